"""The Python kernel: an ordinary IPython one that also gives the data of tables and charts."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import zmq
from ipykernel.kernelapp import IPKernelApp
from IPython.core.formatters import BaseFormatter
from traitlets import ObjectName, Unicode
from traitlets.config import Config

_saved: dict[str, str | None] = {}


def push_env(variables: Mapping[str, str]) -> None:
    """Set environment variables and remember what they were."""
    _saved.clear()
    _saved.update({name: os.environ.get(name) for name in variables})
    os.environ.update(variables)


def pop_env() -> None:
    """Put back what `push_env` changed."""
    for name, value in _saved.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _saved.clear()


class _DataFormatter(BaseFormatter):  # type: ignore[misc]
    format_type = Unicode("e2b/data")
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = dict

    def __call__(self, value: Any) -> dict[str, Any] | None:
        return _table(value) if _is(value, "pandas", "DataFrame") else None


class _ChartFormatter(BaseFormatter):  # type: ignore[misc]
    format_type = Unicode("e2b/chart")
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = dict

    def __call__(self, value: Any) -> dict[str, Any] | None:
        return _chart(value) if _is(value, "matplotlib.figure", "Figure") else None


def _is(value: Any, package: str, name: str) -> bool:
    """Whether a value is of a class, without importing that: registered printers are removed by matplotlib."""
    return any(base.__name__ == name and base.__module__.startswith(package) for base in type(value).__mro__)


def _table(frame: Any) -> dict[str, list[Any]] | None:
    """Column name -> its values, as JSON has them."""
    with contextlib.suppress(Exception):
        return {
            str(name): json.loads(frame.iloc[:, at].to_json(orient="values", date_format="iso"))
            for at, name in enumerate(frame.columns)
        }
    return None


def _chart(figure: Any) -> dict[str, Any] | None:
    with contextlib.suppress(Exception):
        from e2b_charts import chart_figure_to_dict

        return chart_figure_to_dict(figure)
    return None


def _add_formatters(shell: Any) -> None:
    for kind in (_DataFormatter, _ChartFormatter):
        formatter = kind(parent=shell.display_formatter)
        shell.display_formatter.formatters[formatter.format_type] = formatter


class PythonKernelApp(IPKernelApp):  # type: ignore[misc]
    def init_iopub(self, context: zmq.Context[Any]) -> None:
        # Without a high-water mark: a loop that prints faster than the server reads loses nothing.
        context.setsockopt(zmq.SNDHWM, 0)
        super().init_iopub(context)


def main() -> None:
    config = Config()
    config.HistoryManager.enabled = False
    app = PythonKernelApp.instance(config=config)
    app.initialize()
    _add_formatters(app.shell)
    # Python starts with -P: a file of the user's directory must not stand for a module that the kernel needs.
    # From here on cells may import such files.
    if "" not in sys.path:
        sys.path.insert(0, "")
    app.start()


if __name__ == "__main__":
    main()
