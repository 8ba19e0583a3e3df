"""The cases that begin with one disk: a blank one becomes its spare, another one takes the place of the one that died, and a third one
becomes the first of another machine."""

import images
from cases import Pair
from images import blank

# Of what names the disks of a pair on purpose.
NAMED = "-not -path '*/etc/dualroot.conf' -not -path '*/var/lib/dualroot/*' -not -path '*/var/log/*'"
# All that an installation from a template could change on the machine that does it. Files that may be absent are in there, too.
STATE = ("sha256sum /etc/dualroot.conf /etc/fstab /etc/machine-id /etc/hostname /var/lib/dualroot/* /boot/loader/entries/* "
         "/boot/EFI/dualroot/* /efi/EFI/dualroot/* /sys/firmware/efi/efivars/Boot* 2>/dev/null; ls /sys/firmware/efi/efivars; "
         "findmnt -rno TARGET,SOURCE; cat /proc/swaps")
TEMPLATE = "/srv/template"
# This machine is reached by ssh(1), with a key that only an agent has. What is in its environment then is kept.
SSH = ("ssh-keygen -q -t ed25519 -N '' -f /run/key && mkdir -p -m 700 /root/.ssh && cp /run/key.pub /root/.ssh/authorized_keys && "
       "printf 'PermitLocalCommand yes\nLocalCommand env >/run/environment\n' >/root/.ssh/config && "
       "systemctl start ssh && ssh-keyscan -t ed25519 127.0.0.1 >/root/.ssh/known_hosts && ssh-agent -a /run/agent >/dev/null && "
       "SSH_AUTH_SOCK=/run/agent ssh-add -q /run/key && rm /run/key")
UNPACK = {"initramfs-tools": "unmkinitramfs {} .", "dracut": "lsinitrd --unpack {} >/dev/null"}
MAKE = {"initramfs-tools": "mkinitramfs -o {}", "dracut": "dracut -q --force {}"}


def adopted(machine, number, roles):
    """A disk as the configuration and the file systems on it have it."""
    disk = images.Disk(number, roles)
    text = machine.run("cat /etc/dualroot.conf").split(f"[disk{number}]")[1].split("[")[0]
    disk.container = None
    disk.partuuid = dict(line.split("=") for line in text.split())
    for role, partuuid in disk.partuuid.items():
        found = dict(line.split() for line in machine.run(f"lsblk -lno FSTYPE,UUID /dev/disk/by-partuuid/{partuuid}").splitlines())
        disk.container = found.pop("crypto_LUKS", None) or disk.container
        [disk.uuid[role]] = found.values()
    return disk


def size(pair):
    """Of all of A's partitions, in MiB."""
    return sum(images.SIZES[role] for role in pair.a.roles)


def device(serial):
    return f"/dev/disk/by-id/virtio-{serial}"


def plug(machine, serial, image):
    machine.plug(serial, image)
    machine.run(f"udevadm wait -t 60 {device(serial)}", 90)


def rest(machine):
    """Has no sync begin by itself, as one does two minutes after a boot: while it has the lock, a clone is refused."""
    machine.run("systemctl stop dualroot-sync.timer dualroot-sync.path && mkdir -p /run/dualroot && flock /run/dualroot/lock true")


def check_refusals(pair):
    report, machine = pair.report, pair.machine
    plug(machine, "T", blank(machine.directory / "t.raw", 700))
    machine.run("echo '[]' >/run/layout.json; "
                r"printf '[disk%s]\nesp=aaaaaaaa-0000-4000-8000-%012u\nroot=aaaaaaaa-0000-4000-8000-%012u\n' 0 1 2 1 3 4 >/run/others")
    for what, arguments, expected in (
            ("the booted disk", f"--yes-erase {device('A')} {device('A')}", "is mounted on"),
            ("a partition of it", f"--yes-erase {device('A')}-part1 {device('A')}-part1", "is no disk (type part)"),
            ("a disk without a word", device("B"), "there is no terminal to ask on; confirm with"),
            ("a disk by another's name", f"--yes-erase A {device('B')}", "is neither the name nor the serial number of /dev/"),
            ("a disk that isn't there", "--yes-erase X /dev/disk/by-id/virtio-X", "No such file"),
            ("a disk that is too small", f"--yes-erase T {device('T')}", "it is too small"),
            ("a place that no disk has", f"--replace disk7 --yes-erase B {device('B')}", "has no section [disk7]"),
            ("a file", "--yes-erase X /etc/fstab", "lsblk can't show /etc/fstab"),
            ("a layout that isn't there", f"--layout /etc/layout.json --yes-erase B {device('B')}", "/etc/layout.json: No such file"),
            ("a layout of other disks", f"--layout /run/layout.json --yes-erase B {device('B')}", "holds no layout of disk1")):
        refused(pair, what, arguments, expected)
    # What is so for a moment: how that is brought about, and how it ends.
    part = f"{device('T')}-part1"
    record = ("/efi" if "xbootldr" in pair.a.roles else "/boot") + "/EFI/dualroot"
    for what, serial, begin, end, expected in (
            ("a disk that is read-only", "T", f"blockdev --setro {device('T')}", f"blockdev --setrw {device('T')}", "is read-only"),
            ("a disk with a partition that is mounted", "T", f"echo , | sfdisk -q -X gpt {device('T')} && udevadm wait -t 60 {part} && "
             f"mkfs.ext4 -q {part} && mount {part} /mnt", "umount /mnt", "is mounted on /mnt"),
            ("a disk with swap space that is in use", "T", f"mkswap -q {part} && swapon {part}", f"swapoff {part}", "in use as swap space"),
            ("while a sync is running", "B", "exec 9>/run/dualroot/lock && flock 9", "true", "another sync is running"),
            ("a partition table that can't be read", "B", "mount --bind /bin/false /sbin/sfdisk", "umount /sbin/sfdisk", "sfdisk failed"),
            ("without a program", "B", "mount --bind /dev/null /usr/bin/rsync", "umount /usr/bin/rsync", "'rsync' is not installed"),
            ("a configuration that is none", "B", "echo esp=1 >/etc/dualroot.conf", "rm /etc/dualroot.conf", "/etc/dualroot.conf:1"),
            ("a record that isn't the booted disk's", "B", f"mkdir {record} && echo x >{record}/lineage", f"rm -r {record}",
             "remove that file"),
            ("a pair that the booted disk isn't of", "B", "cp /run/others /etc/dualroot.conf", "rm /etc/dualroot.conf", "is in no section")):
        refused(pair, what, f"--yes-erase {serial} {device(serial)}", expected, begin, end)
    machine.unplug("T")
    refuse_answers(pair)
    if pair.own:
        refuse_initrd(pair)
    else:
        refused(pair, "a shared root with a swap file in it", f"--shared-root --yes-erase B {device('B')}", "is a swap file in use",
                "touch /swap && chattr +C /swap && fallocate -l 16M /swap && chmod 600 /swap && mkswap -q /swap && swapon /swap",
                "swapoff /swap && rm /swap")
    written = machine.run(f"cmp -n 67108864 {device('B')} /dev/zero && ls /etc/dualroot.conf 2>/dev/null || true")
    report.equal("nothing was written by that", written, "")


def answered(pair, arguments, *answers):
    """Runs dualroot-clone on a terminal, where each question gets what is typed, or what is called to find that; its exit status and what
    it printed."""
    run = pair.machine.run
    run("export HOME=/root SSH_AUTH_SOCK=/run/agent DISPLAY=:0; cd /run; rm -f typed said code; mkfifo typed; : >said; exec >/dev/null 2>&1\n"
        f"(script -qfec 'dualroot-clone {arguments}' said <typed; echo $? >ended; mv ended code) & "
        # As long as it runs, nobody hangs up.
        "(exec 3>typed; until [ -e code ]; do sleep 0.1; done) &")
    for question, answer in answers:
        run(f"until grep -q '{question}' /run/said || [ -e /run/code ]; do sleep 0.1; done", 300)
        typed = answer() if callable(answer) else answer
        run(f"[ -e /run/code ] || echo '{typed}' >/run/typed")
    run("until [ -e /run/code ]; do sleep 0.1; done", 1500)
    return int(run("cat /run/code")), run("cat /run/said")


def refuse_answers(pair):
    """What is typed is no name of the disk; and that isn't there any more when it is typed."""
    def pull():
        pair.machine.unplug("B")
        return "B"
    for what, answer, expected in (
            ("another disk's name", "A", "is neither the name nor the serial number of /dev/"),
            ("a disk that is pulled", pull, "is no longer the disk that you were asked about")):
        code, said = answered(pair, device("B"), ("To erase it", answer))
        pair.report.check(f"refused: {what}, typed", code == 3 and expected in said, (code, said))
    plug(pair.machine, "B", pair.disks["B"])


def refused(pair, what, arguments, expected, begin="true", end="true"):
    code, said = pair.machine.status(f"{begin} || exit 99; dualroot-clone {arguments} </dev/null 2>&1; code=$?; {end} && exit $code", 300)
    pair.report.check(f"refused: {what}", code == 3 and expected in said, (code, said))


def refuse_initrd(pair):
    """An initrd that names the booted disk's root is no good on another disk."""
    machine = pair.machine
    # As the hook of initramfs-tools for resuming does, where dualroot's isn't installed.
    initrd = machine.run("ls /boot/*/*/initrd.img-*")
    machine.run(f"mkdir /run/x; cd /run/x; echo RESUME=UUID={pair.a.uuid['root']} >resume; cp {initrd} /run/initrd; "
                f"echo resume | cpio -o -H newc >/run/made; cat /run/initrd >>/run/made; cp /run/made {initrd}")
    refused(pair, "an initrd that names the booted disk", f"--yes-erase B {device('B')}", "built in")
    machine.run(f"cp /run/initrd {initrd}; rm /run/initrd /run/made")


def refuse_luks(pair, initrd):
    """What has to do with containers only; and an initrd as they are made there."""
    report, machine = pair.report, pair.machine
    if initrd == "initramfs-tools":
        machine.run("update-initramfs -u", 900)
    plug(machine, "T", blank(machine.directory / "t.raw", size(pair)))
    for what, arguments, expected in (
            ("nobody to ask for a passphrase", "", "there is no terminal to ask for a passphrase on"),
            ("another passphrase", "--key-file /etc/hostname ", "does not open the LUKS container")):
        code, said = machine.status(f"dualroot-clone {arguments}--yes-erase T {device('T')} </dev/null 2>&1", 300)
        report.check(f"refused: {what}", code == 3 and expected in said, (code, said))
    # As LVM holds what it makes of a partition.
    held = f"echo , | sfdisk -q -X gpt {device('T')} && udevadm wait -t 60 {device('T')}-part1 && " \
        f"echo 0 2048 linear {device('T')}-part1 0 | dmsetup create volume"
    refused(pair, "a disk that something is mapped to", f"--yes-erase T {device('T')}", "is used by /dev/mapper/volume", held,
            "dmsetup remove volume")
    machine.unplug("T")


def interrupt(pair):
    """A clone is killed in each of its phases; that to a shared root by a power cut while that is mirrored."""
    report, machine = pair.report, pair.machine
    if pair.own:
        kill_everywhere(pair)
        return
    begin = "(dualroot-clone --shared-root --yes-erase B {} >/run/said 2>&1; touch /run/ended) </dev/null >/dev/null 2>&1 &"
    machine.run(begin.format(device("B")))
    machine.run("until grep -q balance /sys/fs/btrfs/*/exclusive_operation || [ -e /run/ended ]; do sleep 0.1; done; sync", 300)
    machine.kill()
    pair.boot("A", "B")
    code, said = machine.status(f"dualroot-clone --yes-erase B {device('B')} 2>&1")
    report.check("refused: the disk, without another word, for a root of its own",
                 code == 3 and ("in use" in said or "mounted on" in said), (code, said))
    said = machine.run(f"dualroot-clone --dry-run --shared-root {device('B')}")
    report.check("a clone that was killed has left a mark", "that was not finished" in said, said)
    report.equal("and nothing on the booted disk", machine.status("cat /etc/dualroot.conf")[0], 1)


# Stands in for each program that a clone runs. Of a tree, it copies a part: the rest makes no difference before the clone has ended.
STAND_IN = """#!/bin/sh
real=/dev/shm/real/${0##*/}
case "${0##*/} $*" in
'rsync '*--files-from*) copy() { head -z -n 300 | $real "$@"; } ;;
*) copy() { $real "$@"; } ;;
esac
. /dev/shm/phase
copy "$@"
"""
BEFORE, AFTER = "kill -KILL $PPID; exit", 'copy "$@"; kill -KILL $PPID; exit'
# What was started goes on, and another clone begins beside it.
BESIDE = """copy "$@"; kill -KILL $PPID; flock /run/dualroot/lock true
nsenter -t 1 -m dualroot-clone --yes-erase B DISK >/dev/shm/beside 2>&1; echo $? >>/dev/shm/beside; exit"""
# What becomes of the disk: nothing, one with the mark, one without that, and one that the configuration names.
BLANK, MARKED, FINISHED, CONFIGURED = range(4)
# Where it is killed: at which program, by its name and arguments; and what the disk is then.
PHASES = (
    ("when the disk is blank", "'wipefs -q -a '*", AFTER, BLANK),
    ("when there are partitions", "'sfdisk -q --wipe'*", AFTER, MARKED),
    ("when there is an ESP", "'mkfs.vfat '*1", AFTER, MARKED),
    ("when there is a root", "mkfs.[be]*", AFTER, MARKED),
    ("when the ESP is gone again", "'wipefs -q -a '*1", AFTER, MARKED),
    ("before udev knows", "'udevadm trigger --settle'*", BEFORE, MARKED),
    ("before trees are compared", "'rsync '*--dry-run*", BEFORE, MARKED),
    ("while a tree is copied", "'rsync '*--files-from*", BESIDE, MARKED),
    ("before the mark goes", "'sfdisk '*--part-attrs*", BEFORE, MARKED),
    ("when the mark is gone", "'sfdisk '*--part-attrs*", AFTER, FINISHED),
    ("before the configuration is in force", "'systemctl daemon-reload'", BEFORE, CONFIGURED),
)
PROGRAMS = "wipefs sfdisk mkfs.vfat mkfs.btrfs mkfs.ext4 udevadm rsync systemctl"
IS_FREE = "perl -MFcntl -e 'sysopen DISK, shift, O_RDONLY | O_EXCL or exit 1'"
# What there is beside the new disk, but for what dualroot keeps of its boots and syncs.
AROUND = f"""md5sum /etc/fstab; find /boot /efi -type f ! -path '*/dualroot/*' -exec md5sum {{}} +
cat /sys/firmware/efi/efivars/Boot* | md5sum; findmnt -rno TARGET,SOURCE; pidof -x dualroot-clone {PROGRAMS}; cat /etc/dualroot.conf 2>&1"""


def kill_everywhere(pair):
    report, machine, disk = pair.report, pair.machine, device("B")
    machine.run(f"mkdir /dev/shm/real; cat >/dev/shm/stand-in <<'end'; chmod +x /dev/shm/stand-in\n{STAND_IN}end\n"
                f"for i in {PROGRAMS}; do cp $(command -v $i) /dev/shm/real/ && mount --bind /dev/shm/stand-in $(command -v $i); done")
    (_, before), was = machine.status(AROUND), BLANK
    for what, program, does, state in PHASES:
        machine.run(f"cat >/dev/shm/phase <<'end'\ncase \"${{0##*/}} $*\" in\n{program}) {does} ;;\nesac\nend".replace("DISK", disk))
        # Whatever it has started has the pipe open, too, and is waited for.
        said = machine.run(f"{{ dualroot-clone --yes-erase B {disk} 2>&1; echo $?; }} 9>&1 </dev/null | cat; : >/dev/shm/phase", 600)
        report.check(f"killed {what}", "\n137" in said, said)
        report.equal("it has said whether it begins anew", "that was not finished" in said, was == MARKED)
        # udev looks at the partitions. That the kernel lets go of what was mounted, a moment later, is no event.
        machine.run(f"udevadm settle; for i in $(lsblk -nrpo NAME {disk}); do until {IS_FREE} $i; do sleep 0.1; done; done")
        marked = machine.run(f"sfdisk -d {disk} 2>/dev/null | grep NoBlockIOProtocol | cut -d ' ' -f 1 || true").split()
        report.equal("the mark is where it has to be", [path[-1] for path in marked], ["1"] if state == MARKED else [])
        (_, now), was = machine.status(AROUND), state
        if state == CONFIGURED:
            report.check("nothing else has changed", now.startswith(before.rsplit("\n", 1)[0] + "\n[disk0]"), now)
            check_named(pair)
        else:
            report.equal("nothing else has changed", now, before)
    said, code = machine.run("cat /dev/shm/beside").rsplit("\n", 1)
    report.check("refused: the disk, while something that a clone has started is at work", code == "3" and "in use" in said, (code, said))
    machine.run(f"for i in {PROGRAMS}; do umount $(command -v $i); done; cd /dev/shm; rm -r real stand-in phase beside")


def check_named(pair):
    """A disk that the configuration names is a spare as any other; it is erased by hand."""
    report, machine = pair.report, pair.machine
    code, said = machine.status("dualroot-sync --dry-run", 300)
    report.check("the next sync does what is left", code == 0, (code, said))
    other = f"--yes-erase kernels {device('kernels')}"
    for what, arguments, expected in (
            ("a disk of the pair", f"--yes-erase B {device('B')}", "belongs to disk1 of the pair"),
            ("the place of a disk that is there", f"--replace disk1 {other}", "disk1 is still there"),
            ("a shared root instead of one's own", f"--shared-root {other}", "each disk has a root of its own")):
        refused(pair, what, arguments, expected)
    machine.run(f"wipefs -q -a {device('B')}-part* && wipefs -q -a {device('B')} && rm /etc/dualroot.conf && systemctl daemon-reload && "
                "udevadm settle")


def talk(pair, serial, arguments, *answers):
    """As `answered`, for what is to be done; kept, as manual pages have it."""
    pair.report.step(f"dualroot-clone {arguments}")
    answers = list(answers)
    if "--yes-erase" not in arguments:
        answers.append(("To erase it", serial))
    if pair.layout == "one-luks" and "--key-file" not in arguments:
        answers.append(("Passphrase of", images.PASSPHRASE))
    code, said = answered(pair, arguments, *answers)
    (pair.machine.directory / f"clone-{serial}.txt").write_text(said)
    return code, said


def check_shown(report, said):
    shown = [line for line in said.split("\r") if line.startswith("[") and " MiB/s  " in line and " left" in line]
    report.check(f"it has shown how far it is: {shown[len(shown) // 2:][:1]}", len(shown) > 1, said)


def clone(pair, number, serial, more=""):
    """Makes a disk a spare, as on a terminal, and returns it."""
    report, machine = pair.report, pair.machine
    rest(machine)
    code, said = talk(pair, serial, f"{more}{device(serial)}")
    report.check("the disk boots, it says", code == 0 and f"is disk{number} now, and boots" in said, (code, said))
    # With a shared root, there may be little that the kernel has left to do: it is mirrored within a second or two.
    if pair.own:
        check_shown(report, said)
    flags = machine.run(f"lsblk -no PARTFLAGS {device(serial)}").split()
    report.equal("the mark is gone", flags, [])
    disk = adopted(machine, number, pair.a.roles)
    pair.check_spare(disk)
    return disk


def check_nothing_left(pair, old, initrd):
    """Nothing of the disk that was copied is named by the copy, which is booted: not in files, and not in the initrds."""
    report, machine = pair.report, pair.machine
    roles = [role for role in old.roles if pair.own or role != "root"]
    names = [name for role in roles for name in (old.partuuid[role], old.uuid[role], old.uuid[role].replace("-", ""))]
    names += [old.container] if pair.layout == "one-luks" else []
    # Labels of this length could be anything's. What is made beside a disk of this number has "-1" behind it.
    names += [f"LABEL={role}{old.number}([^-]|$)" for role in roles]
    pattern = " ".join(f"-e '{name}'" for name in names)
    machine.run(f"for i in /boot/*/*/initrd*; do mkdir -p /run/i/$i; cd /run/i/$i; {UNPACK[initrd].format('$i')}; done", 300)
    found = machine.run(f"find /etc /boot /efi /root /home /var/lib /usr/lib/systemd /run/i -type f {NAMED} -print0 | "
                        f"xargs -0 grep -liE {pattern} || true", 300)
    report.equal("nothing of the other disk is named here", found, "")


def check_key_stays(pair, initrd):
    """What opens the containers isn't put into an initrd, which lies beside them."""
    make, unpack = (commands[initrd].format("/run/made") for commands in (MAKE, UNPACK))
    found = pair.machine.run(f"mkdir /run/parts && cd /run/parts && {{ {make} && {unpack}; }} >/dev/null 2>&1 && "
                             "find . -name 'dm-crypt*' -o -name dualroot.key && rm -r /run/made /run/parts", 900).split()
    pair.report.check("an initrd that is made here opens containers, and has no key to them",
                      len(found) == 1 and "dm-crypt" in found[0], found)


def check_mark(pair):
    """From a disk with the mark, no firmware boots, whole as it is otherwise."""
    report, machine = pair.report, pair.machine
    report.step("B gets the mark of a clone that isn't finished, and is put in alone")
    images.sh("sfdisk", "-q", "--part-attrs", pair.disks["B"], 1, "NoBlockIOProtocol")
    machine.power_on({"B": pair.disks["B"]})
    machine.await_console("UEFI Interactive Shell", limit=60)
    report.check("the firmware boots nothing", True)
    machine.kill()


def check_mirrored(pair):
    """Either half of the root is enough, and nothing says that one is behind."""
    report, machine = pair.report, pair.machine
    kinds = machine.run("btrfs filesystem df / | grep -v GlobalReserve | sed 's/:.*//'").split("\n")
    report.check("all of the root is there twice", kinds and all(kind.endswith(", RAID1") for kind in kinds), kinds)
    report.equal("no disk is behind", machine.run("ls -d /run/dualroot/degraded /var/lib/dualroot/degraded "
                                                  "/sys/firmware/efi/efivars/Dualroot* 2>/dev/null || true"), "")


def make_template(pair):
    """A tree of the system that is booted, and in it what must not be copied."""
    machine, name = pair.machine, TEMPLATE
    machine.run(f"mkdir {name} && rsync -aHAX --one-file-system --exclude={name} / {name}/ && for dir in boot efi home; do "
                f"! mountpoint -q /$dir || rsync -aHAX --one-file-system /$dir/ {name}/$dir/; done", 900)
    machine.run(f"mkdir -p {name}/etc/ssh {name}/var/log/journal/{images.MACHINE_ID} && cd {name}/etc && touch ssh/ssh_config "
                "ssh/ssh_host_ed25519_key ssh/ssh_host_ed25519_key.pub && echo 'a template' >../root/kind && "
                f"echo '127.0.1.1 pair.example pair' >hosts && echo {images.MACHINE_ID} >kernel/entry-token && "
                # The generator mounted it.
                "sed -i '/ \\/boot /d' fstab && touch ../var/log/journal/*/system.journal ../boot/loader/random-seed")


def install(pair, booted, initrd):
    """A blank disk becomes the first one of another machine, which is told from a template; what is booted stays as it is."""
    report, machine = pair.report, pair.machine
    report.step("a template is made")
    make_template(pair)
    pair.disks["T"] = blank(machine.directory / "t.raw", size(pair) - 100)
    plug(machine, "T", pair.disks["T"])
    # What they would do is not what is looked for.
    machine.run("systemctl stop dualroot-sync.timer dualroot-{sync,entries}.path dualroot-{sync,entries}.service")
    command = f"dualroot-clone --template {{}} --yes-erase T {device('T')}"
    for what, origin, expected, exit_status in (
            ("a template without a machine id", "/srv", "/srv has no /etc/machine-id", 3),
            ("one without a name", TEMPLATE, "there is no terminal to ask on; give the name of the new machine with '--hostname NAME'", 3),
            ("a name that is none", f"{TEMPLATE} --hostname a_b", "is no host name", 2),
            ("one in the place of a disk", f"{TEMPLATE} --replace disk0", "cannot be used with", 2)):
        code, said = machine.status(f"{command.format(origin)} </dev/null 2>&1", 300)
        report.check(f"refused: {what}", code == exit_status and expected in said, (code, said))
    code, said = machine.status(f"{command.format(TEMPLATE)} --dry-run 2>&1 </dev/null", 300)
    report.check("what would be done is printed", code == 0 and "as the first disk of another machine" in said, (code, said))
    report.equal("nothing was written by that", machine.run(f"cmp -n 67108864 {device('T')} /dev/zero"), "")
    remote = "home" in booted.roles
    if remote:
        machine.run(SSH)
    before = machine.run(STATE)
    if remote:
        code, said = talk(pair, "T", f"--template root@127.0.0.1:{TEMPLATE} --hostname other {device('T')}")
    else:
        code, said = talk(pair, "T", f"--template {TEMPLATE} {device('T')}", ("The name of the new machine", "other"))
    report.check("the disk boots, it says", code == 0 and "boots as other" in said, (code, said))
    check_shown(report, said)
    report.equal("this machine is as it was", machine.run(STATE), before)
    if remote:
        logins = machine.run("journalctl -b -u ssh -o cat --no-pager | grep -c 'Accepted publickey for root' || true")
        report.check("it was reached by ssh", int(logins) >= 3, logins)
        given = machine.run("sed 's/=.*//' /run/environment").split()
        report.check("which was given the agent, and no display", "SSH_AUTH_SOCK" in given and "DISPLAY" not in given, given)
    rows = machine.run(f"lsblk -lno PARTUUID,UUID,PARTFLAGS {device('T')} | tail -n +2").splitlines()
    made = images.Disk(0, booted.roles)
    report.check("it has the template's partitions, without a mark", [len(row.split()) for row in rows] == [2] * len(made.roles), rows)
    for role, row in zip(made.roles, rows):
        made.partuuid[role], made.uuid[role] = row.split()
    machine.power_off()

    report.step("the new disk is put into a machine that has never seen it")
    machine.forget()
    pair.boot("T")
    pair.check_booted(made, pair.kernels[0])
    own = machine.run("cat /etc/machine-id")
    report.check("it has a machine id of its own", len(own) == 32 and own != images.MACHINE_ID, own)
    report.check("by which it is booted", f"systemd.machine_id={own}" in machine.run("cat /proc/cmdline"))
    report.equal("the machine id of the template is nowhere", machine.run(
        f"cd /; find boot efi etc var -name '*{images.MACHINE_ID}*'; grep -rilF {images.MACHINE_ID} boot efi etc var --exclude-dir=log "
        "|| true"), "")
    report.equal("it has its own name", machine.run("hostname; grep 127.0.1.1 /etc/hosts"), "other\n127.0.1.1 other.example other")
    report.equal("keys of ssh, and what dualroot knew, didn't come along", machine.run(
        "ls /etc/ssh/ssh_config; find /etc/ssh/ssh_host* /etc/dualroot.conf /var/lib/dualroot /.dualroot /{efi,boot}/EFI/dualroot -type f "
        "2>/dev/null || true"), "/etc/ssh/ssh_config")
    report.equal("all else did", machine.run("cat /root/kind /root/note"), "a template\nwritten on A")
    report.equal("/boot has a line in fstab again", machine.run("grep -c ' /boot ' /etc/fstab"), "1")
    check_nothing_left(pair, booted, initrd)
    machine.power_off()


def begin(pair, mebibytes=0):
    """A boots, something is written on it, and B is put in: blank, and by so much larger."""
    machine = pair.machine
    pair.boot_first()
    pair.check_booted(pair.a, pair.kernels[0])
    machine.run("echo 'written on A' >/root/note")
    if pair.own:
        machine.run(f"printf '[Mount]\\nWhat=/dev/disk/by-uuid/{pair.a.uuid['esp']}\\nWhere=/srv/esp\\n' >/etc/systemd/system/srv-esp.mount")
    put_in(pair, "B", mebibytes)


def put_in(pair, name, mebibytes=0):
    """Another disk, blank, is put in; than A, it is by so much larger."""
    pair.disks[name] = blank(pair.machine.directory / f"{name.lower()}.raw", size(pair) + mebibytes)
    plug(pair.machine, name, pair.disks[name])


def go_on(pair, initrd, name, disk, old):
    """The disk that was copied is removed, and the copy boots."""
    pair.report.step(f"disk{old.number} is removed, and {name} is there")
    pair.boot(name)
    pair.check_booted(disk, pair.kernels[0])
    pair.check_nothing_waits()
    pair.report.equal("what was written on A is here", pair.machine.run("cat /root/note"), "written on A")
    if pair.own:
        found = pair.machine.run("systemctl start srv-esp.mount && findmnt -no PARTUUID /srv/esp && systemctl stop srv-esp.mount")
        pair.report.equal("a mount unit that was A's names this disk", found, disk.partuuid["esp"])
    check_nothing_left(pair, old, initrd)


def one_disk(report, directory, staging, release, initrd, layout, parts=("refusals", "killed", "spare", "third")):
    """Nothing that is refused, and no clone that is killed, harms A; it gets a spare, B, and goes; B gets a third disk in the place of A."""
    pair = Pair(report, directory, staging, release, initrd, layout)
    try:
        begin(pair, -200)
        rest(pair.machine)
        if "refusals" in parts:
            check_refusals(pair)
        if "killed" in parts:
            interrupt(pair)
        if "spare" in parts:
            get_spare(pair, initrd)
        if "third" in parts:
            get_third(pair, initrd)
    finally:
        pair.machine.kill()


def get_spare(pair, initrd):
    """A gets a spare, B, and goes."""
    pair.b = clone(pair, 1, "B", "" if pair.own else "--shared-root ")
    if not pair.own:
        check_mirrored(pair)
        pair.report.equal("fstab mounts the root only", pair.machine.run("grep -c ^[^#] /etc/fstab"), "1")
    pair.machine.power_off()
    go_on(pair, initrd, "B", pair.b, pair.a)


def get_third(pair, initrd):
    """B gets another spare, C, in the place of A, and goes; C makes a disk for another machine, T."""
    put_in(pair, "C", 500)
    if not pair.own:
        refused(pair, "a third disk, while one is missing", f"--yes-erase C {device('C')}", "--replace diskN")
    pair.c = clone(pair, 0, "C", "--replace disk0 --layout /var/lib/dualroot/layout.json ")
    if not pair.own:
        check_mirrored(pair)
    pair.machine.power_off()
    check_mark(pair)
    go_on(pair, initrd, "C", pair.c, pair.b)
    if pair.own:
        install(pair, pair.c, initrd)
    else:
        pair.machine.power_off()


def encrypted(report, directory, staging, release, initrd, layout):
    """A, with its root in a LUKS container, gets a spare, B, and goes; it comes back, and is B's spare."""
    pair = Pair(report, directory, staging, release, initrd, layout)
    machine = pair.machine
    try:
        begin(pair)
        refuse_luks(pair, initrd)
        if initrd == "dracut":
            machine.run(f"printf %s '{images.PASSPHRASE}' >/run/passphrase")
            pair.b = clone(pair, 1, "B", "--yes-erase B --key-file /run/passphrase ")
        else:
            pair.b = clone(pair, 1, "B")
        found = machine.run(f"cryptsetup luksDump {device('B')}-part2 | grep -E '^(Version|UUID)' | sed 's/.*: *\\t*//'").split()
        report.equal("it is LUKS2, and has a UUID of its own", found, ["2", pair.b.container])
        report.check("which is another one", pair.b.container != pair.a.container)
        report.equal("only root may read the key", machine.run("stat -c %a%u /mnt/root1/etc/cryptsetup-keys.d/dualroot.key"), "6000")
        machine.power_off()
        go_on(pair, initrd, "B", pair.b, pair.a)
        machine.run("systemctl stop dualroot-sync.timer; echo 'written on B' >/root/note")
        check_key_stays(pair, initrd)
        plug(machine, "A", pair.disks["A"])
        pair.manual_sync()
        pair.check_spare(pair.a)
        report.equal("what was written on B is on A", machine.run("cat /mnt/root1/root/note"), "written on B")
        machine.unplug("A")
        machine.run("until [ ! -e /mnt/root1/root ]; do sleep 1; done")
        machine.power_off()
    finally:
        machine.kill()


def large_sectors(report, directory, staging, release, initrd, layout):
    """A gets a spare with sectors of 4096 bytes, B, and goes; of that, a disk with usual ones is made, C, and B goes."""
    pair = Pair(report, directory, staging, release, initrd, layout)
    machine = pair.machine
    machine.large_sectors = {"B"}
    try:
        begin(pair)
        pair.b = clone(pair, 1, "B")
        report.equal("its sectors are large", machine.run(f"blockdev --getss {device('B')}"), "4096")
        machine.power_off()
        go_on(pair, initrd, "B", pair.b, pair.a)
        put_in(pair, "C")
        pair.c = clone(pair, 0, "C", "--replace disk0 ")
        machine.power_off()
        go_on(pair, initrd, "C", pair.c, pair.b)
        machine.power_off()
    finally:
        machine.kill()


CASES = {"one-btrfs-12": (one_disk, 12, "initramfs-tools", "one-btrfs", ("refusals", "spare")),
         "one-btrfs-12-killed": (one_disk, 12, "initramfs-tools", "one-btrfs", ("killed",)),
         "one-btrfs-12-third": (one_disk, 12, "initramfs-tools", "one-btrfs", ("spare", "third")),
         "one-luks-12": (encrypted, 12, "initramfs-tools", "one-luks"),
         "one-luks-13": (encrypted, 13, "dracut", "one-luks"), "one-ext4-13": (one_disk, 13, "dracut", "one-ext4"),
         "one-xfs-13": (large_sectors, 13, "dracut", "one-xfs"),
         "one-shared-btrfs-12": (one_disk, 12, "initramfs-tools", "one-shared-btrfs"),
         "one-shared-btrfs-13": (one_disk, 13, "dracut", "one-shared-btrfs")}
