"""A real swiprd for a test: started, looked into, and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from swiprctl import Client, SwiprError
from swiprctl.protocol import MAX_LINE, LineReader

SWIPRD = (sys.executable, "-P", "-m", "swiprd")
SWIPRCTL = (sys.executable, "-P", "-m", "swiprctl")
PICTURES = Path(__file__).parent / "pictures"
CHELSEA = PICTURES / "chelsea.png"
COFFEE = PICTURES / "coffee.png"


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Return once ``condition`` holds; fail the test when it does not come to hold."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.01)


class Daemon:
    """One daemon process at its own socket. ``stop`` must be called.

    Args:
        folder: an empty folder with a short path; the socket and the log go there.
        flags: what stands on its command line after ``--socket``.
        command: what is started instead, where it is not just the daemon; its word SOCKET
            stands for the path of the socket.
        pass_fds: descriptors that it inherits.
    """

    running: set[int] = set()  # noqa: RUF012 - shared on purpose: whom the leak check expects

    def __init__(
        self,
        folder: Path,
        *flags: str,
        command: Sequence[str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.path = str(folder / "s")
        self._log = folder / "log"
        self.began = time.monotonic()
        words = command or [*SWIPRD, "--socket", "SOCKET", *flags]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [self.path if word == "SOCKET" else word for word in words],
                stderr=log,
                cwd=folder,
                # Not what somebody compiled on this machine.
                env={**os.environ, "SWIPRD_CACHE_DIR": str(folder / "cache")},
                pass_fds=pass_fds,
            )
        self.pid = self.process.pid
        self.running.add(self.pid)
        try:
            wait_until(self._listens, f"a daemon at {self.path}", 30)
        except BaseException:
            self._end()
            raise

    def _listens(self) -> bool:
        assert self.process.poll() is None, f"the daemon ended: {self.log()}"
        return "listening at" in self.log() or self._is_activated()

    def _is_activated(self) -> bool:
        # Somebody else listens for it, and it starts with the first client.
        return "Listening on" in self.log()

    def log(self) -> str:
        """Return what it has logged so far."""
        return self._log.read_text()

    def client(self, timeout: float = 30.0) -> Client:
        """Return a client of this daemon."""
        return Client(self.path, timeout=timeout)

    def connect(self) -> socket.socket:
        """Return a raw connection to this daemon."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(self.path)  # with a time-out, a full backlog would be an error
        sock.settimeout(30)
        return sock

    def status(self) -> dict[str, object]:
        """Return its status."""
        with self.client() as client:
            return client.status()

    def wait_ready(self) -> None:
        """Return once a worker has its model loaded."""
        wait_until(lambda: self.status()["state"] == "ready", f"a worker; {self.log()}")

    def all_ready(self) -> bool:
        """Return whether every worker has its model loaded."""
        with self.client() as client:
            return all(worker["state"] == "ready" for worker in client.status()["workers"])

    def descriptors(self) -> int:
        """Return how many descriptors the front has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def descriptors_soon(self) -> int:
        """Return how many it has without what it is about to close."""
        counts = []
        for _ in range(5):
            time.sleep(0.02)
            counts.append(self.descriptors())
        return min(counts)

    def descriptors_at_rest(self) -> int:
        """Return how many it has while it has one client."""
        with self.client() as client:
            wait_until(lambda: client.status()["connections"] == 1, "the other clients to be gone")
            return self.descriptors_soon()

    def worker_pids(self) -> list[int]:
        """Return the processes that the daemon has started."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")
        return [int(pid) for children in tasks for pid in children.read_text().split()]

    def stop(self) -> int:
        """End it with SIGTERM and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self._end()

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.running.discard(self.pid)


def exchange(sock: socket.socket, data: bytes) -> list[bytes]:
    """Send ``data``, end the sending side, and return the lines that come back until the end."""
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    return read_lines(sock)


def read_lines(sock: socket.socket, count: int | None = None) -> list[bytes]:
    """Return the next ``count`` lines from ``sock`` and leave the others, or all until its end."""
    reader = LineReader(max_line=MAX_LINE)
    lines: list[bytes] = []
    while count is None or len(lines) < count:
        waiting = sock.recv(4096, socket.MSG_PEEK)
        if not waiting:
            break
        reader.feed(sock.recv(waiting.find(b"\n") + 1 or len(waiting)))
        while (line := reader.next_line()) is not None:
            lines.append(line.data)
    return lines


def code_of(call: Callable[[], object]) -> str:
    """Return the code of the error that ``call`` raises."""
    try:
        call()
    except SwiprError as error:
        return error.code
    raise AssertionError("expected a SwiprError")


def can_compute(client: Client) -> bool:
    """Return whether a picture is scored, and rightly; False while no model is served."""
    try:
        return client.compute(CHELSEA).scores[1] > 0.9
    except SwiprError as error:
        if error.code != "unavailable":
            raise
        return False
