"""What the daemon measures of itself: how long images take, and how much memory processes hold."""

from __future__ import annotations

import math
import resource
from collections import deque
from typing import Final

from swiprctl.protocol import Result

WINDOW: Final = 1000
"""Images whose times the quantiles are taken of: the last ones."""
QUANTILES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class Latency:
    """How long the parts of an image's way took, in milliseconds.

    ``decode`` is the worker's reading, decoding and preprocessing, ``compute`` the rest of its
    work, ``whole`` all from when the request was read until the reply was there, the wait for a
    worker included.

    Attributes:
        images: how many were scored.
    """

    def __init__(self) -> None:
        self.images = 0
        self._recent = {
            part: deque[float](maxlen=WINDOW) for part in ("decode", "compute", "whole")
        }
        self._sums = dict.fromkeys(self._recent, 0.0)

    def note(self, result: Result, whole: float) -> None:
        """Take note of an image that was scored, in ``whole`` milliseconds.

        What the worker says of its own part is believed within that: it may be anything, where a
        picture has taken the worker over.
        """
        self.images += 1
        worked = min(max(result.ms, 0.0), whole)
        decode = min(max(result.decode_ms, 0.0), worked)
        for part, ms in (("decode", decode), ("compute", worked - decode), ("whole", whole)):
            self._recent[part].append(ms)
            self._sums[part] += ms

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Return quantiles of each part, None where there was no image, and its sum of all."""
        return {
            part: {**_quantiles(recent), "sum": round(self._sums[part], 3)}
            for part, recent in self._recent.items()
        }


def _quantiles(values: deque[float]) -> dict[str, float | None]:
    ranked = sorted(values)
    # By nearest rank: a time that an image really took.
    return {
        name: round(ranked[math.ceil(share * len(ranked)) - 1], 3) if ranked else None
        for name, share in QUANTILES.items()
    }


def memory_of(pid: int | str) -> int:
    """Return the bytes of memory that a process holds, shared ones included; 0 when it is gone.

    Args:
        pid: its process id, or ``self``.
    """
    try:
        with open(f"/proc/{pid}/statm", "rb") as statm:  # see proc(5): in pages
            return int(statm.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0
