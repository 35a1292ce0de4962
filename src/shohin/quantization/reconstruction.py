"""Rounding that is chosen block by block: codes, scales and biases learn together until a block's outputs are those of the float network.

BRECQ (Li et al., 2021, arXiv 2102.05426, sections 3.2 to 3.4): the blocks in order, each on the inputs that the rounded blocks before it
give, with the squared error of its outputs weighted by the diagonal of the Fisher information there. What is learned begins at codes that
are good already. AdaRound's relaxation would leave them and be annealed back to whole codes, which takes thousands of steps; here every
step rounds, and gradients pass straight through (SignRound, Cheng et al., 2023, arXiv 2309.05516, section 3). Samples that a block does not
learn from choose among its states, of which the one that it came with is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from shohin.data import Call
from shohin.evidence.layers import LayerWeight
from shohin.evidence.means import biases
from shohin.formats import Quantizer
from shohin.program import Program, call_inputs, joined_inputs
from shohin.program.execute import apart
from shohin.program.inputs import samples as some
from shohin.program.nodes import run
from shohin.quantization.blocks import Block, find_blocks, moved_nodes

#: samples of one step; one in so many portions judges and is not learned from
BATCH, JUDGES = 32, 5
#: passes over the others: of scales and biases, then of codes with them
SCALE_PASSES, CODE_PASSES = 4, 8
#: first sizes of Adam's steps, which fall to zero: of codes, of the logarithms of scales, and of biases beside their root mean square
CODES, SCALES, BIASES = 0.004, 1e-3, 1e-3
#: decay of Adam's means of gradients and of their squares; the latter short, as there are few steps
BETAS = (0.9, 0.99)
#: where a weight begins between the middle of its code's interval (0) and the float weight (1), at most half a step away
PULL = 0.8
#: random directions of the answers, each with a backward pass
DIRECTIONS = 2

Values = dict[fx.Node, Any]
Changed = tuple[dict[str, Tensor], dict[str, Quantizer]]


@dataclass(eq=False)
class _Portion:
    """Some samples, and what is known of them at the block that is looked at.

    Args:
        size: number of samples.
        passing: values that rounding does not move.
        fisher: block output -> diagonal of the Fisher information, bfloat16 in the output's shape.
        float_entry, entry: what the block reads of the blocks before, in the float program and in the rounded one.
        wanted: the outputs of the float block.
    """

    size: int
    passing: Values
    fisher: Values = field(default_factory=dict)
    float_entry: Any = None
    entry: Any = None
    wanted: Sequence[Tensor] = ()


def reconstructed(
    program: Program,
    tensors: Mapping[str, Tensor],
    quantizers: Mapping[str, Quantizer],
    weights: Sequence[LayerWeight],
    calls: Sequence[Call],
    *,
    samples: int = 512,
    seed: int = 0,
) -> Changed:
    """The tensors that change and their grids: every block's error on samples that it did not learn from becomes no greater than it was.

    A weight that several layers share keeps its codes. Memory beside the model: of all samples the values that a block reads, its outputs,
    and two bytes for each value that any block gives; the activations of one block on `BATCH` samples.

    Args:
        program: folded, with float weights.
        tensors: of the same program, weights on grids.
        quantizers: weight -> its grid.
        weights: those that lie on grids.
        calls: calibration batches.
        samples: how many are used.
        seed: of the samples' order and the directions of the answers.
    """
    blocks, moved = find_blocks(program, weights), moved_nodes(program, weights)
    plain = {name: t.detach() for name, t in program.tensors.items()}
    now = {name: t.detach() for name, t in tensors.items()}
    changed: Changed = ({}, {})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        portions = [
            _Portion(size, _passing(program, moved, inputs, plain)) for inputs, size in _portions(program, calls, samples, generator)
        ]
    for portion in portions:
        portion.fisher = _fisher(program, blocks, portion, plain, generator)
    alone = {w.name: w.names for w in weights if len(w.nodes) == 1}
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        with torch.no_grad():
            for portion in portions:
                portion.wanted = _outputs(program, block, portion, plain, portion.float_entry)
        latents = {name: _Latent(quantizers[name], now[name], plain[name]) for name in block.weights if name in alone}
        if latents:
            learner = _Learner(program, block, portions, now, latents, alone)
            if learner.least > 0:
                learner.learn(SCALE_PASSES, 0.0, generator)
                learner.learn(CODE_PASSES, CODES, generator)
            now |= learner.best[0]
            changed = changed[0] | learner.best[0], changed[1] | learner.best[1]
        with torch.no_grad():
            for portion in portions:
                _advance(program, block, after, portion, now)
    return changed


def _portions(program: Program, calls: Sequence[Call], samples: int, generator: torch.Generator) -> list[tuple[tuple[Any, ...], int]]:
    """Inputs of a few mixed samples each, and how many; the calls as they are where samples act on each other."""
    total = min(samples, sum(call.size for call in calls))
    joined = None if program.fixed else joined_inputs(program, calls, samples)
    if joined is None or not apart(program, joined, total):
        seen = [sum(call.size for call in calls[:i]) for i in range(len(calls))]
        return [(call_inputs(program, call), call.size) for call, before in zip(calls, seen, strict=True) if before < samples]
    order = torch.randperm(total, generator=generator)
    mixed = tuple(x[order] if isinstance(x, Tensor) and x.dim() and len(x) == total else x for x in joined)
    each = max(1, min(BATCH, total // JUDGES))
    return [(some(mixed, total, i, min(i + each, total)), min(each, total - i)) for i in range(0, total, each)]


def _run(program: Program, nodes: Sequence[fx.Node], values: Values, tensors: Mapping[str, Tensor]) -> None:
    """Adds the values of these nodes."""

    def look(node: fx.Node) -> Any:
        return values[node] if node in values else tensors[program.names[node.name]]

    for node in nodes:
        values[node] = run(node, fx.map_arg(node.args, look), fx.map_arg(node.kwargs, look))


def _passing(program: Program, moved: Sequence[fx.Node], inputs: tuple[Any, ...], tensors: Mapping[str, Tensor]) -> Values:
    """What the moved nodes read that is neither moved nor a tensor of the model."""
    every = set(moved)
    read = {n for node in moved for n in node.all_input_nodes if n not in every and n.name not in program.names}
    needed, nodes = set(read), list[fx.Node]()
    for node in reversed(program.graph.nodes):
        if node in needed and node.op == "call_function":
            nodes.append(node)
            needed.update(node.all_input_nodes)
    given = dict(zip(program.inputs, inputs, strict=True))
    values: Values = {n: given[n.name] for n in program.graph.nodes if n.op == "placeholder" and n.name in given}
    _run(program, nodes[::-1], values, tensors)
    return {node: values[node] for node in read}


def _fisher(
    program: Program, blocks: Sequence[Block], portion: _Portion, tensors: Mapping[str, Tensor], generator: torch.Generator
) -> dict[fx.Node, Tensor]:
    """The mean square of the gradients of random combinations of the answers at every block's outputs, in the float program.

    All alike where no answer is a float.
    """
    values, ends = dict(portion.passing), [node for block in blocks for node in block.targets]
    with torch.enable_grad():
        for block in blocks:
            _run(program, block.nodes, values, tensors)
            for node in block.targets:
                values[node] = values[node] if values[node].requires_grad else values[node].detach().requires_grad_()
        leaves = (values.get(n) for n in pytree.tree_leaves(next(iter(reversed(program.graph.nodes))).args[0]) if isinstance(n, fx.Node))
        answers = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]
        reached = [values[node] for node in ends]
        sums = [torch.zeros_like(x) if answers else torch.ones_like(x) for x in reached]
        for number in range(DIRECTIONS if answers else 0):
            signs = [torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1 for x in answers]
            direction = torch.stack([(x * s).sum() for x, s in zip(answers, signs, strict=True)]).sum()
            keep = number < DIRECTIONS - 1
            for total, gradient in zip(sums, torch.autograd.grad(direction, reached, retain_graph=keep, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient.square() / DIRECTIONS
    return {node: total.bfloat16() for node, total in zip(ends, sums, strict=True)}


def _outputs(program: Program, block: Block, portion: _Portion, tensors: Mapping[str, Tensor], entry: Any) -> list[Tensor]:
    values = dict(portion.passing) if block.entry is None else {**portion.passing, block.entry: entry}
    _run(program, block.nodes, values, tensors)
    return [values[node] for node in block.targets]


def _advance(program: Program, block: Block, after: Block | None, portion: _Portion, tensors: Mapping[str, Tensor]) -> None:
    """Takes a portion to the next block."""
    if after is not None and after.entry in block.targets:
        place = block.targets.index(after.entry)
        portion.float_entry = portion.wanted[place]
        portion.entry = _outputs(program, block, portion, tensors, portion.entry)[place]
    portion.wanted = ()
    for node in block.targets:
        del portion.fisher[node]


def _loss(program: Program, block: Block, portion: _Portion, tensors: Mapping[str, Tensor]) -> Tensor:
    """Of a sample: squared error of the block's outputs by their Fisher information."""
    found = _outputs(program, block, portion, tensors, portion.entry)
    parts = [
        (portion.fisher[node].to(x.dtype) * (x - y).square()).sum() for node, x, y in zip(block.targets, found, portion.wanted, strict=True)
    ]
    return torch.stack(parts).sum() / portion.size


class _Latent:
    """A weight whose codes and scales learn.

    Args:
        value: on the grid.
        original: the float weight.
    """

    def __init__(self, quantizer: Quantizer, value: Tensor, original: Tensor) -> None:
        self.quantizer, self.zero = quantizer, quantizer.spread(quantizer.zero_point, value)
        start = quantizer.codes(value)
        offset = original / quantizer.steps(value) + self.zero - start
        self.codes = (start + PULL * offset.clamp(-0.5, 0.5)).to(value.dtype)
        self.growth = torch.zeros(quantizer.scale.shape, dtype=value.dtype)

    def value(self) -> Tensor:
        """On the grid, with gradients for codes and scales."""
        whole = self.codes + (self._whole() - self.codes).detach()
        scale = self.quantizer.spread(self.quantizer.scale.to(whole.dtype) * self.growth.exp(), whole)
        factors = self.quantizer.columns
        return (whole - self.zero) * (scale if factors is None else scale * factors.to(whole.dtype))

    def grid(self) -> Quantizer:
        """The grid now."""
        return replace(self.quantizer, scale=(self.quantizer.scale * self.growth.detach().double().exp()).float().double())

    def rounded(self) -> Tensor:
        """The values of the codes on the grid now."""
        return self.grid().decoded(self._whole().to(torch.int64)).to(self.codes.dtype)

    def _whole(self) -> Tensor:
        return self.codes.detach().round().clamp(self.quantizer.format.low, self.quantizer.format.high)


class _Learner:
    """One block, its weights and biases, and the best state so far.

    Args:
        now: all tensors as the blocks before left them.
        weights: that learn.
    """

    def __init__(
        self,
        program: Program,
        block: Block,
        portions: Sequence[_Portion],
        now: Mapping[str, Tensor],
        weights: Mapping[str, _Latent],
        aliases: Mapping[str, Sequence[str]],
    ) -> None:
        self.program, self.block, self.now, self.weights, self.aliases = program, block, now, weights, aliases
        hold = max(1, len(portions) // JUDGES) if len(portions) > 1 else 0
        self.shown, self.judges = portions[hold:], portions[:hold] or portions
        own = biases(program)
        self.shifts = {own[node.name]: now[own[node.name]].clone() for node in block.nodes if node.name in own}
        self.best: Changed = ({}, {})
        self.least = self._error({})

    def learn(self, passes: int, codes: float, generator: torch.Generator) -> None:
        """Passes over the shown samples, each judged; ``codes`` is the size of their steps, and 0 leaves them alone."""
        growths = [weight.growth for weight in self.weights.values()]
        groups: list[dict[str, Any]] = [{"params": growths, "lr": SCALES}]
        groups += [{"params": [t], "lr": BIASES * float(t.square().mean().sqrt())} for t in self.shifts.values()]
        if codes:
            groups.append({"params": [weight.codes for weight in self.weights.values()], "lr": codes})
        learning = [tensor for group in groups for tensor in group["params"]]
        adam = torch.optim.Adam(groups, betas=BETAS)
        fall = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, passes * len(self.shown))
        for _ in range(passes):
            for tensor in learning:
                tensor.requires_grad_()
            for place in torch.randperm(len(self.shown), generator=generator).tolist():
                adam.zero_grad()
                with torch.enable_grad():
                    changed = {**self.now, **self._changed(_Latent.value)}
                    loss = _loss(self.program, self.block, self.shown[place], changed) / self.least
                torch.autograd.backward(loss)
                adam.step()
                fall.step()
            for tensor in learning:
                tensor.requires_grad_(False)
            self._judge()

    def _judge(self) -> None:
        found = self._changed(_Latent.rounded)
        error = self._error(found)
        if error < self.least:
            self.least = error
            kept = found | {name: t.clone() for name, t in self.shifts.items()}
            self.best = kept, {name: weight.grid() for name, weight in self.weights.items()}

    def _changed(self, value: Callable[[_Latent], Tensor]) -> dict[str, Tensor]:
        values = {name: value(weight) for name, weight in self.weights.items()}
        return {alias: value for name, value in values.items() for alias in self.aliases[name]} | self.shifts

    def _error(self, changed: Mapping[str, Tensor]) -> float:
        """Of the judging samples together."""
        tensors = {**self.now, **changed}
        with torch.no_grad():
            return sum(float(_loss(self.program, self.block, p, tensors)) * p.size for p in self.judges)
