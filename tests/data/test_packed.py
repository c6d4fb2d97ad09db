from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mars.data import COLUMNS, Dataset, open_dataset
from mars.data.packed import Writer
from mars.errors import DataError, DiskError, TooManyBadError
from mars.files import parse_json
from mars.labels import Labels
from tests.data.conftest import list_again

SAMPLES = 200
FILES = ["audio.i16", "metadata.npy", "names.txt", "instruments.txt", "dataset.json", "bad_files.jsonl"]


def write(out: Path, notes: int = 20, instruments: int = 10, **options: Any) -> Dataset:
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
        writer.add("louder", np.array([1.0, -4.0], np.float32), Labels("x"))
        writer.add("full", np.array([1.0, -1.0], np.float32), Labels("x"))
        dataset = writer.commit()
    assert np.array(dataset.audio).tolist() == [[32767, -32768], [8192, -32768], [32767, -32768]]
    assert dataset.packing.changes == {"scaled": 2}  # as a whole: the shape of the sound stays


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


@pytest.mark.parametrize("name", [name for name in FILES if name != "audio.i16"])
def test_all_but_the_audio_is_checked_whenever_a_dataset_is_opened(tmp_path, name):
    out = tmp_path / "packed"
    write(out)
    file = out / name
    (content := bytearray(file.read_bytes() or b"x"))[len(file.read_bytes()) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"{name}(: want 0 bytes| differs from its checksum| is damaged|.* is not valid)"
    ):
        Dataset.open(out)


def test_audio_that_was_overwritten_is_found_by_its_checksum(tmp_path):
    out = tmp_path / "packed"
    write(out).verify()
    file = out / "audio.i16"
    file.write_bytes(file.read_bytes()[::-1])
    dataset = Dataset.open(out)  # whose size is right
    calls: list[tuple[int, int]] = []
    with pytest.raises(DataError, match=r"audio.i16 differs from its checksum; put back the file that was packed"):
        dataset.verify(lambda done, of: calls.append((done, of)))
    assert calls == [(8000, 8000)]
    with pytest.raises(DataError, match="differs from its checksum"):
        Dataset.open(out, verify=True)


@pytest.mark.parametrize("change", ["cut short", "overwritten", "grown", "removed", "empty"])
def test_audio_that_changes_while_it_is_used_is_an_error_and_no_signal(tmp_path, change):
    out = tmp_path / "packed"
    dataset = write(out)
    before = dataset.waveforms([3, 19])
    file = out / "audio.i16"
    if change == "removed":
        file.unlink()
    elif change in ("cut short", "empty"):
        os.truncate(file, 5000 if change == "cut short" else 0)
    elif change == "grown":
        with file.open("ab") as stream:
            stream.write(b"more")
    else:
        status = file.stat()
        with file.open("r+b") as stream:
            stream.write(b"other notes")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # clocks of file systems may be coarse
    says = "cannot be read any more" if change == "removed" else "has changed since it was opened"
    for read in (lambda: dataset.waveforms([3, 19]), lambda: dataset.audio[0], dataset.verify):
        with pytest.raises(DataError, match=rf"audio.i16 {says}"):
            read()
    assert before.shape == (2, SAMPLES)


def test_audio_on_the_disk_is_indexed_as_an_array_is(tmp_path):
    audio = write(tmp_path / "packed").audio
    array = np.fromfile(tmp_path / "packed" / "audio.i16", "<i2").reshape(20, SAMPLES)
    assert (len(audio), audio.shape, audio.ndim, audio.dtype) == (20, array.shape, 2, array.dtype)
    keys = [3, -1, np.int64(4), slice(None), slice(18, 5, -3), [4, 4, 0], np.array([[1], [2]]), np.arange(20) > 15, [],
            (2, 5), (2, slice(3, 9)), (slice(4), 7), ([1, 3], slice(None, 4))]  # fmt: skip
    for key in keys:
        np.testing.assert_array_equal(audio[key], array[key], strict=True)
    np.testing.assert_array_equal(np.asarray(audio), array)
    assert sum(1 for _ in audio) == 20
    for key in (20, -21, [0, 20]):
        with pytest.raises(IndexError):
            audio[key]


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
    list_again(out, "dataset.json")
    with pytest.raises(DataError, match=says):
        Dataset.open(out)


def test_labels_out_of_range_and_pickles_are_refused(tmp_path):
    out = tmp_path / "packed"
    metadata = write(out).metadata.copy()
    metadata[3, 1] = 11
    np.save(out / "metadata.npy", metadata)
    list_again(out, "metadata.npy")
    with pytest.raises(DataError, match="a family is out of range"):
        Dataset.open(out)
    pickled = np.empty(1, object)
    np.save(out / "metadata.npy", pickled, allow_pickle=True)
    list_again(out, "metadata.npy")
    with pytest.raises(DataError, match="damaged"):
        Dataset.open(out)


def npy(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    {
        "huge": npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000, 6), }"),
        "negative": npy("{'descr': '<i4', 'fortran_order': False, 'shape': (-20, -6), }"),
        "wide": npy("{'descr': '<U100000000', 'fortran_order': False, 'shape': (20, 6), }"),
        "turned": npy("{'descr': '<i4', 'fortran_order': True, 'shape': (20, 6), }") + bytes(480),
        "swapped": npy("{'descr': '>i4', 'fortran_order': False, 'shape': (20, 6), }") + bytes(480),
        "cut": npy("{'descr': '<i4', 'fortran_order': False, 'shape': (20, 6), }") + bytes(100),
        "nested": npy("{'descr': " + "[" * 9000 + ", 'fortran_order': False, 'shape': (20, 6), }"),
        "deep": npy("-" * 9000 + "1"),
        "long": npy("{'descr': '<i4', " + " " * 60_000 + "'fortran_order': False, 'shape': (20, 6), }"),
        "no header": b"\x93NUMPY\x01\x00\xff\xff",
        "another version": b"\x93NUMPY\x03\x00\x00\x00\x00\x00",
        "zip": b"PK\x03\x04" + bytes(100),
        "empty zip": b"PK\x05\x06" + bytes(18),
        "nothing": b"",
    }.values(),
    ids=lambda content: None,
)
def test_hostile_tables_are_refused(tmp_path, content):
    out = tmp_path / "packed"
    write(out)
    (out / "metadata.npy").write_bytes(content)
    list_again(out, "metadata.npy")
    with pytest.raises(DataError, match=r"metadata.npy is damaged: want 20 x 6 int32; pack the dataset again"):
        Dataset.open(out)


@pytest.mark.parametrize(("owner", "call"), [(Path, "is_file"), (Path, "stat"), (os, "open")])
def test_a_folder_without_permission_is_told(tmp_path, monkeypatch, owner, call):
    write(tmp_path / "packed")

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", "packed")

    monkeypatch.setattr(owner, call, refuse)
    with pytest.raises(DataError, match=r"packed.* cannot be read.*Permission denied"):
        Dataset.open(tmp_path / "packed")


def test_a_disk_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(DataError, match="the name is too long; choose a shorter one"):
        write(tmp_path / ("a" * 300))
    for owner, call in ((Path, "mkdir"), (os, "fsync"), (Path, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, call, refuse)
            with pytest.raises(DiskError, match=r"packed cannot be written after \d+ notes \(Read-only file system\)"):
                write(tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_raw_audio_and_nothing_are_explained(tmp_path):
    with pytest.raises(DataError, match=r"is not a packed dataset \(no dataset.json\); pack it first: `mars-data f"):
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


def test_a_killed_write_is_begun_again_where_process_ids_repeat(tmp_path, monkeypatch):
    """As in containers, where the first process is always number 1."""
    begun = (
        "import sys, time; from pathlib import Path; from mars.data.packed import Writer\n"
        "with Writer(Path(sys.argv[1]), sample_rate=16_000, samples=200, origin={}): print(flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", begun, tmp_path / "packed"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(os, "getpid", lambda: process.pid)
    write(tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == sorted([*FILES, "manifest.json"])


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
        with pytest.raises(DataError, match="exists; name a new folder"):
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


def test_no_instrument_is_in_two_splits(tmp_path):
    dataset = write(tmp_path / "a", notes=60, instruments=12)
    found = [set(dataset.column("instrument")[dataset.split(name)]) for name in ("train", "valid", "test")]
    assert sum(len(instruments) for instruments in found) == len(set.union(*found)) == 12


def test_of_one_instrument_notes_are_held_out(tmp_path):
    dataset = write(tmp_path / "a", notes=20, instruments=1)
    assert [len(dataset.split(name)) for name in ("train", "valid", "test")] == [18, 2, 0]
    assert dataset.packing.held_out == "2 of 20 notes for validation, since there is one instrument"


def test_what_is_not_held_out_is_not_called_so(tmp_path):
    dataset = write(tmp_path / "a", by="none")
    assert dataset.split("train").tolist() == list(range(20))
    assert dataset.split("valid").tolist() == dataset.split("test").tolist() == []
    assert dataset.packing.held_out == "nothing, as was asked for"


@pytest.mark.parametrize("text", [b"{", b'{"a":1,"a":2}', b"[NaN]", b"\xff\xfe{\x00}", b"[" * 100_000, b'"\xff"'])
def test_json_from_strangers_is_strict(text):
    with pytest.raises(DataError, match=r"x\.json cannot be read as JSON"):
        parse_json(text, "x.json", DataError)


def columns_of(out, names, metadata):
    """Give a dataset other columns, as another version of mars would have written it."""
    info = json.loads((out / "dataset.json").read_text())
    info.pop("columns")
    if names is not None:
        info["columns"] = names
    (out / "dataset.json").write_text(json.dumps(info))
    np.save(out / "metadata.npy", metadata)
    for name in ("dataset.json", "metadata.npy"):
        list_again(out, name)


def test_a_dataset_says_which_columns_it_has(tmp_path):
    write(tmp_path / "packed")
    assert tuple(json.loads((tmp_path / "packed" / "dataset.json").read_text())["columns"]) == COLUMNS


def test_a_dataset_of_before_columns_had_names_opens(tmp_path):
    out = tmp_path / "packed"
    metadata = write(out).metadata
    columns_of(out, None, metadata)
    dataset = Dataset.open(out)
    assert dataset.columns == ("instrument", "family", "source", "pitch", "velocity", "split")
    np.testing.assert_array_equal(dataset.metadata, metadata)


def test_a_dataset_with_a_column_that_nobody_knows_opens(tmp_path):
    out = tmp_path / "packed"
    before = write(out)
    take = np.arange(20, dtype=np.int32)[:, None]
    columns_of(out, ["take", *COLUMNS], np.hstack([take, before.metadata]))
    dataset = Dataset.open(out)
    for name in COLUMNS:
        np.testing.assert_array_equal(dataset.column(name), before.column(name))
    assert dataset.column("take").tolist() == list(range(20))
    assert [dataset.known(i) for i in range(20)] == [before.known(i) for i in range(20)]


def test_a_label_that_a_dataset_was_packed_without_is_unknown(tmp_path):
    out = tmp_path / "packed"
    before = write(out)
    columns_of(out, [name for name in COLUMNS if name != "velocity"], np.delete(before.metadata, 4, axis=1))
    dataset = Dataset.open(out)
    assert dataset.column("velocity").tolist() == [-1] * 20
    np.testing.assert_array_equal(dataset.column("split"), before.column("split"))
    with pytest.raises(DataError, match=r"want one of the columns instrument, family, .*got 'tempo'"):
        dataset.column("tempo")


@pytest.mark.parametrize(
    "names",
    [
        None, "split", 3, [], ["split"], [*COLUMNS[:-1], "take"], [*COLUMNS, "split"], [*COLUMNS, 3],
        [*COLUMNS, "a\nb"],
        [*COLUMNS, *map(str, range(999))], {"split": 1, "instrument": 2},
    ],
    ids=range(11),
)  # fmt: skip
def test_senseless_columns_are_one_line(names, tmp_path):
    out = tmp_path / "packed"
    metadata = write(out).metadata
    columns_of(out, names, metadata)
    if names is None:
        info = json.loads((out / "dataset.json").read_text()) | {"columns": None}
        (out / "dataset.json").write_text(json.dumps(info))
        list_again(out, "dataset.json")
    with pytest.raises(DataError, match=r"dataset\.json: want the names of columns, instrument and split") as caught:
        Dataset.open(out)
    assert "\n" not in str(caught.value)


def test_more_columns_than_there_are_numbers_are_refused(tmp_path):
    out = tmp_path / "packed"
    columns_of(out, [*COLUMNS, "take"], write(out).metadata)
    with pytest.raises(DataError, match="want 20 x 7 int32"):
        Dataset.open(out)
