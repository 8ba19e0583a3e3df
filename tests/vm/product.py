"""The product, as a packager has it built and installed."""

import os
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]


def install(directory):
    """Builds the product, and installs it into a directory of its own, which is returned."""
    build, staging = directory / "build", directory / "staging"
    for command in (["meson", "setup", "--prefix=/usr", build, TOP / "meson-wrapper"], ["meson", "install", "-C", build]):
        done = subprocess.run(command, env=os.environ | {"DESTDIR": str(staging)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(done.stdout.decode(errors="replace"))
    return staging
