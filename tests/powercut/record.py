"""A machine that syncs to a spare whose every write is logged, through all scenes; and other tools that do the same."""

import io
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vm"))
import booted  # noqa: E402
import images  # noqa: E402
from machine import Machine  # noqa: E402

import scenes  # noqa: E402

MIB = 1 << 20
SIZES = {"esp": 34, "xbootldr": 34, "root": 128}
KINDS = {"esp": ["vfat"], "xbootldr-vfat": ["vfat", "vfat"], "xbootldr-ext4": ["vfat", "ext4"],
         "root-ext4": ["vfat", "ext4"], "root-btrfs": ["vfat", "btrfs"]}
# What needn't be written later is in the log of no sync.
EXT4 = ["-E", "lazy_itable_init=0,lazy_journal_init=0"]
# What the source doesn't have goes.
DELETE = "cd {1}; find . -type f | while read -r f; do [ -e \"{0}/$f\" ] || rm \"$f\"; done; cd /"
PEERS = {
    "rsync -a --delete": "rsync -a --delete {0}/ {1}/",
    "rsync --delay-updates --delete-after --fsync": "rsync -a --delay-updates --delete-after --fsync {0}/ {1}/",
    "cp -a": "cp -a {0}/. {1}/ && {{ " + DELETE + "; }}",
    "write, rename, syncfs": "cd {0}; find . -type f -print | while read -r f; do mkdir -p \"$(dirname \"{1}/$f\")\"; "
                             "cp -a \"$f\" \"{1}/$f.new\" && mv \"{1}/$f.new\" \"{1}/$f\" && sync -f {1}; done; "
                             + DELETE,
}


def time_of(data):
    """A time for a file: what stays the same has the same one."""
    return 1700000000 + zlib.crc32(data) % 10000000 * 2


def archive(path, states):
    """The scenes' files, as a tar archive to be given to the guest as a disk."""
    with tarfile.open(path, "w") as tar:
        for number, trees in enumerate(states):
            for place, files in trees.items():
                for name, data in files.items():
                    info = tarfile.TarInfo(f"{number}/{place}/{name}")
                    info.size, info.mode, info.mtime = len(data), 0o755, time_of(data)
                    tar.addfile(info, io.BytesIO(data))
    with open(path, "r+b") as tar:
        tar.truncate(-(-path.stat().st_size // MIB) * MIB)


class Spare:
    """The disk that is written: its image, its log, and where in it each partition is."""

    def __init__(self, directory, name, kinds, disk, content=None):
        self.image, self.log = directory / f"{name}.raw", directory / f"{name}.log"
        self.base = directory / f"{name}.base"
        self.places, start = {}, 1
        for role in kinds:
            self.places[role] = (start * MIB, SIZES[role] * MIB)
            start += SIZES[role]
        if content is None:
            self.format(directory, name, kinds, disk)
        else:
            self.image.write_bytes(content)
        subprocess.run(["cp", "--sparse=always", self.image, self.base], check=True)

    def format(self, directory, name, kinds, disk):
        lines = ["label: gpt"]
        with open(self.image, "wb") as image:
            image.truncate((sum(SIZES[role] for role in kinds) + 2) * MIB)
        for role, (start, size) in self.places.items():
            lines.append(f"start={start // 512}, size={size // 512}, type={images.TYPES[role]}, uuid={disk.partuuid[role]}")
        images.sh("sfdisk", "-q", self.image, input="\n".join(lines).encode())
        for role, kind in kinds.items():
            part = directory / f"{name}.part"
            with open(part, "wb") as image:
                image.truncate(SIZES[role] * MIB)
            if kind == "vfat":
                images.sh("mkfs.vfat", "-F32", "-s1", "-i", disk.uuid[role].replace("-", ""), part)
            elif kind == "btrfs":
                images.sh("mkfs.btrfs", "-q", "-U", disk.uuid[role], part)
            elif role == "root":
                images.sh("mke2fs", "-q", "-t", kind, "-b", "4096", "-U", disk.uuid[role], *EXT4, part)
            else:
                images.sh("mke2fs", "-q", "-t", kind, "-b", "1024", "-I", "256", part)
            images.sh("dd", f"if={part}", f"of={self.image}", "bs=1M", f"seek={self.places[role][0] // MIB}", "conv=notrunc")
            part.unlink()


class Recorder:
    """A guest that boots from disk A, and what is done in it. `kind` is a key of KINDS."""

    def __init__(self, directory, kind, staging, states, fails=None, older=False):
        self.directory, self.kind = directory, kind
        directory.mkdir(parents=True, exist_ok=True)
        layout = "own-esp" if kind == "esp" else "own-xbootldr"
        self.a, self.b = images.pair(layout)
        self.roles = ["esp"] if kind == "esp" else ["esp", "xbootldr"]
        archive(directory / "scenes.tar", states)
        self.machine = Machine(directory, 1536)
        booted.resume(self.machine, 12, "initramfs-tools", layout, staging, older, fails)
        self.machine.plug("scenes", directory / "scenes.tar")
        # One root for both disks, of which no file names a disk: what is synced is the boot partitions.
        text = "[dualroot]\nsettle=0\nefi-entries=no\n"
        for disk in (self.a, self.b):
            text += f"[disk{disk.number}]\n" + "".join(f"{role}={disk.partuuid[role]}\n" for role in self.roles)
        self.machine.run(
            "systemctl stop dualroot-sync.path dualroot-entries.path dualroot-sync.timer; swapoff -a; : >/etc/fstab; "
            f"echo root=LABEL=shared >/etc/kernel/cmdline; printf '{text}' >/etc/dualroot.conf; "
            "udevadm wait -t 60 /dev/disk/by-id/virtio-scenes; mkdir /run/scenes; tar -xf /dev/disk/by-id/virtio-scenes -C /run/scenes; rm -rf /run/systemd/generator/mnt-root1*")
        self.number = 0

    def spare(self, content=None, fails=None, slow=False):
        """Puts in a spare, empty or with this content; of what `fails` or is `slow`, see Machine.plug. No log is kept of one that fails."""
        self.number += 1
        spare = Spare(self.directory, f"spare{self.number}", dict(zip(self.roles, KINDS[self.kind])), self.b, content)
        self.machine.plug("B", spare.image, None if fails else spare.log, fails, slow)
        self.machine.run("".join(f"udevadm wait -t 30 /dev/disk/by-partuuid/{self.b.partuuid[role]}; " for role in self.roles) +
                         "udevadm settle")
        return spare

    def remove(self):
        self.machine.run("for m in $(findmnt -rno TARGET | grep ^/mnt/root1 | sort -r); do umount $m; done; udevadm settle")
        self.machine.unplug("B")

    def turn_to(self, number):
        """Gives the booted disk what it holds in a scene."""
        for place in ("efi", "boot") if self.kind != "esp" else ("boot",):
            self.machine.run(f"mkdir -p /run/scenes/{number}/{place}; "
                             f"rsync -rt --delete --exclude /EFI/dualroot /run/scenes/{number}/{place}/ /{place}/")

    def sync(self):
        """One sync by the product; raises where it isn't a success."""
        return self.machine.run("dualroot-sync 2>&1", 300)

    def peer(self, command):
        """One sync by another tool, with the mount that it would have."""
        device = f"/dev/disk/by-partuuid/{self.b.partuuid['esp']}"
        return self.machine.run(f"mkdir -p /run/peer && mount -t vfat {device} /run/peer && "
                                f"{{ {command.format('/boot', '/run/peer')}; }} && umount /run/peer", 300)
