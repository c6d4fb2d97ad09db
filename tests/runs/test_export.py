"""A run's model as a folder of its own, with its card and nothing else; and the card that every run has."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import mars
from mars import checkpoint
from mars.cli.root import main
from mars.runs import card
from mars.runs.export import export
from tests.train.test_start import pack, run, tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tokenizer `tok` and a transformer `var` on it."""
    folder = tmp_path_factory.mktemp("base")
    notes = pack(folder / "mine")
    every = ("--set", "train.validate_every=2")
    assert tokenizer("--data", notes, "--out", folder / "tok", *every).exit_code == 0
    done = run("var", "--tokenizer", folder / "tok", "--data", notes, "--out", folder / "var", *every)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def runs(base, tmp_path):
    shutil.copytree(base, tmp_path / "runs")
    return tmp_path / "runs"


def mars_export(*arguments: object):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_it_writes_the_model_its_card_and_nothing_else(runs, tmp_path):
    out = tmp_path / "bells"
    done = mars_export(runs / "var", "--out", out, "--licence", "cc-by-4.0")
    assert done.exit_code == 0, done.output
    names = {"README.md", "config.json", "data.json", "manifest.json", "notes.json", "tokenizer.safetensors",
             "var.safetensors"}  # fmt: skip
    assert {path.name for path in out.iterdir()} == names == {Path(line.split(": ")[0]).name for line in
                                                              done.stdout.splitlines()}  # fmt: skip
    checkpoint.verify(out)
    text = (out / "README.md").read_text(encoding="utf-8")
    assert text.startswith('---\nlicense: "cc-by-4.0"\nlibrary_name: "mars"\n')
    title, intro, sections = card.parts(text.partition("\n---\n")[2])
    assert title == "bells"
    assert "by family, source, pitch, velocity" in intro
    assert list(sections) == ["Data", "Tokenizer", "Transformer", "Use", "Licence"]
    assert "8 notes" in sections["Data"]
    assert "Their licence: unknown." in sections["Data"]
    assert re.search(r"step 4 of 4.*\n[\s\S]*cross-entropy on held-out notes", sections["Transformer"])
    assert re.search(r"mean squared error of held-out spectrograms in \[-1, 1\]: \d", sections["Tokenizer"])
    assert "MODEL" not in text
    assert sections["Licence"] == "cc-by-4.0"
    one, other = mars.load(runs / "var"), mars.Model.from_pretrained(out)
    assert torch.equal(one.generate(1)[0].ids, other.generate(1)[0].ids)


def test_half_is_half_and_a_licence_that_nobody_gave_is_not_made_up(runs, tmp_path):
    done = mars_export(runs / "tok", "--out", tmp_path / "small", "--half", "--name", "Small bells", "--json")
    assert done.exit_code == 0, done.output
    files = json.loads(done.stdout)["files"]
    whole = (runs / "tok/model/tokenizer.safetensors").stat().st_size
    assert files["tokenizer.safetensors"] < 0.75 * whole
    text = (tmp_path / "small/README.md").read_text(encoding="utf-8")
    assert "# Small bells\n" in text
    assert card.STATED in text


def test_the_best_is_taken_or_the_last(runs, tmp_path):
    for options, name in (((), "best"), (("--last",), "model")):
        assert mars_export(runs / "tok", "--out", tmp_path / name, *options).exit_code == 0
        ours, theirs = (p / "tokenizer.safetensors" for p in (tmp_path / name, runs / "tok" / name))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_of_before_there_were_cards_gets_one(runs, tmp_path):
    for name in ("model", "best"):
        model = mars.load(runs / "tok" / name)
        model.card = ""
        model.save(runs / "tok" / name)
    best = json.loads((runs / "tok/best.json").read_text())["step"]
    for last, step in ((False, best), (True, 4)):
        export(runs / "tok", tmp_path / str(step), last=last)
        text = (tmp_path / str(step) / "README.md").read_text(encoding="utf-8")
        assert f"step {step} of 4" in text
        assert f"On held-out notes, at step {step}:" in text
        if best == 4:
            break


@pytest.mark.parametrize(
    ("run", "out", "message"),
    [
        ("nothing", "new", "is not a run folder"),
        ("mine", "new", "is not a run folder"),
        ("tok", "var", "name a new folder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(run, out, message, runs):
    before = sorted(runs.rglob("*"))
    done = mars_export(runs / run, "--out", runs / out)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert sorted(runs.rglob("*")) == before


def test_a_stop_leaves_no_trace_in_the_card(base, tmp_path):
    for most in (1, 3, 4):  # 1 and 3 judge at their end, as no whole run does
        done = tokenizer("--data", base / "mine", "--out", tmp_path / "tok", "--set", "train.validate_every=2",
                         "--max-steps", most)  # fmt: skip
        assert done.exit_code == 0, done.output
        if most == 3:
            assert "at step 2:" in (tmp_path / "tok/model/README.md").read_text(encoding="utf-8")
    assert (tmp_path / "tok/model/README.md").read_bytes() == (base / "tok/model/README.md").read_bytes()
