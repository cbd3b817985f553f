"""The worker process: it gets descriptors of image files and gives back scores.

The front starts it with one socket and nothing else. Every message is a line of the same protocol
that clients speak::

    front  {"model": "/…/animal.safetensors", "threads": 2, …}      once, the settings
    worker {"ready": {"model": "sha256:…", "labels": […], …}}       or {"error": {…}}, and it exits
    front  {"id": 1, "thumbnail": null}  with the image's descriptor beside it    again and again
    worker {"id": 1, "scores": […], …}  or  {"id": 1, "error": {…}}

It holds nothing that would need saving, so the front ends it with SIGKILL. When the front is gone
the socket ends, and so does the worker.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Final

from swiprctl import protocol
from swiprctl.protocol import Line, Result, SwiprError
from swiprd.bundle import BundleError, BundleFile
from swiprd.channel import receive
from swiprd.files import read_image
from swiprd.log import start_logging
from swiprd.sandbox import SandboxError, close_inherited, confine, die_with_front

if TYPE_CHECKING:
    from PIL.Image import Image

    from swiprctl.protocol import Thumbnail
    from swiprd.model import Model

log = logging.getLogger("swiprd.worker")

LONGEST_REPLY: Final = protocol.MAX_LINE - 1024
"""Bytes of a reply with a thumbnail: the client's id, which takes the place of ours, is longer."""


def main() -> int:
    """Serve the front over the socket whose descriptor is the only argument."""
    # The front decides when a worker ends: a drain goes on after the Ctrl-C that began it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    if not die_with_front(sock):
        return 0
    close_inherited(sock.fileno())
    gc.disable()  # it would look through torch again and again while that is imported
    link = _Link(sock)
    settings = link.receive()
    if settings is None:
        return 0
    try:
        model, limits = _load(protocol.decode(settings.data, max_depth=protocol.MAX_DEPTH))
    except SwiprError as error:
        link.send(protocol.encode_error(error))
        return 1
    # What is there now stays: later collections, in the middle of a picture, leave it out.
    gc.freeze()
    gc.enable()
    link.send(protocol.encode({"ready": _describe(model)}))
    while (line := link.receive()) is not None:
        link.send(_answer(line, model, limits))
    return 0


class _Link:
    """The socket to the front, one line at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._reader = protocol.LineReader(max_line=protocol.MAX_LINE)

    def receive(self) -> Line | None:
        while (line := self._reader.next_line()) is None:
            try:
                unwanted: list[int] = []
                goes_on = receive(self._socket, self._reader, unwanted)
                assert not unwanted, "the front sends one descriptor with each request"
                if not goes_on:
                    return None
            except ConnectionResetError:  # it went without reading all that it was sent
                return None
        return line

    def send(self, data: bytes) -> None:
        # That the front is gone shows at the next receive.
        with suppress(BrokenPipeError):
            self._socket.sendall(data)


def _load(settings: dict[str, Any]) -> tuple[Model, int]:
    start_logging(settings["log_target"], settings["log_level"], "swiprd worker")
    folder = settings["cache_dir"]
    try:
        readable = [settings["model"]] if folder is None else [settings["model"], folder]
        confine(readable, max_memory=settings["max_memory"])
        # Its manifest comes first: what is no bundle is told at once, not after seconds of loading,
        # as a wrong checksum is.
        with closing(BundleFile(settings["model"])) as file, ThreadPoolExecutor(1) as beside:
            log.debug("the manifest is read")
            # To read and sum up 100 MB takes a tenth of the import, and no lock of Python's.
            reading = beside.submit(file.read)
            import torch

            bundle = reading.result()
        log.debug("torch is imported")

        from swiprd.architectures import CACHE_VARIABLE
        from swiprd.compiled import FormCache, this_host
        from swiprd.model import best_model

        os.environ[CACHE_VARIABLE] = "/"  # wherever it is, torch would make it, which it cannot
        torch.set_num_threads(settings["threads"])
        forms = None if folder is None else FormCache(folder, this_host(settings["threads"]))
        model = best_model(bundle, forms, settings["precision"], max_pixels=settings["max_pixels"])
        if model.engine == "compiled":
            # The form has the weights, and torch none of them. What is left of the imports, without
            # a collector, may hold this frame and all that it names.
            bundle.release()
    except BundleError as error:
        raise SwiprError("unavailable", str(error)) from None
    except SandboxError as error:
        raise SwiprError("unavailable", f"the worker cannot be confined: {error}") from None
    except ModuleNotFoundError as error:
        raise SwiprError(
            "unavailable", f"{error.name} is not installed; install swipr without --no-deps"
        ) from None
    except Exception as error:
        log.exception("cannot load the model")
        # A library that cannot be mapped is an ImportError; a thread that cannot be started, and
        # memory that torch does not get, are RuntimeErrors.
        kinds = (ImportError, MemoryError, RuntimeError)
        wants_memory = settings["max_memory"] and isinstance(error, kinds)
        hint = "; is max_worker_mib large enough?" if wants_memory else ""
        raise SwiprError("unavailable", f"the worker failed: {error!r}{hint}") from None
    return model, settings["max_bytes"]


def _describe(model: Model) -> dict[str, Any]:
    return {
        "model": model.digest,
        "labels": model.labels,
        "engine": model.engine,
        "precision": model.precision,
    }


def _answer(line: Line, model: Model, max_bytes: int) -> bytes:
    began = time.perf_counter()
    request = protocol.decode(line.data, max_depth=protocol.MAX_DEPTH)
    id, side = request["id"], request.get("thumbnail")
    fd = line.fd
    assert fd is not None, "the front sends a descriptor with every request"
    try:
        picture = model.decode(read_image(fd, max_bytes=max_bytes))
        inputs = model.prepare(picture)
        decoded = time.perf_counter()
        scores = model.score(inputs)
        thumbnail = None if side is None else _thumbnail(picture, side)
    except SwiprError as error:
        if error.code == "internal":
            log.error("a picture is not scored: %s", error)
        error.id = id
        return protocol.encode_error(error)
    except Exception as error:
        log.exception("cannot score a picture")
        return protocol.encode_error(
            SwiprError("internal", f"the worker failed: {str(error) or type(error).__name__}", id)
        )
    finally:
        os.close(fd)
    result = Result(
        scores=scores,
        labels=model.labels,
        model=model.digest,
        engine=model.engine,
        precision=model.precision,
        ms=_milliseconds(began, time.perf_counter()),
        decode_ms=_milliseconds(began, decoded),
        thumbnail=thumbnail,
    )
    reply = protocol.encode_result(id, result)
    if len(reply) > LONGEST_REPLY:
        result.thumbnail = None
        reply = protocol.encode_result(id, result)
    return reply


def _thumbnail(picture: Image, side: int) -> Thumbnail:
    from swiprd.thumbnail import make_thumbnail  # pillow, which the model has loaded by now

    return make_thumbnail(picture, side)


def _milliseconds(began: float, ended: float) -> float:
    return round((ended - began) * 1000, 3)


if __name__ == "__main__":
    sys.exit(main())
