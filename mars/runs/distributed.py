"""The processes that train one model together: who takes which micro-batch, what they add up, who writes.

`join` reads torchrun's environment. Without it there is one process, every function here returns what it was given, and
torch.distributed is never initialised. Weights are either copied to every process (DistributedDataParallel; Li et al.
2020, arXiv:2006.15704) or spread over them (FSDP2; Zhao et al. 2023, arXiv:2304.11277). What the processes have to
agree on goes through gloo, on the CPU, and so does not wait for a GPU.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mars.config import TrainConfig
from mars.errors import ConfigError, LostProcess, MarsError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)  # how long one process waits for another, the main one's saving included


@dataclass(frozen=True)
class World:
    """This process among those of the run; process 0 is the main one, which alone writes and speaks."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this process writes checkpoints, logs and models."""
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """Whether this is the first process of its machine."""
        return int(os.environ.get("LOCAL_RANK", self.rank)) == 0

    def check(self, train: TrainConfig) -> None:
        """Raise ConfigError if the micro-batches of a step cannot be shared equally."""
        if train.accumulate % self.size == 0:
            return
        notes = train.notes_per_step
        counts = [a for a in range(self.size, notes + 1, self.size) if notes % a == 0]
        smaller = [a for a in counts if a >= train.accumulate]  # whose micro-batches need no more memory
        if counts:
            count = smaller[0] if smaller else counts[-1]
            cure = f"train.batch_size={notes // count} train.accumulate={count} keep the {notes} notes a step"
        else:
            cure = f"no train.batch_size keeps the {notes} notes a step, so start another number of processes"
        raise ConfigError(
            f"train.accumulate must be a multiple of the {self.size} processes, got {train.accumulate}; {cure}"
        )

    def share(self, count: int) -> range:
        """Return which of `count` micro-batches this process takes: its contiguous block."""
        assert count % self.size == 0
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wrap `module` so that its backward pass averages gradients over the processes; call what this returns."""
        if self.size == 1:
            return module
        where = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the successor of broadcast_buffers came with PyTorch 2.13
            return DistributedDataParallel(
                module, device_ids=where, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def sync(self, wrapped: nn.Module, last: bool) -> None:
        """Set, before a micro-batch's forward pass, whether its backward pass averages the accumulated gradients."""
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = last

    def shard(self, module: nn.Module, parts: Iterable[nn.Module]) -> None:
        """Spread the parameters of `module` over the processes in place; each of `parts` is gathered by itself.

        Gradients are averaged after every micro-batch, since keeping them whole between micro-batches would take the
        memory that sharding saves.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for part in (*parts, module):
            fully_shard(part, mesh=mesh)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process; a barrier too."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.any(False)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Average over the processes."""
        return tensor if self.size == 1 else self.all_reduce(tensor.clone()) / self.size

    def means(self, metrics: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
        """Average the scalar tensors among the metrics over the processes; numbers are the same everywhere."""
        names = [name for name, value in metrics.items() if isinstance(value, Tensor)]
        if self.size == 1 or not names:
            return dict(metrics)
        values = self.mean(torch.stack([torch.as_tensor(metrics[name]) for name in names]))
        return {**metrics, **dict(zip(names, values.unbind(), strict=True))}

    def broadcast(self, own: T) -> T:
        """Return in every process the JSON value that the main process passed as `own`."""
        if self.size == 1:
            return own
        data = torch.tensor(list(json.dumps(own).encode()), dtype=torch.uint8)
        length = torch.tensor(len(data))
        dist.broadcast(length, 0)
        data = data if self.main else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return json.loads(bytes(data.tolist()))

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors, sharded ones gathered on the CPU of the main process, and left out in the others."""
        gathered = {}
        for name, tensor in tensors.items():
            if _sharded(tensor):
                full = tensor.full_tensor()  # type: ignore[attr-defined]  # one at a time, so that memory stays low
                if self.main:
                    gathered[name] = full.detach().cpu()
            else:
                gathered[name] = tensor
        return gathered

    @staticmethod
    def local(tensor: Tensor) -> Tensor:
        """Return `tensor`, or of a sharded one the part that this process holds, as a view."""
        return tensor.to_local() if _sharded(tensor) else tensor  # type: ignore[attr-defined]

    @staticmethod
    def part(full: Tensor, like: Tensor) -> Tensor:
        """Return `full`, or where `like` is sharded this process's part of it, on the same device."""
        if not _sharded(like):
            return full
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(like, DTensor)
        # No source rank: every process has read `full` itself, and takes its part without asking.
        return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


ALONE = World()  # one process
_joined = False  # whether this process has ever been one of several


def join(device: torch.device) -> World:
    """Join the processes that torchrun started, and return this one's place; without torchrun it is alone, on `device`.

    CUDA processes take the GPU of their local rank and talk over NCCL, CPU processes over gloo.

    Raises:
        ConfigError: there is no GPU for this process, or the device is one that cannot be shared.
    """
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), _own(device))
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        return World(device=device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"`device` {device.type}: several processes need cpu or cuda")
    device = _own(device)
    global _joined
    _joined = True
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return World(dist.get_rank(), dist.get_world_size(), device)


def _own(device: torch.device) -> torch.device:
    """This process's GPU; the CPU is everybody's."""
    if device.type != "cuda":
        return device
    local, present = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= present:
        raise ConfigError(f"process {local} of this machine has no GPU; start {present} processes a machine or fewer")
    return torch.device("cuda", local)


@contextmanager
def teardown() -> Iterator[None]:
    """Leave the process group at the end of the block, if there is one; an error says which process it is of.

    Raises:
        LostProcess: another process went away. After any error the process group is left as it is, since closing it
            waits for the others.
    """
    try:
        yield
    except MarsError as error:
        if dist.is_initialized() and dist.get_rank():
            error.args = (f"process {dist.get_rank()}: {error}",)
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo's own errors have no class
            raise LostProcess(
                f"lost another process of this run ({str(error).splitlines()[0]}); its own message says why. "
                "Start all of them again with the same `out` to go on from the last checkpoint"
            ) from error
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End this process with `code` at once if it was one of several, else return; functions of `atexit` are run first.

    Gloo's threads outlive their process group, since parts of PyTorch keep it. One that is still letting go of a tensor
    while Python shuts down is ended by Python, and with it the whole process by SIGABRT, whatever its exit code was to
    be (https://github.com/pytorch/pytorch/pull/179291). So a process of several never gets there.
    """
    if not _joined:
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or a pipe that nobody reads
            stream.flush()
    os._exit(code)
