"""The traffic door: HAProxy's configuration and its live route maps. Knows routes, nothing else."""
