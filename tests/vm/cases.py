"""The cases: what a user of two disks lives through, on real firmware."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "powercut"))
import booted  # noqa: E402
import images  # noqa: E402
import writelog  # noqa: E402
from machine import Failure, Machine, overlay  # noqa: E402

# Of the cuts of a kernel's sync, so many are booted in each case that logs writes, first those while the ESP and then those while
# something else is written; the seed is printed.
CUTS = (2, 1)
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

# Changes a byte of loader.conf on the medium, below its file system.
ROT = """perl -e 'open F, "+<", $ARGV[0] or die; while (read F, $part, 1 << 20) { $in = index $part, "console-mode keep"; next if $in < 0;
$at = tell(F) - length($part) + $in; seek F, $at, 0; print F "C"; seek F, ($at | 0xfffff) + 1, 0 }' %s"""


class Report:
    """Prints a line for every assertion, and counts."""

    def __init__(self, name, out=print, older=False):
        self.name, self.out, self.begun = name, out, time.monotonic()
        # With other kernels than the newest ones.
        self.older = older
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
        self.origin = (release, initrd, layout, staging, report.older)
        system = images.system(release, initrd, layout, staging, report.older)
        directory.mkdir(parents=True, exist_ok=True)
        self.a, self.b = images.pair(layout)
        self.disks = {"A": overlay(system / "disk0.raw", directory / "a.qcow2")}
        if not layout.startswith("one-"):
            self.disks["B"] = overlay(system / "disk1.raw", directory / "b.qcow2")
        self.base, self.logs = system / "disk1.raw", {}
        if logged:
            # The format of which QEMU can log the writes.
            self.disks["B"] = copy(self.base, directory / "b.raw")
            self.logs = {"B": directory / "b.log"}
        self.kernels = images.kernel_versions(release, report.older)
        self.extra = {"kernels": overlay(images.kernels(release, report.older), directory / "kernels.qcow2")}
        # Where ext4 is short of memory, some of Debian 12's kernels die.
        self.machine = Machine(directory, 1024 if "btrfs" in layout else 1536)
        self.own = "shared" not in layout
        if layout == "one-luks":
            self.machine.passphrase = images.PASSPHRASE
        self.generations = layout == "own-btrfs"

    def boot(self, *names, logs=None):
        """Boots with these disks, and returns the seconds from the start of user space until people could log in."""
        self.report.step(f"power on with {' and '.join(names)}")
        self.machine.start({name: self.disks[name] for name in names} | self.extra, logs=logs)
        reached = self.machine.run("systemctl show -P ActiveEnterTimestampMonotonic multi-user.target")
        begun = self.machine.run("systemctl show -P UserspaceTimestampMonotonic")
        return (int(reached) - int(begun)) / 1e6

    def boot_first(self):
        """Goes on from where a machine was saved that had booted from A, as it was made, alone."""
        self.report.step("power on with A")
        self.disks["A"] = booted.resume(self.machine, *self.origin)
        for name, image in self.extra.items():
            self.machine.plug(name, image)
            self.machine.run(f"udevadm wait -t 60 /dev/disk/by-id/virtio-{name}", 90)

    def partuuid_at(self, directory):
        # What is mapped to a partition has no PARTUUID itself.
        below = f"findmnt -nvo SOURCE --mountpoint {directory} | xargs -r lsblk -lnso PARTUUID | grep ."
        return self.machine.status(f"findmnt -no PARTUUID --mountpoint {directory} | grep . || {below}")[1].lower()

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
        entries = run("cat /sys/firmware/efi/efivars/Boot0* | tr -d '\\0' | grep -ao 'Linux Boot Manager (disk[0-9])' | sort -u || true")
        report.check("the firmware has an entry for the spare", f"(disk{disk.number})" in entries, entries)
        self.check_denials()

    def check_denials(self):
        """The services had every right that they needed."""
        denied = "not permitted|denied|read-only file system|cross-device|EPERM|EACCES|EROFS|EXDEV|NAMESPACE"
        found = self.machine.run(f"journalctl -b -u 'dualroot-*' --no-pager | grep -iE '{denied}'; "
                                 "journalctl -b -k --no-pager | grep 'type=1326' || true")
        self.report.equal("nothing was denied to the services", found, "")

    def check_entries_service(self):
        """dualroot-entries.service has fewer rights than the sync, which does the same."""
        report, run = self.report, self.machine.run
        units = "dualroot-sync.timer dualroot-sync.path dualroot-entries.path"
        files = "/etc/default/grub /boot/loader/entries/test.conf"
        run(f"systemctl stop {units} dualroot-sync.service; echo 'options root=UUID={self.a.uuid['root']}' | tee {files}")
        run("systemctl start dualroot-entries.service", 300)
        expected = f"options root=UUID={self.b.uuid['root']}"
        report.equal("dualroot-entries.service rewrites what names the other disk", run(f"cat {files}").split("\n"), [expected] * 2)
        self.check_denials()
        run(f"rm {files}; systemctl start {units}")

    def check_status(self):
        """What is said of a spare that boots, also to those who aren't root."""
        report = self.report
        status = json.loads(self.machine.run("dualroot-status --json"))
        report.check("dualroot-status says that disk1 boots", status["exit_status"] == 0 and status["disks"][1]["boots"], status)
        code, said = self.machine.status("setpriv --reuid 65534 --regid 65534 --clear-groups dualroot-status")
        report.check("and so it does without root", code == 0 and "boots, as of" in said and "(needs root)" in said, said)

    def check_verified(self):
        """A byte that changes at rest is found, and put right by the next sync."""
        report = self.report
        report.equal("a verification finds the spare whole", self.machine.status("systemctl start dualroot-verify.service", 300), (0, ""))
        self.machine.run(ROT % f"/dev/disk/by-partuuid/{self.b.partuuid['esp']}; sync", 300)
        code, _ = self.machine.status("systemctl start dualroot-verify.service", 300)
        said = self.machine.run("journalctl -b -u dualroot-verify.service -o cat --no-pager")
        report.check("a byte that has changed is found", code != 0 and "loader/loader.conf is not what the last sync read" in said, said)
        code, said = self.machine.status("dualroot-status")
        report.check("dualroot-status says so", code == 1 and "would not boot: esp (/dev/" in said, said)
        self.manual_sync()
        report.equal("and a sync puts it right", self.machine.status("systemctl start dualroot-verify.service", 300), (0, ""))

    def plan_a_change(self):
        """Stages a file on the booted disk that replaces another, as a copy does that is interrupted before its last step."""
        self.report.step("a copy to this disk was interrupted")
        self.machine.run("systemctl stop dualroot-sync.timer dualroot-sync.path dualroot-sync.service")
        self.machine.run("echo old >/root/generation && mkdir -p /.dualroot/new/root && echo new >/.dualroot/new/root/generation && "
                         r"printf 'dualroot 1\0F root/generation\0.' >/.dualroot/plan && sync")

    def check_completed(self):
        """The initrd has carried that out, and not the service that comes after it."""
        report, run = self.report, self.machine.run
        report.equal("what was staged is in its place", run("cat /root/generation; ls -d /.dualroot 2>/dev/null || true"), "new")
        report.equal("that was done in the initrd", run("journalctl -b -k -t dualroot-complete --no-pager -o cat"),
                     "/: a copy to this disk was interrupted, and is complete now")

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
        command = (f"mkdir -p /run/debs && tar -xf /dev/disk/by-id/virtio-kernels -C /run/debs --wildcards './linux-image-{kernel}_*' && "
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
        chosen = [state for count, esp in zip(CUTS, (True, False)) for state in rng.sample([s for s in states if in_esp(s) == esp], count)]
        for number, state in enumerate(chosen):
            self.report.step(f"the power is cut: {state.what} (seed {SEED})")
            # With firmware that has never seen this disk.
            machine = Machine(self.machine.directory / f"cut{number}", self.machine.memory)
            try:
                disk = copy(self.base, machine.directory / "b.raw")
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
        # As two minutes after a boot. What a disk has done since it was booted is not on the other one before.
        self.manual_sync()
        self.machine.power_off()
        self.report.step("A is removed")
        alone = self.boot("B")
        self.check_booted(self.b, second)
        return alone, both

    def subvolume_at(self, directory):
        return self.machine.run(f"findmnt -no FSROOT --mountpoint {directory}")

    def boot_older(self, kernels):
        """Boots the generation of its root that the booted disk had before, by its entry in the menu, and then the newest one again."""
        newest = self.subvolume_at("/")
        older = int(Path(newest).name) - 1
        entries = sorted(self.machine.run("cd /boot/loader/entries; echo -- -dualroot-*").split()[1:])
        self.report.check(f"generation {older} is offered", entries and all(f"-dualroot-{older}-" in e for e in entries), entries)
        self.machine.run(f"bootctl set-oneshot -- {entries[-1]}")
        self.machine.power_off()
        kernel = next(kernel for kernel in kernels if kernel in entries[-1])
        self.boot("B")
        self.check_booted(self.b, kernel)
        self.report.equal("its root is that generation", self.subvolume_at("/"), f"/dualroot/{older}")
        self.machine.power_off()
        self.boot("B")
        self.check_booted(self.b, kernels[0])
        self.report.equal("and then the newest again", self.subvolume_at("/"), newest)

    def boot_stale(self, kernel):
        """Boots the disk that was away, as firmware does that has lost its settings, beside the one that runs and has gone on without it:
        nothing is overwritten by itself."""
        report, run = self.report, self.machine.run
        run("echo 'written on disk1' >/home/note")
        self.machine.power_off()
        self.machine.forget()
        self.boot("A", "B")
        self.check_booted(self.a, kernel)
        run("systemctl stop dualroot-sync.timer")
        code, _ = self.machine.status("systemctl start dualroot-sync.service", 900)
        said = run("journalctl -b -u dualroot-sync.service -o cat --no-pager")
        report.check("the disk that was away overwrites nothing", code != 0 and "disk1 is newer than disk0: it has " in said, said)
        report.equal("what was written on the other one is there", run("cat /mnt/root1/home/note"), "written on disk1")

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
    """One root on both disks: A goes, B boots with half of the mirror and is upgraded, A comes back alone and is not booted, comes back
    beside B and is healed, B goes. Release 13 keeps what B's ESP has, and loses B while it runs; release 12 gives that up."""
    pair = Pair(report, directory, staging, release, initrd, layout, logged)
    first, second, third = pair.kernels
    machine = pair.machine
    try:
        pair.boot("A", "B", logs=pair.logs)
        report.step("the root is mirrored to B")
        # Now and then the last of the old chunks finds no room on so small a disk, before those that were moved are given back.
        balance = "btrfs balance start -dconvert=raid1,soft -mconvert=raid1,soft /"
        machine.run(f"btrfs device add -f /dev/disk/by-partuuid/{pair.b.partuuid['root']} / && {{ {balance} || {balance}; }}", 900)
        pair.manual_sync()
        # Not before: a sync that began by itself would have had to fail.
        pair.check_booted(pair.a, first)
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
        half = machine.run(f"blkid -p -s UUID_SUB -o value /dev/disk/by-partuuid/{pair.b.partuuid['root']}")
        remembered = "cat /sys/firmware/efi/efivars/DualrootAlone-* | tail -c +5"
        report.equal("and in the firmware", machine.run(remembered), f"{pair.a.uuid['root']} {half}")
        machine.power_off()

        report.step("A is put in, and B is not")
        stays_behind(pair, "A")

        report.step("B is put back beside it")
        pair.boot("A", "B")
        pair.check_booted(pair.b, third)
        report.check("with both disks, it is not degraded", "degraded" not in machine.run("findmnt -no OPTIONS /"))
        report.equal("the firmware remembers still", machine.run(remembered), f"{pair.a.uuid['root']} {half}")
        # A's ESP has stayed behind, too. Which of the two is given up is not for a sync to choose.
        boot_half(pair, pair.a, second)
        kernel, given_up = second, "disk1"
        if release == 13:
            boot_half(pair, pair.b, third)
            kernel, given_up = third, "disk0"
        code, said = machine.status(f"dualroot-sync --discard-spare {given_up}", 300)
        report.check("as long as A isn't healed, a sync says that it wouldn't boot", code == 1 and "dualroot-heal.service" in said, said)
        machine.run("while systemctl show -P ActiveState dualroot-heal.service | grep -q activating; do sleep 1; done", 900)
        report.check("A is healed", machine.status("test ! -e /var/lib/dualroot/degraded")[0] == 0,
                     machine.run("journalctl -u dualroot-heal.service -o cat --no-pager | tail -5"))
        report.equal("and may be booted alone", machine.run("ls /sys/firmware/efi/efivars | grep Dualroot || true"), "")
        pair.check_denials()
        pair.manual_sync()
        note = "written on B alone"
        if release == 13:
            note = drop_out(pair, remembered)
        else:
            machine.power_off()

        report.step("B is removed")
        pair.boot("A")
        pair.check_booted(pair.a, kernel)
        report.equal("what was written on B, or without it, is on A", machine.run("cat /root/note"), note)
        machine.power_off()
    finally:
        machine.kill()


def boot_half(pair, disk, kernel):
    """With both halves there, this disk's ESP is booted: nothing is copied to the other's."""
    report, machine = pair.report, pair.machine
    machine.run("systemctl stop dualroot-sync.timer")
    machine.run(f"dualroot-sync --boot-next disk{disk.number}")
    machine.power_off()
    pair.boot("A", "B")
    pair.check_booted(disk, kernel)
    # That, and no more: the healing isn't to begin yet.
    code, said = machine.status("dualroot-sync --dry-run", 300)
    newer = "disk1 is newer than disk0: it has" if disk is pair.a else "disk1 and disk0 were each used without the other"
    report.check(f"from disk{disk.number}, nothing is overwritten unasked", code == 3 and newer in said, said)


def drop_out(pair, remembered):
    """B, which was booted, drops out while the machine runs, and is not booted alone after that. What was written meanwhile."""
    report, machine = pair.report, pair.machine
    half = machine.run(f"blkid -p -s UUID_SUB -o value /dev/disk/by-partuuid/{pair.a.partuuid['root']}")
    report.step("B is pulled, while the machine runs")
    machine.run("systemctl stop dualroot-sync.timer")
    machine.unplug("B")
    machine.run("until grep -q . /sys/firmware/efi/efivars/DualrootAlone-*; do sleep 1; done")
    report.equal("the firmware remembers that A goes on", machine.run(remembered), f"{pair.a.uuid['root']} {half}")
    note = "written without B"
    machine.run(f"echo '{note}' >/root/note; sync")
    machine.kill()
    report.step("the power was cut; B is there alone")
    stays_behind(pair, "B")
    return note


def stays_behind(pair, name):
    """Powers on with this disk alone, which has stayed behind."""
    pair.machine.power_on({name: pair.disks[name]} | pair.extra)
    pair.machine.await_console(f"dualroot: not mounting the btrfs root {pair.a.uuid['root']}: the missing disk was written")
    pair.report.check(f"{name}, which has stayed behind, is not booted alone", True)
    pair.machine.kill()


def failover(report, directory, staging, release, initrd, layout, logged):
    """A boots, B becomes a copy by itself, A goes, B boots and is upgraded, A comes back."""
    pair = Pair(report, directory, staging, release, initrd, layout, logged)
    first, second, third = pair.kernels
    machine = pair.machine
    try:
        if layout == "own-esp":
            pair.boot_first()
            report.step("B is put in, while the machine runs")
            machine.run("systemctl stop dualroot-sync.timer")
            machine.plug("B", pair.disks["B"], pair.logs.get("B"))
            pair.await_sync("a disk that is put in is synced by itself", first)
        else:
            pair.boot("A", "B", logs=pair.logs)
            pair.manual_sync()
        pair.check_booted(pair.a, first)
        pair.check_spare(pair.b)
        pair.check_status()
        if layout == "own-esp":
            pair.check_verified()
        if pair.generations:
            report.equal("B's root is its first generation", pair.subvolume_at("/mnt/root1"), "/dualroot/1")
        machine.run("echo 'written on disk0' >/home/note")
        alone, both = pair.upgrade_and_lose_a(first, second)
        report.equal("what was written on the first disk is here", machine.run("cat /home/note"), "written on disk0")
        pair.names_only(pair.b, pair.a)
        if pair.generations:
            pair.boot_older((second, first))
        report.compare_boots(layout, alone, both)
        pair.check_nothing_waits()
        code, said = machine.status("dualroot-sync", 300)
        report.equal("a sync without a spare says so by its exit status", code, 4)
        report.equal("and so does dualroot-status", machine.status("dualroot-status >/dev/null")[0], 4)
        pair.check_entries_service()
        if pair.generations:
            # A kernel that is installed on B is other cases' business.
            third = second
        else:
            machine.run(pair.install(third), 900)
            pair.names_only(pair.b, pair.a)
        pair.plan_a_change()
        machine.power_off()

        pair.boot("B")
        pair.check_booted(pair.b, third)
        pair.check_completed()
        if layout == "own-esp":
            keep_newer(pair, second, third)
        elif layout == "own-xbootldr":
            give_up_newer(pair, second)
        else:
            come_back(pair, third)
    finally:
        machine.kill()


def come_back(pair, kernel):
    """A is put back into the machine that runs from B."""
    report, machine = pair.report, pair.machine
    report.step("A is put back, while the machine runs")
    machine.run("systemctl stop dualroot-sync.timer")
    machine.plug("A", pair.disks["A"])
    pair.await_sync("the disk that came back is synced by itself", kernel)
    pair.check_spare(pair.a)
    machine.power_off()

    pair.boot("A", "B")
    pair.check_booted(pair.b, kernel)
    machine.power_off()
    pair.boot("A")
    pair.check_booted(pair.a, kernel)
    pair.names_only(pair.a, pair.b)
    machine.power_off()


def keep_newer(pair, old, new):
    """A is put back, and the firmware boots it: B is gone back to, and its content kept."""
    report, machine = pair.report, pair.machine
    pair.boot_stale(old)
    machine.run("dualroot-sync --boot-next disk1")
    machine.power_off()

    pair.boot("A", "B")
    pair.check_booted(pair.b, new)
    machine.run("systemctl stop dualroot-sync.timer")
    code, said = machine.status("dualroot-sync", 300)
    report.check("what was done on disk0 is not given up unasked, either", code == 3 and "--discard-spare disk0" in said, said)
    code, said = machine.status("dualroot-sync --discard-spare disk0", 900)
    report.check("it is when that is said", code == 0, said)
    pair.check_spare(pair.a)
    machine.power_off()

    boot_alone(pair, "A", pair.a, pair.b, new)


def give_up_newer(pair, old):
    """A is put back, and the firmware boots it: what is on B is given up."""
    report, machine = pair.report, pair.machine
    pair.boot_stale(old)
    code, said = machine.status("dualroot-sync --discard-spare disk1", 900)
    report.check("it is given up when that is said", code == 0, said)
    pair.manual_sync()
    machine.power_off()

    boot_alone(pair, "B", pair.b, pair.a, old)


def boot_alone(pair, name, own, other, kernel):
    """Boots a disk without the other one, of which it has the content."""
    pair.boot(name)
    pair.check_booted(own, kernel)
    pair.report.equal(f"what was written on disk{other.number} is on disk{own.number}",
                      pair.machine.run("cat /home/note"), f"written on disk{other.number}")
    pair.names_only(own, other)
    pair.machine.power_off()


CASES = {
    f"{layout}-{release}": (degraded if layout == "shared-btrfs" else failover, release, initrd, layout,
                          f"{layout}-{release}" in ("shared-btrfs-12", "own-esp-12", "own-btrfs-12"))
    for layout in ("shared-btrfs", "own-xbootldr", "own-btrfs", "own-esp") for release, initrd in ((13, "dracut"), (12, "initramfs-tools"))
}
