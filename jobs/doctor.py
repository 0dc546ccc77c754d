"""Is everything ready to train? `python jobs/doctor.py --help`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from sr4ir_dist.cli import (
    Address,
    Cpus,
    Gpu,
    JsonFile,
    console,
    make_app,
    refuse_job_folder,
    say,
    user_errors,
    write_result,
)

app = make_app()
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


@app.command()
def main(
    storage_uri: Annotated[
        str | None, typer.Option("--storage", help="Where runs are to be kept: a path or URI.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Dataset to train on; may be repeated, as in training.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Ranks that are to train together.")] = 1,
    cpus: Cpus = None,
    gpu: Gpu = None,
    address: Address = None,
    json_file: JsonFile = None,
) -> None:
    """Check this machine, the storage, the data and the Ray cluster before a run does.

    What would make training fail ends in exit code 1, with what to do about it. Give it what the
    run will get; what is not given is not checked. No secret is shown.

        python jobs/doctor.py --storage s3://bucket/runs --data s3://bucket/data --workers 8 --gpu
    """
    from sr4ir_dist.doctor import cluster, dataset, machine, store
    from sr4ir_dist.training.launch import Resources

    with user_errors():
        address = cluster.find(address)
        if storage_uri is not None:
            refuse_job_folder(storage_uri)
        found = []
        say("this machine ...")
        found += machine.findings(*((workers, gpu) if address is None else (0, None)))
        if storage_uri is not None:
            say(f"storage {storage_uri} ...")
            found += store.findings(storage_uri)
        if data:
            say(f"data {', '.join(data)} ...")
            found += dataset.findings(data)
        say("Ray ...")
        found += cluster.findings(address, Resources(workers, cpus, gpu), storage_uri)

        table = Table("check", "", title="sr4ir_dist doctor")
        table.add_column("what was found, and what to do", overflow="fold")
        for each in found:
            mend = f"\n-> {each.mend}" if each.mend and each.status in ("warn", "fail") else ""
            status = Text(each.status, style=_STYLES[each.status])
            table.add_row(Text(each.name), status, Text(each.told + mend))
        console.print(table)
        failed = [each.name for each in found if each.status == "fail"]
        write_result(
            json_file,
            {"ready": not failed, "findings": [dataclasses.asdict(each) for each in found]},
        )
    if failed:
        say(f"not ready: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
