"""Faults, one in sixteen of those of `make reliability`: no checkpoint is lost, wrong or left half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEAST = {  # trials of each trainer
    "SIGKILL at a random moment": 6,
    "crash at every": 20,
    "power cut": 20,
    "ENOSPC, EDQUOT or EIO": 20,
    "damaged checkpoint": 30,
    "disk full": 3,
    "SIGTERM, SIGINT or SIGUSR1": 3,
    "the same signal again": 1,
    "NaN or infinity": 2,
    "two trainers": 2,
}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The campaigns, in a process of their own: this one has threads and should not fork."""
    report = tmp_path_factory.mktemp("reliability") / "rows.json"
    command = [sys.executable, "-m", "scripts.reliability", "--share", "0.06", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert report.is_file(), done.stderr
    return json.loads(report.read_text())


@pytest.mark.parametrize("trainer", ["tokenizer", "var"])
@pytest.mark.parametrize("fault", LEAST)
def test_nothing_is_lost(fault, trainer, rows):
    (row,) = [r for r in rows if r["fault"].startswith(fault) and trainer in r["fault"].split(", ")]
    assert row["trials"] >= LEAST[fault]
    assert row["failures"] == []


def test_killed_generation_goes_on(rows):
    (row,) = [r for r in rows if r["fault"].startswith("SIGKILL at a random moment of mars-generate")]
    assert row["trials"] >= 3
    assert row["failures"] == []
