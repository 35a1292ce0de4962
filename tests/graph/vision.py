"""Small torchvision models."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sweep.torchvision_schemas import torchvision_models

tv = torchvision_models()

#: name -> (model, size of its square image)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: tv.resnet18(weights=None, num_classes=10), 64),
    "squeezenet1_1": (lambda: tv.squeezenet1_1(weights=None, num_classes=10), 64),
    "small vit": (lambda: tv.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5), 32),
    "small swin": (lambda: tv.swin_transformer.SwinTransformer([4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=5), 64),
}
