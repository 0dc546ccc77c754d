"""Two rank processes that train together, and small drawn datasets."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from sr4ir_dist.benchmark.processes import run_together
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.source import Source
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.data.shards import ShardReader, load_manifest
from sr4ir_dist.data.synthetic import CLASS_NAMES

RANKS = 2


@dataclass(frozen=True)
class RankResults:
    """What the rank processes found, by rank, and the folder with the checkpoints they wrote."""

    by_rank: tuple[dict[str, Any], ...]
    folder: Path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A drawn dataset of 32x32 images: 40 to train on, 9 to judge on."""
    uri = str(tmp_path_factory.mktemp("drawn") / "data")
    convert(DRAWN, open_drawn(train_count=40, val_count=9, size=32, seed=3), uri, threads=1)
    return uri


@pytest.fixture(scope="session")
def flawed(drawn: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The drawn dataset with images cut short, 3 to train on and 1 to judge on, to be skipped."""
    uri = str(tmp_path_factory.mktemp("flawed") / "data")
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, bad in (("train", {3, 17, 18}), ("val", {2})):
        (shard,) = load_manifest(drawn, split).shards
        rows[split] = ShardReader(Path(drawn, split, shard.path)).rows(range(shard.rows))
        for row in bad:
            rows[split][row]["image"] = rows[split][row]["image"][:20]
    counts = {split: len(of_split) for split, of_split in rows.items()}
    # Which does not decode them: they went bad after a conversion, so to say.
    source = Source(CLASS_NAMES, counts, rows.__getitem__, dict)
    convert(DRAWN, source, uri, on_bad_row="skip", threads=1)
    return uri


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A drawn dataset of very few images: a detector trains on 512 proposals of each."""
    uri = str(tmp_path_factory.mktemp("few") / "data")
    convert(DRAWN, open_drawn(train_count=8, val_count=7, size=32), uri, threads=1)
    return uri


@pytest.fixture(scope="session")
def two_ranks(
    drawn: str,
    flawed: str,
    few: str,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> RankResults:
    """Runs `rank_process.py` as two processes that train together, once for all test processes."""
    session = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        session = session.parent  # which pytest-xdist's processes share
    folder = session / "two-ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            script = Path(__file__).with_name("rank_process.py")
            words = [sys.executable, "-W", "error", script, folder, drawn, flawed, few, RANKS]
            command = list(map(str, words))
            run_together(command, ranks=RANKS, threads=1, folder=str(folder), limit_s=600)
    results = (torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(RANKS))
    return RankResults(tuple(results), folder)
