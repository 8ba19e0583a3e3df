"""Disks with real Debian systems on them, made without mounting anything, and kept by the hash of what went into them."""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

MIB = 1 << 20
TYPES = {"esp": "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "xbootldr": "bc13c2ff-59e6-4262-a352-b275fd6f7172",
         "root": "0fc63daf-8483-4772-8e79-3d69d8477de4", "home": "933ac7e1-2eb4-4f13-b844-0e14e2aef915",
         "swap": "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f"}
SIZES = {"esp": 512, "xbootldr": 512, "root": 2560, "home": 64, "swap": 64}
MACHINE_ID = "d0a1c0de" * 4
CACHE = Path(os.environ.get("DUALROOT_TEST_CACHE", "/var/cache/dualroot-tests"))

SUITES = {12: "bookworm", 13: "trixie"}
COMMON = ["systemd", "systemd-sysv", "udev", "dbus", "systemd-boot", "systemd-boot-efi", "dosfstools", "e2fsprogs", "btrfs-progs",
          "rsync", "kmod", "zstd", "qemu-guest-agent", "fdisk", "util-linux", "efibootmgr"]
# What systems of some layouts have besides: those with a root in a LUKS container.
MORE = {"one-luks": {"initramfs-tools": ["cryptsetup", "cryptsetup-initramfs"], "dracut": ["cryptsetup", "systemd-cryptsetup"]},
        "one-xfs": {"dracut": ["xfsprogs"]}, "one-ext4": {"dracut": ["openssh-server"]}}
# What opens that.
PASSPHRASE = "correct horse battery staple"
# What an initrd needs of the kernel's modules in these machines. With Debian's default, nearly all of them, making one takes minutes
# under emulation.
DRIVERS = ["virtio_pci", "virtio_blk"]
# Of a kernel's modules, those that its packages keep, by the beginning of their paths. These machines have no hardware for the others,
# which guests would unpack, index, load and copy all the same.
MODULES = tuple(f"kernel/{path}" for path in (
    "crypto/", "drivers/block/loop", "drivers/block/virtio", "drivers/char/hw_random/", "drivers/char/virtio", "drivers/firmware/efi/",
    "drivers/firmware/qemu", "drivers/md/dm-crypt", "drivers/md/dm-mod", "drivers/virtio/", "fs/autofs/", "fs/btrfs/", "fs/configfs/",
    "fs/efivarfs/", "fs/ext4/", "fs/fat/", "fs/fuse/", "fs/jbd2/", "fs/mbcache", "fs/nls/", "fs/overlayfs/", "fs/xfs/", "lib/"))
# What Debian's dracut would put into an initrd, and these machines have no use for. With "shutdown", each of them ends by unpacking it.
OMITTED = ["hwdb", "kernel-modules-extra", "lunmask", "nvdimm", "overlay-root", "resume", "shutdown", "terminfo", "virtfs", "virtiofs"]
# Nobody logs in, there is nothing to reap, and nothing of what is tested asks for the others. Emulated, each takes a second of every boot.
MASKED = ["getty.target", "e2scrub_reap.service", "systemd-logind.service", "systemd-hostnamed.socket", "modprobe@drm.service",
          "modprobe@fuse.service", "modprobe@configfs.service", "sys-kernel-config.mount", "modprobe@efi_pstore.service",
          "systemd-pstore.service", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "sys-fs-fuse-connections.mount", "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount",
          "sys-kernel-tracing.mount", "proc-sys-fs-binfmt_misc.automount", "systemd-binfmt.service"]
# What a case starts when it needs it.
DISABLED = ["ssh.service", "ssh.socket"]
# What no test reads, and each copy of a system would have: below /usr, where packages may have it below / still.
WITHOUT = ["share/doc", "share/man", "share/locale", "share/info", "share/zoneinfo", "share/lintian", "share/bug",
           "share/bash-completion", "share/zsh", "lib/udev/hwdb.d", "lib/x86_64-linux-gnu/gconv",
           "lib/x86_64-linux-gnu/perl-base/unicore/lib"]
# Of these, what mkfs.fat(8) needs.
WITH = ["lib/x86_64-linux-gnu/gconv/gconv-modules*", "lib/x86_64-linux-gnu/gconv/IBM850.so"]


def sh(*command, **options):
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout.decode(errors='replace')[-2000:]}")
    return done.stdout.decode(errors="replace")


def digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def alone(name):
    """No other thread or process that has this name is in here meanwhile."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def cached(name, parts, suffix, build):
    """The path of what `build` makes at the path it is given, made only when nothing with these ingredients is there."""
    path, fresh = CACHE / f"{name}-{digest(parts)}{suffix}", CACHE / f".{name}.new"
    with alone(name):
        if not path.exists():
            # Of one that was killed.
            remove(fresh)
            build(fresh)
            fresh.rename(path)
            # What it replaces isn't needed again, unless another run is at work with it. These are large.
            for old in CACHE.glob(f"{name}-????????????????{suffix}"):
                if old != path and old.stat().st_mtime < time.time() - 7200:
                    remove(old)
        os.utime(path)
    return path


def sources(release):
    suite = SUITES[release]
    return (f"deb http://deb.debian.org/debian {suite} main\n"
            f"deb http://deb.debian.org/debian-security {suite}-security main\n")


def apt(release, *command, **options):
    """Runs a program of apt on a state of its own, as of today, for another release of Debian than that of this machine."""
    state = CACHE / f"apt{release}"
    with alone(state.name):
        lists = state / "lists"
        fresh = lists.exists() and lists.stat().st_mtime > time.time() - 86400
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        (state / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
        (state / "sources").write_text(sources(release))
        settings = {"Dir::Etc::sourcelist": state / "sources", "Dir::Etc::sourceparts": "/dev/null", "Dir::State::lists": lists,
                    "Dir::State::status": "/dev/null", "Dir::Cache": state / "cache", "APT::Sandbox::User": "root"}
        given = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        if not fresh:
            sh("apt-get", *given, "update")
            os.utime(lists)
        return sh(command[0], *given, *command[1:], **options)


@functools.cache
def kernel_versions(release, older=False):
    """The newest three kernels of the release's own series, the newest last; or the three before, if the archive has them still."""
    def numbers(name):
        return [int(number) for number in re.findall(r"\d+", name)]
    names = re.findall(r"^linux-image-(\d\S*-cloud-amd64)$", apt(release, "apt-cache", "pkgnames", "linux-image-"), re.MULTILINE)
    current = re.search(r"^Depends: linux-image-(\d\S*)", apt(release, "apt-cache", "show", "linux-image-cloud-amd64"), re.MULTILINE)
    series = numbers(current[1])[:2]
    found = sorted((name for name in names if numbers(name)[:2] == series), key=numbers)
    return found[-6:-3] if older and len(found) >= 6 else found[-3:]


def slim(package):
    """Takes a kernel's package apart, and puts it together with fewer modules, and without compression."""
    with tempfile.TemporaryDirectory(dir=CACHE) as top:
        sh("dpkg-deb", "--raw-extract", package, top)
        kept = []
        for line in Path(top, "DEBIAN/md5sums").read_text().splitlines():
            path = line.split(maxsplit=1)[1]
            if "/kernel/" in path and not path.partition("/modules/")[2].partition("/")[2].startswith(MODULES):
                Path(top, path).unlink()
            else:
                kept.append(line + "\n")
        Path(top, "DEBIAN/md5sums").write_text("".join(kept))
        sh("find", top, "-type", "d", "-empty", "-delete")
        sh("dpkg-deb", "--root-owner-group", "-Znone", "--build", top, package)


def kernels(release, older=False):
    """A tar archive of the packages of all kernels, slim, to be given to guests as a disk."""
    names = [f"linux-image-{version}" for version in kernel_versions(release, older)]

    def build(path):
        with tempfile.TemporaryDirectory(dir=CACHE) as tmp:
            apt(release, "apt-get", "download", *names, cwd=tmp)
            for package in Path(tmp).iterdir():
                slim(package)
            sh("tar", "-cf", path, "-C", tmp, ".")
            with open(path, "r+b") as archive:
                archive.truncate(-(-path.stat().st_size // MIB) * MIB)
    return cached(f"kernels{release}", [names, MODULES], ".tar", build)


def tree(release, initrd, layout, older):
    """A tar archive of a Debian system with the oldest of its kernels."""
    more = MORE.get(layout, {}).get(initrd, [])
    packages = COMMON + [initrd, "linux-base"] + more
    without = [f"--dpkgopt=path-exclude={top}/{path}/*" for path in WITHOUT for top in ("", "/usr")]
    without += [f"--dpkgopt=path-include=/usr/{path}" for path in WITH]
    # With that, Debian 12 gets usr-is-merged, and not usrmerge, which brings the whole of perl.
    without.append("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr")
    kernel = f"linux-image-{kernel_versions(release, older)[0]}"

    def build(path):
        with tempfile.NamedTemporaryFile("w", suffix=".list") as listing, tempfile.TemporaryDirectory() as tmp:
            listing.write(sources(release))
            listing.flush()
            sh("tar", "-xf", kernels(release, older), "-C", tmp, "--wildcards", f"./{kernel}_*")
            [package] = os.listdir(tmp)
            sh("nice", "mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar", f"--include={','.join(packages)}",
               *without, f"--customize-hook=copy-in {tmp}/{package} /",
               f'--customize-hook=chroot "$1" dpkg -i {package} && rm "$1/{package}"', SUITES[release], path, listing.name)
    name = f"debian{release}-{initrd}{layout.removeprefix('one') if more else ''}"
    return cached(name, [packages, without, sources(release), str(kernels(release, older))], ".tar", build)


def blank(path, mebibytes):
    with open(path, "wb") as image:
        image.truncate(mebibytes * MIB)
    return path


class Disk:
    """A disk of the pair: its partitions, in order, with the GUIDs and UUIDs that it has in every test."""

    def __init__(self, number, roles):
        self.number = number
        self.roles = roles
        self.partuuid = {r: f"{number}d15c000-0000-4000-8000-00000000000{i}" for i, r in enumerate(roles, 1)}
        self.uuid = {r: f"{number}f5f5f5f-0000-4000-8000-00000000000{i}" for i, r in enumerate(roles, 1)}
        for role in ("esp", "xbootldr"):
            self.uuid[role] = f"{number}F00-{'E' if role == 'esp' else 'B'}000"
        # That of the LUKS container which holds the root, where one does.
        self.container = f"{number}c0c0c0c-0000-4000-8000-000000000001"

    def image(self, path, contents):
        """Writes the disk: `contents` are the images of its partitions by role."""
        start, lines, places = 1, ["label: gpt", f"label-id: {self.number}d15c000-0000-4000-8000-000000000000"], {}
        for role in self.roles:
            lines.append(f"start={start * 2048}, size={SIZES[role] * 2048}, type={TYPES[role]}, uuid={self.partuuid[role]}")
            places[role] = start
            start += SIZES[role]
        blank(path, start + 1)
        sh("sfdisk", "-q", path, input="\n".join(lines).encode())
        for role, image in contents.items():
            sh("dd", f"if={image}", f"of={path}", "bs=1M", f"seek={places[role]}", "conv=notrunc,sparse")


def fat(path, role, disk, content=None):
    sh("mkfs.vfat", "-F32", "-n", f"{role[:4].upper()}{disk.number}", "-i", disk.uuid[role].replace("-", ""), path)
    if content:
        names = sorted(os.listdir(content))
        if names:
            sh("mcopy", "-s", "-Q", "-i", path, *[Path(content) / n for n in names], "::/")


def ext4(path, role, disk, content=None):
    sh("mke2fs", "-q", "-t", "ext4", "-U", disk.uuid[role], "-L", f"{role}{disk.number}",
       *(["-d", content] if content else []), path)


def luks(path, role, disk, content=None):
    """A LUKS container, of the older form, as QEMU makes it: without the kernel's help. It has its UUID as text (LUKS1, section 2.1)."""
    plain = blank(path.with_name(f"{path.name}-plain"), SIZES[role])
    ext4(plain, role, disk, content)
    # Beside the header.
    sh("resize2fs", plain, f"{SIZES[role] - 4}M")
    os.truncate(plain, (SIZES[role] - 4) * MIB)
    sh("qemu-img", "convert", "-f", "raw", "-O", "luks", "--object", f"secret,id=key,data={PASSPHRASE}", "-o",
       "key-secret=key,iter-time=100", plain, path)
    plain.unlink()
    with open(path, "r+b") as image:
        image.seek(168)
        image.write(disk.container.encode().ljust(40, b"\0"))


def swap(path, role, disk, _content=None):
    sh("mkswap", "-q", "-U", disk.uuid[role], path)


def btrfs(path, role, disk, content=None):
    sh("mkfs.btrfs", "-q", "-U", disk.uuid[role], "-L", f"{role}{disk.number}", *(["--rootdir", content] if content else []), path)


def xfs(path, role, disk, content=None):
    """This one is mounted: mkfs.xfs takes no directory."""
    sh("mkfs.xfs", "-q", "-m", f"uuid={disk.uuid[role]}", "-L", f"{role}{disk.number}", path)
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        sh("mount", path, place)
        try:
            sh("cp", "-a", f"{content}/.", place)
        finally:
            sh("umount", place)


LAYOUTS = {"own-esp": ("esp", "root"), "own-btrfs": ("esp", "root"), "own-xbootldr": ("esp", "xbootldr", "root", "home", "swap"),
           "shared-btrfs": ("esp", "root"),
           # Of these, there is only one disk, and no configuration.
           "one-luks": ("esp", "root"), "one-xfs": ("esp", "root"), "one-ext4": ("esp", "root", "swap", "home"),
           "one-btrfs": ("esp", "xbootldr", "root"), "one-shared-btrfs": ("esp", "root")}


def pair(layout):
    return Disk(0, LAYOUTS[layout]), Disk(1, LAYOUTS[layout])


def configuration(layout, disks):
    text = "# The pair of this machine.\n"
    for disk in disks:
        text += f"[disk{disk.number}]\ntitle=[{disk.number}]\n"
        for role in disk.roles:
            if not (role == "root" and layout == "shared-btrfs"):
                text += f"{role}={disk.partuuid[role]}\n"
    return text


def system(release, initrd, layout, staging, older=False):
    """The disks of a machine: the first with a Debian system and the product on it, the second with empty file systems. With `older`
    kernels, those before the newest three."""
    a, b = pair(layout)
    product = sorted((str(p.relative_to(staging)), hashlib.sha256(p.read_bytes()).hexdigest())
                     for p in Path(staging).rglob("*") if p.is_file())
    recipe, base = Path(__file__).read_bytes(), tree(release, initrd, layout, older)
    version = kernel_versions(release, older)[0]

    def build(path):
        path.mkdir()
        with tempfile.TemporaryDirectory(dir=CACHE) as tmp:
            make(Path(tmp), base, version, initrd, layout, staging, a, b, path)
    return cached(f"system{release}-{initrd}-{layout}", [product, recipe, str(base)], "", build)


def make(tmp, base, version, initrd, layout, staging, a, b, out):
    root, boot, esp = tmp / "root", tmp / "boot", tmp / "esp"
    for path in (root, boot, esp):
        path.mkdir()
    sh("tar", "-xf", base, "-C", root, "--xattrs")
    sh("sh", "-c", f"tar -c -C '{staging}' . | tar -x -C '{root}' --keep-directory-symlink --no-same-owner")
    (root / "etc/machine-id").write_text(MACHINE_ID + "\n")
    (root / "etc/hostname").write_text("pair\n")
    root_type = next((kind for kind in ("btrfs", "xfs") if kind in layout), "ext4")
    drivers = [*DRIVERS, root_type]
    if root_type != "btrfs":
        # An initrd would load its driver all the same, which tries out for seconds how it computes best.
        for name in ("hooks/btrfs", "scripts/local-premount/btrfs"):
            (root / "usr/share/initramfs-tools" / name).unlink(missing_ok=True)
    fstab = f"# The root.\nUUID={a.uuid['root']}\t/  {root_type}\tdefaults 0 {1 if root_type == 'ext4' else 0}\n"
    if layout == "one-ext4":
        fstab += f"LABEL=home0 /home ext4 defaults 0 2\n"
    if "swap" in a.roles:
        fstab += f"/dev/disk/by-uuid/{a.uuid['swap']} none swap sw 0 0 # with a comment\n"
    if layout.startswith("one-"):
        for place, role in (("/boot", "xbootldr"), ("/efi", "esp")) if "xbootldr" in a.roles else (("/boot", "esp"),):
            fstab += f"UUID={a.uuid[role]} {place} vfat umask=0077 0 2\n"
    else:
        (root / "etc/dualroot.conf").write_text(configuration(layout, (a, b)))
    (root / "etc/fstab").write_text(fstab)
    # What goes wrong before the guest can be asked is on the console. Emulated, the same code at another address in each process is
    # translated again and again: that makes a boot take a third longer, and a kernel's installation far more. What the kernel does against
    # faults of processors costs a tenth.
    options = (f"root=UUID={a.uuid['root']} ro norandmaps mitigations=off console=ttyS0 systemd.show_status=no "
               "systemd.journald.forward_to_console=1 systemd.journald.max_level_console=notice")
    if layout == "one-luks":
        (root / "etc/crypttab").write_text(f"cryptroot UUID={a.container} none luks,initramfs\n")
        options += {"initramfs-tools": f" cryptopts=target=cryptroot,source=UUID={a.container}",
                    "dracut": f" rd.luks.name={a.container}=cryptroot"}[initrd]
    (root / "etc/kernel/cmdline").write_text(options + "\n")
    sh("systemctl", f"--root={root}", "preset",
       "dualroot-booted.service", "dualroot-entries.path", "dualroot-sync.path", "dualroot-sync.timer", "dualroot-verify.timer")
    sh("systemctl", f"--root={root}", "mask", *MASKED)
    for unit in DISABLED:
        if (root / "usr/lib/systemd/system" / unit).exists():
            sh("systemctl", f"--root={root}", "disable", unit)
    # As after a first boot: what systemd updates then is up to date.
    for name in ("etc/.updated", "var/.updated"):
        (root / name).touch()
    sh("chroot", root, "passwd", "-d", "root")
    if initrd == "initramfs-tools":
        settings = root / "etc/initramfs-tools"
        (settings / "conf.d/machine").write_text("MODULES=list\nCOMPRESS=zstd\nCOMPRESSLEVEL=1\n")
        (settings / "modules").write_text("\n".join(drivers) + "\n")
        sh("chroot", root, "update-initramfs", "-u", "-k", version)
    else:
        (root / "etc/dracut.conf.d/machine.conf").write_text(f'hostonly=no\ndrivers=" {" ".join(drivers)} "\n'
                                                              f'omit_dracutmodules+=" {" ".join(OMITTED)} "\ncompress="zstd -1"\n')
        # Debian's hooks have the initrd made twice, by the package dracut and by kernel-install(8). Once is enough.
        (root / "etc/kernel/install.conf").write_text("initrd_generator=none\n")
        sh("chroot", root, "dracut", "-q", "--force", f"/boot/initrd.img-{version}", version)
    # What kernel-install(8) and bootctl(1) make of it in a running system.
    token = boot / MACHINE_ID / version
    token.mkdir(parents=True)
    shutil.copy(root / f"boot/vmlinuz-{version}", token / "linux")
    shutil.copy(root / f"boot/initrd.img-{version}", token / f"initrd.img-{version}")
    (boot / "loader/entries").mkdir(parents=True)
    (boot / f"loader/entries/{MACHINE_ID}-{version}.conf").write_text(
        f"title      Debian GNU/Linux\nversion    {version}\nmachine-id {MACHINE_ID}\nsort-key   debian\n"
        f"options    {options} systemd.machine_id={MACHINE_ID}\nlinux      /{MACHINE_ID}/{version}/linux\n"
        f"initrd     /{MACHINE_ID}/{version}/initrd.img-{version}\n")
    for name in os.listdir(root / "boot"):
        shutil.copy(root / "boot" / name, boot / name)
        (root / "boot" / name).unlink()
    separate = "xbootldr" in a.roles
    place = esp if separate else boot
    (place / "loader").mkdir(exist_ok=True)
    (boot / "loader/entries.srel").write_text("type1\n")
    (place / "loader/loader.conf").write_text("timeout 0\nconsole-mode keep\n")
    if separate:
        (place / "loader/entries.srel").write_text("type1\n")
    loader = root / "usr/lib/systemd/boot/efi/systemd-bootx64.efi"
    for target in ("EFI/systemd/systemd-bootx64.efi", "EFI/BOOT/BOOTX64.EFI"):
        (place / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(loader, place / target)
    (root / "boot").mkdir(exist_ok=True)
    (root / "efi").mkdir(exist_ok=True)
    parts = {0: {}, 1: {}}
    disks = (a,) if layout.startswith("one-") else (a, b)
    for disk in disks:
        for role in disk.roles:
            image = blank(tmp / f"{role}{disk.number}", SIZES[role])
            content = {"esp": place, "xbootldr": boot, "root": root}.get(role) if disk is a else None
            if role == "root" and layout == "shared-btrfs" and disk is b:
                continue
            of_root = luks if layout == "one-luks" else {"btrfs": btrfs, "xfs": xfs, "ext4": ext4}[root_type]
            write = {"esp": fat, "xbootldr": fat, "swap": swap, "root": of_root}.get(role, ext4)
            write(image, role, disk, content)
            parts[disk.number][role] = image
    for disk in disks:
        disk.image(out / f"disk{disk.number}.raw", parts[disk.number])
