"""Compiled blocks give the same steps, survive a resume bit for bit, and a compiler that fails is no surprise."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
import torch
import torch._inductor.config
from rich.console import Console

from mars.config import override
from mars.errors import ConfigError
from mars.models.tokenizer import Tokenizer
from mars.runs.distributed import ALONE
from mars.runs.folder import RunFolder
from mars.runtime import stream
from mars.train import loop
from mars.train.compiling import compile_blocks
from mars.train.tokenizer import TokenizerStage
from mars.train.tokens import tokenize
from mars.train.var import VARStage

CPU = torch.device("cpu")


def make(kind: str, smoke, notes, mode: str):
    settings = ("train.steps=4", "train.batch_size=3", "train.precision=float32", "train.validate_notes=2")
    c = override(smoke, (*settings, f"train.compile={mode}"), kind)
    if kind == "tokenizer":
        return TokenizerStage(c, notes, CPU, seed=4)
    torch.manual_seed(0)
    tokenizer = Tokenizer(c).eval().requires_grad_(False)
    return VARStage(c, notes, tokenizer, tokenize(tokenizer, c, notes, ALONE, lambda n: None), CPU, seed=4)


def compiled(stage) -> bool:
    return any(block._compiled_call_impl is not None for block in stage.blocks())


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A machine without a C++ compiler, as far as Inductor can tell."""
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # where nothing is compiled yet
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        yield
    torch.compiler.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's own tracing reads it
@pytest.mark.parametrize("kind", ["tokenizer", "var"])
def test_the_same_steps_and_the_same_bits_after_a_resume(kind, smoke, notes, tmp_path):
    torch.compiler.reset()
    plain, messages = make(kind, smoke, notes, "off"), []
    assert not compile_blocks(plain, messages.append)
    before = {(g, k): v.clone() for g, t in plain.state().items() for k, v in t.items()}

    def run(path, **settings):
        stage = make(kind, smoke, notes, "on")
        assert compile_blocks(stage, messages.append)
        assert compiled(stage)
        if not settings:
            state = {(g, k): v for g, t in stage.state().items() for k, v in t.items()}
            assert state.keys() == before.keys()
            assert all(torch.equal(v, before[key]) for key, v in state.items())  # the dry run left no trace
            assert all(p.grad is None for p in stage.model.parameters())
        path.mkdir(exist_ok=True)
        console = Console(file=io.StringIO())
        with torch._dynamo.config.patch(error_on_recompile=True):
            loop.run(stage, RunFolder(path), notes.split("train"), seed=4, console=console, **settings)
        return stage

    straight = run(tmp_path / "straight")
    run(tmp_path / "parts", max_steps=2)
    parts = run(tmp_path / "parts", max_steps=4)
    for a, b in zip(straight.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "plain").mkdir()
    console = Console(file=io.StringIO())
    loop.run(plain, RunFolder(tmp_path / "plain"), notes.split("train"), seed=4, console=console)
    for a, b in zip(straight.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)
    assert messages == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_without_a_compiler_auto_goes_on_and_on_does_not(smoke, notes, broken, monkeypatch):
    messages: list[str] = []
    stage = make("var", smoke, notes, "on")
    expected = r"^train.compile=on: torch.compile failed \(.*C\+\+ compiler.*\); install .* train.compile=off$"
    with pytest.raises(ConfigError, match=expected):
        compile_blocks(stage, messages.append)
    assert messages == []
    stage = make("var", smoke, notes, "auto")
    assert not compile_blocks(stage, messages.append)  # on a CPU it does not even try
    assert messages == []
    torch.compiler.reset()
    monkeypatch.setattr("mars.train.compiling.AUTO", ("cpu",))
    assert not compile_blocks(stage, messages.append)
    assert len(messages) == 1
    assert messages[0].startswith("warning: torch.compile failed (")
    assert "C++ compiler" in messages[0]
    assert messages[0].endswith("); training goes on without it")
    assert "\n" not in messages[0]
    assert not compiled(stage)
    loss = stage.step(0, [stage.batch(np.arange(3))], [stream(0)])["loss"]
    assert loss.isfinite()


def test_a_fault_of_the_step_itself_is_not_put_down_to_the_compiler(smoke, notes):
    stage = make("var", smoke, notes, "on")

    def dry_run():
        raise MemoryError("all gone")

    stage.dry_run = dry_run
    with pytest.raises(MemoryError, match="all gone"):
        compile_blocks(stage, lambda line: None)
    assert not compiled(stage)
