"""What classifiers' directories hold and say, and the published networks."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mars.cli.evaluate import main
from mars.data import Dataset
from mars.errors import CheckpointError, ConfigError
from mars.evaluate.embedders import classifier
from mars.evaluate.embedders.classifier import PRESETS
from mars.evaluate.embedders.frontend import PUBLISHED
from mars.evaluate.embedders.networks import build, initialise
from mars.evaluate.sets import NoteSet, Record
from mars.runtime import stream
from tests.tones import QUICK, document, tones, train


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The tiny preset for half-second notes of an octave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", QUICK)
        yield


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tones()


@pytest.fixture(scope="module")
def pitch(dataset, tmp_path_factory):
    """A pitch classifier's directory."""
    return train(dataset, tmp_path_factory.mktemp("made") / "pitch-tiny")


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
    notes = NoteSet("test", names, names, unknown, ({},) * 50, Record(), lambda rows, *_: audio[list(rows)])
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train-classifier", "--task", "timbre"], "'timbre' is not one of"),
        (["train-classifier", "--task", "pitch", "--data", "nowhere"], "nowhere does not exist"),
        (["train-classifier", "--task", "pitch", "--max-time", "soon"], "want a time such as 90s"),
        (["import-sony"], "give --pitch-network FILE, --instrument-network FILE or both"),
    ],
    ids=str,
)
def test_mistakes_at_the_command_line(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 2
    assert message in done.output
