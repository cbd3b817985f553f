"""The command swiprctl: words in, answers out, an exit status.

What is asked most is answered by ``swiprctl.quick``, all else by ``swiprctl.commands.run``.
"""

from __future__ import annotations

import os
import sys
import time

from swiprctl import quick
from swiprctl.terminal import INTERRUPTED, NotWritten, in_words, status_of, tell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def run() -> None:
    """Run ``main`` and leave. What the console script calls."""
    status = main()
    # All is written. To take the interpreter apart takes a tenth of a whole ping.
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(words)
    except NotWritten as failure:
        if failure.reason is not None:
            tell(f"cannot write the answer: {failure.reason}")
        return failure.status
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        from swiprctl.protocol import SwiprError  # not before there is one

        if not isinstance(error, SwiprError):
            raise
        tell(in_words(error))
        return status_of(error)


def _run(words: Sequence[str]) -> int:
    began = time.monotonic()
    status = quick.answer(words)
    if status is None:
        # In tenths of a second: nothing, where nobody was asked.
        spent = round(time.monotonic() - began, 1)
        from swiprctl.commands import run

        status = run.run(words, spent=spent)
    return status


if __name__ == "__main__":
    run()
