"""Multi-scale residual vector quantiser with one codebook for all scales (Tian et al. 2024, §3.1)."""

from __future__ import annotations

from mars.config import TokenizerConfig
from mars.kernels import MultiScaleVQ
from mars.kernels.modules import Quantized as Quantized
from mars.kernels.modules import phi_index as phi_index


class Quantizer(MultiScaleVQ):
    """The quantiser of a tokenizer's settings."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(
            config.code_dim,
            config.codebook_size,
            config.scales,
            metric=config.metric,
            phi=config.phi,
            ratio=config.phi_ratio,
            beta=config.beta,
            dropout=config.quantizer_dropout,
            dropout_start=config.dropout_start,
            residuals=config.ema_codebook or config.restart_dead_codes > 0,
        )
        self.config = config
        if config.ema_codebook:
            self.codebook.requires_grad_(False)  # the codebook term of the loss then trains the convolutions alone
