"""What is minimised."""

from luthier.objectives.fused_head import token_outputs, weighted_sum
from luthier.objectives.objective import START, Objective, TokenLoss, count_targets, token_objective

__all__ = ["START", "Objective", "TokenLoss", "count_targets", "token_objective", "token_outputs", "weighted_sum"]
