"""Folders of tokens: made of a dataset, heard, trained on; and refused where they are of something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import mars
from mars.cli.root import main
from mars.data import Dataset, tokens
from mars.errors import ConfigError, DataError
from tests.train.test_start import pack, run, tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A dataset `mine`, a tokenizer `tok` of it, and the tokens `t` that it makes."""
    folder = tmp_path_factory.mktemp("base")
    assert tokenizer("--data", pack(folder / "mine"), "--out", folder / "tok").exit_code == 0
    done = command("data", "tokens", folder / "mine", "--model", folder / "tok", "--out", folder / "t")
    assert done.exit_code == 0, done.output
    assert "8 notes of 5 tokens" in done.stdout
    return folder


def command(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_they_are_what_the_model_encodes_with_names_and_labels(base):
    found, dataset, model = tokens.read(base / "t"), Dataset.open(base / "mine"), mars.load(base / "tok")
    assert torch.equal(found.ids.long(), model.encode(dataset.waveforms(range(8))))
    assert found.ids.dtype == torch.uint8
    assert list(found.header.names) == list(dataset.names)
    assert found.condition(3) == {"family": "guitar", "source": "acoustic", "pitch": 43, "velocity": 100,
                                  "instrument": "i3"}  # fmt: skip
    assert {path.name for path in (base / "t").iterdir()} == {"tokens.json", "tokens.safetensors", "manifest.json"}
    document = json.loads((base / "t/tokens.json").read_text())
    assert document["scales"] == [[1, 1], [2, 2]]
    assert (document["codebook_size"], document["sample_rate"], document["samples"]) == (8, 16_000, 1900)
    assert load_file(base / "t/tokens.safetensors")["ids"].shape == (8, 5)


def test_they_are_heard_and_going_on_makes_the_same_bytes(base, tmp_path):
    arguments = ("generate", "--tokens", base / "t", "--model", base / "tok", "--iterations", 2, "--seed", 3)
    done = command(*arguments, "--out", tmp_path / "a", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["notes"] == 8
    files = sorted((tmp_path / "a").glob("*.wav"))
    assert files[3].name == "0003-guitar-043.wav"
    sound, rate = soundfile.read(files[3])
    assert (len(sound), rate) == (1900, 16_000)
    before = {path.name: path.read_bytes() for path in files}
    for index in (1, 6):
        files[index].unlink()
    assert command(*arguments, "--out", tmp_path / "a").exit_code == 0
    assert {path.name: path.read_bytes() for path in files} == before
    few = command(*arguments, "--out", tmp_path / "b", "-n", 2)
    assert few.exit_code == 0
    assert [path.read_bytes() for path in sorted((tmp_path / "b").glob("*.wav"))] == [*before.values()][:2]


def test_the_trainer_reads_them_and_learns_the_same(base, tmp_path):
    plain = ("var", "--tokenizer", base / "tok", "--data", base / "mine")
    one = run(*plain, "--out", tmp_path / "runs/one")
    two = run(*plain, "--out", tmp_path / "others/two", "--tokens", base / "t")
    assert (one.exit_code, two.exit_code) == (0, 0), one.output + two.output
    weights = [tmp_path / place / "model/var.safetensors" for place in ("runs/one", "others/two")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (tmp_path / "others/.tokens").exists()  # none were made


def test_tokens_of_something_else_are_refused(base, tmp_path):
    other = pack(tmp_path / "other", seed=1)
    wrong = run("var", "--tokenizer", base / "tok", "--data", other, "--out", tmp_path / "x", "--tokens", base / "t")
    assert wrong.exit_code == 2
    assert "is of other notes than the dataset" in " ".join(wrong.output.split())
    wrong = command("generate", "--tokens", base / "t", "--out", tmp_path / "y")
    assert wrong.exit_code == 2
    assert "was made by another tokenizer than this; name the model that made it" in " ".join(wrong.output.split())
    for option in (("--family", "brass"), ("--cfg", "1"), ("-n", "9")):
        wrong = command("generate", "--tokens", base / "t", "--model", base / "tok", "--out", tmp_path / "y", *option)
        assert wrong.exit_code == 2
        assert option[0] in wrong.output
    again = command("data", "tokens", base / "mine", "--model", base / "tok", "--out", base / "t")
    assert again.exit_code == 2
    assert "name a new folder" in again.output
    assert not (tmp_path / "y").exists()


def test_another_programs_tokens_are_taken_and_checked(base, tmp_path):
    path = tmp_path / "t"
    shutil.copytree(base / "t", path)
    (path / "manifest.json").unlink()
    document = json.loads((path / "tokens.json").read_text()) | {"tokenizer": None, "dataset": None, "labels": {}}
    document["names"] = ["mine"]
    (path / "tokens.json").write_text(json.dumps(document))
    save_file({"ids": torch.tensor([[0, 1, 2, 3, 7]])}, path / "tokens.safetensors")
    done = command("generate", "--tokens", path, "--model", base / "tok", "--iterations", 1, "--out", tmp_path / "a")
    assert done.exit_code == 0, done.output
    assert [p.name for p in (tmp_path / "a").glob("*.wav")] == ["0000-any-any.wav"]


def spoil(path: Path, **changes: object) -> None:
    (path / "manifest.json").unlink(missing_ok=True)
    document = json.loads((path / "tokens.json").read_text()) | changes
    (path / "tokens.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format must be one of mars-tokens"),
        ({"version": 2}, "version must be one of 1"),
        ({"scales": [[1, 1]]}, r"want integers ids \(8, 1\)"),
        ({"names": ["a"]}, "want labels, each a name and a list"),
        ({"codebook_size": 3}, "want tokens 0..2"),
        ({"labels": {"a/b": [None] * 8}}, "see a/b"),
        ({"labels": {"pitch": [200] * 8}}, "want a pitch 0..127 or null, got 200"),
        ({"labels": {"pitch": 3}}, "see pitch"),
    ],
)
def test_headers_that_cannot_be_are_one_line(changes, message, base, tmp_path):
    shutil.copytree(base / "t", tmp_path / "t")
    spoil(tmp_path / "t", **changes)
    with pytest.raises(DataError, match=message):
        tokens.read(tmp_path / "t")


@pytest.mark.parametrize(
    "ids", [torch.zeros(8, 5), torch.zeros(7, 5, dtype=torch.uint8), torch.full((8, 5), -1), torch.zeros(8, 5) > 0]
)
def test_arrays_that_are_no_tokens_are_one_line(ids, base, tmp_path):
    shutil.copytree(base / "t", tmp_path / "t")
    (tmp_path / "t/manifest.json").unlink()
    save_file({"ids": ids}, tmp_path / "t/tokens.safetensors")
    with pytest.raises(DataError, match=r"want (integers ids|tokens 0)"):
        tokens.read(tmp_path / "t")


def test_damage_is_found(base, tmp_path):
    with pytest.raises(DataError, match="is no folder of tokens"):
        tokens.read(tmp_path)
    shutil.copytree(base / "t", tmp_path / "t")
    content = np.fromfile(tmp_path / "t/tokens.safetensors", np.uint8)
    content[-1] ^= 1
    content.tofile(tmp_path / "t/tokens.safetensors")
    with pytest.raises(DataError, match="does not match its checksum"):
        tokens.read(tmp_path / "t")


def test_notes_at_another_rate_are_refused(base, tmp_path):
    from mars.train.tokens import write_tokens

    dataset = Dataset.open(pack(tmp_path / "fast", rate=8_000))
    with pytest.raises(ConfigError, match="the dataset is at 8000 Hz, the model at 16000"):
        write_tokens(mars.load(base / "tok"), dataset, tmp_path / "t", lambda done, of: None)
    assert not (tmp_path / "t").exists()
