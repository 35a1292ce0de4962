"""What rounding does to a model, layer by layer: how far each layer's own codes move the answers, to first order, and why.

The gradient of the answers at a layer's output times the error that its codes make there; in random directions of the answers, so that
the mean square is that of all of them (the empirical Fisher information of the answers, Nagel et al. 2021, 2106.08295, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from shohin.data import Call
from shohin.evidence.layer_rows import channel_axis
from shohin.formats import Quantizer
from shohin.program import Program, call_inputs, family, fold, interpret
from shohin.program.fold import CONVOLUTIONS
from shohin.program.inputs import samples
from shohin.quantization.quantized import Quantized
from shohin.quantization.sites import FUSED, IDENTITY, JOINS, MOVES, PADS, POOLS, base, held_by, table_of

#: what stands between an integer layer and one that reads its codes
THROUGH = frozenset(FUSED) | MOVES | PADS | IDENTITY | JOINS | POOLS
#: samples that errors are estimated on
SAMPLES = 64
#: random directions of the answers, each with a backward pass
DIRECTIONS = 2
#: a largest value so many times what nearly all others stay below is an outlier
OUTLIER = 4.0
#: a channel so many times the median one takes the codes of the others
UNEVEN = 10.0


@dataclass(frozen=True)
class Damage:
    """What rounding does at one layer.

    Args:
        moved: how far the answers move by it, squared, to first order; of all samples, in the answers' own unit.
        activation, weight: the parts of its input's codes and of its weights' codes.
        outlier: the input's largest magnitude over what 99.9 % of them stay below.
        clipped: share of the input's values beyond its range.
        uneven: the largest magnitude of any channel of the input over that of the median channel.
        maker: address of the integer layer that makes the input, or None.
    """

    moved: float
    activation: float
    weight: float
    outlier: float
    clipped: float
    uneven: float = 1.0
    maker: str | None = None

    @property
    def together(self) -> str | None:
        """The layer that goes back with this one, if any."""
        return self.maker if self.activation > self.weight else None

    @property
    def reason(self) -> str:
        """Why, in words."""
        if self.activation <= self.weight:
            return "its weights need finer steps than their codes have"
        if self.clipped > 1e-3:
            return f"its input saturates: {self.clipped:.1%} of the values lie beyond the range that was chosen"
        if self.uneven >= UNEVEN:
            return f"its input's channels differ: the largest reaches {self.uneven:.0f} times the median one, and all share one scale"
        if self.outlier >= OUTLIER:
            return f"its input has outliers: the largest value is {self.outlier:.0f} times what 99.9 % stay below"
        return "its input needs finer steps than its codes have"


def damages(program: Program, quantized: Quantized, calls: Sequence[Call], seed: int = 0) -> dict[str, Damage]:
    """Layer address -> what rounding does there, the worst first. Each layer is looked at alone, on the inputs of the float program.

    Args:
        program: before quantization.
        quantized: the same program on its grids.
        calls: batches; the first `SAMPLES` samples are used, all of the first batch where the model fixes its size.
    """
    plain, tensors = fold(program).program, quantized.program.tensors
    nodes = [n for n in plain.graph.nodes if held_by(plain, n) in quantized.weights]
    totals = {n.name: torch.zeros(6, dtype=torch.float64) for n in nodes}
    seen = 0
    generator = torch.Generator().manual_seed(seed)
    for call in calls:
        if seen >= SAMPLES and not plain.fixed:
            break
        inputs, room = call_inputs(plain, call), call.size if plain.fixed else min(call.size, SAMPLES - seen)
        seen += room
        inputs = samples(inputs, call.size, 0, room)  # the errors of every layer are held at once: a large batch is not taken whole
        _one(plain, tensors, quantized, nodes, inputs, totals, generator)
    found = {}
    for node in nodes:
        moved, activation, weight, outlier, clipped, uneven = totals[node.name].tolist()
        each = max(seen, 1)
        made = None if table_of(plain, node) is not None else maker(plain, node, quantized.sites.readers)
        found[plain.origins[node.name].address] = Damage(
            moved / each,
            activation / each,
            weight / each,
            outlier,
            clipped / each,
            uneven,
            made if made in quantized.sites.layers else None,
        )
    return dict(sorted(found.items(), key=lambda item: -item[1].moved))


def maker(program: Program, node: fx.Node, readers: Collection[str] = ()) -> str | None:
    """The convolution whose codes a layer reads, behind what moves, joins or pools them.

    Args:
        readers: nodes that floating operations make, behind which there is none.
    """
    source: Any = node.args[0]
    while isinstance(source, fx.Node) and source.op == "call_function":
        if family(source) in CONVOLUTIONS:
            return program.origins[source.name].address
        if source.name in readers or family(source) not in THROUGH:
            return None
        first: Any = source.args[0]
        source = first[0] if isinstance(first, (list, tuple)) else first
    return None


def _one(
    program: Program,
    tensors: Mapping[str, Tensor],
    quantized: Quantized,
    nodes: Sequence[fx.Node],
    inputs: tuple[Any, ...],
    totals: dict[str, Tensor],
    generator: torch.Generator,
) -> None:
    chosen = {n.name for n in nodes}
    outputs: dict[str, Tensor] = {}
    errors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name not in chosen:
            return value
        with torch.no_grad():
            errors[node.name] = _errors(program, tensors, quantized, node, args, value, totals[node.name])
        outputs[node.name] = value = value.detach().requires_grad_() if not value.requires_grad else value
        return value

    with torch.enable_grad():
        flat = interpret(program, program.graph, {n: t.detach() for n, t in program.tensors.items()}, inputs, visit)
        answers = [x for x in pytree.tree_leaves(flat) if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]
        for number in range(DIRECTIONS):
            direction = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in answers)
            if not isinstance(direction, Tensor):
                return
            last = number == DIRECTIONS - 1
            gradients = torch.autograd.grad(direction, list(outputs.values()), retain_graph=not last, allow_unused=True)
            for name, gradient in zip(outputs, gradients, strict=True):
                if gradient is not None:
                    for place, error in enumerate(errors[name]):
                        by_sample = (gradient * error).reshape(len(error), -1).double().sum(1)
                        totals[name][place] += by_sample.square().sum() / DIRECTIONS


def _errors(
    program: Program,
    tensors: Mapping[str, Tensor],
    quantized: Quantized,
    node: fx.Node,
    args: tuple[Any, ...],
    value: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `rounding_errors`; ranges of the input go to ``total``."""
    x, source = args[0], node.args[0]
    q = quantized.activations.get(base(source).name) if isinstance(source, fx.Node) and table_of(program, node) is None else None
    if q is not None or node.name in quantized.inputs:
        size = x.abs().reshape(-1)
        near = float(torch.quantile(size[:: len(size) // 100_000 + 1], 0.999).clamp_min(1e-12))
        channels = x.abs().movedim(-1 if family(node) == "linear" else 1, 0).flatten(1).amax(1)
        total[3] = max(float(total[3]), float(size.max()) / near)
        total[4] += 0.0 if q is None else len(x) * float(beyond(x, q))
        total[5] = max(float(total[5]), float(channels.max() / channels.median().clamp_min(1e-12)))
    return rounding_errors(program, tensors, quantized, node, args, value)


def rounding_errors(
    program: Program, tensors: Mapping[str, Tensor], quantized: Quantized, node: fx.Node, args: tuple[Any, ...], value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What all codes, those of the input and those of the weights change in the output of a layer or an embedding.

    The bias is the layer's own: a corrected one makes up for what the layers before it did. Means of errors are left out, as corrected
    biases do.

    Args:
        program: folded, before quantization.
        tensors: after it.
        node, args, value: of the layer, with float arguments.
    """
    run: Callable[..., Tensor] = node.target  # type: ignore[assignment]
    if (table := table_of(program, node)) is not None:
        looked = run(tensors[table], *args[1:]) - value
        return looked, torch.zeros_like(looked), looked
    x, source = args[0], node.args[0]
    q = quantized.activations.get(base(source).name) if isinstance(source, fx.Node) else None
    rounded = x if q is None else q.fake(x)
    rounded = quantized.inputs[node.name](rounded) if node.name in quantized.inputs else rounded
    weight = tensors[program.names[node.args[1].name]]  # type: ignore[union-attr, index]
    rest, axis = args[2:], channel_axis(node, value)
    others = [d for d in range(value.dim()) if d != axis] if isinstance((*rest, None)[0], Tensor) else []
    found = [run(a, w, *rest) - value for a, w in ((rounded, weight), (rounded, args[1]), (x, weight))]
    both, activation, alone = (error - error.mean(others, keepdim=True) if others else error for error in found)
    return both, activation, alone


def beyond(x: Tensor, q: Quantizer) -> Tensor:
    """Share of the values that lie beyond a range."""
    steps, zero = q.steps(x), q.spread(q.zero_point, x)
    return ((x < (q.format.low - zero - 0.5) * steps) | (x > (q.format.high - zero + 0.5) * steps)).double().mean()
