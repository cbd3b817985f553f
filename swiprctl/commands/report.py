"""swiprctl report: one page that shows images and their scores. The page itself is report.html."""

from __future__ import annotations

import json
import os
import pkgutil
import stat
import time
import urllib.parse

import swiprctl
from swiprctl.commands.formats import other_labels
from swiprctl.commands.scoring import Scoring
from swiprctl.defaults import RELOAD_TIMEOUT
from swiprctl.protocol import SwiprError
from swiprctl.terminal import FAILED, NotWritten, in_words, status_of, tell

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any, BinaryIO, Final

    from swiprctl.client import Client
    from swiprctl.protocol import Result

THUMBNAIL: Final = 160
"""Pixels on the longer side; such a JPEG has some 5 KB."""
MARK: Final = b"@DATA@\n"
"""The line of report.html that the data takes the place of."""
_ESCAPED: Final = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
FEW: Final = 3
"""Sources that are all named in the title."""
_REST: Final = "(all the rest)"


def report(client: Client, args: argparse.Namespace) -> int:
    """Write the page for all images that ``args`` mean; return the exit status.

    Raises:
        NotWritten: the page cannot be written; what was there before is left as it was.
    """
    path = os.path.realpath(args.output)  # a link stays one
    # Beside it, so that the page appears whole or not at all.
    part = f"{path}.{os.getpid()}.part"
    try:
        mode = _mode_of(path)
        file = open(part, "xb")  # noqa: SIM115 - closed below, and known then to be whole
    except OSError as error:
        raise NotWritten(FAILED, f"{args.output}: {error.strerror}") from None
    try:
        with file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            try:
                status = Page(file, os.path.dirname(path)).write(client, args)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise NotWritten(FAILED, f"{args.output}: {error.strerror}") from None
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    return status


def _mode_of(path: str) -> int | None:
    """Return the mode of the page that is to be replaced; None: there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise NotWritten(FAILED, f"{path}: expected a file to replace, got something else")
    return stat.S_IMODE(found.st_mode)


class Page:
    """The page on its way into ``file``. An image is written when it is scored, and not kept.

    Args:
        file: open for writing.
        folder: where the page will stand, from which its links lead.
    """

    def __init__(self, file: BinaryIO, folder: str) -> None:
        self._file = file
        self._folder = folder or "."

    def write(self, client: Client, args: argparse.Namespace) -> int:
        """Write it all; return the exit status."""
        before, _, after = _template().partition(MARK)
        self._file.write(before + b'{"pictures":[')
        failures: list[tuple[str, str, str]] = []
        scoring = Scoring(
            client,
            args,
            timeout=args.timeout or RELOAD_TIMEOUT,
            recursive=True,
            thumbnail=THUMBNAIL,
            failures=failures,
        )
        first: Result | None = None
        try:
            for name, result in scoring.run():
                if first is not None and result.labels != first.labels:
                    scoring.refuse(name, other_labels(name))
                    continue
                separator = b"" if first is None else b",\n"
                self._file.write(separator + encoded(self._picture(name, result)))
                first = first or result
            status = scoring.status
        except SwiprError as error:
            # What has been scored is worth having, as long as it does not look like everything.
            tell(in_words(error))
            failures.append((_REST, error.code, error.message))
            status = status_of(error)
        if first is None and not failures:  # of which it has been told
            raise NotWritten(FAILED, None)
        self._file.write(b"],\n" + encoded(_about(args, first, failures))[1:] + b"\n" + after)
        return status

    def _picture(self, name: str, result: Result) -> dict[str, Any]:
        small = result.thumbnail
        return {
            "name": name,
            "href": None if name == "-" else self._link(name),
            "scores": result.scores,
            "thumbnail": small and small.data,
            "width": small and small.width,
            "height": small and small.height,
        }

    def _link(self, name: str) -> str:
        return urllib.parse.quote(os.fsencode(os.path.relpath(name, self._folder)))


def _about(
    args: argparse.Namespace, first: Result | None, failures: list[tuple[str, str, str]]
) -> dict[str, Any]:
    return {
        "title": _title([*args.paths, *filter(None, [args.files_from])]),
        "made": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "version": swiprctl.__version__,
        "model": first.model if first else "-",
        "engine": first.engine if first else "-",
        "precision": first.precision if first else "-",
        "labels": first.labels if first else [],
        "errors": [
            {"name": name, "code": code, "message": message} for name, code, message in failures
        ],
    }


def _title(sources: list[str]) -> str:
    more = len(sources) - FEW
    return ", ".join(sources[:FEW]) + (f" and {more} more" if more > 0 else "")


def _template() -> bytes:
    data = pkgutil.get_data("swiprctl.commands", "report.html")  # from a zip file, too
    assert data is not None, "the package has a loader that gives data"
    return data


def encoded(fields: dict[str, Any]) -> bytes:
    """Return ``fields`` as JSON that can stand in a script element: no name in it can end that."""
    return json.dumps(fields, separators=(",", ":"), allow_nan=False).translate(_ESCAPED).encode()
