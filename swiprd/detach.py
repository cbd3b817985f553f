"""Going on in the background without a service manager, by python-daemon.

What can go wrong is tried before the terminal is left: the shell's prompt comes back when the
daemon listens, or with the reason why it does not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence

from swiprd.lock import ForeignLockError, is_locked_file, lock_file
from swiprd.log import SYSLOG


class DetachError(Exception):
    """The daemon cannot go on in the background; the message says what stands in the way."""


class PidFile:
    """A file that holds the daemon's process id, and whose lock keeps a second daemon away."""

    def __init__(self, path: str) -> None:
        """Take the lock.

        Raises:
            DetachError: another daemon holds it, or the file cannot be made.
        """
        self.path = path
        try:
            self.fd = lock_file(path, wait=False)
        except BlockingIOError:
            raise DetachError(
                f"a daemon runs already{_named_in(path)}: it holds {path}; stop it or choose"
                " another file with --pid-file"
            ) from None
        except FileNotFoundError:
            raise DetachError(
                f"cannot make {path}: its folder is not there; make it or choose another file with"
                " --pid-file"
            ) from None
        except ForeignLockError as error:
            raise DetachError(str(error)) from None
        except OSError as error:
            raise DetachError(f"cannot make {path}: {error.strerror}") from None

    def write(self) -> None:
        """Write this process's id; the lock has come along through the forks."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)

    def remove(self) -> None:
        """Remove the file, unless it is another's by now, and give up its lock."""
        if is_locked_file(self.path, self.fd):
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        os.close(self.fd)


def check_syslog() -> None:
    """Look whether there is a syslog: whoever logs to none loses every line without a word.

    Raises:
        DetachError: there is none.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(SYSLOG)
    except OSError as error:
        raise DetachError(
            f"no syslog listens at {SYSLOG} ({error.strerror}); name a file with --log-file"
        ) from None


def open_log(path: str) -> int:
    """Return a descriptor that appends to ``path``.

    Raises:
        DetachError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise DetachError(f"cannot write to {path}: {error.strerror}") from None


def detach(pid_file: PidFile, keep: Sequence[int], *, log_fd: int | None) -> None:
    """Leave the terminal and the session; the calling process ends with status 0.

    Args:
        pid_file: gets the id of the process that goes on, before the calling one ends.
        keep: other descriptors that are still needed; all the rest is closed.
        log_fd: where standard output and error go from now on; None: nowhere.

    Raises:
        DetachError: python-daemon is not there.
    """
    try:
        import daemon  # only for those who detach
    except ModuleNotFoundError:
        raise DetachError(
            "python-daemon is not installed; install swipr without --no-deps"
        ) from None

    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed when we were started; the number is filled since
            setattr(sys, name, os.fdopen(fd, "r" if fd == 0 else "w"))
    done, tell_done = os.pipe()
    if os.fork():
        os.close(tell_done)
        os._exit(0 if os.read(done, 1) else 1)
    output = None if log_fd is None else open(log_fd, "ab", buffering=0)  # noqa: SIM115
    daemon.DaemonContext(
        detach_process=True,
        files_preserve=[pid_file.fd, tell_done, *keep],
        stdout=output,
        stderr=output,
        # Not SIGTERM: that is the event loop's.
        signal_map=dict.fromkeys((signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)),
        umask=0o077,
    ).open()
    pid_file.write()
    os.write(tell_done, b"\n")
    os.close(tell_done)


def _named_in(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return f" as process {int(file.read(20))}"
    except (OSError, ValueError):
        return ""  # it is just starting, and has not written yet
