"""The languages: which kernel runs each, and how a piece of code in it sets environment variables."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from jupyter_client.kernelspec import KernelSpecManager

from interpreter.errors import Invalid


@dataclass(frozen=True)
class Language:
    """`push_env` gives code that sets variables for one execution, `pop_env` code that puts back what they were."""

    name: str
    kernel: str
    transport: str
    """`ipc` where the kernel can: a Unix socket is no port that the sandbox shows to the world."""
    push_env: Callable[[Mapping[str, str]], str]
    pop_env: Callable[[Iterable[str]], str]
    late_seconds: float = 0.0
    """How much later than the end of an execution the kernel may still tell of its result."""
    displays_values: bool = False
    """The kernel displays the values of expressions, and has no results apart from that."""


def _python_push(variables: Mapping[str, str]) -> str:
    return f"__import__('interpreter_kernel').push_env({dict(variables)!r})"


def _python_pop(_: Iterable[str]) -> str:
    return "__import__('interpreter_kernel').pop_env()"


def _bash_push(variables: Mapping[str, str]) -> str:
    return "\n".join(
        f'__had_{name}="${{{name}+x}}"; __old_{name}="${{{name}-}}"; export {name}={shlex.quote(value)}'
        for name, value in variables.items()
    )


def _bash_pop(names: Iterable[str]) -> str:
    return "\n".join(
        f'if [ -n "$__had_{name}" ]; then export {name}="$__old_{name}"; else unset {name}; fi; '
        f"unset __had_{name} __old_{name}"
        for name in names
    )


_SAVED = 'globalThis[Symbol.for("interpreter.env")]'


def _deno_push(variables: Mapping[str, str]) -> str:
    return (
        f"for (const [k, v] of Object.entries({json.dumps(dict(variables))})) "
        f"{{ ({_SAVED} ??= {{}})[k] = Deno.env.get(k) ?? null; Deno.env.set(k, v); }}"
    )


def _deno_pop(names: Iterable[str]) -> str:
    return (
        f"for (const k of {json.dumps(list(names))}) {{ const v = {_SAVED}?.[k] ?? null; "
        "if (v === null) Deno.env.delete(k); else Deno.env.set(k, v); }"
    )


def _r_text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _r_push(variables: Mapping[str, str]) -> str:
    names = ", ".join(_r_text(name) for name in variables)
    pairs = ", ".join(f"`{name}` = {_r_text(value)}" for name, value in variables.items())
    return f"options(interpreter.env = Sys.getenv(c({names}), unset = NA, names = TRUE)); Sys.setenv({pairs})"


def _r_pop(_: Iterable[str]) -> str:
    return (
        'local({ old <- getOption("interpreter.env"); Sys.unsetenv(names(old)[is.na(old)]); '
        "old <- old[!is.na(old)]; if (length(old)) do.call(Sys.setenv, as.list(old)) })"
    )


_ALL = {
    language.name: language
    for language in (
        Language("python", "ipython", "ipc", _python_push, _python_pop),
        Language("bash", "bash", "ipc", _bash_push, _bash_pop),
        Language("javascript", "deno", "tcp", _deno_push, _deno_pop, late_seconds=0.05),
        Language("typescript", "deno", "tcp", _deno_push, _deno_pop, late_seconds=0.05),
        Language("r", "ir", "tcp", _r_push, _r_pop, displays_values=True),
    )
}
_OTHER_NAMES = {
    "python3": "python",
    "py": "python",
    "js": "javascript",
    "ts": "typescript",
    "sh": "bash",
    "shell": "bash",
}


def find_language(name: str) -> Language:
    """The language that `name` means, in any case.

    Raises:
        Invalid: no kernel of this template runs it; names those that there are.
    """
    folded = name.strip().lower()
    language = _ALL.get(_OTHER_NAMES.get(folded, folded))
    installed = KernelSpecManager().find_kernel_specs()
    if language is None or language.kernel not in installed:
        there = ", ".join(each.name for each in _ALL.values() if each.kernel in installed)
        raise Invalid(f"language {name[:64]!r} is not supported; there are: {there}")
    return language
