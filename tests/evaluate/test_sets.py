"""Sets of notes: what is read, what is refused and why, labels, pairs."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
import soundfile
import torch

from mars.data import Dataset, open_dataset
from mars.data.folder import pack_folder
from mars.errors import DataError, TooManyBadError
from mars.evaluate.sets import note_id, open_notes, pair


def write(path, samples=64_000, rate=16_000, channels=1, level=0.5, subtype=None, hertz=300):
    """A tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = level * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)
    soundfile.write(path, np.stack([audio] * channels, 1), rate, subtype=subtype)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("bass_electronic_018-060-075.wav", "bass_electronic_018-060-075"),
        ("sub/bass_electronic_018-060-075.FLAC", "bass_electronic_018-060-075"),
        ("0007-brass-060.wav", "7"),
        ("2024/12.wav", "12"),
        ("note_0012.flac", "12"),
        ("0.wav", "0"),
        ("take2-of-3.wav", "take2-of-3"),
        ("a.b.wav", "a.b"),
        ("flute", "flute"),
    ],
)
def test_ids_come_from_names(name, wanted):
    assert note_id(name) == wanted


def test_a_folder_is_read_cut_padded_and_clipped(tmp_path):
    write(tmp_path / "1.wav")
    write(tmp_path / "sub" / "2.flac", samples=32_000)
    write(tmp_path / "3.wav", samples=65_536)
    write(tmp_path / "4.wav", level=2.0, subtype="FLOAT")
    (tmp_path / "readme.txt").write_text("no note")
    notes = open_notes(tmp_path)
    assert notes.names == ("1.wav", "3.wav", "4.wav", "sub/2.flac")
    assert notes.ids == ("1", "3", "4", "2")
    record = notes.record
    assert (record.padded, record.cut, record.clipped, record.refused) == ({"sub/2.flac"}, {"3.wav"}, {"4.wav"}, ())
    part = notes.subset([0, 3]).record
    assert (part.padded, part.cut, part.clipped) == ({"sub/2.flac"}, set(), set())
    audio = notes.waveforms()
    assert audio.shape == (4, 64_000)
    assert audio.dtype == torch.float32
    assert audio.abs().max() == 1
    assert torch.count_nonzero(audio[3, 32_000:]) == 0
    expected, _ = soundfile.read(tmp_path / "3.wav", dtype="float32")
    assert torch.equal(audio[1], torch.from_numpy(expected[:64_000]))
    assert torch.equal(notes.waveforms(np.array([3, 1])), audio[[3, 1]])


def test_notes_of_another_rate_are_resampled_and_counted(tmp_path):
    write(tmp_path / "folder" / "1.wav")
    write(tmp_path / "folder" / "2.wav", samples=2 * 44_100, rate=44_100)
    notes = open_notes(tmp_path / "folder")
    assert (notes.record.resampled, notes.record.padded) == ({"2.wav"}, {"2.wav"})
    assert notes.subset([0]).record.resampled == set()
    spectra = torch.fft.rfft(notes.waveforms()[:, :16_000]).abs()
    assert spectra.argmax(1).tolist() == [300, 300]
    assert notes.waveforms(sample_rate=44_100, samples=1000).shape == (2, 1000)
    pack_folder(tmp_path / "folder", tmp_path / "packed", sample_rate=22_050, seconds=5, hold_out="none")
    packed = open_notes(tmp_path / "packed", split="train")
    assert packed.record.resampled == packed.record.cut == {"1.wav", "2.wav"}
    assert torch.fft.rfft(packed.waveforms()[:, :16_000]).abs().argmax(1).tolist() == [300, 300]
    whole = packed.waveforms(sample_rate=22_050, samples=5 * 22_050)
    assert torch.equal(whole, Dataset.open(tmp_path / "packed").waveforms([0, 1]))


def bad_file(path, kind):
    """A file that cannot be used."""
    match kind:
        case "stereo":
            write(path, channels=2)
        case "short":
            write(path, samples=1_000)
        case "silent":
            write(path, level=0.0)
        case "nan":
            soundfile.write(path, np.full(64_000, np.nan), 16_000, subtype="FLOAT")
        case "empty":
            path.touch()
        case "text":
            path.write_text("RIFF of lies")
        case "cut":
            write(path)
            path.write_bytes(path.read_bytes()[:60_000])


REASONS = {
    "stereo": "want mono; got 2 channels",
    "short": "too short: 0.062 s",
    "silent": "silent",
    "nan": "holds NaN",
    "empty": "unreadable",
    "text": "unreadable",
    "cut": "cut short",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_bad_file_is_refused_and_named(kind, tmp_path):
    write(tmp_path / "1.wav")
    bad_file(tmp_path / "2.wav", kind)
    with pytest.raises(TooManyBadError, match=rf"1 of 2 notes cannot be used, the first: 2\.wav: .*{REASONS[kind]}"):
        open_notes(tmp_path)
    notes = open_notes(tmp_path, allow_bad=0.5)
    assert notes.names == ("1.wav",)
    ((name, reason),) = notes.record.refused
    assert name == "2.wav"
    assert REASONS[kind] in reason


def test_what_is_no_file_or_not_looked_into_is_refused_and_hidden_files_are_left_alone(tmp_path):
    write(tmp_path / "in" / "1.wav")
    write(tmp_path / "elsewhere" / "2.wav")
    (tmp_path / "in" / "._1.wav").write_text("of macOS")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "in" / "pipe.wav")
    (tmp_path / "in" / "3.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    notes = open_notes(tmp_path / "in", allow_bad=0.8)
    assert notes.names == ("1.wav",)
    refused = dict(notes.record.refused)
    assert refused.keys() == {"linked", "pipe.wav", "3.m4a"}
    assert refused["pipe.wav"] == "unreadable (not a regular file)"
    assert refused["3.m4a"].startswith("unreadable")


def test_folders_without_notes_are_errors(tmp_path):
    with pytest.raises(DataError, match="holds no audio files"):
        open_notes(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_notes(tmp_path / "none")
    write(tmp_path / "1.wav", level=0.0)
    with pytest.raises(DataError, match=r"is not a folder"):
        open_notes(tmp_path / "1.wav")
    with pytest.raises(DataError, match=r"none of its 1 notes can be used; 1\.wav: silent"):
        open_notes(tmp_path, allow_bad=1.0)


def test_a_file_that_changes_or_goes_is_an_error(tmp_path):
    write(tmp_path / "1.wav")
    write(tmp_path / "2.wav")
    notes = open_notes(tmp_path)
    write(tmp_path / "1.wav", level=0.4)
    (tmp_path / "2.wav").unlink()
    with pytest.raises(DataError, match=r"1\.wav has changed since the evaluation began"):
        notes.waveforms([0])
    with pytest.raises(DataError, match=r"2\.wav was there when the evaluation began"):
        notes.waveforms([1])


def test_labels_come_from_nsynth_names(tmp_path):
    write(tmp_path / "flute_acoustic_002-072-100.wav")
    write(tmp_path / "other.wav")
    notes = open_notes(tmp_path)
    assert notes.pitch.tolist() == [72, -1]
    known = {"family": "flute", "source": "acoustic", "pitch": 72, "velocity": 100, "instrument": "flute_acoustic_002"}
    assert notes.labels == (known, {})


def listing(path, *entries, **more):
    (path / "notes.json").write_text(
        json.dumps({"notes": [{"file": f, "condition": {"pitch": p, "family": k, **more}} for f, p, k in entries]})
    )


def test_labels_come_from_what_generation_was_asked_for(tmp_path):
    write(tmp_path / "0000-brass-060.wav")
    write(tmp_path / "0001-any-any.wav")
    listing(tmp_path, ("0000-brass-060.wav", 60, "brass"), ("0001-any-any.wav", None, None))
    notes = open_notes(tmp_path)
    assert notes.pitch.tolist() == [60, -1]
    assert notes.labels == ({"family": "brass", "pitch": 60}, {})
    listing(tmp_path, ("0001-any-any.wav", 60, "brass"), source="synthetic", velocity=75)
    notes = open_notes(tmp_path)
    assert notes.labels == ({}, {"family": "brass", "source": "synthetic", "pitch": 60, "velocity": 75})


def test_a_note_that_was_generated_and_is_gone_counts_as_refused(tmp_path):
    write(tmp_path / "0.wav")
    listing(tmp_path, ("0.wav", 60, "brass"), ("1.wav", 61, "brass"))
    with pytest.raises(TooManyBadError, match=r"1\.wav: listed in notes\.json, but there is no such file"):
        open_notes(tmp_path)
    assert open_notes(tmp_path, allow_bad=0.5).record.refused[0][0] == "1.wav"


@pytest.mark.parametrize("text", ["{}", "[]", '{"notes": 3}', '{"notes": [{"file": "0.wav"}]}', "nonsense"])
def test_a_listing_of_something_else_is_an_error(text, tmp_path):
    write(tmp_path / "0.wav")
    (tmp_path / "notes.json").write_text(text)
    with pytest.raises(DataError, match=r"notes\.json"):
        open_notes(tmp_path)


@pytest.mark.parametrize("pitch", [128, -1, 60.0, "C4", True])
def test_a_pitch_that_is_none_is_an_error(pitch, tmp_path):
    write(tmp_path / "0.wav")
    listing(tmp_path, ("0.wav", pitch, "brass"))
    with pytest.raises(DataError, match=r"want a pitch 0\.\.127 or null"):
        open_notes(tmp_path)


def test_a_velocity_that_is_none_is_an_error(tmp_path):
    write(tmp_path / "0.wav")
    listing(tmp_path, ("0.wav", 60, "brass"), velocity=128)
    with pytest.raises(DataError, match=r"want a velocity 0\.\.127 or null"):
        open_notes(tmp_path)


def test_a_packed_split_is_a_set(tmp_path):
    dataset = open_dataset(None)
    notes = open_notes(None, split="valid")
    rows = dataset.split("valid")
    assert notes.source == "built-in notes (valid)"
    assert notes.names == tuple(dataset.names[i] for i in rows)
    assert notes.pitch.tolist() == dataset.column("pitch")[rows].tolist()
    assert notes.labels == tuple(dataset.known(i) for i in rows)
    short = dataset.samples
    assert torch.equal(notes.waveforms([2])[0, :short], dataset.waveforms(rows[[2]])[0, :64_000])
    assert notes.waveforms([2]).shape == (1, 64_000)
    assert len(set(notes.keys)) == len(notes)
    with pytest.raises(DataError, match="want one of the splits train, valid, test"):
        open_notes(None, split="all")


def test_packed_notes_of_another_length_are_fitted_and_counted(tmp_path):
    for i in range(3):
        write(tmp_path / "in" / f"inst{i}-{i}.wav", hertz=300 + i)
    pack_folder(tmp_path / "in", tmp_path / "short", seconds=2.0)
    pack_folder(tmp_path / "in", tmp_path / "long", seconds=5.0)
    short, long = (open_notes(tmp_path / name, split="train") for name in ("short", "long"))
    assert (short.record.padded, short.record.cut) == (set(short.names), set())
    assert (long.record.padded, long.record.cut) == (set(), set(long.names))
    assert torch.count_nonzero(short.waveforms()[:, 32_000:]) == 0
    assert long.waveforms().shape == (len(long), 64_000)


def test_an_empty_split_is_an_error_and_not_another_split(tmp_path):
    for i in range(2):
        write(tmp_path / "in" / f"one-{i}.wav", hertz=300 + i)
    pack_folder(tmp_path / "in", tmp_path / "packed", hold_out="none")
    with pytest.raises(DataError, match="has no notes in the split valid"):
        open_notes(tmp_path / "packed", split="valid")


def test_pairs_are_by_id_whatever_the_order(tmp_path):
    for i in range(3):
        write(tmp_path / "real" / f"note{i}.wav", hertz=300 + i)
        write(tmp_path / "fake" / f"{i:02d}-x.flac", hertz=300 + i)
    real, fake = open_notes(tmp_path / "real"), open_notes(tmp_path / "fake").subset([2, 0, 1])
    assert fake.ids == ("2", "0", "1")
    a, b = pair(real, fake)
    assert a.ids == b.ids == ("0", "1", "2")
    torch.testing.assert_close(a.waveforms(), b.waveforms(), atol=1e-4, rtol=0)


def test_notes_without_a_partner_are_errors(tmp_path):
    for i in range(4):
        write(tmp_path / "real" / f"{i}.wav")
        write(tmp_path / "fake" / f"{i}.wav")
    real, fake = open_notes(tmp_path / "real"), open_notes(tmp_path / "fake")
    with pytest.raises(DataError, match=r"real has 4 notes, .*fake 2, .*fake has no note 1 and 1 more"):
        pair(real, fake.subset([0, 2]))
    with pytest.raises(DataError, match=r"real has no note 3$"):
        pair(real.subset([0, 1, 2]), fake)
    write(tmp_path / "fake" / "03.wav")
    with pytest.raises(DataError, match=r"03\.wav and 3\.wav both have the id 3"):
        pair(real, open_notes(tmp_path / "fake"))


def test_partners_of_refused_files_are_left_out_and_listed(tmp_path):
    for i in range(5):
        write(tmp_path / "real" / f"{i}.wav", level=0.5 if i != 1 else 0)
        write(tmp_path / "fake" / f"{i}.wav", level=0.5 if i != 3 else 0)
    real, fake = pair(*(open_notes(tmp_path / name, allow_bad=0.2) for name in ("real", "fake")))
    assert real.names == fake.names == ("0.wav", "2.wav", "4.wav")
    assert dict(real.record.refused) == {
        "1.wav": "silent (peak 0.0e+00)", "3.wav": f"its partner in {tmp_path / 'fake'} cannot be used",
    }  # fmt: skip
    assert [name for name, _ in fake.record.refused] == ["3.wav", "1.wav"]
    for i in (0, 2, 4):
        write(tmp_path / "real" / f"{i}.wav", level=0)
    with pytest.raises(DataError, match=r"no note of .*real can be used in .*fake as well"):
        pair(open_notes(tmp_path / "real", allow_bad=0.8), fake)


def test_a_subset_is_a_set(tmp_path):
    for i in range(4):
        write(tmp_path / f"flute_acoustic_00{i}-06{i}-100.wav", hertz=300 + i)
    notes = open_notes(tmp_path)
    part = notes.subset([3, 1, 2]).subset([0, 2])
    assert part.pitch.tolist() == [63, 62]
    assert [known["velocity"] for known in part.labels] == [100, 100]
    assert part.keys == (notes.keys[3], notes.keys[2])
    assert torch.equal(part.waveforms(), notes.waveforms([3, 2]))


def test_sounds_can_be_mapped(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.wav", hertz=300 + i)
    notes, seen = open_notes(tmp_path), []
    quiet = notes.mapped("half", lambda waveforms, keys: seen.append(tuple(keys)) or waveforms / 2)
    assert torch.equal(quiet.subset([3, 1]).waveforms(), notes.waveforms([3, 1]) / 2)
    assert seen == [(notes.keys[3], notes.keys[1])]
    assert quiet.keys == tuple(f"half:{key}" for key in notes.keys)
    assert quiet.names == notes.names
    assert quiet.fingerprint != notes.fingerprint
    assert quiet.mapped("half", lambda waveforms, _: waveforms).keys[0] == f"half:half:{notes.keys[0]}"


def test_many_notes_are_mapped_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("mars.evaluate.sets.BATCH", 3)
    for i in range(4):
        write(tmp_path / f"{i}.wav", hertz=300 + i)
    notes, sizes = open_notes(tmp_path), []
    same = notes.mapped("same", lambda waveforms, keys: sizes.append((len(waveforms), len(keys))) or waveforms)
    assert torch.equal(same.waveforms(), notes.waveforms())
    assert sizes == [(3, 3), (1, 1)]


def test_an_order_of_the_sets_own(tmp_path):
    for i in range(9):
        write(tmp_path / f"{i}.wav", hertz=300 + i)
    write(tmp_path / "9.wav", hertz=300)  # the sound of 0.wav
    notes = open_notes(tmp_path)
    shuffled = notes.shuffled(1)
    assert sorted(shuffled.names) == list(notes.names)
    assert shuffled.names == notes.subset(range(10)[::-1]).shuffled(1).names
    assert len({notes.shuffled(seed).names for seed in range(9)}) == 9


def test_the_fingerprint_is_of_names_sounds_and_order(tmp_path):
    for i in range(2):
        write(tmp_path / "a" / f"{i}.wav", hertz=300 + i)
        write(tmp_path / "b" / f"{i}.wav", hertz=300 + i)
    first, second = open_notes(tmp_path / "a"), open_notes(tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    others = {first.subset([1, 0]).fingerprint, first.subset([0]).fingerprint}
    others |= {dataclasses.replace(first, names=("x.wav", "1.wav")).fingerprint}
    write(tmp_path / "b" / "1.wav", hertz=400)
    others |= {open_notes(tmp_path / "b").fingerprint}
    assert len(others | {first.fingerprint}) == 5


def test_progress_is_told(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.wav")
    calls = []
    open_notes(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
