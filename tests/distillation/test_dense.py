"""Dense prediction: where classes stand is told by the labels, for losses, metrics, ensembles and comparisons alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from shohin.data import Call, Data, class_axis
from shohin.distillation import Ensemble, distillation_objective, divergence, losses
from shohin.distillation.named import classes_at
from shohin.errors import DataError
from shohin.evidence import Divergence
from shohin.pruning.saliency import sampled_loss

torch.set_num_threads(1)
CLASSES = 3


def segmenter(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, CLASSES, 1))


def maps(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``[N, 2, 6, 8]`` and a class for each pixel: which channel is larger there, or neither."""
    x = torch.randn(count, 2, 6, 8, generator=torch.Generator().manual_seed(seed))
    first = F.avg_pool2d(x, 3, 1, 1)
    return x, torch.where(first.abs().amax(1) < 0.25, 2, first.argmax(1))


SHAPES = {
    "classes": ((4, CLASSES), (4,), -1),
    "words": ((4, 5, CLASSES), (4, 5), -1),
    "signals": ((4, CLASSES, 5), (4, 5), 1),
    "pixels": ((4, CLASSES, 5, 6), (4, 5, 6), 1),
    "voxels": ((4, CLASSES, 5, 6, 2), (4, 5, 6, 2), 1),
    "no labels": ((4, CLASSES), None, -1),
    "maps without labels": ((4, CLASSES, 5, 6), None, None),
    "other labels": ((4, CLASSES, 5), (4, 7), None),
    "one class": ((4, 1), (4,), None),
}


@pytest.mark.parametrize(("scores", "labels", "axis"), SHAPES.values(), ids=SHAPES)
def test_labels_tell_where_the_classes_are(scores: tuple[int, ...], labels: tuple[int, ...] | None, axis: int | None) -> None:
    target = None if labels is None else torch.zeros(labels, dtype=torch.long)
    assert class_axis(torch.zeros(scores), Call((), {}, target, None)) == axis


@pytest.mark.parametrize("shape", [shape for shape, labels, axis in SHAPES.values() if axis is not None and labels])
def test_a_comparison_by_place_is_that_of_rows(shape: tuple[int, ...]) -> None:
    """Distillation, divergence, ensembles and accuracy of scores in any place equal those of ``[rows, classes]``."""
    (axis,) = {a for s, labels, a in SHAPES.values() if s == shape and labels and a is not None}
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=g) for _ in range(2))
    flat = [t.movedim(axis, -1).reshape(-1, CLASSES) for t in (student, teacher)]
    target = flat[1].argmax(1).reshape(teacher.movedim(axis, -1).shape[:-1])
    wanted = losses.kd(flat[0], flat[1], 2.0)

    class Fixed(nn.Module):
        def __init__(self, answer: Tensor) -> None:
            super().__init__()
            self.answer = nn.Parameter(answer)

        def forward(self, x: Tensor) -> Tensor:
            return self.answer + 0 * x.sum()

    x, models = torch.zeros(4, 1), [Fixed(student), Fixed(teacher)]
    data = Data(train=[(x, target)])
    call = next(data.calls("train"))
    found, _ = distillation_objective(models[1], temperature=2.0)(models[0], call, g)
    torch.testing.assert_close(found, wanted)
    plain = float(losses.kd(flat[0], flat[1], 1.0))
    assert divergence(models[0], models[1], data) == pytest.approx(plain, rel=1e-5)
    assert Divergence(models[1], [call])(models[0]) == pytest.approx(plain, rel=1e-5)
    assert data.quality(models[1]) == 1.0
    assert data.quality(models[0]) == pytest.approx(float((flat[0].argmax(1) == flat[1].argmax(1)).float().mean()))
    torch.manual_seed(3)
    likelihood = float(sampled_loss(teacher, call, data, torch.Generator().manual_seed(1)))
    drawn = torch.multinomial(flat[1].softmax(1), 1, generator=torch.Generator().manual_seed(1)).squeeze(1)
    assert likelihood == pytest.approx(float(F.cross_entropy(flat[1], drawn)), rel=1e-5)
    for weights in ("equal", "confidence"):
        both = Ensemble(models, weights, axis)(x)  # type: ignore[arg-type]
        rows = Ensemble([Fixed(f) for f in flat], weights)(x)  # type: ignore[arg-type]
        torch.testing.assert_close(both.movedim(axis, -1).reshape(-1, CLASSES), rows)


def test_without_labels_maps_have_their_classes_first() -> None:
    for shape, axis in (((2, 3, 4, 5), 1), ((2, 3, 4, 5, 6), 1), ((2, 3, 4), -1), ((2, 3), -1)):
        assert classes_at(torch.zeros(shape), Call((), {}, None, None)) == axis
        summed = Ensemble([nn.Identity(), nn.Identity()])(torch.randn(shape)).exp().sum(axis)
        torch.testing.assert_close(summed, torch.ones_like(summed))


def test_labels_that_do_not_count_are_left_out_of_accuracy() -> None:
    x, y = torch.eye(3), torch.tensor([0, -100, 1])
    assert Data(train=[(x, y)]).quality(nn.Identity()) == 0.5
    with pytest.raises(DataError, match="all labels of the validation batches are -100"):
        Data(train=[(x, torch.full((3,), -100))]).quality(nn.Identity())


@pytest.mark.parametrize("labels", [True, False])
def test_a_segmentation_student_learns_from_its_teacher(labels: bool) -> None:
    train, held = [maps(32, i) for i in range(8)], [maps(64, 99)]
    teacher = segmenter(16, 0)
    data = Data(train, held)
    config = shohin.training.TrainConfig(epochs=15, lr=0.02)

    def plain(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return F.cross_entropy(model(*call.args), call.target), {}

    shohin.training.train(teacher, data, plain, config, evaluate=data.quality)
    assert data.quality(teacher.eval()) > 0.8
    own = data if labels else Data([x for x, _ in train], [x for x, _ in held])
    found = shohin.distill(segmenter(8, 1), teacher, own, config=config, inherit=False)
    assert found.model is not None and data.quality(found.model.eval()) > 0.72  # softmax along the width: 0.66
