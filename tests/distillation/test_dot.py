"""DOT: two momenta, kept apart through accumulation, clipping, checkpoints and many processes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.data import Call, Data
from shohin.distillation import Dot, FeatureTap, Loss, distill, distillation_objective
from shohin.errors import DataError
from shohin.training import TrainConfig, train

sys.path.insert(0, str(Path(__file__).parent))
import dotted

from two_processes import run_both

torch.set_num_threads(1)


@pytest.mark.parametrize("delta", [0.0, 0.05, 0.09])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_equals_plain_numpy(delta: float, decay: float) -> None:
    """Quadratic losses, whose gradients are known without autograd."""
    g = torch.Generator().manual_seed(3)
    a, b, start = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(3))
    p = nn.Parameter(start.clone())
    optimizer = Dot([p], lr=0.05, momentum=0.9, delta=delta, weight_decay=decay)
    expected, v_task, v_teacher = start.numpy().copy(), np.zeros(5), np.zeros(5)
    for _ in range(7):
        optimizer.zero_grad()
        optimizer.backward((p - a).square().sum(), 0.5 * (p - b).pow(4).sum())
        optimizer.step()
        g_task, g_teacher = 2 * (expected - a.numpy()) + decay * expected, 2 * (expected - b.numpy()) ** 3
        v_task = (0.9 - delta) * v_task + g_task
        v_teacher = (0.9 + delta) * v_teacher + g_teacher
        expected = expected - 0.05 * (v_task + v_teacher)
    assert np.allclose(p.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_delta_it_is_sgd(clip: float | None, accumulate: int) -> None:
    """In the one loop, in float64, on the summed loss, with clipping and unequal accumulated batches; and delta changes that."""
    ends = {}
    for delta in (None, 0.0, 0.07):
        net = dotted.model(0)
        teacher, data = dotted.model(9), Data(dotted.batches(slice(None)))
        config = TrainConfig(epochs=3, lr=0.05, optimizer="sgd", clip=clip, accumulate=accumulate)
        own = (lambda named: torch.optim.SGD(named, 0.05, 0.9)) if delta is None else (lambda named, d=delta: Dot(named, 0.05, 0.9, d))
        objective = distillation_objective(teacher, alpha=0.4, task_loss=data.batch_loss, apart=delta is not None)
        result = train(net, data, objective, config, optimizer=own)
        ends[delta] = (torch.cat([p.detach().reshape(-1) for p in net.parameters()]), [r.loss for r in result.history])
        assert set(result.history[0].terms) == {"task", "kd"}
    assert torch.allclose(ends[None][0], ends[0.0][0], rtol=1e-12, atol=1e-12)
    assert ends[None][1] == pytest.approx(ends[0.0][1], rel=1e-12)
    assert not torch.allclose(ends[None][0], ends[0.07][0], atol=1e-5)


def test_both_gradients_are_clipped_by_one_factor() -> None:
    """The loop against a loop by hand, in which the two gradients are asked for one by one."""
    net, data = dotted.model(0), Data(dotted.batches(slice(None)))
    teacher = dotted.model(9)
    objective = distillation_objective(teacher, alpha=0.4, task_loss=data.batch_loss, apart=True)
    config = TrainConfig(epochs=2, lr=0.05, optimizer="sgd", clip=0.2, schedule="constant", warmup=0.0)
    train(net, data, objective, config, optimizer=lambda named: Dot(named, 0.05, 0.9, 0.07))

    hand = dotted.model(0)
    params = list(hand.parameters())
    v = {k: [torch.zeros_like(p) for p in params] for k in ("task", "teacher")}
    for _ in range(2):
        for x, y in dotted.batches(slice(None)):
            out = hand(x)
            task = torch.autograd.grad(0.4 * F.cross_entropy(out, y), params, retain_graph=True)
            log_s, log_t = F.log_softmax(out / 2, 1), F.log_softmax(teacher(x).detach() / 2, 1)
            taught = torch.autograd.grad(0.6 * 4 * F.kl_div(log_s, log_t, log_target=True, reduction="batchmean"), params)
            norm = torch.cat([(a + b).reshape(-1) for a, b in zip(task, taught, strict=True)]).norm()
            factor = min(1.0, 0.2 / (float(norm) + 1e-6))
            with torch.no_grad():
                for i, p in enumerate(params):
                    v["task"][i] = 0.83 * v["task"][i] + factor * task[i]
                    v["teacher"][i] = 0.97 * v["teacher"][i] + factor * taught[i]
                    p -= 0.05 * (v["task"][i] + v["teacher"][i])
    for p, q in zip(net.parameters(), params, strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-10)


def test_own_loop_with_loss() -> None:
    """`Loss`, `Dot.backward`, `Dot.clip`: what the loop of the library does."""
    teacher, net, data = dotted.model(9), dotted.model(0), Data(dotted.batches(slice(None)))
    config = TrainConfig(epochs=1, lr=0.05, clip=0.2, schedule="constant", warmup=0.0)
    objective = distillation_objective(teacher, alpha=0.5, task_loss=data.batch_loss, apart=True)
    train(net, data, objective, config, optimizer=lambda named: Dot(named, 0.05, 0.9, 0.05))
    own = dotted.model(0)
    answers = Loss(teacher)
    optimizer = Dot(own.parameters(), lr=0.05, momentum=0.9, delta=0.05)
    for x, y in dotted.batches(slice(None)):
        own.zero_grad()  # not the optimizer's: what is left of the last step must not count again
        out = own(x)
        optimizer.backward(0.5 * F.cross_entropy(out, y), 0.5 * answers(out, x))
        optimizer.clip(0.2)
        optimizer.step()
    for p, q in zip(net.parameters(), own.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-12)


def test_distill_learns_and_adapters_take_the_plain_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    from shohin.distillation import dot as room

    made: list[Dot] = []
    init = Dot.__init__

    def spy(self: Dot, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(room.Dot, "__init__", spy)
    data = Data([(x.float(), y) for x, y in dotted.batches(slice(None))])
    teacher, student = dotted.model(9, 8).float(), dotted.model(0).float()
    config = TrainConfig(epochs=8, lr=0.05, optimizer="sgd", weight_decay=1e-3)
    taps = [FeatureTap("0", dim=-1)]
    before = data.quality(student)
    result = distill(student, teacher, data, config=config, alpha=0.5, feature_weight=0.1, taps=taps, dot=0.075)
    assert result.best_quality is not None and result.best_quality > before
    groups = [(g["delta"], g["weight_decay"], len(g["params"])) for g in made[-1].param_groups]
    assert groups == [(0.075, 1e-3, 2), (0.075, 0.0, 2), (0.0, 1e-3, 1), (0.0, 0.0, 1)]
    assert not any(name.startswith("adapters") for name in result.state)


def test_resume_is_exact(tmp_path: Path) -> None:
    def run(epochs: int, path: Path | None) -> nn.Module:
        net, data = dotted.model(0), Data(dotted.batches(slice(None)))
        config = TrainConfig(epochs=4, lr=0.05, optimizer="sgd", clip=0.5)
        objective = distillation_objective(dotted.model(9), alpha=0.4, task_loss=data.batch_loss, apart=True)
        seen = 0

        def stop(record: object) -> None:
            nonlocal seen
            seen += 1
            if seen == epochs + 1:
                raise KeyboardInterrupt

        try:
            train(net, data, objective, config, checkpoint=path, optimizer=lambda n: Dot(n, 0.05, 0.9, 0.08), callbacks=[stop])
        except KeyboardInterrupt:
            assert path is not None
        return net

    path = tmp_path / "c.safetensors"
    run(2, path)
    kept = [name for name in load_file(path) if name.startswith("optimizer")]
    assert len(kept) == 2 * len(list(dotted.model(0).parameters())), kept  # both momenta
    resumed, whole = run(9, path), run(9, None)
    for p, q in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Unequal shares of each batch: both gradients are means over all samples."""
    run_both(dotted.__file__, tmp_path / "meeting", tmp_path)
    alone = dotted.run(slice(None))
    for rank in (0, 1):
        for p, q in zip(alone.parameters(), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_either_gradient_that_is_not_finite_stops(which: int) -> None:
    """Losses that are finite, with a gradient that is not: the square root of zero."""
    net, data = dotted.model(0), Data(dotted.batches(slice(None)))

    def objective(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        out = model(*call.args)
        good, bad = out.square().mean(), (out * 0).square().sum().sqrt()
        return torch.stack([bad, good] if which == 0 else [good, bad]), {}

    with pytest.raises(DataError, match=r"gradient of .* became NaN or Inf at step 0"):
        train(net, data, objective, TrainConfig(epochs=1), optimizer=lambda named: Dot(named, 0.1))


def test_what_is_not_supported_is_said() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(DataError, match="delta <= momentum"):
        Dot([p], momentum=0.9, delta=0.1)
    with pytest.raises(DataError, match="delta <= momentum"):
        Dot([{"params": [p], "momentum": 0.05}], delta=0.09)
    optimizer = Dot([p])
    p.square().sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(DataError, match=r"optimizer\.backward\(task, teacher\) in place of"):
        optimizer.step()
    with pytest.raises(DataError, match="no closure"):
        optimizer.step(lambda: None)
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = Dot(table.parameters())
    optimizer.backward(table(torch.tensor([1])).sum(), table(torch.tensor([2])).sum())
    with pytest.raises(DataError, match="sparse"):
        optimizer.step()
    teacher, student, data = dotted.model(9), dotted.model(0), Data(dotted.batches(slice(None)))
    with pytest.raises(DataError, match="asks for 'adamw'"):
        distill(student, teacher, data, alpha=0.5, dot=0.075)
    sgd = TrainConfig(epochs=1, optimizer="sgd")
    with pytest.raises(DataError, match="0 < alpha < 1"):
        distill(student, teacher, data, config=sgd, dot=0.075)
    with pytest.raises(DataError, match="not both"):
        distill(student, teacher, data, config=sgd, alpha=0.5, dot=0.075, optimizer=torch.optim.SGD)
    with pytest.raises(DataError, match=r"a loss of shape \[2\]; got \(\)"):
        train(student, data, distillation_objective(teacher), sgd, optimizer=lambda named: Dot(named, 0.1))
