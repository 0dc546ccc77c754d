"""Train SR4IR on a small drawn dataset and show the result: `python jobs/quickstart.py --help`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from sr4ir_dist.cli import JsonFile, console, make_app, user_errors, write_result

app = make_app()


@app.command()
def main(
    folder: Annotated[
        str, typer.Option(help="Where dataset and runs go, a path or URI.")
    ] = "runs/quickstart",
    workers: Annotated[int, typer.Option(help="Ranks of each run.")] = 2,
    json_file: JsonFile = None,
) -> None:
    """Draw a dataset, pre-train an SR network, train L->T and SR4IR, and compare both.

    It takes about five minutes on two cores. Finished runs are not repeated: give another
    `--folder`, or remove the old one, to see it all again.
    """
    from sr4ir_dist import quickstart
    from sr4ir_dist.training.launch import TrainingError

    with user_errors(TrainingError):
        result = quickstart.run(folder, workers=workers, say=console.print)
        _print(result.runs)
        sr4ir = result.runs["SR4IR"]
        console.print(f"dataset     {result.data}", soft_wrap=True)
        console.print(f"SR4IR run   {sr4ir['run_uri']}", soft_wrap=True)
        console.print(f"checkpoint  {sr4ir['checkpoint']}", soft_wrap=True)
        console.print(f"pictures    {result.picture}", soft_wrap=True)
        console.print(f"report      {result.report}", soft_wrap=True)
        write_result(
            json_file,
            {"runs": result.runs, "picture": result.picture, "report": result.report},
        )


def _print(runs: dict[str, dict]) -> None:
    table = Table("method", title="x4, 8 classes (chance 12.5 %)")
    for heading in ("top-1 %", "PSNR dB", "SSIM", "steps", "training time"):
        table.add_column(heading, justify="right")
    for label, run in runs.items():
        figures = run["metrics"]
        table.add_row(
            label,
            f"{figures['top1']:.1f}",
            f"{figures['psnr']:.2f}",
            f"{figures['ssim']:.3f}",
            str(run["steps"]),
            f"{run['seconds']:.0f} s",
        )
    console.print(table)


if __name__ == "__main__":
    app()
