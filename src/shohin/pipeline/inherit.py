"""A student that a plan can make out of its teacher begins with the teacher's weights instead of random ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from shohin.data import Call, Data
from shohin.errors import DataError, ShohinError
from shohin.evidence import answers
from shohin.graph import Graph
from shohin.graph.regions import Region
from shohin.pipeline.compensate import compensate
from shohin.plan import Plan
from shohin.planning.loss import kept_units
from shohin.pruning.criteria import CRITERIA, Inputs
from shohin.surgery import cut_sharing_values, understand

Shapes = Mapping[str, torch.Size]


def inherit(student: nn.Module, teacher: nn.Module, data: Data, calls: Sequence[Call], seed: int = 0) -> Plan | None:
    """Gives ``student`` its teacher's weights through the plan that makes its architecture out of the teacher's, where there is one
    and it then answers more like the teacher than it did.

    The most salient units stay (`shohin.pruning.saliency`), and every layer is refitted to what it gave in the teacher
    (`shohin.pruning.layerwise`); no step of training is done.

    Args:
        student: changed in place, or left as it is.
        teacher: left as it is.
        data: for the loss; ``calls`` of it are looked at.

    Returns:
        The plan, or None if the student was left as it is: names or shapes fit no plan, its weights are already closer to the teacher, or
        some of them are frozen.
    """
    wanted = {name: t.shape for name, t in student.state_dict().items()}
    if not all(p.requires_grad for p in student.parameters()):
        return None  # what is frozen stays as the user has it
    if not wanted.keys() <= teacher.state_dict().keys():
        return None
    try:
        graph = understand(teacher, data.example())
        counts, skips = choices(graph, wanted)
        if not counts and not skips:
            return None
        saliency = CRITERIA["taylor"](Inputs(graph, data, calls, seed))
        widths = {name: kept_units(saliency[name].tolist(), count) for name, count in counts.items()}
        plan = Plan(graph.program.fingerprint, widths, skips)
        made = cut_sharing_values(teacher, graph, plan)
        compensate(made, graph, plan, calls, seed)
        state = made.model.state_dict()
        if {name: t.shape for name, t in state.items()} != wanted:
            return None
    except DataError:
        raise
    except (ShohinError, RuntimeError):
        return None  # no such plan
    heir = copy.deepcopy(student)
    heir.load_state_dict(state)
    if distance(heir, teacher, calls) >= distance(student, teacher, calls):
        return None
    student.load_state_dict(state)
    return plan


def choices(graph: Graph, wanted: Shapes) -> tuple[dict[str, int], tuple[str, ...]]:
    """How many units of each group stay, and what is skipped, so that tensors get the shapes ``wanted``.

    Only a proposal where groups share an axis: whether all shapes come out shows when the plan is carried out.
    """
    skipped = graph.skipped(r.name for r in (*graph.regions, *graph.layers) if (own := _tensors(graph, r)) and not own & wanted.keys())
    counts: dict[str, int] = {}
    for group in graph.groups:
        for name, axes in group.slices.items():
            for axis, indices in axes.items():
                if name in wanted and len(wanted[name]) > axis and group.name not in counts:
                    gone, by_unit = graph.program.tensors[name].shape[axis] - wanted[name][axis], indices.shape[1]
                    if gone > 0 and gone % by_unit == 0 and gone // by_unit < group.size:
                        counts[group.name] = group.size - gone // by_unit
    return counts, tuple(r.name for r in skipped)


def _tensors(graph: Graph, region: Region) -> set[str]:
    """Names of the tensors that a region reads."""
    names = graph.program.names
    nodes = [n for n in graph.program.graph.nodes if n.name in region.nodes]
    return {names[i.name] for n in nodes for i in n.all_input_nodes if i.name in names}


def _rows(answers: Tensor) -> Tensor:
    """``[..., F]`` to ``[rows, F]``; ``[N]`` to ``[N, 1]``."""
    return answers.flatten(0, -2) if answers.dim() > 1 else answers.reshape(-1, 1)


def distance(student: nn.Module, teacher: nn.Module, calls: Sequence[Call]) -> float:
    """Squared error of the student's first output as a share of the variance of the teacher's; infinite where it is not finite."""
    ours, theirs = (torch.cat([_rows(a.float()) for a in answers(model, calls)]) for model in (student, teacher))
    error = (ours - theirs).square().mean() / (theirs - theirs.mean(0)).square().mean()
    return float(error) if bool(error.isfinite()) else torch.inf
