"""MARS: next-scale autoregressive sound generation on spectrograms (Ristori et al., arXiv:2509.26007).

    model = mars.load()
    for note in model.generate(4, family="organ", pitch=(48, 72)):
        note.save(f"{note.index}.wav")

Operations stand in `mars.kernels`, evaluation in `mars.evaluate`, what can go wrong in `mars.errors`. What the library
has to say goes to the logger `mars`.
"""

from typing import TYPE_CHECKING, Any

from mars.errors import MarsError

if TYPE_CHECKING:
    from mars.labels import Condition
    from mars.model import Model, load
    from mars.notes import Note

__all__ = ["Condition", "MarsError", "Model", "Note", "__version__", "load"]
__version__ = "0.1.0"

_PLACES = {"Condition": "labels", "Model": "model", "Note": "notes", "load": "model"}

if not TYPE_CHECKING:  # or any name would be one to mypy

    def __getattr__(name: str) -> Any:  # so that the help of a command need not wait for PyTorch
        if name in _PLACES:
            from importlib import import_module

            return getattr(import_module(f"mars.{_PLACES[name]}"), name)
        raise AttributeError(f"module 'mars' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
