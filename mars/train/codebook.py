"""The codebook in training: how much of it is used, and three optional ways to keep it in use.

k-means initialisation, codes that follow the mean of what chooses them (van den Oord et al. 2017, arXiv:1711.00937,
appendix A.1) and the restart of dead codes (Dhariwal et al. 2020, arXiv:2005.00341, §3), with the constants of EnCodec
(Défossez et al. 2022, arXiv:2210.13438). A code here stands for residuals of every scale, so all of them are rules on
the residuals of all tokens, each token counting once.

Letters: B batch, L tokens over all scales, N scales, D code dimension, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mars.errors import CheckpointError
from mars.models.quantizer import Quantized, Quantizer
from mars.runs.distributed import ALONE, World
from mars.runtime import stream, to_device
from mars.train.optimizer import Optimizer

EPSILON = 1e-5  # Laplace smoothing of the counts
KMEANS_ROUNDS = 10
ENOUGH = 64  # tokens of a scale below which its use says nothing


@dataclass(slots=True)
class Statistics:
    """Sums over tokens: over micro-batches as they are added, then over processes."""

    scale: Tensor  # int64 (L,), of each token
    counts: Tensor  # int64 (N, V), how often each scale chose each code
    sums: Tensor | None  # (V, D), what chose it
    candidates: Tensor | None  # (V, D), what may take its place

    def reduce(self, world: World) -> None:
        """Add up the sums of all processes."""
        for tensor in (self.counts, self.sums, self.candidates):
            if tensor is not None:
                world.all_reduce(tensor)

    @torch.no_grad()
    def add(
        self,
        ids: Tensor,
        residuals: Tensor | None,
        keep_mask: Tensor | None,
        generator: torch.Generator,
        part: tuple[int, int],
    ) -> None:
        """Add the tokens of a micro-batch.

        ids: (B, L); residuals: (B, L, D), not needed for counts alone; keep_mask: bool (B, N), the scales that count.
        generator: draws the candidates. part: (i, n), micro-batch i of the n of this step over all processes; it draws
        for every n-th code, so that the sum holds one for each.
        """
        size = self.counts.shape[1]
        counted = torch.ones_like(ids) if keep_mask is None else keep_mask[:, self.scale].to(ids.dtype)
        self.counts.view(-1).scatter_add_(0, (ids + self.scale * size).flatten(), counted.flatten())
        if residuals is None:
            return
        rows = residuals.flatten(0, 1)
        if self.sums is not None:
            self.sums.index_add_(0, ids.flatten(), rows * counted.flatten()[:, None])
        if self.candidates is not None:
            i, n = part
            slots = torch.arange(i, size, n)
            chosen = torch.randperm(len(rows), generator=generator)[torch.arange(len(slots)) % len(rows)]
            self.candidates[to_device(slots, rows.device)] = rows[to_device(chosen, rows.device)]


class CodebookTraining:
    """Measures the use of a quantiser's codebook and, if its settings say so, updates it once per step."""

    def __init__(
        self,
        quantizer: Quantizer,
        ema: Quantizer,
        optimizer: Optimizer,
        tokens_per_step: int,
        world: World = ALONE,
    ) -> None:
        c, codes = quantizer.config, quantizer.codebook
        self.quantizer, self.ema, self.optimizer, self.world = quantizer, ema, optimizer, world
        self.means, self.restarts = c.ema_codebook, c.restart_dead_codes > 0
        size = len(codes)
        starts = quantizer.starts
        lengths = torch.tensor(starts).diff()
        scale = torch.arange(len(lengths)).repeat_interleave(lengths, output_size=starts[-1])
        self.scale = scale.to(codes.device)
        self.counts = torch.zeros(len(lengths), size, dtype=torch.int64, device=codes.device)  # since the last report
        self.peak = torch.zeros(len(lengths), dtype=torch.float64)  # largest share of usable codes in a report so far
        # As though every code had been chosen equally often: a new one has time until it counts as dead.
        self.size = torch.full((size,), tokens_per_step / size, device=codes.device)
        self.total = codes.detach() * self.size[:, None]
        self.alarmed: set[int] = set()
        self.gathered = self._statistics(self.means, self.restarts)

    def _statistics(self, means: bool, restarts: bool) -> Statistics:
        codes, counts = self.quantizer.codebook.detach(), torch.zeros_like(self.counts)
        sums, candidates = (torch.zeros_like(codes) if enabled else None for enabled in (means, restarts))
        return Statistics(self.scale, counts, sums, candidates)

    def gather(self, quantized: Quantized, generator: torch.Generator, part: tuple[int, int]) -> None:
        """Add a micro-batch to the statistics of the step; see `Statistics.add`."""
        self.gathered.add(quantized.ids, quantized.residuals, quantized.keep_mask, generator, part)

    @torch.no_grad()
    def start(self, latents: Mapping[int, Tensor], parts: int, seed: int) -> None:
        """Initialise the codebook by k-means on the residuals of these latent maps (B, D, H, W).

        The residual of a latent at the finer scales depends on the codes of the coarser ones, so every round runs the
        quantiser itself, and codes that nothing chose are drawn anew from its residuals.

        latents: this process's share of the `parts` maps, by their number.
        """
        q = self.quantizer
        for round_ in range(KMEANS_ROUNDS + 1):
            statistics = self._statistics(means=True, restarts=True)
            for i, f in latents.items():
                ids, totals = q.search(f)
                residuals = q.residuals(f, totals if round_ else torch.zeros_like(totals))
                statistics.add(ids, residuals, None, stream(seed, 3, round_, i), (i, parts))
            statistics.reduce(self.world)
            assert statistics.sums is not None
            assert statistics.candidates is not None
            chosen = statistics.counts.sum(0)[:, None]
            means = statistics.sums / chosen.clamp_min(1)
            # The first round draws the seeds, from the latents at the grids of all scales.
            q.codebook.copy_(means.where((chosen > 0) & (round_ > 0), statistics.candidates))
        self.ema.codebook.copy_(q.codebook)
        self.total = q.codebook * self.size[:, None]

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Apply the statistics of a step, after its backward pass, unless its loss or gradient was not `finite`."""
        statistics, self.gathered = self.gathered, self._statistics(self.means, self.restarts)
        statistics.reduce(self.world)
        self.counts += statistics.counts * finite
        if not (self.means or self.restarts):
            return
        c, codes = self.quantizer.config, self.quantizer.codebook
        size = self.size.lerp(statistics.counts.sum(0).to(self.size.dtype), 1 - c.codebook_decay)
        new, total = codes.detach(), self.total
        if statistics.sums is not None:
            total = total.lerp(statistics.sums, 1 - c.codebook_decay)
            mass = size.sum()
            new = total / ((size + EPSILON) * (mass / (mass + len(size) * EPSILON)))[:, None]
        if statistics.candidates is not None:
            mean = size.mean()
            dead = (size < c.restart_dead_codes * mean) & finite
            new = statistics.candidates.where(dead[:, None], new)
            total = (statistics.candidates * mean).where(dead[:, None], total)
            size = mean.where(dead, size)
            self.ema.codebook.copy_(new.where(dead[:, None], self.ema.codebook))
            self.optimizer.restart(codes, dead)
        codes.copy_(new.where(finite, codes))
        self.size, self.total = size.where(finite, self.size), total.where(finite, self.total)

    def report(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Use of the codebook per scale since the last report, and the scales that have collapsed.

        A scale can use as many codes as there are or as it had tokens, whichever is less. It counts as collapsed if, of
        64 tokens or more, the perplexity is below 2, or if the share of those codes that it used is below a tenth of
        the largest so far. Each scale is warned of once until it recovers.
        """
        counts, self.counts = self.counts.cpu(), torch.zeros_like(self.counts)
        used, perplexity = usage(counts)
        seen = counts.sum(1)
        share = torch.tensor(used, dtype=torch.float64) / seen.clamp(1, counts.shape[1])
        collapsed = [
            k
            for k, p in enumerate(perplexity)
            if seen[k] >= ENOUGH and (p < min(2, counts.shape[1] / 2) or share[k] < self.peak[k] / 10)
        ]
        self.peak = self.peak.maximum(share.where(seen >= ENOUGH, 0))
        for k in collapsed:
            if k not in self.alarmed:
                h, w = self.quantizer.scales[k]
                say(
                    f"warning: the {h}x{w} scale has collapsed: {used[k]:,} codes in its last {int(seen[k]):,} tokens, "
                    f"perplexity {perplexity[k]}; docs/training.md says what to do"
                )
        self.alarmed = set(collapsed)
        return {"train_codes_used": used, "train_perplexity": perplexity, "collapsed": collapsed}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that an interrupted run needs to resume."""
        return {
            "counts": self.counts,
            "peak": self.peak,
            **({"size": self.size} if self.means or self.restarts else {}),
            **({"total": self.total} if self.means else {}),
        }

    def load_state(self, state: Mapping[str, Tensor], source: Path) -> None:
        """Restore `state()`.

        Raises:
            CheckpointError: a tensor is missing, unknown or has another shape.
        """
        own = self.state()
        for name in sorted(own.keys() | state.keys()):
            if name not in own or name not in state or own[name].shape != state[name].shape:
                raise CheckpointError(f"{source}: codebook statistic {name} is missing, unknown or has another shape")
            own[name].copy_(state[name])


def usage(counts: Tensor) -> tuple[list[int], list[float]]:
    """Return per scale: how many different codes were chosen, and the perplexity of the choice. counts: (N, V)."""
    counts = counts.double()
    p = counts / counts.sum(1, keepdim=True).clamp_min(1)
    perplexity = (-torch.xlogy(p, p).sum(1)).exp()
    return (counts > 0).sum(1).tolist(), [round(float(x), 1) for x in perplexity]
