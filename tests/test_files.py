"""Files of strangers are read only if they are files, of a bounded size, and JSON that can be walked over."""

from __future__ import annotations

import os
import threading

import pytest

from mars import checkpoint, config
from mars.data.packed import Dataset
from mars.errors import CheckpointError, ConfigError, DataError, MarsError
from mars.evaluate import report
from mars.evaluate.embedders.weights import git_blob, read_weights
from mars.files import DEEPEST, new_folder, opened, parse_json, read_bytes, read_json, read_text, sha256
from mars.runs.log import read_log
from mars.runs.record import read_record

READERS = {
    "manifest.json": (checkpoint.verify, CheckpointError),
    "state.json": (lambda folder: checkpoint.read_json(folder / "state.json"), CheckpointError),
    "x.safetensors": (lambda folder: checkpoint.read_tensors(folder / "x.safetensors"), CheckpointError),
    "config.json": (lambda folder: config.load(folder / "config.json"), ConfigError),
    "report.json": (lambda folder: report.read(folder / "report.json"), DataError),
    "run.json": (read_record, ConfigError),
    "log.jsonl": (read_log, ConfigError),
    "network.pth": (lambda folder: read_weights(folder / "network.pth"), CheckpointError),
    "network": (lambda folder: git_blob(folder / "network"), CheckpointError),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(name, kind, tmp_path):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    read, error = READERS[name]
    with pytest.raises(error, match=rf"{name} cannot be read: (not a regular file|Is a directory)"):
        read(tmp_path)
    with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
        sha256(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_dataset_of_pipes_is_refused(tmp_path):
    os.mkfifo(tmp_path / "dataset.json")
    with pytest.raises(DataError):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".json")])
@pytest.mark.parametrize("depth", [DEEPEST + 1, 900, 100_000])
def test_json_too_deep_to_walk_over_is_one_line(name, depth, tmp_path):
    (tmp_path / name).write_text("[" * depth + "]" * depth)
    read, error = READERS[name]
    with pytest.raises(error) as caught:
        read(tmp_path)
    assert "more than 64 lists and objects inside one another" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_of_the_log_too_deep_to_parse_is_counted(tmp_path):
    (tmp_path / "log.jsonl").write_text("[" * 100_000 + "\n" + '{"step": 1, "loss": 2.0}\n')
    log = read_log(tmp_path)
    assert (log.unreadable, log.value("loss")) == (1, 2.0)


def test_the_deepest_json_is_read():
    nested = parse_json("[" * DEEPEST + "]" * DEEPEST, "x", MarsError)
    for _ in range(DEEPEST - 1):
        (nested,) = nested
    assert nested == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[NaN]", "NaN is no JSON number"),
        ("[-Infinity]", "-Infinity is no JSON number"),
        ("[1e999]", "1e999 is too large a number"),
        ('{"a": 1, "a": 2}', "a key appears twice"),
        ("", "Expecting value"),
        (b"\xff", "can't decode byte"),
        ("9" * 5000, "Exceeds the limit"),
    ],
)
def test_json_that_is_none(text, message):
    with pytest.raises(ConfigError, match=f"^x.json cannot be read as JSON: .*{message}"):
        parse_json(text, "x.json", ConfigError)


def test_no_more_is_read_than_the_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'"12345678"')
    assert read_json(path, DataError, 10) == "12345678"
    with pytest.raises(DataError, match=r"a.json is over 9 bytes, the most that such a file may have$"):
        read_bytes(path, DataError, 9)


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(b"# \xff\xfe")
    with pytest.raises(CheckpointError, match=r"README.md cannot be read as UTF-8 text: invalid start byte at byte 2$"):
        read_text(path, CheckpointError)
    with pytest.raises(CheckpointError, match=r"none.md does not exist$"):
        read_text(tmp_path / "none.md", CheckpointError)


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with opened(tmp_path / "b") as file:
        assert file.read() == b"x"


def test_a_taken_name_gets_a_number(tmp_path):
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "x-2").touch()
    found = [new_folder(tmp_path / "parent", "x").name for _ in range(3)]
    assert found == ["x", "x-3", "x-4"]


def test_no_two_get_one_folder(tmp_path):
    found, start = [], threading.Barrier(8)

    def take():
        start.wait()
        found.append(new_folder(tmp_path / "new" / "parent", "x"))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8
    assert all(path.is_dir() for path in found)
