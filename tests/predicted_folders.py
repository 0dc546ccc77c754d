"""What predictions wrote, to compare folders by."""

from pathlib import Path


def contents(folder):
    """The bytes of every file below a folder, by its path."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
