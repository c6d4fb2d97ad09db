"""Prints docs/compiled.md, what every Triton kernel compiles to, without a GPU: python -m scripts.compile_kernels"""

from __future__ import annotations

import sys
from itertools import groupby

from mars.kernels._triton import ARCHITECTURES, Compilation
from tests import cubin

HEAD = """# Triton kernels, compiled

Every tile that mars launches, compiled by Triton {version} for four generations of GPUs and read from the machine code:
`python -m scripts.compile_kernels` prints this page, and `tests/kernels/test_compiled.py` checks what it shows; under
another minor version of Triton only that each tile compiles, fits into shared memory and adds in its order. It says
that nothing spills and what the inner loops consist of; how fast they are, only a GPU can say
([what one said](gpu.md)).

Each cell: registers a thread, shared memory in KiB, tensor-core instructions of the main loop, and for the search its
instructions per score. No kernel uses a stack or local memory, else the check fails.
"""


def main() -> None:
    if (why := cubin.missing()) is not None:
        raise SystemExit(why)
    import triton

    configurations = cubin.configurations(*cubin.modules())
    reports = cubin.reports(*cubin.modules())
    if failed := [f"{name} on sm_{arch}: {r}" for (name, arch), r in reports.items() if isinstance(r, str)]:
        raise SystemExit("\n".join(failed))
    write = sys.stdout.write
    write(HEAD.format(version=triton.__version__))
    for op, names in groupby(configurations, key=lambda name: name.split()[0]):
        write(f"\n## {op}\n\n| kernel, tile, warps, stages |" + "".join(f" sm_{a} |" for a in ARCHITECTURES))
        write("\n|---|" + "---|" * len(ARCHITECTURES) + "\n")
        for name in names:
            cells = [_cell(configurations[name], reports.get((name, arch))) for arch in ARCHITECTURES]
            write(f"| {name.split(maxsplit=1)[1].strip('_')} | {' | '.join(cells)} |\n")


def _cell(config: Compilation, report: cubin.Report | str | None) -> str:
    if not isinstance(report, cubin.Report):
        return ""
    parts = [str(report.registers), f"{report.shared_memory / 1024:.3g}"]
    if report.mma:
        parts.append(" + ".join(f"{count} {kind}" for kind, count in report.mma.items()))
    if config.instructions_per_score:
        parts.append(f"{report.instructions_per_score(config.depth):.2f}")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
