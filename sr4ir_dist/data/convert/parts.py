"""A part of a conversion: a run of a split's items that becomes a shard, anywhere and in any order.

A part's record, written after its shards, says that it is finished.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from sr4ir_dist import storage
from sr4ir_dist.data.convert.source import TALLY, Row
from sr4ir_dist.data.schema import DatasetError, Shard, checked_row
from sr4ir_dist.data.shards import build_shards

OnBadRow = Literal["fail", "skip"]
# Rows that are read and not yet written, beyond what threads are busy with.
_AHEAD = 64


@dataclass(frozen=True)
class Part:
    """What to convert.

    Attributes:
        split: the split that it is a part of.
        number: its place among the split's parts, from 0.
        items: the source's items.
        batch_rows: how many rows a record batch may have.
    """

    split: str
    number: int
    items: Sequence[Any]
    batch_rows: int

    @property
    def record(self) -> str:
        """The name of its record."""
        return f"{self.split}-{self.number:05d}.json"


@dataclass(frozen=True)
class PartRecord:
    """What became of a part.

    Attributes:
        split: the part's split.
        number: its number.
        items: how many items it has.
        shards: the manifest entries of its shards; none if all of its rows are bad.
        skipped: why rows were left out, one message each.
        tally: what was found in the rows that were written, and how often.
    """

    split: str
    number: int
    items: int
    shards: tuple[Shard, ...]
    skipped: tuple[str, ...]
    tally: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {**vars(self), "shards": [vars(shard) for shard in self.shards]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PartRecord":
        """The record in a JSON object."""
        tuples = ("batch_rows", "batch_groups")
        shards = [
            Shard(**{**shard, **{name: tuple(shard[name]) for name in tuples}})
            for shard in value["shards"]
        ]
        changed = {"shards": tuple(shards), "skipped": tuple(value["skipped"])}
        return cls(**{**value, **changed})


@dataclass(frozen=True)
class PartMaker:
    """Makes a part, in any process; the same part always has the same bytes.

    It reads the items, uploads the shards, each from memory in one request, and then the record. A
    part takes about the memory of one shard, and twice that while the shard's buffer grows.

    Attributes:
        uri: the dataset.
        records: the folder for records.
        read: the source's.
        schema: of the rows.
        classes: how many classes labels may name.
        on_bad_row: fail at a bad row, or leave it out.
        threads: how many items are read and checked at once.
        shard_bytes: see ``build_shards``.
        batch_bytes: see ``build_shards``.

    Raises:
        DatasetError: when called, for a bad row that is not to be skipped; names the file.
        StorageError: when called, for storage that does not answer or cannot be written.
    """

    uri: str
    records: str
    read: Callable[[Any], Row]
    schema: pa.Schema
    classes: int
    on_bad_row: OnBadRow
    threads: int
    shard_bytes: int
    batch_bytes: int

    def __call__(self, part: Part) -> PartRecord:
        """Makes a part; gives its record."""
        skipped: list[str] = []
        tally: Counter[str] = Counter()
        built = build_shards(
            self._good_rows(part.items, skipped, tally),
            self.schema,
            stem=f"part-{part.number:05d}",
            shard_bytes=self.shard_bytes,
            batch_bytes=self.batch_bytes,
            batch_rows=part.batch_rows,
        )
        shards = []
        for shard, content in built:
            storage.write_bytes(storage.join(self.uri, part.split, shard.path), content)
            shards.append(shard)
        record = PartRecord(
            part.split, part.number, len(part.items), tuple(shards), tuple(skipped), dict(tally)
        )
        storage.write_json(storage.join(self.records, part.record), record.to_json())
        return record

    def _good_rows(
        self, items: Iterable[Any], skipped: list[str], tally: Counter[str]
    ) -> Iterator[Row]:
        for row in self._rows(items):
            if isinstance(row, DatasetError):
                if self.on_bad_row == "fail":
                    raise row
                skipped.append(str(row))
            else:
                tally.update(row.pop(TALLY, {}))
                yield row

    def _rows(self, items: Iterable[Any]) -> Iterator[Row | DatasetError]:
        """The rows of items in order, read ahead by threads; a bad one as its error."""
        waiting: deque[Future[Row | DatasetError]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(self._attempt, item))
                    if len(waiting) >= _AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _attempt(self, item: Any) -> Row | DatasetError:
        try:
            row = dict(self.read(item))
            tally = row.pop(TALLY, {})
            return {**checked_row(row, self.schema, self.classes), TALLY: tally}
        except DatasetError as error:
            return error
