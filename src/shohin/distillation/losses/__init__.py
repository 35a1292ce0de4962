"""Distillation losses as pure functions. Student first, teacher second; gradients flow into the student only.

Per-pixel distillation of a segmentation is `kd` with ``dim=1``; of a detector, `kd` or `multi_label` on its class scores,
`bounded_regression` on its boxes and `channel_wise` on its feature maps.
"""

from shohin.distillation.losses.features import (
    attention_transfer,
    channel_wise,
    cosine_embedding,
    crd,
    feature_mse,
    layer_map,
    minilm,
    normalized_feature_mse,
    rkd,
    similarity_preserving,
    vid,
)
from shohin.distillation.losses.logits import bounded_regression, dist, dkd, kd, logits_mse, multi_label
from shohin.distillation.losses.sequences import embeddings, sequence, tokens

__all__ = [
    "attention_transfer",
    "bounded_regression",
    "channel_wise",
    "cosine_embedding",
    "crd",
    "dist",
    "dkd",
    "embeddings",
    "feature_mse",
    "kd",
    "layer_map",
    "logits_mse",
    "minilm",
    "multi_label",
    "normalized_feature_mse",
    "rkd",
    "sequence",
    "similarity_preserving",
    "tokens",
    "vid",
]
