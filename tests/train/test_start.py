"""What a run is begun with: the notes of both stages, files that stay what they were, the command that comes next."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

from mars import checkpoint, config, model
from mars.cli.train import main
from mars.data import Dataset
from mars.data.folder import pack_folder
from mars.data.packed import Writer
from mars.labels import FAMILIES, Labels
from mars.train.tokenizer import TokenizerStage

AUDIO = ("audio.n_fft=128", "audio.hop=64", "audio.bins=64", "audio.frames=32", "audio.samples=1900", "audio.cmx=2,1")
SMALL = (*AUDIO, "tokenizer.patch=16,16", "tokenizer.width=8", "tokenizer.scales=[1,2]", "tokenizer.codebook_size=8")
STEPS = ("train.steps=4", "train.batch_size=2", "train.validate_notes=2", "train.sample_every=0", "train.workers=0")


def pack(out: Path, seed: int = 0, rate: int = 16_000) -> Path:
    """Eight short notes of four instruments."""
    rng = np.random.default_rng(seed)
    with Writer(out, sample_rate=rate, samples=1900, origin={"kind": "test"}) as writer:
        for i in range(8):
            audio = np.sin(np.arange(1900) * 0.02 * (i + 1)) * 0.5 + rng.normal(0, 0.01, 1900)
            writer.add(f"note {i}", audio.astype(np.float32), Labels(f"i{i % 4}", i % 4, i % 3, 40 + i, 100))
        writer.commit()
    return out


def run(stage: str, *arguments: object, settings: tuple[str, ...] = STEPS):
    """mars-train on the CPU."""
    words = [word for setting in settings for word in ("--set", setting)]
    return CliRunner().invoke(main, [stage, "--device", "cpu", *words, *map(str, arguments)])


def tokenizer(*arguments: object):
    return run("tokenizer", "--preset", "smoke", *arguments, settings=(*SMALL, *STEPS))


def said(result) -> str:
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tokenizer `runs/tok`, trained on the dataset `mine`, beside the dataset `other`."""
    folder = tmp_path_factory.mktemp("base")
    pack(folder / "other", seed=1)
    assert tokenizer("--data", pack(folder / "mine"), "--out", folder / "runs" / "tok").exit_code == 0
    return folder


@pytest.fixture
def trained(base, tmp_path, monkeypatch):
    """A copy of all that to work in, as if it had been made there."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    record = tmp_path / "runs" / "tok" / "run.json"
    record.write_text(record.read_text().replace(str(base), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "tok"


def test_the_next_command_is_whole_and_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack(tmp_path / "my notes")
    first = tokenizer("--data", "my notes", "--out", "runs/the tokenizer")
    assert first.exit_code == 0, first.output
    last = first.output.rstrip("\n").splitlines()[-1]
    assert last == "next: mars-train var --tokenizer 'runs/the tokenizer' --data 'my notes'"
    name, stage, *options = shlex.split(last.removeprefix("next: "))
    assert (name, stage) == ("mars-train", "var")
    second = run(stage, *options, "--out", "runs/var")
    assert second.exit_code == 0, second.output
    assert "warning" not in second.output
    assert second.output.rstrip("\n").splitlines()[-1] == "next: mars-generate -n 64 --model runs/var"
    assert json.loads(Path("runs/var/run.json").read_text())["data"] == Dataset.open("my notes").fingerprint


def test_a_model_says_what_it_was_trained_on(trained):
    mine, other = (Dataset.open(name).fingerprint for name in ("mine", "other"))
    assert model.load(trained).data == {"tokenizer": mine}
    assert json.loads((trained / "run.json").read_text())["data_path"] == str(Path("mine").resolve())
    assert run("var", "--tokenizer", trained, "--data", "other", "--out", "runs/var").exit_code == 0
    shutil.move("runs/var/model", "moved")  # away from its run
    assert model.load("moved").data == {"tokenizer": mine, "var": other}


def without_data(path: Path) -> None:
    """Make the model one of a time when models did not say what they were trained on."""
    tensors = {"tokenizer": checkpoint.read_tensors(path / "tokenizer.safetensors")}
    documents = {name: checkpoint.read_json(path / f"{name}.json") for name in ("config", "notes")}
    checkpoint.replace_directory(path, tensors, documents)


def test_without_data_the_second_stage_does_not_take_the_built_in_notes_for_those_of_the_tokenizer(trained):
    for words in (("--tokenizer", trained), ()):  # named, or found as the newest
        result = run("var", *words, "--out", "runs/var")
        assert result.exit_code == 2
        fingerprint = Dataset.open("mine").fingerprint[:12]
        assert f"trained on {Path('mine').resolve()} (fingerprint {fingerprint})" in said(result)
        assert "not on the built-in notes (fingerprint" in said(result)
        assert "name the dataset that it was trained on" in said(result)
        assert not Path("runs/var").exists()
    without_data(trained / "model")  # its run still says so
    assert run("var", "--tokenizer", trained, "--out", "runs/var").exit_code == 2


def test_another_dataset_than_the_tokenizers_is_refused_by_accident_and_a_warning_on_purpose(trained):
    result = run("var", "--data", "other", "--out", "runs/var")  # with the newest tokenizer
    assert result.exit_code == 2
    assert "both the data and the tokenizer" in said(result)
    result = run("var", "--data", "other", "--tokenizer", trained, "--out", "runs/var", "--max-steps", 2)
    assert result.exit_code == 0
    assert f"warning: the tokenizer {trained} was trained on" in said(result)
    again = run("var", "--data", "other", "--resume", "runs/var")
    assert again.exit_code == 0, again.output
    assert "resuming at step 2" in again.output


@pytest.mark.parametrize("name", ["moved", "notes"])
def test_a_tokenizer_that_does_not_say_what_it_was_trained_on_is_a_warning(name, trained):
    without_data(trained / "model")
    shutil.move(trained / "model", "moved")
    result = run("var", "--tokenizer", name, "--data", "other", "--out", "runs/var", "--max-steps", 1,
                 settings=(*STEPS, "var.width=16", "var.depth=1", "train.keep=1"))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"warning: what the tokenizer {name} was trained on is not recorded; the VAR learns other (" in said(result)


def test_a_dataset_that_cannot_fit_the_tokenizer_is_refused(trained):
    pack(Path("fast"), rate=22_050)
    result = run("var", "--tokenizer", trained, "--data", "fast", "--out", "runs/var")
    assert result.exit_code == 2
    assert "the dataset is at 22050 Hz, audio.sample_rate is 16000" in said(result)


def test_a_run_is_gone_on_with_on_its_own_notes_alone(trained):
    for words, notes in ((("--data", "other"), f"other (fingerprint {Dataset.open('other').fingerprint[:12]})"),
                         ((), "the built-in notes (fingerprint ")):  # fmt: skip
        result = tokenizer(*words, "--out", trained)
        assert result.exit_code == 2
        assert f"is a run on {Path('mine').resolve()} (fingerprint" in said(result)
        assert notes in said(result)


def test_notes_of_another_length_are_said_to_be_cut_or_padded(tmp_path):
    pack(tmp_path / "mine")
    for samples, change in ((1000, "cut to 0.0625 s"), (1980, "padded with silence to 0.124 s")):
        settings = (*SMALL, *STEPS, f"audio.samples={samples}")
        result = run("tokenizer", "--preset", "smoke", "--data", tmp_path / "mine", "--max-steps", 1,
                     "--out", tmp_path / change[:3], settings=settings)  # fmt: skip
        assert result.exit_code == 0, result.output
        assert f"the notes, of 0.119 s, are {change} (audio.samples)" in said(result)


def overwrite(dataset: Path) -> None:
    """Other notes of the same size."""
    file = dataset / "audio.i16"
    file.write_bytes(file.read_bytes()[::-1])


@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def test_audio_overwritten_between_two_sessions_ends_the_second(stage, trained):
    start = tokenizer if stage == "tokenizer" else lambda *words: run("var", "--tokenizer", trained, *words)
    words = ("--data", "mine", "--out", "runs/cut")
    assert start(*words, "--max-steps", 2).exit_code == 0
    overwrite(Path("mine"))
    result = start(*words)
    assert result.exit_code == 2
    assert "mine/audio.i16 differs from its checksum; put back the file that was packed" in said(result)
    assert [path.name for path in Path("runs/cut/checkpoints").iterdir()] == ["step-00000002"]
    fresh = start("--data", "mine", "--out", "runs/fresh")
    assert fresh.exit_code == 2
    assert not Path("runs/fresh/checkpoints").exists()
    overwrite(Path("mine"))  # back again
    assert start(*words).exit_code == 0


@pytest.mark.parametrize("change", ["cut short", "written to"])
def test_audio_that_changes_while_it_is_trained_on_ends_the_run_with_a_line(change, trained, monkeypatch):
    step = TokenizerStage.step

    def strike(self, number, *inputs):
        if number == 2 and change == "cut short":
            os.truncate("mine/audio.i16", 100)
        elif number == 2:
            os.utime("mine/audio.i16", ns=(0, 0))
        return step(self, number, *inputs)

    monkeypatch.setattr(TokenizerStage, "step", strike)
    steps = ("train.steps=20", "train.batch_size=2", "train.save_every=1", "train.workers=0")
    result = run("tokenizer", "--preset", "smoke", "--data", "mine", "--out", "runs/cut", settings=(*SMALL, *steps))
    assert result.exit_code == 2
    assert "mine/audio.i16 has changed since it was opened" in said(result)
    assert result.output.rstrip("\n").splitlines()[-1].startswith("Error: ")
    assert sorted(path.name for path in Path("runs/cut/checkpoints").iterdir())[-1] == "step-00000003"


def test_other_threads_are_said_as_another_torch_is(tmp_path):
    words = ("--data", pack(tmp_path / "mine"), "--out", tmp_path / "run")
    assert tokenizer(*words, "--threads", 1, "--max-steps", 2).exit_code == 0
    same = tokenizer(*words, "--threads", 1, "--max-steps", 3)
    assert "warning" not in same.output
    other = tokenizer(*words, "--threads", 2)
    assert "was written with threads 1, not 2; going on may not be exact to the bit" in said(other)
    assert other.exit_code == 0


def toml(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_printed_settings_are_those_of_the_run_and_make_the_same_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack(tmp_path / "mine")
    printed = tokenizer("--print-config")
    assert printed.exit_code == 0, printed.output
    file = toml(tmp_path / "settings.toml", printed.stdout)
    plain = ("tokenizer", "--device", "cpu", "--data", "mine")
    first = tokenizer("--data", "mine", "--out", "runs/a", "--json", "-q")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["run"] == "runs/a"
    assert json.loads(first.stdout)["state"] == "finished"
    second = CliRunner().invoke(main, [*plain, "--config", str(file), "--out", "runs/b"])
    assert second.exit_code == 0, second.output
    for name in ("config.json", "model/tokenizer.safetensors", "model/README.md"):
        assert Path("runs/a", name).read_bytes() == Path("runs/b", name).read_bytes(), name
    again = CliRunner().invoke(main, ["tokenizer", "--print-config", "--out", "runs/b"])
    assert config.preset(*_read(toml(tmp_path / "again.toml", again.stdout))) == config.load(Path("runs/b/config.json"))
    beyond = CliRunner().invoke(
        main, ["tokenizer", "--print-config", "--json", "--config", str(file), "--set", "train.lr=3e-5"]
    )
    assert json.loads(beyond.stdout)["train"]["tokenizer"]["lr"] == 3e-5
    assert not list(Path("runs").glob("tokenizer-*"))


def _read(file: Path) -> tuple[str, tuple[str, ...], None, dict[str, object]]:
    named, changes = config.read_settings(file)
    assert named is not None
    return named, (), None, changes


def test_a_transformers_settings_keep_to_its_tokenizer(trained):
    printed = run("var", "--tokenizer", trained, "--print-config")
    assert printed.exit_code == 0, printed.output
    file = toml(Path("var.toml"), printed.stdout)
    assert run("var", "--tokenizer", trained, "--config", file, "--print-config").stdout == printed.stdout
    toml(file, printed.stdout.replace("codebook_size = 8", "codebook_size = 16"))
    wrong = run("var", "--tokenizer", trained, "--config", file, "--print-config")
    assert wrong.exit_code == 2
    assert "--config var.toml: its [tokenizer] is not that of the trained tokenizer runs/tok" in said(wrong).replace(
        str(trained), "runs/tok"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokenizer = 1", "want preset and the tables audio, tokenizer, var, train; got tokenizer"),
        ("preset = 1", "preset must be a name"),
        ("[tokeniser]\nwidth = 8", "got tokeniser"),
        ("[tokenizer]\nwidht = 8", "did you mean tokenizer.width?"),
        ("[train]\nsteps = 'x'", "train.tokenizer.steps must be an int"),
        ("x =", "cannot be read as TOML"),
        ("preset = 'huge'", "unknown preset 'huge'"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(text, message, tmp_path):
    file = toml(tmp_path / "settings.toml", text)
    done = CliRunner().invoke(main, ["tokenizer", "--config", str(file), "--print-config"])
    assert done.exit_code == 2
    assert message in said(done)


def labelled(out: Path) -> Path:
    """Notes of two instruments and of a label of their own."""
    folder = out.with_suffix(".wav")
    for i in range(6):
        path = folder / f"{'ab'[i % 2]}{i}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, 0.5 * np.sin(np.arange(1900) * (i + 3) / 20), 16_000)
    rows = "".join(f"{'ab'[i % 2]}{i}.wav,6{i},kazoo,{'xy'[i % 2]},{['dark', 'bright'][i % 2]}\n" for i in range(6))
    (out.parent / "labels.csv").write_text("file,pitch,family,instrument,type\n" + rows)
    pack_folder(folder, out, csv=out.parent / "labels.csv", seconds=1900 / 16_000, hold_out="notes", shortest=0.1)
    return out


def test_both_stages_start_from_a_model_and_its_vocabulary_grows(trained, tmp_path):
    small = (*STEPS, "var.width=16", "var.depth=1")
    base = run("var", "--tokenizer", trained, "--data", "mine", "--out", "runs/base", settings=small)
    assert base.exit_code == 0, base.output
    own = labelled(tmp_path / "own")
    none = ("train.lr=1e-30", "train.weight_decay=0")  # so that the weights stay what they start as
    first = run("tokenizer", "--init", "runs/base", "--data", own, "--out", "runs/first", settings=(*STEPS, *none))
    assert first.exit_code == 0, first.output
    for name, tensor in model.load("runs/first").tokenizer.state_dict().items():
        torch.testing.assert_close(tensor, model.load("runs/base").tokenizer.state_dict()[name])
    condition = "var.condition=family,source,pitch,velocity,instrument,type"
    second = run("var", "--init", "runs/base", "--tokenizer", "runs/first", "--data", own, "--out", "runs/second",
                 settings=(*STEPS, *none, condition))  # fmt: skip
    assert second.exit_code == 0, second.output
    old, new = model.load("runs/base"), model.load("runs/second")
    assert new.words == {"family": [*FAMILIES, "kazoo"], "instrument": ["x", "y"], "type": ["bright", "dark"]}
    had, has = (made.var.condition["family"].weight for made in (old, new))
    torch.testing.assert_close(has[: len(FAMILIES)], had[:-1])
    torch.testing.assert_close(has[len(FAMILIES)], had[:-1].mean(0))
    torch.testing.assert_close(has[-1], had[-1])
    assert not new.var.condition["instrument"].weight.abs().max() > 1e-20
    (note,) = new.generate(1, labels={"type": "dark"}, pitch=61, family="kazoo", allow_untrained=True)
    assert note.condition["type"] == "dark"
    again = run("var", "--resume", "runs/second", "--data", own, settings=())
    assert again.exit_code == 0, again.output
    other = run("var", "--init", trained, "--tokenizer", "runs/first", "--data", own, "--out", "runs/third")
    assert other.exit_code == 2
    for settings, says in (
        (("var.width=32",), "the weights of --init are of 16, which they fix"),
        (("var.condition=pitch",), "the conditions of --init are family, source, pitch, velocity; keep them"),
        (("var.condition=family,source,pitch,velocity,colour",), "the dataset has no such label; it has family"),
        (("tokenizer.width=32",), "the trained tokenizer runs/first fixes these"),
    ):
        refused = run("var", "--init", "runs/base", "--tokenizer", "runs/first", "--data", own, "--out", "runs/no",
                      settings=(*STEPS, *settings))  # fmt: skip
        assert refused.exit_code == 2, refused.output
        assert says in said(refused)


def test_training_follows_the_rate_and_the_length_of_the_notes(tmp_path):
    data = pack(tmp_path / "fast", rate=22_050)
    result = run(
        "tokenizer", "--preset", "smoke", "--data", data, "--plan", "--device", "cpu", settings=("train.batch_size=2",)
    )
    assert result.exit_code == 0, result.output
    assert "22,050 Hz, 0.0862 s: window 1,024, hop 256" in result.output
    result = run(
        "tokenizer", "--preset", "smoke", "--data", data, "--out", "runs/fast", "--max-steps", 1, settings=STEPS
    )
    assert result.exit_code == 0, result.output
    made = model.load("runs/fast").config
    assert (made.audio.sample_rate, made.audio.samples) == (22_050, 1900)
