"""What the booted disk's boot partitions hold, from one scene to the next: every change of a scene is synced, and cut everywhere."""

import random
import struct

TOKEN = "d0a1c0ded0a1c0ded0a1c0ded0a1c0de"
KIB = 1 << 10


def noise(name, size):
    """Bytes that belong to a name, always the same."""
    return random.Random(name).randbytes(size)


def cpio(name, size):
    """An initrd, as far as anybody looks into it: an archive of the kind "newc" with one file."""
    def member(path, data):
        fields = [0, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path) + 1, 0]
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + path + b"\0"
        return head.ljust(-(-len(head) // 4) * 4, b"\0") + data.ljust(-(-len(data) // 4) * 4, b"\0")
    return member(b"noise", noise(name, size)) + member(b"TRAILER!!!", b"")


def pe(sections, seed):
    """A program as EFI wants it, with these sections: no more of it than what a boot loader looks at before it starts one."""
    aligned = 512
    head = bytearray(b"MZ".ljust(60, b"\0") + struct.pack("<I", 64) + b"PE\0\0")
    head += struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, 240, 0x22e)
    head += struct.pack("<HBBIIIII", 0x20b, 0, 0, 0, 0, 0, 0x1000, 0x1000)
    head += struct.pack("<QIIHHHHHHIIIIHH", 0, 0x1000, aligned, 0, 0, 0, 0, 0, 0, 0, 0x1000000, aligned, 0, 10, 0)
    head = head.ljust(64 + 24 + 240, b"\0")
    at, body = aligned * 2, b""
    for number, (name, data) in enumerate(sections.items()):
        size = -(-len(data) // aligned) * aligned
        head += struct.pack("<8sIIIIIIHHI", name.encode(), len(data), 0x1000 + number * 0x100000, size, at, 0, 0, 0, 0, 0x40000040)
        body += data.ljust(size, b"\0")
        at += size
    return bytes(head).ljust(aligned * 2, b"\0") + body + noise(seed, 700)


def loader(version):
    magic = f"#### LoaderInfo: systemd-boot {version} ####"
    return pe({".sdmagic": magic.encode(), ".text": noise(f"loader {version}", 90 * KIB)}, version)


def loaders(version):
    return {"EFI/systemd/systemd-bootx64.efi": loader(version), "EFI/BOOT/BOOTX64.EFI": loader(version)}


def uki(name, version, generation):
    osrel = f"ID=debian\nVERSION_ID=12\nPRETTY_NAME=Debian\nIMAGE_VERSION={version}\n"
    sections = {".osrel": osrel.encode(), ".cmdline": b"root=LABEL=shared quiet", ".uname": version.encode(),
                ".linux": noise(f"linux {generation}", 700 * KIB), ".initrd": cpio(f"initrd {generation}", 900 * KIB)}
    return {f"EFI/Linux/{name}.efi": pe(sections, generation)}


def fixed(kernel, initrd, options="quiet", microcode=None):
    """A kernel in files that keep their names, as Arch Linux has it."""
    entry = "title Arch Linux\nlinux /vmlinuz-linux\n"
    files = {"vmlinuz-linux": noise(f"kernel {kernel}", 600 * KIB + 100),
             "initramfs-linux.img": cpio(f"initrd {initrd}", 1100 * KIB + 37),
             "initramfs-linux-fallback.img": cpio(f"fallback {initrd}", 300 * KIB + 5)}
    # What else lies there, so that not all names are in one sector.
    files |= {f"memtest86+x{bits}.bin": noise(f"memtest {bits}", 9 * KIB) for bits in (32, 64)}
    if microcode:
        entry += "initrd /intel-ucode.img\n"
        files["intel-ucode.img"] = cpio(f"microcode {microcode}", 60 * KIB)
    entry += f"initrd /initramfs-linux.img\noptions root=LABEL=shared rw {options}\n"
    return files | {"loader/entries/arch.conf": entry.encode()}


def versioned(version, tree=None, options="quiet"):
    """A kernel in a directory of its own, as kernel-install(8) has it."""
    directory = f"{TOKEN}/{version}"
    entry = f"title      Debian GNU/Linux\nversion    {version}\nmachine-id {TOKEN}\nsort-key   debian\n"
    entry += f"options    root=LABEL=shared {options}\n"
    entry += f"linux      /{directory}/linux\ninitrd     /{directory}/initrd.img\n"
    files = {f"{directory}/linux": noise(f"kernel {version}", 700 * KIB),
             f"{directory}/initrd.img": cpio(f"initrd {version}", 900 * KIB)}
    if tree:
        entry += f"devicetree /{directory}/board.dtb\n"
        files[f"{directory}/board.dtb"] = noise(f"tree {tree}", 30 * KIB)
    return files | {f"loader/entries/{TOKEN}-{version}.conf": entry.encode()}


def settings(default=None):
    return {"loader/loader.conf": ("timeout 0\n" + (f"default {default}\n" if default else "")).encode()}


LONG = " ".join(f"some.option{number}=value" for number in range(40))
OTHER = LONG.replace("value", "other")
FILLER = {"EFI/tools/filler.bin": noise("filler", 29 << 20)}

# With one ESP. The first sync is onto an empty file system, and each scene begins where the one before it ended.
ESP = {
    "first sync": loaders("1") | settings() | fixed(1, 1, microcode=1),
    "fixed names": loaders("1") | settings() | fixed(2, 2, microcode=2),
    "initrd only": loaders("1") | settings() | fixed(2, 3, microcode=2),
    "entry only": loaders("1") | settings() | fixed(2, 3, "splash", microcode=2),
    "entry gets longer than a sector": loaders("1") | settings() | fixed(2, 3, LONG, microcode=2),
    "entry longer than a sector": loaders("1") | settings() | fixed(2, 3, OTHER, microcode=2),
    "fixed names, entry longer than a sector": loaders("1") | settings() | fixed(4, 4, LONG, microcode=3),
    "boot loader": loaders("2") | settings() | fixed(4, 4, LONG, microcode=3),
    "other kind of names": loaders("2") | settings() | versioned("6.1.1"),
    "new kernel": loaders("2") | settings() | versioned("6.1.1") | versioned("6.1.2"),
    "loader.conf": loaders("2") | settings(f"{TOKEN}-6.1.1.conf") | versioned("6.1.1") | versioned("6.1.2"),
    "default kernel goes": loaders("2") | settings() | versioned("6.1.2"),
    "new comes, old goes": loaders("2") | settings() | versioned("6.1.3", tree=1),
    "device tree": loaders("2") | settings() | versioned("6.1.3", tree=2),
    "unified": loaders("2") | settings() | versioned("6.1.3", tree=2) | uki(f"{TOKEN}-6.1.4", "6.1.4", "4"),
    "unified only": loaders("2") | settings() | uki(f"{TOKEN}-6.1.4", "6.1.4", "4"),
    "unified, same name": loaders("2") | settings() | uki(f"{TOKEN}-6.1.4", "6.1.4", "5"),
    "everything": loaders("3") | settings("arch.conf") | fixed(5, 5, microcode=5) | versioned("6.1.5"),
    "filled": loaders("3") | settings() | versioned("6.1.5") | versioned("6.1.6") | FILLER,
    "little room": loaders("3") | settings() | versioned("6.1.6") | versioned("6.1.7", tree=7) | FILLER,
}

# With an XBOOTLDR partition, FAT or ext4: the ESP's files, and its.
XBOOTLDR = {
    "first sync": (loaders("1") | settings(), fixed(1, 1)),
    "fixed names": (loaders("1") | settings(), fixed(2, 2)),
    "boot loader and kernel": (loaders("2") | settings(), fixed(2, 2) | versioned("6.1.1")),
    "new comes, old goes": (loaders("2") | settings(), versioned("6.1.2", tree=1)),
    "entry longer than a sector": (loaders("2") | settings(f"{TOKEN}-*"), versioned("6.1.2", tree=1, options=LONG)),
    "the same again": (loaders("2") | settings(f"{TOKEN}-*"), versioned("6.1.2", tree=1, options=OTHER)),
    "unified": (loaders("2") | settings(), uki(f"{TOKEN}-6.1.4", "6.1.4", "4")),
}

# What other tools are given: the two ways to name a kernel.
PEERS = {
    "fixed names": (loaders("1") | settings() | fixed(1, 1), loaders("1") | settings() | fixed(2, 2)),
    "versioned names": (loaders("1") | settings() | versioned("6.1.1"), loaders("1") | settings() | versioned("6.1.2")),
}
