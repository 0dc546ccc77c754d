from collections.abc import Callable
from pathlib import Path

import pytest

from sr4ir_dist import storage
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.doctor import dataset


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A drawn dataset of 8 images to train on and 4 to judge on."""
    converter = CONVERTERS["drawn"]
    source = converter.open(train_count=8, val_count=4, size=32, seed=0)
    convert(converter, source, str(tmp_path / "drawn"))
    return tmp_path / "drawn"


def test_data_that_are_ready(drawn: Path, s3: Callable[[], str]):
    bucket = s3()
    for name in storage.list_files(drawn):
        storage.upload(drawn / name, storage.join(bucket, name))
    for uri in (str(drawn), bucket):
        train, val, shard = dataset.findings(uri)
        assert {each.status for each in (train, val, shard)} == {"ok"}
        assert "8 rows in 1 shard(s)" in train.told
        assert "format 2" in train.told
        assert "4 rows" in val.told
        assert "digest is right" in shard.told


def test_data_that_are_not_there(tmp_path: Path):
    for found in dataset.findings(str(tmp_path)):
        assert found.status == "fail"
        assert "no manifest" in found.told
        assert "prepare_data" in found.mend


def test_a_manifest_that_was_altered(drawn: Path):
    path = drawn / "val" / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 99'))
    train, val, _ = dataset.findings(str(drawn))
    assert (train.status, val.status) == ("ok", "fail")
    assert "manifest.json: truncated or altered" in val.told


def test_a_shard_that_was_altered(drawn: Path):
    (path,) = (drawn / "train").glob("*.arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    train, _, shard = dataset.findings(str(drawn))
    assert (train.status, shard.status) == ("ok", "fail")
    assert path.name in shard.told
