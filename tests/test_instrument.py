"""A label with words of its own, from the notes to the model's notes and back: instruments."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mars import model
from mars.cli import data, generate, train
from mars.data.packed import Writer
from mars.evaluate.produce import generate_like
from mars.evaluate.sets import open_notes
from mars.labels import Labels

INSTRUMENTS = ("Horn in F", "flûte", "Rhodes (soft)")
SETTINGS = (
    *("audio.n_fft=128", "audio.hop=64", "audio.bins=64", "audio.frames=32", "audio.samples=1900", "audio.cmx=2,1"),
    *("tokenizer.patch=16,16", "tokenizer.width=8", "tokenizer.scales=[1,2]", "tokenizer.codebook_size=8"),
)
STEPS = ("train.steps=2", "train.batch_size=2", "train.validate_notes=2", "train.sample_every=2", "train.workers=0")


def call(main, *words, exit_code=0):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == exit_code, done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


def sets(settings):
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Notes of three instruments, and a model `var` that was trained on them with instruments as a condition."""
    out = tmp_path_factory.mktemp("instruments")
    rng = np.random.default_rng(0)
    with Writer(out / "notes", sample_rate=16_000, samples=1900, origin={"kind": "test"}) as writer:
        for i in range(12):
            audio = np.sin(np.arange(1900) * 0.02 * (i + 1)) * 0.5 + rng.normal(0, 0.01, 1900)
            instrument = INSTRUMENTS[i % 3]
            split = int(i == 11)
            writer.add(f"note {i}", audio.astype(np.float32), Labels(instrument, i % 3, 0, 40 + i, 100), split)
        writer.add("held out", audio.astype(np.float32), Labels("held out", 0, 0, 60, 100), 1)
        writer.commit()
    device = ("--device", "cpu")
    preset = ("--preset", "smoke", *sets((*SETTINGS, *STEPS)))
    call(train.main, "tokenizer", *preset, "--data", out / "notes", "--out", out / "tok", *device)
    settings = sets((*STEPS, "var.condition=family,pitch,instrument"))
    call(
        train.main, "var", "--tokenizer", out / "tok", "--data", out / "notes", "--out", out / "var", *settings, *device
    )
    return out


def notes(folder: Path) -> list[dict]:
    return json.loads((folder / "notes.json").read_text())["notes"]


def test_the_model_knows_the_instruments_that_it_was_trained_on(made):
    found = model.load(made / "var")
    assert found.words == {"instrument": sorted(INSTRUMENTS)}
    assert found.transformer.condition["instrument"].weight.shape[0] == len(INSTRUMENTS) + 1
    assert {entry["instrument"] for entry in found.notes} == set(INSTRUMENTS)


def test_a_plan_counts_the_instruments(made):
    arguments = ("--tokenizer", made / "tok", "--data", made / "notes", "--out", made / "var", "--device", "cpu")
    planned = json.loads(call(train.main, "var", *arguments, "--plan", "--json"))
    assert planned["parameters"] == sum(p.numel() for p in model.load(made / "var").transformer.parameters())


def test_training_tells_the_network_the_instruments(made):
    """Those of held-out notes that it does not know are unknown to it, not some row that nothing has trained."""
    from mars.data import Dataset
    from mars.labels import column_ids

    dataset, words = Dataset.open(made / "notes"), model.load(made / "var").words
    ids = column_ids(dataset.labels(), ("instrument",), dataset.words, words).flatten().tolist()
    expected = [sorted(INSTRUMENTS).index(INSTRUMENTS[i % 3]) for i in range(12)]
    assert ids == [*expected, len(INSTRUMENTS)]


def test_samples_name_the_instrument(made):
    (names,) = (json.loads(f.read_text())["names"] for f in made.glob("var/samples/step-*/samples.json"))
    assert any("instrument flûte" in name or "instrument Rhodes" in name for name in names), names


def test_notes_are_generated_by_instrument_listed_and_read_again(made, tmp_path):
    words = ("-n", 3, "--model", made / "var", "--iterations", 1, "--device", "cpu")
    call(generate.main, *words, "--out", tmp_path / "horns", "--instrument", "Horn in F")
    assert [note["condition"]["instrument"] for note in notes(tmp_path / "horns")] == ["Horn in F"] * 3
    assert {note["condition"]["family"] for note in notes(tmp_path / "horns")} == {"bass"}
    assert json.loads((tmp_path / "horns" / "notes.json").read_text())["instrument"] == "Horn in F"
    call(generate.main, *words, "--out", tmp_path / "flutes", "--instrument", "flûte", "--pitch", 44)
    sounds = [[(folder / note["file"]).read_bytes() for note in notes(folder)] for folder in tmp_path.iterdir()]
    assert sounds[0] != sounds[1]


def test_evaluation_reads_the_instruments_that_were_asked_for(made, tmp_path):
    import soundfile

    conditions = [{"pitch": 60, "instrument": "flûte"}, {"pitch": 61, "instrument": None}, {"pitch": 62}]
    listed = [{"file": f"{i}.wav", "condition": condition} for i, condition in enumerate(conditions)]
    for note in listed:
        soundfile.write(tmp_path / note["file"], 0.5 * np.sin(np.arange(8000) * 0.1), 16_000)
    (tmp_path / "notes.json").write_text(json.dumps({"notes": listed}))
    assert open_notes(tmp_path).labels == ({"pitch": 60, "instrument": "flûte"}, {"pitch": 61}, {"pitch": 62})


def test_evaluation_asks_for_the_instruments_of_the_real_notes(made, tmp_path):
    real = open_notes(made / "notes", split="train")
    found = generate_like(model.load(made / "var"), real, len(real), tmp_path / "out", iterations=1)
    requested = Counter(note["condition"]["instrument"] for note in notes(tmp_path / "out"))
    assert requested == Counter(known["instrument"] for known in real.labels)
    assert set(found["left_open"]) == {"source", "velocity"}
    held_out = open_notes(made / "notes", split="valid")
    found = generate_like(model.load(made / "var"), held_out, 2, tmp_path / "held out", iterations=1)
    assert found["left_open"]["instrument"] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Horn in G", "unknown instrument 'Horn in G'; did you mean Horn in F?"),
        ("kazoo", "unknown instrument 'kazoo'; known: Horn in F, Rhodes (soft), flûte"),
    ],
)
def test_unknown_instruments_are_explained(name, message, made, tmp_path):
    words = ("-n", 1, "--model", made / "var", "--out", tmp_path / "out", "--instrument", name)
    assert message in call(generate.main, *words, exit_code=2)
    assert not (tmp_path / "out").exists()


def test_a_model_without_instruments_refuses_one(made, tmp_path):
    device = ("--device", "cpu", "--out", tmp_path / "var")
    settings = sets((*STEPS, "train.sample_every=0", "var.condition=pitch"))
    call(train.main, "var", "--tokenizer", made / "tok", "--data", made / "notes", *settings, *device)
    assert not (tmp_path / "var" / "model" / "labels.json").exists()
    assert all("instrument" not in entry for entry in model.load(tmp_path / "var").notes)
    words = ("-n", 1, "--model", tmp_path / "var", "--out", tmp_path / "out")
    said = call(generate.main, *words, "--instrument", "flûte", exit_code=2)
    assert "not trained with instrument as a condition (it has pitch); leave it out" in said
    call(generate.main, *words, "--iterations", 0, "--device", "cpu")
    assert "instrument" not in notes(tmp_path / "out")[0]["condition"]


def test_a_dataset_names_its_instruments(made):
    said = re.sub(r" \(\d+\)", "", call(data.main, "info", made / "notes"))  # how many notes each has
    assert "instrument: Horn in F, Rhodes (soft), flûte, held out" in said
