"""How good notes are: sets of notes, metrics of one against another, and reports.

`run`, `reconstruct` and `generate` do what the commands of mars-eval of these names do.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mars.evaluate.evaluation import Options as Options
    from mars.evaluate.evaluation import generate as generate
    from mars.evaluate.evaluation import reconstruct as reconstruct
    from mars.evaluate.evaluation import run as run


def __getattr__(name: str) -> Any:  # so that comparing reports need not wait for PyTorch
    if name in ("Options", "generate", "reconstruct", "run"):
        from mars.evaluate import evaluation

        return getattr(evaluation, name)
    raise AttributeError(f"module 'mars.evaluate' has no attribute {name!r}")
