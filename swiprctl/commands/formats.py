"""How the scores of several images are printed."""

from __future__ import annotations

import json

from swiprctl.protocol import SwiprError
from swiprctl.terminal import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from swiprctl.protocol import Result

_ESCAPED = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r"})


class Bare:
    """The scores and nothing else, for one image. Every other ``--format`` is a class below.

    Args:
        labels: print the label before each score.
        top: print only the label with the highest score, and that score.
    """

    def __init__(self, *, labels: bool, top: bool) -> None:
        self._labels = labels
        self._top = top

    def first(self, result: Result) -> str:
        """Return what stands before the first image."""
        return ""

    def image(self, name: str, result: Result) -> str:
        """Return what is printed for one image.

        Raises:
            SwiprError: it cannot stand among the others.
        """
        return f"{self.scores(result)}\n"

    def last(self, count: int) -> str:
        """Return what stands behind the last image, where ``count`` were printed."""
        return ""

    def scores(self, result: Result) -> str:
        """Return the scores with six decimals and a comma between them."""
        labels = self._labels or self._top
        pairs = [top_of(result)] if self._top else zip(result.labels, result.scores, strict=True)
        return ",".join(
            f"{printable(label)}={score:.6f}" if labels else f"{score:.6f}"
            for label, score in pairs
        )


class Tuple(Bare):
    """The scores, two spaces and the name, as sha256sum prints its sums.

    A name with a backslash or an end of line in it has these escaped, and a backslash stands
    before the line to say so.
    """

    def image(self, name: str, result: Result) -> str:
        """Return the line for an image."""
        escaped = name.translate(_ESCAPED)
        mark = "" if escaped == name else "\\"
        return f"{mark}{self.scores(result)}  {escaped}\n"


class Csv(Bare):
    """RFC 4180, but with newlines alone: a column for the name and one for each label."""

    def __init__(self, *, labels: bool, top: bool) -> None:
        super().__init__(labels=labels, top=top)
        self._columns: tuple[str, ...] = ()

    def first(self, result: Result) -> str:
        """Return the header."""
        self._columns = result.labels
        return _row("path", *(("label", "score") if self._top else result.labels))

    def image(self, name: str, result: Result) -> str:
        """Return the row for an image."""
        if self._top:
            label, score = top_of(result)
            return _row(name, label, f"{score:.6f}")
        if result.labels != self._columns:
            raise other_labels(name)
        return _row(name, *(f"{score:.6f}" for score in result.scores))


class NdJson(Bare):
    """One JSON object a line, with all that the daemon says and every digit of it."""

    def image(self, name: str, result: Result) -> str:
        """Return the line for an image."""
        return f"{self._object(name, result)}\n"

    def _object(self, name: str, result: Result) -> str:
        fields: dict[str, Any] = {"path": name}
        if self._top:
            fields["label"], fields["score"] = top_of(result)
        else:
            fields |= {"scores": result.scores, "labels": result.labels}
        fields |= {
            "model": result.model,
            "engine": result.engine,
            "precision": result.precision,
            "ms": result.ms,
            "decode_ms": result.decode_ms,
        }
        return json.dumps(fields, allow_nan=False)


class Json(NdJson):
    """The same objects as one array."""

    def __init__(self, *, labels: bool, top: bool) -> None:
        super().__init__(labels=labels, top=top)
        self._before = "[\n"

    def image(self, name: str, result: Result) -> str:
        """Return the element for an image, and what separates it from the one before."""
        before, self._before = self._before, ",\n"
        return f"{before}{self._object(name, result)}"

    def last(self, count: int) -> str:
        """Return the end of the array."""
        return "\n]\n" if count else "[]\n"


def other_labels(name: str) -> SwiprError:
    """Return the error for an image whose scores cannot stand among those before it."""
    return SwiprError("model_changed", f"{name}: the daemon's labels have changed; score it again")


def top_of(result: Result) -> tuple[str, float]:
    """Return the label with the highest score, and that; of equal ones, the first."""
    score = max(result.scores)
    return result.labels[result.scores.index(score)], score


def _row(*fields: str) -> str:
    return ",".join(map(_field, fields)) + "\n"


def _field(text: str) -> str:
    if any(c in text for c in ',"\n\r') or text != text.strip():
        return '"' + text.replace('"', '""') + '"'
    return text
