"""A trained model: the front end's settings, the tokenizer and, if it can generate, the VAR transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mars
from mars import audio, checkpoint, config
from mars.arguments import Array, integer, tensor
from mars.config import Config
from mars.errors import CheckpointError, ConfigError
from mars.files import sha256
from mars.labels import Ranges
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR
from mars.runtime import pick_device

DEFAULT = "notes"  # the packaged model


@dataclass
class Model:
    """Tokenizer and VAR with their settings; see `load`."""

    config: Config
    tokenizer: Tokenizer
    var: VAR | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)  # what it was trained on: see `mars.train.var.ranges`
    data: Mapping[str, str] = field(default_factory=dict)  # fingerprint of what "tokenizer" and "var" were trained on
    card: str = ""  # Markdown: data, licence, figures
    hash: str = ""  # sha256 of the manifest it was loaded from

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tokenizer.mask.device

    @property
    def record(self) -> dict[str, Any]:
        """What decides its notes beside the settings, for a listing of them."""
        return {
            "mars": mars.__version__,
            "model_hash": self.hash,
            "torch": torch.__version__,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
        }

    @property
    def ranges(self) -> Ranges:
        """What it can be asked for; nothing if it has no second stage."""
        return Ranges(self.var.config.condition if self.var is not None else (), self.notes)

    @torch.inference_mode()
    def encode(self, waveform: Array) -> Tensor:
        """Tokens int64 (B, L) of waveforms (B, samples) in [-1, 1] at `config.audio.sample_rate`.

        A NumPy array will do. Notes of another length are for the caller to cut, or to pad with zeros.

        Raises:
            ConfigError: another shape, integers, NaN or infinity.
            CheckpointError: the tokenizer's weights were made something else than float32.
        """
        wanted = f"waveforms (B, {self.config.audio.samples}), floating-point with full scale 1"
        x = tensor("encode", waveform, wanted)
        if not x.is_floating_point():
            hint = "" if x.is_complex() or x.dtype == torch.bool else "; divide 16-bit samples by 32768"
            raise ConfigError(f"encode: want {wanted}, got {x.dtype}{hint}")
        if x.ndim != 2:
            hint = "; give one note as waveform[None]" if x.ndim == 1 else "; mix channels to one, one note a row"
            raise ConfigError(f"encode: want {wanted}, got shape {tuple(x.shape)}{hint}")
        if x.shape[1] != self.config.audio.samples:
            do = "cut it" if x.shape[1] > self.config.audio.samples else "pad it with zeros"
            raise ConfigError(f"encode: want {wanted}, got {x.shape[1]} samples; {do}")
        if not bool(x.isfinite().all()):
            raise ConfigError(f"encode: want {wanted}, got NaN or infinity in {_rows(~x.isfinite())}")
        self.check_weights()
        return self.tokenizer.encode(audio.multiplexed(x.to(self.device), self.config.audio))

    @torch.inference_mode()
    def decode(self, ids: Array, *, iterations: int = 32, seed: int | Sequence[torch.Generator] = 0) -> Tensor:
        """Waveforms (B, samples) of tokens (B, L), a NumPy array or a tensor of integers.

        The phase is Griffin-Lim's, started at random from `seed`: a number, or a generator for each note.

        Raises:
            ConfigError: another shape, numbers that are no tokens, a setting out of range.
            CheckpointError: the tokenizer's weights were made something else than float32.
        """
        size, length = self.config.tokenizer.codebook_size, self.config.tokenizer.tokens
        wanted = f"tokens (B, {length}), integers 0..{size - 1}"
        x = tensor("decode", ids, wanted)
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ConfigError(f"decode: want {wanted}, got {x.dtype}")
        if x.ndim != 2 or x.shape[1] != length:
            hint = "; give one note as ids[None]" if x.shape == (length,) else ""
            raise ConfigError(f"decode: want {wanted}, got shape {tuple(x.shape)}{hint}")
        x = x.to(torch.int64)
        if bool((outside := (x < 0) | (x >= size)).any()):
            raise ConfigError(f"decode: want {wanted}, got {int(x[outside][0])} in {_rows(outside)}")
        iterations = integer("iterations", iterations, 0)
        if not isinstance(seed, Sequence):
            seed = integer("seed", seed, 0, 2**63 - 1)
        elif len(seed) != len(x) or not all(isinstance(generator, torch.Generator) for generator in seed):
            raise ConfigError(f"seed must be a number or {len(x)} generators, one a note; got {seed!r:.80}")
        self.check_weights()
        magnitudes = audio.demultiplexed_magnitudes(self.tokenizer.decode(x.to(self.device)), self.config.audio)
        return audio.griffin_lim(magnitudes, self.config.audio, iterations, generators=seed)

    def check_weights(self) -> None:
        """Raise `CheckpointError` if somebody has made the weights something else than float32."""
        for name, part in (("tokenizer", self.tokenizer), ("var", self.var)):
            dtype = next((p.dtype for p in part.parameters() if p.dtype != torch.float32), None) if part else None
            if dtype is not None:
                raise CheckpointError(f"{name}: want weights in float32, got {dtype}; go back: model.{name}.float()")

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
        documents: dict[str, Any] = {"config": config.to_dict(self.config), "notes": self.notes}
        if self.data:
            documents["data"] = dict(self.data)
        checkpoint.replace_directory(path, tensors, documents, {"README.md": self.card} if self.card else None)


def _rows(marked: Tensor) -> str:
    """In which rows of (B, n) anything is marked, for a message."""
    rows = marked.any(dim=1).nonzero().flatten().tolist()
    return f"row {rows[0]}" + (f" and {len(rows) - 1} more" if rows[1:] else "")


def _state(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in module.state_dict().items()}


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
        device: where the weights go: auto, cpu, cuda, cuda:1, mps, ….

    Raises:
        CheckpointError: there is no such model, or a file is damaged or does not fit its configuration.
        ConfigError: its configuration cannot be used, or there is no such device.
    """
    device = pick_device(device)
    path = locate(name)
    checkpoint.verify(path)
    settings = config.load(path / "config.json")
    tokenizer = Tokenizer(settings)
    checkpoint.load_weights(
        tokenizer, checkpoint.read_tensors(path / "tokenizer.safetensors"), path / "tokenizer.safetensors"
    )
    var = None
    if (path / "var.safetensors").is_file():
        var = VAR(settings.var, settings.tokenizer)
        checkpoint.load_weights(var, checkpoint.read_tensors(path / "var.safetensors"), path / "var.safetensors")
        var = var.to(device).eval().requires_grad_(False)
    card = path / "README.md"
    return Model(
        config=settings,
        tokenizer=tokenizer.to(device).eval().requires_grad_(False),
        var=var,
        notes=checkpoint.read_json(path / "notes.json"),
        data=_data(path),
        card=card.read_text(encoding="utf-8") if card.is_file() else "",
        hash=sha256(path / checkpoint.MANIFEST),
    )


def _data(path: Path) -> dict[str, str]:
    """The fingerprints in `data.json`, or of a model without it what the run that it is in says."""
    if (path / "data.json").is_file():
        found = checkpoint.read_json(path / "data.json")
        if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
            return found
        raise CheckpointError(f"{path / 'data.json'} must hold the fingerprint of a dataset for each stage")
    record = path.parent / "run.json"
    run = checkpoint.read_json(record) if record.is_file() else None
    if isinstance(run, dict) and isinstance(run.get("stage"), str) and isinstance(run.get("data"), str):
        return {run["stage"]: run["data"]}
    return {}
