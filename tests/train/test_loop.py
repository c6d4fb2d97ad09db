"""The loop: which notes, which rate, what is updated, logged, saved, and when it stops."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import signal
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from mars import checkpoint, runtime
from mars.config import TrainConfig, VARConfig
from mars.errors import CheckpointError, Diverged
from mars.labels import CLOSED
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR
from mars.runs.folder import RunFolder
from mars.runtime import stream
from mars.train import loop
from mars.train.loop import batch_indices
from mars.train.optimizer import Float32Muon, Optimizer, learning_rate


@pytest.mark.parametrize(("notes", "batch"), [(10, 3), (7, 7), (5, 12), (1, 4), (64, 16), (13, 1)])
def test_every_note_comes_once_per_epoch(notes, batch):
    names = np.arange(100, 100 + notes)
    epochs = 6
    drawn = np.concatenate([batch_indices(3, s, batch, names) for s in range(-(-epochs * notes // batch))])
    orders = [drawn[i * notes : (i + 1) * notes] for i in range(epochs)]
    for order in orders:
        assert sorted(order) == list(names)
    if notes > 4:
        assert len({tuple(o) for o in orders}) == epochs
    assert all(len(batch_indices(3, s, batch, names)) == batch for s in range(20))


def test_an_epochs_order_is_drawn_once(monkeypatch):
    drawn = []
    original = torch.randperm
    monkeypatch.setattr("torch.randperm", lambda n, **kwargs: drawn.append(n) or original(n, **kwargs))
    loop._order.cache_clear()
    for step in range(12):  # 36 of 20 notes an epoch: two epochs, the step between them in both
        batch_indices(3, step, 3, np.arange(20))
    assert drawn == [20, 20]


def test_notes_depend_on_seed_and_step_alone():
    notes = np.arange(50)
    a = [batch_indices(1, s, 8, notes) for s in range(20)]
    torch.manual_seed(99)
    b = [batch_indices(1, s, 8, notes) for s in reversed(range(20))][::-1]
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not np.array_equal(a[0], batch_indices(2, 0, 8, notes))


def test_streams_are_functions_of_their_key():
    keys = [(0, 2), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 1, 0), (1, 0, 1), (2**40, 1, 5), (0, 1, 2**33)]
    draws = [tuple(torch.rand(3, generator=stream(*k)).tolist()) for k in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(torch.rand(3, generator=stream(*k)).tolist()) for k in keys]
    before = torch.random.get_rng_state()
    stream(1, 2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_warm_up_then_cosine():
    c = TrainConfig(steps=1000, lr=2.0, warmup=0.1, final_lr=0.2)
    rates = [learning_rate(c, s) for s in range(1000)]
    assert 0 < rates[0] < 0.05
    assert rates[100] == max(rates) == 2.0
    assert np.allclose(np.diff(rates[:101]), 2 / 101)
    assert (np.diff(rates[100:]) < 0).all()
    assert rates[550] == pytest.approx(2 * (0.2 + 0.8 / 2))
    assert rates[325] == pytest.approx(2 * (0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2))
    assert rates[-1] == pytest.approx(0.4, rel=1e-4)
    assert learning_rate(c, 1000) == learning_rate(c, 5000) == pytest.approx(0.4)


def test_warm_up_then_lin0():
    c = TrainConfig(steps=1000, lr=1.0, warmup=0.0, final_lr=0.1, schedule="lin0")
    rates = np.array([learning_rate(c, s) for s in range(1001)])
    assert (rates[:51] == 1).all()
    assert np.allclose(np.diff(rates[50:]), -0.9 / 950)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "lin0"])
@pytest.mark.parametrize("settings", [{"warmup": 0.0}, {"warmup": 1.0}, {"steps": 1}, {"steps": 2, "warmup": 0.02}])
def test_the_rate_stays_between_zero_and_its_peak(schedule, settings):
    c = TrainConfig(**{"steps": 30, "lr": 0.5, "final_lr": 0.0, "schedule": schedule} | settings)
    assert all(0 < learning_rate(c, s) <= 0.5 for s in range(c.steps))


def test_updates_are_adamw_with_clipping_and_an_average():
    c = TrainConfig(steps=20, lr=0.05, warmup=0.2, weight_decay=0.1, grad_clip=0.3, ema=0.6)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    ema = nn.Linear(3, 2).requires_grad_(False)
    ema.load_state_dict(ours.state_dict())
    mean = [p.detach().clone() for p in ours.parameters()]
    optimizer = Optimizer(ours, c, ema)
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=c.betas, fused=False, foreach=False)
    for step in range(8):
        x = torch.randn(4, 3) * 5
        for module in (ours, theirs):
            (module(x) - 1).square().mean().backward()
        norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()
        for p in theirs.parameters():
            p.grad.mul_(min(1, 0.3 / norm))
        for group in adam.param_groups:
            group["lr"] = learning_rate(c, step)
        adam.step()
        adam.zero_grad()
        assert optimizer.clip().item() == pytest.approx(norm.item(), rel=1e-4)
        assert optimizer.update(step) == learning_rate(c, step)
        decay = min(0.6, (1 + step) / (10 + step))
        for m, p, a in zip(mean, theirs.parameters(), ema.parameters(), strict=True):
            m.mul_(decay).add_(p.detach(), alpha=1 - decay)
            torch.testing.assert_close(a.data, m, rtol=1e-4, atol=1e-5)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            assert a.grad is None


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_bad_update_changes_nothing_and_a_good_one_does_not_notice_it(kind):
    def new() -> tuple[nn.Module, nn.Module, Optimizer]:
        torch.manual_seed(0)
        module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 3)]), "head": nn.Linear(3, 2)})
        ema = copy.deepcopy(module).requires_grad_(False)
        return module, ema, Optimizer(module, TrainConfig(optimizer=kind, lr=0.1, warmup=0.0, steps=9), ema)

    def update(parts: tuple[nn.Module, nn.Module, Optimizer], step: int, bad: float | None) -> None:
        module, _, optimizer = parts
        for p in module.parameters():
            p.grad = torch.full_like(p, math.nan) if bad else torch.full_like(p, step + 1.0)
        optimizer.update(step, bad=None if bad is None else torch.tensor(bad))
        assert all(p.grad is None for p in module.parameters())

    one, other = new(), new()
    update(one, 0, 1.0)  # before there are any moments
    for step in (0, 1):
        update(one, step, 0.0)
        update(other, step, None)
    before = [p.clone() for p in (*one[0].parameters(), *one[1].parameters())]
    update(one, 2, 1.0)
    for p, old in zip((*one[0].parameters(), *one[1].parameters()), before, strict=True):
        assert torch.equal(p, old)
    update(one, 2, 0.0)
    update(other, 2, None)
    for ours, theirs in zip(one[:2], other[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(torch.equal(v, other[2].state()[k]) for k, v in one[2].state().items())


def test_without_a_limit_gradients_are_not_clipped():
    module = nn.Linear(2, 1)
    optimizer = Optimizer(module, TrainConfig(grad_clip=0.0))
    (module(torch.ones(1, 2)) * 1e6).sum().backward()
    assert optimizer.clip() > 1e6
    assert module.weight.grad.max() == 1e6


def decayed(module: nn.Module) -> set[str]:
    optimizer = Optimizer(module, TrainConfig(weight_decay=0.05))
    (adamw,) = optimizer.optimizers
    decaying, plain = adamw.param_groups
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {id(p): n for n, p in module.named_parameters()}
    assert len(decaying["params"]) + len(plain["params"]) == len(names)
    return {names[id(p)] for p in decaying["params"]}


@pytest.mark.parametrize("shared", [False, True])
def test_weights_of_layers_decay_and_nothing_else(shared, smoke):
    config = VARConfig(depth=1, width=8, heads=2, shared_adaln=shared, condition=CLOSED)
    with torch.device("meta"):
        model = VAR(config, smoke.tokenizer)
    block = {f"blocks.0.{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")}
    ada = {"shared_ada.1.weight" if shared else "blocks.0.ada.1.weight", "head_ada.1.weight"}
    tables = {f"condition.{name}.weight" for name in CLOSED}
    assert decayed(model) == block | ada | tables | {"embed.weight", "head.weight"}
    with torch.device("meta"):
        names = decayed(Tokenizer(smoke))
    assert {"embed.weight", "head.weight", "to_code.weight", "from_code.weight", "quantizer.phi_weight"} < names
    for name in ("queries", "mask", "quantizer.codebook", "encoder.position", "encoder.level", "encoder.norm.weight"):
        assert name not in names


def test_optimiser_state_that_does_not_fit_is_named():
    module = nn.Linear(2, 1)
    optimizer = Optimizer(module, TrainConfig())
    optimizer.load_state({}, "f")  # saved before the first update
    assert not optimizer.state()
    module(torch.ones(1, 2)).sum().backward()
    optimizer.update(0)
    state = optimizer.state()
    for name in state:
        with pytest.raises(CheckpointError, match=f"f: optimiser state of {name.split('/')[0]} is missing"):
            Optimizer(nn.Linear(2, 1), TrainConfig()).load_state({k: v for k, v in state.items() if k != name}, "f")
    with pytest.raises(CheckpointError, match="optimiser state of weight is missing or has another shape"):
        Optimizer(nn.Linear(3, 1), TrainConfig()).load_state(state, "f")


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_in_float32_makes_the_steps_of_that_in_bfloat16(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    kinds = torch.optim.Muon, Float32Muon
    parameters = [nn.Parameter(start.clone()) for _ in kinds]
    both = [
        kind([p], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for kind, p in zip(kinds, parameters, strict=True)
    ]
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        for p, optimizer in zip(parameters, both, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    moved, wanted = parameters[1] - start, parameters[0] - start
    assert (moved - wanted).norm() < 0.03 * wanted.norm()
    assert not torch.equal(moved, wanted)  # bfloat16 has eight bits
    momenta = [o.state[p]["momentum_buffer"] for p, o in zip(parameters, both, strict=True)]
    torch.testing.assert_close(*momenta)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(smoke):
    model = VAR(VARConfig(depth=2, width=8, heads=2), smoke.tokenizer)
    c = TrainConfig(optimizer="muon", lr=0.05, warmup=0.0, weight_decay=0.0, grad_clip=0.0)
    optimizer = Optimizer(model, c)
    adamw, muon = ([p for g in o.param_groups for p in g["params"]] for o in optimizer.optimizers)
    assert len({id(p) for p in (*adamw, *muon)}) == len(adamw) + len(muon) == len(list(model.parameters()))
    names = {id(p): n for n, p in model.named_parameters()}
    parts = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "ada.1")
    assert {names[id(p)] for p in muon} == {f"blocks.{i}.{part}.weight" for i in range(2) for part in parts}
    before = [p.detach().clone() for p in muon]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    assert optimizer.update(0) == 0.05
    for p, old in zip(muon, before, strict=True):
        step = (p.detach() - old) / 0.05
        values = torch.linalg.svdvals(step)
        assert values.max() / values.median() < 2  # orthogonalised, up to five Newton-Schulz rounds
        assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)  # AdamW's usual size
        assert p.grad is None
    assert {key.split("/")[1] for key in optimizer.state()} == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    other = Optimizer(model, c)
    other.load_state(optimizer.state(), "f")
    assert other.state().keys() == optimizer.state().keys()
    assert all(torch.equal(v, other.state()[k]) for k, v in optimizer.state().items())
    missing = {k: v for k, v in optimizer.state().items() if k != "blocks.1.mlp.0.weight/momentum_buffer"}
    with pytest.raises(CheckpointError, match=r"optimiser state of blocks\.1\.mlp\.0\.weight is missing"):
        Optimizer(model, c).load_state(missing, "f")


class Counter:
    """A stage that does nothing but write down what it is asked for."""

    def __init__(self, **settings) -> None:
        defaults = {"steps": 10, "batch_size": 2, "log_every": 1, "validate_every": 100, "save_every": 4}
        self.train = TrainConfig(**defaults | settings)
        self.seen: list[tuple[int, list[list[int]], list[float]]] = []
        self.weight = torch.zeros(())
        self.exports = 0
        self.act: Callable[[int], float | None] = lambda step: None

    def batch(self, indices):
        return indices.tolist()

    def step(self, step, batches, streams):
        self.seen.append((step, batches, [torch.rand(1, generator=s).item() for s in streams]))
        self.weight += step
        loss = self.act(step)
        return {"loss": torch.tensor(1.0 if loss is None else loss)}

    def report(self, say):
        return {"gathered": [len(self.seen)]}

    def validate(self):
        return {"val_loss": 0.5, "per_scale": [1, 2]}

    def state(self):
        return {"model": {"weight": self.weight.clone()}}

    def load_state(self, state, source):
        self.weight = state["model"]["weight"].clone()

    def snapshot(self):
        return self

    def save(self, path):
        self.exports += 1


NOTES = np.arange(7)


@pytest.fixture
def output():
    return io.StringIO()


@pytest.fixture
def go(tmp_path, output):
    (tmp_path / "run").mkdir()

    def go(stage, **settings):
        console = Console(file=output, width=200, soft_wrap=True)
        return loop.run(stage, RunFolder(tmp_path / "run"), NOTES, seed=1, console=console, **settings)

    go.path = tmp_path / "run"
    return go


def steps_saved(path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (path / "checkpoints").iterdir())


def lines(path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_steps_get_their_batches_and_streams(go):
    stage = Counter(accumulate=3)
    assert go(stage) == 10
    assert [step for step, *_ in stage.seen] == list(range(10))
    for step, batches, draws in stage.seen:
        assert [n for part in batches for n in part] == batch_indices(1, step, 6, NOTES).tolist()
        assert [len(part) for part in batches] == [2, 2, 2]
        assert draws == [torch.rand(1, generator=stream(1, 1, step, i)).item() for i in range(3)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_same_however_many_workers_make_them(workers, go):
    made: list[str] = []
    stage = Counter(workers=workers)
    original = stage.batch
    stage.batch = lambda indices: made.append(threading.current_thread().name) or original(indices)
    waited = []
    stage.act = lambda step: waited.append(len(made))  # batches made when a step runs
    go(stage)
    for step, batches, _ in stage.seen:
        assert [n for part in batches for n in part] == batch_indices(1, step, 2, NOTES).tolist()
    assert len(made) == 10
    assert threading.current_thread().name not in made
    assert all(count <= step + 1 + workers for step, count in enumerate(waited))
    if workers == 0:
        assert waited == list(range(1, 11))


def test_saves_validates_and_logs_in_time(go):
    stage = Counter(steps=11, log_every=4, validate_every=5, save_every=2)
    go(stage)
    assert steps_saved(go.path) == [5, 8, 10, 11]  # the newest three, and the best
    assert stage.exports == 8
    found = lines(go.path)
    assert [r["step"] for r in found if "loss" in r] == [4, 8, 11]
    assert [r["gathered"] for r in found if "loss" in r] == [[4], [8], [11]]
    assert [r["step"] for r in found if "val_loss" in r] == [5, 10, 11]
    assert all(r["notes_per_s"] > 0 for r in found if "loss" in r)


def test_stops_and_goes_on_where_it_was(go, output):
    whole, parts = Counter(), Counter()
    assert go(parts, max_steps=3) == 3
    assert steps_saved(go.path) == [3]
    again = Counter()
    assert go(again, max_time=1e-9) == 3  # no time for a step
    assert again.seen == []
    again = Counter()
    assert go(again) == 10
    assert "resuming at step 3 of 10" in output.getvalue()
    other = go.path.parent / "other"
    other.mkdir()
    loop.run(whole, RunFolder(other), NOTES, seed=1, console=Console(file=io.StringIO()))
    assert parts.seen + again.seen == whole.seen
    assert torch.equal(again.weight, whole.weight)
    assert go(Counter()) == 10  # nothing left to do


def test_time_limit_saves(go, wait):
    stage = Counter(save_every=100)
    stage.act = lambda step: wait(1)
    assert go(stage, max_time=4.5) == 4
    assert steps_saved(go.path) == [4]
    assert stage.exports == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(number, go, output):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    stage = Counter(save_every=100)
    stage.act = lambda step: os.kill(os.getpid(), number) if step == 5 else None
    assert go(stage) == 6
    assert len(stage.seen) == 6
    assert steps_saved(go.path) == [6]
    assert stage.exports == 1
    assert "stopped at step 6 of 10; saved in" in output.getvalue()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    again = Counter(save_every=100)
    assert go(again) == 10
    assert again.seen[0][0] == 6


def test_a_second_interrupt_stops_at_once(go):
    stage = Counter()
    stage.act = lambda step: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            go(stage)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(stage.seen) == 1


def test_ten_bad_steps_in_a_row_are_too_many(go):
    stage = Counter(steps=60, save_every=5)
    stage.act = lambda step: float("nan") if step in (3, 4) or step >= 33 else None
    with pytest.raises(Diverged, match=r"10 steps in a row were not finite, the last at step 43; lower train.lr"):
        go(stage)
    assert len(stage.seen) == 43
    assert steps_saved(go.path) == [30, 35, 40]


def test_nine_bad_steps_in_a_row_are_not(go):
    stage = Counter(steps=40)
    stage.act = lambda step: float("inf") if step % 10 else None
    assert go(stage) == 40


DAMAGE = {
    "truncated": lambda p: (p / "model.safetensors").write_bytes(b"half"),
    "missing file": lambda p: (p / "model.safetensors").unlink(),
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "extra tensors": lambda p: (p / "x.safetensors").write_bytes((p / "model.safetensors").read_bytes()),
    "empty": lambda p: [f.unlink() for f in p.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_later_replaced(damage, go, output):
    go(Counter(), max_steps=8)
    assert steps_saved(go.path) == [4, 8]
    damage(go.path / "checkpoints" / "step-00000008")
    again = Counter()
    assert go(again, max_steps=8) == 8
    assert "warning: " in output.getvalue()
    assert "trying the checkpoint before it" in output.getvalue()
    assert [s for s, *_ in again.seen] == [4, 5, 6, 7]
    checkpoint.verify(go.path / "checkpoints" / "step-00000008")
    last = Counter()
    assert go(last) == 10
    assert [s for s, *_ in last.seen] == [8, 9]
    assert last.weight == sum(range(10))


def test_with_only_damaged_checkpoints_it_refuses_to_start_over(go):
    go(Counter(), max_steps=8)
    for path in (go.path / "checkpoints").iterdir():
        DAMAGE["truncated"](path)
    stage = Counter()
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .*model\.safetensors does not match"):
        go(stage)
    assert stage.seen == []


def test_leftovers_of_a_killed_save_are_ignored(go):
    go(Counter(), max_steps=4)
    folder = go.path / "checkpoints"
    for name in (".tmp-step-00000009-123", ".new-step-00000009", ".del-step-00000001", "step-x"):
        (folder / name).mkdir()
    assert [p.name for p in RunFolder(go.path).checkpoints()] == ["step-00000004"]
    assert go(Counter()) == 10


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    runtime.free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OSError, match=r"MB free; this run needs about 1000000000000 MB"):
        runtime.free_space(tmp_path / "not" / "yet", 10**18)


def test_autocast_is_what_was_asked_for():
    cpu = torch.device("cpu")
    for precision, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with runtime.autocast(cpu, precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    with runtime.autocast(cpu, "auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype in (torch.float32, torch.bfloat16)
