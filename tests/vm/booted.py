"""Machines that have booted from the first disk of a system, saved for all cases that begin with that."""

import shutil
import subprocess
import time
from pathlib import Path

import images
import machine
from machine import Machine, overlay


def saved(directory, memory, release, initrd, layout, staging, older):
    """A directory with a machine's memory, its first disk and its firmware's variables; where there is none yet, one is made. The log of
    its console is in `directory` then."""
    system = images.system(release, initrd, layout, staging, older)
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], check=True, capture_output=True).stdout
    # A guest that has been away for days would make up for timers that it has missed, as soon as it boots again.
    day = time.strftime("%F", time.gmtime())
    recipe = [Path(path).read_bytes() for path in (__file__, machine.__file__)]
    ingredients = [str(system), memory, qemu, recipe, Path(machine.CODE).stat().st_mtime, day]

    def build(path):
        first = Machine(directory / "booted", memory)
        if layout == "one-luks":
            first.passphrase = images.PASSPHRASE
        disk = overlay(system / "disk0.raw", first.directory / "a.qcow2")
        try:
            first.start({"A": disk})
            first.save(first.directory / "state")
        finally:
            first.kill()
        path.mkdir()
        for part in (first.directory / "state", disk, first.vars):
            shutil.move(part, path / part.name)
    return images.cached(f"booted{release}-{initrd}-{layout}", ingredients, "", build)


def resume(guest, release, initrd, layout, staging, older=False, fails=None):
    """Has a machine go on from there; the first disk, which keeps its changes. What `fails` is as for Machine.plug, by serial number."""
    place = saved(guest.directory, guest.memory, release, initrd, layout, staging, older)
    disk = overlay(place / "a.qcow2", guest.directory / "a.qcow2")
    shutil.copy(place / "vars.fd", guest.vars)
    guest.resume(place / "state", {"A": disk}, fails)
    return disk
