"""The published capabilities of the Sandbox API: what they are, and the documents that describe them.

`catalogue.py` is the one list of operations and tools; everything else here is made from it.
"""
