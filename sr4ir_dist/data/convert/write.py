"""Writing an opened source as a dataset."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import sr4ir_dist
from sr4ir_dist.data.convert.source import TALLY, Converter, Row, Source
from sr4ir_dist.data.schema import DatasetError, Manifest
from sr4ir_dist.data.shards import ShardWriter, has_split, load_manifest

# One bad file among millions is worth a line in the manifest, a million of them are not.
_LISTED = 1000


@dataclass(frozen=True)
class ConvertedSplit:
    """What a conversion made of a split.

    Attributes:
        manifest: the manifest as written.
        skipped: one message for each bad row that was left out.
        tally: what was found in the rows that were written (boxes that were dropped, images
            without objects), and how often.
    """

    manifest: Manifest
    skipped: tuple[str, ...]
    tally: dict[str, int]


def convert(
    converter: Converter,
    source: Source,
    uri: str,
    *,
    name: str | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[str, int], None] = lambda split, done: None,
    shard_bytes: int = 96 << 20,
) -> dict[str, ConvertedSplit]:
    """Write every split of a source; all are committed one after the other at the very end.

    A failure before that leaves nothing, or the dataset that is replaced as it was.

    Args:
        converter: the source's kind.
        source: the opened source.
        uri: where the dataset goes.
        name: the dataset's name; the converter's by default.
        on_bad_row: what to do with a sample that cannot be read: fail, or leave it out.
        overwrite: replace a dataset that is there.
        threads: how many samples are read and checked at once; the number of CPUs by default.
        progress: called after each row with the split and the number of items done in it.
        shard_bytes: a shard is closed when its payload reaches this.

    Returns:
        What became of each split.

    Raises:
        DatasetError: a dataset is there already, or a sample is bad; names the file.
        StorageError: the dataset cannot be written.
    """
    refuse_existing(uri, source.splits, overwrite)
    writers: dict[str, ShardWriter] = {}
    skipped: dict[str, list[str]] = {split: [] for split in source.splits}
    tallies: dict[str, Counter[str]] = {split: Counter() for split in source.splits}
    with ExitStack() as stack, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for split, count in source.counts.items():
            writers[split] = stack.enter_context(
                ShardWriter(
                    uri,
                    name=name or converter.name,
                    split=split,
                    tasks=converter.tasks,
                    class_names=source.class_names,
                    expected_rows=count,
                    overwrite=overwrite,
                    shard_bytes=shard_bytes,
                )
            )
        for split, writer in writers.items():
            bad = skipped[split]
            for done, row in enumerate(_read_ahead(pool, source.read, source.items(split)), 1):
                if isinstance(row, DatasetError):
                    if on_bad_row == "fail":
                        raise row
                    bad.append(str(row))
                else:
                    tallies[split].update(row.pop(TALLY, {}))
                    writer.append(row)
                progress(split, done)
            writer.source = {
                "converter": converter.name,
                "version": sr4ir_dist.__version__,
                **source.facts,
                "skipped": len(bad),
                "skipped_rows": bad[:_LISTED],
                "tally": dict(tallies[split]),
            }
    return {
        split: ConvertedSplit(
            load_manifest(uri, split), tuple(skipped[split]), dict(tallies[split])
        )
        for split in source.splits
    }


def refuse_existing(uri: str, splits: Iterable[str], overwrite: bool) -> None:
    """Refuse to replace a dataset by accident.

    Raises:
        DatasetError: one of the splits is there and ``overwrite`` is not set.
    """
    found = [split for split in splits if has_split(uri, split)]
    if found and not overwrite:
        raise DatasetError(
            f"{uri}: there is a dataset already (splits {', '.join(found)}); "
            "pass --overwrite to replace it"
        )


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[Any], Row], items: Iterable[Any]
) -> Iterator[Row | DatasetError]:
    """The rows of items in order, read by a pool; a bad one as its error."""

    def attempt(item: Any) -> Row | DatasetError:
        try:
            return read(item)
        except DatasetError as error:
            return error

    waiting: deque[Future[Row | DatasetError]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(attempt, item))
            if len(waiting) >= 64:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
