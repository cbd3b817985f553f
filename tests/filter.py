"""Programs to which the kernel refuses a system call, as old kernels and containers do."""

from __future__ import annotations

import sys

FILTERED = """
import ctypes, os, struct, sys

def step(code, value, jump=0):
    return struct.pack("HBBI", code, 0, jump, value)

number, error = map(int, sys.argv[1:3])
steps = step(0x20, 0) + step(0x15, number, 1) + step(6, 0x50000 | error) + step(6, 0x7FFF0000)
buffer = ctypes.create_string_buffer(steps)
program = struct.pack("HP", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == libc.prctl(22, 2, program, 0, 0) == 0
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Has the kernel answer a system call with an error, by seccomp(2), and runs the other words."""


def filtered(call: int, error: int, *command: str) -> list[str]:
    """Return what runs ``command`` with ``error`` as the answer to each system call ``call``."""
    return [sys.executable, "-c", FILTERED, str(call), str(error), *command]
