"""What is measured: engines alone, and services, each started as its users would.

A service is asked in its own protocol over connections that stay open, or by a client process a
request, where it has a client.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from bench.material import Material
from swiprctl import Client, SwiprError
from swiprd.process import ENVIRONMENT

START_SECONDS: Final = 120.0
END_SECONDS: Final = 20.0
BENCH: Final = Path(__file__).parent
PYTHON: Final = sys.executable
SWIPRD: Final = str(Path(sys.executable).parent / "swiprd")
SWIPRCTL: Final = str(Path(sys.executable).parent / "swiprctl")

SWIPR: Final = "swipr"
SWIPR_BF16: Final = "swipr, bf16"
MAX_PER_USER: Final = 128
"""Connections: 64 come while as many of the load before may not be gone yet."""
SPINNING: Final = "compiled, spinning"
"""The compiled form, its threads waiting for one another as those of other engines do by default:
looking for work for milliseconds, where those of a worker soon sleep."""

Address = str | tuple[str, int]


class Process:
    """A process and all that it starts. ``end`` must be called.

    Args:
        words: what is started, in the repository's folder.
        log: what it says on standard error is added to this file.
        talks: its standard input and output are pipes.
        environment: what it finds there where ours does not say otherwise.
    """

    def __init__(
        self,
        words: list[str],
        *,
        log: Path,
        talks: bool = False,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                words,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else file,
                stderr=file,
                start_new_session=True,
                env={**environment, **os.environ},
                cwd=BENCH.parent,
            )
        self._log = log

    def check(self) -> None:
        """Fail when it has ended."""
        if self.popen.poll() is not None:
            raise RuntimeError(f"{self.popen.args!r} ended: {self._log.read_text()[-2000:]}")

    def pids(self) -> list[int]:
        """Return it and its descendants."""
        found = [self.popen.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found.extend(int(child) for child in children.read_text().split())
        return found

    def end(self) -> None:
        """End it, and what it has started."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGTERM)
            try:
                self.popen.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()


class EngineAlone:
    """An engine of ``bench.engines`` in a process of its own.

    It has the environment of a worker: what a service adds is to be seen, not what that brings.
    What is to spin has libgomp's own number of looks for work.
    """

    def __init__(self, name: str, threads: int, material: Material, folder: Path) -> None:
        self.name = name
        words = [PYTHON, "-m", "bench.engines", name, str(threads), str(material.bundle.parent)]
        looks = {"GOMP_SPINCOUNT": "300000"} if name == SPINNING else {}
        self.process = Process(
            words, log=folder / f"{name}.log", talks=True, environment=ENVIRONMENT | looks
        )
        try:
            self._read()
        except BaseException:
            self.process.end()
            raise

    def ask(self, count: int, picture: Path) -> list[Any]:
        """Return what it measured: see ``bench.engines``."""
        assert self.process.popen.stdin is not None
        self.process.popen.stdin.write(f"{count} {picture}\n".encode())
        self.process.popen.stdin.flush()
        found = self._read()
        assert isinstance(found, list)
        return found

    def _read(self) -> Any:
        assert self.process.popen.stdout is not None
        line = self.process.popen.stdout.readline()
        if not line:
            self.process.popen.wait()
            self.process.check()
        return json.loads(line)


@dataclass(frozen=True, slots=True)
class Wire:
    """How a service is asked over a connection.

    Attributes:
        request: the bytes that ask for the picture at a path.
        read: reads one answer from a stream and returns its body.
    """

    request: Callable[[str], bytes]
    read: Callable[[asyncio.StreamReader], Any]


def _line(path: str) -> bytes:
    return json.dumps({"path": path}).encode() + b"\n"


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    return await stream.readline()


def _post(path: str) -> bytes:
    body = json.dumps({"path": path}).encode()
    head = (
        "POST /compute HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _read_response(stream: asyncio.StreamReader) -> bytes:
    head = (await stream.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
    return await stream.readexactly(length)


LINES: Final = Wire(_line, _read_line)
HTTP: Final = Wire(_post, _read_response)


@dataclass(frozen=True, slots=True)
class Service:
    """A running service.

    Attributes:
        name: in tables.
        process: its own.
        address: where it listens; None: only its own client reaches it.
        wire: how it is asked there.
        client: the words that ask for a picture, without its path; None: it has no client.
    """

    name: str
    process: Process
    address: Address | None = None
    wire: Wire | None = None
    client: list[str] | None = None

    def ask(self, count: int, picture: Path) -> list[float]:
        """Return the milliseconds of requests, one after another over one connection."""
        return asyncio.run(self._ask(count, picture))

    async def _ask(self, count: int, picture: Path) -> list[float]:
        reader, writer = await self.open()
        taken = []
        try:
            for _ in range(count):
                began = time.perf_counter()
                await self.exchange(reader, writer, picture)
                taken.append(1000 * (time.perf_counter() - began))
        finally:
            writer.close()
            await writer.wait_closed()
        return taken

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect."""
        assert self.address is not None, f"{self.name} is asked by its own client only"
        if isinstance(self.address, str):
            return await asyncio.open_unix_connection(self.address)
        return await asyncio.open_connection(*self.address)

    async def exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, picture: Path
    ) -> bytes:
        """Ask for one picture and return the answer, which must be one."""
        assert self.wire is not None
        writer.write(self.wire.request(str(picture)))
        answer = await self.wire.read(reader)
        if b'"scores"' not in answer:
            raise RuntimeError(f"{self.name} answered {answer!r}")
        assert isinstance(answer, bytes)
        return answer

    def scores(self, picture: Path) -> list[float]:
        """Return what it says of a picture, by its client where that is all it has."""
        if self.address is None:
            assert self.client is not None
            words = [*self.client, str(picture)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            return [float(score) for score in done.stdout.split(",")]
        return asyncio.run(self._scores(picture))

    async def _scores(self, picture: Path) -> list[float]:
        reader, writer = await self.open()
        answer = await self.exchange(reader, writer, picture)
        writer.close()
        await writer.wait_closed()
        found = json.loads(answer)["scores"]
        assert isinstance(found, list)
        return found

    def environment(self) -> dict[str, str]:
        """Return the environment of a client process: there it finds the daemon's socket."""
        return {**os.environ, "SWIPR_SOCKET": str(self.address)}

    def run_client(self, picture: Path) -> float:
        """Return the milliseconds of one whole client process."""
        assert self.client is not None
        began = time.perf_counter()
        words = [*self.client, str(picture)]
        done = subprocess.run(words, check=True, capture_output=True, env=self.environment())
        taken = 1000 * (time.perf_counter() - began)
        if not done.stdout.startswith((b"0.", b"1.")):
            raise RuntimeError(f"{self.name} answered {done.stdout!r}")
        return taken


def start_swipr(
    name: str, engine: str, settings: list[str], cache: Path, material: Material, folder: Path
) -> Service:
    """Start the daemon and return once it has loaded its model, on the ``engine`` that is meant."""
    address = str(folder / f"{name}.sock")
    words = [SWIPRD, "--socket", address, "--model", str(material.bundle)]
    words += ["--cache-dir", str(cache), "--max-per-user", str(MAX_PER_USER), *settings]
    process = Process(words, log=folder / f"{name}.log")
    client = [SWIPRCTL, "compute"]
    service = Service(name, process, address=address, wire=LINES, client=client)
    _wait(process, lambda: _status(address)["state"] == "ready")
    found = _status(address)
    if f"{found['engine']} {found['precision']}" != engine:
        process.end()
        raise RuntimeError(f"{name} serves {found['engine']} {found['precision']}, not {engine}")
    return service


def _status(address: str) -> dict[str, Any]:
    with Client(address) as client:
        return client.status()


def start_script(name: str, material: Material, folder: Path) -> Service:
    """Start the script service and return once it has answered."""
    endpoint = f"ipc://{folder / name}.zmq"
    script = [PYTHON, str(BENCH / "script_service.py"), endpoint]
    process = Process([*script, str(material.bundle)], log=folder / f"{name}.log")
    service = Service(name, process, client=[*script, "--compute"])
    picture = material.picture(400, 300)
    _wait(process, lambda: service.run_client(picture) > 0)
    return service


def start_fastapi(name: str, threads: int, material: Material, folder: Path) -> Service:
    """Start the FastAPI service and return once it listens."""
    address = str(folder / f"{name}.sock")
    words = [PYTHON, "-m", "bench.fastapi_service", address, str(threads)]
    words.append(str(material.bundle.parent))
    process = Process(words, log=folder / f"{name}.log", environment=ENVIRONMENT)
    return _started(Service(name, process, address=address, wire=HTTP), material)


def start_litserve(name: str, threads: int, material: Material, folder: Path) -> Service:
    """Start LitServe and return once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    words = [PYTHON, "-m", "bench.litserve_service", str(address[1]), str(threads)]
    words.append(str(material.bundle.parent))
    process = Process(words, log=folder / f"{name}.log", environment=ENVIRONMENT)
    return _started(Service(name, process, address=address, wire=HTTP), material)


def _started(service: Service, material: Material) -> Service:
    picture = material.picture(400, 300)
    _wait(service.process, lambda: len(service.ask(1, picture)) == 1)
    return service


def _wait(process: Process, answers: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    try:
        while time.monotonic() < deadline:
            process.check()
            with contextlib.suppress(OSError, EOFError, SwiprError, RuntimeError):
                if answers():
                    return
            time.sleep(0.1)
        raise RuntimeError(f"{process.popen.args!r} does not answer")
    except BaseException:
        process.end()
        raise
