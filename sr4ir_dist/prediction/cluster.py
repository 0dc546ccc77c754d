"""Parts of a prediction on the workers of a Ray cluster, by Ray Data."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.exceptions import RayError

from sr4ir_dist.parallel import ClusterError
from sr4ir_dist.prediction.inputs import InputImage, PredictionError
from sr4ir_dist.prediction.parts import PartWorker
from sr4ir_dist.prediction.plan import Part, Plan
from sr4ir_dist.prediction.run import Run
from sr4ir_dist.training.capacity import Resources, check_resources

# A part is begun again so often because its worker or its node died, and a worker is started again
# so often; what it raises is final.
_RETRIES, _RESTARTS = 5, 20
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
        log = logging.getLogger("ray.data")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns that its progress bars are switched off
        try:
            for row in _records(plan, parts, given).iter_rows():
                record = json.loads(row["record"])
                if "error" in record:
                    raise PredictionError(record["error"])
                yield record
        except RayError as error:
            raise ClusterError(
                f"the Ray cluster lost a worker too often: {error}; is an image too "
                "large for its memory (--tile, --most-pixels)?"
            ) from error
        finally:
            log.setLevel(level)

    return run


def _records(plan: Plan, parts: Sequence[Part], given: Resources) -> ray.data.Dataset:
    """The records of parts, which are made when it is read; Ray Data does not tell of itself."""
    # As text: Ray Data would make columns of what is in it.
    rows = [{"part": json.dumps(_as_value(part))} for part in parts]
    with warnings.catch_warnings():
        # Ray Data warns of settings of its own, and of these retries, for which there is no other
        # way yet; without them an image that kills its worker would be tried for ever.
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS))
        dataset = dataset.map_batches(
            _Worker,
            fn_constructor_args=(plan, given.cpus, bool(given.gpu)),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(given.workers, len(parts))),
            num_cpus=given.cpus,
            num_gpus=1 if given.gpu else 0,
            max_restarts=_RESTARTS,
            max_task_retries=_RETRIES,
        )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset


class _Worker:
    """A worker's networks, and what Ray Data calls with one part at a time."""

    def __init__(self, plan: Plan, threads: int, gpu: bool) -> None:
        self._plan, self._threads = plan, threads
        self._device = torch.device("cuda", 0) if gpu else torch.device("cpu")

    @cached_property
    def _worker(self) -> PartWorker:
        return PartWorker(self._plan, threads=self._threads, device=self._device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        return {"record": [json.dumps(self._brief(str(text))) for text in batch["part"]]}

    def _brief(self, part: str) -> dict[str, Any]:
        """What the driver needs to know of a part: what was skipped, not what was found."""
        try:
            record = self._worker.predict(_from_value(json.loads(part)))
        except ValueError as error:
            # Ray Data would tell it in pages of stack traces, and add to the message.
            return {"error": str(error)}
        kept = ("path", "skipped")
        return {"images": [{k: e[k] for k in kept if k in e} for e in record["images"]]}


def _as_value(part: Part) -> list[Any]:
    return [part.number, [[image.uri, image.path, image.name] for image in part.images]]


def _from_value(value: list[Any]) -> Part:
    number, images = value
    return Part(number, tuple(InputImage(*image) for image in images))
