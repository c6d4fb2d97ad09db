"""Training classifiers on tones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mars.cli.evaluate import main
from mars.data import Dataset
from mars.errors import ConfigError, DataError, Diverged
from mars.evaluate.embedders import classifier
from mars.evaluate.embedders.classifier import PRESETS
from mars.evaluate.embedders.networks import build, initialise
from mars.train import classifier as trainer
from tests.tones import QUICK, document, relabelled, tones, train


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The tiny preset for half-second notes of an octave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", QUICK)
        yield


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tones()


def test_it_learns_families_and_keeps_the_confusions(dataset, tmp_path):
    made = document(train(dataset, tmp_path / "i", "instrument"))
    assert made["classes"][:2] == ["bass", "brass"]
    assert made["outputs"] == 11
    assert made["validation"]["accuracy"] > 0.9
    table = np.array(made["validation"]["confusion"])
    assert table.sum() == 48
    assert table[:2].sum(1).tolist() == [24, 24]
    assert table.trace() / 48 == pytest.approx(made["validation"]["accuracy"])


def test_the_seed_alone_decides_the_weights(dataset, tmp_path):
    first = document(train(dataset, tmp_path / "a", epochs=1))
    torch.manual_seed(99)
    assert document(train(dataset, tmp_path / "b", epochs=1))["sha256"] == first["sha256"]
    assert document(train(dataset, tmp_path / "c", epochs=1, seed=1))["sha256"] != first["sha256"]


def test_training_leaves_the_global_stream_alone(dataset, tmp_path):
    before = torch.get_rng_state()
    train(dataset, tmp_path / "a", epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_test_split_is_never_looked_at(dataset, tmp_path, monkeypatch):
    seen = set()
    waveforms = Dataset.waveforms
    monkeypatch.setattr(Dataset, "waveforms", lambda self, rows: seen.update(map(int, rows)) or waveforms(self, rows))
    train(dataset, tmp_path / "a", epochs=1)
    assert seen == {*dataset.split("train"), *dataset.split("valid")}


def test_the_weights_are_the_best_epochs(dataset, tmp_path, monkeypatch):
    after = []

    def validate(self):
        after.append({name: t.clone() for name, t in self.network.state_dict().items()})
        return {"accuracy": (0.1, 0.3, 0.3, 0.2, 0.1)[len(after) - 1], "loss": 1.0}

    monkeypatch.setattr(trainer._Fit, "validate", validate)
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(QUICK, patience=2))
    path = train(dataset, tmp_path / "a")
    assert len(after) == 4  # the best is the second; two more do no better
    assert document(path)["validation"]["epoch"] == document(path)["training"]["best_epoch"] == 2
    kept = classifier.load(path, force=True).network.state_dict()
    assert all(torch.equal(kept[name], after[1][name]) for name in kept)
    assert not torch.equal(kept["fc.weight"], after[3]["fc.weight"])


def test_max_time_stops_and_keeps_what_there_is(dataset, tmp_path):
    made = document(train(dataset, tmp_path / "a", max_time=1e-9))
    assert made["training"]["steps"] == 1
    assert made["validation"]["notes"] == 48


def test_the_rate_rises_and_falls_to_zero(dataset):
    network = initialise(build("tiny", 12), 0)
    fit = trainer._Fit(network, QUICK, dataset, trainer.examples(dataset, "pitch", QUICK), 0, epochs=2)
    rates = []
    for _ in range(fit.steps):
        rates.append(fit.optimizer.param_groups[0]["lr"])
        fit.optimizer.step()
        fit.schedule.step()
    assert len(rates) == 12
    assert rates[0] < rates[1] < rates[2]
    assert QUICK.lr > rates[2] > 0.9 * QUICK.lr
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.1 * QUICK.lr


@pytest.mark.parametrize("name", ["sony", "full"])
def test_the_big_presets_make_a_step(dataset, name):
    preset = dataclasses.replace(PRESETS[name], batch_size=2)
    notes = trainer.examples(relabelled(dataset, 2, 0), "pitch", preset)
    network = initialise(build(preset.network, len(notes.classes)), 0)
    before = network.fc.weight.detach().clone()
    fit = trainer._Fit(network, preset, dataset, notes, 0, epochs=1)
    assert fit.step() < 50
    assert (network.fc.weight != before).any(1).all()


def test_masks_silence_spans_of_frames():
    chance = torch.Generator().manual_seed(0)
    pictures = trainer._masked(torch.ones(50, 1, 4, 64), 2, chance)
    assert torch.equal(pictures.amin(2), pictures.amax(2))
    hidden = (pictures[:, 0, 0] == 0).float()
    assert 0.1 < hidden.mean() < 0.3
    assert hidden.sum(1).max() <= 2 * 17
    assert (hidden.diff(dim=1) == 1).sum(1).max() <= 2
    assert torch.equal(trainer._masked(pictures, 0, chance), pictures)


def test_a_loss_that_is_not_finite_stops(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(QUICK, lr=1e38, warmup=0.0))
    with pytest.raises(Diverged, match="is not finite"):
        train(dataset, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (5, 0, "the split valid has no notes with a known pitch"),
        (3, -1, "the split train has no notes with a known pitch"),
        (0, 0, "instrument i0 is in the train and the valid split"),
    ],
    ids=["no valid split", "no pitches", "shared instrument"],
)
def test_notes_that_teach_nothing_are_an_error(dataset, tmp_path, column, values, message):
    with pytest.raises(DataError, match=message):
        train(relabelled(dataset, column, values), tmp_path / "a")


def test_other_mistakes_are_errors(dataset, tmp_path):
    with pytest.raises(ConfigError, match="exists"):
        train(dataset, tmp_path)
    with pytest.raises(DataError, match="at 22050 Hz, classifiers want 16000"):
        train(dataclasses.replace(dataset, sample_rate=22_050), tmp_path / "a")
    with pytest.raises(ConfigError, match="known: sony, full, tiny"):
        trainer.train(dataset, "pitch", "huge", tmp_path / "a")
    with pytest.raises(ConfigError, match="unknown task 'timbre'; known: pitch, instrument"):
        classifier.task_of("timbre")


def test_sony_learns_from_acoustic_notes_of_27_pitches(dataset):
    chosen = relabelled(dataset, 2, [0, 0, 1] * 48)
    found = trainer.examples(chosen, "pitch", PRESETS["sony"])
    assert found.classes == tuple(str(p) for p in range(44, 71))
    assert (chosen.column("source")[found.train] == 0).all()
    assert found.targets[found.train].tolist() == (chosen.column("pitch")[found.train] - 44).tolist()
    families = relabelled(dataset, 2, np.where(dataset.column("family") == 1, 0, 2))
    found = trainer.examples(families, "instrument", PRESETS["sony"])
    assert found.classes == ("brass",)
    assert set(found.targets[found.valid]) == {0}


def test_the_command_trains_on_the_built_in_notes(tmp_path, monkeypatch):
    monkeypatch.setenv(classifier.WEIGHTS_DIR, str(tmp_path))
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(QUICK, pitches=(0, 127), batch_size=64))
    options = ["train-classifier", "--task", "instrument", "--preset", "tiny", "--epochs", "1", "--device", "cpu"]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    assert "epoch 1 " in done.output
    assert "on notes of instruments it has not heard" in done.output.replace("\n", " ")
    assert document(tmp_path / "instrument-tiny")["training"]["epochs"] == 1
    again = CliRunner().invoke(main, options)
    assert again.exit_code == 2
    assert "exists; name a new folder" in again.output
