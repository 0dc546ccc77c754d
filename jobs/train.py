"""Train an experiment on Ray: `python jobs/train.py --help`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from sr4ir_dist import experiments, recipes, storage
from sr4ir_dist.cli import (
    Address,
    CacheDir,
    Cpus,
    Gpu,
    JsonFile,
    Settings,
    console,
    refuse_job_folder,
    result_table,
    user_errors,
    write_result,
)
from sr4ir_dist.config import Experiment, from_json, override

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command()
def main(
    name: Annotated[
        str | None,
        typer.Argument(help="Experiment, such as `drawn_cls/edsr-x4/sr4ir`; see --list."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Dataset made by prepare_data.py: a path or `s3://` URI.")
    ] = None,
    storage_uri: Annotated[
        str, typer.Option("--storage", help="Where runs are kept: a path or `s3://` URI.")
    ] = "runs",
    settings: Settings = None,
    experiment_file: Annotated[
        str | None,
        typer.Option("--experiment", help="Take it from a JSON file (path or URI), not by name."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Ranks that train together.")] = 1,
    cpus: Cpus = None,
    gpu: Gpu = None,
    max_failures: Annotated[int, typer.Option(help="Restarts after a worker died.")] = 3,
    address: Address = None,
    cache_dir: CacheDir = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of progress.")] = 10,
    json_file: JsonFile = None,
    list_names: Annotated[
        bool, typer.Option("--list", help="List the experiments and end.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the experiment and end.")] = False,
) -> None:
    """Train an experiment on Ray Train workers with DeepSpeed.

    The same command again continues an interrupted run, or says that it is finished. Changed
    settings or data make another run. Without a cluster, Ray starts on this machine:

        python jobs/prepare_data.py drawn --out datasets/drawn

        python jobs/train.py drawn_cls/edsr-x4/sr4ir --data datasets/drawn --workers 2
    """
    if list_names:
        _list()
        return
    with user_errors():
        experiment = _experiment(name, experiment_file, settings or [])
        if show:
            _show(experiment)
            return
    if data is None:
        raise typer.BadParameter("--data is missing: make a dataset with jobs/prepare_data.py")

    # Ray and torch take seconds to import, which --help and --list need not wait for.
    from sr4ir_dist.training import launch
    from sr4ir_dist.training.plan import make_plan

    with user_errors(launch.TrainingError):
        refuse_job_folder(storage_uri)
        plan = make_plan(experiment, data=data, storage_uri=storage_uri)
        result = launch.finished_result(plan)
        if result is None:
            console.print(f"run [bold]{plan.run}[/] in {plan.run_uri}", highlight=False)
            launch.connect(address)
            resources = launch.Resources(workers, cpus, gpu, max_failures)
            result = launch.train(plan, resources, log_every=log_every, cache_dir=cache_dir)
        else:
            console.print(f"run [bold]{plan.run}[/] is finished already", highlight=False)
        _print_result(result)
        write_result(json_file, result)


def _experiment(name: str | None, file: str | None, settings: list[str]) -> Experiment:
    if (name is None) == (file is None):
        raise typer.BadParameter("give an experiment's name (see --list) or --experiment FILE")
    if file is not None:
        return override(from_json(storage.read_bytes(file)), settings)
    assert name is not None
    return override(experiments.make(name), settings)


def _list() -> None:
    table = Table("experiment", "paper", "what it trains")
    for name in experiments.names():
        recipe = recipes.RECIPES[name.rpartition("/")[2]]
        table.add_row(name, recipe.title, recipe.about)
    console.print(table)
    for name, (about, _) in experiments.DATA.items():
        console.print(f"[bold]{name}[/]: {about}")


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
    for role, origin in recipe.init_from.items():
        network = getattr(experiment, role)
        start = network.start or f"the run of recipe {origin}"
        if origin == recipes.PRETRAINED:
            start = network.weights or "a random start"
        console.print(f"the {role} network starts from {start}", highlight=False)


def _print_result(result: dict) -> None:
    table = result_table(result["experiment"], result["metrics"])
    table.add_row("steps", str(result["steps"]))
    table.add_row("training time", f"{result['seconds']:.0f} s on {result['world_size']} worker(s)")
    table.add_row("run", result["run_uri"])
    table.add_row("checkpoint", result["checkpoint"])
    console.print(table)


if __name__ == "__main__":
    app()
