"""Reads ext2, ext3 and ext4 with e2fsprogs: no mount, and no code of ours to be wrong."""

import collections
import hashlib
import os
import subprocess
import tempfile

from fat import Missing, Unreadable, Volume, split

Entry = collections.namedtuple("Entry", "name directory size inode")
CHUNK = 1 << 20


def scratch_directory(size):
    """Where a file of that size may be made: in memory if there is room."""
    try:
        room = os.statvfs("/dev/shm")
        if room.f_bavail * room.f_frsize > 2 * size:
            return "/dev/shm"
    except OSError:
        pass
    return tempfile.gettempdir()


def copy_out(buffer, start, size, file):
    """Writes a part of a buffer to a file, and leaves holes where there are zeros."""
    zeros = bytes(CHUNK)
    for offset in range(0, size, CHUNK):
        part = bytes(buffer[start + offset:start + min(offset + CHUNK, size)])
        if part != zeros[:len(part)]:
            file.seek(offset)
            file.write(part)
    file.truncate(size)
    file.flush()


class Ext(Volume):
    """The file system in a part of `buffer`, after its journal was replayed and errors were repaired, as the boot of another
    system would; `repaired` says whether there were errors."""

    def __init__(self, buffer, start=0, size=None):
        size = len(buffer) - start if size is None else size
        self.copy = tempfile.NamedTemporaryFile(dir=scratch_directory(size), suffix=".ext4")
        self.known = {}
        copy_out(buffer, start, size, self.copy)
        done = subprocess.run(["e2fsck", "-fy", self.copy.name], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        if done.returncode & ~3:
            raise Unreadable(f"e2fsck can't repair it: {done.stdout.decode(errors='replace').strip().splitlines()[-1:]}")
        self.repaired = done.returncode != 0

    def debugfs(self, request):
        done = subprocess.run(["debugfs", "-R", request, self.copy.name], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return done.stdout

    def entries(self, inode):
        if inode not in self.known:
            found = []
            for line in self.debugfs(f"ls -p <{inode}>").decode(errors="replace").splitlines():
                # /inode/mode/uid/gid/name/size/, and no name has a slash in it.
                fields = line.split("/")
                if len(fields) == 8 and fields[5] not in (".", "..") and fields[1] != "0":
                    found.append(Entry(fields[5], fields[2].startswith("04"), int(fields[6] or 0), int(fields[1])))
            self.known[inode] = found
        return self.known[inode]

    def find(self, path):
        """Without regard to case, as the file systems of firmware are; a name that is written the same goes first."""
        entry = Entry("", True, 0, 2)
        for part in split(path):
            there = self.entries(entry.inode) if entry.directory else []
            same = [e for e in there if e.name == part] or [e for e in there if e.name.lower() == part.lower()]
            if not same:
                raise Missing(f"{path}: no such file")
            entry = same[0]
        return entry

    def children(self, _path, entry):
        return self.entries(entry.inode)

    def read(self, path, offset=0, size=None):
        entry = self.file(path)
        content = self.debugfs(f"cat <{entry.inode}>")
        if len(content) != entry.size:
            raise Unreadable(f"{path}: {len(content)} bytes of {entry.size} can be read")
        return content[offset:] if size is None else content[offset:offset + size]

    def digest(self, path):
        return hashlib.sha256(self.read(path)).hexdigest()

    def walk(self, path="", inode=2):
        for entry in self.entries(inode):
            yield f"{path}/{entry.name}", entry
            if entry.directory:
                yield from self.walk(f"{path}/{entry.name}", entry.inode)
