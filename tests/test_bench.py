"""What the bench makes of its measurements. The measuring itself needs packages of its own."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import measures
from bench.batches import joined
from bench.goals import goals
from bench.load import loaded
from bench.measures import IMPORT_TORCH, Stolen, quantile, take_turns

ROOT = Path(__file__).parent.parent


def test_a_quantile_is_a_value_that_was_measured() -> None:
    """By nearest rank, as the daemon's own."""
    values = [float(x) for x in range(200, 0, -1)]
    assert [quantile(values, share) for share in (0.01, 0.5, 0.99, 1)] == [2, 100, 198, 200]
    assert quantile([7.0], 0.99) == 7


def test_a_rate_counts_what_lies_between_answers() -> None:
    """Not the time before the first or after the last, of which an answer has only a part."""
    found = loaded([(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)])
    assert found.rate == 2
    assert found.waits == [1000, 1000, 1000]
    assert found.before == [0, 1, 1]


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_the_results_that_are_kept_are_of_a_whole_run(kind: str) -> None:
    """And have what the aims are looked up in."""
    folder = ROOT / "bench" / "results" / kind
    found = json.loads((folder / "results.json").read_text())
    assert not found["quick"]
    assert found["machine"]["bf16"] == (kind == "bf16")
    assert {"throughput", "client throughput", "cold start", "memory", "stolen"} <= set(found)
    usual = found["latency"]["1080x1350"]
    assert {"compiled", "compiled, spinning", "onnxruntime", "openvino"} <= set(usual["engines"])
    assert "matmul-fp32" in usual["matmul"]
    text = (folder / "RESULTS.md").read_text()
    assert "quick run" not in text
    assert "swipr-" not in text  # no path of the machine that it ran on


def test_every_aim_says_what_it_was_held_to() -> None:
    """Twice as fast as the script is enough, a third slower than the engine alone is not."""
    met = {goal.aim: goal.met for goal in goals(RESULTS)}
    assert met["latency, script service to swipr"] is True
    assert met["one request over its engine alone, compiled"] is False
    assert met["bf16: latency"] is None


def test_what_computes_in_bf16_has_aims_of_its_own() -> None:
    """Against the script service, and against multiplications of the same rounds."""
    measured: dict[str, Any] = copy.deepcopy(RESULTS)
    usual = measured["latency"]["1080x1350"]
    usual["engines"]["compiled-bf16"] = {"whole": [40.0] * 3, "compute": [20.0, 25.0, 40.0]}
    usual["matmul"] = {"matmul-bf16": [500.0, 850.0, 250.0]}  # medians of each alone say 0.68
    measured["client latency"]["swipr, bf16"] = [70.0]
    measured["client throughput"]["swipr, bf16"] = {16: CELL | {"rate": [29.0]}}
    met = {goal.aim: goal.met for goal in goals(measured)}
    assert met["latency, script service to swipr, bf16"] is True
    assert met["pictures a second of 16 callers, swipr, bf16"] is False
    assert met["bf16, of the speed of torch.matmul"] is True
    assert "bf16: latency" not in met


def test_starts_are_held_against_the_import_of_their_round() -> None:
    """A busy round makes both slower; medians of each alone could be of different rounds."""
    measured: dict[str, Any] = copy.deepcopy(RESULTS)
    whole = {"swipr": [1.2, 2.4, 1.3], IMPORT_TORCH: [1.0, 2.0, 0.8]}
    measured["cold start"]["whole"] = whole
    (goal,) = (goal for goal in goals(measured) if goal.aim.startswith("cold start"))
    assert (goal.measured, goal.met) == ("1.20 (1.20 to 1.41)", True)
    whole |= {"swipr": [1.2, 3.0, 1.0], IMPORT_TORCH: [0.8, 2.0, 1.0]}
    (goal,) = (goal for goal in goals(measured) if goal.aim.startswith("cold start"))
    assert (goal.measured, goal.met) == ("1.50 (1.25 to 1.50)", False)


def test_turns_are_taken_from_either_end() -> None:
    """Whoever follows one that leaves threads spinning does so in every other round only."""
    seen: list[str] = []
    take_turns([partial(seen.append, name) for name in "abc"], 3)
    assert "".join(seen) == "abccbaabc"


def test_batches_are_joined_in_their_order() -> None:
    """For rounds are compared by where they stand; whatever a batch began with."""
    first = {"latency": {"a": [1.0, 2.0], "b": [3.0]}, "throughput": {1: {"rate": [4.0]}}}
    second = {"throughput": {1: {"rate": [5.0]}}, "latency": {"b": [6.0], "a": []}}
    assert joined([first, second]) == {
        "latency": {"a": [1.0, 2.0], "b": [3.0, 6.0]},
        "throughput": {1: {"rate": [4.0, 5.0]}},
    }


def test_what_was_stolen_is_of_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of the time between them."""
    ticks = iter([(0, 0), (90, 10), (1000, 1000), (1050, 1050)])
    monkeypatch.setattr(measures, "_ran_and_stolen", lambda: next(ticks))
    stolen = Stolen()
    for _ in range(2):
        stolen.begin("one request")
        stolen.end()
    assert stolen.shares() == {"one request": 30}


def test_what_serving_adds_is_the_difference_of_one_round() -> None:
    """Medians of each alone would say 30 ms here."""
    measured: dict[str, Any] = copy.deepcopy(RESULTS)
    usual = measured["latency"]["1080x1350"]
    usual["engines"]["compiled"]["whole"] = [70.0, 100.0, 70.0]
    usual["services"]["swipr"] = [72.0, 102.0, 100.0]
    (goal,) = (goal for goal in goals(measured) if goal.aim.endswith("alone, compiled"))
    assert (goal.measured, goal.met) == ("2.0 (2.0 to 16.0) ms", True)


CELL = {"rate": [10.0], "waits": [100.0], "before": [63.0]}
RESULTS = {
    "latency": {
        "1080x1350": {
            "engines": {
                name: {"whole": [75.0], "compute": [60.0]}
                for name in ("eager", "compiled", "compiled, spinning", "onnxruntime", "openvino")
            },
            "services": {"swipr": [100.0], "swipr, eager": [76.0]},
        }
    },
    "client latency": {"script service": [200.0], "swipr": [100.0], "swipr, eager": [120.0]},
    "client throughput": {"script service": {16: CELL}, "swipr": {16: CELL}},
    "throughput": {"swipr": {4: CELL, 64: CELL}},
    "cold start": {"whole": {"swipr": [1.0], IMPORT_TORCH: [1.0]}},
    "idle memory": [{"rss": 20.0}],
    "client starts": {"swiprctl ping": [1.0], "python3 -c 'import socket, json'": [1.0]},
}
"""What a run finds, as little of it as the aims look at."""
