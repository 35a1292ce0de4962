"""Forward and backward passes over the calibration batches, with a look at what is read.

Memory: one batch's activations (forward: those that are still needed; backward: all of one batch), whatever the number of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shohin.data import Call
from shohin.program import call_inputs, interpret, restore_outputs
from shohin.pruning.criteria.inputs import Inputs
from shohin.pruning.criteria.readings import Reading

Taken = Mapping[int, Tensor]
"""Number of a reading -> the tensor that holds its units, with ``.grad`` after a backward pass."""


@dataclass(frozen=True, eq=False)
class Step:
    """One batch after its backward pass.

    Args:
        size: samples.
        taken: by number of the reading; those that the loss depends on.
        outputs: name of a reading's node -> its output, where that was asked for.
        gradients: name -> gradient of the parameter, where these were asked for.
    """

    size: int
    taken: Taken
    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


def forward(inputs: Inputs, listed: Sequence[Reading], take: Callable[[int, Tensor, Tensor | None], None]) -> None:
    """Calls ``take(number of the reading, tensor, other operand of a product or None)`` for every batch."""
    program = inputs.graph.program
    at = _by_node(listed)

    def feed(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        for number in at.get(node.name, ()):
            one = listed[number]
            if one.place is not None:
                take(number, args[one.place], None if one.partner is None else args[one.partner[0]])
        return args

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        for number in at.get(node.name, ()):
            if listed[number].place is None:
                take(number, value, None)
        return value

    for call in inputs.calls:
        with torch.no_grad():
            interpret(program, program.graph, program.tensors, call_inputs(program, call), visit, feed)
        if inputs.tick is not None:
            inputs.tick()


def backward(
    inputs: Inputs,
    listed: Sequence[Reading],
    loss: Callable[[Any, Call], Tensor],
    *,
    outputs: Collection[str] = (),
    parameters: bool = False,
) -> Iterator[Step]:
    """One step for each batch.

    Args:
        listed: whose tensors get a gradient.
        loss: of the outputs of a call: a mean over its samples.
        outputs: names of nodes whose outputs get a gradient.
        parameters: True for the gradients of all parameters; without them a backward pass costs about a third less.
    """
    program = inputs.graph.program
    at = _by_node(listed)
    leaves: dict[int, Tensor] = {}
    for name, tensor in program.tensors.items():
        wanted = parameters and name in program.trainable and tensor.is_floating_point()
        if id(tensor) not in leaves or wanted:
            leaves[id(tensor)] = tensor.detach().requires_grad_(wanted)
    tensors = {name: leaves[id(t)] for name, t in program.tensors.items()}
    for call in inputs.calls:
        taken: dict[int, Tensor] = {}
        seen: dict[str, Tensor] = {}

        def feed(node: fx.Node, args: tuple[Any, ...], taken: dict[int, Tensor] = taken) -> tuple[Any, ...]:
            given = list(args)
            for number in at.get(node.name, ()):
                place = listed[number].place
                if place is not None:
                    given[place] = taken[number] = _watched(given[place])
            return tuple(given)

        def visit(
            node: fx.Node, value: Any, args: tuple[Any, ...], taken: dict[int, Tensor] = taken, seen: dict[str, Tensor] = seen
        ) -> Any:
            for number in at.get(node.name, ()):
                if listed[number].place is None:
                    value = taken[number] = _watched(value)
            if node.name in outputs:
                value = seen[node.name] = _watched(value)
            return value

        with torch.enable_grad():
            flat = interpret(program, program.graph, tensors, call_inputs(program, call), visit, feed)
            value = loss(restore_outputs(program, flat), call)
            if value.requires_grad:  # else nothing that is asked for moves the loss
                value.backward()  # type: ignore[no-untyped-call]
        gradients = {name: t.grad for name, t in tensors.items() if t.grad is not None}
        reached = {number: x for number, x in taken.items() if x.grad is not None}
        yield Step(call.size, reached, {name: y for name, y in seen.items() if y.grad is not None}, gradients)
        for leaf in leaves.values():
            leaf.grad = None
        if inputs.tick is not None:
            inputs.tick()


def gates(one: Reading, x: Tensor, size: int) -> dict[str, Tensor]:
    """Gradient of each sample's loss with respect to a gate of one on each unit where it is read: group -> float64 (size, units).

    Args:
        x: a tensor with its gradient, of a loss that is a mean over ``size`` samples (undone here).
    """
    if x.grad is None:
        return {}
    product = (x.detach().double() * x.grad.double()).movedim(one.axis, -1)
    if product.shape[0] % size == 0:  # windows or heads may be folded into the batch
        line = product.reshape(size, -1, product.shape[-1]).sum(1) * size
    else:
        line = product.reshape(1, -1, product.shape[-1]).sum(1).expand(size, -1)
    return {group: one.by_unit(line, group).cpu() for group in one.owners}


def _watched(x: Tensor) -> Tensor:
    """The tensor as one that keeps its gradient."""
    if not x.is_floating_point():
        return x
    if not x.requires_grad:
        return x.detach().requires_grad_()
    x = x.view_as(x)
    x.retain_grad()
    return x


def _by_node(listed: Sequence[Reading]) -> dict[str, list[int]]:
    at: dict[str, list[int]] = {}
    for number, one in enumerate(listed):
        at.setdefault(one.node, []).append(number)
    return at
