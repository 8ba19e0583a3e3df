"""Recognises on a guest's console that its kernel has died, which is no verdict on the product."""

import re

# The kernel's own lines have nothing between the time and the text; those of services have their names there.
TIME = r"\[ *\d+\.\d{6}\] "
# A lockup is no fault: the machine that emulates the guest was busy. Neither is a panic because of init or the root: a spare that was
# made wrong ends like that.
FAULT = re.compile(TIME + r"(BUG: (?!soft lockup|workqueue lockup)[^\n]*|kernel BUG at [^\n]*|[\w ,:-]+: [0-9a-f]{4} \[#\d+\][^\n]*|"
                   r"Kernel panic - not syncing: (?!Attempted to kill init|No working init|Requested init|VFS: )[^\n]*)")
PLACE = re.compile(TIME + r"RIP: \w+:([\w.]+)\+0x")


def death(text):
    """The first fault inside the kernel, in one line, or None."""
    text = text.replace("\r", "")
    fault = FAULT.search(text)
    if not fault:
        return None
    place = PLACE.search(text, fault.end())
    return fault[1].strip() + (f", in {place[1]}" if place else "")


class Silent(Exception):
    """The guest agent stopped answering."""


def lost(name, directory, error):
    """Why a case, which may have ended with an error, is no verdict on the product, or None. The logs of its guests' consoles are in the
    directory, at any depth."""
    for log in sorted(directory.rglob("serial-*.log")):
        fault = death(log.read_text(errors="replace"))
        if fault:
            return f"guest kernel died ({name}: {fault})"
    return f"guest agent stopped answering ({name}: {error})" if isinstance(error, Silent) else None
