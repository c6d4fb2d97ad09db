"""Whole evaluations of synthetic notes, with networks that are a few lines long."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console

from mars.errors import ConfigError, DataError
from mars.evaluate import mel, page, report, table
from mars.evaluate.baselines import ANCHOR, ORACLE, REAL_VS_REAL, anchor
from mars.evaluate.embedders.classifier import Classifier, logits_vinay2022
from mars.evaluate.embedders.features import Embedding
from mars.evaluate.embedders.frontend import WHOLE_NOTE
from mars.evaluate.embedders.networks import build, initialise
from mars.evaluate.embedders.roles import ROLES
from mars.evaluate.metrics import catalogue, inception_score, kid, ndb
from mars.evaluate.scoring import Settings, evaluate
from mars.evaluate.sets import open_notes
from mars.pages.html import number
from mars.runtime import stream

PITCHES = range(45, 76)
BRIGHTNESS = {"bass": 3.0, "organ": 1.5, "brass": 0.7, "reed": 1.0}  # power by which partials fall


def note(pitch: int, family: str, chance: np.random.Generator) -> np.ndarray:
    """Partials that fall off and decay, over a little noise."""
    t = np.arange(64_000) / 16_000
    f = 440 * 2 ** ((pitch - 69) / 12)
    partials = [
        k ** -BRIGHTNESS[family] * np.sin(2 * np.pi * k * f * t + chance.uniform(0, 6)) * np.exp(-k * t / 4)
        for k in range(1, int(7500 / f))
    ]
    return 0.3 * np.sum(partials, 0) * np.exp(-t) + 1e-3 * chance.standard_normal(len(t))


def write(folder: Path, n: int, seed: int, start: int = 0) -> Path:
    """A folder of notes with NSynth names."""
    folder.mkdir()
    chance = np.random.default_rng(seed)
    for i in range(start, start + n):
        family, pitch = list(BRIGHTNESS)[i % 4], PITCHES[int(chance.integers(len(PITCHES)))]
        name = f"{family}_acoustic_{i:03d}-{pitch:03d}-100.wav"
        soundfile.write(folder / name, note(pitch, family, chance), 16_000)
    return folder


@dataclass(frozen=True)
class Listener:
    """Hears the loudest partial (pitch), the spectrum's shape (instrument) or its course (vggish)."""

    id: str
    classes: tuple[str, ...] | None
    sample_rate: int = 16_000
    dim: int = 12
    sha256: str = "0"
    front_end: str = "1"

    def embed(self, waveforms: torch.Tensor) -> Embedding:
        if self.id == "pitch":
            spectrum = torch.fft.rfft(waveforms.double(), 2**17).abs().float()
            hertz = 440 * 2 ** ((torch.tensor([int(c) for c in self.classes]) - 69) / 12)
            logits = spectrum[:, (hertz * 2**17 / 16_000).round().long()]
            return Embedding(logits[:, None, :12].contiguous(), logits)
        bands = mel.log_mel(waveforms)[:, 4:76].unflatten(1, (12, 6)).mean(2)  # (n, 12, 251)
        if self.id == "vggish":
            return Embedding(bands[:, :, :240].unflatten(2, (8, 30)).mean(3).mT.contiguous())
        return Embedding(bands.mean(2)[:, None], 20 * bands.mean(2)[:, :4])


def listeners() -> dict:
    """One for each role but CREPE."""
    return {
        "pitch": Listener("pitch", tuple(map(str, PITCHES))),
        "instrument": Listener("instrument", tuple(BRIGHTNESS)),
        "vggish": Listener("vggish", None),
        "crepe": "no crepe here",
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("sets")
    return {
        "real": write(base / "real", 40, seed=1),
        "fresh": write(base / "fresh", 30, seed=2, start=100),
        "cache": base / "cache",
    }


def assess(folders, fake, settings=None, embedders=None, **options):
    real = open_notes(folders["real"])
    return evaluate(
        real, fake, embedders or listeners(), settings or Settings(bins=5), cache=folders["cache"], **options
    ).report


@pytest.fixture(scope="module")
def generated(folders):
    """A report of notes as good as real ones."""
    return assess(folders, open_notes(folders["fresh"]))


def values(metrics):
    return {name: m.value for name, m in metrics.items()}


def test_every_metric_has_a_value_or_a_reason(generated):
    assert tuple(generated.metrics) == tuple(catalogue.table())
    assert tuple(generated.baselines) == (REAL_VS_REAL, ORACLE, ANCHOR)
    for row in (generated.metrics, *generated.baselines.values()):
        for name, metric in row.items():
            assert (metric.value is None) == bool(metric.reason), name
            if metric.low is not None:
                assert metric.low <= metric.value <= metric.high
    missing = {name: m.reason for name, m in generated.metrics.items() if m.value is None}
    assert missing == {
        "copy_ratio": "want the training notes (`train`)",
        **dict.fromkeys(("pis_crepe", "pkid_crepe", "pitch_accuracy_crepe"), "no crepe here"),
    }
    assert (generated.metrics["pkid"].n_real, generated.metrics["pkid"].n_fake) == (40, 30)
    halves = generated.baselines[REAL_VS_REAL]["pkid"]
    assert (halves.n_real, halves.n_fake, halves.embedder) == (20, 20, "pitch")


def test_degraded_notes_score_worse_but_keep_their_pitch(generated):
    """The anchor is real notes low-passed at 1 kHz and reduced to 8 bit; the networks of this test hear timbre."""
    floor, oracle, worse = (values(generated.baselines[name]) for name in (REAL_VS_REAL, ORACLE, ANCHOR))
    good = values(generated.metrics)
    for name in ("mse", "mae", "ikid", "fad", "fad_classifier", "kad", "kad_classifier"):
        assert worse[name] > 1.5 * max(oracle[name], 0), name
    for name in ("mse", "mae", "ikid"):
        assert worse[name] > 1.5 * max(good[name], 0), name
    for name in ("mse", "mae", "fad", "fad_classifier"):
        assert oracle[name] < floor[name], name  # the same notes, but for their phase
    assert good["pitch_accuracy"] == 1
    assert worse["pitch_accuracy"] >= oracle["pitch_accuracy"] > 0.9  # low partials are what it goes by


def test_the_order_of_files_does_not_matter(folders, generated, tmp_path):
    shuffled = np.random.default_rng(3).permutation(sorted(folders["fresh"].iterdir()))
    for i, file in enumerate(shuffled):
        folder = tmp_path / f"{i:03d}"
        folder.mkdir()
        shutil.copy(file, folder)  # the name says the pitch, the folder the place
    again = assess(folders, open_notes(tmp_path), baselines=False)
    assert values(again.metrics) == values(generated.metrics)
    assert again.fingerprint == generated.fingerprint


def test_reconstructions_are_compared_with_their_originals(folders, tmp_path):
    real = open_notes(folders["real"])
    louder = tmp_path / "louder"
    louder.mkdir()
    for name, waveform in zip(real.names, real.waveforms().numpy(), strict=True):
        soundfile.write(louder / name, 0.5 * waveform, 16_000)
    fake = open_notes(louder)
    actual = assess(folders, fake, Settings(mode="reconstruction", bins=5))
    expected = mel.mel_errors(mel.log_mel(real.waveforms()), mel.log_mel(fake.waveforms()))
    assert actual.metrics["mse"].value == pytest.approx(float(expected.mse.mean()), rel=1e-9)
    assert actual.metrics["mae"].value == pytest.approx(float(expected.mae.mean()), rel=1e-9)
    assert actual.metrics["mse"].params["against"] == "the original"
    assert "copy_ratio" not in actual.metrics
    floor = actual.baselines[REAL_VS_REAL]
    assert (floor["mse"].value, floor["mse"].reason) == (None, "the notes have no originals to be compared with")
    assert floor["ikid"].value is not None
    (louder / real.names[0]).unlink()
    with pytest.raises(DataError, match=r"has 40 notes, .* 39, and they must pair up"):
        assess(folders, open_notes(louder), Settings(mode="reconstruction", bins=5))


def classifiers() -> dict:
    """Networks that have learnt nothing, but are classifiers."""
    return listeners() | {
        task: Classifier(
            id=f"{task}-tiny", task=task, classes=None, pipeline=WHOLE_NOTE, sha256=task,
            network=initialise(build("tiny", outputs), outputs).eval(), document={"gate": None, "validation": None},
        )
        for task, outputs in (("pitch", 27), ("instrument", 10))
    }  # fmt: skip


def test_the_published_profile_is_that_of_the_published_programs(folders):
    real = open_notes(folders["real"])
    fake = anchor(open_notes(folders["fresh"]))
    networks, settings = classifiers(), Settings(profile="vinay2022", bins=5)
    actual = assess(folders, fake, settings, networks, baselines=False)
    assert tuple(actual.metrics) == Settings(profile="vinay2022").possible
    assert actual.metrics["pkid"].reason == "want as many notes to evaluate as real ones, got 30 and 40"
    for name, role in (("pis", "pitch"), ("iis", "instrument")):
        expected = inception_score.inception_score_vinay2022(networks[role].embed(fake.waveforms()).logits)
        assert actual.metrics[name].value == pytest.approx(expected.mean, rel=1e-5)
        assert actual.metrics[name].details["shuffled"] == pytest.approx(expected.mean, rel=1e-5)  # they fill no batch
    bins = ndb.fit_bins_vinay2022(mel.log_mel(real.waveforms()).flatten(1), 5, seed=2020)
    expected = ndb.different_bins(bins, mel.log_mel(fake.waveforms()).flatten(1)).ratio
    assert actual.metrics["ndb_k"].value == expected
    thirty = real.subset(range(30))

    def with_thirty(settings):
        return evaluate(thirty, fake, networks, settings, cache=folders["cache"], baselines=False).report

    equal, swapped = with_thirty(settings), with_thirty(replace(settings, as_published=True))
    logits = [logits_vinay2022(networks["pitch"], notes, key=i) for i, notes in enumerate((thirty, fake))]
    assert equal.metrics["pkid"].value == pytest.approx(kid.kid_vinay2022(*logits).mean, rel=1e-4)
    for name in Settings(profile="vinay2022").possible:
        other = {"pkid": "ikid", "ikid": "pkid", "pis": "iis", "iis": "pis"}.get(name, name)
        assert swapped.metrics[name].value == equal.metrics[other].value
        assert swapped.metrics[name].embedder == equal.metrics[other].embedder
    assert swapped.metrics["pkid"].params["label_order"] == "as published"
    assert swapped.fingerprint != equal.fingerprint


def test_the_published_score_is_given_in_another_order_too(folders, monkeypatch):
    monkeypatch.setattr(inception_score, "BATCH", 5)
    fake, settings = open_notes(folders["fresh"]), Settings(profile="vinay2022", metrics=("pis",))
    found = assess(folders, fake, settings, baselines=False).metrics["pis"]
    logits = listeners()["pitch"].embed(fake.waveforms()).logits
    order = torch.randperm(len(logits), generator=stream(settings.seed))
    ordered, shuffled = (inception_score.inception_score_vinay2022(x).mean for x in (logits, logits[order]))
    assert (found.value, found.details["shuffled"]) == pytest.approx((ordered, shuffled), rel=1e-5)
    assert abs(shuffled - ordered) > 1e-3 * ordered


def test_the_real_notes_are_heard_once_in_training_mode(folders, monkeypatch):
    heard = []

    def logits(made, notes, *, seed, key, progress):
        heard.append((notes.source, key))
        return logits_vinay2022(made, notes, seed=seed, key=key)

    monkeypatch.setattr(kid, "logits_vinay2022", logits)
    real = open_notes(folders["real"]).subset(range(6))
    settings = Settings(profile="vinay2022", metrics=("pkid",))
    found = evaluate(real, anchor(real), classifiers(), settings, cache=folders["cache"]).report
    assert found.metrics["pkid"].value == found.baselines[ANCHOR]["pkid"].value
    source = str(folders["real"])
    assert sorted(heard)[:3] == [(source, 0), (source, 0), (source, 1)]  # all of them, and both halves
    assert len(heard) == 6


def test_copies_of_training_notes_are_found(folders, tmp_path):
    train = open_notes(write(tmp_path / "train", 40, seed=7, start=300))
    copies = assess(folders, train.subset(range(0, 40, 2)), train=train)
    honest = assess(folders, open_notes(folders["fresh"]), train=train, baselines=False)
    assert copies.metrics["copy_ratio"].value == 0
    assert copies.metrics["copy_ratio"].details["below_half"] == 1
    assert 0.7 < honest.metrics["copy_ratio"].value < 1.4
    assert 0.7 < copies.baselines[REAL_VS_REAL]["copy_ratio"].value < 1.4
    assert copies.baselines[ANCHOR]["copy_ratio"].reason == "want notes that may be copies"
    real = open_notes(folders["real"])
    twins = assess(folders, real.subset(range(10)), Settings(metrics=("copy_ratio",)), train=train, baselines=False)
    assert twins.metrics["copy_ratio"].value == 1000  # the real notes themselves: as far from copies as can be
    found = honest.metrics["ndb_k"]
    assert (found.params["reference"], found.params["n_reference"]) == ("train", 40)
    assert 0 <= found.details["floor"] <= 1


def test_metrics_that_are_named_must_be_there(folders):
    fresh = open_notes(folders["fresh"])
    with pytest.raises(ConfigError, match="pis_crepe: no crepe here"):
        assess(folders, fresh, Settings(metrics=("mse", "pis_crepe")))
    with pytest.raises(DataError, match="ndb_k: want a note or more for each of 100 bins, got 40; have fewer"):
        assess(folders, fresh, Settings(metrics=("ndb_k",)))
    found = assess(folders, fresh, Settings(metrics=("mae",)))
    assert tuple(found.metrics) == ("mae",)
    assert tuple(found.baselines[ANCHOR]) == ("mae",)
    assert found.embedders == {}
    for settings, message in (
        ({"metrics": ("fid",)}, "unknown metric 'fid'; known: ndb_k, pkid"),
        ({"metrics": ("kad",), "profile": "vinay2022"}, "kad is not computed for generation in the profile vinay2022"),
        ({"metrics": ("copy_ratio",), "mode": "reconstruction"}, "copy_ratio is not computed for reconstruction"),
        ({"as_published": True}, "exists in the profile vinay2022 only"),
    ):
        with pytest.raises(ConfigError, match=message):
            Settings(**settings)


def test_classes_that_nobody_knows_give_no_accuracy(folders):
    embedders = listeners() | {"instrument": "none", "vggish": "none"}
    heard = embedders["pitch"].embed

    @dataclass(frozen=True)
    class Unnamed(Listener):
        def embed(self, waveforms):
            return heard(waveforms)

    embedders["pitch"] = Unnamed("pitch", None, sha256="2")
    found = assess(folders, open_notes(folders["fresh"]), embedders=embedders, baselines=False)
    assert found.metrics["pitch_accuracy"].reason == "nobody knows which class of pitch is which"
    assert found.metrics["pkid"].value is not None


def test_the_fingerprint_is_that_of_the_protocol(folders, generated, tmp_path):
    fresh = open_notes(folders["fresh"])
    plain = assess(folders, fresh, baselines=False).fingerprint
    assert plain == generated.fingerprint
    assert assess(folders, anchor(fresh), baselines=False).fingerprint == plain  # other notes, the same protocol
    others = {
        "seed": assess(folders, fresh, Settings(bins=5, seed=1), baselines=False),
        "bins": assess(folders, fresh, Settings(bins=6), baselines=False),
        "number": assess(folders, fresh.subset(range(29)), baselines=False),
        "weights": assess(
            folders,
            fresh,
            embedders=listeners() | {"pitch": replace(listeners()["pitch"], sha256="9")},
            baselines=False,
        ),
    }
    assert len({plain, *(other.fingerprint for other in others.values())}) == 5
    assert generated.metrics["ndb_k"].details["explained"] > 0.5
    assert "explained" not in generated.protocol["metrics"]["ndb_k"]  # a result, which threads may round differently
    path = tmp_path / "report.json"
    report.write(path, generated)
    again = report.read(path)
    assert again == generated
    document = json.loads(path.read_text())
    assert document["metrics"]["mse"]["value"] == generated.metrics["mse"].value
    assert document["fingerprint"] == generated.fingerprint == again.fingerprint


def test_reports_that_are_none_are_refused(generated, tmp_path):
    path = tmp_path / "report.json"
    report.write(path, generated)
    document = json.loads(path.read_text())
    for change, message in (
        ({"format": "x"}, "is not a report of mars-eval"),
        ({"version": 2}, "want mars-evaluation version 1, got 2"),
        ({"metrics": {"mse": {"value": "much"}}}, "metrics.mse.value must be a float, got 'much'"),
        ({"metrics": {"mse": {"value": float("inf")}}}, "Infinity is no JSON number"),
        ({"sets": None}, "sets must be a JSON object, got None"),
        ({"sets": {}}, "is damaged"),
        ({"profile": "own"}, "profile must be one of standard, vinay2022"),
        ({"embedders": {"pitch": {}}}, "is damaged"),
    ):
        path.write_text(json.dumps(document | change))
        with pytest.raises(DataError, match=message):
            report.read(path)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        report.read(path)
    with pytest.raises(DataError, match="does not exist"):
        report.read(tmp_path / "absent.json")


def test_roles_are_all_there():
    assert set(listeners()) == set(ROLES)
    for settings, expected in (
        (Settings(), set(ROLES)),
        (Settings(profile="vinay2022"), {"pitch", "instrument", "vggish"}),
        (Settings(metrics=("mse", "ndb_k")), set()),
        (Settings(metrics=("mse", "pis")), {"pitch"}),
        (Settings(profile="vinay2022", metrics=("pis",), as_published=True), {"instrument"}),
    ):
        assert settings.roles == expected


def test_a_value_and_its_interval_are_of_one_estimate_and_the_means_of_parts_are_details(generated, folders):
    fresh, real = open_notes(folders["fresh"]), open_notes(folders["real"])
    for name, role in (("pis", "pitch"), ("iis", "instrument"), ("pkid", "pitch"), ("ikid", "instrument")):
        actual, network = generated.metrics[name], listeners()[role]
        ours = network.embed(fresh.waveforms())
        if name.endswith("is"):
            expected = inception_score.inception_score(ours.logits, seed=2020)
            parts = actual.details["splits_mean"], actual.details["splits_std"]
            assert expected.mean != pytest.approx(expected.full.value, rel=1e-3)
        else:
            theirs = network.embed(real.waveforms())
            expected = kid.kid(theirs.frames[:, 0], ours.frames[:, 0], subset_size=15, seed=2020)
            parts = actual.details["subsets_mean"], actual.details["subsets_std"]
        full = expected.full.value, expected.full.low, expected.full.high
        assert (actual.value, actual.low, actual.high) == pytest.approx(full, rel=1e-3, abs=1e-6)
        assert parts == pytest.approx((expected.mean, expected.std), rel=1e-3, abs=1e-6)
        assert actual.params["of"] == "all notes at once"


def test_page_table_and_file_show_the_same_figures(generated, tmp_path):
    report.write(tmp_path / "report.json", generated)
    written = json.loads((tmp_path / "report.json").read_text())
    drawn = page.render(generated, [])
    console = Console(file=io.StringIO(), width=400)
    table.print_report(generated, console)
    shown = console.file.getvalue()
    for row in (written["metrics"], *written["baselines"].values()):
        for name, metric in row.items():
            if "low" in metric:
                value, low, high = (metric[key] for key in ("value", "low", "high"))
                assert f"{number(value)}, interval {number(low)} to {number(high)}." in drawn, name
                assert f"{number(value)}<small>[{number(low)}, {number(high)}]</small>" in drawn, name
                assert number(value) in shown
                assert f"[{number(low, 3)}, {number(high, 3)}]" in shown, name


def test_an_older_report_whose_interval_is_of_another_estimate_is_shown_without(generated, tmp_path):
    path = tmp_path / "report.json"
    report.write(path, generated)
    document = json.loads(path.read_text())
    document["metrics"]["pis"] |= {"value": 2.5, "point": 21.0, "low": 18.0, "high": 24.0}
    path.write_text(json.dumps(document))
    found = report.read(path)
    assert (found.metrics["pis"].value, found.metrics["pis"].low, found.metrics["pis"].high) == (2.5, None, None)
    assert found.metrics["mse"] == generated.metrics["mse"]
