"""Distillation: losses, features aligned by index, and the training of a student."""

from shohin.distillation.features import FeatureTap, feature_loss, recorded
from shohin.distillation.losses import dist, dkd, feature_mse, kd, logits_mse, normalized_feature_mse
from shohin.distillation.teacher import Teacher
from shohin.distillation.transfer import RECOVERY, distill, distillation_objective, divergence

__all__ = [
    "RECOVERY",
    "FeatureTap",
    "Teacher",
    "dist",
    "distill",
    "distillation_objective",
    "divergence",
    "dkd",
    "feature_loss",
    "feature_mse",
    "kd",
    "logits_mse",
    "normalized_feature_mse",
    "recorded",
]
