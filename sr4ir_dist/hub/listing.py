"""What is in a hub: every published version with its card and tags, filtered and sorted."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.hub.cards import Card, load_card
from sr4ir_dist.hub.names import PATH, TAGS, VERSION, VERSIONS, HubError, Name
from sr4ir_dist.hub.versions import find, tags, uri_of

NEWEST = "newest"
"""The order of versions by the time of their publication."""
FIELDS: dict[str, Callable[[Card], Any]] = {
    "task": lambda card: card.task,
    "data": lambda card: card.dataset,
    "sr": lambda card: card.sr,
    "scale": lambda card: card.scale,
    "recipe": lambda card: card.recipe,
}
"""What versions can be found by, besides their figures."""
_VERSION_FILE = re.compile(
    rf"(?P<path>{PATH.pattern})/{VERSIONS}/(?P<version>{VERSION.pattern})/{re.escape(checkpoint.MANIFEST)}"
)
_TAG_FILE = re.compile(rf"(?P<path>{PATH.pattern})/{TAGS}/[^/]+\.json")
_CONDITION = re.compile(r"\s*(?P<metric>\w+)\s*(?P<compare>>=|<=|>|<|=)\s*(?P<number>\S+)\s*")
_COMPARE = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
_LOWER_IS_BETTER = ("lpips",)
_READERS = 16  # an object store answers many small reads at once


@dataclass(frozen=True)
class Entry:
    """A published version.

    Attributes:
        name: with the version's id.
        card: what it says of itself.
        tags: the tags that name it, in alphabetical order.
    """

    name: Name
    card: Card
    tags: tuple[str, ...]


def entry(name: Name, hub: str) -> Entry:
    """One version.

    Raises:
        HubError: there is no such version, or its card or a tag is malformed.
        CheckpointError: it is damaged.
    """
    found = find(name, hub)
    return Entry(found, _card(found, hub), _naming(found, tags(found.path, hub)))


def entries(hub: str, prefix: str = "") -> tuple[list[Entry], list[str]]:
    """All published versions of a hub whose names begin with a prefix, the newest first.

    Returns:
        The versions, and in words what could not be read: one damaged card hides no other.

    Raises:
        StorageError: the storage does not answer.
    """
    files = [file for file in storage.list_files(hub) if file.startswith(prefix)]
    found = [match for file in files if (match := _VERSION_FILE.fullmatch(file))]
    names = [Name(match["path"], match["version"]) for match in found]
    tagged = sorted({match["path"] for file in files if (match := _TAG_FILE.fullmatch(file))})
    with ThreadPoolExecutor(_READERS) as pool:
        cards = {name: pool.submit(_tried, _card, name, hub) for name in names}
        tags_of = {path: pool.submit(_tried, tags, path, hub) for path in tagged}
    read = [each.result() for each in (*cards.values(), *tags_of.values())]
    problems = [found for found in read if isinstance(found, str)]
    result = []
    for name, card in cards.items():
        of_name = tags_of[name.path].result() if name.path in tags_of else {}
        if isinstance(card.result(), Card):
            named = _naming(name, of_name) if isinstance(of_name, dict) else ()
            result.append(Entry(name, card.result(), named))
    result.sort(key=lambda entry: (str(entry.name.which), entry.name.path), reverse=True)
    return result, problems


def select(
    found: Iterable[Entry],
    wanted: Mapping[str, str | int | None],
    conditions: Iterable[str] = (),
    sort: str = NEWEST,
) -> list[Entry]:
    """The versions that have what is wanted, in an order.

    Args:
        found: the newest first.
        wanted: the value of some of `FIELDS`; None for any.
        conditions: such as `miou>60`; all must hold. Also `>=`, `<=`, `<` and `=`.
        sort: `NEWEST`, or a figure, the best first and those without it last.

    Raises:
        HubError: a condition is malformed, or no version at all has such a value or figure; the
            message says which there are.
    """
    found = list(found)
    chosen = found
    for field, value in wanted.items():
        if value is not None:
            of = FIELDS[field]
            _known(f"{field}={value}", value, {of(entry.card) for entry in found})
            chosen = [entry for entry in chosen if of(entry.card) == value]
    metrics = {metric for entry in found for metric in entry.card.metrics}
    for condition in conditions:
        match = _CONDITION.fullmatch(condition)
        if match is None or not _is_number(match["number"]):
            raise HubError(f"metric {condition!r}: expected such as miou>60 or lpips<=0.2")
        _known(f"metric {condition!r}", metric := match["metric"], metrics)
        holds, number = _COMPARE[match["compare"]], float(match["number"])
        of_metric = ((entry, entry.card.metrics.get(metric)) for entry in chosen)
        chosen = [entry for entry, value in of_metric if value is not None and holds(value, number)]
    if sort == NEWEST:
        return chosen
    _known(f"sort={sort}", sort, metrics | {NEWEST})
    with_it = [entry for entry in chosen if sort in entry.card.metrics]
    without = [entry for entry in chosen if sort not in entry.card.metrics]
    best_is_high = sort not in _LOWER_IS_BETTER
    return sorted(with_it, key=lambda e: e.card.metrics[sort], reverse=best_is_high) + without


def _card(name: Name, hub: str) -> Card:
    return load_card(checkpoint.load(uri_of(name, hub)))


def _naming(name: Name, of_name: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(tag for tag, version in of_name.items() if version == name.which)


def _tried(read: Callable[[Any, str], Any], what: Any, hub: str) -> Any:
    """What is read, or why it cannot be."""
    try:
        return read(what, hub)
    except (checkpoint.CheckpointError, storage.MissingError) as error:
        return str(error)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _known(what: str, value: Any, known: Iterable[Any]) -> None:
    there = sorted(str(each) for each in known if each is not None)
    if str(value) not in there:
        raise HubError(f"{what}: no version has it; there are: {', '.join(there) or 'none'}")
