"""Recognises files that are given where a folder of notes is expected, to say in an error what to do with them."""

from __future__ import annotations

from pathlib import Path

from mars.data.decode import SUFFIXES

TAR = "a tar archive"

_UNPACK = "unpack it and give the folder"
_BEGINNINGS = {  # of files
    b"PK\x03\x04": "a ZIP archive",
    b"\xfd7zXZ\0": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
}


def kind(file: Path) -> tuple[str, str]:
    """Return the kind of a file, and how to get notes out of it; two empty strings: it is not known."""
    name = file.name.lower()
    try:
        if not file.is_file():  # a pipe would wait for its writer
            return "", ""
        with file.open("rb") as stream:
            head = stream.read(512)
    except OSError:
        return "", ""
    if ".tfrecord" in name:
        return "a TFRecord file", "fetch the json/wav archive in its place (nsynth-….jsonwav.tar.gz)"
    for beginning, what in _BEGINNINGS.items():
        if head.startswith(beginning):
            return what, _UNPACK
    if head[257:262] == b"ustar" or (head[:2] == b"\x1f\x8b" and name.endswith((".tar.gz", ".tgz"))):
        return (
            TAR,
            "of NSynth, pack it with mars-data nsynth; any other, unpack it and give mars-data folder the folder",
        )
    if head[:4] == b"RIFF" and head[8:12] == b"sfbk":
        return "a soundfont", "pack it with mars-data soundfont"
    if name.endswith(SUFFIXES):
        return "a single audio file", "give the folder that it is in"
    return "", ""


def not_a_folder(path: Path, advice: str) -> str:
    """Return the error message for a path that is no folder; `advice`: what to do if its kind is unknown."""
    if not path.exists():
        return f"{path} does not exist; {advice}"
    what, cure = kind(path)
    return f"{path} is not a folder{f' but {what}' if what else ''}; {cure or advice}"
