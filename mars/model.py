"""A trained model: the front end's settings, the tokenizer and, if it can generate, the VAR transformer.

A generated note depends on its seed, index and condition alone: it has its own random stream, and the network always
runs on whole tiles of notes, index i in slot i % tile of tile i // tile, because matrix products may round differently
with the number of their rows. So on one machine a note has the same bytes whatever n, start, batch_size and the
conditions of other notes are. On a CPU tiles are computed side by side, each on one thread, so that the number of
threads does not count either, but for a large transformer, whose tiles have all of them
(`mars.models.sampling.workers`). Another device or version of PyTorch may round differently, which can change a token.

Precision: the tokens of a sound, and the sound of tokens, are computed in float32 (`CODING`), on every device and
whatever the model was trained in: in bfloat16 a third of a note's tokens come out as others. What a transformer draws
is its own choice, so generation has a setting, `precision`: "auto", unless one asks for another, is bfloat16 where the
device computes in it natively.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar, Unpack, get_args

import torch
from torch import Tensor

import mars
from mars import audio, checkpoint, config, hub
from mars.arguments import Array, integer, number, tensor
from mars.config import AudioConfig, Config
from mars.data.sound import Given, waveform
from mars.errors import CheckpointError, ConfigError
from mars.files import read_text, sha256
from mars.kernels import _backend
from mars.labels import LABELS, LONGEST_WORD, Condition, Ranges, Words, condition_ids, label
from mars.models.sampling import sample, tile_size, workers
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR
from mars.notes import Note
from mars.pages import html
from mars.runtime import Precision, ahead, autocast, pick_device, stream, thread_pool
from mars.text import is_one_line

M = TypeVar("M", bound=torch.nn.Module)
Sound: TypeAlias = "Given | Note"  # what `Model.tokenize` takes
DEFAULT = "notes"  # the packaged model
CODING: Precision = "float32"  # of encoding and decoding
SOUND = 7  # the same of the phases of tokens that are only made to sound
STREAM = 4  # tells the random streams of notes from those of training with the same seed


@dataclass
class Timing:
    """Seconds spent so far, over all notes; what went on side by side shares them."""

    transformer: float = 0.0
    decoding: float = 0.0  # tokens to spectrogram
    griffin_lim: float = 0.0
    compiling: float = 0.0  # importing and compiling kernels, in none of the above; on a CPU they are there already

    def add(self, transformer: float, decoding: float, griffin_lim: float, waited: float) -> None:
        """Share the seconds that were waited for some notes among their parts, as these took."""
        share = waited / max(transformer + decoding + griffin_lim, 1e-9)
        self.transformer += share * transformer
        self.decoding += share * decoding
        self.griffin_lim += share * griffin_lim


def _clock() -> float:
    """Seconds on a clock that stands still while kernels are imported and compiled."""
    return time.perf_counter() - _backend.compiling_seconds()


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
    labels: Mapping[str, str] | None
    allow_untrained: bool
    conditions: Sequence[Condition] | None
    tokens: Array | None
    cfg: float
    top_k: int
    top_p: float
    temperature: float
    batch_size: int
    iterations: int
    precision: Precision
    progress: Callable[[int, int], None] | None
    timing: Timing | None


@dataclass(repr=False)
class Model:
    """Tokenizer and VAR with their settings; see `load`. In a notebook it shows its card."""

    config: Config
    tokenizer: Tokenizer
    var: VAR | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)  # what it was trained on: see `mars.labels.entries`
    words: Words = field(default_factory=dict)  # of those of its conditions whose words are the data's
    data: Mapping[str, str] = field(default_factory=dict)  # fingerprint of what "tokenizer" and "var" were trained on
    card: str = ""  # Markdown: data, licence, figures
    hash: str = ""  # sha256 of the manifest it was loaded from

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | None = None,
    ) -> Model:
        """Load a model from this machine, as `load` finds it, or else from the Hugging Face Hub.

        Args:
            name: what `load` takes, or "user/name" of the Hub, which needs the package huggingface_hub and is kept in
                its cache. What is in a folder comes before what is on the Hub.
            revision: branch, tag or commit there; None: its main branch.
            token: for private models; None: what huggingface_hub finds.

        Raises:
            CheckpointError, ConfigError: see `load`; or the Hub has no such model, or cannot be reached.
        """
        return load(name if name is None or exists(name) else hub.download(str(name), revision, token), device)

    def save_pretrained(self, path: str | Path) -> None:
        """Save the model as `save` does: the name that other libraries have for it."""
        self.save(path)

    def push_to_hub(
        self, name: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
    ) -> str:
        """Upload the model to the Hugging Face Hub as "user/name", made if need be, and return its address there.

        Args:
            private: of a new repository; None: what the account says.
            token: None: what huggingface_hub finds, as after `hf auth login`.
            revision: the branch; None: main.

        Raises:
            MissingPackage: huggingface_hub is not installed.
            ConfigError: the Hub cannot be reached, or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / "model")
            return hub.upload(Path(folder) / "model", name, private=private, token=token, revision=revision)

    def to(self, device: str | torch.device) -> Model:
        """Move the weights to a device (auto, cpu, cuda, cuda:1, mps, …) and return the model. Raises `ConfigError`."""
        device = pick_device(device)
        for part in (self.tokenizer, self.var):
            if part is not None:
                part.to(device)
        return self

    def __repr__(self) -> str:
        sizes = (f"{name} {count / 1e6:.1f} M" for name, count in self.parameters.items())
        sound = (
            f"{self.config.audio.samples / self.config.audio.sample_rate:.3g} s at {self.config.audio.sample_rate} Hz"
        )
        condition = f", by {', '.join(self.var.config.condition)}" if self.var and self.var.config.condition else ""
        return f"<Model {self.config.preset}: {', '.join(sizes)} parameters, {sound}{condition}, on {self.device}>"

    def _repr_html_(self) -> str:
        return html.markdown(self.card) if self.card else f"<p>{escape(repr(self))}</p>"

    @property
    def parameters(self) -> dict[str, int]:
        """The numbers of parameters of "tokenizer" and, if there is one, "transformer"."""
        parts = {"tokenizer": self.tokenizer, "transformer": self.var}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}

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
        x = self._tokens("decode", ids, (self.config.tokenizer.tokens,), f"tokens (B, {self.config.tokenizer.tokens})")
        self.check_weights()
        return self._decoded(self.tokenizer.quantizer.latent(x.to(self.device)))

    def _tokens(self, what: str, ids: Array, lengths: Sequence[int], wanted: str, rows: int | None = None) -> Tensor:
        """Check tokens and return them as int64 (B, one of lengths), B being `rows` if given. Raises `ConfigError`."""
        size = self.config.tokenizer.codebook_size
        wanted = f"{what}: want {wanted}, integers 0..{size - 1}"
        x = tensor(what, ids, wanted.removeprefix(f"{what}: want "))
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ConfigError(f"{wanted}, got {x.dtype}")
        if x.ndim != 2 or x.shape[1] not in lengths or rows not in (None, len(x)):
            hint = "; give one note as ids[None]" if x.ndim == 1 and len(x) in lengths else ""
            raise ConfigError(f"{wanted}, got shape {tuple(x.shape)}{hint}")
        x = x.to(torch.int64)
        if bool((outside := (x < 0) | (x >= size)).any()):
            raise ConfigError(f"{wanted}, got {int(x[outside][0])} in {_rows(outside)}")
        return x

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
        labels: Mapping[str, str] | None = None,
        allow_untrained: bool = False,
        conditions: Sequence[Condition] | None = None,
        tokens: Array | None = None,
        cfg: float = 2.0,
        top_k: int = 900,
        top_p: float = 0.96,
        temperature: float = 1.0,
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
            labels: the words of other labels that it was trained with, by their names.
            allow_untrained: take what is out of the range that the model was trained on; see
                `mars.labels.Ranges.requested`.
            conditions: n conditions, one for each note, instead of the labels; see
                `mars.labels.Ranges.accepted`.
            tokens: integers (n, t), the tokens of each note's first scales, which are kept; t is the number of tokens
                of so many scales, as `config.tokenizer.starts` has them. With all tokens nothing is drawn.
            cfg: guidance towards the condition on the last scale, growing linearly from 0 on the first. 0:
                none, at half the cost. Without effect if the model has no condition.
            top_k: draw among so many of the likeliest tokens.
            top_p: of these, draw among the likeliest whose probabilities add up to this.
            temperature: below 1 likely tokens become likelier: notes that are purer and more alike.
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
        temperature = number("temperature", temperature)
        if not 0 < temperature < math.inf:
            raise ConfigError(f"temperature must be above 0 (1 as trained), got {temperature}")
        if precision not in get_args(Precision):
            raise ConfigError(f"precision must be one of {', '.join(get_args(Precision))}; got {precision!r:.80}")
        requested = ranges.requested(
            pitch=pitch,
            family=family,
            source=source,
            velocity=velocity,
            instrument=instrument,
            labels=labels,
            allow_untrained=allow_untrained,
        )
        given: dict[int, Condition] = {}
        if conditions is not None:
            if any(value is not None for value in requested.values()):
                raise ConfigError(f"conditions say what each note is to be; leave out {', '.join(LABELS)}, labels")
            if not isinstance(conditions, Sequence) or len(conditions) != n:
                got = len(conditions) if isinstance(conditions, Sequence) else repr(conditions)[:80]
                raise ConfigError(f"want a condition for each of {n} notes, got {got}")
            accepted = [ranges.accepted(condition, allow_untrained=allow_untrained) for condition in conditions]
            given = dict(enumerate(accepted, start))
        starts = self.config.tokenizer.starts
        wanted = f"tokens ({n}, one of {', '.join(map(str, starts))})"
        kept = None if tokens is None else self._tokens("tokens", tokens, starts, wanted, n).to(device)
        timing = timing or Timing()
        size = tile_size(device)
        indices = range(start, start + n)

        @torch.no_grad()
        def sample_tile(first: int) -> tuple[list[_Decoded], float, float]:
            """Sample the tile of notes from `first`, always a whole one, even if fewer are requested.

            Returns it with the seconds that both networks took.
            """
            streams = [stream(seed, STREAM, index) for index in range(first, first + size)]
            chosen = [ranges.choose(requested, s) for s in streams]
            conditions = [given.get(first + i, condition) for i, condition in enumerate(chosen)]
            uniforms = torch.stack([torch.rand(var.starts[-1], generator=s, dtype=torch.float32) for s in streams])
            began = _clock()
            classes = condition_ids(conditions, var.config.condition, self.words).to(device)
            rows = [min(max(first + i - start, 0), n - 1) for i in range(size)]  # those of the tile's other notes: any
            ids, latent = sample(
                var,
                self.tokenizer.quantizer,
                classes,
                uniforms.to(device),
                cfg=cfg,
                top_k=top_k,
                top_p=top_p,
                precision=precision,
                temperature=temperature,
                first=None if kept is None else kept[rows],
            )
            ids = ids.cpu()
            sampled = _clock()
            spectrograms = self._decoded(latent)
            _synchronise(device)
            tile = [_Decoded(first + i, s, conditions[i], ids[i], spectrograms[i]) for i, s in enumerate(streams)]
            return tile, sampled - began, _clock() - sampled

        def notes() -> Iterator[Note]:
            firsts = range(start - start % size, start + n, size)
            step = -(-batch_size // size)  # tiles
            side_by_side = min(workers(var, device), len(firsts))
            with ExitStack() as stack:
                pool = stack.enter_context(thread_pool(side_by_side)) if workers(var, device) > 1 else None
                sampled_tiles = ahead(pool, sample_tile, firsts, max(step, 2 * side_by_side))
                stack.enter_context(closing(sampled_tiles))  # before the pool, which waits for all that is left
                resumed, compiled = _clock(), _backend.compiling_seconds()
                while batch := list(islice(sampled_tiles, step)):
                    began = _clock()
                    done = finished([tile for tile, *_ in batch])
                    ended = _clock()
                    transformer = sum(seconds for _, seconds, _ in batch) / side_by_side
                    decoding = sum(seconds for *_, seconds in batch) / side_by_side
                    timing.add(transformer, decoding, ended - began, waited=ended - resumed)
                    timing.compiling += _backend.compiling_seconds() - compiled
                    if progress is not None:
                        progress(done[-1].index + 1 - start, n)
                    yield from done
                    resumed, compiled = _clock(), _backend.compiling_seconds()

        @torch.no_grad()
        def finished(tiles: list[list[_Decoded]]) -> list[Note]:
            """The notes wanted of the tiles."""
            if device.type == "cpu":  # there Griffin-Lim treats each note by itself, whole tile or not
                tiles = [[d for tile in tiles for d in tile if d.index in indices]]
            return [note for tile in tiles for note in finish(tile) if note.index in indices]

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
                Note(d.index, w, s, d.ids, d.condition, self.config.audio.sample_rate)
                for d, w, s in zip(tile, audio.within_full_scale(waveforms), spectrograms.cpu(), strict=True)
            ]

        return notes()

    @torch.inference_mode()
    def tokenize(self, sound: Sound) -> Tensor:
        """Return the tokens int64 (L,) of one sound, cut or padded with zeros to the model's length.

        Args:
            sound: a note of this model, whose tokens are known; or what `mars.data.sound.waveform` takes: the path of a
                file, a waveform at the model's rate, or a waveform and its rate in Hz.

        Raises:
            ConfigError: it is none of these, or a note of another model.
            DataError: the file cannot be read, or there is no sound in it.
        """
        if isinstance(sound, Note):
            length = self.config.tokenizer.tokens
            return self._tokens("sound", sound.ids[None], (length,), f"a note with {length} tokens")[0]
        return self.encode(waveform("sound", sound, self.config.audio)[0][None])[0].cpu()

    @torch.inference_mode()
    def mix(self, a: Sound, b: Sound, amounts: Sequence[float]) -> Tensor:
        """Return tokens int64 (n, L) between two sounds: their latent maps in these proportions, quantised anew.

        amounts: (n,), 0 (all of a) to 1 (all of b); at both ends the tokens are those of the sound itself.

        Raises:
            ConfigError: an amount is out of range; and as `tokenize`.
            DataError: as `tokenize`.
        """
        shares = torch.tensor([number("amount", amount) for amount in amounts], dtype=torch.float32)
        if not len(shares) or not bool(((shares >= 0) & (shares <= 1)).all()):
            raise ConfigError(f"amount must be numbers from 0 to 1, got {amounts!r:.80}")
        ids = torch.stack([self.tokenize(a), self.tokenize(b)]).to(self.device)
        quantizer, t = self.tokenizer.quantizer, shares[:, None, None, None].to(self.device)
        first, second = quantizer.latent(ids)
        mixed, _ = quantizer.search(first + t * (second - first))
        mixed[shares == 0], mixed[shares == 1] = ids[0], ids[1]
        return mixed.cpu()

    def vary(self, sound: Sound, n: int = 1, *, keep: int | None = None, **settings: Unpack[Generation]) -> list[Note]:
        """Return notes like a sound: its first scales stay, the others are drawn anew.

        Args:
            sound: see `tokenize`.
            n: how many.
            keep: scales that stay, from the coarsest: 0 none, all of them the sound as the tokenizer renders it. Half
                of them unless given.
            settings: of `iterate`. A label that is not given is unknown, or as that of the `Note` that is varied.

        Raises:
            CheckpointError, ConfigError: as `iterate` and `tokenize`; `keep` is out of range.
            DataError: as `tokenize`.
        """
        kept = self.tokenize(sound)[: self.kept(len(self.config.tokenizer.scales) // 2 if keep is None else keep)]
        return self._alike(kept.expand(integer("n", n, 1), -1), [sound], settings)

    def morph(
        self,
        a: Sound,
        b: Sound,
        amount: float | Sequence[float] = 0.5,
        *,
        keep: int | None = None,
        **settings: Unpack[Generation],
    ) -> list[Note]:
        """Return notes between two sounds, one for each amount: see `mix`.

        Args:
            a, b: see `tokenize`.
            amount: from 0, which is a, to 1, which is b; a sequence gives as many notes.
            keep: scales of the mix that stay; the others are drawn anew. All of them unless given.
            settings: of `iterate`. A label that is not given is unknown, or what two `Note`s have in common.

        Raises:
            CheckpointError, ConfigError, DataError: as `vary`; an amount is out of range.
        """
        amounts = amount if isinstance(amount, Sequence) else [amount]
        scales = len(self.config.tokenizer.scales)
        return self._alike(self.mix(a, b, amounts)[:, : self.kept(scales if keep is None else keep)], [a, b], settings)

    def kept(self, keep: int) -> int:
        """Return how many tokens the first `keep` scales have. Raises `ConfigError` if there are not so many scales."""
        return self.config.tokenizer.starts[integer("keep", keep, 0, len(self.config.tokenizer.scales))]

    def _alike(self, tokens: Tensor, sounds: Sequence[Sound], settings: Mapping[str, Any]) -> list[Note]:
        """Return notes with these first tokens (n, t), labelled as the settings say, else as all the sounds are."""
        if settings.get("tokens") is not None:
            raise ConfigError("tokens are those of the sound; leave them out")
        if settings.get("conditions") is None:
            given = {name: settings[name] for name in LABELS if settings.get(name) is not None}
            labels = [sound.condition if isinstance(sound, Note) else {} for sound in sounds]
            common = {name: labels[0].get(name) for name in LABELS if len({of.get(name) for of in labels}) == 1}
            known = {name: value for name, value in common.items() if self.ranges.takes(name, value)}
            settings = {name: value for name, value in settings.items() if name not in LABELS}
            settings["conditions"] = [known | given] * len(tokens)
        return self.generate(len(tokens), **{**settings, "tokens": tokens})

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
        labels: Mapping[str, str] | None = None,
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
            labels=labels,
            allow_untrained=allow_untrained,
        )
        return [ranges.choose(requested, stream(seed, STREAM, index)) for index in range(start, start + n)]

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
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
        checkpoint.replace_directory(Path(path), tensors, documents, {"README.md": self.card} if self.card else None)


@torch.inference_mode()
def tokens_of(tokenizer: Tokenizer, waveforms: Tensor, config: AudioConfig, refine: int = 0) -> Tensor:
    """Encode waveforms (B, samples), cut or padded, on the tokenizer's device, to tokens int64 (B, L).

    This is what `Model.encode` computes, for a tokenizer without a model and waveforms that are known to be sound.
    """
    with autocast(waveforms.device, CODING):
        x = audio.multiplexed(waveforms, config)
        return tokenizer.refine(x, refine) if refine else tokenizer.encode(x)


@torch.inference_mode()
def decode_notes(
    model: Model, ids: Tensor, wanted: range, *, seed: int = 0, iterations: int = 32
) -> Iterator[tuple[int, Tensor]]:
    """Yield the index and the waveform (samples,), at most full scale, of the wanted notes of tokens (notes, L).

    A note depends on its tokens, its index and the seed alone: as in generation the network runs on whole tiles.
    """
    size = tile_size(model.device)
    for first in range(wanted.start - wanted.start % size, wanted.stop, size):
        tile = ids[first : first + size].to(torch.int64)
        padded = torch.cat([tile, tile.new_zeros(size - len(tile), tile.shape[1])])
        streams = [stream(seed, SOUND, index) for index in range(first, first + size)]
        waveforms = audio.within_full_scale(model.decode(padded, iterations=iterations, seed=streams).cpu())
        for index in range(max(first, wanted.start), min(first + size, wanted.stop)):
            yield index, waveforms[index - first]


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


def _ranges(path: Path, words: Words) -> list[dict[str, Any]]:
    entries = checkpoint.read_json(path)
    if not isinstance(entries, list):
        raise CheckpointError(f"{path} must hold a list, got {type(entries).__name__}")
    for i, entry in enumerate(entries):
        config.from_document(_Range, entry, f"{path}: entry {i}", CheckpointError)
        for name in ("family", "source", *words):
            known = label(name).values(words)
            if (value := entry.get(name)) is not None and value not in known:
                wanted = "one of labels.json" if name in words else f"one of {', '.join(known)}"
                raise CheckpointError(
                    f"{path}: entry {i} cannot be used: {name} must be null or {wanted}, got {value!r:.80}"
                )
    return entries


def _words(path: Path, attributes: Sequence[str]) -> dict[str, list[str]]:
    """Read the words of the open conditions from `labels.json`; models without such conditions have none."""
    names = {name for name in attributes if label(name).open}
    if not names and not path.exists():
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


def exists(name: str | Path | None) -> bool:
    """Return whether this machine has something of that name: a path, or a packaged model."""
    packaged = Path(str(resources.files("mars").joinpath("assets", "models")))
    return name is None or Path(name).exists() or (packaged / str(name)).is_dir()


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
