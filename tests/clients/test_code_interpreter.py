"""The `code-interpreter-v1` template by the official clients."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator

import e2b
import httpx
import pytest
from e2b_code_interpreter import Sandbox

from tests.clients import test_mcp_inspector as inspector
from tests.clients.support import node
from tests.clients.support.instance import Emberbox
from tests.clients.support.shipped import ensure_built
from tests.clients.support.timing import eventually, seconds, whole_seconds
from tests.clients.test_mcp import a_sandbox, called, over_http, refused

# The template is built once for the run, from a few hundred megabytes of packages.
pytestmark = [pytest.mark.timeout(seconds(3000)), pytest.mark.xdist_group("code_interpreter")]


@pytest.fixture(scope="module")
def template(emberbox: Emberbox) -> str:
    ensure_built(emberbox, "code-interpreter-v1")
    return "code-interpreter-v1"


@pytest.fixture(scope="module")
def interpreter(template: str) -> Iterator[Sandbox]:
    made = Sandbox.create(timeout=whole_seconds(3600), envs={"FROM_SANDBOX": "yes"})
    yield made
    made.kill()


def test_variables_live_in_the_context(interpreter: Sandbox) -> None:
    first = interpreter.run_code("x = 20")
    second = interpreter.run_code("x += 1\nprint('out')\nx * 2")

    assert (first.results, first.error) == ([], None)
    assert (second.text, second.logs.stdout, second.logs.stderr) == ("42", ["out\n"], [])
    assert second.execution_count == (first.execution_count or 0) + 1


def test_it_runs_as_the_user_at_home_with_the_sandboxs_variables(interpreter: Sandbox) -> None:
    execution = interpreter.run_code("import os; os.getuid(), os.getcwd(), os.environ['FROM_SANDBOX']")

    assert execution.text == "(1000, '/home/user', 'yes')"


def test_output_comes_while_the_code_runs(interpreter: Sandbox) -> None:
    seen: list[tuple[str, bool]] = []

    def note(message) -> None:  # type: ignore[no-untyped-def]
        seen.append((message.line, message.error))
        if "one" in message.line:
            interpreter.files.write("/tmp/heard", "")

    results: list[str | None] = []
    # It ends only when somebody has heard its first line.
    wait = "while not os.path.exists('/tmp/heard'): time.sleep(0.05)"
    code = f"import os, sys, time\nprint('one', flush=True)\n{wait}\nprint('two', file=sys.stderr)\n'end'"
    interpreter.run_code(code, on_stdout=note, on_stderr=note, on_result=lambda result: results.append(result.text))

    assert seen == [("one\n", False), ("two\n", True)]
    assert results == ["end"]


def test_an_error_has_name_value_and_traceback_and_what_came_before(interpreter: Sandbox) -> None:
    told = []
    execution = interpreter.run_code("print('before')\nraise ValueError('nö')", on_error=told.append)

    assert execution.error is not None
    assert (execution.error.name, execution.error.value) == ("ValueError", "nö")
    assert "Traceback" in execution.error.traceback
    assert execution.logs.stdout == ["before\n"]
    assert told == [execution.error]
    assert interpreter.run_code("def f(:").error.name == "SyntaxError"  # type: ignore[union-attr]


def test_a_plot_is_a_picture_and_its_data(interpreter: Sandbox) -> None:
    execution = interpreter.run_code(
        "import matplotlib.pyplot as plt\n"
        "plt.plot([1, 2, 3], [2, 4, 6], label='doubled')\n"
        "plt.title('Line')\nplt.xlabel('time (s)')\nplt.show()"
    )

    (result,) = execution.results
    assert base64.b64decode(result.png or "").startswith(b"\x89PNG")
    assert result.chart is not None
    assert (result.chart.type, result.chart.title) == ("line", "Line")
    (line,) = result.chart.elements
    assert (line.label, line.points) == ("doubled", [(1, 2), (2, 4), (3, 6)])
    assert not result.is_main_result


def test_a_table_is_text_html_and_data(interpreter: Sandbox) -> None:
    execution = interpreter.run_code("import pandas as pd\npd.DataFrame({'a': [1, 2], 'b': ['x', None]})")

    (result,) = execution.results
    assert set(result.formats()) == {"text", "html", "data"}
    assert "<table" in (result.html or "")
    assert result.data == {"a": [1, 2], "b": ["x", None]}


def test_displays_of_every_kind_keep_their_kind(interpreter: Sandbox) -> None:
    code = """
from IPython.display import HTML, JSON, Javascript, Latex, Markdown, SVG, display
display(HTML('<b>h</b>'), Markdown('*m*'), Latex('$l$'), SVG('<svg xmlns="http://www.w3.org/2000/svg"/>'))
display(JSON({'j': 1}), Javascript('1'))
display({'application/x-own': 'own'}, raw=True)
"""
    results = interpreter.run_code(code).results

    kinds = [sorted(set(result.formats()) - {"text"}) for result in results]
    assert kinds == [["html"], ["markdown"], ["latex"], ["svg"], ["json"], ["javascript"], ["application/x-own"]]
    assert results[4].json == {"j": 1}


def test_contexts_keep_apart_and_have_a_directory(interpreter: Sandbox) -> None:
    context = interpreter.create_code_context(cwd="/tmp", language="python")
    interpreter.run_code("own = 1", context=context)

    assert interpreter.run_code("import os; os.getcwd(), own", context=context).text == "('/tmp', 1)"
    assert interpreter.run_code("own").error is not None
    listed = {each.id: (each.language, each.cwd) for each in interpreter.list_code_contexts()}
    assert listed[context.id] == ("python", "/tmp")

    interpreter.restart_code_context(context)
    assert interpreter.run_code("own", context=context).error.name == "NameError"  # type: ignore[union-attr]

    interpreter.remove_code_context(context)
    with pytest.raises(e2b.NotFoundException, match=context.id):
        interpreter.run_code("1", context=context)
    with pytest.raises(e2b.NotFoundException, match=context.id):
        interpreter.remove_code_context(context)


def test_contexts_run_side_by_side_and_code_of_one_in_turn(interpreter: Sandbox) -> None:
    other = interpreter.create_code_context()
    wait = "open('/tmp/began', 'w').close()\nwhile not os.path.exists('/tmp/go-on'): time.sleep(0.05)"
    code = f"import os, time\n{wait}\nafter = 'slow'"

    slow = threading.Thread(target=interpreter.run_code, args=(code,))
    slow.start()
    eventually(lambda: interpreter.files.exists("/tmp/began"), what="the slow code runs")
    queued = threading.Thread(target=interpreter.run_code, args=("after += ' then queued'",))
    queued.start()
    beside = interpreter.run_code("1", context=other).text
    was_running = slow.is_alive()
    interpreter.files.write("/tmp/go-on", "")
    slow.join()
    queued.join()

    assert (beside, was_running) == ("1", True)
    assert interpreter.run_code("after").text == "slow then queued"
    interpreter.remove_code_context(other)


@pytest.mark.parametrize(
    ("language", "code", "text"),
    [
        ("javascript", "[1, 2].map((x) => x * 21)[1]", "42"),
        ("typescript", "const n: number = 41; n + 1", "42"),
        ("r", "sum(c(20, 22))", "[1] 42"),
    ],
)
def test_other_languages_give_results(interpreter: Sandbox, language: str, code: str, text: str) -> None:
    assert interpreter.run_code(code, language=language).text == text


def test_bash_gives_output_and_an_exit_code(interpreter: Sandbox) -> None:
    execution = interpreter.run_code("cd /tmp; A=kept; echo $FROM_SANDBOX", language="bash")

    assert "".join(execution.logs.stdout) == "yes\n"
    assert "".join(interpreter.run_code("echo $A $PWD", language="bash").logs.stdout) == "kept /tmp\n"
    assert interpreter.run_code("(exit 3)", language="bash").error.value == "3"  # type: ignore[union-attr]


def test_a_language_that_is_not_there_is_refused_with_those_that_are(interpreter: Sandbox) -> None:
    with pytest.raises(e2b.SandboxException, match="'cobol' is not supported; there are: python, bash"):
        interpreter.run_code("1", language="cobol")
    with pytest.raises(e2b.SandboxException, match="not a directory"):
        interpreter.create_code_context(cwd="/no/such")


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("python", "import os; print(os.environ.get('CALL', 'none'), end='')"),
        ("bash", 'printf %s "${CALL-none}"'),
        ("javascript", "console.log(Deno.env.get('CALL') ?? 'none')"),
        ("r", "cat(Sys.getenv('CALL', 'none'))"),
    ],
)
def test_variables_of_one_call_are_gone_after_it(interpreter: Sandbox, language: str, code: str) -> None:
    def output(envs: dict[str, str] | None = None) -> str:
        return "".join(interpreter.run_code(code, language=language, envs=envs).logs.stdout).strip()

    assert output({"CALL": 'it\'s "quoted" $HOME'}) == 'it\'s "quoted" $HOME'
    assert output() == "none"


def test_code_that_takes_too_long_is_interrupted_and_the_state_kept(interpreter: Sandbox) -> None:
    interpreter.run_code("kept = 7")

    with pytest.raises(e2b.TimeoutException):
        interpreter.run_code("import time\nwhile True: time.sleep(0.1)", timeout=seconds(2))

    assert interpreter.run_code("kept").text == "7"


def test_a_dead_kernel_is_told_and_the_next_code_runs(interpreter: Sandbox) -> None:
    context = interpreter.create_code_context()
    died = interpreter.run_code("print('last', flush=True)\nimport os; os._exit(1)", context=context)

    assert died.error is not None
    assert died.error.name == "KernelDied"
    assert interpreter.run_code("'alive'", context=context).text == "alive"
    interpreter.remove_code_context(context)


def test_much_output_and_every_character_comes_back(interpreter: Sandbox) -> None:
    text = "\N{SNOWMAN}ñ\u2028𝄞\x00\x1b"
    execution = interpreter.run_code(f"print({text!r})\nprint('x' * 1_000_000)\n{text!r}[:4]")

    assert "".join(execution.logs.stdout) == f"{text}\n{'x' * 1_000_000}\n"
    assert execution.text == "\N{SNOWMAN}ñ\\u2028𝄞"
    lines = interpreter.run_code("for i in range(3000): print(i, flush=True)").logs.stdout
    assert "".join(lines).split() == [str(i) for i in range(3000)]


def test_what_pip_installs_can_be_imported(interpreter: Sandbox) -> None:
    interpreter.commands.run("pip install --quiet iniconfig", timeout=whole_seconds(400))

    assert interpreter.run_code("import iniconfig; iniconfig.__name__").text == "iniconfig"


def test_the_server_comes_back_when_code_kills_it(template: str) -> None:
    sandbox = Sandbox.create(timeout=whole_seconds(300))
    try:
        sandbox.commands.run("pkill -9 -f 'python -P -m interpreter$'")

        eventually(lambda: _answers(sandbox), within=180, every=0.5, what="code runs again")
    finally:
        sandbox.kill()


def test_files_of_the_user_do_not_stand_for_what_kernels_and_server_need(template: str) -> None:
    sandbox = Sandbox.create(timeout=whole_seconds(300))
    try:
        for name in ("random", "asyncio", "fastapi", "zmq"):
            sandbox.files.write(f"/home/user/{name}.py", "raise SystemExit('mine')")
        sandbox.files.write("/home/user/own_module.py", "answer = 42")

        context = sandbox.create_code_context()
        assert sandbox.run_code("import own_module; own_module.answer", context=context).text == "42"
        assert sandbox.run_code("echo fine", language="bash").logs.stdout == ["fine\n"]
        sandbox.commands.run("pkill -9 -f 'python -P -m interpreter$'")
        eventually(lambda: _answers(sandbox), within=180, every=0.5, what="the server starts beside these files")
    finally:
        sandbox.kill()


def test_clients_that_leave_while_a_kernel_starts_leave_no_kernel(interpreter: Sandbox) -> None:
    def kernels() -> int:
        return int(interpreter.commands.run("pgrep -c -f interpreter_kernel || true").stdout)

    before = kernels()
    context = interpreter.create_code_context()
    for _ in range(3):
        interpreter.run_code("import os; os._exit(1)", context=context)
        with pytest.raises(e2b.TimeoutException):
            interpreter.run_code("1", context=context, timeout=0.1)
    interpreter.remove_code_context(context)

    eventually(lambda: kernels() <= before, within=90, every=0.5, what="their kernels end")


def test_code_of_a_context_that_is_removed_is_told(interpreter: Sandbox) -> None:
    context = interpreter.create_code_context()
    told: list[str] = []

    def run() -> None:
        code = "import time; open('/tmp/removed-soon', 'w').close(); time.sleep(600)"
        error = interpreter.run_code(code, context=context, timeout=600).error
        told.append(error.name if error else "no error")

    running = threading.Thread(target=run)
    running.start()
    eventually(lambda: interpreter.files.exists("/tmp/removed-soon"), what="the code runs")
    interpreter.remove_code_context(context)
    running.join(seconds(120))

    assert told == ["ContextRemoved"]


def test_a_context_goes_on_after_pause_and_connect(template: str) -> None:
    sandbox = Sandbox.create(timeout=whole_seconds(300))
    try:
        sandbox.run_code("before = 'here'")
        sandbox.pause()
        again = Sandbox.connect(sandbox.sandbox_id)
        assert again.run_code("before").text == "here"
    finally:
        sandbox.kill()


async def test_agents_run_code_through_mcp(template: str, emberbox: Emberbox) -> None:
    async with over_http(emberbox) as client:
        made = await called(client, "e2b-create-sandbox", templateID=template, timeout=whole_seconds(300))
        it = {"sandboxID": made["sandboxID"]}
        try:
            first = await called(client, "e2b-run-code", **it, code="x = 40\nprint('out')\nx + 2")
            kept = await called(client, "e2b-run-code", **it, code="x")
            wrong = await called(client, "e2b-run-code", **it, code="1 / 0")
            plot = "import matplotlib.pyplot as plt; plt.plot([1], [2]); plt.show()"
            plotted = await called(client, "e2b-run-code", **it, code=plot)
            late = await called(client, "e2b-run-code", **it, code="while True: pass", timeout=seconds(1))
            after = await called(client, "e2b-run-code", **it, code="x")
            long = await called(client, "e2b-run-code", **it, code="print('y' * 1_000_000)")
            assert "there are: python" in await refused(client, "e2b-run-code", **it, code="1", language="cobol")
        finally:
            await called(client, "e2b-kill-sandbox", **it)

    assert (first["text"], first["stdout"]) == ("42", "out\n")
    assert kept["text"] == "40"
    assert (wrong["error"]["name"], wrong["error"]["value"]) == ("ZeroDivisionError", "division by zero")
    assert plotted["results"][0]["chart"]["type"] == "line"
    assert "pictures are left out" in plotted["note"]
    assert late["timedOut"]
    assert after["text"] == "40"
    assert long["truncated"]
    assert len(long["stdout"]) < 100_000


def test_the_inspector_runs_code_too(interpreter: Sandbox, emberbox: Emberbox, tmp_path) -> None:  # type: ignore[no-untyped-def]
    call = ["--method", "tools/call", "--tool-name", "e2b-run-code"]
    arguments = ["--tool-arg", f"sandboxID={interpreter.sandbox_id}", "--tool-arg", "code=print('inspected')"]

    answer = inspector.inspect(emberbox, tmp_path, *call, *arguments)

    assert answer["structuredContent"]["stdout"] == "inspected\n"


async def test_running_code_elsewhere_says_which_template_has_it(emberbox: Emberbox) -> None:
    async with over_http(emberbox) as client, a_sandbox(client) as sandbox_id:
        assert "code-interpreter-v1" in await refused(client, "e2b-run-code", sandboxID=sandbox_id, code="1")


def test_the_javascript_client(template: str, emberbox: Emberbox, tmp_path) -> None:  # type: ignore[no-untyped-def]
    node.run_tests(emberbox, tmp_path, "code_interpreter.mjs")


def _answers(sandbox: Sandbox) -> bool:
    try:
        return sandbox.run_code("6 * 7").text == "42"
    except (e2b.SandboxException, httpx.TransportError):
        return False
