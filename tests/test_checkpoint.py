"""Directories are complete or absent, damage is found, and nothing that could run is read."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mars import checkpoint, model
from mars.checkpoint import load_weights, replace_directory, verify, write_directory
from mars.config import preset
from mars.errors import CheckpointError, ConfigError
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR

TENSORS = {
    "a": {"x": torch.arange(6.0).view(2, 3), "y": torch.tensor(3)},
    "b": {"z": torch.ones(4, dtype=torch.bfloat16)},
}
DOCUMENTS = {"state": {"step": 5}}
HEARD = [{"family": "brass", "source": "acoustic", "count": 3, "pitch": [40, 50]}]
SMALL = ("tokenizer.width=8", "tokenizer.codebook_size=8", "tokenizer.code_dim=4", "var.width=8", "var.depth=1")


def write(path: Path, tensors=TENSORS) -> Path:
    write_directory(path, tensors, DOCUMENTS, {"README.md": "# hé\n"})
    return path


def relist(path: Path) -> None:
    """A manifest that fits whatever is there."""
    files = {
        p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "bytes": p.stat().st_size}
        for p in path.iterdir()
        if p.name != checkpoint.MANIFEST
    }
    (path / checkpoint.MANIFEST).write_text(json.dumps({"files": files}))


def test_what_is_written_is_read_back(tmp_path):
    path = write(tmp_path / "deep" / "er" / "c")
    verify(path)
    for name, group in TENSORS.items():
        found = checkpoint.read_tensors(path / f"{name}.safetensors")
        assert found.keys() == group.keys()
        for key, value in group.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value)
    assert checkpoint.read_json(path / "state.json") == {"step": 5}
    assert (path / "README.md").read_text("utf-8") == "# hé\n"
    assert [p.name for p in path.parent.iterdir()] == ["c"]


def test_strided_and_empty_tensors_are_written_as_their_values(tmp_path):
    x = torch.arange(6.0).view(2, 3).T
    path = write(tmp_path / "c", {"a": {"x": x, "none": torch.zeros(0, 3)}, "empty": {}})
    verify(path)
    assert torch.equal(checkpoint.read_tensors(path / "a.safetensors")["x"], x)
    assert checkpoint.read_tensors(path / "empty.safetensors") == {}


def test_an_existing_directory_is_not_written_to(tmp_path):
    path = write(tmp_path / "c")
    before = (path / "a.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        write(path)
    assert (path / "a.safetensors").read_bytes() == before


FILES = ["a.safetensors", "b.safetensors", "state.json", "README.md"]
DAMAGE = {
    "gone": Path.unlink,
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "empty": lambda p: p.write_bytes(b""),
    "one bit": lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_named(name, damage, tmp_path):
    path = write(tmp_path / "c")
    damage(path / name)
    with pytest.raises(CheckpointError, match=rf"{name} (is missing|does not match its checksum)"):
        verify(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"files": {}}',
        '{"files": []}',
        '{"files": {"a.safetensors": 1}}',
        "\xff",
        "[" * 99_999,
    ],
    ids=range(10),
)
def test_a_manifest_that_says_nothing_is_refused(text, tmp_path):
    path = write(tmp_path / "c")
    (path / checkpoint.MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError):
        verify(path)


def test_a_disk_that_cannot_be_read_is_damage_too(tmp_path, monkeypatch):
    path = write(tmp_path / "c")
    monkeypatch.setattr(checkpoint, "sha256", lambda file: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(CheckpointError, match=r"c/\S+ cannot be read: Input/output error"):
        verify(path)


def test_a_missing_manifest_or_directory_is_refused(tmp_path):
    path = write(tmp_path / "c")
    (path / checkpoint.MANIFEST).unlink()
    for folder in (path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=r"manifest\.json does not exist"):
            verify(folder)


@pytest.mark.parametrize("name", ["../secret.json", "/etc/hostname", "sub/x.json", "..", "."])
def test_a_manifest_cannot_point_outside(name, tmp_path):
    path = write(tmp_path / "c")
    (tmp_path / "secret.json").write_text("{}")
    (path / "sub").mkdir()
    (path / "sub" / "x.json").write_text("{}")
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(b"{}").hexdigest()}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is missing; the directory is damaged"):
        verify(path)


@pytest.mark.parametrize("name", ["c.safetensors", "notes.json"])
def test_files_that_would_be_read_must_be_listed(name, tmp_path):
    path = write(tmp_path / "c")
    (path / "notes.txt").write_text("anybody may leave a text")
    verify(path)
    (path / name).write_bytes((path / "a.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=f"{name} is not listed"):
        verify(path)


def failing_save(monkeypatch, at: int, error: BaseException) -> None:
    """The `at`-th file breaks off half-way."""
    calls = []
    original = checkpoint.write_new

    def write(path, parts):
        calls.append(path)
        if len(calls) == at:
            path.write_bytes(b"half a file")
            raise error
        return original(path, parts)

    monkeypatch.setattr(checkpoint, "write_new", write)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_an_interrupted_write_leaves_nothing(at, error, tmp_path, monkeypatch):
    failing_save(monkeypatch, at, error)
    with pytest.raises(type(error)):
        write(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_after_the_files_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "sync", lambda path: (_ for _ in ()).throw(OSError("broken disk")))
    with pytest.raises(OSError, match="broken disk"):
        write(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_the_files_are_on_disk_before_they_get_their_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "c", []
    original = os.fsync

    def fsync(descriptor):
        synced.append((os.fstat(descriptor).st_ino, path.exists()))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(path)
    before = {inode for inode, named in synced if not named}
    assert {p.stat().st_ino for p in (path, *path.iterdir())} <= before
    assert synced[-1] == (tmp_path.stat().st_ino, True)


def test_every_dtype_is_written_as_safetensors_reads_it(tmp_path):
    floats = ("float64", "float32", "float16", "bfloat16", "bool")
    names = [*floats, *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))]
    group = {name: torch.arange(6).view(2, 3).to(getattr(torch, name)) for name in names}
    group |= {"é": torch.tensor(1.0), "none": torch.zeros(0, 2), "long": torch.arange(300_000)}
    file = write(tmp_path / "c", {"a": group}) / "a.safetensors"
    found = load_file(file)
    assert found.keys() == group.keys()
    for name, value in group.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
        assert found[name].data_ptr() % max(value.element_size(), 1) == 0
    same = {name: torch.randn(3, 2) for name in "bca"}
    save_file(same, tmp_path / "theirs")
    assert (write(tmp_path / "d", {"a": same}) / "a.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_replacing_swaps_the_whole_directory(tmp_path):
    path = write(tmp_path / "c")
    replace_directory(path, {"new": {"x": torch.zeros(1)}}, {})
    verify(path)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "new.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    replace_directory(tmp_path / "d", TENSORS, DOCUMENTS)  # also where nothing is
    verify(tmp_path / "d")


@pytest.mark.parametrize("when", ["while writing", "while renaming"])
def test_a_failed_replacement_keeps_the_old_directory(when, tmp_path, monkeypatch):
    path = write(tmp_path / "c")
    with monkeypatch.context() as patch:
        if when == "while writing":
            failing_save(patch, 1, OSError("full"))
        else:
            rename = Path.rename

            def refuse(self, target):
                if self.name == ".new-c":
                    raise OSError("no")
                return rename(self, target)

            patch.setattr(Path, "rename", refuse)
        with pytest.raises(OSError, match=r"full|no"):
            replace_directory(path, {"new": {"x": torch.zeros(1)}}, {})
    verify(path)
    assert torch.equal(checkpoint.read_tensors(path / "a.safetensors")["x"], TENSORS["a"]["x"])
    replace_directory(path, {"new": {"x": torch.zeros(1)}}, {})  # what was left over does not get in the way
    assert (path / "new.safetensors").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("killed", ["after the first rename", "before it", "while removing the old", "while writing"])
def test_a_kill_while_replacing_is_put_right(killed, tmp_path):
    path = write(tmp_path / "c")
    newer = write(tmp_path / ".new-c", {"a": {"x": torch.zeros(1)}})
    expected = newer if killed == "after the first rename" else path
    x = checkpoint.read_tensors(expected / "a.safetensors")["x"]
    if killed == "after the first rename":
        path.rename(tmp_path / ".old-c")
    elif killed == "while removing the old":
        newer.rename(tmp_path / ".old-c")
        (tmp_path / ".old-c" / "a.safetensors").unlink()
    elif killed == "while writing":
        newer.rename(tmp_path / ".tmp-.new-c-123")
    for leftover in (".del-d", ".tmp-d-99"):
        write(tmp_path / leftover)
    (tmp_path / ".best.json.123.tmp").write_text("half")
    actual = checkpoint.current(path)  # what a reader sees, who may not write
    verify(actual)
    assert torch.equal(checkpoint.read_tensors(actual / "a.safetensors")["x"], x)
    checkpoint.recover(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    verify(path)
    assert torch.equal(checkpoint.read_tensors(path / "a.safetensors")["x"], x)


def test_an_old_directory_alone_gets_its_name_back(tmp_path):
    path = write(tmp_path / "c")
    path.rename(tmp_path / ".old-c")
    verify(checkpoint.current(path))
    checkpoint.recover(tmp_path)
    verify(path)
    checkpoint.recover(tmp_path / "nothing")  # no folder, nothing to do
    assert checkpoint.current(tmp_path / "nothing") == tmp_path / "nothing"


def test_what_is_removed_cannot_be_taken_for_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError("broken disk")))
        with pytest.raises(OSError, match="broken disk"):
            checkpoint.remove_directory(path)
    assert [p.name for p in tmp_path.iterdir()] == [".del-c"]
    checkpoint.recover(tmp_path)
    assert list(tmp_path.iterdir()) == []


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def test_weights_are_copied_into_place():
    one, other = layers(), layers()
    own = [p.data_ptr() for p in one.parameters()]
    load_weights(one, {k: v.double() for k, v in other.state_dict().items()}, Path("f"))
    assert [p.data_ptr() for p in one.parameters()] == own
    assert all(p.requires_grad and p.dtype == torch.float32 for p in one.parameters())
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": torch.zeros(3, 2)}, r"f: tensor 0\.weight has shape \(3, 2\), the configuration wants \(2, 3\)"),
        ({"0.weight": None}, r"f lacks tensor 0\.weight; it belongs to another configuration"),
        ({"evil": torch.zeros(1)}, r"f has an unknown tensor evil"),
        ({"1.bias": torch.tensor([float("nan")])}, r"f: tensor 1\.bias holds values that are not finite"),
        ({"0.bias": torch.tensor([0.0, float("-inf")])}, r"f: tensor 0\.bias holds values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    tensors = {**layers().state_dict(), **change}
    with pytest.raises(CheckpointError, match=message):
        load_weights(layers(), {k: v for k, v in tensors.items() if v is not None}, Path("f"))


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 64, b"\x08" + bytes(7) + b"{}      ", pickle.dumps({"x": 1})])
def test_what_is_no_safetensors_file_is_refused(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    if content[:1] == b"\x08":  # a valid file without tensors
        assert checkpoint.read_tensors(path) == {}
        return
    with pytest.raises(CheckpointError, match=r"a\.safetensors is not a readable safetensors file"):
        checkpoint.read_tensors(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.safetensors does not exist"):
        checkpoint.read_tensors(tmp_path / "a.safetensors")


def saved_model(path: Path) -> Path:
    c = preset("smoke", SMALL)
    model.Model(config=c, tokenizer=Tokenizer(c), var=VAR(c.var, c.tokenizer), notes=HEARD, card="# c").save(path)
    return path


def test_a_model_is_loaded_as_it_was_saved(tmp_path):
    c = preset("smoke", SMALL)
    saved = model.Model(config=c, tokenizer=Tokenizer(c), var=VAR(c.var, c.tokenizer), notes=HEARD, card="# c")
    saved.save(tmp_path / "m")
    found = model.load(tmp_path / "m")
    assert found.config == c
    assert (found.notes, found.card) == (saved.notes, saved.card)
    assert len(found.hash) == 64
    for a, b in ((found.tokenizer, saved.tokenizer), (found.var, saved.var)):
        assert not a.training
        assert a.state_dict().keys() == b.state_dict().keys()
        for name, value in b.state_dict().items():
            assert torch.equal(a.state_dict()[name], value)
        assert not any(p.requires_grad for p in a.parameters())


def test_a_model_is_found_though_its_writer_was_killed(tmp_path):
    saved_model(tmp_path / "run" / "model").rename(tmp_path / "run" / ".old-model")
    assert model.load(tmp_path / "run").var is not None
    assert model.load(tmp_path / "run" / "model").var is not None


def test_a_model_of_another_configuration_is_refused(tmp_path):
    path = saved_model(tmp_path / "m")
    values = json.loads((path / "config.json").read_text())
    values["tokenizer"]["codebook_size"] = 16
    (path / "config.json").write_text(json.dumps(values))
    relist(path)
    with pytest.raises(CheckpointError, match=r"tensor quantizer\.codebook has shape \(8, 4\), .* wants \(16, 4\)"):
        model.load(path)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def test_loading_unpickles_nothing(tmp_path, monkeypatch):
    path = saved_model(tmp_path / "m")
    bomb = Evil()
    bomb.target = str(tmp_path / "boom")
    content = pickle.dumps(bomb)
    for name in ("model.pt", "pytorch_model.bin", "tokenizer.pkl", "var.ckpt"):
        (path / name).write_bytes(content)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    assert model.load(path).var is not None
    (path / "tokenizer.safetensors").write_bytes(content)
    relist(path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.safetensors is not a readable safetensors file"):
        model.load(path)
    assert not (tmp_path / "boom").exists()
    monkeypatch.undo()
    pickle.loads(content)  # it would have gone off
    assert (tmp_path / "boom").exists()


def signed(tmp_path: Path, *settings: str) -> Path:
    """A small model that was changed by a stranger, who wrote a manifest that fits."""
    c = preset("smoke", (*SMALL, "var.heads=2", "tokenizer.heads=2", *settings))
    path = tmp_path / "m"
    model.Model(config=c, tokenizer=Tokenizer(c), var=VAR(c.var, c.tokenizer), notes=HEARD, card="# c").save(path)
    return path


HOSTILE_CONFIGS = {
    "width": ({"var": {"width": 65_536}}, "has shape .*, the configuration wants"),
    "wider": ({"var": {"width": 10**9}}, "var.width must be at most 65,536, got 1000000000"),
    "depth": ({"var": {"depth": 10**9}}, "var.depth must be at most 256, got 1000000000"),
    "tokenizer": ({"tokenizer": {"depth": 256}}, "lacks tensor"),
    "codes": ({"tokenizer": {"codebook_size": 1 << 24}}, "has shape .*, the configuration wants"),
    "code": ({"tokenizer": {"code_dim": 10**6}}, "tokenizer.code_dim must be at most 65,536"),
    "scales": ({"tokenizer": {"scales": [1, 2, 4, 10**6]}}, "tokenizer.scales must be at most 64 of at most 1024"),
    "frames": ({"audio": {"frames": 1 << 40}}, r"audio: n_fft / 2 x frames must be at most 16,777,216"),
    "rate": ({"audio": {"sample_rate": 10**12}}, "audio.sample_rate must be at most 384,000"),
    "huge number": ({"var": {"depth": 10**4000}}, "var.depth must be at most 256"),
}


@pytest.mark.parametrize(("changes", "message"), HOSTILE_CONFIGS.values(), ids=HOSTILE_CONFIGS)
def test_a_configuration_is_held_against_the_weights_before_memory_is_taken(changes, message, tmp_path, monkeypatch):
    path = signed(tmp_path)
    values = json.loads((path / "config.json").read_text())
    for group, settings in changes.items():
        values[group] |= settings
    (path / "config.json").write_text(json.dumps(values))
    relist(path)

    def built(module: nn.Module) -> None:
        assert next(module.parameters()).device.type == "meta", "memory was taken before the shapes were compared"

    for kind in (Tokenizer, VAR):
        original = kind.__init__

        def watched(self, *arguments, original=original, fits=kind is Tokenizer and "var" in changes):
            original(self, *arguments)
            if not fits:
                built(self)

        monkeypatch.setattr(kind, "__init__", watched)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        model.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


SENSELESS = {
    "notes.json": {
        "[null]": "entry 0 must hold a JSON object, got NoneType",
        "{}": "must hold a list, got dict",
        "[{}]": "entry 0 cannot be used: family is missing",
        '[{"family": "kazoo", "source": null, "count": 1, "pitch": [1, 2]}]': "family must be null or one of",
        '[{"family": null, "source": null, "count": 1, "pitch": [1, 2, 3]}]': "pitch must have 2 values",
        '[{"family": null, "source": null, "count": 1, "pitch": [60, 400]}]': "pitches from -1 to 127",
        '[{"family": null, "source": null, "count": "1", "pitch": [1, 2]}]': "count must be an int",
    },
    "config.json": {"[]": "must hold a JSON object", '{"preset": [[[]]]}': "preset must be a str", "{}": "preset is"},
    "README.md": {"\udcff": "README.md cannot be read as UTF-8 text"},
}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [(name, text, message) for name, texts in SENSELESS.items() for text, message in texts.items()],
)
def test_senseless_but_signed_documents_are_one_line(name, text, message, tmp_path):
    path = signed(tmp_path)
    (path / name).write_bytes(text.encode(errors="surrogateescape"))
    relist(path)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        model.load(path)
    assert "\n" not in str(caught.value)
    assert str(path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float8_e4m3fn, "is of dtype F8_E4M3; want one of F64, F32, F16, BF16"),
        (torch.complex64, "is of dtype C64; want one of F64"),
        (torch.int32, r"is of torch.int32, the configuration wants torch.float32"),
    ],
    ids=str,
)
def test_weights_of_other_kinds_of_numbers_are_one_line(dtype, message, tmp_path):
    path = signed(tmp_path)
    weights = path / "var.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(weights).items()}, weights)
    relist(path)
    with pytest.raises(CheckpointError, match=message):
        model.load(path)


def with_instruments(tmp_path: Path) -> Path:
    words = {"instrument": ["Horn in F", "flute"]}
    c = preset("smoke", (*SMALL, "var.condition=pitch,instrument"))
    heard = [{**HEARD[0], "instrument": "flute"}]
    var = VAR(c.var, c.tokenizer, words)
    model.Model(config=c, tokenizer=Tokenizer(c), var=var, notes=heard, words=words).save(tmp_path / "m")
    return tmp_path / "m"


def test_the_words_of_a_model_are_stored_with_it(tmp_path):
    path = with_instruments(tmp_path)
    found = model.load(path)
    assert found.words == {"instrument": ["Horn in F", "flute"]}
    assert found.transformer.condition["instrument"].weight.shape[0] == 3
    assert found.ranges.takes("instrument", "flute")
    assert not (saved_model(tmp_path / "without") / "labels.json").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.json", None, r"labels\.json"),
        ("labels.json", "[]", "must hold the words of instrument"),
        ("labels.json", "{}", "must hold the words of instrument"),
        ("labels.json", '{"instrument": ["a", "b"], "family": ["a"]}', "must hold the words of instrument"),
        ("labels.json", '{"instrument": "ab"}', "instrument must be a list of different words"),
        ("labels.json", '{"instrument": ["a", 3]}', "instrument must be a list of different words"),
        ("labels.json", '{"instrument": ["a", "a"]}', "instrument must be a list of different words"),
        ("labels.json", '{"instrument": ["a", ""]}', "instrument must be a list of different words"),
        ("labels.json", '{"instrument": ["a", "b\\u001b[2J"]}', "instrument must be a list of different words"),
        ("labels.json", '{"instrument": ["flute"]}', "has shape .*, the configuration wants"),
        (
            "notes.json",
            '[{"family": null, "source": null, "count": 1, "pitch": [1, 2], "instrument": "kazoo"}]',
            r"entry 0 .*instrument must be null or one of labels\.json, got 'kazoo'",
        ),
        (
            "notes.json",
            '[{"family": null, "source": null, "count": 1, "pitch": [1, 2], "instrument": [[]]}]',
            "entry 0 .*instrument must be null or one of",
        ),
    ],
)
def test_senseless_words_are_one_line(name, text, message, tmp_path):
    path = with_instruments(tmp_path)
    if text is None:
        (path / name).unlink()
    else:
        (path / name).write_text(text)
    relist(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        model.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
