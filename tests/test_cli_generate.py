"""mars-generate: its files, its exit codes, its help."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import subprocess
import sys
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

import mars
from mars import config
from mars.cli.generate import main
from mars.model import Model
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR

NOTES = [{"family": "brass", "source": "acoustic", "count": 8, "pitch": [42, 70]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, untrained."""
    torch.manual_seed(1)
    settings = config.preset("smoke")
    tokenizer, var = Tokenizer(settings).eval(), VAR(settings.var, settings.tokenizer).eval()
    path = tmp_path_factory.mktemp("models") / "model"
    Model(config=settings, tokenizer=tokenizer, var=var, notes=NOTES).save(path)
    return path


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "notes"
    done = invoke("-n", 3, "--model", folder, "--out", out, "--iterations", 1, "--seed", 7, "--device", "cpu")
    assert done.exit_code == 0, done.output
    return out, done


def test_files(made, folder):
    out, done = made
    document = json.loads((out / "notes.json").read_text())
    files = [note["file"] for note in document["notes"]]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*files, "index.html", "notes.json", "pictures", "spectrograms.png"]
    )
    assert (out / "spectrograms.png").read_bytes()[:4] == b"\x89PNG"
    assert document["mars"] == mars.__version__
    assert document["model"] == str(folder)
    assert document["model_hash"] == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert {k: document[k] for k in ("n", "seed", "cfg", "pitch", "iterations")} == {
        "n": 3, "seed": 7, "cfg": 2.0, "pitch": None, "iterations": 1,
    }  # fmt: skip
    for index, note in enumerate(document["notes"]):
        assert note["index"] == index
        assert note["condition"]["family"] == "brass"
        assert note["file"] == f"{index:04d}-brass-{note['condition']['pitch']:03d}.wav"
        assert note["sha256"] == hashlib.sha256((out / note["file"]).read_bytes()).hexdigest()
        with wave.open(str(out / note["file"])) as file:
            assert file.getparams()[:4] == (1, 2, 16_000, 64_000)
    assert str(out) in done.output
    assert "griffin-lim" in done.output


def test_the_same_seed_gives_the_same_bytes(made, folder, tmp_path):
    arguments = (
        "-n",
        1,
        "--model",
        folder,
        "--iterations",
        1,
        "--seed",
        7,
        "--batch-size",
        1,
        "--device",
        "cpu",
    )
    assert invoke(*arguments, "--out", tmp_path / "again").exit_code == 0
    (again,) = (tmp_path / "again").glob("*.wav")
    assert again.read_bytes() == (made[0] / again.name).read_bytes()


def test_a_folder_with_files_is_refused(made, folder):
    before = {p: p.stat().st_mtime_ns for p in made[0].iterdir()}
    done = invoke("-n", 1, "--model", folder, "--out", made[0])
    assert done.exit_code == 2
    assert "was begun with n 3, not 1; name a new folder" in done.output
    assert {p: p.stat().st_mtime_ns for p in made[0].iterdir()} == before


def test_a_folder_of_something_else_is_not_touched(folder, tmp_path):
    for name in ("run.json", ".lock", ".notes.json.1.tmp"):
        (tmp_path / name).write_text("mine")
    done = invoke("-n", 1, "--model", folder, "--out", tmp_path)
    assert done.exit_code == 2
    assert "holds run.json, which is none of these notes; name a new folder" in done.output
    assert {p.name: p.read_text() for p in tmp_path.iterdir() if p.is_file()} == dict.fromkeys(
        ("run.json", ".lock", ".notes.json.1.tmp"), "mine"
    )


def test_the_page_shows_every_note_and_links_to_it(made):
    out, done = made
    assert f"listen: {out / 'index.html'}" in done.output
    text = (out / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 6
    assert all((out / source).is_file() for source in sources)
    assert text.count('<option value="brass"') == 0  # one family: nothing to choose


def test_start_gives_the_next_notes_of_a_seed(folder, made, tmp_path):
    words = ("--model", folder, "--iterations", 1, "--seed", 7, "--device", "cpu", "--out", tmp_path / "out")
    done = invoke("-n", 2, "--start", 1, *words)
    assert done.exit_code == 0, done.output
    again = sorted(p.name for p in (tmp_path / "out").glob("*.wav"))
    assert [name[:4] for name in again] == ["0001", "0002"]
    for name in again:
        assert (tmp_path / "out" / name).read_bytes() == (made[0] / name).read_bytes()
    document = json.loads((tmp_path / "out" / "notes.json").read_text())
    assert [note["index"] for note in document["notes"]] == [1, 2]
    assert "(2 were there)" in invoke("-n", 2, "--start", 1, *words).output


def test_a_folder_of_an_earlier_version_is_gone_on_with(folder, tmp_path):
    words = ("-n", 1, "--model", folder, "--iterations", 1, "--device", "cpu", "--out", tmp_path / "out")
    assert invoke(*words).exit_code == 0
    listing = tmp_path / "out" / "notes.json"
    document = json.loads(listing.read_text())
    listing.write_text(json.dumps({k: v for k, v in document.items() if k not in ("start", "temperature")}))
    assert "(1 were there)" in invoke(*words).output
    assert invoke(*words, "--temperature", 0.5).exit_code == 2


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    t = np.arange(32_000) / 16_000
    for name, frequency in (("a.wav", 220), ("b.wav", 660)):
        soundfile.write(folder / name, 0.4 * np.sin(2 * np.pi * frequency * t), 16_000)
    return folder / "a.wav", folder / "b.wav"


def test_variations_of_a_sound(folder, sounds, tmp_path):
    out = tmp_path / "out"
    words = ("--model", folder, "--iterations", 1, "--device", "cpu", "--out", out, "--from", sounds[0])
    done = invoke("-n", 2, "--keep", 1, "--pitch", "A3", *words)
    assert done.exit_code == 0, done.output
    assert f"{sounds[0]}: padded with silence to 4 s" in done.output
    document = json.loads((out / "notes.json").read_text())
    assert (document["from"], document["keep"]) == (str(sounds[0]), 1)
    assert document["from_sha256"] == hashlib.sha256(sounds[0].read_bytes()).hexdigest()
    assert [note["condition"]["pitch"] for note in document["notes"]] == [57, 57]
    assert {note["condition"]["family"] for note in document["notes"]} == {None}
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "Variations of a.wav" in page
    assert page.count("data:audio/flac") == 1
    assert invoke("-n", 2, "--keep", 2, "--pitch", "A3", *words).exit_code == 2
    assert "(2 were there)" in invoke("-n", 2, "--keep", 1, "--pitch", "A3", *words).output


def test_a_morph_has_a_note_for_each_amount(folder, sounds, tmp_path):
    words = ("--model", folder, "--iterations", 1, "--device", "cpu", "--from", sounds[0], "--to", sounds[1])
    done = invoke("-n", 3, *words, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "out" / "notes.json").read_text())
    assert document["amount"] == [0, 1]
    assert len(document["notes"]) == 3
    done = invoke("--amount", "0.5", *words, "--out", tmp_path / "one")
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "one").glob("*.wav"))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", 1), "--keep is for a sound; give it as --from FILE"),
        (("--to", "a.wav"), "--to is for a sound; give it as --from FILE"),
        (("--from", "missing.wav"), "missing.wav is not a file"),
        (("--from", "A", "--keep", 9), "keep must be 0.."),
        (("--from", "A", "--amount", "0.5"), "--amount is for two sounds"),
        (("--from", "A", "--to", "B", "--amount", "2"), "want an amount from 0 to 1"),
        (("--from", "A", "--to", "B", "--amount", "0.5", "-n", 4), "4 notes of one amount would be the same"),
        (("--from", "A", "--pitch", "C3-C4"), "pitch"),
        (("--from", "A", "--family", "brss"), "did you mean brass"),
    ],
)
def test_mistakes_with_sounds_are_explained(folder, sounds, tmp_path, words, message):
    words = [{"A": sounds[0], "B": sounds[1]}.get(word, word) for word in words]
    done = invoke("--model", folder, "--out", tmp_path / "out", *words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


def test_a_whole_folder_is_left_as_it_is(made, folder):
    before = {p: p.stat().st_mtime_ns for p in made[0].iterdir()}
    done = invoke("-n", 3, "--model", folder, "--out", made[0], "--iterations", 1, "--seed", 7, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "3 notes in" in done.output
    assert "(3 were there)" in done.output
    assert {p: p.stat().st_mtime_ns for p in made[0].iterdir()} == before


def test_two_in_one_second_get_a_folder_each(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    for seed in (1, 2, 3):
        done = invoke("-n", 1, "--model", folder, "--seed", seed, "--iterations", 0)
        assert done.exit_code == 0, done.output
    seeds = {p.name: json.loads((p / "notes.json").read_text())["seed"] for p in (tmp_path / "generated").iterdir()}
    assert seeds == {"20260101-000000": 1, "20260101-000000-2": 2, "20260101-000000-3": 3}


def test_two_on_one_folder_do_not_mix(folder, tmp_path, monkeypatch):
    other = []

    def meanwhile(*arguments, iterate=Model.iterate, **settings):
        if not other and (tmp_path / "out").exists():
            other.append(None)
            other[0] = invoke("-n", 2, "--model", folder, "--out", tmp_path / "out", "--iterations", 0)
        return iterate(*arguments, **settings)

    monkeypatch.setattr(Model, "iterate", meanwhile)
    done = invoke("-n", 2, "--model", folder, "--out", tmp_path / "out", "--iterations", 0)
    assert done.exit_code == 0, done.output
    assert other[0].exit_code == 2
    assert "is in use by process" in " ".join(other[0].output.split())


def test_an_interrupted_command_is_gone_on_with(made, folder, tmp_path, monkeypatch):
    """Its files are those of one that was not interrupted, byte for byte."""
    from mars.audio import write_wav

    def stop(path, *rest):
        if path.name.startswith("0001"):
            raise KeyboardInterrupt
        write_wav(path, *rest)

    out = tmp_path / "notes"
    arguments = ("-n", 3, "--model", folder, "--out", out, "--iterations", 1, "--seed", 7, "--device", "cpu")
    monkeypatch.setattr("mars.audio.write_wav", stop)
    assert invoke(*arguments).exit_code == 130
    assert sorted(p.name[:4] for p in out.iterdir()) == ["0000", "note"]
    names = sorted(p.name for p in made[0].iterdir())
    for name in (names[1], "notes.json"):
        (out / f".{name}.1234.tmp").touch()  # as of a process that was killed
    monkeypatch.setattr("mars.audio.write_wav", write_wav)
    done = invoke(*arguments, "--batch-size", 1)
    assert done.exit_code == 0, done.output
    assert "(1 were there)" in done.output
    whole, found = (
        {str(p.relative_to(at)): p.read_bytes() for p in at.rglob("*") if p.is_file()} for at in (made[0], out)
    )
    assert found.keys() == whole.keys()
    assert all(found[name] == content for name, content in whole.items() if name != "notes.json")
    documents = [json.loads(files["notes.json"]) | {"batch_size": 0} for files in (whole, found)]
    assert documents[0] == documents[1]


def test_what_a_model_was_not_trained_on_is_refused_unless_allowed(folder, tmp_path):
    arguments = ("-n", 2, "--model", folder, "--out", tmp_path / "out", "--iterations", 0, "--pitch", 120)
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "known to have 42-70" in done.output
    assert not (tmp_path / "out").exists()
    done = invoke(*arguments, "--allow-untrained")
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "out" / "notes.json").read_text())
    assert document["allow_untrained"] is True
    assert [note["condition"]["pitch"] for note in document["notes"]] == [120, 120]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pitch", "128"], "--pitch"),
        (["--pitch", "60-48"], "--pitch"),
        (["--pitch", "H4"], "--pitch"),
        (["-n", "0"], "-n"),
        (["--top-p", "0"], "--top-p"),
        (["--cfg", "inf"], "cfg must be"),
        (["--family", "brss"], "did you mean brass"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_exit_with_2_and_write_nothing(folder, tmp_path, arguments, message):
    out = tmp_path / "out"
    done = invoke("--model", folder, "--out", out, *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert not out.exists()


def test_a_tokenizer_alone_is_refused(folder, tmp_path):
    settings = config.preset("smoke")
    Model(config=settings, tokenizer=Tokenizer(settings)).save(tmp_path / "model")
    done = invoke("--model", tmp_path / "model", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "train the second stage" in done.output


def test_a_full_disk_exits_with_6(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    done = invoke("--model", folder, "--out", tmp_path / "out")
    assert done.exit_code == 6
    assert "free" in done.output
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_whole_files_only(folder, tmp_path, monkeypatch):
    from mars.audio import write_wav

    def fail(path, waveform, rate):
        if path.name.startswith("0002"):
            monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        write_wav(path, waveform, rate)

    monkeypatch.setattr("mars.audio.write_wav", fail)
    done = invoke("-n", 4, "--model", folder, "--out", tmp_path / "out", "--iterations", 1)
    assert done.exit_code == 6
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert [name[:4] for name in names] == ["0000", "0001", "note"]
    assert all((tmp_path / "out" / name).stat().st_size == 128_044 for name in names[:2])
    document = json.loads((tmp_path / "out" / "notes.json").read_text())
    assert not any("sha256" in note for note in document["notes"])  # so that it does not pass for whole


def test_silence_is_reported(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mars.audio.griffin_lim", lambda m, config, *_, **__: torch.zeros(len(m), config.samples))
    done = invoke("-n", 2, "--model", folder, "--out", tmp_path / "out")
    assert done.exit_code == 0
    assert "2 of 2 notes are silent" in done.output


def test_defaults_are_those_of_the_library():
    with main.make_context("mars-generate", []) as context:
        options = context.params
    library = {p.name: p.default for p in inspect.signature(Model.iterate).parameters.values()}
    shared = (options.keys() & library.keys()) - {"n", "model"}
    assert len(shared) >= 10
    assert {name: options[name] for name in shared} == {name: library[name] for name in shared}


def test_help_is_quick():
    """It imports nothing heavy: no PyTorch, unless the package itself does."""
    code = (
        "import sys, mars; has = 'torch' in sys.modules; from mars.cli.generate import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "assert has or 'torch' not in sys.modules\n"
        "late = {'mars.model', 'mars.notes', 'mars.pages.picture', 'mars.train.start', 'rich.progress'}\n"
        "assert not late & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in (
        "-n",
        "--model",
        "--out",
        "--seed",
        "--pitch",
        "--family",
        "--source",
        "--velocity",
        "--allow-untrained",
        "--cfg",
    ):
        assert option in done.stdout
