"""What a mistyped name was perhaps meant to be."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Words to append to the message about an unknown name.

    Args:
        name: the unknown name.
        known: the names that there are.
        cutoff: how alike (0 to 1) a known name must be to be offered.

    Returns:
        ``; did you mean 'a', 'b' or 'c'?`` with up to three known names, the nearest first, or
        nothing when none is near.
    """
    near = [repr(match) for match in difflib.get_close_matches(name, known, n=3, cutoff=cutoff)]
    if not near:
        return ""
    *others, last = near
    return f"; did you mean {', '.join(others)} or {last}?" if others else f"; did you mean {last}?"


def unknown_key(path: str, known: Iterable[str]) -> str:
    """The message for a setting's dotted path that is not there, with the nearest that are."""
    known = list(known)
    last = path.rpartition(".")[2]
    alike = [name for name in known if name.rpartition(".")[2] == last]
    hint = did_you_mean(path, alike, cutoff=0) or did_you_mean(path, known, cutoff=0.5)
    return f"unknown key {path!r}{hint} (--show lists every key)"
