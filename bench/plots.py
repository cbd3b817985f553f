"""The results drawn, as SVG."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

SETTINGS: Final = {"svg.hashsalt": "swipr", "svg.fonttype": "none", "figure.dpi": 80}
"""The same numbers give the same bytes, and text stays text."""


def write_plots(results: Mapping[str, Any], folder: Path) -> None:
    """Write latency.svg, throughput.svg and growth.svg."""
    mpl.use("svg")
    mpl.rcParams.update(SETTINGS)
    for name, figure in (
        ("latency", _latency(results["latency"])),
        ("throughput", _throughput(results["throughput"])),
        ("growth", _growth(results["growth"])),
    ):
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


def _latency(found: Mapping[str, Any]) -> Figure:
    figure, all_axes = plt.subplots(1, len(found), figsize=(12, 4))
    for axes, (picture, measured) in zip(all_axes, found.items(), strict=True):
        bars = {f"{name}, alone": parts["whole"] for name, parts in measured["engines"].items()}
        bars |= measured["services"]
        names = list(reversed(bars))
        colours = ["tab:green" if n.startswith("swipr") else "tab:gray" for n in names]
        axes.barh(names, [statistics.median(bars[name]) for name in names], color=colours)
        axes.set_title(f"one request, {picture}")
        axes.set_xlabel("milliseconds, median")
    figure.tight_layout()
    return figure


def _throughput(found: Mapping[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, cells in found.items():
        counts = list(cells)
        rates = [statistics.median(cells[count]["rate"]) for count in counts]
        axes.plot(counts, rates, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clients, each with a connection")
    axes.set_ylabel("pictures a second")
    axes.legend()
    return figure


def _growth(found: Mapping[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, by_size in found.items():
        sizes = list(by_size)
        axes.plot(sizes, [statistics.median(by_size[s]) for s in sizes], marker="o", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("megapixels of a JPEG")
    axes.set_ylabel("milliseconds, median")
    axes.legend()
    return figure
