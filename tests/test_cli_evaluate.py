"""mars-eval as its users meet it: what it writes and prints, and what it says to their mistakes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from mars.cli.evaluate import main
from mars.data import open_dataset
from mars.errors import ConfigError
from mars.evaluate import report
from tests.builtin import write

TABLE_1 = {"ndb_k", "pkid", "ikid", "pis", "iis", "mse", "mae", "fad"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, without anybody's weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MARS_WEIGHTS_DIR", raising=False)
    monkeypatch.setenv("MARS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def mars_eval(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeed(*arguments):
    result = mars_eval(*arguments)
    assert result.exit_code == 0, result.output
    return result


def test_a_run_is_printed_and_written(folder):
    real, fake = write(folder / "real", range(25)), write(folder / "fake", range(24), split="valid")
    files = folder / "out" / "report.json", folder / "out" / "report.html"
    result = succeed(
        "run", "--real", real, "--fake", fake, "--preset", "tiny", "--bins", 5, "--json", files[0], "--html", files[1]
    )
    document = json.loads(files[0].read_text())
    assert document["metrics"].keys() >= TABLE_1
    found = {name for name, metric in document["metrics"].items() if metric["value"] is not None}
    assert found >= TABLE_1 - {"fad"}
    assert "no VGGish weights" in document["metrics"]["fad"]["reason"]
    assert document["embedders"]["pitch-tiny"]["accuracy"] >= 0.7
    assert document["baselines"]["griffin-lim oracle"]["mse"]["value"] < document["metrics"]["mse"]["value"]
    for text in ("NDB/k", "real-vs-real", "anchor", document["fingerprint"][:12], "no VGGish weights"):
        assert text in " ".join(result.output.split()), text
    page = files[1].read_text()
    assert page.count("<audio") > 4
    assert "<script" not in page
    # The features are kept, and found again, out of the working directory.
    assert not (folder / "features").exists()
    assert len(list((folder / "cache" / "features").glob("pitch-tiny-*/part-*"))) >= 2
    again = folder / "again.json"
    succeed("run", "--real", real, "--fake", fake, "--preset", "tiny", "--bins", 5, "--json", again)
    one, other = report.read(files[0]), report.read(again)
    assert one.fingerprint == other.fingerprint
    assert {n: m.value for n, m in one.metrics.items()} == {n: m.value for n, m in other.metrics.items()}


def test_reconstructions_are_made_and_scored(folder):
    out = folder / "out"
    options = ("reconstruct", "-n", 5, "--metrics", "mse,mae", "--iterations", 4, "--out", out)
    succeed(*options)
    found = report.read(out / "report.json")
    assert len(list((out / "notes").glob("*.wav"))) == 5
    assert (found.mode, found.sets["real"].notes, found.produced["settings"]["iterations"]) == ("reconstruction", 5, 4)
    oracle = found.baselines["griffin-lim oracle"]["mse"].value
    assert oracle < found.metrics["mse"].value < 0.03
    assert (out / "report.html").is_file()
    assert succeed(*options).exit_code == 0  # once more, on the notes that are there
    assert report.read(out / "report.json").metrics["mse"].value == found.metrics["mse"].value
    refused = mars_eval("reconstruct", "-n", 5, "--metrics", "mse", "--iterations", 5, "--out", out)
    assert refused.exit_code == 2
    assert "was begun with" in refused.output


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--metrics", "fid"), 2, "unknown metric 'fid'"),
        (("--metrics", "mse,fad"), 2, "fad: no VGGish weights"),
        (("--train", "absent"), 2, "absent does not exist"),
        (("--pitch-classifier", "absent"), 2, "absent is not a classifier"),
        (("--out", "file/new"), 6, "file/new cannot be written (Not a directory); name another place"),
        (("--out", "taken"), 2, "taken/report.html is a folder; name a file"),
    ],
)
def test_mistakes_are_found_before_notes_are_made(folder, monkeypatch, options, code, message):
    (folder / "file").touch()
    (folder / "taken" / "report.html").mkdir(parents=True)
    for name in ("reconstruct", "generate_like"):
        monkeypatch.setattr(f"mars.evaluate.produce.{name}", None)
    for command in ("reconstruct", "generate"):
        result = mars_eval(command, "-n", 2, *options)
        assert message in " ".join(result.output.split())
        assert result.exit_code == code
    assert mars_eval("generate", "-n", 2, "--metrics", "copy_ratio").exit_code == 2
    assert sorted(file.name for file in folder.iterdir()) == ["file", "taken"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--json", "real"), 2, "real is a folder; name a file"),
        (("--html", "file/page.html"), 6, "file cannot be written (File exists); name another place"),
    ],
)
def test_a_report_that_cannot_be_written_is_found_before_scoring(folder, monkeypatch, options, code, message):
    write(folder / "real", range(2))
    (folder / "file").touch()
    monkeypatch.setattr("mars.evaluate.evaluation.evaluate", None)
    result = mars_eval("run", "--real", "real", "--fake", "real", *options)
    assert message in result.output
    assert result.exit_code == code


def test_notes_are_generated_like_the_real_ones_and_scored(folder):
    out = folder / "out"
    options = ("--metrics", "mse,mae,pitch_accuracy", "--preset", "tiny", "--iterations", 4, "--no-baselines")
    succeed("generate", "-n", 6, *options, "--out", out)
    found = report.read(out / "report.json")
    assert len(list((out / "notes").glob("*.wav"))) == 6
    assert (found.mode, found.sets["fake"].notes, found.baselines) == ("generation", 6, {})
    assert found.metrics["mse"].params["against"] == "nearest real note"
    assert found.metrics["pitch_accuracy"].details["notes"] == 6  # each was asked for a pitch


def test_a_network_that_nobody_asked_for_stops_nothing(folder, monkeypatch):
    real = write(folder / "real", range(2))
    (folder / "weights" / "pitch-full").mkdir(parents=True)
    (folder / "weights" / "pitch-full" / "classifier.json").write_text("{")
    (folder / "weights" / "vggish.safetensors").write_text("{")
    monkeypatch.setenv("MARS_WEIGHTS_DIR", str(folder / "weights"))
    options = ("run", "--real", real, "--fake", real, "--no-baselines")
    succeed(*options, "--metrics", "mse,mae")
    assert mars_eval(*options).exit_code == 2
    assert "vggish.safetensors" in mars_eval(*options, "--metrics", "fad").output


def test_the_same_notes_score_the_same_in_one_folder_or_another(folder):
    real = write(folder / "real", range(12))
    values = []
    for name in ("a", "b"):
        write(folder / name, range(12), split="valid")
        succeed("run", "--real", real, "--fake", folder / name, "--metrics", "mse", "--no-baselines", "--no-cache",
                "--json", folder / f"{name}.json")  # fmt: skip
        values.append(report.read(folder / f"{name}.json"))
    assert values[0].metrics["mse"].value == values[1].metrics["mse"].value
    assert not (folder / "features").exists()
    compared = succeed("compare", folder / "a.json", folder / "b.json")
    assert "mel MSE" in compared.output


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--metrics", "fid"), 2, "unknown metric 'fid'; known: ndb_k"),
        (("--metrics", "fad"), 2, "fad: no VGGish weights, which mars cannot ship: put vggish-10086976.pth"),
        (("--metrics", "pkid"), 2, "pkid: classifiers/pitch-full is not a classifier"),
        (("--metrics", "ndb_k"), 2, "ndb_k: want a note or more for each of 100 bins, got 12; have fewer"),
        (("--label-order", "as-published"), 2, "in the profile vinay2022 only"),
        (("--pairs", "--metrics", "mse"), 2, "has 12 notes, fake 11, and they must pair up by name"),
        (("--fake", "absent"), 2, "absent does not exist; give a folder of audio files or a packed dataset"),
        (("--pitch-classifier", "real"), 2, "real is not a classifier (no classifier.json)"),
    ],
)
def test_mistakes_are_explained(folder, monkeypatch, options, code, message):
    write(folder / "real", range(12))
    write(folder / "fake", range(11))
    result = mars_eval("run", "--real", "real", "--fake", "fake", "--no-baselines", *options)
    text = " ".join(result.output.split())
    assert message in text
    assert "Traceback" not in text
    assert result.exit_code == code


def test_a_place_for_notes_is_not_among_the_real_ones(folder):
    write(folder / "real", range(3))
    result = mars_eval("reconstruct", "--data", "real", "--metrics", "mse", "--out", "real/new")
    assert result.exit_code == 2
    assert "real/new is inside" in result.output
    assert not (folder / "real" / "new").exists()


def test_a_cache_that_cannot_be_written_is_found_early(folder):
    write(folder / "real", range(3))
    (folder / "cache").mkdir()
    (folder / "cache" / "features").touch()
    result = mars_eval("run", "--real", "real", "--fake", "real", "--metrics", "mse")
    assert result.exit_code == 2
    assert "features is not a folder" in result.output


@pytest.mark.parametrize("bad", ["silent", "stereo", "garbage"])
def test_files_that_cannot_be_used_are_named(folder, bad):
    write(folder / "real", range(12))
    fake = write(folder / "fake", range(12), split="valid")
    match bad:
        case "silent":
            soundfile.write(fake / "zero.wav", np.zeros(64_000), 16_000)
        case "stereo":
            soundfile.write(fake / "zero.wav", np.random.default_rng(0).uniform(-1, 1, (64_000, 2)), 16_000)
        case "garbage":
            (fake / "zero.wav").write_bytes(b"RIFF and no more")
    options = ("run", "--real", "real", "--fake", "fake", "--metrics", "mae", "--no-baselines", "--json", "x.json")
    result = mars_eval(*options)
    assert result.exit_code == 3
    assert "zero.wav" in result.output
    assert not (folder / "x.json").exists()
    shown = succeed(*options, "--allow-bad", "0.1")
    found = report.read(folder / "x.json").sets["fake"]
    assert (found.notes, [name for name, _ in found.refused]) == (12, ["zero.wav"])
    assert "zero.wav" in shown.output or "1 refused" in shown.output


def test_folders_that_pair_up_by_name_are_said_to(folder):
    write(folder / "real", range(6))
    write(folder / "same", range(6))
    write(folder / "other", range(6), split="valid")
    options = ("run", "--real", "real", "--metrics", "mse", "--no-baselines", "--no-cache", "--fake")
    hint = "note: every note of same has the name of a real one; if they are reconstructions"
    result = succeed(*options, "same")
    assert hint in " ".join(result.stderr.split())
    assert "--pairs" in result.stderr
    assert "note:" not in succeed(*options, "other").stderr
    assert "note:" not in succeed(*options, "same", "--pairs").stderr


@pytest.mark.parametrize("command", ["reconstruct", "generate"])
def test_the_built_in_notes_are_no_silent_stand_in_for_those_of_a_model(folder, monkeypatch, command):
    from mars import model

    def stop(*_):
        raise ConfigError("no further")

    monkeypatch.setattr("mars.evaluate.evaluation._Evaluation.begin", stop)  # before any note is made
    options = (command, "-n", 2, "--metrics", "mse", "--model")
    built_in, theirs = open_dataset(None).fingerprint, "f" * 64
    packaged = model.load()
    for name, data in (("none", {}), ("same", dict.fromkeys(("tokenizer", "var"), built_in)),
                       ("other", dict.fromkeys(("tokenizer", "var"), theirs))):  # fmt: skip
        packaged.data = data
        packaged.save(folder / name)
        result = mars_eval(*options, name)
        assert "no further" in result.stderr
        assert ("warning: other was not trained on the built-in notes" in result.stderr) == (name == "other")
    write(folder / "real", range(2))
    assert "warning" not in mars_eval(*options, "other", "--data", "real").stderr
