#!/usr/bin/env python3
"""Runs the cases that need a machine: tests/vm/run [--list] [--jobs N] [--keep DIR] [CASE…]"""

import argparse
import concurrent.futures
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "powercut"))
import cases  # noqa: E402
import clone  # noqa: E402
import faults  # noqa: E402
from console import lost  # noqa: E402
from product import install  # noqa: E402

# The longest first.
CASES = clone.CASES | cases.CASES | {"faults": (faults.run,)}


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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    # A third of the time, a machine waits: for a disk that is away, for quiet.
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1, help="how many machines at a time")
    parser.add_argument("--keep", type=Path, help="where disks and consoles' logs go, and stay")
    parser.add_argument("case", nargs="*", default=[name for name in CASES if name not in cases.ON_REQUEST])
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(CASES))
        return 0
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="dualroot-vm-"))
    directory.mkdir(parents=True, exist_ok=True)
    staging = install(directory)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda name: Result(name, directory, staging), arguments.case))
    for result in results:
        for text, ratio in result.report.figures:
            print(f"{text}: {ratio:.2f}")
    for result in results:
        for why in result.lost:
            print(f"1 {why}")
    passed, failed = sum(r.report.passed for r in results), sum(r.report.failed for r in results)
    if not arguments.keep and not failed:
        shutil.rmtree(directory)
    elif failed:
        print(f"disks and logs are in {directory}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
