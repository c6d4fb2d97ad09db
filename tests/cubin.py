"""Compiles Triton kernels ahead of time and reads their machine code. Needs the triton wheel, but no GPU.

`reports` does so in processes of its own (`python -m tests.cubin`), as they must run without TRITON_INTERPRET.
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
from dataclasses import asdict, dataclass
from importlib import resources, util
from pathlib import Path

from mars.kernels._triton import Compilation

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes that a block can have
WORKERS = 2
TRITON = "3.7"  # the tiles were chosen by what it compiles them to; others spill a register here and there

# A line of nvdisasm: /*0100*/ @!P0 HMMA.16816.F32 R4, R8, R12, R4 ;
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Za-z0-9_.]+)([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True, slots=True)
class Report:
    """What a kernel compiled to."""

    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # instructions that read or write local memory
    shared_memory: int  # bytes a block
    loop: int  # instructions of the main loop: the one with the most tensor-core instructions, else the longest
    mma: dict[str, int]  # tensor-core instructions of the main loop, by kind (HMMA, HGMMA)
    products: int  # of 16-bit numbers, that these multiply and add, a warp
    loads: dict[str, int]  # global memory, the whole kernel: bits an access -> instructions
    stores: dict[str, int]
    in_order: bool  # as `_in_order`

    def instructions_per_score(self, depth: int) -> float:
        """Of the main loop, a thread."""
        return self.loop * 32 * depth / self.products


def missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "the compiler and disassembler of triton's wheel are for Linux on x86-64"
    return None if util.find_spec("triton") else "triton is not installed"


def modules() -> list[str]:
    """The modules of all Triton kernels: every kernels/*/triton.py."""
    return [f"mars.kernels.{path.parent.name}.triton" for path in sorted((ROOT / "kernels").glob("*/triton.py"))]


def configurations(*modules: str) -> dict[str, Compilation]:
    """The `CONFIGS` of modules by names that tell them apart: the module's folder, then `Compilation.name`."""
    found: dict[str, Compilation] = {}
    for module in modules:
        for config in importlib.import_module(module).CONFIGS:
            name = f"{module.split('.')[-2]} {config.name}"
            if name in found:
                raise ValueError(f"cubin: two configurations are called {name!r}")
            found[name] = config
    return found


def compiled(config: Compilation, architecture: int) -> Report:
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
        registers=int(usage[1]),
        stack=int(usage[2]),
        spills=sum(opcode.split(".")[0] in ("LDL", "STL") for opcode, _ in code),
        shared_memory=kernel.metadata.shared,
        loop=len(main),
        mma=dict(mma),
        products=sum(map(_products, main)),
        loads=_widths(code, ("LDG", "LDGSTS")),
        stores=_widths(code, ("STG",)),
        in_order=_in_order(kernel.asm["ptx"]),
    )


def errors(config: Compilation, architecture: int, report: Report | str) -> list[str]:
    """What keeps a kernel from running, or makes its results others. A string is why there is no report."""
    if isinstance(report, str):
        return [report]
    found = []
    if report.shared_memory > (limit := SHARED_MEMORY[architecture]):
        found.append(f"shared memory: {report.shared_memory} bytes, at most {limit}")
    if config.in_order and not report.in_order:
        found.append("tl.dot: the products are not added one by one, fused, first column first")
    return found


def faults(config: Compilation, architecture: int, report: Report | str) -> list[str]:
    """What a report breaks of what its configuration must keep to: `errors`, and what makes it slow."""
    actual = errors(config, architecture, report)
    if isinstance(report, str):
        return actual
    if report.stack or report.spills:
        actual.append(f"spills: a stack of {report.stack} bytes, {report.spills} loads and stores of local memory")
    if config.mma != "none":
        kind = "HGMMA" if config.mma == "warpgroup" and architecture == 90 else "HMMA"
        if set(report.mma) != {kind}:
            actual.append(f"tensor cores: want {kind} in the main loop, got {report.mma or 'none'}")
    most = config.instructions_per_score.get(architecture)
    if most is not None and not (report.products and report.instructions_per_score(config.depth) <= most):
        actual.append(f"main loop: {report.loop} instructions for {report.products} products, at most {most} a score")
    for what, expected, widths in (
        ("loads", config.wide_loads, report.loads),
        ("stores", config.wide_stores, report.stores),
    ):
        bits = sum(int(width) * count for width, count in widths.items())
        if expected and widths.get("128", 0) * 128 < 0.9 * max(bits, 1):
            actual.append(f"global {what}: want 128 bits wide, got {widths}")
    return actual


def reports(*modules: str) -> dict[tuple[str, int], Report | str]:
    """Of each of the `configurations` on each of its architectures: the report, or the compiler's error."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cubin", str(worker), *modules],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for worker in range(WORKERS)
    ]
    found: dict[tuple[str, int], Report | str] = {}
    for worker, (out, errors) in [(worker, worker.communicate()) for worker in workers]:
        if worker.returncode:
            raise RuntimeError(f"cubin: a worker failed\n{errors}")
        for line in out.splitlines():
            name, architecture, report = json.loads(line)
            found[name, architecture] = report if isinstance(report, str) else Report(**report)
    return found


def _work(worker: int, *modules: str) -> None:
    """Print every WORKERS-th of the reports, a line of JSON each."""
    tasks = [(name, config, a) for name, config in configurations(*modules).items() for a in config.architectures]
    for name, config, architecture in tasks[worker::WORKERS]:
        try:
            report: dict[str, object] | str = asdict(compiled(config, architecture))
        except Exception as error:  # the compiler's are of many kinds
            report = f"does not compile: {error}"
        sys.stdout.write(json.dumps((name, architecture, report)) + "\n")


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


def _in_order(ptx: str) -> bool:
    """Whether all float32 products are fused and, in each sum, come from ever higher places in shared memory."""
    place: dict[str, int] = {}  # of what a register, or its low half, was loaded from
    high: dict[str, int] = {}  # of its high half
    last: dict[str, tuple[int, ...]] = {}  # of the factors of the product that a sum added last
    for line in ptx.splitlines():
        opcode, _, operands = line.strip().partition(" ")
        registers = re.findall(r"%rd?\d+", operands)
        match opcode.split("."):
            case ["ld", "shared", *_, ("b32" | "b64") as kind]:
                offset = re.search(r"\+(\d+)\]", operands)
                for i, register in enumerate(registers[:-1]):
                    place[register] = int(offset[1] if offset else 0) + int(kind[1:]) // 8 * i
            case ["shl", "b64"]:
                place[registers[0]] = place.get(registers[1], -1)
            case ["or", "b64"] if len(registers) == 3:
                out, upper, lower = registers
                place[out], high[out] = place.get(lower, -1), place.get(upper, -1)
            case ["mov", "b64"] if len(registers) == 3:  # of a pair: from its halves, or to them
                if operands.lstrip().startswith("{"):
                    place[registers[0]], place[registers[1]] = place.get(registers[2], -1), high.get(registers[2], -1)
                else:
                    place[registers[0]], high[registers[0]] = (place.get(half, -1) for half in registers[1:])
            case ["fma", "rn", "f32" | "f32x2"]:
                out, *factors, start = registers
                last[out] = tuple(place.get(factor, -1) for factor in factors)
                before = last.get(start, (-1, -1))
                if not all(a < b for a, b in zip(before, last[out], strict=True)):
                    return False
            case ["mul" | "add" | "sub" | "fma", *_, "f32" | "f32x2"]:
                return False
    return bool(last)


if __name__ == "__main__":
    _work(int(sys.argv[1]), *sys.argv[2:])
