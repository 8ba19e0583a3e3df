#!/usr/bin/env python3
"""Cuts the power at every write of a sync, and asks what would boot: tests/powercut/run [--seed N] [--subsets N] [--keep DIR] [--peers]

The real programs sync in a guest, onto a disk of which every write and flush is logged. Then the log is replayed: every prefix, torn
writes, and random subsets of what no flush had made durable yet. Each of these states of the boot partitions is judged as it is, and as
fsck.fat leaves it; those of a root tree are mounted, and judged as they are and as dualroot-complete leaves them.
"""

import argparse
import collections
import concurrent.futures
import multiprocessing
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vm"))
from console import lost  # noqa: E402
from product import install  # noqa: E402

import generations  # noqa: E402
import oracle  # noqa: E402
import record  # noqa: E402
import roots  # noqa: E402
import scenes  # noqa: E402
import trees  # noqa: E402
import writelog  # noqa: E402

# A sync: its writes are those of the log from `first` to `last`, on what was there after those before. Of a root tree, `looks` are all
# generations, of which those with the numbers in `generations` may be found, and the last of them in the end.
Sync = collections.namedtuple("Sync", "kind name base log places first last looks generations", defaults=[(), ()])
# Of so many interrupted syncs the next one is recorded, and cut, too.
AGAIN = ("fixed names", "new comes, old goes", "unified, same name", "everything")
# A writer that is broken on purpose in one of these ways has to be found out.
BROKEN = {"fixed names": ("without flushes", "without one flush", "with two steps swapped"),
          "new comes, old goes": ("without flushes", "with two steps swapped"),
          "everything changes": ("without flushes", "with two steps swapped")}


def say(text):
    print(text, flush=True)


def parts(places, kind):
    kinds = ["ext" if fs == "ext4" else "fat" for fs in record.KINDS[kind]]
    return [oracle.Part(*place, name) for place, name in zip(places.values(), kinds)]


def length(spare):
    return len(writelog.read_log(spare.log).writes)


def cut_out(log, first, last):
    """The part of a log from one write to another, as a log."""
    bounds = sorted({0, last - first} | {bound - first for bound in log.bounds if first < bound < last})
    return writelog.Log(log.writes[first:last], bounds)


def load(sync):
    """The image as it was before a sync, and its writes."""
    log = writelog.read_log(sync.log)
    image = writelog.open_image(sync.base)
    for write in log.writes[:sync.first]:
        image.write(*writelog.whole(write))
    image.keep()
    return image, cut_out(log, sync.first, sync.last)


def interrupted(sync, rng, torn=None):
    """What the disk may hold after a cut of that sync, somewhere in its middle; or one that tore what is written there."""
    image, log = load(sync)
    wanted = list(writelog.states(log, rng, 8, 1))
    if torn is None:
        wanted = wanted[len(wanted) // 4:]
    else:
        def tears(at, data):
            return at in torn and not isinstance(data, int) and len(data) < len(torn)
        wanted = [state for state in wanted if any(tears(*change) for change in state.extra)]
    state = rng.choice(wanted)
    for write in log.writes[:state.prefix]:
        image.write(*writelog.whole(write))
    for change in state.extra:
        image.write(*change)
    return bytes(image[0:len(image)]), state.what


def record_kind(kind, directory, staging, seed, older):
    """All syncs of one kind of spare."""
    states = scenes.ESP if kind == "esp" else scenes.XBOOTLDR
    held = [{"boot": s} if kind == "esp" else {"efi": s[0], "boot": s[1]} for s in states.values()]
    recorder = record.Recorder(directory / kind, kind, staging, held, older=older)
    syncs, rng = {}, random.Random(seed)

    def sync(spare, name, first):
        recorder.sync()
        done = Sync(kind, name, spare.base, spare.log, spare.places, first, length(spare))
        say(f"recorded {kind}, {name}: {done.last - done.first} writes")
        return done

    try:
        spare, before = recorder.spare(), 0
        for number, name in enumerate(states):
            recorder.turn_to(number)
            syncs[name] = sync(spare, name, before)
            before = syncs[name].last
        recorder.remove()
        for name in AGAIN if kind == "esp" else AGAIN[:2]:
            recorder.turn_to(list(states).index(name))
            latest = syncs[name]
            for times in ("once", "twice"):
                # No kernel mounts an ext4 of which half the superblock was written.
                at = latest.places["xbootldr"][0] + 1024 if kind == "xbootldr-ext4" and times == "twice" else None
                content, what = interrupted(latest, rng, at and range(at, at + 1024))
                spare = recorder.spare(content)
                latest = sync(spare, f"{name}, interrupted {times} ({what})", 0)
                recorder.remove()
                # It may be judged by what was there before the first of them.
                yield latest, syncs[name]
    finally:
        recorder.machine.kill()
    for done in syncs.values():
        yield done, done


def cut_while(sync, staged, rng):
    """The disk after a cut of a sync to a root that comes when so much is staged, and what was cut."""
    start, size = sync.places["root"]
    image, log = load(sync)
    prefixes = list(range(1, len(log.writes)))
    rng.shuffle(prefixes)
    for prefix in prefixes:
        image.rollback()
        for write in log.writes[:prefix]:
            image.write(*writelog.whole(write))
        content = image[start:start + size]
        if (generations.stage_in(content) if sync.kind == "root-btrfs" else trees.stage_in(content)) == staged:
            return bytes(image[0:len(image)]), f"the first {prefix} writes"
    raise RuntimeError(f"{sync.kind}, {sync.name}: after no cut what is staged is {staged}")


def record_root(kind, directory, staging, seed, older):
    """The syncs of a root tree: the first, one that changes all kinds of things, and one each after a cut of the one before."""
    recorder, rng = roots.Recorder(directory / kind, kind, staging, older), random.Random(seed)

    def sync(spare, name, first, *numbers):
        recorder.turn_to(numbers[-1])
        recorder.sync()
        done = Sync(kind, name, spare.base, spare.log, spare.places, first, length(spare), recorder.looks, numbers)
        say(f"recorded {kind}, {name}: {done.last - done.first} writes")
        return done

    try:
        spare = recorder.spare()
        first = sync(spare, "first sync", 0, 0, 1)
        change = sync(spare, "everything changes", first.last, 1, 2)
        recorder.remove()
        yield first, first
        yield change, change
        content, what = cut_while(change, trees.HALF, rng)
        spare = recorder.spare(content)
        again = sync(spare, f"everything changes, interrupted while it stages ({what})", 0, 1, 2)
        recorder.remove()
        yield again, change
        content, what = cut_while(again, trees.WHOLE, rng)
        spare = recorder.spare(content)
        # Modules and files that name a disk are those of the first still.
        yield sync(spare, f"another change, after one interrupted when all was staged ({what})", 0, 1, 2, 3), change
    finally:
        recorder.machine.kill()


def record_peers(directory, staging, older):
    """The syncs of other tools."""
    held = [{"boot": files} for pair in scenes.PEERS.values() for files in pair]
    recorder = record.Recorder(directory / "peers", "esp", staging, held, older=older)
    try:
        for tool, command in record.PEERS.items():
            for number, name in enumerate(scenes.PEERS):
                recorder.turn_to(number * 2)
                spare = recorder.spare()
                recorder.peer(command)
                before = length(spare)
                recorder.turn_to(number * 2 + 1)
                recorder.peer(command)
                recorder.remove()
                done = Sync("esp", f"{tool}, {name}", spare.base, spare.log, spare.places, before, length(spare))
                yield done, done
    finally:
        recorder.machine.kill()


def subsets_of(states):
    """How many of these are selections of what was not flushed."""
    return sum(not state.what.startswith(("nothing", "the first")) for state in states)


def judge(pair, seed, subsets):
    """(name, (states, subsets among them), writes, flushes, faults) of one sync. `origin` is the sync that was interrupted, or the same."""
    sync, origin = pair
    before = oracle.survey(oracle.volumes(load(origin)[0], *parts(origin.places, origin.kind)))
    image, log = load(sync)
    own = f"{seed} {sync.name}"
    count, faults = oracle.prove(image, log, *parts(sync.places, sync.kind), seed=own, subsets=subsets, before=before)
    chosen = subsets_of(writelog.states(log, random.Random(own), subsets))
    return f"{sync.kind}: {sync.name}", (count, chosen), len(log.writes), len(log.bounds) - 1, faults


def load_root(sync):
    """What a sync to a root is judged by: that alone, or, where entries say which generation it is, the whole disk."""
    start, size = sync.places["root"]
    image, log = load(sync)
    if sync.kind == "root-btrfs":
        return image, log
    return writelog.Image(bytearray(image[start:start + size])), trees.clipped(log, start, size)


def sample(log, seed, subsets):
    """The states of a sync of a root: every prefix, and of the rest what there is time for."""
    rng = random.Random(seed)
    states = list(writelog.states(log, rng, -(-subsets // 8), 1))
    rest = [number for number, state in enumerate(states) if state.extra]
    left_out = set(rng.sample(rest, max(0, len(rest) - 5 * subsets)))
    return [state for number, state in enumerate(states) if number not in left_out]


def prove_root(sync, image, log, program, states, before=None, enough=None):
    """({how far it was: number of states}, [(what, problem)]) of a root, copied in place or kept in generations."""
    if sync.kind == "root-btrfs":
        looks = {str(number): sync.looks[number] for number in sync.generations}
        return generations.prove(image, log, sync.places, looks, states, before, enough)
    return trees.prove(image, log, [sync.looks[number] for number in sync.generations], program, states, enough)


def booted_around(sync, cut):
    """What booted before a sync, and, if that was cut, what it was to boot."""
    image, log = load(sync)
    esp = parts(sync.places, sync.kind)[0]
    before = oracle.survey(oracle.volumes(image, esp))
    if not cut:
        return before
    for write in log.writes:
        image.write(*writelog.whole(write))
    after = oracle.survey(oracle.volumes(image, esp))
    return before._replace(systems=before.systems | after.systems, taken=before.taken | after.taken)


def judge_root(pair, program, seed, subsets):
    """As `judge`, of a root tree: a state is mounted, which takes longer, and so there are fewer."""
    sync, origin = pair
    (image, log), before = load_root(sync), None
    if sync.kind == "root-btrfs":
        before = booted_around(origin, origin.name != sync.name)
    states = sample(log, f"{seed} {sync.name}", subsets)
    count, faults = prove_root(sync, image, log, program, states, before)
    # On the way to what is whole now, or to the last generation.
    ends = str(sync.generations[-1]) if sync.kind == "root-btrfs" else trees.WHOLE
    if not count[ends] or len(count) == 1:
        faults.append(("all cuts", f"none came before it was as it is in the end, or none after that: {dict(count)}"))
    if sync.kind != "root-btrfs":
        end = writelog.State("all that was written", 0, [])
        last = sync._replace(generations=sync.generations[-1:])
        faults += prove_root(last, image, writelog.Log([], [0]), program, [end])[1]
    return f"{sync.kind}: {sync.name}", (sum(count.values()), subsets_of(states)), len(log.writes), len(log.bounds) - 1, faults


def mutants(log):
    """(what, log, random subsets of what isn't flushed) of writers that leave out the flushes, one flush, or do two things in the wrong
    order."""
    writes, bounds = log
    yield "without flushes", writelog.Log(writes, [0, len(writes)]), 400
    for number in range(1, len(bounds) - 1):
        yield "without one flush", writelog.Log(writes, bounds[:number] + bounds[number + 1:]), 40
        first, middle, last = bounds[number - 1:number + 2]
        swapped = writes[:first] + writes[middle:last] + writes[first:middle] + writes[last:]
        yield "with two steps swapped", writelog.Log(swapped, bounds[:number] + [first + last - middle] + bounds[number + 1:]), 0


def judge_mutants(sync, ways):
    """{what: number of cuts that don't boot} of broken writers that make the same changes as a sync."""
    found = collections.Counter()
    image, log = load(sync)
    before = oracle.survey(oracle.volumes(image, *parts(sync.places, sync.kind)))
    start = bytes(image[0:len(image)])
    for what, broken, subsets in mutants(log):
        if what in ways:
            image = writelog.Image(bytearray(start))
            found[what] += len(oracle.prove(image, broken, *parts(sync.places, sync.kind), subsets=subsets, before=before)[1])
    return f"{sync.kind}: {sync.name}", found


def judge_root_mutants(sync, ways, program, seed):
    """As `judge_mutants`, of a root tree; one cut that is found is enough."""
    image, log = load_root(sync)
    start, rng, found = bytes(image[0:len(image)]), random.Random(seed), collections.Counter()
    broken = list(mutants(log))
    rng.shuffle(broken)
    for what, changed, subsets in broken:
        if what not in ways or found[what]:
            continue
        states = list(writelog.states(changed, rng, subsets // 4, 0))
        if subsets:
            # In these, a flush that is missing shows; prefixes are what they were.
            states = [state for state in states if state.extra]
        some = sorted(rng.sample(range(len(states)), min(40, len(states))))
        image = writelog.Image(bytearray(start))
        found[what] += len(prove_root(sync, image, changed, program, [states[n] for n in some], None, 1)[1])
    return f"{sync.kind}: {sync.name}", {what: found[what] for what in ways}


def table(cells):
    """The table of README.md: how many of the cuts that were tried do not boot."""
    rows = [("dualroot", "esp: fixed names", "esp: new comes, old goes")]
    rows += [(f"`{tool}`", *(f"esp: {tool}, {name}" for name in scenes.PEERS)) for tool in record.PEERS]
    head = ["power cuts after which the disk does not boot", *scenes.PEERS]
    lines = [head, ["---"] * len(head)] + [[tool, *(cells.get(name, "-") for name in names)] for tool, *names in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", default=None)
    parser.add_argument("--subsets", type=int, default=20, help="random subsets of each run of writes between two flushes")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--peers", action="store_true", help="other tools too, and a table")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("kind", nargs="*", default=list(record.KINDS))
    arguments = parser.parse_args()
    seed = arguments.seed or writelog.seed()
    say(f"seed {seed}")
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="dualroot-powercut-"))
    directory.mkdir(parents=True, exist_ok=True)
    staging = install(directory)
    failed = passed = total = random_ones = 0
    kinds = arguments.kind + ["peers"] * arguments.peers
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as threads, \
            concurrent.futures.ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        def judged(kind, directory, older, jobs, broken):
            program = staging / "usr/sbin/dualroot-complete"
            if kind.startswith("root"):
                for sync, origin in record_root(kind, directory, staging, seed, older):
                    jobs.append(pool.submit(judge_root, (sync, origin), program, seed, arguments.subsets))
                    if sync.name in BROKEN:
                        broken.append(pool.submit(judge_root_mutants, sync, BROKEN[sync.name], program, seed))
                return
            if kind == "peers":
                made = record_peers(directory, staging, older)
            else:
                made = record_kind(kind, directory, staging, seed, older)
            for sync, origin in made:
                jobs.append(pool.submit(judge, (sync, origin), seed, arguments.subsets))
                if kind == "esp" and sync.name in BROKEN:
                    broken.append(pool.submit(judge_mutants, sync, BROKEN[sync.name]))

        def recorded(kind, directory=directory, older=False):
            """The judgements of syncs, those of broken writers, and what went wrong before there were all."""
            jobs, broken = [], []
            try:
                judged(kind, directory, older, jobs, broken)
            except Exception as error:
                why = lost(kind, directory / kind, error)
                if not why:
                    return jobs, broken, f"{type(error).__name__}: {error}"
                dead.append(why)
                for job in jobs + broken:
                    job.cancel()
                if older:
                    return [], [], f"not judged: {why}"
                say(f"NOT JUDGED: {why}; once more, with older kernels if there are any")
                return recorded(kind, directory / "again", True)
            return jobs, broken, None

        cells, dead = {}, []
        for kind, (jobs, broken, problem) in zip(kinds, threads.map(recorded, kinds)):
            if problem:
                say(f"FAIL {kind}: {problem}")
                failed += 1
            root = kind.startswith("root")
            bad = "leave no root of one generation" if root else "do not boot"
            for job in broken:
                name, found = job.result()
                for what, count in found.items():
                    cuts = f"{count} of the cuts tried" if root else f"{count} cuts"
                    say(f"{'ok  ' if count else 'FAIL'} {name}, by a writer {what}: {cuts} {bad}, as it should be")
                    passed, failed = passed + bool(count), failed + (not count)
            for job in jobs:
                name, (count, chosen), writes, epochs, faults = job.result()
                cells[name] = f"{len(faults)} of {count}"
                result = f"{len(faults)} of {count} cuts {bad} ({writes} writes, {epochs} flushes{', no superblock torn' * root})"
                if kind == "peers":
                    say(f"     {name}: {result}")
                    continue
                total, random_ones = total + count, random_ones + chosen
                say(f"{'ok  ' if not faults else 'FAIL'} {name}: {result}")
                for what, problem in faults[:3]:
                    say(f"     {what}: {problem}")
                passed, failed = passed + (not faults), failed + bool(faults)
    if arguments.peers:
        say(table(cells))
    for why in dead:
        say(f"1 {why}")
    say(f"{total} cuts, {random_ones} of them subsets of what was not flushed; seed {seed}")
    say(f"{passed} passed, {failed} failed")
    if not arguments.keep and not failed:
        shutil.rmtree(directory)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
