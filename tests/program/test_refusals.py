"""What cannot be captured is refused in words for the person who wrote it: what, which line, what to do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import small_models as models
from shohin.errors import ModelError
from shohin.program import ProgramModule, capture


class Body(nn.Module):
    """A forward that is given, over one linear layer."""

    def __init__(self, forward: Callable[[Body, Tensor], object]) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.body = forward

    def forward(self, x: Tensor) -> object:
        return self.body(self, x)


class Branch(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.sum() > 0:
            y = -y
        return y


class Loop(Body):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max().item()) % 2 + 1):
            x = self.a(x)
        return x


class Sized(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)[:, : int(x.abs().max().item()) % 3 + 1]


class Masked(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)[x[:, 0].abs() >= 0].sum(0)


class Found(Body):
    def forward(self, x: Tensor) -> Tensor:
        return x.nonzero()


class Numpy(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + torch.from_numpy(np.sort(x.detach().numpy()))


class Autocast(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.a(x)


class Listing(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * len([v for v in x[:, 0].tolist() if v > 0])


class Box:
    """Something that holds a tensor and that nobody can open."""

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside


class Boxed(Body):
    def forward(self, x: Tensor) -> Box:
        return Box(self.a(x))


class Conditional(Body):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))


WORDS = {
    Branch: r"branch that depends on the values.*if y\.sum\(\) > 0.*torch\.where",
    Loop: r"depends? on.*range\(int\(x",
    Sized: r"depends? on.*% 3 \+ 1",
    Masked: r"shape of a tensor depends on the values.*x\[:, 0\]\.abs\(\) >= 0.*mask",
    Found: r"shape of a tensor depends on the values.*nonzero",
    Numpy: r"numpy.*np\.sort.*torch operators",
    Autocast: r"autocast.*self\.a\(x\)",
    Listing: r"depend.*tolist\(\)",
    Boxed: r"output holds a Box.*dataclasses",
    Conditional: r"control-flow operator cond cannot be followed.*torch\.where",
}


@pytest.mark.parametrize("kind", WORDS, ids=lambda k: k.__name__)
def test_refusals_name_what_where_and_what_to_do(kind: type[Body]) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=WORDS[kind]):
        capture(kind(lambda m, x: x), (torch.randn(2, 6),))


def test_a_failed_capture_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError):
        capture(models.Branching(), (torch.randn(2, 6),))
    shown = capsys.readouterr()
    assert "def forward" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: torch.jit.script(nn.Linear(6, 6)), "ScriptModule.*scripted from"),
        (lambda: nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 6))), "sub-module '1'.*ScriptModule"),
        (lambda: nn.DataParallel(nn.Linear(6, 6)), r"DataParallel.*model\.module"),
        (lambda: torch.compile(nn.Linear(6, 6)), r"torch\.compile"),
        (lambda: torch.relu, "torch.nn.Module, not builtin"),
    ],
)
def test_what_is_no_plain_module_is_refused(model: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        capture(model(), (torch.randn(2, 6),))


@pytest.mark.parametrize(
    ("example", "text"),
    [
        ((torch.randn(2, 6), torch.randn(2, 6)), r"does not run on the example \(tensor \(2, 6\) float32, tensor \(2, 6\) float32\)"),
        ({"y": torch.randn(2, 6)}, r"does not run.*y=tensor \(2, 6\)"),
        ((torch.randn(2, 5),), r"does not run.*tensor \(2, 5\).*shapes cannot be multiplied"),
        ((Box(torch.randn(2, 6)),), "input holds a Box"),
        (({},), "holds no tensor with a batch dimension"),
    ],
)
def test_examples_that_do_not_fit(example: object, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        capture(nn.Linear(6, 6), example)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        return y.reshape(2, -1)


class Alone(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 1:
            raise ValueError("one at a time")
        return x * 2


def test_a_batch_that_the_model_fixes_is_remarked_with_its_line() -> None:
    (remark,) = capture(Fixed(), (torch.randn(2, 3),)).remarks
    assert "batch of input 'x' is fixed to 2" in remark and "return y.reshape(2, -1)" in remark
    program = capture(Alone(), (torch.randn(1, 3),))
    assert program.batch == 1 and "fixed to 1" in program.remarks[0] and "one at a time" in program.remarks[0]
    x = torch.randn(1, 3)
    assert torch.equal(ProgramModule(program)(x), x * 2)
