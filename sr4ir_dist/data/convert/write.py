"""Writing an opened source as a dataset: parts in any order and place, the manifests last.

Parts that are finished stay until the dataset is there, so that the same conversion begun again
makes only the others. No reader sees them: no manifest names their shards.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import sr4ir_dist
from sr4ir_dist import storage
from sr4ir_dist.data.convert.parts import OnBadRow, PartRecord
from sr4ir_dist.data.convert.plan import RECORDS_PREFIX, Conversion, plan_conversion
from sr4ir_dist.data.convert.source import Converter, Source
from sr4ir_dist.data.schema import MANIFEST_NAME, DatasetError, Manifest
from sr4ir_dist.data.shards import SHARD_SUFFIX, has_split, load_manifest
from sr4ir_dist.parallel import Run, on_threads, threads_of_job

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
        resumed: how many of its items were done by an earlier call.
    """

    manifest: Manifest
    skipped: tuple[str, ...]
    tally: dict[str, int]
    resumed: int


def convert(
    converter: Converter,
    source: Source,
    uri: str,
    *,
    name: str | None = None,
    on_bad_row: OnBadRow = "fail",
    overwrite: bool = False,
    threads: int | None = None,
    run: Run | None = None,
    progress: Callable[[str, int, int], None] = lambda split, done, total: None,
    say: Callable[[str], None] = lambda text: None,
    shard_bytes: int = 96 << 20,
    batch_bytes: int = 6 << 20,
    min_batches: int = 64,
) -> dict[str, ConvertedSplit]:
    """Write every split of a source; all are committed one after the other at the very end.

    A failure or a kill before that leaves finished parts, which the same call uses when it is made
    again, and the dataset that is replaced as it was. The result is the same, byte for byte,
    whatever was interrupted and wherever parts are made. It is the same conversion while converter,
    options, version of the package and the list of items are the same; files of the source that
    were changed in place are not noticed.

    Args:
        converter: the source's kind.
        source: the opened source.
        uri: where the dataset goes.
        name: the dataset's name; the converter's by default.
        on_bad_row: what to do with a sample that cannot be read: fail, or leave it out.
        overwrite: replace a dataset that is there.
        threads: how many samples of a part are read and checked at once; by default all parts
            together take as many as there are CPUs.
        run: where parts are made; on threads of this process by default.
        progress: called after each part with its split, and the number of items done and of all.
        say: is told what an earlier call did.
        shard_bytes: what the images and masks of a shard take together, about.
        batch_bytes: a record batch is closed when its payload reaches this.
        min_batches: a split of at least so many rows gets at least so many record batches, so that
            small datasets have more of them than ranks.

    Returns:
        What became of each split.

    Raises:
        DatasetError: another dataset is there already, a sample is bad, or no sample is good; names
            the file.
        StorageError: the source cannot be read or the dataset cannot be written.
    """
    name = name or converter.name
    facts = {
        "converter": converter.name,
        "version": sr4ir_dist.__version__,
        **source.facts,
    }
    conversion = plan_conversion(
        source,
        uri,
        name=name,
        tasks=converter.tasks,
        facts=facts,
        on_bad_row=on_bad_row,
        threads=threads or threads_of_job(),
        shard_bytes=shard_bytes,
        batch_bytes=batch_bytes,
        min_batches=min_batches,
    )
    facts |= {"conversion": conversion.digest, "on_bad_row": on_bad_row}
    if not overwrite and _is_finished(uri, source.splits, facts):
        say("this conversion is finished already; --overwrite would do it again")
        result = {split: _read_back(uri, split) for split in source.splits}
    else:
        storage.check_writable(conversion.make.records)
        records, resumed = _make_parts(conversion, run or on_threads(), progress, say)
        result = {
            split: _joined(
                Manifest(name, split, converter.tasks, source.class_names, (), facts),
                [record for record in records if record.split == split],
                resumed[split],
            )
            for split in source.splits
        }
        _commit(uri, result)
    _clean(uri, conversion, result)
    return result


def _is_finished(uri: str, splits: Sequence[str], facts: dict[str, Any]) -> bool:
    """Whether the manifests of a conversion, told by its facts, are all there.

    Raises:
        DatasetError: there are others.
    """
    found = [split for split in splits if has_split(uri, split)]
    others = [split for split in found if not _is_of(uri, split, facts)]
    if others:
        raise DatasetError(
            f"{uri}: there is a dataset already (splits {', '.join(others)}); "
            "pass --overwrite to replace it"
        )
    return len(found) == len(splits)


def _is_of(uri: str, split: str, facts: dict[str, Any]) -> bool:
    try:
        found = load_manifest(uri, split).source
    except DatasetError:  # of another version of the format, say
        return False
    return all(found.get(key) == facts[key] for key in ("conversion", "on_bad_row"))


def _read_back(uri: str, split: str) -> ConvertedSplit:
    manifest = load_manifest(uri, split)
    facts = manifest.source
    items = manifest.rows + facts["skipped"]
    return ConvertedSplit(manifest, tuple(facts["skipped_rows"]), facts["tally"], items)


def _make_parts(
    conversion: Conversion,
    run: Run,
    progress: Callable[[str, int, int], None],
    say: Callable[[str], None],
) -> tuple[list[PartRecord], Counter[str]]:
    """The records of all parts, in order, and how many items of each split were done before."""
    make = conversion.make
    finished = _finished_parts(conversion)
    if finished:
        say(f"continuing: {len(finished)} of {len(conversion.parts)} parts are there")
    there = {(record.split, record.number) for record in finished}
    missing = [part for part in conversion.parts if (part.split, part.number) not in there]
    resumed: Counter[str] = Counter()
    for record in finished:
        resumed[record.split] += record.items
    totals: Counter[str] = Counter()
    for part in conversion.parts:
        totals[part.split] += len(part.items)
    for split, total in totals.items():
        progress(split, 0, total)
    records: list[PartRecord] = []
    done: Counter[str] = Counter()
    for record in chain(finished, run(make, missing)):
        # Of a part that was made when bad rows were to be skipped.
        if record.skipped and make.on_bad_row == "fail":
            raise DatasetError(record.skipped[0])
        records.append(record)
        done[record.split] += record.items
        progress(record.split, done[record.split], totals[record.split])
    return sorted(records, key=lambda record: record.number), resumed


def _finished_parts(conversion: Conversion) -> list[PartRecord]:
    """The records that an earlier call left, of parts whose shards are still there."""
    make = conversion.make
    names = {*storage.list_names(make.records)}
    if not names:
        return []
    with ThreadPoolExecutor(make.threads) as pool:
        wanted = [part.record for part in conversion.parts if part.record in names]
        values = pool.map(lambda name: storage.read_json(storage.join(make.records, name)), wanted)
        records = [PartRecord.from_json(value) for value in values]
    splits = {record.split for record in records}
    shards = {split: {*storage.list_names(storage.join(make.uri, split))} for split in splits}
    return [
        record
        for record in records
        if all(shard.path in shards[record.split] for shard in record.shards)
    ]


def _joined(manifest: Manifest, records: Sequence[PartRecord], resumed: int) -> ConvertedSplit:
    """A split of its parts; the manifest lacks only what they know."""
    skipped = tuple(message for record in records for message in record.skipped)
    tally: Counter[str] = Counter()
    for record in records:
        tally.update(record.tally)
    facts = {
        **manifest.source,
        "skipped": len(skipped),
        "skipped_rows": list(skipped[:_LISTED]),
        "tally": dict(tally),
    }
    shards = tuple(shard for record in records for shard in record.shards)
    return ConvertedSplit(
        replace(manifest, shards=shards, source=facts), skipped, dict(tally), resumed
    )


def _commit(uri: str, result: dict[str, ConvertedSplit]) -> None:
    for split, converted in result.items():
        if not converted.manifest.shards:
            first = "".join(f": {message}" for message in converted.skipped[:1])
            raise DatasetError(f"{storage.join(uri, split)}: no row could be written{first}")
    for split, converted in result.items():
        manifest = storage.join(uri, split, MANIFEST_NAME)
        storage.write_bytes(manifest, converted.manifest.to_bytes())


def _clean(uri: str, conversion: Conversion, result: dict[str, ConvertedSplit]) -> None:
    """Delete what no manifest names.

    These are the shards of a dataset that was replaced and of conversions that were given up, and
    all records. Records of others go before the shards that they name; this conversion's go last,
    so that it cleans up again if it is killed here.
    """
    own = conversion.make.records
    for name in storage.list_names(uri):
        if name.startswith(RECORDS_PREFIX) and storage.join(uri, name) != own:
            storage.delete(storage.join(uri, name))
    for split, converted in result.items():
        folder = storage.join(uri, split)
        used = {shard.path for shard in converted.manifest.shards}
        for name in storage.list_names(folder):
            if name.endswith(SHARD_SUFFIX) and name not in used:
                storage.delete(storage.join(folder, name))
        storage.delete_unfinished(folder)
    storage.delete(own)
