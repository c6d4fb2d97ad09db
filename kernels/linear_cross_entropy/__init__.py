"""This operation is the loss of a linear head, whose logits never exist whole; `op` is its contract."""

from mars.kernels.linear_cross_entropy.op import linear_cross_entropy as linear_cross_entropy
from mars.kernels.linear_cross_entropy.op import token_scores as token_scores
