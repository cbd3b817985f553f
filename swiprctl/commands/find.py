"""Which images a command line means: paths, folders, lists of paths, standard input."""

from __future__ import annotations

import os
import sys

from swiprctl.protocol import SwiprError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator
    from io import BufferedReader
    from typing import Final

    from swiprctl.images import Image

SUFFIXES: Final = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""What the names of files that are taken from a folder end in, in any case. A file that is named
itself is taken whatever its name."""
STDIN: Final = "-"


def find_images(
    args: argparse.Namespace, refuse: Callable[[str, SwiprError], None], *, recursive: bool
) -> Iterator[Image]:
    """Yield the images that ``args`` mean, in order: those of a folder by name.

    Args:
        args: ``paths``, ``files_from`` and ``null``.
        refuse: told of what cannot be gone through or read; the rest goes on.
        recursive: take what is in folders, and in folders below. Links to folders are followed
            only where they are named themselves, so that none leads round in a circle.
    """
    for path in args.paths:
        if path != STDIN:
            yield from _at(path, refuse, recursive)
            continue
        try:
            stdin = _open_stdin()
        except SwiprError as error:
            refuse(path, error)
        else:
            yield stdin
    if args.files_from is not None:
        try:
            for path in read_names(args.files_from, b"\0" if args.null else b"\n"):
                yield from _at(path, refuse, recursive)
        except SwiprError as error:
            refuse(args.files_from, error)


def _at(path: str, refuse: Callable[[str, SwiprError], None], recursive: bool) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
    elif recursive:
        yield from _below(path, refuse)
    else:
        folder = SwiprError("not_a_file", f"{path}: is a folder; -r takes the images in it")
        refuse(path, folder)


def _below(folder: str, refuse: Callable[[str, SwiprError], None]) -> Iterator[str]:
    waiting = [(folder, True)]  # the next one last: folders may be nested deeper than calls can be
    while waiting:
        path, is_folder = waiting.pop()
        if not is_folder:
            yield path
            continue
        try:
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name, reverse=True)
            folders = {entry.path for entry in entries if entry.is_dir(follow_symlinks=False)}
        except OSError as error:
            code = "permission_denied" if isinstance(error, PermissionError) else "not_a_file"
            refuse(path, SwiprError(code, f"{path}: cannot be gone through: {error.strerror}"))
            continue
        for entry in entries:
            if entry.path in folders:
                waiting.append((entry.path, True))
            elif entry.name.lower().endswith(SUFFIXES) and not os.path.isdir(entry.path):
                waiting.append((entry.path, False))


def read_names(list_path: str, end: bytes) -> Iterator[str]:
    """Yield the paths in the file ``list_path``, each ended by ``end``; empty ones are left out.

    Raises:
        SwiprError: the file cannot be read.
    """
    try:
        with _open_stdin() if list_path == STDIN else open(list_path, "rb") as file:
            for name in _split(iter(lambda: file.read1(65536), b""), end):
                if name:
                    yield os.fsdecode(name)
    except _NulError:
        raise SwiprError(
            "not_a_file", f"{list_path}: its paths end with NUL, not a newline; add -0"
        ) from None
    except FileNotFoundError:
        raise SwiprError("not_found", f"{list_path}: no such file, for --files-from") from None
    except OSError as error:
        raise SwiprError("not_a_file", f"{list_path}: cannot be read: {error.strerror}") from None


class _NulError(Exception):
    """A NUL stands where no path has one."""


def _split(chunks: Iterable[bytes], end: bytes) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        if end != b"\0" and b"\0" in chunk:
            raise _NulError
        *whole, rest = (rest + chunk).split(end)
        yield from whole
    yield rest


def _open_stdin() -> BufferedReader:
    if sys.stdin is None:  # its number may be another file's by now
        raise SwiprError("not_a_file", "standard input is closed")
    return open(sys.stdin.fileno(), "rb", closefd=False)
