"""Small torchvision models. Its binary needs the operators of one exact build of torch; models that use none of them run when
the schemas of the missing ones are declared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qroi_align": "(Tensor input, Tensor rois, float scale, int height, int width, int ratio, bool aligned) -> Tensor",
    "roi_align": "(Tensor input, Tensor rois, float scale, int height, int width, int ratio, bool aligned) -> Tensor",
    "_roi_align_backward": "(Tensor grad, Tensor rois, float scale, int h, int w, int n, int c, int y, int x, int r, bool a) -> Tensor",
    "roi_pool": "(Tensor input, Tensor rois, float scale, int height, int width) -> (Tensor, Tensor)",
    "_roi_pool_backward": "(Tensor grad, Tensor rois, Tensor m, float scale, int h, int w, int n, int c, int y, int x) -> Tensor",
    "ps_roi_align": "(Tensor input, Tensor rois, float scale, int height, int width, int ratio) -> (Tensor, Tensor)",
    "_ps_roi_align_backward": "(Tensor grad, Tensor rois, Tensor m, float s, int h, int w, int r, int n, int c, int y, int x) -> Tensor",
    "ps_roi_pool": "(Tensor input, Tensor rois, float scale, int height, int width) -> (Tensor, Tensor)",
    "_ps_roi_pool_backward": "(Tensor grad, Tensor rois, Tensor m, float s, int h, int w, int n, int c, int y, int x) -> Tensor",
    "deform_conv2d": "(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, int sh, int sw, int ph, int pw, int dh, "
    "int dw, int groups, int offset_groups, bool use_mask) -> Tensor",
    "_deform_conv2d_backward": "(Tensor g, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, int sh, int sw, int ph, "
    "int pw, int dh, int dw, int groups, int offset_groups, bool use_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def _declare() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not torch._C._jit_get_schemas_for_operator(f"torchvision::{name}"):
            library.define(name + schema)
    return library


_LIBRARY = _declare()

from torchvision import models as tv  # noqa: E402
from torchvision.models.swin_transformer import SwinTransformer  # noqa: E402

#: name -> (model, size of its square image)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: tv.resnet18(weights=None, num_classes=10), 64),
    "mobilenet_v3_small": (lambda: tv.mobilenet_v3_small(weights=None, num_classes=10), 64),
    "shufflenet_v2_x0_5": (lambda: tv.shufflenet_v2_x0_5(weights=None, num_classes=10), 64),
    "squeezenet1_1": (lambda: tv.squeezenet1_1(weights=None, num_classes=10), 64),
    "small vit": (lambda: tv.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5), 32),
    "small swin": (lambda: SwinTransformer([4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=5), 64),
}
