#!/usr/bin/env python3
"""Runs the cases that need a machine: tests/vm/run [--list] [--jobs N] [--keep DIR] [CASE…]"""

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import cases  # noqa: E402
import clone  # noqa: E402

TOP = Path(__file__).resolve().parents[2]


def install(directory):
    """Builds the product as a packager would, and installs it into a directory of its own."""
    build, staging = directory / "build", directory / "staging"
    for command in (["meson", "setup", "--prefix=/usr", build, TOP / "meson-wrapper"], ["meson", "install", "-C", build]):
        done = subprocess.run(command, env=os.environ | {"DESTDIR": str(staging)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(done.stdout.decode(errors="replace"))
    return staging


def faults(report, _directory, _staging):
    """tests/powercut/faults.py, whose machine has room beside the last of the others."""
    line = ""
    with subprocess.Popen([TOP / "tests/powercut/faults.py"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            verdict, _, text = line.rstrip("\n").partition(" ")
            if verdict in ("ok", "FAIL"):
                report.check(text.strip(), verdict == "ok", "see above")
            elif " passed, " not in line:
                report.step(line.rstrip("\n"))
    report.check("it ends", process.returncode == 0, line.strip())


# The longest first.
CASES = clone.CASES | cases.CASES | {"faults": (faults,)}


def run(name, staging, directory):
    case, *arguments = CASES[name]
    report = cases.Report(name, lambda text: print(text, flush=True))
    try:
        case(report, directory / name, staging, *arguments)
    except Exception as error:
        report.check(f"{name} ends", False, f"{type(error).__name__}: {error}")
    return report


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
        reports = list(pool.map(lambda name: run(name, staging, directory), arguments.case))
    for report in reports:
        for text, ratio in report.figures:
            print(f"{text}: {ratio:.2f}")
    passed, failed = sum(r.passed for r in reports), sum(r.failed for r in reports)
    if not arguments.keep and not failed:
        shutil.rmtree(directory)
    elif failed:
        print(f"disks and logs are in {directory}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
