"""Measure this system next to its limits and its peers: `python jobs/benchmark.py --help`."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sr4ir_dist import experiments, parallel, storage
from sr4ir_dist.cli import (
    Address,
    JsonFile,
    Settings,
    console,
    make_app,
    say,
    user_errors,
    write_result,
)
from sr4ir_dist.overrides import override

app = make_app()
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default one a core.")]


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
    from sr4ir_dist.benchmark.loopback import bucket_of
    from sr4ir_dist.benchmark.tables import of_data
    from sr4ir_dist.data.convert.source import list_images

    with user_errors(), bucket_of(s3) as bucket, tempfile.TemporaryDirectory(dir=folder) as work:
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
        console.print(of_data(entries))
        result = {"images": len(jpegs) * copies, "workers": workers, "batch_size": batch_size}
        result |= {"resize": resize, "crop": crop, "epochs": epochs}
        write_result(json_file, result | {"entries": [each.as_result() for each in entries]})


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
    threads: Threads = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Dataset on which to time the training loop too.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of that loop.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Time, FLOPs and memory of a training step, next to the step as it was published.

    The real networks step on random images of the experiment's size (detection: 375x500), in turn
    in one process, with equal starts; plain PyTorch engines, no Ray. The published step is a plain,
    eager implementation, repeated forwards and all, in fp32. Figures are medians; forward, backward
    and optimizer lie in the phases. A speed-up is the median ratio to the first row's steps of the
    same rounds; peak memory counts tensors alone; a GPU's host would wait for each sync. --data
    adds what the loop on DeepSpeed's engines waits for: data, and other ranks; plain CPU processes
    with --images each, which share the threads.
    """
    import torch

    from sr4ir_dist.benchmark.processes import RankError
    from sr4ir_dist.benchmark.scaling import time_loop
    from sr4ir_dist.benchmark.step import compare, line_up, measured_peaks
    from sr4ir_dist.benchmark.tables import of_loop, of_steps

    with user_errors(RankError):
        count = threads or os.cpu_count() or 1
        options: dict[str, Any] = {"steps": steps, "warm_up": warm_up}
        result = options | {"experiment": name, "settings": settings or [], "images": images}
        result |= {"threads": count, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
        torch.set_num_threads(count)
        contenders = line_up(name, settings or [], also or [], images, published=published)
        if data:
            own = override(experiments.make(name), settings or [])
            loop = time_loop(own, data, images, ranks=ranks, threads=count, **options, say=say)
            console.print(of_loop(loop))
            result["loop"] = {"ranks": ranks, "seconds": asdict(loop.times)}
        peaks = measured_peaks(contenders[0].clock.device)
        results = compare(
            contenders,
            **options,
            peaks=peaks,
            told=lambda done, total: say(f"round {done} of {total}"),
        )
        console.print(of_steps(results))
        result |= {"peak_flops": peaks, "results": [asdict(each) for each in results]}
        write_result(json_file, result)


@app.command()
def overhead(
    name: Annotated[
        str, typer.Argument(help="Experiment whose networks step, as for train.py.")
    ] = "cub200/edsr-x8/sr4ir",
    settings: Settings = None,
    pixels: Annotated[int, typer.Option(min=8, help="Side of the tiny images.")] = 32,
    images: Annotated[int, typer.Option(min=2, help="Images of a tiny step.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each.")] = 50,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 5,
    threads: Threads = None,
    ray: Annotated[
        bool, typer.Option("--ray/--no-ray", help="Measure in a Ray Train worker too.")
    ] = True,
    of: Annotated[
        str | None,
        typer.Option(
            help="What the share is of: the seconds of a step, or an experiment of which steps "
            "are timed at its own size. By default NAME."
        ),
    ] = None,
    of_images: Annotated[int, typer.Option(min=2, help="Images of that step.")] = 4,
    of_steps: Annotated[int, typer.Option(min=1, help="Timed steps of that size.")] = 2,
    address: Address = None,
    json_file: JsonFile = None,
) -> None:
    """What Ray and DeepSpeed add to a training step, in milliseconds and as a share of it.

    The experiment's own networks step on a tiny input, in turn in one process with equal starts:
    on plain PyTorch engines, on DeepSpeed's, and in the training loop with all that a Ray Train
    worker has around it (losses are read every step; training reads those of ten at once). Then the
    same in a worker that Ray runs: what Ray's processes take of the CPUs shows between the columns.
    Figures are medians; differences are within a round. One rank: see `scaling` for communication.
    """
    import torch

    from sr4ir_dist.benchmark import overhead as tools
    from sr4ir_dist.benchmark.step import make_experiment
    from sr4ir_dist.benchmark.tables import of_overhead
    from sr4ir_dist.training.launch import TrainingError

    with user_errors(TrainingError):
        count = threads or os.cpu_count() or 1
        torch.set_num_threads(count)
        load = os.getloadavg()[0]
        own = [f"batch_size={images}", *(settings or [])]
        experiment = tools.tiny(make_experiment(name, own), pixels)
        request = tools.Request(experiment, images, steps, warm_up, count)
        full = tools.full_size(of or name, settings or [], of_images, of_steps, say=say)
        say(f"{warm_up + steps} rounds in this process")
        found = {"a process": tools.measure_plainly(request)}
        if ray:
            say(f"{warm_up + steps} rounds in a Ray Train worker")
            parallel.connect(address)
            found["a Ray worker"] = tools.measure_in_ray(request)
        console.print(of_overhead(found, full))
        result = {"settings": settings or [], "pixels": pixels, "images": images, "steps": steps}
        result |= {"threads": count, "cores": os.cpu_count(), "load_before": load}
        result |= {"experiment": name, "full_size": asdict(full)}
        write_result(json_file, result | {"found": {k: asdict(v) for k, v in found.items()}})


@app.command()
def zero(
    name: Annotated[str, typer.Argument(help="Experiment.")] = "cub200/edsr-x8/sr4ir",
    settings: Settings = None,
    images: Annotated[int, typer.Option(min=1, help="Images of each rank's step.")] = 2,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks, of one thread each.")] = 2,
    json_file: JsonFile = None,
) -> None:
    """What each ZeRO stage saves of a rank's memory, and costs of its time, on this machine."""
    from sr4ir_dist.benchmark.processes import RankError
    from sr4ir_dist.benchmark.step import make_experiment
    from sr4ir_dist.benchmark.tables import of_zero
    from sr4ir_dist.benchmark.zero import measure

    with user_errors(RankError):
        experiment = make_experiment(name, [f"batch_size={images * ranks}", *(settings or [])])
        found = measure(experiment, images=images, ranks=ranks, told=say)
        console.print(of_zero(found))
        result = {"experiment": name, "settings": settings or [], "images": images, "ranks": ranks}
        write_result(json_file, result | {"stages": [asdict(each) for each in found]})


@app.command()
def start(
    name: Annotated[
        str, typer.Argument(help="Experiment on the drawn dataset, as for train.py.")
    ] = "drawn_cls/edsr-x4/sr4ir",
    settings: Settings = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs, the first of which may be cold.")] = 2,
    workers: Annotated[int, typer.Option(min=1, help="Ranks.")] = 1,
    images: Annotated[int, typer.Option(min=8, help="Images of the drawn dataset.")] = 64,
    size: Annotated[int, typer.Option(min=32, help="Their side in pixels.")] = 64,
    json_file: JsonFile = None,
) -> None:
    """How long it takes from `python jobs/train.py` to the end of the first training step.

    Runs of one epoch on a small drawn dataset in a temporary folder, one after the other, each from
    nothing, as a user starts them: *imports* of the command, the *plan* that is checked, *Ray* that
    starts here (or is joined, where RAY_ADDRESS names a cluster), *workers* that Ray Train starts,
    with their imports, *networks* and engines, the *first batch* and the *first step*. The job
    prints the same line in every run. The first run also reads from disk what later ones have in
    memory, and may build DeepSpeed's operator, once for a machine.
    """
    from sr4ir_dist.benchmark.start import StartError, measure
    from sr4ir_dist.benchmark.tables import of_starts

    with user_errors(StartError):
        sizes = {"runs": runs, "workers": workers, "images": images, "size": size}
        starts = measure(Path(__file__).parent, name, settings or [], **sizes, say=say)
        console.print(of_starts(starts))
        result = {"experiment": name, "settings": settings or [], "workers": workers}
        result |= {"cores": os.cpu_count(), "runs": [asdict(each) for each in starts]}
        write_result(json_file, result)


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
    from sr4ir_dist.benchmark.processes import RankError
    from sr4ir_dist.benchmark.scaling_outlook import (
        DGX_H100,
        as_result,
        experiment_work,
        measure_here,
        numbers,
        outlook,
    )
    from sr4ir_dist.benchmark.tables import of_outlook, of_runs

    with user_errors(RankError):
        result: dict[str, Any] = {"experiment": name, "settings": settings or []}
        result |= {"load_before": os.getloadavg()[0], "cores": os.cpu_count()}
        counts, sizes = numbers("--gpus", gpus), numbers("--batches", batches)
        if repeats:
            options = {"steps": steps, "warm_up": warm_up, "repeats": repeats, "threads": threads}
            experiment = override(experiments.make(name), settings or [])
            runs, checks = measure_here(
                experiment, data, ranks=numbers("--ranks", ranks), **options, say=say
            )
            for table in of_runs(runs, checks):
                console.print(table)
            result |= options | as_result(experiment, runs, checks)
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
        for modelled in [each for each in full_size or _FULL_SIZE if each != "none"]:
            say(f"counting the work of {modelled}")
            batch, work = experiment_work(*modelled.split())
            found = outlook(work, cluster, counts, sorted({batch, *sizes}))
            console.print(of_outlook(modelled, found))
            result["model"][modelled] = {
                "work": [asdict(phase) for phase in work],
                "gpus": [asdict(each) for each in found],
            }
        write_result(json_file, result)


if __name__ == "__main__":
    app()
