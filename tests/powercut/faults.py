#!/usr/bin/env python3
"""What goes wrong while a spare is written, other than the power: tests/powercut/faults.py [NAME...]

Disks fail a write, a read, or altogether; the sync is killed, or the machine rebooted; the source never rests. Each time the spare has to
boot, what was wrong has to be said, and the next sync has to make up for it.
"""

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import cut
import oracle
import record
import scenes
import writelog
from cases import Report
from machine import Failure
from product import install

# A sector of the booted disk that can be written, and not read, and how many sectors into its ESP that is.
UNREADABLE = 200 << 11
ESP_START = 1 << 11
SCENES = ["first sync", "fixed names"]
# Of a sync that replaces a kernel, so many are killed.
KILLS = 4
SEED = writelog.seed()


def in_the_middle(write):
    return (write.offset + write.size // 2) // writelog.SECTOR


def sectors(log):
    """{what fails: a sector in which it lies} of a sync that replaces a kernel with fixed names."""
    data = [write for write in log.writes if write.data is not None]
    entry = next(write for write in data if b"title Arch Linux" in bytes(write.data))
    largest = sorted(data, key=lambda write: write.size)[-2:]
    return {"a part of a kernel or initrd": in_the_middle(largest[0]), "a part of another": in_the_middle(largest[1]),
            "an entry": in_the_middle(entry)}


class Bench:
    """A guest, and, when it is prepared, a spare that it has synced once; `log` is of the sync that comes next."""

    def __init__(self, report, directory, staging):
        self.report, self.check = report, report.check
        self.recorder = record.Recorder(directory, "esp", staging, [{"boot": scenes.ESP[name]} for name in SCENES],
                                        {"A": ("read", ESP_START + UNREADABLE)}, report.older)
        self.machine = self.recorder.machine
        self.device = f"/dev/disk/by-partuuid/{self.recorder.b.partuuid['esp']}"

    def prepare(self):
        spare = self.recorder.spare()
        self.recorder.turn_to(0)
        self.recorder.sync()
        self.content, first, self.old = spare.image.read_bytes(), cut.length(spare), self.boots(spare)
        self.recorder.turn_to(1)
        self.recorder.sync()
        self.recorder.remove()
        self.log, self.new = cut.cut_out(writelog.read_log(spare.log), first, cut.length(spare)), self.boots(spare)

    def parts(self, spare):
        return cut.parts(spare.places, "esp")

    def boots(self, spare):
        return oracle.survey(oracle.volumes(memoryview(spare.image.read_bytes()), *self.parts(spare)))

    def problem(self, spare):
        """Why the spare would not boot all old or all new, as it is or as fsck.fat leaves it, or None."""
        image = writelog.open_image(spare.image)
        scratch = oracle.Scratch(image, self.parts(spare)[0])
        try:
            return oracle.judge_image(self.old, self.new, image, *self.parts(spare), scratches=[scratch])
        finally:
            scratch.close()

    def spare(self, **how):
        return self.recorder.spare(self.content, **how)

    def begin(self, spare, writes, command="dualroot-sync"):
        """Begins a sync, and returns when it has written so much to a slow spare."""
        self.machine.run(f"rm -f /run/code; ({command} >/run/said 2>&1; echo $? >/run/code) </dev/null >/dev/null 2>&1 &")
        deadline = time.monotonic() + 120
        while self.length(spare) < writes:
            if time.monotonic() > deadline:
                raise Failure(f"no {writes} writes within 120 s: {self.machine.run('cat /run/said')}")
            time.sleep(0.05)

    @staticmethod
    def length(spare):
        try:
            return cut.length(spare)
        except (writelog.BadLog, ValueError):
            # There is nothing in it yet.
            return 0

    def end(self):
        """Waits for the end of what was begun: its exit status, and what it said."""
        self.machine.run("until [ -s /run/code ]; do sleep 0.2; done", 120)
        return int(self.machine.run("cat /run/code")), self.machine.run("cat /run/said")

    def check_next(self, what, spare):
        """The next sync makes up for it."""
        said = self.recorder.sync()
        self.recorder.remove()
        self.check(f"{what}: the next sync has it", self.boots(spare) == self.new, said)


def f20_writes_that_fail(bench):
    for what, sector in sectors(bench.log).items():
        spare = bench.spare(fails=("write", sector))
        # As systemd has it. Otherwise the kernel would forget what it knows of it as soon as the sync ends.
        bench.machine.run(f"mkdir -p /srv/spare && mount -o ro {bench.device} /srv/spare")
        code, said = bench.machine.status("dualroot-sync 2>&1", 300)
        bench.check(f"{what} can't be written: the sync fails", code == 1 and "error" in said, (code, said))
        said = bench.recorder.sync()
        bench.machine.run("umount /srv/spare")
        bench.recorder.remove()
        bench.check(f"{what} couldn't be written: the next sync has it", bench.boots(spare) == bench.new, said)


def f20_reads_that_fail(bench):
    """In the middle of a kernel that is on the spare already."""
    kernel = scenes.ESP[SCENES[0]]["vmlinuz-linux"]
    at = bench.content.index(kernel) + len(kernel) // 2
    spare = bench.spare(fails=("read", at // writelog.SECTOR))
    code, said = bench.machine.status("dualroot-sync 2>&1", 300)
    bench.check("a file on the spare can't be read: the sync fails, and names it", code == 1 and "vmlinuz-linux" in said, (code, said))
    bench.recorder.remove()
    bench.check("a file on the spare can't be read: nothing has become worse", bench.problem(spare) is None, bench.problem(spare))


def f20_read_only(bench):
    spare = bench.spare()
    disk = bench.machine.run(f"lsblk -no PKNAME $(readlink -f {bench.device}) | head -1")
    bench.machine.run(f"blockdev --setro /dev/{disk} $(readlink -f {bench.device})")
    code, said = bench.machine.status("dualroot-sync 2>&1", 300)
    bench.check("the spare is read-only: the sync fails, and says so", code in (1, 3) and "it is read-only" in said, (code, said))
    bench.machine.run(f"blockdev --setrw /dev/{disk} $(readlink -f {bench.device})")
    bench.check_next("the spare was read-only", spare)


def f21_pulled(bench):
    spare = bench.spare(slow=True)
    bench.begin(spare, len(bench.log.writes) // 3)
    bench.machine.unplug("B")
    code, said = bench.end()
    bench.check("the spare is pulled in the middle: the sync fails, and says so", code == 1 and "error" in said, (code, said))
    bench.check("the spare is pulled in the middle: it boots", bench.problem(spare) is None, bench.problem(spare))
    code, said = bench.machine.status("dualroot-sync 2>&1", 300)
    bench.check("without it, a sync says that it isn't there", code == 4 and "disk1 is not there" in said, (code, said))
    spare = bench.recorder.spare(spare.image.read_bytes())
    bench.check_next("the spare was pulled", spare)


def f18_killed(bench):
    rng, latest, killed = random.Random(SEED), len(bench.log.writes), 0
    while killed < KILLS:
        number = rng.randrange(1, latest)
        spare = bench.spare(slow=True)
        bench.begin(spare, number)
        code, _ = bench.machine.status("kill -KILL $(pidof dualroot-sync)")
        bench.end()
        if code:
            # The last writes are small, and follow each other too fast.
            bench.report.step(f"after write {number}, the sync ended before it could be killed")
            bench.recorder.remove()
            latest = number
            continue
        killed += 1
        bench.machine.unplug("B")
        bench.check(f"the sync is killed at write {number} (seed {SEED}): the spare boots", bench.problem(spare) is None,
                    bench.problem(spare))
        spare = bench.recorder.spare(spare.image.read_bytes())
        bench.check_next(f"it was killed at write {number}", spare)


def f23_two_at_once(bench):
    spare = bench.spare(slow=True)
    bench.begin(spare, 1)
    code, said = bench.machine.status("dualroot-sync 2>&1", 60)
    bench.check("a second sync is refused", code == 3 and "another sync is running" in said, (code, said))
    code, said = bench.end()
    bench.recorder.remove()
    bench.check("the first one goes on", code == 0 and bench.boots(spare) == bench.new, (code, said))


def f10_a_clock_that_is_set_back(bench):
    spare = bench.spare()
    bench.machine.run("date -s '2001-01-01'")
    bench.check_next("the clock was set back by decades", spare)
    bench.machine.run("hwclock --hctosys")


def f10_a_source_that_never_rests(bench):
    # A file that gets longer and longer.
    restless = ("touch /run/restless; (while [ -e /run/restless ]; do echo restless >>/boot/restless; sleep 0.2; done; rm /boot/restless) "
                "</dev/null >/dev/null 2>&1 &")
    # It changes while it is copied, each time.
    spare = bench.spare(slow=True)
    bench.machine.run(restless)
    code, said = bench.machine.status("dualroot-sync 2>&1", 300)
    bench.check("a source that changes all the time is reported", code == 1 and "changed" in said, (code, said))
    # FAT knows times of two seconds: so long it takes until a change is seen.
    bench.machine.run("sed -i s/settle=0/settle=3/ /etc/dualroot.conf; systemctl start --no-block dualroot-sync.service; "
                      "until systemctl show -P StatusText dualroot-sync.service | grep -q 'waiting: the boot files'; do sleep 0.2; done", 300)
    bench.machine.run("rm /run/restless; while [ -e /boot/restless ]; do sleep 0.1; done; sed -i s/settle=3/settle=0/ /etc/dualroot.conf")
    code, said = bench.machine.status("systemctl start dualroot-sync.service", 300)
    bench.recorder.remove()
    bench.check("it is waited for, and copied when it rests", code == 0 and bench.boots(spare) == bench.new, said)


def f10_a_hundred_thousand_events(bench):
    spare = bench.spare()
    units = "dualroot-entries.path dualroot-sync.path"
    bench.machine.run(f"systemctl start {units}")
    bench.machine.run("perl -e 'for (1..100000) { utime undef, undef, \"/boot/loader/entries/arch.conf\" or die }'", 300)
    bench.machine.run(f"until ! systemctl show -P ActiveState dualroot-sync.service dualroot-entries.service | grep -q activating && "
                      "[ ! -e /run/dualroot/dirty ]; do sleep 0.5; done", 300)
    active = bench.machine.status(f"systemctl is-active {units}")[1].split()
    bench.check("after 100,000 events the path units are at work", active == ["active"] * 2, active)
    said = bench.machine.run("systemctl show -P Result dualroot-sync.service")
    bench.machine.run(f"systemctl stop {units}")
    bench.recorder.remove()
    bench.check("and the spare is synced", said == "success" and bench.boots(spare) == bench.new, said)


# Where the first sector of each file lies in its file system, and the last one (FIBMAP). What is written at once lies together.
WHERE = ('for (@ARGV) { open F, "<", $_ or die; my @at = map { my $n = pack "i", $_; ioctl F, 1, $n or die; unpack "i", $n } '
         '(0, ((-s F) - 1) >> 9); print "$_ @at\\n" }')


def f20_a_source_that_cannot_be_read(bench):
    """A sector of the booted disk fails: what lies there is brought to be a part of a kernel."""
    machine = bench.machine

    def where(files):
        found = machine.run(f"sync; perl -e '{WHERE}' {files}")
        return {path: range(int(first), int(last) + 1) for path, first, last in map(str.split, found.splitlines())}

    machine.run("dd if=/dev/zero of=/boot/junk bs=64K count=1 status=none")
    start = where("/boot/junk")["/boot/junk"].start
    machine.run(f"rm /boot/vmlinuz-linux /boot/initramfs-linux.img; dd if=/dev/zero of=/boot/junk bs=512 count={UNREADABLE - start - 400} "
                "status=none", 300)
    bench.recorder.turn_to(1)
    found = where("/boot/*linux*")
    there = [path for path, sectors in found.items() if UNREADABLE in sectors]
    if not there:
        raise Failure(f"nothing lies on sector {UNREADABLE}: {found}")
    # What is cached of that file, and no other, is forgotten: some kernels die when they are to forget everything.
    machine.run(f"rm /boot/junk; sync; dd if={there[0]} iflag=nocache count=0 status=none")
    spare = bench.spare()
    code, said = machine.status("dualroot-sync 2>&1", 300)
    bench.check("a file on the booted disk can't be read: the sync fails, and names it", code == 1 and Path(there[0]).name in said, (code, said))
    bench.recorder.remove()
    bench.check("a file on the booted disk can't be read: the spare is what it was", bench.boots(spare) == bench.old, said)
    # What is written anew lies elsewhere.
    machine.run(f"rm {' '.join(there)}")
    bench.recorder.turn_to(1)


def f18_shut_down(bench):
    """As with a reboot; the machine is gone after that."""
    spare = bench.spare(slow=True)
    bench.begin(spare, len(bench.log.writes) // 3, "systemctl start dualroot-sync.service")
    bench.machine.power_off(300)
    bench.check("a machine that is shut down in the middle gives the sync the time to end", bench.boots(spare) == bench.new,
                bench.problem(spare) or "the old system boots")


# In this order: of the last two, each leaves something broken.
FAULTS = [f20_writes_that_fail, f20_reads_that_fail, f20_read_only, f21_pulled, f18_killed, f23_two_at_once, f10_a_clock_that_is_set_back,
          f10_a_source_that_never_rests, f10_a_hundred_thousand_events, f20_a_source_that_cannot_be_read, f18_shut_down]


def run(report, directory, staging, wanted=()):
    bench = Bench(report, directory, staging)
    try:
        bench.prepare()
        for fault in FAULTS:
            if not wanted or fault.__name__ in wanted:
                report.step(fault.__name__)
                fault(bench)
    finally:
        bench.machine.kill()


def main():
    directory = Path(tempfile.mkdtemp(prefix="dualroot-faults-"))
    report = Report("faults", cut.say)
    run(report, directory, install(directory), sys.argv[1:])
    cut.say(f"{report.passed} passed, {report.failed} failed")
    if not report.failed:
        shutil.rmtree(directory)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
