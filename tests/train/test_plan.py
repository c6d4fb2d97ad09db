"""The plan is what the training step then takes; activation checkpointing changes memory and nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mars.cli.train import main
from mars.config import preset
from mars.models.tokenizer import Tokenizer
from mars.runtime import peak_memory, stream
from mars.train import plan
from mars.train.plan import DryRun, Fit, Notes, Planner
from mars.train.start import settings_of
from mars.train.tokenizer import TokenizerStage
from mars.train.var import VARStage

CPU = torch.device("cpu")
ACTIVATIONS = (  # more of them than weights
    *("tokenizer.width=128", "tokenizer.depth=2", "tokenizer.drop_path=0.2", "tokenizer.layer_scale=1e-5"),
    *("tokenizer.scales=1,2,3,4,6,8", "var.width=128", "var.depth=2", "var.drop_path=0.2"),
)
BATCH = 8
STAGES = ["tokenizer", "var"]


def real(config, stage):
    """The stage on ordinary tensors, its weights not those of the start, and noise for one micro-batch."""
    if stage == "tokenizer":
        made = TokenizerStage(config, Notes(config.audio.samples), CPU, 0)
        batch = torch.randn(BATCH, *config.audio.shape).clamp(-1, 1)
    else:
        tokens = torch.randint(config.tokenizer.codebook_size, (BATCH, config.tokenizer.tokens), dtype=torch.int32)
        made = VARStage(config, Notes(config.audio.samples), Tokenizer(config), tokens, CPU, 0)
        batch = made.batch(np.arange(BATCH))
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return made, batch


def streams(n):
    return [stream(0, 1, 0, i) for i in range(n)]


@pytest.mark.parametrize(
    ("stage", "precision", "checkpointing", "adversarial", "optimizer"),
    [  # every pair of two values
        ("tokenizer", "float32", "false", "true", "adamw"),
        ("tokenizer", "float32", "true", "false", "muon"),
        ("tokenizer", "bfloat16", "false", "false", "adamw"),
        ("tokenizer", "bfloat16", "true", "true", "adamw"),
        ("var", "float32", "false", "false", "adamw"),
        ("var", "float32", "true", "false", "muon"),
        ("var", "bfloat16", "false", "false", "adamw"),
        ("var", "bfloat16", "true", "false", "adamw"),
    ],
)
def test_memory_and_flops_are_those_of_the_step(stage, precision, checkpointing, adversarial, optimizer):
    values = {
        "precision": precision,
        "checkpointing": checkpointing,
        "adversarial": adversarial,
        "optimizer": optimizer,
    }
    config = preset("smoke", (*ACTIVATIONS, *(f"train.{k}={v}" for k, v in values.items())), stage)
    planned = DryRun(config, stage, "cpu").step(BATCH, 2)
    trained, batch = real(config, stage)
    last = getattr(config.train, stage).steps - 1

    def step():
        return trained.step(last, [batch, batch], streams(2))

    with FlopCounterMode(display=False) as flops:
        assert torch.isfinite(step()["loss"])  # the first one, which makes the optimiser's moments
    assert planned.flops == flops.get_total_flops()
    measured = peak_memory(step, CPU)
    assert measured > sum(p.nbytes for p in trained.model.parameters())
    assert planned.peak - planned.held == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_checkpointing_changes_no_bit(stage, precision):
    def trained(checkpointing):
        torch.manual_seed(1)
        values = (f"train.checkpointing={checkpointing}", f"train.precision={precision}", "tokenizer.drop_path=0.5")
        config = preset("smoke", (*ACTIVATIONS, *values, "var.drop_path=0.5"), stage)
        made, batch = real(config, stage)
        losses = [made.step(i, [batch, batch], streams(2))["loss"] for i in range(2)]
        return losses, made.model.state_dict()

    (losses, weights), (again, same) = trained("false"), trained("true")
    assert losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_checkpointing_is_for_training_only(monkeypatch):
    config = preset("smoke", ("train.checkpointing=true",), "tokenizer")
    made, batch = real(config, "tokenizer")
    called = []
    monkeypatch.setattr("mars.models.tokenizer.checkpoint", lambda block, *x, **_: called.append(block) or block(*x))
    made.ema(batch)
    assert not called
    made.step(0, [batch], streams(1))
    assert len(called) == 2 * config.tokenizer.depth


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
@pytest.mark.parametrize("stage", STAGES)
def test_checkpointed_blocks_compile(stage):
    torch.compiler.reset()  # what other tests have compiled counts against the limit of recompilations
    config = preset("smoke", ("tokenizer.drop_path=0.5", "var.drop_path=0.5", "train.checkpointing=true"), stage)
    (made, batch), (compiled, _) = real(config, stage), real(config, stage)
    compiled.model.load_state_dict(made.model.state_dict())
    for module in compiled.model.modules():
        if type(module).__name__ == "Block":
            module.compile(backend="aot_eager", fullgraph=True)
    losses = [m.step(0, [batch], streams(1))["loss"] for m in (made, compiled)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_sizes_are_those_of_the_stage(stage):
    config = preset("smoke", ("train.adversarial=true",), "tokenizer")
    sizes = DryRun(config, stage, "cuda").sizes()
    made, batch = real(config, stage)
    made.step(99, [batch], streams(1))
    assert sizes["parameters"] == sum(p.numel() for p in made.model.parameters())
    assert sizes["averaged"] == 4 * sizes["parameters"]
    state = made.state()
    moments = [t for name in ("optimizer", "d_optimizer") if name in state for t in state[name].values()]
    assert sizes["optimizer"] == sum(t.nbytes for t in moments)
    other = made.discriminator if stage == "tokenizer" else made.tokenizer
    others = sum(p.nbytes for p in other.parameters())
    assert sizes["gradients"] == sizes["averaged"] + (others if stage == "tokenizer" else 0)
    buffers = sum(b.nbytes for m in (made.model, other) for b in m.buffers())
    assert sizes["weights"] == sizes["averaged"] + others + buffers


def test_moving_changes_the_layout_alone():
    convolution = nn.Conv2d(2, 3, 4)
    assert plan._moved(convolution, CPU) is convolution
    assert convolution.weight.is_contiguous()
    plan._moved(convolution, memory_format=torch.channels_last)
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert convolution.weight.requires_grad


def test_nothing_is_left_behind_by_a_step():
    dry_run = DryRun(preset("smoke", ("train.optimizer=adamw",), "var"), "var", "cuda")
    held = dry_run.allocations.held
    steps = [dry_run.step(4, 2) for _ in range(3)]
    assert dry_run.allocations.held == held
    assert steps[0] == steps[1] == steps[2]


def test_what_fits_is_the_most_that_fits():
    stage = "tokenizer"
    values = "train.batch_size=6", "train.accumulate=5", "train.optimizer=adamw"
    config = preset("smoke", (*ACTIVATIONS, *values), stage)
    found = Planner(config, stage).plan(plan.RESERVED * 20 // 19 + 120 * 10**6)
    assert found.usable == pytest.approx(114e6, rel=1e-3)
    for fit in found.fits:
        needs = plan._Needs(config.with_train(stage, checkpointing=fit.checkpointing), stage, "cuda", {})
        assert needs(fit.largest) <= found.usable < needs(fit.largest + 1)
        assert 30 % fit.micro_batch == 0
        assert all(30 % n for n in range(fit.micro_batch + 1, min(fit.largest, 30) + 1))
        whole = needs.dry_run.step(6, 5)  # all five, where the plan went on from three
        assert fit.peak == pytest.approx(whole.peak + whole.loading, rel=1e-3)
        assert fit.flops == whole.flops
    assert found.fits[0].largest < found.fits[1].largest
    assert found.fits[0].flops < found.fits[1].flops
    assert found.planned == found.fits[0]
    chosen = found.fits["train.checkpointing=true" in found.recommended].micro_batch
    assert found.recommended[:2] == (f"train.batch_size={chosen}", f"train.accumulate={30 // chosen}")


def fit(checkpointing, micro_batch):
    return Fit(checkpointing=checkpointing, peak=0, flops=0, largest=micro_batch, micro_batch=micro_batch)


@pytest.mark.parametrize(
    ("plain", "checkpointed", "on", "wanted"),
    [
        (4, 16, False, ("train.batch_size=4", "train.accumulate=12")),  # 4 x 680 rows are enough
        (2, 16, False, ("train.batch_size=16", "train.accumulate=3", "train.checkpointing=true")),
        (2, 16, True, ("train.batch_size=16", "train.accumulate=3")),
        (8, 16, True, ("train.batch_size=8", "train.accumulate=6", "train.checkpointing=false")),
        (0, 1, False, ("train.batch_size=1", "train.accumulate=48", "train.checkpointing=true")),
        (1, 1, False, ("train.batch_size=1", "train.accumulate=48")),
        (0, 0, False, ()),
    ],
)
def test_recommended(plain, checkpointed, on, wanted):
    train = dataclasses.replace(preset("smoke").train.var, batch_size=24, accumulate=2, checkpointing=on)
    assert plan._recommended(fit(False, plain), fit(True, checkpointed), 680, train) == wanted


def run(*arguments):
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_plans_and_writes_nothing(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = "train.batch_size=4", "train.accumulate=2", "train.optimizer=adamw"
    options = ("--preset", "smoke", *(part for value in values for part in ("--set", value)), "--plan")
    if stage == "var":
        shown = run(stage, *options, "--memory", "8GB")
        assert shown.exit_code == 0, shown.output
        assert "estimated on fake tensors for a CUDA GPU, bfloat16" in shown.output
        assert "recommended: --set train.batch_size=8 --set train.accumulate=1\n" in shown.output
    else:
        read = json.loads(run(stage, *options, "--json", "--device", "cpu").output)
        assert (read["stage"], read["device"], read["memory"]) == (stage, "cpu", 32 * 10**9)
        assert [f["checkpointing"] for f in read["fits"]] == [False, True]
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_said():
    fits = (fit(False, 0), fit(True, 0))
    sizes = dict.fromkeys(("parameters", "weights", "gradients", "optimizer", "averaged"), 0)
    settings = {"stage": "var", "preset": "x", "device": "cuda", "precision": "bfloat16", "checkpointing": False,
                "grid": ""}  # fmt: skip
    batch = {"batch_size": 2, "accumulate": 3, "memory": 32 * 10**9, "usable": 29 * 10**9}
    fits = dataclasses.replace(fits[0], peak=30 * 10**9), fits[1]
    shown = plan.report(plan.Plan(**sizes, **settings, **batch, fits=fits, recommended=()))
    assert "The settings do not fit: they need 1.00 GB more." in shown
    assert "Not even one note fits" in shown


def test_the_command_plans_for_a_tokenizer_there_is():
    settings = settings_of("var", tokenizer=Path("notes"), overrides=("train.steps=7",))
    assert (settings.preset, settings.train.var.steps) == ("notes", 7)
    wrong = run("var", "--tokenizer", "notes", "--preset", "smoke", "--plan")
    assert wrong.exit_code == 2
    assert "--preset smoke does not fit the tokenizer notes" in wrong.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "1GB"), "--memory goes with --plan"),
        (("--plan", "--device", "mps"), "--plan --device mps: only for cuda"),
        (("--plan", "--threads", "100000"), "threads: want 1 to 256, got 100000"),
        (("--plan", "--memory", "lots"), "'--memory': want a size"),
        (("--plan", "--set", "train.checkpoint=1"), "did you mean train.tokenizer.checkpointing?"),
    ],
)
def test_wrong_options(arguments, message):
    result = run("tokenizer", *arguments)
    assert result.exit_code == 2
    assert message in result.output
