"""The machine code of every Triton kernel, for every architecture: compiled ahead of time, not run."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest

from mars.kernels._triton import ARCHITECTURES, Compilation
from tests import cubin

if (why := cubin.missing()) is not None:
    pytest.skip(why, allow_module_level=True)

import triton
import triton.language as tl

from mars.kernels.nearest_code import triton as nearest_code

CONFIGURATIONS = cubin.configurations(*cubin.modules())
TASKS = [(name, a) for name, config in CONFIGURATIONS.items() for a in config.architectures]


@pytest.fixture(scope="module")
def reports():
    return cubin.reports(*cubin.modules())


@pytest.mark.parametrize(("name", "architecture"), TASKS, ids=lambda value: str(value).replace(" ", "-"))
def test_machine_code(reports, name, architecture):
    check = cubin.faults if triton.__version__.startswith(f"{cubin.TRITON}.") else cubin.errors
    assert check(CONFIGURATIONS[name], architecture, reports[name, architecture]) == []


@pytest.mark.parametrize("module", cubin.modules())
def test_every_kernel_is_compiled_for_every_architecture(module):
    """What a module launches, it calls *_kernel."""
    module = importlib.import_module(module)
    compiled = {(config.kernel.fn.__name__, a) for config in module.CONFIGS for a in config.architectures}
    package, parts = module.__name__.rpartition(".")[0], [module]
    parts += [part for part in vars(module).values() if getattr(part, "__name__", "").startswith(f"{package}.triton_")]
    kernels = {name for part in parts for name in vars(part) if name.endswith("_kernel")}
    assert compiled == {(name, a) for name in kernels for a in ARCHITECTURES}


@triton.jit
def _tree_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + i) * tl.load(y_ptr + i)))


def _like(kernel: str, **changed: object) -> Compilation:
    return replace(next(c for c in nearest_code.CONFIGS if c.kernel.fn.__name__ == kernel), **changed)


def _filter(rows: int, columns: int, depth: int, **changed: object) -> Compilation:
    constants = {"DEPTH": depth, "ROWS": rows, "COLUMNS": columns, "UPCAST": False}
    tile = f"{rows}x{columns} D={depth}"
    return _like("_filter_kernel", tile=tile, constants=constants, depth=depth, **changed)


_REFUSED = [  # none of these is shipped
    (_filter(128, 64, 64, warps=4, architectures=(89,)), "spills: a stack of"),
    (_filter(128, 32, 256, warps=8, architectures=(120,)), "shared memory: 196608 bytes, at most 101376"),
    (_filter(32, 64, 32, architectures=(90,)), "tensor cores: want HGMMA in the main loop, got {'HMMA'"),
    (_filter(128, 64, 16, architectures=(80,), instructions_per_score={80: 1.0}), "at most 1.0 a score"),
    (_like("_exact_kernel", architectures=(80,), mma="warp"), "tensor cores: want HMMA in the main loop, got none"),
    (_like("_rerank_kernel", architectures=(89,), wide_stores=True), "global stores: want 128 bits wide, got {'64'"),
    (_like("_filter_kernel", tile="narrow", architectures=(80,), wide_loads=True), "global loads: want 128 bits wide"),
    (
        Compilation(
            kernel=_tree_kernel,
            tile="128",
            signature={"x_ptr": "*fp32", "y_ptr": "*fp32"},
            constants={"SIZE": 128},
            warps=1,
            stages=1,
            architectures=(80,),
            in_order=True,
        ),
        "tl.dot: the products are not added one by one",
    ),
    (_like("_rerank_kernel", tile="none", constants={"SPLITS": 3, "ROWS": 4}, architectures=(80,)), "does not compile"),
]
CONFIGS = tuple(config for config, _ in _REFUSED)


@pytest.fixture(scope="module")
def refused_reports():
    return cubin.reports("tests.kernels.test_compiled")


@pytest.mark.parametrize(("config", "fault"), _REFUSED, ids=lambda value: getattr(value, "name", ""))
def test_machine_code_that_breaks_a_rule_is_refused(refused_reports, config, fault):
    (architecture,) = config.architectures
    found = cubin.faults(config, architecture, refused_reports[f"kernels {config.name}", architecture])
    assert any(fault in each for each in found), found


_SUM = """
	ld.shared.v2.b32 	{%r1, %r2}, [%r9];
	ld.shared.b32 	%r3, [%r8+4096];
	ld.shared.b32 	%r4, [%r8+4352];
	fma.rn.f32 	%r5, %r1, %r3, %r7;
	fma.rn.f32 	%r6, %r2, %r4, %r5;
"""


def test_sums_in_another_order_are_seen():
    assert cubin._in_order(_SUM)
    assert not cubin._in_order(_SUM.replace("%r8+4352", "%r8+3840"))
    assert not cubin._in_order(_SUM.replace("{%r1, %r2}", "{%r2, %r1}"))
    assert not cubin._in_order(_SUM + "	mul.f32 	%r10, %r1, %r3;\n")
    assert not cubin._in_order("	mov.b32 	%r1, 0;\n")


def test_two_configurations_of_one_name_are_refused(monkeypatch):
    monkeypatch.setattr(nearest_code, "CONFIGS", nearest_code.CONFIGS[:1] * 2)
    with pytest.raises(
        ValueError, match=r"two configurations are called 'nearest_code _filter_kernel 128x64 D=16 w4 s3'"
    ):
        cubin.configurations("mars.kernels.nearest_code.triton")


def test_a_forgotten_argument_is_refused():
    config = _like("_rerank_kernel", constants={"SPLITS": 1})
    with pytest.raises(ValueError, match=r"want a type or a value for every argument, got \['ROWS'\] wrong"):
        cubin.compiled(config, 80)


def test_a_limit_on_instructions_per_score_needs_the_depth():
    with pytest.raises(ValueError, match="instructions_per_score needs the depth"):
        _like("_rerank_kernel", instructions_per_score={80: 4.5})
