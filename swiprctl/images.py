"""Images on the program's side: a path, or a file object, to the descriptor that is sent.

Standard library only. The program opens its images itself, so the daemon needs no permission of
its own to read them.
"""

from __future__ import annotations

import errno
import io
import os

from swiprctl.protocol import SwiprError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO, Final

    Image = str | bytes | os.PathLike[str] | BinaryIO

MAX_STREAM: Final = 2**30
"""Bytes taken of what is no file: no daemon can be told to take larger ones."""
_CHUNK: Final = 2**16
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors for want of descriptors or memory: they say nothing about the image."""


def open_image(image: Image) -> int:
    """Return a descriptor of ``image``, for the caller to close.

    Args:
        image: a path, or an object with ``read`` that gives bytes. What such an object still has
            to give is the image; a file that stands at its beginning is sent as it is.

    Raises:
        SwiprError: ``not_found``, ``permission_denied``, ``not_a_file``, ``too_large``, or ``busy``
            for want of descriptors.
    """
    if isinstance(image, (str, bytes, os.PathLike)):
        return _open_path(os.fsdecode(image))
    return _open_stream(image)


def name_of(image: Image) -> str:
    """Return what ``image`` is called in messages."""
    if isinstance(image, (str, bytes, os.PathLike)):
        return os.fsdecode(image)
    name = getattr(image, "name", None)
    return name if isinstance(name, str) else "-"


def absolute_name(image: Image) -> str:
    """Return what ``image`` is called on the wire: a path is absolute there."""
    name = name_of(image)
    try:
        return os.path.abspath(name) if isinstance(image, (str, bytes, os.PathLike)) else name
    except OSError:  # the working folder is gone; beside a descriptor any name does
        return name


def _open_path(path: str) -> int:
    # O_NONBLOCK: a FIFO without a writer must not hang us. The daemon looks at what it is.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if not path:
        raise SwiprError("not_found", "the path is empty")
    try:
        return os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise SwiprError("not_found", f"{path}: no such file") from None
    except PermissionError:
        raise SwiprError("permission_denied", f"{path}: no permission to read it") from None
    except OSError as error:
        code = "busy" if error.errno in _EXHAUSTED else "not_a_file"
        raise SwiprError(code, f"{path}: cannot be opened: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise SwiprError("not_found", f"{path}: no such file: {error}") from None


def _open_stream(stream: BinaryIO) -> int:
    try:
        # Others, like gzip's, have the descriptor of what they read from.
        is_plain = isinstance(getattr(stream, "raw", stream), io.FileIO)
        if is_plain and stream.tell() == 0 and _is_regular(stream.fileno()):
            return os.dup(stream.fileno())
    except (OSError, AttributeError):  # it has no position, or no descriptor
        pass
    try:
        return _copy(stream)
    except OSError as error:
        code = "busy" if error.errno in _EXHAUSTED else "not_a_file"
        name = name_of(stream)
        raise SwiprError(code, f"{name}: cannot be read: {error.strerror}") from None


def _copy(stream: BinaryIO) -> int:
    # Anonymous memory is a regular file to whoever is sent it; see memfd_create(2).
    fd = os.memfd_create("image")
    try:
        size = 0
        while data := stream.read(_CHUNK):
            size += len(data)
            if size > MAX_STREAM:
                raise SwiprError("too_large", f"expected at most {MAX_STREAM} bytes, and more came")
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_regular(fd: int) -> bool:
    import stat  # not for a path, which is what there mostly is

    return stat.S_ISREG(os.fstat(fd).st_mode)
