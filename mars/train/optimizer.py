"""The learning-rate schedules, and the optimiser with gradient clipping and the EMA of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mars.config import TrainConfig
from mars.errors import CheckpointError
from mars.runs.distributed import World
from mars.runtime import native_bfloat16
from mars.train.spans import span


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of `step`: linear warm-up, then a cosine or VAR's "lin0" (flat for 5 %, then linear)."""
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.peak_lr * (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(config.steps - warmup, 1), 1.0)
    fall = max(progress - 0.05, 0) / 0.95 if config.schedule == "lin0" else 0.5 - 0.5 * math.cos(math.pi * progress)
    return config.peak_lr * (1 - (1 - config.final_lr) * fall)


def not_finite(value: Tensor) -> Tensor:
    """Return float32 (): 1 if `value` () is infinite or NaN, else 0; on its device, so that the host need not wait."""
    return value.isfinite().logical_not().float()


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` with the rounds of Newton and Schulz in float32, not bfloat16, and "match_rms_adamw" alone.

    For devices that have no bfloat16 in hardware: an AVX2 core emulates its products 35 times as slowly.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move each matrix along its orthogonalised momentum (Nesterov's), scaled as AdamW's steps are."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonalised(
                    p.grad.lerp(mean, momentum), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(update, alpha=-0.2 * rate * math.sqrt(max(p.shape)))


def orthogonalised(x: Tensor, coefficients: tuple[float, float, float], rounds: int, eps: float) -> Tensor:
    """A matrix (m, n) with its singular values near 1: rounds of a X + b (X X^T) X + c (X X^T)^2 X, from X / |X|."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizer:
    """AdamW with the schedule, gradient clipping and an EMA (exponential moving average) of the weights.

    With "muon" the matrices of the transformer blocks are updated by orthogonalised momentum instead (Jordan et al.
    2024), scaled so that the same learning rate serves both.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, ema: nn.Module | None = None) -> None:
        self.config = config
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        # As published: only weights of layers decay, not positions, levels, tokens, the codebook or attention scales.
        decay: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, p in zip(self.names, self.parameters, strict=True):
            matrix = p.ndim > 1 and name.endswith("weight") and name != "level.weight"
            (decay if matrix else plain).append(p)
        groups: list[dict[str, Any]] = [
            {"params": decay, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        matrices: list[nn.Parameter] = []
        if config.optimizer == "muon":
            matrices = [p for name, p in module.named_parameters() if p.ndim == 2 and "blocks." in name]
            inside = {id(p) for p in matrices}
            for group in groups:
                group["params"] = [p for p in group["params"] if id(p) not in inside]
        adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            kind = torch.optim.Muon if native_bfloat16(matrices[0].device) else Float32Muon
            self.optimizers.append(
                kind(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        self.ema = [World.local(p) for p in ema.parameters()] if ema is not None else None
        self.current = [World.local(p) for p in module.parameters()]  # what the EMA follows: a frozen codebook, too
        self.waits = bool(matrices) or any(World.local(p) is not p for p in self.parameters)

    def clip(self) -> Tensor:
        """Clip the gradients, and return their global norm before that; the host does not wait for it."""
        limit = self.config.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients

    def update(self, step: int, bad: Tensor | None = None) -> float:
        """Apply the gradients with the scheduled learning rate, which is returned; then drop them.

        bad: float32 (); if it is 1, nothing changes but that the gradients are dropped. It stays on its device:
            AdamW and the EMA read it in their kernels. Muon and sharded weights cannot, so there the host waits.
        """
        rate = learning_rate(self.config, step)
        if self.waits and bad is not None:
            if bad:
                self.forget()
                return rate
            bad = None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            if isinstance(optimizer, torch.optim.AdamW):
                optimizer.found_inf = bad  # type: ignore[attr-defined]  # as torch.amp.GradScaler hands it over
            with span("optimizer"):
                optimizer.step()
        if self.ema is not None:
            with span("average"):
                self._update_ema(self.ema, min(self.config.ema, (1 + step) / (10 + step)), bad)  # quick at first
        self.forget()
        return rate

    @torch.no_grad()
    def _update_ema(self, ema: list[Tensor], decay: float, bad: Tensor | None) -> None:
        """Update ema += (1 - decay) (weight - ema), as a step of SGD, whose fused kernel reads `bad`.

        With the weight as the gradient to ascend and a weight decay of 1: ema - rate (ema - weight).
        """
        torch._fused_sgd_(
            ema,
            self.current,
            [],
            weight_decay=1.0,
            momentum=0.0,
            lr=1 - decay,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
            found_inf=bad,
        )

    def forget(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def restart(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Forget the gradient and the moments of the `rows` (a mask) of a parameter that is updated by AdamW."""
        for value in (parameter.grad, *self.optimizers[0].state.get(parameter, {}).values()):
            if value is not None and value.shape == parameter.shape:
                value.masked_fill_(rows[:, None], 0)

    def state(self) -> dict[str, Tensor]:
        """Return the moments and step counts by parameter name; empty before the first update."""
        names = {id(p): name for name, p in zip(self.names, self.parameters, strict=True)}
        return {
            f"{names[id(p)]}/{key}": value
            for optimizer in self.optimizers
            for p, moments in optimizer.state.items()
            for key, value in moments.items()
        }

    def load_state(self, state: Mapping[str, Tensor], source: Path) -> None:
        """Restore `state()`.

        Raises:
            CheckpointError: a moment is missing, unknown or has another shape.
        """
        if not state:  # saved before the first update
            return
        names = {id(p): name for name, p in zip(self.names, self.parameters, strict=True)}
        unknown = set(state)
        for optimizer in self.optimizers:
            keys = (
                ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("step", "exp_avg", "exp_avg_sq")
            )
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                name, moments = names[id(p)], {}
                for key in keys:
                    value = state.get(f"{name}/{key}")
                    if value is None or value.shape != (() if key == "step" else p.shape):
                        raise CheckpointError(f"{source}: optimiser state of {name} is missing or has another shape")
                    unknown.discard(f"{name}/{key}")
                    if key == "step":  # the fused kernel wants it on the device too
                        moments[key] = value.clone().to(p.device)
                    else:  # and the moments laid out as the weight is
                        moments[key] = torch.empty_like(p).copy_(World.part(value, p))
                optimizer.state[p] = moments
        if unknown:
            raise CheckpointError(f"{source} has an unknown optimiser state {min(unknown)}; it is of another run")
