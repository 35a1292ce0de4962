"""Regions: sub-graphs with one input and one output of equal shape that can be skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from shohin.graph.labels.core import Labels
from shohin.program import Program, family

CONTRACTIONS = frozenset(
    ["conv1d", "conv2d", "conv3d", "linear", "matmul", "bmm", "mm", "scaled_dot_product_attention", "conv_transpose1d", "conv_transpose2d"]
)
PASSING = frozenset(["add", "add_", "relu", "dropout", "clone", "contiguous", "detach", "alias", "relu6", "hardtanh", "gelu", "silu"])
#: what a layer's skip connection may run through besides (normalization after the addition, as in the first transformers)
NORMALIZING = frozenset(["layer_norm", "rms_norm", "batch_norm", "group_norm"])


@dataclass(frozen=True)
class Region:
    """A sub-graph that can be skipped: its input then goes to its consumers.

    Args:
        name: module path, or the address of the addition that closes it.
        input, output: node names.
        nodes: names of the operations inside, the output included.
        module: path of the module whose call is exactly this region, or None.
        residual: True if the input reaches the output past all contractions (a skip connection). Else it is a chain, whose
            input and output may have widths of their own: it can be skipped where both keep the same units.
    """

    name: str
    input: str
    output: str
    nodes: frozenset[str]
    module: str | None
    residual: bool


def find_regions(program: Program, labels: Mapping[str, Labels]) -> list[Region]:
    """The smallest residual regions, and chains of equal shape outside them, in program order.

    No node outside may read the inside, or feed it but for the input: removal leaves no dangling edge. What reads a chain's
    output must not read its input too (an addition would count it twice).
    """
    modules = _module_regions(program, labels)
    found: list[Region] = []
    for region in [*modules, *_addition_regions(program, labels)]:
        if region.residual and not any(_same_work(program, region.nodes, other.nodes) for other in found):
            found.append(region)
    smallest = [r for r in found if not any(o.nodes < r.nodes for o in found)]
    chains = [r for r in modules if not r.residual and _single(program, r) and not any(r.nodes & o.nodes for o in smallest)]
    smallest += [r for r in chains if not any(o.nodes < r.nodes for o in chains)]
    return _ordered(program, smallest)


def find_layers(program: Program, labels: Mapping[str, Labels], regions: Sequence[Region]) -> list[Region]:
    """Modules that can be skipped as a whole and do more than any of ``regions``: the layers of a transformer, in program order.

    A skip connection leads through them, perhaps through normalizations; what they read besides their input (a mask) is not read
    when they are skipped. A module that only runs such modules one after the other is no choice of its own.
    """
    candidates: dict[frozenset[str], Region] = {}
    known = [_work(program, r.nodes) for r in regions]
    for path, nodes in _modules(program).items():
        region = _region(program, labels, path, nodes, module=path, layer=True)
        if region and not any(_work(program, region.nodes) <= work for work in known):
            candidates[region.nodes] = region  # of a module and a list that holds it alone, the module, which comes later
    smaller = [*candidates.values(), *(r for r in regions if r.residual and r.module is not None)]
    return _ordered(program, [r for r in candidates.values() if not _only_holds(program, r, smaller)])


def outermost(regions: Iterable[Region]) -> list[Region]:
    """The regions that lie in no other of them: what lies in a skipped region is skipped with it."""
    known = list(regions)
    return [r for r in known if not any(r.nodes < o.nodes for o in known)]


def _only_holds(program: Program, region: Region, others: Sequence[Region]) -> bool:
    """True if all contractions of a region are those of smaller ones."""
    inner = [o.nodes for o in others if o.nodes < region.nodes]
    return bool(inner) and _same_work(program, region.nodes, frozenset().union(*inner))


def _ordered(program: Program, regions: list[Region]) -> list[Region]:
    order = {n.name: i for i, n in enumerate(program.graph.nodes)}
    return sorted(regions, key=lambda r: order[r.output])


def _single(program: Program, region: Region) -> bool:
    """True if nothing outside a region reads its input: then nothing can read input and output both."""
    entry = next(n for n in program.graph.nodes if n.name == region.input)
    return all(u.name in region.nodes or family_or_none(u) == "sym_size" for u in entry.users)


def _modules(program: Program) -> dict[str, list[fx.Node]]:
    """Path of a module, or of what holds modules -> the operations inside."""
    paths: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            parts = program.origins[node.name].module.split(".")
            for depth in range(1, len(parts) + 1):
                path = ".".join(parts[:depth])
                if path:
                    paths.setdefault(path, []).append(node)
    return paths


def _module_regions(program: Program, labels: Mapping[str, Labels]) -> list[Region]:
    """Of a module and a list that holds it alone, the module, which comes later: so its name stays when its neighbours go."""
    regions: dict[frozenset[str], Region] = {}
    for path, nodes in _modules(program).items():
        region = _region(program, labels, path, nodes, module=path)
        if region:
            regions[region.nodes] = region
    return list(regions.values())


def _addition_regions(program: Program, labels: Mapping[str, Labels]) -> list[Region]:
    regions = []
    for node in program.graph.nodes:
        if node.op != "call_function" or family(node) != "add" or not all(isinstance(a, fx.Node) for a in node.args[:2]):
            continue
        for start, branch in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            inside = _between(start, branch)
            if inside:
                region = _region(program, labels, program.origins[node.name].address, [*inside, node], module=None)
                if region and region.input == start.name:
                    regions.append(region)
                    break
    return regions


def _between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Operations on paths from ``start`` (excluded) to ``end``; empty if there is none."""
    backward, stack = set(), [end]
    while stack:
        n = stack.pop()
        if n in backward or n is start or n.op != "call_function":
            continue
        backward.add(n)
        stack.extend(n.all_input_nodes)
    forward, stack = set(), [start]
    while stack:
        n = stack.pop()
        for user in n.users:
            if user in backward and user not in forward:
                forward.add(user)
                stack.append(user)
    return list(forward) if end in forward else []


def _region(
    program: Program, labels: Mapping[str, Labels], name: str, nodes: list[fx.Node], module: str | None, layer: bool = False
) -> Region | None:
    inside = set(nodes)
    if not any(family(n) in CONTRACTIONS for n in inside):
        return None
    entries = {
        i for n in inside for i in n.all_input_nodes if i not in inside and i.name not in program.names and family_or_none(i) != "sym_size"
    }
    exits = {n for n in inside if any(u not in inside and family_or_none(u) != "sym_size" for u in n.users)}
    if layer:  # sizes that export computes once may be read by later layers: they stay
        exits = {n for n in exits if not isinstance(n.meta.get("val"), (int, torch.SymInt))}
    if len(exits) != 1:
        return None
    output = exits.pop()
    if layer:
        entries = {e for e in entries if _alike(labels, e, output) and _passes(e, output, inside, PASSING | NORMALIZING)}
    if len(entries) != 1:
        return None
    entry = entries.pop()
    residual = layer or _passes(entry, output, inside)
    if not _alike(labels, entry, output, same_units=residual):
        return None
    return Region(name, entry.name, output.name, frozenset(n.name for n in inside), module, residual)


def _alike(labels: Mapping[str, Labels], entry: fx.Node, output: fx.Node, same_units: bool = True) -> bool:
    """True if both have one shape and, if asked, the same can be removed from both."""
    a, b = labels.get(entry.name), labels.get(output.name)
    return a is not None and b is not None and a.shape == b.shape and (not same_units or _equal(a, b))


def _equal(a: Labels, b: Labels) -> bool:
    """True if the same can be removed from both."""
    return all(np.array_equal(a.plane(d), b.plane(d)) for d in range(len(a.shape)))


def family_or_none(node: fx.Node) -> str:
    """The family of an operation, or "" for placeholders and the output."""
    return family(node) if node.op == "call_function" else ""


def _passes(entry: fx.Node, output: fx.Node, inside: set[fx.Node], through: frozenset[str] = PASSING) -> bool:
    seen, stack = set(), [entry]
    while stack:
        n = stack.pop()
        if n is output:
            return True
        for user in n.users:
            if user in inside and user not in seen and family(user) in through:
                seen.add(user)
                stack.append(user)
    return False


def _same_work(program: Program, a: frozenset[str], b: frozenset[str]) -> bool:
    return _work(program, a) == _work(program, b)


def _work(program: Program, nodes: frozenset[str]) -> frozenset[str]:
    return frozenset(n for n in nodes if _is_work(program, n))


def _is_work(program: Program, name: str) -> bool:
    address = program.origins[name].address.rsplit("/", 1)[-1]
    return address.rsplit(".", 1)[0] in CONTRACTIONS
