"""Whether a disk whose root is kept in generations boots, after a power cut: each entry that is listed has to boot a subvolume that is,
as a whole, the root of the generation that its kernel is of."""

import collections
import hashlib
import re
import tempfile

import ext
import oracle
import trees
import writelog

DIRECTORY = "dualroot"
NEW = f"{DIRECTORY}/new"
# The number of the top directory of every subvolume.
TOP = 256


def words(options, key):
    return [word.split("=", 1)[1] for word in options.split() if word.startswith(f"{key}=")]


def booted(options):
    """(root=, subvolume, generation of the kernel) of a command line; None for what it doesn't say."""
    flags = ",".join(words(options, "rootflags")).split(",")
    named = [flag.split("=", 1)[1] for flag in flags if flag.startswith("subvol=")]
    return [(found or [None])[-1] for found in (words(options, "root"), named, words(options, "generation"))]


def due(look, root, subvolume):
    """A tree as it is to be in that subvolume, of which its own command line for kernels tells."""
    def line(number):
        text = f"root={root} rootflags=subvol={subvolume} ro generation={number}\n".encode()
        return len(text), hashlib.blake2b(text).hexdigest()
    number, tree = look
    return tree | {"etc/kernel/cmdline": tree["etc/kernel/cmdline"]._replace(content=line(number))}


def dated(tree):
    """Without the times of what is written anew."""
    return {path: thing._replace(time=0) if trees.undated(path) or path in trees.APART else thing for path, thing in tree.items()}


def judge(systems, place, looks):
    """What is wrong with the roots that these systems boot, or None. `looks` are trees by the generation's number."""
    wrong = {}
    for options in sorted({system.options for system in systems}):
        root, subvolume, number = booted(options)
        if subvolume not in wrong:
            path = place / (subvolume or ".")
            if not subvolume or not path.is_dir() or path.stat().st_ino != TOP:
                wrong[subvolume] = "it is no subvolume"
            elif number not in looks:
                wrong[subvolume] = "there is no such generation"
            else:
                wrong[subvolume] = trees.unlike(dated(trees.look(path)), dated(due((number, looks[number]), root, subvolume)))
        if wrong[subvolume]:
            return f"an entry boots {subvolume} as generation {number}: {wrong[subvolume]}"
    return None


class Root:
    """The root's part of an image, and what was found to be wrong with it the last time."""

    def __init__(self, image, part, looks):
        self.image, self.part, self.looks = image, part, looks
        self.scratch = trees.Scratch(image, part)
        self.last = None, None

    def judge(self, systems):
        key = self.image.identities(self.part.start, self.part.size), frozenset(systems)
        if self.last[0] != key:
            self.scratch.follow()
            try:
                with trees.mounted(self.scratch.file.name, "btrfs") as place:
                    problem = judge(systems, place, self.looks)
            except (oracle.Unreadable, OSError) as unreadable:
                problem = str(unreadable)
            self.scratch.restore()
            self.last = key, problem
        return self.last[1]


def whole_superblocks(states, part):
    """As trees.whole_superblocks, of a disk of which this is the part."""
    inside = [state._replace(extra=[(at - part.start, data) for at, data in state.extra]) for state in states]
    kept = {id(state) for state in trees.whole_superblocks(inside, "btrfs")}
    return [state for state, moved in zip(states, inside) if id(moved) in kept]


def prove(image, log, places, looks, states, before=None, enough=None):
    """({generation that would boot, or None: number of states}, [(what, problem)]), otherwise as oracle.prove."""
    esp, part = oracle.Part(*places["esp"]), oracle.Part(*places["root"])
    before = before or oracle.survey(oracle.volumes(image, esp))
    for write in log.writes:
        image.write(*writelog.whole(write))
    after = oracle.survey(oracle.volumes(image, esp))
    image.rollback()
    root, count, faults = Root(image, part, looks), collections.Counter(), []
    try:
        for what in writelog.visit(image, log, whole_superblocks(states, part)):
            taken = problem = None
            try:
                state = oracle.volumes(image, esp)
                problem = oracle.judge(before, after, state)
                if any(oracle.can_start(state.esp, path) for path in oracle.boot_loaders(state.esp)):
                    found = oracle.survey(state)
                    taken = next((booted(system.options)[2] for system in found.taken), None)
                    problem = problem or root.judge(found.systems)
            except oracle.Unreadable as unreadable:
                problem = str(unreadable)
            count[taken] += 1
            if problem:
                faults.append((what, problem))
            if len(faults) == enough:
                break
    finally:
        root.scratch.close()
    return count, faults


def stage_in(content):
    """How far a sync has come that left this file system: while it makes a generation, and until its mounts show that."""
    with tempfile.NamedTemporaryFile(dir=ext.scratch_directory(len(content))) as file:
        file.write(content)
        file.flush()
        with trees.mounted(file.name, "btrfs") as place:
            if (place / NEW).is_dir() and any((place / NEW).iterdir()):
                return trees.HALF
            numbers = [int(path.name) for path in (place / DIRECTORY).iterdir() if path.name.isdigit()]
            shown = re.search(r" path (\S+)$", trees.must("btrfs", "subvolume", "get-default", place))
            return trees.WHOLE if numbers and shown and shown[1] != f"{DIRECTORY}/{max(numbers)}" else trees.NOTHING
