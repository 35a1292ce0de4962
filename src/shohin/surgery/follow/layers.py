"""Layers: normalized shapes, numbers of groups, the scale of attention."""

from __future__ import annotations

import numpy as np
from torch import fx

from shohin.program.nodes import argument, arguments
from shohin.surgery.follow.table import follow
from shohin.surgery.scales import Scaling
from shohin.surgery.work import Work, set_argument, set_sizes


@follow("layer_norm", "rms_norm")
def layer_norm(work: Work, node: fx.Node, copy: fx.Node) -> None:
    labels = work.of(node)
    if labels is not None:
        count = len(arguments(node)[1])
        set_sizes(work, node, copy, 1, work.shape(labels)[-count:], labels.shape[-count:])


def _groups(work: Work, node: fx.Node, groups: int) -> int | None:
    """How many groups of the input channels stay; None if the channels are whole."""
    source = work.of(node.args[0])
    kept = {} if source is None else work.kept(source)
    if source is None or 1 not in kept:
        return None
    return len(np.unique(kept[1] // (source.shape[1] // groups)))


@follow("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """As many groups as still have channels."""
    groups = argument(node, 6, 1)
    left = _groups(work, node, groups) if groups > 1 else None
    if left is not None and left != groups:
        set_argument(work, node, copy, 6, left)


@follow("group_norm")
def group_norm(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """As many groups as still have channels."""
    left = _groups(work, node, arguments(node)[1])
    if left is not None and left != arguments(node)[1]:
        set_argument(work, node, copy, 1, left)


@follow("scaled_dot_product_attention")
def attention(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """The default scale follows the head dim: the query rows make up for it, or the original scale is written out at the end."""
    query = work.of(node.args[0])
    if query is not None and work.shape(query)[-1] != query.shape[-1] and copy.kwargs.get("scale") is None:
        work.scalings.append(Scaling(node, arguments(node)[0], (work.shape(query)[-1] / query.shape[-1]) ** 0.5))
