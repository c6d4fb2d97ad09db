"""A folder of tokens: what a tokenizer made of notes, for training, for listening, and for other programs.

    tokens.safetensors   "ids" (notes, L): uint8, uint16 or int32; L tokens a note, scale after scale, coarse to fine
    tokens.json          format and version; "scales" (h, w) of each, "codebook_size", "sample_rate" (Hz), "samples";
                         "tokenizer" and "dataset": sums of what made them and of what they are of, or null;
                         "names" of the notes, and "labels": of each label its values, null where it is not known
    manifest.json        size and sha256 of both

Another program may write such a folder without a manifest and with null for both sums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mars import checkpoint
from mars.config import Config, from_document, to_dict
from mars.data.packed import Dataset
from mars.errors import CheckpointError, ConfigError, DataError
from mars.files import read_json
from mars.labels import LABELS, Values, is_name, label

FORMAT, VERSION = "mars-tokens", 1
SEARCH = 1  # version of what makes tokens of a spectrogram; a change of the front end or of the search must raise it


@dataclass(frozen=True, kw_only=True)
class Header:
    """What `tokens.json` says."""

    format: Literal["mars-tokens"]
    version: Literal[1]
    scales: tuple[tuple[int, int], ...]
    codebook_size: int
    sample_rate: int
    samples: int
    tokenizer: str | None
    dataset: str | None
    names: tuple[str, ...]
    labels: Mapping[str, Any]  # lists, as long as the names

    def __post_init__(self) -> None:
        for name, values in self.labels.items():
            if not is_name(name) or not isinstance(values, list) or len(values) != len(self.names):
                raise ConfigError(f"want labels, each a name and a list of {len(self.names):,} values; see {name}")
            for value in values:
                label(name).listed(value)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of notes, and what is known of these."""

    header: Header
    ids: Tensor  # (notes, L), of an integer type

    @property
    def sum(self) -> str:
        """The sha256, in hexadecimal, of the tokens."""
        return hashlib.sha256(self.ids.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()

    def condition(self, note: int) -> Values:
        """Return the values of the labels of a note, None where they are not known."""
        return dict.fromkeys(LABELS) | {name: values[note] for name, values in self.header.labels.items()}

    def check(self, where: object, tokenizer: nn.Module, config: Config) -> None:
        """Raise `ConfigError` unless this tokenizer, with these settings, can have made them."""
        made, settings = self.header.tokenizer, config.tokenizer
        if made not in (None, tokenizer_sum(tokenizer, config)):
            raise ConfigError(f"{where} was made by another tokenizer than this; name the model that made it")
        if (self.header.scales, self.header.codebook_size) != (settings.scales, settings.codebook_size):
            raise ConfigError(
                f"{where} is of {self.header.codebook_size:,} codes on scales {self.header.scales}, the model of "
                f"{settings.codebook_size:,} on {settings.scales}; name the model that made it"
            )


def tokenizer_sum(tokenizer: nn.Module, config: Config) -> str:
    """Return the sha256, in hexadecimal, of all that the tokens of a sound depend on."""
    settings = {name: to_dict(getattr(config, name)) for name in ("audio", "tokenizer")}
    digest = hashlib.sha256(json.dumps([SEARCH, settings]).encode())
    for name, weight in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: Path, ids: Tensor, dataset: Dataset, tokenizer: nn.Module, config: Config) -> None:
    """Write the tokens (notes, L) of all notes of a dataset to the new folder `path`, all or nothing.

    Raises:
        ConfigError: `path` exists.
        OSError: it cannot be written.
    """
    if path.exists():
        raise ConfigError(f"`out` {path} exists; name a new folder")
    columns = dataset.labels()
    labels: dict[str, list[Any]] = {}
    for name, column in columns.items():
        values = label(name).values(dataset.words)
        labels[name] = [None if number < 0 else values[number] for number in column.tolist()]
    header = Header(
        format="mars-tokens", version=1, scales=config.tokenizer.scales, codebook_size=config.tokenizer.codebook_size,
        sample_rate=config.audio.sample_rate, samples=config.audio.samples, tokenizer=tokenizer_sum(tokenizer, config),
        dataset=dataset.fingerprint, names=tuple(dataset.names), labels=labels,
    )  # fmt: skip
    checkpoint.write_directory(path, {"tokens": {"ids": ids}}, {"tokens": asdict(header)})


def read(path: Path) -> Tokens:
    """Read the tokens in a folder that `write`, or another program, wrote.

    Raises:
        DataError: it is missing, damaged, or something else.
    """
    if not (path / "tokens.json").is_file():
        raise DataError(f"{path} is no folder of tokens (it has no tokens.json); make one: `mars-data tokens`")
    try:
        if (path / checkpoint.MANIFEST).exists():
            checkpoint.verify(path)
        header = from_document(Header, read_json(path / "tokens.json", DataError), path / "tokens.json", DataError)
        tensors = checkpoint.read_tensors(path / "tokens.safetensors")
    except CheckpointError as error:
        raise DataError(str(error)) from None
    except ValueError as error:  # of a label's value
        raise error if isinstance(error, DataError) else DataError(f"{path / 'tokens.json'}: {error}") from None
    ids, length = tensors.get("ids"), sum(h * w for h, w in header.scales)
    if ids is None or ids.is_floating_point() or ids.dtype == torch.bool or ids.shape != (len(header.names), length):
        got = "none" if ids is None else f"{ids.dtype} {tuple(ids.shape)}"
        raise DataError(f"{path}: want integers ids ({len(header.names)}, {length}) in tokens.safetensors, got {got}")
    wide = ids.to(torch.int64)  # as read they are mapped, and a file cut short later would end the process
    if wide.numel() and not 0 <= int(wide.min()) <= int(wide.max()) < header.codebook_size:
        raise DataError(
            f"{path}: want tokens 0..{header.codebook_size - 1}, got {int(wide.min())} to {int(wide.max())}"
        )
    return Tokens(header, wide.to(kind(header.codebook_size)))


def kind(codebook_size: int) -> torch.dtype:
    """Return the smallest of uint8, uint16 and int32 that holds the tokens of a codebook."""
    return torch.uint8 if codebook_size <= 1 << 8 else torch.uint16 if codebook_size <= 1 << 16 else torch.int32
