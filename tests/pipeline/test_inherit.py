"""A student whose architecture a plan makes out of its teacher's begins with the teacher's weights; any other is left as it is."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from shohin.pipeline.inherit import distance, inherit


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.norm1(self.conv1(x)))) + self.shortcut(x))


class Net(nn.Module):
    def __init__(self, widths: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        made: list[nn.Module] = []
        inputs = 4
        for width in widths:
            made += [nn.Sequential(*(Block(inputs if i == 0 else width, width) for i in range(blocks)))]
            inputs = width
        self.stages = nn.Sequential(*made)
        self.head = nn.Linear(inputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean(-1))


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Mixer(nn.Module):
    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.layers = nn.Sequential(*(Layer(width, hidden) for _ in range(layers)))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.first(x.mT)).mean(1))


def task(seed: int = 0, count: int = 256) -> shohin.Data:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 12, generator=g)
    y = torch.stack([x[:, 0].mean(1), x[:, 1].std(1) - 1, x[:, 2, :6].mean(1) - x[:, 2, 6:].mean(1)], 1).argmax(1)
    return shohin.Data(train=list(zip(x.split(64), y.split(64), strict=True)))


def learned(model: nn.Module, data: shohin.Data, steps: int = 60) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for i in range(steps):
        x, y = list(data.train)[i % 4]
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    return model.eval()


PAIRS = {
    "narrower": (lambda: Net((16, 24), 2), lambda: Net((9, 14), 2), 0),
    "narrower and shallower": (lambda: Net((16, 24), 3), lambda: Net((10, 13), 1), 4),
    "one stage narrower": (lambda: Net((16, 24), 1), lambda: Net((16, 15), 1), 0),
    "shallower": (lambda: Net((16, 24), 2), lambda: Net((16, 24), 1), 2),
    "fewer layers and narrower inside": (lambda: Mixer(12, 32, 4), lambda: Mixer(12, 20, 2), 2),
    "a narrower stream": (lambda: Mixer(16, 24, 2), lambda: Mixer(11, 17, 2), 0),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_student_made_by_a_plan_begins_close_to_its_teacher(name: str) -> None:
    large, small, skipped = PAIRS[name]
    data = task()
    calls = list(data.calls("train"))
    torch.manual_seed(1)
    teacher = learned(large(), data)
    before = copy.deepcopy(teacher.state_dict())
    student = small()
    fresh = distance(student, teacher, calls)
    plan = inherit(student, teacher, data, calls)
    assert plan is not None and len(plan.skips) == skipped
    assert distance(student, teacher, calls) < min(0.8, 0.8 * fresh)
    cut = shohin.cut(teacher, plan, calls[0].args)  # the student has the shapes of that plan, and is a module of its own
    assert {n: t.shape for n, t in cut.state_dict().items()} == {n: t.shape for n, t in student.state_dict().items()}
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    assert not {t.data_ptr() for t in student.state_dict().values()} & {t.data_ptr() for t in teacher.state_dict().values()}


STRANGERS = {
    "same architecture": lambda: Net((16, 24), 2),
    "other modules": lambda: Mixer(12, 20, 2),
    "wider": lambda: Net((16, 30), 2),
    "another shape": lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 3)),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_any_other_student_is_left_as_it_is(name: str) -> None:
    data = task()
    torch.manual_seed(1)
    teacher, student = learned(Net((16, 24), 2), data), STRANGERS[name]()
    before = copy.deepcopy(student.state_dict())
    assert inherit(student, teacher, data, list(data.calls("train"))) is None
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())


def test_a_student_that_knows_more_keeps_its_weights() -> None:
    data = task()
    torch.manual_seed(1)
    teacher = learned(Net((16, 24), 2), data)
    student = Net((4, 6), 2)
    shohin.distillation.distill(student, teacher, data, config=shohin.training.TrainConfig(epochs=40, lr=1e-2))
    before = copy.deepcopy(student.state_dict())
    assert inherit(student, teacher, data, list(data.calls("train"))) is None
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())


def test_distill_inherits_unless_told_otherwise() -> None:
    data = task()
    torch.manual_seed(1)
    teacher, student = learned(Net((16, 24), 2), data), Net((9, 14), 1)
    heir, orphan = (shohin.distill(student, teacher, data, epochs=0, inherit=inherits) for inherits in (True, False))
    assert all(torch.equal(t, student.state_dict()[n]) for n, t in orphan.model.state_dict().items())
    assert "inherited" not in orphan.notes and shohin.Plan.from_json(heir.notes["inherited"]).skips
    calls = list(data.calls("train"))
    assert distance(heir.model, teacher, calls) < 0.8 * distance(orphan.model, teacher, calls)
