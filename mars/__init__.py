"""MARS: next-scale autoregressive sound generation on spectrograms (Ristori et al., arXiv:2509.26007)."""

from mars.model import Model as Model
from mars.model import load as load

__version__ = "0.1.0"
