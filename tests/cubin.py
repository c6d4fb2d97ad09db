"""Compiles Triton kernels ahead of time and reads their machine code. Needs the triton wheel, but no GPU.

`python -m tests.cubin` compiles every configuration of every kernels/*/triton.py, for all its architectures, and prints
a report of each as a line of JSON. It must run without TRITON_INTERPRET; `reports` starts it.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources, util
from pathlib import Path

from mars.kernels._triton import Compilation

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes that a block can have
WORKERS = 2

# A line of nvdisasm: /*0100*/ @!P0 HMMA.16816.F32 R4, R8, R12, R4 ;
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Za-z0-9_.]+)([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True, slots=True)
class Report:
    """What a kernel compiled to."""

    name: str  # as `name_of`
    architecture: int
    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # instructions that read or write local memory
    shared_memory: int  # bytes a block
    loop: int  # instructions of the main loop: the one with the most tensor-core instructions, else the longest
    mma: dict[str, int]  # tensor-core instructions of the main loop, by kind (HMMA, HGMMA)
    products: int  # of 16-bit numbers, that these multiply and add, a warp
    loads: dict[str, int]  # global memory, the whole kernel: bits an access -> instructions
    stores: dict[str, int]

    def instructions_per_score(self, depth: int) -> float:
        """Of the main loop, a thread."""
        return self.loop * 32 * depth / self.products


def missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "the compiler and disassembler of triton's wheel are for Linux on x86-64"
    return None if util.find_spec("triton") else "triton is not installed"


def configurations() -> dict[str, Compilation]:
    """`name_of` each configuration of each kernels/*/triton.py, to it."""
    found = {}
    for path in sorted((ROOT / "kernels").glob("*/triton.py")):
        for config in importlib.import_module(f"mars.kernels.{path.parent.name}.triton").CONFIGS:
            name = f"{path.parent.name} {config.name}"
            if name in found:
                raise ValueError(f"cubin: two configurations are called {name!r}")
            found[name] = config
    return found


def compiled(config: Compilation, architecture: int, name: str = "") -> Report:
    """Compile one kernel for a compute capability (80, 89, 90 or 120). Raises where Triton cannot."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = config.kernel.arg_names
    if unknown := set(names) ^ {*config.signature, *config.constants}:
        raise ValueError(
            f"cubin: {config.name}: want a type or a value for every argument, got {sorted(unknown)} wrong"
        )
    aligned = [a for a, kind in config.signature.items() if kind.startswith("*") or a in config.multiples_of_16]
    source = ASTSource(
        fn=config.kernel,
        signature={a: config.signature.get(a, "constexpr") for a in names},
        constexprs={(names.index(a),): value for a, value in config.constants.items()},
        attrs={(names.index(a),): [["tt.divisibility", 16]] for a in aligned},
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _RESOURCES.search(_tool("cuobjdump", "--dump-resource-usage", file.name))
        code, loops = _disassembled(_tool("nvdisasm", "-c", file.name))
    assert usage is not None
    main = max((code[a:b] for a, b in loops), key=lambda body: (sum(map(_products, body)), len(body)), default=[])
    mma = Counter(opcode.split(".")[0] for opcode, _ in main if _products((opcode, "")))
    return Report(
        name=name or config.name,
        architecture=architecture,
        registers=int(usage[1]),
        stack=int(usage[2]),
        spills=sum(opcode.split(".")[0] in ("LDL", "STL") for opcode, _ in code),
        shared_memory=kernel.metadata.shared,
        loop=len(main),
        mma=dict(mma),
        products=sum(map(_products, main)),
        loads=_widths(code, ("LDG", "LDGSTS")),
        stores=_widths(code, ("STG",)),
    )


def faults(config: Compilation, report: Report) -> list[str]:
    """What a report breaks of what its configuration must keep to."""
    found = []
    if report.stack or report.spills:
        found.append(f"spills: a stack of {report.stack} bytes, {report.spills} loads and stores of local memory")
    if report.shared_memory > (limit := SHARED_MEMORY[report.architecture]):
        found.append(f"shared memory: {report.shared_memory} bytes, at most {limit}")
    if config.mma != "none":
        kind = "HGMMA" if config.mma == "warpgroup" and report.architecture == 90 else "HMMA"
        if set(report.mma) != {kind}:
            found.append(f"tensor cores: want {kind} in the main loop, got {report.mma or 'none'}")
    most = config.instructions_per_score.get(report.architecture)
    if most is not None and not (report.products and report.instructions_per_score(config.depth) <= most):
        found.append(f"main loop: {report.loop} instructions for {report.products} products, at most {most} a score")
    for what, wanted, widths in (
        ("loads", config.wide_loads, report.loads),
        ("stores", config.wide_stores, report.stores),
    ):
        bits = sum(int(width) * count for width, count in widths.items())
        if wanted and widths.get("128", 0) * 128 < 0.9 * max(bits, 1):
            found.append(f"global {what}: want 128 bits wide, got {widths}")
    return found


def reports() -> list[Report]:
    """All configurations on all their architectures, compiled in processes of their own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cubin", str(worker)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for worker in range(WORKERS)
    ]
    found = []
    for worker in workers:
        out, errors = worker.communicate()
        if worker.returncode:
            raise RuntimeError(f"cubin: a worker failed\n{errors}")
        found += [Report(**json.loads(line)) for line in out.splitlines()]
    return found


def _work(worker: int) -> Iterator[Report]:
    """Every WORKERS-th compilation."""
    tasks = [(name, config, a) for name, config in configurations().items() for a in config.architectures]
    for name, config, architecture in tasks[worker::WORKERS]:
        yield compiled(config, architecture, name)


def _tool(name: str, *arguments: str) -> str:
    path = resources.files("triton") / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _disassembled(text: str) -> tuple[list[tuple[str, str]], list[tuple[int, int]]]:
    """(opcode, operands) of each instruction, and the innermost loops as (start, end): backward branches."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append((instruction[2], instruction[3]))
    loops = []
    for at, (opcode, operands) in enumerate(code):
        if opcode.startswith("BRA") and (target := re.search(r"\.L_\w+", operands)) and labels[target[0]] < at:
            loops.append((labels[target[0]], at + 1))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return code, inner


def _products(instruction: tuple[str, str]) -> int:
    """Products that a 16-bit tensor-core instruction adds up, a warp: m n k, for HGMMA's four warps a fourth."""
    opcode = instruction[0]
    if match := re.match(r"HMMA\.16(8)(8|16)\.", opcode):
        return 16 * int(match[1]) * int(match[2])
    if match := re.match(r"HGMMA\.64x(\d+)x16\.", opcode):
        return 16 * int(match[1]) * 16
    return 0


def _widths(code: list[tuple[str, str]], opcodes: tuple[str, ...]) -> dict[str, int]:
    """Bits that an access moves, a thread -> how many instructions."""
    found: Counter[str] = Counter()
    for opcode, _ in code:
        first, *suffixes = opcode.split(".")
        if first in opcodes:
            found[next((s.lstrip("US") for s in suffixes if s.lstrip("US") in ("8", "16", "64", "128")), "32")] += 1
    return dict(found)


if __name__ == "__main__":
    for report in _work(int(sys.argv[1])):
        sys.stdout.write(json.dumps(asdict(report)) + "\n")
