"""One case of the version matrix, run by the Python of an environment that has one release of `e2b`.

    python_suite.py CASE

Exit code 0: it works. 3: this release does not have it (the reason is printed). Anything else: it does not work.
Written for every release from 1.11 on; what differs between them is in `create` and its neighbours.
"""

# ruff: noqa: PT017 - it runs where there is no pytest
import os
import sys
import tempfile
import threading
import time
import uuid

import e2b
from e2b import Sandbox

SCALE = float(os.environ.get("EMBERBOX_TEST_SCALE", "1"))


class NotInThisRelease(Exception):
    pass


def create(**options):
    options.setdefault("timeout", int(90 * SCALE))
    make = getattr(Sandbox, "create", None) or Sandbox
    return make(**options)


def case_create_and_kill():
    sandbox = create(metadata={"suite": "compat"}, envs={"GREETING": "hello"})
    try:
        assert sandbox.is_running()
        assert sandbox.commands.run("echo $GREETING").stdout == "hello\n"
    finally:
        # The method of 1.x gives nothing back; the class's answer is asserted below.
        sandbox.kill()
    assert not sandbox.is_running()
    assert not Sandbox.kill(sandbox.sandbox_id)


def case_run():
    with create() as sandbox:
        result = sandbox.commands.run("echo out; echo err >&2")
        assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 0)
        try:
            sandbox.commands.run("exit 7")
        except e2b.CommandExitException as error:
            assert error.exit_code == 7
        else:
            raise AssertionError("a failing command raised nothing")
        assert sandbox.commands.run("id -un; pwd", user="root", cwd="/tmp").stdout == "root\n/tmp\n"


def case_stream():
    seen = []
    with create() as sandbox:
        sandbox.commands.run(
            "echo one; sleep 1; echo two", on_stdout=lambda text: seen.append((str(text), time.monotonic()))
        )
    at = {word: next(moment for text, moment in seen if word in text) for word in ("one", "two")}
    assert at["two"] - at["one"] > 0.5, seen


def case_background():
    with create() as sandbox:
        handle = sandbox.commands.run("sleep 1000", background=True)
        assert handle.pid in [each.pid for each in sandbox.commands.list()]
        assert sandbox.commands.connect(handle.pid).pid == handle.pid
        assert handle.kill()
        try:
            handle.wait()
        except e2b.CommandExitException as error:
            assert error.exit_code != 0
        else:
            raise AssertionError("a killed command ended well")


def case_stdin():
    with create() as sandbox:
        # Releases before the option had standard input open always.
        import inspect

        known = inspect.signature(sandbox.commands.run).parameters
        options = {"stdin": True} if "stdin" in known else {}
        handle = sandbox.commands.run("read line; echo got:$line", background=True, **options)
        sandbox.commands.send_stdin(handle.pid, "hello\n")
        assert handle.wait().stdout == "got:hello\n"


def case_command_timeout():
    with create() as sandbox:
        try:
            # A whole number: 1.x sends a fraction as it is, which is no Connect-Timeout-Ms.
            sandbox.commands.run("sleep 1000", timeout=max(1, round(SCALE)))
        except e2b.TimeoutException:
            return
    raise AssertionError("no TimeoutException")


def case_files():
    content = bytes(range(256)) * 500
    with create() as sandbox:
        sandbox.files.write("dir/text.txt", "wörld\n")
        sandbox.files.write("dir/data.bin", content)
        assert sandbox.files.read("dir/text.txt") == "wörld\n"
        assert bytes(sandbox.files.read("dir/data.bin", format="bytes")) == content
        assert b"".join(sandbox.files.read("dir/data.bin", format="stream")) == content
        assert sorted(entry.name for entry in sandbox.files.list("dir")) == ["data.bin", "text.txt"]
        assert sandbox.files.rename("dir/text.txt", "dir/moved.txt").path == "/home/user/dir/moved.txt"
        assert sandbox.files.make_dir("dir/sub") is True
        assert sandbox.files.make_dir("dir/sub") is False
        sandbox.files.remove("dir")
        assert not sandbox.files.exists("dir")
        try:
            sandbox.files.read("dir/moved.txt")
        except e2b.NotFoundException:
            return
    raise AssertionError("no NotFoundException")


def case_watch():
    with create() as sandbox:
        sandbox.files.make_dir("watched")
        watcher = sandbox.files.watch_dir("watched")
        sandbox.files.write("watched/new", "x")
        deadline = time.monotonic() + 10 * SCALE
        names = set()
        while "new" not in names:
            assert time.monotonic() < deadline, names
            names |= {event.name for event in watcher.get_new_events()}
            time.sleep(0.05)
        watcher.stop()


def case_terminal():
    try:
        from e2b import PtySize
    except ImportError:
        from e2b.sandbox.commands.command_handle import PtySize
    output = bytearray()
    with create() as sandbox:
        terminal = sandbox.pty.create(PtySize(rows=24, cols=80))
        sandbox.pty.send_stdin(terminal.pid, b"stty size; exit\n")
        terminal.wait(on_pty=output.extend)
    assert b"24 80" in output, output


def case_list():
    mark = uuid.uuid4().hex
    with create(metadata={"mark": mark, "odd key": "a&b=c é"}) as sandbox:
        from e2b.sandbox.sandbox_api import SandboxQuery

        found = Sandbox.list(query=SandboxQuery(metadata={"mark": mark, "odd key": "a&b=c é"}))
        found = found if isinstance(found, list) else found.next_items()
        assert [each.sandbox_id for each in found] == [sandbox.sandbox_id]
        assert found[0].metadata["mark"] == mark


def case_set_timeout():
    with create(timeout=int(60 * SCALE)) as sandbox:
        before = sandbox.get_info().end_at
        sandbox.set_timeout(1000)
        assert (sandbox.get_info().end_at - before).total_seconds() > 500


def case_pause_and_connect():
    pause = getattr(Sandbox, "pause", None) or getattr(Sandbox, "beta_pause", None)
    if pause is None:
        raise NotInThisRelease("no pause in this release")
    sandbox = create()
    try:
        sandbox.files.write("kept.txt", "kept")
        sleeper = sandbox.commands.run("sleep 1000", background=True)
        (getattr(sandbox, "pause", None) or sandbox.beta_pause)()
        again = Sandbox.connect(sandbox.sandbox_id)
        assert again.files.read("kept.txt") == "kept"
        assert sleeper.pid in [each.pid for each in again.commands.list()]
    finally:
        sandbox.kill()


def case_errors():
    for call, expected in (
        (lambda: create(template="no-such-template"), e2b.SandboxException),
        (lambda: Sandbox.connect("i" + "0" * 19).files.read("/etc/hostname"), e2b.SandboxException),
    ):
        try:
            call()
        except expected:
            continue
        raise AssertionError(f"expected {expected.__name__}")


def case_signed_urls():
    import httpx

    with create(secure=True) as sandbox:
        sandbox.files.write("file.txt", "signed")
        url = sandbox.download_url("file.txt")
        route = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983"}
        assert httpx.get(url, headers=route, timeout=20).text == "signed"


def case_template_build():
    if not hasattr(e2b, "Template"):
        raise NotInThisRelease("no templates in this release")
    name = f"compat-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "note.txt"), "w") as file:
            file.write("note\n")
        template = e2b.Template(file_context_path=folder).from_template("base").copy("note.txt", "/home/user/")
        template = template.run_cmd("cat /home/user/note.txt > /home/user/copy.txt")
        # The name's own argument is newer.
        e2b.Template.build(template, alias=name)
    with create(template=name) as sandbox:
        assert sandbox.files.read("copy.txt") == "note\n"


CASES = {name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")}


def main():
    if sys.argv[1:] == ["--list"]:
        print("\n".join(CASES))
        return 0
    # A release that hangs is ended from outside; this says where it hung.
    import faulthandler

    faulthandler.dump_traceback_later(float(os.environ.get("CASE_SECONDS", "30")) - 2, exit=False)
    try:
        CASES[sys.argv[1]]()
    except NotInThisRelease as reason:
        print(reason)
        return 3
    finally:
        faulthandler.cancel_dump_traceback_later()
    # Some old releases leave threads behind; they are not what is tested.
    sys.stdout.flush()
    if threading.active_count() > 1:
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
