"""What Swipr means to be, each aim beside what was measured.

What is compared was measured in turn: figures are medians of the ratios, or differences, of the
same round, and in brackets their middle half.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.material import USUAL
from bench.measures import IMPORT_TORCH, paired, spread
from bench.subjects import SPINNING, SWIPR, SWIPR_BF16

GFLOP: Final = 8.5
"""Of one forward pass of a ResNeXt-50 32x4d on 224 x 224 pixels, a multiplication and an addition
counted as two: torchvision's documentation gives 4.23 GFLOPS, counted as one."""
OTHERS: Final = ("onnxruntime", "openvino")
NOT_HERE: Final = "this processor does not compute in bf16"


@dataclass(frozen=True, slots=True)
class Goal:
    """One aim.

    Attributes:
        aim: what is compared.
        wanted: the bound.
        measured: what it was.
        met: whether it is within the bound; None: it cannot be measured here.
    """

    aim: str
    wanted: str
    measured: str
    met: bool | None


def goals(results: Mapping[str, Any]) -> Iterator[Goal]:
    """Yield every aim with what ``results`` say of it."""
    usual = results["latency"][USUAL]
    alone, served = usual["engines"], usual["services"]
    for service, engine in ((SWIPR, "compiled"), ("swipr, eager", "eager")):
        whole = alone[engine]["whole"]
        differences = [a - b for a, b in zip(served[service], whole, strict=True)]
        allowed = 1 + 0.03 * statistics.median(whole)
        yield Goal(
            f"one request over its engine alone, {engine}",
            f"at most 1.0 ms + 3 % of it, {allowed:.1f} ms",
            f"{spread(differences)} ms",
            statistics.median(differences) <= allowed,
        )
    script = "script service"
    asked = results["client latency"]
    yield _at_least("latency, script service to swipr", paired(asked[script], asked[SWIPR]), 1.5)
    eager = paired(asked[script], asked["swipr, eager"])
    yield Goal("the same, to swipr with the script's engine", "", spread(eager, 2), None)
    by_processes = {name: cells[16]["rate"] for name, cells in results["client throughput"].items()}
    yield _at_least(
        "pictures a second of 16 callers, to the script service",
        paired(by_processes[SWIPR], by_processes[script]),
        1.5,
    )
    if SWIPR_BF16 in asked:
        yield _at_least(
            f"latency, script service to {SWIPR_BF16}",
            paired(asked[script], asked[SWIPR_BF16]),
            2.5,
        )
        yield _at_least(
            f"pictures a second of 16 callers, {SWIPR_BF16}",
            paired(by_processes[SWIPR_BF16], by_processes[script]),
            3,
        )
        speeds = usual["matmul"]["matmul-bf16"]
        reached = [GFLOP / (ms / 1000) for ms in alone["compiled-bf16"]["compute"]]
        yield _at_least("bf16, of the speed of torch.matmul", paired(reached, speeds), 0.8)
        of_best = statistics.median(reached) / max(speeds)
        yield Goal("the same, of its best", "", f"{of_best:.2f}", None)
    else:
        for aim, bound in (
            ("latency", 2.5),
            ("pictures a second of 16 callers", 3),
            ("of the speed of torch.matmul", 0.8),
        ):
            yield Goal(f"bf16: {aim}", f"at least {bound:g}", NOT_HERE, None)
    cells = results["throughput"][SWIPR]
    yield _at_least(
        "pictures a second, of 64 clients to those of 4",
        paired(cells[64]["rate"], cells[4]["rate"]),
        0.97,
    )
    # A wait in milliseconds is other programs' doing, too; how many went before is not.
    before = max(cells[64]["before"])
    yield Goal(
        "64 clients: most that were answered while one waited",
        "at most 64, the queue",
        f"{before:.0f}",
        before <= 64,
    )
    sleeping, spinning = (
        max(
            (paired(alone[ours]["compute"], alone[theirs]["compute"]) for theirs in OTHERS),
            key=statistics.median,
        )
        for ours in ("compiled", SPINNING)
    )
    yield _at_most("compute, compiled to the better of ONNX Runtime and OpenVINO", sleeping, 1.15)
    yield Goal("the same, its threads spinning as theirs do", "", spread(spinning, 2), None)
    cold = results["cold start"]["whole"]
    yield _at_most(
        "cold start, to an import of torch", paired(cold[SWIPR], cold[IMPORT_TORCH]), 1.35
    )
    (front,) = results["idle memory"]
    yield Goal(
        "the front, idle after 64 clients", "at most 25 MB (RSS)", f"{front['rss']:.1f} MB",
        front["rss"] <= 25,
    )  # fmt: skip
    starts = results["client starts"]
    yield _at_most(
        "swiprctl ping, to python3 -c 'import socket, json'",
        paired(starts["swiprctl ping"], starts["python3 -c 'import socket, json'"]),
        1.6,
    )


def _at_least(aim: str, ratios: Sequence[float], bound: float) -> Goal:
    met = statistics.median(ratios) >= bound
    return Goal(aim, f"at least {bound:g}", spread(ratios, 2), met)


def _at_most(aim: str, ratios: Sequence[float], bound: float) -> Goal:
    met = statistics.median(ratios) <= bound
    return Goal(aim, f"at most {bound:g}", spread(ratios, 2), met)
