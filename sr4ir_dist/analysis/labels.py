"""`LABEL=URI`, as jobs take checkpoints and runs that a table or a picture names."""

from __future__ import annotations

from collections.abc import Sequence


def parse_labelled(words: Sequence[str]) -> dict[str, str]:
    """The URI of each label, in order; a URI without a label is called by its last component.

    Args:
        words: `LABEL=URI` or `URI` each; a label has no slash.

    Raises:
        ValueError: a label or URI is empty, or a label comes twice.
    """
    found: dict[str, str] = {}
    for word in words:
        label, equals, uri = word.partition("=")
        if not equals or "/" in label:
            label, uri = word.rstrip("/").rpartition("/")[2], word
        label = label.strip()
        if not label or not uri:
            raise ValueError(f"{word!r}: expected LABEL=URI, as in SR4IR=runs/...")
        if label in found:
            raise ValueError(f"{word!r}: another one has the label {label!r} too")
        found[label] = uri.strip()
    return found
