"""Export a checkpoint's networks to safetensors and ONNX: `python jobs/export.py --help`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from sr4ir_dist.cli import JsonFile, console, make_app, say, user_errors, write_result

app = make_app()


@app.command()
def main(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, or a run for its newest: a path or URI, or `hub://NAME`."
        ),
    ],
    out: Annotated[str, typer.Option(help="Where to, a path or URI; no export may be there yet.")],
    formats: Annotated[
        str, typer.Option(help="What to write beside the JSON: `safetensors`, `onnx` or both.")
    ] = "safetensors,onnx",
    data: Annotated[
        str | None,
        typer.Option(help="Dataset that names the classes; by default the run's own."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Write the networks of a checkpoint for people who do not have this package.

    python jobs/export.py runs/drawn_cls-edsr-x4-sr4ir-1a2b3c4d --out exported

    - `sr.json`, `task.json`: how to build the network (torchvision's constructor and arguments, or
      the SR network's layers), its input, output, classes, metrics and origin.
    - `sr.safetensors`, `task.safetensors`: its weights, in public names.
    - `sr.onnx`, `task.onnx`, `pipeline.onnx` (LR image to SR image and class scores): for any
      number and size of RGB images in [0, 1], each compared with the network by onnxruntime.
      Detectors have no ONNX. Needs `pip install -e '.[export]'`.
    - `export.json`: sizes, digests and differences; written last, so that no export is half there.
    """
    from sr4ir_dist.export.write import export

    with user_errors():
        wanted = [name.strip() for name in formats.split(",")]
        result = export(checkpoint, out, formats=wanted, data=data, say=say)
        _print(out, result)
        write_result(json_file, {"out": out, **result})


def _print(out: str, result: dict[str, Any]) -> None:
    table = Table("file", title=out)
    for heading in ("MB", "onnxruntime differs by"):
        table.add_column(heading, justify="right")
    for name, file in result["files"].items():
        checked = result["onnx"].get(name, {"checked": []})["checked"]
        worst = [max(shape["difference"].values()) for shape in checked]
        table.add_row(name, f"{file['bytes'] / 1e6:.2f}", f"{max(worst):.1g}" if worst else "")
    console.print(table)
    for note in result["notes"]:
        console.print(note, markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
