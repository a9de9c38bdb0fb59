"""Faults in the file operations of a run: a kill, a torn write, a full disk, an error of the disk, at any operation.

`shim.c` stands between a process and the C library. `preloaded.py` is a process with the shim that has imported
everything and forks for every run. `points.py` says what must hold after a fault.
"""
