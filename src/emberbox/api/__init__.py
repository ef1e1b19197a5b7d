"""The HTTP surface: parse, authorise, call control, shape the answer. Only `cli` starts it."""
