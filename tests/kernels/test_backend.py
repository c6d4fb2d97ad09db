"""How an implementation is chosen: by tables that say what there is, in each operation the same way."""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from pathlib import Path
from typing import get_args

import pytest
import torch

from mars import kernels
from mars.errors import KernelError
from mars.kernels import _backend
from mars.kernels.cmx import op as cmx
from mars.kernels.linear_cross_entropy import op as linear_cross_entropy
from mars.kernels.multiscale_quantize import op as multiscale_quantize
from mars.kernels.nearest_code import op as nearest_code
from mars.kernels.scale_causal_attention import op as attention
from tests.kernels.test_ops import FIT, FUSED

BACKENDS = set(get_args(_backend.Backend))
FOLDER = Path(kernels.__file__).parent
CHOOSING = [n for n in FIT if n not in FUSED and "hybrid" not in n and "shifted" not in n]  # the rest are one backend's


@pytest.mark.parametrize("name", CHOOSING)
def test_a_backend_that_an_operation_lacks_is_an_error(name, monkeypatch):
    """The next backend, until an operation has it, must not run as one of the others."""
    monkeypatch.setattr(_backend, "backend", lambda device: "fourth")
    monkeypatch.setattr(_backend, "choice", lambda: "fourth")
    call = kernels.linear_cross_entropy if name == "linear_cross_entropy" else getattr(torch.ops.mars, name)
    arguments = FIT[name]()[: 4 if name == "linear_cross_entropy" else None]
    with pytest.raises(KernelError, match=rf"^{name}: want a backend of .*native.*, got 'fourth'$"):
        call(*arguments)


def test_an_attention_that_there_is_not_is_an_error(monkeypatch):
    q = torch.randn(1, 2, 5, 16)
    monkeypatch.setattr(_backend, "backend", lambda device: "fourth")
    monkeypatch.setattr(_backend, "choice", lambda: "fourth")
    with pytest.raises(KernelError, match=r"^scale_causal_attention: want a backend of .*, got 'fourth'$"):
        kernels.scale_causal_attention(q, q, q, (1, 4))
    with pytest.raises(KernelError, match=r"^token_scores: want a backend of .*, got 'fourth'$"):
        kernels.token_scores(*FIT["linear_cross_entropy"]()[:4])


def test_tables_hold_what_can_be_asked_for():
    for table in (
        cmx._CMX,
        cmx._INVERSE_CMX,
        cmx._SPECTROGRAM_CMX,
        cmx._SPECTROGRAM_CMX_BACKWARD,
        cmx._INVERSE_SPECTROGRAM_CMX,
        multiscale_quantize._IMPLEMENTATIONS,
        nearest_code._IMPLEMENTATIONS,
        attention._MEANING,
    ):
        assert set(table) == BACKENDS
    assert set(linear_cross_entropy._LOSSES) == set(linear_cross_entropy._SCORES) == BACKENDS | {"auto"}
    assert set(attention._TABLE) == set(attention.BACKENDS)


def test_what_is_deferred_is_imported_by_the_first_call(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    double = _backend.deferred("late_module", "double")
    assert "late_module" not in sys.modules
    assert [double(3), double(4)] == [6, 8]
    assert sys.modules.pop("late_module")


def imports(path):
    """The modules of mars.kernels that a file imports, at whatever depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mars.kernels"):
            yield from (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("mars.kernels."):
            yield node.value  # what is deferred


def test_no_two_modules_need_each_other():
    files = {
        ".".join(("mars", "kernels", *path.relative_to(FOLDER).with_suffix("").parts)): path
        for path in FOLDER.rglob("*.py")
        if not path.name.startswith("__")
    }
    needs = {name: set(imports(path)) & set(files) for name, path in files.items()}
    assert len(files) > 20
    done: set[str] = set()
    while ready := {name for name in files if name not in done and needs[name] <= done}:
        done |= ready
    assert set(files) - done == set()


def test_preparing_a_codebook_needs_no_triton():
    assert "import triton" not in (FOLDER / "nearest_code/packing.py").read_text(encoding="utf-8")


def test_the_packages_docstring_names_all_and_its_example_runs():
    text = str(kernels.__doc__)
    public = {name for name, value in vars(kernels).items() if callable(value) and not name.startswith("_")}
    assert public
    assert {name for name in public if f"`{name}`" not in text} == set()
    code = textwrap.dedent("\n".join(line for line in text.splitlines() if line.startswith("    ")))
    assert code
    ran: dict[str, torch.Tensor] = {}
    exec(code, ran)  # noqa: S102  # the snippet of our own docstring
    x, z, codebook = ran["x"], ran["z"], ran["codebook"]
    torch.testing.assert_close(x.grad, 2 * z)
    torch.testing.assert_close((x - z).norm(dim=1), torch.cdist(x, codebook).amin(1), rtol=1e-4, atol=1e-4)


def test_the_guide_lists_every_attention():
    guide = Path(__file__).resolve().parents[2] / "docs/kernels.md"
    section = guide.read_text(encoding="utf-8").partition("## Attention\n")[2].partition("\n## ")[0]
    sentence = section.partition("selects one of")[2].partition(".")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(attention.BACKENDS)
