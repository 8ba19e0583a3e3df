"""Which entry systemd-boot takes when nobody presses a key, and no variable of the firmware says otherwise.

Follows the source of systemd: src/boot/efi/boot.c of v252, src/boot/boot.c of v257. Where the two differ, `version` says which is
meant. A file system is anything with exists(path), list(path) that gives things with `name` and `directory`, read(path, offset,
size) and digest(path), which raise fat.Unreadable.
"""

import collections
import functools
import re
import struct

from fat import Unreadable

VERSIONS = (252, 257)
FALLBACK, INSTALLED = "/EFI/BOOT/BOOTX64.EFI", "/EFI/systemd/systemd-bootx64.efi"
INT_MAX = (1 << 31) - 1
# Nothing but ASCII has a lower case there.
LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}

# `name` is the id without a boot counter; `files` are (role, path) on the file system `fs`.
Entry = collections.namedtuple("Entry", "kind id name fs options files sort_key machine version left done")
# What the file systems hold: the content of loader.conf, (fs, file name, lines of the file) of type 1, (fs, file name, sections)
# of type 2.
Found = collections.namedtuple("Found", "esp xbootldr config type1 type2")


def lower(text):
    return text.translate(LOWER)


def text(raw):
    return raw.split(b"\0", 1)[0].decode("utf-8", "ignore")


@functools.lru_cache(1000)
def pairs(content, separators, quotes):
    """The keys and values of a file, as line_get_key_value() sees them."""
    found = []
    for line in re.split(b"[\n\r]+", content.split(b"\0", 1)[0]):
        line = line.strip(b" \t")
        match = re.fullmatch(b"([^%b]*)[%b]+(.*)" % (separators, separators), line, re.DOTALL)
        if line.startswith(b"#") or not match:
            continue
        key, value = match.groups()
        if value[:1] and value[:1] in quotes and value[-1:] == value[:1]:
            value = value[1:-1]
        found.append((text(key), text(value)))
    return found


def efi_path(value):
    return re.sub(r"\\+", r"\\", value.replace("/", "\\"))


def counter(name, suffix):
    """(prefix, suffix, tries left, tries done) of a name with a boot counter, or None."""
    match = re.fullmatch(r"(.*)\+([0-9]+)(?:-([0-9]+))?(" + re.escape(suffix) + ")", name, re.IGNORECASE | re.DOTALL)
    if not match or max(int(match[2]), int(match[3] or 0)) > INT_MAX:
        return None
    return match[1], match[4], int(match[2]), int(match[3] or 0)


def names(file, suffix, version):
    """(id, id without counter, tries left, tries done). For 257 the counter isn't part of the id, which then keeps its case."""
    found = counter(file, suffix)
    if not found:
        return lower(file), lower(file), -1, -1
    prefix, ending, left, done = found
    return lower(file) if version < 253 else prefix + ending, lower(prefix + ending), left, done


def tokens(pattern):
    """The parts of a pattern between its asterisks, as lists of what a character may be: a list of ranges, or None for
    anything."""
    parts, position = [[]], 0
    while position < len(pattern):
        c = pattern[position]
        position += 1
        if c == "*":
            parts.append([])
        elif c == "?":
            parts[-1].append(None)
        elif c == "\\":
            if position == len(pattern):
                return None
            parts[-1].append([(pattern[position],) * 2])
            position += 1
        elif c == "[":
            ranges, first, can_range = [], True, True
            while True:
                if position >= len(pattern):
                    return None
                c = pattern[position]
                if c == "\\":
                    position += 1
                    if position >= len(pattern):
                        return None
                    ranges.append((pattern[position],) * 2)
                    can_range = True
                elif c == "]" and not first:
                    position += 1
                    break
                elif c == "-" and can_range and not first and pattern[position + 1:position + 2] != "]":
                    low = pattern[position - 1]
                    position += 1
                    if pattern[position:position + 1] == "\\":
                        position += 1
                    if position >= len(pattern):
                        return None
                    ranges.append((low, pattern[position]))
                    can_range = False
                else:
                    ranges.append((c, c))
                    can_range = True
                position += 1
                first = False
            parts[-1].append(ranges)
        else:
            parts[-1].append([(c, c)])
    return parts


def fnmatch(pattern, name):
    """efi_fnmatch(): a pattern of the shell, in which an exclamation mark means nothing, and an open bracket matches nothing."""
    parts = tokens(pattern)
    if parts is None:
        return False

    def fits(part, start):
        return 0 <= start <= len(name) - len(part) and all(
            ranges is None or any(low <= c <= high for low, high in ranges) for ranges, c in zip(part, name[start:]))

    if len(parts) == 1:
        return len(name) == len(parts[0]) and fits(parts[0], 0)
    if not fits(parts[0], 0):
        return False
    position = len(parts[0])
    for part in parts[1:-1]:
        while position <= len(name) and not fits(part, position):
            position += 1
        if position > len(name):
            return False
        position += len(part)
    last = len(name) - len(parts[-1])
    return last >= position and fits(parts[-1], last)


def compare(a, b):
    return (a > b) - (a < b)


def compare_versions(a, b):
    """strverscmp_improved()."""
    digits, letters = re.compile(r"[0-9]*"), re.compile(r"[A-Za-z]*")
    a, b = a or "", b or ""
    while True:
        a, b = re.sub(r"^[^0-9A-Za-z~^.-]+", "", a), re.sub(r"^[^0-9A-Za-z~^.-]+", "", b)
        for separator in "~-^.":
            if separator == "-" and not (a and b):
                return compare(a, b)
            if a.startswith(separator) or b.startswith(separator):
                order = compare(not a.startswith(separator), not b.startswith(separator))
                if order:
                    return order
                a, b = a[1:], b[1:]
        kind = digits if a[:1].isdecimal() or b[:1].isdecimal() else letters
        x, y = kind.match(a)[0], kind.match(b)[0]
        if kind is digits:
            key_x, key_y = ((bool(s), len(s.lstrip("0")), s.lstrip("0")) for s in (x, y))
        else:
            shorter = min(len(x), len(y))
            key_x, key_y = (x[:shorter], len(x)), (y[:shorter], len(y))
        if key_x != key_y:
            return compare(key_x, key_y)
        a, b = a[len(x):], b[len(y):]


def compare_entries(a, b):
    """boot_entry_compare(). An absent string comes before any that is there."""
    keys = [lambda e: e.left == 0, lambda e: e.sort_key is None]
    for key in keys:
        order = compare(key(a), key(b))
        if order:
            return order
    if a.sort_key is not None:
        machines = [(e.machine is not None, e.machine or "") for e in (a, b)]
        order = compare(a.sort_key, b.sort_key) or compare(*machines) or -compare_versions(a.version, b.version)
        if order:
            return order
    order = -compare_versions(a.id, b.id)
    if order or a.left < 0 or b.left < 0:
        return order
    return -compare(a.left, b.left) or compare(a.done, b.done)


def sort(entries):
    """An insertion sort, as there: it matters where the comparison isn't transitive, as with foo.conf beside foo+3.conf."""
    ordered = []
    for entry in entries:
        place = len(ordered)
        while place and compare_entries(ordered[place - 1], entry) > 0:
            place -= 1
        ordered.insert(place, entry)
    return ordered


def sections(fs, path):
    """(name, virtual size, raw size, offset) of the sections of a PE file for x86-64, or None if it is none."""
    try:
        dos = fs.read(path, 0, 64)
        if len(dos) < 64 or dos[:2] != b"MZ":
            return None
        start, = struct.unpack_from("<I", dos, 60)
        head = fs.read(path, start, 96)
        if len(head) < 96 or head[:4] != b"PE\0\0":
            return None
        machine, count, optional = struct.unpack_from("<HH12xH", head, 4)
        if machine != 0x8664 or not count or struct.unpack_from("<H", head, 24)[0] not in (0x10b, 0x20b):
            return None
        table = fs.read(path, start + 24 + optional, count * 40)
    except Unreadable:
        return None
    if len(table) < count * 40:
        return None
    return [struct.unpack_from("<8sI4xII", table, number * 40) for number in range(count)]


def section(fs, path, table, name, version):
    """The content of a section of a PE file, or None."""
    found = None
    for title, virtual, raw, offset in table:
        if version < 253 and title.startswith(name):
            found = (offset, virtual)
        elif version >= 253 and title.rstrip(b"\0") == name and not found:
            found = (offset, min(raw, virtual))
    if not found or not found[1]:
        return None
    try:
        content = fs.read(path, *found)
    except Unreadable:
        return None
    return content


def listing(fs, directory, suffix):
    """The files in a directory that may be entries, in its own order."""
    try:
        there = fs.list(directory)
    except Unreadable:
        return []
    files = [item.name for item in there if not item.directory and not item.name.startswith(".")]
    return [name for name in files if lower(name).endswith(suffix)]


def hidden(name, version):
    return (name if version < 253 else lower(name)).startswith("auto-")


def content(fs, path):
    try:
        return fs.read(path)
    except Unreadable:
        return None


def scan(esp, xbootldr=None):
    """Reads what all versions of sd-boot look at."""
    found = Found(esp, xbootldr, content(esp, "/loader/loader.conf") or b"", [], [])
    for fs in [esp] + [xbootldr] * (xbootldr is not None):
        for name in listing(fs, "/EFI/Linux", ".efi"):
            table = sections(fs, f"/EFI/Linux/{name}")
            if table:
                found.type2.append((fs, name, table))
        # One that can't be read is passed over.
        for name in listing(fs, "/loader/entries", ".conf"):
            raw = content(fs, f"/loader/entries/{name}")
            if raw is not None:
                found.type1.append((fs, name, raw))
    return found


def type1(found, fs, file, raw, version, loader):
    kind, start, options, initrds, tree, fields = None, None, None, [], None, {}
    for key, value in pairs(raw, b" \t", b'"' if version < 253 else b"\"'"):
        if key in ("sort-key", "machine-id", "version"):
            fields[key] = value
        elif key in ("linux", "efi"):
            kind, start = key, efi_path(value)
            # An entry for the running boot loader itself.
            if key == "efi" and fs is found.esp and lower(start) == lower(efi_path(loader)):
                return None
        elif key == "architecture" and lower(value) != "x64":
            return None
        elif key == "devicetree":
            tree = efi_path(value)
        elif key == "initrd":
            initrds.append(efi_path(value))
        elif key == "options":
            options = value if options is None else f"{options} {value}"
    # Of the files only this one is looked for, and it is not read. An initrd that isn't there is noticed after the choice, and
    # ends the boot (initrd_prepare(), image_start(), run()).
    if not kind or not fs.exists(start):
        return None
    files = [(kind, start)] + [("initrd", path) for path in initrds if kind == "linux"]
    files += [("devicetree", tree)] * (tree is not None)
    identity, name, left, done = names(file, ".conf", version)
    return Entry("type1", identity, name, fs, (options or "").rstrip(), files, fields.get("sort-key"), fields.get("machine-id"),
                 fields.get("version"), left, done)


def type2(fs, file, table, version):
    """Only the first profile of a unified kernel image, which comes before its others."""
    path = f"/EFI/Linux/{file}"
    base = table
    profiles = [number for number, row in enumerate(table) if row[0].rstrip(b"\0") == b".profile"]
    if version >= 253 and profiles:
        stop = profiles[1] if len(profiles) > 1 else len(table)
        base = table[profiles[0]:stop] + table[:profiles[0]]
    release = section(fs, path, base, b".osrel", version)
    if release is None:
        return None
    values = dict(pairs(release, b"=", b'"' if version < 253 else b"\"'"))
    if not any(key in values for key in ("PRETTY_NAME", "IMAGE_ID", "NAME", "ID")):
        return None
    good_version = next((values[key] for key in ("IMAGE_VERSION", "VERSION", "VERSION_ID", "BUILD_ID") if key in values), None)
    identity, name, left, done = names(file, ".efi", version)
    # Its command line is a part of the file.
    sort_key = values.get("IMAGE_ID", values.get("ID"))
    return Entry("type2", identity, name, fs, "", [("uki", path)], sort_key, None, good_version, left, done)


def automatic(found, version, loader):
    """The entries that sd-boot makes up, and puts after all others."""
    def entry(kind, name, fs, files):
        return Entry(kind, name, name, fs, "", files, None, None, None, -1, -1)

    def is_sdboot(path):
        magic = section(found.esp, path, sections(found.esp, path) or [], b".sdmagic", version)
        return magic is not None and magic.startswith(b"#### LoaderInfo: systemd-boot ")

    switches = {key: value for key, value in pairs(found.config, b" \t", b'"') if key.startswith("auto-")}
    off = ("0", "no", "n", "false", "f", "off")
    if switches.get("auto-entries") not in off:
        places = [("auto-osx", "\\System\\Library\\CoreServices\\boot.efi", [found.esp, found.xbootldr]),
                  ("auto-windows", "\\EFI\\Microsoft\\Boot\\bootmgfw.efi", [found.esp]),
                  ("auto-efi-shell", "\\shellx64.efi", [found.esp])]
        itself = lower(efi_path(loader)) == lower(efi_path(FALLBACK))
        if not itself and not is_sdboot(FALLBACK) and not is_sdboot("/EFI/BOOT/GRUBX64.EFI"):
            places.append(("auto-efi-default", efi_path(FALLBACK), [found.esp]))
        for name, path, systems in places:
            there = [fs for fs in systems if fs is not None and fs.exists(path)]
            if there:
                yield entry("auto", name, there[0], [("efi", path)])
    if switches.get("auto-firmware") not in off:
        yield entry("firmware", "auto-reboot-to-firmware-setup", found.esp, [])


def listed(found, version=257, loader=FALLBACK):
    """The entries, in the order of the menu."""
    def on(fs):
        unified = (type2(*item, version) for item in found.type2 if item[0] is fs and not hidden(item[1], version))
        files = (type1(found, *item, version, loader) for item in found.type1 if item[0] is fs and not hidden(item[1], version))
        return [entry for entry in [*unified, *files] if entry]
    there = on(found.esp) + (on(found.xbootldr) if found.xbootldr is not None else [])
    return sort(there) + list(automatic(found, version, loader))


def choose(found, version=257, loader=FALLBACK):
    """The entry that is taken, or None if there is none at all."""
    entries = listed(found, version, loader)
    pattern = None
    for key, value in pairs(found.config, b" \t", b'"' if version < 253 else b"\"'"):
        if key == "default" and (not value.startswith("@") or lower(value) == "@saved"):
            pattern = lower(value)
    if pattern is not None and pattern != "@saved":
        for entry in entries:
            if fnmatch(pattern, entry.id):
                return entry
    return next((entry for entry in entries if entry.kind in ("type1", "type2")), entries[0] if entries else None)


def contents(entry):
    """(role, path, hash or None, problem or None) of the files that an entry needs."""
    found = []
    for role, path in entry.files:
        try:
            found.append((role, path, entry.fs.digest(path), None))
        except Unreadable as problem:
            found.append((role, path, None, str(problem)))
    return found
