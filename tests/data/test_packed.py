from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mars.data import COLUMNS, Dataset, open_dataset
from mars.data.notes import Labels, parse_json
from mars.data.packed import Writer, split_instruments
from mars.errors import DataError, DiskError, TooManyBadError
from mars.files import sha256

SAMPLES = 200
FILES = ["audio.i16", "metadata.npy", "names.txt", "instruments.txt", "dataset.json", "bad_files.jsonl"]


def write(out: Path, notes: int = 20, instruments: int = 10, **options: float) -> Dataset:
    rng = np.random.default_rng(0)
    with Writer(out, sample_rate=16_000, samples=SAMPLES, origin={"kind": "test"}) as writer:
        for i in range(notes):
            labels = Labels(f"instrument {i % instruments}", i % 11, i % 3, 21 + i, 100)
            writer.add(f"note {i}", rng.uniform(-1, 1, SAMPLES).astype(np.float32), labels)
        return writer.commit(**options)


def test_what_is_written_is_read(tmp_path):
    audio = np.random.default_rng(0).uniform(-1, 1, SAMPLES).astype(np.float32)
    dataset = write(tmp_path / "packed")
    assert len(dataset) == 20
    assert dataset.samples == SAMPLES
    assert dataset.names == [f"note {i}" for i in range(20)]
    assert dataset.metadata.dtype == np.int32
    assert dataset.metadata.shape == (20, len(COLUMNS))
    assert dataset.column("pitch").tolist() == list(range(21, 41))
    assert [dataset.instruments[i] for i in dataset.column("instrument")[:2]] == [
        "instrument 0",
        "instrument 1",
    ]
    waveforms = dataset.waveforms(torch.tensor([0, 3]))
    assert waveforms.shape == (2, SAMPLES)
    assert waveforms.dtype == torch.float32
    torch.testing.assert_close(waveforms[0], torch.from_numpy(audio), atol=1.01 / 32768, rtol=0)
    splits = [dataset.split(name) for name in ("train", "valid", "test")]
    assert sorted(np.concatenate(splits).tolist()) == list(range(20))
    again = Dataset.open(tmp_path / "packed", verify=True)
    assert again.fingerprint == dataset.fingerprint == write(tmp_path / "other").fingerprint
    assert open_dataset(str(tmp_path / "packed")).origin == {"kind": "test"}


def test_full_scale_does_not_wrap(tmp_path):
    with Writer(tmp_path / "a", sample_rate=16_000, samples=2, origin={}) as writer:
        writer.add("loud", np.array([1.5, -1.5], np.float32), Labels("x"))
        dataset = writer.commit()
    assert dataset.audio[0].tolist() == [32767, -32768]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found(tmp_path, name, damage):
    out = tmp_path / "packed"
    before = write(out).fingerprint
    file = out / name
    content = bytearray(file.read_bytes() or b"x")  # bad_files.jsonl is empty
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2] if file.stat().st_size else b"grown")
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    try:
        after = Dataset.open(out, verify=True)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    # Only the manifest may hold a flip that changes nothing it says: then the fingerprint tells.
    assert (name, damage) == ("manifest.json", "flip")
    assert after.fingerprint != before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 1"),
        ({"format": "zip"}, "format mars-dataset"),
        ({"count": 21}, "want 21 x 200"),
        ({"count": "many"}, "damaged"),
        ({"count": -1}, "another size"),
    ],
)
def test_other_formats_are_refused(tmp_path, change, says):
    out = tmp_path / "packed"
    write(out)
    info = json.loads((out / "dataset.json").read_text()) | change
    (out / "dataset.json").write_text(json.dumps(info))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["dataset.json"]["size"] = (out / "dataset.json").stat().st_size
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=says):
        Dataset.open(out)


def test_labels_out_of_range_and_pickles_are_refused(tmp_path):
    out = tmp_path / "packed"
    metadata = write(out).metadata.copy()
    metadata[3, 1] = 11
    np.save(out / "metadata.npy", metadata)
    with pytest.raises(DataError, match="a family is out of range"):
        Dataset.open(out)
    pickled = np.empty(1, object)
    np.save(out / "metadata.npy", pickled, allow_pickle=True)
    size = (out / "metadata.npy").stat().st_size
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["metadata.npy"]["size"] = size
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="damaged"):
        Dataset.open(out)


def test_raw_audio_and_nothing_are_explained(tmp_path):
    with pytest.raises(DataError, match=r"is not a packed dataset \(no dataset.json\); pack it first: mars-data"):
        Dataset.open(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        Dataset.open(tmp_path / "none")
    dataset = write(tmp_path / "a")
    with pytest.raises(DataError, match="want one of the columns"):
        dataset.column("colour")
    with pytest.raises(DataError, match="want one of the splits"):
        dataset.split("all")  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    def interrupted() -> None:
        with Writer(tmp_path / "packed", sample_rate=16_000, samples=SAMPLES, origin={}) as writer:
            writer.add("note", np.ones(SAMPLES, np.float32), Labels("x"))
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_anywhere_leaves_nothing(tmp_path, monkeypatch):
    """Every fsync and the rename of a commit in turn."""
    from mars.data import packed

    failed = 0
    for at in range(100):
        calls = 0

        def fail(original, at=at):
            def call(*args):
                nonlocal calls
                calls += 1
                if calls > at:
                    raise OSError(28, "No space left on device")
                return original(*args)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(packed.os, "fsync", fail(packed.os.fsync))
            patch.setattr(Path, "rename", fail(Path.rename))
            try:
                write(tmp_path / "packed")
            except OSError:
                failed += 1
                left = {path.name for path in tmp_path.iterdir()}
                # Once renamed it is whole, even if the folder above could not be synced.
                assert left <= {"packed"}
                if left:
                    assert len(Dataset.open(tmp_path / "packed", verify=True)) == 20
                    shutil.rmtree(tmp_path / "packed")
            else:
                break
    assert failed == at == 10  # seven files, two folders and the rename


def test_existing_paths_are_never_overwritten(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("there", "link"):
        with pytest.raises(DataError, match="exists; give --out a new folder"):
            write(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


def test_a_full_disk_is_seen_before_writing(tmp_path):
    writer = Writer(tmp_path / "a", sample_rate=16_000, samples=64_000, origin={}, expected=10**9)
    with pytest.raises(DiskError, match="free; make room"), writer:
        pass
    assert list(tmp_path.iterdir()) == []


def test_bad_notes_are_listed_and_counted(tmp_path):
    good = np.ones(SAMPLES, np.float32)
    with Writer(tmp_path / "a", sample_rate=16_000, samples=SAMPLES, origin={}) as writer:
        assert writer.add("good", good, Labels("x"))
        assert writer.add("taken back", good / 4, Labels("x"))
        assert writer.add("last", good / 2, Labels("y"))
        assert not writer.add("good", good, Labels("x"))
        assert not writer.add("silent", good * 0, Labels("x"))
        assert not writer.add("nan", good * np.nan, Labels("x"))
        assert not writer.add("two\nlines", good, Labels("x"))
        writer.bad("taken back", "changed my mind")
        with pytest.raises(ValueError, match="want audio of shape"):
            writer.add("short", good[:5], Labels("x"))
        dataset = writer.commit(allow_bad=1.0)
    # A second note of the same name makes neither trustworthy.
    assert dataset.names == ["last"]
    assert dataset.audio[0, 0] == 16384
    assert (tmp_path / "a" / "audio.i16").stat().st_size == 2 * SAMPLES
    listed = [json.loads(line) for line in (tmp_path / "a" / "bad_files.jsonl").read_text().splitlines()]
    assert [row["file"] for row in listed] == ["good", "silent", "nan", "two\nlines", "taken back"]
    assert json.loads((tmp_path / "a" / "dataset.json").read_text())["bad"] == 5


@pytest.mark.parametrize(("bad", "refused"), [(1, False), (2, True)])
def test_one_percent_of_bad_files_is_the_limit(tmp_path, bad, refused):
    with Writer(tmp_path / "a", sample_rate=16_000, samples=2, origin={}) as writer:
        for i in range(100 - bad):
            writer.add(f"{i}", np.ones(2, np.float32), Labels("x"))
        for i in range(bad):
            writer.bad(f"bad {i}", "broken")
        if refused:
            with pytest.raises(TooManyBadError, match="2 of 100 files are bad"):
                writer.commit()
        else:
            assert len(writer.commit()) == 99
    assert (tmp_path / "a").exists() is not refused
    assert (tmp_path / "a.bad_files.jsonl").exists() is refused


def test_nothing_to_pack_is_an_error(tmp_path):
    with (
        pytest.raises(DataError, match="there is no note"),
        Writer(tmp_path / "a", sample_rate=16_000, samples=2, origin={}) as writer,
    ):
        writer.commit()
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None)
@given(st.lists(st.text(max_size=8), unique=True, max_size=40))
def test_splits_are_by_instrument_and_stable(names):
    split = split_instruments(names)
    assert len(split) == len(names)
    assert split_instruments(names[::-1])[::-1] == split
    if len(names) > 1:
        assert {0, 1} <= set(split)
    # Others joining never moves an instrument, once both splits have one without help.
    more = [*names, "a", "b", "c"] if not {"a", "b", "c"} & set(names) else names
    alone = [split_instruments([name, *(str(i) for i in range(50))])[0] for name in more]
    joined = split_instruments([*more, *(f"{i}" for i in range(50) if f"{i}" not in more)])
    assert joined[: len(more)] == alone


def test_splits_have_the_sizes_asked_for():
    split = split_instruments([f"instrument {i}" for i in range(2000)])
    assert [round(split.count(i) / 2000, 2) for i in range(3)] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


def test_no_instrument_is_in_two_splits(tmp_path):
    dataset = write(tmp_path / "a", notes=60, instruments=12)
    found = [set(dataset.column("instrument")[dataset.split(name)]) for name in ("train", "valid", "test")]
    assert sum(len(instruments) for instruments in found) == len(set.union(*found)) == 12


def test_one_instrument_is_all_train(tmp_path, caplog):
    dataset = write(tmp_path / "a", notes=5, instruments=1)
    assert "one instrument" in caplog.text
    assert dataset.split("train").tolist() == dataset.split("valid").tolist() == list(range(5))
    assert len(dataset.split("test")) == 0


@pytest.mark.parametrize("text", [b"{", b'{"a":1,"a":2}', b"[NaN]", b"\xff\xfe{\x00}", b"[" * 100_000, b'"\xff"'])
def test_json_from_strangers_is_strict(text):
    with pytest.raises(DataError, match=r"x\.json cannot be read as JSON"):
        parse_json(text, "x.json")


def with_metadata(tmp_path: Path, content: bytes) -> Path:
    """A dataset whose metadata a stranger has written, who listed it rightly."""
    path = tmp_path / "set"
    write(path)
    (path / "metadata.npy").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["metadata.npy"] = {"size": len(content), "sha256": sha256(path / "metadata.npy")}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def npy(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x09\x00" + bytes(200),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000, 6)}"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (20, 6)}"),
        npy("{'descr': 'O', 'fortran_order': False, 'shape': (20, 6)}"),
        npy("{'descr': '<i4', 'fortran_order': True, 'shape': (20, 6)}") + bytes(480),
        npy("[" * 5000),
        npy("-" * 5000 + "1"),
        npy("{'descr': [('a'" + ", [('a'" * 300),
        npy("{" * 9000),
        bytes(100_000),
    ],
    ids=range(11),
)
def test_a_hostile_table_is_one_line(content, tmp_path):
    with pytest.raises(DataError, match=r"metadata.npy .*pack it again|metadata.npy is over") as caught:
        Dataset.open(with_metadata(tmp_path, content))
    assert "\n" not in str(caught.value)
