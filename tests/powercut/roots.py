"""Three generations of a small root, with whatever a root may have and every way in which it may change; and a machine that syncs it.

It is the root of the configuration (root=), and not of the machine: the product runs in a chroot(2) there, with the machine's
programs mounted into it. So it copies a root as it always does, but one of which every write can be tried.
"""

import collections
import os
import struct
import tempfile
from pathlib import Path
from uuid import uuid4

import record
import scenes
import trees
from record import MIB, Machine, booted, images

KIB = 1 << 10
SIZE = 128
GENERATIONS = 3
# Where the machine's own programs and file systems go, of which nothing is copied.
MOUNTED = ("usr/bin", "usr/sbin", "usr/lib64", "usr/lib/x86_64-linux-gnu", "boot", "dev", "proc", "run", "sys")
SOURCE = "0d15c000-0000-4000-8000-0000000000aa"
UUID = "0f5f5f5f-0000-4000-8000-0000000000aa"

# Every few seconds, Linux commits what it knows of a file system's names, without the files' content. In scenes that take less, this
# has it do so all the time (EXT4_IOC_CHECKPOINT, BTRFS_IOC_START_SYNC), or all renames would be one commit, which can't be cut.
RESTLESS = 'open(D, "<", "/srv/spare"); while (1) { my $none = pack("Q", 0); ioctl(D, %d, $none); select(undef, undef, undef, 0.04) }'
COMMIT = {"ext4": 0x4004662b, "btrfs": 0x80089418}

# What a path is to be. `data` is what a file holds, where a link leads, a device's number, or whose other name it is.
Node = collections.namedtuple("Node", "kind data mode owner time attributes", defaults=[b"", 0o644, (0, 0), 0, ()])

CAPABILITY = ("security.capability", struct.pack("<5I", 0x2000001, 1 << 10, 0, 0, 0))
LONG = ("user.long", b"attribute " * 150)


def acl(*entries):
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


DEFAULT_ACL = ("system.posix_acl_default", acl((1, 7, 0xffffffff), (2, 5, 1000), (4, 5, 0xffffffff), (16, 5, 0xffffffff),
                                                (32, 0, 0xffffffff)))


def many(number):
    """Files of all sizes, of which a part changes, comes and goes with each generation."""
    found = {}
    for index in range(160):
        size = (0, 37, 150, 900, 4096, 5000, 21 * KIB, 70 * KIB)[index % 8]
        born, dies = (index % 11 == 3) + 1, 1 + index % 13 if index % 13 in (1, 2) else GENERATIONS
        changes = {0: number, 1: max(number, 2), 2: min(number, 2)}.get(index % 5, 0)
        data = scenes.noise(f"file {index} {changes}", size)
        mode, owner = (0o644, (0, 0)) if index % 7 != 5 else (0o600 + number, (1000, 1000 + number))
        if born <= number <= dies:
            found[f"usr/share/package{index % 12}/file{index}"] = Node("file", data, mode, owner, index * 10 + changes)
    return found


def kinds(number):
    """What is something else in another generation, or has another name."""
    directory = {f"srv/{name}": Node("file", name.encode(), time=9) for name in ("thing/a", "thing/deep/b", "thing/deep/c")}
    file = {"srv/thing": Node("file", b"a file", time=number)}
    merged = {"opt/usr/lib/ld.so": Node("file", b"library %d" % number, time=number), "opt/lib": Node("link", "usr/lib")}
    apart = {"opt/lib/ld.so": Node("file", b"library %d" % number, time=number), "opt/usr": Node("dir", mode=0o755)}
    moved = f"var/directory{number}"
    found = (directory if number % 2 else file) | (apart if number == 1 else merged)
    found |= {"srv/other": file["srv/thing"]} if number % 2 else {"srv/other/x": file["srv/thing"]}
    found |= {f"{moved}/{name}": Node("file", scenes.noise(name, 3000), time=5) for name in ("a", "b", "deep/c")}
    found |= {"etc/alternative": Node("link", f"/etc/of{number}", time=number), f"etc/of{number}": Node("file", b"x" * number)}
    found |= {"var/pipe": Node("pipe", mode=0o600 + number), "var/device": Node("device", os.makedev(1, 2 + number), 0o660)}
    return found


def names(number):
    """Files with several names: of new content, with one more name, with one fewer, parted."""
    same, new = scenes.noise("same", 9000), scenes.noise(f"new {number}", 9000)
    found = {"usr/libexec/git": Node("file", new, 0o755, time=number), "usr/libexec/git-add": Node("name", "usr/libexec/git"),
             "usr/bin-x/git": Node("name", "usr/libexec/git"), "var/store/one": Node("file", same, time=3)}
    if number != 2:
        found["var/store/two"] = Node("name", "var/store/one")
    if number > 1:
        found["var/store/three"] = Node("name", "var/store/one")
    found["var/parted"] = Node("file", same, time=3)
    # Of other content than before: names of one file that become files of the same content are left together by rsync's -H.
    found["var/parted2"] = Node("name", "var/parted") if number == 1 else Node("file", new, time=number)
    return found


def dressed(number):
    """What has attributes, which change without the content, or with it."""
    data = scenes.noise("ping", 12000)
    return {
        "usr/libexec/ping": Node("file", data, 0o755, time=4, attributes=(CAPABILITY,) if number > 1 else ()),
        "usr/libexec/pong": Node("file", data + b"x" * number, 0o755, time=4, attributes=(CAPABILITY,) if number < 3 else ()),
        "usr/libexec/su": Node("file", data, 0o4755 if number != 2 else 0o755, time=4),
        "var/acl": Node("dir", b"", 0o2770, (0, number), 7, (DEFAULT_ACL,) if number != 2 else ()),
        "var/acl/file": Node("file", b"in it", time=4, attributes=(("user.generation", b"%d" % number), LONG)),
        "var/empty": Node("dir", mode=0o700 + number, time=11),
        "var/sparse": Node("file", bytes(MIB) + b"end %d" % number, time=number),
        "var/new\nline": Node("file", b"%d" % number, time=number),
    }


def modules(number):
    version = f"usr/lib/modules/6.1.{min(number, 2)}"
    return {f"{version}/kernel/fs/{name}.ko": Node("file", scenes.noise(f"{name} {version}", 15000)) for name in "abc"} | \
        {f"{version}/modules.dep": Node("file", version.encode())}


def etc(number, uuid, configuration):
    # The line that comes names no disk.
    fstab = f"UUID={uuid} / auto defaults 0 1\n" + "none /var/cache tmpfs defaults 0 0\n" * (number - 1)
    return {"etc/fstab": Node("file", fstab.encode()), "etc/hostname": Node("file", b"pair\n"),
            "etc/kernel/cmdline": Node("file", f"root=UUID={uuid} ro generation={number}\n".encode(), time=number),
            "etc/dualroot.conf": Node("file", configuration.encode())}


def generation(number, uuid, configuration):
    """{path: Node} of a root, directories before what is in them; the first has number 1, and 0 nothing at all."""
    if not number:
        return {}
    found = {path: Node("dir", mode=0o755, time=1) for path in (*MOUNTED, trees.OWN)} | {"tmp": Node("dir", mode=0o1777)}
    found |= {path: Node("link", f"usr/{path}") for path in ("bin", "sbin", "lib", "lib64")}
    for part in (many, kinds, names, dressed, modules):
        found |= part(number)
    found |= etc(number, uuid, configuration)
    above = {str(parent) for path in found for parent in Path(path).parents if str(parent) != "."}
    found |= {path: Node("dir", mode=0o755, time=20) for path in above - found.keys()}
    return dict(sorted(found.items()))


def write(nodes, top):
    """Makes a tree."""
    top = Path(top)
    others = [path for path, node in nodes.items() if node.kind == "name"]
    for path in [path for path in nodes if path not in others] + others:
        full, node = top / path, nodes[path]
        if node.kind == "dir":
            full.mkdir()
        elif node.kind == "link":
            full.symlink_to(node.data)
        elif node.kind == "pipe":
            os.mkfifo(full)
        elif node.kind == "device":
            os.mknod(full, 0o060000, node.data)
        elif node.kind == "name":
            os.link(top / node.data, full)
            continue
        else:
            with open(full, "wb") as file:
                # Zeros at the beginning are a hole.
                file.seek(len(node.data) - len(node.data.lstrip(b"\0")))
                file.write(node.data.lstrip(b"\0"))
                file.truncate(len(node.data))
        os.lchown(full, *node.owner)
        if node.kind != "link":
            os.chmod(full, node.mode)
        for name, value in node.attributes:
            os.setxattr(full, name, value, follow_symlinks=False)
    for path, node in reversed(nodes.items()):
        if node.kind != "name":
            time = (1700000000 + node.time) * 10**9 + 123456789
            os.utime(top / path, ns=(time, time), follow_symlinks=False)


def esp(number):
    """What the booted disk's ESP holds: with each generation comes a kernel, and the last but one goes."""
    files = scenes.loaders("1") | scenes.settings()
    for version in range(max(1, number - 1), number + 1):
        files |= scenes.versioned(f"6.1.{version}", options=f"ro generation={number}")
    return {f"esp{number}/{path}": data.replace(b"LABEL=shared", f"UUID={UUID}".encode()) for path, data in files.items()}


def configuration(a, b):
    return (f"[dualroot]\nsettle=0\nefi-entries=no\nexclude=/{trees.OWN}/*\n"
            f"[disk0]\nesp={a.partuuid['esp']}\nroot={SOURCE}\n[disk1]\nesp={b.partuuid['esp']}\nroot={b.partuuid['root']}\n")


def make(fstype, path, size, uuid, *options):
    with open(path, "wb") as image:
        image.truncate(size * MIB)
    if fstype == "btrfs":
        images.sh("mkfs.btrfs", "-q", "-U", uuid, path)
    else:
        images.sh("mke2fs", "-q", "-t", fstype, "-b", "4096", "-U", uuid, *options, path)


def source_disk(path, fstype, text, uuid):
    """A disk with an empty root for the machine, and one with all generations; returns what these look like on a spare
    whose root has that UUID."""
    parts = [path.with_suffix(f".part{number}") for number in (1, 2)]
    make(fstype, parts[0], SIZE, UUID)
    make("ext4", parts[1], SIZE, "random", "-N", "8192")
    with trees.mounted(parts[1], "ext4") as top:
        for number in range(1, GENERATIONS + 1):
            (top / str(number)).mkdir()
            write(generation(number, UUID, text), top / str(number))
        for name, data in (item for number in range(1, GENERATIONS + 1) for item in esp(number).items()):
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_bytes(data)
            os.utime(top / name, (record.time_of(data),) * 2)
    with open(path, "wb") as image:
        image.truncate((2 * SIZE + 2) * MIB)
    table = f"label: gpt\nstart=2048, size={SIZE * 2048}, uuid={SOURCE}\nstart={(1 + SIZE) * 2048}, size={SIZE * 2048}\n"
    images.sh("sfdisk", "-q", path, input=table.encode())
    for number, part in enumerate(parts):
        images.sh("dd", f"if={part}", f"of={path}", "bs=1M", f"seek={1 + number * SIZE}", "conv=notrunc,sparse")
        part.unlink()
    looks = []
    for number in range(1, GENERATIONS + 1):
        with tempfile.NamedTemporaryFile(suffix=".ext4") as file:
            make("ext4", file.name, SIZE, "random")
            with trees.mounted(file.name, "ext4") as top:
                write(generation(number, uuid, text), top)
                looks.append(trees.look(top))
    return [{".": looks[0]["."]}] + looks


class Recorder(record.Recorder):
    """A guest whose source is the small root. `looks` are its generations, as they are to be on the spare."""

    def __init__(self, directory, kind, staging, older=False):
        self.directory, self.kind, self.number = directory, kind, 0
        self.fstype = record.KINDS[kind][1]
        directory.mkdir(parents=True, exist_ok=True)
        self.a, self.b = images.pair("own-esp")
        # mkfs.btrfs wants one that nothing else has.
        self.b.uuid["root"] = str(uuid4())
        self.roles = ["esp", "root"]
        self.looks = source_disk(directory / "source.raw", self.fstype, configuration(self.a, self.b), self.b.uuid["root"])
        self.machine = Machine(directory, 1536)
        booted.resume(self.machine, 12, "initramfs-tools", "own-esp", staging, older)
        self.machine.plug("S", directory / "source.raw")
        self.machine.run(
            # Its mounts of the spare aren't seen in the small root, where a sync couldn't take them away.
            "systemctl stop dualroot-sync.path dualroot-entries.path dualroot-sync.timer; "
            "systemctl mask --runtime --quiet mnt-root1.mount mnt-root1-boot.mount; "
            "udevadm wait -t 60 /dev/disk/by-id/virtio-S-part2; mkdir -p /srv/root /srv/scenes /srv/spare; mount -o ro /dev/disk/by-id/virtio-S-part2 /srv/scenes")

    def turn_to(self, number):
        """Makes the small root one generation of it, and mounts into it what the product needs of the machine."""
        self.machine.run(
            "cd /; umount -R /srv/root 2>/dev/null; set -e; "
            f"mount /dev/disk/by-partuuid/{SOURCE} /srv/root; "
            f"rsync -aHAX --numeric-ids --delete --exclude /lost+found --exclude '/{trees.OWN}/*' "
            f"/srv/scenes/{number}/ /srv/root/; rsync -rt --delete --exclude /EFI/dualroot /srv/scenes/esp{number}/ /boot/; "
            f"for dir in {' '.join(MOUNTED)}; do mount --rbind /$dir /srv/root/$dir; mount --make-rslave /srv/root/$dir; done")

    def spare(self, content=None):
        spare = super().spare(content)
        self.machine.run(f"mount -o ro /dev/disk/by-partuuid/{self.b.partuuid['root']} /srv/spare")
        return spare

    def remove(self):
        self.machine.run("umount /srv/spare")
        super().remove()

    def sync(self):
        return self.machine.run(f"perl -e '{RESTLESS % COMMIT[self.fstype]}' >/dev/null 2>&1 & busy=$!; "
                                "chroot /srv/root dualroot-sync 2>&1; code=$?; kill $busy; exit $code", 300)
