import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sr4ir_dist.analysis.comparison import compare
from sr4ir_dist.analysis.extras import need
from sr4ir_dist.analysis.loaded import load, samples
from sr4ir_dist.analysis.tsne import Features, collect, embed, write_scatter


def test_the_gap_is_a_share_of_the_distance_between_images():
    hr = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    shifted = hr + [0.0, 1.0]
    features = Features(("a", "b", "c"), {"HR": hr, "same": hr.copy(), "shifted": shifted})
    assert features.gap("same") == 0
    # Two of three pairs are 5 apart, the third 0.
    assert features.gap("shifted") == pytest.approx(1 / (10 / 3))


@pytest.mark.parametrize("task", ["cls", "seg", "det"])
def test_features_are_the_oracles(published, task):
    oracle = load(published(f"drawn_{task}/h2t"))
    compared = compare({"SR4IR": published(f"drawn_{task}/edsr-x4/sr4ir")})
    features = collect(compared, oracle, count=4)
    assert {label: each.shape[0] for label, each in features.vectors.items()} == {
        "HR": 4,
        "SR4IR": 4,
    }
    (sample,) = samples(oracle, count=1)
    assert oracle.setup.task is not None
    with torch.no_grad():
        views = oracle.setup.task.features(oracle.setup.modules["task"], sample.inputs.hr)
    *_, last = views.values()
    assert features.ids[0] == sample.id
    np.testing.assert_allclose(features.vectors["HR"][0], last.mean(dim=(2, 3))[0], rtol=1e-4)
    assert features.gap("SR4IR") > 0


def test_the_first_checkpoints_own_network_is_the_default(published):
    runs = {"H->T": published("drawn_cls/h2t"), "SR4IR": published("drawn_cls/edsr-x4/sr4ir")}
    compared = compare(runs)
    told = []
    features = collect(compared, count=5, told=told.append)
    assert told == [1, 2, 3, 4, 5]
    assert features.gap("H->T") == 0
    given = collect(compared, load(runs["H->T"]), count=5)
    np.testing.assert_array_equal(features.vectors["SR4IR"], given.vectors["SR4IR"])


def test_the_same_points_every_time_in_a_picture(published, tmp_path):
    compared = compare({"SR4IR": published("drawn_cls/edsr-x4/sr4ir")})
    features = collect(compared)
    places = embed(features)
    for label, part in embed(features).items():
        np.testing.assert_array_equal(part, places[label])
    out = tmp_path / "tsne.png"
    said = write_scatter(features, places, str(out))
    assert Image.open(io.BytesIO(out.read_bytes())).format == "PNG"
    assert len(said["points"]) == 2 * 8
    assert said["gap"] == {"SR4IR": features.gap("SR4IR")}
    assert {point["images"] for point in said["points"]} == {"HR", "SR4IR"}


def test_what_cannot_be_embedded_is_refused(published):
    compared = compare({"S": published("drawn_cls/edsr-x4/s")})
    with pytest.raises(ValueError, match="has no task network .* --oracle"):
        collect(compared)
    with pytest.raises(ValueError, match="2 images are too few"):
        collect(compared, load(published("drawn_cls/h2t")), count=2)
    with pytest.raises(ValueError, match="the label HR"):
        collect(compare({"HR": published("drawn_cls/h2t")}))


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.manifold", raising=False)
    with pytest.raises(ValueError, match=r"sklearn.*pip install -e '.\[analysis\]'"):
        need("sklearn.manifold")
