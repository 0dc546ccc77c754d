"""Drain this machine's Ray node when its end is announced: see `--help`."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from sr4ir_dist.cli import make_app, say, user_errors

app = make_app()


class Metadata(enum.StrEnum):
    """Whose metadata service is asked."""

    EC2 = "ec2"
    GCE = "gce"
    NONE = "none"


@app.command()
def main(
    address: Annotated[
        str | None, typer.Option(help="The cluster's head, HOST:6379; by default this machine's.")
    ] = None,
    metadata: Annotated[
        Metadata, typer.Option(help="Whose notices to ask for, besides signals.")
    ] = Metadata.EC2,
    every_s: Annotated[float, typer.Option(min=0.1, help="Seconds between questions.")] = 5,
    seconds: Annotated[
        int, typer.Option(min=1, help="Seconds that are left when a signal comes, or --now.")
    ] = 60,
    now: Annotated[
        bool, typer.Option("--now", help="The end is announced: drain at once.")
    ] = False,
    stay: Annotated[
        bool, typer.Option("--stay", help="End only when the node has left, or its time is up.")
    ] = False,
    head_seconds: Annotated[
        float | None,
        typer.Option(
            min=0, help="How long to ask a head that does not answer; by default to the end."
        ),
    ] = None,
    also_head: Annotated[
        bool, typer.Option("--also-head", help="Drain the head too, where it is on this machine.")
    ] = False,
    node_id: Annotated[
        list[str] | None, typer.Option(help="Drain this node instead; may be repeated.")
    ] = None,
) -> None:
    """Wait beside the raylet for the notice that this machine goes away, then drain its node.

    Runs on the node save at once and go on elsewhere. Notices are EC2's spot interruption (two
    minutes before), Compute Engine's preemption (30 seconds before), SIGTERM and SIGUSR1.

        python jobs/drain_on_notice.py --address $RAY_HEAD_IP:6379 &
    """
    from sr4ir_dist import notices

    with user_errors(), notices.held_signals():
        # Without an address it is looked for at the end, when Ray may have been started anew.
        head = notices.head_address(address) if address else None
        if now:
            notice = notices.Notice("the end was announced", seconds)
        else:
            make = notices.SOURCES.get(metadata.value)
            asked = f"{metadata.value}'s notices and " if make else ""
            say(f"waiting for {asked}SIGTERM or SIGUSR1, to drain this node")
            source = make() if make else None
            notice = notices.wait(source, every_s=every_s, signal_s=seconds, say=say)
            say(f"notice: {notice.why}; {notice.seconds} s are left")
        head = head or notices.head_address(None)
        drained = notices.drain(
            head,
            notice,
            node_ids=node_id or (),
            also_head=also_head,
            head_s=head_seconds,
            say=say,
        )
        if stay:
            gone = notices.wait_until_gone(head, drained, notice.seconds)
            say("the node has left the cluster" if gone else "the time is up")


if __name__ == "__main__":
    app()
