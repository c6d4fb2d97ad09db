"""Evaluations from Python: what `mars-eval` does, with typed values and without a word of the command line."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

import mars.evaluate
from mars.errors import ConfigError
from mars.evaluate import Options, evaluation, report
from tests.builtin import write


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, without anybody's weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MARS_WEIGHTS_DIR", raising=False)
    return tmp_path


def test_notes_of_a_folder_are_scored(folder):
    real, fake = write(folder / "real", range(6)), write(folder / "fake", range(5), split="valid")
    done, messages = set(), []
    result = mars.evaluate.run(
        real,
        fake,
        Options(metrics=("mse", "mae")),
        json_file=folder / "out" / "report.json",
        say=messages.append,
        progress=lambda what, done_, of: done.add(what),
    )
    assert result.files == (folder / "out" / "report.json",)
    assert report.read(result.files[0]).fingerprint == result.report.fingerprint
    assert tuple(result.report.metrics) == ("mse", "mae")
    assert (result.report.mode, result.report.sets["fake"].notes) == ("generation", 5)
    assert f"read {fake}" in done
    assert messages == []
    assert sorted(path.name for path in folder.iterdir()) == ["fake", "out", "real"]  # no features are kept
    copied = mars.evaluate.run(real, real, Options(metrics=("mse",), baselines=False), say=messages.append)
    assert copied.report.metrics["mse"].value == 0
    (message,) = messages
    assert message.startswith(f"note: every note of {real} has the name of a real one")
    assert "say so with `pairs`" in message


@pytest.mark.parametrize("name", ["reconstruct", "generate"])
def test_notes_are_made_and_scored(folder, name):
    begun = []
    options = Options(metrics=("mse",), baselines=False, device="cpu", seed=3)
    result = getattr(mars.evaluate, name)(None, options, n=3, iterations=2, begun=begun.append)
    (out,) = begun
    assert out.parent.name == "evaluations"
    assert result.files == (out / "report.json", out / "report.html")
    assert all(file.is_file() for file in result.files)
    assert len(list((out / "notes").glob("*.wav"))) == 3
    assert result.report.produced["settings"]["seed"] == result.report.seed == 3
    again = getattr(mars.evaluate, name)(out, options, n=3, iterations=2)  # goes on, with nothing left to make
    assert again.report.metrics["mse"].value == result.report.metrics["mse"].value


def test_mistakes_are_found_before_anything_is_made(folder):
    data = write(folder / "data", range(2))
    (folder / "cache").touch()
    for call, message in (
        (lambda: mars.evaluate.run(data, data, Options(cache=folder / "cache", metrics=("mse",))), "is not a folder"),
        (lambda: mars.evaluate.generate(data / "new", Options(metrics=("mse",)), data=data), "is inside"),
        (lambda: mars.evaluate.generate(None, Options(metrics=("copy_ratio",))), "copy_ratio: want the training notes"),
        (lambda: mars.evaluate.reconstruct(None, Options(metrics=("fid",))), "unknown metric 'fid'"),
    ):
        with pytest.raises(ConfigError, match=message) as raised:
            call()
        assert " --" not in str(raised.value)
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "data"]


def test_two_in_one_second_get_a_folder_each(folder, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    prepared = evaluation._Evaluation("generation", Options(metrics=("mse",)), None, None)
    made = [prepared.begin(None, None, None) for _ in range(2)]
    assert [path.as_posix() for path in made] == ["evaluations/20260101-000000", "evaluations/20260101-000000-2"]
    assert all(path.is_dir() for path in made)
    with pytest.raises(ConfigError, match="is inside"):
        prepared.begin(None, folder, None)
    assert len(list((folder / "evaluations").iterdir())) == 2


def test_a_profile_has_reports_of_its_own(tmp_path):
    names = {profile: [file.name for file in evaluation.report_files(tmp_path, profile)] for profile in report.PROFILES}
    assert names["standard"] == ["report.json", "report.html"]
    assert names["vinay2022"] == ["report-vinay2022.json", "report-vinay2022.html"]


def test_silent_notes_are_refused_or_left_out(folder):
    real, fake = write(folder / "real", range(4)), write(folder / "fake", range(4), split="valid")
    soundfile.write(fake / "zero.wav", np.zeros(64_000), 16_000)
    options = Options(metrics=("mse",), baselines=False, allow_bad=0.5)
    assert mars.evaluate.run(real, fake, options).report.sets["fake"].refused[0][0] == "zero.wav"
