"""Pictures that are damaged in every way, given to a worker."""

from __future__ import annotations

import io
import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from swiprctl import Client, SwiprError
from swiprctl.protocol import IMAGE_CODES
from swiprd.config import load_config
from tests.conftest import StartDaemon
from tests.daemon import CHELSEA
from tests.faults.conftest import Trial

SIZE = (40, 30)
ALIKE = 1e-6
"""How far apart the scores of one picture may be."""


def originals() -> Iterator[bytes]:
    """Yield small pictures of every format that is served, in every mode that it has."""
    whole = Image.open(CHELSEA).convert("RGBA").resize(SIZE)
    for format, modes, ways in (
        ("JPEG", ("L", "RGB", "CMYK"), ({}, {"progressive": True}, {"quality": 20})),
        ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), ({}, {"compress_level": 0})),
        ("GIF", ("L", "P"), ({}, {"save_all": True, "append_images": [whole.convert("P")]})),
        ("BMP", ("1", "L", "P", "RGB"), ({},)),
        (
            "TIFF",
            ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "F"),
            ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}),
        ),
        ("TIFF", ("L", "RGB"), ({"compression": "jpeg"}, {"compression": "packbits"})),
        ("WEBP", ("RGB", "RGBA"), ({}, {"lossless": True}, {"save_all": True})),
    ):
        for mode in modes:
            image = whole.convert("RGB") if mode == "LAB" else whole.convert("L")
            if mode == "LAB":
                image = Image.merge("LAB", image.split())
            elif mode not in ("I;16", "F"):
                image = whole.convert(mode)
            else:
                image = image.convert(mode)
            for way in ways:
                file = io.BytesIO()
                exif = Image.Exif()
                exif[0x0112] = 6  # turned
                image.save(file, format, exif=exif, **way)
                yield file.getvalue()


Damage = Callable[[random.Random, bytes, bytes], bytes]


def flip_bits(chance: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 2, 5, 20))):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def change_bytes(chance: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 3, 10))):
        # The headers are where a byte says most.
        end = chance.choice((40, 200, len(data)))
        changed[chance.randrange(min(end, len(data)))] = chance.choice((0, 1, 127, 128, 255))
    return bytes(changed)


def write_number(chance: random.Random, data: bytes, other: bytes) -> bytes:
    at = chance.randrange(max(1, min(len(data), 300) - 4))
    number = chance.choice((0, 1, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1))
    return data[:at] + struct.pack(chance.choice("<>") + "I", number) + data[at + 4 :]


def cut_off(chance: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: chance.randrange(1, len(data))]


def cut_out(chance: random.Random, data: bytes, other: bytes) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + data[at + chance.randrange(1, 50) :]


def splice(chance: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: chance.randrange(1, len(data))] + other[chance.randrange(len(other)) :]


def insert(chance: random.Random, data: bytes, other: bytes) -> bytes:
    at, start = chance.randrange(len(data)), chance.randrange(len(other))
    return data[:at] + other[start : start + chance.randrange(1, 200)] + data[at:]


DAMAGES: list[Damage] = [
    flip_bits,
    change_bytes,
    write_number,
    cut_off,
    cut_out,
    splice,
    insert,
]


def test_pictures_that_are_damaged(start_daemon: StartDaemon, trial: Trial) -> None:
    """Each gives a whole tuple or an error about the picture, within the worker's limits."""
    count = trial.count(short=2_000, long=50_000)
    chance = random.Random(None if trial.soak else 3)  # noqa: S311 - no secret
    config = load_config(file=os.devnull, environment={}, flags={})
    whole = list(originals())
    daemon = start_daemon()
    daemon.wait_ready()
    (worker,) = daemon.worker_pids()
    slowest = 0.0
    with daemon.client() as client:
        before = client.compute(CHELSEA).scores
        assert {score(client, data) for data in whole} == {"scored"}
        for _ in range(count):
            data = chance.choice(DAMAGES)(chance, chance.choice(whole), chance.choice(whole))
            began = time.monotonic()
            outcome = score(client, data or b"\0")
            slowest = max(slowest, time.monotonic() - began)
            trial.tried += 1
            trial.notes[outcome] += 1
            assert outcome == "scored" or outcome in IMAGE_CODES | {"timeout"}, (outcome, data)
            trial.survived += 1
        after = client.compute(CHELSEA).scores
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) < ALIKE
    assert slowest < config.compute_timeout + 5
    killers = trial.notes["worker_died"] + trial.notes["timeout"]
    if not killers:
        assert daemon.worker_pids() == [worker]
        memory = int(status_of(worker)["VmPeak"].split()[0]) * 1024
        assert memory <= config.max_worker_bytes
        trial.words.append(f"worker's memory {status_of(worker)['VmHWM'].strip()} at most")
    trial.words.append(f"slowest {slowest:.2f} s")
    assert "Traceback" not in daemon.log()


def score(client: Client, data: bytes) -> str:
    """Return "scored", or the code of the error."""
    fd = os.memfd_create("picture")
    try:
        os.write(fd, data)
        result = client.compute(f"/proc/self/fd/{fd}")
    except SwiprError as error:
        return error.code
    finally:
        os.close(fd)
    assert abs(sum(result.scores) - 1) < ALIKE
    return "scored"


def status_of(pid: int) -> dict[str, str]:
    """Return what the kernel says of a process, by proc(5)'s names."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines)
