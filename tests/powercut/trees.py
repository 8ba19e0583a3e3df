"""Whether a root tree is one generation after a power cut: mounted by this machine's kernel, which replays the journal, and completed
by the real dualroot-complete."""

import collections
import contextlib
import fcntl
import hashlib
import os
import re
import stat
import subprocess
import tempfile
from pathlib import Path

import ext
import oracle
import writelog

STAGE = ".dualroot"
PLAN = f"{STAGE}/plan"
# What is staged in a tree.
NOTHING, HALF, WHOLE = "nothing", "not whole", "whole"
# Files that name a disk: after the tree, they are replaced one by one, and written anew they have the time of that. So have their
# directories. Beside them may lie what was to replace them.
APART = ("etc/fstab", "etc/kernel/cmdline")
UNDATED = {os.path.dirname(path) for path in APART}
TEMPORARY = re.compile(rf"(?:{'|'.join(map(re.escape, UNDATED))})/\.dualroot-[^/]*")
# The modules of old kernels go one by one, in the end.
MODULES = "usr/lib/modules"
# What the product remembers is written by every sync. The scenes exclude it.
OWN = "var/lib/dualroot"
# Where superblocks are: that of ext4, of which a kernel reads no other, and those of btrfs.
SUPERBLOCKS = {"ext4": [(1024, 1024)], "btrfs": [(64 << 10, 4 << 10), (64 << 20, 4 << 10)]}

# A discard would make holes in the file that is mounted, which nobody knows to be changes.
OPTIONS = {"ext4": "noatime,nodiscard", "btrfs": "noatime,nodiscard,subvolid=5"}

# What lies at a path. `names` are those that a file has in the tree, where it has several.
Thing = collections.namedtuple("Thing", "kind mode owner time content attributes names")


def attributes(path):
    return tuple(sorted((name, os.getxattr(path, name, follow_symlinks=False)) for name in os.listxattr(path, follow_symlinks=False)))


def look(top):
    """{path: Thing} of a tree, its top as ".", without what is staged there and what mkfs made."""
    top, found, names, paths = os.fspath(top), {}, collections.defaultdict(list), ["."]
    for path in paths:
        full = os.path.join(top, path)
        status = os.lstat(full)
        content = status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else None
        if stat.S_ISDIR(status.st_mode):
            inside = [os.path.normpath(os.path.join(path, name)) for name in os.listdir(full)]
            paths += [below for below in inside if below not in (STAGE, "lost+found")]
        else:
            names[status.st_ino].append(path)
            if stat.S_ISREG(status.st_mode):
                with open(full, "rb") as file:
                    content = (status.st_size, hashlib.blake2b(file.read()).hexdigest())
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(full)
        found[path] = Thing(stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid),
                            status.st_mtime_ns, content, attributes(full), ())
    for several in names.values():
        for path in several if len(several) > 1 else ():
            found[path] = found[path]._replace(names=tuple(sorted(several)))
    return found


def parted(tree):
    """A tree without what may be of another generation than the rest, or of none: ({path: Thing}, files that name a disk, modules)."""
    apart = {path: thing._replace(time=0) for path, thing in tree.items() if path in APART}
    modules = {path: thing for path, thing in tree.items() if path.startswith(f"{MODULES}/")}
    rest = {path: thing._replace(time=0) if undated(path) else thing for path, thing in tree.items()
            if path not in apart and not TEMPORARY.fullmatch(path)}
    return rest, apart, modules


def undated(path):
    # The top gets its time last of all, when nothing is staged any more; the next sync sees to it.
    return path in UNDATED or path in (".", MODULES, OWN)


def unlike(found, wanted):
    """What is different, in a sentence; None if nothing is."""
    for path in sorted(found.keys() | wanted.keys()):
        there, due = found.get(path), wanted.get(path)
        if there == due:
            continue
        if not there or not due:
            return f"{path} {'is there' if there else 'is missing'}"
        fields = [name for name, one, other in zip(Thing._fields, there, due) if one != other]
        return f"{path} differs in {', '.join(fields)}"
    return None


def is_one(found, wanted, generations):
    """None if `found` is the tree `wanted`, one of these; or what is wrong."""
    rest, apart, modules = parted(found)
    due, named, kept = parted(wanted)
    old = [parted(tree) for tree in generations]
    # An old kernel's modules may still be there, or a part of them; a directory's time changes when something goes from it.
    for path, thing in modules.items():
        if path not in kept and any(is_left(thing, other[2].get(path)) for other in old):
            rest.pop(path)
    problem = unlike(rest, due)
    for path in sorted(named.keys() | apart.keys()):
        if not problem and apart.get(path) not in [other[1].get(path) for other in old]:
            problem = f"{path} is of no generation"
    return problem


def is_left(thing, before):
    return thing == before or before and stat.S_ISDIR(thing.kind) and thing._replace(time=0) == before._replace(time=0)


def judge(found, generations):
    """None if the tree is one of these generations; or what each of them has differently."""
    problems = []
    for number, wanted in enumerate(generations):
        problem = is_one(found, wanted, generations)
        if not problem:
            return None
        problems.append(f"not {'old' if not number else 'new'}: {problem}")
    return "; ".join(problems)


def run(*command):
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.decode(errors="replace").strip()


def must(*command):
    code, said = run(*command)
    if code:
        raise oracle.Unreadable(f"{command[0]}: {said}")
    return said


@contextlib.contextmanager
def alone(fstype):
    """btrfs takes two file systems with one UUID for one, and remembers those that were mounted."""
    if fstype != "btrfs":
        yield
        return
    with open(Path(tempfile.gettempdir()) / "dualroot-btrfs.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def mounted(file, fstype):
    """The directory where a file system in a file is mounted, the top of all subvolumes. Raises Unreadable if it can't be."""
    with alone(fstype), tempfile.TemporaryDirectory(prefix="dualroot-tree-") as place:
        loop = must("losetup", "--find", "--show", file)
        try:
            must("mount", "-t", fstype, "-o", OPTIONS[fstype], loop, place)
            try:
                yield Path(place)
            finally:
                must("umount", place)
        finally:
            if fstype == "btrfs":
                run("btrfs", "device", "scan", "--forget", loop)
            must("losetup", "--detach", loop)


class Scratch(oracle.Scratch):
    """A file that follows an image, for a kernel to mount and write."""

    def restore(self):
        """Makes what was written to the file undone."""
        start = self.part.start
        for first, end in self.extents():
            for offset in range(first, end, writelog.CHUNK):
                stop = min(offset + writelog.CHUNK, end)
                content = self.image[start + offset:start + stop]
                if self.mapped[offset:stop] != content:
                    self.mapped[offset:stop] = content


def stage(place):
    if not (place / STAGE).exists():
        return NOTHING
    return WHOLE if (place / PLAN).exists() else HALF


def judge_mounted(place, staged, generations, program):
    """What is wrong with a tree that a boot finds: as it is, if what is staged isn't whole, and after dualroot-complete."""
    if staged != WHOLE:
        problem = judge(look(place), generations)
        if problem:
            return f"before completion, {problem}"
        if staged == NOTHING:
            return None
    code, said = run(program, place)
    if code:
        return f"dualroot-complete ends with {code}: {said}"
    if (place / STAGE).exists():
        return f"/{STAGE} is still there"
    return judge(look(place), generations)


def judge_file(file, generations, program):
    """(what is staged, what is wrong)."""
    staged = None
    try:
        with mounted(file, "ext4") as place:
            staged = stage(place)
            return staged, judge_mounted(place, staged, generations, program)
    except (oracle.Unreadable, OSError) as problem:
        return staged, str(problem)


def whole_superblocks(states, fstype):
    """Leaves out the states with a part of a new superblock, which nothing that mounts this file system is made for."""
    for state in states:
        parts = [(at, at + (data if isinstance(data, int) else len(data))) for at, data in state.extra]
        cut = [place < bound < place + size for place, size in SUPERBLOCKS[fstype] for part in parts for bound in part]
        if not any(cut):
            yield state


def prove(image, log, generations, program, wanted, enough=None):
    """({what was staged: number of states}, [(what, problem)]) of these states of an ext4 file system, of which `generations` are those that
    may be found; ends after `enough` problems. The image is left with all of the log written, if it comes to the end."""
    scratch = Scratch(image, oracle.Part(0, len(image)))
    count, faults = collections.Counter(), []
    try:
        for what in writelog.visit(image, log, whole_superblocks(wanted, "ext4")):
            scratch.follow()
            staged, problem = judge_file(scratch.file.name, generations, program)
            scratch.restore()
            count[staged] += 1
            if problem:
                faults.append((what, problem))
            if len(faults) == enough:
                break
    finally:
        scratch.close()
    return count, faults


def stage_in(content):
    """How far a sync has come that left this file system."""
    with tempfile.NamedTemporaryFile(dir=ext.scratch_directory(len(content))) as file:
        file.write(content)
        file.flush()
        with mounted(file.name, "ext4") as place:
            return stage(place)


def clipped(log, start, size):
    """Of a log, what was written to a part of the disk."""
    writes, bounds = [], [0]
    for first, last in zip(log.bounds, log.bounds[1:]):
        writes += [write._replace(offset=write.offset - start) for write in log.writes[first:last]
                   if start <= write.offset < start + size]
        if bounds[-1] != len(writes):
            bounds.append(len(writes))
    return writelog.Log(writes, bounds)
