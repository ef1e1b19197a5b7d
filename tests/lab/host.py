"""The running lab: one QEMU process, its state folder, and ssh into it.

Everything a boot makes lies in one state folder (key, sockets, log, the disk's changes); `down` ends the process and
removes the folder. The cached image itself is never written.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.lab.backlog import raise_backlog
from tests.lab.recipe import LabImage, say


class LabError(Exception):
    """The lab cannot do what was asked; the message says why."""


@dataclass(frozen=True, slots=True)
class Boot:
    """What `up` was asked for and chose."""

    pid: int
    memory_mb: int
    cpus: int
    ports: dict[str, int]
    """Port inside the lab (as text, for JSON) to port on this machine's loopback."""


CPU = "max,la57=off,erms=off,fsrm=off"
"""One that says it copies bytes fast has every kernel copy byte by byte, which is what emulation is slowest at."""


class Lab:
    """A lab under one state folder; at most one runs there."""

    def __init__(self, state: Path | None = None) -> None:
        self.state = state or default_state()

    # ---- life ----

    def up(self, image: LabImage, *, memory_mb: int, cpus: int, forward: list[int], deadline: float) -> Boot:
        """Boot `image` and return when ssh answers.

        Args:
            forward: ports inside the lab to forward from this machine's loopback, besides ssh.
            deadline: seconds until a boot that does not answer is ended.

        Raises:
            LabError: one runs already, QEMU is missing, or the boot did not answer.
        """
        if self.running() is not None:
            raise LabError("a lab is running already; end it with 'lab.py down'")
        if shutil.which("qemu-system-x86_64") is None:
            raise LabError("qemu-system-x86_64 is missing (Debian: apt-get install qemu-system-x86)")
        self._forget()
        self.state.mkdir(parents=True, mode=0o700)
        public = self._make_key()
        ports = {str(port): _free_port() for port in (22, *forward)}
        command = self._qemu(image, memory_mb, cpus, ports, public)
        started = time.monotonic()
        with (self.state / "qemu.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(self.state)},
            )
        boot = Boot(process.pid, memory_mb, cpus, ports)
        (self.state / "boot.json").write_text(json.dumps(asdict(boot)))
        try:
            self._wait_for_ssh(process, started + deadline)
        except BaseException:
            process.kill()
            process.wait()
            raise
        try:
            raise_backlog(process.pid, ports.values())
        except (OSError, LookupError) as error:
            say(f"connections that come at once may be lost: {error}")
        say(f"up after {time.monotonic() - started:.0f} s")
        return boot

    def down(self) -> bool:
        """End the lab and remove all it made; False when none ran. Safe to repeat."""
        boot = self.running()
        if boot is not None:
            self._stop_master()
            _end(boot.pid)
        self._forget()
        return boot is not None

    def running(self) -> Boot | None:
        """Return the boot whose QEMU lives, known by its command line: a pid alone may be somebody else's by now."""
        try:
            boot = Boot(**json.loads((self.state / "boot.json").read_text()))
            command = Path(f"/proc/{boot.pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError, TypeError):
            return None
        return boot if str(self.state / "console.log").encode() in b"\0".join(command) else None

    # ---- use ----

    def shell(
        self, command: str, *, stdin: bytes | None = None, capture: bool = False, timeout: float | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a shell command as root in the lab; returns the finished process, with its output when `capture`."""
        return subprocess.run(
            self.argv(command),
            input=stdin,
            stdin=None if stdin is not None or not capture else subprocess.DEVNULL,
            capture_output=capture,
            timeout=timeout,
            check=False,
        )

    def argv(self, command: str, *, terminal: bool = False) -> list[str]:
        """The command line that runs a shell command as root in the lab, with a terminal there when asked.

        Raises:
            LabError: no lab is running.
        """
        boot = self.running()
        if boot is None:
            raise LabError("no lab is running; start it with 'lab.py up'")
        return [*self._ssh(boot), *(["-tt"] if terminal else []), "--", command]

    def put(self, source: Path, target: str) -> None:
        """Copy a file or folder to the path `target` in the lab, replacing what was there."""
        pack = subprocess.run(
            ["tar", "-C", str(source.parent), "-cf", "-", source.name], capture_output=True, check=True, timeout=600
        )
        parent, name = os.path.split(target)
        where, old, new = shlex.quote(parent), shlex.quote(target), shlex.quote(f"{parent}/{source.name}")
        move = "" if source.name == name else f" && mv {new} {old}"
        command = f"mkdir -p {where} && rm -rf {old} && tar -C {where} -xf -{move}"
        done = self.shell(command, stdin=pack.stdout, capture=True, timeout=600)
        if done.returncode != 0:
            raise LabError(f"copying {source} into the lab failed: {done.stderr.decode('utf-8', 'replace')}")

    def console(self) -> str:
        return _read_tail(self.state / "console.log")

    # ---- parts ----

    def _qemu(self, image: LabImage, memory_mb: int, cpus: int, ports: dict[str, int], key: str) -> list[str]:
        forwards = "".join(f",hostfwd=tcp:127.0.0.1:{outer}-:{inner}" for inner, outer in ports.items())
        # A stripped q35: `-M microvm` starves of timer ticks under TCG with this kernel.
        return [
            "qemu-system-x86_64",
            *("-M", "q35,i8042=off,smbus=off,sata=off,usb=off,vmport=off", "-accel", "tcg,thread=multi"),
            *("-cpu", CPU, "-smp", str(cpus), "-m", str(memory_mb)),
            *("-display", "none", "-no-reboot", "-nodefaults", "-no-user-config"),
            *("-serial", f"file:{self.state / 'console.log'}"),
            # What a lab that hangs is asked with: `info registers -a`.
            *("-monitor", f"unix:{self.state / 'monitor.sock'},server=on,wait=off"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            *(
                "-append",
                f"console=ttyS0 reboot=t panic=-1 mitigations=off tsc=reliable nokaslr quiet lab.key={key}",
            ),
            # snapshot=on: writes go to an unlinked temporary file in TMPDIR, never to the cached image.
            *("-drive", f"file={image.disk},if=none,id=disk,format=raw,cache=unsafe,snapshot=on"),
            *("-device", "virtio-blk-pci,drive=disk"),
            *("-netdev", f"user,id=net{forwards}", "-device", "virtio-net-pci,netdev=net"),
            *("-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"),
        ]

    def _ssh(self, boot: Boot) -> list[str]:
        options = {
            "IdentityFile": self.state / "key",
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "ConnectTimeout": "20",
            # One connection for all commands: the handshake costs half a second of emulated CPU.
            "ControlMaster": "auto",
            "ControlPath": self.state / "ssh",
            "ControlPersist": "600",
        }
        flags = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return ["ssh", "-F", "none", *flags, "-p", str(boot.ports["22"]), "root@127.0.0.1"]

    def _wait_for_ssh(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                log = _read_tail(self.state / "qemu.log")
                raise LabError(f"QEMU ended ({process.returncode}): {log}\n{self.console()}")
            if "lab: host is up" in self.console():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    # The clock is set over a connection that is there already: the first command waits for it.
                    connected = self.shell("true", capture=True, timeout=60).returncode == 0
                    if connected and self._set_clock():
                        return
            time.sleep(0.3)
        raise LabError(f"the lab did not answer in time; its console's end:\n{self.console()}")

    def _set_clock(self) -> bool:
        return self.shell(f"date -s @{time.time():.3f}", capture=True, timeout=60).returncode == 0

    def _make_key(self) -> str:
        path = self.state / "key"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(path)], check=True, timeout=30
        )
        return path.with_suffix(".pub").read_text().split()[1]

    def _stop_master(self) -> None:
        subprocess.run(
            ["ssh", "-F", "none", "-o", f"ControlPath={self.state / 'ssh'}", "-O", "exit", "root@127.0.0.1"],
            capture_output=True,
            timeout=20,
            check=False,
        )

    def _forget(self) -> None:
        shutil.rmtree(self.state, ignore_errors=True)


def default_state() -> Path:
    chosen = os.environ.get("EMBERBOX_LAB_STATE")
    return Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"emberbox-lab-{os.getuid()}"


def _end(pid: int) -> None:
    descriptor = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        os.kill(pid, signal.SIGTERM)
        if not poller.poll(10_000):
            os.kill(pid, signal.SIGKILL)
            poller.poll(10_000)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _read_tail(path: Path, size: int = 4000) -> str:
    try:
        return path.read_bytes()[-size:].decode("utf-8", "replace")
    except OSError:
        return ""
