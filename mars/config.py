"""Settings: frozen dataclasses, the presets of `presets.toml`, and reading and writing both.

No other module reads settings. A wrong key or value raises `ConfigError` with a one-line message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from mars.errors import ConfigError, MarsError
from mars.files import read_json, read_text, write_atomically
from mars.labels import LABELS, is_name

Pair = tuple[int, int]
T = TypeVar("T")

# Far above what can be trained: so that settings of strangers cannot take the machine.
LARGEST_GRID = 1 << 24  # bins times frames of a note's spectrogram: 8 min with the settings below
LARGEST_WIDTH, DEEPEST, MOST_SCALES, LARGEST_SCALE, MOST_CODES = 1 << 16, 256, 64, 1024, 1 << 24


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(config: Any, where: str, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) > 0, f"{where}.{name} must be positive, got {getattr(config, name)}")


def _at_most(config: Any, where: str, **limits: int) -> None:
    for name, limit in limits.items():
        _require(
            getattr(config, name) <= limit, f"{where}.{name} must be at most {limit:,}, got {getattr(config, name)}"
        )


def _within(config: Any, where: str, *names: str) -> None:
    for name in names:
        _require(0 <= getattr(config, name) <= 1, f"{where}.{name} must be in 0..1, got {getattr(config, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig:
    """The front end: waveform (samples,) <-> normalised log magnitude (bins, frames) <-> CMX tensor."""

    sample_rate: int = 16_000  # Hz
    samples: int = 64_000  # per note; shorter audio is padded with zeros, longer is cut
    n_fft: int = 1024  # samples; also the Hann window's length
    hop: int = 256  # samples between frames
    bins: int = 512  # kept from the low end; n_fft / 2 keeps all but one
    frames: int = 256  # the waveform is zero-padded to (frames - 1) * hop so that this is exact
    drop: Literal["dc", "nyquist"] = "dc"  # the bin left out to get from n_fft / 2 + 1 to n_fft / 2
    min_db: float = -52.0  # 20 log10 of the magnitude that becomes -1
    max_db: float = 48.0  # becomes +1; a full-scale sine reaches 20 log10(n_fft / 4)
    cmx: Pair = (1, 1)  # factors (r_f, r_t) of channel multiplexing

    def __post_init__(self) -> None:
        _require(self.sample_rate > 0 and self.samples > 0, "audio: sample_rate and samples must be positive")
        _require(
            self.n_fft % 2 == 0 and 0 < self.hop <= self.n_fft // 2,
            f"audio: want even n_fft and 0 < hop <= n_fft / 2; got n_fft {self.n_fft}, hop {self.hop}",
        )
        _require(0 < self.bins <= self.n_fft // 2, f"audio.bins must be 1..{self.n_fft // 2}, got {self.bins}")
        _require(self.min_db < self.max_db, f"audio: min_db {self.min_db} is not below max_db {self.max_db}")
        _at_most(self, "audio", sample_rate=384_000, n_fft=1 << 16)
        _require(
            self.n_fft // 2 * self.frames <= LARGEST_GRID,
            f"audio: n_fft / 2 x frames must be at most {LARGEST_GRID:,}, got {self.n_fft // 2} x {self.frames}",
        )
        _require(
            abs(self.min_db) <= 400
            and self.max_db - self.min_db <= 340,  # beyond float32, and `kernels.spectrogram_cmx`
            f"audio: want min_db within -400..400 and max_db at most 340 dB above, got {self.min_db} and {self.max_db}",
        )
        _require(self.drop in ("dc", "nyquist"), f"audio.drop must be dc or nyquist, got {self.drop!r}")
        _require(
            (self.frames - 1) * self.hop >= self.samples,
            f"audio.frames {self.frames} is too few for {self.samples} samples at hop {self.hop}; "
            f"want at least {math.ceil(self.samples / self.hop) + 1}",
        )
        r_f, r_t = self.cmx
        _require(
            r_f > 0 and r_t > 0 and self.bins % r_f == 0 and self.frames % r_t == 0,
            f"audio.cmx {self.cmx} must divide (bins, frames) = ({self.bins}, {self.frames})",
        )

    @property
    def channels(self) -> int:
        """Channels of the CMX tensor."""
        return self.cmx[0] * self.cmx[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, F, T) of the CMX tensor."""
        return self.channels, self.bins // self.cmx[0], self.frames // self.cmx[1]


def _scales(config: Any, name: str) -> None:
    """Read `config.scales` as (h, w) pairs (a number n stands for (n, n)) and check them against the grid."""
    scales = tuple((s, s) if isinstance(s, int) else tuple(s) for s in config.scales)
    object.__setattr__(config, "scales", scales)
    _require(bool(scales), f"{name}.scales must name at least one (h, w) grid")
    ordered = all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(scales))
    _require(ordered, f"{name}.scales must not shrink, got {scales}")
    _require(scales[0][0] > 0 and scales[0][1] > 0, f"{name}.scales must be positive, got {scales}")
    _require(
        len(scales) <= MOST_SCALES and max(scales[-1]) <= LARGEST_SCALE,
        f"{name}.scales must be at most {MOST_SCALES} of at most {LARGEST_SCALE} x {LARGEST_SCALE}, "
        f"got {len(scales)}, the last {scales[-1]}",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """ViT encoder, multi-scale residual vector quantiser, ViT decoder (MARS §2.2)."""

    patch: Pair = (16, 16)  # CMX cells of frequency and time in a patch
    width: int = 768
    depth: int = 12  # blocks in the encoder, and again in the decoder
    heads: int = 12
    layer_scale: float = 1e-5  # initial value; 0 leaves LayerScale out
    drop_path: float = 0.1  # of the last block, rising linearly from 0
    scales: tuple[Pair, ...] = tuple((s, s) for s in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))  # last: the latent grid
    codebook_size: int = 16_384
    code_dim: int = 32
    metric: Literal["cosine", "l2"] = "cosine"  # how the nearest code is chosen
    phi: int = 4  # convolutions after up-sampling, shared among the scales
    phi_ratio: float = 0.5
    beta: float = 0.25  # weight of the commitment term
    quantizer_dropout: float = 0.1  # share of samples that keep only their first scales
    dropout_start: int = 3  # they keep at least this many
    kmeans_init: int = 0  # notes whose latents the codebook starts from, by k-means; 0: random unit vectors
    ema_codebook: bool = False  # codes follow the mean of the latents that choose them, not the gradient
    restart_dead_codes: float = 0.0  # codes chosen less often than this share of the average start anew; 0: never
    codebook_decay: float = 0.99  # per step, of those means and of how often codes are chosen

    def __post_init__(self) -> None:
        _scales(self, "tokenizer")
        _positive(self, "tokenizer", "width", "depth", "heads", "code_dim")
        _at_most(
            self, "tokenizer", width=LARGEST_WIDTH, depth=DEEPEST, code_dim=LARGEST_WIDTH, codebook_size=MOST_CODES
        )
        _within(self, "tokenizer", "phi_ratio", "quantizer_dropout", "restart_dead_codes")
        _require(self.kmeans_init >= 0, f"tokenizer.kmeans_init must not be negative, got {self.kmeans_init}")
        _require(0 <= self.codebook_decay < 1, f"tokenizer.codebook_decay must be in [0, 1), got {self.codebook_decay}")
        _require(0 <= self.drop_path < 1, f"tokenizer.drop_path must be in [0, 1), got {self.drop_path}")
        _require(self.width % self.heads == 0, f"tokenizer.width {self.width} is not a multiple of heads {self.heads}")
        _require(self.metric in ("cosine", "l2"), f"tokenizer.metric must be cosine or l2, got {self.metric!r}")
        _require(self.codebook_size >= 2, f"tokenizer.codebook_size must be at least 2, got {self.codebook_size}")
        _require(
            1 <= self.phi <= len(self.scales),
            f"tokenizer.phi must be 1..{len(self.scales)} (the number of scales), got {self.phi}",
        )
        _require(
            1 <= self.dropout_start <= len(self.scales),
            f"tokenizer.dropout_start must be 1..{len(self.scales)} (the number of scales), got {self.dropout_start}",
        )

    @property
    def latent(self) -> Pair:
        """Grid (h, w) of the S = h w learnable tokens."""
        return self.scales[-1]

    @property
    def tokens(self) -> int:
        """Length L of the token sequence over all scales."""
        return self.starts[-1]

    @property
    def starts(self) -> list[int]:
        """Index of each scale's first token in the sequence, and its length at the end."""
        return list(accumulate((h * w for h, w in self.scales), initial=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class VARConfig:
    """Next-scale transformer (Tian et al. 2024, arXiv:2404.02905)."""

    depth: int = 16
    width: int = 1024
    heads: int = 16
    shared_adaln: bool = False  # one AdaLN projection for all blocks plus a learned offset per block
    drop_path: float = 1 / 15  # of the last block; the published rule is 0.1 depth / 24
    condition: tuple[str, ...] = ()  # empty: no condition at all
    condition_dropout: float = 0.1  # chance that a note's whole condition is hidden, for guidance

    def __post_init__(self) -> None:
        object.__setattr__(self, "condition", tuple(self.condition))
        _positive(self, "var", "width", "depth", "heads")
        _at_most(self, "var", width=LARGEST_WIDTH, depth=DEEPEST)
        _within(self, "var", "condition_dropout")
        _require(0 <= self.drop_path < 1, f"var.drop_path must be in [0, 1), got {self.drop_path}")
        _require(self.width % self.heads == 0, f"var.width {self.width} is not a multiple of heads {self.heads}")
        for name in self.condition:
            known = ", ".join(LABELS)
            _require(is_name(name), f"var.condition must be of {known} or the dataset's own labels; got {name!r:.80}")
        twice = len(set(self.condition)) < len(self.condition)
        _require(not twice, f"var.condition names an attribute twice: {', '.join(self.condition)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training stage. Steps count optimiser updates."""

    steps: int = 1000
    epochs: float = 0.0  # passes over the training notes; 0: `steps` counts, otherwise it follows from this
    batch_size: int = 16  # notes per micro-batch
    accumulate: int = 1  # micro-batches per step; several processes share them equally
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, AdamW for the rest
    lr: float = 1e-4  # peak
    lr_batch: int = 0  # the rates are for steps of this many notes and grow with the step's; 0: for any step
    warmup: float = 0.02  # share of the steps
    final_lr: float = 0.02  # as a ratio to the peak
    schedule: Literal["cosine", "lin0"] = "cosine"  # lin0: flat for 5 % after the warm-up, then linear
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0  # global norm; 0: off
    ema: float = 0.999  # decay of the EMA (exponential moving average) of the weights, which are the ones exported
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast where the device has it
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the transformer blocks; auto: on CUDA
    workers: int = 1  # threads that make batches ahead of the steps; 0: each batch when its step wants it
    checkpointing: bool = False  # activation checkpointing: the blocks run again in the backward, to save memory
    adversarial: bool = False  # PatchGAN term (tokenizer only)
    adversarial_weight: float = 0.5
    adversarial_start: float = 0.28  # share of the steps before the discriminator joins
    adversarial_ramp: float = 0.02  # share of the steps over which its weight rises
    adaptive_weight: bool = True  # scale the term to the reconstruction gradient; False: Eq. 1 as written
    discriminator_lr: float = 4e-4  # peak
    discriminator_warmup: float = 0.02  # share of the steps, counted from where it joins
    discriminator_weight_decay: float = 5e-4
    log_every: int = 20
    validate_every: int = 500
    validate_notes: int = 256
    patience: int = 0  # validations without a better one before training ends; 0: it goes on to the last step
    save_every: int = 500
    sample_every: int = 500  # steps between pictures and sounds of a few notes, the last step included; 0: none
    keep: int = 3  # checkpoints, besides the best

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "log_every", "validate_every", "validate_notes", "save_every")
        _positive(self, "train", *counts, "keep", "lr", "discriminator_lr")
        _within(self, "train", "warmup", "final_lr", "adversarial_start", "adversarial_ramp", "discriminator_warmup")
        for name in ("epochs", "lr_batch", "discriminator_weight_decay", "sample_every", "patience"):
            _require(getattr(self, name) >= 0, f"train.{name} must not be negative, got {getattr(self, name)}")
        _require(all(0 <= b < 1 for b in self.betas), f"train.betas must be in [0, 1), got {self.betas}")
        _require(
            self.weight_decay >= 0 and self.grad_clip >= 0,
            f"train: weight_decay and grad_clip must not be negative, got {self.weight_decay} and {self.grad_clip}",
        )
        _require(0 <= self.ema < 1, f"train.ema must be in [0, 1), got {self.ema}")
        _require(self.schedule in ("cosine", "lin0"), f"train.schedule must be cosine or lin0, got {self.schedule!r}")
        _require(
            self.precision in ("auto", "float32", "bfloat16"),
            f"train.precision must be auto, float32 or bfloat16, got {self.precision!r}",
        )
        _require(self.compile in ("auto", "on", "off"), f"train.compile must be auto, on or off, got {self.compile!r}")
        _require(0 <= self.workers <= 256, f"train.workers must be 0 to 256, got {self.workers}")

    @property
    def notes_per_step(self) -> int:
        """The global batch: notes of all micro-batches of a step, on however many processes."""
        return self.batch_size * self.accumulate

    @property
    def peak_lr(self) -> float:
        """`lr`, brought from `lr_batch` to the notes of a step."""
        return self.lr * (self.notes_per_step / self.lr_batch if self.lr_batch else 1)

    def resolved(self, notes: int) -> TrainConfig:
        """With the number of steps that `epochs` passes over `notes` training notes take; itself without `epochs`."""
        if not self.epochs:
            return self
        return dataclasses.replace(self, steps=math.ceil(self.epochs * notes / self.notes_per_step))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainStages:
    """Both stages of training."""

    tokenizer: TrainConfig = field(default_factory=TrainConfig)
    var: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that defines a model and its training."""

    preset: str
    audio: AudioConfig = field(default_factory=AudioConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    var: VARConfig = field(default_factory=VARConfig)
    train: TrainStages = field(default_factory=TrainStages)

    def __post_init__(self) -> None:
        _, bins, frames = self.audio.shape
        patch = self.tokenizer.patch
        _require(
            patch[0] > 0 and patch[1] > 0 and bins % patch[0] == 0 and frames % patch[1] == 0,
            f"tokenizer.patch {patch} must divide the grid ({bins}, {frames}) that audio.cmx {self.audio.cmx} gives",
        )
        _require(
            not self.train.tokenizer.adversarial or min(bins, frames) >= 24,
            f"train.adversarial wants a grid of 24 x 24 or more, audio.cmx {self.audio.cmx} gives ({bins}, {frames})",
        )

    def with_train(self, stage: str, **values: Any) -> Config:
        """With other values for the training of `stage`, "tokenizer" or "var"."""
        train = dataclasses.replace(getattr(self.train, stage), **values)
        return dataclasses.replace(self, train=dataclasses.replace(self.train, **{stage: train}))

    def resolved(self, stage: str, notes: int) -> Config:
        """With `TrainConfig.resolved` for `stage`."""
        return self.with_train(stage, steps=getattr(self.train, stage).resolved(notes).steps)

    @property
    def patches(self) -> Pair:
        """Grid (K_f, K_t) of patches."""
        _, bins, frames = self.audio.shape
        return bins // self.tokenizer.patch[0], frames // self.tokenizer.patch[1]


def fitted(config: Config, sample_rate: int, samples: int) -> Config:
    """The config for notes of this rate (Hz) and length, if it is for others: networks of about the same size.

    Window, hop, bins and the CMX factor of frequency grow with the rate by the nearest power of two, so that a frame
    lasts about as long as before and the grid has as many rows; the loudest magnitude grows with the window. Patches
    and scales grow along time with the seconds of a note, and the CMX factor of time keeps patches about as long.
    """
    audio, tokenizer = config.audio, config.tokenizer
    if (audio.sample_rate, audio.samples) == (sample_rate, samples):
        return config
    power = round(math.log2(sample_rate / audio.sample_rate))
    n_fft, hop, bins, rows = (max(int(n * 2.0**power), 1) for n in (audio.n_fft, audio.hop, audio.bins, audio.cmx[0]))
    longer = samples / sample_rate / (audio.samples / audio.sample_rate)
    frames, patch = math.ceil(samples / hop) + 1, tokenizer.patch[1]
    columns = max(round(frames / (config.patches[1] * longer * patch)), 1)
    frames = math.ceil(frames / (columns * patch)) * columns * patch
    louder = 20 * math.log10(n_fft / audio.n_fft)
    scales = tuple((h, max(round(w * longer), 1)) for h, w in tokenizer.scales)
    return dataclasses.replace(
        config,
        audio=dataclasses.replace(
            audio, sample_rate=sample_rate, samples=samples, n_fft=n_fft, hop=hop, bins=bins, frames=frames,
            min_db=audio.min_db + louder, max_db=audio.max_db + louder, cmx=(rows, columns),
        ),
        tokenizer=dataclasses.replace(tokenizer, scales=scales),
    )  # fmt: skip


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `kind` from plain values, refusing unknown keys and wrong types.

    Raises:
        ConfigError: naming the key, with the nearest valid one.
    """
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown setting {where}{key}; {hint}")
        arguments[key] = _convert(hints[key], value, where + key)
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{f.name} is missing")
    return kind(**arguments)


def from_document(kind: type[T], document: Any, where: object, error: type[MarsError]) -> T:
    """Build the dataclass `kind` from those keys of a JSON document that it has as fields; the rest are passed over.

    Raises:
        MarsError: of the kind `error`, naming `where` and the key that is missing or of another type.
    """
    if not isinstance(document, Mapping):
        raise error(f"{where} must hold a JSON object, got {type(document).__name__}")
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    try:
        return from_dict(kind, {key: value for key, value in document.items() if key in names})
    except ConfigError as problem:
        raise error(f"{where} cannot be used: {problem}") from None


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as the annotated type `kind`. Raises `ConfigError` if it is not one."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is a group of settings, not a value; set {where}.<name>=…")
        return from_dict(typing.cast(type, kind), value, where + ".")
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} must be one of {', '.join(map(str, arguments))}; got {value!r:.80}")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, value, where)
    if kind is Any:
        return value
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a JSON object, got {value!r:.80}")
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 1000 else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {'an' if kind is int else 'a'} {kind.__name__}, got {value!r:.80}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{where} must be finite, got {value!r}")
    return value


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return `value` as the first of the types that it can be."""
    if value is None and types.NoneType in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not types.NoneType)
    for kind in others:
        with contextlib.suppress(ConfigError):
            return _convert(kind, value, where)
    return _convert(last, value, where)


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if kind_is_list := arguments[-1] is Ellipsis:
        arguments = arguments[:1]
    if isinstance(value, str) or not isinstance(value, Sequence):
        if not (kind_is_list or isinstance(value, int)):
            raise ConfigError(f"{where} must be a list, got {value!r:.80}")
        value = [value] if kind_is_list else [value] * len(arguments)  # 8 stands for (8, 8)
    if kind_is_list:
        item = arguments[0]
        if item == Pair:
            return tuple(_convert_tuple((int, int), v, where) for v in value)
        return tuple(_convert(item, v, where) for v in value)
    if len(value) != len(arguments):
        raise ConfigError(f"{where} must have {len(arguments)} values, got {list(value)!s:.80}")
    return tuple(_convert(item, v, where) for item, v in zip(arguments, value, strict=True))


@cache
def _presets() -> dict[str, Any]:
    return tomllib.loads(resources.files("mars").joinpath("presets.toml").read_text(encoding="utf-8"))


def preset_names() -> list[str]:
    """Return the names of the presets."""
    return list(_presets())


def preset(
    name: str, overrides: Sequence[str] = (), stage: str | None = None, file: Mapping[str, Any] | None = None
) -> Config:
    """Return the preset `name` with `key=value` overrides, e.g. `tokenizer.width=128` or `audio.cmx=8,4`.

    With `stage` ("tokenizer" or "var"), `train.KEY` means `train.<stage>.KEY`. Steps asked for replace epochs.

    Args:
        file: settings that come between the preset's and the overrides, as `read_settings` gives them.

    Raises:
        ConfigError: unknown preset, unknown key or unusable value.
    """
    presets = _presets()
    if name not in presets:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(presets)}")
    return override(from_dict(Config, {"preset": name, **presets[name]}), overrides, stage, file)


def override(
    config: Config, overrides: Sequence[str], stage: str | None = None, file: Mapping[str, Any] | None = None
) -> Config:
    """Return `config` with `key=value` overrides; see `preset`."""
    if not overrides and not file:
        return config
    values = to_dict(config)
    stated = list(_flat(file or {}))
    for path, value in stated:
        _put(values, path, value, stage, ".".join(path))
    for path, value in stated:  # or steps beside them would have put them to zero
        if path[-1] == "epochs":
            _put(values, path, value, stage, ".".join(path))
    for item in overrides:
        key, equals, text = item.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or len(path) < 2 or not all(path):
            raise ConfigError(f"want KEY=VALUE with a key such as tokenizer.width, got {item!r}")
        _put(values, path, _parse(text.strip()), stage, key)
    return from_dict(Config, values)


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any, stage: str | None, key: str) -> None:
    """Set one value in nested settings."""
    if stage and path[0] == "train" and path[1] not in ("tokenizer", "var"):
        path = ("train", stage, *path[1:])
    group: Any = values
    for part in path[:-1]:
        group = group.setdefault(part, {}) if isinstance(group, dict) else None
    if not isinstance(group, dict):
        raise ConfigError(f"unknown setting {key}")
    group[path[-1]] = value
    if path[0] == "train" and path[-1] == "steps":
        group["epochs"] = 0  # or the preset's epochs would win


def _flat(values: Mapping[str, Any], *before: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the values in nested tables, with the names that lead to each."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, *before, name)
        else:
            yield (*before, name), value


def read_settings(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Return the preset that a TOML file of settings names, or None, and the settings in it.

    Such a file is what `as_toml` gives, or a part of it.

    Raises:
        ConfigError: it cannot be read, is no TOML, or holds something else than tables of settings.
    """
    try:
        values = tomllib.loads(read_text(path, ConfigError))
    except (tomllib.TOMLDecodeError, RecursionError) as problem:
        raise ConfigError(f"{path} cannot be read as TOML: {problem}") from None
    name = values.pop("preset", None)
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{path}: preset must be a name, got {name!r:.80}")
    known = [field.name for field in dataclasses.fields(Config) if field.name != "preset"]
    for key, value in values.items():
        if key not in known or not isinstance(value, dict):
            raise ConfigError(f"{path}: want preset and the tables {', '.join(known)}; got {key}")
    return name, values


def as_toml(config: Config) -> str:
    """Return all settings as TOML, which `read_settings` reads."""
    lines = [f"preset = {json.dumps(config.preset)}"]

    def table(name: str, values: Mapping[str, Any]) -> None:
        plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
        if plain:
            lines.extend(["", f"[{name}]"])
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in plain.items() if value is not None)
        for key, value in values.items():
            if isinstance(value, Mapping):
                table(f"{name}.{key}", value)

    for name, values in to_dict(config).items():
        if isinstance(values, Mapping):
            table(name, values)
    return "\n".join(lines) + "\n"


def _parse(text: str) -> Any:
    """Parse a TOML value: `8,4` is a list, a bare word a string and `family,pitch` a list of strings."""
    words = json.dumps([word.strip() for word in text.split(",")] if "," in text else text)
    for candidate in (text, f"[{text}]", words):
        try:
            if candidate != f"[{text}]" or "," in text:
                return tomllib.loads(f"v = {candidate}")["v"]
        except tomllib.TOMLDecodeError:
            continue
    raise ConfigError(f"cannot read the value {text!r}")


def save(config: Config, path: Path) -> None:
    """Write `config` as JSON."""
    write_atomically(path, (json.dumps(to_dict(config), indent=1) + "\n").encode(), durable=True)


def load(path: Path) -> Config:
    """Read a config written by `save`.

    Raises:
        ConfigError: the file is missing, not JSON, or holds an unknown setting.
    """
    values = read_json(path, ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    try:
        return from_dict(Config, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
