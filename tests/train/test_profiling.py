"""A profile names where the time goes and leaves no run behind."""

from __future__ import annotations

import io
import json
from functools import partial

import pytest
import torch
from rich.console import Console

from mars.config import override
from mars.models.discriminator import Discriminator
from mars.models.tokenizer import Tokenizer
from mars.runs.distributed import ALONE
from mars.train.profiling import profile_steps
from mars.train.spans import span, timed
from mars.train.tokenizer import TokenizerStage
from mars.train.tokens import tokenize
from mars.train.var import VARStage

CPU = torch.device("cpu")
PARTS = {"data", "forward", "loss", "backward", "optimizer", "average", "other"}


@pytest.mark.parametrize("kind", ["tokenizer", "var"])
def test_the_parts_of_a_step(kind, smoke, notes, tmp_path, monkeypatch):
    monkeypatch.setattr("mars.train.tokenizer.Discriminator", partial(Discriminator, width=4))
    c = override(smoke, ["train.batch_size=2", *(["train.adversarial=true"] if kind == "tokenizer" else [])], kind)
    if kind == "tokenizer":
        stage = TokenizerStage(c, notes, CPU, 0)
    else:
        tokenizer = Tokenizer(c).eval().requires_grad_(False)
        stage = VARStage(c, notes, tokenizer, tokenize(tokenizer, c, notes, ALONE, lambda n: None), CPU, 0)
    shown = io.StringIO()
    console = Console(file=shown, width=120)
    out = tmp_path / "trace.json"
    profile_steps(stage, notes.split("train"), seed=0, device=CPU, out=out, console=console)
    expected = PARTS | ({"quantizer", "codebook", "discriminator"} if kind == "tokenizer" else set())
    rows = [line.split("│")[1:-1] for line in shown.getvalue().splitlines() if line.startswith("│")]
    shares = {row[0].strip(): float(row[2].strip(" %")) for row in rows if "%" in row[2]}
    assert shares.keys() == expected
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    assert len(rows) - len(shares) == 10
    assert "MiB" in shown.getvalue()
    names = {event.get("name") for event in json.loads(out.read_text())["traceEvents"]}
    assert {f"mars: {name}" for name in expected - {"other"}} <= names
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stage.model.modules())


def test_a_trace_that_cannot_be_written_is_no_trace(smoke, notes, tmp_path):
    stage = TokenizerStage(smoke, notes, CPU, 0)
    with pytest.raises(FileNotFoundError):
        profile_steps(stage, notes.split("train"), seed=0, device=CPU, out=tmp_path / "no/x.json", console=Console())


def test_a_part_counts_without_those_inside_it(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr("mars.train.spans.time.perf_counter", lambda: next(now))
    with timed(CPU, {}) as seconds, span("outer"), span("inner"):
        pass
    assert seconds == {"other": 1, "outer": 2 + 4, "inner": 3}
    with span("outside"):  # which would ask for a sixth time
        pass
