"""Measures the operations, the plan, both training stages and generation on a device; see scripts/gpu_check.sh.

    python -m scripts.gpu_measure --out build/gpu               # on CUDA, the published model
    python -m scripts.gpu_measure --out build/gpu --device cpu  # a rehearsal, on small sizes

Each figure is in OUT/gpu.json as soon as it is there, and OUT/gpu.md holds them as tables. "host" is what the Python
side takes to launch a call, "device" what the kernels take with the launches done ahead; on a CPU there is one figure.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from mars import kernels
from mars.config import Config, preset
from mars.model import Timing, load
from mars.models.quantizer import Quantizer
from mars.models.tokenizer import Tokenizer
from mars.runtime import stream
from mars.train.compiling import compile_blocks
from mars.train.plan import DryRun, Notes
from mars.train.tokenizer import TokenizerStage
from mars.train.var import VARStage

ROUNDS, CALLS, STEPS = 15, 10, 20
SLEEP = 20_000_000  # cycles that the device waits while the host launches ahead of it


class Record:
    """The figures so far, in the file from the moment they are known."""

    def __init__(self, out: Path, device: str) -> None:
        """Begin the record with what it was measured on."""
        self.out, self.rows = out, dict[str, list[dict[str, Any]]]()
        out.mkdir(parents=True, exist_ok=True)
        card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
        revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607
        self.machine = {
            "card": card, "date": date.today().isoformat(), "revision": revision.stdout.strip() or "unknown",
            "torch": torch.__version__, "python": platform.python_version(),
        }  # fmt: skip

    def add(self, table: str, **row: Any) -> None:
        """Add a row to a table, and write the files anew."""
        self.rows.setdefault(table, []).append(row)
        print(table, row, flush=True)
        (self.out / "gpu.json").write_text(json.dumps({**self.machine, **self.rows}, indent=1) + "\n")
        (self.out / "gpu.md").write_text(self.markdown())

    def markdown(self) -> str:
        """Return the tables, with card, date and revision above them."""
        m = self.machine
        lines = [f"## {m['card']}, {m['date']}", "", f"Revision {m['revision']}, PyTorch {m['torch']}."]
        for table, rows in self.rows.items():
            columns = list(rows[0])
            lines += ["", f"### {table}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(_cell(row.get(c)) for c in columns)} |" for row in rows]
        return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def timed(call: Callable[[], object], device: str) -> tuple[float, float | None]:
    """Return the microseconds of a call: of the host, and of the device, each the median of the rounds."""
    for _ in range(3):
        call()
    host, kernels_ = [], []
    for _ in range(ROUNDS):
        if device == "cpu":
            began = time.perf_counter()
            call()
            host.append((time.perf_counter() - began) * 1e6)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP)  # type: ignore[no-untyped-call]
        start.record()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        host.append((time.perf_counter() - began) * 1e6 / CALLS)
        end.record()
        torch.cuda.synchronize()
        kernels_.append(start.elapsed_time(end) * 1e3 / CALLS)
    return median(host), median(kernels_) if kernels_ else None


def operations(record: Record, device: str) -> None:
    """Time every operation at the published model's sizes, on a CPU at small ones, and the card's ceilings."""
    large = device == "cuda"

    def row(name: str, call: Callable[[], object]) -> None:
        host, on_device = timed(call, device)
        record.add("operations, microseconds", operation=name, host=host, device=on_device)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    source = randn(1 << (28 if large else 16))
    row("copy of 1 GiB" if large else "copy", source.clone)
    square = randn(*[8192 if large else 64] * 2, dtype=torch.bfloat16 if large else torch.float32)
    row("product of 8192 x 8192, bfloat16" if large else "product", lambda: square @ square)
    n, bins, frames = (64, 512, 256) if large else (2, 16, 16)
    x, z = randn(n, bins, frames), torch.complex(randn(n, frames, bins), randn(n, frames, bins)).mT
    for factors in ((2, 1), (8, 4)):
        row(f"cmx {factors}", lambda factors=factors: kernels.cmx(x, factors))
        row(f"spectrogram_cmx {factors}", lambda factors=factors: kernels.spectrogram_cmx(z, factors, 0.0025, 0.17))
    r = x.view(n, bins // 8, 8, frames // 4, 4)
    row("permute and contiguous, as (8, 4)", lambda: r.permute(0, 2, 4, 1, 3).contiguous())
    codes = randn(16384 if large else 256, 32)
    packed = kernels.pack_codebook(codes)
    for rows in (65536, 680) if large else (64,):
        queries = randn(rows, 32)
        row(f"nearest_code, {rows} rows, packed", lambda queries=queries: kernels.nearest_code(queries, packed))
        row(f"nearest_code, {rows} rows", lambda queries=queries: kernels.nearest_code(queries, codes))
    config = preset("paper" if large else "smoke").tokenizer
    quantizer = Quantizer(config).to(device)
    f = randn(32 if large else 2, config.code_dim, *config.scales[-1])
    with torch.no_grad():
        row(f"multiscale_quantize, {len(f)} maps", lambda: quantizer.search(f))

    def learned() -> None:
        torch.autograd.grad(quantizer.search(f)[1].sum(), [quantizer.phi_weight])

    row(f"multiscale_quantize, {len(f)} maps, and gradients", learned)
    lengths = [h * w for h, w in config.scales]
    heads, values = (16, 64) if large else (2, 16)
    for batch, dtype in (
        ((8, torch.bfloat16), (32, torch.bfloat16), (8, torch.float32)) if large else ((1, torch.float32),)
    ):
        for gain in (None, torch.full((heads,), 4.0, device=device, requires_grad=True)):
            qkv = randn(batch, sum(lengths), 3, heads, values, dtype=dtype).requires_grad_()
            do = randn(batch, sum(lengths), heads, values, dtype=dtype).transpose(1, 2)

            def attend(qkv: Any = qkv, do: Any = do, gain: Any = gain) -> None:
                q, k, v = qkv.permute(2, 0, 3, 1, 4)
                out = kernels.scale_causal_attention(q, k, v, lengths, values**-0.5, head_scale=gain)
                torch.autograd.grad(out, [qkv] if gain is None else [qkv, gain], do)

            what = f"attention and gradients, {batch} samples, {str(dtype)[6:]}"
            row(what + (", head_scale" if gain is not None else ""), attend)


def training(record: Record, device: str) -> None:
    """Take compiled steps of both stages, on silent notes, beside the plan."""
    name = "paper" if device == "cuda" else "smoke"
    steps = STEPS if device == "cuda" else 2
    for stage in ("tokenizer", "var"):
        config: Config = preset(name, ("train.accumulate=1",), stage)
        batch = getattr(config.train, stage).batch_size
        where, notes = torch.device(device), Notes(config.audio.samples)
        planned = DryRun(config, stage, device).step(batch, 1)  # type: ignore[arg-type]
        made: Any
        if stage == "tokenizer":
            made = TokenizerStage(config, notes, where, 0)  # type: ignore[arg-type]
        else:
            tokens = torch.zeros(1024, config.tokenizer.tokens, dtype=torch.int32)
            made = VARStage(config, notes, Tokenizer(config).to(where), tokens, where, 0)  # type: ignore[arg-type]
        compiled = compile_blocks(made, print)
        data = made.batch(np.zeros(batch, np.int64))
        last = made.train.steps - 1
        for i in range(2):
            made.step(last, [data], [stream(0, i)])
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for i in range(steps):
            loss = made.step(last, [data], [stream(0, i)])["loss"]
        finite = bool(torch.isfinite(torch.as_tensor(loss)))  # which waits for the device
        seconds = (time.perf_counter() - began) / steps
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        record.add(
            "training", stage=stage, preset=name, notes=batch, compiled=compiled, notes_per_second=batch / seconds,
            TFLOPs=planned.flops / seconds / 1e12, peak_GB=peak and peak / 1e9, planned_GB=planned.peak / 1e9,
            finite=finite,
        )  # fmt: skip
        del made


def generation(record: Record, device: str) -> None:
    """Generate notes of the packaged model, the first time and warm."""
    model = load(device=device)
    for what, n in (("first", 4), ("warm", 4), ("warm", 64)) if device == "cuda" else (("first", 1),):
        timing, began = Timing(), time.perf_counter()
        model.generate(n, timing=timing)
        record.add(
            "generation", what=what, notes=n, seconds=time.perf_counter() - began, compiling=timing.compiling,
            transformer=timing.transformer, decoding=timing.decoding, griffin_lim=timing.griffin_lim,
        )  # fmt: skip


def main() -> None:
    """Measure everything; a part that fails is said, and ends the command with 1 after the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_measure: PyTorch finds no CUDA device here; --device cpu rehearses")
    record, failed = Record(options.out, options.device), []
    for part in (operations, generation, training):
        try:
            part(record, options.device)
        except Exception as error:
            failed.append(f"{part.__name__}: {type(error).__name__}: {error}")
    raise SystemExit("\n".join(failed) or 0)


if __name__ == "__main__":
    main()
