"""A UEFI machine in QEMU (TCG): disks that can be plugged, firmware variables that last, and a way to run commands in the guest."""

import base64
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

from console import Silent, death

CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
VARS = "/usr/share/OVMF/OVMF_VARS_4M.fd"
SLOTS = 4
# Bytes that a slow disk writes in a second.
SLOW = 400_000
# Of a disk whose writes are logged: a request that was merged from as many pieces as the host takes is one too many with the log's own,
# and fails; and a "write zeroes" is mixed up with what is written meanwhile.
LOGGED = {"request-merging": False, "write-zeroes": False}


class Failure(Exception):
    """Something that a case asserts is not so."""


class Channel:
    """JSON, a line a message, over a UNIX socket."""

    def __init__(self, path, process, limit):
        deadline = time.monotonic() + limit
        while True:
            try:
                self.socket = socket.socket(socket.AF_UNIX)
                self.socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                # QEMU makes the socket while it starts; there is nothing to wait on before that.
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Failure(f"QEMU did not start: {path}")
                time.sleep(0.05)
        self.buffer, self.closed = b"", False

    def send(self, message):
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, limit):
        """The next message, or None after so many seconds."""
        deadline = time.monotonic() + limit
        while b"\n" not in self.buffer:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                part = self.socket.recv(65536)
            except TimeoutError:
                return None
            if not part:
                self.closed = True
                return None
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line.lstrip(b"\xff"))


class Machine:
    """One machine. Its firmware variables live in `directory` from one power-on to the next."""

    def __init__(self, directory, memory=1024):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.memory = memory
        self.vars = self.directory / "vars.fd"
        if not self.vars.exists():
            shutil.copy(VARS, self.vars)
        self.boots = 0
        self.process = None
        # What is typed when a boot asks for it.
        self.passphrase = None
        # The serial numbers of disks with sectors of 4096 bytes.
        self.large_sectors = set()

    def start(self, disks, limit=400, logs=None, fails=None):
        """Powers on as `power_on` does, and waits until the guest has booted. Returns the seconds that took."""
        begun = time.monotonic()
        self.power_on(disks, logs, fails)
        try:
            self._await_boot(limit)
        except Exception:
            self.kill()
            raise
        return time.monotonic() - begun

    def _await_boot(self, limit):
        if self.passphrase:
            self.await_console("lock disk cryptroot", "phrase for disk")
            self.type(self.passphrase + "\n")
        self.await_event("VSERPORT_CHANGE", limit, lambda data: data["open"])
        self.agent = Channel(self.directory / "agent", self.process, 10)
        self.run("systemctl is-system-running --wait || true", limit)

    def save(self, path):
        """Writes the machine as it is to a file, and ends it. Its disks and its firmware's variables belong to that."""
        self.command("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        self.command("migrate", uri=f"exec:cat >'{path}'")
        self.await_event("MIGRATION", 120, lambda data: data["status"] == "completed")
        self.kill()

    def resume(self, path, disks, fails=None):
        """Goes on from where one with the same memory and the same disks was saved. The guest's clock stays behind until it is booted."""
        self.power_on(disks, fails=fails, waits=True)
        self.command("migrate-incoming", uri=f"exec:cat '{path}'")
        self.await_event("RESUME", 120)
        self.agent = Channel(self.directory / "agent", self.process, 10)

    def power_on(self, disks, logs=None, fails=None, waits=False):
        """Powers on with these disks ({serial: image}; `logs` of writes and what `fails` as for `plug`, by serial). One that `waits` does
        nothing before it is told what it was."""
        self.boots += 1
        self.serial = self.directory / f"serial-{self.boots}.log"
        qmp, agent, console = self.directory / "qmp", self.directory / "agent", self.directory / "console"
        for path in (qmp, agent, console):
            path.unlink(missing_ok=True)
        # One processor: with two, kernels of 2024 and later now and then panic under emulation while they patch their own code.
        command = [
            "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "qemu64", "-smp", "1",
            "-m", str(self.memory), "-display", "none", "-nodefaults", "-no-reboot",
            "-drive", f"if=pflash,format=raw,readonly=on,file={CODE}", "-drive", f"if=pflash,format=raw,file={self.vars}",
            "-chardev", f"socket,id=console,path={console},server=on,wait=off,logfile={self.serial}",
            "-serial", "chardev:console", "-qmp", f"unix:{qmp},server=on,wait=off",
            "-chardev", f"socket,id=agent,path={agent},server=on,wait=off", "-device", "virtio-serial",
            "-device", "virtserialport,id=agent0,chardev=agent,name=org.qemu.guest_agent.0", "-object", "rng-random,id=rng",
            "-device", "virtio-rng-pci,rng=rng", "-object", f"throttle-group,id=slow,x-bps-write={SLOW},x-bps-write-max={SLOW}",
        ]
        for slot in range(SLOTS):
            command += ["-device", f"pcie-root-port,id=slot{slot},chassis={slot + 1}"]
        self.slots = {}
        for slot, (serial, image) in enumerate(disks.items()):
            node = self._node(serial, image, (logs or {}).get(serial), (fails or {}).get(serial))
            command += ["-blockdev", json.dumps(node), "-device", json.dumps(self._device(serial, slot))]
            self.slots[serial] = slot
        if waits:
            command += ["-incoming", "defer"]
        log = open(self.directory / "qemu.log", "ab")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.qmp = Channel(qmp, self.process, 30)
        self.qmp.receive(10)
        self.events = []
        self.command("qmp_capabilities")

    @staticmethod
    def _node(serial, image, log=None, fails=None, slow=False):
        # What the guest flushes needn't reach this machine's own disk.
        cache = {"direct": False, "no-flush": True}

        def file(name):
            return {"driver": "file", "filename": str(name), "cache": cache}
        node = file(image)
        if log:
            Path(log).touch()
            node = {"driver": "blklogwrites", "file": node, "log": file(log), "log-sector-size": 512, "log-super-update-interval": 1}
        elif str(image).endswith(".qcow2"):
            node = {"driver": "qcow2", "cache": cache, "file": node}
        else:
            node = {"driver": "raw", "cache": cache, "file": node}
        if fails:
            iotype, sector = fails
            error = {"event": "none", "iotype": iotype, "errno": 5, "sector": sector, "once": iotype == "write"}
            node = {"driver": "blkdebug", "image": node, "inject-error": [error]}
        if slow:
            node = {"driver": "throttle", "throttle-group": "slow", "file": node}
        return node | {"node-name": f"disk-{serial}"}

    def _device(self, serial, slot):
        size = 4096 if serial in self.large_sectors else 512
        return {"driver": "virtio-blk-pci", "id": f"dev-{serial}", "drive": f"disk-{serial}", "serial": serial, "bus": f"slot{slot}",
                "logical_block_size": size, "physical_block_size": size} | LOGGED

    def command(self, name, limit=60, **arguments):
        self.qmp.send({"execute": name, "arguments": arguments})
        while True:
            answer = self.qmp.receive(limit)
            if answer is None:
                raise Failure(f"QEMU does not answer {name}{self.tail()}")
            if "error" in answer:
                raise Failure(f"{name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            self.events.append(answer)

    def await_event(self, name, limit, matches=lambda data: True):
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            event = self.events.pop(0) if self.events else self.qmp.receive(min(5, max(0.1, deadline - time.monotonic())))
            if event is None:
                if self.process.poll() is not None:
                    break
                self.check_kernel()
            if event and event.get("event") == name and matches(event.get("data", {})):
                return
        raise Failure(f"no {name} within {limit} s{self.tail()}")

    def type(self, text):
        """Types something on the console."""
        console = socket.socket(socket.AF_UNIX)
        console.connect(str(self.directory / "console"))

        def drain():
            # As long as QEMU runs: what nobody reads would stop the guest, and what it hasn't read yet is lost when this is closed.
            with console:
                while console.recv(65536):
                    pass
        threading.Thread(target=drain, daemon=True).start()
        console.sendall(text.encode())

    def await_console(self, *texts, limit=400):
        """Waits until the console has said one of these."""
        deadline = time.monotonic() + limit
        while not any(text in self.said() for text in texts):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Failure(f"the console does not say {texts} within {limit} s{self.tail()}")
            self.check_kernel()
            # Its file has no event for a line.
            time.sleep(0.2)

    def plug(self, serial, image, log=None, fails=None, slow=False):
        """Puts a disk in; with a log, a raw image of which every write and flush is logged (dm-log-writes format). With `fails` ("write" or
        "read", and a sector), the first write to that sector fails, or every read of it; a `slow` disk takes SLOW bytes in a second."""
        slot = next(s for s in range(SLOTS) if s not in self.slots.values())
        self.command("blockdev-add", **self._node(serial, image, log, fails, slow))
        self.command("device_add", **self._device(serial, slot))
        self.slots[serial] = slot

    def unplug(self, serial):
        self.command("device_del", id=f"dev-{serial}")
        self.await_event("DEVICE_DELETED", 60, lambda data: data.get("device") == f"dev-{serial}")
        self.command("blockdev-del", **{"node-name": f"disk-{serial}"})
        del self.slots[serial]

    def _ask(self, name, limit, **arguments):
        self.agent.send({"execute": name, "arguments": arguments})
        deadline, answer = time.monotonic() + limit, None
        while answer is None and not self.agent.closed:
            if time.monotonic() > deadline:
                raise Silent(f"no answer to {name} within {limit} s")
            answer = self.agent.receive(5)
            if answer is None:
                self.check_kernel()
        if answer is None or "error" in answer:
            raise Failure(f"guest agent, {name}: {answer}{self.tail()}")
        return answer["return"]

    def forget(self):
        """Has the firmware lose its settings, while the machine is off."""
        shutil.copy(VARS, self.vars)

    def status(self, command, limit=120):
        """Runs a shell command in the guest; its exit status and what it printed."""
        pid = self._ask("guest-exec", 60, path="/bin/bash", arg=["-c", command], **{"capture-output": True})["pid"]
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            done = self._ask("guest-exec-status", 60, pid=pid)
            if done["exited"]:
                text = b"".join(base64.b64decode(done.get(k, "")) for k in ("out-data", "err-data"))
                return done.get("exitcode", -1), text.decode(errors="replace").strip()
            self.check_kernel()
            # The agent has no event for the end of a command.
            time.sleep(0.2)
        raise Failure(f"'{command}' took longer than {limit} s in the guest{self.tail()}")

    def run(self, command, limit=120):
        """Runs a shell command in the guest that has to end well; what it printed."""
        code, text = self.status(command, limit)
        if code != 0:
            raise Failure(f"'{command}' ended with {code}: {text}")
        return text

    def power_off(self, limit=120):
        self.agent.send({"execute": "guest-exec", "arguments": {"path": "/bin/systemctl", "arg": ["poweroff"]}})
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failure(f"the guest did not power off within {limit} s{self.tail()}")

    def kill(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def said(self):
        """Everything on the console since the machine was powered on."""
        try:
            return self.serial.read_text(errors="replace")
        except (OSError, AttributeError):
            return ""

    def check_kernel(self):
        """Raises if the kernel has died: nothing more will come of what is waited for."""
        fault = death(self.said())
        if fault:
            raise Failure(f"the guest's kernel died: {fault}")

    def tail(self, lines=25):
        text = self.said()
        if not text:
            return ""
        return "\n--- the console's last lines:\n" + "\n".join(text.splitlines()[-lines:])


def overlay(base, path):
    """A disk that begins as `base` and keeps its own changes."""
    path.unlink(missing_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2" if str(base).endswith(".qcow2") else "raw",
                    "-b", os.path.abspath(base), str(path)], check=True)
    return path
