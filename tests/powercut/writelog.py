"""Logs of what a disk was told to write, and the states in which a power cut may leave the disk.

The log is QEMU's (the driver blklogwrites), in the format of Linux' dm-log-writes. QEMU writes an entry when the write is done,
counts in sectors of the log's own size, writes the data of a "write zeroes" as zeros, and writes neither data for a discard nor
the FUA flag: a guest's FUA write is followed by a flush.
"""

import collections
import itertools
import mmap
import os
import random
import struct

SECTOR = 512
BLOCK = 4096
CHUNK = 1 << 16
MAGIC = 0x6a736677736872
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8

# `data` is None for a discard, after which the sectors read as zeros, as they do with a file below.
Write = collections.namedtuple("Write", "offset size data fua")
# The first `prefix` writes are on the disk, and then these (offset, data) too.
State = collections.namedtuple("State", "what prefix extra")
# The writes, and the bounds of the epochs: epoch i is writes[bounds[i]:bounds[i + 1]], and begins with a flush.
Log = collections.namedtuple("Log", "writes bounds")


class BadLog(Exception):
    pass


def seed():
    """The seed of the random cuts of this run: what tests/run gives to all of them, or a new one."""
    return os.environ.get("DUALROOT_TEST_SEED") or str(random.SystemRandom().randrange(1 << 32))


def read_log(path, start=0, size=None):
    """What was written to the disk, or to the part of `size` bytes of it that begins at `start`, with offsets in that part."""
    with open(path, "rb") as file:
        raw = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return parse(raw, start, size)


def parse(raw, start=0, size=None):
    raw = memoryview(raw)
    if len(raw) < 28:
        raise BadLog("the log has no superblock")
    magic, version, count, sector = struct.unpack_from("<QQQI", raw)
    if magic != MAGIC or version != 1:
        raise BadLog("this is no log of writes; was nothing ever flushed?")
    if sector < 32 or sector & sector - 1 or sector > 1 << 24:
        raise BadLog(f"the log has sectors of {sector} bytes")
    end = 1 << 64 if size is None else start + size
    writes, bounds, position = [], [0], sector
    for number in range(count):
        if position + sector > len(raw):
            raise BadLog(f"the log ends before entry {number} of {count}")
        where, sectors, flags, _ = struct.unpack_from("<QQQQ", raw, position)
        position += sector
        if not sectors and not flags:
            raise BadLog(f"entry {number} of {count} is empty")
        if flags & ~(FLUSH | FUA | DISCARD | MARK):
            raise BadLog(f"entry {number} has flags {flags:#x}")
        if flags & MARK:
            position += sectors * sector
            continue
        # A write that has this flag too begins with the flush.
        if flags & FLUSH and bounds[-1] != len(writes):
            bounds.append(len(writes))
        if not sectors:
            continue
        data = None
        if not flags & DISCARD:
            data = raw[position:position + sectors * sector]
            position += sectors * sector
            if len(data) != sectors * sector:
                raise BadLog(f"the log ends within the data of entry {number}")
        first, last = max(where * sector, start), min((where + sectors) * sector, end)
        if first < last:
            if data is not None:
                data = data[first - where * sector:last - where * sector]
            writes.append(Write(first - start, last - first, data, bool(flags & FUA)))
    if bounds[-1] != len(writes):
        bounds.append(len(writes))
    return Log(writes, bounds)


def pieces(write, sectors):
    """The given sectors of a write, as few (offset, data) as it takes."""
    found = []
    for _, run in itertools.groupby(enumerate(sorted(sectors)), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in run]
        first, last = run[0] * SECTOR, min((run[-1] + 1) * SECTOR, write.size)
        found.append((write.offset + first, write.data[first:last]))
    return found


def whole(write):
    return (write.offset, write.size if write.data is None else write.data)


def tears(write, rng, count):
    """(what, sectors) for ways in which only some sectors of a write reach the disk; a single sector is written whole or not at
    all."""
    total = -(-write.size // SECTOR)
    if write.data is None or total < 2:
        return
    seen = set()
    ways = [("first half", range(total // 2)), ("last half", range(total // 2, total))]
    ways += [("random sectors", None)] * (count if total > 2 else 0)
    for what, sectors in ways:
        if sectors is None:
            share = rng.random()
            sectors = [number for number in range(total) if rng.random() < share]
        key = tuple(sectors)
        if 0 < len(key) < total and key not in seen:
            seen.add(key)
            yield what, key


def choices(rng, first, last, writes, count):
    """(what, indices) of the writes of an epoch that reached the disk: all that there are when they are few."""
    indices = range(first, last)
    free = [index for index in indices if not writes[index].fua]
    if len(free) == len(indices) and len(free) < 20 and 1 << len(free) <= count:
        for mask in range(1, 1 << len(free)):
            yield "some writes", [index for place, index in enumerate(free) if mask >> place & 1]
        return
    for sample in range(count):
        # The cut comes after one of them, when those with FUA that are done are durable, and the next haven't begun.
        cut = last if rng.random() < 0.5 else rng.randint(first + 1, last)
        flavour = sample % 4
        odd = rng.randrange(first, cut)
        share = rng.random()
        chosen = []
        for index in range(first, cut):
            there = (rng.random() < share, index != odd, rng.random() < share, index == odd)[flavour]
            if there or writes[index].fua:
                chosen.append(index)
        yield ("some writes", "all writes but one", "some writes", "a single write")[flavour], chosen


def subset_states(log, rng, number, count, torn):
    first, last = log.bounds[number], log.bounds[number + 1]
    if last - first < 2:
        return
    seen = set()
    for what, chosen in choices(rng, first, last, log.writes, count):
        extra, key, ragged = [], [], 0
        for index in chosen:
            write = log.writes[index]
            ways = list(tears(write, rng, 1)) if torn and not write.fua and rng.random() < 0.15 else None
            if ways:
                sectors = rng.choice(ways)[1]
                extra += pieces(write, sectors)
                key.append((index, sectors))
                ragged += 1
            else:
                extra.append(whole(write))
                key.append(index)
        if tuple(key) not in seen:
            seen.add(tuple(key))
            yield State(f"{what} of {first}..{last - 1} ({len(chosen)}{f', {ragged} torn' if ragged else ''}): "
                        f"{','.join(map(str, chosen[:12]))}{',…' if len(chosen) > 12 else ''}", first, extra)


def states(log, rng, subsets=40, torn=1):
    """Yields the states, by growing prefix: every prefix; prefixes with a part of the next write, in two ways and `torn` random
    ones (0: never); and of each epoch up to `subsets` selections of its writes, on top of all that was flushed before it."""
    yield State("nothing written", 0, [])
    for number, (first, last) in enumerate(zip(log.bounds, log.bounds[1:])):
        yield from subset_states(log, rng, number, subsets, torn)
        for index in range(first, last):
            if torn:
                for what, sectors in tears(log.writes[index], rng, torn):
                    extra = pieces(log.writes[index], sectors)
                    yield State(f"the first {index} writes, and the next torn ({what})", index, extra)
            yield State(f"the first {index + 1} writes", index + 1, [])


class Image:
    """A disk in memory that changes can be undone on. What was computed from a part of it is kept for as long, and again as soon,
    as that part has the same content."""

    def __init__(self, data):
        self.data = data
        self.ids = [None] * (-(-len(data) // BLOCK))
        self.undo, self.kept, self.trackers = [], {}, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, where):
        return self.data[where]

    def write(self, offset, data):
        """Writes bytes, or as many zeros; returns whether that changed anything."""
        size = data if isinstance(data, int) else len(data)
        if offset + size > len(self.data):
            raise BadLog(f"a write of {size} bytes at {offset} lies beyond the end of the disk")
        changed = False
        for start in range(0, size, CHUNK):
            stop = min(start + CHUNK, size)
            new = bytes(stop - start) if isinstance(data, int) else bytes(data[start:stop])
            first, last = offset + start, offset + stop
            old = self.data[first:last]
            if old == new:
                continue
            blocks = range(first // BLOCK, -(-last // BLOCK))
            self.undo.append((first, old, self.ids[blocks.start:blocks.stop]))
            self.data[first:last] = new
            self.ids[blocks.start:blocks.stop] = [None] * len(blocks)
            for tracker in self.trackers:
                tracker.update(blocks)
            changed = True
        return changed

    def mark(self):
        return len(self.undo)

    def rollback(self, mark=0):
        while len(self.undo) > mark:
            offset, old, ids = self.undo.pop()
            first = offset // BLOCK
            self.data[offset:offset + len(old)] = old
            self.ids[first:first + len(ids)] = ids
            for tracker in self.trackers:
                tracker.update(range(first, first + len(ids)))

    def keep(self):
        """What was written so far is not to be undone."""
        self.undo.clear()

    def identities(self, offset, size):
        first, last = offset // BLOCK, -(-(offset + size) // BLOCK)
        found = self.ids[first:last]
        if None in found:
            for number, identity in enumerate(found, first):
                if identity is None:
                    self.ids[number] = hash(bytes(self.data[number * BLOCK:(number + 1) * BLOCK]))
            found = self.ids[first:last]
        return tuple(found)

    def memo(self, what, ranges, compute):
        """The value of `compute`, which may depend on nothing but `what` and the bytes in these ranges of (offset, size)."""
        key = (what, tuple(ranges), *(self.identities(offset, size) for offset, size in ranges))
        if key not in self.kept:
            if len(self.kept) > 2000:
                self.kept.clear()
            self.kept[key] = compute()
        return self.kept[key]


def open_image(path, start=0, size=None):
    """An image of a file, or of a part of it; the file itself is never changed."""
    with open(path, "rb") as file:
        if start or size is not None:
            file.seek(start)
            return Image(bytearray(file.read() if size is None else file.read(size)))
        return Image(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def visit(image, log, wanted):
    """Brings the image into one state after the other, and yields what it is; skips those that change nothing since the last that
    was yielded. The prefix stays applied in the end."""
    done, seen = 0, False
    for state in wanted:
        if state.prefix < done:
            raise ValueError("the states do not come by growing prefix")
        for write in log.writes[done:state.prefix]:
            if image.write(*whole(write)):
                seen = False
        image.keep()
        done = state.prefix
        changed = [image.write(*change) for change in state.extra]
        if any(changed) or not seen:
            yield state.what
        seen = seen or not any(changed)
        image.rollback()
