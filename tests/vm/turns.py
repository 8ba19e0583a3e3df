"""Which cases run: those of the core always, the others in turn, as many as there are minutes for."""

import json
import random

# Own roots, a shared one, a second disk for a machine with one, and what goes wrong other than the power.
CORE = ("own-esp-12", "shared-btrfs-12", "one-btrfs-12", "faults")
# The minutes that each case takes beside two others, on two processors without KVM.
MINUTES = {
    "own-esp-12": 12, "own-esp-13": 17, "own-xbootldr-12": 10, "own-xbootldr-13": 13, "own-btrfs-12": 11, "own-btrfs-13": 15,
    "shared-btrfs-12": 12, "shared-btrfs-13": 17, "one-btrfs-12": 5, "one-btrfs-12-killed": 4, "one-btrfs-12-third": 8,
    "one-ext4-13": 14, "one-luks-12": 8, "one-luks-13": 8, "one-xfs-13": 8, "one-shared-btrfs-12": 8, "one-shared-btrfs-13": 10,
    "faults": 5,
}


def ends(minutes, jobs):
    """When the last of these cases ends, if each begins, in this order, as soon as one of so many machines is free."""
    free = [0.0] * jobs
    for length in minutes:
        free.sort()
        free[0] += length
    return max(free)


def longest_first(names, lengths):
    return sorted(names, key=lambda name: (-lengths[name], name))


def draw(lengths, core, minutes, jobs, seed):
    """The cases that run, the longest first, and those that are left out this time. `lengths` has the minutes that each case takes."""
    chosen, left_out = longest_first(core, lengths), []
    others = sorted(set(lengths) - set(core))
    random.Random(seed).shuffle(others)
    for name in others:
        tried = longest_first([*chosen, name], lengths)
        if ends([lengths[case] for case in tried], jobs) <= minutes:
            chosen = tried
        else:
            left_out.append(name)
    return chosen, left_out


class Memory:
    """How many minutes each case took here the last time, beside so many others at a time: a file in the cache."""

    def __init__(self, path, jobs):
        self.path, self.jobs = path, str(jobs)
        try:
            self.known = json.loads(path.read_text())
        except (OSError, ValueError):
            self.known = {}

    def lengths(self):
        return MINUTES | {name: took for name, took in self.known.get(self.jobs, {}).items() if name in MINUTES}

    def keep(self, took):
        self.known.setdefault(self.jobs, {}).update({name: round(minutes, 1) for name, minutes in took.items()})
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.known, indent=1, sort_keys=True))
        fresh.replace(self.path)
