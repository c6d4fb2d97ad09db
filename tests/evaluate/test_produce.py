"""Notes of a model: they pair up with the real ones, go on where they stopped, and do not differ for it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from mars import audio, config
from mars.data.folder import pack_folder
from mars.errors import CheckpointError, ConfigError, DataError, DiskError
from mars.evaluate.baselines import phases
from mars.evaluate.produce import generate_like, reconstruct
from mars.evaluate.sets import NoteSet, open_notes, pair
from mars.labels import CLOSED, VELOCITIES
from mars.model import Model
from mars.models.sampling import TILE
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR

SMALL = (
    *("audio.n_fft=128", "audio.hop=64", "audio.bins=64", "audio.frames=32", "audio.samples=1900", "audio.cmx=2,1"),
    *("tokenizer.patch=8,8", "tokenizer.width=16", "tokenizer.codebook_size=32", "tokenizer.code_dim=4"),
    *("tokenizer.depth=2", "var.width=16"),
)
TRAINED = [
    {"family": "bass", "source": "synthetic", "count": 8, "pitch": [30, 70]},
    {"family": "brass", "source": "acoustic", "count": 8, "pitch": [42, 70]},
]


def small(*overrides: str, notes=TRAINED) -> Model:
    """An untrained model whose tokens vary."""
    torch.manual_seed(1)
    settings = config.preset("smoke", [*SMALL, *overrides])
    var = VAR(settings.var, settings.tokenizer)
    with torch.no_grad():
        for p in var.parameters():
            p.mul_(3) if p.ndim == 1 else p.normal_(std=0.15)
    tokenizer = Tokenizer(settings).eval().requires_grad_(False)
    tokenizer.head.weight.mul_(0.2)
    tokenizer.head.bias.fill_(-0.3)  # 15 dB below the middle, so that notes do not reach full scale
    return Model(config=settings, tokenizer=tokenizer, var=var.eval().requires_grad_(False), notes=notes, hash="h")


@pytest.fixture(scope="module")
def model() -> Model:
    return small()


@pytest.fixture(scope="module")
def builtin() -> NoteSet:
    """More notes than a tile."""
    return open_notes(None, split="test").subset(range(TILE + 3))


def write(path, hertz, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * np.arange(4000) / 16_000), 16_000, **settings)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.wav")}


NAMES = {
    "nsynth": ["bass_synthetic_018-030-075.wav", "bass_synthetic_018-031-075.wav", "reed_acoustic_000-060-127.wav"],
    "numbers": ["0007-brass-060.wav", "0008-any-any.wav", "sub/12.flac", "x/note_0013.ogg"],
    "words": ["flute.wav", "sub/take2-of-3.wav", "a.b.flac", "Grand Piano (soft)/c#.wav"],
}


def closed(notes):
    return [{name: known[name] for name in known if name in CLOSED} for known in notes.labels]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", NAMES)
def test_reconstructions_pair_up_whatever_the_notes_are_called(kind, packed, model, tmp_path):
    for i, name in enumerate(NAMES[kind]):
        write(tmp_path / "real" / name, 300 + 50 * i)
    real = open_notes(tmp_path / "real")
    if packed:
        pack_folder(tmp_path / "real", tmp_path / "packed")
        real = open_notes(tmp_path / "packed", split="train")
    reconstruct(model, real, tmp_path / "out", iterations=0)
    ours, theirs = pair(real, open_notes(tmp_path / "out"))
    assert len(ours) == len(real) > 0
    assert closed(ours) == list(theirs.labels)


def test_a_reconstruction_is_what_the_model_makes_of_the_note(model, builtin, tmp_path):
    calls = []
    found = reconstruct(model, builtin, tmp_path, iterations=2, seed=3, progress=lambda *p: calls.append(p))
    assert calls == [(TILE, len(builtin)), (len(builtin), len(builtin))]
    assert found == {
        "model_hash": "h",
        "settings": {"made": "reconstructions", "of": builtin.fingerprint, "iterations": 2, "seed": 3},
        "quieter": 0,
    }
    ours, theirs = pair(builtin, open_notes(tmp_path))
    assert closed(ours) == list(theirs.labels)
    for i in (0, len(ours) - 1):
        ids = model.encode(ours.waveforms([i])[:, :1900])
        waveform = model.decode(ids, iterations=2, seed=phases([ours.keys[i]], 3))
        torch.testing.assert_close(theirs.waveforms([i])[:, :1900], waveform, rtol=0, atol=1e-3)
        assert waveform.abs().max() > 0.01


def test_reconstructions_of_refined_tokens(model, builtin, tmp_path):
    notes = builtin.subset(range(2))
    found = reconstruct(model, notes, tmp_path, iterations=0, refine=2)
    assert found["settings"]["refine"] == 2
    ids = model.encode(notes.waveforms([0])[:, :1900], refine=2)
    waveform = model.decode(ids, iterations=0, seed=phases([notes.keys[0]], 0))
    torch.testing.assert_close(open_notes(tmp_path).waveforms([0])[:, :1900], waveform, rtol=0, atol=1e-3)


def test_the_phases_are_the_notes_own(model, builtin, tmp_path):
    reconstruct(model, builtin, tmp_path / "a", iterations=0)
    reconstruct(model, builtin.subset(range(len(builtin))[::-1]), tmp_path / "b", iterations=0)
    a, b = pair(open_notes(tmp_path / "a"), open_notes(tmp_path / "b"))
    torch.testing.assert_close(a.waveforms(), b.waveforms(), rtol=0, atol=1e-3)
    reconstruct(model, builtin, tmp_path / "c", iterations=0, seed=1)
    assert (open_notes(tmp_path / "c").waveforms() - open_notes(tmp_path / "a").waveforms()).abs().max() > 0.01


def make(kind, model, real, out, **settings):
    """Either function, with settings that cost little."""
    settings = {"iterations": 0, **settings}
    if kind == "reconstruct":
        return reconstruct(model, real, out, **settings)
    return generate_like(model, real, len(real), out, **settings)


@pytest.fixture(scope="module", params=["reconstruct", "generate_like"])
def made(request, model, builtin, tmp_path_factory):
    """Which function, the folder that it fills and what it returns."""
    out = tmp_path_factory.mktemp("made") / "new" / "notes"
    return request.param, out, make(request.param, model, builtin, out)


def test_the_listing_is_that_of_mars_generate(made, builtin):
    _, out, found = made
    document = json.loads((out / "notes.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == sorted(["notes.json", *(n["file"] for n in document["notes"])])
    assert {key: document[key] for key in found["settings"]} == found["settings"]
    assert document["model_hash"] == "h"
    assert document["threads"] == torch.get_num_threads()
    notes = open_notes(out)
    assert len(notes) == len(builtin)
    assert [n["index"] for n in document["notes"]] == list(range(len(builtin)))
    assert sorted(notes.keys) == sorted(n["sha256"] for n in document["notes"])


def test_an_interrupted_call_is_gone_on_with(made, model, builtin, tmp_path, monkeypatch):
    kind, whole, found = made
    write_wav, written = audio.write_wav, []

    def fail(path, *rest):
        if len(written) == TILE + 1:
            raise KeyboardInterrupt
        written.append(path.name)
        write_wav(path, *rest)

    monkeypatch.setattr(audio, "write_wav", fail)
    with pytest.raises(KeyboardInterrupt):
        make(kind, model, builtin, tmp_path / "out")
    assert len(contents(tmp_path / "out")) == TILE + 1
    with pytest.raises(DataError, match=r"listed in notes\.json, but there is no such file"):
        open_notes(tmp_path / "out")
    again = []
    monkeypatch.setattr(audio, "write_wav", lambda path, *rest: again.append(path.name) or write_wav(path, *rest))
    assert make(kind, model, builtin, tmp_path / "out") == found
    assert len(again) == len(builtin) - TILE - 1
    assert not set(again) & set(written)
    assert contents(tmp_path / "out") == contents(whole)
    assert (tmp_path / "out" / "notes.json").read_bytes() == (whole / "notes.json").read_bytes()


def test_what_was_lost_is_made_again(made, model, builtin, monkeypatch):
    kind, out, found = made
    before, files = contents(out), sorted(out.glob("*.wav"))
    files[2].unlink()
    files[3].write_bytes(files[3].read_bytes()[:99])
    files[-1].unlink()
    calls = []
    assert make(kind, model, builtin, out, progress=lambda *p: calls.append(p)) == found
    assert calls[-1] == (len(builtin), len(builtin))
    assert contents(out) == before
    monkeypatch.setattr(audio, "griffin_lim", None)
    assert make(kind, model, builtin, out) == found


@pytest.mark.parametrize(
    ("settings", "name"), [({"seed": 1}, "seed 0, not 1"), ({"iterations": 1}, "iterations 0, not 1")]
)
def test_a_folder_of_other_settings_is_refused(settings, name, made, model, builtin):
    kind, out, _ = made
    with pytest.raises(ConfigError, match=f"was begun with {name}"):
        make(kind, model, builtin, out, **settings)


def test_a_folder_of_another_model_or_other_notes_is_refused(made, model, builtin, monkeypatch):
    kind, out, _ = made
    with pytest.raises(ConfigError, match=r"was begun with (of|n)"):
        make(kind, model, builtin.subset(range(3)), out)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 99)
        with pytest.raises(ConfigError, match="was begun with threads"):
            make(kind, model, builtin, out)
    monkeypatch.setattr(model, "hash", "g")
    with pytest.raises(ConfigError, match="was begun with model_hash h, not g; name a new folder"):
        make(kind, model, builtin, out)


def test_a_folder_of_something_else_is_refused(made, model, builtin, tmp_path):
    kind, out, _ = made
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "0.wav").touch()
    with pytest.raises(DataError, match=r"old holds 0\.wav, which is none of these notes"):
        make(kind, model, builtin, tmp_path / "old")
    with pytest.raises(DataError, match="is not a folder"):
        make(kind, model, builtin, tmp_path / "old" / "0.wav")
    (out / "zzz.wav").touch()
    with pytest.raises(DataError, match=r"holds zzz\.wav"):
        make(kind, model, builtin, out)
    (out / "zzz.wav").unlink()
    for text in ("[]", "{}", '{"notes": [1]}', "nonsense"):
        (tmp_path / "old" / "notes.json").write_text(text)
        with pytest.raises(DataError, match=r"notes\.json (is not|cannot be read as JSON)"):
            make(kind, model, builtin, tmp_path / "old")


def test_without_room_nothing_is_begun(made, model, builtin, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DiskError, match="free"):
        make(made[0], model, builtin, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"), [({"seed": -1}, "seed must be at least 0"), ({"iterations": -1}, "iterations must be")]
)
def test_mistakes_write_nothing(settings, message, made, model, builtin, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make(made[0], model, builtin, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_rate_hears_the_notes_at_its_own(made, builtin, tmp_path):
    make(made[0], small("audio.sample_rate=8000"), builtin.subset(range(3)), tmp_path / "out")
    for file in (tmp_path / "out").glob("*.wav"):
        assert soundfile.info(file).samplerate == 8000
    assert open_notes(tmp_path / "out").record.resampled


def test_a_loud_note_is_made_quieter_and_counted(made, model, builtin, tmp_path, monkeypatch):
    loud = torch.linspace(-0.5, 0.25, 1900).repeat(TILE, 1)
    loud[[0, 2]] *= 4
    monkeypatch.setattr(audio, "griffin_lim", lambda m, *_, **__: loud[: len(m)])
    found = make(made[0], model, builtin.subset(range(5)), tmp_path / "out")
    assert found["quieter"] == 2
    peaks = [np.abs(soundfile.read(file)[0]).max() for file in sorted((tmp_path / "out").glob("*.wav"))]
    assert sorted(peaks) == [0.5, 0.5, 0.5, 1, 1]


def test_numbers_that_are_not_finite_are_refused(made, builtin, tmp_path):
    model = small()
    model.tokenizer.head.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite; the model's weights are unusable"):
        make(made[0], model, builtin, tmp_path / "out")


def test_originals_that_cannot_be_told_apart_are_refused(model, tmp_path):
    for name in ("a/1.wav", "b/1.wav"):
        write(tmp_path / "real" / name, 300)
    with pytest.raises(DataError, match=r"a/1\.wav and b/1\.wav both have the id 1"):
        reconstruct(model, open_notes(tmp_path / "real"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def labels(notes):
    return sorted(tuple(known.get(name) for name in CLOSED) for known in notes.labels)


def test_new_notes_are_asked_for_the_labels_of_the_real_ones(builtin, tmp_path):
    model = small(notes=[])
    n = 2 * len(builtin) + 2
    found = generate_like(model, builtin, n, tmp_path / "a", iterations=0, seed=5)
    assert found["left_open"] == {}
    assert found["settings"]["n"] == n
    notes = open_notes(tmp_path / "a")
    assert all(known["velocity"] in VELOCITIES for known in notes.labels)
    order = builtin.shuffled(5)
    assert labels(notes) == sorted(2 * labels(builtin) + labels(order.subset([0, 1])))
    assert notes.pitch.tolist() == [order.pitch[i % len(order)] for i in range(n)]
    generate_like(model, builtin.subset(range(len(builtin))[::-1]), n, tmp_path / "b", iterations=0, seed=5)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_a_new_note_is_that_of_generate(model, builtin, tmp_path):
    settings = {"seed": 2, "cfg": 1.5, "top_k": 20, "top_p": 0.9, "iterations": 1}
    generate_like(model, builtin, 3, tmp_path, **settings)
    for entry in json.loads((tmp_path / "notes.json").read_text())["notes"]:
        (note,) = model.generate(1, start=entry["index"], conditions=[entry["condition"]], **settings)
        pcm, _ = soundfile.read(tmp_path / entry["file"], dtype="int16")
        assert np.array_equal(pcm, (note.waveform * 32768).round().clamp(-32768, 32767).numpy())


def test_labels_that_the_model_was_not_trained_on_are_left_open_and_counted(tmp_path):
    for name in ("bass_synthetic_018-030-075", "reed_acoustic_000-060-127", "brass_electronic_000-062-110", "x"):
        write(tmp_path / "real" / f"{name}.wav", 300)
    real = open_notes(tmp_path / "real")
    found = generate_like(small(), real, 8, tmp_path / "out", iterations=0)
    assert found["left_open"] == {"family": 2, "source": 2}
    conditions = [entry["condition"] for entry in json.loads((tmp_path / "out" / "notes.json").read_text())["notes"]]
    assert sorted(map(str, (list(c.values()) for c in conditions[:4]))) == sorted(
        map(str, (["bass", "synthetic", 30, 75], [None, "acoustic", 60, 127], ["brass", None, 62, 100], [None] * 4))
    )


@pytest.mark.parametrize("exact", [True, False])
def test_pitches_that_the_model_was_not_trained_on_are_asked_for_and_counted(exact, tmp_path):
    for pitch in (20, 30, 70, 71):
        write(tmp_path / "real" / f"bass_synthetic_018-{pitch:03d}-075.wav", 300)
    trained = [{**TRAINED[0], **({"pitch_range": [30, 70], "velocity": [75]} if exact else {})}]
    found = generate_like(small(notes=trained), open_notes(tmp_path / "real"), 8, tmp_path / "out", iterations=0)
    assert found["left_open"] == {}
    assert found["untrained"] == ({"pitch": 4} if exact else {})  # where only the usual pitches are known
    assert sorted(open_notes(tmp_path / "out").pitch) == [20, 20, 30, 30, 70, 70, 71, 71]


@pytest.mark.parametrize("name", ["pitch", "velocity"])
def test_labels_that_no_training_note_had_are_left_open(name, tmp_path):
    write(tmp_path / "real" / "bass_synthetic_018-030-075.wav", 300)
    trained = [{**TRAINED[0], "pitch_range": [30, 70], "velocity": [75]}]
    trained[0] |= {"pitch": [-1, -1], "pitch_range": [-1, -1]} if name == "pitch" else {"velocity": []}
    found = generate_like(small(notes=trained), open_notes(tmp_path / "real"), 1, tmp_path / "out", iterations=0)
    assert (found["left_open"], found["untrained"]) == ({name: 1}, {})


def test_a_model_without_conditions_is_asked_for_nothing(builtin, tmp_path):
    found = generate_like(small("var.condition=[]"), builtin, 2, tmp_path, iterations=0)
    assert found["left_open"] == {"family": 2, "pitch": 2, "source": 2, "velocity": 2}
    assert sorted(contents(tmp_path)) == ["0000-any-any.wav", "0001-any-any.wav"]


def test_a_tokenizer_alone_reconstructs_but_does_not_generate(model, builtin, tmp_path):
    alone = Model(config=model.config, tokenizer=model.tokenizer)
    reconstruct(alone, builtin.subset([0]), tmp_path / "a", iterations=0)
    assert len(contents(tmp_path / "a")) == 1
    with pytest.raises(CheckpointError, match="tokenizer only"):
        generate_like(alone, builtin, 1, tmp_path / "b")
    with pytest.raises(ConfigError, match="n must be at least 1"):
        generate_like(model, builtin, 0, tmp_path / "b")
    assert not (tmp_path / "b").exists()
