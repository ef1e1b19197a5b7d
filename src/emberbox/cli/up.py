"""`emberbox up`: checks the host, prepares the data directory, starts the roles, makes the first key and `base`."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import signal
from contextlib import suppress
from pathlib import Path

import structlog

from emberbox import __version__
from emberbox.cli import first_run, node_client, requirements
from emberbox.cli.certificates import CertificateCopy
from emberbox.cli.errors import CliError
from emberbox.cli.exports import print_exports
from emberbox.cli.follow import follow_logs
from emberbox.cli.layout import ensure_account, make_layout
from emberbox.cli.output import note
from emberbox.cli.processes import ProcessRef
from emberbox.cli.reporters import ConsoleReporter, PipeReporter, Reporter, relay
from emberbox.cli.roles import ROLE_NAMES, log_path, role
from emberbox.cli.state import Phase, RoleProcess, State, StateDir
from emberbox.cli.stopping import END_SANDBOXES, end_sandboxes
from emberbox.cli.supervisor import Supervisor
from emberbox.edge.main import end_leftover
from emberbox.logs import configure_logging
from emberbox.settings import Settings

log = structlog.get_logger()

START_SECONDS = 60.0
CERTIFICATE_SECONDS = 30.0
LEFT_BEHIND_GRACE = 15.0


def up(settings: Settings, reporter: Reporter, *, show_logs: bool) -> None:
    """Run Emberbox until SIGTERM or SIGINT. Sandboxes go on running after that.

    Raises:
        AlreadyRunning: another supervisor holds the data directory.
        CliError: something needed is missing, or a role does not start.
    """
    requirements.require_root()
    settings = settings.model_copy(update={"agent_path": requirements.agent_path(settings)})
    state_dir = StateDir(settings)
    account = ensure_account(settings)
    make_layout(settings, account)
    certificates = CertificateCopy(settings, account)
    with state_dir.lock():
        _stop_left_behind(settings, state_dir, reporter)
        requirements.require(settings)
        certificates.refresh()
        asyncio.run(_Instance(settings, state_dir, reporter, certificates).run(show_logs=show_logs))


class _Instance:
    """One run of one instance, from start to stop."""

    def __init__(
        self, settings: Settings, state_dir: StateDir, reporter: Reporter, certificates: CertificateCopy
    ) -> None:
        self._certificates = certificates
        self._settings = settings
        self._state_dir = state_dir
        self._reporter = reporter
        self._me = ProcessRef.of(os.getpid())
        self._phase: Phase = "starting"
        self._processes: list[RoleProcess] = []
        self._stop_asked = asyncio.Event()
        self._end_sandboxes = False

    async def run(self, *, show_logs: bool) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_asked.set)
        loop.add_signal_handler(END_SANDBOXES, self._stop_with_sandboxes)
        self._write()
        given = self._certificates.apply(self._settings)
        supervisor = Supervisor([role(name, given) for name in ROLE_NAMES], changed=self._roles_changed)
        starting = asyncio.create_task(self._start(supervisor))
        stop = asyncio.create_task(self._stop_asked.wait())
        try:
            await asyncio.wait({starting, stop}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await self._serve(stop, show_logs=show_logs)
        finally:
            stop.cancel()
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)  # `result` has told, or nobody asks any more
            self._set_phase("stopping")
            await supervisor.stop_role("api")
            if self._end_sandboxes:
                await asyncio.to_thread(end_sandboxes, self._settings)
            await supervisor.stop()
            self._state_dir.clear()

    async def _start(self, supervisor: Supervisor) -> None:
        self._reporter.step(f"starting Emberbox {__version__} on {self._settings.data_dir}")
        supervisor.begin()
        await asyncio.to_thread(first_run.ensure_key, self._settings, self._state_dir)
        await supervisor.ready(deadline=START_SECONDS * self._settings.time_scale)
        await first_run.ensure_base(self._settings, self._reporter)
        view = await asyncio.to_thread(node_client.look, self._settings)
        if view is not None:
            self._reporter.step(f"runtime {view.runtime}: {view.isolation}; because {view.why}")
        self._set_phase("ready")
        log.info("emberbox.ready", data_dir=str(self._settings.data_dir))
        self._reporter.ready()

    async def _serve(self, stop: asyncio.Task[bool], *, show_logs: bool) -> None:
        beside = [asyncio.create_task(self._renew_certificates(), name="certificates")]
        if show_logs:
            logs = [log_path(self._settings, name) for name in ROLE_NAMES]
            beside.append(asyncio.create_task(follow_logs(logs), name="logs"))
        try:
            await stop
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _renew_certificates(self) -> None:
        while True:
            await asyncio.sleep(CERTIFICATE_SECONDS)
            try:
                if await asyncio.to_thread(self._certificates.refresh):
                    log.info("certificates.copied")
            except CliError as error:
                log.error("certificates.not_copied", error=error.message)

    def _stop_with_sandboxes(self) -> None:
        self._end_sandboxes = True
        self._stop_asked.set()

    def _roles_changed(self, processes: list[RoleProcess]) -> None:
        self._processes = processes
        self._write()

    def _set_phase(self, phase: Phase) -> None:
        self._phase = phase
        self._write()

    def _write(self) -> None:
        self._state_dir.write(
            State(__version__, self._phase, self._me, self._settings.model_dump(mode="json"), self._processes)
        )


def _stop_left_behind(settings: Settings, state_dir: StateDir, reporter: Reporter) -> None:
    """End the roles of a supervisor that was killed; their machines go on, and the new node adopts them."""
    state = state_dir.read()
    if state is None:
        return
    left = [one for one in reversed(state.processes) if one.process.alive]
    if left:
        names = ", ".join(f"{one.name} (pid {one.process.pid})" for one in left)
        reporter.step(f"the last supervisor ended without stopping {names}; stopping them now")
    for one in left:
        one.process.stop(grace=LEFT_BEHIND_GRACE)
    if end_leftover(settings):
        reporter.step("its edge was killed as well; ended the HAProxy that it left")
    state_dir.clear()


# ---- the two ways to call it


def up_in_foreground(settings: Settings, *, report_to: int | None = None) -> None:
    """Serve in this process. With `report_to`, a descriptor, this is the background process of `up --detach`."""
    configure_logging("supervisor", settings)
    reporter: Reporter
    if report_to is None:
        reporter = ConsoleReporter(on_ready=lambda: print_exports(settings))
    else:
        reporter = PipeReporter(report_to)
    try:
        up(settings, reporter, show_logs=report_to is None)
    except CliError as error:
        reporter.failed(error)
        raise
    if report_to is None:
        reporter.step("Emberbox has stopped; its sandboxes go on, and the next `emberbox up` finds them again")


def up_in_background(settings: Settings) -> None:
    """Serve in a background process and wait until it is ready. When one serves already, that is enough.

    The process is a fork of this one: what was imported is not imported again. In it the call returns when Emberbox
    has been stopped.

    Raises:
        CliError: it could not start.
    """
    requirements.require_root()
    if _runs_already(settings):
        return
    log_file = settings.data_dir / "logs" / "supervisor.log"
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        output = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CliError(f"the data directory {settings.data_dir} cannot be used: {error}") from None
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        _hide_argument(settings.database_url)
        writing = _leave_terminal(output, keep=writing)
        up_in_foreground(settings, report_to=writing)
        return
    os.close(output)
    os.close(writing)
    with os.fdopen(reading) as lines:
        try:
            told = relay(lines, ConsoleReporter(on_ready=lambda: print_exports(settings)))
        except CliError:
            os.waitpid(process, 0)  # it has cleaned up, and nothing of it is left when this returns
            raise
        if not told:
            _, status = os.waitpid(process, 0)
            code = os.waitstatus_to_exitcode(status)
            raise CliError(f"Emberbox ended while starting (code {code}); see {log_file}")


def _leave_terminal(output: int, *, keep: int) -> int:
    """Make this a background process that writes to `output` and has nothing else of its parent's open but `keep`.

    Returns what `keep` is from now on: the parent may have been started with its standard streams closed.
    """
    os.setsid()
    output, keep = (fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 3) for each in (output, keep))
    nothing = fcntl.fcntl(os.open(os.devnull, os.O_RDONLY), fcntl.F_DUPFD_CLOEXEC, 3)
    for number, source in enumerate((nothing, output, output)):
        os.dup2(source, number)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number != keep:
            with suppress(OSError):  # the one that listed them
                os.close(number)
    return keep


def _hide_argument(text: str | None) -> None:
    """Overwrite an argument of this process's command line, which everybody on the host may read: it has a password."""
    if not text:
        return
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, proc(5)
    secret = text.encode()
    found = ctypes.string_at(start, end - start).find(secret)
    if found >= 0:
        ctypes.memset(start + found, ord("x"), len(secret))


def _runs_already(settings: Settings) -> bool:
    state = StateDir(settings).read()
    if state is None or not state.supervisor.alive or state.phase != "ready":
        return False
    note(f"Emberbox already runs on {settings.data_dir} (pid {state.supervisor.pid}); it keeps its settings")
    print_exports(settings)
    return True
