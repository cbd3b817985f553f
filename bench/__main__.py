"""Measure everything, and write the results: see ``bench``."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import swiprctl
from bench import load
from bench.batches import CLIENTS, Pictures, Subjects, measure_batches
from bench.cold import cold_starts
from bench.engines import BF16_ENGINE, ENGINES, MATMULS
from bench.material import LARGE, USUAL, Material
from bench.measures import Stolen, memory
from bench.page import write_results
from bench.subjects import (
    BENCH,
    SWIPR,
    SWIPR_BF16,
    EngineAlone,
    Service,
    start_fastapi,
    start_litserve,
    start_script,
    start_swipr,
)
from swiprd.compiled import this_host
from swiprd.process import ENVIRONMENT

PICTURES: Final = {USUAL: (1080, 1350), LARGE: (4000, 3000)}
MEGAPIXELS: Final = (0.1, 0.5, 1.5, 5, 12, 24, 48)
IDLE_SECONDS: Final = 1
MEMORY_PICTURES: Final = 10
PACKAGES: Final = (
    "torch", "torchvision", "pillow", "onnxruntime", "openvino", "fastapi", "uvicorn",
    "litserve", "pyzmq",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write what was found into a folder."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="see that all works: measures little")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where results go [bench/results/bf16, or fp32 where the processor has no bf16;"
        " bench/build/quick with --quick]",
    )
    parser.add_argument(
        "--material",
        type=Path,
        default=BENCH / "build",
        metavar="DIR",
        help="where models and pictures are made, once [bench/build]",
    )
    args = parser.parse_args(argv)
    # As at Ctrl-C: what was started is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name in ENVIRONMENT:  # what the shell says would hold for those that say otherwise, too
        os.environ.pop(name, None)
    threads = len(os.sched_getaffinity(0))
    has_bf16 = this_host(threads).computes_bf16
    material = Material(args.material.absolute())
    material.make(threads, ("fp32", "bf16") if has_bf16 else ("fp32",))
    with tempfile.TemporaryDirectory(prefix="swipr-") as folder:
        results = _measure(Path(folder), material, threads, has_bf16=has_bf16, quick=args.quick)
    kept = BENCH / "results" / ("bf16" if has_bf16 else "fp32")
    output = args.output or (BENCH / "build" / "quick" if args.quick else kept)
    write_results(results, output)
    print(output / "RESULTS.md")
    return 0


def _measure(
    folder: Path, material: Material, threads: int, *, has_bf16: bool, quick: bool
) -> dict[str, Any]:
    began = time.monotonic()
    named = {name: material.picture(*size) for name, size in PICTURES.items()}
    pictures = Pictures(named, {size: material.picture_of(size) for size in MEGAPIXELS})
    usual = named[USUAL]
    stolen = Stolen()
    empty = folder / "no-forms"
    serve = ["--model", str(material.bundle), "--cache-dir"]
    fp32 = ["--precision", "fp32"]  # otherwise the form in bf16 is taken, where there is one
    two = [*fp32, "--workers", "2", "--threads", "1"]
    swipr = partial(start_swipr, material=material, folder=folder)
    services: dict[str, Callable[[], Service]] = {
        "script service": lambda: start_script("script service", material, folder),
        SWIPR: lambda: swipr(SWIPR, "compiled fp32", fp32, material.cache),
        "swipr, eager": lambda: swipr("swipr, eager", "eager fp32", [], empty),
        "swipr, 2 workers": lambda: swipr("swipr, 2 workers", "compiled fp32", two, material.cache),
        "FastAPI": lambda: start_fastapi("FastAPI", threads, material, folder),
        "LitServe": lambda: start_litserve("LitServe", threads, material, folder),
    }
    if has_bf16:
        services[SWIPR_BF16] = lambda: swipr(
            SWIPR_BF16, "compiled bf16", ["--precision", "bf16"], material.cache
        )
    engines, multipliers = (
        {name: partial(EngineAlone, name, threads, material, folder) for name in names}
        for names in (
            (*ENGINES, BF16_ENGINE) if has_bf16 else ENGINES,
            MATMULS if has_bf16 else MATMULS[:1],
        )
    )
    results = {
        "machine": _machine(threads, has_bf16=has_bf16),
        "quick": quick,
        **measure_batches(Subjects(services, engines, multipliers), pictures, stolen, quick=quick),
    }
    stolen.begin("cold starts")
    daemons = {
        SWIPR: [*serve, str(material.cache), *fp32],
        "swipr, eager": [*serve, str(empty)],
    }
    wholes, parts = cold_starts(daemons, material, folder, 1 if quick else 11, usual)
    results["cold start"] = {"whole": wholes, "parts": parts}
    stolen.begin("memory, one service at a time")
    results["memory"] = {name: _memory(start(), usual) for name, start in services.items()}
    idle = [*fp32, "--idle-timeout", str(IDLE_SECONDS)]
    results["idle memory"] = _idle_memory(
        swipr(SWIPR, "compiled fp32", idle, material.cache), usual
    )
    stolen.end()
    results["stolen"] = stolen.shares()
    results["minutes"] = round((time.monotonic() - began) / 60, 1)
    return results


def _memory(service: Service, picture: Path) -> list[dict[str, Any]]:
    """Return what the processes hold after some pictures, with no other service beside them."""
    try:
        for _ in range(MEMORY_PICTURES):
            service.scores(picture)
        return memory(service.process)
    finally:
        service.process.end()


def _idle_memory(service: Service, picture: Path) -> list[dict[str, Any]]:
    """Return what is left of a daemon that had many clients, when it has nothing to do."""
    try:
        load.by_connections(service, CLIENTS[-1], IDLE_SECONDS, picture)
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
