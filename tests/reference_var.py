"""A second, slow opinion: the published VAR quantiser and transformer, written from their description alone.

Nothing of mars is imported. Everything runs in the dtype of its arguments, which the tests make float64: loops over
scales, samples and heads, resizing by explicit matrices, one dense mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def area_matrix(size: int, out: int) -> Tensor:
    """(out, size): row i averages the cells that the interval [i, i + 1) size / out touches."""
    matrix = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        first, last = (i * size) // out, -((-(i + 1) * size) // out)
        matrix[i, first:last] = 1 / (last - first)
    return matrix


def bicubic_matrix(size: int, out: int) -> Tensor:
    """(out, size): Keys' kernel with a = -0.75 at half-pixel centres, the border cell repeated."""

    def kernel(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    matrix = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        centre = (i + 0.5) * size / out - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), size - 1)] += kernel(centre - j)
    return matrix


def resize(x: Tensor, grid: tuple[int, int], matrix) -> Tensor:
    """x (B, D, h, w) -> (B, D, *grid), separable."""
    rows, columns = matrix(x.shape[2], grid[0]).to(x), matrix(x.shape[3], grid[1]).to(x)
    return torch.einsum("ih,bdhw,jw->bdij", rows, x, columns)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Zero-padded convolution as nine shifted matrix products."""
    height, width = x.shape[2:]
    padded = torch.zeros(*x.shape[:2], height + 2, width + 2, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    y = bias.view(1, -1, 1, 1).expand(len(x), -1, height, width)
    for i in range(3):
        for j in range(3):
            part = padded[:, :, i : i + height, j : j + width]
            y = y + torch.einsum("oc,bchw->bohw", weight[:, :, i, j], part)
    return y


def nearest(z: Tensor, codebook: Tensor, metric: str) -> int:
    """Index of the row nearest to the vector z; the first of equals."""
    if metric == "cosine":
        return int((codebook @ z / (codebook.norm(dim=1) * z.norm())).argmax())
    return int(((codebook - z) ** 2).sum(1).argmin())


def contribution(ids: Tensor, codebook, phi, scale, grid, ratio: float) -> Tensor:
    """What a scale's tokens (B, n) add to the map."""
    h = torch.stack([torch.stack([codebook[i] for i in sample], dim=1) for sample in ids])
    h = h.reshape(len(ids), -1, *scale)
    if scale != grid:
        h = resize(h, grid, bicubic_matrix)
    return (1 - ratio) * h + ratio * conv3x3(h, *phi)


def quantize(
    f: Tensor,
    codebook: Tensor,
    phis: list[tuple[Tensor, Tensor]],
    which: list[int],
    scales: list[tuple[int, int]],
    *,
    metric: str,
    ratio: float,
    beta: float,
    keep: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Tokens (B, L), straight-through map, loss, and the running sums f-hat_1..N."""
    batch, grid, n = len(f), tuple(f.shape[2:]), len(scales)
    keep = keep or [n] * batch
    residual = f.detach().clone()
    sums = [torch.zeros_like(residual[b]) for b in range(batch)]
    tokens, running, loss = [], [], 0
    for k, scale in enumerate(scales):
        z = residual if scale == grid else resize(residual, scale, area_matrix)
        cells = [(i, j) for i in range(scale[0]) for j in range(scale[1])]
        ids = torch.tensor([[nearest(z[b, :, i, j], codebook, metric) for i, j in cells] for b in range(batch)])
        h = contribution(ids, codebook, phis[which[k]], scale, grid, ratio)
        residual = residual - h.detach()
        active = [b for b in range(batch) if k < keep[b]]
        terms = []
        for b in active:
            sums[b] = sums[b] + h[b]
            terms.append(((sums[b] - f[b].detach()) ** 2).mean() + beta * ((sums[b].detach() - f[b]) ** 2).mean())
        loss = loss + (sum(terms) / len(terms) if terms else 0)
        tokens.append(ids)
        running.append(torch.stack(sums))
    return torch.cat(tokens, 1), f + (running[-1] - f).detach(), loss / n, running


def teacher_inputs(ids: Tensor, codebook, phis, which, scales, ratio: float) -> Tensor:
    """(B, L - n_1, D): the running sum after scale k at the grid of scale k + 1."""
    start, total, inputs = 0, 0, []
    for k, scale in enumerate(scales[:-1]):
        n = scale[0] * scale[1]
        part = ids[:, start : start + n]
        total = total + contribution(part, codebook, phis[which[k]], scale, scales[-1], ratio)
        inputs.append(resize(total, scales[k + 1], area_matrix).flatten(2).transpose(1, 2))
        start += n
    return torch.cat(inputs, dim=1)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=torch.float64))


class Layer(nn.Module):
    """One AdaLN block with the published order of modulations: gain 1, gain 2, scale 1, scale 2, shift 1, shift 2."""

    def __init__(self, width: int, heads: int, shared: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = parameter(3 * width, width)
        self.q_bias, self.v_bias = parameter(width), parameter(width)
        self.log_scale = parameter(heads)
        self.proj_w, self.proj_b = parameter(width, width), parameter(width)
        self.fc1_w, self.fc1_b = parameter(4 * width, width), parameter(4 * width)
        self.fc2_w, self.fc2_b = parameter(width, 4 * width), parameter(width)
        self.ada_w, self.ada_b = (None, None) if shared else (parameter(6 * width, width), parameter(6 * width))
        self.ada_offset = parameter(6, width) if shared else None


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-6)


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).sum(-1, keepdim=True))


class ReferenceVAR(nn.Module):
    """The class-conditional transformer; row `classes` of the label table is the unconditional one."""

    def __init__(
        self, *, classes: int, width: int, heads: int, depth: int, scales, dim: int, vocabulary: int, shared: bool
    ) -> None:
        super().__init__()
        self.width, self.shared = width, shared
        self.lengths = [h * w for h, w in scales]
        self.labels = parameter(classes + 1, width)
        self.start_pos = parameter(self.lengths[0], width)
        self.pos = parameter(sum(self.lengths), width)
        self.level = parameter(len(scales), width)
        self.word_w, self.word_b = parameter(width, dim), parameter(width)
        self.layers = nn.ModuleList(Layer(width, heads, shared) for _ in range(depth))
        self.shared_w, self.shared_b = (parameter(6 * width, width), parameter(6 * width)) if shared else (None, None)
        self.head_ada_w, self.head_ada_b = parameter(2 * width, width), parameter(2 * width)
        self.head_w, self.head_b = parameter(vocabulary, width), parameter(vocabulary)

    def forward(self, inputs: Tensor, label: Tensor) -> Tensor:
        """Logits (B, L, V) of inputs (B, L - n_1, D) and labels (B,)."""
        return torch.stack([self.one(x, self.labels[c]) for x, c in zip(inputs, label.tolist(), strict=True)])

    def one(self, inputs: Tensor, cond: Tensor) -> Tensor:
        scale_of = [k for k, n in enumerate(self.lengths) for _ in range(n)]
        tokens = [cond + p for p in self.start_pos] + [self.word_w @ t + self.word_b for t in inputs]
        x = torch.stack([t + self.pos[i] + self.level[scale_of[i]] for i, t in enumerate(tokens)])
        visible = torch.tensor([[a >= b for b in scale_of] for a in scale_of])
        bias = torch.zeros(visible.shape, dtype=x.dtype).masked_fill(~visible, -math.inf)
        for layer in self.layers:
            if self.shared:
                six = layer.ada_offset + (self.shared_w @ silu(cond) + self.shared_b).view(6, -1)
            else:
                six = (layer.ada_w @ silu(cond) + layer.ada_b).view(6, -1)
            gain1, gain2, scale1, scale2, shift1, shift2 = six
            x = x + gain1 * self.attend(layer, norm(x) * (1 + scale1) + shift1, bias)
            y = norm(x) * (1 + scale2) + shift2
            x = x + gain2 * (gelu_tanh(y @ layer.fc1_w.T + layer.fc1_b) @ layer.fc2_w.T + layer.fc2_b)
        scale, shift = (self.head_ada_w @ silu(cond) + self.head_ada_b).view(2, -1)
        return (norm(x) * (1 + scale) + shift) @ self.head_w.T + self.head_b

    def attend(self, layer: Layer, x: Tensor, bias: Tensor) -> Tensor:
        w = self.width
        q = x @ layer.qkv[:w].T + layer.q_bias
        k = x @ layer.qkv[w : 2 * w].T
        v = x @ layer.qkv[2 * w :].T + layer.v_bias
        heads, d = [], w // layer.heads
        for h in range(layer.heads):
            part = slice(h * d, (h + 1) * d)
            sharpness = torch.exp(layer.log_scale[h].clamp(max=math.log(100)))
            scores = sharpness * unit(q[:, part]) @ unit(k[:, part]).T + bias
            heads.append(torch.softmax(scores, -1) @ v[:, part])
        return torch.cat(heads, dim=1) @ layer.proj_w.T + layer.proj_b
