from __future__ import annotations

import builtins
import json
import os
import struct

import numpy as np
import pytest
import soundfile

from mars.data import Dataset
from mars.data.decode import CHANGES, decode
from mars.data.folder import pack_folder, read_csv
from mars.data.packed import CONFIDENCE, Packing, left_out
from mars.errors import BadFileError, DataError, MissingPackage, TooManyBadError
from mars.labels import FAMILIES
from mars.text import is_one_line
from tests.data.conftest import list_again

RATE = 16_000


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def loudest(audio: np.ndarray) -> float:
    """Frequency (Hz) of the strongest partial of a second at RATE."""
    return float(np.abs(np.fft.rfft(audio[:RATE])).argmax())


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "aiff", "mp3"])
def test_formats_and_rates(notes, tmp_path, suffix, rate):
    if suffix == "mp3" and ("MP3" not in soundfile.available_formats() or rate > 48_000):
        pytest.skip("no MP3 of this rate here")
    stereo = np.stack([tone(rate), np.zeros(rate)], 1)
    soundfile.write(notes / f"a.{suffix}", stereo, rate)
    dataset = pack_folder(notes, tmp_path / "out", seconds=2)
    assert dataset.samples == 2 * RATE
    audio = dataset.waveforms([0])[0].numpy()
    assert loudest(audio) == 440
    assert np.abs(audio[2000:14000]).max() == pytest.approx(0.25, abs=0.03)  # the mean of the two channels
    assert np.abs(audio[20_000:]).max() < 1e-3


def test_labels(notes, tmp_path):
    for name in (
        "bass_electronic_018-060-075.wav",
        "violin_A4.wav",
        "lone.wav",
        "oboe/x.wav",
        "oboe/deep/y.WAV",
    ):
        (notes / name).parent.mkdir(exist_ok=True)
        soundfile.write(notes / name, tone(RATE), RATE)
    (tmp_path / "labels.csv").write_text(
        "\ufefffile,pitch,velocity,family,source,instrument\nviolin_A4.wav,69,100,string,acoustic,stradivari\n"
        "oboe/x.wav,60,,reed,,\n"
    )
    dataset = pack_folder(notes, tmp_path / "out", csv=tmp_path / "labels.csv")
    rows = {
        name: (dataset.instruments[row[0]], *row[1:5].tolist())
        for name, row in zip(dataset.names, dataset.metadata, strict=True)
    }
    assert rows == {
        "bass_electronic_018-060-075.wav": ("bass_electronic_018", 0, 1, 60, 75),
        "lone.wav": ("lone", -1, -1, -1, -1),
        "oboe/deep/y.WAV": ("oboe/deep", -1, -1, -1, -1),
        "oboe/x.wav": ("oboe", 7, -1, 60, -1),
        "violin_A4.wav": ("stradivari", 8, 0, 69, 100),
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "want the column file"),
        ("pitch\n60\n", "want the column file"),
        ("file,split\na.wav,train\n", "the column 'split' cannot be a label"),
        ("file,a.b\na.wav,train\n", "the column 'a.b' cannot be a label"),
        ("file,\na.wav,train\n", "the column '' cannot be a label"),
        ("file,colour\na.wav,\x07\n", "colour .* has characters that cannot be printed"),
        ("file,file\na.wav,b.wav\n", "want the column file"),
        ("file,pitch\na.wav,128\n", "line 2: want pitch 0..127 .* such as C4 .*, got '128'"),
        ("file,pitch\na.wav,H4\n", "got 'H4'"),
        ("file,pitch\na.wav,²\n", "want pitch"),
        ("file,velocity\na.wav,-1\n", "want velocity"),
        ("file,family\na.wav,tu\x07ba\n", "family .* has characters that cannot be printed"),
        ("file,pitch\na.wav,60\na.wav,61\n", "line 3: .* listed twice"),
        ("file,pitch\na.wav\n", "want 2 cells"),
        ("file,pitch\na.wav,60,70\n", "want 2 cells"),
        ("file,instrument\na.wav,\x07\n", "cannot be printed"),
        ('file\n"a.wav\n', "cannot be read as CSV"),
    ],
)
def test_wrong_csv_rows_are_explained(tmp_path, text, says):
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=says):
        read_csv(tmp_path / "x.csv")


def test_csv_in_another_encoding_is_explained(tmp_path):
    (tmp_path / "x.csv").write_bytes("file\nä.wav\n".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-8"):
        read_csv(tmp_path / "x.csv")


def test_bad_files_are_listed(notes, tmp_path):
    good = tone(RATE)
    soundfile.write(notes / "good.wav", good, RATE)
    soundfile.write(notes / "short.wav", good[:1599], RATE)
    soundfile.write(notes / "long enough.wav", good[:1600], RATE)
    soundfile.write(notes / "nan.wav", np.where(np.arange(RATE) == 5, np.nan, good), RATE, subtype="FLOAT")
    soundfile.write(notes / "silent.wav", good * 0, RATE)
    soundfile.write(notes / "none.wav", good[:0], RATE)
    whole = (notes / "good.wav").read_bytes()
    (notes / "cut.wav").write_bytes(whole[:9000])
    (notes / "text.mp3").write_text("hello" * 100)
    (notes / "empty.ogg").write_bytes(b"")
    (notes / "folder.wav").mkdir()
    (notes / "dangling.wav").symlink_to(notes / "nowhere.wav")
    soundfile.write(tmp_path / "outside.wav", good, RATE)
    (notes / "outside.wav").symlink_to(tmp_path / "outside.wav")
    (notes / "inside.wav").symlink_to(notes / "good.wav")
    os.mkfifo(notes / "pipe.wav")
    soundfile.write(notes / "cut.flac", np.random.default_rng(0).uniform(-0.5, 0.5, RATE), RATE)
    (notes / "cut.flac").write_bytes((notes / "cut.flac").read_bytes()[:5000])
    soundfile.write(notes / "new\nline.wav", good, RATE)
    (notes / "readme.txt").write_text("ignored")
    (tmp_path / "labels.csv").write_text("file,pitch\nmissing.wav,60\ngood.wav,69\n")
    dataset = pack_folder(notes, tmp_path / "out", csv=tmp_path / "labels.csv", allow_bad=1)
    assert dataset.names == ["good.wav", "inside.wav", "long enough.wav"]
    lines = (tmp_path / "out" / "bad_files.jsonl").read_text().splitlines()
    bad = {row["file"]: row["reason"] for row in map(json.loads, lines)}
    says = {
        "short.wav": "too short", "nan.wav": "NaN", "silent.wav": "silent", "none.wav": "too short",
        "cut.wav": "cut short", "cut.flac": "", "text.mp3": "unreadable", "empty.ogg": "unreadable",
        "folder.wav": "not a regular", "dangling.wav": "not a regular", "outside.wav": "not a regular",
        "pipe.wav": "not a regular", "new\nline.wav": "characters", "missing.wav": "no such file",
    }  # fmt: skip
    assert bad.keys() == says.keys()
    assert all(says[name] in bad[name] for name in says)
    with pytest.raises(TooManyBadError, match=r"\(.*2 too short.*\).*larger fraction with `allow_bad`"):
        pack_folder(notes, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def riff(claimed: int, rate: int = RATE, channels: int = 1, total: int | None = None) -> bytes:
    """A WAV of 4000 frames whose header claims `claimed` bytes of audio."""
    form = struct.pack("<HHIIHH", 1, channels, rate, (rate * channels * 2) % 2**32, channels * 2, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", claimed)
    audio = (tone(RATE, 0.25) * 32767).astype("<i2").tobytes() * channels
    return b"RIFF" + struct.pack("<I", total or (len(body) + claimed) % 2**32) + body + audio


def test_no_memory_for_false_claims():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # No size, or one as large as can be, is how programs write to a pipe: what is there is read.
    for size in (0xFFFFFFFF, 0x7FFFFFF0, 0x7FFFF000, 0x80000000, 0):
        audio = decode(riff(size, total=size), sample_rate=RATE, samples=64_000).audio
        assert loudest(audio) == 440
    for content in (
        riff(0x3FFFFFF0),
        riff(8000, rate=2**31 - 1),
        riff(8000, channels=1000),
        riff(8000, rate=0),
    ):
        with pytest.raises(BadFileError):
            decode(content, sample_rate=RATE, samples=64_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_damaged_files_never_crash(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    soundfile.write(file, tone(22_050), 22_050)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    fates = []
    for trial in range(150):
        content = bytearray(whole)
        for at in rng.integers(0, min(len(whole), 200 if trial % 2 else len(whole)), 4):
            content[at] ^= 1 << int(rng.integers(8))
        if trial % 3 == 0:
            content = content[: int(rng.integers(len(whole)))]
        try:
            assert decode(bytes(content), sample_rate=RATE, samples=RATE).audio.shape == (RATE,)
            fates.append(True)
        except BadFileError:
            fates.append(False)
    assert len(fates) == 150
    assert not all(fates)


def listed(out) -> dict[str, str]:
    return {row["file"]: row["reason"] for row in map(json.loads, (out / "bad_files.jsonl").read_text().splitlines())}


def test_what_was_done_is_counted_and_kept(notes, tmp_path):
    soundfile.write(notes / "long.wav", tone(RATE, 9), RATE)
    soundfile.write(notes / "fast.wav", tone(44_100, 4), 44_100)
    soundfile.write(notes / "wide.flac", np.stack([tone(RATE, 4)] * 2, 1), RATE)
    soundfile.write(notes / "cancels.wav", np.stack([tone(RATE, 4), -tone(RATE, 4)], 1), RATE)
    soundfile.write(notes / "loud.wav", 4 * tone(RATE, 3), RATE, subtype="FLOAT")
    soundfile.write(notes / "late.wav", np.concatenate([np.zeros(5 * RATE), tone(RATE)]), RATE)
    for other in ("readme.txt", "more.TXT", "Makefile"):
        (notes / other).write_text("no sound")
    packed = pack_folder(notes, tmp_path / "out", allow_bad=0.2)
    for dataset in (packed, Dataset.open(tmp_path / "out", verify=True)):
        assert dataset.packing.changes == dict.fromkeys(CHANGES, 1)
        assert dataset.packing.ignored == {".txt": 2, "no suffix": 1}
    loud = packed.waveforms([packed.names.index("loud.wav")])[0].numpy()
    np.testing.assert_allclose(loud[: 3 * RATE], 2 * tone(RATE, 3), atol=1e-3)  # scaled, not squared off
    assert listed(tmp_path / "out") == {"late.wav": "silent (peak 0.0e+00): in the beginning, which alone is kept"}
    assert left_out(tmp_path / "out") == {"silent": 1}


def test_a_dataset_of_before_says_nothing_of_its_packing(notes, tmp_path):
    soundfile.write(notes / "a.wav", tone(RATE), RATE)
    pack_folder(notes, tmp_path / "out")
    info = json.loads((tmp_path / "out/dataset.json").read_text())
    for key in ("changes", "ignored", "held_out"):
        del info[key]
    (tmp_path / "out/dataset.json").write_text(json.dumps(info))
    list_again(tmp_path / "out", "dataset.json")
    assert Dataset.open(tmp_path / "out").packing == Packing()


@pytest.mark.parametrize("nonsense", [{"changes": 3}, {"changes": {"cut": "many"}}, {"ignored": [1]}, {"count": 0.5}])
def test_nonsense_about_the_packing_is_damage(notes, tmp_path, nonsense):
    soundfile.write(notes / "a.wav", tone(RATE), RATE)
    pack_folder(notes, tmp_path / "out")
    info = json.loads((tmp_path / "out/dataset.json").read_text()) | nonsense
    (tmp_path / "out/dataset.json").write_text(json.dumps(info).replace("0.5", "1e400"))  # no number of ours
    list_again(tmp_path / "out", "dataset.json")
    with pytest.raises(DataError, match=r"is damaged|too large a number"):
        Dataset.open(tmp_path / "out")


def test_every_sound_file_is_packed_or_listed(notes, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no FFmpeg
    for format, name in (("AIFF", "a.aifc"), ("W64", "b.w64"), ("AU", "c.au"), ("CAF", "d.caf"), ("WAV", "e.wav")):
        soundfile.write(notes / name, tone(RATE), RATE, format=format)
    (notes / "f.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    (notes / "g.wma").write_bytes(bytes(100))
    (tmp_path / "elsewhere").mkdir()
    soundfile.write(tmp_path / "elsewhere/x.wav", tone(RATE), RATE)
    (notes / "linked").symlink_to(tmp_path / "elsewhere")
    dataset = pack_folder(notes, tmp_path / "out", allow_bad=0.5)
    assert dataset.names == ["a.aifc", "b.w64", "c.au", "d.caf", "e.wav"]
    bad = listed(tmp_path / "out")
    assert bad.keys() == {"f.m4a", "g.wma", "linked"}
    assert all("install FFmpeg" in bad[name] for name in ("f.m4a", "g.wma"))
    assert bad["linked"] == "a link to a folder, which is not followed"
    assert left_out(tmp_path / "out") == {
        "unreadable without FFmpeg": 2,
        "a link to a folder, which is not followed": 1,
    }


def test_opus_is_read(notes, tmp_path):
    if "OPUS" not in soundfile.available_subtypes("OGG"):
        pytest.skip("this libsndfile writes no Opus")
    soundfile.write(notes / "a.opus", tone(48_000), 48_000, format="OGG", subtype="OPUS")
    dataset = pack_folder(notes, tmp_path / "out")
    assert loudest(dataset.waveforms([0])[0].numpy()) == 440


def forbid(monkeypatch, folder) -> None:
    """Makes a folder one that may not be read, also to root."""
    original = os.scandir

    def scandir(path):
        if os.fspath(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(folder))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_folders_that_cannot_be_read_are_listed(notes, tmp_path, monkeypatch):
    (notes / "closed").mkdir()
    soundfile.write(notes / "closed/a.wav", tone(RATE), RATE)
    soundfile.write(notes / "b.wav", tone(RATE), RATE)
    forbid(monkeypatch, notes / "closed")
    assert pack_folder(notes, tmp_path / "out", allow_bad=0.5).names == ["b.wav"]
    assert listed(tmp_path / "out") == {"closed": "a folder that cannot be read (Permission denied)"}
    forbid(monkeypatch, notes)
    with pytest.raises(DataError, match=r"notes cannot be read \(Permission denied\)"):
        pack_folder(notes, tmp_path / "again")


def test_hidden_files_are_left_alone_and_counted(notes, tmp_path):
    soundfile.write(notes / "a.wav", tone(RATE), RATE)
    for name in ("._a.wav", ".hidden.wav", ".git/x.wav", "__MACOSX/._a.wav", ".DS_Store"):
        (notes / name).parent.mkdir(exist_ok=True)
        (notes / name).write_bytes(b"\0\5\x16\7")
    dataset = pack_folder(notes, tmp_path / "out")
    assert dataset.names == ["a.wav"]
    assert dataset.packing.ignored == {"hidden": 5}
    assert listed(tmp_path / "out") == {}


PRINTABLE = {
    "ideographic space": "\u97f3\u3000\u97f3",
    "no-break space": "no\xa0break",
    "joined emoji": "\U0001f469\u200d\U0001f3a4",
    "joined Persian": "\u0645\u06cc\u200c\u062e",
    "newer than Python": "\U0001fae9",
    "decomposed": "cafe\u0301",
}


@pytest.mark.parametrize("name", PRINTABLE.values(), ids=PRINTABLE)
def test_any_printable_name_is_accepted(notes, tmp_path, name):
    (notes / name).mkdir()
    soundfile.write(notes / name / f"{name}.wav", tone(RATE), RATE)
    (tmp_path / "labels.csv").write_text(f"file,instrument\n{name}/{name}.wav,the {name}\n", encoding="utf-8")
    dataset = pack_folder(notes, tmp_path / "out")
    assert dataset.names == [f"{name}/{name}.wav"]
    assert dataset.instruments == [name]
    assert pack_folder(notes, tmp_path / "again", csv=tmp_path / "labels.csv").instruments == [f"the {name}"]


@pytest.mark.parametrize("name", ["new\nline", "tab\t", "line\u2028sep", "\u202egnp", "bell\x07", "\x85", "\udce9"])
def test_names_that_break_a_line_are_not(name):
    assert not is_one_line(name)


def test_notes_of_two_folders_are_not_halved(notes, tmp_path):
    for i in range(30):
        (notes / "ab"[i % 2]).mkdir(exist_ok=True)
        soundfile.write(notes / "ab"[i % 2] / f"{i}.wav", tone(RATE, 0.2), RATE)
    dataset = pack_folder(notes, tmp_path / "out", seconds=0.2)
    assert [len(dataset.split(name)) for name in ("train", "valid", "test")] == [27, 3, 0]
    assert dataset.packing.held_out == "3 of 30 notes for validation, since 2 instruments are few"
    whole = pack_folder(notes, tmp_path / "whole", seconds=0.2, hold_out="instruments")
    assert [len(whole.split(name)) for name in ("train", "valid", "test")] == [15, 15, 0]
    assert len(pack_folder(notes, tmp_path / "none", seconds=0.2, hold_out="none").split("train")) == 30


def test_soxr_is_needed_only_to_resample(notes, tmp_path, monkeypatch):
    original = builtins.__import__

    def no_soxr(name, *args, **kwargs):
        if name == "soxr":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_soxr)
    soundfile.write(notes / "a.wav", tone(RATE), RATE)
    assert len(pack_folder(notes, tmp_path / "out")) == 1
    soundfile.write(notes / "b.wav", tone(8000), 8000)
    with pytest.raises(MissingPackage, match=r"needs soxr; run: pip install soxr$"):
        pack_folder(notes, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_wrong_paths_are_explained(notes, tmp_path):
    with pytest.raises(DataError, match="holds no audio files"):
        pack_folder(notes, tmp_path / "out")
    with pytest.raises(DataError, match="none does not exist; give the folder"):
        pack_folder(tmp_path / "none", tmp_path / "out")


def test_any_column_is_a_label_and_families_may_be_ones_own(notes, tmp_path):
    for name in ("a.wav", "b.wav", "c.wav"):
        soundfile.write(notes / name, tone(RATE), RATE)
    (tmp_path / "labels.csv").write_text(
        "file,pitch,family,type,room size\na.wav,C4,kazoo,dark,5 m\nb.wav,61,brass,bright,\nc.wav,,accordion,dark,\n"
    )
    dataset = pack_folder(notes, tmp_path / "out", csv=tmp_path / "labels.csv")
    assert [dataset.known(i) for i in range(3)] == [
        {"instrument": "a", "pitch": 60, "family": "kazoo", "type": "dark", "room size": "5 m"},
        {"instrument": "b", "pitch": 61, "family": "brass", "type": "bright"},
        {"instrument": "c", "family": "accordion", "type": "dark"},
    ]
    assert dataset.own == ("room size", "type")
    assert dataset.words["family"] == [*FAMILIES, "accordion", "kazoo"]
    assert dataset.labels()["type"].tolist() == [1, 0, 1]
    for changed in ({"type": ["dark"]}, {"type": ["dark", "dark"]}, {"family": ["kazoo"]}, {"pitch": ["a"]}, ["type"]):
        info = json.loads((tmp_path / "out" / "dataset.json").read_text())
        (tmp_path / "out" / "dataset.json").write_text(json.dumps({**info, "words": changed}))
        list_again(tmp_path / "out", "dataset.json")
        with pytest.raises(DataError, match="pack"):
            Dataset.open(tmp_path / "out")


def test_a_dataset_without_words_of_its_own_says_nothing_of_them(notes, tmp_path):
    soundfile.write(notes / "a.wav", tone(RATE), RATE)
    pack_folder(notes, tmp_path / "out")
    assert "words" not in json.loads((tmp_path / "out" / "dataset.json").read_text())


def test_a_part_of_a_name_is_a_pitch(notes, tmp_path):
    named = {"oboe_A#3_soft.wav": 58, "bell-Bb4.wav": 70, "C-1.wav": -1, "take_A1_B2.wav": -1, "kick_a4.wav": -1}
    for name in named:
        soundfile.write(notes / name, tone(RATE), RATE)
    dataset = pack_folder(notes, tmp_path / "out")
    assert dict(zip(dataset.names, dataset.column("pitch").tolist(), strict=True)) == named


def test_pitches_are_estimated_where_nobody_says_them(notes, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, RATE)
    for name, sound in (("a", tone(RATE, hertz=220)), ("b", noise), ("C5", tone(RATE))):
        soundfile.write(notes / f"{name}.wav", sound, RATE)
    dataset = pack_folder(notes, tmp_path / "out", pitch="estimate")
    assert dict(zip(dataset.names, dataset.column("pitch").tolist(), strict=True)) == {
        "C5.wav": 72, "a.wav": 57, "b.wav": -1,
    }  # fmt: skip  # what is said stands
    assert dataset.column(CONFIDENCE)[dataset.names.index("a.wav")] > 90
    assert (dataset.column(CONFIDENCE) >= 0).sum() == 1
    with pytest.raises(DataError, match="want one of the columns"):
        pack_folder(notes, tmp_path / "plain").column(CONFIDENCE)
