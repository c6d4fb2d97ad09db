"""The scripts of examples/ at the smallest size at which they do all that they do, and the notebook."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from mars.cli.train import main as mars_train
from mars.data import builtin
from mars.train import finetune

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "first_sound.ipynb"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script with arguments in an empty folder, and return what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_say_how_they_are_run(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 60
    assert re.search(rf"^    .*python examples/{path.name}", source, re.MULTILINE)
    assert f"def test_{path.stem}(" in Path(__file__).read_text(encoding="utf-8")


def test_first_sound(run):
    out = run("first_sound", "-n", "1")
    assert "<Note 0: acoustic organ, pitch" in out
    names = {path.name for path in Path("sounds").iterdir()}
    assert names == {"organ-0.wav", *(f"{kind}-{i}.wav" for kind in ("variation", "morph") for i in range(3))}
    sounds = [soundfile.read(Path("sounds", name)) for name in names]
    assert all(len(sound) == 64_000 and rate == 16_000 and abs(sound).max() > 0.01 for sound, rate in sounds)


def test_evaluate(run):
    out = run("evaluate", "-n", "8", "--metrics", "mse,mae")
    for name in ("reconstruction", "generation"):
        assert Path("evaluations/example", name, "report.html").is_file()
        report = json.loads(Path("evaluations/example", name, "report.json").read_text())
        figures = out.partition(f"{name}: ")[2]
        assert float(re.search(r"^  mse +(\S+)$", figures, re.MULTILINE)[1]) == pytest.approx(
            report["metrics"]["mse"]["value"], rel=1e-3
        )


def test_kernels(run):
    out = run("kernels", "--steps", "51")
    before, after = (float(error) for error in re.findall(r"squared error ([\d.]+)", out))
    assert after < 0.7 * before
    assert "16,384 rows, auto: " in out


def test_image_tokenizer(run):
    out = run("image_tokenizer", "3")
    assert "held-out digits, reconstructed: squared error " in out
    assert re.search(r"\d% of the drawn ones:\n(.*\n){8}$", out)


def test_the_notebook_was_run_in_order_and_runs(tmp_path, monkeypatch):
    """Its outputs are shown where it is read, so they stay small; tokens may be others on other machines."""
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert NOTEBOOK.stat().st_size < 200_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    shown = [out["data"] for cell in cells for out in cell["outputs"] if "data" in out]
    assert any("<audio" in "".join(data.get("text/html", "")) for data in shown)
    space: dict[str, object] = {}
    for i, cell in enumerate(cells, 1):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {i}", "exec"), space)  # noqa: S102  # our own
    assert soundfile.info("organ.wav").frames == 64_000


def test_fine_tune(run, monkeypatch):
    """The command as it stands, in this process, where it trains for four steps of each stage."""
    monkeypatch.setattr(finetune, "STEPS", 4)
    settings = {name: values | {"validate_every": 2} for name, values in finetune.SETTINGS.items()}
    monkeypatch.setattr(finetune, "SETTINGS", settings)

    def command(words: list[str], check: bool) -> None:
        assert words[0] == "mars-train"
        assert check
        mars_train(words[1:], standalone_mode=False)

    monkeypatch.setattr(subprocess, "run", command)
    dataset = builtin.load()
    Path("mine").mkdir()
    for i in range(6):
        soundfile.write(f"mine/{dataset.names[i]}.wav", dataset.waveforms([i])[0].numpy(), dataset.sample_rate)
    out = run("fine_tune", "mine", "--time", "1h")
    assert "$ mars-train finetune mine --time 1h --out runs/fine-tuned\n" in out
    assert "<Model " in out
    assert len(list(Path("runs/fine-tuned").glob("example-*.wav"))) == 4
