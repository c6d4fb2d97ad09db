"""A trained model: the front end's settings, the tokenizer and, if it can generate, the VAR transformer.

A generated note depends on its seed, index and condition alone: it has its own random stream, and the network always
runs on whole tiles of notes, index i in slot i % tile of tile i // tile, because matrix products may round differently
with the number of their rows. So on one machine a note has the same bytes whatever n, start, batch_size and the
conditions of other notes are. Another device, number of threads or version of PyTorch may round differently, which can
change a token.

Precision: the tokens of a sound, and the sound of tokens, are computed in float32 (`CODING`), on every device and
whatever the model was trained in: in bfloat16 a third of a note's tokens come out as others. What a transformer draws
is its own choice, so generation has a setting, `precision`: "auto", unless one asks for another, is bfloat16 where the
device computes in it natively.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack, get_args

import torch
from torch import Tensor

import mars
from mars import audio, checkpoint, config
from mars.arguments import Array, integer, number, tensor
from mars.config import AudioConfig, Config
from mars.errors import CheckpointError, ConfigError
from mars.files import read_text, sha256
from mars.labels import LABELS, LONGEST_WORD, Condition, Ranges, Words, condition_ids
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR
from mars.notes import Note
from mars.runtime import Precision, autocast, pick_device, stream
from mars.sampling import sample, tile_size
from mars.text import is_one_line

M = TypeVar("M", bound=torch.nn.Module)
DEFAULT = "notes"  # the packaged model
CODING: Precision = "float32"  # of encoding and decoding
STREAM = 4  # tells the random streams of notes from those of training with the same seed


@dataclass
class Timing:
    """Seconds spent so far, over all notes."""

    transformer: float = 0.0
    decoding: float = 0.0  # tokens to spectrogram
    griffin_lim: float = 0.0


@dataclass(frozen=True, eq=False)
class _Decoded:
    """A note without its waveform."""

    index: int
    stream: torch.Generator
    condition: Condition
    ids: Tensor
    spectrogram: Tensor  # on the model's device


class Generation(TypedDict, total=False):
    """Settings of `Model.iterate`."""

    seed: int
    start: int
    pitch: int | tuple[int, int] | None
    family: str | None
    source: str | None
    velocity: int | None
    instrument: str | None
    allow_untrained: bool
    conditions: Sequence[Condition] | None
    cfg: float
    top_k: int
    top_p: float
    batch_size: int
    iterations: int
    precision: Precision
    progress: Callable[[int, int], None] | None
    timing: Timing | None


@dataclass
class Model:
    """Tokenizer and VAR with their settings; see `load`."""

    config: Config
    tokenizer: Tokenizer
    var: VAR | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)  # what it was trained on: see `mars.labels.entries`
    words: Words = field(default_factory=dict)  # of those of its conditions whose words are the data's
    data: Mapping[str, str] = field(default_factory=dict)  # fingerprint of what "tokenizer" and "var" were trained on
    card: str = ""  # Markdown: data, licence, figures
    hash: str = ""  # sha256 of the manifest it was loaded from

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.tokenizer.mask.device

    @property
    def record(self) -> dict[str, Any]:
        """What decides generated notes besides the settings: hash of the weights, versions, device, threads."""
        return {
            "mars": mars.__version__,
            "model_hash": self.hash,
            "torch": torch.__version__,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
        }

    @property
    def transformer(self) -> VAR:
        """The VAR. Raises `CheckpointError` if the model has none."""
        if self.var is None:
            raise CheckpointError("the model is a tokenizer only; train the second stage on it: `mars-train var`")
        return self.var

    @property
    def ranges(self) -> Ranges:
        """The labels that can be requested. Raises `CheckpointError` if the model has no VAR."""
        return Ranges(self.transformer.config.condition, self.notes, self.words)

    @torch.inference_mode()
    def encode(self, waveform: Array, *, refine: int = 0) -> Tensor:
        """Encode to tokens int64 (B, L) the waveforms (B, samples) in [-1, 1] at `config.audio.sample_rate`.

        A NumPy array is accepted. Notes of another length must first be cut, or padded with zeros, by the caller.

        Args:
            refine: steps by which the tokens are then improved, so that the sound of them is nearer to the note's
                (`mars.models.tokenizer.Tokenizer.refine`); each takes about as long as encoding does twice.

        Raises:
            ConfigError: another shape, integers, NaN or infinity, or a setting out of range.
            CheckpointError: the tokenizer's weights are not float32 any more.
        """
        expected = f"waveforms (B, {self.config.audio.samples}), floating-point with full scale 1"
        x = tensor("encode", waveform, expected)
        if not x.is_floating_point():
            hint = "" if x.is_complex() or x.dtype == torch.bool else "; divide 16-bit samples by 32768"
            raise ConfigError(f"encode: want {expected}, got {x.dtype}{hint}")
        if x.ndim != 2:
            hint = "; give one note as waveform[None]" if x.ndim == 1 else "; mix channels to one, one note a row"
            raise ConfigError(f"encode: want {expected}, got shape {tuple(x.shape)}{hint}")
        if x.shape[1] != self.config.audio.samples:
            do = "cut it" if x.shape[1] > self.config.audio.samples else "pad it with zeros"
            raise ConfigError(f"encode: want {expected}, got {x.shape[1]} samples; {do}")
        if not bool(x.isfinite().all()):
            raise ConfigError(f"encode: want {expected}, got NaN or infinity in {_rows(~x.isfinite())}")
        refine = integer("refine", refine, 0)
        self.check_weights()
        return tokens_of(self.tokenizer, x.to(self.device), self.config.audio, refine)

    @torch.inference_mode()
    def decode(self, ids: Array, *, iterations: int = 32, seed: int | Sequence[torch.Generator] = 0) -> Tensor:
        """Decode tokens (B, L), a NumPy array or a tensor of integers, to waveforms (B, samples).

        Griffin-Lim finds the phases, from random ones of `seed`: a number, or a generator for each note.

        Raises:
            ConfigError: another shape, numbers that are no tokens, a setting out of range.
            CheckpointError: the tokenizer's weights are not float32 any more.
        """
        spectrograms = self.spectrogram(ids)
        iterations = integer("iterations", iterations, 0)
        if not isinstance(seed, Sequence):
            seed = integer("seed", seed, 0, 2**63 - 1)
        elif len(seed) != len(spectrograms) or not all(isinstance(generator, torch.Generator) for generator in seed):
            raise ConfigError(f"seed must be a number or {len(spectrograms)} generators, one a note; got {seed!r:.80}")
        magnitudes = audio.magnitudes(spectrograms, self.config.audio)
        return audio.griffin_lim(magnitudes, self.config.audio, iterations, generators=seed)

    @torch.inference_mode()
    def spectrogram(self, ids: Array) -> Tensor:
        """Decode tokens (B, L), a NumPy array or a tensor of integers, to spectrograms (B, bins, frames) in [-1, 1].

        Raises:
            ConfigError: another shape, or numbers that are no tokens.
            CheckpointError: the tokenizer's weights are not float32 any more.
        """
        size, length = self.config.tokenizer.codebook_size, self.config.tokenizer.tokens
        expected = f"tokens (B, {length}), integers 0..{size - 1}"
        x = tensor("decode", ids, expected)
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ConfigError(f"decode: want {expected}, got {x.dtype}")
        if x.ndim != 2 or x.shape[1] != length:
            hint = "; give one note as ids[None]" if x.shape == (length,) else ""
            raise ConfigError(f"decode: want {expected}, got shape {tuple(x.shape)}{hint}")
        x = x.to(torch.int64)
        if bool((outside := (x < 0) | (x >= size)).any()):
            raise ConfigError(f"decode: want {expected}, got {int(x[outside][0])} in {_rows(outside)}")
        self.check_weights()
        return self._decoded(self.tokenizer.quantizer.latent(x.to(self.device)))

    def _decoded(self, latent: Tensor) -> Tensor:
        """Decode the latent maps (B, D, H, W) of tokens to spectrograms (B, bins, frames) in [-1, 1]."""
        with autocast(self.device, CODING):
            x = self.tokenizer.reconstruct(latent).clamp(-1, 1)
        return audio.demultiplexed(x, self.config.audio)

    def check_weights(self) -> None:
        """Raise `CheckpointError` if the weights have been converted from float32."""
        for name, part in (("tokenizer", self.tokenizer), ("var", self.var)):
            dtype = next((p.dtype for p in part.parameters() if p.dtype != torch.float32), None) if part else None
            if dtype is not None:
                raise CheckpointError(f"{name}: want weights in float32, got {dtype}; go back: model.{name}.float()")

    def generate(self, n: int, **settings: Unpack[Generation]) -> list[Note]:
        """Generate notes and return them all; the settings are those of `iterate`, with the same defaults."""
        return list(self.iterate(n, **settings))

    def iterate(
        self,
        n: int,
        *,
        seed: int = 0,
        start: int = 0,
        pitch: int | tuple[int, int] | None = None,
        family: str | None = None,
        source: str | None = None,
        velocity: int | None = None,
        instrument: str | None = None,
        allow_untrained: bool = False,
        conditions: Sequence[Condition] | None = None,
        cfg: float = 2.0,
        top_k: int = 900,
        top_p: float = 0.96,
        batch_size: int = 16,
        iterations: int = 32,
        precision: Precision = "auto",
        progress: Callable[[int, int], None] | None = None,
        timing: Timing | None = None,
    ) -> Iterator[Note]:
        """Generate notes `start` to `start + n - 1` of `seed`, in order, as an iterator.

        What is not given of the labels is drawn for each note from what the model was trained on (`model.notes`): any
        of its families, the source most common in it, any of their instruments, one of its usual pitches, any of its
        velocities, among the notes that go with what is given. It is left open if that is not known or the model has
        no such condition.

        Args:
            pitch: MIDI number, or (lowest, highest); the usual pitches within that range if there are any.
            velocity: counts as the nearest of `mars.labels.VELOCITIES`.
            instrument: one of `model.words["instrument"]`.
            allow_untrained: take what is out of the range that the model was trained on; see
                `mars.labels.Ranges.requested`.
            conditions: n conditions, one for each note, instead of the labels; see
                `mars.labels.Ranges.accepted`.
            cfg: guidance towards the condition on the last scale, growing linearly from 0 on the first. 0:
                none, at half the cost. Without effect if the model has no condition.
            top_k: draw among so many of the likeliest tokens.
            top_p: of these, draw among the likeliest whose probabilities add up to this.
            batch_size: notes finished together, rounded up to whole tiles; of no effect on the notes.
            iterations: of Griffin-Lim.
            precision: of the transformer: "auto" (bfloat16 where the device computes in it natively), "float32" or
                "bfloat16".
            progress: called with the notes done and n.
            timing: to which the seconds of each part are added.

        Raises:
            CheckpointError: the model is a tokenizer only or, later, gives numbers that are not finite.
            ConfigError: a setting is out of range or asks for what the model was not trained on.
        """
        var, ranges, device = self.transformer, self.ranges, self.device
        self.check_weights()
        n, seed, start = integer("n", n, 1), integer("seed", seed, 0), integer("start", start, 0)
        top_k, batch_size = integer("top_k", top_k, 1), integer("batch_size", batch_size, 1)
        iterations, cfg, top_p = integer("iterations", iterations, 0), number("cfg", cfg), number("top_p", top_p)
        if not 0 <= cfg < math.inf:
            raise ConfigError(f"cfg must be at least 0 (no guidance), got {cfg}")
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1 (no limit), got {top_p}")
        if precision not in get_args(Precision):
            raise ConfigError(f"precision must be one of {', '.join(get_args(Precision))}; got {precision!r:.80}")
        requested = ranges.requested(
            pitch=pitch,
            family=family,
            source=source,
            velocity=velocity,
            instrument=instrument,
            allow_untrained=allow_untrained,
        )
        given: dict[int, Condition] = {}
        if conditions is not None:
            if any(value is not None for value in requested.values()):
                raise ConfigError(f"conditions say what each note is to be; leave out {', '.join(LABELS)}")
            if not isinstance(conditions, Sequence) or len(conditions) != n:
                got = len(conditions) if isinstance(conditions, Sequence) else repr(conditions)[:80]
                raise ConfigError(f"want a condition for each of {n} notes, got {got}")
            accepted = [ranges.accepted(condition, allow_untrained=allow_untrained) for condition in conditions]
            given = dict(enumerate(accepted, start))
        timing = timing or Timing()
        size = tile_size(device)
        indices = range(start, start + n)

        def sample_tile(first: int) -> list[_Decoded]:
            """Sample the tile of notes from `first`, always a whole one, even if fewer are requested."""
            streams = [stream(seed, STREAM, index) for index in range(first, first + size)]
            chosen = [ranges.choose(requested, s) for s in streams]
            conditions = [given.get(first + i, condition) for i, condition in enumerate(chosen)]
            uniforms = torch.stack([torch.rand(var.starts[-1], generator=s, dtype=torch.float32) for s in streams])
            began = time.perf_counter()
            classes = condition_ids(conditions, var.config.condition, self.words).to(device)
            ids, latent = sample(
                var,
                self.tokenizer.quantizer,
                classes,
                uniforms.to(device),
                cfg=cfg,
                top_k=top_k,
                top_p=top_p,
                precision=precision,
            )
            ids = ids.cpu()
            sampled = time.perf_counter()
            spectrograms = self._decoded(latent)
            _synchronise(device)
            timing.transformer += sampled - began
            timing.decoding += time.perf_counter() - sampled
            return [_Decoded(first + i, s, conditions[i], ids[i], spectrograms[i]) for i, s in enumerate(streams)]

        def notes() -> Iterator[Note]:
            step = -(-batch_size // size) * size
            for first in range(start - start % size, start + n, step):
                with torch.no_grad():
                    tiles = [sample_tile(t) for t in range(first, min(first + step, start + n), size)]
                    if device.type == "cpu":  # there Griffin-Lim treats each note by itself, whole tile or not
                        tiles = [[d for tile in tiles for d in tile if d.index in indices]]
                    began = time.perf_counter()
                    finished = [note for tile in tiles for note in finish(tile) if note.index in indices]
                    timing.griffin_lim += time.perf_counter() - began
                if progress is not None:
                    progress(finished[-1].index + 1 - start, n)
                yield from finished

        def finish(tile: list[_Decoded]) -> list[Note]:
            """Add the waveforms by Griffin-Lim to the notes of a tile."""
            spectrograms = torch.stack([d.spectrogram for d in tile])
            magnitudes = audio.magnitudes(spectrograms, self.config.audio)
            streams = [d.stream for d in tile]
            waveforms = audio.griffin_lim(magnitudes, self.config.audio, iterations, generators=streams).cpu()
            for d, finite in zip(tile, waveforms.isfinite().all(dim=1).tolist(), strict=True):
                if not finite:
                    raise CheckpointError(
                        f"note {d.index} of seed {seed} is not finite; the model's weights are unusable"
                    )
            return [
                Note(d.index, w, s, d.ids, d.condition)
                for d, w, s in zip(tile, audio.within_full_scale(waveforms), spectrograms.cpu(), strict=True)
            ]

        return notes()

    def choose(
        self,
        n: int,
        *,
        seed: int = 0,
        start: int = 0,
        pitch: int | tuple[int, int] | None = None,
        family: str | None = None,
        source: str | None = None,
        velocity: int | None = None,
        instrument: str | None = None,
        allow_untrained: bool = False,
    ) -> list[Condition]:
        """Return the conditions that `iterate` draws with these arguments, without generating the notes.

        Raises:
            CheckpointError, ConfigError: see `iterate`.
        """
        ranges = self.ranges
        n, seed, start = integer("n", n, 1), integer("seed", seed, 0), integer("start", start, 0)
        requested = ranges.requested(
            pitch=pitch,
            family=family,
            source=source,
            velocity=velocity,
            instrument=instrument,
            allow_untrained=allow_untrained,
        )
        return [ranges.choose(requested, stream(seed, STREAM, index)) for index in range(start, start + n)]

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the model directory `path`, replacing one that is there.

        Raises:
            OSError: it cannot be written; the old directory is kept.
        """
        tensors = {"tokenizer": _state(self.tokenizer, dtype)}
        if self.var is not None:
            tensors["var"] = _state(self.var, dtype)
        documents: dict[str, Any] = {"config": config.to_dict(self.config), "notes": self.notes}
        if self.words:
            documents["labels"] = {name: list(words) for name, words in self.words.items()}
        if self.data:
            documents["data"] = dict(self.data)
        checkpoint.replace_directory(path, tensors, documents, {"README.md": self.card} if self.card else None)


@torch.inference_mode()
def tokens_of(tokenizer: Tokenizer, waveforms: Tensor, config: AudioConfig, refine: int = 0) -> Tensor:
    """Encode waveforms (B, samples), cut or padded, on the tokenizer's device, to tokens int64 (B, L).

    This is what `Model.encode` computes, for a tokenizer without a model and waveforms that are known to be sound.
    """
    with autocast(waveforms.device, CODING):
        x = audio.multiplexed(waveforms, config)
        return tokenizer.refine(x, refine) if refine else tokenizer.encode(x)


def _rows(marked: Tensor) -> str:
    """List for a message the rows of (B, n) in which anything is marked."""
    rows = marked.any(dim=1).nonzero().flatten().tolist()
    return f"row {rows[0]}" + (f" and {len(rows) - 1} more" if rows[1:] else "")


def _state(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in module.state_dict().items()}


def _loaded(build: Callable[[], M], weights: Path, device: str | torch.device) -> M:
    """Build the module with its weights, after a copy on the meta device has shown that they fit."""
    with torch.device("meta"):
        checkpoint.check_shapes(build(), weights)
    module = build()
    checkpoint.load_weights(module, checkpoint.read_tensors(weights), weights)
    return module.to(device).eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Range:
    """An entry of notes.json, as `mars.labels.entries` makes them, but for open labels."""

    family: str | None
    source: str | None
    count: int
    pitch: tuple[int, int]
    pitch_range: tuple[int, int] = (-1, -1)  # older models lack this and the next
    velocity: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        spans = self.pitch, self.pitch_range
        if self.count < 0 or not all(-1 <= low <= high < 128 for low, high in spans):
            raise ConfigError(f"want a count and pitches from -1 to 127, got {self.count:,}, {spans[0]} and {spans[1]}")
        if not all(0 <= level < 128 for level in self.velocity):
            raise ConfigError(f"want velocities from 0 to 127, got {self.velocity}")
        for name in ("family", "source"):
            known, value = LABELS[name].words, getattr(self, name)
            if value not in (None, *known):
                raise ConfigError(f"{name} must be null or one of {', '.join(known)}; got {value!r:.80}")


def _ranges(path: Path, words: Words) -> list[dict[str, Any]]:
    entries = checkpoint.read_json(path)
    if not isinstance(entries, list):
        raise CheckpointError(f"{path} must hold a list, got {type(entries).__name__}")
    for i, entry in enumerate(entries):
        config.from_document(_Range, entry, f"{path}: entry {i}", CheckpointError)
        for name, known in words.items():
            if (value := entry.get(name)) is not None and value not in known:
                expected = f"{name} must be null or one of labels.json"
                raise CheckpointError(f"{path}: entry {i} cannot be used: {expected}, got {value!r:.80}")
    return entries


def _words(path: Path, attributes: Sequence[str]) -> dict[str, list[str]]:
    """Read the words of the open conditions from `labels.json`; models without such conditions have none."""
    names = {name for name in attributes if LABELS[name].open}
    if not names:
        return {}
    document = checkpoint.read_json(path)
    if not isinstance(document, dict) or not names <= document.keys() <= set(attributes):
        raise CheckpointError(f"{path} must hold the words of {', '.join(sorted(names))}, got {document!r:.80}")
    for name, words in document.items():
        good = isinstance(words, list) and all(
            isinstance(word, str) and 0 < len(word) <= LONGEST_WORD and is_one_line(word) for word in words
        )
        if not good or len(set(words)) < len(words):
            raise CheckpointError(f"{path}: {name} must be a list of different words, each on one line")
    return document


def locate(name: str | Path | None) -> Path:
    """Return the model directory of a packaged name, a run folder or a model directory; None: the packaged default.

    Raises:
        CheckpointError: there is no such model.
    """
    packaged = Path(str(resources.files("mars").joinpath("assets", "models")))
    path = packaged / DEFAULT if name is None else Path(name)
    if name is not None and not path.exists() and (packaged / str(name)).is_dir():
        path = packaged / str(name)
    for candidate in (checkpoint.current(path), checkpoint.current(path / "model")):
        if (candidate / "config.json").is_file() and (candidate / "tokenizer.safetensors").is_file():
            return candidate
    if name is None:
        raise CheckpointError("this installation has no packaged model; name one with `model`")
    if (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path} is a run that has not finished its first save; wait for it or resume it")
    known = ", ".join(sorted(p.name for p in packaged.iterdir())) if packaged.is_dir() else ""
    raise CheckpointError(f"{path} is not a model or a run folder; packaged models: {known or 'none'}")


def load(name: str | Path | None = None, device: str | torch.device = "cpu") -> Model:
    """Load a model.

    Args:
        name: a run folder, a model directory, the name of a packaged model, or None for the packaged default.
        device: where the weights go: auto, cpu, cuda, cuda:1, mps, ….

    Raises:
        CheckpointError: there is no such model, or a file is damaged or does not fit its configuration.
        ConfigError: its configuration cannot be used, or there is no such device.
    """
    device = pick_device(device)
    path = locate(name)
    checkpoint.verify(path)
    settings = config.load(path / "config.json")
    tokenizer: Tokenizer = _loaded(lambda: Tokenizer(settings), path / "tokenizer.safetensors", device)
    var, words = None, dict[str, list[str]]()
    if (path / "var.safetensors").exists():
        words = _words(path / "labels.json", settings.var.condition)
        var = _loaded(lambda: VAR(settings.var, settings.tokenizer, words), path / "var.safetensors", device)
    card = path / "README.md"
    return Model(
        config=settings,
        tokenizer=tokenizer,
        var=var,
        notes=_ranges(path / "notes.json", words),
        words=words,
        data=_data(path),
        card=read_text(card, CheckpointError) if card.exists() else "",
        hash=sha256(path / checkpoint.MANIFEST),
    )


def _data(path: Path) -> dict[str, str]:
    """Read the datasets' fingerprints from `data.json`, or for a model without it from the run that holds it."""
    if (path / "data.json").is_file():
        document = checkpoint.read_json(path / "data.json")
        if isinstance(document, dict) and all(isinstance(value, str) for value in document.values()):
            return document
        raise CheckpointError(f"{path / 'data.json'} must hold the fingerprint of a dataset for each stage")
    record = path.parent / "run.json"
    run = checkpoint.read_json(record) if record.is_file() else None
    if isinstance(run, dict) and isinstance(run.get("stage"), str) and isinstance(run.get("data"), str):
        return {run["stage"]: run["data"]}
    return {}


def _synchronise(device: torch.device) -> None:
    """Wait until the device has finished, so that `Timing` is right."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
