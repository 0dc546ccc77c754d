import io

import numpy as np
import pytest
import torch
from PIL import Image

from sr4ir_dist.analysis.comparison import compare, figures, rows, write_figure
from sr4ir_dist.analysis.loaded import load, samples
from sr4ir_dist.analysis.overlays import Overlay, drawn, true
from sr4ir_dist.tasks.palette import voc_palette

SR4IR, L2T, H2T = "drawn_{}/edsr-x4/sr4ir", "drawn_{}/x4/l2t", "drawn_{}/h2t"


def small(cell):
    """A cell's image at the size it had before it was enlarged."""
    return np.asarray(cell.image.resize((32, 32), Image.Resampling.NEAREST))


def test_every_method_is_a_column_and_every_image_a_row(published, small_data, tmp_path):
    runs = {"L->T": published(L2T.format("cls")), "SR4IR": published(SR4IR.format("cls"))}
    compared = compare(runs)
    assert compared.titles == ("LR", "bilinear", "L->T", "SR4IR", "HR")
    out = tmp_path / "figure.png"
    seen = []
    names = write_figure(compared, str(out), count=3, told=seen.append)
    assert len(set(names)) == 3
    assert seen == [1, 2, 3]
    picture = Image.open(io.BytesIO(out.read_bytes()))
    assert picture.width == 5 * (192 + 6) + 6
    assert 3 * 192 < picture.height < 4 * 192


def test_columns_show_what_the_networks_see(published):
    compared = compare({"SR4IR": published(SR4IR.format("cls"))})
    (row,) = rows(compared, [2], overlay=False)
    loaded = load(compared.loaded["SR4IR"].uri)
    with torch.no_grad():
        *_, sample = samples(loaded, count=3)
        sr = sample.views.image("sr")[0].clamp(0, 1)
    assert row.id == sample.id
    lr, bilinear, shown, hr = row.cells
    assert (small(hr) == (sample.inputs.hr[0] * 255).round().permute(1, 2, 0).numpy()).all()
    assert abs(small(shown) / 255 - sr.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    assert (small(lr)[::4, ::4] == small(lr)[3::4, 3::4]).all()
    assert len({cell.image.tobytes() for cell in row.cells}) == 4
    assert not any(cell.caption for cell in row.cells)
    for _ in rows(compared, [0, 1]):
        assert torch.is_grad_enabled()


def test_classes_are_written_below_and_wrong_ones_in_red(published):
    compared = compare({"SR4IR": published(SR4IR.format("cls"))})
    captions = []
    for row in rows(compared, range(8)):
        (*_, shown, hr) = row.cells
        name = hr.caption.removeprefix("true: ")
        assert name in compared.names
        assert shown.right == shown.caption.startswith(f"{name} ")
        assert shown.right != shown.caption.startswith("wrong: ")
        captions.append(shown.right)
    assert False in captions


def test_masks_are_blended_in_the_palette():
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[0, :4] = 3
    picture = np.asarray(drawn(torch.full((3, 8, 8), 0.5), Overlay(mask=mask[0])))
    upper, lower = picture[0, 0], picture[-1, 0]
    assert (lower == 128).all()
    assert np.allclose(upper, 0.45 * 128 + 0.55 * np.array(voc_palette()[3]), atol=1.5)


@pytest.mark.parametrize("task", ["seg", "det"])
def test_overlays_are_drawn_where_they_are_asked_for(published, task):
    compared = compare({"SR4IR": published(SR4IR.format(task))})
    plain, overlaid = (next(rows(compared, [0], overlay=each)) for each in (False, True))
    assert plain.cells[0].image.tobytes() == overlaid.cells[0].image.tobytes()
    assert plain.cells[-1].image.tobytes() != overlaid.cells[-1].image.tobytes()


def test_boxes_are_drawn_where_the_objects_are(published):
    compared = compare({"H->T": published(H2T.format("det"))})
    assert compared.titles == ("H->T", "HR")
    loaded = compared.loaded["H->T"]
    (sample,) = samples(loaded, count=1)
    assert loaded.setup.task is not None
    overlay = true(loaded.setup.task, sample.inputs.targets, compared.names)
    before, after = (
        np.asarray(drawn(sample.inputs.hr[0], each)).astype(int) for each in (Overlay(), overlay)
    )
    changed = abs(before - after).sum(axis=2) > 0
    x0, y0, x1, y1 = (sample.inputs.targets[0]["boxes"][0] * 6).round().int().tolist()
    assert changed[y0 : y1 + 1, min(x0, 190)].mean() > 0.9
    assert changed[min(y1, 190), x0 : x1 + 1].mean() > 0.9


def test_figures_of_single_images(published):
    compared = compare({"S": published("drawn_cls/edsr-x4/s"), "T": published(SR4IR.format("cls"))})
    psnr = figures(compared, "S", 4)
    assert len(psnr) == 4
    assert all(0 < value < 60 for value in psnr)
    shares = figures(compared, "T", None)
    assert len(shares) == 8
    assert all(0 <= value <= 100 for value in shares)


def test_checkpoints_that_do_not_see_the_same_images_are_refused(published):
    x4 = published(SR4IR.format("cls"))
    with pytest.raises(ValueError, match="scale of b is 8, but that of a is 4"):
        compare({"a": x4, "b": published("drawn_cls/x8/l2t")})
    with pytest.raises(ValueError, match="task of b is mask, but that of a is label"):
        compare({"a": x4, "b": published(SR4IR.format("seg"))})
    with pytest.raises(ValueError, match="degradation of b is .*blur=5.0, but that of a"):
        compare({"a": x4, "b": published("drawn_cls/edsr-x4-blur5/sr4ir")})
    other = published(L2T.format("cls"), "data.resize=48", "data.crop=48")
    with pytest.raises(ValueError, match="b sees .* at 48x48, but a sees .* at 32x32"):
        list(rows(compare({"a": x4, "b": other}), [0]))
    with pytest.raises(ValueError, match="neither a checkpoint nor a run"):
        compare({"a": f"{x4}-none"})
