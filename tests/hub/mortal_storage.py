"""A process that dies at a write or deletion of its storage."""

from collections import Counter

from sr4ir_dist import storage


class Killed(BaseException):
    """The process ends here: nothing in the package may catch it."""


def dying(monkeypatch, at):
    """Lets the process die before (even) or after (odd) a write or deletion; counts them."""
    counted = Counter()

    def mortal(operation):
        def operate(*arguments):
            number = counted["operations"]
            counted["operations"] += 1
            if number == at // 2 and at % 2 == 0:
                raise Killed
            operation(*arguments)
            if number == at // 2:
                raise Killed

        return operate

    monkeypatch.setattr(storage, "write_bytes", mortal(storage.write_bytes))
    monkeypatch.setattr(storage, "delete", mortal(storage.delete))
    return counted
