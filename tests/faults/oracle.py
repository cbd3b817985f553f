"""What the protocol promises of any stream of bytes, told without the code that keeps it."""

from __future__ import annotations


def expected_replies(stream: bytes, max_line: int) -> int:
    """Return how many replies a client gets that sends ``stream`` and ends its sending side.

    One for each line, and one for what is left at the end without a newline. A line longer than
    ``max_line`` gets one too, and nothing that comes after it.
    """
    count = 0
    while stream:
        line, _, stream = stream.partition(b"\n")
        count += 1
        if len(line) + 1 > max_line:
            break
    return count
