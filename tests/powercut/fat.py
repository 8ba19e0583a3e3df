"""Reads a FAT file system as firmware does: the first FAT only, and nothing that isn't asked for."""

import collections
import hashlib
import struct

Entry = collections.namedtuple("Entry", "name short directory size cluster")

ROOT = Entry("", "", True, 0, None)
DIRECTORY, LABEL, LONG = 0x10, 0x08, 0x0f
MAX_DIRECTORY = 2 << 20
MAX_DEPTH = 32


class Unreadable(Exception):
    """Says in one sentence why a file or a file system can't be read."""


class Missing(Unreadable):
    """There is no such name."""


def checksum(short):
    total = 0
    for byte in short:
        total = ((total & 1) << 7) + (total >> 1) + byte & 0xff
    return total


def short_name(record):
    """The name of 8.3 as it is shown: bits say whether its parts are in lower case."""
    base, extension, case = bytearray(record[:8]), record[8:11], record[12]
    if base[0] == 0x05:
        base[0] = 0xe5
    base, extension = base.decode("cp437").rstrip(" "), extension.decode("cp437").rstrip(" ")
    base = base.lower() if case & 0x08 else base
    extension = extension.lower() if case & 0x10 else extension
    return f"{base}.{extension}" if extension else base


def long_name(parts, short):
    """The name that these records, as they lie on the disk, give to the short one after them; None unless they belong to it."""
    total = len(parts)
    if not parts or parts[0][0] != 0x40 | total:
        return None
    text = b""
    for number, part in zip(range(total, 0, -1), parts):
        if part[0] & 0x3f != number or part[13] != checksum(short):
            return None
        text = part[1:11] + part[14:26] + part[28:32] + text
    units = struct.unpack(f"<{len(text) // 2}H", text)
    units = units[:units.index(0)] if 0 in units else units
    return struct.pack(f"<{len(units)}H", *units).decode("utf-16-le", "replace") or None


def entries(raw):
    """The entries of a directory's content, and whether one that ends it was found: deleted ones, labels, and the names . and ..
    are left out."""
    found, parts = [], []
    for position in range(0, len(raw) - 31, 32):
        record = raw[position:position + 32]
        kind = record[11]
        if record[0] == 0:
            return found, True
        if record[0] == 0xe5:
            parts = []
        elif kind & 0x3f == LONG:
            if record[0] & 0x40:
                parts = []
            parts.append(record)
        else:
            if not kind & LABEL and record[:11].rstrip(b" ") not in (b".", b".."):
                high, low, size = struct.unpack_from("<H4xHI", record, 20)
                short = short_name(record)
                found.append(Entry(long_name(parts, record[:11]) or short, short, bool(kind & DIRECTORY), size, high << 16 | low))
            parts = []
    return found, False


def split(path):
    return [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]


class Volume:
    """What file systems answer alike; `find(path)`, and `children(path, entry)` of a directory, are each one's own."""

    def exists(self, path):
        """Whether firmware can open it, which says nothing about whether it can be read."""
        try:
            self.find(path)
            return True
        except Unreadable:
            return False

    def list(self, path=""):
        entry = self.find(path)
        if not entry.directory:
            raise Unreadable(f"{path}: it is no directory")
        return self.children(path, entry)

    def file(self, path):
        entry = self.find(path)
        if entry.directory:
            raise Unreadable(f"{path}: it is a directory")
        return entry


class Fat(Volume):
    """A file system in `buffer`, which is anything that can be sliced, from `start` on. `notes` tells of what firmware wouldn't
    mind."""

    def __init__(self, buffer, start=0, size=None):
        self.buffer, self.start, self.notes = buffer, start, []
        self.size = len(buffer) - start if size is None else size
        boot = bytes(buffer[start:start + 512])
        if len(boot) < 512:
            raise Unreadable("the file system has no boot sector")
        self.sector, per_cluster, reserved, fats, root, few, media, length, many = struct.unpack_from("<HBHBHHBH8xI", boot, 11)
        if self.sector not in (512, 1024, 2048, 4096) or per_cluster & per_cluster - 1 or not (per_cluster and reserved and fats):
            raise Unreadable("the boot sector is not that of a FAT file system")
        if media != 0xf0 and media < 0xf8:
            raise Unreadable("the boot sector names no medium")
        wide = not length
        if wide:
            length, = struct.unpack_from("<I", boot, 36)
        total = few or many
        root_sectors = -(-root * 32 // self.sector)
        data = reserved + fats * length + root_sectors
        if not total or not length or data >= total or total * self.sector > self.size:
            raise Unreadable("the boot sector's sizes do not fit")
        self.clusters = (total - data) // per_cluster
        self.bits = 32 if wide else 12 if self.clusters < 4085 else 16
        self.clusters = min(self.clusters, length * self.sector * 8 // self.bits - 2)
        self.cluster = per_cluster * self.sector
        self.table = (start + reserved * self.sector, length * self.sector)
        self.data = start + data * self.sector
        self.fixed_root = None if wide else (start + (reserved + fats * length) * self.sector, root * 32)
        self.root, = struct.unpack_from("<I", boot, 44) if wide else (0,)

    def memo(self, what, ranges, compute):
        """Leaves it to the buffer to remember, if it can."""
        remember = getattr(self.buffer, "memo", None)
        return remember((self.start, *what), ranges, compute) if remember else compute()

    def next(self, table, cluster):
        if self.bits == 32:
            return int.from_bytes(table[cluster * 4:cluster * 4 + 4], "little") & 0x0fffffff
        if self.bits == 16:
            return int.from_bytes(table[cluster * 2:cluster * 2 + 2], "little")
        pair = int.from_bytes(table[cluster * 3 // 2:cluster * 3 // 2 + 2], "little")
        return pair >> 4 if cluster & 1 else pair & 0xfff

    def follow(self, first, wanted):
        """(extents, problem, longer): where up to `wanted` clusters of a chain lie, what is wrong with it, and whether it goes
        on."""
        table = bytes(self.buffer[self.table[0]:sum(self.table)])
        last_cluster, end, bad = self.clusters + 1, (1 << min(self.bits, 28)) - 8, (1 << min(self.bits, 28)) - 9
        runs, cluster, count, seen, problem = [], first, 0, bytearray(self.clusters + 2), None
        link = memoryview(table)[:len(table) // 4 * 4].cast("I") if self.bits == 32 else None
        while count < wanted:
            if cluster >= end:
                problem = f"its chain ends after {count} clusters" if count else "it has no clusters"
            elif cluster == bad:
                problem = "there is a bad cluster in its chain"
            elif cluster < 2:
                problem = "there is a free cluster in its chain" if count else "it has no clusters"
            elif cluster > last_cluster:
                problem = f"cluster {cluster} in its chain does not exist"
            elif seen[cluster]:
                problem = "its chain runs in a circle"
            if problem:
                break
            seen[cluster] = 1
            count += 1
            if runs and runs[-1][1] == cluster:
                runs[-1][1] = cluster + 1
            else:
                runs.append([cluster, cluster + 1])
            cluster = link[cluster] & 0x0fffffff if link else self.next(table, cluster)
        found = [(self.data + (a - 2) * self.cluster, (b - a) * self.cluster) for a, b in runs]
        return found, problem, not problem and cluster < end

    def chain(self, first, wanted):
        return self.memo(("chain", first, wanted), [self.table], lambda: self.follow(first, wanted))

    def extents(self, path, entry, size):
        """Where the first `size` bytes of a file lie."""
        if not size:
            return []
        wanted = -(-size // self.cluster)
        if wanted > self.clusters:
            raise Unreadable(f"{path}: it is larger than the file system")
        found, problem, longer = self.chain(entry.cluster, wanted)
        if problem:
            raise Unreadable(f"{path}: {problem}")
        if longer and size == entry.size:
            self.notes.append(f"{path}: its chain is longer than its size")
        excess = sum(length for _, length in found) - size
        return [*found[:-1], (found[-1][0], found[-1][1] - excess)]

    def content(self, path, first):
        """The entries of the directory that begins at this cluster, or, if that is None, of the root."""
        if first is None and self.fixed_root:
            found, problem = [self.fixed_root], None
        else:
            first = self.root if first is None else first
            found, problem, _ = self.chain(first, min(self.clusters, MAX_DIRECTORY // self.cluster))
        listed, ended = self.memo(("directory",), found, lambda: entries(b"".join(self.slices(found))))
        # Firmware reads on up to the entry that ends it: what is wrong with the chain behind that is never seen.
        if not found or not ended and problem and "ends after" not in problem:
            raise Unreadable(f"{path or '/'}: {problem}")
        return listed

    def slices(self, extents):
        return [bytes(self.buffer[offset:offset + size]) for offset, size in extents]

    def find(self, path):
        """The entry at a path, without regard to case, by its long or its short name."""
        entry = ROOT
        for part in split(path):
            if not entry.directory:
                raise Missing(f"{path}: no such file")
            wanted = part.upper()
            for candidate in self.content(path, entry.cluster):
                if wanted in (candidate.name.upper(), candidate.short.upper()):
                    entry = candidate
                    break
            else:
                raise Missing(f"{path}: no such file")
        return entry

    def children(self, path, entry):
        return self.content(path, entry.cluster)

    def read(self, path, offset=0, size=None):
        """The content of a file, or as much of a part of it as there is."""
        entry = self.file(path)
        end = entry.size if size is None else min(entry.size, offset + size)
        if offset >= end:
            return b""
        return b"".join(self.slices(self.extents(path, entry, end)))[offset:]

    def digest(self, path):
        """A hash of the content of a file."""
        entry = self.file(path)
        found = self.extents(path, entry, entry.size)

        def compute():
            total = hashlib.sha256()
            for part in self.slices(found):
                total.update(part)
            return total.hexdigest()
        return self.memo(("digest",), found, compute)

    def walk(self, path="", entry=ROOT, above=()):
        """(path, entry) of all that there is; a directory comes before what is in it."""
        cluster = self.root if entry.cluster is None else entry.cluster
        if cluster in above or len(above) > MAX_DEPTH:
            raise Unreadable(f"{path}: it lies within itself")
        for child in self.content(path, entry.cluster):
            below = f"{path}/{child.name}"
            yield below, child
            if child.directory:
                yield from self.walk(below, child, (*above, cluster))
