"""The log, the samples and the report of a run: complete, harmless to the training, readable whatever happened."""

from __future__ import annotations

import base64
import dataclasses
import errno
import io
import json
import math
import shutil
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mars import audio, config, runtime
from mars.cli.train import main
from mars.config import override
from mars.errors import CheckpointError, ConfigError, Diverged
from mars.models.tokenizer import Tokenizer
from mars.runs import compare, report, samples
from mars.runs.distributed import ALONE, World
from mars.runs.folder import RunFolder
from mars.runs.log import read_log
from mars.runs.samples import Sampler
from mars.runs.watch import Watch
from mars.train import loop
from mars.train.deadline import Deadline
from mars.train.tokenizer import TokenizerStage
from mars.train.tokens import tokenize
from mars.train.var import VARStage
from tests.page_parser import Page

CPU = torch.device("cpu")
SETTINGS = (
    *("train.steps=8", "train.batch_size=3", "train.accumulate=1", "train.log_every=2", "train.precision=float32"),
    *("train.validate_every=4", "train.save_every=4", "train.sample_every=3"),
)


def make(kind: str, smoke, notes, *extra: str):
    c = override(smoke, (*SETTINGS, *extra), kind)
    if kind == "tokenizer":
        return TokenizerStage(c, notes, CPU, seed=4)
    torch.manual_seed(0)
    tokenizer = Tokenizer(c).eval().requires_grad_(False)
    return VARStage(c, notes, tokenizer, tokenize(tokenizer, c, notes, ALONE, lambda n: None), CPU, seed=4)


def train(stage, path: Path, notes, sampler="own", said=None, **options) -> Path:
    """One session of a run, as `mars.train.start` arranges it."""
    if not path.exists():
        path.mkdir()
        config.save(stage.config, path / "config.json")
        kind = "var" if isinstance(stage, VARStage) else "tokenizer"
        record = {"stage": kind, "preset": "smoke", "seed": 4, "data": "0" * 64, "created": time.time()}
        (path / "run.json").write_text(json.dumps({**record, "notes": 11, "train_notes": 8}))
    sampler = Sampler(stage, notes, 4) if sampler == "own" else sampler
    say = (lambda text: None) if said is None else said.append
    watch = Watch(RunFolder(path), stage.train, say, sampler, device=CPU, tensorboard=options.pop("tensorboard", False))
    console = Console(file=io.StringIO())
    loop.run(stage, RunFolder(path), notes.split("train"), seed=4, console=console, watch=watch, **options)
    return path


@pytest.fixture(scope="module", params=["tokenizer", "var"])
def run(request, tmp_path_factory, smoke, notes) -> Path:
    """A finished run."""
    return train(make(request.param, smoke, notes), tmp_path_factory.mktemp(request.param) / "a run", notes)


def contents(path: Path, *folders: str) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for f in folders for p in (path / f).rglob("*") if p.is_file()}


def write_log(path: Path, *records: object, torn: str = "") -> Path:
    path.mkdir(exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (path / "log.jsonl").write_text("".join(f"{line}\n" for line in lines) + torn)
    return path


def test_a_run_logs_what_it_takes(run):
    log = read_log(run)
    assert [s for s, _ in log.series("loss")] == [2, 4, 6, 8]
    assert [v for _, v in log.series("epoch")] == [0.75, 1.5, 2.25, 3.0]
    assert all(100 < v < 1e5 for _, v in log.series("memory_mb"))
    assert [e["event"] for e in log.events()] == ["started", "samples", "samples", "samples", "finished"]
    assert all("time" in r for r in log.records)
    assert log.unreadable == 0
    assert log.state() == "finished"


def test_later_lines_take_back_those_of_later_steps(tmp_path):
    first = [{"step": s, "loss": float(s)} for s in (10, 20, 30, 40)]
    again = [{"step": 20, "event": "started"}, {"step": 30, "loss": -3.0}]
    log = read_log(write_log(tmp_path, *first[:2], {"step": 20, "val_mse": 1.0}, *first[2:], *again))
    assert log.series("loss") == [(10, 10), (20, 20), (30, -3)]
    assert log.series("val_mse") == [(20, 1)]
    assert read_log(write_log(tmp_path, *first, first[1], {"step": 20, "loss": 5.0})).series("loss") == [
        (10, 10),
        (20, 5),
    ]


def test_half_a_line_is_left_out(tmp_path):
    write_log(tmp_path, {"step": 1, "loss": 1.0}, "[1]", '{"step": "2"}', "NaN", {"step": 3, "loss": None}, torn='{"st')
    log = read_log(tmp_path)
    assert log.series("loss") == [(1, 1), (3, None)]
    assert log.unreadable == 3


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["loss", "val_mse"]))))
def test_the_log_is_in_order_and_has_each_line_once(tmp_path_factory, lines):
    path = write_log(tmp_path_factory.mktemp("log"), *({"step": s, n: float(i)} for i, (s, n) in enumerate(lines)))
    found = [(r["step"], "val_mse" in r) for r in read_log(path).records]
    assert [s for s, _ in found] == sorted(s for s, _ in found)
    assert len(set(found)) == len(found)
    if lines:
        assert (lines[-1][0], lines[-1][1] == "val_mse") in found


def test_states(tmp_path):
    now = time.time()
    started, line = {"step": 0, "event": "started", "time": now - 9.1e5}, {"step": 5, "loss": 1.0, "time": now - 9e5}
    assert read_log(write_log(tmp_path, started, line)).state() == "killed"
    assert read_log(write_log(tmp_path, started, {**line, "time": now})).state() == "running"
    for end in ("finished", "stopped", "diverged"):
        assert read_log(write_log(tmp_path, started, line, {"step": 5, "event": end})).state() == end
    again = {"step": 5, "event": "started", "time": now}
    assert read_log(write_log(tmp_path, started, line, {"step": 5, "event": "stopped"}, again)).state() == "running"


def test_a_lock_says_whether_it_runs(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    write_log(tmp_path, {"step": 0, "event": "started", "time": time.time()})
    with (tmp_path / ".lock").open("w") as lock:
        assert read_log(tmp_path).state() == "killed"
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_log(tmp_path).state() == "running"


def test_the_time_of_all_sessions_counts(tmp_path):
    times = [(0, "started", 100.0), (5, None, 110.0), (5, "started", 500.0), (9, None, 540.0)]
    lines = [{"step": s, "time": t, **({"event": e} if e else {"loss": 1.0})} for s, e, t in times]
    assert read_log(write_log(tmp_path, *lines)).seconds == 50


def test_memory_is_what_the_process_took():
    before = runtime.process_peak(CPU)
    block = np.ones(40_000_000)
    assert runtime.process_peak(CPU) >= min(before, block.nbytes) > 0


def test_samples_come_in_time_and_originals_once(run):
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        *("originals", "step-00000003", "step-00000006", "step-00000008"),
    ]
    for folder in (run / "samples").iterdir():
        names = json.loads((folder / "samples.json").read_text())["names"]
        assert len(names) == 3  # as many as are held out
        assert {p.name for p in folder.iterdir()} == {
            "samples.json",
            *(f"{i}.{k}" for i in range(3) for k in ("wav", "png")),
        }
        for file in folder.glob("*.wav"):
            with wave.open(str(file)) as sound:
                assert (sound.getnframes(), sound.getframerate()) == (1900, 16_000)


def test_originals_are_the_notes(run, notes):
    names = json.loads((run / "samples/originals/samples.json").read_text())["names"]
    assert names == ["n8", "n9", "n10"]
    for i, note in enumerate((8, 9, 10)):
        waveform, _ = soundfile.read(run / f"samples/originals/{i}.wav", dtype="int16")
        assert np.array_equal(waveform, notes.audio[note])


@pytest.mark.parametrize("kind", ["tokenizer", "var"])
def test_watching_changes_no_weight_and_resuming_no_sample(kind, tmp_path, smoke, notes):
    watched = train(make(kind, smoke, notes), tmp_path / "watched", notes)
    train(make(kind, smoke, notes), tmp_path / "unwatched", notes, sampler=None)
    for most in (2, 5, 8):
        train(make(kind, smoke, notes), tmp_path / "parts", notes, max_steps=most)
    same = contents(watched, "model", "checkpoints/step-00000008")
    assert contents(tmp_path / "unwatched", "model", "checkpoints/step-00000008") == same
    assert contents(tmp_path / "parts", "model", "checkpoints/step-00000008") == same
    steps = ("samples/step-00000003", "samples/step-00000006", "samples/step-00000008", "samples/originals")
    assert contents(tmp_path / "parts", *steps) == contents(watched, *steps)
    assert not (tmp_path / "unwatched/samples").exists()
    assert not (tmp_path / "unwatched/report.html").exists()


@pytest.mark.parametrize("kind", ["tokenizer", "var"])
def test_training_notes_are_never_called_held_out(kind, tmp_path, smoke, notes):
    metadata = notes.metadata.copy()
    metadata[:, 5] = 0
    all_trained = dataclasses.replace(notes, metadata=metadata)
    run = train(make(kind, smoke, all_trained), tmp_path / "run", all_trained)
    log = read_log(run)
    assert [s for s, _ in log.series("loss")] == [2, 4, 6, 8]
    assert not [name for record in log.records for name in record if name.startswith("val_")]
    assert log.best() is None
    assert not (run / "best").exists()
    summary = compare.summary(run)
    assert (summary["validation"], summary["best"]) == (None, None)
    assert "held-out" not in (run / "report.html").read_text()
    names = json.loads((run / "samples/originals/samples.json").read_text())["names"]
    assert names == [f"n{i} (a training note)" for i in (0, 3, 6, 10)]


def test_a_var_is_asked_for_the_conditions_of_the_notes(smoke, notes):
    stage = make("var", smoke, notes)
    made = Sampler(stage, notes, 4).samples(stage.snapshot())
    # The family of notes 8 to 10 is not among those trained on, so it is left to chance; the source of 8 and 9 is.
    assert [s.name.rpartition(", pitch")[2] for s in made] == [f" {p}, velocity 100" for p in (48, 49, 50)]
    assert [s.name.split()[0] for s in made[:2]] == ["electronic", "synthetic"]


def test_a_var_without_conditions_has_no_originals(tmp_path, smoke, notes):
    run = train(make("var", smoke, notes, "var.condition=[]"), tmp_path / "run", notes)
    assert not (run / "samples/originals").exists()
    page = parsed(run)
    assert [alt for alt in page.alts if "original" in alt] == []
    assert len([alt for alt in page.alts if "generated: note" in alt]) == 9


def test_reconstructions_are_the_model_s(smoke, notes):
    stage = make("tokenizer", smoke, notes, "train.precision=bfloat16")  # but notes are coded in float32
    sampler, model = Sampler(stage, notes, 4), stage.snapshot()
    for made, original in zip(sampler.samples(model), sampler.originals(model), strict=True):
        x = audio.multiplexed(original.waveform[None], smoke.audio)
        expected = audio.demultiplexed(stage.ema(x)[0].clamp(-1, 1), smoke.audio)[0]
        torch.testing.assert_close(made.spectrogram, expected, rtol=0, atol=1e-4)
        assert made.waveform.abs().max() <= 1
        assert made.picture.shape == (64, 32, 3)


def test_only_the_main_process_writes(tmp_path, smoke, notes):
    stage = make("tokenizer", smoke, notes)
    stage.world = World(1, 2)
    watch = Watch(RunFolder(tmp_path, world=World(1, 2)), stage.train, print, Sampler(stage, notes, 4), device=CPU)
    with watch.session(0):
        watch.log({"step": 3, "loss": 1.0})
        watch.show(3, last=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("every", "wanted"), [(0, []), (100, [8]), (4, [4, 8])])
def test_how_often_is_a_setting(every, wanted, tmp_path, smoke, notes):
    run = train(make("tokenizer", smoke, notes, f"train.sample_every={every}"), tmp_path / "run", notes)
    assert [int(p.name[5:]) for p in sorted((run / "samples").glob("step-*"))] == wanted
    assert (run / "report.html").is_file()


def test_time_is_kept_for_what_follows_the_next_step(tmp_path, smoke, notes, monkeypatch):
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(Deadline, "leaves_time_for", lambda self, *kinds: asked.append(kinds) is None)
    train(make("tokenizer", smoke, notes), tmp_path / "run", notes, max_time=1e6)
    always = ("step", "save")
    assert asked == [
        *(always, always, (*always, "samples"), (*always, "validation")),
        *(always, (*always, "samples"), always, (*always, "validation", "samples")),
    ]


def test_samples_are_whole_or_absent(tmp_path, monkeypatch):
    good = [samples.Sample("a", torch.zeros(100), torch.zeros(8, 8))]
    (tmp_path / ".tmp-step-00000001").mkdir()
    samples.write(tmp_path / "x", good, 100)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    before = contents(tmp_path, "x")
    bad = [*good, samples.Sample("b", torch.full((100,), math.nan), torch.zeros(8, 8))]
    for path in (tmp_path / "x", tmp_path / "y"):
        with pytest.raises(ValueError, match="NaN"):
            samples.write(path, bad, 100)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert contents(tmp_path, "x") == before


@pytest.mark.parametrize(
    "error", [RuntimeError("cuFFT\n[/x] failed"), CheckpointError("not finite"), ValueError("bug")]
)
def test_samples_that_fail_do_not_stop_the_training(error, tmp_path, smoke, notes, monkeypatch):
    stage, said = make("tokenizer", smoke, notes), []
    sampler = Sampler(stage, notes, 4)
    monkeypatch.setattr(sampler, "samples", lambda model: (_ for _ in ()).throw(error))
    run = train(stage, tmp_path / "run", notes, sampler, said)
    assert len(said) == 3
    assert said[0].startswith(f"warning: no samples of step 3, training goes on: {type(error).__name__}: ")
    assert "\n" not in said[0]
    assert read_log(run).state() == "finished"
    assert "No samples of step 8: " in (run / "report.html").read_text()
    assert list((run / "samples").glob("*")) == []


def test_weights_that_are_not_finite_make_no_samples(smoke, notes):
    stage = make("tokenizer", smoke, notes)
    with torch.no_grad():
        stage.ema.head.bias.fill_(math.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        Sampler(stage, notes, 4).samples(stage.snapshot())


def test_a_report_that_fails_does_not_stop_the_training(tmp_path, smoke, notes, monkeypatch):
    monkeypatch.setattr("mars.runs.report.render", lambda run: {}["bug"])
    said: list[str] = []
    run = train(make("tokenizer", smoke, notes), tmp_path / "run", notes, said=said)
    assert "warning: no report of step 0, training goes on: KeyError: 'bug'" in said
    assert read_log(run).state() == "finished"


@pytest.mark.parametrize("what", ["mars.runs.samples.write_png", "mars.pages.html.write_atomically"])
def test_a_full_disk_stops_the_training_after_its_save(what, tmp_path, smoke, notes, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    stage = make("tokenizer", smoke, notes, "train.sample_every=4")
    train(stage, tmp_path / "run", notes, max_steps=2)
    monkeypatch.setattr(what, full)
    with pytest.raises(OSError, match="No space left"):
        train(stage, tmp_path / "run", notes)
    assert read_log(tmp_path / "run").series("loss")[-1][0] in (2, 4)


def test_a_diverged_run_says_so(tmp_path, smoke, notes):
    stage = make("tokenizer", smoke, notes, "train.steps=30")
    step = stage.step
    stage.step = lambda n, *rest: step(n, *rest) | ({"loss": math.nan} if n > 3 else {})
    with pytest.raises(Diverged):
        train(stage, tmp_path / "run", notes)
    assert compare.summary(tmp_path / "run")["state"] == "diverged"
    page = parsed(tmp_path / "run")
    assert any(text.startswith("Training diverged: 10 steps in a row") for text in page.texts)
    assert any("loss: not finite" in text or "training: not finite" in text for text in page.texts)
    train(make("tokenizer", smoke, notes, "train.steps=30"), tmp_path / "run", notes)
    assert compare.summary(tmp_path / "run")["state"] == "finished"
    assert "Training diverged" not in (tmp_path / "run/report.html").read_text()


def parsed(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"), 1900, run)


def test_the_report_shows_the_run(run):
    page = parsed(run)
    shown = " ".join(page.texts)
    for text in ("a run", "finished", "8 of 8", "Learning rate", "Gradient norm", "Speed", "Memory", "Settings"):
        assert text in shown
    var = "Tokenizer" not in shown and "Accuracy" in shown
    scales = ("Loss", "Accuracy") if var else ("Perplexity of the codes", "Codes used")
    assert all(shown.count(title) >= 1 for title in scales)
    assert page.tags.count("svg") == len([t for t in page.tags if t == "figure"]) - 3 - 9
    assert len(page.alts) == 3 + 9  # originals; three notes at three steps
    assert page.tags.count("audio") == 12
    assert page.tags.count("details") == 3  # two earlier steps and the settings
    assert all(source.startswith("data:") for source in page.sources)
    assert "train.var.lr" in page.texts if var else "train.tokenizer.lr" in page.texts
    assert "audio.n_fft" in page.texts


def test_sounds_survive_the_report(run):
    first = next(s for s in parsed(run).sources if s.startswith("data:audio"))
    waveform, _ = soundfile.read(io.BytesIO(base64.b64decode(first.partition(",")[2])), dtype="int16")
    original, _ = soundfile.read(run / "samples/originals/0.wav", dtype="int16")
    assert np.array_equal(waveform, original)


def test_what_does_not_fit_is_linked(tmp_path, smoke, notes, monkeypatch):
    run = train(make("tokenizer", smoke, notes), tmp_path / "50% of a #run?", notes)
    size = len((run / "report.html").read_bytes())
    monkeypatch.setattr("mars.runs.report.EMBEDDED", 30_000)
    report.write(run)
    page = parsed(run)
    linked = [s for s in page.sources if not s.startswith("data:")]
    assert 0 < len(linked) < len(page.sources)
    assert page.sources[0].startswith("data:")  # the newest stays
    assert linked[-1].startswith("samples/step-00000003/")
    assert any("keep this file in its run folder" in text for text in page.texts)
    assert len(page.text) < size


def test_the_command_makes_it_again(run):
    before = contents(run, "")
    (run / "report.html").unlink()
    done = CliRunner().invoke(main, ["report", str(run)])
    assert (done.exit_code, done.output) == (0, f"{run / 'report.html'}\n")
    assert contents(run, "").keys() == before.keys()
    parsed(run)


@pytest.mark.parametrize("lines", [0, 1, 2, 4])
def test_a_report_of_little_or_nothing(lines, run, tmp_path):
    for name in ("run.json", "config.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / "log.jsonl").write_bytes(b"\n".join((run / "log.jsonl").read_bytes().splitlines()[:lines]))
    report.write(tmp_path)
    parsed(tmp_path)


HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=y>"


def test_names_cannot_smuggle_anything_in(run, tmp_path):
    path = tmp_path / HOSTILE.replace("/", "\u2044")
    path.mkdir()
    for name in ("run.json", "config.json", "log.jsonl"):
        (path / name).write_bytes((run / name).read_bytes())
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**record, "tokenizer": HOSTILE, "preset": HOSTILE, "data": HOSTILE}))
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "preset": HOSTILE}))
    with (path / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 8, HOSTILE: 1.0, "device": HOSTILE}) + "\n")
        log.write(json.dumps({"step": 8, "event": "failed", "what": HOSTILE, "reason": HOSTILE}) + "\n")
        log.write(json.dumps({"step": 8, "event": "started", "mars": HOSTILE, "device": HOSTILE, "time": 1.0}) + "\n")
    hostile = [samples.Sample(HOSTILE + "\ud800", torch.zeros(1900), torch.zeros(8, 8))]
    samples.write(samples.folder(path, 8), hostile, 16_000)
    report.write(path)
    page = parsed(path)
    assert sum(HOSTILE in text for text in page.texts) >= 7


def test_a_collapsed_scale_raises_an_alarm(run, tmp_path):
    for name in ("run.json", "config.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    lines = [(2, [0]), (4, [0, 2]), (6, [2, 99]), (8, [2])]
    write_log(tmp_path, *({"step": s, "loss": 1.0, "collapsed": c, "skipped": 3} for s, c in lines))
    report.write(tmp_path)
    alarms = [text for text in parsed(tmp_path).texts if text.startswith(("Scale ", "Steps that"))]
    assert alarms == [
        "Scale 4x4 has collapsed: few of its codes in use since step 4.",
        "Steps that were not finite and changed nothing: 3.",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", None, "not a run folder"),
        ("run.json", "{", "cannot be read as JSON"),
        ("run.json", "[]", "must hold a JSON object"),
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", None, "does not exist"),
    ],
)
def test_what_is_no_run_has_no_report(name, text, message, run, tmp_path):
    for file in ("run.json", "config.json"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    done = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.splitlines()) == 1
    with pytest.raises(ConfigError):
        report.write(tmp_path)


def test_tensorboard_gets_all_of_it(tmp_path, smoke, notes):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for most in (5, 8):
        train(make("tokenizer", smoke, notes), tmp_path / "run", notes, tensorboard=True, max_steps=most)
    found = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    logged = [(s, pytest.approx(v)) for s, v in read_log(tmp_path / "run").series("loss")]
    assert [(e.step, e.value) for e in found.Scalars("training/loss")] == logged
    assert [e.step for e in found.Images("sample/2")] == [3, 5, 6, 8]
    assert [e.step for e in found.Audio("original/0")] == [3]


def test_listing_runs_does_not_wait_for_pytorch(run):
    code = "import sys; from mars.cli.train import main; main(sys.argv[1:], standalone_mode=False)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules", "list", str(run)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "8/8" in done.stdout


def test_runs_are_listed_newest_first_with_the_broken_ones(run, tmp_path):
    runs = tmp_path / "runs"
    for i, name in enumerate(("old", "new")):
        (runs / name).mkdir(parents=True)
        for file in ("run.json", "config.json", "log.jsonl"):
            (runs / name / file).write_bytes((run / file).read_bytes())
        record = json.loads((runs / name / "run.json").read_text())
        (runs / name / "run.json").write_text(json.dumps({**record, "created": 1e9 * (i + 1)}))
    (runs / ".tmp-x").mkdir()
    (runs / "a file").write_text("")
    (runs / "empty").mkdir()
    broken = {
        "cut": '{"sta',
        "list": "[]",
        "other": '{"stage": "x", "created": 1}',
        "odd": '{"stage": [], "created": 1}',
        "late": '{"stage": "var", "created": 1e300}',
        "many": '{"stage": "var", "preset": ["x"], "created": 1}',
    }
    for name, text in {**broken, "deep": "[" * 100_000, "when": '{"stage": "var", "created": "x"}'}.items():
        (runs / name).mkdir()
        (runs / name / "run.json").write_text(text)
        (runs / name / "config.json").write_bytes((run / "config.json").read_bytes())
    done = CliRunner().invoke(main, ["list", str(runs), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert [Path(s["run"]).name for s in found][:2] == ["new", "old"]
    assert {Path(s["run"]).name for s in found[2:]} == {"empty", "when", "deep", *broken}
    assert all(s["problem"] for s in found[2:])
    best = "val_loss" if found[0]["stage"] == "var" else "val_mse"
    log = read_log(run)
    assert found[0] == {
        "run": str(runs / "new"),
        "problem": None,
        "bytes": sum(p.stat().st_size for p in (runs / "new").iterdir()),
        "stage": log and found[0]["stage"],
        "preset": "smoke",
        "state": "finished",
        "step": 8,
        "steps": 8,
        "loss": log.last("loss"),
        "validated_by": best,
        "validation": log.last(best),
        "best": min(v for _, v in log.series(best)),
        "best_step": found[0]["best_step"],
        "notes_per_s": log.last("notes_per_s"),
        "created": 2e9,
    }
    table = CliRunner().invoke(main, ["list", str(runs)]).output.splitlines()
    assert table[0].split()[:4] == ["run", "stage", "preset", "state"]
    assert "8/8" in table[1]
    assert f"{runs / 'empty'}: no run.json" in table
    assert len(table) == 12


SENSELESS = (
    {"step": 9, "loss": "much", "notes_per_s": [1], "memory_mb": {}, "epoch": "x", "val_mse": "low", "val_loss": None},
    {"step": 9, "event": ["started"], "skipped": {"a": []}, "collapsed": [[], "x", None]},
    {"step": 9, "event": "started", "device": [], "mars": None, "time": "now"},
    {"step": 10**30, "event": "samples", "lr": 10**400},
)


def test_a_run_with_a_senseless_log_is_listed_and_reported(run, tmp_path):
    for place in ("good", "bad"):
        (tmp_path / place).mkdir()
        for name in ("run.json", "config.json", "log.jsonl"):
            (tmp_path / place / name).write_bytes((run / name).read_bytes())
    with (tmp_path / "bad/log.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in SENSELESS)
    listed = CliRunner().invoke(main, ["list", str(tmp_path)])
    assert listed.exit_code == 0, listed.output
    assert len(listed.output.splitlines()) == 3
    made = CliRunner().invoke(main, ["report", str(tmp_path / "bad")])
    assert made.exit_code == 0, made.output


def test_a_sound_that_is_none_is_one_line_of_the_report(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for sound in (tmp_path / "run/samples").glob("*/0.wav"):
        sound.write_bytes(b"RIFF")
    made = CliRunner().invoke(main, ["report", str(tmp_path / "run")])
    assert made.exit_code == 2, made.output
    assert "0.wav cannot be read as a sound" in made.output
    assert len(made.output.splitlines()) == 1


def test_a_single_run_and_a_missing_one(run, tmp_path, monkeypatch):
    done = CliRunner().invoke(main, ["list", str(run), str(run)])
    assert len(done.output.splitlines()) == 2
    done = CliRunner().invoke(main, ["list", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert "is not a folder" in done.output
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["list"])
    assert (done.exit_code, done.output) == (0, "no runs; train one: mars-train tokenizer\n")
