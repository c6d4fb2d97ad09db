"""The table of benchmark results, as Markdown; of earlier ones: `python -m scripts.bench_report [results.json]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.contenders import COPY, PRODUCT


def main(path: Path) -> None:
    results = json.loads(path.read_text())
    lines = table(results["benchmarks"], results["datetime"][:10])
    if not lines:
        sys.exit(f"{path}: no results; run pytest benchmarks --benchmark-only first")
    print("\n".join(lines))


def table(benchmarks: Sequence[Mapping[str, Any]], date: str) -> list[str]:
    """The lines of the table of those benchmarks that were timed; none without any."""
    found = [b for b in benchmarks if "contenders" in b["extra_info"]]
    if not found:
        return []
    about = found[0]["extra_info"]
    machine = ", ".join(str(about[key]) for key in ("cpu", "gpu") if key in about)
    lines = [f"{date}, {machine}, torch {about['torch']}. Medians (smallest to largest).", ""]
    for group, members in groupby(found, key=lambda b: b["group"]):
        lines += [f"**{group}**", "", "| case | contender | ms | times the first | target | rate |"]
        lines += ["|---|---|---|---|---|---|"]
        for benchmark in members:
            lines += case_lines(benchmark)
            if used := benchmark["extra_info"]["device_memory"]:
                lines += [f"| | *the driver's count afterwards* | | | | {used / 2**20:.0f} MiB |"]
        lines += [""]
    return lines


def case_lines(benchmark: Mapping[str, Any]) -> list[str]:
    """One line for each contender; the first of them is ours."""
    lines = []
    info = benchmark["extra_info"]
    contenders = info["contenders"]
    first = next(iter(contenders.values()))
    case = benchmark["name"].partition("[")[2].rstrip("]") or info["place"]
    for name, c in contenders.items():
        ms = f"{c['median'] * 1e3:.3g} ({c['min'] * 1e3:.3g}-{c['max'] * 1e3:.3g})"
        ratio = c["median"] / first["median"]
        target = info["targets"].get(name)
        notes = []
        if c["flop"]:
            notes.append(f"{c['flop'] / c['median'] / 1e9:.0f} GFLOP/s")
        if c["bytes"]:
            notes.append(f"{c['bytes'] / c['median'] / 1e9:.1f} GB/s")
        ceilings = [
            c[unit] / c["median"] / (contenders[of][unit] / contenders[of]["median"])
            for of, unit in ((COPY, "bytes"), (PRODUCT, "flop"))
            if of in contenders and c[unit]
        ]
        if ceilings and name not in (COPY, PRODUCT):
            notes.append(f"{max(ceilings):.2f} of the roofline")
        if c["peak_memory"]:
            notes.append(f"peak {c['peak_memory'] / 2**20:.0f} MiB")
        target_ = "" if target is None else f"≥ {target:.3g}"
        if c is first and "rate" in info["targets"]:
            last = list(contenders.values())[-1]
            rate = "flop" if c["flop"] else "bytes"
            fraction = c[rate] / c["median"] / (last[rate] / last["median"])
            notes.append(f"{fraction:.2f} of the last")
            target_ = f"≥ {info['targets']['rate']:.3g} of the last's rate"
        if c is first and "memory" in info["targets"]:
            share = c["peak_memory"] / list(contenders.values())[-1]["peak_memory"]
            notes.append(f"{share:.2f} of the last's")
            target_ = f"≤ {info['targets']['memory']:.3g} of the last's memory"
        lines += [f"| {case} | {name} | {ms} | {ratio:.3g} | {target_} | {', '.join(notes)} |"]
        case = ""
    return lines


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".benchmarks/latest.json"))
