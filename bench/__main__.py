"""Measure everything, and write the results: see ``bench``."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import swiprctl
from bench import load
from bench.cold import cold_starts
from bench.engines import MATMULS
from bench.material import Material
from bench.measures import (
    client_latency,
    growth,
    latency,
    matmul,
    memory,
    say,
    starts,
    throughput,
)
from bench.page import write_results
from bench.subjects import (
    EngineAlone,
    Service,
    start_fastapi,
    start_litserve,
    start_script,
    start_swipr,
)
from swiprd.compiled import this_host

BENCH: Final = Path(__file__).parent
PICTURES: Final = {"1080x1350": (1080, 1350), "12 megapixels": (4000, 3000)}
MEGAPIXELS: Final = (0.1, 0.5, 1.5, 5, 12, 24, 48)
CLIENTS: Final = (1, 4, 16, 64)
CALLERS: Final = (1, 16)
IDLE_SECONDS: Final = 1
PACKAGES: Final = (
    "torch", "torchvision", "pillow", "onnxruntime", "openvino", "fastapi", "uvicorn",
    "litserve", "pyzmq",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write what was found into a folder."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="see that all works: measures little")
    parser.add_argument(
        "--output", type=Path, default=BENCH, metavar="DIR", help="where results go [bench]"
    )
    parser.add_argument(
        "--material",
        type=Path,
        default=BENCH / "build",
        metavar="DIR",
        help="where models and pictures are made, once [bench/build]",
    )
    args = parser.parse_args(argv)
    threads = len(os.sched_getaffinity(0))
    has_bf16 = this_host(threads).computes_bf16
    material = Material(args.material.absolute())
    material.make(threads, ("fp32", "bf16") if has_bf16 else ("fp32",))
    with tempfile.TemporaryDirectory(prefix="swipr-") as folder:
        results = _measure(Path(folder), material, threads, has_bf16=has_bf16, quick=args.quick)
    write_results(results, args.output)
    print(args.output / "RESULTS.md")
    return 0


def _measure(
    folder: Path, material: Material, threads: int, *, has_bf16: bool, quick: bool
) -> dict[str, Any]:
    began = time.monotonic()
    pictures = {name: material.picture(*size) for name, size in PICTURES.items()}
    usual = pictures["1080x1350"]
    results: dict[str, Any] = {"machine": _machine(threads, has_bf16=has_bf16), "quick": quick}
    empty = folder / "no-forms"
    serve = ["--model", str(material.bundle), "--cache-dir"]
    with contextlib.ExitStack() as running:

        def keep(subject: Any) -> Any:
            running.callback(subject.process.end)
            return subject

        def swipr(name: str, *settings: str, cache: Path = material.cache) -> Service:
            say(f"starting {name}")
            service = start_swipr(name, list(settings), cache, material, folder)
            return keep(service)

        compiled = swipr("swipr")
        services = [
            keep(start_script("script service", material, folder)),
            compiled,
            swipr("swipr, eager", cache=empty),
            swipr("swipr, 2 workers", "--workers", "2", "--threads", "1"),
            keep(start_fastapi("FastAPI", threads, material, folder)),
            keep(start_litserve("LitServe", threads, material, folder)),
        ]
        names = ["eager", "compiled", "onnxruntime", "openvino"]
        if has_bf16:
            names.append("compiled-bf16")
            services.append(swipr("swipr, bf16", "--precision", "bf16"))
        say("starting the engines")
        engines = [keep(EngineAlone(name, threads, material, folder)) for name in names]

        say("matrix multiplication")
        with contextlib.ExitStack() as multiplying:
            multipliers = []
            for name in MATMULS if has_bf16 else MATMULS[:1]:
                multipliers.append(EngineAlone(name, threads, material, folder))
                multiplying.callback(multipliers[-1].process.end)
            results["matmul"] = matmul(multipliers, 2 if quick else 20, usual)

        results["latency"] = {}
        for (name, picture), rounds in zip(pictures.items(), (40, 15), strict=True):
            say(f"one request, {name}")
            rounds = 2 if quick else rounds
            results["latency"][name] = latency(engines, services, rounds, picture)
        say("one request, with a client process")
        results["client latency"] = client_latency(services, 2 if quick else 25, usual)
        say("memory")
        results["memory"] = {"warm": {s.name: memory(s.process) for s in services}}

        seconds, rounds = (4.0, 1) if quick else (6.0, 3)
        say("many clients, over connections")
        connected = [service for service in services if service.address is not None]
        results["throughput"] = throughput(
            connected, CLIENTS, seconds, rounds, usual, by=load.by_connections
        )
        say("many clients, a process a request")
        called = [service for service in services if service.client is not None]
        results["client throughput"] = throughput(
            called, CALLERS, seconds, rounds, usual, by=load.by_processes
        )
        say("growth with the picture")
        by_size = {size: material.picture_of(size) for size in MEGAPIXELS}
        grown = [s for s in services if s.name in ("script service", "swipr")]
        results["growth"] = growth([engines[1]], grown, by_size, 1 if quick else 5)
        say("client processes")
        results["client starts"] = starts(compiled, 3 if quick else 40)
    say("cold starts")
    daemons = {"swipr": [*serve, str(material.cache)], "swipr, eager": [*serve, str(empty)]}
    wholes, parts = cold_starts(daemons, material, folder, 1 if quick else 7, usual)
    results["cold start"] = {"whole": wholes, "parts": parts}
    say("memory when idle")
    results["memory"]["idle"] = {"swipr": _idle(material, folder)}
    results["minutes"] = round((time.monotonic() - began) / 60, 1)
    return results


def _idle(material: Material, folder: Path) -> list[dict[str, Any]]:
    settings = ["--idle-timeout", str(IDLE_SECONDS)]
    service = start_swipr("idle", settings, material.cache, material, folder)
    try:
        deadline = time.monotonic() + 30
        while len(service.process.pids()) > 1:
            if time.monotonic() > deadline:
                raise RuntimeError("the worker has not ended")
            time.sleep(0.1)
        return memory(service.process)
    finally:
        service.process.end()


def _machine(threads: int, *, has_bf16: bool) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = {
        line.partition(":")[2].strip() for line in cpuinfo.splitlines() if "model name" in line
    }
    return {
        "processor": ", ".join(sorted(models)),
        "features": this_host(threads).processor,
        "threads": threads,
        "bf16": has_bf16,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "version": swiprctl.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
