"""The cases: what a user of two disks lives through, on real firmware."""

import re
import time

import images
from machine import Failure, Machine, overlay

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


class Pair:
    """A machine with two disks of one layout, and what is asked of it again and again."""

    def __init__(self, report, directory, staging, release, initrd, layout):
        self.report, self.layout = report, layout
        system = images.system(release, initrd, layout, staging)
        kind = "raw"
        if layout == "shared-btrfs":
            system, kind = mirrored(system, layout), "qcow2"
        directory.mkdir(parents=True, exist_ok=True)
        self.a, self.b = images.pair(layout)
        self.disks = {"A": overlay(system / f"disk0.{kind}", directory / "a.qcow2"),
                      "B": overlay(system / f"disk1.{kind}", directory / "b.qcow2")}
        self.kernels = images.SUITES[release]["kernels"]
        self.extra = {"kernels": overlay(images.kernels(release), directory / "kernels.qcow2")}
        self.machine = Machine(directory)
        self.own = layout.startswith("own")

    def boot(self, *names):
        """Boots with these disks, and returns the seconds of user space until nothing was left to do."""
        self.report.step(f"power on with {' and '.join(names)}")
        self.machine.start({name: self.disks[name] for name in names} | self.extra)
        text = self.machine.run("systemd-analyze time")
        seconds = re.search(r"\+ (?:(\d+)min )?([\d.]+)(m?)s \(userspace\)", text)
        if not seconds:
            raise Failure(f"systemd-analyze says: {text}")
        minutes, number, milli = seconds.groups()
        return int(minutes or 0) * 60 + float(number) / (1000 if milli else 1)

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
        report.equal("no unit has failed", run("systemctl list-units --failed --no-legend --plain"), "")

    def check_spare(self, disk):
        report, run = self.report, self.machine.run
        roles = {"/mnt/root1/boot": "xbootldr" if "xbootldr" in disk.roles else "esp"}
        if "xbootldr" in disk.roles:
            roles["/mnt/root1/efi"] = "esp"
        if self.own:
            roles["/mnt/root1"] = "root"
        for directory, role in roles.items():
            report.equal(f"{directory} is the spare's", self.partuuid_at(directory), disk.partuuid[role])
            options = run(f"findmnt -no OPTIONS --mountpoint {directory}").split(",")
            report.check(f"{directory} is read-only", "ro" in options, options)

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

    def manual_sync(self):
        code, said = self.machine.status("systemctl start dualroot-sync.service", 900)
        log = self.machine.run("journalctl -u dualroot-sync.service -n 12 --no-pager -o cat")
        self.report.check("systemctl start dualroot-sync.service", code == 0, said + log)


def mirrored(system, layout):
    """The same disks with the root of the first mirrored to the second, as a user would do it."""
    _, b = images.pair(layout)

    def build(path):
        path.mkdir()
        disks = {name: overlay(system / f"disk{n}.raw", path / f"disk{n}.qcow2") for n, name in enumerate("AB")}
        machine = Machine(path / "vm")
        try:
            machine.start(disks)
            machine.run("systemctl stop dualroot-sync.timer dualroot-sync.path dualroot-entries.path")
            machine.run(f"btrfs device add -f /dev/disk/by-partuuid/{b.partuuid['root']} / && "
                        "btrfs balance start --full-balance -dconvert=raid1 -mconvert=raid1 /", 900)
            machine.power_off()
        finally:
            machine.kill()
    return images.cached(f"mirrored-{layout}", str(system), "", build)


def degraded(report, directory, staging, release, initrd, layout):
    """One root on both disks: A goes, B boots with half of the mirror, A comes back and is healed, B goes."""
    pair = Pair(report, directory, staging, release, initrd, layout)
    first, second, _ = pair.kernels
    machine = pair.machine
    try:
        pair.boot("A", "B")
        pair.check_booted(pair.a, first)
        report.check("the root is on both disks", "raid1" in machine.run("btrfs filesystem df / | tr A-Z a-z"))
        pair.manual_sync()
        pair.check_spare(pair.b)
        pair.install_and_await_sync(second)
        machine.run("sync; echo 'written on both' >/root/note")
        machine.power_off()

        report.step("A is removed")
        pair.boot("B")
        pair.check_booted(pair.b, second)
        report.check("it says that it is degraded", machine.status("cat /run/dualroot/degraded")[0] == 0)
        report.check("the root is mounted degraded", "degraded" in machine.run("findmnt -no OPTIONS /"))
        report.equal("a sync without a spare says so", machine.status("dualroot-sync", 300)[0], 4)
        machine.run("echo 'written on B alone' >/root/note; sync")
        machine.power_off()

        report.step("A is put back")
        pair.boot("A", "B")
        pair.check_booted(pair.b, second)
        report.check("with both disks, it is not degraded", "degraded" not in machine.run("findmnt -no OPTIONS /"))
        pair.manual_sync()
        machine.run("while systemctl is-active -q dualroot-heal.service || systemctl show -P ActiveState dualroot-heal.service | "
                    "grep -q activating; do sleep 1; done", 600)
        report.check("A is healed", machine.status("test ! -e /var/lib/dualroot/degraded")[0] == 0,
                     machine.run("journalctl -u dualroot-heal.service -o cat --no-pager | tail -5"))
        machine.power_off()

        report.step("B is removed")
        pair.boot("A")
        pair.check_booted(pair.a, second)
        report.equal("what was written on B is on A", machine.run("cat /root/note"), "written on B alone")
        machine.power_off()
    finally:
        machine.kill()


def failover(report, directory, staging, release, initrd, layout):
    """A boots, B becomes a copy by itself, A goes, B boots and is upgraded, A comes back."""
    pair = Pair(report, directory, staging, release, initrd, layout)
    first, second, third = pair.kernels
    machine = pair.machine
    try:
        both = pair.boot("A", "B")
        pair.check_booted(pair.a, first)
        pair.manual_sync()
        pair.check_spare(pair.b)
        pair.install_and_await_sync(second)
        report.equal("the spare is clean at rest", machine.status(
            "for p in /dev/disk/by-partuuid/" + pair.b.partuuid["esp"] + "; do od -An -tx1 -j65 -N1 $p; done")[1], "00")
        machine.power_off()

        report.step("A is removed")
        alone = pair.boot("B")
        pair.check_booted(pair.b, second)
        pair.names_only(pair.b, pair.a)
        report.figures.append((f"{layout}: user space with the spare missing / present", alone / both))
        report.check("a missing spare costs the boot no time", alone < both + 5, f"{alone} s instead of {both} s")
        code, said = machine.status("dualroot-sync", 300)
        report.equal("a sync without a spare says so by its exit status", code, 4)
        machine.run(pair.install(third), 900)
        pair.names_only(pair.b, pair.a)
        machine.power_off()

        pair.boot("B")
        pair.check_booted(pair.b, third)
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


CASES = {
    "own-xbootldr-12": (failover, 12, "initramfs-tools", "own-xbootldr"),
    "own-esp-12": (failover, 12, "initramfs-tools", "own-esp"),
}

# Not run unless named: not seen to pass yet. The README says so.
UNPROVEN = {
    "shared-btrfs-12": (degraded, 12, "initramfs-tools", "shared-btrfs"),
}
