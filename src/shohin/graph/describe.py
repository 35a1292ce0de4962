"""What is known of a graph as plain rows, for tables and pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from shohin.graph.costs import Operator
from shohin.graph.operators import macs_of
from shohin.graph.sizes import batched, is_symbolic, shape_at_example
from shohin.program import Program

if TYPE_CHECKING:
    from shohin.graph.graph import Graph


def shape_text(program: Program, node: fx.Node, grows: bool) -> tuple[str, ...]:
    """The sizes of a tensor's axes, with "B" for the batch ("4B" where it is multiplied with heads or windows).

    Args:
        grows: whether the tensor grows with the batch.
    """
    shape = shape_at_example(program, node)
    symbolic = [is_symbolic(s) for s in node.meta["val"].shape] if "val" in node.meta else []
    if grows and not any(symbolic):  # the batch is a number in this program
        symbolic = [d == 0 and n % program.batch == 0 for d, n in enumerate(shape)]
    if not grows:
        return tuple(map(str, shape))
    return tuple(_times(n // program.batch) if s else str(n) for n, s in zip(shape, symbolic, strict=True))


def _times(count: int) -> str:
    return "B" if count == 1 else f"{count}B"


def layer_details(graph: Graph, element: float = 4.0) -> dict[str, dict[str, Any]]:
    """Address of each operation that costs time -> ``{"inputs", "output", "moved", "intensity"}``: shapes as "B×64×56×56", bytes
    read and written for one sample (activations and weights), MACs per byte.
    """
    program, grows = graph.program, batched(graph.program)
    nodes = {program.origins[n.name].address: n for n in program.graph.nodes if n.name in program.origins}
    out = {}
    for op in graph.costs:
        node = nodes[op.address]
        given = [n for n in node.all_input_nodes if n.name not in program.names and _is_tensor(n)]
        made = node if _is_tensor(node) else next((u for u in node.users if _is_tensor(u)), None)
        out[op.address] = {
            "inputs": ["×".join(shape_text(program, n, n.name in grows)) for n in given],
            "output": "" if made is None else "×".join(shape_text(program, made, made.name in grows)),
            "moved": op.moved(graph.sizes, element=element),
            "intensity": op.intensity(graph.sizes, element=element),
        }
    return out


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def group_rows(graph: Graph) -> list[dict[str, Any]]:
    """One row for each unit group: ``{"name", "units", "params", "macs", "multiple", "normalized", "places"}``; parameters and MACs
    are those of one unit with everything else at full width, "multiple" is None where any count is allowed.
    """
    return [
        {
            "name": group.name,
            "units": group.size,
            "params": group.parameters,
            "macs": group.macs,
            "multiple": group.multiple if group.multiple > 1 else None,
            "normalized": group.normalized,
            "places": [f"{name}[{axis}]" for name, axes in group.slices.items() for axis in axes],
        }
        for group in graph.groups
    ]


def region_rows(graph: Graph) -> list[dict[str, Any]]:
    """One row for each region: ``{"name", "operations", "macs", "params", "residual"}``, of what skipping it saves."""
    rows = []
    for region in graph.regions:
        inside: list[Operator] = [op for op in graph.costs if region.name in op.regions]
        params = sum(t.at(graph.sizes) for op in inside for t in op.weights)
        rows.append(
            {
                "name": region.name,
                "operations": len(inside),
                "macs": macs_of(inside, graph.sizes),
                "params": params,
                "residual": region.residual,
            }
        )
    return rows


def frozen_rows(graph: Graph) -> list[dict[str, str]]:
    """One row for each thing that cannot be chosen: ``{"address", "reason", "line"}``; what is equal but for its address is
    one row.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for note in graph.frozen:
        found.setdefault((note.reason, note.line), []).append(note.address)
    return [
        {"address": where[0] + (f" and {len(where) - 1} more" if len(where) > 1 else ""), "reason": reason, "line": line}
        for (reason, line), where in found.items()
    ]
