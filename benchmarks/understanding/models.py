"""What both tools are given: the models, the layer that must keep its outputs, sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shohin.surgery.oracle import lively
from sweep.catalogue import catalogue
from sweep.entry import Entry
from sweep.numbers import embedding_tables, outputs_of

#: tiny configurations, one of each kind
TRANSFORMERS = (
    "bert-classifier",
    "distilbert",
    "gpt2",
    "llama",
    "qwen2",
    "t5",
    "vit",
    "swin",
    "segformer",
    "mobilevit",
    "convnext",
    "resnet",
)


def chosen() -> dict[str, Entry]:
    """All torchvision classification and segmentation models, and some transformers."""
    wanted = {f"transformers/{n}" for n in TRANSFORMERS}
    return {name: e for name, e in catalogue().items() if e.family in ("classification", "segmentation") or name in wanted}


def build(entry: Entry) -> nn.Module:
    """The model with random weights, statistics and scales, in float32 and evaluation mode; the same at every call."""
    torch.manual_seed(0)
    return lively(entry.build(), 0).float()


def sizes(model: nn.Module, tables: set[str] | None = None) -> tuple[int, int]:
    """(parameters outside embedding tables, bytes of all parameters and buffers), tied ones once."""
    if tables is None:
        tables = embedding_tables(model)
    ids = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in tables}
    outside = sum(p.numel() for p in model.parameters() if id(p) not in ids)
    return outside, sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def last_layer(model: nn.Module, arguments: Any) -> nn.Module | None:
    """The final classifier: of the convolutions and linear layers whose width is a dimension of an output, the one called last."""
    called: list[tuple[nn.Module, int]] = []
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]

    def note(module: nn.Module, _: Any, result: Any) -> None:
        called.append((module, module.out_features if isinstance(module, nn.Linear) else module.out_channels))

    hooks = [m.register_forward_hook(note) for m in layers]
    with torch.no_grad():
        outputs = outputs_of(model(*arguments[0], **arguments[1]))
    for hook in hooks:
        hook.remove()
    dimensions = {d for t in outputs for d in t.shape[1:]}
    fitting = [m for m, width in called if width in dimensions]
    return fitting[-1] if fitting else called[-1][0] if called else None


def runs(model: nn.Module, entry: Entry, double: bool) -> str:
    """ "" if the model runs forward on one and on two samples, otherwise the error."""
    for batch in (1, 2):
        try:
            args, kwargs = widened(entry.arguments(batch, 3), double)
            with torch.no_grad():
                model(*args, **kwargs)
        except Exception as error:
            return f"batch {batch}: {short(error)}"
    return ""


def widened(arguments: Any, double: bool) -> Any:
    """Floating tensors in float64 if ``double``, otherwise in float32."""
    kind = torch.float64 if double else torch.float32
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(kind) if t.is_floating_point() else t, arguments)


def short(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
