"""Criteria: how much each unit of each group is worth. One function for each, `CRITERIA` by name."""

from shohin.pruning.criteria.inputs import Criterion, Inputs, Needs, Scores
from shohin.pruning.criteria.table import CRITERIA

__all__ = ["CRITERIA", "Criterion", "Inputs", "Needs", "Scores"]
