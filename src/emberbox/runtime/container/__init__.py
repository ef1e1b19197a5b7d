"""Containers: runc with an OCI bundle made here."""
