"""The tokens of a dataset, computed once per tokenizer and dataset and cached beside the runs.

`runs/.tokens/<key>/` holds `ids.safetensors` of shape (notes, L) in the smallest integer type and a manifest of sha256
sums. The folder appears complete or not at all, and is checked and read into memory when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mars import checkpoint
from mars.config import Config, to_dict
from mars.data import Dataset
from mars.data.tokens import SEARCH, kind, read, write
from mars.errors import CheckpointError, ConfigError
from mars.model import Model, tokens_of
from mars.models.tokenizer import Tokenizer
from mars.runs.distributed import ALONE, World

VERSION = SEARCH  # of what is cached
PRECISION = str(torch.float32)  # of all tokens (`mars.model.tokens_of`); tokens of another were kept once


def cached_tokens(
    folder: Path,
    tokenizer: Tokenizer,
    config: Config,
    dataset: Dataset,
    world: World,
    *,
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> Tensor:
    """Return the tokens of every note, (notes, L) uint8, uint16 or int32: cached in `folder`, or else computed.

    A damaged entry is computed again; if the folder cannot be written the tokens stay in memory. `say` gets a warning
    of either. Several processes share the work, unless all of them find the tokens.
    """
    path = folder / _key(tokenizer, config, dataset)
    cached, problem = None, ""
    if path.is_dir():
        try:
            checkpoint.verify(path)
            ids = checkpoint.read_tensors(path / "ids.safetensors")["ids"]
            if ids.shape == (len(dataset), config.tokenizer.tokens):
                cached = ids.clone()  # as read they are mapped, and a file cut short later would end the process
            else:
                problem = f"{path} holds tokens of shape {tuple(ids.shape)}"
        except (CheckpointError, KeyError) as error:
            problem = str(error)
    missing = world.any(cached is None)
    if cached is not None and not missing:
        return cached
    if problem:
        say(f"warning: {problem}; making the tokens again")
        if world.main:
            shutil.rmtree(path, ignore_errors=True)
    tokens = tokenize(tokenizer, config, dataset, world, advance)
    if not world.main or path.is_dir():
        return tokens
    try:
        checkpoint.write_directory(path, {"ids": {"ids": tokens}}, {})
    except OSError as error:
        if not path.is_dir():  # else another process was faster
            say(f"warning: the tokens could not be kept in {folder} ({error}); they stay in memory")
    return tokens


def _key(tokenizer: Tokenizer, config: Config, dataset: Dataset) -> str:
    """Return the sha256, in hexadecimal, of all that the tokens depend on."""
    settings = {name: to_dict(getattr(config, name)) for name in ("audio", "tokenizer")}
    digest = hashlib.sha256(json.dumps([VERSION, dataset.fingerprint, PRECISION, settings]).encode())
    for name, weight in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def write_tokens(model: Model, dataset: Dataset, out: Path, progress: Callable[[int, int], None]) -> None:
    """Write the tokens of all notes of a dataset to the new folder `out`; see `mars.data.tokens`.

    Args:
        progress: called with the notes done and all of them.

    Raises:
        ConfigError: `out` exists, or the notes are at another sample rate than the model's.
        OSError: it cannot be written.
    """
    if out.exists():
        raise ConfigError(f"`out` {out} exists; name a new folder")
    if dataset.sample_rate != model.config.audio.sample_rate:
        raise ConfigError(
            f"the dataset is at {dataset.sample_rate} Hz, the model at {model.config.audio.sample_rate}; "
            "pack it again at that rate (`mars-data folder`)"
        )
    done = 0

    def advance(notes: int) -> None:
        nonlocal done
        done = min(done + notes, len(dataset))
        progress(done, len(dataset))

    world = World(device=model.device) if model.device.type != "cpu" else ALONE
    write(out, tokenize(model.tokenizer, model.config, dataset, world, advance), dataset, model.tokenizer, model.config)


def given_tokens(path: Path, tokenizer: Tokenizer, config: Config, dataset: Dataset) -> Tensor:
    """Return the tokens in a folder, (notes, L), for training on this dataset.

    Raises:
        ConfigError: they are of another dataset, or by another tokenizer.
        DataError: the folder is damaged, or something else.
    """
    tokens = read(path)
    tokens.check(f"`tokens` {path}", tokenizer, config)
    if tokens.header.dataset not in (None, dataset.fingerprint) or list(tokens.header.names) != list(dataset.names):
        raise ConfigError(f"`tokens` {path} is of other notes than the dataset; name that, or make its tokens")
    return tokens.ids


@torch.inference_mode()
def tokenize(
    tokenizer: Tokenizer, config: Config, dataset: Dataset, world: World, advance: Callable[[int], None]
) -> Tensor:
    """Compute the tokens of every note, (notes, L), in the smallest of uint8, uint16 and int32 that holds them.

    Batches are of fixed size; `advance` is called with the number of notes done. Several processes take the batches in
    turn, and all get all tokens.
    """
    size, codes = config.train.var.batch_size, config.tokenizer.codebook_size
    dtype = kind(codes)
    tokens = torch.zeros(len(dataset), config.tokenizer.tokens, dtype=dtype if world.size == 1 else torch.int32)
    for start in range(world.rank * size, len(dataset), world.size * size):
        indices = np.arange(start, min(start + size, len(dataset)))
        waveforms = dataset.waveforms(indices).to(world.device)
        tokens[start : start + len(indices)] = tokens_of(tokenizer, waveforms, config.audio).to(tokens.dtype)
        advance(len(indices) * world.size)
    return world.all_reduce(tokens).to(dtype)  # every note is zero in all processes but one
