"""Distillation: losses, pairs of any teacher and any student, and the training of a student."""

from shohin.distillation import losses
from shohin.distillation.dot import Dot
from shohin.distillation.ensemble import Ensemble, assistants, born_again
from shohin.distillation.features import FeatureTap, feature_loss, recorded
from shohin.distillation.generate import generate, statistics_distance
from shohin.distillation.loss import Loss, Mix
from shohin.distillation.matching import cka, match
from shohin.distillation.onpolicy import Continuation, continuations, on_policy_objective
from shohin.distillation.teacher import Teacher
from shohin.distillation.transfer import FEATURES, LABELS, RECOVERY, disagreement, distill, distillation_objective, divergence

__all__ = [
    "FEATURES",
    "LABELS",
    "RECOVERY",
    "Continuation",
    "Dot",
    "Ensemble",
    "FeatureTap",
    "Loss",
    "Mix",
    "Teacher",
    "assistants",
    "born_again",
    "cka",
    "continuations",
    "disagreement",
    "distill",
    "distillation_objective",
    "divergence",
    "feature_loss",
    "generate",
    "losses",
    "match",
    "on_policy_objective",
    "recorded",
    "statistics_distance",
]
