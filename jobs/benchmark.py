"""Measure this system next to its limits and its peers: `python jobs/benchmark.py --help`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sr4ir_dist import experiments, storage
from sr4ir_dist.cli import JsonFile, Settings, console, make_app, say, user_errors, write_result
from sr4ir_dist.config import Experiment
from sr4ir_dist.overrides import override

if TYPE_CHECKING:
    from sr4ir_dist.benchmark.data import Entry
    from sr4ir_dist.benchmark.scaling import Run
    from sr4ir_dist.benchmark.scaling_outlook import Check, Outlook
    from sr4ir_dist.benchmark.step import Result

app = make_app()


@app.callback()
def main() -> None:
    """Measure this system next to what bounds it and to what a user would pick instead."""


@app.command()
def data(
    images: Annotated[str, typer.Argument(help="Folder of JPEG files, a path or URI.")],
    copies: Annotated[
        int, typer.Option(min=1, help="Read a small folder as if it held each image so often.")
    ] = 1,
    s3: Annotated[
        str | None,
        typer.Option(
            help="Measure from a bucket too: a prefix such as `s3://bucket/benchmark`, or "
            "`loopback` for a server on this machine."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this contender; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; figures are medians.")] = 3,
    epochs: Annotated[int, typer.Option(min=2, help="Epochs of each run.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Our threads, the peers' processes.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a batch.")] = 32,
    resize: Annotated[int, typer.Option(min=1, help="Pixels of the short side.")] = 256,
    crop: Annotated[int, typer.Option(min=1, help="Height and width of the result.")] = 224,
    folder: Annotated[
        str | None, typer.Option(help="Local folder for the formats; a temporary one by default.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Images per second and peak memory of the data path, from disk and from a bucket.

    This system's loader, decoding alone and raw GET requests (the limits), and the peers: a
    torchvision ImageFolder behind torch's DataLoader, mosaicml-streaming, webdataset and Ray Data.
    All read the same images, resize, crop and mirror them; each runs in processes of its own, in
    turn. Peers that are not installed are left out: `pip install -e '.[benchmark]'`, best in an
    environment of its own, since mosaicml-streaming needs an older numpy.
    """
    from sr4ir_dist.benchmark.contenders import CONTENDERS, Work
    from sr4ir_dist.benchmark.data import measure
    from sr4ir_dist.data.convert.source import list_images

    with user_errors(), _bucket(s3) as bucket, tempfile.TemporaryDirectory(dir=folder) as work:
        paths, _ = list_images(images)
        jpegs = [path for path in paths if path.lower().endswith((".jpg", ".jpeg"))]
        if not jpegs:
            raise ValueError(f"{images}: no JPEG files")
        entries = measure(
            [storage.join(storage.absolute(images), path) for path in jpegs] * copies,
            Work(work, work, batch_size, resize, crop, workers, epochs),
            repeats=repeats,
            names=only or list(CONTENDERS),
            bucket=bucket,
            say=say,
        )
        _print(entries)
        write_result(
            json_file,
            {
                "images": len(jpegs) * copies,
                "workers": workers,
                "batch_size": batch_size,
                "resize": resize,
                "crop": crop,
                "epochs": epochs,
                "entries": [
                    asdict(entry) | {"median": asdict(entry.median) if entry.runs else None}
                    for entry in entries
                ],
            },
        )


@app.command()
def step(
    name: Annotated[
        str, typer.Argument(help="Experiment to measure, as for train.py.")
    ] = "cub200/edsr-x8/sr4ir",
    settings: Settings = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure the experiment with these settings too (`precision=bf16`), or another "
            "one (`cub200/edsr-x8/sr4ir-no-tdp`), settings after it; may be repeated."
        ),
    ] = None,
    published: Annotated[
        bool, typer.Option(help="Measure the published step too, which recipe sr4ir has.")
    ] = True,
    images: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each.")] = 10,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 2,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default one a core.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time, FLOPs and memory of a training step, next to the step as it was published.

    The real networks step on random images of the experiment's size (detection: 375x500), in turn
    in one process, with equal starts; plain PyTorch engines, no Ray. The published step is a plain,
    eager implementation, repeated forwards and all, in fp32. Figures are medians; backward and
    optimizer are parts of the phases. A speed-up is the median ratio to the first row's steps of
    the same rounds; peak memory counts tensors alone; a GPU's host would wait for each sync.
    """
    import torch

    from sr4ir_dist.benchmark.step import (
        PUBLISHED,
        compare,
        contender,
        make_experiment,
        measured_peak,
        random_batch,
    )

    with user_errors():
        torch.set_num_threads(threads or os.cpu_count() or 1)
        own = [f"batch_size={images}", *(settings or [])]
        chosen = {" ".join([name, *(settings or [])]): make_experiment(name, own)}
        for text in also or ():
            first, *others = text.split()
            other, more = (name, [*own, first, *others]) if "=" in first else (first, others)
            chosen[text] = make_experiment(other, [f"batch_size={images}", *more])
        first = next(iter(chosen.values()))
        if published:
            chosen = {PUBLISHED: first, **chosen}
        contenders = [
            contender(label, each, random_batch(each, images)) for label, each in chosen.items()
        ]
        peak = measured_peak(contenders[0].clock.device, torch.float32)
        results = compare(
            contenders,
            steps=steps,
            warm_up=warm_up,
            peak=peak,
            told=lambda done, total: say(f"round {done} of {total}"),
        )
        _print_steps(results)
        result = {"images": images, "steps": steps, "threads": torch.get_num_threads()}
        result |= {"experiment": name, "settings": settings or [], "cores": os.cpu_count()}
        result |= {"peak_gflops_fp32": peak / 1e9, "load_before": os.getloadavg()[0]}
        write_result(json_file, result | {"results": [asdict(each) for each in results]})


def _print_steps(results: list[Result]) -> None:
    table = Table("step", "ms", "images/s", "speed-up", "phase 1", "phase 2", "backward")
    for heading in ("optimizer", "GFLOPs/image", "of peak", "operators", "syncs", "peak MB"):
        table.add_column(heading, justify="right")
    for each in results:
        parts = (f"{1e3 * seconds:,.0f}" for seconds in each.parts.values())
        cost = each.cost
        table.add_row(
            each.label,
            f"{1e3 * each.seconds:,.0f}",
            f"{each.images_per_second:.3g}",
            f"{each.speedup:.2f}",
            *parts,
            f"{cost.gflops / each.images:.1f}",
            f"{each.peak_share:.0%}",
            f"{cost.operators:,}",
            str(cost.syncs),
            f"{cost.peak_mb:,.0f}",
        )
    console.print(table)


_FULL_SIZE = ("cub200/edsr-x8/sr4ir", "voc_seg/edsr-x8/sr4ir", "voc_det/edsr-x8/sr4ir")


@app.command()
def scaling(
    name: Annotated[
        str, typer.Argument(help="Experiment to measure, as for train.py.")
    ] = "drawn_cls/edsr-x4/sr4ir",
    settings: Settings = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Dataset to measure on; may be repeated. A drawn one by default."),
    ] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks to measure.")] = "1,2,4",
    repeats: Annotated[
        int, typer.Option(min=0, help="Runs of each; figures are medians. 0: only the model.")
    ] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps measured in each run.")] = 10,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before them.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a rank's networks.")] = 1,
    full_size: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Experiment to model at full size, settings after it (`cub200/h2t "
            "batch_norm=local`); may be repeated; `none` for none.",
        ),
    ] = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs to model.")] = "1,8,16,32,64,128,"
    "256,512",
    batches: Annotated[
        str, typer.Option(help="Global batches to model besides the experiment's own.")
    ] = "1024,8192",
    tflops: Annotated[
        float,
        typer.Option(help="TFLOP/s a GPU achieves (assumed: a tenth of an H100's bf16)."),
    ] = 99,
    launch_us: Annotated[float, typer.Option(help="Microseconds of a kernel's launch.")] = 5,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    inside_gbs: Annotated[
        float, typer.Option(help="GB/s of a GPU to its node's others (NCCL on H100 NVLink).")
    ] = 370,
    between_gbs: Annotated[
        float, typer.Option(help="GB/s of a node to the others (8 x 400 Gbit/s InfiniBand).")
    ] = 368,
    call_us: Annotated[float, typer.Option(help="Microseconds of any collective.")] = 5,
    inside_us: Annotated[float, typer.Option(help="Microseconds of a hop in a node.")] = 1,
    between_us: Annotated[float, typer.Option(help="Microseconds of a hop between nodes.")] = 5,
    loader: Annotated[
        float, typer.Option(help="Images/s of a node's loaders (assumed: 64 threads at 500).")
    ] = 32_000,
    overlap: Annotated[
        float,
        typer.Option(min=0, max=1, help="Part of the backward that hides gradients' reduction."),
    ] = 0,
    json_file: JsonFile = None,
) -> None:
    """Time and traffic of a training step on 1, 2, 4 ranks here, and a model of many GPUs.

    The real loop on DeepSpeed engines, in plain CPU processes (no Ray) over loopback: a step's
    time in compute, transfer, waiting for the slowest rank and waiting for data; and the bytes that
    the kernel counted on each rank's connections, by phase, next to the least. The model takes
    FLOPs, kernels and bytes counted on the real networks, and the cluster from these options, whose
    defaults are a DGX H100's by datasheets and others' measurements. It is checked on this machine.
    """
    from sr4ir_dist.benchmark.scaling import ScalingError
    from sr4ir_dist.benchmark.scaling_outlook import (
        DGX_H100,
        experiment_work,
        outlook,
    )

    with user_errors(ScalingError):
        result: dict[str, Any] = {"experiment": name, "settings": settings or []}
        result |= {"load_before": os.getloadavg()[0], "cores": os.cpu_count()}
        counts, sizes = _numbers("--gpus", gpus), _numbers("--batches", batches)
        if repeats:
            options = {"steps": steps, "warm_up": warm_up, "repeats": repeats, "threads": threads}
            experiment = override(experiments.make(name), settings or [])
            result |= _measure_scaling(experiment, data, _numbers("--ranks", ranks), options)
        cluster = replace(
            DGX_H100,
            flops=tflops * 1e12,
            launch_s=launch_us * 1e-6,
            gpus_per_node=gpus_per_node,
            inside_bytes_s=inside_gbs * 1e9,
            between_bytes_s=between_gbs * 1e9,
            call_s=call_us * 1e-6,
            inside_s=inside_us * 1e-6,
            between_s=between_us * 1e-6,
            images_s=loader,
            overlap=overlap,
        )
        result |= {"cluster": asdict(cluster), "model": {}}
        for modelled in full_size or _FULL_SIZE:
            if modelled == "none":
                continue
            say(f"counting the work of {modelled}")
            batch, work = experiment_work(*modelled.split())
            found = outlook(work, cluster, counts, sorted({batch, *sizes}))
            _print_outlook(modelled, found)
            result["model"][modelled] = {
                "work": [asdict(phase) for phase in work],
                "gpus": [asdict(each) for each in found],
            }
        write_result(json_file, result)


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{option} {text}: expected whole numbers above 0, such as 1,2,4")
    return [int(part) for part in parts]


def _measure_scaling(
    experiment: Experiment,
    data: list[str] | None,
    ranks: list[int],
    options: dict[str, int],
) -> dict[str, Any]:
    from sr4ir_dist.benchmark.scaling import drawn_data, measure, prepare
    from sr4ir_dist.benchmark.scaling_outlook import check_here

    drawn = nullcontext(data) if data else drawn_data(experiment)
    with drawn as found:
        uris = [found] if isinstance(found, str) else found
        prepared = prepare(experiment, uris)
        runs = measure(prepared, uris, ranks=ranks, **options, say=say)
        checks = check_here(prepared, uris, runs, **options, say=say) if max(ranks) > 1 else []
    _print_runs(runs, checks)
    measured = {str(count): _medians(runs, count) for count in ranks}
    return options | {
        "batch_size": experiment.batch_size,
        "medians": measured,
        "runs": [asdict(run) for run in runs],
        "check": [asdict(each) | {"error": each.error} for each in checks],
    }


def _medians(runs: list[Run], ranks: int) -> dict[str, Any]:
    from sr4ir_dist.benchmark.scaling import median

    of_ranks = [run for run in runs if run.ranks == ranks]
    phases = [asdict(phase) | {"rest": phase.rest} for phase in of_ranks[0].phases]
    return asdict(median([run.times for run in of_ranks])) | {"phases_of_first_run": phases}


def _print_runs(runs: list[Run], checks: list[Check]) -> None:
    from sr4ir_dist.benchmark.scaling import median

    parts = ("step", "compute", "transfer", "waiting", "data")
    times = Table("ranks", *(f"{part} ms" for part in parts), "model's error")
    traffic = Table("ranks", "phase updates", "sent MB", "gradients", "batch norm", "rest")
    errors = {check.ranks: f"{check.error:+.0%}" for check in checks}
    for count in sorted({run.ranks for run in runs}):
        of_count = [run for run in runs if run.ranks == count]
        found = median([run.times for run in of_count])
        cells = (f"{1e3 * getattr(found, part):,.1f}" for part in parts)
        times.add_row(str(count), *cells, errors.get(count, ""))
        for phase in of_count[0].phases if count > 1 else ():
            sizes = (phase.measured, phase.gradients, phase.batch_norm, phase.rest + phase.other)
            cells = (f"{size / 1e6:,.3f}" for size in sizes)
            traffic.add_row(str(count), " and ".join(phase.updates), *cells)
    console.print(times)
    console.print(traffic)


def _print_outlook(name: str, found: list[Outlook]) -> None:
    told = "images a GPU, milliseconds, efficiency, smallest batches of 50 and 80 %"
    table = Table(title=f"{name}, modelled: {told}")
    headings = ("GPUs", "batch", "images", "compute", "comm.", "data ms", "eff.", "50 %", "80 %")
    for heading in headings:
        table.add_column(heading, justify="right")
    for each in found:
        thresholds = [f"{b:,}" if b else "never" for b in (each.batch_50, each.batch_80)]
        for number, step in enumerate(each.steps):
            table.add_row(
                str(step.gpus) if not number else "",
                f"{step.batch:,}",
                f"{step.images:,}",
                *(f"{1e3 * t:,.1f}" for t in (step.compute, step.communication, step.data)),
                f"{step.efficiency:.0%}",
                *(thresholds if not number else ("", "")),
            )
    console.print(table)


@contextmanager
def _bucket(s3: str | None) -> Iterator[str | None]:
    """The prefix to measure from; for `loopback` there is a server as long as this is open."""
    if s3 != "loopback":
        yield s3
        return
    import boto3

    from sr4ir_dist.benchmark.loopback import s3_server

    with s3_server() as environment:
        os.environ.update(environment)
        boto3.client("s3").create_bucket(Bucket="benchmark")
        yield "s3://benchmark/data"


def _print(entries: list[Entry]) -> None:
    table = Table("contender", "from")
    for heading in ("first epoch", "later epochs", "peak memory"):
        table.add_column(heading, justify="right")
    for entry in entries:
        if entry.runs:
            figures = entry.median
            cells = (
                f"{figures.first:,.0f} images/s",
                f"{figures.later:,.0f} images/s",
                f"{figures.peak_mib:,.0f} MiB",
            )
        else:
            cells = (entry.failure or "", "", "")
        table.add_row(entry.name, entry.where, *cells)
    console.print(table)


if __name__ == "__main__":
    app()
