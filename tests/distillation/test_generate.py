"""Inputs from the model alone: they look like data to batch normalizations, name classes, and teach a student more than noise does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.distillation.generate import generate, statistics_distance
from shohin.errors import DataError, ModelError
from shohin.training import copy_state

torch.set_num_threads(1)
EXAMPLE = torch.zeros(48, 3, 16, 16)


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Six classes: a square, a ring or a cross, reddish or bluish, somewhere on a noisy grey."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 6, (n,), generator=g)
    grid = torch.arange(16.0)
    centre = 5 + 6 * torch.rand(n, 2, 1, 1, generator=g)
    dy, dx = (grid[:, None] - centre[:, 0]).abs(), (grid[None] - centre[:, 1]).abs()
    r, far = 3 + 1.5 * torch.rand(n, 1, 1, generator=g), torch.maximum(dy, dx)
    kinds = torch.stack([far < r, (far < r) & (far > r - 1.6), ((dy < 1.1) | (dx < 1.1)) & (far < r + 1)], 1)
    shape = kinds[torch.arange(n), y % 3].float()
    colour = torch.tensor([[1.0, 0.2, 0.1], [0.1, 0.4, 1.0]])[y // 3] * (0.6 + 0.4 * torch.rand(n, 1, generator=g))
    grey = 0.3 * torch.rand(n, 3, 1, 1, generator=g) + 0.1 * torch.randn(n, 3, 16, 16, generator=g)
    return (shape[:, None] * colour[:, :, None, None] + grey - 0.3) / 0.3, y


def network(width: int) -> nn.Sequential:
    def block(i: int, o: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]

    layers = [*block(3, width, 1), *block(width, 2 * width, 2), *block(2 * width, 2 * width, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 6))


def quietly(*args: Any, **kwargs: Any) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return generate(*args, **kwargs)


def accuracy(model: nn.Module) -> float:
    x, y = pictures(400, 2)
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    net, (x, y) = network(16), pictures(1024, 1)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(9):
        for i in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[i]), y[i]).backward()
            optimizer.step()
    assert accuracy(net) > 0.8
    net.zero_grad(set_to_none=True)
    return net.eval()


@pytest.fixture(scope="module")
def dreams(teacher: nn.Module) -> list[Tensor]:
    return quietly(teacher, EXAMPLE, 6, steps=60)


def gaussian(count: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(EXAMPLE.shape, generator=g) for _ in range(count)]


def test_generated_batches_match_statistics_and_name_classes(teacher: nn.Module, dreams: list[Tensor]) -> None:
    noise = gaussian(6)
    far, near = (sum(statistics_distance(teacher, b) for b in batches) for batches in (noise, dreams))
    assert near < far / 5
    with torch.no_grad():
        sure, unsure = (torch.cat([teacher(b) for b in batches]).softmax(1).amax(1).mean().item() for batches in (dreams, noise))
        named = torch.cat([teacher(b) for b in dreams]).argmax(1).bincount(minlength=6)
    assert sure > 0.8 and sure > unsure + 0.2
    assert int(named.min()) > 0.5 * len(EXAMPLE)  # each class is asked for by 48 of 288 samples


def test_a_student_learns_more_from_generated_batches_than_from_noise(teacher: nn.Module, dreams: list[Tensor]) -> None:
    def learned(batches: list[Tensor], seed: int) -> float:
        torch.manual_seed(seed)
        student = network(8)
        optimizer = torch.optim.Adam(student.parameters(), 3e-3)
        for step in range(180):
            x = batches[step % len(batches)]
            with torch.no_grad():
                answer = teacher(x).softmax(1)
            optimizer.zero_grad()
            F.kl_div(student(x).log_softmax(1), answer, reduction="batchmean").backward()
            optimizer.step()
        return accuracy(student)

    ours = sum(learned(dreams, seed) for seed in (0, 1)) / 2
    noise = sum(learned(gaussian(60), seed) for seed in (0, 1)) / 2  # even fresh noise
    assert ours > 0.45 and ours > noise + 0.1


def test_statistics_distance_is_what_it_says() -> None:
    net = nn.Sequential(nn.BatchNorm1d(1, eps=0.0), nn.ReLU()).eval()
    assert statistics_distance(net, torch.tensor([[-1.0], [1.0]])) == pytest.approx(0.0, abs=1e-9)
    assert statistics_distance(net, torch.tensor([[0.0], [6.0]])) == pytest.approx(9 + 4)  # mean 3, deviation 3
    with pytest.raises(ModelError, match="no batch normalization"):
        statistics_distance(nn.Sequential(nn.BatchNorm1d(1, track_running_stats=False), nn.InstanceNorm1d(1)), torch.zeros(2, 1, 3))


def test_a_function_of_the_seed_and_the_batch_that_leaves_everything_as_it_was(teacher: nn.Module) -> None:
    small = EXAMPLE[:8]
    teacher[0].weight.requires_grad_(False)
    teacher[1].train()
    before, random = copy_state(teacher), torch.get_rng_state()
    try:
        a, b = quietly(teacher, small, 2, steps=4), quietly(teacher, (small + 1,), 2, steps=4)
        assert teacher[1].training and not teacher[2].training and not teacher[0].weight.requires_grad
    finally:
        teacher.eval()
        teacher[0].weight.requires_grad_(True)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and not torch.equal(a[0], a[1])
    assert not torch.equal(a[0], quietly(teacher, small, 1, steps=4, seed=1)[0])
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in copy_state(teacher).items())
    assert all(p.grad is None for p in teacher.parameters()) and not any(m._forward_pre_hooks for m in teacher.modules())
    assert all(x.shape == small.shape and x.dtype == small.dtype and not x.requires_grad for x in a)
    with torch.no_grad():
        assert torch.equal(quietly(teacher, small, 1, steps=4)[0], a[0])


@pytest.mark.parametrize("norm,shape", [(nn.BatchNorm1d, (32, 2, 12)), (nn.BatchNorm1d, (32, 2)), (nn.BatchNorm3d, (8, 2, 4, 4, 4))])
def test_other_ranks_match_their_statistics_without_classes(norm: type[nn.BatchNorm1d], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(2) if norm is nn.BatchNorm1d else nn.BatchNorm3d(2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(1))
    net(torch.zeros(shape))
    net[0].running_mean.copy_(torch.tensor([2.0, -1.0]))
    net[0].running_var.copy_(torch.tensor([4.0, 0.25]))
    (x,) = quietly(net, torch.zeros(shape), 1, steps=100)
    dims = [d for d in range(len(shape)) if d != 1]
    torch.testing.assert_close(x.mean(dims), torch.tensor([2.0, -1.0]), atol=0.1, rtol=0.05)
    torch.testing.assert_close(x.std(dims), torch.tensor([2.0, 0.5]), atol=0.05, rtol=0.1)


def test_bounds_and_types_are_kept(teacher: nn.Module) -> None:
    x = quietly(teacher, EXAMPLE[:8], 1, steps=8, bounds=(-1.0, 1.5), mean=[0.1, 0.2, 0.3], scale=2.0)[0]
    assert float(x.min()) >= -1 and float(x.max()) <= 1.5
    x = quietly(network(2).double(), EXAMPLE[:4].double(), 1, steps=2)[0]
    assert x.dtype == torch.float64


def test_without_batch_normalization_there_is_noise_of_the_asked_mean_and_scale() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    example = torch.zeros(64, 2, 16, 16)
    first, second = quietly(net, example, 2, mean=torch.tensor([1.0, -2.0]), scale=[0.5, 2.0])
    both = torch.cat([first, second])
    torch.testing.assert_close(both.mean((0, 2, 3)), torch.tensor([1.0, -2.0]), atol=0.1, rtol=0.1)
    torch.testing.assert_close(both.std((0, 2, 3)), torch.tensor([0.5, 2.0]), atol=0.05, rtol=0.05)
    z = (both - torch.tensor([1.0, -2.0]).reshape(1, 2, 1, 1)) / torch.tensor([0.5, 2.0]).reshape(1, 2, 1, 1)
    alike = (z[..., 1:] * z[..., :-1]).mean((1, 2, 3))  # correlation of neighbours: none in white noise
    assert float(alike.max()) > 0.5 and float(alike.min()) < 0.1
    assert not torch.equal(first, second) and torch.equal(first, quietly(net, example, 1, mean=[1.0, -2.0], scale=[0.5, 2.0])[0])


def test_ids_lie_below_the_size_of_the_embedding_that_reads_them() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.word = nn.Embedding(5, 4), nn.Embedding(11, 4, padding_idx=3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.word(ids) + self.place(torch.arange(ids.shape[1]))

    example = torch.zeros(40, 5, dtype=torch.int64)
    (ids,) = quietly(Words(), example, 1)
    assert ids.dtype == torch.int64 and ids.shape == example.shape
    assert set(ids.flatten().tolist()) == set(range(11)) - {3}
    (ids,) = quietly(nn.Flatten(), example.int(), 1, vocabulary=4)
    assert ids.dtype == torch.int32 and set(ids.flatten().tolist()) == {0, 1, 2, 3}
    with pytest.raises(DataError, match="vocabulary="):
        quietly(nn.Flatten(), example, 1)


def test_the_warning_is_always_given(teacher: nn.Module) -> None:
    embedding = nn.Embedding(4, 2)
    for model, example in ((teacher, EXAMPLE[:4]), (nn.Linear(3, 2), torch.zeros(2, 3)), (embedding, torch.zeros(2, 3, dtype=torch.int64))):
        with pytest.warns(UserWarning, match="measure it on real data"):
            generate(model, example, 1, steps=1)


class Needy(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask


class Cut(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize(
    "model,example,settings,error,said",
    [
        (nn.Linear(3, 2), "text", {}, DataError, "one tensor"),
        (nn.Linear(3, 2), (torch.zeros(2, 3), torch.zeros(2, 3)), {}, DataError, "one input"),
        (nn.Linear(3, 2), torch.tensor(1.0), {}, DataError, "a batch"),
        (nn.Linear(3, 2), torch.zeros(2, 4), {}, ModelError, "does not run"),
        (Needy(), torch.zeros(2, 4), {}, ModelError, "one input"),
        (nn.Linear(3, 2), torch.zeros(2, 3), {"steps": 0}, DataError, "steps"),
        (nn.Linear(3, 2), torch.zeros(2, 3), {"mean": [1.0, 2.0]}, DataError, "3 channels"),
        (nn.Linear(3, 2), torch.zeros(2, 3), {"scale": 0.0}, DataError, "scale"),
        (nn.Linear(3, 2), torch.zeros(2, 3), {"bounds": (1.0, 0.0)}, DataError, "bounds"),
        (nn.BatchNorm2d(3), torch.zeros(2, 3, 8, 8), {"classes": True}, DataError, "classes=True"),
        (Cut(nn.BatchNorm1d(3)), torch.zeros(4, 3), {}, ModelError, "no gradient"),
        (nn.BatchNorm1d(3), torch.zeros(4, 3), {"mean": float("nan")}, ModelError, "batch 0, step 0"),
    ],
)
def test_what_cannot_be_done_is_said(model: nn.Module, example: Any, settings: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        quietly(model, example, 1, **settings)
