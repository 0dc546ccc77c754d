"""Look at networks and runs: `python jobs/analyze.py --help`."""

from __future__ import annotations

from sr4ir_dist.cli import make_app

app = make_app()


@app.callback()
def main() -> None:
    """Figures and measurements behind the paper's supplement, one command each."""


if __name__ == "__main__":
    app()
