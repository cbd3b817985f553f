"""The worker process, started and spoken to as the front does it: swiprd.worker."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from PIL import Image, ImageStat

from swiprctl import protocol
from swiprctl.protocol import MAX_LINE, LineReader
from swiprd.bundle import Golden, read_bundle, write_bundle
from swiprd.config import DEFAULT_BUNDLE
from swiprd.engines import eager
from swiprd.model import Model
from swiprd.process import WORKER_COMMAND
from tests.daemon import CHELSEA, COFFEE, wait_until

MAX_BYTES = 300_000
MAX_PIXELS = 200_000
"""Chelsea, 451 x 300 in 240,512 bytes, is within both limits; coffee is beyond both."""
SETTINGS = {
    "log_target": "terminal",
    "max_memory": 0,
    "model": DEFAULT_BUNDLE,
    "precision": "auto",
    "cache_dir": None,
    "threads": 1,
    "max_bytes": MAX_BYTES,
    "max_pixels": MAX_PIXELS,
    "log_level": "info",
}
PATIENCE = 60.0


@dataclasses.dataclass
class Worker:
    """A worker process, and the front's end of its socket."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    out: IO[bytes]
    err: IO[bytes]
    reader: LineReader = dataclasses.field(default_factory=lambda: LineReader(max_line=MAX_LINE))
    first: dict[str, Any] = dataclasses.field(default_factory=dict)

    def send_settings(self, **changes: Any) -> None:
        """Send the first line."""
        self.socket.sendall(protocol.encode(SETTINGS | changes))

    def receive(self) -> dict[str, Any]:
        """Return the next line."""
        while (line := self.reader.next_line()) is None:
            data = self.socket.recv(65536)
            assert data, f"the worker ended: {self.log()}"
            self.reader.feed(data)
        found: dict[str, Any] = json.loads(line.data)
        return found

    def load(self, **changes: Any) -> dict[str, Any]:
        """Send the settings and return the answer."""
        self.send_settings(**changes)
        self.first = self.receive()
        return self.first

    def ask(self, id: int, fd: int, thumbnail: int | None = None) -> None:
        """Send a request and its descriptor."""
        request = {"id": id, "thumbnail": thumbnail}
        socket.send_fds(self.socket, [protocol.encode(request)], [fd])

    def score(
        self, id: int, path: Path, flags: int = os.O_RDONLY, thumbnail: int | None = None
    ) -> dict[str, Any]:
        """Send the file at ``path`` and return the reply."""
        fd = os.open(path, flags)
        try:
            self.ask(id, fd, thumbnail)
        finally:
            os.close(fd)
        return self.receive()

    def log(self) -> str:
        """Return its standard error so far."""
        return os.pread(self.err.fileno(), 10**7, 0).decode()

    def end(self) -> tuple[int, bytes, str]:
        """Return its exit status, standard output and error once it has ended by itself."""
        return self.process.wait(PATIENCE), os.pread(self.out.fileno(), 10**6, 0), self.log()

    def descriptors(self) -> list[str]:
        """Return its open descriptors and what they lead to."""
        folder = f"/proc/{self.process.pid}/fd"
        return sorted(f"{fd} {os.readlink(f'{folder}/{fd}')}" for fd in os.listdir(folder))

    def imports_torch(self) -> bool:
        """Return whether torch's libraries are in its memory by now."""
        return "libtorch" in Path(f"/proc/{self.process.pid}/maps").read_text()


QUIET = (0, b"", "")
"""How a worker ends that did nothing wrong."""


@contextlib.contextmanager
def start(**environment: str) -> Iterator[Worker]:
    """Start a worker as the front does, but with its output apart from its log."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.settimeout(PATIENCE)
    with ours, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with theirs:
            process = subprocess.Popen(
                [*WORKER_COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env=os.environ | environment,
            )
        try:
            yield Worker(process, ours, out, err)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def ready() -> Iterator[Worker]:
    """One worker with its model loaded, for all tests that leave it as it was."""
    with start() as worker:
        worker.load()
        yield worker
        worker.socket.close()
        assert worker.end() == QUIET


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The worker's model in this process, computing with as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    bundle = read_bundle(DEFAULT_BUNDLE)
    yield Model(bundle, eager(bundle), max_pixels=MAX_PIXELS)
    torch.set_num_threads(before)


def picture(folder: Path, width: int, height: int) -> Path:
    """Write a small picture of noise."""
    data = random.Random(width).randbytes(width * height * 3)  # noqa: S311
    path = folder / f"{width}x{height}.png"
    Image.frombytes("RGB", (width, height), data).save(path)
    return path


# --- scores --------------------------------------------------------------------------------------


def test_the_first_line_tells_of_the_model(ready: Worker) -> None:
    """Once it is ready it says so, with the bundle's digest and labels, and nothing else."""
    assert ready.first == {
        "ready": {
            "model": read_bundle(DEFAULT_BUNDLE).digest,
            "labels": ["other", "animal"],
            "engine": "eager",
            "precision": "fp32",
        }
    }


def test_scores_are_the_models_own_to_the_last_bit(
    ready: Worker, model: Model, folder: Path
) -> None:
    """Neither the process nor the wire changes an answer."""
    sizes = [(40, 30), (1, 200), (250, 251)]
    paths = [CHELSEA, *(picture(folder, *size) for size in sizes)]
    for id, path in enumerate(paths):
        reply = ready.score(id, path)
        assert tuple(reply.pop("scores")) == model.compute(path.read_bytes())
        assert reply.pop("ms") > reply.pop("decode_ms") > 0
        assert reply == {
            "id": id,
            "labels": ["other", "animal"],
            "model": model.digest,
            "engine": "eager",
            "precision": "fp32",
        }


def test_requests_sent_ahead_are_answered_in_order(ready: Worker, model: Model) -> None:
    """Each line keeps the descriptor that came with it, however many wait."""
    with CHELSEA.open("rb") as good, open(os.devnull, "rb") as bad:
        for id in range(100, 110):
            ready.ask(id, (bad if id % 2 else good).fileno())
    scores = list(model.compute(CHELSEA.read_bytes()))
    for id in range(100, 110):
        reply = ready.receive()
        assert reply["id"] == id
        assert reply.get("scores") == (None if id % 2 else scores)


# --- bad pictures --------------------------------------------------------------------------------


def garbage(folder: Path) -> Path:
    path = folder / "garbage"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    return path


def empty(folder: Path) -> Path:
    path = folder / "empty"
    path.touch()
    return path


def cut_off(folder: Path) -> Path:
    path = folder / "cut.png"
    path.write_bytes(CHELSEA.read_bytes()[:100_000])
    return path


def crowded(folder: Path) -> Path:
    path = folder / "crowded.png"
    Image.new("L", (MAX_PIXELS + 1, 1)).save(path)
    return path


def bomb(folder: Path) -> Path:
    """Write a header that promises four thousand million pixels, and next to nothing behind it."""
    data = io.BytesIO()
    Image.new("L", (1, 1)).save(data, "PNG")
    header = b"IHDR" + struct.pack(">II", 65535, 65535) + data.getvalue()[24:29]
    checked = header + struct.pack(">I", zlib.crc32(header))
    path = folder / "bomb.png"
    path.write_bytes(data.getvalue()[:12] + checked + data.getvalue()[33:])
    return path


def just_folder(folder: Path) -> Path:
    return folder


BAD: list[tuple[Callable[[Path], Path], str]] = [
    (lambda _: COFFEE, "too_large"),
    (garbage, "not_an_image"),
    (empty, "not_an_image"),
    (cut_off, "not_an_image"),
    (crowded, "too_many_pixels"),
    (bomb, "too_many_pixels"),
    (just_folder, "not_a_file"),
    (lambda _: Path(os.devnull), "not_a_file"),
]


@pytest.mark.parametrize(("make", "code"), BAD)
def test_a_bad_picture_gets_its_error_and_the_worker_works_on(
    ready: Worker, make: Callable[[Path], Path], code: str, folder: Path
) -> None:
    """The error has the request's id and no scores, and the next picture is scored."""
    reply = ready.score(77, make(folder))
    assert set(reply) == {"id", "error"}
    assert (reply["id"], reply["error"]["code"]) == (77, code)
    assert ready.score(78, CHELSEA)["id"] == 78


def test_a_descriptor_that_cannot_be_read_gets_its_error(ready: Worker, folder: Path) -> None:
    """A file that is open for writing only was meant for something else."""
    reply = ready.score(5, picture(folder, 40, 30), os.O_WRONLY)
    assert (reply["id"], reply["error"]["code"]) == (5, "permission_denied")


def test_after_many_requests_no_descriptor_is_left(ready: Worker, folder: Path) -> None:
    """What comes with a request is closed with its reply, whatever the reply is."""
    paths = [picture(folder, 40, 30), *(make(folder) for make, _ in BAD)]
    for path in paths:
        ready.score(0, path)
    before = ready.descriptors()
    for id in range(50):
        assert ready.score(id, paths[id % len(paths)])["id"] == id
    assert ready.descriptors() == before


# --- thumbnails ---------------------------------------------------------------------------------


def test_a_thumbnail_goes_along_with_the_same_scores(ready: Worker) -> None:
    """A whole JPEG, of the whole picture; where none is wanted there is none."""
    plain = ready.score(1, CHELSEA)
    reply = ready.score(2, CHELSEA, thumbnail=64)
    assert reply["scores"] == plain["scores"]
    assert "thumbnail" not in plain
    small = Image.open(io.BytesIO(base64.b64decode(reply["thumbnail"]["data"], validate=True)))
    assert (small.format, small.mode) == ("JPEG", "RGB")
    assert small.size == (reply["thumbnail"]["width"], reply["thumbnail"]["height"]) == (64, 43)
    with Image.open(CHELSEA) as picture:
        expected = picture.resize(small.size)
    means = [ImageStat.Stat(image).mean for image in (small, expected)]
    assert means[0] == pytest.approx(means[1], abs=3)


def test_a_thumbnail_that_does_not_fit_is_left_out(folder: Path) -> None:
    """Where labels fill the line, the scores come without it."""
    bundle = read_bundle(DEFAULT_BUNDLE)
    labels = tuple(f"{number:020}" for number in range(1000))
    every_class = dataclasses.replace(bundle.manifest, labels=labels, outputs=None, golden=())
    weights = {k: v for k, v in bundle.tensors.items() if not k.startswith("golden.")}
    many = dataclasses.replace(bundle, manifest=every_class, tensors=weights)
    model = Model(many, eager(many), max_pixels=MAX_PIXELS)
    golden = tuple(
        Golden(found.image, model.compute(bytes(bundle.tensors[found.image].data)))
        for found in bundle.manifest.golden
    )
    path = str(folder / "many.safetensors")
    write_bundle(path, dataclasses.replace(every_class, golden=golden), bundle.tensors)
    noise = folder / "noise.png"
    Image.frombytes("RGB", (256, 256), os.urandom(256 * 256 * 3)).save(noise)
    with start() as worker:
        worker.load(model=path)
        assert "thumbnail" in worker.score(1, CHELSEA, thumbnail=64)
        reply = worker.score(2, noise, thumbnail=256)
        assert len(reply["scores"]) == 1000
        assert "thumbnail" not in reply


# --- the end -------------------------------------------------------------------------------------


def test_it_ends_when_the_front_ends_before_the_settings() -> None:
    """A front that goes at once leaves no worker, and no error in the log."""
    with start() as worker:
        worker.socket.close()
        assert worker.end() == QUIET


def test_it_ends_when_the_front_ends_in_the_middle_of_a_load() -> None:
    """A front that goes while torch is being imported leaves no worker, and no error."""
    with start() as worker:
        worker.send_settings()
        wait_until(worker.imports_torch, "the import of torch")
        worker.socket.close()
        assert worker.end() == QUIET


def test_it_ends_when_the_front_ends_without_reading_what_it_said() -> None:
    """A reply that nobody takes any more is no error either."""
    with start() as worker:
        worker.send_settings()
        assert worker.socket.recv(1, socket.MSG_PEEK) == b"{"
        worker.socket.close()  # with the ready line unread
        assert worker.end() == QUIET


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: str(n.name)
)
def test_signals_for_the_whole_group_do_not_end_it(ready: Worker, number: signal.Signals) -> None:
    """A drain goes on after the Ctrl-C that began it; only the front ends a worker."""
    with CHELSEA.open("rb") as file:
        for id in range(5):
            ready.ask(id, file.fileno())
            ready.process.send_signal(number)
    assert [ready.receive()["id"] for _ in range(5)] == list(range(5))
    ready.process.send_signal(number)
    assert ready.score(9, CHELSEA)["id"] == 9


def test_nothing_but_the_front_ends_it() -> None:
    """Signals in the middle of a load do not, and its first pictures are scored all the same; a
    front that goes in the middle of a picture does, and no error is logged.
    """
    with start() as worker:
        worker.send_settings()
        wait_until(worker.imports_torch, "the import of torch")
        worker.process.send_signal(signal.SIGINT)
        worker.process.send_signal(signal.SIGTERM)
        assert "ready" in worker.receive()
        assert worker.score(1, CHELSEA)["id"] == 1
        with CHELSEA.open("rb") as file:
            worker.ask(2, file.fileno())
        worker.socket.close()
        assert worker.end() == QUIET


# --- bundles that cannot be served ---------------------------------------------------------------


def missing(folder: Path) -> str:
    return str(folder / "missing.safetensors")


def truncated(folder: Path) -> str:
    path = folder / "truncated.safetensors"
    path.write_bytes(Path(DEFAULT_BUNDLE).read_bytes()[:-1])
    return str(path)


def no_bundle(folder: Path) -> str:
    path = folder / "weights.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" * 100)
    return str(path)


def no_manifest(folder: Path) -> str:
    path = folder / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    return str(path)


@pytest.mark.parametrize("make", [missing, truncated, no_bundle, no_manifest, str])
def test_a_file_that_is_no_bundle_is_told_before_torch_is_loaded(
    make: Callable[[Path], str], folder: Path
) -> None:
    """The error names the file, comes without seconds of importing, and the status is 1."""
    path = make(folder)
    with start(PYTHONPROFILEIMPORTTIME="1") as worker:
        reply = worker.load(model=path)
        assert set(reply) == {"id", "error"}
        assert (reply["id"], reply["error"]["code"]) == (None, "unavailable")
        assert path in reply["error"]["message"]
        status, output, log = worker.end()
        assert (status, output) == (1, b"")
        imported = {line.split("|")[-1].strip() for line in log.splitlines()}
        assert "swiprd.bundle" in imported
        assert not imported & {"torch", "PIL", "PIL.Image", "numpy", "swiprd.model"}


def test_a_bundle_with_a_changed_weight_is_never_served(folder: Path) -> None:
    """It is told once torch is imported, and nothing is computed with it."""
    content = bytearray(Path(DEFAULT_BUNDLE).read_bytes())
    content[-1000] ^= 1
    path = folder / "damaged.safetensors"
    path.write_bytes(content)
    with start() as worker:
        reply = worker.load(model=str(path))
        assert set(reply) == {"id", "error"}
        assert reply["error"]["code"] == "unavailable"
        assert f"{path} is no bundle" in reply["error"]["message"]
        assert "its checksum is wrong" in reply["error"]["message"]
        assert worker.end() == (1, b"", "")


def test_a_bundle_whose_golden_answers_come_out_wrong_is_never_served(folder: Path) -> None:
    """Instead of being ready the worker says why not, and ends."""
    bundle = read_bundle(DEFAULT_BUNDLE)
    golden = tuple(
        dataclasses.replace(golden, scores=golden.scores[::-1]) for golden in bundle.manifest.golden
    )
    path = str(folder / "wrong.safetensors")
    write_bundle(path, dataclasses.replace(bundle.manifest, golden=golden), bundle.tensors)
    with start() as worker:
        reply = worker.load(model=path)
        assert set(reply) == {"id", "error"}
        assert reply["error"]["code"] == "unavailable"
        assert "golden picture 0 scores " in reply["error"]["message"]
        assert worker.end() == (1, b"", "")


def test_a_bundle_whose_replies_would_not_fit_in_a_line_is_never_served(folder: Path) -> None:
    """It is refused when it is loaded, not at each picture."""
    bundle = read_bundle(DEFAULT_BUNDLE)
    labels = tuple(f"{number:060}" for number in range(1000))
    golden = tuple(
        dataclasses.replace(golden, scores=(0.0,) * 1000) for golden in bundle.manifest.golden
    )
    path = str(folder / "long.safetensors")
    manifest = dataclasses.replace(bundle.manifest, labels=labels, outputs=None, golden=golden)
    write_bundle(path, manifest, bundle.tensors)
    with start() as worker:
        reply = worker.load(model=path)
        assert reply["error"]["code"] == "unavailable"
        assert "expected at most 65536" in reply["error"]["message"]
