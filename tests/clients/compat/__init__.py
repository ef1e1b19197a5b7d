"""The version matrix: one small suite against several releases of the official clients. `make compat` runs it."""
