"""How a test runs a coroutine to a clean end, and code without the superuser's rights."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

NOBODY = 65534
PATIENCE = 30.0
"""Seconds after which whatever a test waits for will not come."""

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T], seconds: float = 2 * PATIENCE) -> T:
    """Return what ``coroutine`` returns; fail when it leaves a task behind or an error unseen."""
    unseen: list[dict[str, Any]] = []

    async def main() -> T:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: unseen.append(context))
        async with asyncio.timeout(seconds):
            result = await coroutine
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"
        return result

    result = asyncio.run(main())
    gc.collect()  # a task or future whose error nobody took tells so when it goes
    assert not unseen, f"errors that nobody has seen: {unseen}"
    return result


async def until(condition: Callable[[], bool], what: str) -> None:
    """Return once ``condition`` holds; the event loop goes on meanwhile."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"waited {PATIENCE:g} s in vain for {what}") from None


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Run the block without the superuser's rights, where the tests have them."""
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if privileged:
            os.seteuid(0)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let child processes be interrupted, even where we were started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def descriptors() -> set[str]:
    """Return the open descriptors of this process and what they lead to."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return found
