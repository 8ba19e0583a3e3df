"""Tests of the proof itself: that it reads what is there, and sees what is wrong. Needs dosfstools, mtools and e2fsprogs."""

import collections
import os
import random
import stat
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import ext
import fat
import generations
import oracle
import roots
import sdboot
import trees
import writelog
from fat import Fat, Unreadable

MIB = 1 << 20
# Names outside of ASCII.
ENVIRONMENT = os.environ | {"MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"}


def sh(*command, **options):
    return subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
                          **options).stdout


def noise(seed, size):
    return random.Random(seed).randbytes(size)


def put(image, files):
    """Writes files into a FAT image, with mtools."""
    for path, content in files.items():
        above = path.strip("/").split("/")[:-1]
        for depth in range(1, len(above) + 1):
            subprocess.run(["mmd", "-D", "s", "-i", image, f"::/{'/'.join(above[:depth])}"], stdin=subprocess.DEVNULL,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
        sh("mcopy", "-D", "o", "-o", "-i", image, "-", f"::{path}", input=content)


class Disk:
    """A FAT image in a file, and a log of what is done to it: each step is flushed."""

    def __init__(self, files, size=40, bits=32):
        self.file = tempfile.NamedTemporaryFile(dir=ext.scratch_directory(size * MIB))
        self.file.truncate(size * MIB)
        sh("mkfs.vfat", "-F", bits, "-i", "12345678", self.file.name)
        put(self.file.name, files)
        self.base = self.bytes()
        self.before, self.entries = self.base, []

    def bytes(self):
        return Path(self.file.name).read_bytes()

    def image(self):
        return writelog.Image(bytearray(self.bytes()))

    def step(self, files=None, *commands):
        """Logs, as writes of up to 64 KiB, what some changes make different."""
        put(self.file.name, files or {})
        for command in commands:
            sh(*command[:1], "-i", self.file.name, *command[1:])
        now, runs = self.bytes(), []
        for start in range(0, len(now), 4096):
            if now[start:start + 4096] == self.before[start:start + 4096]:
                continue
            if runs and runs[-1][1] == start and start - runs[-1][0] < 65536:
                runs[-1][1] = start + 4096
            else:
                runs.append([start, start + 4096])
        self.entries += [(first, now[first:last], 0) for first, last in runs] + [(0, b"", writelog.FLUSH)]
        self.before = now

    def overwrite(self, path, content):
        """Changes a file of the same size in place, as one write."""
        reader = Fat(bytearray(self.bytes()))
        (offset, size), = reader.extents(path, reader.find(path), len(content))
        with open(self.file.name, "r+b") as file:
            file.seek(offset)
            file.write(content)
        self.before = self.bytes()
        sector = content.ljust(-(-size // 512) * 512, b"\0")
        self.entries += [(offset, sector, 0), (0, b"", writelog.FLUSH)]

    def log(self):
        return writelog.parse(make_log(self.entries))


def make_log(entries, sector=512):
    """A log from (offset, data, flags); for a discard, data is the number of bytes."""
    parts = [struct.pack("<QQQI", writelog.MAGIC, 1, len(entries), sector).ljust(sector, b"\0")]
    for offset, data, flags in entries:
        size = data if isinstance(data, int) else len(data)
        parts.append(struct.pack("<QQQQ", offset // sector, size // sector, flags, 0).ljust(sector, b"\0"))
        parts.append(b"" if isinstance(data, int) else data)
    return b"".join(parts)


class Tree:
    """A file system out of a dictionary."""

    def __init__(self, files):
        self.files = files

    def key(self, path):
        return "/".join(fat.split(path)).lower()

    def read(self, path, offset=0, size=None):
        found = [content for name, content in self.files.items() if self.key(name) == self.key(path)]
        if not found:
            raise fat.Missing(f"{path}: no such file")
        if found[0] is None:
            raise Unreadable(f"{path}: its chain is broken")
        return found[0][offset:] if size is None else found[0][offset:offset + size]

    def exists(self, path):
        return any(self.key(name) == self.key(path) for name in self.files)

    def list(self, path):
        start = f"{path}/".lstrip("/")
        below = [name[len(start):] for name in self.files if name.startswith(start)]
        return [ext.Entry(name, False, 0, 0) for name in below if "/" not in name]

    def digest(self, path):
        return ext.hashlib.sha256(self.read(path)).hexdigest()


def pe(sections, machine=0x8664):
    """A minimal PE file."""
    table, body, offset = b"", b"", 64 + 24 + 112 + 40 * len(sections)
    for name, content in sections:
        table += struct.pack("<8sIIII12xI", name, len(content), 4096, len(content), offset + len(body), 0)
        body += content
    head = b"PE\0\0" + struct.pack("<HHIIIHH", machine, len(sections), 0, 0, 0, 112, 0) + struct.pack("<H110x", 0x20b)
    return b"MZ".ljust(60, b"\0") + struct.pack("<I", 64) + head + table + body


def uki(release, seed=0):
    return pe([(b".osrel", release), (b".cmdline", b"quiet"), (b".linux", noise(seed, 3000))])


def loader(number):
    return pe([(b".text", noise(number, 20000)), (b".sdmagic", b"#### LoaderInfo: systemd-boot 252 ####")])


def fails(function, *arguments):
    """The message of the error that a call must raise."""
    try:
        function(*arguments)
    except Unreadable as problem:
        return str(problem)
    return None


def equal(found, expected):
    assert found == expected, f"{found!r} instead of {expected!r}"


# FAT

TREE = {"/EFI/BOOT/BOOTX64.EFI": noise(1, 70001), "/a.txt": b"a", "/empty": b"", "/Mixed Case Name.conf": b"x" * 511,
        "/loader/entries/6a9857a393724b7a981ebb5b8495b9ea-6.1.0-37-amd64.conf": b"y" * 513, "/ünïcödé-näme.txt": b"u" * 4097,
        "/UPPER.TXT": b"z" * 512, "/lower.txt": b"l", "/a/b/c/d/e/f/deep.file.name.with.dots": noise(2, 9000),
        "/exactly-13-ch": b"13", "/exactly-26-characters-long": b"26",
        "/6a9857a393724b7a981ebb5b8495b9ea/6.1/linux": noise(3, 700000)}


def test_reads_what_mtools_wrote():
    for size, bits in ((4, 12), (32, 16), (40, 32)):
        disk = Disk({**TREE, **{f"/many/file number {n}.conf": b"%d" % n for n in range(60)}}, size, bits)
        reader = Fat(disk.image())
        equal(reader.bits, bits)
        found = {path: reader.read(path) for path, entry in reader.walk() if not entry.directory}
        equal(len(found), len(TREE) + 60)
        for path, content in TREE.items():
            assert found[path] == content, path
            assert sh("mcopy", "-i", disk.file.name, f"::{path}", "-") == content, path
        equal(reader.read("\\EFI\\boot\\bootx64.efi", 70000, 5), TREE["/EFI/BOOT/BOOTX64.EFI"][70000:])
        equal(reader.read("/ÜNÏCÖDÉ-NÄME.TXT"), b"u" * 4097)
        equal(sum(entry.directory for _, entry in reader.walk()), 13)
        equal(reader.notes, [])
        equal(fails(reader.read, "/a.txt/b"), "/a.txt/b: no such file")
        equal(fails(reader.read, "/loader"), "/loader: it is a directory")
        assert reader.exists("/loader/ENTRIES") and not reader.exists("/loader/none")


def test_reads_a_part_of_a_disk():
    disk = Disk(TREE)
    whole = writelog.Image(bytearray(MIB) + disk.bytes() + bytearray(MIB))
    equal(Fat(whole, MIB, 40 * MIB).read("/a.txt"), b"a")
    assert fails(Fat, whole, 0, MIB) and fails(Fat, whole, MIB, 39 * MIB)
    # From files, of which neither changes.
    with tempfile.TemporaryDirectory() as tmp:
        path, log = Path(tmp, "disk"), Path(tmp, "log")
        path.write_bytes(whole.data)
        log.write_bytes(make_log([(41 * MIB, b"x" * 512, 0), (0, b"y" * 512, 0)]))
        for image, start in ((writelog.open_image(path), MIB), (writelog.open_image(path, MIB, 40 * MIB), 0)):
            equal(Fat(image, start, 40 * MIB).read("/a.txt"), b"a")
            image.write(start, bytes(512))
            assert fails(Fat, image, start, 40 * MIB)
            image.rollback()
            equal(Fat(image, start, 40 * MIB).read("/a.txt"), b"a")
        equal([(w.offset, w.size) for w in writelog.read_log(log, 40 * MIB).writes], [(MIB, 512)])
        assert path.read_bytes() == bytes(whole.data)


def name_records(image, name):
    """Where the directory entry of a file with a short name is."""
    return bytes(image[0:len(image)]).index(name)


def test_long_names_must_belong():
    image = Disk({"/Mixed Case Name.conf": b"x"}).image()
    offset = name_records(image, b"MIXEDC~1CON")
    image.write(offset - 32 + 13, bytes([image[offset - 32 + 13] ^ 1]))
    equal([entry.name for entry in Fat(image).list()], ["MIXEDC~1.CON"])
    image.rollback()
    equal([entry.name for entry in Fat(image).list()], ["Mixed Case Name.conf"])
    image.write(offset, b"\xe5")
    equal(Fat(image).list(), [])
    image.rollback()
    image.write(offset - 64, b"\xe5")
    equal([entry.name for entry in Fat(image).list()], ["MIXEDC~1.CON"])


def link(image, cluster, value):
    reader = Fat(image)
    image.write(reader.table[0] + cluster * 4, struct.pack("<I", value))


def test_broken_chains():
    image = Disk({"/linux": noise(1, 5000), "/other": noise(2, 3000), "/dir/x": b"x"}).image()
    reader = Fat(image)
    first, other = reader.find("/linux").cluster, reader.find("/other").cluster
    for value, problem in ((0, "there is a free cluster in its chain"), (0x0ffffff7, "there is a bad cluster in its chain"),
                           (0x0fffffff, "its chain ends after 4 clusters"), (0x0ffffff8, "its chain ends after 4 clusters"),
                           (first + 1, "its chain runs in a circle"), (999999, "cluster 999999 in its chain does not exist")):
        link(image, first + 3, value)
        equal(fails(Fat(image).read, "/linux"), f"/linux: {problem}")
        equal(fails(Fat(image).digest, "/linux"), f"/linux: {problem}")
        # The part before it can still be read, as firmware does that looks at headers only.
        equal(Fat(image).read("/linux", 0, 2048), noise(1, 2048))
        image.rollback()
    # Two files that share a chain can be read.
    link(image, first + 3, other)
    equal(Fat(image).read("/linux"), noise(1, 2048) + noise(2, 3000)[:2952])
    image.rollback()
    link(image, other + 5, first)
    longer = Fat(image)
    equal(longer.read("/other"), noise(2, 3000))
    equal(longer.notes, ["/other: its chain is longer than its size"])
    image.rollback()
    offset = name_records(image, b"LINUX      ")
    image.write(offset + 28, struct.pack("<I", 0xffffffff))
    equal(fails(Fat(image).read, "/linux"), "/linux: it is larger than the file system")
    image.rollback()
    image.write(offset + 20, bytes(2) + image[offset + 22:offset + 26] + bytes(2))
    equal(fails(Fat(image).read, "/linux"), "/linux: it has no clusters")
    image.rollback()
    # A directory that is its own child.
    offset = name_records(image, b"DIR        ")
    image.write(offset + 20, struct.pack("<H", 0) + image[offset + 22:offset + 26] + struct.pack("<H", Fat(image).root))
    equal(fails(lambda: list(Fat(image).walk()) and None), "/dir: it lies within itself")


def test_any_bytes():
    random_, image = random.Random(4), Disk(TREE, 36).image()
    reader = Fat(image)
    meta = [*range(90), *range(reader.table[0], reader.table[0] + 6000), *range(reader.data, reader.data + 8192)]
    begun, worst, read = time.monotonic(), 0, 0
    for _ in range(250):
        for _ in range(random_.choice((1, 5, 100))):
            image.write(random_.choice(meta), random_.randbytes(random_.choice((1, 4))))
        start = time.monotonic()
        try:
            broken = Fat(image)
            for path, entry in broken.walk():
                try:
                    if not entry.directory:
                        broken.read(path)
                        read += 1
                except Unreadable:
                    pass
        except Unreadable:
            pass
        worst = max(worst, time.monotonic() - start)
        image.rollback()
    assert worst < 2 and read > 100, (worst, read, time.monotonic() - begun)
    assert fails(Fat, b"") and fails(Fat, bytes(MIB)) and fails(Fat, b"\xff" * MIB)


# ext4

def test_reads_ext4():
    with tempfile.TemporaryDirectory() as tmp:
        files = {"vmlinuz-6.1": noise(1, 300000), "loader/entries/a b.conf": b"title x\n", "deep/er/empty": b""}
        for path, content in files.items():
            (Path(tmp, "tree") / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(tmp, "tree") / path).write_bytes(content)
        image = Path(tmp, "image")
        sh("mke2fs", "-q", "-t", "ext4", "-d", Path(tmp, "tree"), image, "24M")
        data = bytearray(MIB) + image.read_bytes()
        reader = ext.Ext(data, MIB)
        assert not reader.repaired
        found = {path[1:]: reader.read(path) for path, entry in reader.walk() if not entry.directory}
        equal(found, files)
        equal([entry.name for entry in reader.list("/loader/ENTRIES")], ["a b.conf"])
        equal(reader.digest("/VMLINUZ-6.1"), ext.hashlib.sha256(files["vmlinuz-6.1"]).hexdigest())
        assert not reader.exists("/nothing")
        data[MIB:] = bytes(len(data) - MIB)
        assert fails(ext.Ext, data, MIB)


# sd-boot

# From systemd's own test, src/boot/efi/test-efi-string.c.
MATCHES = [("", "", 1), ("abc", "abc", 1), ("aBc", "abc", 0), ("b", "a", 0), ("b", "", 0), ("abc", "a", 0), ("a?c", "azc", 1),
           ("???", "?.9", 1), ("1?", "1", 0), ("***", "", 1), ("*", "123", 1), ("**", "abcd", 1), ("*b*", "abcd", 1),
           ("abc*d", "abc", 0), ("start*end", "startend", 1), ("start*end", "startendend", 1), ("start*end", "startenddne", 0),
           ("start*end", "startendstartend", 1), ("start*end", "starten", 0), ("*.conf", "arch.conf", 1), ("ab*cde", "abzcd", 0),
           ("debian-*.conf", "debian-wheezy.conf", 1), ("debian-*.*", "debian-wheezy.efi", 1), ("\\*\\a\\[", "*a[", 1),
           ("[abc] [abc] [abc]", "a b c", 1), ("abc]", "abc]", 1), ("[abc]", "z", 0), ("[abc", "a", 0),
           ("[][!] [][!] [][!]", "[ ] !", 1),
           ("[]-] []-]", "] -", 1), ("[1\\]] [1\\]]", "1 ]", 1), ("[$-\\+]", "&", 1), ("[1-3A-C] [1-3A-C]", "2 B", 1),
           ("[3-5] [3-5] [3-5]", "3 4 5", 1), ("[a-c-f] [a-c-f] [a-c-f] [a-c-f] [a-c-f]", "a b c - f", 1), ("[a-c-f]", "e", 0),
           ("[--0] [--0] [--0]", "- . 0", 1), ("[+--] [+--] [+--]", "+ , -", 1), ("[f-l]", "m", 0), ("[b]", "z-a", 0),
           ("[a\\-z]", "b", 0),
           ("?a*b[.-0]c", "/a/b/c", 1), ("debian-*-*-*.*", "debian-jessie-2018-06-17-kernel-image-5.10.0-16-amd64.efi", 1),
           ("a*" * 30, "a" * 29, 0), ("a*" * 30, "a" * 300, 1)]


def test_patterns():
    for pattern, name, expected in MATCHES:
        assert sdboot.fnmatch(pattern, name) == bool(expected), (pattern, name)


def test_versions():
    # From the comment at strverscmp_improved(), the oldest first.
    ordered = ["122.1", "123~rc1-1", "123", "123-a", "123-a.1", "123-1", "123-1.1", "123^post1", "123.a-1", "123.1-1",
               "123a-1", "124-1"]
    for i, a in enumerate(ordered):
        for j, b in enumerate(ordered):
            equal((a, b, sdboot.compare_versions(a, b)), (a, b, (i > j) - (i < j)))
    for a, b, expected in (("", None, 0), ("a", "", 1), ("00123", "123", 0), ("123_a", "123a", 0), ("12", "9", 1),
                           ("1.0", "1", 1),
                           ("a~", "a", -1), ("0", "a", 1), ("abc", "abcde", -1), ("x-6.1.0-37", "x-6.1.0-9", 1)):
        equal((a, b, sdboot.compare_versions(a, b)), (a, b, expected))
        equal(sdboot.compare_versions(b, a), -expected)


def conf(**fields):
    return "".join(f"{key.rstrip('_').replace('_', '-')}  {value}\n" for key, value in {"linux": "/k", **fields}.items()).encode()


def ids(files, version=257, second=None, loader=sdboot.FALLBACK):
    found = sdboot.scan(Tree({"k": b"kernel", **files}), second and Tree({"k": b"kernel", **second}))
    return [entry.id for entry in sdboot.listed(found, version, loader) if entry.kind != "firmware"]


def taken(files, config=b"", version=257, **options):
    found = sdboot.scan(Tree({"k": b"kernel", "loader/loader.conf": config, **files}))
    entry = sdboot.choose(found, version, **options)
    return entry and entry.id


def entry_files(**files):
    return {f"loader/entries/{name}": content for name, content in files.items()}


def test_order():
    plain = {f"loader/entries/{name}.conf": conf() for name in ("a-1", "a-10", "a-9", "b")}
    equal(ids(plain), ["b.conf", "a-10.conf", "a-9.conf", "a-1.conf"])
    sorted_ = {"loader/entries/z.conf": conf(sort_key="arch", version="2"),
               "loader/entries/y.conf": conf(sort_key="arch", version="10"),
               "loader/entries/x.conf": conf(sort_key="arch", machine_id="1", version="99"),
               "loader/entries/w.conf": conf(sort_key="Arch")}
    equal(ids({**plain, **sorted_}), ["w.conf", "y.conf", "z.conf", "x.conf", "b.conf", "a-10.conf", "a-9.conf", "a-1.conf"])
    counted = {f"loader/entries/{name}.conf": conf() for name in ("a-10+0-3", "a-9+2-1", "a-9+3", "a-1", "a-10+bad", "c+1-")}
    equal(ids(counted), ["c+1-.conf", "a-10+bad.conf", "a-9.conf", "a-9.conf", "a-1.conf", "a-10.conf"])
    equal(ids(counted, 252), ["c+1-.conf", "a-10+bad.conf", "a-9+3.conf", "a-9+2-1.conf", "a-1.conf", "a-10+0-3.conf"])
    found = sdboot.scan(Tree({"k": b"", **counted}))
    equal([(e.left, e.done) for e in sdboot.listed(found)][2:4], [(3, 0), (2, 1)])
    equal(ids(plain, second={"loader/entries/c.conf": conf()})[0], "c.conf")


def test_listing():
    for version in sdboot.VERSIONS:
        files = {"loader/entries/.hidden.conf": conf(), "loader/entries/a.txt": conf(), "loader/entries/A.CONF": conf(),
                 "loader/entries/auto-x.conf": conf(), "loader/entries/no-kernel.conf": b"title x\ninitrd /i\n",
                 "loader/entries/missing.conf": conf(linux="/missing"), "loader/entries/arm.conf": conf(architecture="AA64"),
                 "loader/entries/x64.conf": conf(architecture="X64"), "loader/entries/unreadable.conf": None,
                 "loader/entries/self.conf": conf(linux="/k", efi="//EFI/BOOT\\bootx64.efi"), "EFI/BOOT/BOOTX64.EFI": loader(1),
                 "loader/entries/no-initrd.conf": conf(initrd="/missing"), "loader/entries/bare.conf": b"linux\n",
                 "loader/entries/AUTO-upper.conf": conf(), "EFI/Linux/no-osrel.efi": pe([(b".text", b"x")]),
                 "EFI/Linux/u.efi": uki(b"ID=arch\nIMAGE_VERSION=3\n"), "EFI/Linux/arm.efi": pe([(b".osrel", b"ID=x\n")], 0xaa64),
                 "EFI/Linux/nameless.efi": uki(b"VERSION_ID=3\n"), "EFI/Linux/cut.efi": uki(b"ID=x\n")[:200]}
        expected = ["u.efi", "x64.conf", "no-initrd.conf", "auto-upper.conf", "a.conf"]
        equal(ids(files, version), [e for e in expected if version == 252 or e != "auto-upper.conf"])
        equal("self.conf" in ids(files, version, loader=sdboot.INSTALLED), True)
    found = sdboot.scan(Tree({"k": b"", "loader/entries/a.conf": b"\xef\xbb\xbftitle x\n"
                              b"# no\n\toptions  a  b \r\noptions 'c'\nlinux k\n"
                              b"initrd //i1\ninitrd \\i2\ndevicetree d\nsort-key \"s\"\n\0options z\n"}))
    entry = sdboot.listed(found)[0]
    equal((entry.options, entry.files, entry.sort_key),
          ("a  b c", [("linux", "k"), ("initrd", "\\i1"), ("initrd", "\\i2"), ("devicetree", "d")], "s"))
    equal(sdboot.listed(found, 252)[0].options, "a  b 'c'")
    equal(sdboot.contents(entry)[1], ("initrd", "\\i1", None, "\\i1: no such file"))
    two = {"EFI/Linux/a.efi": uki(b"IMAGE_ID=m\nID=n\nVERSION_ID=2\nIMAGE_VERSION=10\n"),
           "EFI/Linux/b+3.efi": uki(b"ID=m\nVERSION_ID=9")}
    equal([(e.id, e.sort_key, e.version, e.left) for e in sdboot.listed(sdboot.scan(Tree(two)))[:2]],
          [("a.efi", "m", "10", -1), ("b.efi", "m", "9", 3)])
    profiles = pe([(b".osrel", b"ID=base\n"), (b".profile", b"ID=main\n"), (b".osrel", b"ID=main\n"), (b".profile", b"ID=2\n"),
                   (b".osrel", b"ID=second\n")])
    equal([e.sort_key for v in sdboot.VERSIONS for e in sdboot.listed(sdboot.scan(Tree({"EFI/Linux/p.efi": profiles})), v)[:1]],
          ["second", "main"])


def test_choice():
    both = {f"loader/entries/{name}.conf": conf() for name in ("arch", "Arch.LTS", "zen+0-3")}
    for version in sdboot.VERSIONS:
        equal(taken(both, version=version), "arch.lts.conf")
        equal(taken(both, b"timeout 3\ndefault ARCH.C*\n", version), "arch.conf")
        equal(taken(both, b"default arch.conf\ndefault none*\n", version), "arch.lts.conf")
        equal(taken(both, b"default arch.conf\ndefault @foo\n", version), "arch.conf")
        equal(taken(both, b"default @saved\n", version), "arch.lts.conf")
        equal(taken(both, b"#default arch.conf\n", version), "arch.lts.conf")
        equal(taken(both, b"default \"arch.conf\"\n", version), "arch.conf")
        equal(taken({}, version=version), "auto-reboot-to-firmware-setup")
        equal(taken({}, b"auto-firmware no\n", version), None)
        others = {"EFI/Microsoft/Boot/bootmgfw.efi": b"w", "shellx64.efi": b"s", "EFI/BOOT/BOOTX64.EFI": b"x"}
        equal(taken({**both, **others}, version=version), "arch.lts.conf")
        equal(taken({**both, **others}, b"default auto-w*\n", version), "auto-windows")
        equal(taken({**both, **others}, b"default auto-w*\nauto-entries 0\n", version), "arch.lts.conf")
        equal(taken(others, version=version), "auto-windows")
        equal(ids(others, version, loader=sdboot.INSTALLED)[-1], "auto-efi-default")
        equal(ids({**others, "EFI/BOOT/BOOTX64.EFI": loader(1)}, version, loader=sdboot.INSTALLED)[-1], "auto-efi-shell")
    # Only newer ones take an entry with a counter by the name without it, and then not if that has upper-case letters.
    counted = {"loader/entries/a+3.conf": conf(), "loader/entries/B+3.conf": conf(), "loader/entries/c.conf": conf()}
    equal([taken(counted, b"default a.conf\n", v) for v in sdboot.VERSIONS], ["c.conf", "a.conf"])
    equal([taken(counted, b"default b*.conf\n", v) for v in sdboot.VERSIONS], ["b+3.conf", "c.conf"])


# The log and its states

def test_log():
    for sector in (512, 4096):
        log = writelog.parse(make_log([(0, b"", writelog.FLUSH), (sector * 2, b"a" * sector * 3, 0),
                                       (0, b"b" * sector, writelog.FUA),
                                       (0, b"", writelog.FLUSH), (0, b"", writelog.FLUSH), (sector, b"x" * sector, writelog.MARK),
                                       (sector * 8, 4 * sector, writelog.DISCARD), (0, b"c" * sector, writelog.FLUSH),
                                       (0, b"d" * sector, 0)], sector))
        # How many writes a flush had made durable before each.
        after = [max(bound for bound in log.bounds if bound <= number) for number in range(len(log.writes))]
        equal([(w.offset, w.size, w.data and bytes(w.data[:1]), w.fua, durable) for w, durable in zip(log.writes, after)],
              [(2 * sector, 3 * sector, b"a", False, 0), (0, sector, b"b", True, 0), (8 * sector, 4 * sector, None, False, 2),
               (0, sector, b"c", False, 3), (0, sector, b"d", False, 3)])
        equal(log.bounds, [0, 2, 3, 5])
    part = writelog.parse(make_log([(0, b"a" * 512 + b"b" * 1024, 0), (4096, b"c" * 512, 0), (1024, b"d" * 1024, 0)]), 512, 1024)
    equal([(w.offset, bytes(w.data)) for w in part.writes], [(0, b"b" * 1024), (512, b"d" * 512)])
    good = make_log([(0, b"a" * 512, 0)])
    for bad in (b"", bytes(512), good[:-1], good[:600], good[:16] + b"\2" + good[17:], good[:24] + b"\1" + good[25:],
                good[:528] + b"\xff" + good[529:]):
        try:
            writelog.parse(bad)
            assert False, f"no error for {bad[:30]}"
        except writelog.BadLog:
            pass


def sample_log():
    data = [(n * 4096, bytes([n + 1]) * (512 if n % 3 == 0 else 4096), 0) for n in range(16)]
    data[9] = (*data[9][:2], writelog.FUA)
    for place in (12, 5, 5):
        data.insert(place, (0, b"", writelog.FLUSH))
    return writelog.parse(make_log(data))


def contents_of(image):
    """For each write of the sample, how many of its sectors are there."""
    return tuple(sum(image[n * 4096 + s * 512] == n + 1 for s in range(8)) for n in range(16))


def all_states(subsets=60, torn=1, seed=2):
    log, image = sample_log(), writelog.Image(bytearray(16 * 4096))
    wanted = writelog.states(log, random.Random(seed), subsets, torn)
    return log, image, [(what, contents_of(image)) for what in writelog.visit(image, log, wanted)]


FULL = [1 if n % 3 == 0 else 8 for n in range(16)]


def test_states():
    log, image, seen = all_states(300)
    equal(log.bounds, [0, 5, 12, 16])
    found = {state for _, state in seen}
    for count in range(17):
        assert tuple(FULL[:count] + [0] * (16 - count)) in found, f"no prefix of {count}"
        if count < 16 and FULL[count] == 8:
            torn = [s[count] for what, s in seen if s[:count] == tuple(FULL[:count]) and not any(s[count + 1:])]
            assert torn.count(4) >= 2, f"write {count} is not torn in both halves: {torn}"
    equal(contents_of(image), tuple(FULL))
    skipped = 0
    for what, state in seen:
        # What follows the first flush after which nothing more was written is absent, what precedes it is whole.
        last = max((n for n in range(16) if state[n]), default=0)
        epoch = max(bound for bound in log.bounds if bound <= last)
        equal((what, state[:epoch]), (what, tuple(FULL[:epoch])))
        # Of a write with FUA a later one says that it is there.
        assert last < 10 or state[9] == FULL[9], (what, state)
        skipped += any(not state[n] for n in range(epoch, last))
    assert skipped > 50, skipped
    for first, last in zip(log.bounds, log.bounds[1:]):
        inside = [s[first:last] for _, s in seen if any(s[first:last]) and not any(s[last:])]
        alone = [s for s in inside if sum(map(bool, s)) == (2 if first == 5 else 1) and s[-1]]
        assert alone and any(all(s[1:]) and not s[0] for s in inside), (first, last)
    assert not any(0 < state[n] < FULL[n] for _, state in all_states(torn=0)[2] for n in range(16))
    equal(all_states(300)[2], seen)
    assert all_states(300, seed=3)[2] != seen
    # A small epoch is tried in full.
    assert len({s[:5] for _, s in all_states(32, 0)[2]}) == 32


def test_states_that_change_nothing_are_skipped():
    log = writelog.parse(make_log([(0, b"a" * 512, 0), (512, bytes(512), 0), (0, b"a" * 512, 0), (1024, 1024, writelog.DISCARD),
                                   (1024, b"b" * 512, 0)]))
    image = writelog.Image(bytearray(4096))
    found = [what for what in writelog.visit(image, log, writelog.states(log, random.Random(1), 0))]
    equal(found, ["nothing written", "the first 1 writes", "the first 5 writes"])


def test_image():
    random_, image = random.Random(1), writelog.Image(bytearray(noise(1, 300000)))
    tracker = set()
    image.trackers.append(tracker)
    start, calls = bytes(image.data), []

    def compute():
        calls.append(1)
        return bytes(image[10000:20000])

    def value():
        found = image.memo("x", [(10000, 10000)], compute)
        assert found == bytes(image[10000:20000])
        return found
    value(), value()
    equal(len(calls), 1)
    for _ in range(50):
        mark, there = image.mark(), bytes(image.data)
        for _ in range(5):
            size = random_.randrange(1, 100000)
            image.write(random_.randrange(0, 200000), random_.randbytes(size) if random_.random() < 0.7 else size)
            value()
        image.rollback(mark)
        assert bytes(image.data) == there
        if random_.random() < 0.5:
            image.write(random_.randrange(0, 200000), b"new")
    image.rollback()
    assert bytes(image.data) == start and len(tracker) > 20
    count = len(calls)
    value()
    equal(len(calls), count)
    try:
        image.write(299999, b"ab")
        assert False, "wrote beyond the end"
    except writelog.BadLog:
        pass


# The oracle

OLD = {"/EFI/BOOT/BOOTX64.EFI": loader(1), "/EFI/systemd/systemd-bootx64.efi": loader(1),
       "/loader/loader.conf": b"default arch.conf\n",
       "/loader/entries/arch.conf": b"linux /vmlinuz-linux\ninitrd /initramfs-linux.img\noptions root=LABEL=a rw\n" + b"\n" * 400,
       "/vmlinuz-linux": noise(10, 90000), "/initramfs-linux.img": noise(11, 200000)}
NEW = {**OLD, "/EFI/BOOT/BOOTX64.EFI": loader(2), "/EFI/systemd/systemd-bootx64.efi": loader(2),
       "/vmlinuz-linux": noise(12, 95000), "/initramfs-linux.img": noise(13, 210000)}
ESP = oracle.Part(0, 40 * MIB)


def boots(files):
    return oracle.survey(oracle.Volumes(Tree({path[1:]: content for path, content in files.items()}), None))


def verdict(files, before=OLD, after=NEW, strict=False):
    state = oracle.Volumes(Tree({path[1:]: content for path, content in files.items()}), None)
    return oracle.judge(boots(before), boots(after), state, strict)


def says(problem, *words):
    assert problem and all(word in problem for word in words), problem


def test_oracle():
    equal([verdict(OLD), verdict(NEW), verdict({**OLD, "/other": b"x"})], [None, None, None])
    mixed = verdict({**OLD, "/vmlinuz-linux": NEW["/vmlinuz-linux"]})
    says(mixed, "arch.conf is neither the old nor the new", "vmlinuz-linux is new", "initramfs-linux.img is old")
    says(verdict({**OLD, "/initramfs-linux.img": b"x"}), "arch.conf: initrd \\initramfs-linux.img is neither old nor new")
    says(verdict({**OLD, "/initramfs-linux.img": None}), "initrd can't be read")
    says(verdict({path: c for path, c in OLD.items() if "initramfs" not in path}), "initrd can't be read")
    says(verdict({path: c for path, c in OLD.items() if "vmlinuz" not in path}), "auto-reboot-to-firmware-setup would be taken")
    says(verdict({**OLD, "/loader/entries/arch.conf": b""}), "auto-reboot-to-firmware-setup")
    says(verdict({path: c for path, c in OLD.items() if "EFI" not in path}), "BOOTX64.EFI is neither old nor new: it is missing")
    says(verdict({**OLD, "/EFI/systemd/systemd-bootx64.efi": b"x"}), "systemd-bootx64.efi is neither old nor new")
    equal(verdict({**OLD, "/EFI/systemd/systemd-bootx64.efi": loader(2)}), None)
    changed = OLD["/loader/entries/arch.conf"].replace(b"LABEL=a", b"LABEL=b")
    says(verdict({**OLD, "/loader/entries/arch.conf": changed}), "options are neither old nor new")
    # The new options with the old kernel, each of which is known.
    after = {**NEW, "/loader/entries/arch.conf": changed}
    equal(verdict(after, after=after), None)
    says(verdict({**OLD, "/loader/entries/arch.conf": changed}, after=after), "neither the old nor the new one")
    equal(verdict({**OLD, "/loader/entries/arch.conf": OLD["/loader/entries/arch.conf"].replace(b" rw\n", b" rw  \t\n")}), None)
    # Staged under other names, and the entry turned to them.
    staged = OLD["/loader/entries/arch.conf"].replace(b"/vmlinuz-linux", b"/staged/1")
    staged = staged.replace(b"/initramfs-linux.img", b"/staged/2")
    turned = {**OLD, "/loader/entries/arch.conf": staged, "/staged/1": NEW["/vmlinuz-linux"],
              "/staged/2": NEW["/initramfs-linux.img"]}
    equal(verdict(turned), None)
    says(verdict({**turned, "/staged/2": NEW["/initramfs-linux.img"][:-1]}), "initrd \\staged\\2 is neither")
    # One that was broken before is not good because it still is.
    broken = {**OLD, "/loader/entries/broken.conf": b"linux /vmlinuz-linux\ninitrd /none\n"}
    equal(verdict(broken, broken, broken), None)
    chosen = {**broken, "/loader/loader.conf": b"default broken.conf\n"}
    says(verdict(chosen, broken, broken), "broken.conf: the initrd can't be read")
    # Another whole entry is good enough, unless told otherwise; an unknown one isn't.
    rescue = {**OLD, "/rescue": b"rescue", "/loader/entries/rescue.conf": b"linux /rescue\n"}
    lost = {path: c for path, c in rescue.items() if "arch.conf" not in path}
    equal(verdict(lost, rescue, rescue), None)
    says(verdict(lost, rescue, rescue, strict=True), "is taken neither before nor after")
    says(verdict(lost), "rescue.conf is listed neither")
    shell = {"/shellx64.efi": b"s"}
    says(verdict({**lost, **shell, "/loader/entries/rescue.conf": b""}, {**rescue, **shell}), "auto-efi-shell")
    # Counters are not a part of what an entry is.
    counted = {path.replace("arch.conf", "arch+2-1.conf"): c for path, c in OLD.items()}
    equal(verdict(counted), None)
    # A boot loader that only the new one has may come late, one that only the old one has may go.
    less = {path: c for path, c in OLD.items() if "systemd-boot" not in path}
    equal([verdict(OLD, less, OLD), verdict(less, less, OLD), verdict(less, OLD, less), verdict(OLD, OLD, less)], [None] * 4)


def test_oracle_on_a_first_sync():
    for before in ({}, {"/data": b"x"}):
        equal(verdict({}, before), None)
        equal(verdict(NEW, before), None)
        equal(verdict({path: c for path, c in NEW.items() if "EFI" not in path}, before), None)
        part = {path: c for path, c in NEW.items() if "initramfs" not in path}
        says(verdict(part, before), "initrd can't be read")
        says(verdict({path: c for path, c in NEW.items() if "entries" not in path}, before), "auto-reboot-to-firmware-setup")
        # Firmware refuses a boot loader that ends too early, but not one with a hole.
        cut = {"/EFI/BOOT/BOOTX64.EFI": loader(2)[:10000]}
        equal(verdict({**part, "/EFI/systemd/systemd-bootx64.efi": None, **cut}, before), None)
        hole = {"/EFI/BOOT/BOOTX64.EFI": loader(2)[:9000] + bytes(500) + loader(2)[9500:]}
        says(verdict({**NEW, **hole}, before), "can be started, and is not the new one")
    # As long as there is a boot loader but nothing for it to boot, there is nothing to lose either.
    equal(verdict({}, {"/EFI/BOOT/BOOTX64.EFI": loader(1)}), None)


def point(image, name, entry):
    """Lets a directory entry name the clusters of another file."""
    offset = name_records(image, name)
    image.write(offset + 20, struct.pack("<H", entry.cluster >> 16))
    image.write(offset + 26, struct.pack("<HI", entry.cluster & 0xffff, entry.size))


def judged(before, after, image, fsck=True):
    scratches = [oracle.Scratch(image, ESP)] if fsck else []
    problem = oracle.judge_image(before, after, image, ESP, None, scratches)
    for scratch in scratches:
        scratch.close()
    return problem


def test_fsck_truncates_what_is_cross_linked():
    disk = Disk({**OLD, "/new": noise(12, 95000)})
    image = disk.image()
    before = oracle.survey(oracle.volumes(image, ESP))
    start = bytes(image.data)
    equal(judged(before, before, image), None)
    reader = Fat(image)
    # As in the middle of a rename: a second name, before the first one in the directory, for the same clusters.
    entry = reader.find("/initramfs-linux.img")
    point(image, b"NEW        ", entry)
    crossed = bytes(image.data)
    equal(Fat(image).read("/new"), OLD["/initramfs-linux.img"])
    equal(judged(before, before, image, fsck=False), None)
    problem = judged(before, before, image)
    # It cuts whichever comes second; if that is the other, nothing is wrong.
    second = [e.name for e in Fat(image).list() if e.name in ("new", "initramfs-linux.img")][1]
    if second == "new":
        equal(problem, None)
    else:
        says(problem, "after fsck", "initrd")
    assert bytes(image.data) == crossed
    image.rollback()
    assert bytes(image.data) == start
    # The other way round.
    point(image, b"INITRA~1IMG", reader.find("/new"))
    point(image, b"VMLINU~1   ", reader.find("/new"))
    twins = {**OLD, "/vmlinuz-linux": noise(12, 95000), "/initramfs-linux.img": noise(12, 95000)}
    equal(judged(boots(twins), boots(twins), image, fsck=False), None)
    says(judged(boots(twins), boots(twins), image), "after fsck")


def test_the_next_sync_can_begin():
    files = {**OLD, "/left/over": noise(13, 700)}
    image = Disk(files).image()
    # As in the middle of its removal: it is there still, and its cluster is free already.
    link(image, Fat(image).find("/left").cluster, 0)
    equal(judged(boots(files), boots(files), image), None)
    repairs, oracle.REPAIRS = oracle.REPAIRS, 1
    try:
        says(judged(boots(files), boots(files), image), "after fsck", "the next sync", "/left")
    finally:
        oracle.REPAIRS = repairs


def test_fsck_follows_the_image():
    """One scratch file through many states gives what a fresh one gives for each."""
    disk, random_ = Disk(OLD, 36), random.Random(5)
    image = disk.image()
    part = oracle.Part(0, 36 * MIB)
    before = oracle.survey(oracle.volumes(image, part))
    reader, scratch, outcomes = Fat(image), oracle.Scratch(image, part), set()
    for _ in range(25):
        for _ in range(random_.randrange(3)):
            link(image, random_.randrange(3, 700), random_.choice((0, 5, 0x0fffffff, 300)))
        fresh = oracle.Scratch(image, part)
        mark = image.mark()
        results = []
        for one in (scratch, fresh):
            problem = one.repair()
            results.append((problem, hash(bytes(image.data))))
            image.rollback(mark)
        equal(results[0], results[1])
        outcomes.add(results[0])
        fresh.close()
        image.rollback()
    scratch.close()
    assert len(outcomes) > 5, len(outcomes)
    image.write(0, bytes(512))
    says(judged(before, before, image), "the ESP can't be read")


def test_what_a_mount_writes_is_undone():
    rng = random.Random(8)
    image = writelog.Image(bytearray(rng.randbytes(6 * MIB)))
    scratch = trees.Scratch(image, oracle.Part(MIB, 4 * MIB))
    scratch.mapped[0:9000], scratch.mapped[2 * MIB:2 * MIB + 5] = bytes(9000), b"other"
    image.write(3 * MIB + 70000, b"meanwhile")
    scratch.restore()
    scratch.follow()
    assert scratch.mapped[:] == image[MIB:5 * MIB]
    scratch.close()


def test_an_xbootldr_partition():
    on_esp = {path: content for path, content in OLD.items() if "EFI" in path or "loader.conf" in path}
    esp, rest = oracle.Part(MIB, 36 * MIB), {path: content for path, content in OLD.items() if path not in on_esp}
    for kind in ("fat", "ext"):
        second = oracle.Part(37 * MIB, 36 * MIB, kind)
        if kind == "fat":
            content = Disk(rest, 36).bytes()
        else:
            with tempfile.TemporaryDirectory() as tmp:
                for path, data in rest.items():
                    (Path(tmp, "tree") / path[1:]).parent.mkdir(parents=True, exist_ok=True)
                    (Path(tmp, "tree") / path[1:]).write_bytes(data)
                sh("mke2fs", "-q", "-t", "ext4", "-d", Path(tmp, "tree"), Path(tmp, "image"), "36M")
                content = Path(tmp, "image").read_bytes()
        image = writelog.Image(bytearray(MIB) + bytearray(Disk(on_esp, 36).bytes()) + bytearray(content))
        before = oracle.survey(oracle.volumes(image, esp, second))
        equal(([s.name for s in before.systems], before.taken), (["arch.conf"], before.systems))
        equal(oracle.judge_image(before, before, image, esp, second), None)
        image.write(bytes(image.data).index(OLD["/initramfs-linux.img"][:512]) + 5, b"other")
        problem = oracle.judge_image(before, before, image, esp, second)
        says(problem, "arch.conf: initrd \\initramfs-linux.img is neither old nor new")
        image.rollback()
        image.write(second.start, 36 * MIB)
        says(oracle.judge_image(before, before, image, esp, second), "auto-reboot-to-firmware-setup would be taken")
        image.rollback()
        equal(oracle.judge_image(before, before, image, esp, second), None)


def fixed_names():
    """As cp does: one file after the other, in place."""
    disk = Disk(OLD)
    disk.step({"/vmlinuz-linux": NEW["/vmlinuz-linux"]})
    disk.step({"/initramfs-linux.img": NEW["/initramfs-linux.img"]})
    return disk


def staged_names():
    """Beside the old files, to which nothing refers until an entry of one sector is overwritten."""
    old = OLD["/loader/entries/arch.conf"]
    turned = old.replace(b"/vmlinuz-linux", b"/new-l").replace(b"/initramfs-linux.img", b"/new-i").ljust(len(old), b"\n")
    disk = Disk(OLD)
    disk.step({"/new-l": NEW["/vmlinuz-linux"], "/new-i": NEW["/initramfs-linux.img"]})
    disk.overwrite("/loader/entries/arch.conf", turned)
    disk.step({"/vmlinuz-linux": NEW["/vmlinuz-linux"]})
    disk.step({"/initramfs-linux.img": NEW["/initramfs-linux.img"]})
    disk.overwrite("/loader/entries/arch.conf", old)
    disk.step(None, ["mdel", "::/new-l"], ["mdel", "::/new-i"])
    return disk


def proven(disk, **options):
    image = writelog.Image(bytearray(disk.base))
    count, faults = oracle.prove(image, disk.log(), ESP, **options)
    assert bytes(image.data) == disk.bytes()
    return count, faults


def test_a_safe_order_is_proven():
    for fsck in (False, True):
        count, faults = proven(staged_names(), subsets=12, fsck=fsck)
        equal((count > 60, faults[:3]), (True, []))


def test_an_unsafe_order_is_found():
    count, faults = proven(fixed_names(), subsets=10, fsck=False)
    assert count > 20 and len(faults) > count / 2, (count, len(faults))
    problems = " ".join(problem for _, problem in faults)
    assert "as a whole" in problems, problems
    # Without the flush before the entry is turned, no order of the writes is sure.
    disk = staged_names()
    flush = next(n for n, entry in enumerate(disk.entries) if entry[2])
    del disk.entries[flush]
    assert proven(disk, subsets=60, fsck=False)[1]


def all_looks():
    """What the generations of the small root look like; None without the right to make what is in them."""
    found = []
    for number in range(1, roots.GENERATIONS + 1) if os.geteuid() == 0 else ():
        with tempfile.TemporaryDirectory() as top:
            roots.write(roots.generation(number, roots.UUID, ""), top)
            found.append(trees.look(top))
    return found


def test_each_difference_of_two_trees_is_seen():
    if os.geteuid():
        return
    nodes = roots.generation(1, roots.UUID, "")

    def again(path, change):
        """With the old time."""
        before = os.lstat(path)
        change(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns), follow_symlinks=False)

    def relink(path):
        os.unlink(path)
        os.symlink("elsewhere", path)

    def part(path):
        content = Path(path).read_bytes()
        os.unlink(path)
        Path(path).write_bytes(content)
        os.chmod(path, 0o755)

    git = "usr/libexec/git-add"
    for path, change, said in (
        ("etc/hostname", lambda p: Path(p).write_bytes(b"Pair\n"), "etc/hostname differs in content"),
        ("etc/hostname", lambda p: os.chmod(p, 0o4644), "etc/hostname differs in mode"),
        ("etc/hostname", lambda p: os.chown(p, 0, 1), "etc/hostname differs in owner"),
        ("etc/hostname", lambda p: os.setxattr(p, "user.x", b""), "etc/hostname differs in attributes"),
        ("var/acl/file", lambda p: os.setxattr(p, "user.long", b""), "var/acl/file differs in attributes"),
        ("var/acl", lambda p: os.removexattr(p, "system.posix_acl_default"), "var/acl differs in attributes"),
        ("usr/libexec/pong", lambda p: os.removexattr(p, "security.capability"), "usr/libexec/pong differs in attributes"),
        ("bin", relink, "bin differs in content"),
        ("bin", lambda p: os.chown(p, 1, 0, follow_symlinks=False), "bin differs in owner"),
        (git, part, f"{git} differs in names"),
        (git, lambda p: os.link(p, f"{p}2"), f"{git} differs in names"),
    ):
        with tempfile.TemporaryDirectory() as top:
            roots.write(nodes, top)
            before = trees.look(top)
            again(f"{top}/{path}", change)
            problem = trees.unlike({p: thing for p, thing in trees.look(top).items() if p == path}, {path: before[path]})
            equal(problem, said)
    with tempfile.TemporaryDirectory() as top:
        roots.write(nodes, top)
        before = trees.look(top)
        equal(trees.unlike(trees.look(top), before), None)
        os.utime(f"{top}/bin", ns=(0, 1), follow_symlinks=False)
        equal(trees.unlike(trees.look(top), before), "bin differs in time")
        before.pop(".")
        os.unlink(f"{top}/bin")
        equal(trees.unlike({p: thing for p, thing in trees.look(top).items() if p != "."}, before), "bin is missing")
        os.mkdir(f"{top}/bin")
        equal(trees.unlike({"bin": trees.look(top)["bin"]}, {"bin": before["bin"]}), "bin differs in kind, mode, time, content")
        os.mkdir(f"{top}/.dualroot")
        Path(f"{top}/.dualroot/x").touch()
        Path(f"{top}/all").touch()
        equal(trees.unlike({p: thing for p, thing in trees.look(top).items() if p not in (".", "bin")}, before), "all is there")


def test_generations_differ_as_rsync_sees_it():
    for number in range(1, roots.GENERATIONS):
        one, other = (roots.generation(n, roots.UUID, "") for n in (number, number + 1))
        for path in one.keys() & other.keys():
            if one[path].kind == other[path].kind == "file" and one[path].data != other[path].data:
                assert (len(one[path].data), one[path].time) != (len(other[path].data), other[path].time), path


def test_a_tree_of_two_generations_is_none():
    for old, new in zip(all_looks(), all_looks()[1:]):
        equal((trees.judge(old, [old, new]), trees.judge(new, [old, new])), (None, None))
        says(trees.judge(new, [old]), "not old: ")
        tried = 0
        for path in sorted(old.keys() | new.keys()):
            for one, other in ((old, new), (new, old)):
                mixed = {p: thing for p, thing in one.items() if p != path} | {p: other[p] for p in (path,) if p in other}
                allowed = path in trees.APART or path.startswith(trees.MODULES + "/") and path not in one
                if trees.parted(mixed) != trees.parted(one):
                    equal(trees.judge(mixed, [old, new]) is None, allowed)
                    tried += 1
        assert tried > 150, tried


def test_an_entry_boots_the_generation_of_its_kernel():
    equal(generations.booted("quiet root=UUID=1 rootflags=noatime,subvol=dualroot/2 generation=3"), ["UUID=1", "dualroot/2", "3"])
    equal(generations.booted("root=UUID=1 rootflags=noatime"), ["UUID=1", None, None])
    if os.geteuid():
        return
    System = collections.namedtuple("System", "options")

    def boots(subvolume, number):
        return System(f"root=UUID={roots.UUID} rootflags=subvol={subvolume} ro generation={number}")
    looks = {str(number): tree for number, tree in enumerate(all_looks(), 1)}
    with tempfile.NamedTemporaryFile(suffix=".btrfs") as file:
        roots.make("btrfs", file.name, 256, str(uuid.uuid4()))
        with trees.mounted(file.name, "btrfs") as place:
            (place / "dualroot").mkdir()
            for number in (1, 2):
                subprocess.run(["btrfs", "-q", "subvolume", "create", place / f"dualroot/{number}"], check=True)
                (place / f"dualroot/{number}").chmod(0o700)
                roots.write(roots.generation(number, roots.UUID, ""), place / f"dualroot/{number}")
                line = f"root=UUID={roots.UUID} rootflags=subvol=dualroot/{number} ro generation={number}\n"
                (place / f"dualroot/{number}/etc/kernel/cmdline").write_text(line)
            both = [boots("dualroot/1", 1), boots("dualroot/2", 2)]
            equal(generations.judge(both, place, looks), None)
            says(generations.judge([boots("dualroot/1", 2)], place, looks), "boots dualroot/1 as generation 2", "differs")
            says(generations.judge([boots("dualroot/3", 3)], place, looks), "no subvolume")
            says(generations.judge([boots("dualroot", 1)], place, looks), "no subvolume")
            (place / "dualroot/2/var/empty").chmod(0o777)
            says(generations.judge(both, place, looks), "boots dualroot/2", "var/empty differs in mode")


def test_what_comes_after_a_tree_may_be_of_the_other_generation():
    for old, new in zip(all_looks()[:1], all_looks()[1:2]):
        fstab, module = "etc/fstab", next(path for path in sorted(old) if path.endswith(".ko"))
        equal(trees.judge(new | {fstab: old[fstab]}, [old, new]), None)
        equal(trees.judge(new | {fstab: old[fstab]._replace(time=1)}, [old, new]), None)
        says(trees.judge(new | {fstab: old[fstab]._replace(content=(1, ""))}, [old, new]), "etc/fstab is of no generation")
        says(trees.judge({p: t for p, t in new.items() if p != fstab}, [old, new]), "etc/fstab is of no generation")
        equal(trees.judge(new | {"etc/.dualroot-fstab.new": old[fstab]}, [old, new]), None)
        says(trees.judge(new | {"var/.dualroot-fstab.new": old[fstab]}, [old, new]), "var/.dualroot-fstab.new is there")
        equal(trees.judge(new | {module: old[module]}, [old, new]), None)
        says(trees.judge(new | {module: old[module]._replace(content=(1, ""))}, [old, new]), f"{module} is there")
        says(trees.judge({p: t for p, t in old.items() if p != module}, [old, new]), f"not old: {module} is missing")
        above = os.path.dirname(module)
        equal((stat.S_ISDIR(old[above].kind), trees.judge(new | {above: old[above]._replace(time=1)}, [old, new])), (True, None))


def test_a_log_is_clipped_to_a_partition():
    writes = [writelog.Write(at, 512, b"x" * 512, False) for at in (0, 1024, 4096, 2048, 0)]
    log = trees.clipped(writelog.Log(writes, [0, 1, 3, 4, 5]), 1024, 2048)
    equal(([write.offset for write in log.writes], log.bounds), ([0, 1024], [0, 1, 2]))


def test_no_superblock_is_torn():
    def kept(fstype, *extra):
        return len(list(trees.whole_superblocks([writelog.State("", 0, extra)], fstype)))
    equal([kept("ext4", (0, bytes(size))) for size in (512, 1024, 1536, 2048, 4096)], [1, 1, 0, 1, 1])
    equal([kept("ext4", (at, 512)) for at in (512, 1024, 1536, 2048)], [1, 0, 0, 1])
    equal([kept("btrfs", (64 << 10, bytes(size))) for size in (2048, 4096)], [0, 1])
    equal(kept("btrfs", (0, 512), ((64 << 20) + 512, bytes(512))), 0)


def main():
    passed = failed = 0
    for name, test in list(globals().items()):
        if not name.startswith("test_") or sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        title, begun = name[5:].replace("_", " "), time.monotonic()
        try:
            test()
            passed += 1
            print(f"ok   {title} ({time.monotonic() - begun:.1f} s)", flush=True)
        except Exception as problem:
            failed += 1
            line = problem.__traceback__.tb_next.tb_lineno
            print(f"FAIL {title}: {type(problem).__name__} in line {line}: {problem}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
