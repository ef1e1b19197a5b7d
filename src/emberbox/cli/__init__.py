"""The `emberbox` command. Nothing imports it."""
