"""Having all images scored that a command line means."""

from __future__ import annotations

import os

from swiprctl.commands.find import STDIN, find_images
from swiprctl.commands.progress import Progress, is_shown
from swiprctl.images import name_of
from swiprctl.protocol import SwiprError
from swiprctl.terminal import DONE, FAILED, in_words

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from swiprctl.client import Client
    from swiprctl.protocol import Result


class Scoring:
    """The images of a command line, on their way to the daemon and back.

    Args:
        client: of the daemon.
        args: the command line: ``paths``, ``files_from`` and ``null``.
        timeout: seconds without an answer after which to give up.
        recursive: whether to take the images that are in folders.
        thumbnail: longest side of a small copy that is wanted as well; None: none is.

        failures: where to note what could not be scored: name, code and message; None: nowhere.

    Attributes:
        progress: what everything is to be printed through meanwhile.
        status: the exit status so far.
    """

    def __init__(
        self,
        client: Client,
        args: argparse.Namespace,
        *,
        timeout: float,
        recursive: bool,
        thumbnail: int | None = None,
        failures: list[tuple[str, str, str]] | None = None,
    ) -> None:
        self._client = client
        self._args = args
        self._timeout = timeout
        self._recursive = recursive
        self._thumbnail = thumbnail
        self._model: str | None = None
        self.status = DONE
        self._failures = failures
        is_watched = is_shown()
        self.progress = Progress(self._count() if is_watched else None, is_shown=is_watched)

    def run(self) -> Iterator[tuple[str, Result]]:
        """Yield the name and the result of each image that is scored; the others are told.

        Raises:
            SwiprError: nothing more can be scored.
        """
        done = 0
        images = find_images(self._args, self.refuse, recursive=self._recursive)
        try:
            for image, outcome in self._client.compute_many(
                images, thumbnail=self._thumbnail, timeout=self._timeout
            ):
                done += 1
                self.progress.step()
                if isinstance(outcome, SwiprError):
                    self.refuse(name_of(image), outcome)
                else:
                    self._look_at_model(name_of(image), outcome)
                    yield name_of(image), outcome
        except SwiprError as error:
            if done:
                error.message = f"stopped after {done} images: {error.message}"
            raise
        else:
            if not done and self.status == DONE:
                self.progress.tell("no images were found")
        finally:
            self.progress.clear()

    def refuse(self, name: str, error: SwiprError) -> None:
        """Tell that the image, folder or list ``name`` comes to nothing; the others go on."""
        self.status = FAILED
        if self._failures is not None:
            self._failures.append((name, error.code, error.message))
        self.progress.tell(in_words(error))

    def _look_at_model(self, name: str, result: Result) -> None:
        if self._model is not None and result.model != self._model:
            told = f"from here on another model answers, {result.model}; before, {self._model}"
            self.refuse(name, SwiprError("model_changed", f"{name}: {told}"))
        self._model = result.model

    def _count(self) -> int | None:
        listed = self._args.files_from
        if listed is not None and (listed == STDIN or not os.path.isfile(listed)):
            return None  # what is read once cannot be counted first
        found = find_images(self._args, lambda name, error: None, recursive=self._recursive)
        return sum(1 for _ in found)
