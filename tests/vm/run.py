#!/usr/bin/env python3
"""Runs the cases that need a machine: tests/vm/run [--list] [--all] [--jobs N] [--keep DIR] [CASE…]

Without a case or --all: those of the core, and of the others those that are drawn by DUALROOT_TEST_SEED into what is left of
DUALROOT_TEST_MINUTES.
"""

import argparse
import concurrent.futures
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "powercut"))
import cases  # noqa: E402
import clone  # noqa: E402
import faults  # noqa: E402
import images  # noqa: E402
import turns  # noqa: E402
from console import lost  # noqa: E402
from product import install  # noqa: E402

CASES = clone.CASES | cases.CASES | {"faults": (faults.run,)}
# What tests/run leaves to this suite, where it doesn't say so.
MINUTES = "25"


def say(text):
    print(text, flush=True)


def attempt(name, directory, staging, older=False):
    """Runs a case: its report, and why that is no verdict on the product, or None."""
    case, *arguments = CASES[name]
    report, problem = cases.Report(name, say, older), None
    try:
        case(report, directory, staging, *arguments)
    except Exception as error:
        problem = error
        report.check(f"{name} ends", False, f"{type(error).__name__}: {error}")
    return report, lost(name, directory, problem)


class Result:
    """What has become of a case: its report, and why earlier ones of it didn't count."""

    def __init__(self, name, directory, staging):
        begun = time.monotonic()
        self.name, self.lost = name, []
        self.report, why = attempt(name, directory / name, staging)
        if why:
            self.lost.append(why)
            self.report.step(f"NOT JUDGED: {why}; once more, with older kernels if there are any")
            begun = time.monotonic()
            self.report, why = attempt(name, directory / f"{name}-again", staging, older=True)
        if why:
            self.lost.append(why)
            self.report.passed = self.report.failed = 0
            self.report.check(f"{name} is judged", False, why)
        self.minutes = (time.monotonic() - begun) / 60
        self.report.step(f"it took {self.minutes:.1f} minutes")


class Suite:
    """Runs cases, so many at a time. Of those that aren't in the core, the ones for which it has become too late don't begin."""

    def __init__(self, directory, staging, lengths, core, ends):
        self.directory, self.staging, self.lengths, self.core, self.ends = directory, staging, lengths, core, ends
        self.lock, self.results, self.late = threading.Lock(), [], []

    def pace(self):
        """How much longer than expected cases have taken."""
        expected = sum(self.lengths[result.name] for result in self.results)
        return max(1, sum(result.minutes for result in self.results) / expected) if expected else 1

    def one(self, name):
        with self.lock:
            if name not in self.core and time.monotonic() + 60 * self.lengths[name] * self.pace() > self.ends:
                self.late.append(name)
                return
        result = Result(name, self.directory, self.staging)
        with self.lock:
            self.results.append(result)

    def run(self, names, jobs):
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(self.one, names))


def choose(arguments, lengths, left):
    """The cases that run, in order; those of them that run however late it is; and those that are left out."""
    if arguments.all or arguments.case:
        names = turns.longest_first(arguments.case or CASES, lengths)
        return names, names, []
    seed = cases.SEED
    names, left_out = turns.draw(lengths, turns.CORE, left, arguments.jobs, seed)
    drawn = [name for name in names if name not in turns.CORE]
    say(f"always: {' '.join(turns.CORE)}")
    say(f"drawn by seed {seed} into {left:.0f} minutes: {' '.join(drawn) or 'none'}; left out: {' '.join(left_out) or 'none'}")
    return names, turns.CORE, left_out


def summarize(suite, left_out):
    """Prints what was found, and returns how much of it failed."""
    reports = [result.report for result in suite.results]
    for report in reports:
        for text, ratio in report.figures:
            print(f"{text}: {ratio:.2f}")
    if suite.late:
        print(f"drawn, and left out as it was too late: {' '.join(suite.late)}")
    if left_out:
        print(f"left out: {' '.join(left_out)}")
    for result in suite.results:
        for why in result.lost:
            print(f"1 {why}")
    failed = sum(report.failed for report in reports)
    print(f"{sum(report.passed for report in reports)} passed, {failed} failed")
    return failed


def main():
    begun = time.monotonic()
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    parser.add_argument("--all", action="store_true", help="run all cases, however long that takes")
    # A third of the time, a machine waits: for a disk that is away, for quiet.
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1, help="how many machines at a time")
    parser.add_argument("--keep", type=Path, help="where disks and consoles' logs go, and stay")
    parser.add_argument("case", nargs="*")
    arguments = parser.parse_args()
    unknown = set(arguments.case) - set(CASES)
    if unknown:
        parser.error(f"no such case: {' '.join(sorted(unknown))}")
    if arguments.list:
        print("\n".join(CASES))
        return 0
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="dualroot-vm-"))
    directory.mkdir(parents=True, exist_ok=True)
    staging = install(directory)
    memory = turns.Memory(images.CACHE / "minutes.json", arguments.jobs)
    ends = begun + 60 * float(os.environ.get("DUALROOT_TEST_MINUTES", MINUTES))
    names, core, left_out = choose(arguments, memory.lengths(), (ends - time.monotonic()) / 60)
    suite = Suite(directory, staging, memory.lengths(), core, ends)
    suite.run(names, arguments.jobs)
    # Alone, a case takes less.
    if len(names) >= arguments.jobs:
        memory.keep({result.name: result.minutes for result in suite.results if not result.report.failed})
    failed = summarize(suite, left_out)
    if failed:
        print(f"disks and logs are in {directory}")
    elif not arguments.keep:
        shutil.rmtree(directory)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
