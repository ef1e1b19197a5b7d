"""Carrying out builds: sources, steps in a machine, the cache of what steps left. Called by `node.builds` alone."""
