"""System calls that Python's library does not have, one module a kernel facility. Knows nothing of Emberbox.

Everything here blocks for as long as the kernel takes; async code calls it through `asyncio.to_thread`.
"""
