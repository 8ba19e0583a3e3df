"""Whether a disk boots unattended after a power cut: the whole old system, or the whole new one."""

import collections
import mmap
import os
import random
import subprocess
import tempfile

import ext
import sdboot
import writelog
from fat import Fat, Missing, Unreadable

LOADERS = (sdboot.FALLBACK, sdboot.INSTALLED)
# So often a sync has fsck.fat correct what it finds.
REPAIRS = 5

# The file systems of a state: `xbootldr` is None where there is none, or where it can't be read.
Volumes = collections.namedtuple("Volumes", "esp xbootldr")
# What of a disk matters to the boot: the hashes of its boot loaders by path, the systems that are listed, whole, and those that
# are taken.
Boots = collections.namedtuple("Boots", "loaders systems taken")
# What an entry boots. Paths don't matter, but the contents of the files do.
System = collections.namedtuple("System", "kind name options files")
Part = collections.namedtuple("Part", "start size kind", defaults=["fat"])


# The last ext4 file system that was read, which takes long: most writes are to others.
LAST = {}


def ext_volume(image, part):
    key = (part, image.identities(part.start, part.size))
    if key not in LAST:
        LAST.clear()
        LAST[key] = ext.Ext(image, part.start, part.size)
    return LAST[key]


def volumes(image, esp, xbootldr=None):
    """The file systems in these parts of an image; raises Unreadable if the ESP can't be read."""
    second = None
    if xbootldr:
        try:
            if xbootldr.kind == "ext":
                second = ext_volume(image, xbootldr)
            else:
                second = Fat(image, xbootldr.start, xbootldr.size)
        except Unreadable:
            pass
    return Volumes(Fat(image, esp.start, esp.size), second)


def boot_loaders(esp):
    """{path: (hash or None, problem or None)} of the boot loaders that are there."""
    found = {}
    for path in LOADERS:
        try:
            found[path] = (esp.digest(path), None)
        except Missing:
            pass
        except Unreadable as problem:
            found[path] = (None, str(problem))
    return found


def system(entry, contents):
    return System(entry.kind, entry.name, entry.options, tuple((role, digest) for role, _, digest, _ in contents))


def is_whole(contents):
    return all(digest for _, _, digest, _ in contents)


def variants(loaders):
    return [(version, path) for version in sdboot.VERSIONS for path in loaders]


def survey(state):
    """The Boots of a state that is whole, before or after a sync."""
    loaders = boot_loaders(state.esp)
    found = sdboot.scan(*state)
    systems, taken = set(), set()
    for version, path in variants(loaders):
        for entry in sdboot.listed(found, version, path):
            contents = sdboot.contents(entry)
            if entry.kind in ("type1", "type2") and is_whole(contents):
                systems.add(system(entry, contents))
        entry = sdboot.choose(found, version, path)
        contents = sdboot.contents(entry) if entry else []
        if contents and is_whole(contents):
            # An automatic entry counts only if it is the one that is meant to be taken.
            taken.add(system(entry, contents))
    return Boots(loaders, systems | taken, taken)


def bootable(boots):
    return bool(boots.taken) and any(digest for digest, _ in boots.loaders.values())


def can_start(esp, path):
    """Whether firmware would start this file: one that lacks a part that its headers promise is refused."""
    table = sdboot.sections(esp, path)
    try:
        return bool(table) and all(not raw or len(esp.read(path, offset + raw - 1, 1)) == 1 for _, _, raw, offset in table)
    except Unreadable:
        return False


def judge_loaders(before, after, loaders):
    for path in before.loaders:
        old, new = before.loaders[path][0], after.loaders.get(path, (None, None))[0]
        digest, problem = loaders.get(path, (None, "it is missing"))
        if path not in loaders and path not in after.loaders:
            continue
        if digest is None or digest not in (old, new):
            return f"{path} is neither old nor new" + (f": {problem}" if problem else "")
    return None


def judge_entry(before, after, entry, strict):
    """What is wrong with the entry that is taken."""
    contents = sdboot.contents(entry)
    found = system(entry, contents)
    good = before.taken | after.taken if strict else before.systems | after.systems
    if found in good:
        return None
    for role, path, digest, problem in contents:
        if digest is None:
            return f"{entry.id}: the {role} can't be read: {problem}"
    if entry.kind not in ("type1", "type2"):
        return f"{entry.id} would be taken"
    same = [[s for s in boots.systems if (s.kind, s.name) == (found.kind, found.name)] for boots in (before, after)]
    if not any(same):
        return f"{entry.id} is listed neither before nor after"
    if not any(found.options == s.options for side in same for s in side):
        return f"{entry.id}: the options are neither old nor new: {entry.options!r}"
    ages = []
    for role, path, digest, _ in contents:
        old, new = ([digest in [d for r, d in s.files if r == role] for s in side] for side in same)
        if not any(old + new):
            return f"{entry.id}: {role} {path} is neither old nor new"
        ages.append(f"{role} {path} is {'the same in both' if any(old) and any(new) else 'old' if any(old) else 'new'}")
    if found in before.systems | after.systems:
        return f"{entry.id} is taken, which is taken neither before nor after"
    return f"{entry.id} is neither the old nor the new one as a whole: {', '.join(ages) or 'it has no files'}"


def judge(before, after, state, strict=False):
    """None if the state boots, unattended, what was listed before or after; or a sentence about what would be wrong. `strict`
    allows only what would be taken before or after, and not another entry that is whole."""
    loaders = boot_loaders(state.esp)
    if not bootable(before):
        # Nothing to lose: it is enough that a machine doesn't start what leads nowhere.
        started = [path for path in loaders if can_start(state.esp, path)]
        if not started:
            return None
        for path in started:
            if loaders[path][0] is None or loaders[path][0] != after.loaders.get(path, (None,))[0]:
                return f"{path} can be started, and is not the new one" + (f": {loaders[path][1]}" if loaders[path][1] else "")
        loaders = {path: loaders[path] for path in started}
    else:
        problem = judge_loaders(before, after, loaders)
        if problem:
            return problem
        if not loaders:
            return "there is no boot loader"
    found = sdboot.scan(*state)
    for version, path in variants(loaders):
        entry = sdboot.choose(found, version, path)
        problem = judge_entry(before, after, entry, strict) if entry else "no entry is listed"
        if problem:
            return f"{problem} (sd-boot {version} at {path})"
    return None


class Scratch:
    """A file that follows a part of an image, for fsck.fat to work on."""

    def __init__(self, image, part):
        self.image, self.part = image, part
        self.file = tempfile.NamedTemporaryFile(dir=ext.scratch_directory(part.size), suffix=".fat")
        ext.copy_out(image, part.start, part.size, self.file)
        self.mapped = mmap.mmap(self.file.fileno(), part.size)
        self.changed = set()
        image.trackers.append(self.changed)

    def close(self):
        self.image.trackers[:] = [tracker for tracker in self.image.trackers if tracker is not self.changed]
        self.mapped.close()
        self.file.close()

    def follow(self):
        start, end = self.part.start, self.part.start + self.part.size
        for block in self.changed:
            first, last = max(block * writelog.BLOCK, start), min((block + 1) * writelog.BLOCK, end)
            if first < last:
                self.mapped[first - start:last - start] = self.image[first:last]
        self.changed.clear()

    def extents(self):
        """Where the file isn't a hole."""
        position = 0
        while position < self.part.size:
            try:
                first = os.lseek(self.file.fileno(), position, os.SEEK_DATA)
            except OSError:
                return
            position = min(os.lseek(self.file.fileno(), first, os.SEEK_HOLE), self.part.size)
            yield first, position

    def repair(self):
        """Runs fsck.fat as a boot does, and takes what it changed over into the image, to be undone there; returns a problem, or
        None."""
        self.follow()
        done = subprocess.run(["fsck.fat", "-a", self.file.name], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=60)
        if done.returncode not in (0, 1):
            last = done.stdout.decode(errors="replace").strip().splitlines()[-1:]
            self.take_over()
            return f"fsck.fat -a ends with {done.returncode}: {' '.join(last)}"
        # With 0 it has changed nothing.
        if done.returncode:
            self.take_over()
        return None

    def unreadable(self):
        """Why the next sync couldn't read a directory, although it has fsck.fat repair what that finds, again and again; or None."""
        problem = None
        for _ in range(REPAIRS):
            try:
                collections.deque(Fat(self.image, self.part.start, self.part.size).walk(), maxlen=0)
                return None
            except Unreadable as reason:
                problem = self.repair() or f"the next sync can't read {reason}"
        return problem

    def take_over(self):
        start = self.part.start
        for first, end in self.extents():
            for offset in range(first, end, writelog.CHUNK):
                stop = min(offset + writelog.CHUNK, end)
                new = self.mapped[offset:stop]
                if new == self.image[start + offset:start + stop]:
                    continue
                for place in range(0, len(new), writelog.BLOCK):
                    self.image.write(start + offset + place, new[place:place + writelog.BLOCK])


def judge_image(before, after, image, esp, xbootldr=None, scratches=None, strict=False):
    """Judges the state that an image is in, and, with scratch files, again as fsck.fat leaves it; then the next sync has to be able to begin."""
    try:
        problem = judge(before, after, volumes(image, esp, xbootldr), strict)
        if problem or not scratches:
            return problem
        mark = image.mark()
        try:
            for scratch in scratches:
                problem = problem or scratch.repair()
            problem = problem or judge(before, after, volumes(image, esp, xbootldr), strict)
            for scratch in scratches:
                problem = problem or scratch.unreadable()
            return problem and f"after fsck: {problem}"
        finally:
            image.rollback(mark)
    except Unreadable as problem:
        return f"the ESP can't be read: {problem}"


def prove(image, log, esp, xbootldr=None, seed=1, subsets=40, torn=1, fsck=True, strict=False, before=None):
    """(number of states, [(what, problem)]) of all the states that a cut may leave of these writes; the image is as it was before
    them, and is left with all of them written. `before` says what booted before, where the image isn't what was there then."""
    before = before or survey(volumes(image, esp, xbootldr))
    for write in log.writes:
        image.write(*writelog.whole(write))
    after = survey(volumes(image, esp, xbootldr))
    image.rollback()
    scratches = [Scratch(image, part) for part in (esp, xbootldr) if part and part.kind == "fat"] if fsck else []
    count, faults = 0, []
    try:
        for what in writelog.visit(image, log, writelog.states(log, random.Random(seed), subsets, torn)):
            count += 1
            problem = judge_image(before, after, image, esp, xbootldr, scratches, strict)
            if problem:
                faults.append((what, problem))
    finally:
        for scratch in scratches:
            scratch.close()
    return count, faults
