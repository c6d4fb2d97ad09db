"""New notes from a trained model: condition, tokens scale by scale, spectrogram, waveform.

Sampling is VAR's (Tian et al. 2024, arXiv:2404.02905): guidance that grows with the scale, top-k, then top-p.

A note depends on its seed, index and condition alone: it has its own random stream, and the network always runs on
whole tiles of notes, index i in slot i % tile of tile i // tile, because matrix products may round differently with
the number of their rows. So on one machine a note has the same bytes whatever n, start, batch_size and the conditions
of other notes are.
Another device, number of threads or version of PyTorch may round differently, which can change a token.

Letters: B notes, L tokens over all scales, n tokens of one scale, V codebook size, D code dimension.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mars import audio
from mars.arguments import integer, number
from mars.errors import CheckpointError, ConfigError
from mars.labels import Condition, condition_ids
from mars.model import Model
from mars.models.var import VAR
from mars.notes import Note
from mars.runtime import autocast, stream

TILE = 8  # notes the network runs on at once on a CPU; changing it changes the bytes of all notes
TILE_ACCELERATOR = 32
STREAM = 4  # tells these random streams from those of training with the same seed


@dataclass
class Timing:
    """Seconds spent so far, over all notes."""

    transformer: float = 0.0
    decoding: float = 0.0  # tokens to spectrogram
    griffin_lim: float = 0.0


@dataclass(frozen=True, eq=False)
class _Draft:
    """A note without its waveform."""

    index: int
    stream: torch.Generator
    condition: Condition
    ids: Tensor
    spectrogram: Tensor  # on the model's device


def generate(
    model: Model,
    n: int,
    *,
    seed: int = 0,
    start: int = 0,
    pitch: int | tuple[int, int] | None = None,
    family: str | None = None,
    source: str | None = None,
    velocity: int | None = None,
    allow_untrained: bool = False,
    conditions: Sequence[Condition] | None = None,
    cfg: float = 2.0,
    top_k: int = 900,
    top_p: float = 0.96,
    batch_size: int = 16,
    iterations: int = 32,
    progress: Callable[[int, int], None] | None = None,
    timing: Timing | None = None,
) -> Iterator[Note]:
    """Notes `start` to `start + n - 1` of `seed`, in order.

    What is not given of pitch, family, source and velocity is drawn for each note from what the model was
    trained on (`model.notes`): any of its families, the source most common in it, one of its usual pitches,
    any of its velocities, among the notes that go with what is given. It is left open if that is not known or the
    model has no such condition.

    Args:
        pitch: MIDI number, or (lowest, highest); the usual pitches within that range if there are any.
        velocity: counts as the nearest of VELOCITIES.
        allow_untrained: take what is out of the range that the model was trained on; see `mars.labels.Ranges.asked`.
        conditions: n of them, what each note is to be, in place of the four labels; see `mars.labels.Ranges.accepted`.
        cfg: guidance towards the condition on the last scale, growing linearly from 0 on the first. 0:
            none, at half the cost. Without effect if the model has no condition.
        top_k, top_p: draw among the top_k likeliest tokens, and of these among the likeliest of mass top_p.
        batch_size: notes finished together, rounded up to whole tiles; of no effect on the notes.
        iterations: of Griffin-Lim.
        progress: called with the notes done and n.
        timing: to which the seconds of each part are added.

    Raises:
        CheckpointError: the model is a tokenizer only or, later, gives numbers that are not finite.
        ConfigError: a setting is out of range or asks for what the model was not trained on.
    """
    var, ranges, device = transformer(model), model.ranges, model.device
    model.check_weights()
    n, seed, start = integer("n", n, 1), integer("seed", seed, 0), integer("start", start, 0)
    top_k, batch_size = integer("top_k", top_k, 1), integer("batch_size", batch_size, 1)
    iterations, cfg, top_p = integer("iterations", iterations, 0), number("cfg", cfg), number("top_p", top_p)
    if not 0 <= cfg < math.inf:
        raise ConfigError(f"cfg must be at least 0 (no guidance), got {cfg}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1 (no limit), got {top_p}")
    asked = ranges.asked(pitch=pitch, family=family, source=source, velocity=velocity, allow_untrained=allow_untrained)
    given: dict[int, Condition] = {}
    if conditions is not None:
        if any(value is not None for value in asked.values()):
            raise ConfigError("conditions say what each note is to be; leave out pitch, family, source and velocity")
        if not isinstance(conditions, Sequence) or len(conditions) != n:
            got = len(conditions) if isinstance(conditions, Sequence) else repr(conditions)[:80]
            raise ConfigError(f"want a condition for each of {n} notes, got {got}")
        accepted = [ranges.accepted(condition, allow_untrained=allow_untrained) for condition in conditions]
        given = dict(enumerate(accepted, start))
    timing = timing or Timing()
    size = tile_size(device)
    wanted = range(start, start + n)

    def drafts(first: int) -> list[_Draft]:
        """The tile of notes from `first`, whole even where fewer are wanted."""
        streams = [stream(seed, STREAM, index) for index in range(first, first + size)]
        chosen = [ranges.choose(asked, s) for s in streams]
        conditions = [given.get(first + i, condition) for i, condition in enumerate(chosen)]
        uniforms = torch.stack([torch.rand(var.starts[-1], generator=s, dtype=torch.float32) for s in streams])
        began = time.perf_counter()
        classes = condition_ids(conditions, var.config.condition).to(device)
        ids, latent = sample(model, classes, uniforms.to(device), cfg, top_k, top_p)
        ids = ids.cpu()
        sampled = time.perf_counter()
        with autocast(device, model.config.train.tokenizer.precision):
            x = model.tokenizer.reconstruct(latent).clamp(-1, 1)
        spectrograms = audio.demultiplexed(x, model.config.audio)
        _synchronise(device)
        timing.transformer += sampled - began
        timing.decoding += time.perf_counter() - sampled
        return [_Draft(first + i, s, conditions[i], ids[i], spectrograms[i]) for i, s in enumerate(streams)]

    def notes() -> Iterator[Note]:
        step = -(-batch_size // size) * size
        for first in range(start - start % size, start + n, step):
            with torch.no_grad():
                tiles = [drafts(t) for t in range(first, min(first + step, start + n), size)]
                if device.type == "cpu":  # there Griffin-Lim treats each note by itself, whole tile or not
                    tiles = [[d for tile in tiles for d in tile if d.index in wanted]]
                began = time.perf_counter()
                finished = [note for tile in tiles for note in finish(tile) if note.index in wanted]
                timing.griffin_lim += time.perf_counter() - began
            if progress is not None:
                progress(finished[-1].index + 1 - start, n)
            yield from finished

    def finish(drafts: list[_Draft]) -> list[Note]:
        """The same with waveforms."""
        spectrograms = torch.stack([d.spectrogram for d in drafts])
        magnitudes = audio.magnitudes(spectrograms, model.config.audio)
        streams = [d.stream for d in drafts]
        waveforms = audio.griffin_lim(magnitudes, model.config.audio, iterations, generators=streams).cpu()
        for d, finite in zip(drafts, waveforms.isfinite().all(dim=1).tolist(), strict=True):
            if not finite:
                raise CheckpointError(f"note {d.index} of seed {seed} is not finite; the model's weights are unusable")
        return [
            Note(d.index, w, s, d.ids, d.condition)
            for d, w, s in zip(drafts, audio.within_full_scale(waveforms), spectrograms.cpu(), strict=True)
        ]

    return notes()


def choose(
    model: Model,
    n: int,
    *,
    seed: int = 0,
    start: int = 0,
    pitch: int | tuple[int, int] | None = None,
    family: str | None = None,
    source: str | None = None,
    velocity: int | None = None,
    allow_untrained: bool = False,
) -> list[Condition]:
    """The conditions that `generate` chooses with these arguments, to be known before the notes.

    Raises:
        CheckpointError, ConfigError: see `generate`.
    """
    transformer(model)
    n, seed, start = integer("n", n, 1), integer("seed", seed, 0), integer("start", start, 0)
    asked = model.ranges.asked(
        pitch=pitch, family=family, source=source, velocity=velocity, allow_untrained=allow_untrained
    )
    return [model.ranges.choose(asked, stream(seed, STREAM, index)) for index in range(start, start + n)]


def tile_size(device: torch.device) -> int:
    """Notes that the network runs on at once."""
    return TILE if device.type == "cpu" else TILE_ACCELERATOR


def sample(
    model: Model, condition: Tensor, uniforms: Tensor, cfg: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Draw all tokens, scale after scale.

    Args:
        condition: int64 (B, attributes), see `VAR.embed_condition`.
        uniforms: (B, L) in [0, 1), one for each token to draw.
        cfg, top_k, top_p: see `generate`.

    Returns:
        ids: int64 (B, L).
        latent: (B, D, H, W), the tokens' latent map.
    """
    var, quantizer = model.var, model.tokenizer.quantizer
    assert var is not None
    cast = autocast(model.device, model.config.train.var.precision)
    last = len(var.lengths) - 1
    guided = cfg > 0 and bool(var.config.condition) and last > 0
    if guided:  # the second half of the rows has the condition hidden
        condition = torch.cat((condition, var.null_condition(len(condition))))
    with cast:
        embedded = var.embed_condition(condition)
        modulations = var.modulations(embedded)
        half = torch.is_autocast_enabled(model.device.type)
    dtype = torch.get_autocast_dtype(model.device.type) if half else torch.float32
    cache = var.new_cache(len(condition), dtype)
    ids: list[Tensor] = []
    total = inputs = None
    for k, uniform in enumerate(uniforms.split(var.lengths, dim=1)):
        with cast:
            logits = var.step(k, inputs, embedded, modulations, cache)
        if guided:
            logits, free = logits.chunk(2)
            if k > 0:  # no guidance on the first scale, but the rest needs both halves of its cache
                t = cfg * k / last
                logits = (1 + t) * logits - t * free
        ids.append(draw(logits, uniform, top_k, top_p))
        total = quantizer.add_scale(k, ids[-1], total)  # not autocast, as in training
        if k < last:
            inputs = quantizer.next_input(k + 1, total)
            inputs = torch.cat((inputs, inputs)) if guided else inputs
    assert total is not None
    return torch.cat(ids, dim=1), total


def draw(logits: Tensor, uniforms: Tensor, top_k: int, top_p: float) -> Tensor:
    """Tokens int64 (B, n) from logits (B, n, V), inverting the distribution at uniforms (B, n) in [0, 1).

    Kept are the top_k likeliest tokens and, with these adding up to 1, the fewest of them that reach top_p.

    Raises:
        CheckpointError: logits are not finite.
    """
    values, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)  # likeliest first
    mass = values.softmax(dim=-1).cumsum(dim=-1)
    if not bool(mass[..., -1].isfinite().all()):
        raise CheckpointError("the transformer's output is not finite; the model's weights are unusable")
    last = (mass[..., :-1] < top_p).sum(dim=-1, keepdim=True)  # the last token kept, at least the first
    level = uniforms[..., None] * mass.gather(-1, last)
    choice = torch.searchsorted(mass, level, right=True).minimum(last)  # level may round up to the whole mass
    return tokens.gather(-1, choice).squeeze(-1)


def transformer(model: Model) -> VAR:
    """The model's second stage; raises `CheckpointError` where there is none."""
    if model.var is None:
        raise CheckpointError("the model is a tokenizer only; train the second stage: mars-train var --tokenizer MODEL")
    return model.var


def _synchronise(device: torch.device) -> None:
    """Wait until the device has finished, for the sake of `Timing`."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
