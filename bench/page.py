"""Results for people and programs: RESULTS.md, results.json and the plots beside them."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.goals import GFLOP, goals
from bench.material import USUAL
from bench.measures import IMPORT_TORCH, paired, quantile, spread
from bench.plots import write_plots

SHARES: Final = (25, 75, 90, 99)

HEAD: Final = """# Results

Made by `make bench`, whole and in one run, on one machine; change nothing here. In each table the
subjects took turns, and were started anew four times, but for those of cold starts and of memory,
where each was alone. Cells are medians; where there are brackets, they hold the middle half of what
was measured. What was aimed at is held against medians of the ratios, or differences, of the same
round. All have the same weights, a ResNeXt-50 of fast.ai 0.7, the same pictures, and as many
threads as there are processors; "2 workers" has one in each. `bench/README.md` says what is
compared with what; `results.json` has the numbers.

"""


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write the files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    aims = [dataclasses.asdict(goal) for goal in goals(results)]
    numbers = {**_summed(results), "aims": aims}
    (folder / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    write_plots(results, folder)
    (folder / "RESULTS.md").write_text(HEAD + "\n".join(_sections(results)))


def _sections(results: Mapping[str, Any]) -> Iterable[str]:
    yield _machine(results)
    yield "## What was aimed at\n"
    yield table(
        ["aim", "wanted", "measured", ""],
        [[g.aim, g.wanted, g.measured, "" if g.met is None else "met" if g.met else "**missed**"]
         for g in goals(results)],
    )  # fmt: skip
    yield (
        "How quiet the machine was meanwhile: of the time in which something here could have run,"
        " percent that the host gave to others, what Linux calls steal.\n"
    )
    yield table(
        ["while this was measured", "stolen"],
        [[name, f"{share:.1f}"] for name, share in results["stolen"].items()],
    )
    for name, found in results["latency"].items():
        yield f"## One request: {name}\n"
        yield "Milliseconds, over a connection that is open; engines alone without any service.\n"
        yield _latency(found)
    yield "![One request](latency.svg)\n"
    yield "## Beside the multiplication of matrices\n"
    yield _limit(results)
    yield "## One request, with a client process of its own\n"
    yield "Milliseconds of the whole process, 1080x1350.\n"
    yield table(
        ["service", "median", "p90"],
        [[name, spread(taken), f"{quantile(taken, 0.9):.1f}"]
         for name, taken in results["client latency"].items()],
    )  # fmt: skip
    yield "## Many clients\n"
    yield "Pictures a second, and in brackets the p99 of the waits in milliseconds; 1080x1350.\n"
    yield _throughput("clients, each with a connection", results["throughput"])
    yield _throughput("callers, each with a process a request", results["client throughput"])
    yield "![Many clients](throughput.svg)\n"
    yield "## Growth with the picture\n"
    yield "Milliseconds of one request by megapixels; of services with a client process.\n"
    yield _growth(results["growth"])
    yield "![Growth](growth.svg)\n"
    yield "## Cold start\n"
    yield (
        "Milliseconds from the first connect, with nothing running, to the first tuple; of the"
        " script service from the start of its process, and of Python to the end of the import.\n"
    )
    yield _cold(results["cold start"])
    yield "## Memory\n"
    yield "MB, by process: its proportional share (PSS), what is its own, all that it maps (RSS).\n"
    yield _memory(results)
    yield "## Client processes\n"
    yield "Milliseconds of whole processes.\n"
    yield table(
        ["process", "median"],
        [[f"`{name}`", spread(taken)] for name, taken in results["client starts"].items()],
    )


def _machine(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    bf16 = "" if machine["bf16"] else " It does not compute in bf16: no row has it."
    quick = (
        "**A quick run: it measures too little to say anything.**\n\n" if results["quick"] else ""
    )
    return (
        f"{quick}{machine['date']}, Swipr {machine['version']}, {results['minutes']} minutes.\n"
        f"Processor: {machine['processor']}, {machine['threads']} threads, with"
        f" {', '.join(machine['features'])}.{bf16}\n"
        f"Python {machine['python']}, {packages}.\n"
    )


def _latency(found: Mapping[str, Any]) -> str:
    rows = [
        [f"{name}, alone", spread(parts["whole"]), f"{quantile(parts['whole'], 0.9):.1f}"]
        + [f"{statistics.median(parts[part]):.1f}" for part in ("decode", "prepare", "compute")]
        for name, parts in found["engines"].items()
    ]
    rows += [
        [name, spread(taken), f"{quantile(taken, 0.9):.1f}", "", "", ""]
        for name, taken in found["services"].items()
    ]
    return table(["", "median", "p90", "decode", "prepare", "compute"], rows)


def _limit(results: Mapping[str, Any]) -> str:
    rows = []
    for name, speeds in results["latency"][USUAL]["matmul"].items():
        typical = statistics.median(speeds)
        rows.append([name, f"{typical:.0f}", f"{max(speeds):.0f}", f"{GFLOP / typical * 1000:.1f}"])
    said = (
        f"A ResNeXt-50 takes {GFLOP} GFLOP a picture. So long it would take at the speed of"
        " torch.matmul in the same rounds.\n\n"
    )
    return said + table(["torch.matmul", "GFLOP/s", "at best", "ms a picture"], rows)


def _throughput(what: str, found: Mapping[str, Any]) -> str:
    counts = list(next(iter(found.values())))
    rows = [
        [name]
        + [
            f"{statistics.median(cells[n]['rate']):.1f} ({quantile(cells[n]['waits'], 0.99):.0f})"
            for n in counts
        ]
        for name, cells in found.items()
    ]
    return table([what, *map(str, counts)], rows)


def _growth(found: Mapping[str, Any]) -> str:
    sizes = list(next(iter(found.values())))
    rows = [
        [name, *(f"{statistics.median(by_size[size]):.0f}" for size in sizes)]
        for name, by_size in found.items()
    ]
    return table(["megapixels", *(f"{size:g}" for size in sizes)], rows)


def _cold(found: Mapping[str, Any]) -> str:
    torch = found["whole"][IMPORT_TORCH]
    rows = [
        [
            f"`{name}`" if name == IMPORT_TORCH else name,
            spread(taken),
            spread(paired(taken, torch), 2),
        ]
        for name, taken in found["whole"].items()
    ]
    stages = list(next(iter(found["parts"].values())))
    parts = [
        [name, *(f"{statistics.median(parts[stage]):.0f}" for stage in stages)]
        for name, parts in found["parts"].items()
    ]
    whole = table(["", "median", "times an import of torch"], rows)
    return whole + "\n" + table(["of which", *stages], parts)


def _memory(found: Mapping[str, Any]) -> str:
    services = {**found["memory"], "swipr, idle after 64 clients": found["idle memory"]}
    rows = [
        [name, process["process"], *(f"{process[kind]:.0f}" for kind in ("pss", "private", "rss"))]
        for name, processes in services.items()
        for process in processes
    ]
    return table(["service", "process", "PSS", "own", "RSS"], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _summed(found: Any) -> Any:
    """Return the results with each list of measurements summed up."""
    if isinstance(found, Mapping):
        return {str(key): _summed(value) for key, value in found.items()}
    if isinstance(found, list) and found and all(isinstance(x, float) for x in found):
        return {
            "count": len(found),
            "least": round(min(found), 3),
            "median": round(statistics.median(found), 3),
            **{f"p{share}": round(quantile(found, share / 100), 3) for share in SHARES},
            "most": round(max(found), 3),
        }
    if isinstance(found, list):
        return [_summed(value) for value in found]
    return round(found, 3) if isinstance(found, float) else found
