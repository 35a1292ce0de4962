"""Plans and timings belong to one structure: what changes the computation changes the fingerprint; weights do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shohin.program import ProgramModule, capture, fold, unfold_state


def net(stride: int = 1, padding: int = 0, activation: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 8, 3, stride, padding), activation or nn.ReLU(), nn.Conv1d(8, 8, 1))


def fingerprint(model: nn.Module) -> str:
    return capture(model, (torch.randn(2, 3, 32),)).fingerprint


class Wired(nn.Module):
    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.a, self.b, self.swapped = nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 1), swapped

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.a(x), self.b(x)
        return y - z if not self.swapped else z - y


def test_the_fingerprint_is_of_the_whole_structure() -> None:
    models = [
        net(),
        net(2),
        net(padding=1),
        net(activation=nn.GELU()),
        net(activation=nn.LeakyReLU(0.1)),
        net(activation=nn.LeakyReLU(0.2)),
    ]
    models += [Wired(False), Wired(True)]
    found = [fingerprint(m) for m in models]
    assert len(set(found)) == len(found)


def test_weights_and_batch_do_not_enter_the_fingerprint() -> None:
    torch.manual_seed(0)
    first, second = net(), net()
    assert fingerprint(first) == fingerprint(second)
    assert capture(first, (torch.randn(5, 3, 32),)).fingerprint == fingerprint(first)
    assert capture(first, (torch.randn(2, 3, 32),)).weights_hash() != capture(second, (torch.randn(2, 3, 32),)).weights_hash()


class Shared(nn.Module):
    """One normalization after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Conv1d(3, 6, 3), nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6)
        nn.init.uniform_(self.n.weight, 0.5, 2)
        self.n.running_mean.normal_()
        self.n.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.b(torch.relu(self.n(self.a(x)))))


def test_a_normalization_shared_by_two_layers_is_not_folded() -> None:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(4, 3, 20)
    program = capture(model, (x,))
    folded = fold(program)
    assert not folded.folded
    again = ProgramModule(program, tensors=unfold_state(folded, folded.program.tensors, program.tensors))
    with torch.no_grad():
        assert torch.allclose(again(x), model(x), atol=1e-6)
