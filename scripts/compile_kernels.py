"""Prints what every Triton kernel compiles to, as Markdown. Needs no GPU: python -m scripts.compile_kernels"""

from __future__ import annotations

from tests import cubin

HEADINGS = (
    "op",
    "kernel",
    "tile",
    "warps",
    "stages",
    "sm",
    "registers",
    "shared memory, bytes",
    "stack, bytes",
    "tensor-core instructions in the main loop",
    "instructions per score",
)


def main() -> None:
    if (why := cubin.missing()) is not None:
        raise SystemExit(why)
    configurations = cubin.configurations(*cubin.modules())
    print("## Compiled, not run\n")
    print("|", " | ".join(HEADINGS), "|")
    print("|", " | ".join("---" for _ in HEADINGS), "|")
    for (name, architecture), report in sorted(cubin.reports(*cubin.modules()).items()):
        config = configurations[name]
        row = [
            name.split()[0],
            config.kernel.fn.__name__.strip("_").removesuffix("_kernel"),
            config.tile,
            config.warps,
            config.stages,
            architecture,
        ]
        if isinstance(report, str):
            row.append(report)
        else:
            mma = ", ".join(f"{count} {kind}" for kind, count in report.mma.items())
            per_score = f"{report.instructions_per_score(config.depth):.2f}" if config.instructions_per_score else ""
            row += [report.registers, report.shared_memory, report.stack, mma, per_score]
        print("|", " | ".join(map(str, row)), "|")


if __name__ == "__main__":
    main()
