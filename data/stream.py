"""Streams conversations while training, without a first pass over them or a table on disk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from torch.utils.data import IterableDataset, get_worker_info

from data.config import DataConfig, Source
from data.dataset import Encoder, Sample, open_images
from data.images import inspect_image
from data.rows import DataError, Fault, Record, RowError, parse
from data.sources import HUB, NO_ROWS, find_files, has_rows, hub_rows, raw_rows
from data.table import check_folders, folder_of, image_options, row_of

_POOL: Final = 512  # samples that are shuffled and grouped by length together
_PROBED: Final = 100  # first rows of a source; at least one must be without a fault before training starts


class ConversationStream(IterableDataset[dict[str, Any]]):
    """An endless stream of one rank's samples, divided among its workers.

    There are n shards (ranks x workers). If the number of a source's files is a multiple of n, each shard reads
    different files; otherwise it reads every n-th row. Sources are mixed by their weights; without weights they are
    drawn evenly until exhausted, and each row comes once an epoch. Order and mixture depend on the seed.

    Args:
        config: the recipe's data section.
        processor: the family's.
        seed: of the order.
        batch: samples of one forward pass; `group_by_length` groups 512 samples at a time.
        rank: rank of this process.
        ranks: number of ranks.

    Attributes:
        skip: forward passes of this rank to skip when a run resumes; their images are not opened.
        skipped: empty: faults come with the samples, as `faults`.
        encoder: turns records into samples.
        source_rows: empty: the rows are not counted.

    Raises:
        DataError: a source or one of its files cannot be read or has no row, its first rows are all faulty, or it has
            fewer rows than there are ranks x workers.
        TokenizerError: the tokenizer cannot label conversations.
    """

    def __init__(
        self, config: DataConfig, processor: Any, *, seed: int = 0, batch: int = 1, rank: int = 0, ranks: int = 1
    ) -> None:
        self.config, self.processor, self.seed, self.batch = config, processor, seed, batch
        self.rank, self.ranks, self.skip = rank, ranks, 0
        self.skipped: list[Fault] = []
        self.source_rows: list[int] = []
        self.encoder = Encoder.of(config, processor)
        check_folders(config)
        for number in range(len(config.sources)):
            self._probe(number)
        self._check_parts(ranks * max(1, config.workers))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields samples as `ConversationDataset` gives them; `faults` are those of the rows just before."""
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        # the loader takes passes from its workers in turn: worker 0 takes the place of the one that is next
        place = self.skip % workers if worker is None else (worker.id + self.skip) % workers
        skip = max(0, -(-(self.skip - place) // workers)) * self.batch
        faults: list[Fault] = []
        for item in self._ordered(self.rank * workers + place, self.ranks * workers, faults):
            if skip > 0:
                skip -= 1
                continue
            try:
                sample = self._sample(item)
            except RowError as error:
                faults.append(item.fault(error))
                continue
            if faults:
                sample["faults"] = faults.copy()
                faults.clear()
            yield sample

    def _sample(self, item: _Item) -> dict[str, Any]:
        tokens = item.sample
        folder = folder_of(self.config.sources[item.source], item.file)
        images = open_images(tokens.images, folder, self.config)
        return {**self.encoder.expand(tokens.ids, tokens.labels, images), "source": item.source}

    def _ordered(self, shard: int, shards: int, faults: list[Fault]) -> Iterator[_Item]:
        """Yields the shard's items, shuffled; with `group_by_length` in passes of similar length."""
        order = random.Random(f"{self.seed} {shard}")
        pool: list[_Item] = []
        for item in self._mixed(shard, shards, faults, order):
            pool += [] if item is None else [item]
            if item is None or len(pool) >= _POOL:
                yield from self._arranged(pool, order)
                pool = []

    def _arranged(self, pool: list[_Item], order: random.Random) -> list[_Item]:
        order.shuffle(pool)
        if not self.config.group_by_length:
            return pool
        pool.sort(key=lambda item: (bool(item.sample.images), item.sample.length))
        passes = [pool[start : start + self.batch] for start in range(0, len(pool), self.batch)]
        order.shuffle(passes)
        return [item for samples in passes for item in samples]

    def _mixed(self, shard: int, shards: int, faults: list[Fault], order: random.Random) -> Iterator[_Item | None]:
        """Yields good items of all sources, epoch after epoch; without weights, None at the end of each.

        Raises:
            DataError: the shard's part has no good row, or with weights that of one source has none.
        """
        weights = [source.weight for source in self.config.sources]
        streams, has_good = dict[int, Iterator[_Item]](), False
        while True:
            if not streams:
                streams = {number: self._items(number, shard, shards, faults) for number in range(len(weights))}
            number = order.choices(list(streams), [weights[one] or 1.0 for one in streams])[0]
            item, before = next(streams[number], None), 0
            if item is None and weights[number] is not None:  # begins again in the same draw: its share is its weight
                before, streams[number] = len(faults), self._items(number, shard, shards, faults)
                item = next(streams[number], None)
            if item is not None:
                has_good = True
                yield item
            elif weights[number] is not None or (len(streams) == 1 and not has_good):
                name = "data.files" if weights[number] is None else self.config.sources[number].path
                first = "".join(f": {fault}" for fault in faults[before:][:1])
                raise DataError(f"{name}: got no row without a fault in part {shard} of {shards}{first}")
            else:
                del streams[number]
                if not streams:
                    has_good = False
                    yield None

    def _items(self, number: int, shard: int, shards: int, faults: list[Fault]) -> Iterator[_Item]:
        """Yields the shard's part of a source once; appends its faults to `faults`."""
        source = self.config.sources[number]
        for file, row, raw in _shard_rows(source, shard, shards):
            try:
                yield self._item(number, file, row, raw)
            except RowError as error:
                faults.append(Fault(file, row, str(error)))

    def _item(self, number: int, file: str, row: int, raw: Any) -> _Item:
        record = parse(raw)
        folder, options = folder_of(self.config.sources[number], file), image_options(self.config)
        sizes = [inspect_image(folder, image, options)[1] for image in record.images]
        sample = self.encoder.encode(record, sizes, number)
        return _Item(number, file, row, sample)

    def _check_parts(self, shards: int) -> None:
        """Raises DataError if the part of a rank's worker has no row; weights need rows of each source there."""
        counts = [(_part_rows(source, shards), source) for source in self.config.sources]
        is_weighted = self.config.sources[0].weight is not None
        count, source = (min if is_weighted else max)(counts, key=lambda pair: pair[0])
        if count < shards:
            raise DataError(
                f"{source.path}: got {count:,} rows for {shards:,} parts, expected at least one for each rank and "
                "worker (data.workers)"
            )

    def _probe(self, number: int) -> None:
        """Raises DataError if the first rows of a source are all faulty."""
        faults: list[Fault] = []
        for file, row, raw in islice(_shard_rows(self.config.sources[number], 0, 1), _PROBED):
            try:
                self._item(number, file, row, raw)
            except RowError as error:
                faults.append(Fault(file, row, str(error)))
                continue
            return
        first = f": {faults[0]}" if faults else ""
        raise DataError(f"{self.config.sources[number].path}: the first {len(faults)} rows are all faulty{first}")


def _part_rows(source: Source, shards: int) -> int:
    """Returns the number of a source's rows, at most `shards`, which is enough for a row in each part.

    Raises:
        DataError: a file has no row.
    """
    files = [] if source.path.startswith(HUB) else find_files(source.path)
    for file in files:
        if not has_rows(file):
            raise DataError(f"{file}: {NO_ROWS}")
    if files and source.limit is None and len(files) % shards == 0:
        return shards
    return sum(1 for _ in islice(_shard_rows(source, 0, 1), shards))


def checked_rows(config: DataConfig) -> Iterator[dict[str, Any]]:
    """Yields the rows of `check_rows`' table one by one, without writing the table.

    Raises:
        DataError: a source or an image folder cannot be used.
    """
    check_folders(config)
    for number, source in enumerate(config.sources):
        for file, row, raw in _shard_rows(source, 0, 1):
            notes, sizes = set[str](), list[int]()
            folder, options = folder_of(source, file), image_options(config)
            try:
                parsed = parse(raw)
                for image in parsed.images:
                    seen, size = inspect_image(folder, image, options)
                    notes.update(seen)
                    sizes += size
                record: Record | RowError = parsed
            except RowError as error:
                record = error
            found = row_of(number, file, row, record, source.format or config.format)
            extra = {} if found["fault"] else {"notes": [*found["notes"], *sorted(notes)], "sizes": sizes}
            yield {**found, **extra}


@dataclass(frozen=True)
class _Item:
    """A tokenised row, its images not yet opened."""

    source: int
    file: str
    row: int
    sample: Sample = field(repr=False)

    def fault(self, error: RowError) -> Fault:
        """Returns the fault of its row."""
        return Fault(self.file, self.row, str(error))


def _shard_rows(source: Source, shard: int, shards: int) -> Iterator[tuple[str, int, Any]]:
    """Yields file, row number and raw row of a shard's part of a source."""
    if source.path.startswith(HUB):
        name = source.path if shards == 1 else f"{source.path} (part {shard} of {shards})"
        yield from _numbered(name, hub_rows(source.path, source.limit, shard, shards), is_part=shards > 1)
        return
    files = find_files(source.path)
    if source.limit is None and len(files) % shards == 0:
        files, shard, shards = files[shard::shards], 0, 1
    count = 0
    for file in files:
        for place in _numbered(file, raw_rows(file, stream=True)):
            if count == source.limit:
                return
            if count % shards == shard:
                yield place
            count += 1


def _numbered(file: str, rows: Iterator[Any], *, is_part: bool = False) -> Iterator[tuple[str, int, Any]]:
    """Yields file, row number and raw row.

    Raises:
        DataError: the file loses rows because it is broken, or it has none and is no part of one.
    """
    row = -1
    for row, raw in enumerate(rows):
        yield file, row, raw
    if row < 0 and not is_part:
        raise DataError(f"{file}: {NO_ROWS}")
