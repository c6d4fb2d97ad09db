"""The Python interface: what it takes, and one error that says what was wanted and got."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import soundfile
import torch

import mars
from mars import config
from mars.errors import CheckpointError, ConfigError, MarsError
from mars.model import Model, load
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR
from mars.notes import Note
from mars.runtime import pick_device

SMALL = (
    *("audio.n_fft=128", "audio.hop=64", "audio.bins=64", "audio.frames=32", "audio.samples=1900", "audio.cmx=2,1"),
    *("tokenizer.patch=8,8", "tokenizer.width=16", "tokenizer.codebook_size=32", "tokenizer.code_dim=4"),
    *("tokenizer.depth=2", "var.width=16"),
)
NOTES = [{"family": "brass", "source": "acoustic", "count": 8, "pitch": [42, 70]}]
N, L, V = 1900, 21, 32


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(1)
    settings = config.preset("smoke", SMALL)
    assert settings.tokenizer.tokens == L
    var = VAR(settings.var, settings.tokenizer).eval().requires_grad_(False)
    tokenizer = Tokenizer(settings).eval().requires_grad_(False)
    return Model(config=settings, tokenizer=tokenizer, var=var, notes=NOTES)


@pytest.fixture(scope="module")
def waveforms() -> torch.Tensor:
    return 0.5 * torch.sin(torch.arange(2 * N).reshape(2, N) / 9)


@pytest.fixture(scope="module")
def ids(model, waveforms):
    return model.encode(waveforms)


def test_arrays_of_numpy_are_taken(model, waveforms, ids):
    array = waveforms.numpy()
    frozen = array.copy()
    frozen.flags.writeable = False
    for other in (array, array.astype(np.float64), array.astype(">f4"), array[:, ::-1].copy()[:, ::-1], frozen):
        assert torch.equal(model.encode(other), ids)
    expected = model.decode(ids, iterations=1)
    for dtype in (np.int64, np.uint16, ">i4"):
        actual = model.decode(ids.numpy().astype(dtype), iterations=np.int64(1), seed=np.uint8(0))
        assert torch.equal(actual, expected)
    assert torch.equal(model.decode(ids.int(), iterations=1), expected)


def test_batches_may_be_empty(model):
    assert model.encode(torch.zeros(0, N)).shape == (0, L)
    assert model.decode(torch.zeros(0, L, dtype=torch.int64)).shape == (0, N)


def corrupted(value):
    x = torch.zeros(3, N)
    x[1, 5] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(N), r"got shape \(1900,\); give one note as waveform\[None\]"),
        (torch.zeros(()), r"got shape \(\)"),
        (torch.zeros(2, 1, N), r"got shape \(2, 1, 1900\); mix channels"),
        (torch.zeros(2, 2, N), r"got shape \(2, 2, 1900\)"),
        (torch.zeros(2, N - 1), "got 1899 samples; pad it with zeros"),
        (torch.zeros(2, N + 1), "got 1901 samples; cut it"),
        (torch.zeros(2, 0), "got 0 samples"),
        (torch.zeros(2, N, dtype=torch.int16), "got torch.int16; divide 16-bit samples by 32768"),
        (np.zeros((2, N), np.int16), "got torch.int16; divide"),
        (torch.zeros(2, N, dtype=torch.complex64), "got torch.complex64"),
        (torch.zeros(2, N, dtype=torch.bool), "got torch.bool"),
        (corrupted(float("nan")), "got NaN or infinity in row 1"),
        (corrupted(float("-inf")), "got NaN or infinity in row 1"),
        (np.array([["a"]]), "got a NumPy array of <U1"),
        ([[0.0] * N], "got list"),
        (None, "got NoneType"),
    ],
)
def test_waveforms_that_cannot_be_encoded(model, x, message):
    with pytest.raises(ConfigError, match=r"encode: want waveforms \(B, 1900\), floating-point.*" + message):
        model.encode(x)


def test_encoding_is_not_refined_by_less_than_nothing(model):
    with pytest.raises(ConfigError, match="refine must be at least 0, got -1"):
        model.encode(torch.zeros(1, N), refine=-1)


def of(value):
    x = torch.zeros(3, L, dtype=torch.int64)
    x[2, 3] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(L, dtype=torch.int64), r"got shape \(21,\); give one note as ids\[None\]"),
        (torch.zeros(2, L - 1, dtype=torch.int64), r"got shape \(2, 20\)"),
        (torch.zeros(2, L + 1, dtype=torch.int64), r"got shape \(2, 22\)"),
        (torch.zeros(2, 1, L, dtype=torch.int64), r"got shape \(2, 1, 21\)"),
        (of(V), "got 32 in row 2"),
        (of(-1), "got -1 in row 2"),
        (of(99_999).numpy(), "got 99999 in row 2"),
        (np.full((1, L), 2**64 - 1, np.uint64), "in row 0"),
        (torch.zeros(2, L), "got torch.float32"),
        (torch.zeros(2, L, dtype=torch.bool), "got torch.bool"),
        ([[0] * L], "got list"),
    ],
)
def test_tokens_that_cannot_be_decoded(model, x, message):
    with pytest.raises(ConfigError, match=r"decode: want tokens \(B, 21\), integers 0..31.*" + message):
        model.decode(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": -1}, "iterations must be at least 0, got -1"),
        ({"iterations": 1.5}, "iterations must be a whole number, at least 0, got 1.5"),
        ({"seed": -1}, "seed must be 0.."),
        ({"seed": 2**64}, "seed must be 0.."),
        ({"seed": "1"}, "seed must be a number or 2 generators"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": []}, "seed must be a number or 2 generators, one a note"),
        ({"seed": [0, 1]}, "seed must be a number or 2 generators, one a note"),
    ],
)
def test_settings_that_cannot_be_used(model, ids, settings, message):
    with pytest.raises(ConfigError, match=message):
        model.decode(ids, **settings)


@pytest.mark.parametrize(
    "settings",
    [{"n": 1.5}, {"n": "1"}, {"seed": 0.5}, {"start": None}, {"cfg": "2"}, {"top_p": None}, {"top_k": 9.5},
     {"pitch": 60.5}, {"pitch": "60"}, {"velocity": 99.5}, {"family": 3}, {"source": ["acoustic"]},
     {"conditions": 3}, {"conditions": [None]}],
)  # fmt: skip
def test_one_error_for_what_generate_cannot_take(model, settings):
    with pytest.raises(ConfigError, match=r"(got|unknown) "):
        model.generate(**{"n": 1, **settings})


def test_numbers_of_numpy_generate_the_same_notes(model):
    (note,) = model.generate(1, pitch=60, velocity=100, seed=1, iterations=1)
    settings = {"pitch": np.int64(60), "velocity": np.uint8(100), "seed": np.int32(1), "cfg": np.float32(2)}
    (same,) = model.generate(np.int64(1), iterations=np.int8(1), **settings)
    assert torch.equal(note.waveform, same.waveform)
    assert same.condition == note.condition


def test_another_default_dtype_changes_nothing(model, waveforms, ids):
    expected = model.generate(1, seed=1, iterations=1)[0].waveform
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model.encode(waveforms), ids)
        assert torch.equal(model.generate(1, seed=1, iterations=1)[0].waveform, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("part", ["tokenizer", "var"])
def test_weights_of_another_dtype_are_refused(part, model, waveforms, ids):
    other = copy.deepcopy(model)
    getattr(other, part).half()
    calls = [lambda: other.generate(1), lambda: other.encode(waveforms), lambda: other.decode(ids)]
    for call in calls if part == "tokenizer" else calls[:1]:
        with pytest.raises(CheckpointError, match=f"{part}: want weights in float32, got torch.float16"):
            call()


def test_devices(monkeypatch):
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("device", ["nonsense", "cuda:", "meta", "cuda:77", "", None, 3.5])
def test_devices_that_are_not_there(device):
    with pytest.raises(
        ConfigError, match=r"device .*: (want auto, cpu, cuda|this machine or this PyTorch build has none)"
    ):
        load(device=device)


def test_without_a_gpu_there_is_no_cuda():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(MarsError, match="device cuda: this machine or this PyTorch build has none; use cpu"):
        mars.load(device="cuda")


def test_the_choice_can_be_known_before_the_notes(model):
    chosen = model.choose(3, start=2, seed=4, pitch=(50, 60))
    assert chosen == [note.condition for note in model.generate(3, start=2, seed=4, pitch=(50, 60), iterations=0)]


def test_tokens_and_sounds_are_of_float32_under_any_autocast(model, waveforms, ids):
    """Lowered, some of these would come out as others."""
    expected, spectrogram = model.decode(ids, iterations=1), model.spectrogram(ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(waveforms), ids)
        assert torch.equal(model.decode(ids, iterations=1), expected)
        assert torch.equal(model.spectrogram(ids), spectrogram)


def test_what_a_model_was_trained_in_changes_no_note(model):
    """The precision of a generation is an argument, and that of its sound none."""
    expected = model.generate(2, seed=1, iterations=1)
    lowered = [f"train.{stage}.precision=bfloat16" for stage in ("tokenizer", "var")]
    other = dataclasses.replace(model, config=config.override(model.config, lowered))
    for one, same in zip(expected, other.generate(2, seed=1, iterations=1), strict=True):
        assert torch.equal(one.ids, same.ids)
        assert torch.equal(one.waveform, same.waveform)
    for precision in ("float32", "bfloat16"):
        for note in other.generate(2, seed=1, iterations=1, precision=precision):
            torch.testing.assert_close(note.log_magnitude[None], model.spectrogram(note.ids[None]), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="precision must be one of auto, float32, bfloat16; got 'half'"):
        model.generate(1, precision="half")


def test_it_says_in_a_line_what_it_is(model):
    assert repr(model) == (
        "<Model smoke: tokenizer 0.0 M, transformer 0.0 M parameters, 0.119 s at 16000 Hz, "
        "by family, source, pitch, velocity, on cpu>"
    )
    assert "transformer" not in repr(dataclasses.replace(model, var=None))


def test_a_notebook_shows_its_card_and_runs_nothing_of_it(model):
    card = (
        "---\nlicense: mit\n---\n# Bells\n\n<script>alert(1)</script> [x](javascript:alert(1))\n\n| a |\n|---|\n| 1 |\n"
    )
    page = dataclasses.replace(model, card=card)._repr_html_()
    assert page.startswith("<h1>Bells</h1>")
    assert "<td>1</td>" in page
    assert "license" not in page
    assert "<script" not in page
    assert "href" not in page
    assert model._repr_html_().startswith("<p>&lt;Model smoke")


def test_it_goes_to_a_device(model):
    other = copy.deepcopy(model)
    assert other.to("cpu") is other
    assert other.to("auto").device == pick_device("auto")
    with pytest.raises(ConfigError, match="device 'tpu'"):
        other.to("tpu")


def test_a_saved_model_is_opened_as_a_pretrained_one(model, tmp_path):
    model.save_pretrained(str(tmp_path / "kept"))
    found = Model.from_pretrained(tmp_path / "kept")
    assert torch.equal(found.generate(1, seed=4)[0].ids, model.generate(1, seed=4)[0].ids)
    assert Model.from_pretrained("notes").hash == load().hash


def ids_of(notes):
    return torch.stack([note.ids for note in notes])


def test_a_sound_is_varied_from_a_file_samples_or_a_note(model, waveforms, ids, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, waveforms[0].numpy(), 16_000, subtype="FLOAT")
    kept = model.kept(1)
    for sound in (path, str(path), waveforms[0], waveforms[0].numpy(), (waveforms[0], 16_000)):
        assert torch.equal(model.tokenize(sound), ids[0])
        notes = model.vary(sound, 3, keep=1, seed=4, iterations=1)
        assert torch.equal(ids_of(notes)[:, :kept], ids[:1, :kept].expand(3, -1))
    assert torch.equal(ids_of(notes), ids_of(model.vary(path, 3, keep=1, seed=4, iterations=1)))
    scales = len(model.config.tokenizer.scales)
    (same,) = model.vary(path, keep=scales, iterations=1)
    assert torch.equal(same.ids, ids[0])
    half = model.kept(scales // 2)
    assert torch.equal(model.vary(path, iterations=1)[0].ids[:half], ids[0, :half])


def test_variations_are_labelled_as_asked_or_as_the_note_was(model, waveforms):
    (note,) = model.generate(1, family="brass", pitch=50, iterations=1)
    (like,) = model.vary(note, iterations=1)
    assert like.condition == note.condition
    assert model.vary(note, pitch=60, iterations=1)[0].condition == {**note.condition, "pitch": 60}
    assert set(model.vary(waveforms[0], iterations=1)[0].condition.values()) == {None}
    (other,) = model.generate(1, family="brass", pitch=60, velocity=note.condition["velocity"], iterations=1)
    assert model.morph(note, other, iterations=1)[0].condition == {**note.condition, "pitch": None}


def test_a_morph_goes_from_one_sound_to_the_other(model, waveforms, ids):
    a, b = waveforms[0], waveforms[1].flip(0) * 0.1
    ends = model.morph(a, b, [0, 1], iterations=1)
    assert torch.equal(ids_of(ends), model.encode(torch.stack([a, b])))
    assert len(model.morph(a, b, [0.5] * 3, keep=1, iterations=1)) == 3
    assert len(model.morph(a, b, iterations=1)) == 1


def test_a_morph_leaves_one_sound_as_it_nears_the_other():
    packaged = load()
    t = torch.arange(64_000) / 16_000
    flute, bass = 0.3 * torch.sin(2764 * t), 0.5 * torch.sin(345.6 * t).sign() * torch.exp(-2 * t)
    found = packaged.spectrogram(packaged.mix(flute, bass, [0, 0.25, 0.5, 0.75, 1]))
    left, near = ((found - end).square().mean((1, 2)).tolist() for end in (found[0], found[-1]))
    assert left == sorted(left)
    assert near == sorted(near, reverse=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.vary(x, keep=9), "keep must be 0..3, got 9"),
        (lambda m, x: m.vary(x, 0), "n must be at least 1"),
        (lambda m, x: m.vary(x, tokens=x), "tokens are those of the sound"),
        (lambda m, x: m.vary(x, family="flute"), "flute"),
        (lambda m, x: m.vary(None), "sound: want a path, a waveform"),
        (lambda m, x: m.vary("missing.wav"), "missing.wav is not a file"),
        (lambda m, x: m.morph(x, x, 1.5), "amount must be numbers from 0 to 1"),
        (lambda m, x: m.morph(x, x, []), "amount must be numbers from 0 to 1"),
        (lambda m, x: m.morph(x, x, "half"), "amount must be a number"),
        (lambda m, x: m.vary(Note(0, x, x, x[:4], {}, 16_000)), "sound: want a note with 21 tokens"),
    ],
)
def test_one_error_for_what_cannot_be_varied(model, waveforms, call, message):
    with pytest.raises(MarsError, match=message):
        call(model, waveforms[0])
