"""The results drawn, as SVG."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
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
    rates = {
        name: {count: cell["rate"] for count, cell in cells.items()}
        for name, cells in found.items()
    }
    figure, axes = _curves(rates, "clients, each with a connection", "pictures a second")
    counts = list(next(iter(found.values())))
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_ylim(bottom=0)
    return figure


def _growth(found: Mapping[str, Any]) -> Figure:
    figure, axes = _curves(found, "megapixels of a JPEG", "milliseconds, median")
    axes.set_xscale("log")
    axes.set_yscale("log")
    return figure


def _curves(
    found: Mapping[str, Mapping[float, list[float]]], across: str, up: str
) -> tuple[Figure, Axes]:
    """Draw the medians of each subject, and name the axes."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, measured in found.items():
        medians = [statistics.median(values) for values in measured.values()]
        axes.plot(list(measured), medians, marker="o", label=name)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend()
    return figure, axes
