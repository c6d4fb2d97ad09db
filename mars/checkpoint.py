"""Directories of safetensors and JSON that are complete or absent, and proven intact when read.

A directory is written under a temporary name, every file flushed to disk, a manifest of sha256 sums written last, and
renamed. Nothing here reads or writes any format that can run code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mars.errors import CheckpointError
from mars.files import sha256, sync

MANIFEST = "manifest.json"
Tensors = Mapping[str, Tensor]


def write_directory(
    path: Path, tensors: Mapping[str, Tensors], documents: Mapping[str, Any], texts: Mapping[str, str] | None = None
) -> None:
    """Write `<name>.safetensors`, `<name>.json` and text files into the new directory `path`, all or nothing.

    Raises:
        FileExistsError: `path` exists.
        OSError: the disk is full or cannot be written; nothing is left behind.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, group in tensors.items():
            contiguous = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            save_file(contiguous, temporary / f"{name}.safetensors")
            (temporary / f"{name}.safetensors").chmod(0o644)  # safetensors makes it readable to its owner alone
        for name, document in documents.items():
            (temporary / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        files = {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
        for p in temporary.iterdir():
            sync(p)
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_directory(
    path: Path, tensors: Mapping[str, Tensors], documents: Mapping[str, Any], texts: Mapping[str, str] | None = None
) -> None:
    """`write_directory`, in place of what is there; the old one goes only when the new one is complete."""
    new, old = path.with_name(f".new-{path.name}"), path.with_name(f".old-{path.name}")
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    write_directory(new, tensors, documents, texts)
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify(path: Path) -> None:
    """Check every file of the directory against its manifest.

    Raises:
        CheckpointError: a file is missing, changed or not listed, or the manifest cannot be read.
    """
    manifest = read_json(path / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path / MANIFEST} lists no files; the directory is damaged")
    for name, entry in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file} is missing; the directory is damaged")
        if not isinstance(entry, dict) or sha256(file) != entry.get("sha256"):
            raise CheckpointError(f"{file} does not match its checksum; the file is damaged")
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".json") and file.name not in (*files, MANIFEST):
            raise CheckpointError(f"{file} is not listed in the manifest; move it elsewhere")


def read_json(path: Path) -> Any:
    """The JSON document at `path`.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def load_weights(
    module: nn.Module, tensors: Tensors, source: Path, part: Callable[[Tensor, Tensor], Tensor] = lambda full, own: full
) -> None:
    """Copy `tensors` into `module`: the same names and shapes, any float dtype.

    Of each tensor goes there what `part(tensor, own)` gives, as where `module` is spread over processes.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    own = module.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        side = "lacks" if name in own else "has an unknown"
        raise CheckpointError(f"{source} {side} tensor {name}; it belongs to another configuration")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source}: tensor {name} has shape {tuple(tensor.shape)}, "
                f"the configuration wants {tuple(own[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{source}: tensor {name} holds values that are not finite")
        own[name].copy_(part(tensor, own[name]))
