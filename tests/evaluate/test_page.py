"""The page of a report: complete, well formed, harmless, and of bounded size."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import replace

import pytest
import soundfile
import torch

from mars import audio
from mars.evaluate import page, table
from mars.evaluate.metrics import catalogue
from mars.evaluate.page import Pair
from mars.evaluate.report import Figure
from tests.page_parser import Page
from tests.reports import plausible

SAMPLES = 4000
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=y>\ud800"


def pair(title, *names, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return Pair(title, {name: 0.1 * torch.randn(SAMPLES, generator=chance) for name in names})


def parsed(report, pairs=()):
    return Page(page.render(report, pairs), SAMPLES)


def test_the_page_shows_the_report(tmp_path):
    made = plausible()
    path = tmp_path / "new/report.html"
    page.write(path, made, [pair("a note", "real", "evaluated", "griffin-lim oracle", "anchor")])
    found = Page(path.read_text(encoding="utf-8"), SAMPLES)
    shown = " ".join(found.texts)
    assert "Evaluation, standard profile, reconstruction" in found.texts
    for text in (
        *("nsynth (test)", "out/notes", "4,094 evaluated, 4,096 real", made.fingerprint[:12], "2020", "1 h 9 min"),
        *("mars 0.1.0, torch 2.13.0", "c.wav: unreadable", "p" * 64, "0.9312", "settings.iterations", "f" * 64),
        *("fingerprint " + made.fingerprint[:12], "must not be put beside them", "evaluate in the profile"),
    ):
        assert text in shown
    assert found.texts.count("a note") == 1
    assert [alt.split(";")[0] for alt in found.alts] == [
        f"Spectrogram, {what}: a note" for what in ("real", "evaluated", "griffin-lim oracle", "anchor")
    ]
    assert found.tags.count("audio") == 4
    assert found.tags.count("svg") == len(catalogue.table())
    assert found.tags.count("details") == len(catalogue.table()) + 1  # the files that were refused
    assert all(source.startswith("data:") for source in found.sources)


def test_every_figure_is_there_with_its_interval():
    made = plausible()
    found = parsed(made)
    cells = found.texts[found.texts.index("Figures") : found.texts.index("Not measured")]
    for row in table.rows(made).values():
        for metric in row.values():
            if metric.value is not None:
                assert table.number(metric.value) in cells
            if metric.low is not None:
                assert f"[{table.number(metric.low)}, {table.number(metric.high)}]" in cells
    assert [text for text in cells if text.endswith(("↓", "↑"))] == [
        f"{heading.label} {table.arrow(heading)}" for heading in catalogue.headings().values()
    ]
    assert [text for text in cells if text in table.rows(made)] == list(table.rows(made))


def test_a_bar_is_of_the_estimate_that_its_interval_is_of():
    drawn = page.render(plausible(), [])
    assert "evaluated: 6.412, interval 6.156 to 6.668." in drawn  # PIS, as read out


def test_what_is_missing_is_explained_once():
    made = plausible(lacking=("fad", "fad_infinity", "kad"))
    found = parsed(made)
    assert "FAD, FAD∞, KAD: no VGGish weights" in found.texts
    assert "copy ratio (anchor): no copies of those" in found.texts
    assert found.text.count("no VGGish weights") == 1
    assert "FAD ↓" not in found.texts
    assert found.tags.count("svg") == len(catalogue.table()) - 3


def test_a_report_without_any_figure_is_a_page():
    found = parsed(plausible(lacking=tuple(catalogue.table()), embedders={}, produced={}, baselines={}))
    assert "Charts" not in found.texts
    assert "Not measured" in found.texts
    assert found.tags.count("table") == 1  # the sets


def test_the_profile_of_the_published_baselines_says_what_it_is_for():
    shown = " ".join(parsed(plausible(profile="vinay2022")).texts)
    assert "for a number beside Table 1 of the paper" in shown
    assert "evaluate in the profile" not in shown


def test_names_cannot_smuggle_anything_in(tmp_path):
    hostile = Figure(
        value=1.0, low=0.5, high=2.0, embedder=HOSTILE, params={HOSTILE: HOSTILE}, details={"x": [HOSTILE]}
    )
    made = plausible()
    sets = {
        name: replace(sounds, source=HOSTILE, fingerprint=HOSTILE, refused=((HOSTILE, HOSTILE),))
        for name, sounds in made.sets.items()
    }
    made = replace(
        made,
        **dict.fromkeys(("profile", "mode", "device", "created"), HOSTILE),
        metrics={HOSTILE: hostile, "fad": Figure(reason=HOSTILE)},
        baselines={HOSTILE: {HOSTILE: hostile}},
        sets={**sets, HOSTILE: sets["fake"]},
        embedders={HOSTILE: {"sha256": HOSTILE, "front_end": HOSTILE}},
        versions={"mars": HOSTILE, HOSTILE: HOSTILE},
        produced={HOSTILE: HOSTILE},
    )
    path = tmp_path / "report.html"
    page.write(path, made, [pair(HOSTILE, HOSTILE)])
    found = Page(path.read_text(encoding="utf-8"), SAMPLES)
    assert sum("<script>" in text for text in found.texts) >= 30
    assert "default-src 'none'" in found.text


def test_sounds_survive_the_page():
    given = pair("a", "real", "evaluated")
    found = parsed(plausible(), [given])
    sounds = [source for source in found.sources if source.startswith("data:audio")]
    for source, waveform in zip(sounds, given.sounds.values(), strict=True):
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(source.partition(",")[2])), dtype="int16")
        assert rate == 16_000
        assert torch.equal(torch.from_numpy(samples), torch.from_numpy(audio.pcm(waveform)))


def test_pairs_that_do_not_fit_are_left_out_and_counted(monkeypatch):
    pairs = [pair(f"note {i}", "real", "evaluated", seed=i) for i in range(3)]
    whole = parsed(plausible(), pairs)
    assert not any("Left out" in text for text in whole.texts)
    monkeypatch.setattr(page, "EMBEDDED", 2 * len("".join(whole.sources)) * 3 // 4 // 3)  # of three, base64 undone
    found = parsed(plausible(), pairs)
    assert found.tags.count("audio") == 4
    assert "Left out, so that this file stays small: 1 of 3." in found.texts
    assert found.sources == whole.sources[:8]


@pytest.mark.parametrize("sound", [torch.zeros(1, 9), torch.tensor([math.nan]), torch.zeros(9, dtype=torch.int16)])
def test_what_is_no_waveform_is_refused(sound, tmp_path):
    with pytest.raises(ValueError, match=r"^pcm: "):
        page.write(tmp_path / "report.html", plausible(), [Pair("a", {"real": sound})])
    assert list(tmp_path.iterdir()) == []
