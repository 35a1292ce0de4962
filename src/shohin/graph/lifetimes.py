"""When the memory of each activation is needed: who owns it, from which operation to which."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from shohin.errors import ModelError, closest
from shohin.graph.costs import Term
from shohin.graph.labels.core import Labels
from shohin.graph.operators import Extents
from shohin.graph.sizes import Sizes
from shohin.program import Program, concrete, family
from shohin.program.nodes import argument, flatten

if TYPE_CHECKING:
    from shohin.graph.graph import Graph

#: operators that may return their argument itself though their schema does not say so
_PASSING = frozenset(["dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "dropout_"])
#: elementwise in evaluation, though not marked so by torch
_POINTWISE = frozenset(["batch_norm", "hardtanh", "relu6", "hardswish", "prelu", "softplus"])

#: one tensor among those that an operation returns
Key = tuple[str, int]


@dataclass(frozen=True)
class Lifetime:
    """The memory of one activation; views of it need none of their own.

    Args:
        name: of the graph node that makes it.
        address: of that operation, or the name of an input of the model.
        elements: of one sample if ``batched``, else in all.
        batched: a larger batch makes it larger.
        itemsize: bytes of an element; None for floating-point activations, whose width the caller chooses.
        birth: position of the operation that makes it; -1 for inputs.
        death: position of the last operation that reads it, itself or a view; for outputs the number of operations.
    """

    name: str
    address: str
    elements: tuple[Term, ...]
    batched: bool
    itemsize: int | None
    birth: int
    death: int


def operation_order(graph: Graph, skipped: Collection[str] = ()) -> list[str]:
    """Addresses of all operations that make or look at an activation, in program order: the default order of execution.

    What does not depend on an input of the model is a constant, and no activation.
    """
    return [graph.program.origins[n.name].address for n in _steps(graph, skipped)]


def lifetimes(graph: Graph, order: Sequence[str] | None = None, *, reuse: bool = False, skipped: Collection[str] = ()) -> list[Lifetime]:
    """The memory of every activation, inputs and outputs of the model included.

    Args:
        order: addresses of all operations (`operation_order`) as they are executed; default program order.
        reuse: an elementwise operation writes over an argument of its size that nothing reads later (inputs of the model
            stay as they are).
        skipped: names of regions that are left out.

    Raises:
        ModelError: if ``order`` is not the operations in an order in which each follows what it reads.
    """
    steps = _steps(graph, skipped)
    if order is not None:
        steps = _ordered(graph.program, steps, order)
    owners = _owners(graph, skipped)
    sizes = _sizes(graph)
    made: dict[Key, Lifetime] = {}
    for node in graph.program.graph.nodes:
        if node.name in graph.program.inputs and owners.get(node):
            made[node.name, 0] = _lifetime(sizes, node, 0, -1)
    merged: dict[Key, Key] = {}
    for position, node in enumerate(steps):
        own = [key for key in dict.fromkeys(owners[node]) if key[0] == node.name]
        if not own and _looks(node):
            continue  # a view touches no memory
        for i in dict.fromkeys(key for a in node.all_input_nodes for key in owners.get(a, ())):
            made[i] = replace(made[i], death=max(made[i].death, position))
        for key in own:
            made[key] = _lifetime(sizes, node, key[1], position)
    output = next(n for n in graph.program.graph.nodes if n.op == "output")
    for key in {k for n in output.all_input_nodes for k in owners.get(n, ())}:
        made[key] = replace(made[key], death=len(steps))
    if reuse:
        _overwrite(steps, owners, made, merged, frozenset(graph.program.inputs))
    return list(made.values())


def _overwrite(
    steps: Sequence[fx.Node], owners: dict[fx.Node, list[Key]], made: dict[Key, Lifetime], merged: dict[Key, Key], inputs: Collection[str]
) -> None:
    """Lets elementwise operations write over arguments that die in them."""
    for position, node in enumerate(steps):
        key = (node.name, 0)
        if key not in made or not _pointwise(node):
            continue
        for argument_ in node.all_input_nodes:
            for given in owners.get(argument_, ()):
                while given in merged:
                    given = merged[given]
                old, new = made[given], made[key]
                fits = (old.elements, old.batched, old.itemsize) == (new.elements, new.batched, new.itemsize)
                if key in made and given != key and old.death == position and fits and given[0] not in inputs:
                    made[given], merged[key] = replace(old, death=new.death), given
                    del made[key]
                    break
            if key not in made:
                break


def _sizes(graph: Graph) -> Sizes:
    labels = {name: value for name, value in graph.labels.items() if isinstance(value, Labels)}
    return Sizes(graph.program, labels, graph.planes, Extents(graph.groups, graph.label_count))


def _lifetime(sizes: Sizes, node: fx.Node, index: int, position: int) -> Lifetime:
    value = node.meta["val"]
    tensor: Tensor = value if isinstance(value, Tensor) else value[index]
    holder = node if isinstance(value, Tensor) else _part(node, index)
    origin = sizes.program.origins.get(node.name)
    names = dict(zip(sizes.program.inputs, sizes.program.input_names, strict=False))
    batched = sizes.depends_on_batch(node)
    if holder is not None:
        elements = tuple(sizes.elements(holder))
    else:
        elements = (Term(math.prod(concrete(s) for s in tensor.shape) / (sizes.batch if batched else 1), ()),)
    item = None if tensor.dtype.is_floating_point else tensor.dtype.itemsize
    address = origin.address if origin else names.get(node.name, node.name)
    return Lifetime(node.name, address, elements, batched, item, position, position)


def _part(node: fx.Node, index: int) -> fx.Node | None:
    """The node that reads one of several results."""
    return next((u for u in node.users if family(u) == "getitem" and argument(u, 1) == index), None) if node.op != "output" else None


def _steps(graph: Graph, skipped: Collection[str]) -> list[fx.Node]:
    gone = _gone(graph, skipped)
    reached: set[fx.Node] = set()
    out = []
    for node in graph.program.graph.nodes:
        if node.name in graph.program.inputs or any(i in reached for i in node.all_input_nodes):
            reached.add(node)
            if node.op == "call_function" and node.name not in gone and _tensors(node):
                out.append(node)
    return out


def _gone(graph: Graph, skipped: Collection[str]) -> frozenset[str]:
    return frozenset().union(*(graph.region(name).nodes for name in skipped))


def _ordered(program: Program, steps: Sequence[fx.Node], order: Sequence[str]) -> list[fx.Node]:
    known = {program.origins[n.name].address: n for n in steps}
    for address in order:
        if address not in known:
            raise ModelError(f"the order names {address!r}, which is no operation of this program{closest(address, known)}")
    if len(order) != len(known) or len(set(order)) != len(order):
        missing = [a for a in known if a not in set(order)]
        raise ModelError(
            f"the order must hold each of {len(known)} operations once; missing: {', '.join(missing[:3]) or 'none (one is twice)'}"
        )
    done: set[fx.Node] = set()
    wanted = set(steps)
    for address in order:
        for i in known[address].all_input_nodes:
            if i in wanted and i not in done:
                raise ModelError(f"in the order, {address!r} comes before {program.origins[i.name].address!r}, which it reads")
        done.add(known[address])
    return [known[a] for a in order]


def _owners(graph: Graph, skipped: Collection[str]) -> dict[fx.Node, list[Key]]:
    """The memory that each tensor of a node lies in; none for constants and parts of the model."""
    program, steps, gone = graph.program, set(_steps(graph, ())), _gone(graph, skipped)
    by_name = {n.name: n for n in program.graph.nodes}
    through = {r.output: by_name[r.input] for r in graph.skipped(skipped)}
    out: dict[fx.Node, list[Key]] = {}
    for node in program.graph.nodes:
        if node.name in program.inputs and isinstance(node.meta.get("val"), Tensor):
            out[node] = [(node.name, 0)]
        elif node.name in through:
            out[node] = out.get(through[node.name], [])
        elif node not in steps or node.name in gone:
            continue
        elif family(node) == "getitem":
            parts = out.get(argument(node, 0), [])
            out[node] = [parts[argument(node, 1)]] if parts else []
        elif (parent := _viewed(node)) is not None:
            out[node] = [key for key in out.get(parent, [])[:1] for _ in _tensors(node)]
        else:
            out[node] = [(node.name, i) for i, _ in enumerate(_tensors(node))]
    return out


def _tensors(node: fx.Node) -> list[Tensor]:
    return [t for t in flatten(node.meta.get("val")) if isinstance(t, Tensor)]


def _viewed(node: fx.Node) -> fx.Node | None:
    """The argument whose memory the result lies in."""
    schema = getattr(node.target, "_schema", None)
    alias = schema is not None and any(r.alias_info is not None for r in schema.returns)
    if not alias and family(node) not in _PASSING:
        return None
    mine = _storage(_tensors(node)[0])
    return next((a for a in node.all_input_nodes if any(_storage(t) == mine for t in _tensors(a))), None)


def _looks(node: fx.Node) -> bool:
    return family(node) == "getitem" or _viewed(node) is not None


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else None


def _pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or family(node) in _POINTWISE
