import io

import pytest
from PIL import Image

from sr4ir_dist import checkpoint, experiments
from sr4ir_dist.analysis.comparison import COLUMNS, write_comparison
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.overrides import override
from sr4ir_dist.training import state
from sr4ir_dist.training.build import build_networks, make_setup

SIZE = ["data.resize=32", "data.crop=32", "evaluation.border=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("drawn") / "data")
    convert(DRAWN, open_drawn(train_count=8, val_count=8, size=32), uri, threads=1)
    return uri


def publish(name, settings, folder):
    experiment = override(experiments.make(name), [*SIZE, *settings, "task.classes=8"])
    setup = make_setup(experiment, build_networks(experiment), engine="none")
    return checkpoint.publish(str(folder), 1, state.snapshot(setup, state.Progress()))


def test_a_picture_has_a_row_an_image_and_its_last_column_is_hr(data, tmp_path):
    saved = publish("drawn_cls/edsr-x4/sr4ir", ["sr.blocks=1", "sr.features=8"], tmp_path)
    out = tmp_path / "picture.png"
    write_comparison(saved, str(out), data=data, count=3)
    picture = Image.open(io.BytesIO(out.read_bytes())).convert("RGB")
    cell = 192 + 4
    assert picture.width == len(COLUMNS) * cell + 4
    assert 3 * cell < picture.height < 3 * cell + 40
    lr, bilinear, sr, hr = (
        picture.crop((4 + n * cell, picture.height - cell, n * cell + cell, picture.height - 4))
        for n in range(len(COLUMNS))
    )
    first = hr.resize((32, 32), Image.Resampling.NEAREST)
    assert first.resize(hr.size, Image.Resampling.NEAREST).tobytes() == hr.tobytes()
    assert len({image.tobytes() for image in (lr, bilinear, sr, hr)}) == 4


def test_a_checkpoint_without_an_sr_network_is_refused(data, tmp_path):
    saved = publish("drawn_cls/h2t", [], tmp_path)
    with pytest.raises(ValueError, match="drawn_cls/h2t has no SR network"):
        write_comparison(saved, str(tmp_path / "picture.png"), data=data)
