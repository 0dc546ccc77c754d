import io

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from sr4ir_dist import storage
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.prediction.inputs import PredictionError, list_inputs, read_image

# Smooth, so that lossy formats keep it; no two corners are alike.
PIXELS = np.stack(np.broadcast_arrays(*np.ogrid[0:240:20j, 0:200:12j], 90), 2).astype(np.uint8)


def saved(path, picture, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **settings)
    return str(path)


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_images_are_turned_as_their_tag_says(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    lossless = {"lossless": True} if suffix == "webp" else {}
    uri = saved(tmp_path / f"a.{suffix}", Image.fromarray(PIXELS), exif=exif, **lossless)
    with Image.open(uri) as picture:
        seen = np.array(ImageOps.exif_transpose(picture).convert("RGB")).astype(int)
    assert seen.shape[0] == (20 if orientation < 5 else 12)
    read = read_image(uri)
    assert read.dtype == torch.uint8
    assert read.is_contiguous()
    found = read.permute(1, 2, 0).numpy()
    assert found.shape == seen.shape
    assert np.abs(found - seen).max() <= (3 if suffix == "jpg" else 0)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *[(f"a.{suffix}", "RGB") for suffix in ("png", "bmp", "tif", "gif", "JPEG")],
        *[(f"a.{suffix}", "RGBA") for suffix in ("png", "webp", "tiff")],
        *[(f"a.{suffix}", "P") for suffix in ("png", "gif", "bmp")],
        *[(f"a.{suffix}", "L") for suffix in ("png", "jpg", "tif")],
        *[(f"a.{suffix}", "1") for suffix in ("png", "tif")],
        ("a.jpg", "CMYK"),
    ],
)
def test_common_formats_and_modes_become_rgb(tmp_path, name, mode):
    uri = saved(tmp_path / name, Image.fromarray(PIXELS).convert(mode))
    with Image.open(uri) as picture:
        expected = np.array(picture.convert("RGB")).astype(int)
    found = read_image(uri).permute(1, 2, 0).numpy()
    assert found.shape == (20, 12, 3)
    assert np.abs(found - expected).max() <= (4 if name.lower().endswith(("jpg", "jpeg")) else 0)


def test_sixteen_bits_become_eight_and_a_gif_its_first_frame(tmp_path):
    grey = np.linspace(0, 65535, 240).round().astype(np.uint16).reshape(20, 12)
    for name in ("deep.png", "deep.tif"):
        read = read_image(saved(tmp_path / name, Image.fromarray(grey)))
        assert torch.equal(read[0], torch.from_numpy((grey / 257).round().astype(np.uint8)))
    frames = [Image.new("RGB", (12, 20), colour) for colour in ("red", "blue")]
    uri = saved(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    assert read_image(uri)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8nonsense", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"text"]
)
def test_what_is_no_image_is_named(tmp_path, data):
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(DatasetError, match=r"bad.png: no readable image"):
        read_image(str(tmp_path / "bad.png"))
    with pytest.raises(DatasetError, match="none.png"):
        read_image(str(tmp_path / "none.png"))


def test_a_cut_off_image_is_named(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, "PNG")
    (tmp_path / "half.png").write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    with pytest.raises(DatasetError, match="half.png"):
        read_image(str(tmp_path / "half.png"))


def test_a_folder_is_mirrored_and_equal_stems_stay_apart(tmp_path):
    files = ["b/1.png", "a/1.JPG", "a/1.png", "a/1.jpg.png", "a/2.v1.gif", "c.webp"]
    touch(tmp_path, *files, "a/notes.md", ".hidden/3.png")
    images, notes = list_inputs(str(tmp_path))
    assert [image.path for image in images] == sorted(files)
    names = {image.path: image.name for image in images}
    assert names == {
        "a/1.JPG": "a/1.JPG",
        "a/1.jpg.png": "a/1.jpg",
        "a/1.png": "a/1.png",
        "a/2.v1.gif": "a/2.v1",
        "b/1.png": "b/1",
        "c.webp": "c",
    }
    assert [image.uri for image in images] == [f"{tmp_path}/{path}" for path in sorted(files)]
    assert notes == ("1 files that are no images were left out",)


def test_names_that_clash_with_full_names_stay_apart(tmp_path):
    touch(tmp_path, "a.jpg", "a.png", "a.jpg.webp")
    images, _ = list_inputs(str(tmp_path))
    assert [image.name for image in images] == ["a.jpg", "a.jpg.webp", "a.png"]


def test_a_list_keeps_its_order_and_its_folders(tmp_path):
    listed = ["x/b/2.png", f"{tmp_path}/x/a/1.png", "", "  x/c.jpg ", "./x/a/../a/1.png"]
    (tmp_path / "some.txt").write_text("\n".join(listed))
    images, notes = list_inputs(str(tmp_path / "some.txt"))
    assert [image.path for image in images] == ["b/2.png", "a/1.png", "c.jpg"]
    assert [image.uri for image in images] == [
        f"{tmp_path}/x/{path}" for path in ("b/2.png", "a/1.png", "c.jpg")
    ]
    assert notes == ("1 lines that name an image again were left out",)


def test_a_list_may_name_places_of_several_kinds(s3, tmp_path):
    bucket = s3()
    listed = [f"{bucket}/in/1.png", "s3://other/1.png", f"file://{tmp_path}/1.png"]
    storage.write_bytes(f"{bucket}/lists/a.txt", "\n".join([*listed, "near.png"]).encode())
    images, _ = list_inputs(f"{bucket}/lists/a.txt")
    local = f"{tmp_path}/1.png"
    assert [image.uri for image in images] == [*listed[:2], local, f"{bucket}/lists/near.png"]
    assert len({image.name for image in images}) == 4
    assert images[1].path == "other/1.png"


def test_one_image_is_an_input_too(tmp_path):
    (image,), notes = list_inputs(str(touch(tmp_path, "a/One.PNG") / "a" / "One.PNG"))
    assert (image.path, image.name, notes) == ("One.PNG", "One", ())


def test_what_names_no_image_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        list_inputs(str(tmp_path / "none"))
    touch(tmp_path, "folder/notes.md", "empty.txt")
    with pytest.raises(PredictionError, match=r"folder names no images \(\.jpg, .*\.gif\)"):
        list_inputs(str(tmp_path / "folder"))
    with pytest.raises(PredictionError, match="empty.txt names no images"):
        list_inputs(str(tmp_path / "empty.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PredictionError, match="binary.txt: not a text file"):
        list_inputs(str(tmp_path / "binary.txt"))
    (tmp_path / "up.txt").write_text("s3://bucket/a/../../x.png\ns3://bucket/b.png")
    with pytest.raises(PredictionError, match=r"'\.\.'"):
        list_inputs(str(tmp_path / "up.txt"))
