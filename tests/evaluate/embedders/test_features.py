"""The feature cache: what is computed, what is found again, what is refused."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from mars import checkpoint
from mars.errors import CheckpointError, DataError
from mars.evaluate.embedders import features
from mars.evaluate.embedders.features import Embedding, embed
from mars.evaluate.sets import NoteSet, Record


def notes(*values: float) -> NoteSet:
    """Notes of constant samples, known by their value."""
    audio = torch.tensor(values)[:, None].expand(-1, 64_000)
    unknown = np.full(len(values), -1, np.int32)
    return NoteSet(
        source="test",
        names=tuple(map(str, values)),
        keys=tuple(map(str, values)),
        pitch=unknown,
        labels=({},) * len(values),
        record=Record(),
        _read=lambda rows: audio[list(rows)],
    )


@dataclass
class Counter:
    """An embedder whose features are the note's first sample; counts what it is given."""

    id: str = "counter"
    sample_rate: int = 16_000
    dim: int = 2
    classes: tuple[str, ...] | None = ("a", "b", "c")
    sha256: str = "0"
    front_end: str = "1"
    batches: list[int] = field(default_factory=list)

    def embed(self, waveforms: torch.Tensor) -> Embedding:
        self.batches.append(len(waveforms))
        first = waveforms[:, :1]
        logits = None if self.classes is None else first.expand(-1, 3) * torch.tensor([1.0, 2.0, 3.0])
        return Embedding(first[:, :, None].expand(-1, 4, 2).contiguous(), logits)


def test_features_come_in_the_order_of_the_notes():
    counter = Counter()
    made = embed(notes(0.3, 0.1, 0.2), counter, batch_size=2)
    assert counter.batches == [2, 1]
    assert made.frames.shape == (3, 4, 2)
    assert made.frames[:, 0, 0].tolist() == pytest.approx([0.3, 0.1, 0.2])
    torch.testing.assert_close(made.logits[:, 2], torch.tensor([0.9, 0.3, 0.6]))


def test_float32_is_float32_whatever_was_set():
    seen = []

    class Listener(Counter):
        def embed(self, waveforms):
            cudnn = torch.backends.cudnn
            seen.append((torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic))
            return super().embed(waveforms)

    torch.set_float32_matmul_precision("medium")
    try:
        before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
        embed(notes(0.1), Listener())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", False, True)]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic) == before


def test_threads_that_start_later_have_all_their_threads():
    def of_a_new_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        embed(notes(0.1, 0.2), Counter(), batch_size=1)
        assert torch.get_num_threads() == of_a_new_thread() == 3
    finally:
        torch.set_num_threads(threads)


def test_logits_may_be_absent(tmp_path):
    for _ in range(2):
        assert embed(notes(0.1), Counter(classes=None), tmp_path).logits is None


def test_what_is_known_is_not_computed_again(tmp_path):
    counter = Counter()
    first = embed(notes(0.1, 0.2), counter, tmp_path)
    assert embed(notes(0.2, 0.1), counter, tmp_path).frames[:, 0, 0].tolist() == pytest.approx([0.2, 0.1])
    assert counter.batches == [2]
    more = embed(notes(0.3, 0.2, 0.4), counter, tmp_path)
    assert counter.batches == [2, 2]
    assert more.frames[:, 0, 0].tolist() == pytest.approx([0.3, 0.2, 0.4])
    assert torch.equal(more.logits[1], first.logits[1])


def test_a_note_that_a_set_holds_twice_is_computed_once(tmp_path):
    counter = Counter()
    made = embed(notes(0.1, 0.2, 0.1), counter, tmp_path)
    assert counter.batches == [2]
    assert made.frames[:, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.1])


@pytest.mark.parametrize("change", [{"sha256": "x"}, {"front_end": "x"}, {"id": "other"}], ids=str)
def test_another_embedder_shares_nothing(change, tmp_path):
    embed(notes(0.1), Counter(), tmp_path)
    other = Counter(**change)
    embed(notes(0.1), other, tmp_path)
    assert other.batches == [1]


def test_an_interrupted_run_keeps_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PART", 2)
    counter = Counter()
    given = notes(*(i / 10 for i in range(7)))

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(given, counter, tmp_path, batch_size=1, progress=stop)
    again = Counter()
    assert embed(given, again, tmp_path).frames[:, 0, 0].tolist() == pytest.approx([i / 10 for i in range(7)])
    assert again.batches == [2, 1]


def test_progress_counts_what_was_known(tmp_path):
    embed(notes(0.1, 0.2), Counter(), tmp_path)
    calls = []
    embed(notes(0.1, 0.2, 0.3, 0.4), Counter(), tmp_path, batch_size=1, progress=lambda *a: calls.append(a))
    assert calls == [(3, 4), (4, 4)]


def test_a_damaged_part_is_an_error_that_says_what_to_remove(tmp_path):
    embed(notes(0.1), Counter(), tmp_path)
    (part,) = tmp_path.glob("*/part-*")
    file = part / "features.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"does not match its checksum.*; remove {part}"):
        embed(notes(0.1), Counter(), tmp_path)
    counter = Counter()
    embed(notes(0.2), counter, tmp_path)  # what another note needs is not damaged
    assert counter.batches == [1]


@pytest.mark.parametrize(
    ("tensors", "listing", "message"),
    [
        ({"frames": torch.zeros(1, 1, 1)}, None, "does not list notes"),
        ({"frames": torch.zeros(1, 1, 1)}, [["a"]], "does not list notes"),
        ({"logits": torch.zeros(1, 1)}, "own", "does not hold the features of 1 notes"),
        ({"frames": torch.zeros(2, 1, 1)}, "own", "does not hold the features of 1 notes"),
    ],
    ids=range(4),
)
def test_a_senseless_part_is_an_error_that_says_what_to_remove(tensors, listing, message, tmp_path):
    given = notes(0.1)
    embed(given, Counter(), tmp_path)
    (part,) = tmp_path.glob("*/part-*")
    shutil.rmtree(part)
    keys = list(given.keys) if listing == "own" else listing
    checkpoint.write_directory(part, {"features": tensors}, {"notes": keys})
    with pytest.raises(CheckpointError, match=rf"{message}.*; remove {part}"):
        embed(given, Counter(), tmp_path)


def test_another_process_may_write_the_same_part_first(tmp_path, monkeypatch):
    write = checkpoint.write_directory
    calls = []

    def late(path, *content):
        calls.append(path)
        write(path, *content)
        write(path, *content)  # raises FileExistsError

    monkeypatch.setattr(checkpoint, "write_directory", late)
    made = embed(notes(0.1), Counter(), tmp_path)
    assert calls
    assert made.frames[0, 0, 0] == pytest.approx(0.1)


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(OSError, match="cache"):
        embed(notes(0.1), Counter(), tmp_path / "cache")


def test_features_that_are_not_finite_are_an_error_and_not_kept(tmp_path):
    with pytest.raises(DataError, match="counter has no finite features for nan of test"):
        embed(notes(0.1, float("nan")), Counter(), tmp_path)
    assert not list(tmp_path.glob("*/part-*"))


def test_other_rates_and_empty_sets_are_errors():
    with pytest.raises(ValueError, match="counter takes notes at 8000 Hz, got 16000"):
        embed(notes(0.1), Counter(sample_rate=8000))
    with pytest.raises(ValueError, match="want at least one note"):
        embed(notes(0.1).subset([]), Counter())


def test_keys_of_the_cache_are_float32_safetensors(tmp_path):
    embed(notes(0.1, 0.2), Counter(), tmp_path)
    (part,) = tmp_path.glob("counter-*/part-*")
    assert sorted(p.name for p in part.iterdir()) == ["features.safetensors", "manifest.json", "notes.json"]
    tensors = checkpoint.read_tensors(part / "features.safetensors")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "frames": (torch.float32, (2, 4, 2)),
        "logits": (torch.float32, (2, 3)),
    }
    assert checkpoint.read_json(part / "notes.json") == ["0.1", "0.2"]
