"""Batch normalization folded into the layer before it: exact, both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.program import ProgramModule, capture, family, fold, unfold_state

MAKE: dict[str, tuple[Callable[[bool], nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda bias: nn.Conv1d(4, 8, 3, bias=bias), nn.BatchNorm1d, (4, 12)),
    "conv2d": (lambda bias: nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=bias), nn.BatchNorm2d, (4, 9, 9)),
    "grouped": (lambda bias: nn.Conv2d(4, 8, 3, groups=4, bias=bias), nn.BatchNorm2d, (4, 6, 6)),
    "linear": (lambda bias: nn.Linear(6, 8, bias=bias), nn.BatchNorm1d, (6,)),
}


class Normed(nn.Module):
    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.layer(x)))


def make(kind: str, bias: bool, affine: bool = True, eps: float = 1e-3) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(len(kind) + 2 * bias + 4 * affine)
    layer, norm, shape = MAKE[kind]
    model = Normed(layer(bias), norm(8, affine=affine, eps=eps)).double()
    with torch.no_grad():
        model.norm.running_mean.normal_()  # type: ignore[union-attr,operator]
        model.norm.running_var.uniform_(0.2, 3.0)  # type: ignore[union-attr,operator]
        if affine:
            model.norm.weight.normal_()  # type: ignore[union-attr,operator]
            model.norm.bias.normal_()  # type: ignore[union-attr,operator]
    return model.eval(), torch.randn(5, *shape, dtype=torch.float64)


def families(program: Any) -> list[str]:
    return [family(n) for n in program.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", MAKE)
def test_folding_is_exact_and_can_be_undone(kind: str, bias: bool, affine: bool) -> None:
    model, x = make(kind, bias, affine)
    program = capture(model, (x,))
    folded = fold(program)
    assert "batch_norm" in families(program) and "batch_norm" not in families(folded.program)
    assert set(folded.folded) == {"layer.weight"} and "layer.bias" in folded.program.tensors
    with torch.no_grad():
        torch.testing.assert_close(ProgramModule(folded.program)(x), model(x), rtol=1e-9, atol=1e-9)
        # other values of the folded program, in the user's class: quantization snaps weights and corrects biases
        generator = torch.Generator().manual_seed(0)
        state = {
            n: t.detach() + 0.1 * torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in folded.program.tensors.items()
        }
        changed = ProgramModule(type(folded.program)(**{**vars(folded.program), "tensors": state}))
        model.load_state_dict(unfold_state(folded, state, program.tensors), strict=False)
        torch.testing.assert_close(model(x), changed(x), rtol=1e-9, atol=1e-9)
        again = fold(capture(model, (x,))).program.tensors
        for name in state:
            torch.testing.assert_close(again[name].detach(), state[name], rtol=1e-9, atol=1e-9)


class Awkward(nn.Module):
    """Normalizations that must stay: after an activation, after a convolution that is read twice, and over a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared = (nn.Conv1d(4, 4, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](F.relu(self.a(x)))
        y = self.b(x)
        y = self.norms[1](y) + y
        return self.norms[2](self.shared(y)) + self.norms[3](self.shared(x))


def test_what_cannot_be_folded_stays() -> None:
    torch.manual_seed(0)
    model = Awkward().eval()
    for norm in model.norms:
        norm.running_mean.normal_()  # type: ignore[union-attr,operator]
    x = torch.randn(3, 4, 7)
    folded = fold(capture(model, (x,)))
    assert families(folded.program).count("batch_norm") == 4 and not folded.folded
    with torch.no_grad():
        torch.testing.assert_close(ProgramModule(folded.program)(x), model(x), rtol=1e-6, atol=1e-6)
