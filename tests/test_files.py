"""Files and folders that nobody else gets."""

from __future__ import annotations

import threading

from mars.files import new_folder


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
