"""What is said to files that are given in place of notes."""

from __future__ import annotations

import bz2
import io
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from mars.cli.data import main
from mars.data import Dataset
from mars.data.folder import pack_folder
from mars.data.kinds import kind
from mars.data.nsynth import pack_nsynth
from mars.errors import DataError
from mars.evaluate.sets import open_notes


def archive(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        tar.addfile(tarfile.TarInfo("nsynth-test/audio/a.wav"), io.BytesIO())
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.wav", b"RIFF")
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(8000) / 9), 16_000, format="WAV")
    return buffer.getvalue()


TFRECORD = (8).to_bytes(8, "little") + b"\0" * 12
FILES = {  # name: content, what it is said to be, what to do
    "nsynth-test.tfrecord": (TFRECORD, "a TFRecord file", "fetch the json/wav archive"),
    "train.tfrecord-00003-of-00010": (TFRECORD, "a TFRecord file", "nsynth-….jsonwav.tar.gz"),
    "a.zip": (zipped(), "a ZIP archive", "unpack it"),
    "a.tar.xz": (lzma.compress(archive("w")), "an xz archive", "unpack it"),
    "a.tar.bz2": (bz2.compress(archive("w")), "a bzip2 archive", "unpack it"),
    "a.tar.zst": (b"\x28\xb5\x2f\xfd" + b"\0" * 20, "a zstd archive", "unpack it"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c" + b"\0" * 20, "a 7-Zip archive", "unpack it"),
    "renamed.tar.gz": (zipped(), "a ZIP archive", "unpack it"),
    "font.sf2": (b"RIFF\x10\0\0\0sfbk" + b"\0" * 20, "a soundfont", "mars-data soundfont"),
    "note.wav": (sound(), "a single audio file", "give the folder that it is in"),
}
TARS = {"a.tar": archive("w"), "a.tar.gz": archive("w:gz"), "a.tgz": archive("w:gz")}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_archive_of_nsynth_is_named(name, tmp_path):
    content, what, cure = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is {what}; want a .tar or .tar.gz archive or a folder") as caught:
        pack_nsynth([tmp_path / name], tmp_path / "out")
    assert cure in str(caught.value)
    assert "fetch it again" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*FILES, *TARS])
@pytest.mark.parametrize("reader", ["pack_folder", "Dataset.open", "open_notes"])
def test_a_file_where_a_folder_is_wanted_is_named(reader, name, tmp_path):
    tar = "a tar archive", "mars-data nsynth"
    content, what, cure = FILES[name] if name in FILES else (TARS[name], *tar)
    (tmp_path / name).write_bytes(content)
    read = {
        "pack_folder": lambda path: pack_folder(path, tmp_path / "out"),
        "Dataset.open": Dataset.open,
        "open_notes": open_notes,
    }[reader]
    with pytest.raises(DataError, match=f"{name} is not a folder but {what}; ") as caught:
        read(tmp_path / name)
    assert cure in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_names_it_too(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped())
    for command in ("folder", "nsynth"):
        result = CliRunner().invoke(main, [command, str(tmp_path / "a.zip"), "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert "a ZIP archive; " in result.output


def test_of_anything_else_nothing_is_claimed(tmp_path):
    (tmp_path / "a.dat").write_bytes(b"anything")
    os.mkfifo(tmp_path / "pipe.zip")
    for path in (tmp_path / "a.dat", tmp_path / "pipe.zip", tmp_path, tmp_path / "none", Path("/dev/zero")):
        assert kind(path) == ("", "")
    with pytest.raises(DataError, match=r"a.dat is not a folder; give the folder that holds the audio files"):
        pack_folder(tmp_path / "a.dat", tmp_path / "out")
