"""Share checkpoints by name: `python jobs/checkpoints.py --help`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from sr4ir_dist.cli import JsonFile, console, result_table, say, user_errors, write_result
from sr4ir_dist.hub import listing, names, sharing, versions
from sr4ir_dist.hub.cards import Card

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Share checkpoints by name, through a bucket or a folder: the hub.\n\n"
        "    export SR4IR_HUB=s3://bucket/hub\n\n"
        "    python jobs/checkpoints.py publish runs/RUN team/voc_seg-edsr-x8 --tag best\n\n"
        "    python jobs/evaluate.py hub://team/voc_seg-edsr-x8@best\n\n"
        "    python jobs/train.py ... --set sr.weights=hub://team/voc_seg-edsr-x8\n\n"
        "Each `publish` makes a new version, with an id of its own, that never changes. NAME alone "
        "is the newest version, NAME@TAG the one that a tag names, NAME@ID that version for good. "
        "Wherever a job takes a checkpoint, it takes `hub://NAME`."
    ),
)

Hub = Annotated[
    str | None,
    typer.Option(
        "--hub", envvar=names.ROOT_VARIABLE, help="The hub: a path or `s3://bucket/prefix`."
    ),
]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME[@ID|@TAG]", help="A version; the newest by default.")
]
Prefix = Annotated[str, typer.Argument(help="Names that begin so, such as `team/`.")]


@app.command()
def publish(
    source: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run for its newest.")
    ],
    name: Annotated[str, typer.Argument(help="Such as `team/voc_seg-edsr-x8`.")],
    note: Annotated[str, typer.Option(help="A line for those who look for a checkpoint.")] = "",
    tag: Annotated[str | None, typer.Option(help="Also give this tag to the version.")] = None,
    hub: Hub = None,
    json: JsonFile = None,
) -> None:
    """Copy a checkpoint into the hub as a new version of NAME.

    Its experiment, figures and a model card go with it. What is published twice, by one person or
    by two at once, is two versions.
    """
    with user_errors():
        found = versions.publish(source, name, hub=names.root(hub), note=note, tag=tag)
        _print(f"{names.SCHEME}{found}")
        write_result(json, {"name": found.path, "version": found.which, "tag": tag})


@app.command("list")
def list_names(prefix: Prefix = "", hub: Hub = None, json: JsonFile = None) -> None:
    """List the names in the hub, each with its newest version and all its tags."""
    with user_errors():
        grouped: dict[str, list[listing.Entry]] = {}
        for entry in _entries(names.root(hub), prefix):
            grouped.setdefault(entry.name.path, []).append(entry)
        table = Table(
            Column("name", no_wrap=True), "versions", "tags", "newest", "experiment", "figures"
        )
        result = []
        for path, (newest, *others) in sorted(grouped.items()):
            tags = sorted(tag for entry in (newest, *others) for tag in entry.tags)
            card, count = newest.card, 1 + len(others)
            day, figures = card.published[:10], _figures(card)
            texts = (path, count, " ".join(tags), day, card.experiment, figures)
            table.add_row(*map(_cell, texts))
            result.append({"versions": count, "tags": tags, "newest": _as_json(newest)})
        console.print(table)
        write_result(json, result)


@app.command()
def search(
    prefix: Prefix = "",
    task: Annotated[str | None, typer.Option(help="Such as `segmentation`.")] = None,
    data: Annotated[str | None, typer.Option(help="Such as `voc_seg`.")] = None,
    sr: Annotated[str | None, typer.Option(help="SR network: `edsr`, `swinir`.")] = None,
    scale: Annotated[int | None, typer.Option(help="2, 4 or 8.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Such as `sr4ir`.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A figure's bound, such as 'miou>60'; may be repeated."),
    ] = None,
    sort: Annotated[
        str, typer.Option(help=f"A figure, the best first, or {listing.NEWEST}.")
    ] = listing.NEWEST,
    hub: Hub = None,
    json: JsonFile = None,
) -> None:
    """Find versions by what was trained and how well it does.

    python jobs/checkpoints.py search --data voc_seg --scale 8 --metric 'miou>60' --sort miou
    """
    with user_errors():
        wanted = {"task": task, "data": data, "sr": sr, "scale": scale, "recipe": recipe}
        found = listing.select(_entries(names.root(hub), prefix), wanted, metric or [], sort)
        table = Table(Column("version", no_wrap=True), "tags", "experiment", "figures", "note")
        for entry in found:
            card = entry.card
            texts = (entry.name, " ".join(entry.tags), card.experiment, _figures(card), card.note)
            table.add_row(*map(_cell, texts))
        console.print(table)
        write_result(json, [_as_json(entry) for entry in found])


@app.command()
def show(name: NameArgument, hub: Hub = None, json: JsonFile = None) -> None:
    """Show a version: its card, its tags, where it lies, and the other versions of the name."""
    with user_errors():
        root = names.root(hub)
        entry = listing.entry(names.parse(name), root)
        published, _ = versions.versions(entry.name.path, root)
        uri = versions.resolve(f"{names.SCHEME}{entry.name}", root)
        value = _as_json(entry) | {"uri": uri, "versions": [str(each.which) for each in published]}
        table = result_table(f"{names.SCHEME}{entry.name}", {})
        facts = entry.card.model_dump(exclude={"metrics"}) | {"figures": _figures(entry.card)}
        facts |= {"tags": entry.tags, "URI": uri, "versions": value["versions"]}
        for what, fact in facts.items():
            lines = fact if isinstance(fact, list | tuple) else [fact]
            table.add_row(what, _cell("\n".join(map(str, lines))))
        console.print(table)
        write_result(json, value)


@app.command()
def pull(
    source: Annotated[
        str, typer.Argument(metavar="NAME|URL", help="A name in the hub, or a shared URL.")
    ],
    to: Annotated[str, typer.Option(help="Folder or URI that the files go to.")],
    hub: Hub = None,
    json: JsonFile = None,
) -> None:
    """Fetch a version, every file checked against its digest.

    The same command again fetches what is missing. The folder is then a checkpoint like any other.
    """
    with user_errors():
        source = source if "://" in source else f"{names.SCHEME}{source}"
        saved = sharing.pull(source, to, hub=hub, say=say)
        _print(saved.uri)
        write_result(json, {"checkpoint": saved.uri, "files": list(saved.files)})


@app.command()
def share(
    name: NameArgument,
    expires: Annotated[str, typer.Option(help="Such as 45m, 12h or 7d, the longest.")] = "7d",
    hub: Hub = None,
    json: JsonFile = None,
) -> None:
    """Print a URL by which anybody can pull a version for a time, without credentials.

    python jobs/checkpoints.py pull 'URL' --to FOLDER
    """
    with user_errors():
        duration = sharing.seconds(expires)
        url = sharing.share(names.parse(name), hub=names.root(hub), expires=duration, say=say)
        _print(url)
        write_result(json, {"url": url, "seconds": duration})


@app.command()
def promote(
    name: NameArgument,
    tag: Annotated[str, typer.Argument(help="Such as `best`.")],
    hub: Hub = None,
    json: JsonFile = None,
) -> None:
    """Let TAG name a version, whatever it named before."""
    with user_errors():
        found = versions.promote(names.parse(name), tag, hub=names.root(hub))
        _print(f"{names.SCHEME}{found.path}@{tag} is {found.which}")
        write_result(json, {"name": found.path, "version": found.which, "tag": tag})


@app.command()
def verify(name: NameArgument, hub: Hub = None, json: JsonFile = None) -> None:
    """Read every file of a version, or of all versions of NAME, and compare its digest."""
    with user_errors():
        root, wanted = names.root(hub), names.parse(name)
        if wanted.which is not None:
            checked, unfinished = [versions.find(wanted, root)], []
        else:
            checked, unfinished = versions.versions(wanted.path, root)
            versions.find(wanted, root)  # says that there is none
        problems = {str(each): versions.verify(each, root) for each in checked}
        for each, found in problems.items():
            _print(f"{each}: {'; '.join(found) or 'sound'}")
        for each in unfinished:
            say(f"note: {each} is being published or was left half-way; `delete` removes it")
        write_result(json, {"problems": problems, "unfinished": [str(each) for each in unfinished]})
    if any(problems.values()):
        raise typer.Exit(1)


@app.command()
def delete(
    name: Annotated[str, typer.Argument(metavar="NAME@ID", help="One version, by its id.")],
    force: Annotated[bool, typer.Option("--force", help="With the tags that name it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    hub: Hub = None,
) -> None:
    """Delete a version for good. One that a tag names is refused unless you say --force."""
    with user_errors():
        root, version = names.root(hub), names.parse(name)
        versions.check_deletable(version, hub=root, force=force)
        if not yes:
            typer.confirm(f"Delete {version} from {root}?", abort=True, err=True)
        versions.delete(version, hub=root, force=force)
        _print(f"deleted {version}")


def _print(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _cell(value: object) -> Text:
    # Whole, to be copied, and without markup, which others wrote.
    return Text(str(value), overflow="fold")


def _entries(root: str, prefix: str) -> list[listing.Entry]:
    found, problems = listing.entries(root, prefix)
    for problem in problems:
        say(f"note: {problem}")
    if not found:
        say(f"nothing is published in {root}{f' below {prefix}' if prefix else ''}")
    return found


def _figures(card: Card) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in card.metrics.items())


def _as_json(entry: listing.Entry) -> dict[str, Any]:
    name = {"name": entry.name.path, "version": entry.name.which, "tags": list(entry.tags)}
    return name | entry.card.model_dump()


if __name__ == "__main__":
    app()
