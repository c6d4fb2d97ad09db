from __future__ import annotations

import builtins
import json
import os
import struct

import numpy as np
import pytest
import soundfile

from mars.data.folder import pack_folder, read_csv
from mars.data.notes import read_audio
from mars.errors import BadFileError, DataError, MissingPackage, TooManyBadError

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
        ("file,colour\na.wav,red\n", "want the column file"),
        ("file,file\na.wav,b.wav\n", "want the column file"),
        ("file,pitch\na.wav,128\n", "line 2: want pitch 0..127, got '128'"),
        ("file,pitch\na.wav,C4\n", "got 'C4'"),
        ("file,pitch\na.wav,²\n", "want pitch"),
        ("file,velocity\na.wav,-1\n", "want velocity"),
        ("file,family\na.wav,tuba\n", "want a family of bass, brass"),
        ("file,source\na.wav,real\n", "want a source of acoustic"),
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
    with pytest.raises(TooManyBadError, match="--allow-bad"):
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
    # A size of all ones is how streams are written: what is there is read.
    audio = read_audio(riff(0xFFFFFFFF, total=0xFFFFFFFF), sample_rate=RATE, samples=64_000)
    assert loudest(audio) == 440
    for content in (
        riff(0x7FFFFFF0),
        riff(8000, rate=2**31 - 1),
        riff(8000, channels=1000),
        riff(8000, rate=0),
    ):
        with pytest.raises(BadFileError):
            read_audio(content, sample_rate=RATE, samples=64_000)
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
            assert read_audio(bytes(content), sample_rate=RATE, samples=RATE).shape == (RATE,)
            fates.append(True)
        except BadFileError:
            fates.append(False)
    assert len(fates) == 150
    assert not all(fates)


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
    with pytest.raises(DataError, match="is not a folder"):
        pack_folder(tmp_path / "none", tmp_path / "out")
