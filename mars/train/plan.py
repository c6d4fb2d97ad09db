"""Plans a training step without running it: memory, FLOPs, and the micro-batch that fits.

The stage's own step runs on fake tensors, which have shapes but no data: no GPU, no dataset and hardly any memory is
used. The fake tensors are a CPU's, since a PyTorch without CUDA cannot run a backward pass on fake CUDA ones; the
operations are those that a GPU would be given, with the dtypes of its autocast. Memory is what the tensors that are
alive at once take, as `torch.cuda.max_memory_allocated` counts it; the workspaces of cuDNN and cuBLAS are not in it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry

from mars.config import Config, TrainConfig
from mars.data import Dataset
from mars.kernels import _backend, costs
from mars.labels import LABELS, Words
from mars.models.tokenizer import Tokenizer
from mars.runs.stage import StageName
from mars.runtime import native_bfloat16, stream
from mars.train.optimizer import Optimizer
from mars.train.tokenizer import TokenizerStage
from mars.train.var import VARStage

RESERVED = 1 << 30  # bytes: the CUDA context, and the workspaces of cuBLAS and cuDNN
FRAGMENTED = 0.05  # share of the memory that lies unused between the allocator's blocks
ROWS = 2048  # of a micro-batch's matrices, below which a GPU idles: worth a third more FLOPs

NO_WORDS: Words = MappingProxyType({})

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One planned step, in bytes and FLOPs."""

    held: int  # before the step: weights, moments, EMA weights, the batches of this and of the next step
    peak: int  # most during the step
    loading: int  # what preparing one micro-batch takes meanwhile
    flops: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The memory of a stage and the micro-batch that fits, with or without activation checkpointing."""

    checkpointing: bool
    peak: int  # bytes, at the micro-batch of the settings
    flops: int  # per step
    largest: int  # micro-batch, in notes, that fits; 0: not even one
    micro_batch: int  # the largest that fits and divides the notes of a step; 0: none


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a stage. Sizes are in bytes; FLOPs count matrix products, convolutions and attention."""

    stage: StageName
    preset: str
    device: Device
    precision: str
    batch_size: int
    accumulate: int
    parameters: int
    weights: int  # with those of the discriminator, or of the tokenizer that a VAR reads
    gradients: int
    optimizer: int
    averaged: int
    checkpointing: bool  # as the settings have it
    grid: str  # the front end and the scales, in words
    memory: int
    usable: int  # of the memory, for tensors
    fits: tuple[Fit, Fit]  # without and with activation checkpointing
    recommended: tuple[str, ...]  # KEY=VALUE, for a step of as many notes; empty: nothing fits

    @property
    def notes(self) -> int:
        """The notes of a step."""
        return self.batch_size * self.accumulate

    @property
    def planned(self) -> Fit:
        """The fit for the settings as they are."""
        return self.fits[self.checkpointing]


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors alive, and FLOPs, of all operations below it."""

    def __init__(self, alignment: int) -> None:
        """alignment: bytes, to which the allocator rounds up."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.alignment = alignment
        self.held = self.peak = self.flops = 0
        self.truth = False  # what reading a bool gives, since fake ones have no values; a number reads as 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # most calls by far; as the fake mode itself would answer
            return cast(FakeTensor, args[0]).fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.truth if cast(Tensor, args[0]).dtype == torch.bool else 0
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.held + costs.workspace(func, args))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.alignment) * self.alignment

        def forget(_: Any) -> None:
            del self._known[key]
            self.held -= size

        self._known[key] = weakref.ref(storage, forget)
        self.held += size


class Notes:
    """A stand-in for a dataset: silent notes, all of them for training."""

    fingerprint = ""

    def __init__(self, samples: int, words: Words = NO_WORDS) -> None:
        """Make the notes. samples: of each; words: those of the open labels, each of which some note has."""
        self.samples, self.words = samples, words
        self.count = max([1024, *map(len, words.values())])

    def __len__(self) -> int:
        return self.count

    def split(self, name: str) -> np.ndarray:
        """Return the indices of a split, int64 (notes,)."""
        return np.arange(self.count)

    def waveforms(self, indices: np.ndarray) -> Tensor:
        """Return silence, float32 (notes, samples)."""
        return torch.zeros(len(indices), self.samples)

    def labels(self, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the numbers of every label, int32 (notes,) each: -1 (unknown), but for the labels of `words`."""
        unknown = dict.fromkeys(LABELS, np.full(self.count, -1, np.int32))
        known = {
            name: np.arange(self.count, dtype=np.int32) % len(words) for name, words in self.words.items() if words
        }
        return unknown | known


class DryRun:
    """A stage on fake tensors that has done its first step, so that the optimiser's moments exist."""

    def __init__(
        self, config: Config, stage: StageName, device: Device, *, at: int | None = None, words: Words = NO_WORDS
    ) -> None:
        """Make the stage.

        Args:
            at: the step to run; None: the last one, in which all terms of the loss are on.
            words: those of the open labels in the training notes, whose embeddings a VAR with such conditions has.
        """
        train = getattr(config.train, stage)
        self.device = device
        self.allocations = Allocations(alignment=512 if device == "cuda" else 1)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        precision = train.precision
        if precision == "auto":
            precision = "bfloat16" if device == "cuda" or native_bfloat16(torch.device("cpu")) else "float32"
        settings = config.with_train(stage, precision=precision)
        cpu, notes = torch.device("cpu"), cast(Dataset, Notes(config.audio.samples, words))
        with self._pretending():
            self.stage: TokenizerStage | VARStage
            if stage == "tokenizer":
                self.stage = TokenizerStage(settings, notes, cpu, 0)
            else:
                tokens = torch.zeros(1, config.tokenizer.tokens, dtype=torch.int32)
                tokenizer = Tokenizer(settings).eval().requires_grad_(False)
                self.stage = VARStage(settings, notes, tokenizer, tokens, cpu, 0)
        self.at = self.stage.train.steps - 1 if at is None else at
        self.step(train.batch_size, 1)

    def step(self, batch: int, micro_batches: int) -> Step:
        """Run a step of micro-batches of `batch` notes, with those of the next steps (`train.workers`) in memory."""
        count = self.allocations
        with self._pretending():
            count.peak = count.held
            first = self.stage.batch(np.zeros(batch, np.int64))
            loading = count.peak - count.held
            held_ahead = (1 + self.stage.train.workers) * micro_batches
            batches = [first, *(tree_map_only(Tensor, torch.clone, first) for _ in range(held_ahead - 1))]
            held = count.peak = count.held
            count.truth, flops = True, count.flops  # is it finite? it is
            streams = [stream(0, i) for i in range(micro_batches)]
            self.stage.step(self.at, batches[:micro_batches], streams)
            count.truth = False
            return Step(held=held, peak=count.peak, loading=loading, flops=count.flops - flops)

    def sizes(self) -> dict[str, int]:
        """Return the number of parameters, and the bytes of what stays from step to step."""
        members = vars(self.stage).values()
        held = {id(t): t for m in members if isinstance(m, nn.Module) for t in (*m.parameters(), *m.buffers())}
        for tensor in (*self.stage.ema.parameters(), *self.stage.ema.buffers()):
            held.pop(id(tensor), None)
        weights = held.values()
        return {
            "parameters": sum(p.numel() for p in self.stage.model.parameters()),
            "weights": sum(t.nbytes for t in weights),
            "gradients": sum(t.nbytes for t in weights if t.requires_grad),
            "optimizer": sum(t.nbytes for o in members if isinstance(o, Optimizer) for t in o.state().values()),
            "averaged": sum(p.nbytes for p in self.stage.ema.parameters()),
        }

    @contextmanager
    def _pretending(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_backend.planned(self.device))
            # Two things that fake parameters do not do: be moved, be it to the device where they are, and be copied.
            stack.enter_context(mock.patch.object(nn.Module, "to", _moved))
            stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", _copied))
            stack.enter_context(self._fake)
            stack.enter_context(self.allocations)
            yield


def _moved(module: nn.Module, *_: Any, memory_format: torch.memory_format | None = None) -> nn.Module:
    if memory_format is not None:
        for part in module.modules():
            for name, p in list(part.named_parameters(recurse=False)):
                if p.ndim == 4:
                    setattr(part, name, nn.Parameter(p.detach().contiguous(memory_format=memory_format)))
    return module


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    copy = tensor.detach().clone()
    memo[id(tensor)] = copy = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return copy


class Planner:
    """Plans of a stage for any amount of memory; words: as for `DryRun`."""

    def __init__(self, config: Config, stage: StageName, device: Device = "cuda", *, words: Words = NO_WORDS) -> None:
        self.config, self.stage, self.device = config, stage, device
        self._needs = [_Needs(config.with_train(stage, checkpointing=on), stage, device, words) for on in (False, True)]

    def plan(self, memory: int) -> Plan:
        """Return what the stage needs on a device with `memory` bytes, and the micro-batch that fits it."""
        train: TrainConfig = getattr(self.config.train, self.stage)
        usable = max(0, int(memory * (1 - FRAGMENTED)) - RESERVED)
        plain, checkpointed = (needs.fit(usable) for needs in self._needs)
        tokens = self.config.tokenizer.tokens
        if self.stage == "tokenizer":
            tokens = math.prod(self.config.patches) + math.prod(self.config.tokenizer.latent)
        dry_run = self._needs[train.checkpointing].dry_run
        return Plan(
            stage=self.stage,
            preset=self.config.preset,
            device=self.device,
            precision=dry_run.stage.train.precision,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            checkpointing=train.checkpointing,
            grid=_grid(self.config),
            memory=memory,
            usable=usable,
            fits=(plain, checkpointed),
            recommended=_recommended(plain, checkpointed, tokens, train),
            **dry_run.sizes(),
        )


class _Needs:
    """The bytes that a step needs, as a function of its micro-batch, for a given number of notes."""

    def __init__(self, config: Config, stage: StageName, device: Device, words: Words) -> None:
        self.train: TrainConfig = getattr(config.train, stage)
        self.notes = self.train.notes_per_step
        self.dry_run = DryRun(config, stage, device, words=words)
        self._steps: dict[tuple[int, int], Step] = {}
        two, three = (self._step(self.train.batch_size, n) for n in (2, 3))
        self.flops = two.flops + (self.train.accumulate - 2) * (three.flops - two.flops)
        self._more = (three.peak - two.peak) / self.train.batch_size  # per note of a micro-batch after the second

    def __call__(self, batch: int) -> int:
        step = self._step(batch, 2 if batch < self.notes else 1)
        return step.peak + step.loading + math.ceil(max(self.notes - 2 * batch, 0) * self._more)

    def fit(self, usable: int) -> Fit:
        """Return the largest fit into `usable` bytes."""
        largest = _largest(self, usable, self.train.batch_size, self.dry_run.allocations.held)
        return Fit(
            checkpointing=self.train.checkpointing,
            peak=self(self.train.batch_size),
            flops=self.flops,
            largest=largest,
            micro_batch=next((n for n in range(min(largest, self.notes), 0, -1) if self.notes % n == 0), 0),
        )

    def _step(self, batch: int, micro_batches: int) -> Step:
        if (batch, micro_batches) not in self._steps:
            self._steps[batch, micro_batches] = self.dry_run.step(batch, micro_batches)
        return self._steps[batch, micro_batches]


def _largest(needs: Callable[[int], int], usable: int, guess: int, least: int) -> int:
    """Return the largest micro-batch that needs at most `usable` bytes, or 0; `least`: the bytes without any."""
    needed = {0: least}
    low, high = 0, math.inf
    while high - low > 1:
        needed[guess] = needs(guess)
        if needed[guess] <= usable:
            low = guess
        else:
            high = guess
        a, b, *_ = sorted(needed, key=lambda n: abs(needed[n] - usable))
        slope = (needed[a] - needed[b]) / (a - b)  # needs are nearly affine
        estimate = a + (usable - needed[a]) / slope if slope > 0 else math.inf
        if a == low > 0 < b and estimate < low + 1:
            break
        guess = int(max(min(estimate, high - 1, 8 * low + 8), low + 1))
    return low


def _recommended(plain: Fit, checkpointed: Fit, tokens: int, train: TrainConfig) -> tuple[str, ...]:
    enough = plain.micro_batch * tokens >= ROWS or plain.micro_batch >= checkpointed.micro_batch
    chosen = plain if enough else checkpointed
    if not chosen.micro_batch:
        return ()
    notes = train.notes_per_step
    settings = [f"train.batch_size={chosen.micro_batch}", f"train.accumulate={notes // chosen.micro_batch}"]
    if chosen.checkpointing != train.checkpointing:
        settings.append(f"train.checkpointing={str(chosen.checkpointing).lower()}")
    return tuple(settings)


def report(plan: Plan, before: str = "") -> str:
    """Describe the plan as text; `before` precedes each recommended setting."""
    place = "a CUDA GPU" if plan.device == "cuda" else "a CPU"
    fixed = (("weights", plan.weights), ("gradients", plan.gradients), ("optimizer", plan.optimizer))
    lines = [
        f"{plan.stage}, preset {plan.preset}: {plan.parameters / 1e6:.1f} M parameters, "
        f"{plan.accumulate} x {plan.batch_size} = {plan.notes} notes a step",
        plan.grid,
        f"estimated on fake tensors for {place}, {plan.precision}; nothing was run or measured",
        "",
        *(f"{name:<18}{_gb(size)}" for name, size in (*fixed, ("EMA weights", plan.averaged))),
        "",
        f"{'checkpointing':<18}{'false':>12}{'true':>12}",
    ]
    rows: list[tuple[str, Callable[[Fit], str]]] = [
        ("peak memory", lambda fit: _gb(fit.peak)),
        ("TFLOP a step", lambda fit: f"{fit.flops / 1e12:.4g}"),
        ("TFLOP a note", lambda fit: f"{fit.flops / plan.notes / 1e12:.4g}"),
        ("largest batch_size", lambda fit: f"{fit.largest}"),
    ]
    lines += [f"{name:<18}" + "".join(f"{show(fit):>12}" for fit in plan.fits) for name, show in rows]
    lines += [
        "",
        f"The largest is for {_gb(plan.memory).strip()}, of which {_gb(plan.memory - plan.usable).strip()} are left to "
        "the CUDA context, libraries and fragmentation.",
    ]
    if plan.planned.peak <= plan.usable:
        lines.append("The settings fit as they are.")
    else:
        lines.append(f"The settings do not fit: they need {_gb(plan.planned.peak - plan.usable).strip()} more.")
    if plan.recommended:
        lines.append("recommended: " + " ".join(f"{before}{setting}" for setting in plan.recommended))
    else:
        lines.append("Not even one note fits: choose a smaller model.")
    return "\n".join(lines)


def _grid(config: Config) -> str:
    """ "44,100 Hz, 4 s: window 2,048, hop 512, 384 frames, CMX 16 x 6; scales 1x1 2x2, 155 tokens"."""
    a, t = config.audio, config.tokenizer
    scales = " ".join(f"{h}x{w}" for h, w in t.scales)
    return (
        f"{a.sample_rate:,} Hz, {a.samples / a.sample_rate:.3g} s: window {a.n_fft:,}, hop {a.hop}, {a.frames} frames, "
        f"CMX {a.cmx[0]} x {a.cmx[1]}; scales {scales}, {t.tokens:,} tokens a note"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
