"""The native library as such: that it is there, its levels, its machine code, and what happens without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mars import kernels
from mars.errors import KernelError
from mars.kernels import _backend, _native

MISSING = _backend.missing("native", "cpu")
needs_native = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def python(code, **environment):
    """Run code in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )


def test_the_library_is_there():
    if MISSING and "CI" not in os.environ:
        pytest.skip(MISSING)
    assert MISSING is None
    assert _native.levels()[0] == "portable"
    assert _backend.backend("cpu") == "native"
    assert _native.functions().mars_threaded()


@needs_native
def test_levels_are_the_ones_of_the_header():
    header = (Path(kernels.__file__).parent / "native" / "simd.h").read_text()
    found = re.search(r"enum Level : int \{(.*)\}", header)
    assert found
    names = [name.strip().lower() for name in re.sub(r"= \d+", "", found[1]).split(",")]
    assert tuple(names) == _native.LEVELS
    assert f"#define MARS_ABI {_native.ABI}\n" in (Path(kernels.__file__).parent / "native/mars_native.h").read_text()


@needs_native
def test_the_environment_chooses_the_level():
    show = "from mars.kernels import _native; print(_native.level())"
    for level in {"portable", _native.levels()[-1]}:
        assert python(show, MARS_NATIVE_LEVEL=level).stdout.strip() == level
    refused = python(show, MARS_NATIVE_LEVEL="sse9")
    assert "MARS_NATIVE_LEVEL: want one of portable" in refused.stderr
    assert "got 'sse9'" in refused.stderr


def test_the_environment_chooses_the_implementation():
    show = "from mars.kernels import _backend; print(_backend.backend('cpu'))"
    assert python(show, MARS_KERNELS="reference").stdout.strip() == "reference"
    assert (
        "MARS_KERNELS: want one of auto, reference, native, triton, got 'cuda'"
        in python(show, MARS_KERNELS="cuda").stderr
    )
    with (
        pytest.raises(ValueError, match="want one of auto, reference, native, triton, got 'cuda'"),
        kernels.use("cuda"),
    ):
        pass


@pytest.mark.parametrize("name", ["MARS_KERNELS", "MARS_ATTENTION", "MARS_NATIVE_LEVEL"])
def test_a_wrong_value_is_one_line_of_a_command(name):
    """It is no error of an import, and one that commands can tell."""
    if name == "MARS_NATIVE_LEVEL" and MISSING is not None:
        pytest.skip(MISSING)
    code = (
        "import torch\n"
        "from mars.cli.errors import user_errors\n"
        "from mars.kernels import nearest_code, scale_causal_attention\n"
        "import click\n"
        "@click.command()\n"
        "def main():\n"
        "    with user_errors():\n"
        "        nearest_code(torch.eye(3), torch.eye(3))\n"
        "        scale_causal_attention(*torch.ones(3, 1, 1, 5, 16), (1, 4))\n"
        "main()"
    )
    done = python(code, **{name: "wrong"})
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {name}: want one of ")
    assert line.endswith("got 'wrong'")


def test_what_cannot_run_here_is_an_error_of_mars(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with kernels.use("triton"), pytest.raises(KernelError, match=r"^MARS_KERNELS=triton: "):
        _backend.backend("cpu")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("MARS_KERNELS", "auto, reference, native, triton"),
        ("MARS_ATTENTION", "auto, triton, hybrid, grouped, dense, flash, xformers, flex, reference"),
    ],
)
def test_the_command_tells_a_wrong_value(name, known):
    done = subprocess.run(
        [sys.executable, "-m", "mars.kernels"],
        env={**os.environ, name: "wrong"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == f"Error: {name}: want one of {known}, got 'wrong'\n"


def test_without_the_library_there_is_one_warning_and_plain_pytorch(tmp_path):
    code = (
        "import torch, warnings\n"
        "from mars.kernels import nearest_code\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    ids = [nearest_code(torch.eye(3), torch.eye(3)) for _ in range(3)]\n"
        "print([str(w.message) for w in caught if 'mars' in str(w.message)], ids[2].tolist())\n"
    )
    done = python(code, MARS_NATIVE_LIBRARY=str(tmp_path / "none.so"))
    assert done.stdout.count("no native kernels") == 1, done.stderr
    assert done.stdout.endswith("[0, 1, 2]\n")
    asked = python(code, MARS_NATIVE_LIBRARY=str(tmp_path / "none.so"), MARS_KERNELS="native")
    assert "MARS_KERNELS=native:" in asked.stderr
    assert "does not load" in asked.stderr


@pytest.mark.parametrize(
    ("triton", "numpy", "why"),
    [
        ("3.6.0", "2.4.0", "the interpreter of Triton 3.6.0 stops on NumPy 2.4.0: it wants Triton 3.7 or NumPy"),
        ("3.6.0+git1", "3.0.1", "the interpreter of Triton 3.6.0+git1 stops on NumPy 3.0.1"),
        ("3.6.0", "2.3.5", None),
        ("3.7.0", "2.4.6", None),
        ("3.10.1", "2.4.6", None),
    ],
)
def test_an_interpreter_that_numpy_stops_is_said(triton, numpy, why, monkeypatch):
    monkeypatch.setattr(_backend.metadata, "version", {"triton": triton, "numpy": numpy}.get)
    found = _backend._interpreter_stops.__wrapped__()
    assert found is None if why is None else found.startswith(why)


@pytest.mark.skipif(sys.platform != "linux", reason="names a library of Linux")
def test_another_library_is_said_to_be_that():
    show = "from mars.kernels import _native; print(_native.library())"
    done = python(show, MARS_NATIVE_LIBRARY="libc.so.6")
    assert done.stdout == "libc.so.6 is another library than that of mars\n"


def test_importing_the_package_loads_neither_triton_nor_the_library():
    code = (
        "import sys, mars, mars.kernels\n"
        "from mars.kernels import _native\n"
        "print('triton' in sys.modules, _native.library.cache_info().currsize)"
    )
    assert python(code).stdout == "False 0\n"


def test_the_command_lists_what_is_there():
    done = subprocess.run([sys.executable, "-m", "mars.kernels"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0
    assert re.search(r"^  reference +yes$", done.stdout, re.M)
    refused = subprocess.run(
        [sys.executable, "-m", "mars.kernels"],
        env={**os.environ, "MARS_KERNELS": "triton", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert refused.returncode == 0
    assert refused.stdout.startswith("cpu: MARS_KERNELS=triton: ")
    if MISSING is None:
        assert f"instruction set: {_native.level()} (of portable" in done.stdout


# ---- Machine code: accumulators that a compiler moves to the stack inside a loop cost three quarters of the speed.


def spills(listing):
    """{function: vector stores to the stack inside innermost loops that multiply} of `objdump -d`."""
    found = {}
    for name, body in re.findall(r"^[0-9a-f]+ <([^>]+)>:\n((?:.+\n)+)", listing, re.M):
        lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"^\s*([0-9a-f]+):\t(.*)$", body, re.M)]
        loops = []
        for at, (address, text) in enumerate(lines):
            jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
            if jump and int(jump[1], 16) < address:
                start = next((i for i, (a, _) in enumerate(lines) if a == int(jump[1], 16)), None)
                if start is not None:
                    loops.append((start, at))
        for a, b in loops:
            if any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops):
                continue
            inner = [text for _, text in lines[a : b + 1]]
            if not any(re.match(r"(vfmadd\w+ps|vpdpbusd|vdpbf16ps)\b.*%[yz]mm", text) for text in inner):
                continue
            stores = [text for text in inner if re.match(r"vmov\w+\s+%[yz]mm\d+,-?(0x)?[0-9a-f]*\(%r[sb]p\)", text)]
            found[name] = max(found.get(name, 0), len(stores))
    return found


@needs_native
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_no_accumulator_goes_through_the_stack():
    library = _native.functions()._name
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    ).stdout
    found = spills(listing)
    if _native.levels()[-1] == "portable":
        pytest.skip("not a processor that the vector code was built for")
    for name in ("exact_avx512", "exact_avx2", "score_vnni", "score_bf16"):
        assert [count for function, count in found.items() if name in function] == [0], (name, found)
    assert not any(found.values()), found


def test_the_check_of_the_machine_code_can_fail():
    loop = """
0000000000001000 <bad>:
    1000:\tvfmadd231ps %zmm1,%zmm2,%zmm3
    1006:\tvmovaps %zmm3,0x40(%rsp)
    100c:\tdec    %rax
    100f:\tjne    1000 <bad>
    1011:\tret

"""
    assert spills(loop) == {"bad": 1}
    assert spills(loop.replace("0x40(%rsp)", "0x40(%rdi)")) == {"bad": 0}
    assert spills(loop.replace("vfmadd231ps", "vaddps")) == {}


@needs_native
def test_threads_are_those_of_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert _native.threads() == 2
    finally:
        torch.set_num_threads(before)
