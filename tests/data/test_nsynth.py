from __future__ import annotations

import gzip
import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mars.data.nsynth import pack_nsynth
from mars.errors import DataError, TooManyBadError
from mars.labels import FAMILIES, SOURCES, labels_of

GENUINE = Path(__file__).parents[3] / "shared" / "data" / "nsynth-sample"


def archive(folder: Path, out: Path, mode: str = "w", listing_last: bool = True) -> Path:
    """A tar of an NSynth folder."""
    files = sorted((folder / "audio").iterdir())
    order = [*files, folder / "examples.json"] if listing_last else [folder / "examples.json", *files]
    with tarfile.open(out, mode, format=tarfile.USTAR_FORMAT) as tar:
        for file in order:
            tar.add(file, f"nsynth/{file.relative_to(folder)}")
    return out


def bad_of(out: Path) -> dict[str, str]:
    lines = (out / "bad_files.jsonl").read_text().splitlines()
    return {row["file"]: row["reason"] for row in map(json.loads, lines)}


def test_names_state_labels():
    labels = labels_of("synth_lead_synthetic_011-108-127")
    assert labels is not None
    assert labels.instrument == "synth_lead_synthetic_011"
    assert (FAMILIES[labels.family], SOURCES[labels.source]) == ("synth_lead", "synthetic")
    assert (labels.pitch, labels.velocity) == (108, 127)
    for wrong in ("bass_electronic_18-060-075", "bass_electronic_018-128-075", "tuba_acoustic_001-060-075"):
        assert labels_of(wrong) is None


@pytest.mark.skipif(not GENUINE.is_dir(), reason=f"needs the genuine notes in {GENUINE}")
def test_genuine_notes(tmp_path):
    dataset = pack_nsynth([GENUINE], tmp_path / "a")
    assert len(dataset) == 13
    listing = json.loads((GENUINE / "examples.json").read_text())
    for i, name in enumerate(dataset.names):
        want = listing[name]
        assert dataset.instruments[dataset.metadata[i, 0]] == want["instrument_str"]
        keys = ("instrument_family", "instrument_source", "pitch", "velocity")
        assert dataset.metadata[i, 1:5].tolist() == [want[key] for key in keys]
        exact, _ = soundfile.read(GENUINE / "audio" / f"{name}.wav", dtype="int16")
        np.testing.assert_array_equal(dataset.audio[i], exact)
    packed = pack_nsynth([archive(GENUINE, tmp_path / "a.tar.gz", "w:gz")], tmp_path / "b")
    np.testing.assert_array_equal(packed.metadata, dataset.metadata)
    np.testing.assert_array_equal(packed.audio, dataset.audio)


@pytest.mark.parametrize("listing_last", [True, False])
@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_folders_and_archives_are_the_same(nsynth, tmp_path, suffix, mode, listing_last):
    # The listing overrides what the names say.
    nsynth.listing["flute_acoustic_002-060-100"] |= {"pitch": 61, "instrument_str": "another"}
    folder = nsynth.save()
    a = pack_nsynth([folder], tmp_path / "a")
    b = pack_nsynth([archive(folder, tmp_path / f"n{suffix}", mode, listing_last)], tmp_path / "b")
    assert a.names == b.names == sorted(nsynth.listing)
    np.testing.assert_array_equal(a.metadata, b.metadata)
    np.testing.assert_array_equal(a.audio, b.audio)
    at = a.names.index("flute_acoustic_002-060-100")
    assert a.metadata[at, 3] == 61
    assert a.instruments[a.metadata[at, 0]] == "another"


def test_names_do_where_there_is_no_listing(nsynth, tmp_path):
    (nsynth.path / "examples.json").unlink()
    dataset = pack_nsynth([nsynth.path], tmp_path / "a")
    assert dataset.column("pitch").tolist() == [60, 72] * 3


def test_official_splits_are_kept(nsynth, tmp_path):
    official = nsynth.path.rename(tmp_path / "nsynth-valid")
    assert len(pack_nsynth([official], tmp_path / "a").split("valid")) == 6
    assert len(pack_nsynth([official], tmp_path / "b", split="test").split("test")) == 6
    assert len(pack_nsynth([official], tmp_path / "c", split="instrument").split("train")) < 6
    tar = archive(official, tmp_path / "nsynth-test.jsonwav.tar.gz", "w:gz")
    with pytest.raises(TooManyBadError, match="came before"):
        pack_nsynth([official, tar], tmp_path / "d")
    other = tmp_path / "nsynth-train"
    official.rename(other)
    for file in (other / "audio").iterdir():
        file.rename(file.with_name(file.name.replace("_0", "_1")))
    (other / "examples.json").unlink()
    both = pack_nsynth([other, tar], tmp_path / "e")
    assert [len(both.split(name)) for name in ("train", "test")] == [6, 6]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pitch", 128), ("pitch", -1), ("pitch", "60"), ("pitch", True), ("pitch", 60.0), ("pitch", None),
        ("velocity", 128), ("instrument_family", 11), ("instrument_source", 3), ("instrument_str", ""),
        ("instrument_str", "two\nlines"), ("instrument_str", 7), ("sample_rate", 44100), ("note_str", "x"),
        ("instrument_family_str", "flute"),
    ],
)  # fmt: skip
def test_wrong_entries_are_bad(nsynth, tmp_path, key, value):
    nsynth.listing["bass_electronic_018-060-100"][key] = value
    dataset = pack_nsynth([nsynth.save()], tmp_path / "a", allow_bad=0.5)
    assert len(dataset) == 5
    assert key in bad_of(tmp_path / "a")["bass_electronic_018-060-100"]


def test_missing_and_unlisted_notes_are_bad(nsynth, tmp_path):
    (nsynth.path / "audio" / "bass_electronic_018-060-100.wav").unlink()
    del nsynth.listing["flute_acoustic_002-060-100"]
    nsynth.listing["vocal_synthetic_003-060-100"] = 5
    dataset = pack_nsynth([nsynth.save()], tmp_path / "a", allow_bad=0.5)
    assert len(dataset) == 3
    bad = bad_of(tmp_path / "a")
    assert "no such file" in bad["bass_electronic_018-060-100"]
    assert "not listed" in bad["flute_acoustic_002-060-100"]
    assert "no object" in bad["vocal_synthetic_003-060-100"]
    with pytest.raises(TooManyBadError):
        pack_nsynth([nsynth.path], tmp_path / "b")


def test_wrong_audio_is_bad(nsynth, tmp_path):
    audio = nsynth.path / "audio"
    name = "organ_acoustic_001-{:03d}-100"
    nsynth.add(name.format(1), np.zeros(64_000))
    nsynth.add(name.format(2), np.ones(63_999) / 2)
    nsynth.add(name.format(3), np.ones((64_000, 2)) / 2)
    nsynth.add(name.format(4))
    soundfile.write(audio / f"{name.format(4)}.wav", np.ones(64_000) / 2, 8000)
    nsynth.add(name.format(5))
    whole = (audio / f"{name.format(5)}.wav").read_bytes()
    (audio / f"{name.format(5)}.wav").write_bytes(whole[:5000])
    nsynth.add(name.format(6))
    (audio / f"{name.format(6)}.wav").write_bytes(b"")
    nsynth.add(name.format(7))
    (audio / f"{name.format(7)}.wav").write_bytes(whole + bytes(1 << 20))
    nsynth.add(name.format(8))
    (audio / f"{name.format(8)}.wav").unlink()
    (audio / f"{name.format(8)}.wav").symlink_to(audio / f"{name.format(5)}.wav")
    (audio / "notes.wav").write_bytes(whole)
    dataset = pack_nsynth([nsynth.save()], tmp_path / "a", allow_bad=0.9)
    assert len(dataset) == 6
    bad = bad_of(tmp_path / "a")
    says = [
        "silent",
        "63999 frames",
        "2 channels",
        "8000 Hz",
        "cut short",
        "unreadable",
        "larger",
        "not a regular",
    ]
    for i, reason in enumerate(says, 1):
        assert reason in bad[name.format(i)]
    assert "not named like" in bad["notes"]


def test_hostile_members_are_bad_and_write_nothing(nsynth, tmp_path):
    wav = (nsynth.path / "audio" / "bass_electronic_018-060-100.wav").read_bytes()

    def member(tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, content: bytes = wav) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "/etc/passwd"
        entry.size = len(content) if kind == tarfile.REGTYPE else 0
        tar.addfile(entry, io.BytesIO(content) if entry.size else None)

    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(folder / "hostile.tar", "w") as tar:
        member(tar, "audio/flute_acoustic_001-060-100.wav")
        member(tar, "../../flute_acoustic_002-060-100.wav")
        member(tar, "/tmp/flute_acoustic_003-060-100.wav")
        member(tar, "flute_acoustic_004-060-100.wav", tarfile.SYMTYPE)
        member(tar, "flute_acoustic_005-060-100.wav", tarfile.LNKTYPE)
        member(tar, "flute_acoustic_006-060-100.wav", tarfile.FIFOTYPE)
        member(tar, "flute_acoustic_007-060-100.wav", tarfile.CHRTYPE)
        member(tar, "flute_acoustic_008-060-100.wav", content=wav + bytes(1 << 20))
        member(tar, "flute_acoustic_009-060-100.wav\n")
        member(tar, "evil name.wav")
        member(tar, "audio/flute_acoustic_001-060-100.WAV")  # ignored, as README is
        member(tar, "README", content=b"hello")
        member(tar, "flute_acoustic_010-060-100.wav", tarfile.DIRTYPE)
    dataset = pack_nsynth([folder / "hostile.tar"], tmp_path / "out", allow_bad=1)
    assert dataset.names == ["flute_acoustic_001-060-100"]
    bad = bad_of(tmp_path / "out")
    assert {name[15:18] for name in bad if name.startswith("flute")} == {f"00{i}" for i in range(2, 9)}
    assert "evil name" in bad
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "notes", "out"]
    assert [path.name for path in folder.iterdir()] == ["hostile.tar"]


def test_duplicates_are_bad(nsynth, tmp_path):
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for folder in "ab":
            for file in sorted((nsynth.path / "audio").iterdir())[: 1 if folder == "b" else None]:
                tar.add(file, f"{folder}/{file.name}")
    dataset = pack_nsynth([tmp_path / "twice.tar"], tmp_path / "out", allow_bad=0.5)
    assert len(dataset) == 5
    assert bad_of(tmp_path / "out") == {"bass_electronic_018-060-100": "a note of this name came before"}


@pytest.mark.parametrize("second", [None, b"no audio"], ids=["the same", "unreadable"])
@pytest.mark.parametrize("listing_last", [True, False])
def test_duplicates_of_listed_notes_are_bad(nsynth, tmp_path, listing_last, second):
    path = archive(nsynth.path, tmp_path / "twice.tar", listing_last=listing_last)
    twice = "bass_electronic_018-060-100"
    again = second or (nsynth.path / "audio" / f"{twice}.wav").read_bytes()
    with tarfile.open(path, "a") as tar:
        entry = tarfile.TarInfo(f"nsynth/audio/{twice}.wav")
        entry.size = len(again)
        tar.addfile(entry, io.BytesIO(again))
    dataset = pack_nsynth([path], tmp_path / "out", allow_bad=0.5)
    assert dataset.names == sorted(nsynth.listing.keys() - {twice})
    assert list(bad_of(tmp_path / "out")) == [twice]
    assert ("came before" if second is None else "unreadable") in bad_of(tmp_path / "out")[twice]


def bomb(kind: bytes, size: int) -> Iterator[bytes]:
    """A tar whose one header goes on for `size` bytes."""
    entry = tarfile.TarInfo("flute_acoustic_001-060-100.wav")
    entry.type = kind
    if kind == tarfile.GNUTYPE_SPARSE:
        entry.size = 512
        block = bytearray(entry.tobuf())
        block[482] = 1  # more of the map follows
        block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
        yield bytes(block)
        hole = b"%011o\0%011o\0" % (512, 512) * 21
        yield (hole + b"\1" + bytes(7)) * (size // 512)
        return
    entry.size = size
    start = b"%d path=" % size if kind in (tarfile.XHDTYPE, tarfile.XGLTYPE) else b""
    yield entry.tobuf() + start
    yield b"a" * (size - len(start) - 1) + b"\n"


def peak_of(function: Callable[[], None]) -> int:
    """The most bytes that Python held at once in a call, beyond those before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE,
                                  tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE], ids=bytes.decode)  # fmt: skip
def test_headers_without_end_take_little_memory(tmp_path, kind):
    with gzip.open(tmp_path / "bomb.tar.gz", "wb", 1) as file:
        for part in bomb(kind, 1 << 25):
            file.write(part)
        file.write(bytes(10240))

    def pack() -> None:
        with pytest.raises(DataError, match=r"is not a whole tar archive \(over 65,536 bytes of headers"):
            pack_nsynth([tmp_path / "bomb.tar.gz"], tmp_path / "out")

    assert peak_of(pack) < 1 << 23
    assert not (tmp_path / "out").exists()


def test_headers_that_repeat_take_little_memory(nsynth, tmp_path):
    attributes = {f"x{i}": "y" * 1000 for i in range(20)}
    with tarfile.open(tmp_path / "many.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for file in sorted((nsynth.path / "audio").iterdir()):
            for turn in range(60):
                entry = tarfile.TarInfo("README")
                entry.pax_headers = attributes
                tar.addfile(entry)
                other = {f"{file.stem} {turn} {key}": value for key, value in attributes.items()}
                assert tar.fileobj is not None
                header = tarfile.TarInfo.create_pax_global_header(other)
                tar.fileobj.write(header)
                tar.offset += len(header)
            tar.add(file, f"audio/{file.name}")

    def pack() -> None:
        assert len(pack_nsynth([tmp_path / "many.tar"], tmp_path / "out")) == 6

    assert peak_of(pack) < 6_000_000


def test_names_beyond_all_measure_are_refused(tmp_path):
    with tarfile.open(tmp_path / "long.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a" * 5000 + ".wav"))
    with pytest.raises(DataError, match="breaks its limits"):
        pack_nsynth([tmp_path / "long.tar"], tmp_path / "out")


@pytest.mark.parametrize("packed", [True, False])
def test_a_large_listing_takes_little_memory(nsynth, tmp_path, packed):
    for entry in nsynth.listing.values():
        entry["comment"] = "x" * 60_000
    nsynth.listing |= {f"note {i}": {"comment": "x" * 60_000} for i in range(150)}
    nsynth.save()
    path = archive(nsynth.path, tmp_path / "n.tar") if packed else nsynth.path

    def pack() -> None:
        assert len(pack_nsynth([path], tmp_path / "out", allow_bad=1)) == 6

    assert (nsynth.path / "examples.json").stat().st_size > 9e6
    assert peak_of(pack) < 1 << 23


@pytest.mark.parametrize("piece", [512, 613, 1000])
@pytest.mark.parametrize("indent", [None, 3])
def test_a_listing_is_read_the_same_in_any_pieces(nsynth, tmp_path, monkeypatch, piece, indent):
    nsynth.listing["flute_acoustic_002-060-100"]["instrument_str"] = "フルート"
    (nsynth.path / "examples.json").write_text(
        json.dumps(nsynth.listing, indent=indent, ensure_ascii=False) + " \n" * 999, "utf-8"
    )
    monkeypatch.setattr("mars.data.nsynth._LARGEST_ENTRY", piece)
    dataset = pack_nsynth([nsynth.path], tmp_path / "out")
    assert dataset.names == sorted(nsynth.listing)
    assert "フルート" in dataset.instruments


def test_listings_beyond_all_measure_are_refused(nsynth, tmp_path, monkeypatch):
    nsynth.listing["flute_acoustic_002-060-100"]["qualities"] = [0] * 50_000
    with pytest.raises(DataError, match=r"examples\.json is not valid JSON of notes \(after bass"):
        pack_nsynth([nsynth.save()], tmp_path / "out")
    monkeypatch.setattr("mars.data.nsynth._LARGEST_ENTRY", 1 << 20)
    assert len(pack_nsynth([nsynth.path], tmp_path / "whole")) == 6
    monkeypatch.setattr("mars.data.nsynth._MOST_NOTES", 5)
    with pytest.raises(DataError, match="more than 5 notes"):
        pack_nsynth([nsynth.path], tmp_path / "out")


def test_a_member_that_claims_terabytes_is_refused(tmp_path):
    entry = tarfile.TarInfo("bass_electronic_018-060-100.wav")
    entry.size = 1 << 42
    (tmp_path / "huge.tar").write_bytes(entry.tobuf() + bytes(10240))
    with pytest.raises(DataError, match="breaks its limits"):
        pack_nsynth([tmp_path / "huge.tar"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_archives_are_explained(nsynth, tmp_path):
    whole = archive(nsynth.path, tmp_path / "a.tar.gz", "w:gz").read_bytes()
    plain = archive(nsynth.path, tmp_path / "a.tar").read_bytes()
    member = 512 + 128_512  # of a header and a note, in whole blocks
    broken = {
        "empty": b"",
        "text": b"not a tar" * 200,
        "half a gzip": whole[: len(whole) // 2],
        "a damaged gzip": whole[:700] + b"\0" * 400 + whole[1100:],
        "a wrong sum": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        "cut in a note": plain[: member + 5000],
        "cut in a header": plain[: member + 200],
        "cut between notes": plain[:member],
        "a damaged header": plain[: 2 * member + 100] + b"!!!!" + plain[2 * member + 104 :],
    }
    for name, content in broken.items():
        (tmp_path / "b.tar.gz").write_bytes(content)
        with pytest.raises(DataError, match="is not a whole tar archive"):
            pytest.fail(f"{name}: {pack_nsynth([tmp_path / 'b.tar.gz'], tmp_path / 'out').names}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        "",
        '{"a": ' + "[" * 60_000,
        '{"a": {"b": 1, "b": 2}}',
        '{"a": NaN}',
        '{"a": 1,}',
        '{"a" 1}',
        "{a: 1}",
        "{1: 1}",
        '{"a": 1 "b": 2}',
        '{"a": 1}}',
        '{"a": 1',
        "\ufeff{}",
        '{"\udcff": 1}',
        '{"' + "a" * 300 + '": 1}',
        '{"a": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: text[:12],
)
def test_broken_listings_are_explained(nsynth, tmp_path, text):
    (nsynth.path / "examples.json").write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(DataError, match=r"examples\.json is not valid JSON of notes"):
        pack_nsynth([nsynth.path], tmp_path / "out")


def test_wrong_paths_are_explained(tmp_path):
    with pytest.raises(DataError, match="has no folder audio"):
        pack_nsynth([tmp_path], tmp_path / "out")
    with pytest.raises(DataError, match="does not exist"):
        pack_nsynth([tmp_path / "none.tar"], tmp_path / "out")
