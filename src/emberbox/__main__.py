"""`python -m emberbox`: the same as the `emberbox` command."""

from emberbox.cli.main import run

run()
