#!/usr/bin/env python3
"""Has single writes to a spare fail, as with a disk that dies: tests/powercut/errors.py

The sync has to say so, and the next one to make up for it, although the kernel then remembers what it was to write, and the disk doesn't
have it.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import cut
import oracle
import record
import scenes
import writelog


def in_the_middle(write):
    return (write.offset + write.size // 2) // writelog.SECTOR


def sectors(log):
    """{what fails: a sector in which it lies} of a sync that replaces a kernel with fixed names."""
    data = [write for write in log.writes if write.data is not None]
    entry = next(write for write in data if b"title Arch Linux" in bytes(write.data))
    largest = sorted(data, key=lambda write: write.size)[-2:]
    return {"a part of a kernel or initrd": in_the_middle(largest[0]), "a part of another": in_the_middle(largest[1]),
            "an entry": in_the_middle(entry)}


def boots(spare):
    image = memoryview(spare.image.read_bytes())
    return oracle.survey(oracle.volumes(image, *cut.parts(spare.places, "esp")))


def main():
    directory = Path(tempfile.mkdtemp(prefix="dualroot-errors-"))
    names = ["first sync", "fixed names"]
    recorder = record.Recorder(directory, "esp", cut.install(directory), [{"boot": scenes.ESP[name]} for name in names])
    device = f"/dev/disk/by-partuuid/{recorder.b.partuuid['esp']}"
    passed = failed = 0

    def check(what, good, found):
        nonlocal passed, failed
        passed, failed = passed + bool(good), failed + (not good)
        cut.say(f"ok   {what}" if good else f"FAIL {what}: {found}")

    try:
        spare = recorder.spare()
        recorder.turn_to(0)
        recorder.sync()
        content, before = spare.image.read_bytes(), cut.length(spare)
        recorder.turn_to(1)
        recorder.sync()
        recorder.remove()
        log = cut.cut_out(writelog.read_log(spare.log), before, cut.length(spare))
        wanted = boots(spare)
        for what, sector in sectors(log).items():
            spare = recorder.spare(content, sector)
            # As systemd has it. Otherwise the kernel would forget what it knows of it as soon as the sync ends.
            recorder.machine.run(f"mkdir -p /srv/spare && mount -o ro {device} /srv/spare")
            code, said = recorder.machine.status("dualroot-sync 2>&1", 300)
            check(f"{what} can't be written: the sync fails", code == 1 and "error" in said, (code, said))
            said = recorder.sync()
            recorder.machine.run("umount /srv/spare")
            recorder.remove()
            check(f"{what} couldn't be written: the next sync has it", boots(spare) == wanted, said)
    finally:
        recorder.machine.kill()
    cut.say(f"{passed} passed, {failed} failed")
    if not failed:
        shutil.rmtree(directory)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
