from __future__ import annotations

import builtins
import os
import signal
import struct
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars.data import soundfont
from mars.data.soundfont import Preset, Renderer, choose, pack_soundfont, read_presets, render
from mars.errors import DataError, LostProcess, MissingPackage
from mars.labels import FAMILIES, SOURCES, VELOCITIES, labels_of

FONTS = sorted(Path("/usr/share/sounds/sf2").glob("*.sf2"))


@pytest.fixture(scope="module")
def font() -> Path:
    """An installed soundfont, with all that is needed to render it."""
    if not FONTS:
        pytest.skip("needs a soundfont in /usr/share/sounds/sf2 (Debian: fluid-soundfont-gm)")
    pytest.importorskip("soxr")
    try:
        soundfont.library()
    except DataError as error:
        pytest.skip(str(error))
    return FONTS[0]


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def tiny_font(pitches: tuple[int, int] = (40, 90), instrument: tuple[int, int] = (0, 95)) -> bytes:
    """A soundfont of one sine: preset `Sine` at program 80, its zones limited in the preset and below.

    The preset has a global zone of `pitches`, which its first zone takes over and its second (90..100) not.
    The instrument has a global zone too, `instrument`.
    """
    rate, period = 16_000, 64
    wave = (8000 * np.sin(2 * np.pi * np.arange(rate) / period)).astype("<i2")
    keys = {name: struct.pack("<HBB", 43, *span) for name, span in
            {"global": pitches, "second": (90, 100), "instrument": instrument}.items()}  # fmt: skip
    points = struct.pack("<HH", 41, 0)
    sample = struct.pack("<HHHH", 54, 1, 53, 0)  # sampleModes: loop; sampleID
    pgen = keys["global"] + points + keys["second"] + points + bytes(4)
    pbag = b"".join(struct.pack("<HH", at, 0) for at in (0, 1, 2, 4))
    igen = keys["instrument"] + sample + bytes(4)
    ibag = b"".join(struct.pack("<HH", at, 0) for at in (0, 1, 3))
    header = struct.pack("<20sHHHIII", b"Sine", 80, 0, 0, 0, 0, 0)
    header += struct.pack("<20sHHHIII", b"EOP", 0, 0, 3, 0, 0, 0)
    instruments = struct.pack("<20sH", b"Sine", 0) + struct.pack("<20sH", b"EOI", 2)
    samples = struct.pack("<20sIIIIIBbHH", b"Sine", 0, rate, period, 200 * period, rate, 59, -21, 0, 1)
    samples += struct.pack("<20sIIIIIBbHH", b"EOS", 0, 0, 0, 0, 0, 0, 0, 0, 0)
    pdta = b"".join(
        chunk(name, content)
        for name, content in [
            (b"phdr", header), (b"pbag", pbag), (b"pmod", bytes(10)), (b"pgen", pgen), (b"inst", instruments),
            (b"ibag", ibag), (b"imod", bytes(10)), (b"igen", igen), (b"shdr", samples),
        ]
    )  # fmt: skip
    info = chunk(b"ifil", struct.pack("<HH", 2, 1)) + chunk(b"isng", b"EMU8000\0") + chunk(b"INAM", b"Tiny\0\0")
    audio = chunk(b"smpl", wave.tobytes() + bytes(92))
    lists = [(b"INFO", info), (b"sdta", audio), (b"pdta", pdta)]
    return chunk(b"RIFF", b"sfbk" + b"".join(chunk(b"LIST", name + content) for name, content in lists))


def test_presets_are_read_with_their_keys(tmp_path):
    file = tmp_path / "tiny.sf2"
    file.write_bytes(tiny_font())
    (preset,) = read_presets(file)
    assert (preset.name, preset.bank, preset.program) == ("Sine", 0, 80)
    assert preset.keys == frozenset(range(40, 96))
    file.write_bytes(tiny_font((60, 62)))
    assert read_presets(file)[0].keys == {60, 61, 62, *range(90, 96)}
    file.write_bytes(tiny_font((0, 3), (3, 90)))
    assert read_presets(file)[0].keys == {3, 90}
    file.write_bytes(tiny_font((126, 255), (0, 255)))  # MIDI ends at 127
    assert read_presets(file)[0].keys == {*range(90, 101), 126, 127}


def test_broken_soundfonts_are_explained(tmp_path):
    file = tmp_path / "tiny.sf2"
    whole = tiny_font()
    at = whole.index(b"pdta")
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(400):
        content = bytearray(whole)
        for place in rng.integers(at - 8, len(whole), 3):
            content[place] = int(rng.integers(256))
        if trial % 4 == 0:
            content = content[: int(rng.integers(at, len(whole)))]
        file.write_bytes(content)
        try:
            assert all(preset.keys <= set(range(128)) for preset in read_presets(file))
        except DataError:
            refused += 1
    assert refused > 50
    for content in (b"", b"RIFF", b"hello" * 100, whole[:at], whole.replace(b"phdr", b"xxxx")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"tiny\.sf2"):
            read_presets(file)
    with pytest.raises(DataError, match="is not a file"):
        read_presets(tmp_path)


def test_the_table_is_sound():
    programs = [program for first, last, *_ in soundfont._PROGRAMS for program in range(first, last + 1)]
    assert programs == sorted(set(programs))
    assert set(range(128)) - set(programs) == {55, *range(115, 128)}
    for _, _, family, source, low, high in soundfont._PROGRAMS:
        assert family in FAMILIES
        assert source in SOURCES
        assert 21 <= low < high <= 108
    assert {family for _, _, family, *_ in soundfont._PROGRAMS} == set(FAMILIES)


COMPASS = {  # of the General MIDI programs; C4 is MIDI 60
    "A0 C8": (0, 1, 2, 3, *range(80, 88)),
    "C1 C5": (38, 39),
    "C1 G7": (46,),
    "C1 C8": (19,),
    "D1 F4": (58,),
    "E1 C4": (32, 43),
    "E1 G4": (33, 34, 35, 36, 37),
    "E1 C7": (44, 45, 48, 49, *range(88, 96)),
    "E1 G7": (4, 5),
    "F1 F6": (6,),
    "A#1 D#5": (57, 70),
    "A#1 F5": (60,),
    "C2 C4": (47,),
    "C2 A4": (67,),
    "C2 E5": (42,),
    "C2 F#6": (61,),
    "C2 C7": (7, 16, 17, 18, 20, 50, 51, 62, 63, *range(96, 104)),
    "E2 C6": (24, 25),
    "E2 D6": (26, 27, 28, 29, 30, 31),
    "F2 A6": (21, 23),
    "G2 G#5": (109,),
    "G2 C6": (52, 53, 54, 104, 105, 106, 107),
    "G#2 E5": (66,),
    "A2 C7": (12,),
    "C3 C6": (108, 111, 114),
    "C3 E6": (41,),
    "C#3 A5": (65,),
    "D3 G6": (71,),
    "E3 C6": (69,),
    "F3 F6": (11,),
    "F#3 D6": (56, 59),
    "G3 D6": (15,),
    "G3 C7": (74, 75, 76, 77, 78, 79, 110),
    "G3 E7": (40,),
    "G#3 E6": (64,),
    "A#3 G6": (68,),
    "B3 D7": (73,),
    "C4 C6": (14,),
    "C4 C7": (10, 22, 112, 113),
    "C4 C8": (8,),
    "F4 C8": (13,),
    "C5 C8": (9,),
    "D5 C8": (72,),
}


def midi(note: str) -> int:
    """MIDI number of a note as it is written, C#4 being 61."""
    return 12 * (int(note[-1]) + 1) + "C D EF G A B".index(note[0]) + note.count("#")


PRESETS = [Preset(f"p{i}", 0, i, frozenset(range(128))) for i in range(128)] + [
    Preset("kit", 128, 0, frozenset(range(128)))
]


@settings(max_examples=15)
@given(st.integers(1, 9000), st.integers(0, 5))
def test_the_choice_is_even(notes, seed):
    presets = PRESETS[36:50]  # basses to strings, whose ranges differ most
    jobs = choose(presets, notes, seed)
    assert jobs == choose(presets, notes, seed)
    everything = Counter(job.labels.instrument for job in choose(presets, None, seed))
    assert len(jobs) == min(notes, everything.total())
    assert len({job.name for job in jobs}) == len(jobs)
    assert all(labels_of(job.name) == job.labels for job in jobs)
    counts = Counter(job.labels.instrument for job in jobs)
    # Whoever has fewer than the best has all that there is to have, but for the odd one.
    assert all(counts[name] >= min(max(counts.values()) - 1, everything[name]) for name in counts)


def test_pitches_and_velocities_are_spread():
    jobs = [job for job in choose(PRESETS, 128 * 30, 0) if job.preset.program == 0]
    pitches = sorted(job.labels.pitch for job in jobs)
    assert set(np.diff(pitches)) <= {2, 3, 4}
    assert {job.labels.velocity for job in jobs} == set(VELOCITIES)
    assert pitches[0] < 26
    assert pitches[-1] > 103
    piccolo = [job.labels.pitch for job in choose(PRESETS, None, 0) if job.preset.program == 72]
    assert min(piccolo) == 74
    low = choose(PRESETS, None, 0, (36, 40))
    assert {job.labels.pitch for job in low} == set(range(36, 41))
    assert {job.preset.bank for job in low} == {0}
    with pytest.raises(DataError, match="widen `pitches`"):
        choose(PRESETS, None, 0, (0, 5))


def test_every_instrument_plays_its_compass_from_its_lowest_note_to_its_highest():
    played = {preset.program: set() for preset in PRESETS}
    for job in choose(PRESETS, None, 0):
        played[job.preset.program].add(job.labels.pitch)
    expected = {program: set() for program in played}
    for compass, programs in COMPASS.items():
        low, high = map(midi, compass.split())
        expected |= {program: set(range(low, high + 1)) for program in programs}
    assert played == expected


@pytest.mark.parametrize(
    ("keys", "pitches", "wanted"),
    [
        (range(60, 63), (21, 108), {60, 61, 62}),  # the soundfont ends first
        (range(128), (60, 60), {60}),
        (range(128), (99, 127), {99, 100}),  # a violin's highest
        (range(128), (0, 56), {55, 56}),
    ],
)
def test_limits_of_pitch_belong_to_the_range(keys, pitches, wanted):
    jobs = choose([Preset("violin", 0, 40, frozenset(keys))], None, 0, pitches)
    assert {job.labels.pitch for job in jobs} == wanted


def test_names_do_not_depend_on_what_is_asked_for():
    def names(**options):
        return {job.preset.program: job.labels.instrument for job in choose(PRESETS, **options)}

    everything = names(notes=None, seed=0)
    assert names(notes=200, seed=3, pitches=(60, 70)).items() <= everything.items()


@pytest.mark.parametrize(("missing", "says"), [(True, "pip install soxr pyfluidsynth$"), (False, "libfluidsynth3")])
def test_missing_libraries_are_named(monkeypatch, missing, says):
    original = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == "fluidsynth":
            raise (ModuleNotFoundError(name) if missing else ImportError("Couldn't find the FluidSynth library."))
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(MissingPackage if missing else DataError, match=says):
        soundfont.library()


def pitch_of(audio: np.ndarray) -> float:
    """MIDI pitch by the first high peak of the autocorrelation of half a second."""
    part = audio[4000:12_000] - audio[4000:12_000].mean()
    power = np.abs(np.fft.rfft(part, 2 * len(part))) ** 2
    correlation = np.fft.irfft(power)[: len(part) // 2]
    start = int(np.argmax(correlation < 0))
    high = np.flatnonzero(correlation[start:] > 0.9 * correlation[start:].max()) + start
    run = high[: int(np.argmax(np.diff(high, append=10**9) > 1)) + 1]
    return 69 + 12 * np.log2(16_000 / run[correlation[run].argmax()] / 440)


def test_notes_have_the_shape_of_nsynth(font):
    piano = read_presets(font)[0]
    renderer = Renderer(font)
    for pitch in (48, 60, 69):
        audio = renderer.render(piano, pitch, 100)
        assert audio.shape == (64_000,)
        assert audio.dtype == np.float32
        assert np.abs(audio).max() == pytest.approx(0.9, abs=1e-4)
        assert pitch_of(audio) == pytest.approx(pitch, abs=0.4)
        held, released = (np.sqrt((part**2).mean()) for part in (audio[40_000:48_000], audio[56_000:]))
        assert held > 20 * released
    renderer.close()


def test_every_note_is_as_from_a_fresh_synth(font):
    presets = read_presets(font)
    jobs = choose(presets, 139, 0)[::12]
    together = list(render(font, jobs, 1))
    for job, audio in list(zip(jobs, together, strict=True))[::-1][:2]:
        alone = Renderer(font)
        np.testing.assert_array_equal(
            alone.render(job.preset, job.labels.pitch, job.labels.velocity), audio, err_msg=job.name
        )
        alone.close()
    for audio, again in zip(together, render(font, jobs, 2), strict=True):
        np.testing.assert_array_equal(audio, again)


def test_a_tiny_soundfont_is_packed(font, tmp_path):
    file = tmp_path / "tiny.sf2"
    file.write_bytes(tiny_font())
    dataset = pack_soundfont(file, tmp_path / "out", notes=5, seed=1, licence="mine")
    assert len(dataset) == 5
    assert dataset.instruments == ["synth_lead_synthetic_000"]
    assert dataset.origin["presets"] == {"synth_lead_synthetic_000": [0, 80, "Sine"]}
    assert dataset.origin["licence"] == "mine"
    again = pack_soundfont(file, tmp_path / "again", notes=5, seed=1, licence="mine")
    assert again.fingerprint == dataset.fingerprint
    for audio, pitch in zip(dataset.audio, dataset.column("pitch"), strict=True):
        hertz = np.abs(np.fft.rfft(audio[:32_000])).argmax() / 2
        assert 69 + 12 * np.log2(hertz / 440) == pytest.approx(pitch, abs=0.2)


def test_what_fluidsynth_cannot_read_is_explained(font, tmp_path):
    file = tmp_path / "tiny.sf2"
    file.write_bytes(tiny_font().replace(b"sdta", b"xxxx"))
    with pytest.raises(DataError, match="FluidSynth cannot read it"):
        pack_soundfont(file, tmp_path / "out", notes=5)
    assert not (tmp_path / "out").exists()


def test_a_killed_process_is_told(monkeypatch):
    monkeypatch.setattr(soundfont, "Renderer", lambda file: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(soundfont, "_start_worker", str)
    monkeypatch.setattr(soundfont, "_work", os._exit)
    with pytest.raises(LostProcess, match=r"a process that renders x\.sf2 was ended.*fewer processes"):
        list(render("x.sf2", [9, 9, 9], 2))


@pytest.mark.skipif(sys.platform == "win32", reason="it has no masks of signals")
def test_interrupts_are_held_back_from_processes(monkeypatch):
    monkeypatch.setattr(soundfont, "Renderer", lambda file: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(soundfont, "_start_worker", str)
    monkeypatch.setattr(soundfont, "_work", partial(signal.pthread_sigmask, signal.SIG_BLOCK))
    assert [signal.SIGINT in mask for mask in render("x.sf2", [[]], 2)] == [True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
