"""The cases: what a user of two disks lives through, on real firmware."""

import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "powercut"))
import images  # noqa: E402
import writelog  # noqa: E402
from machine import Failure, Machine, overlay  # noqa: E402

# Of the cuts of a kernel's sync, so many are booted; the seed is printed.
CUTS = 6
SEED = writelog.seed()

# Until the spare has this kernel's entry, no change is waiting to be synced, and no sync is running. The guest has no event for all
# of that together.
AWAIT_SYNC = """
entry=%s
until ls $entry >/dev/null 2>&1 && [ ! -e /run/dualroot/dirty ] &&
      ! systemctl show -P ActiveState dualroot-sync.service dualroot-entries.service | grep -q activating; do
    sleep 1
done
systemctl show -P Result dualroot-sync.service
"""


class Report:
    """Prints a line for every assertion, and counts."""

    def __init__(self, name, out=print):
        self.name, self.out, self.begun = name, out, time.monotonic()
        self.passed, self.failed, self.figures = 0, 0, []

    def step(self, text):
        self.out(f"[{self.name} {time.monotonic() - self.begun:5.0f} s] {text}")

    def check(self, text, good, found=""):
        if good:
            self.passed += 1
            self.step(f"ok: {text}")
        else:
            self.failed += 1
            self.step(f"FAILED: {text}; found: {found}")

    def equal(self, text, found, expected):
        self.check(text, found == expected, f"{found!r} instead of {expected!r}")

    def compare_boots(self, what, alone, both):
        """The ratio of the times that boots took without the spare and with it; printed, as times vary with the machine's load."""
        self.figures.append((f"{what}: user space until multi-user.target, spare missing / present", alone / both))


class Pair:
    """A machine with two disks of one layout, and what is asked of it again and again."""

    def __init__(self, report, directory, staging, release, initrd, layout, logged=False):
        self.report, self.layout = report, layout
        system = images.system(release, initrd, layout, staging)
        directory.mkdir(parents=True, exist_ok=True)
        self.a, self.b = images.pair(layout)
        self.disks = {"A": overlay(system / "disk0.raw", directory / "a.qcow2"),
                      "B": overlay(system / "disk1.raw", directory / "b.qcow2")}
        self.base, self.logs = system / "disk1.raw", {}
        if logged:
            # The format of which QEMU can log the writes.
            self.disks["B"] = copy(self.base, directory / "b.raw")
            self.logs = {"B": directory / "b.log"}
        self.kernels = images.kernel_versions(release)
        self.extra = {"kernels": overlay(images.kernels(release), directory / "kernels.qcow2")}
        self.machine = Machine(directory)
        self.own = layout.startswith("own")

    def boot(self, *names, logs=None):
        """Boots with these disks, and returns the seconds from the start of user space until people could log in."""
        self.report.step(f"power on with {' and '.join(names)}")
        self.machine.start({name: self.disks[name] for name in names} | self.extra, logs=logs)
        reached = self.machine.run("systemctl show -P ActiveEnterTimestampMonotonic multi-user.target")
        begun = self.machine.run("systemctl show -P UserspaceTimestampMonotonic")
        return (int(reached) - int(begun)) / 1e6

    def partuuid_at(self, directory):
        return self.machine.status(f"findmnt -no PARTUUID --mountpoint {directory}")[1].lower()

    def check_booted(self, disk, kernel):
        report, run = self.report, self.machine.run
        report.equal("the kernel that runs", run("uname -r"), kernel)
        boot = "xbootldr" if "xbootldr" in disk.roles else "esp"
        report.equal("/boot is the booted disk's", self.partuuid_at("/boot"), disk.partuuid[boot])
        if "xbootldr" in disk.roles:
            report.equal("/efi is the booted disk's", self.partuuid_at("/efi"), disk.partuuid["esp"])
        if self.own:
            report.equal("/ is the booted disk's", self.partuuid_at("/"), disk.partuuid["root"])
        if "home" in disk.roles:
            report.equal("/home is the booted disk's", self.partuuid_at("/home"), disk.partuuid["home"])
            report.equal("the swap space is the booted disk's", run("swapon --show=UUID --noheadings"), disk.uuid["swap"])
        failed = [line.split()[0] for line in run("systemctl list-units --failed --no-legend --plain").splitlines()]
        journals = [run(f"journalctl -b -u {unit} --no-pager -o cat | tail") for unit in failed]
        report.check("no unit has failed", not failed, f"{failed}: {journals}")

    def check_nothing_waits(self):
        """Nothing of the boot comes after a spare's mounts, so that nothing waits for a disk that isn't there."""
        found = self.machine.run("for unit in $(systemctl list-units --all --plain --no-legend 'mnt-root1*.mount' | cut -d' ' -f1); do "
                                 "systemctl show -P Before $unit; done").split()
        after = [unit for unit in found if unit != "umount.target" and not unit.startswith("mnt-root1")]
        self.report.check("nothing waits for the missing spare", found and not after, after or "the spare has no mount units")

    def check_spare(self, disk):
        report, run = self.report, self.machine.run
        roles = {"/mnt/root1/boot": "xbootldr" if "xbootldr" in disk.roles else "esp"}
        if "xbootldr" in disk.roles:
            roles["/mnt/root1/efi"] = "esp"
        if self.own:
            roles["/mnt/root1"] = "root"
        if "home" in disk.roles:
            roles["/mnt/root1/home"] = "home"
        for directory, role in roles.items():
            report.equal(f"{directory} is the spare's", self.partuuid_at(directory), disk.partuuid[role])
            options = run(f"findmnt -no OPTIONS --mountpoint {directory}").split(",")
            report.check(f"{directory} is read-only", "ro" in options, options)

    def plan_a_change(self):
        """Has the disk that is booted look as if a copy to it had been cut before the last step: a file is staged that replaces another."""
        self.report.step("a copy to this disk was cut")
        self.machine.run("systemctl stop dualroot-sync.timer dualroot-sync.path dualroot-sync.service")
        self.machine.run("echo old >/root/generation && mkdir -p /.dualroot/new/root && echo new >/.dualroot/new/root/generation && "
                         r"printf 'dualroot 1\0F root/generation\0.' >/.dualroot/plan && sync")

    def check_completed(self):
        """The initrd has carried that out, and not the service that comes after it."""
        report, run = self.report, self.machine.run
        report.equal("what was staged is in its place", run("cat /root/generation; ls -d /.dualroot 2>/dev/null || true"), "new")
        report.equal("that was done in the initrd", run("journalctl -b -k -t dualroot-complete --no-pager -o cat"),
                     "/: a copy to this disk was cut, and is complete now")

    def names_only(self, own, other):
        """No file below /boot and /etc that is read at boot names the other disk."""
        identifiers = [*other.partuuid.values(), *other.uuid.values()]
        if not self.own:
            identifiers = [i for r in ("esp",) for i in (other.partuuid[r], other.uuid[r])]
        pattern = " ".join(f"-e {i}" for i in identifiers)
        places = "/boot/loader /efi/loader /etc/fstab /etc/kernel /etc/crypttab"
        found = self.machine.status(f"grep -rilF {pattern} {places} 2>/dev/null")[1]
        self.report.equal(f"nothing that boots names disk{other.number}", found, "")

    def install(self, kernel):
        self.report.step(f"dpkg -i linux-image-{kernel}; nothing else is done")
        command = ("mkdir -p /run/debs && tar -xf /dev/disk/by-id/virtio-kernels -C /run/debs && "
                   f"dpkg -i /run/debs/linux-image-{kernel}_*.deb >/run/dpkg.log 2>&1 || {{ tail -5 /run/dpkg.log; exit 1; }}")
        return command

    def install_and_await_sync(self, kernel):
        self.machine.run(self.install(kernel), 900)
        self.await_sync("the path unit has it synced", kernel)

    def await_sync(self, what, kernel):
        said = self.machine.run(AWAIT_SYNC % f"/mnt/root1/boot/loader/entries/*{kernel}*.conf", 900)
        self.report.equal(what, said, "success")

    def written(self):
        """How many writes to the spare have been logged."""
        return len(writelog.read_log(self.logs["B"]).writes) if self.logs else 0

    def boot_cuts(self, begun, kernels):
        """Boots the spare alone as power cuts would have left it, at writes from the number `begun` on."""
        log = writelog.read_log(self.logs["B"])
        start, end = 1 << 20, images.SIZES["esp"] + 1 << 20
        rng = random.Random(SEED)
        states = [state for state in writelog.states(log, rng, 8, 1) if state.prefix >= begun]

        def in_esp(state):
            at = state.extra[-1][0] if state.extra else log.writes[state.prefix - 1].offset
            return start <= at < end
        chosen = rng.sample([s for s in states if in_esp(s)], CUTS - 2) + rng.sample([s for s in states if not in_esp(s)], 2)
        for number, state in enumerate(chosen):
            self.report.step(f"the power is cut: {state.what} (seed {SEED})")
            directory = self.machine.directory / "cut"
            # With firmware that has never seen this disk.
            (directory / "vars.fd").unlink(missing_ok=True)
            machine = Machine(directory)
            try:
                disk = copy(self.base, directory / "b.raw")
                with open(disk, "r+b") as image:
                    for offset, data in [*map(writelog.whole, log.writes[:state.prefix]), *state.extra]:
                        image.seek(offset)
                        image.write(bytes(data) if isinstance(data, int) else data)
                machine.start({"B": disk})
                found = machine.run("uname -r")
                self.report.check("what is left boots", found in kernels, found)
                failed = machine.run("systemctl list-units --failed --no-legend --plain")
                self.report.equal("no unit has failed", failed, "")
                if self.own:
                    # What the package manager knows to be installed is there, and whole; /boot is another file system.
                    verify = ("dpkg --audit; dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' 'linux-image-*' | sed -n 's/^ii *//p' | "
                              "xargs dpkg --verify | grep -v -e ' /usr/share/' -e ' /boot/' || true")
                    self.report.equal("the root is of one generation", machine.run(verify), "")
            except Failure as error:
                self.report.check("what is left boots", False, error)
            finally:
                machine.kill()

    def upgrade_and_lose_a(self, first, second):
        """A kernel arrives and is synced, what cuts would have left of that is booted, and A goes. Seconds that a boot took with B alone,
        and with both."""
        begun = self.written()
        self.install_and_await_sync(second)
        state = self.machine.status(f"od -An -tx1 -j65 -N1 /dev/disk/by-partuuid/{self.b.partuuid['esp']}")[1]
        self.report.equal("the spare is clean at rest", state, "00")
        self.machine.power_off()
        if self.logs:
            self.boot_cuts(begun, (first, second))
        both = self.boot("A", "B")
        self.check_booted(self.a, second)
        self.machine.power_off()
        self.report.step("A is removed")
        alone = self.boot("B")
        self.check_booted(self.b, second)
        return alone, both

    def manual_sync(self):
        self.machine.run("systemctl start dualroot-entries.service", 300)
        code, said = self.machine.status("systemctl start dualroot-sync.service", 900)
        log = self.machine.run("journalctl -u dualroot-sync.service -n 12 --no-pager -o cat")
        self.report.check("systemctl start dualroot-sync.service", code == 0, said + log)


def copy(base, path):
    """A raw disk with the same content, and the same holes."""
    subprocess.run(["cp", "--sparse=always", base, path], check=True)
    return path


def degraded(report, directory, staging, release, initrd, layout, logged):
    """One root on both disks: A goes, B boots with half of the mirror and is upgraded, A comes back and is healed, B goes."""
    pair = Pair(report, directory, staging, release, initrd, layout, logged)
    first, second, third = pair.kernels
    machine = pair.machine
    try:
        pair.boot("A", "B", logs=pair.logs)
        pair.check_booted(pair.a, first)
        report.step("the root is mirrored to B")
        # Now and then the last of the old chunks finds no room on so small a disk, before those that were moved are given back.
        balance = "btrfs balance start -dconvert=raid1,soft -mconvert=raid1,soft /"
        machine.run(f"btrfs device add -f /dev/disk/by-partuuid/{pair.b.partuuid['root']} / && {{ {balance} || {balance}; }}", 900)
        pair.manual_sync()
        pair.check_spare(pair.b)
        machine.run("echo 'written on both' >/root/note")
        alone, both = pair.upgrade_and_lose_a(first, second)
        report.compare_boots(layout, alone, both)
        pair.check_nothing_waits()
        report.check("it says that it is degraded", machine.status("cat /run/dualroot/degraded")[0] == 0)
        report.check("the root is mounted degraded", "degraded" in machine.run("findmnt -no OPTIONS /"))
        report.equal("a sync without a spare says so by its exit status", machine.status("dualroot-sync", 300)[0], 4)
        machine.run(pair.install(third), 900)
        machine.run("echo 'written on B alone' >/root/note")
        machine.power_off()

        pair.boot("B")
        pair.check_booted(pair.b, third)
        report.check("that is remembered on the root", machine.status("cat /var/lib/dualroot/degraded")[0] == 0)
        machine.power_off()

        report.step("A is put back")
        pair.boot("A", "B")
        pair.check_booted(pair.b, third)
        report.check("with both disks, it is not degraded", "degraded" not in machine.run("findmnt -no OPTIONS /"))
        code, said = machine.status("dualroot-sync", 300)
        report.check("as long as A isn't healed, a sync says that it wouldn't boot", code == 1 and "dualroot-heal.service" in said, said)
        machine.run("while systemctl show -P ActiveState dualroot-heal.service | grep -q activating; do sleep 1; done", 900)
        report.check("A is healed", machine.status("test ! -e /var/lib/dualroot/degraded")[0] == 0,
                     machine.run("journalctl -u dualroot-heal.service -o cat --no-pager | tail -5"))
        pair.manual_sync()
        machine.power_off()

        report.step("B is removed")
        pair.boot("A")
        pair.check_booted(pair.a, third)
        report.equal("what was written on B is on A", machine.run("cat /root/note"), "written on B alone")
        machine.power_off()
    finally:
        machine.kill()


def failover(report, directory, staging, release, initrd, layout, logged):
    """A boots, B becomes a copy by itself, A goes, B boots and is upgraded, A comes back."""
    pair = Pair(report, directory, staging, release, initrd, layout, logged)
    first, second, third = pair.kernels
    machine = pair.machine
    try:
        if layout == "own-esp":
            pair.boot("A")
            report.step("B is put in, while the machine runs")
            machine.run("systemctl stop dualroot-sync.timer")
            machine.plug("B", pair.disks["B"], pair.logs.get("B"))
            pair.await_sync("a disk that is put in is synced by itself", first)
        else:
            pair.boot("A", "B")
            pair.manual_sync()
        pair.check_booted(pair.a, first)
        pair.check_spare(pair.b)
        machine.run("echo 'written on disk0' >/home/note")
        alone, both = pair.upgrade_and_lose_a(first, second)
        report.equal("what was written on the first disk is here", machine.run("cat /home/note"), "written on disk0")
        pair.names_only(pair.b, pair.a)
        report.compare_boots(layout, alone, both)
        pair.check_nothing_waits()
        code, said = machine.status("dualroot-sync", 300)
        report.equal("a sync without a spare says so by its exit status", code, 4)
        machine.run(pair.install(third), 900)
        pair.names_only(pair.b, pair.a)
        pair.plan_a_change()
        machine.power_off()

        pair.boot("B")
        pair.check_booted(pair.b, third)
        pair.check_completed()
        report.step("A is put back, while the machine runs")
        machine.run("systemctl stop dualroot-sync.timer")
        machine.plug("A", pair.disks["A"])
        pair.await_sync("the disk that came back is synced by itself", third)
        pair.check_spare(pair.a)
        machine.power_off()

        pair.boot("A", "B")
        pair.check_booted(pair.b, third)
        machine.power_off()
        pair.boot("A")
        pair.check_booted(pair.a, third)
        pair.names_only(pair.a, pair.b)
        machine.power_off()
    finally:
        machine.kill()


# The longest first.
CASES = {
    f"{layout}-{release}": (degraded if layout == "shared-btrfs" else failover, release, initrd, layout,
                          release == 12 and layout != "own-xbootldr")
    for layout in ("shared-btrfs", "own-xbootldr", "own-esp") for release, initrd in ((13, "dracut"), (12, "initramfs-tools"))
}
# With what else there is to do, tests/run has 45 minutes. These have to be asked for: the layout on the other release of Debian is there.
ON_REQUEST = ("own-xbootldr-12", "own-esp-13")
