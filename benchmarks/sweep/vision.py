"""The torchvision models: all for classification, segmentation and detection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sweep.entry import Arguments, Entry, floats
from sweep.torchvision_schemas import torchvision_models

#: above 100 M parameters: at most 2 blocks a stage
SHALLOW = {
    *("vit_l_16", "vit_l_32", "vit_h_14", "convnext_large", "regnet_x_32gf", "regnet_y_32gf", "regnet_y_128gf"),
    *("efficientnet_v2_l", "wide_resnet101_2"),
}
#: classifiers above 100 M parameters: hidden layers of 256 instead of 4096
NARROW = ("vgg",)
SIZES = {"vit": 224, "swin": 64, "maxvit": 224, "inception": 128}


def entries() -> list[Entry]:
    """All of them."""
    tv = torchvision_models()
    found = [_classification(name) for name in tv.list_models(tv)]
    found += [_segmentation(name) for name in tv.list_models(tv.segmentation)]
    found += [_detection(name) for name in tv.list_models(tv.detection)]
    return found


def _classification(name: str) -> Entry:
    size = next((s for start, s in SIZES.items() if name.startswith(start)), 64)
    if name.startswith("vit_h"):
        size = 224
    note = "2 blocks a stage" if name in SHALLOW else "classifier of 256" if name.startswith(NARROW) else ""

    def build() -> nn.Module:
        return _build(name, None)

    return Entry(f"torchvision/{name}", "classification", build, _images(size), note)


def _segmentation(name: str) -> Entry:
    return Entry(f"torchvision/{name}", "segmentation", lambda: _build(name, None), _images(64))


def _detection(name: str) -> Entry:
    """Its forward takes a list of images of any sizes, which no program can: understood by parts."""

    def build() -> nn.Module:
        sizes = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
        return torchvision_models().get_model(name, weights=None, weights_backbone=None, **sizes)

    def call(batch: int, generator: torch.Generator) -> Arguments:
        return ([floats(generator, 3, 64, 64).sigmoid() for _ in range(batch)],), {}

    return Entry(f"torchvision/{name}", "detection", build, call)


def _images(size: int) -> Any:
    def call(batch: int, generator: torch.Generator) -> Arguments:
        return (floats(generator, batch, 3, size, size),), {}

    return call


def _build(name: str, weights: None) -> nn.Module:
    tv = torchvision_models()
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") or name.startswith("vgg") else {}
    if name in tv.list_models(tv.segmentation):
        options = {"weights_backbone": None}
    if name in SHALLOW:
        with torch.device("meta"), _block_sizes_on_the_cpu(tv):
            model = tv.get_model(name, weights=weights, **options)
        return filled(shallow(model))
    if name.startswith(NARROW):
        with torch.device("meta"):
            model = tv.get_model(name, weights=weights, **options)
            model.classifier[0] = nn.Linear(25088, 256)
            model.classifier[3] = nn.Linear(256, 256)
            model.classifier[6] = nn.Linear(256, 1000)
        return filled(model)
    model: nn.Module = tv.get_model(name, weights=weights, **options)
    return model


@contextmanager
def _block_sizes_on_the_cpu(tv: Any) -> Iterator[None]:
    """RegNets compute the sizes of their blocks with tensors."""
    original = tv.regnet.BlockParams.from_init_params

    def computed(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return original(*args, **kwargs)

    tv.regnet.BlockParams.from_init_params = computed
    try:
        yield
    finally:
        tv.regnet.BlockParams.from_init_params = original


def shallow(model: nn.Module, blocks: int = 2) -> nn.Module:
    """Keeps the first blocks of each stage: of each sequence of one class."""
    for module in model.modules():
        alike = isinstance(module, nn.Sequential) and len({type(m) for m in module}) == 1
        if isinstance(module, nn.Sequential) and alike and len(module) > blocks and not isinstance(module[0], nn.Sequential):
            del module[blocks:]
    return model


def filled(model: nn.Module) -> nn.Module:
    """A model without storage, with random weights."""
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)):
                module.reset_parameters()
    return model
