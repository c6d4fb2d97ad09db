"""A metric is one file: what is in it is computed, asked for by name, shown and written, and nothing else knows it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import soundfile
from click.testing import CliRunner
from rich.console import Console

from mars.cli.evaluate import main
from mars.data import open_dataset
from mars.evaluate import metrics, page, report, table
from mars.evaluate.metrics import catalogue
from mars.evaluate.scoring import Settings

FILE = '''
"""How loud notes are."""

from mars.evaluate.bootstrap import bootstrap_mean
from mars.evaluate.metrics.measure import Measure, Metric, Row, figure


def loudness(waveforms):
    return waveforms.square().mean(1).sqrt()


def _loudness(row: Row):
    found = bootstrap_mean(loudness(row.fake.notes.waveforms()), seed=row.conditions.seed)
    return {"loudness": figure(found, {"unit": "full scale"})}


MEASURES = (Measure(metrics=(Metric("loudness", "Loudness of notes", 0, 65),), compute={"standard": _loudness}),)
'''


@pytest.fixture
def loudness(tmp_path, monkeypatch):
    """A file more in the package."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "loudness.py").write_text(FILE)
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(folder)])
    yield "loudness"
    sys.modules.pop("mars.evaluate.metrics.loudness", None)
    vars(metrics).pop("loudness", None)


def test_every_file_of_the_package_is_found():
    files = {path.stem for path in Path(next(iter(metrics.__path__))).glob("*.py")}
    modules = {measure_of.__module__.rpartition(".")[2] for measure_of in functions()}
    assert modules <= files
    assert {"ndb", "kid", "inception_score", "mel_errors", "frechet", "kad", "prdc", "copy_ratio"} <= modules


def functions():
    """What computes the metrics."""
    return [getattr(f, "func", f) for measure in catalogue.measures() for f in measure.compute.values()]


def test_names_and_places_are_each_others_alone():
    every = [metric for measure in catalogue.measures() for metric in measure.metrics]
    assert len({metric.name for metric in every}) == len({metric.place for metric in every}) == len(every)
    assert [metric.place for metric in catalogue.table().values()] == sorted(metric.place for metric in every)


def test_the_published_profile_has_the_columns_of_the_published_table():
    expected = ("ndb_k", "pkid", "ikid", "pis", "iis", "mse", "mae", "fad")
    assert Settings(profile="vinay2022").possible == tuple(catalogue.table())[:8] == expected
    assert "copy_ratio" not in Settings(mode="reconstruction").possible


def test_a_new_file_is_a_new_metric(loudness, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = list(catalogue.table())
    assert names[names.index("mse") + 1] == loudness
    assert loudness in Settings().selected
    assert loudness not in Settings(profile="vinay2022").possible
    dataset = open_dataset(None)
    for name, rows in (("real", range(3)), ("fake", range(3, 6))):
        (tmp_path / name).mkdir()
        for i in dataset.split("test")[rows]:
            soundfile.write(tmp_path / name / f"{dataset.names[i]}.wav", dataset.waveforms([i])[0].numpy(), 16_000)
    options = ("run", "--real", "real", "--fake", "fake", "--metrics", "mse,loudness", "--no-cache")
    result = CliRunner().invoke(main, [*options, "--json", "report.json", "--html", "report.html"])
    assert result.exit_code == 0, result.output
    assert "Loudness" in result.stdout
    document = json.loads((tmp_path / "report.json").read_text())
    expected = dataset.waveforms(dataset.split("test")[3:6])[:, :64_000].square().mean(1).sqrt().mean()
    assert document["metrics"]["loudness"]["value"] == pytest.approx(float(expected), rel=1e-3)
    assert document["baselines"]["anchor"]["loudness"]["params"] == {"unit": "full scale"}
    assert "Loudness of notes" in (tmp_path / "report.html").read_text()
    assert "known: ndb_k" in CliRunner().invoke(main, [*options[:5], "--metrics", "fid"]).output


def test_a_report_says_how_its_metrics_are_shown(loudness, tmp_path, monkeypatch):
    """So it can be read where the metric is not known; one that does not say is shown by what is known."""
    heading = report.Heading("Loudness of notes", -1)
    figures = {"ndb_k": report.Figure(value=0.5), "loudness": report.Figure(value=0.25)}
    sets = {name: report.Sounds(source=name, notes=3, fingerprint="a" * 64) for name in ("real", "fake")}
    made = report.Report(
        profile="standard", mode="generation", seed=1, metrics=figures, baselines={}, sets=sets, embedders={},
        versions={}, device="cpu", threads=1, created="now", seconds=1.0, table={"loudness": heading},
    )  # fmt: skip
    report.write(tmp_path / "new.json", made)
    again = report.read(tmp_path / "new.json")
    assert again.table == {"loudness": heading}
    document = json.loads((tmp_path / "new.json").read_text())
    del document["table"]
    (tmp_path / "old.json").write_text(json.dumps(document))
    older = report.read(tmp_path / "old.json")
    assert older.fingerprint == made.fingerprint
    assert list(table.headings(again)) == ["loudness", "ndb_k"]
    assert table.headings(older)["ndb_k"] == report.Heading("NDB/k", -1)
    for shown, words in ((again, ("of notes ↓", "ndb k")), (older, ("of notes\n", "NDB/k ↓"))):
        console = Console(file=io.StringIO(), width=200)
        table.print_report(shown, console)
        assert all(word in console.file.getvalue() for word in words), console.file.getvalue()
        assert "Loudness of notes" in page.render(shown, [])
    assert table.headings(older, again)["loudness"] == report.Heading("Loudness of notes", 0)
