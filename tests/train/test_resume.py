"""Both stages: stopping and going on gives the same bytes; a step that is not finite changes nothing."""

from __future__ import annotations

import copy
import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from mars import checkpoint, model
from mars.config import override
from mars.errors import CheckpointError, Diverged
from mars.labels import column_ids, entries
from mars.models.discriminator import Discriminator, hinge_loss
from mars.models.tokenizer import Tokenizer
from mars.runs.distributed import ALONE
from mars.runs.folder import RunFolder
from mars.runtime import stream
from mars.train import loop
from mars.train.tokenizer import TokenizerStage, codebook_use
from mars.train.tokens import tokenize
from mars.train.var import VARStage

STEPS = 7
TRAIN = (
    f"train.steps={STEPS}",
    "train.batch_size=3",
    "train.accumulate=2",
    "train.save_every=3",
    "train.validate_every=3",
)
RESTART = ("tokenizer.restart_dead_codes=0.4", "tokenizer.codebook_decay=0.5")
CPU = torch.device("cpu")
STAGES = {
    "tokenizer": (),
    "tokenizer-adversarial": ("train.adversarial=true", "train.adversarial_start=0.4"),
    "tokenizer-literal": ("train.adversarial=true", "train.adversarial_start=0.0", "train.adaptive_weight=false"),
    "tokenizer-ema": ("tokenizer.kmeans_init=4", "tokenizer.ema_codebook=true", *RESTART),
    "tokenizer-restart": ("train.optimizer=muon", "tokenizer.metric=l2", *RESTART),
    "tokenizer-muon": ("train.optimizer=muon", "train.adversarial=true", "train.adversarial_start=0.0"),
    "var": (),
    "var-unconditional": ("var.condition=[]",),
    "var-muon": ("train.optimizer=muon",),
}


@pytest.fixture(autouse=True)
def narrow_discriminator(monkeypatch):
    monkeypatch.setattr("mars.train.tokenizer.Discriminator", partial(Discriminator, width=4))


def make(name: str, smoke, notes, precision: str = "float32", extra: tuple[str, ...] = ()):
    kind = name.split("-")[0]
    c = override(smoke, (*TRAIN, *STAGES[name], f"train.precision={precision}", *extra), kind)
    if kind == "tokenizer":
        return TokenizerStage(c, notes, CPU, seed=4)
    torch.manual_seed(0)
    tokenizer = Tokenizer(c).eval().requires_grad_(False)
    tokens = tokenize(tokenizer, c, notes, ALONE, lambda n: None)
    return VARStage(c, notes, tokenizer, tokens, CPU, seed=4)


def streams(step: int = 0, count: int = 2) -> list[torch.Generator]:
    return [stream(0, 1, step, i) for i in range(count)]


def go(stage, path: Path, notes, **settings) -> int:
    path.mkdir(exist_ok=True)
    console = Console(file=io.StringIO())
    return loop.run(stage, RunFolder(path), notes.split("train"), seed=4, console=console, **settings)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint and of the exported model."""
    newest = RunFolder(path).checkpoints()[0]
    assert newest.name == f"step-{STEPS:08d}"
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for f in (newest, path / "model") for p in f.iterdir()}


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "float32") for name in STAGES), ("tokenizer-adversarial", "bfloat16"), ("var", "bfloat16")],
)
def test_resuming_changes_no_bit(name, precision, smoke, notes, tmp_path):
    def new():
        return make(name, smoke, notes, precision)

    assert go(new(), tmp_path / "straight", notes) == STEPS
    for k in (1, 4):
        torch.manual_seed(k)  # the global stream must not matter
        assert go(new(), tmp_path / "parts", notes, max_steps=k) == k
    assert go(new(), tmp_path / "parts", notes) == STEPS
    a, b = contents(tmp_path / "straight"), contents(tmp_path / "parts")
    assert a.keys() == b.keys()
    assert [file for file in a if a[file] != b[file]] == []
    expected = {"model", "averaged", "optimizer"} | ({"codebook"} if name.startswith("tokenizer") else set())
    if "train.adversarial=true" in STAGES[name]:
        expected |= {"discriminator", "d_optimizer"}
    assert {Path(f).stem for f in a if f.startswith("step") and f.endswith(".safetensors")} == expected


@pytest.mark.parametrize("name", STAGES)
def test_a_step_changes_what_it_should(name, smoke, notes):
    stage = make(name, smoke, notes)
    before = {g: {k: v.clone() for k, v in t.items()} for g, t in stage.state().items()}
    for step in range(4):
        batches = [stage.batch(np.array([0, 1, 2])), stage.batch(np.array([3, 4, 5]))]
        metrics = stage.step(step, batches, streams(step))
        assert all(np.isfinite(float(v)) for v in metrics.values())
    after = stage.state()
    changed = {g: {k for k, v in t.items() if not torch.equal(v, before[g][k])} for g, t in after.items() if before[g]}
    assert changed["model"] == changed["averaged"]
    assert len(changed["model"]) > 0.8 * len(before["model"])  # rows of the condition that did not occur stay, e.g.
    frozen = {"quantizer.codebook"} if name == "tokenizer-ema" else set()
    assert {key.split("/")[0] for key in after["optimizer"]} == before["model"].keys() - frozen
    if "discriminator" in after:
        # Inside the hinge's margins the last bias gets +1/2 and -1/2, which may cancel exactly.
        assert changed["discriminator"] | {"11.bias"} == before["discriminator"].keys()


@pytest.mark.parametrize("name", STAGES)
def test_a_step_that_is_not_finite_changes_nothing(name, smoke, notes):
    stage = make(name, smoke, notes)
    good = [stage.batch(np.array([0, 1, 2])), stage.batch(np.array([3, 4, 5]))]
    stage.step(5, good, streams(0))
    before = {(g, k): v.clone() for g, t in stage.state().items() for k, v in t.items()}

    def corrupt(part):
        if isinstance(part, tuple):
            return part[0], part[1] * float("nan"), part[2]
        return part * float("nan")

    metrics = stage.step(6, [good[0], corrupt(good[1])], streams(1))
    assert np.isnan(float(metrics["loss"]))
    after = {(g, k): v for g, t in stage.state().items() for k, v in t.items()}
    assert after.keys() == before.keys()
    assert [key for key, v in after.items() if not torch.equal(v, before[key])] == []
    clean = make(name, smoke, notes)
    clean.step(5, good, streams(0))
    for s in (stage, clean):  # nothing of the bad gradients is left either
        s.step(6, good, streams(2))
    for a, b in zip(stage.model.parameters(), clean.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["tokenizer-literal", "var"])
def test_a_run_that_never_was_finite_stops_and_can_be_resumed(name, smoke, notes, tmp_path):
    stage = make(name, smoke, notes, extra=("train.steps=20",))
    batch = stage.batch

    def bad(indices):
        part = batch(indices)
        return (part[0], part[1] * float("inf"), part[2]) if isinstance(part, tuple) else part * float("inf")

    stage.batch = bad
    weights = [p.clone() for p in stage.model.parameters()]
    with pytest.raises(Diverged):
        go(stage, tmp_path / "run", notes)
    assert all(torch.equal(a, b) for a, b in zip(weights, stage.model.parameters(), strict=True))
    again = make(name, smoke, notes, extra=("train.steps=20",))
    assert go(again, tmp_path / "run", notes, max_steps=11) == 11
    assert not torch.equal(weights[0], next(again.model.parameters()))


def test_a_checkpoint_of_another_stage_is_refused(smoke, notes, tmp_path):
    for name, other in (
        ("tokenizer-literal", "tokenizer"),
        ("tokenizer", "tokenizer-literal"),
        ("tokenizer-literal", "var"),
    ):
        path = tmp_path / f"{name}-{other}"
        go(make(name, smoke, notes), path, notes, max_steps=1)
        with pytest.raises(CheckpointError, match=r"holds .*(this run needs|it is of another stage)"):
            go(make(other, smoke, notes), path, notes)


def test_the_export_is_the_averaged_model(smoke, notes, tmp_path):
    stage = make("var", smoke, notes)
    go(stage, tmp_path / "run", notes)
    found = model.load(tmp_path / "run")
    for name, value in stage.ema.state_dict().items():
        assert torch.equal(found.var.state_dict()[name], value)
    assert not torch.equal(stage.model.head.weight, stage.ema.head.weight)
    for name, value in stage.tokenizer.state_dict().items():
        assert torch.equal(found.tokenizer.state_dict()[name], value)
    assert sum(entry["count"] for entry in found.notes) == 8


def test_the_adversarial_term_joins_at_its_start_and_ramps(smoke, notes):
    c = override(
        smoke,
        (
            "train.steps=100",
            "train.adversarial=true",
            "train.adversarial_start=0.25",
            "train.adversarial_ramp=0.1",
        ),
        "tokenizer",
    )
    stage = TokenizerStage(c, notes, CPU, seed=0)
    weights = [stage.adversarial_weight(s) for s in range(100)]
    assert weights[:25] == [0] * 25
    assert weights[25:35] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert weights[35:] == [0.5] * 65
    parts = [stage.batch(np.arange(3))]
    early = stage.step(24, parts, streams(count=1))
    assert "adversarial" not in early
    assert not stage.d_optimizer.state()
    late = stage.step(25, parts, streams(count=1))
    assert {"adversarial", "adaptive", "discriminator"} <= late.keys()


@pytest.mark.parametrize(
    ("ramp", "rise"),  # of 100 steps
    [(0.0, []), (0.01, []), (0.015, [1 / 1.5]), (0.03, [1 / 3, 2 / 3]), (1.0, [(i + 1) / 100 for i in range(75)])],
)
def test_the_ramp_of_the_adversarial_weight_is_a_share_of_the_steps(ramp, rise, smoke, notes):
    settings = ("train.steps=100", "train.adversarial=true", "train.adversarial_start=0.25")
    values = (*settings, f"train.adversarial_ramp={ramp}", "train.adversarial_weight=0.8")
    stage = TokenizerStage(override(smoke, values, "tokenizer"), notes, CPU, seed=0)
    expected = [0.0] * 25 + [0.8 * part for part in rise] + [0.8] * (75 - len(rise))
    assert [stage.adversarial_weight(step) for step in range(100)] == pytest.approx(expected, rel=1e-12)


def test_before_its_start_the_discriminator_is_never_called(smoke, notes, monkeypatch):
    stage = make("tokenizer-adversarial", smoke, notes)  # which starts at 0.4 of 7 steps
    calls: list[int] = []
    stage.discriminator.register_forward_pre_hook(lambda *_: calls.append(1))
    for step in range(4):
        calls.clear()
        stage.step(step, [stage.batch(np.arange(3))] * 2, streams(step))
        assert len(calls) == (0 if step < 2.8 else 6)  # per micro-batch for the tokenizer, and for real and fake


def test_the_tokenizers_backward_gives_the_discriminator_no_gradients(smoke, notes, monkeypatch):
    stage = make("tokenizer-adversarial", smoke, notes)
    seen = []
    original = stage._discriminate

    def look(*arguments):
        seen.extend(p.grad for p in stage.discriminator.parameters())
        return original(*arguments)

    monkeypatch.setattr(stage, "_discriminate", look)
    for step in (3, 4):
        stage.step(step, [stage.batch(np.arange(3))] * 2, streams(step))
    assert len(seen) == 2 * len(list(stage.discriminator.parameters()))
    assert all(gradient is None for gradient in seen)


@pytest.mark.parametrize("name", ["tokenizer", "var"])
def test_workers_change_no_bit(name, smoke, notes, tmp_path):
    for workers in (0, 1, 3):
        stage = make(name, smoke, notes, extra=(f"train.workers={workers}",))
        go(stage, tmp_path / str(workers), notes)
    weights = [(contents(tmp_path / str(n))[f"step-{STEPS:08d}/model.safetensors"]) for n in (0, 1, 3)]
    assert weights[0] == weights[1] == weights[2]


def test_the_discriminator_learns_from_its_own_loss_alone(smoke, notes, monkeypatch):
    stage = make("tokenizer-literal", smoke, notes, extra=("train.grad_clip=0",))
    twin, seen = copy.deepcopy(stage.discriminator), []
    original = stage._discriminate
    monkeypatch.setattr(
        stage, "_discriminate", lambda step, pairs, bad: seen.extend(pairs) or original(step, pairs, bad)
    )
    metrics = stage.step(0, [stage.batch(np.arange(3)), stage.batch(np.arange(3, 6))], streams())
    loss = sum(hinge_loss(twin(real), twin(fake)) for real, fake in seen) / 2
    assert float(metrics["discriminator"]) == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    state = stage.d_optimizer.state()
    for name, p in twin.named_parameters():  # after one step the first moment is a tenth of the gradient
        torch.testing.assert_close(state[f"{name}/exp_avg"], p.grad / 10, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["tokenizer", "var"])
def test_accumulated_batches_are_one_large_batch(name, smoke, notes):
    still = ("tokenizer.quantizer_dropout=0", "tokenizer.drop_path=0", "var.drop_path=0", "var.condition_dropout=0")
    one, two = (make(name, smoke, notes, extra=still) for _ in range(2))
    indices = np.arange(6)
    a = one.step(0, [one.batch(indices)], streams(count=1))
    b = two.step(0, [two.batch(indices[:3]), two.batch(indices[3:])], streams())
    for key in ("loss", "grad_norm"):
        assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4)


def test_hidden_conditions(smoke, notes):
    stage = make("var", smoke, notes, extra=("var.condition_dropout=0.3",))
    condition = torch.zeros(4000, 4, dtype=torch.int64)
    hidden = stage._hide(condition, stream(0))
    null = torch.tensor([11, 3, 128, 5])
    assert ((hidden == 0) | (hidden == null)).all()
    gone = hidden == null
    assert gone.all(1).float().mean().item() == pytest.approx(0.3 + 0.7 * 0.3**4, abs=0.03)
    assert gone.float().mean().item() == pytest.approx(0.3 + 0.7 * 0.3, abs=0.03)
    assert not condition.any()


def condition_ids(notes, attributes):
    return column_ids(notes.labels(), attributes, notes.words, {})


def ranges(notes):
    return entries(notes.labels(notes.split("train")), (), notes.words)


def test_conditions_of_notes(notes):
    found = condition_ids(notes, ("velocity", "source", "pitch"))
    assert found[3].tolist() == [3, 3, 43]
    assert found[:, 0].tolist() == [3] * 11
    notes.metadata[:3, 4] = [-1, 30, 120]
    try:
        assert condition_ids(notes, ("velocity",)).flatten().tolist() == [5, 0, 4, *[3] * 8]
    finally:
        notes.metadata[:3, 4] = 100
    assert condition_ids(notes, ()).shape == (11, 0)


def test_ranges_count_the_training_notes(notes):
    found = ranges(notes)
    assert sum(entry["count"] for entry in found) == 8
    assert found[0] == {
        "family": "bass", "source": "acoustic", "count": 1, "pitch": [40, 40], "pitch_range": [40, 40],
        "velocity": [100],
    }  # fmt: skip
    assert found[3]["source"] is None


def test_ranges_say_what_is_known_of_pitches_and_velocities(notes):
    before = notes.metadata.copy()
    notes.metadata[:8, 1:3] = 0  # all of one family and source
    notes.metadata[:8, 3] = [20, *[50] * 6, 90]
    notes.metadata[:8, 4] = [-1, 30, 120, *[100] * 5]
    try:
        (entry,) = ranges(notes)
        assert entry["pitch_range"] == [20, 90]
        assert 20 < entry["pitch"][0] <= entry["pitch"][1] < 90
        assert entry["velocity"] == [25, 100, 127]
        notes.metadata[:8, 3:5] = -1
        (entry,) = ranges(notes)
        assert (entry["pitch"], entry["pitch_range"], entry["velocity"]) == ([-1, -1], [-1, -1], [])
    finally:
        notes.metadata[:] = before


def test_tokens_do_not_depend_on_the_batch(smoke, notes):
    tokenizer = Tokenizer(smoke).eval()
    done: list[int] = []
    four, all_ = (override(smoke, (f"train.batch_size={n}", "train.precision=float32"), "var") for n in (4, 11))
    tokens = tokenize(tokenizer, four, notes, ALONE, done.append)
    assert tokens.shape == (11, smoke.tokenizer.tokens)
    assert tokens.dtype == torch.uint8
    assert done == [4, 4, 3]
    other = tokenize(tokenizer, all_, notes, ALONE, lambda n: None)
    assert (tokens == other).double().mean() > 0.99  # rounding may turn a near-tie


def test_codebook_use_by_hand():
    ids = torch.tensor([[0, 1, 1], [0, 2, 3]])
    assert codebook_use(ids, [0, 1, 3], 5) == ([1, 3], [1.0, 2.8])  # exp of the entropy of (1/2, 1/4, 1/4)


@pytest.mark.parametrize("name", ["tokenizer", "var"])
def test_validation_leaves_training_alone_and_reads_the_average(name, smoke, notes):
    stage = make(name, smoke, notes)
    batches = [stage.batch(np.arange(3))]
    stage.step(0, batches, streams(count=1))
    before = {(g, k): v.clone() for g, t in stage.state().items() for k, v in t.items()}
    first = stage.validate()
    assert all(torch.equal(v, before[g, k]) for g, t in stage.state().items() for k, v in t.items())
    with torch.no_grad():
        for p in stage.model.parameters():
            p.zero_()
    assert stage.validate() == first
    assert all(np.isfinite(v) for v in first.values() if isinstance(v, float))


def test_checkpoints_hold_no_pickle(smoke, notes, tmp_path):
    go(make("tokenizer", smoke, notes), tmp_path / "run", notes, max_steps=1)
    suffixes = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json", ".jsonl"}
    checkpoint.verify(tmp_path / "run" / "model")
