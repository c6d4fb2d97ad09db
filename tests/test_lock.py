"""Folders that one process has for itself."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

import pytest

from mars import lock
from mars.errors import ConfigError


def test_a_second_trainer_is_told_who_is_first(tmp_path):
    with lock.claim(tmp_path, print) as locked:
        assert locked
        who = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ConfigError, match=rf"is in use by {who}; wait for it to end"), lock.claim(tmp_path, print):
            pass
    with lock.claim(tmp_path, print):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_locks_do_not_work_there_is_a_warning(number, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_take", lambda descriptor: (_ for _ in ()).throw(OSError(number, "not here")))
    messages: list[str] = []
    with lock.claim(tmp_path, messages.append) as locked:
        assert not locked
    assert len(messages) == 1
    assert "cannot be locked (not here); make sure that no other trainer uses it" in messages[0]


def test_other_faults_of_the_lock_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_take", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"), lock.claim(tmp_path, print):
        pass


def test_a_lock_that_its_owner_removes_meanwhile_is_none(tmp_path, monkeypatch):
    take, removed = lock._take, []

    def late(descriptor):
        if not removed:
            removed.append(True)
            (tmp_path / lock.NAME).unlink()
        take(descriptor)

    monkeypatch.setattr(lock, "_take", late)
    with lock.claim(tmp_path, print):
        assert (tmp_path / lock.NAME).read_text().startswith(f"process {os.getpid()} on")
        with pytest.raises(ConfigError, match="is in use"), lock.claim(tmp_path, print):
            pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def left_by_a_dead_process(path):
    """What one that was killed leaves: nobody has the lock."""
    place = path.with_name(f".tmp-{path.name}-new")
    (place / path.name).mkdir(parents=True)
    (place / path.name / "half").write_text("half")
    (place / lock.NAME).write_text("process 1 on here\n")
    return place


def test_a_scratch_folder_becomes_the_result_or_nothing(tmp_path):
    with lock.scratch(tmp_path / "out") as new:
        (new / "file").write_text("whole")
        assert names(tmp_path) == [".tmp-out-new"]
        new.rename(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]
    with contextlib.suppress(KeyboardInterrupt), lock.scratch(tmp_path / "other") as new:
        (new / "file").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"]


def test_what_dead_processes_left_is_removed_and_what_living_ones_have_is_not(tmp_path):
    for name in ("out", "another"):
        left_by_a_dead_process(tmp_path / name)
    (tmp_path / ".tmp-never-locked-new").mkdir()
    (tmp_path / ".tmp-of-others").mkdir()
    (tmp_path / ".tmp-theirs-new").mkdir()
    (tmp_path / ".tmp-theirs-new" / "file").touch()
    with lock.scratch(tmp_path / "alive") as living:
        (living / "file").touch()
        with lock.scratch(tmp_path / "out") as new:
            assert names(new) == []
            assert names(tmp_path) == [".tmp-alive-new", ".tmp-of-others", ".tmp-out-new", ".tmp-theirs-new"]
        assert names(living) == ["file"]
    assert names(tmp_path) == [".tmp-of-others", ".tmp-theirs-new"]


def test_two_processes_do_not_fill_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    with lock.scratch(tmp_path / "out") as new:
        who = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ConfigError, match=f"is in use by {who}"), lock.scratch(tmp_path / "out"):
            pass
        assert new.is_dir()


def test_a_folder_that_is_swept_at_that_moment_is_made_again(tmp_path, monkeypatch):
    make, swept = type(tmp_path).mkdir, []

    def unlucky(path, *arguments, **options):
        make(path, *arguments, **options)
        if path.name == ".tmp-out-new" and not swept:
            swept.append(path)
            lock.sweep(tmp_path)
            assert not path.exists()

    monkeypatch.setattr(type(tmp_path), "mkdir", unlucky)
    with lock.scratch(tmp_path / "out") as new:
        assert new.is_dir()
    assert len(swept) == 1


def test_scratch_folders_without_locks_are_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_take", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOLCK, "not here")))
    left = left_by_a_dead_process(tmp_path / "out")  # or by a living one: who could tell
    with lock.scratch(tmp_path / "out") as one, lock.scratch(tmp_path / "out") as other:
        assert one != other
        (other / "file").touch()
        other.rename(tmp_path / "out")
    assert names(tmp_path) == [left.name, "out"]
    assert names(left / "out") == ["half"]


def test_no_link_leads_to_a_file_of_others(tmp_path):
    place = left_by_a_dead_process(tmp_path / "out")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (place / lock.NAME).unlink()
    (place / lock.NAME).symlink_to(precious)
    lock.sweep(tmp_path)
    assert precious.read_text() == "mine"
