"""What each layer loses in each format, for planning: to first order, by its own output, or measured on the model's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from shohin.data import Call
from shohin.errors import PlanError, closest
from shohin.evidence import Divergence
from shohin.program import Program, call_inputs, fold, interpret, restore_outputs
from shohin.quantization.damage import SAMPLES, damages, rounding_errors
from shohin.quantization.quantized import Quantized
from shohin.quantization.sites import base, held_by, table_of

#: "fisher": how far a layer's rounding moves the answers, to first order. "output": its relative squared error at the layer's own output.
#: "kl": divergence of the answers with this layer alone rounded, a forward pass of each layer and format
MEASURES = ("fisher", "output", "kl")


def sensitivity(
    program: Program, forms: Mapping[str, Quantized], calls: Sequence[Call], measure: str = "fisher", seed: int = 0
) -> dict[str, dict[str, float]]:
    """Layer (or embedding) address -> format -> loss; a format that a layer was not quantized to is absent.

    Args:
        program: before quantization.
        forms: format -> the program with every layer in it that can be.
        calls: batches; the first `SAMPLES` samples or so are used.
        measure: one of `MEASURES`. "fisher" is "output" where answers have no gradients.

    Raises:
        PlanError: for an unknown measure.
    """
    if measure not in MEASURES:
        raise PlanError(f"sensitivity={measure!r} is not known; one of {', '.join(map(repr, MEASURES))}{closest(str(measure), MEASURES)}")
    found: dict[str, dict[str, float]] = {}
    for form, quantized in forms.items():
        losses: dict[str, float] = {}
        if measure == "fisher":
            losses = {address: damage.moved for address, damage in damages(program, quantized, calls, seed).items()}
        if measure == "output" or (measure == "fisher" and not any(losses.values())):  # answers without gradients tell nothing
            losses = _at_outputs(program, quantized, _few(calls))
        elif measure == "kl":
            losses = _of_answers(program, quantized, _few(calls))
        for address, loss in losses.items():
            found.setdefault(address, {})[form] = loss
    return found


def _few(calls: Sequence[Call]) -> list[Call]:
    found, seen = [], 0
    for call in calls:
        if seen < SAMPLES:
            found.append(call)
            seen += call.size
    return found


def _rounded_nodes(program: Program, quantized: Quantized) -> list[fx.Node]:
    return [n for n in program.graph.nodes if held_by(program, n) in quantized.weights]


def _at_outputs(program: Program, quantized: Quantized, calls: Sequence[Call]) -> dict[str, float]:
    plain = fold(program).program
    nodes = {n.name for n in _rounded_nodes(plain, quantized)}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in nodes}

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name in nodes:
            error = rounding_errors(plain, quantized.program.tensors, quantized, node, args, value)[0]
            sums[node.name] += torch.stack([error.double().square().sum(), value.double().square().sum()])
        return value

    with torch.no_grad():
        for call in calls:
            interpret(plain, plain.graph, plain.tensors, call_inputs(plain, call), visit)
    return {plain.origins[name].address: float(error / size.clamp_min(1e-30)) for name, (error, size) in sums.items()}


class _OneRounded(nn.Module):
    """The float program with one layer's weight and input rounded."""

    def __init__(self, program: Program, quantized: Quantized, node: fx.Node) -> None:
        super().__init__()
        self.program, self.quantized, self.node = program, quantized, node

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program, held = self.program, self.quantized

        def feed(node: fx.Node, given: tuple[Any, ...]) -> tuple[Any, ...]:
            if node is not self.node:
                return given
            if (table := table_of(program, node)) is not None:
                return (held.program.tensors[table], *given[1:])
            source: Any = node.args[0]
            q = held.activations.get(base(source).name)
            weight = held.program.tensors[program.names[node.args[1].name]]  # type: ignore[union-attr, index]
            return (given[0] if q is None else q.fake(given[0]), weight, *given[2:])

        call = Call(args, kwargs, None, next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
        return restore_outputs(program, interpret(program, program.graph, program.tensors, call_inputs(program, call), feed=feed))


def _of_answers(program: Program, quantized: Quantized, calls: Sequence[Call]) -> dict[str, float]:
    from shohin.program import ProgramModule

    plain = fold(program).program
    divergence = Divergence(ProgramModule(plain), calls)
    return {plain.origins[node.name].address: divergence(_OneRounded(plain, quantized, node)) for node in _rounded_nodes(plain, quantized)}
