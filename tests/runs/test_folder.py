"""The run folder: what it keeps, what it refuses, who may use it, and what a stopped trainer leaves."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from mars import checkpoint, config, files, lock, model
from mars.cli.errors import user_errors
from mars.cli.train import main
from mars.errors import CheckpointError, DiskError, Diverged
from mars.runs import folder
from mars.runs.folder import Best, Position, RunFolder
from mars.terminal import PlainConsole
from mars.train import loop, start
from mars.train.deadline import Deadline
from mars.train.divergence import BadSteps
from mars.train.tokenizer import TokenizerStage
from tests.train.test_loop import NOTES, Counter, lines, steps_saved

IDENTITY = {"seed": 1, "data": "abc", "config": {"train": {"lr": 0.1, "steps": 10}}}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def go(stage, run: RunFolder, **settings) -> str:
    output = io.StringIO()
    loop.run(stage, run, NOTES, seed=1, console=Console(file=output, width=500, soft_wrap=True), **settings)
    return output.getvalue()


class Judged(Counter):
    """A stage whose validations give these losses."""

    def __init__(self, losses, **settings) -> None:
        super().__init__(**{"validate_every": 1, "save_every": 100, "steps": len(losses)} | settings)
        self.losses = losses

    def validate(self):
        return {"val_loss": self.losses[len(self.seen) - 1]}

    def save(self, path):
        path.mkdir(exist_ok=True)
        (path / "weight").write_text(str(float(self.weight)))


def test_the_best_is_saved_exported_and_kept(path):
    stage = Judged([5.0, 3.0, 4.0, float("nan"), 3.0, 3.5, 3.2, 3.3], keep=2, save_every=2)
    go(stage, RunFolder(path))
    assert json.loads((path / "best.json").read_text()) == {"step": 2, "metric": "val_loss", "value": 3.0}
    assert steps_saved(path) == [2, 6, 8]
    assert (path / "best" / "weight").read_text() == str(float(0 + 1))
    assert (path / "model" / "weight").read_text() == str(float(sum(range(8))))


def test_a_validation_that_improves_saves(path):
    go(Judged([3.0, 4.0, 2.0, 5.0, 6.0], keep=9), RunFolder(path))
    assert steps_saved(path) == [1, 3, 5]


def test_the_best_does_not_depend_on_where_the_run_was_stopped(path, tmp_path):
    losses = [9.0, 1.0, 8.0, 7.0, 9.0, 9.0]  # the second is not among the regular validations
    (tmp_path / "straight").mkdir()
    go(Judged(losses, validate_every=3), RunFolder(tmp_path / "straight"))
    for stop in (2, 4, 6):
        stage = Judged(losses, validate_every=3)
        stage.seen = [None] * (stop - 2)
        go(stage, RunFolder(path), max_steps=stop)
    for name in ("best.json", "best/weight", "checkpoints/step-00000006/state.json"):
        assert (path / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert json.loads((path / "best.json").read_text())["step"] == 3


def test_a_kill_between_checkpoint_and_record_is_put_right(path):
    run = RunFolder(path)
    go(Judged([2.0, 1.0]), run)
    (path / "best.json").write_text('{"step": 1, "metric": "val_loss", "value": 2.0}')
    assert run.restore(Counter(), print).best == Best(2, "val_loss", 1.0)
    assert json.loads((path / "best.json").read_text())["step"] == 2


def test_a_damaged_later_checkpoint_does_not_push_out_a_good_one(path):
    go(Counter(keep=1, save_every=100), RunFolder(path), max_steps=3)
    go(Counter(keep=9, save_every=100), RunFolder(path), max_steps=7)
    (path / "checkpoints" / "step-00000007" / "model.safetensors").write_bytes(b"damaged")
    go(Counter(keep=1, save_every=100), RunFolder(path), max_steps=5)
    assert steps_saved(path) == [5]
    checkpoint.verify(path / "checkpoints" / "step-00000005")


def test_val_mse_is_judged_where_there_is_no_loss():
    position = Position(3)
    assert not position.improves({"val_mae": 0.1})
    assert position.improves({"val_mse": 0.2, "val_mae": 0.1})
    assert position.best == Best(3, "val_mse", 0.2)
    assert not position.improves({"val_mse": 0.2})


def test_the_best_model_can_be_loaded(smoke, notes, path):
    c = config.override(smoke, ("train.steps=2", "train.batch_size=2", "train.validate_every=1"), "tokenizer")
    stage = TokenizerStage(c, notes, torch.device("cpu"), 0)
    loop.run(stage, RunFolder(path), notes.split("train"), seed=0, console=Console(file=io.StringIO()))
    assert model.load(path / "best").config == c


def test_the_state_says_what_it_belongs_to(path):
    RunFolder(path, IDENTITY).save(Position(4, 1, Best(2, "val_loss", 0.5)), Counter())
    state = json.loads((path / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state.pop("versions").keys() == {"mars", "torch", "numpy", "python", "device", "threads"}
    best = {"step": 2, "metric": "val_loss", "value": 0.5}
    assert state == {"format": 1, "step": 4, "skipped": 1, "best": best, **IDENTITY}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed is 1, not 2"),
        ({"data": "xyz"}, "data is abc, not xyz"),
        ({"tokenizer_hash": "f"}, "tokenizer_hash is None, not f"),
        ({"config": {"train": {"lr": 0.1, "steps": 20}}}, r"config\.train\.steps is 10, not 20"),
        ({"config": {"train": 3}}, r"config\.train is \{.*\}, not 3"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, message, path):
    RunFolder(path, IDENTITY).save(Position(4), Counter())
    with pytest.raises(CheckpointError, match=rf"step-00000004 is of another run: {message}"):
        RunFolder(path, IDENTITY | change).restore(Counter(), print)


def test_settings_that_came_later_are_no_difference(path):
    RunFolder(path, IDENTITY).save(Position(4), Counter())
    later = {"config": {"train": {"lr": 0.1, "steps": 10, "new": True}}}
    assert RunFolder(path, IDENTITY | later).restore(Counter(), print) == Position(4)


def test_other_versions_are_one_warning(path, monkeypatch):
    RunFolder(path).save(Position(4), Counter())
    messages: list[str] = []
    RunFolder(path).restore(Counter(), messages.append)
    assert messages == []
    monkeypatch.setattr(folder, "VERSIONS", {**folder.VERSIONS, "torch": "9.9", "numpy": "0.1"})
    assert RunFolder(path).restore(Counter(), messages.append) == Position(4)
    (line,) = messages
    assert f"written with torch {torch.__version__}, not 9.9; numpy {np.__version__}, not 0.1; going on" in line


@pytest.mark.parametrize("change", [{"threads": 99}, {"device": "cuda"}, {"threads": None}])
def test_other_threads_or_another_device_are_a_warning_where_a_checkpoint_says_so(change, path):
    RunFolder(path).save(Position(4), Counter())
    (saved,) = RunFolder(path).checkpoints()
    state = checkpoint.read_json(saved / "state.json")
    state["versions"] |= change
    if None in change.values():  # an older checkpoint, which does not say
        state["versions"] = {n: v for n, v in state["versions"].items() if n not in ("device", "threads")}
    tensors = {file.stem: checkpoint.read_tensors(file) for file in saved.glob("*.safetensors")}
    checkpoint.replace_directory(saved, tensors, {"state": state})
    messages: list[str] = []
    assert RunFolder(path).restore(Counter(), messages.append) == Position(4)
    assert len(messages) == (None not in change.values())
    assert all(f"written with {name} {value}, not " in messages[0] for name, value in change.items() if value)


@pytest.mark.parametrize(
    "change",
    [
        {"step": None},
        {"step": "x"},
        {"skipped": None},
        {"best": {"step": 1}},
        {"best": 3},
        {"format": 2},
        {"step": 3},
        {"skipped": -1},
        {"versions": []},
    ],
    ids=str,
)
def test_a_state_that_makes_no_sense_is_passed_over(change, path):
    run = RunFolder(path)
    run.save(Position(2), Counter())
    run.save(Position(4), Counter())
    state = json.loads((path / "checkpoints" / "step-00000004" / "state.json").read_text()) | change
    tensors = {"model": {"weight": torch.zeros(())}}
    checkpoint.replace_directory(path / "checkpoints" / "step-00000004", tensors, {"state": state})
    messages: list[str] = []
    assert run.restore(Counter(), messages.append).step == 2
    assert "step-00000004" in messages[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_saved(value, path):
    stage = Counter()
    stage.act = lambda step: stage.weight.fill_(value) and None if step == 4 else None
    with pytest.raises(Diverged, match=r"weight of model is not finite after step 8, which is not saved"):
        go(stage, RunFolder(path))
    assert steps_saved(path) == [4]


def test_the_log_has_every_step_once(path):
    go(Counter(), RunFolder(path), max_steps=4)
    with (path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 4}\nnull\n{"step": 6, "lo')
    go(Counter(), RunFolder(path))
    assert [r["step"] for r in lines(path) if "loss" in r] == list(range(1, 11))
    (path / "log.jsonl").unlink()
    go(Counter(), RunFolder(path))  # nothing left to do, no log needed


def test_a_full_disk_names_the_log(path):
    (path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"log\.jsonl: No space left on device; make room"):
        RunFolder(path).log({"step": 1})


def test_skipped_steps_are_counted_over_all_sessions(path):
    for stop in (4, 10):
        stage = Counter()
        stage.act = lambda step: float("nan") if step in (1, 2, 6) else None
        go(stage, RunFolder(path), max_steps=stop)
    assert [r["skipped"] for r in lines(path) if "loss" in r] == [0, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_bad_steps_are_listed(path):
    bad, metrics = BadSteps(path / "diverged.json"), {"loss": torch.tensor(float("nan")), "grad_norm": 2.5, "lr": 1.0}
    for step in range(1, 10):
        bad.add(step, metrics, [f"note {step}"])
    assert not bad.report.exists()
    with pytest.raises(Diverged, match=r"10 steps in a row .* the last at step 10; .*listed in .*diverged\.json"):
        bad.add(10, {"loss": float("-inf")}, ["a", "b"])
    listed = json.loads(bad.report.read_text())
    assert listed[0] == {"step": 1, "loss": "nan", "grad_norm": 2.5, "notes": ["note 1"]}
    assert listed[-1] == {"step": 10, "loss": "-inf", "notes": ["a", "b"]}
    assert len(listed) == 10


def test_diverged_runs_name_the_notes(path):
    stage = Counter()
    stage.act = lambda step: float("nan")
    names = [f"n{i}" for i in range(7)]
    with pytest.raises(Diverged):
        go(stage, RunFolder(path), names=names)
    listed = json.loads((path / "diverged.json").read_text())
    assert [e["notes"] for e in listed] == [
        [names[i] for i in loop.batch_indices(1, s, 2, NOTES).tolist()] for s in range(10)
    ]


def test_a_deadline_keeps_time_for_what_is_to_come(wait):
    limit = Deadline(10.0, {"save": 4.0})
    assert limit.leaves_time_for("step", "save")
    with limit.timed("step"):
        wait(3)
    with limit.timed("step"):
        wait(1)
    assert limit.leaves_time_for("step")  # 4 gone, 3 more
    assert not limit.leaves_time_for("step", "save")  # and 4
    with limit.timed("save"):
        wait(1)
    assert limit.leaves_time_for("step", "save")  # measured: 1
    assert not Deadline(-1.0).leaves_time_for("step")
    assert Deadline(None, {"save": 1e9}).leaves_time_for("save")


def test_a_run_ends_before_its_time_limit(path, wait, monkeypatch):
    stage = Judged([1.0] * 40, validate_every=4, save_every=7)
    stage.act = lambda step: wait(1)
    save = RunFolder.save
    monkeypatch.setattr(RunFolder, "save", lambda *a: (wait(6), save(*a)))
    validate = stage.validate
    stage.validate = lambda: (wait(4), validate())[1]
    began = wait()
    go(stage, RunFolder(path), max_time=41)
    # 4 steps, a validation, a save; 3 steps, a save; 1 step, a validation; 3 steps, the last of which leaves no time
    # for another with its validation and the last save.
    assert wait() - began == 4 + 4 + 6 + 3 + 6 + 1 + 4 + 3 + 6
    assert steps_saved(path) == [4, 7, 11]


SMALL = (
    *("audio.n_fft=128", "audio.hop=64", "audio.bins=64", "audio.frames=32", "audio.samples=1900", "audio.cmx=2,1"),
    *("tokenizer.patch=16,16", "tokenizer.width=8", "tokenizer.scales=[1,2]", "tokenizer.codebook_size=8"),
    *("train.steps=4", "train.batch_size=2", "train.validate_notes=2"),
)


@pytest.fixture
def train(notes, monkeypatch):
    """mars-train tokenizer on the small notes, for a few steps."""
    monkeypatch.setattr(start, "open_dataset", lambda path: notes)

    def train(out, *arguments):
        settings = [word for setting in SMALL for word in ("--set", setting)]
        fixed = ["tokenizer", "--device", "cpu", "--preset", "smoke", "--out", str(out), *settings]
        return CliRunner().invoke(main, [*fixed, *map(str, arguments)])

    return train


@pytest.mark.parametrize("name", ["with space", "ünï-ćødé 音", "x" * 200, "a=b,c;d'e", "~", "-"])
def test_any_name_will_do(name, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out, steps in ((tmp_path / name, 2), (Path(".", name), 4)):  # also relative
        result = train(out, "--max-steps", steps)
        assert result.exit_code == 0, result.output
    assert steps_saved(tmp_path / name) == [2, 4]
    assert model.load(tmp_path / name).config.preset == "smoke"


def test_two_in_one_second_get_a_run_each(notes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "open_dataset", lambda path: notes)
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    settings = {"preset": "smoke", "overrides": tuple(SMALL), "device": "cpu", "max_steps": 1}
    runs = [start.train("tokenizer", **settings, seed=seed) for seed in (1, 2)]
    assert [run.name for run in runs] == [f"tokenizer-smoke-20260101-000000{suffix}" for suffix in ("", "-2")]
    assert [json.loads((run / "run.json").read_text())["seed"] for run in runs] == [1, 2]


def test_a_linked_run_folder(train, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    assert train(tmp_path / "link", "--max-steps", 2).exit_code == 0
    assert train(tmp_path / "real", "--resume", tmp_path / "link").exit_code == 0
    assert steps_saved(tmp_path / "real") == [2, 4]


def test_a_trainer_stopped_before_its_first_record_left_nothing_in_the_way(train, path, tmp_path):
    (path / lock.NAME).write_text("process 1 on elsewhere\n")
    (path / "config.json").write_text("{}")
    (path / ".run.json.123.tmp").write_text("{")
    assert train(path).exit_code == 0
    assert not list(path.glob("*.tmp"))
    other = tmp_path / "letters"
    other.mkdir()
    (other / "to mother.txt").write_text("Dear")
    result = train(other)
    assert result.exit_code == 2
    assert "exists and is not a run" in result.output
    assert [p.name for p in other.iterdir()] == ["to mother.txt"]


def test_what_a_killed_trainer_left_is_put_right(train, path):
    assert train(path, "--max-steps", 2).exit_code == 0
    saved = path / "checkpoints"
    (saved / "step-00000002").rename(saved / ".old-step-00000002")
    (path / "model").rename(path / ".new-model")
    for leftover in (saved / ".tmp-step-00000003-1", saved / ".del-step-00000001", path / ".tmp-model-1"):
        leftover.mkdir()
    result = train(path)
    assert "resuming at step 2" in result.output
    assert steps_saved(path) == [2, 4]
    assert [p.name for p in path.glob(".*")] == [lock.NAME]


def test_nothing_is_cleaned_where_others_may_be_writing(train, path, monkeypatch):
    monkeypatch.setattr(lock, "_take", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    assert train(path, "--max-steps", 2).exit_code == 0
    (path / ".tmp-model-1").mkdir()
    result = train(path)
    assert result.exit_code == 0
    assert result.output.count("cannot be locked") == 1
    assert (path / ".tmp-model-1").is_dir()


def test_a_folder_in_use_is_refused(train, path):
    assert train(path, "--max-steps", 2).exit_code == 0
    with lock.claim(path, print):
        result = train(path)
    assert result.exit_code == 2
    assert f"is in use by process {os.getpid()} on" in " ".join(result.output.split())
    assert train(path).exit_code == 0


def test_what_to_do_next_is_said(train, path):
    output = train(path, "--max-steps", 2).output
    assert f"stopped at step 2 of 4; saved in {path}; start the same again with --out {path} to go on\n" in output
    assert "next:" not in output
    assert f"next: mars-train var --tokenizer {path}\n" in train(path).output
    result = CliRunner().invoke(main, ["var", "--device", "cpu", "--out", str(path)])
    assert result.exit_code == 2
    assert "is a run with stage tokenizer, not var" in result.output


def test_nothing_held_out_is_said(train, path, monkeypatch):
    assert "holds no notes out" not in train(path, "--max-steps", 1).output
    notes = start.open_dataset(None)
    metadata = notes.metadata.copy()
    metadata[:, -1] = 0
    monkeypatch.setattr(start, "open_dataset", lambda data: dataclasses.replace(notes, metadata=metadata))
    output = train(path.with_name("other")).output
    assert "warning: the dataset holds no notes out, so that nothing is validated" in " ".join(output.split())
    assert "val_" not in output


def test_time_counts_from_the_start_of_the_command(train, path, monkeypatch):
    given = {}
    with monkeypatch.context() as patch:
        patch.setattr(start, "train", lambda stage, **options: given.update(options))
        began = time.monotonic()
        assert train(path, "--max-time", "59m").exit_code == 0
        assert began <= given["began"] <= time.monotonic()
    for hours, steps in ((1, []), (0, [4])):
        start.train("tokenizer", **given | {"began": time.monotonic() - hours * 3600})
        assert [p.name for p in path.glob("checkpoints/*")] == [f"step-{n:08d}" for n in steps]


def test_too_small_a_disk_is_told_before_the_first_step(train, path, monkeypatch):
    asked: list[int] = []

    def free_space(path, needed):
        asked.append(needed)
        raise DiskError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("mars.runtime.free_space", free_space)
        assert train(path).exit_code == 6
    assert asked[0] > 0
    assert not (path / "checkpoints").exists()
    assert train(path).exit_code == 0  # once there is room


def test_the_space_asked_for_is_enough(smoke, notes, path):
    c = config.override(
        smoke,
        ("train.adversarial=true", "train.adversarial_start=0", "train.keep=2", "train.optimizer=adamw"),
        "tokenizer",
    )
    stage, run = TokenizerStage(c, notes, torch.device("cpu"), 0), RunFolder(path)
    asked = run.space_needed(stage)
    for step in (1, 2, 3):
        stage.step(step - 1, [stage.batch(np.arange(2))], [torch.Generator()])
        run.save(Position(step, best=Best(1, "val_mse", 1.0)), stage)
    tensors = sum(p.stat().st_size for p in path.rglob("*.safetensors"))
    one = sum(p.stat().st_size for p in run.checkpoints()[0].glob("*.safetensors"))
    assert 0.7 * asked < tensors + one < asked
    assert run.space_needed(TokenizerStage(c, notes, torch.device("cpu"), 0)) < 0.4 * asked


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(train, path, monkeypatch):
    def fails(folder):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(start, "probe", fails)
    result = train(path)
    assert result.exit_code == 6
    assert "cannot be written: Read-only file system; name another --out" in " ".join(result.output.split())


def test_the_probe_leaves_nothing(path, monkeypatch):
    files.probe(path)
    assert list(path.iterdir()) == []
    for call in ("rename", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
            with pytest.raises(OSError, match="broken"):
                files.probe(path)
        assert list(path.iterdir()) == []


def test_directories_that_cannot_be_flushed_are_no_error(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda d: (_ for _ in ()).throw(OSError(errno.EINVAL, "a directory")))
    files.sync(path)
    (path / "file").write_text("x")
    with pytest.raises(OSError, match="a directory"):
        files.sync(path / "file")


def test_a_second_interrupt_exits_130():
    import click

    with pytest.raises(click.ClickException) as caught, user_errors():
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130


def test_a_folder_of_any_name_is_trained_in(tmp_path):
    """What is in brackets is no markup; going on prints other lines than beginning."""
    out, said = tmp_path / "[/b] [red] :smile:", io.StringIO()
    console = PlainConsole(file=said, soft_wrap=True)
    for most in (1, 2):
        start.train(
            "tokenizer", preset="smoke", overrides=("train.sample_every=0",), out=out, max_steps=most, console=console
        )
    lines = said.getvalue().splitlines()
    assert sum(f"run {out}" in line for line in lines) == 2
    assert sum(f"saved in {out}; start the same again with `out` {out} to go on" in line for line in lines) == 2
    assert any("resuming at step 1" in line for line in lines)
    listed = CliRunner().invoke(main, ["list", str(out)])
    assert str(out) in listed.output


def test_one_bad_run_does_not_hide_the_newest_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "runs/good"
    (good / "model").mkdir(parents=True)
    (good / "model/config.json").write_text("{}")
    (good / "run.json").write_text(json.dumps({"stage": "tokenizer", "preset": "smoke", "created": 1.0}))
    for name, text in {
        "list": "[]",
        "cut": "{",
        "null": "null",
        "when": '{"stage": "tokenizer", "created": "x"}',
    }.items():
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "run.json").write_text(text)
    assert start.newest_tokenizer() == Path("runs/good")
