"""The tables that the benchmark's commands print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, fields

from rich.table import Table

from sr4ir_dist.benchmark.data import Entry
from sr4ir_dist.benchmark.overhead import FullSize, Overhead
from sr4ir_dist.benchmark.scaling import Run, median
from sr4ir_dist.benchmark.scaling_outlook import Check, Outlook
from sr4ir_dist.benchmark.start import Start
from sr4ir_dist.benchmark.step import PARTS, Result
from sr4ir_dist.benchmark.zero import Figures


def of_data(entries: Sequence[Entry]) -> Table:
    """Contenders' data paths."""
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
    return table


def of_steps(results: Sequence[Result]) -> Table:
    """Contenders' steps, a column each."""
    table = Table("a step", "")
    for each in results:
        table.add_column(each.label, justify="right", overflow="fold")

    def row(name: str, unit: str, cell: Callable[[Result], str]) -> None:
        table.add_row(name, unit, *map(cell, results))

    row("time", "ms", lambda each: f"{1e3 * each.seconds:,.0f}")
    for part in PARTS:
        row(f"  {part}", "ms", lambda each, part=part: f"{1e3 * each.parts[part]:,.0f}")
    row("images", "1/s", lambda each: f"{each.images_per_second:.3g}")
    row("speed-up", "", lambda each: f"{each.speedup:.2f}")
    row("operations", "GFLOPs/image", lambda each: f"{each.cost.gflops / each.images:.1f}")
    row("of the peak", "", lambda each: f"{each.peak_share:.0%}")
    row("operators", "", lambda each: f"{each.cost.operators:,}")
    row("host syncs", "", lambda each: str(each.cost.syncs))
    row("peak memory", "MB", lambda each: f"{each.cost.peak_mb:,.0f}")
    return table


def of_loop(run: Run) -> Table:
    """Where the time of a step of the training loop goes."""
    table = Table("the loop, ranks")
    for field in fields(run.times):
        table.add_column(f"{field.name}, ms", justify="right")
    table.add_row(str(run.ranks), *(f"{1e3 * each:,.0f}" for each in astuple(run.times)))
    return table


def of_runs(runs: Sequence[Run], checks: Sequence[Check]) -> tuple[Table, Table]:
    """Times and traffic of runs of several ranks."""
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
    return times, traffic


def of_outlook(name: str, found: Sequence[Outlook]) -> Table:
    """An experiment as it is modelled on many GPUs."""
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
    return table


def of_overhead(found: Mapping[str, Overhead], full: FullSize) -> Table:
    """What is added to a step, and what share of a step at full size that is.

    Args:
        found: by where the process runs.
        full: that step.
    """
    of = f" ({full.experiment}, {full.images} images)" if full.experiment else ""
    title = f"share of a step of {full.seconds:.3g} s{of}"
    table = Table("milliseconds of a tiny step", title=title)
    for heading in (*found, *(f"share, {where}" for where in found)):
        table.add_column(heading, justify="right")
    rows = {
        "plain PyTorch engines": "plain",
        "DeepSpeed engines": "deepspeed",
        "the loop on DeepSpeed engines": "loop",
        "added by DeepSpeed": "by_deepspeed",
        "added by the loop": "by_loop",
        "added by both": "both",
    }
    for label, name in rows.items():
        values = [getattr(each, name) for each in found.values()]
        added = label.startswith("added")
        shares = [f"{value / 1e3 / full.seconds:+.2%}" if added else "" for value in values]
        table.add_row(label, *(f"{value:{'+' if added else ''}.2f}" for value in values), *shares)
    return table


def of_starts(starts: Sequence[Start]) -> Table:
    """Runs' starts, one after the other."""
    table = Table("seconds")
    for number in range(1, len(starts) + 1):
        table.add_column(f"run {number}", justify="right")
    for part in starts[0].parts:
        table.add_row(part, *(f"{each.parts.get(part, 0):.1f}" for each in starts))
    table.add_row("to the end of the first step", *(f"{each.seconds:.1f}" for each in starts))
    table.add_row("to the end of the command", *(f"{each.whole:.1f}" for each in starts))
    return table


def of_zero(stages: Sequence[Figures]) -> Table:
    """A rank's memory and time at each ZeRO stage."""
    table = Table("stage", title="each rank, the one with the most")
    for heading in ("held MB", "peak MB", "ms a step"):
        table.add_column(heading, justify="right")
    for each in stages:
        figures = (each.held_mb, each.peak_mb, 1e3 * each.seconds)
        table.add_row(str(each.stage), *(f"{figure:,.0f}" for figure in figures))
    return table
