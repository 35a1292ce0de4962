"""Distillation: losses, features aligned by index, and the training of a student."""

from shohin.distillation import losses
from shohin.distillation.features import FeatureTap, feature_loss, recorded
from shohin.distillation.teacher import Teacher
from shohin.distillation.transfer import RECOVERY, distill, distillation_objective, divergence

__all__ = [
    "RECOVERY",
    "FeatureTap",
    "Teacher",
    "distill",
    "distillation_objective",
    "divergence",
    "feature_loss",
    "losses",
    "recorded",
]
