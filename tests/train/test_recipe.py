"""The published recipe: rates, epochs, the adversarial term and its discriminator, and the table that lists it all."""

from __future__ import annotations

import dataclasses
import json
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mars.cli.train import main
from mars.config import Config, TrainConfig, override, preset, to_dict
from mars.models.discriminator import Discriminator
from mars.runtime import stream
from mars.train.optimizer import learning_rate
from mars.train.tokenizer import TokenizerStage, discriminator_schedule
from mars.train.var import VARStage

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "docs" / "paper.md"


@pytest.fixture(autouse=True)
def narrow_discriminator(monkeypatch):
    monkeypatch.setattr("mars.train.tokenizer.Discriminator", partial(Discriminator, width=4))


def tokenizer_stage(smoke, notes, *settings: str) -> TokenizerStage:
    return TokenizerStage(override(smoke, ("train.precision=float32", *settings), "tokenizer"), notes, CPU, seed=0)


def one_step(stage, step: int = 0) -> dict[str, float]:
    metrics = stage.step(step, [stage.batch(np.arange(4))], [stream(0, 1, step)])
    return {name: float(value) for name, value in metrics.items()}


def test_rates_grow_with_the_notes_of_a_step():
    fixed = TrainConfig(lr=3e-5, batch_size=32, accumulate=8)
    assert fixed.peak_lr == 3e-5
    scaled = dataclasses.replace(fixed, lr_batch=128)
    assert scaled.notes_per_step == 256
    assert scaled.peak_lr == pytest.approx(6e-5)
    for step in (0, 1, 10, 500, 999):
        assert learning_rate(scaled, step) == pytest.approx(2 * learning_rate(fixed, step))
        doubled = dataclasses.replace(scaled, accumulate=16)
        assert learning_rate(doubled, step) == pytest.approx(4 * learning_rate(fixed, step))


def test_the_published_rates():
    paper = preset("paper").train
    _, discriminator = discriminator_schedule(paper.tokenizer)
    assert paper.tokenizer.peak_lr == pytest.approx(3e-5 * 256 / 128)
    assert discriminator.peak_lr == pytest.approx(1e-4 * 256 / 128)
    assert paper.var.peak_lr == pytest.approx(8e-5 * 768 / 256)
    # A floor that is a ratio stays below the peak at any batch; ImageFolder's absolute 5e-5 does not.
    single = dataclasses.replace(paper.tokenizer, batch_size=1, accumulate=1)
    assert learning_rate(single, 999) < 0.21 * single.peak_lr < 5e-5


@pytest.mark.parametrize(("epochs", "notes", "steps"), [(400, 289_205, 451_883), (1, 7, 2), (0.5, 8, 1), (3, 8, 6)])
def test_epochs_become_steps(epochs, notes, steps):
    c = TrainConfig(epochs=epochs, batch_size=32 if notes > 100 else 2, accumulate=8 if notes > 100 else 2)
    assert c.resolved(notes).steps == steps
    assert c.resolved(notes).resolved(notes) == c.resolved(notes)
    assert TrainConfig(steps=5).resolved(notes) == TrainConfig(steps=5)


def test_shares_are_shares_of_the_resolved_steps():
    c = TrainConfig(epochs=50, batch_size=4, adversarial_start=0.28, warmup=0.1).resolved(80)
    assert c.steps == 1000
    assert discriminator_schedule(c)[0] == 280
    assert np.argmax([learning_rate(c, s) for s in range(1000)]) == 100


def test_stages_count_the_training_notes(smoke, notes):
    c = override(smoke, ("train.tokenizer.epochs=3", "train.var.epochs=5"))
    tokenizer = TokenizerStage(c, notes, CPU, seed=0)
    assert tokenizer.train.steps == tokenizer.config.train.tokenizer.steps == 3  # 8 of the 11 notes, 8 per step
    assert tokenizer.config.train.var == c.train.var
    tokens = torch.zeros(11, c.tokenizer.tokens, dtype=torch.int32)
    var = VARStage(c, notes, tokenizer.ema, tokens, CPU, seed=0)
    assert var.train.steps == var.config.train.var.steps == 5


def test_steps_that_are_asked_for_replace_the_presets_epochs():
    assert preset("paper", ("train.steps=7",), "tokenizer").train.tokenizer.resolved(1000).steps == 7
    assert preset("paper", ("train.steps=7",), "tokenizer").train.var.epochs == 350
    again = preset("paper", ("train.var.steps=7", "train.var.epochs=2")).train.var
    assert again.resolved(1000).steps == 3


def test_a_run_keeps_the_steps_that_its_epochs_made(tmp_path, monkeypatch):
    from click.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    small = (
        *("tokenizer.width=16", "tokenizer.codebook_size=32", "tokenizer.code_dim=4", "train.batch_size=64"),
        *("train.epochs=0.5", "train.validate_notes=2", "train.tokenizer.validate_every=1000"),
    )
    command = ["tokenizer", "--preset", "smoke", "--out", "run", *(x for s in small for x in ("--set", s))]
    for more in (["--max-steps", "1"], []):
        result = CliRunner().invoke(main, [*command, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["train"]["tokenizer"]
    notes = json.loads((tmp_path / "run" / "run.json").read_text())["train_notes"]
    assert (saved["epochs"], saved["steps"]) == (0.5, -(-notes // 128))
    assert "resuming at step 1 of 2" in result.output


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_loss_is_equation_1(adaptive, smoke, notes):
    stage = tokenizer_stage(
        smoke, notes, "train.adversarial=true", "train.adversarial_start=0", "train.adversarial_ramp=0",
        f"train.adaptive_weight={str(adaptive).lower()}", "train.adversarial_weight=0.5",
    )  # fmt: skip
    found = one_step(stage)
    assert ("adaptive" in found) == adaptive
    weight = 0.5 * found.get("adaptive", 1.0)
    assert found["adversarial"] != 0
    assert found["loss"] == pytest.approx(found["reconstruction"] + found["vq"] + weight * found["adversarial"])


def test_without_the_term_the_loss_is_its_two_others(smoke, notes):
    found = one_step(tokenizer_stage(smoke, notes))
    assert found["loss"] == pytest.approx(found["reconstruction"] + found["vq"])
    assert not {"adversarial", "adaptive", "discriminator"} & found.keys()


def test_the_discriminator_is_not_touched_before_its_start(smoke, notes, monkeypatch):
    """Neither its forward pass nor the two extra gradients, and nothing of the tokenizer's step depends on it."""
    settings = ("train.steps=10", "train.adversarial_start=0.28")
    stage, plain = (tokenizer_stage(smoke, notes, *settings, f"train.adversarial={a}") for a in ("true", "false"))
    weights = [p.clone() for p in stage.discriminator.parameters()]

    def never(*args, **kwargs):
        raise AssertionError("the discriminator was used")

    with monkeypatch.context() as patch:
        patch.setattr(Discriminator, "forward", never)
        patch.setattr("mars.train.tokenizer.adaptive_weight", never)
        for step in range(3):
            assert stage.adversarial_weight(step) == 0
            assert one_step(stage, step) == one_step(plain, step)
        stage.validate()
        with pytest.raises(AssertionError, match="the discriminator was used"):
            one_step(stage, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights, stage.discriminator.parameters(), strict=True))
    assert all(p.grad is None for p in stage.discriminator.parameters())
    for a, b in zip(stage.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_discriminator_warms_up_from_where_it_joins():
    train = TrainConfig(
        steps=1000, lr=1e-3, warmup=0.1, final_lr=0.1, adversarial_start=0.4, discriminator_lr=3e-3,
        discriminator_warmup=0.05, weight_decay=0.0, discriminator_weight_decay=5e-4,
    )  # fmt: skip
    start, own = discriminator_schedule(train)
    assert (start, own.steps, own.weight_decay) == (400, 600, 5e-4)
    rates = [learning_rate(own, s) for s in range(600)]
    assert rates[0] == pytest.approx(3e-3 / 51)
    assert np.argmax(rates) == 50
    assert max(rates) == 3e-3
    assert rates[-1] == pytest.approx(3e-4, rel=1e-3)
    never, own = discriminator_schedule(dataclasses.replace(train, adversarial_start=1.0))
    assert never == 1000
    assert own.warmup <= 1


def test_its_optimiser_has_its_own_rate_and_decay(smoke, notes):
    settings = ("train.steps=10", "train.adversarial=true", "train.adversarial_start=0.25", "train.weight_decay=0.3")
    stage = tokenizer_stage(smoke, notes, *settings, "train.discriminator_lr=1e-3", "train.discriminator_warmup=0.2")
    for step in range(3, 7):
        one_step(stage, step)
        decaying, plain = stage.d_optimizer.optimizers[0].param_groups
        assert (decaying["weight_decay"], plain["weight_decay"]) == (5e-4, 0.0)
        expected = learning_rate(discriminator_schedule(stage.train)[1], step - 3)
        assert decaying["lr"] == plain["lr"] == expected
    assert stage.d_optimizer.state()["0.weight/step"] == 4


def test_the_transformers_weight_decay_does_not_change(smoke, notes):
    c = override(smoke, ("train.weight_decay=0.05", "train.steps=6", "train.optimizer=adamw"), "var")
    tokenizer = tokenizer_stage(smoke, notes).ema
    stage = VARStage(c, notes, tokenizer, torch.zeros(11, c.tokenizer.tokens, dtype=torch.int32), CPU, seed=0)
    for step in range(6):
        one_step(stage, step)
        assert [g["weight_decay"] for g in stage.optimizer.optimizers[0].param_groups] == [0.05, 0.0]


# How a run is watched and cut into pieces, which changes nothing of what is learnt.
OPERATION = {"steps", "patience", "precision", "compile", "workers", "checkpointing", "keep"}
OPERATION |= {"log_every", "validate_every", "validate_notes", "save_every", "sample_every"}


def documented() -> dict[str, str]:
    """Setting and value of every row of the table of training values."""
    text = PAGE.read_text(encoding="utf-8").partition("## Every training value")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    found = {}
    for _, value, whose, names in rows[2:]:
        assert whose
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in found
            found[name] = re.sub(r"(\d),(\d{3})", r"\1\2", value)
    return found


def settings_of(config: Config) -> dict[str, object]:
    groups = to_dict(config)
    train = groups.pop("train")
    groups |= {f"train.{stage}": values for stage, values in train.items()}
    del groups["preset"]
    return {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}


def plain(value: object) -> object:
    """As the table writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        if value and all(isinstance(v, list) and v[0] == v[1] for v in value):
            value = [v[0] for v in value]
        return ", ".join(str(v) for v in value) or "none"
    return value


def test_the_table_says_what_the_preset_has():
    actual = settings_of(preset("paper"))
    for name, text in documented().items():
        value = plain(actual[name])
        if isinstance(value, str):
            assert text == value, name
        else:
            assert float(Fraction(text)) == pytest.approx(value, rel=1e-9), name


def test_the_table_has_every_setting_that_matters():
    actual = settings_of(preset("paper"))
    only_tokenizer = {n for n in actual if n.startswith("train.var.") and ("adversarial" in n or "discriminator" in n)}
    only_tokenizer |= {"train.var.adaptive_weight"}
    expected = {n for n in actual if n.rpartition(".")[2] not in OPERATION} - only_tokenizer
    assert documented().keys() == expected
