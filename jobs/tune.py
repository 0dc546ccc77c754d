"""Search an experiment's settings: `python jobs/tune.py --help`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sr4ir_dist import experiments, parallel, storage
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
    say,
    user_errors,
    write_result,
)
from sr4ir_dist.overrides import override

if TYPE_CHECKING:
    from sr4ir_dist.tuning.outcome import Outcome
    from sr4ir_dist.tuning.space import Space

app = make_app()


@app.command()
def main(
    space_file: Annotated[
        str, typer.Argument(metavar="SPACE", help="Search space, a YAML file: see `tune_spaces/`.")
    ],
    name: Annotated[
        str, typer.Argument(metavar="EXPERIMENT", help="Experiment; `train.py --list` tells.")
    ],
    data: Annotated[
        list[str], typer.Option(help="Dataset, a path or URI; repeat it for a mix of several.")
    ],
    storage_uri: Annotated[
        str, typer.Option("--storage", help="Where runs and searches are kept: a path or URI.")
    ] = "runs",
    settings: Settings = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many; by default the space's.")
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0.0, help="After so many hours no trial goes on.")
    ] = None,
    concurrent: Annotated[
        int | None,
        typer.Option(min=1, help="Trials at a time; by default as many as the cluster holds."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ranks of each trial.")] = 1,
    cpus: Cpus = None,
    gpu: Gpu = None,
    max_failures: Annotated[int, typer.Option(help="Restarts of a trial's dead workers.")] = 3,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a search that was interrupted.")
    ] = False,
    search_name: Annotated[
        str | None, typer.Option("--name", help="The search's folder; by default from its content.")
    ] = None,
    address: Address = None,
    cache_dir: CacheDir = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of progress.")] = 50,
    json_file: JsonFile = None,
) -> None:
    """Search the settings of an experiment with Ray Tune; each trial is a run of its own.

    The search is kept below `--storage`: every trial's run, and at the end `trials.json`,
    `trials.csv`, `report.html` with its plots, and `best.json`, which `train.py --experiment`
    takes. What --set gives holds for all trials, whatever the space says of it. A search that was
    interrupted is continued by the same command with `--resume`.

        python jobs/tune.py tune_spaces/laptop.yaml drawn_cls/edsr-x4/sr4ir --data datasets/drawn
    """
    # Ray and torch take seconds to import, which --help need not wait for.
    from sr4ir_dist.training import launch
    from sr4ir_dist.training.plan import make_plan
    from sr4ir_dist.tuning import search as searches
    from sr4ir_dist.tuning.outcome import records, write_outcomes
    from sr4ir_dist.tuning.page import write_page
    from sr4ir_dist.tuning.space import check, load_space, overruled
    from sr4ir_dist.tuning.strategy import check_draws
    from sr4ir_dist.tuning.trial import Trials

    with user_errors(launch.TrainingError):
        refuse_job_folder(storage_uri)
        refuse_job_folder(*data, option="--data")
        space = load_space(space_file)
        if trials is not None:
            space = space.model_copy(update={"trials": trials})
        space, taken = overruled(space, settings or [])
        for path in taken:
            say(f"note: {path} is not searched, for --set gives it")
        experiment = check(space, override(experiments.make(name), settings or []))
        check_draws(space, experiment)
        experiment = searches.rooted(experiment)
        root = storage.absolute(storage_uri)
        plan = make_plan(experiment, data=data, storage_uri=root, say=say)
        launch.check_shares(plan, workers)
        parallel.connect(address)
        resources = searches.settled(launch.Resources(workers, cpus, gpu, max_failures))
        request = Trials(plan.experiment, plan.data, root, "", resources, log_every, cache_dir)
        stem = PurePosixPath(space_file).stem
        named = search_name or searches.name_of(space, stem, request)
        request = replace(request, folder=storage.join(root, named))
        say(f"search {named} in {request.folder}")
        budget = searches.Budget(concurrent, hours)
        found = searches.search(space, request, budget, resume=resume, say=say)
        best = write_outcomes(request.folder, space, plan.experiment, found)
        page = write_page(request.folder, f"{named}: {experiment.name}", space, found)
        console.print(_table(space, found))
        console.print(f"plots  {page}\nbest   {best}", highlight=False, soft_wrap=True)
        write_result(json_file, records(found))


def _table(space: Space, trials: list[Outcome]) -> Table:
    from sr4ir_dist.tuning.outcome import cells, headings, ranked

    table = Table(title=f"{len(trials)} trials, the best first")
    for number, heading in enumerate(headings(space)):
        table.add_column(heading, justify="left" if number < 2 else "right", overflow="fold")
    for trial in ranked(space, trials):
        table.add_row(*cells(space, trial))
    return table


if __name__ == "__main__":
    app()
