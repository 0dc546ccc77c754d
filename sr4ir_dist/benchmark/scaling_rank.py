"""One rank of the scaling benchmark: `python -m sr4ir_dist.benchmark.scaling_rank REQUEST RANK`.

Plain processes, so that nothing of Ray is in the figures.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from sr4ir_dist.benchmark.watch import Enough, Watch, link
from sr4ir_dist.config import from_json
from sr4ir_dist.training.build import (
    build_networks,
    make_setup,
    open_loader,
    settle_random_start,
)
from sr4ir_dist.training.loop import Hooks, train
from sr4ir_dist.training.state import Progress


@dataclass(frozen=True)
class Request:
    """What all ranks of a run do.

    Attributes:
        experiment: the experiment as JSON.
        data: URIs of the dataset.
        ranks: how many train together.
        steps: how many are watched, the first ones included.
        threads: of each rank's networks.
        folder: local, for the rendezvous and the results.
    """

    experiment: str
    data: tuple[str, ...]
    ranks: int
    steps: int
    threads: int
    folder: str


def main(request: Request, rank: int) -> None:
    """Train for some steps and write what was watched to FOLDER/rank-RANK.json."""
    torch.set_num_threads(request.threads)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{request.folder}/rendezvous",
        rank=rank,
        world_size=request.ranks,
    )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    watch = Watch()
    with watch.installed():
        _train(watch, request, rank)
    record: dict[str, Any] = {"steps": [asdict(step) for step in watch.steps], "link": None}
    if request.ranks > 1:
        record["link"] = link()
    Path(request.folder, f"rank-{rank}.json").write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


def _train(watch: Watch, request: Request, rank: int) -> None:
    experiment = from_json(request.experiment.encode())
    modules = build_networks(experiment, torch.device("cpu"))
    if "task" in modules:
        settle_random_start(experiment, modules["task"], request.data)
    setup = make_setup(experiment, modules, rank=rank, world_size=request.ranks)
    with open_loader(setup, request.data, "train") as loader:
        watched = cast(Any, watch.loader(loader, request.steps))
        try:
            train(setup, watched, loader, Progress(), Hooks(publish=lambda progress: None))
        except Enough:
            return


if __name__ == "__main__":
    main(Request(**json.loads(sys.argv[1])), int(sys.argv[2]))
