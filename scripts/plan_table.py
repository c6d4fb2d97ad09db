"""Print the tables of docs/planning.md: `python -m scripts.plan_table` (minutes, on fake tensors, no GPU)."""

from __future__ import annotations

from mars.config import preset, preset_names
from mars.runs.stage import StageName
from mars.train.plan import DryRun, Planner

STAGES: tuple[StageName, ...] = ("tokenizer", "var")
MEMORIES = (24, 32, 80)  # GB
NOTES = 289_205  # of NSynth's training split
EPOCHS = {"tokenizer": 400, "var": 350}  # the paper's
RATES = (50, 100, 200, 400)  # TFLOP/s


def main() -> None:
    sizes = ", ".join(str(memory) for memory in MEMORIES)
    heads = ("preset", "stage", "parameters, M", "TFLOP a step", "TFLOP a note", "notes a step", "peak, GB")
    head = (*heads, f"largest batch_size in {sizes} GB", "for 32 GB")
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name in preset_names():
        for stage in STAGES:
            planner = Planner(preset(name), stage)
            plans = {memory: planner.plan(memory * 10**9) for memory in MEMORIES}
            plan = plans[32]

            def both(values: list[str]) -> str:
                return f"{values[0]} ({values[1]})"

            cells = (
                name,
                stage,
                f"{plan.parameters / 1e6:.1f}",
                both([f"{fit.flops / 1e12:.3g}" for fit in plan.fits]),
                both([f"{fit.flops / plan.notes / 1e12:.3g}" for fit in plan.fits]),
                f"{plan.accumulate} x {plan.batch_size}",
                both([f"{fit.peak / 1e9:.2f}" for fit in plan.fits]),
                both([", ".join(f"{plans[memory].fits[on].largest:,}" for memory in MEMORIES) for on in (0, 1)]),
                " ".join(f"`{setting.removeprefix('train.')}`" for setting in plan.recommended) or "too large",
            )
            print("| " + " | ".join(cells) + " |")
    print(f"\n| `paper`, {NOTES:,} notes | FLOP | " + " | ".join(f"{rate} TFLOP/s" for rate in RATES) + " |")
    print("|---" * (len(RATES) + 2) + "|")
    whole = {stage: training(stage) for stage in STAGES}
    for stage, flops in (*whole.items(), ("both", sum(whole.values()))):
        label = f"{stage}, {EPOCHS[stage]} epochs" if stage in EPOCHS else stage
        days = (f"{flops / rate / 1e12 / 86400:.1f} days" for rate in RATES)
        print(f"| {label} | {flops:.2e} | " + " | ".join(days) + " |")


def training(stage: StageName) -> float:
    """FLOP of the whole training with the settings of `paper`."""
    config = preset("paper")
    train = getattr(config.train, stage)
    joins = train.adversarial_start if train.adversarial else 1.0
    before, after = (DryRun(config, stage, "cuda", at=at).step(train.batch_size, 1).flops for at in (0, None))
    return (joins * before + (1 - joins) * after) / train.batch_size * NOTES * EPOCHS[stage]


if __name__ == "__main__":
    main()
