"""Layers: the base image, OCI pull, build steps. Called by `node`."""
