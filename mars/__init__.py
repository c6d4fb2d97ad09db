"""MARS: next-scale autoregressive sound generation on spectrograms (Ristori et al., arXiv:2509.26007)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mars.model import Model as Model
    from mars.model import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # so that the help of a command need not wait for PyTorch
    if name in ("Model", "load"):
        from mars import model

        return getattr(model, name)
    raise AttributeError(f"module 'mars' has no attribute {name!r}")
