"""Ways to isolate a machine, behind one protocol (`base.py`). Called by `node`."""
