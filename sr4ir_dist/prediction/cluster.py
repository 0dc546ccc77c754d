"""Parts of a prediction on the workers of a Ray cluster, by Ray Data."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.exceptions import RayError, UserCodeException
from ray.util.annotations import RayDeprecationWarning

from sr4ir_dist.parallel import ClusterError
from sr4ir_dist.prediction.inputs import InputImage
from sr4ir_dist.prediction.parts import PartWorker
from sr4ir_dist.prediction.plan import Part, Plan
from sr4ir_dist.prediction.run import Run
from sr4ir_dist.training.capacity import Resources, check_resources

# A part is begun again so often because its worker or its node died; what it raises is final.
_RESTARTS = 5
# Ray Data holds a reference and some statistics for each block.
_MOST_BLOCKS = 1000


def on_cluster(resources: Resources) -> Run:
    """Run parts on workers of the cluster that `parallel.connect` joined.

    Each worker is an actor that loads the networks once. What travels is where images are, not
    what they show: workers read and write the storage themselves. A worker that dies, or whose node
    does, is started again, and the part that it had is too.

    Args:
        resources: how many workers, and what each takes.

    Raises:
        ExperimentError: the cluster has not what is asked for.
    """
    given = check_resources(resources)

    def run(plan: Plan, parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
        with _quiet():
            # As text: Ray Data would make columns of what is in it.
            rows = [{"part": json.dumps(_as_value(part))} for part in parts]
            dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS))
            with warnings.catch_warnings():
                # There is no other way yet to say `max_task_retries`, without which an image that
                # kills its worker would be tried for ever.
                warnings.simplefilter("ignore", RayDeprecationWarning)
                done = dataset.map_batches(
                    _Worker,
                    fn_constructor_args=(plan, given.cpus, bool(given.gpu)),
                    batch_size=1,
                    compute=ray.data.ActorPoolStrategy(size=min(given.workers, len(parts))),
                    num_cpus=given.cpus,
                    num_gpus=1 if given.gpu else 0,
                    max_task_retries=_RESTARTS,
                )
            try:
                for row in done.iter_rows():
                    yield json.loads(row["record"])
            except UserCodeException as error:
                raise (error.__cause__ or error) from None
            except RayError as error:
                raise ClusterError(f"the Ray cluster lost a worker too often: {error}") from error

    return run


class _Worker:
    """A worker's networks, and what Ray Data calls with one part at a time."""

    def __init__(self, plan: Plan, threads: int, gpu: bool) -> None:
        device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        self._worker = PartWorker(plan, threads=threads, device=device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        parts = [_from_value(json.loads(str(text))) for text in batch["part"]]
        # The driver needs to know what was skipped, not what was found.
        kept = ("path", "skipped")
        briefs = [
            {"images": [{k: e[k] for k in kept if k in e} for e in record["images"]]}
            for record in map(self._worker.predict, parts)
        ]
        return {"record": [json.dumps(brief) for brief in briefs]}


def _as_value(part: Part) -> list[Any]:
    return [part.number, [[image.uri, image.path, image.name] for image in part.images]]


def _from_value(value: list[Any]) -> Part:
    number, images = value
    return Part(number, tuple(InputImage(*image) for image in images))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Data from telling its own progress, on stdout and in logs, beside ours."""
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    names = ("enable_progress_bars", "print_on_execution_start")
    before, level = {name: getattr(context, name) for name in names}, log.level
    for name in names:
        setattr(context, name, False)
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        log.setLevel(level)
