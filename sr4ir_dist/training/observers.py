"""Who is told how a run goes: TensorBoard, Ray's metrics, and whatever a user adds."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from sr4ir_dist import storage
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.training.mirror import Mirror
from sr4ir_dist.training.plan import Plan


class Observer(Protocol):
    """Hears of a run on its rank 0."""

    def logged(self, step: int, figures: Mapping[str, float]) -> None:
        """Take losses, learning rates and throughput after a step of the run."""
        ...

    def evaluated(self, step: int, figures: Mapping[str, Any]) -> None:
        """Take an evaluation's figures after a step of the run."""
        ...

    def close(self) -> None:
        """The run ends here, or goes on elsewhere."""
        ...


class TensorBoard:
    """Writes event files for TensorBoard into the run's folder `tensorboard`.

    Args:
        plan: the run.
        step: steps that are done; what an attempt before wrote of later ones is hidden.
        mirror: copies the file to the run's storage.
    """

    def __init__(self, plan: Plan, step: int, mirror: Mirror) -> None:
        # Takes a second to import, which ranks that write nothing need not wait for.
        from tensorboardX import SummaryWriter

        folder = mirror.folder / "tensorboard"
        self._writer = SummaryWriter(
            str(folder), purge_step=step + 1, flush_secs=20, filename_suffix=f".{step}"
        )
        self._writer.add_text("experiment", plan.experiment.model_dump_json(indent=2), step)
        self._writer.flush()
        for path in folder.iterdir():
            mirror.add(path, storage.join(plan.run_uri, "tensorboard", path.name))

    def logged(self, step: int, figures: Mapping[str, float]) -> None:
        """Write them under `training`."""
        self._write("training", step, figures)

    def evaluated(self, step: int, figures: Mapping[str, Any]) -> None:
        """Write them under `validation`."""
        self._write("validation", step, figures)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()

    def _write(self, group: str, step: int, figures: Mapping[str, Any]) -> None:
        for name, value in figures.items():
            if isinstance(value, int | float) and name not in ("epoch", "step"):
                self._writer.add_scalar(f"{group}/{name}", value, step)


class RayMetrics:
    """Gauges `sr4ir_<figure>` among Ray's metrics for Prometheus, by run."""

    def __init__(self, plan: Plan) -> None:
        self._tags = {"run": plan.run}
        self._gauges: dict[str, Any] = {}

    def logged(self, step: int, figures: Mapping[str, float]) -> None:
        """Set the gauges."""
        from ray.util.metrics import Gauge

        for name, value in {"step": step, **figures}.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"sr4ir_{name}", f"{name} of a run", tag_keys=("run",))
            self._gauges[name].set(value, self._tags)

    def evaluated(self, step: int, figures: Mapping[str, Any]) -> None:
        """Set the gauges."""
        numbers = {
            name: float(value)
            for name, value in figures.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self.logged(step, {name: each for name, each in numbers.items() if name != "step"})

    def close(self) -> None:
        """Nothing is left to do."""


class Observers:
    """Tells several observers; one that fails is told no more, and the run goes on.

    Args:
        observers: who is told.
        say: is told who failed, and why.
    """

    def __init__(self, observers: Sequence[Observer], say: Callable[[str], None]) -> None:
        self._observers, self._say = list(observers), say

    def logged(self, step: int, figures: Mapping[str, float]) -> None:
        """Tell losses, learning rates and throughput."""
        self._tell(lambda each: each.logged(step, figures))

    def evaluated(self, step: int, figures: Mapping[str, Any]) -> None:
        """Tell an evaluation's figures."""
        self._tell(lambda each: each.evaluated(step, figures))

    def close(self) -> None:
        """Tell that this is the end."""
        self._tell(lambda each: each.close())

    def _tell(self, tell: Callable[[Observer], None]) -> None:
        for each in list(self._observers):
            try:
                tell(each)
            except Exception as error:
                name = type(each).__name__
                self._say(f"{name} is told no more: {type(error).__name__}: {error}")
                self._observers.remove(each)


def load_callback(name: str) -> Callable[[Plan], Observer]:
    """What makes an observer for a run, by `module:name`; the working directory is searched too.

    Raises:
        ExperimentError: there is no such module, or nothing of that name to call in it.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ExperimentError(
            f"callback={name!r}: expected module:name of something that takes a plan and returns "
            f"an observer: {error}"
        ) from error
    if not callable(found):
        raise ExperimentError(f"callback={name!r} cannot be called")
    return cast(Callable[[Plan], Observer], found)
