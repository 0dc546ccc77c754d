"""A search on a Ray cluster: started, followed, and continued after its driver died."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
import ray.tune
from ray.tune.experiment import Trial

from sr4ir_dist import storage
from sr4ir_dist.config import Experiment, ExperimentError
from sr4ir_dist.hub.names import is_name
from sr4ir_dist.hub.versions import resolve
from sr4ir_dist.networks import published
from sr4ir_dist.training import capacity
from sr4ir_dist.tuning.deadline import Deadline, set_deadline
from sr4ir_dist.tuning.outcome import Outcome, outcomes
from sr4ir_dist.tuning.space import Space, SpaceError, apply
from sr4ir_dist.tuning.strategy import make_scheduler, make_searcher, trials
from sr4ir_dist.tuning.trial import Trials, run_trial
from sr4ir_dist.tuning.watch import Watch

_RAY_FOLDER, _RECORD, _DEADLINE = "ray", "search.json", "deadline.json"
# Ray Tune wants something for the trial itself. A part of a CPU would keep a worker from the whole.
_OWN = {"memory": 2.0**20}
_FAILURES = 3
_STARTS = (
    *("sr.weights", "sr.start", "task.weights", "task.start"),
    *("fixed.oracle", "fixed.vgg", "evaluation.lpips"),
)


@dataclass(frozen=True)
class Budget:
    """What a search may take.

    Attributes:
        concurrent: trials at a time; None for as many as the cluster has room for.
        hours: after so many, from this start on, no trial begins or goes on; None for no limit.
    """

    concurrent: int | None = None
    hours: float | None = None


def name_of(space: Space, stem: str, request: Trials) -> str:
    """A search's name: its space's and experiment's, and a digest of all that decides its trials.

    Args:
        space: the space.
        stem: what the space is called.
        request: what all trials have in common; its folder does not count.
    """
    content = json.dumps(_record(space, request)["decides"], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return f"{stem}-{request.experiment.name.replace('/', '-')}-{digest}"


def search(
    space: Space,
    request: Trials,
    budget: Budget,
    *,
    resume: bool,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Search a space to its end or its budget.

    Args:
        space: from `space.load_space`, checked.
        request: what all trials have in common.
        budget: what it may take.
        resume: continue a search that was interrupted: finished trials are kept, the others go on
            from their checkpoints.
        say: is told what happens; a table of the trials is printed every now and then.

    Returns:
        All trials.

    Raises:
        SpaceError: there is such a search already, or none to resume.
        ExperimentError: the cluster has not what a trial asks for.
        StorageError: the storage cannot be written.
    """
    _check_start(space, request, resume=resume)
    most = concurrent(request.resources)
    storage.check_writable(request.folder)
    if budget.concurrent is not None:
        most = min(most, budget.concurrent)
    set_deadline(storage.join(request.folder, _DEADLINE), budget.hours)
    tuner = _tuner(space, request, most)
    say(f"up to {most} trials at a time, of {request.resources.workers} worker(s) each")
    found = outcomes(tuner.fit(), request)
    begun = sum(bool(trial.history or trial.error) for trial in found)
    if space.search.name != "grid" and begun < space.trials:
        say(f"{begun} of {space.trials} trials; the same command with --resume goes on")
    return found


def rooted(experiment: Experiment) -> Experiment:
    """The experiment with the places that its networks start from as any node can read them.

    Raises:
        HubError: a name is not in the hub.
    """
    tree = experiment.model_dump()
    values = {}
    for path in _STARTS:
        group, field = path.split(".")
        value = (tree[group] or {}).get(field)
        if value is not None and not published.is_name(value):
            values[path] = resolve(value) if is_name(value) else storage.absolute(value)
    return apply(experiment, values)


def settled(resources: capacity.Resources) -> capacity.Resources:
    """What each trial takes, in numbers: a CPU a worker, or its share of the CPUs beside a GPU.

    Raises:
        ExperimentError: the cluster has not what a trial asks for.
    """
    found = capacity.check_resources(replace(resources, cpus=resources.cpus or 1))
    if found.gpu and resources.cpus is None:
        cluster = ray.cluster_resources()
        return replace(found, cpus=max(1, int(cluster["CPU"]) // int(cluster["GPU"])))
    return found


def concurrent(resources: capacity.Resources) -> int:
    """How many trials the cluster has room for.

    Raises:
        ExperimentError: not even for one.
    """
    capacity.check_resources(resources)
    count = 1
    while True:
        more = replace(resources, workers=resources.workers * (count + 1))
        try:
            capacity.check_resources(more)
        except ExperimentError:
            return count
        count += 1


def _check_start(space: Space, request: Trials, *, resume: bool) -> None:
    """Check that there is a search to resume, and that it is this one; or that there is none."""
    record = storage.join(request.folder, _RECORD)
    started = storage.exists(record)
    if resume and not started:
        raise SpaceError(f"{request.folder}: there is no search to resume")
    if started and not resume:
        raise SpaceError(
            f"{request.folder}: this search was started before; continue it with --resume, or "
            "begin another one with --name"
        )
    if started:
        wanted = json.loads(json.dumps(_record(space, request)["decides"]))
        other = _difference(storage.read_json(record)["decides"], wanted, "")
        if other is not None:
            raise SpaceError(f"{request.folder}: the search that was started has {other}")


def _difference(kept: Any, wanted: Any, path: str) -> str | None:
    """The first value in which two trees differ."""
    if isinstance(kept, dict) and isinstance(wanted, dict):
        for key in (kept | wanted).keys():
            found = _difference(kept.get(key), wanted.get(key), f"{path}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if kept == wanted else f"{path}={kept!r:.200}, not {wanted!r:.200}"


def _tuner(space: Space, request: Trials, most: int) -> ray.tune.Tuner:
    """The search as it was kept, or from its beginning."""
    filesystem, path = storage.filesystem(request.folder)
    trainable = ray.tune.with_resources(ray.tune.with_parameters(run_trial, trials=request), _OWN)
    if storage.exists(storage.join(request.folder, _RAY_FOLDER, "tuner.pkl")):
        # What Ray keeps is pickled: it is read from the storage that this search was kept in.
        return ray.tune.Tuner.restore(
            f"{path}/{_RAY_FOLDER}",
            trainable=trainable,
            resume_errored=True,
            storage_filesystem=filesystem,
        )
    searcher, param_space = make_searcher(space)
    tuner = ray.tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=make_scheduler(space, request.experiment.epochs),
            num_samples=trials(space),
            max_concurrent_trials=most,
            trial_dirname_creator=_folder_of,
        ),
        run_config=ray.tune.RunConfig(
            name=_RAY_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.tune.FailureConfig(max_failures=_FAILURES),
            checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=4),
            callbacks=[Watch(space, request.experiment.epochs)],
            stop=Deadline(storage.join(request.folder, _DEADLINE)),
            verbose=0,
        ),
    )
    storage.write_json(storage.join(request.folder, _RECORD), _record(space, request))
    return tuner


def _record(space: Space, request: Trials) -> dict[str, Any]:
    """What a search is, for people and for its name."""
    return {
        "decides": {
            "space": space.model_dump(mode="json"),
            "experiment": request.experiment.model_dump(mode="json"),
            "data": request.data,
            "workers": request.resources.workers,
        },
        "resources": asdict(request.resources),
    }


def _folder_of(trial: Trial) -> str:
    # Ray's own names hold the values, which may be longer than a file's name may be.
    return trial.trial_id
