"""Tests of what tests/vm/run makes of its cases: which run, and whether a guest that died is a verdict."""

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import run
import turns
from console import Silent, death

# As consoles of guests had them, without what stands between these lines.
OOPS = """\
[  105.144100] BUG: kernel NULL pointer dereference, address: 0000000000000000\r
[  105.144492] #PF: supervisor read access in kernel mode\r
[  105.146961] Oops: 0000 [#1] PREEMPT SMP NOPTI\r
[  105.147206] CPU: 0 PID: 27 Comm: kworker/u2:2 Not tainted 6.1.0-55-cloud-amd64 #1  Debian 6.1.192-1\r
[  105.151165] RIP: 0010:ext4_mb_load_buddy_gfp+0xbc/0x380\r
"""
NO_ROOT = """\
[    4.345367] VFS: Cannot open root device "vda2" or unknown-block(0,0): error -6\r
[    4.345949] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r
[    4.346397] CPU: 0 PID: 1 Comm: swapper/0 Not tainted 6.1.0-55-cloud-amd64 #1  Debian 6.1.192-1\r
[    4.367021] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0) ]---\r
"""


def test_a_fault_in_the_kernel_is_its_death():
    for text, expected in (
            (OOPS, "BUG: kernel NULL pointer dereference, address: 0000000000000000, in ext4_mb_load_buddy_gfp"),
            ("[    3.104520] Oops: 0000 [#1] SMP\n[    3.2] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009\n",
             "Oops: 0000 [#1] SMP"),
            ("[    1.2] nothing\n[    3.104520] kernel BUG at fs/ext4/inode.c:2118!\n", "kernel BUG at fs/ext4/inode.c:2118!"),
            ("[    3.104520] general protection fault, probably for non-canonical address 0xdead000000000108: 0000 [#1] PREEMPT SMP\n",
             "general protection fault, probably for non-canonical address 0xdead000000000108: 0000 [#1] PREEMPT SMP"),
            ("Begin: Mounting root ... [    3.104520] invalid opcode: 0000 [#1] SMP\n", "invalid opcode: 0000 [#1] SMP"),
            ("[    3.104520] Kernel panic - not syncing: Fatal exception in interrupt\n",
             "Kernel panic - not syncing: Fatal exception in interrupt")):
        equal(death(text), expected)


def test_what_a_wrong_spare_does_is_none():
    for text in (
            NO_ROOT,
            "[    4.101533] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\n",
            "[    4.101533] Kernel panic - not syncing: No working init found.  Try passing init= option to kernel.\n",
            "[    4.101533] Kernel panic - not syncing: Requested init /sbin/init failed (error -2).\n",
            "[    2.000000] Initramfs unpacking failed: junk within compressed archive\n",
            # A program that dies.
            "[   31.540923] traps: dualroot-sync[412] general protection fault ip:55d0a11 sp:7ffc81 error:0 in dualroot-sync[55d0a000+9000]\n",
            "[   31.540923] dualroot-sync[412]: segfault at 0 ip 000055d0 sp 00007ffc error 4 in dualroot-sync[55d0a000+9000]\n",
            # A program's words.
            "[   31.540923] dualroot-sync[412]: BUG: the plan is empty\n",
            # The machine was busy.
            "[   84.001240] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [kworker/0:2:65]\n",
            "[   84.001240] BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 41s!\n"):
        equal((text, death(text)), (text, None))


def play(*consoles, silent=False):
    """Runs a case that fails, each time with such a console: (what has become of it, what was asked for older kernels)."""
    asked, left = [], list(consoles)

    def case(report, directory, _staging):
        asked.append(report.older)
        directory.mkdir(parents=True)
        (directory / "serial-1.log").write_text(left.pop(0))
        report.check("it boots", True)
        if silent and len(asked) == 1:
            raise Silent("no answer")
        report.check("it works", bool(consoles) and not left)

    with tempfile.TemporaryDirectory() as top, contextlib.redirect_stdout(io.StringIO()):
        run.CASES["made"] = (case,)
        try:
            result = run.Result("made", Path(top), None)
        finally:
            del run.CASES["made"]
    return (result.report.passed, result.report.failed, result.lost), asked


def test_a_case_whose_kernel_died_is_run_again():
    fault = "guest kernel died (made: BUG: kernel NULL pointer dereference, address: 0000000000000000, in ext4_mb_load_buddy_gfp)"
    equal(play(OOPS, ""), ((2, 0, [fault]), [False, True]))
    # Nothing of what was found then counts, but that there is no verdict.
    equal(play(OOPS, OOPS), ((0, 1, [fault, fault]), [False, True]))


def test_a_case_whose_agent_is_silent_is_run_again():
    equal(play("", "", silent=True), ((2, 0, ["guest agent stopped answering (made: no answer)"]), [False, True]))


def test_a_root_that_cannot_be_mounted_is_a_verdict():
    equal(play(NO_ROOT, ""), ((1, 1, []), [False]))


LENGTHS = {"core1": 8, "core2": 6, "long": 12, "middle": 7, "short": 3, "other": 5}


def test_the_length_of_each_case_is_known():
    equal((set(turns.MINUTES), set(turns.CORE) - set(run.CASES)), (set(run.CASES), set()))


def test_the_draw_has_the_core_and_fits():
    for seed in range(200):
        names, left_out = turns.draw(LENGTHS, ["core2", "core1"], 14, 2, seed)
        equal({"core1", "core2"} - set(names), set())
        equal(sorted([*names, *left_out]), sorted(LENGTHS))
        equal(turns.ends([LENGTHS[name] for name in names], 2) <= 14, True)


def test_each_case_has_its_turn():
    drawn = {name for seed in range(500) for name in turns.draw(turns.MINUTES, turns.CORE, 22, 3, seed)[0]}
    equal(drawn, set(run.CASES))


def test_the_draw_depends_on_the_seed_only():
    equal(turns.draw(LENGTHS, ["core1"], 14, 2, "7"), (["core1", "middle", "core2", "other"], ["long", "short"]))


def test_a_case_that_is_drawn_does_not_begin_too_late():
    begun = []

    def case(_report, directory, _staging):
        begun.append(directory.name)

    def left_out(minutes):
        begun.clear()
        with tempfile.TemporaryDirectory() as top, contextlib.redirect_stdout(io.StringIO()):
            suite = run.Suite(Path(top), None, LENGTHS, ["core1"], time.monotonic() + 60 * minutes)
            suite.run(["core1", "middle", "short"], 1)
        return suite.late

    run.CASES.update(dict.fromkeys(LENGTHS, (case,)))
    try:
        equal([left_out(minutes) for minutes in (0, 4, 8)], [["middle", "short"], ["middle"], []])
        equal(begun, ["core1", "middle", "short"])
    finally:
        for name in LENGTHS:
            del run.CASES[name]


def main():
    passed = failed = 0
    for name, test in list(globals().items()):
        if not name.startswith("test_"):
            continue
        title = name[5:].replace("_", " ")
        try:
            test()
            passed += 1
            print(f"ok   {title}")
        except Exception as problem:
            failed += 1
            line = problem.__traceback__.tb_next.tb_lineno
            print(f"FAIL {title}: {type(problem).__name__} in line {line}: {problem}")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


def equal(found, expected):
    if found != expected:
        raise AssertionError(f"{found!r} instead of {expected!r}")


if __name__ == "__main__":
    sys.exit(main())
