"""Runs code in Jupyter kernels for E2B's code interpreter clients, over HTTP on port 49999."""
