"""Look at networks and runs: `python jobs/analyze.py --help`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sr4ir_dist.cli import (
    Address,
    CacheDir,
    Cpus,
    Gpu,
    JsonFile,
    Settings,
    console,
    make_app,
    progress_bars,
    result_table,
    say,
    user_errors,
    write_result,
)

if TYPE_CHECKING:
    from sr4ir_dist.analysis import judged
    from sr4ir_dist.training.plan import EvaluationRequest

app = make_app()


@app.callback()
def main() -> None:
    """Figures and measurements behind the paper's supplement, one command each."""


Labelled = Annotated[
    list[str],
    typer.Argument(
        metavar="LABEL=CHECKPOINT...",
        help="Checkpoints, or runs for their newest: paths, URIs or `hub://NAME`.",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Dataset, by default that of the first one's run; repeat it for a mix."),
]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
Count = Annotated[int, typer.Option(min=1, help="How many images, the first of the split.")]
Workers = Annotated[int, typer.Option(help="Ranks that share the images.")]
Png = Annotated[str, typer.Option(metavar="PNG", help="The picture to write: a path or URI.")]


@app.command()
def figure(
    checkpoints: Labelled,
    out: Png,
    data: Data = None,
    split: Split = "val",
    count: Count = 6,
    overlay: Annotated[
        bool,
        typer.Option(help="Show masks, boxes or classes that were found, and the true ones on HR."),
    ] = True,
    settings: Settings = None,
    json_file: JsonFile = None,
) -> None:
    """The same images by several methods, as in Figures 4 to 6: a row an image, a column a method.

    python jobs/analyze.py figure "L->T=runs/A" SR4IR=runs/B --out figure.png
    """
    from sr4ir_dist.analysis.comparison import compare, write_figure
    from sr4ir_dist.analysis.labels import parse_labelled

    with user_errors():
        compared = compare(
            parse_labelled(checkpoints), data=data or None, split=split, settings=settings or []
        )
        with progress_bars() as show:
            names = write_figure(
                compared,
                out,
                count=count,
                overlay=overlay,
                told=lambda done: show("images", done, count),
            )
        console.print(f"picture  {out}", soft_wrap=True, highlight=False)
        write_result(json_file, {"columns": compared.titles, "images": names})


@app.command()
def efficiency(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="[LABEL=]NAME...",
            help="Experiments, such as `voc_seg/edsr-x8/sr4ir`, or finished runs by "
            "LABEL=RUN, whose training time is told too.",
        ),
    ],
    json_file: JsonFile = None,
) -> None:
    """Parameters, operations, memory and speed of networks beside the paper's (Table S3).

    python jobs/analyze.py efficiency voc_seg/x8/l2t voc_seg_resnet50/x8/l2t voc_seg/edsr-x8/sr4ir
    """
    from sr4ir_dist.analysis.efficiency import PAPER, measure

    with user_errors(), progress_bars() as show:
        labelled: dict[str, str] = {}
        for name in names:
            label, equals, given = name.partition("=")
            labelled[label] = given if equals else name
        costs = measure(labelled, told=show)
        title = "One image, from its LR image on; in brackets the paper's, on its own machine"
        table = Table("", "parameters", "GFLOPs", "of SR", "memory MB", "images/s", "device hours")
        table.title = title
        for label, cost in costs.items():
            paper = PAPER.get(cost.experiment, {})
            table.add_row(
                label,
                _beside(cost.parameters / 1e6, paper.get("parameters", 0) / 1e6, "M"),
                _beside(cost.gflops, paper.get("gflops")),
                f"{cost.sr_gflops:.1f}",
                _beside(cost.memory_mb, paper.get("memory_mb")),
                _beside(cost.images_per_second, paper.get("images_per_second")),
                _beside(cost.training_hours, paper.get("training_hours")),
            )
        console.print(table)
        write_result(
            json_file,
            {label: asdict(cost) | {"gflops": cost.gflops} for label, cost in costs.items()},
        )


@app.command(name="cross-task")
def cross_task(
    checkpoints: Labelled,
    split: Split = "val",
    settings: Settings = None,
    workers: Workers = 1,
    cpus: Cpus = None,
    gpu: Gpu = None,
    address: Address = None,
    cache_dir: CacheDir = None,
    json_file: JsonFile = None,
) -> None:
    """SR networks tailored to one task, used for another: a matrix (Table S4).

    Each checkpoint's task network judges the images of each checkpoint's SR network, on its own
    data. Labels `seg`, `det` and `cls` put the paper's figures beside.

    python jobs/analyze.py cross-task seg=runs/A det=runs/B cls=runs/C
    """
    from sr4ir_dist.analysis import judged
    from sr4ir_dist.analysis.labels import parse_labelled
    from sr4ir_dist.training.launch import TrainingError

    with user_errors(TrainingError):
        labelled = parse_labelled(checkpoints)
        requests = judged.cross_task(labelled, split=split, settings=settings or [], say=say)
        figures = _evaluated(requests, (workers, cpus, gpu), address, cache_dir)
        table = Table("SR network of", *(f"used for {label}" for label in labelled))
        for sr in labelled:
            cells = []
            for task in labelled:
                name = _figure_of(requests[sr, task])
                paper = judged.PAPER_CROSS_TASK.get((sr, task))
                cells.append(f"{name} {_beside(figures[sr, task][name], paper)}")
            table.add_row(f"{sr}: {requests[sr, sr].experiment.name}", *cells)
        console.print(table)
        write_result(json_file, _as_list(figures, ("sr", "task")))


@app.command()
def degradations(
    checkpoints: Labelled,
    blur: Annotated[
        list[float] | None,
        typer.Option(help="Standard deviation in HR pixels; by default 0, 5, 10 and 15."),
    ] = None,
    data: Data = None,
    split: Split = "val",
    settings: Settings = None,
    workers: Workers = 1,
    cpus: Cpus = None,
    gpu: Gpu = None,
    address: Address = None,
    cache_dir: CacheDir = None,
    json_file: JsonFile = None,
) -> None:
    """Checkpoints under blurs before the degradation that they may not have been trained for.

    Table S5 trains anew for each blur: that is `jobs/reproduce.py tableS5`.

    python jobs/analyze.py degradations "L->T=runs/A" SR4IR=runs/B --blur 0 --blur 5
    """
    from sr4ir_dist.analysis import judged
    from sr4ir_dist.analysis.labels import parse_labelled
    from sr4ir_dist.training.launch import TrainingError

    with user_errors(TrainingError):
        blurs = blur or judged.BLURS
        requests = judged.degradations(
            parse_labelled(checkpoints),
            blurs,
            data=data or None,
            split=split,
            settings=settings or [],
            say=say,
        )
        figures = _evaluated(requests, (workers, cpus, gpu), address, cache_dir)
        table = Table("", *(f"blur {each:g}" if each else "bicubic" for each in blurs))
        for label in dict.fromkeys(label for label, _ in figures):
            cells = [figures[label, f"{each:g}"] for each in blurs]
            names = (_figure_of(requests[label, f"{blurs[0]:g}"]), "psnr", "lpips")
            for name in names:
                if name in cells[0]:
                    table.add_row(f"{label} {name}", *(f"{cell[name]:.4g}" for cell in cells))
        console.print(table)
        write_result(json_file, _as_list(figures, ("label", "blur")))


@app.command(name="sr-benchmarks")
def sr_benchmarks(
    checkpoints: Labelled,
    benchmark: Annotated[
        list[str],
        typer.Option(metavar="NAME=FOLDER", help="Folder with HR/*.png; may be repeated."),
    ],
    json_file: JsonFile = None,
) -> None:
    """PSNR and SSIM of SR networks on Set5, Set14, B100, Urban100 (Table S6), beside bicubic.

    LR images are read from `LR_bicubic/X4/NAMEx4.png` in the folder, or made.

    python jobs/analyze.py sr-benchmarks SR4IR=runs/A --benchmark Set5=benchmarks/Set5
    """
    from sr4ir_dist.analysis import sr_benchmarks as benchmarks
    from sr4ir_dist.analysis.labels import parse_labelled
    from sr4ir_dist.analysis.loaded import load

    with user_errors(), progress_bars() as show:
        networks = {label: load(uri) for label, uri in parse_labelled(checkpoints).items()}
        scores = benchmarks.score(networks, parse_labelled(benchmark), show)
        table = Table("benchmark", "network", "of", "PSNR dB (Y)", "SSIM (Y)", "SSIM (RGB)", "LR")
        for each in scores:
            figures = (f"{each.psnr:.2f}", f"{each.ssim:.4f}", f"{each.ssim_rgb:.4f}")
            table.add_row(each.benchmark, each.network, each.of, *figures, each.lr)
        console.print(table)
        write_result(json_file, [asdict(each) for each in scores])


@app.command()
def gradcam(
    checkpoints: Labelled,
    out: Png,
    data: Data = None,
    split: Split = "val",
    count: Count = 6,
    settings: Settings = None,
    json_file: JsonFile = None,
) -> None:
    """Where task networks look for the true class: Grad-CAM, a column a checkpoint (section S3).

    For classification and segmentation; needs the extra `analysis`.

        python jobs/analyze.py gradcam CQMix=runs/A "no CQMix=runs/B" --out gradcam.png
    """
    from sr4ir_dist.analysis.comparison import compare
    from sr4ir_dist.analysis.gradcam import write_gradcam
    from sr4ir_dist.analysis.labels import parse_labelled

    with user_errors():
        compared = compare(
            parse_labelled(checkpoints), data=data or None, split=split, settings=settings or []
        )
        with progress_bars() as show:
            said = write_gradcam(
                compared, out, count=count, told=lambda done: show("images", done, count)
            )
        console.print(f"picture  {out}", soft_wrap=True, highlight=False)
        write_result(json_file, {"images": said})


@app.command()
def tsne(
    checkpoints: Labelled,
    out: Png,
    oracle: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Whose task network sees all images, as one of h2t; by default the first one's.",
        ),
    ] = None,
    data: Data = None,
    split: Split = "val",
    count: Count = 200,
    seed: Annotated[int, typer.Option(help="Another seed, another plane.")] = 0,
    settings: Settings = None,
    json_file: JsonFile = None,
) -> None:
    """How far SR images are from HR in a task network's features: t-SNE, a plot each (section S1).

    The distance from HR is a share of that between two HR images. `--json` has all points. Needs
    the extra `analysis`.

        python jobs/analyze.py tsne S=runs/A SR4IR=runs/B --oracle runs/C --out tsne.png
    """
    from sr4ir_dist.analysis.comparison import compare
    from sr4ir_dist.analysis.labels import parse_labelled
    from sr4ir_dist.analysis.loaded import load
    from sr4ir_dist.analysis.tsne import collect, embed, write_scatter

    with user_errors():
        compared = compare(
            parse_labelled(checkpoints), data=data or None, split=split, settings=settings or []
        )
        judge = None if oracle is None else load(oracle)
        with progress_bars() as show:
            features = collect(
                compared, judge, count=count, told=lambda done: show("images", done, count)
            )
        result = write_scatter(features, embed(features, seed=seed), out)
        console.print(result_table("distance from HR", result["gap"]))
        console.print(f"picture  {out}", soft_wrap=True, highlight=False)
        write_result(json_file, result)


def _evaluated(
    requests: judged.Keyed, wanted: tuple, address: str | None, cache_dir: str | None
) -> dict[tuple[str, str], dict[str, float]]:
    from sr4ir_dist import parallel
    from sr4ir_dist.training import launch

    for note in dict.fromkeys(note for each in requests.values() for note in each.notes):
        say(f"note: {note}")
    parallel.connect(address)
    resources = launch.Resources(*wanted)
    found = launch.evaluate(list(requests.values()), resources, cache_dir=cache_dir)
    return dict(zip(requests, found, strict=True))


def _figure_of(request: EvaluationRequest) -> str:
    from sr4ir_dist.training.build import make_task

    task = make_task(request.experiment)
    return "psnr" if task is None else task.figure


def _as_list(figures: dict, names: tuple[str, str]) -> list[dict]:
    return [
        dict(zip(names, key, strict=True)) | {"metrics": value} for key, value in figures.items()
    ]


def _beside(ours: float | None, paper: float | None, unit: str = "") -> str:
    text = "-" if ours is None else f"{ours:.1f}{unit}"
    return f"{text} ({paper:g}{unit})" if paper else text


if __name__ == "__main__":
    app()
