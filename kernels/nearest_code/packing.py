"""This module packs a codebook for the Triton kernels: sorted, centred, rounded, with what that can be wrong by.

The codes of a group have errors of one size, as they are sorted by length; a common offset costs no precision, as they
are centred where that keeps the order of the scores. The kernels of `triton` say how the bounds are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_columns

GROUP = 32  # codes
TILE = 128  # codes: of the four threads that share a row of the tensor cores' results, each holds a group
NONE = 2**31 - 1  # no code
LARGE = 1e18  # lengths from here on are left to the exact kernel, as products could overflow
RATIO = 0.0018  # |x - bfloat16(x)| to |x|, typically; any value is correct


@dataclass(frozen=True)
class Packed:
    """This is a codebook as `pack` prepares it, with V and D padded where it says so."""

    size: int  # V
    codes: Tensor  # float32 (groups, D, 32), sorted; 0 where not finite
    bias: Tensor  # float32 (groups * 32,); -inf: never chosen
    order: Tensor  # int32 (groups * 32,): the index in the codebook
    rounded: Tensor  # bfloat16 (groups * 32, padded D): centred, in the order of the tensor cores' columns
    rounded_bias: Tensor  # float32 (groups * 32,): of the centred codes, in that order
    bounds: Tensor  # float32 (tiles, 2, 4): a score of the filter errs by at most bounds[:, 0] |x| + bounds[:, 1]
    shift: Tensor  # float32 (padded D,): what the filter takes from x


@torch.no_grad()
def pack(codebook: Tensor, biased: bool) -> Packed:
    """Prepare a codebook for the kernels.

    Args:
        codebook: float32 (V, D), contiguous, 1 <= V < 2**31, 1 <= D <= 256; for cosine, rows of length 1.
        biased: whether the scores start at -|c|^2 / 2, which gives the smallest distance, or at 0, for cosine.
    """
    size, d = codebook.shape
    depth = max(16, 1 << (d - 1).bit_length())
    padded = -(-size // TILE) * TILE
    valid = codebook.isfinite().all(1)
    codes = torch.where(valid[:, None], codebook, 0.0).double()
    bias = -0.5 * codes.square().sum(1) if biased else torch.zeros_like(codes[:, 0])
    valid &= bias.float().isfinite()
    codes = torch.where(valid[:, None], codes, 0.0)

    mean = (codes.sum(0) / valid.sum().clamp_min(1)).float()
    shift = mean if biased else torch.zeros_like(mean)
    centred = torch.where(valid[:, None], codes - mean, 0.0)
    order = torch.where(valid, centred.square().sum(1), torch.inf).argsort(stable=True)

    def pad(values: Tensor, value: float) -> Tensor:
        """Sort the values, and add rows up to a whole number of tiles."""
        out = values.new_full((padded, *values.shape[1:]), value)
        out[:size] = values[order]
        return out

    codes, centred = pad(codes, 0.0), pad(centred, 0.0)
    bias = pad(torch.where(valid, bias, -torch.inf), -torch.inf)
    rounded = centred.float().bfloat16()
    known = bias > -torch.inf
    centred_bias = torch.where(known, -0.5 * centred.square().sum(1), 0.0) if biased else torch.zeros_like(bias)

    # What the sums lose, relative to |x| |c| + |b|: `chain` in the stated order, `sums` on the tensor cores, twice what
    # they lose where they add 16 products at a time, cut off at 24 bits.
    chain, sums = (d + 4) * 2.0**-24, (depth + 16) * 2.0**-22
    length, kept = codes.norm(dim=1), rounded.double().norm(dim=1)
    scale = (RATIO + sums) * kept + (centred - rounded.double()).norm(dim=1) + chain * length
    offset = chain * (torch.where(known, -bias, 0.0) + shift.double().norm() * length) - sums * centred_bias
    offset += 2.0**-100  # what underflows
    offset.masked_fill_((length > LARGE) | (centred_bias < -1e38), torch.inf)
    bounds = torch.stack((scale, offset)).view(2, -1, 4, GROUP).amax(3).transpose(0, 1) * (1 + 2.0**-8)

    rounded_bias = torch.where(known, centred_bias.clamp_min(-1e38), -torch.inf)
    index = torch.arange(size, dtype=torch.int32, device=codebook.device)
    return Packed(
        size=size,
        codes=codes.float().view(-1, GROUP, d).transpose(1, 2).contiguous(),
        bias=bias.float(),
        order=pad(index, NONE),
        rounded=_columns(pad_columns(rounded, (0, depth - d))),
        rounded_bias=_columns(rounded_bias.float()),
        bounds=bounds.float().contiguous(),
        shift=pad_columns(shift, (0, depth - d)),
    )


def _columns(values: Tensor) -> Tensor:
    """Order each tile's codes as the tensor cores' columns: 8 j + 2 q + b holds code 2 j + b of group q."""
    tiles = values.view(-1, 4, GROUP // 2, 2, *values.shape[1:])
    return tiles.transpose(1, 2).reshape(values.shape)
