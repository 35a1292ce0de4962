"""Block reconstruction: where blocks begin and end, and that what they learn is kept only where it helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from target_nets import Residual2d, Transformer, randomize
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from shohin.data import Call, Data
from shohin.errors import DataError
from shohin.evidence.layers import LayerWeight, layer_weights
from shohin.formats import Scheme
from shohin.program import Program, capture, fold
from shohin.quantization import quantize_layers, quantize_weights, weights_by_address
from shohin.quantization import reconstruction as module
from shohin.quantization.blocks import Block, find_blocks, moved_nodes
from shohin.quantization.quantized import Quantized


class Basic(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(F.relu(self.a(x))))


class ResidualNet(nn.Module):
    """A stem, two residual blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Conv2d(3, 8, 3), Basic(8), Basic(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(F.relu(self.stem(x)))).mean((2, 3)))


class Encoder(nn.Module):
    """One layer behind an embedding; normalization behind the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.first, self.up, self.down, self.second = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.table(words))
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = self.first(x + self.o(seen.transpose(1, 2).flatten(2)))
        x = self.second(x + self.down(F.gelu(self.up(x))))
        weight = mask[:, :, None].to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1)


class TwoExits(nn.Module):
    """An answer leaves in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.early = Basic(4), Basic(4), nn.Linear(4, 2)
        self.late = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        early = self.early(x.mean((2, 3)))
        return early, self.late(self.b(x).mean((2, 3)))


class Shared(nn.Module):
    """The first and the last layer have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        self.d.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu(x + self.c(F.relu(self.b(F.relu(self.a(x)))))))


def mlp() -> nn.Module:
    return nn.Sequential(*(part for _ in range(5) for part in (nn.Linear(12, 12), nn.ReLU())))


def words(generator: torch.Generator) -> tuple[Tensor, ...]:
    lengths = torch.randint(2, 7, (12,), generator=generator)
    return torch.randint(0, 11, (12, 6), generator=generator), torch.arange(6) < lengths[:, None]


def numbers(*shape: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda generator: (torch.randn(12, *shape, generator=generator),)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], tuple[Tensor, ...]]]] = {
    "residual": (ResidualNet, numbers(3, 8, 8)),
    "encoder": (Encoder, words),
    "mlp": (mlp, numbers(12)),
    "exits": (TwoExits, numbers(4, 6, 6)),
    "shared": (Shared, numbers(16)),
    "depthwise": (lambda: Residual2d(norm=True), numbers(3, 12, 12)),
    "transformer": (Transformer, numbers(6, 32)),
}
BLOCKS: dict[str, list[str]] = {
    "residual": ["stem", "one.a one.b", "two.a two.b", "head"],
    "encoder": ["q k v o", "up down"],
    "mlp": ["0 2 4", "6 8"],
    "exits": ["a.a a.b", "early b.a b.b", "late"],
}


@cache
def made(name: str, seed: int = 0, count: int = 5) -> tuple[nn.Module, list[Call], Program]:
    make, draw = NETS[name]
    torch.manual_seed(seed)
    model, generator = make().eval(), torch.Generator().manual_seed(seed)
    calls = [Call(draw(generator), {}, None, None) for _ in range(count)]
    return model, calls, capture(model, calls[0])


def blocks_of(name: str) -> tuple[Program, list[LayerWeight], list[Block]]:
    program = fold(made(name)[2]).program
    weights = layer_weights(program)[0]
    return program, weights, find_blocks(program, weights)


def rounded(program: Program, calls: Sequence[Call], rounding: str, text: str = "weights int3 channel", seed: int = 0) -> Quantized:
    schemes = dict.fromkeys(weights_by_address(fold(program).program), Scheme.parse(text))
    return quantize_weights(program, calls, schemes, rounding=rounding, seed=seed)


def error(model: nn.Module, changed: nn.Module, calls: Sequence[Call]) -> float:
    def leaves(found: Any) -> list[Tensor]:
        return list(found) if isinstance(found, tuple) else [found]

    with torch.no_grad():
        pairs = [pair for c in calls for pair in zip(leaves(model(*c.args)), leaves(changed(*c.args)), strict=True)]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_end_where_one_value_is_all_that_goes_on(name: str) -> None:
    program, _, blocks = blocks_of(name)
    assert [" ".join(w.removesuffix(".weight") for w in b.weights) for b in blocks] == BLOCKS[name]
    answers = {n for node in program.graph.nodes if node.op == "output" for n in node.all_input_nodes}
    assert answers <= {node for b in blocks for node in b.targets}


@pytest.mark.parametrize("name", NETS)
def test_every_moved_operation_is_in_one_block_and_reads_one_value_of_those_before(name: str) -> None:
    program, weights, blocks = blocks_of(name)
    moved = moved_nodes(program, weights)
    assert [node for b in blocks for node in b.nodes] == moved
    layers = [node for w in weights for node in w.nodes]
    assert sorted(node.name for b in blocks for node in b.nodes if node.name in layers) == sorted(layers)
    done: set[Any] = set()
    for block in blocks:
        read = {n for node in block.nodes for n in node.all_input_nodes if n in done}
        assert block.weights and read == ({block.entry} if block.entry is not None else set())
        done |= set(block.nodes)


@pytest.mark.parametrize("name", ["residual", "encoder", "exits", "shared"])
def test_codes_stay_within_the_format_and_zero_points_where_they_were(name: str) -> None:
    _, calls, program = made(name)
    found = rounded(program, calls, "blocks", "weights uint3 group 8")
    for weight, q in found.weights.items():
        value = found.program.tensors[weight]
        torch.testing.assert_close(q.decoded(q.codes(value)), value, rtol=0, atol=1e-6)
        assert len(torch.unique(q.codes(value))) <= 8 and bool((q.scale > 0).all())
    before = rounded(program, calls, "descent", "weights uint3 group 8")
    assert all(torch.equal(q.zero_point, before.weights[n].zero_point) for n, q in found.weights.items())


def test_answers_to_fresh_samples_come_nearer_than_by_layers_alone() -> None:
    (model, calls, program), fresh = made("encoder", 0, 20), made("encoder", 100)[1]
    found = (rounded(program, calls, rounding, "weights uint2 group 8") for rounding in ("descent", "blocks"))
    descent, blocks = (error(model, each.view(), fresh) for each in found)
    assert blocks < 0.85 * descent


@pytest.mark.parametrize("name", ["residual", "exits", "encoder"])
def test_no_block_is_worse_on_the_samples_that_judge_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, calls, program = made(name)
    errors: list[tuple[float, float]] = []

    class Watched(module._Learner):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.first = self.least

        def learn(self, passes: int, codes: float, generator: torch.Generator) -> None:
            super().learn(passes, codes, generator)
            errors.append((self._error(self.best[0]), self.first))

    monkeypatch.setattr(module, "_Learner", Watched)
    rounded(program, calls, "blocks")
    assert errors and all(after <= before * (1 + 1e-6) for after, before in errors)


def test_steps_that_do_harm_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _, calls, program = made("residual")
    before = rounded(program, calls, "descent")
    for size in ("CODES", "SCALES", "BIASES"):
        monkeypatch.setattr(module, size, 10.0)
    found = rounded(program, calls, "blocks")
    assert all(torch.equal(t, before.program.tensors[n]) for n, t in found.program.tensors.items())


def test_a_seed_repeats_itself_and_leaves_the_global_generator_alone() -> None:
    _, calls, program = made("residual")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (rounded(program, calls, "blocks", seed=3) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, again.program.tensors[n]) for n, t in first.program.tensors.items())


def test_a_weight_of_several_blocks_keeps_its_codes() -> None:
    _, calls, program = made("shared")
    found, before = (rounded(program, calls, rounding) for rounding in ("blocks", "descent"))
    (shared,) = (w for w in layer_weights(fold(program).program)[0] if len(w.nodes) == 2)
    assert torch.equal(found.program.tensors[shared.name], before.program.tensors[shared.name])
    assert len({id(found.program.tensors[name]) for name in shared.names}) == 1


@pytest.mark.parametrize("size", [1, 2, 7])
def test_few_samples_serve(size: int) -> None:
    model, calls, program = made("residual")
    few = [Call((calls[0].args[0][:size],), {}, None, None)]
    assert error(model, rounded(program, few, "blocks").view(), calls) < 0.5


class Together(nn.Module):
    """Samples act on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x - x.mean(0))))


def test_batches_whose_samples_act_on_each_other_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Together().eval()
    calls = [Call((torch.randn(9, 12),), {}, None, None) for _ in range(6)]
    sizes: list[int] = []
    fisher = module._fisher

    def watched(program: Program, blocks: Sequence[Block], portion: Any, *rest: Any) -> Any:
        sizes.append(portion.size)
        return fisher(program, blocks, portion, *rest)

    monkeypatch.setattr(module, "_fisher", watched)
    rounded(capture(model, calls[0]), calls, "blocks")
    assert sizes == [9] * 6


class Decided(ResidualNet):
    """Gives back what it decides, no floats."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(-1)


def test_what_is_behind_a_decision_learns_all_the_same() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 3, 8, 8)
    model = Decided().eval()
    found = shohin.quantize(model, shohin.Data(train=[x]), "w3a8", rounding="blocks")
    plain = shohin.quantize(model, shohin.Data(train=[x]), "w3a8", rounding="descent")
    assert found.model is not None and plain.model is not None
    states = zip(found.model.state_dict().values(), plain.model.state_dict().values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in states)


def test_formats_may_differ_and_integers_of_few_bits_learn_too() -> None:
    model, calls, program = made("residual", 0, 20)
    forms = {"stem/conv2d.0": "int8", "one.a/conv2d.0": "w3a8", "one.b/conv2d.0": "w2a8", "head/linear.0": "weights uint2 group 8"}
    found, before = (quantize_layers(program, calls, forms, rounding=rounding) for rounding in ("blocks", "descent"))
    assert {n: q.format.bits for n, q in found.weights.items()} == {
        "stem.weight": 8,
        "one.a.weight": 3,
        "one.b.weight": 2,
        "head.weight": 2,
    }
    assert any(not torch.equal(q.scale, before.weights[n].scale) for n, q in found.weights.items())
    assert error(model, found.view(), calls) < 1.1 * error(model, before.view(), calls)


def test_batches_are_needed() -> None:
    _, _, program = made("mlp")
    with pytest.raises(DataError, match="'blocks' needs calibration batches"):
        rounded(program, [], "blocks")


def test_files_hold_what_was_learned(tmp_path: Path) -> None:
    model = randomize(Transformer(), 0)
    data = Data(train=[torch.randn(16, 6, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    found = shohin.quantize(model, data, "weights int4 group 32", rounding="blocks")
    assert found.model is not None and found.view is not None and found.notes["rounding"] == "blocks"
    x = data.example().args[0]
    torch.testing.assert_close(found.model(x), found.view(x), rtol=1e-4, atol=1e-5)
    shipped = shohin.export(found, data, path=tmp_path / "m.onnx")
    assert shipped.notes["parity"]["departs"] == []
