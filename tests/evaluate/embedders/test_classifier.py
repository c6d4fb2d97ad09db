"""Training classifiers on tones, what their directories hold, and the published networks."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from mars.cli.evaluate import main
from mars.data import Dataset
from mars.errors import CheckpointError, ConfigError, DataError, Diverged
from mars.evaluate.embedders import classifier
from mars.evaluate.embedders.classifier import PRESETS
from mars.evaluate.embedders.frontend import PUBLISHED
from mars.evaluate.embedders.networks import build, initialise
from mars.evaluate.sets import NoteSet, Record
from mars.runtime import stream

SAMPLES = 8192
QUICK = dataclasses.replace(
    PRESETS["tiny"],
    front_end=dataclasses.replace(PRESETS["tiny"].front_end, samples=31 * 256),
    pitches=(50, 61),
    epochs=12,
    patience=12,
    batch_size=8,
    masks=1,
)


def tones() -> Dataset:
    """An octave of six instruments, three with even partials (bass) and three with odd ones (brass), two a split."""
    rng = np.random.default_rng(0)
    time = np.arange(SAMPLES) / 16_000
    audio, rows = [], []
    for instrument in range(6):
        for pitch in [*range(50, 62)] * 2:
            hertz, partials = 440 * 2 ** ((pitch - 69) / 12), ((1, 2, 4), (1, 3, 5))[instrument % 2]
            weights = rng.uniform(0.5, 1, 3)
            tone = sum(w * np.sin(2 * np.pi * k * hertz * time) for w, k in zip(weights, partials, strict=True))
            audio.append(5_000 * np.asarray(tone) + rng.normal(0, 20, SAMPLES))
            rows.append([instrument, instrument % 2, instrument % 2, pitch, 100, instrument // 2])
    return Dataset(
        np.stack(audio).astype("<i2"),
        np.array(rows, np.int32),
        [f"n{i}" for i in range(len(rows))],
        [f"i{i}" for i in range(6)],
        16_000,
        "f" * 64,
        {"kind": "test"},
    )


def relabelled(dataset: Dataset, column: int, values: object) -> Dataset:
    """The dataset with another column of labels."""
    metadata = dataset.metadata.copy()
    metadata[:, column] = values
    return dataclasses.replace(dataset, metadata=metadata)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The tiny preset for half-second notes of an octave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", QUICK)
        yield


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tones()


def train(dataset, out, task="pitch", **options):
    return classifier.train(dataset, task, "tiny", out, console=Console(quiet=True), **options)


@pytest.fixture(scope="module")
def pitch(dataset, tmp_path_factory):
    """A pitch classifier's directory."""
    return train(dataset, tmp_path_factory.mktemp("made") / "pitch-tiny")


def document(path):
    return json.loads((path / "classifier.json").read_text())


def test_it_learns_pitch_and_judges_unheard_instruments(dataset, pitch):
    made = classifier.load(pitch)
    test = dataset.split("test")
    found = made.embed(dataset.waveforms(test))
    assert found.frames.shape == (48, 1, made.dim)
    right = [int(made.classes[i]) for i in found.logits.argmax(1)] == dataset.column("pitch")[test]
    assert right.mean() > 0.9
    validation = document(pitch)["validation"]
    assert validation["accuracy"] > 0.9
    assert validation["families"]["bass"]["notes"] + validation["families"]["brass"]["notes"] == 48
    assert {"octave_errors", "semitone_errors"} <= validation.keys()


def test_the_logits_are_the_last_layer_of_the_features(dataset, pitch):
    made = classifier.load(pitch)
    found = made.embed(dataset.waveforms([0, 60, 100]))
    torch.testing.assert_close(made.network.fc(found.frames[:, 0]), found.logits)
    alone = made.embed(dataset.waveforms([60]))
    torch.testing.assert_close(alone.frames[0], found.frames[1], atol=1e-5, rtol=1e-4)


def test_published_logits_are_of_a_network_that_still_trains(dataset, pitch, monkeypatch):
    monkeypatch.setattr(classifier, "BATCH_VINAY2022", 20)
    made = classifier.load(pitch)
    before = {name: t.clone() for name, t in made.network.state_dict().items()}
    audio = dataset.waveforms(range(50))
    names = tuple(map(str, range(50)))
    unknown = np.full(50, -1, np.int32)
    notes = NoteSet("test", names, names, unknown, ({},) * 50, Record(), lambda rows: audio[list(rows)])
    found = classifier.logits_vinay2022(made, notes)
    network = copy.deepcopy(made.network).train()
    with torch.no_grad():
        features = network.features(made.pipeline(audio[20:40]))
    keep = (torch.rand(20, made.dim, generator=stream(2020, 0, 20)) < 0.5).float()
    torch.testing.assert_close(found[20:40], made.network.fc(features * keep / 0.5), atol=1e-4, rtol=1e-4)
    assert 0.4 < keep.mean() < 0.6
    assert not torch.allclose(found, made.embed(audio).logits, atol=0.1)
    assert torch.equal(classifier.logits_vinay2022(made, notes), found)
    assert not torch.equal(classifier.logits_vinay2022(made, notes, key=1), found)
    after = made.network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not made.network.training


def test_it_learns_families_and_keeps_the_confusions(dataset, tmp_path):
    made = document(train(dataset, tmp_path / "i", "instrument"))
    assert made["classes"][:2] == ["bass", "brass"]
    assert made["outputs"] == 11
    assert made["validation"]["accuracy"] > 0.9
    table = np.array(made["validation"]["confusion"])
    assert table.sum() == 48
    assert table[:2].sum(1).tolist() == [24, 24]
    assert table.trace() / 48 == pytest.approx(made["validation"]["accuracy"])


def test_the_directory_says_what_made_it(dataset, pitch):
    made = document(pitch)
    assert made["id"] == "pitch-tiny"
    assert made["classes"] == [str(p) for p in range(50, 62)]
    assert made["data"]["fingerprint"] == dataset.fingerprint
    assert made["data"]["train_notes"] == made["data"]["valid_notes"] == 48
    assert made["training"]["seed"] == 0
    assert made["training"]["epochs"] == 12
    assert made["versions"].keys() == {"mars", "torch", "numpy"}
    weights = (pitch / "network.safetensors").read_bytes()
    assert made["sha256"] == hashlib.sha256(weights).hexdigest() == classifier.load(pitch).sha256


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

    monkeypatch.setattr(classifier._Fit, "validate", validate)
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
    fit = classifier._Fit(network, QUICK, dataset, classifier.examples(dataset, "pitch", QUICK), 0, epochs=2)
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
    notes = classifier.examples(relabelled(dataset, 2, 0), "pitch", preset)
    network = initialise(build(preset.network, len(notes.classes)), 0)
    before = network.fc.weight.detach().clone()
    fit = classifier._Fit(network, preset, dataset, notes, 0, epochs=1)
    assert fit.step() < 50
    assert (network.fc.weight != before).any(1).all()


def test_masks_silence_spans_of_frames():
    chance = torch.Generator().manual_seed(0)
    pictures = classifier._masked(torch.ones(50, 1, 4, 64), 2, chance)
    assert torch.equal(pictures.amin(2), pictures.amax(2))
    hidden = (pictures[:, 0, 0] == 0).float()
    assert 0.1 < hidden.mean() < 0.3
    assert hidden.sum(1).max() <= 2 * 17
    assert (hidden.diff(dim=1) == 1).sum(1).max() <= 2
    assert torch.equal(classifier._masked(pictures, 0, chance), pictures)


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
        classifier.train(dataset, "pitch", "huge", tmp_path / "a")
    with pytest.raises(ConfigError, match="unknown task 'timbre'; known: pitch, instrument"):
        classifier.task_of("timbre")


def test_sony_learns_from_acoustic_notes_of_27_pitches(dataset):
    chosen = relabelled(dataset, 2, [0, 0, 1] * 48)
    found = classifier.examples(chosen, "pitch", PRESETS["sony"])
    assert found.classes == tuple(str(p) for p in range(44, 71))
    assert (chosen.column("source")[found.train] == 0).all()
    assert found.targets[found.train].tolist() == (chosen.column("pitch")[found.train] - 44).tolist()
    families = relabelled(dataset, 2, np.where(dataset.column("family") == 1, 0, 2))
    found = classifier.examples(families, "instrument", PRESETS["sony"])
    assert found.classes == ("brass",)
    assert set(found.targets[found.valid]) == {0}


def test_the_gate_refuses_and_force_takes(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(QUICK, gate={"pitch": 1.01, "instrument": 1.01}))
    path = train(dataset, tmp_path / "a", epochs=1)
    with pytest.raises(CheckpointError, match=r"accuracy 0\.\d+ on held-out notes, want 1.01; .* take it with `force`"):
        classifier.load(path)
    assert classifier.load(path, force=True).id == "pitch-tiny"


def test_the_gate_of_full_pitch_is_nine_tenths():
    assert PRESETS["full"].gate["pitch"] == 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "want mars-classifier version 1, got mars-classifier version 2"),
        ({"network": "resnet"}, "unknown network"),
        ({"front_end": {"hops": 3}}, "unknown setting front_end.hops"),
        ({"classes": ["1", "2"]}, "want 12 different classes, got 2"),
        ({"task": "timbre"}, "task must be one of pitch, instrument; got 'timbre'"),
        ({"outputs": 11, "classes": None}, "tensor fc.bias has shape"),
    ],
    ids=str,
)
def test_documents_that_cannot_be_used_are_errors(pitch, tmp_path, changes, message):
    path = tmp_path / "a"
    tensors = classifier.checkpoint.read_tensors(pitch / "network.safetensors")
    classifier.checkpoint.write_directory(path, {"network": tensors}, {"classifier": document(pitch) | changes})
    with pytest.raises(CheckpointError, match=message):
        classifier.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": 10**9, "classes": None}, "outputs must be 1 to 10,000, got 1000000000"),
        ({"outputs": 9_999, "classes": None}, "has shape .*, the configuration wants"),
        ({"network": "inception"}, "lacks tensor"),
        ({"network": []}, r"network must be a str, got \[\]"),
        ({"id": "../../elsewhere"}, "id must be of letters, digits and hyphens"),
        ({"sha256": None}, "sha256 must be a str, got None"),
        ({"validation": None}, "there is a gate and no validation.accuracy"),
        ({"validation": {"accuracy": "high"}}, "there is a gate and no validation.accuracy"),
        ({"classes": [str(n) for n in range(1000, 1128)]}, "must be MIDI numbers"),
        ({"classes": ["1"] * 128}, "want 128 different classes, got 1"),
        ({"front_end": None}, "front_end is a group of settings"),
        ({"front_end": {"samples": 10**12}}, "n_fft is missing"),
    ],
    ids=str,
)
def test_senseless_but_signed_documents_are_one_line(tmp_path, changes, message):
    original = classifier.locate("pitch", "tiny")
    tensors = classifier.checkpoint.read_tensors(original / "network.safetensors")
    classifier.checkpoint.write_directory(
        tmp_path / "a", {"network": tensors}, {"classifier": document(original) | changes}
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        classifier.load(tmp_path / "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 10**12}, "samples <= 1,048,576"),
        ({"n_fft": 10**12}, "n_fft / 2 < samples"),
        ({"hop": 0}, "hop and mels within n_fft"),
        ({"square": 10**6}, "square at most 4,096"),
        ({"mels": 64}, "its network does not fit"),
    ],
    ids=str,
)
def test_a_front_end_that_would_take_the_machine_is_one_line(tmp_path, change, message):
    original = classifier.locate("pitch", "tiny")
    tensors = classifier.checkpoint.read_tensors(original / "network.safetensors")
    changed = document(original)
    changed["front_end"] |= change
    classifier.checkpoint.write_directory(tmp_path / "a", {"network": tensors}, {"classifier": changed})
    with pytest.raises(CheckpointError, match=message):
        classifier.load(tmp_path / "a")


@pytest.mark.parametrize("kind", ["file", "below a file", "too long"])
def test_a_weights_folder_that_is_none_is_one_line(tmp_path, monkeypatch, kind):
    (tmp_path / "file").write_text("")
    name = {"file": "file", "below a file": "file/below", "too long": "x" * 5000}[kind]
    monkeypatch.setenv(classifier.WEIGHTS_DIR, str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"^MARS_WEIGHTS_DIR: want a folder, got "):
        classifier.folder()
    monkeypatch.setenv(classifier.WEIGHTS_DIR, str(tmp_path / "new"))
    assert classifier.folder() == tmp_path / "new"
    monkeypatch.setenv(classifier.WEIGHTS_DIR, "")
    assert classifier.folder() == Path("classifiers")


def test_a_damaged_classifier_is_an_error(dataset, tmp_path):
    path = train(dataset, tmp_path / "a", epochs=1)
    content = bytearray((path / "network.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "network.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        classifier.load(path, force=True)
    with pytest.raises(CheckpointError, match=r"is not a classifier \(no classifier.json\)"):
        classifier.load(tmp_path)


def test_classifiers_are_found_by_name(pitch, monkeypatch, tmp_path):
    monkeypatch.delenv(classifier.WEIGHTS_DIR, raising=False)
    assert classifier.locate("pitch", "tiny", pitch) == pitch
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"pitch-full is not .*`mars-eval train-classifier` makes one of task pi"):
        classifier.locate("pitch", "full")
    monkeypatch.setenv(classifier.WEIGHTS_DIR, str(pitch.parent))
    assert classifier.locate("pitch", "tiny") == pitch
    with pytest.raises(CheckpointError, match=r"pitch-sony is not a classifier .* `mars-eval import-sony` makes one"):
        classifier.locate("pitch", "sony")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Stand-ins for the two published files, under misleading names; one in PyTorch's old format."""
    folder = tmp_path_factory.mktemp("published")
    states = {"pitch": initialise(build("inception", 27), 1), "instrument": initialise(build("inception", 10), 2)}
    torch.save(states["pitch"].state_dict(), folder / "instrument.pt", _use_new_zipfile_serialization=False)
    torch.save(states["instrument"].state_dict(), folder / "pitch.pt")
    return folder, {task: network.state_dict() for task, network in states.items()}


def test_published_files_are_recognised_whatever_their_names(published, tmp_path, monkeypatch):
    folder, states = published
    blobs = {
        classifier.git_blob(folder / "instrument.pt"): "pitch",
        classifier.git_blob(folder / "pitch.pt"): "instrument",
    }
    monkeypatch.setattr(classifier, "PUBLISHED_BLOBS", blobs)
    options = ["--pitch", str(folder / "pitch.pt"), "--instrument", str(folder / "instrument.pt")]
    done = CliRunner().invoke(main, ["import-sony", *options, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert f"{tmp_path / 'pitch-sony'} from {folder / 'instrument.pt'}" in done.output.replace("\n", "")
    for task, state in states.items():
        made = classifier.load(tmp_path / f"{task}-sony")
        assert (made.id, made.task, made.classes) == (f"{task}-sony", task, None)
        assert made.pipeline == PUBLISHED
        assert document(tmp_path / f"{task}-sony")["imported"]["published"]
        assert all(torch.equal(made.network.state_dict()[name], state[name]) for name in state)
    again = CliRunner().invoke(main, ["import-sony", *options, "--out", str(tmp_path)])
    assert again.exit_code == 2
    assert "exists" in again.output


def test_unknown_files_are_refused_unless_forced(published, tmp_path):
    folder, _ = published
    files = {"instrument": folder / "instrument.pt"}
    with pytest.raises(
        CheckpointError, match=r"is not one of the published networks .* 27 classes suggest, use `force`"
    ):
        classifier.import_sony(files, tmp_path)
    assert classifier.import_sony(files, tmp_path, force=True) == {folder / "instrument.pt": tmp_path / "pitch-sony"}
    assert not document(tmp_path / "pitch-sony")["imported"]["published"]
    twice = {"pitch": folder / "instrument.pt", "instrument": folder / "copy.pt"}
    (folder / "copy.pt").symlink_to(folder / "instrument.pt")
    with pytest.raises(CheckpointError, match="are both pitch networks"):
        classifier.import_sony(twice, tmp_path / "b", force=True)


class Code:
    """What a pickle can do to its reader."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Code(), "cannot be read as PyTorch weights"),
        ({"a": 3}, "holds something else than tensors by name"),
        (torch.zeros(3), "holds something else than tensors by name"),
        ({"a": torch.zeros(3)}, "has no layer fc"),
        ({"fc.weight": torch.zeros(27, 2048)}, "lacks tensor Conv2d_1a_3x3.bn.bias"),
    ],
    ids=["code", "no tensors", "no names", "no fc", "too few"],
)
def test_files_of_something_else_are_refused(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "weights.pt")
    with pytest.raises(CheckpointError, match=message):
        classifier.import_sony({"pitch": tmp_path / "weights.pt"}, tmp_path / "out", force=True)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def test_git_blob_is_gits(tmp_path):
    (tmp_path / "empty").touch()
    assert classifier.git_blob(tmp_path / "empty") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    (tmp_path / "hello").write_bytes(b"hello\n")
    assert classifier.git_blob(tmp_path / "hello") == "ce013625030ba8dba906f756967f9e9ca394464a"
    with pytest.raises(CheckpointError, match="none does not exist"):
        classifier.git_blob(tmp_path / "none")


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train-classifier", "--task", "timbre"], "'timbre' is not one of"),
        (["train-classifier", "--task", "pitch", "--data", "nowhere"], "nowhere does not exist"),
        (["train-classifier", "--task", "pitch", "--max-time", "soon"], "want a time such as 90s"),
        (["import-sony"], "give --pitch FILE, --instrument FILE or both"),
    ],
    ids=str,
)
def test_mistakes_at_the_command_line(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 2
    assert message in done.output
