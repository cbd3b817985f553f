"""A listening Unix socket of our own, for a daemon that no service manager handed one."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from typing import Final

from swiprd.lock import ForeignLockError, lock_file

MODE: Final = 0o660
BACKLOG: Final = 128


class ListenError(Exception):
    """The socket cannot be had; the message says what stands in the way."""


class OwnSocket:
    """A bound, listening, non-blocking Unix stream socket, and its file.

    A file left behind by a dead daemon is replaced, but only when it is a socket on which nobody
    answers. It is taken away again at the end, unless another daemon has replaced it since.
    """

    def __init__(self, path: str) -> None:
        """Bind ``path`` with mode 0660. Not for several threads.

        Raises:
            ListenError: somebody answers there, something else stands there, or no permission.
        """
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _alone_at(path), _umask(0o777 & ~MODE):
                self._bind()
                self.socket.listen(BACKLOG)
            self.socket.setblocking(False)
            self._identity = _identity(path)
        except FileNotFoundError:
            self.socket.close()
            raise ListenError(
                f"cannot listen at {path}: its folder is not there; make it or choose another path"
            ) from None
        except OSError as error:
            self.socket.close()
            raise ListenError(f"cannot listen at {path}: {error.strerror or error}") from None
        except ForeignLockError as error:
            self.socket.close()
            raise ListenError(f"cannot listen at {path}: {error}") from None
        except ListenError:
            self.socket.close()
            raise

    def _bind(self) -> None:
        try:
            self.socket.bind(self.path)
        except OSError:
            _remove_stale(self.path)
            self.socket.bind(self.path)

    def unlink(self) -> None:
        """Remove the file; who has connected by then can still be accepted."""
        try:
            if _identity(self.path) == self._identity:
                os.unlink(self.path)
        except OSError:
            pass  # gone already, or no longer ours to remove

    def close(self) -> None:
        """Remove the file and close the socket."""
        self.unlink()
        self.socket.close()


@contextlib.contextmanager
def _alone_at(path: str) -> Iterator[None]:
    """Keep other starting daemons waiting.

    What is bound and does not listen yet looks just like what a dead daemon left behind.
    """
    name = path + ".lock"
    lock = lock_file(name, wait=True)
    try:
        yield
    finally:
        os.unlink(name)
        os.close(lock)


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return  # bind failed for another reason and will say so again
    if not stat.S_ISSOCK(mode):
        raise ListenError(
            f"cannot listen at {path}: something that is no socket stands there; remove it or"
            " choose another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its backlog is full: very much alive
    raise ListenError(
        f"cannot listen at {path}: a daemon answers there already, or systemd for one; stop it"
        " (systemctl stop swipr.socket swipr.service) or choose another path"
    )
