"""Tokens are made once per tokenizer and dataset, in float32, and never taken for others or from damaged files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mars.config import override
from mars.model import Model
from mars.models.tokenizer import Tokenizer
from mars.runs.distributed import ALONE
from mars.train import start, tokens
from mars.train.tokens import cached_tokens, tokenize

CPU = torch.device("cpu")


SMALL = ("audio.n_fft=128", "audio.hop=64", "audio.bins=64", "audio.frames=32", "audio.samples=1900", "audio.cmx=2,1")


@pytest.fixture
def made(smoke, notes, tmp_path):
    """Ask for tokens; gives them, what was said, and how many notes were tokenized for it."""
    model = Tokenizer(smoke).eval().requires_grad_(False)

    def made(config=smoke, dataset=notes, tokenizer=model, folder=tmp_path / "cache"):
        done, messages = [], []
        found = cached_tokens(folder, tokenizer, config, dataset, ALONE, advance=done.append, say=messages.append)
        return found, messages, sum(done)

    made.model = model
    made.entries = lambda: sorted(p.name for p in (tmp_path / "cache").iterdir())
    return made


def test_a_second_run_makes_no_tokens(made, smoke, notes):
    first, said, count = made()
    again, said_again, count_again = made()
    assert (count, count_again) == (11, 0)
    assert said + said_again == []
    expected = tokenize(made.model, smoke, notes, ALONE, lambda n: None)
    assert first.dtype == again.dtype == expected.dtype
    assert torch.equal(first, expected)
    assert torch.equal(again, expected)
    assert len(made.entries()) == 1


@pytest.mark.parametrize("changed", ["weights", "dataset", "front end"])
def test_other_tokens_are_not_taken_for_these(changed, made, smoke, notes):
    made()
    arguments = {
        "weights": {"tokenizer": Tokenizer(smoke).eval().requires_grad_(False)},
        "dataset": {"dataset": dataclasses.replace(notes, fingerprint="1" * 64)},
        "front end": {"config": override(smoke, ["audio.min_db=-40"])},
    }[changed]
    assert made(**arguments)[2] == 11
    assert made()[2] == made(**arguments)[2] == 0
    assert len(made.entries()) == 2


def test_settings_of_the_training_do_not_matter(made, smoke):
    made()
    others = ["train.var.lr=0.1", "var.width=32", "train.var.batch_size=3", "train.var.precision=bfloat16"]
    assert made(config=override(smoke, others))[2] == 0


def test_the_tokens_are_those_of_the_model_in_float32(smoke, notes):
    """Whatever the training computes in: what the transformer learns is what `Model.encode` gives."""
    model = Model(config=smoke, tokenizer=Tokenizer(smoke).eval().requires_grad_(False))
    expected = model.encode(notes.waveforms(range(8)))
    for precision in ("float32", "bfloat16"):
        settings = override(smoke, [f"train.var.precision={precision}", "train.var.batch_size=8"])
        actual = tokenize(model.tokenizer, settings, notes, ALONE, lambda n: None)
        assert torch.equal(actual[:8].long(), expected)


@pytest.mark.parametrize("damage", ["changed", "missing", "other shape"])
def test_a_damaged_entry_is_made_again(damage, made, notes, tmp_path):
    expected = made()[0].clone()
    (entry,) = (tmp_path / "cache").iterdir()
    file = entry / "ids.safetensors"
    if damage == "changed":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        name = entry.name
        for path in entry.iterdir():
            path.unlink()
        entry.rmdir()
        tokens.checkpoint.write_directory(entry.parent / name, {"ids": {"ids": expected[:3]}}, {})
    actual, said, count = made()
    assert count == 11
    assert torch.equal(actual, expected)
    assert len(said) == 1
    assert said[0].endswith("; making the tokens again")
    assert made()[2] == 0


def test_without_a_place_to_keep_them_they_stay_in_memory(made, tmp_path):
    (tmp_path / "file").write_text("")
    found, said, count = made(folder=tmp_path / "file")
    assert count == 11
    assert torch.equal(found, made()[0])
    assert len(said) == 1
    assert said[0].startswith("warning: the tokens could not be kept in ")


@pytest.mark.parametrize(
    ("codes", "dtype"), [(256, torch.uint8), (257, torch.uint16), (65_536, torch.uint16), (65_537, torch.int32)]
)
def test_the_smallest_type_that_holds_them(codes, dtype, smoke, notes, monkeypatch):
    config = override(smoke, [f"tokenizer.codebook_size={codes}"])
    ids = torch.arange(codes - config.tokenizer.tokens, codes)

    class Fixed:
        def encode(self, x):
            return ids.expand(len(x), -1)

    found = tokenize(Fixed(), config, notes, ALONE, lambda n: None)
    assert found.dtype == dtype
    assert torch.equal(found.long(), ids.expand(11, -1))
    assert torch.equal(found[[3, 1]].long(), ids.expand(2, -1))


def test_runs_on_the_same_tokenizer_share_their_tokens_and_a_profile_makes_no_run(notes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "open_dataset", lambda path: notes)
    few = ("train.steps=2", "train.batch_size=2", "train.save_every=2")
    first = start.train("tokenizer", preset="smoke", overrides=(*SMALL, *few), out=Path("runs/a"))
    counted = []
    original = tokens.tokenize
    monkeypatch.setattr(tokens, "tokenize", lambda *arguments: counted.append(1) or original(*arguments))
    for name in ("b", "c", "b"):  # the third goes on with the first
        start.train("var", tokenizer=first, overrides=few, out=Path("runs") / name)
    assert len(counted) == 1
    trace = start.train("var", tokenizer=first, overrides=few, profile=Path("trace.json"))
    assert trace.is_file()
    assert len(counted) == 1
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [".tokens", "a", "b", "c"]
    assert sorted(p.name for p in (tmp_path / "runs" / "b").iterdir()) == sorted(
        p.name for p in (tmp_path / "runs" / "a").iterdir()
    )
