"""The compiled forms of bundles: where they are kept, and which of them may be run.

A compiled form is machine code in a shared library: whoever can write it can do what this process
can. So a form is loaded only when root or this process's own user wrote it, where nobody else can
write, and only when it is byte for byte what was compiled, from this very bundle, for this torch
and for this processor. Two files make one form; the record is written last, and its digest names
the library::

    NAME.json          what it was made from and for, and the digest of the library
    NAME-DIGEST.so     the library

NAME is made from the bundle's digest, torch's version, the processor's features, the number of
threads and the precision.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from typing import Any, Final

import torch

FORMAT: Final = 1
PRECISIONS: Final = ("fp32", "bf16")
MAX_RECORD: Final = 65536
"""Longest record in bytes."""


class CompiledError(Exception):
    """A compiled form is there and cannot be used; the message is one line that says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """What compiled code depends on.

    Attributes:
        torch: its version.
        processor: the features that it has, by torch's names; none where torch cannot tell.
        threads: torch computes with. Weights are laid out for so many; with another number they
            are laid out anew for every picture (ResNeXt-50 in one thread: 111 ms compiled for one,
            275 for two; eager 132).
    """

    torch: str
    processor: tuple[str, ...]
    threads: int

    @property
    def computes_bf16(self) -> bool:
        """Whether the processor multiplies bfloat16 by itself; otherwise fp32 is faster."""
        return any(feature.endswith("bf16") for feature in self.processor)


def this_host(threads: int) -> Host:
    """Return what compiled code depends on, of this machine and of ``threads`` to compute with."""
    found = torch.cpu.get_capabilities()
    features = sorted(name for name, value in found.items() if value is True)
    return Host(str(torch.__version__), tuple(features), threads)


@dataclass(frozen=True, slots=True)
class Form:
    """A compiled form that may be run: the path of its library, and its precision."""

    path: str
    precision: str


class FormCache:
    """The compiled forms in one folder, for one host.

    Args:
        folder: need not exist.
        host: for which forms are looked up and kept.
        user: by number, who runs them, and may have written them beside root; None: this process's
            own. Whoever names another does not run them.
    """

    def __init__(self, folder: str, host: Host, *, user: int | None = None) -> None:
        self.folder = os.path.realpath(folder)
        self.host = host
        self._trusted = (0, os.geteuid() if user is None else user)

    def prepare(self) -> None:
        """Make the folder, and see that what will be kept in it may be run.

        Raises:
            OSError: it cannot be made.
            CompiledError: others can write to it, or we cannot, or the processor is not known.
        """
        if not self.host.processor:
            raise CompiledError(
                "torch cannot tell what this processor can do; is /proc/cpuinfo readable?"
            )
        _make_folder(self.folder)
        _check_folder(self.folder, self._trusted)
        if not os.access(self.folder, os.W_OK):
            raise CompiledError(
                f"no permission to write to {self.folder}; run it with sudo, or give --cache-dir"
            )

    def find(self, digest: str, precision: str) -> Form | None:
        """Return the form of the bundle with this digest; None: there is none for this host.

        Raises:
            CompiledError: there is one that must not be run, or cannot be read.
        """
        if not self.host.processor:  # it might be any
            return None
        path = os.path.join(self.folder, self._name(digest, precision) + ".json")
        try:
            with _opened(path, self._trusted) as fd:
                record = os.pread(fd, MAX_RECORD, 0)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CompiledError(f"{path} cannot be read: {error.strerror}") from None
        checksum = _parse(path, record, self._described(digest, precision))
        name = self._name(digest, precision)
        path = os.path.join(self.folder, _library_name(name, checksum))
        try:
            with _opened(path, self._trusted) as fd, open(fd, "rb", closefd=False) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CompiledError(f"{path} cannot be read: {error.strerror}") from None
        if found != checksum:
            raise CompiledError(f"{path} is not what was compiled: cut off, or changed")
        return Form(path, precision)

    def made_for_others(self, digest: str) -> int:
        """Return how many forms of this bundle were made for another host: they are stale here."""
        ours = {self._name(digest, precision) for precision in PRECISIONS}
        try:
            names = os.listdir(self.folder)
        except OSError:
            return 0
        found = {n.removesuffix(".json") for n in names if n.endswith(".json")}
        return sum(name.startswith(_prefix(digest)) for name in found - ours)

    def keep(self, library: str, digest: str, precision: str) -> Form:
        """Copy ``library`` into the folder as the form of a bundle: whole or not at all.

        The folder is there; see ``prepare``.

        Raises:
            OSError: it cannot be written; a form that was there before is there still.
            CompiledError: another process is doing the same.
        """
        name = self._name(digest, precision)
        with open(library, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        target = _library_name(name, checksum)
        record = {**self._described(digest, precision), "sha256": checksum}
        with self._alone():
            before = os.listdir(self.folder)
            try:
                self._put(target, library)
                self._put(f"{name}.json", json.dumps(record).encode())
            except BaseException:
                if target not in before:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(self.folder, target))
                raise
            for old in before:
                if old.startswith(f"{name}-") and old != target:
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(self.folder, old))
        return Form(os.path.join(self.folder, target), precision)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let nobody else keep a form at the same time."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Not waiting: whoever owns the folder could hold the lock for ever.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise CompiledError(
                f"another process keeps a form in {self.folder} just now; try again"
            ) from None
        finally:
            os.close(fd)

    def _put(self, name: str, content: str | bytes) -> None:
        path = os.path.join(self.folder, name)
        temporary = f"{path}.{os.getpid()}.part"
        try:
            # 0644, whatever the umask is: the daemon may run as another user.
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with open(content, "rb") as source:
                        shutil.copyfileobj(source, file, 2**20)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            if isinstance(error, OSError) and error.filename is None:  # a full disk does not say
                error.filename = path
            raise

    def _described(self, digest: str, precision: str) -> dict[str, Any]:
        host = {**asdict(self.host), "processor": list(self.host.processor)}
        return {"format": FORMAT, "bundle": digest, "precision": precision, **host}

    def _name(self, digest: str, precision: str) -> str:
        key = json.dumps([FORMAT, *astuple(self.host)])
        host = hashlib.sha256(key.encode()).hexdigest()
        return f"{_prefix(digest)}{host[:16]}-{precision}"


def _prefix(digest: str) -> str:
    return digest.removeprefix("sha256:")[:32] + "-"


def _library_name(name: str, checksum: str) -> str:
    return f"{name}-{checksum[:16]}.so"


def _parse(path: str, record: bytes, expected: dict[str, Any]) -> str:
    """Return the library's digest."""
    try:
        found = json.loads(record.decode("utf-8"))
    except (ValueError, RecursionError):
        raise CompiledError(f"{path} is not JSON: cut off, or changed") from None
    if not isinstance(found, dict):
        raise CompiledError(f"{path} holds no JSON object")
    for key, value in expected.items():
        if type(found.get(key)) is not type(value) or found[key] != value:
            raise CompiledError(f"{path} is for another bundle or host: its {key!r} differs")
    checksum = found.get("sha256")
    if not isinstance(checksum, str) or not re.fullmatch(r"[0-9a-f]{64}", checksum):
        raise CompiledError(f"{path} has no digest of a library")
    return checksum


# --- whom to trust -------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str, trusted: tuple[int, int]) -> Iterator[int]:
    """Open a regular file that only ``trusted`` users, by number, can have written.

    Raises:
        CompiledError: somebody else could have.
        OSError: it cannot be opened; FileNotFoundError where it is not there.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise CompiledError(f"{path} is no regular file")
        _check_writers(path, found, trusted)
        _check_folder(os.path.dirname(path), trusted)
        yield fd
    finally:
        os.close(fd)


def _make_folder(folder: str) -> None:
    """Make the folder and those above it, for all to read and us to write, whatever the umask."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    if parent != folder:
        _make_folder(parent)
    os.mkdir(folder, 0o700)
    os.chmod(folder, 0o755)  # noqa: S103 - read by the daemon, whoever it runs as


def _check_folder(folder: str, trusted: tuple[int, int]) -> None:
    _check_writers(folder, os.stat(folder), trusted)
    if folder != "/":
        _check_folder(os.path.dirname(folder), trusted)


def _check_writers(path: str, found: os.stat_result, trusted: tuple[int, int]) -> None:
    if found.st_uid not in trusted:
        ours = f" or {trusted[1]}" if trusted[1] else ""
        raise CompiledError(f"{path} belongs to the user {found.st_uid}, expected root{ours}")
    # In a sticky folder, as /tmp, others can add names but not replace those of its owners.
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & 0o022 and not sticky:
        raise CompiledError(
            f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):04o}); take that"
            " right away"
        )
