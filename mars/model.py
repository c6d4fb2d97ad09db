"""A trained model: the front end's settings, the tokenizer and, if it can generate, the VAR transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mars import audio, checkpoint, config
from mars.config import FAMILIES, SOURCES, Config
from mars.errors import CheckpointError, ConfigError
from mars.files import read_text, sha256
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR

M = TypeVar("M", bound=torch.nn.Module)
DEFAULT = "notes"  # the packaged model


@dataclass
class Model:
    """Tokenizer and VAR with their settings; see `load`."""

    config: Config
    tokenizer: Tokenizer
    var: VAR | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)  # what it was trained on: see `mars.train.var.ranges`
    card: str = ""  # Markdown: data, licence, figures
    hash: str = ""  # sha256 of the manifest it was loaded from

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tokenizer.mask.device

    @torch.inference_mode()
    def encode(self, waveform: Tensor) -> Tensor:
        """Tokens int64 (B, L) of waveforms (B, samples) in [-1, 1] at `config.audio.sample_rate`."""
        return self.tokenizer.encode(audio.multiplexed(waveform.to(self.device), self.config.audio))

    @torch.inference_mode()
    def decode(self, ids: Tensor, *, iterations: int = 32, seed: int | Sequence[torch.Generator] = 0) -> Tensor:
        """Waveforms (B, samples) of tokens (B, L).

        The phase is Griffin-Lim's, started at random from `seed`: a number, or a generator for each note.
        """
        magnitudes = audio.demultiplexed_magnitudes(self.tokenizer.decode(ids.to(self.device)), self.config.audio)
        return audio.griffin_lim(magnitudes, self.config.audio, iterations, generators=seed)

    def generate(self, n: int, **settings: Any) -> list[Any]:
        """New notes; the settings are those of `mars.generate.generate`."""
        from mars.generate import generate

        return list(generate(self, n, **settings))

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the model directory `path`, replacing one that is there.

        Raises:
            OSError: it cannot be written; the old directory is kept.
        """
        tensors = {"tokenizer": _state(self.tokenizer, dtype)}
        if self.var is not None:
            tensors["var"] = _state(self.var, dtype)
        documents = {"config": config.to_dict(self.config), "notes": self.notes}
        checkpoint.replace_directory(path, tensors, documents, {"README.md": self.card} if self.card else None)


def _state(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in module.state_dict().items()}


def _loaded(build: Callable[[], M], weights: Path, device: str | torch.device) -> M:
    """The module with its weights, built only once a copy without memory has shown that these are its own."""
    with torch.device("meta"):
        checkpoint.check_shapes(build(), weights)
    module = build()
    checkpoint.load_weights(module, checkpoint.read_tensors(weights), weights)
    return module.to(device).eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Range:
    """An entry of notes.json, as `mars.train.var.ranges` makes them."""

    family: str | None
    source: str | None
    count: int
    pitch: tuple[int, int]

    def __post_init__(self) -> None:
        low, high = self.pitch
        if not (self.count >= 0 and -1 <= low <= high < 128):
            raise ConfigError(f"want a count and pitches from -1 to 127, got {self.count:,} and {self.pitch}")
        for name, value, known in (("family", self.family, FAMILIES), ("source", self.source, SOURCES)):
            if value not in (None, *known):
                raise ConfigError(f"{name} must be null or one of {', '.join(known)}; got {value!r:.80}")


def _ranges(path: Path) -> list[dict[str, Any]]:
    entries = checkpoint.read_json(path)
    if not isinstance(entries, list):
        raise CheckpointError(f"{path} must hold a list, got {type(entries).__name__}")
    for i, entry in enumerate(entries):
        config.from_document(_Range, entry, f"{path}: entry {i}", CheckpointError)
    return entries


def locate(name: str | Path | None) -> Path:
    """The model directory meant by a packaged name, a run folder or a model directory; None: the packaged default.

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
        raise CheckpointError("this installation has no packaged model; name one: --model PATH")
    if (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path} is a run that has not finished its first save; wait for it or resume it")
    known = ", ".join(sorted(p.name for p in packaged.iterdir())) if packaged.is_dir() else ""
    raise CheckpointError(f"{path} is not a model or a run folder; packaged models: {known or 'none'}")


def load(name: str | Path | None = None, device: str | torch.device = "cpu") -> Model:
    """Load a model.

    Args:
        name: a run folder, a model directory, the name of a packaged model, or None for the packaged default.
        device: where the weights go.

    Raises:
        CheckpointError: there is no such model, or a file is damaged or does not fit its configuration.
        ConfigError: its configuration cannot be used.
    """
    path = locate(name)
    checkpoint.verify(path)
    settings = config.load(path / "config.json")
    tokenizer: Tokenizer = _loaded(lambda: Tokenizer(settings), path / "tokenizer.safetensors", device)
    var = None
    if (path / "var.safetensors").exists():
        var = _loaded(lambda: VAR(settings.var, settings.tokenizer), path / "var.safetensors", device)
    card = path / "README.md"
    return Model(
        config=settings,
        tokenizer=tokenizer,
        var=var,
        notes=_ranges(path / "notes.json"),
        card=read_text(card, CheckpointError) if card.exists() else "",
        hash=sha256(path / checkpoint.MANIFEST),
    )
