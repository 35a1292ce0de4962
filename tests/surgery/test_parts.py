"""Models that cannot be captured as a whole: their parts are found, and cut in place, by what they do."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import small_models as models
from shohin.errors import ModelError, PlanError
from shohin.plan import Plan
from shohin.program import ProgramModule
from shohin.surgery.parts import Parts, cut_parts, understand_parts


class Backbone(nn.Module):
    """Convolutions with a residual branch; the outer code reads ``channels``."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 6
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.back, self.last = nn.Conv2d(8, 10, 1), nn.Conv2d(10, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.last(x + self.back(F.relu(self.inner(x))))


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class EarlyExit(nn.Module):
    """Stops early where the first head is sure."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.first, self.second = Head(6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        pooled = features.mean((2, 3)) * (self.backbone.channels / 6)
        early = self.first(pooled)
        if float(early.abs().max()) > 1e6:
            return early
        return self.second(pooled) + early


class Detector(nn.Module):
    """Takes a list of images and keeps, in numpy, the boxes that score."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.heads = Backbone(), nn.ModuleList([Head(6), Head(6)])

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        features = self.backbone(torch.stack(images)).flatten(2).transpose(1, 2)
        scores, boxes = (head(features) for head in self.heads)
        order = np.argsort(-scores[..., 0].detach().numpy(), axis=1)
        return [{"scores": s[o[:5]], "boxes": b[o[:5]]} for s, b, o in zip(scores, boxes, map(torch.from_numpy, order), strict=True)]


class Opaque(nn.Module):
    """A scripted module in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Head(6), Head(4)
        self.opaque = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.opaque(self.before(x)))


class Reading(nn.Module):
    """The outer code uses weights that belong to a part, and ends in a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.other = Head(6), Head(4)
        self.other.b.weight = nn.Parameter(torch.randn(4, 7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(self.part(x)) + self.part.a.weight.sum()
        return y if y.sum() > -1e9 else -y


class Pyramid(nn.Module):
    """One module on maps of two sizes; another that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.idle, self.head = Backbone(), Head(6), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.shared(x).mean((2, 3)), self.shared(F.avg_pool2d(x, 2)).mean((2, 3))], 1)
        return self.head(y) if y.max().item() < 1e9 else y


def image() -> tuple[Tensor]:
    return (torch.randn(1, 3, 8, 8).double(),)


def built(model: nn.Module, example: tuple[object, ...]) -> tuple[nn.Module, Parts]:
    model = models.lively(model)
    return model, understand_parts(model, example)


def zeroed(model: nn.Module, pairs: dict[str, tuple[int, ...]], axis: int = 1) -> nn.Module:
    """The original with consuming slices at zero: parameter -> removed indices of its input axis."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, gone in pairs.items():
            model.get_parameter(name).index_fill_(axis, torch.tensor(gone), 0)
    return model


def test_parts_of_a_model_with_an_early_exit() -> None:
    torch.manual_seed(0)
    _, parts = built(EarlyExit(), image())
    assert list(parts.graphs) == ["backbone", "first", "second"]
    assert {g.name: g.size for g in parts.groups} == {
        "backbone.stem.weight": 8,
        "backbone.inner.weight": 10,
        "first.a.weight": 7,
        "second.a.weight": 7,
    }
    refusal = parts.frozen[0]
    assert refusal.address == "the model" and "early.abs().max()" in refusal.line and "branch" in refusal.reason
    assert any(f.address == "backbone.output" or f.address.startswith("backbone") for f in parts.frozen[1:])


def test_cut_parts_equal_the_model_with_zeroed_consumers() -> None:
    torch.manual_seed(0)
    model, parts = built(EarlyExit(), image())
    before = copy.deepcopy(model.state_dict())
    plans = parts.plans({"backbone.inner.weight": (0, 2, 5), "first.a.weight": (1, 6), "backbone.stem.weight": (0, 1, 2, 3, 4, 6)})
    assert set(plans) == {"backbone", "first"}
    result = cut_parts(model, parts, plans)
    assert type(result.model) is EarlyExit and result.form == "module" and result.proof.holds
    assert result.removed["backbone.inner.weight"] == {0: [1, 3, 4, 6, 7, 8, 9], 1: [5, 7]}
    assert tuple(result.model.backbone.inner.weight.shape) == (3, 6, 1, 1)
    reference = zeroed(
        model,
        {
            "backbone.back.weight": (1, 3, 4, 6, 7, 8, 9),
            "first.b.weight": (0, 2, 3, 4, 5),
            "backbone.inner.weight": (5, 7),
            "backbone.last.weight": (5, 7),
        },
    )
    x = torch.randn(3, 3, 8, 8).double()
    assert torch.allclose(result.model(x), reference(x), rtol=1e-10)
    assert not torch.allclose(result.model(x), model(x))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    own = {t.untyped_storage().data_ptr() for t in result.model.state_dict().values()}
    assert not own & {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in model.parameters())


def test_gradients_flow_through_cut_parts() -> None:
    model, parts = built(EarlyExit(), image())
    result = cut_parts(model, parts, parts.plans({"backbone.inner.weight": (0, 2)}))
    result.model(torch.randn(2, 3, 8, 8).double()).sum().backward()
    assert all(p.grad is not None for p in result.model.parameters())


def test_lists_of_images_and_numpy_between_parts() -> None:
    torch.manual_seed(1)
    images = [torch.randn(3, 8, 8).double() for _ in range(2)]
    model, parts = built(Detector(), (images,))
    assert list(parts.graphs) == ["backbone", "heads.0", "heads.1"]
    assert "numpy" in parts.frozen[0].reason and "argsort" in parts.frozen[0].line
    assert not any(f.address == "heads" for f in parts.frozen)
    result = cut_parts(model, parts, parts.plans({"heads.1.a.weight": (0, 3)}))
    wanted = zeroed(model, {"heads.1.b.weight": (1, 2, 4, 5, 6)})(images)
    for got, other in zip(result.model(images), wanted, strict=True):
        assert torch.allclose(got["scores"], other["scores"]) and torch.allclose(got["boxes"], other["boxes"])


def test_a_scripted_module_is_named_and_stays() -> None:
    model, parts = built(Opaque(), (torch.randn(2, 6).double(),))
    assert list(parts.graphs) == ["before", "after"]
    assert any("opaque" in f.address and "ScriptModule" in f.reason for f in parts.frozen)
    result = cut_parts(model, parts, parts.plans({"before.a.weight": (0, 3), "after.a.weight": (1,)}))
    wanted = zeroed(model, {"before.b.weight": (1, 2, 4, 5, 6), "after.b.weight": (0, 2, 3, 4, 5, 6)})
    x = torch.randn(3, 6).double()
    assert torch.allclose(result.model(x), wanted(x))


def test_weights_that_are_used_outside_their_part_are_frozen() -> None:
    model, parts = built(Reading(), (torch.randn(2, 6).double(),))
    assert [g.name for g in parts.groups] == ["other.a.weight"]
    assert any(f.address == "part.a.weight" and "used outside 'part'" in f.reason for f in parts.frozen)
    result = cut_parts(model, parts, parts.plans({"other.a.weight": (2, 3)}))
    x = torch.randn(3, 6).double()
    assert torch.allclose(result.model(x), zeroed(model, {"other.b.weight": (0, 1, 4, 5, 6)})(x))


def test_tensors_tied_across_parts_stay_whole_and_tied() -> None:
    model = EarlyExit()
    model.second.a.weight = model.first.a.weight
    model, parts = built(model, image())
    assert {g.name for g in parts.groups} == {"backbone.stem.weight", "backbone.inner.weight"}
    result = cut_parts(model, parts, parts.plans({"backbone.inner.weight": (0, 2)}))
    assert result.model.second.a.weight is result.model.first.a.weight


def test_modules_with_several_shapes_and_idle_modules_are_named() -> None:
    _, parts = built(Pyramid(), image())
    assert "head" in parts.graphs and not any(path == "shared" for path in parts.graphs)
    reasons = {f.address: f.reason for f in parts.frozen}
    assert "2 different shapes" in reasons["shared"] and "not called" in reasons["idle"]


def test_a_model_that_fails_after_its_parts_keeps_its_failure() -> None:
    class Broken(EarlyExit):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise NotImplementedError("there is no kernel here")

    model, parts = built(Broken(), image())
    assert "no kernel" in parts.failure and set(parts.graphs) == {"backbone", "first", "second"}
    result = cut_parts(model, parts, parts.plans({"first.a.weight": (0,)}))
    with pytest.raises(NotImplementedError, match="no kernel"):
        result.model(*image())


class Peeking(EarlyExit):
    """The outer code wants to see all channels of a module inside a part."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.backbone.inner.out_channels != 10:
            raise ValueError("ten channels, please")
        return out


def test_outer_code_that_does_not_follow_is_an_error() -> None:
    model, parts = built(Peeking(), image())
    with pytest.raises(ModelError, match=r"parts cut.*ten channels"):
        cut_parts(model, parts, parts.plans({"backbone.inner.weight": (0, 2)}))


class Counted(nn.Module):
    """Its class cannot be repaired: a count is read off the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 3.0
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        return self.b(x / x.shape[-1])


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Counted()

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x) * self.part.scale
        return y if y.sum().item() > -1e9 else -y


def test_a_part_in_program_form_keeps_what_is_read_off_it() -> None:
    model, parts = built(Around(), (torch.randn(2, 6).double(),))
    result = cut_parts(model, parts, parts.plans({"part.a.weight": (0, 1, 5)}))
    assert result.form == "program" and isinstance(result.model.part, ProgramModule) and result.reason.startswith("part: ")
    x = torch.randn(3, 6).double()
    assert torch.allclose(result.model(x), zeroed(model, {"part.b.weight": (2, 3, 4, 6, 7)})(x))


def test_names_and_paths_that_do_not_exist_are_refused() -> None:
    model, parts = built(EarlyExit(), image())
    with pytest.raises(PlanError, match=r"backbone\.iner\.weight.*did you mean"):
        parts.plans({"backbone.iner.weight": (0,)})
    with pytest.raises(PlanError, match="not a part"):
        cut_parts(model, parts, {"backbon": Plan("")})
    with pytest.raises(PlanError, match="another model"):
        cut_parts(model, parts, {"backbone": Plan("0" * 32, {"inner.weight": (0,)})})


def test_a_model_without_any_part_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match=r"no part.*x\.sum\(\) > 0"):
        understand_parts(models.Branching(), (torch.randn(2, 6),))


def test_skipped_regions_of_parts() -> None:
    model, parts = built(EarlyExit(), image())
    assert parts.regions == ("backbone/add.0",)
    result = cut_parts(model, parts, parts.plans({}, parts.regions))
    assert result.form == "program"
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        wanted.backbone.back.weight.zero_()
        wanted.backbone.back.bias.zero_()
    x = torch.randn(3, 3, 8, 8).double()
    assert torch.allclose(result.model(x), wanted(x))


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_a_detector_of_torchvision_is_cut_in_its_backbone() -> None:
    """Its region pooling may have no kernel here: the parts before it were seen."""
    from sweep.torchvision_schemas import torchvision_models

    torch.manual_seed(0)
    detection = torchvision_models().detection
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, min_size=64, max_size=64).eval()
    parts = understand_parts(model, ([torch.rand(3, 64, 64)],))
    assert {"backbone", "rpn.head"} <= set(parts.graphs)
    assert any("ImageList" in f.reason for f in parts.frozen if f.address == "rpn")
    assert len(parts.graphs["backbone"].groups) > 20
    result = cut_parts(model, parts, parts.plans({g.name: range((g.size + 1) // 2) for g in parts.groups}))
    assert result.proof.holds and type(result.model) is type(model)
    assert sum(p.numel() for p in result.model.backbone.parameters()) < 0.6 * sum(p.numel() for p in model.backbone.parameters())


class Measuring(EarlyExit):
    """The outer code reads the size of a weight inside a part."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.first.a.weight.shape[0]


def test_sizes_that_are_read_outside_their_part_are_frozen() -> None:
    model, parts = built(Measuring(), image())
    assert "first.a.weight" not in {g.name for g in parts.groups} and "second.a.weight" in {g.name for g in parts.groups}
    result = cut_parts(model, parts, parts.plans({"second.a.weight": (0, 5)}))
    x = torch.randn(3, 3, 8, 8).double()
    assert torch.allclose(result.model(x), zeroed(model, {"second.b.weight": (1, 2, 3, 4, 6)})(x))
