"""Train an experiment on Ray: `python jobs/train.py --help`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from sr4ir_dist import experiments, parallel, recipes, storage
from sr4ir_dist.analysis.seeds import over_seeds
from sr4ir_dist.cli import (
    Address,
    CacheDir,
    Cpus,
    Gpu,
    JsonFile,
    Settings,
    console,
    make_app,
    refuse_job_folder,
    result_table,
    say,
    user_errors,
    write_result,
)
from sr4ir_dist.config import Experiment, ExperimentError, from_json
from sr4ir_dist.overrides import override

app = make_app()


@app.command()
def main(
    name: Annotated[
        str | None,
        typer.Argument(help="Experiment, such as `drawn_cls/edsr-x4/sr4ir`; see --list."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Dataset made by prepare_data.py: a path or `s3://` URI; repeat it to train on a "
            "mix of several."
        ),
    ] = None,
    storage_uri: Annotated[
        str, typer.Option("--storage", help="Where runs are kept: a path or `s3://` URI.")
    ] = "runs",
    settings: Settings = None,
    experiment_file: Annotated[
        str | None,
        typer.Option("--experiment", help="Take it from a JSON file (path or URI), not by name."),
    ] = None,
    workers: Annotated[
        str,
        typer.Option(
            help="Ranks that train together: a number, or `LEAST:MOST` to go on with fewer of them "
            "when nodes are lost and with more when nodes come."
        ),
    ] = "1",
    cpus: Cpus = None,
    gpu: Gpu = None,
    large_batch: Annotated[
        int | None,
        typer.Option(
            help="Train on so many images a step, with learning rates scaled to match: SGD's by "
            "the factor, AdamW's by its square root, both rising over the first 5 epochs."
        ),
    ] = None,
    max_failures: Annotated[int, typer.Option(help="Restarts without a new checkpoint.")] = 3,
    wait_minutes: Annotated[
        float, typer.Option(min=0, help="How long to wait for nodes that an autoscaler adds.")
    ] = 0,
    rank_timeout: Annotated[
        float,
        typer.Option(min=10, help="Seconds that ranks wait for one another before a restart."),
    ] = 600,
    callback: Annotated[
        list[str] | None,
        typer.Option(
            help="`module:name` that takes the plan and returns an observer, to be told of losses "
            "and evaluations beside TensorBoard; may be repeated."
        ),
    ] = None,
    address: Address = None,
    cache_dir: CacheDir = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of progress.")] = 10,
    seeds: Annotated[
        str | None,
        typer.Option(help="Train once with each seed, such as 1,2,3; report mean and spread."),
    ] = None,
    json_file: JsonFile = None,
    list_names: Annotated[
        bool,
        typer.Option("--list", help="List data, networks and recipes, or what NAME is part of."),
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the experiment and end.")] = False,
) -> None:
    """Train an experiment on Ray Train workers with DeepSpeed.

    The same command again continues an interrupted run, or says that it is finished. Changed
    settings or data make another run. Without a cluster, Ray starts on this machine:

        python jobs/prepare_data.py drawn --out datasets/drawn

        python jobs/train.py drawn_cls/edsr-x4/sr4ir --data datasets/drawn --workers 2
    """
    with user_errors():
        if list_names:
            _list(name)
            return
        experiment = _experiment(name, experiment_file, large_batch, settings or [])
        if show:
            _show(experiment)
            return
    if not data:
        raise typer.BadParameter("--data is missing: make a dataset with jobs/prepare_data.py")

    # Ray and torch take seconds to import, which --help and --list need not wait for.
    from sr4ir_dist.training import launch
    from sr4ir_dist.training.first_step import Marks, process_began
    from sr4ir_dist.training.judged_again import Lacking, add_lpips, lacking_weights
    from sr4ir_dist.training.plan import make_plan

    marks = Marks(process_began()).after("imports")
    with user_errors(launch.TrainingError):
        refuse_job_folder(storage_uri)
        refuse_job_folder(*data or (), option="--data")
        chosen = [experiment] if seeds is None else _with_seeds(experiment, seeds)
        plans = [make_plan(each, data=data, storage_uri=storage_uri, say=say) for each in chosen]
        least, most = _workers(workers)
        resources = launch.Resources(
            most, cpus, gpu, max_failures, least, 60 * wait_minutes, rank_timeout
        )
        marks = marks.after("plan")
        how: dict[str, Any] = {"log_every": log_every, "cache_dir": cache_dir}
        how["observers"] = callback or ()
        results = []
        for plan in plans:
            result = launch.finished_result(plan)
            if result is None:
                console.print(f"run [bold]{plan.run}[/] in {plan.run_uri}", highlight=False)
                for note in plan.notes:
                    say(f"note: {note}")
                parallel.connect(address)
                # Of several runs the first one alone starts with this process.
                first = None if results else marks.after("Ray")
                result = launch.train(plan, resources, **how, marks=first, say=say)
            else:
                console.print(f"run [bold]{plan.run}[/] is finished already", highlight=False)
                weights = lacking_weights(plan, result)
                if weights is not None:
                    say("judging it again, for LPIPS")
                    parallel.connect(address)
                    (result,) = add_lpips(
                        [Lacking(result, plan.data, weights)], resources, cache_dir=cache_dir
                    )
            _print_result(result)
            results.append(result)
        if seeds is None:
            write_result(json_file, results[0])
        else:
            figures = over_seeds(results)
            console.print(_spread(experiment.name, [each.seed for each in chosen], figures))
            write_result(json_file, {"runs": results, "metrics": figures})


def _workers(given: str) -> tuple[int | None, int]:
    """The least number of ranks, where there is a range, and the largest."""
    least, colon, most = given.partition(":")
    numbers = (least, most) if colon else (least,)
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--workers {given}: expected a number such as 8, or a range such as 2:8")
    return (int(least), int(most)) if colon else (None, int(least))


def _with_seeds(experiment: Experiment, seeds: str) -> list[Experiment]:
    parts = [part.strip() for part in seeds.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"--seeds {seeds}: expected different whole numbers such as 1,2,3")
    return [override(experiment, [f"seed={part}"]) for part in parts]


def _spread(name: str, seeds: list[int], figures: dict[str, dict[str, float]]) -> Table:
    table = Table("", "mean", "std", "min", "max", title=f"{name}, seeds {seeds}")
    for figure, spread in figures.items():
        table.add_row(figure, *(f"{spread[key]:.4g}" for key in ("mean", "std", "min", "max")))
    return table


def _experiment(
    name: str | None, file: str | None, large_batch: int | None, settings: list[str]
) -> Experiment:
    if (name is None) == (file is None):
        raise typer.BadParameter("give an experiment's name (see --list) or --experiment FILE")
    if file is not None:
        experiment = from_json(storage.read_bytes(file))
    else:
        assert name is not None
        experiment = experiments.make(name)
    if large_batch is not None:
        experiment = experiments.large_batch(experiment, large_batch)
    return override(experiment, settings)


def _list(part: str | None) -> None:
    if part is not None:
        found = [name for name in experiments.names() if part in name]
        if not found:
            raise ExperimentError(f"no experiment's name has {part!r} in it (--list alone tells)")
        console.print("\n".join(found), highlight=False)
        return
    names = Table("data", "what it is", title="DATA/SR-xSCALE/RECIPE, DATA/xSCALE/l2t, DATA/h2t")
    for name, data in experiments.DATA.items():
        names.add_row(name, data.about)
    console.print(names)
    table = Table("recipe", "paper", "what it trains")
    table.columns[0].no_wrap = True
    for name, recipe in recipes.RECIPES.items():
        table.add_row(name, recipe.title, recipe.about)
    console.print(table)
    scales = ", ".join(f"x{scale}" for scale in experiments.SCALES)
    console.print(f"SR networks: {', '.join(experiments.SR_NETWORKS)}; scales: {scales}")
    console.print(f"{len(experiments.names())} names; `--list voc_det/edsr-x8` lists those with it")


def _show(experiment: Experiment) -> None:
    recipe = recipes.get(experiment.recipe)
    experiment = experiments.relevant(experiment)
    console.print_json(experiment.model_dump_json())
    console.print(f"{recipe.title}: {recipe.about}", highlight=False)
    for number, phase in enumerate(recipe.phases, 1):
        terms = ", ".join(
            f"{term.weight:g} {term.name}" + (" (after the warm-up)" if term.after_warmup else "")
            for term in phase.terms
        )
        console.print(f"phase {number} updates {' and '.join(phase.updates)} by {terms}")
    for network, origin in recipe.init_from.items():
        start = _start(experiment, network, origin)
        console.print(f"the {network} network starts from {start}", highlight=False)
    if recipe.choices:
        console.print(f"what the paper leaves open: {recipe.choices}", highlight=False)


def _start(experiment: Experiment, network: str, origin: str) -> str:
    fixed = experiment.fixed
    if origin != recipes.PRETRAINED:
        start = fixed.oracle if network == "oracle" else getattr(experiment, network).start
        return start or f"the run of recipe {origin}"
    if network == "vgg":
        return fixed.vgg
    settings = getattr(experiment, network)
    if settings.network in ("bilinear", "bicubic"):
        return f"{settings.network} interpolation, which has no weights"
    if settings.weights is None:
        return f"a random start (give one by --set {network}.weights=URI)"
    note = ""
    if network == "sr" and experiment.scale == 8 and settings.weights == experiments.DIV2K:
        note = ", which are not public for EDSR x8: pre-train with folder_sr/edsr-x8/pretrain"
    how = ", what fits of them" if settings.partial else ""
    return f"the weights {settings.weights}{how}{note if settings.network == 'edsr' else ''}"


def _print_result(result: dict) -> None:
    table = result_table(result["experiment"], result["metrics"])
    table.add_row("steps", str(result["steps"]))
    table.add_row("training time", f"{result['seconds']:.0f} s on {result['world_size']} worker(s)")
    for note in result["notes"]:
        table.add_row("note", note)
    table.add_row("run", result["run_uri"])
    table.add_row("checkpoint", result["checkpoint"])
    console.print(table)


if __name__ == "__main__":
    app()
