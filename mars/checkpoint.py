"""Directories of safetensors and JSON that are complete or absent, and proven intact when read.

A directory is written under a temporary name, every file hashed on its way and flushed to disk, a manifest of sha256
sums written last, and renamed. Nothing here reads or writes any format that can run code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mars import files, lock
from mars.errors import CheckpointError
from mars.files import sha256, sync, write_new

MANIFEST = "manifest.json"
Tensors = Mapping[str, Tensor]

_WRITING, _NEW, _OLD, _DOOMED = ".tmp-", ".new-", ".old-", ".del-"  # how the names of unfinished work begin
_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL"},
}


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
    contents = {name: [text.encode()] for name, text in (texts or {}).items()}
    contents |= {f"{name}.json": [_json(document)] for name, document in documents.items()}
    with lock.scratch(path) as new:
        listed = {name: write_new(new / name, parts) for name, parts in contents.items()}
        for name, group in tensors.items():
            listed[f"{name}.safetensors"] = write_new(new / f"{name}.safetensors", _safetensors(group))
        write_new(new / MANIFEST, [_json({"files": dict(sorted(listed.items()))})])
        sync(new)
        new.rename(path)
        sync(path.parent)


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def _safetensors(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file in parts: the length of its header, the header, and one tensor after another.

    So no more than one tensor at a time is copied from a GPU. The widest dtypes come first, which aligns all.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def replace_directory(
    path: Path, tensors: Mapping[str, Tensors], documents: Mapping[str, Any], texts: Mapping[str, str] | None = None
) -> None:
    """Do what `write_directory` does, replacing a directory that is there only when the new one is complete.

    Killed between its two renames, it leaves nothing at `path`: see `current` and `recover`.
    """
    if not path.exists():
        write_directory(path, tensors, documents, texts)
        return
    new, old = path.with_name(f"{_NEW}{path.name}"), path.with_name(f"{_OLD}{path.name}")
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    write_directory(new, tensors, documents, texts)
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory so that no reader takes a partly removed one for the whole."""
    doomed = path.with_name(f"{_DOOMED}{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def current(path: Path) -> Path:
    """Return the path of the directory `path`: another name if its writer was killed while replacing it."""
    places = (path, path.with_name(f"{_NEW}{path.name}"), path.with_name(f"{_OLD}{path.name}"))
    return next((p for p in places if p.exists()), path)


def recover(folder: Path) -> None:
    """Restore the directories of `folder` after a writer was killed, and remove what it left unfinished.

    Only for the one process that may write there.
    """
    for prefix in (_NEW, _OLD):
        for copy in folder.glob(f"{prefix}*"):
            path = copy.with_name(copy.name.removeprefix(prefix))
            if not path.exists():
                copy.rename(path)
    for prefix in (_WRITING, _NEW, _OLD, _DOOMED):
        for leftover in folder.glob(f"{prefix}*"):
            shutil.rmtree(leftover)
    for leftover in folder.glob(".*.tmp"):  # of `files.write_atomically`
        leftover.unlink()


def verify(path: Path) -> None:
    """Check every file of the directory against its manifest.

    Raises:
        CheckpointError: a file is missing, changed or not listed, or the manifest cannot be read.
    """
    manifest = read_json(path / MANIFEST)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path / MANIFEST} lists no files; the directory is damaged")
    for name, entry in listed.items():
        file = path / name
        try:
            if Path(name).name != name or name == ".." or "\0" in name:
                raise FileNotFoundError
            intact = isinstance(entry, dict) and file.stat().st_size == entry.get("bytes")
            intact = intact and sha256(file) == entry.get("sha256")
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing; the directory is damaged") from None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
        if not intact:
            raise CheckpointError(f"{file} does not match its checksum; the file is damaged")
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".json") and file.name not in (*listed, MANIFEST):
            raise CheckpointError(f"{file} is not listed in the manifest; move it elsewhere")


def read_json(path: Path) -> Any:
    """Read the JSON document at `path`.

    Raises:
        CheckpointError: it is missing, not a regular file, too large, or not JSON.
    """
    return files.read_json(path, CheckpointError)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged, or holds numbers of a kind that mars does not write, such as float8.
    """
    with _tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict


def check_shapes(module: nn.Module, path: Path) -> None:
    """Check by its header alone that the safetensors file at `path` holds the tensors of `module`.

    The module may be on the meta device, so that no memory is taken for a configuration that its weights belie.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    with _tensors(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a dict
    _check_shapes(_shapes(module.state_dict()), shapes, path)


@contextmanager
def _tensors(path: Path) -> Iterator[Any]:
    """A safetensors file whose header has been read and whose dtypes are known."""
    try:
        with files.opened(path):
            pass
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                dtype, known = file.get_slice(name).get_dtype(), _DTYPES.values()
                if dtype not in known:
                    raise CheckpointError(f"{path}: tensor {name} is of dtype {dtype}; want one of {', '.join(known)}")
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def load_weights(
    module: nn.Module,
    tensors: Tensors,
    source: Path | str,
    part: Callable[[Tensor, Tensor], Tensor] = lambda full, own: full,
) -> None:
    """Copy `tensors` into `module`: the same names and shapes, any float dtype.

    `part(tensor, own)` gives what is copied of each tensor, for a `module` that is sharded over processes.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    own = module.state_dict()
    _check_shapes(_shapes(own), _shapes(tensors), source)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise CheckpointError(
                f"{source}: tensor {name} is of {tensor.dtype}, the configuration wants {own[name].dtype}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{source}: tensor {name} holds values that are not finite")
        own[name].copy_(part(tensor, own[name]))


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]], source: Path | str
) -> None:
    for name in sorted(expected.keys() ^ actual.keys()):
        side = "lacks" if name in expected else "has an unknown"
        raise CheckpointError(f"{source} {side} tensor {name}; it belongs to another configuration")
    for name, shape in actual.items():
        if shape != expected[name]:
            raise CheckpointError(
                f"{source}: tensor {name} has shape {shape}, the configuration wants {expected[name]}"
            )
