"""swiprctl status: the daemon's account of itself, for people, programs and Prometheus.

A daemon of another version may leave fields out: what it does not say is a dash, or no metric.
"""

from __future__ import annotations

import json
import sys
import time

from swiprctl.protocol import SwiprError
from swiprctl.terminal import in_words, printable, tell, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Final

    from swiprctl.client import Client

PARTS: Final = ("decode", "compute", "whole")
QUANTILES: Final = {"p50": "0.5", "p95": "0.95", "p99": "0.99"}
STATES: Final = ("loading", "ready", "idle", "failed")
HOME: Final = "\x1b[H\x1b[J"
"""Goes to the upper left and clears the terminal from there on."""


def status(client: Client, args: argparse.Namespace) -> None:
    """Print the status as ``args`` ask for it, once or again and again."""
    form = as_json if args.json else as_metrics if args.prometheus else as_table
    if args.watch is None:
        write(form(client.status()))
        return
    while True:
        _show(client, form)
        time.sleep(args.watch)


def _show(client: Client, form: Callable[[dict[str, Any]], str]) -> None:
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    before = HOME if is_terminal and form is as_table else ""
    after = "" if before or form is not as_table else "\n"
    try:
        write(before + form(client.status()) + after)
    except SwiprError as error:  # it may come back
        if before:
            write(before)
        tell(in_words(error))


def as_json(found: dict[str, Any]) -> str:
    """Return the status as one line of JSON, with every field that the daemon sent."""
    return json.dumps(found) + "\n"


# --- for people ----------------------------------------------------------------------------------


def as_table(found: dict[str, Any]) -> str:
    """Return the status as a table."""
    rows = [
        ("daemon", f"swiprd {_text(found, 'version')}, process {_text(found, 'pid')}"),
        ("up for", _duration(_number(found, "uptime"))),
        ("state", _state(found)),
        ("bundle", _text(found, "bundle")),
        ("model", _text(found, "model")),
        ("labels", _labels(found)),
        ("engine", f"{_text(found, 'engine')}, {_text(found, 'precision')}"),
        ("images", f"{_count(found, 'images')} scored, {_count(found, 'queued')} waiting"),
        ("replies", _replies(found)),
        ("clients", f"{_count(found, 'connections')} connected"),
        ("memory", _memory(found)),
    ]
    lines = [f"{name:<8} {value}" for name, value in rows]
    return "\n".join([*lines, *_latency(found)]) + "\n"


def _state(found: dict[str, Any]) -> str:
    state, reason = _text(found, "state"), found.get("reason")
    if isinstance(reason, str):
        return f"{state}: {printable(reason)}"
    idle_in = _number(found, "idle_in")
    if idle_in is None:
        return state
    return f"{state}; without work, the worker ends in {_duration(idle_in)}"


def _labels(found: dict[str, Any]) -> str:
    labels = found.get("labels")
    if not isinstance(labels, list) or not labels:
        return "-"
    shown = ", ".join(printable(str(label)) for label in labels[:8])
    return shown if len(labels) <= 8 else f"{shown} and {len(labels) - 8} more"


def _replies(found: dict[str, Any]) -> str:
    counts = _dict(found, "replies")
    return ", ".join(f"{printable(code)} {_count(counts, code)}" for code in counts) or "-"


def _memory(found: dict[str, Any]) -> str:
    front = f"front {_mib(_number(found, 'memory'))}"
    workers = (f"worker {_text(w, 'pid')} {_mib(_number(w, 'memory'))}" for w in _workers(found))
    return ", ".join([front, *workers])


def _latency(found: dict[str, Any]) -> Iterator[str]:
    parts = _dict(found, "latency")
    yield "latency  " + " ".join(f"{name:>8}" for name in QUANTILES) + "  ms, of the last images"
    for part in PARTS:
        times = (_number(_dict(parts, part), name) for name in QUANTILES)
        yield f"  {part:<7}" + " ".join("       -" if ms is None else f"{ms:8.1f}" for ms in times)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    whole = round(seconds)
    for unit, size, name in ((86400, 3600, "d h"), (3600, 60, "h min"), (60, 1, "min s")):
        if whole >= unit:
            large, small = name.split()
            return f"{whole // unit} {large} {whole % unit // size} {small}"
    return f"{whole} s"


def _mib(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f} MiB"


# --- for Prometheus ------------------------------------------------------------------------------


def as_metrics(found: dict[str, Any]) -> str:
    """Return the status in Prometheus' text exposition format, version 0.0.4."""
    return "".join(_metrics(found))


def _metrics(found: dict[str, Any]) -> Iterator[str]:
    said = {key: found.get(key) for key in ("version", "model", "engine", "precision")}
    known = {key: value for key, value in said.items() if isinstance(value, str)}
    yield from _metric("info", "gauge", "What is served, and by what.", [(known, 1)])
    state = found.get("state")
    states = [({"state": name}, int(name == state)) for name in STATES]
    yield from _metric("state", "gauge", "1 for the state that the daemon is in.", states)
    for key, name, help in (
        ("uptime", "uptime_seconds", "Time since the daemon was started."),
        ("queued", "queued_images", "Images that wait for a worker."),
        ("connections", "connections", "Clients that are connected."),
        ("idle_in", "worker_ends_in_seconds", "Time until the worker ends if no image comes."),
    ):
        yield from _metric(name, "gauge", help, [({}, _number(found, key))])
    replies = _dict(found, "replies")
    by_code = [({"code": code}, _number(replies, code)) for code in replies]
    yield from _metric("replies_total", "counter", "Replies by code, ok for all others.", by_code)
    memory: list[_Sample] = [({"process": "front"}, _number(found, "memory"))]
    for index, worker in enumerate(_workers(found)):
        memory.append(({"process": f"worker{index}"}, _number(worker, "memory")))
    yield from _metric("memory_bytes", "gauge", "Memory that a process holds.", memory)
    yield from _summary(found)


def _summary(found: dict[str, Any]) -> Iterator[str]:
    parts = _dict(found, "latency")
    count = _number(found, "images")
    help = "Time that scored images took; quantiles of the last ones."
    for part in PARTS:
        times = _dict(parts, part)
        name = f"image_{part}_seconds"
        quantiles: list[_Sample] = [
            ({"quantile": share}, _seconds(_number(times, key))) for key, share in QUANTILES.items()
        ]
        total = _seconds(_number(times, "sum"))
        if count is not None and total is not None:
            yield from _metric(name, "summary", help, quantiles)
            yield _sample(f"{name}_sum", {}, total)
            yield _sample(f"{name}_count", {}, count)


if TYPE_CHECKING:
    _Sample = tuple[dict[str, str], float | None]


def _metric(name: str, kind: str, help: str, samples: Sequence[_Sample]) -> Iterator[str]:
    known = [(labels, value) for labels, value in samples if value is not None]
    if known or kind == "summary":
        yield f"# HELP swipr_{name} {help}\n# TYPE swipr_{name} {kind}\n"
    for labels, value in known:
        yield _sample(name, labels, value)


def _sample(name: str, labels: dict[str, str], value: float) -> str:
    pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"swipr_{name}{{{pairs}}} {value}\n" if pairs else f"swipr_{name} {value}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else round(ms / 1000, 9)


# --- fields --------------------------------------------------------------------------------------


def _text(found: dict[str, Any], key: str) -> str:
    value = found.get(key)
    return "-" if value is None else printable(str(value))


def _number(found: dict[str, Any], key: str) -> float | None:
    value = found.get(key)
    return value if type(value) in (int, float) else None


def _count(found: dict[str, Any], key: str) -> str:
    value = _number(found, key)
    return "-" if value is None else f"{value:,}"


def _dict(found: dict[str, Any], key: str) -> dict[str, Any]:
    value = found.get(key)
    return value if isinstance(value, dict) else {}


def _workers(found: dict[str, Any]) -> list[dict[str, Any]]:
    workers = found.get("workers")
    return [w for w in workers if isinstance(w, dict)] if isinstance(workers, list) else []
