"""Recurrent layers: the sizes of initial states; the operators themselves read all sizes off their weights."""

from __future__ import annotations

from torch import fx

from shohin.graph.labels.recurrent import FILLED
from shohin.program import family, shape_of
from shohin.program.nodes import arguments
from shohin.surgery.follow.table import follow
from shohin.surgery.rewritten import CannotRewrite
from shohin.surgery.work import Work, set_sizes


@follow(*sorted(FILLED))
def filled(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """The sizes of a tensor of one value."""
    labels = work.of(node)
    if labels is not None:
        place = int(family(node).startswith("new_"))
        set_sizes(work, node, copy, place, work.shape(labels), labels.shape)


@follow("lstm")
def lstm(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """The operator knows by unequal states that it has projections, so these must stay unequal."""
    states = arguments(node)[1]
    if not isinstance(states, (list, tuple)):
        return
    before = [shape_of(s)[-1] for s in states]
    after = [len(work.stays(s).get(2, range(n))) for s, n in zip(states, before, strict=True)]
    if before[0] != before[1] and after[0] == after[1]:
        raise CannotRewrite(f"{after[0]} projected units of {after[1]} hidden ones: torch's LSTM needs two different numbers")
