"""The losses of other libraries as objectives of `shohin.training.train`: their code, with the settings that they publish.

``python benchmarks/distilling/peers.py`` runs three steps of every method whose library is installed and names those that are not.
Each library has an environment of its own, see ``benchmarks/peers/``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from shohin.data import Call, Data, first_output
from shohin.distillation import Teacher, recorded
from shohin.errors import DataError
from shohin.training import Objective, TrainConfig, train
from sweep.torchvision_schemas import torchvision_models

Terms = dict[str, dict[str, Any]]

#: what torchdistill's configurations say of logits
LOGITS = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".", "teacher_module_io": "output"}
TASK = {
    "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
    "criterion_wrapper": {
        "key": "SimpleLossWrapper",
        "kwargs": {"input": {"is_from_teacher": False, "module_path": ".", "io": "output"}, "target": {"uses_label": True}},
    },
    "weight": 1.0,
}


def _term(key: str, settings: dict[str, Any], weight: float = 1.0) -> dict[str, Any]:
    return {"criterion": {"key": key, "kwargs": settings}, "weight": weight}


def _kd(temperature: float, alpha: float) -> dict[str, Any]:
    return _term("KDLoss", {**LOGITS, "temperature": temperature, "alpha": alpha, "reduction": "batchmean"})


_PATHS = {"teacher_output_path": "feature", "student_output_path": "feature"}
_BATCHMEAN = {"reduction": "batchmean"}
_MODULES = {f"{who}_module_{what}": value for who in ("student", "teacher") for what, value in (("path", "feature"), ("io", "output"))}
#: method -> the ``sub_terms`` of torchdistill's WeightedSumLoss, as in the configurations named, of configs/ in its repository (1.1.5).
#: "feature" stands for the module whose output is compared; alpha of KDLoss is the weight of the labels.
TORCHDISTILL: dict[str, Terms] = {
    # sample/cifar10/kd/*-final_run.yaml and sample/cifar100/kd/*-final_run.yaml
    "kd": {"kd": _kd(4.0, 0.9)},
    # official/ilsvrc2012/yoshitomo-matsubara/kd-resnet18_from_resnet34.yaml
    "kd_imagenet": {"kd": _kd(1.0, 0.5)},
    # in no configuration of the library, but a usual choice elsewhere
    "kd_even": {"kd": _kd(4.0, 0.5)},
    # sample/ilsvrc2012/kd_w_ls/resnet18_from_resnet34.yaml: logit standardization (Sun et al., 2024, 2403.01427)
    "logit_std": {"kd": _term("LogitStdKDLoss", {**LOGITS, **_BATCHMEAN, "temperature": 2.0, "alpha": 0.5, "beta": 9})},
    # sample/ilsvrc2012/dist/resnet18_from_resnet34.yaml
    "dist": {"ce": TASK, "dist": _term("DISTLoss", {**LOGITS, "beta": 1.0, "gamma": 1.0, "tau": 1.0}, 2.0)},
    # sample/ilsvrc2012/pkt/resnet18_from_resnet152.yaml: on the input of the classifier; no labels
    "pkt": {"pkt": _term("PKTLoss", {**_MODULES, "eps": 1e-7}, 30000.0)},
    # sample/ilsvrc2012/rkd/resnet18_from_resnet34.yaml: on the last stage, beside the labels
    "rkd": {"kd": _kd(1.0, 1.0), "rkd": _term("RKDLoss", {**_PATHS, "dist_factor": 1.0, "angle_factor": 2.0, "reduction": "mean"})},
    # sample/ilsvrc2012/spkd/resnet18_from_resnet34.yaml: on the last stage
    "spkd": {"ce": TASK, "spkd": _term("SPKDLoss", {**_PATHS, **_BATCHMEAN})},
}
NEED_FEATURES = ("pkt", "rkd", "spkd")

#: method -> arguments of ModelOpt's LogitsDistillationLoss; always with its default StaticLossBalancer (half the student's own loss)
MODELOPT: dict[str, dict[str, Any]] = {
    # docs/source/guides/4_distillation.rst, "Convert and integrate": all defaults (temperature 1; the mean is over samples and classes)
    "kd_loss": {},
    # what an attentive user would set: Hinton's temperature, and the divergence of distributions (a mean over samples alone)
    "kd_loss_batchmean": {"temperature": 4.0, "reduction": "batchmean"},
}
METHODS = (*(f"torchdistill:{name}" for name in TORCHDISTILL), *(f"modelopt:{name}" for name in MODELOPT))


def objective(method: str, teacher: Teacher, classes: int, features: tuple[str, str] | None = None) -> Objective:
    """A peer's method on the logits (and features) that the teacher remembers, so that all methods are taught the same.

    Args:
        method: one of `METHODS`.
        teacher: for methods of `NEED_FEATURES`, made with the name of its module.
        classes: of the task; both models' logits must have them.
        features: modules of the student and of the teacher whose outputs are compared; pooled features for "pkt", else the last stage.

    Raises:
        DataError: for an unknown method, logits of other shapes, or features that are not given.
        ImportError: if the library is not installed in this environment.
    """
    library, _, name = method.partition(":")
    if method not in METHODS:
        raise DataError(f"unknown method {method!r}; known: {', '.join(METHODS)}. torchdistill 1.1.5 has neither DKD nor SRRL")
    if library == "modelopt":
        return _modelopt(name, teacher, classes)
    if name in NEED_FEATURES and features is None:
        raise DataError(f"{method} compares features: give features=(module of the student, module of the teacher)")
    return _torchdistill(name, teacher, classes, features if name in NEED_FEATURES else None)


def _torchdistill(name: str, teacher: Teacher, classes: int, features: tuple[str, str] | None) -> Objective:
    torchvision_models()  # torchdistill imports it
    for level in ("mid", "high"):
        import_module(f"torchdistill.losses.{level}_level")  # registers the losses
    registry: Any = import_module("torchdistill.losses.registry")
    criterion = registry.get_high_level_loss({"key": "WeightedSumLoss", "kwargs": {"sub_terms": TORCHDISTILL[name]}})
    values: dict[str, float] = {}
    for term, (part, weight) in criterion.term_dict.items():
        part.register_forward_hook(_keeper(values, term, weight))
    taps = [] if features is None else [features[0]]

    def objective(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with recorded(model, taps) as found:
            student = _checked(first_output(model(*call.args, **call.kwargs)), classes, "student")
        known, seen = teacher(call)
        io: dict[str, dict[str, dict[str, Tensor]]] = {
            "student": {".": {"output": student}},
            "teacher": {".": {"output": _checked(known, classes, "teacher")}},
        }
        if features is not None:
            io["student"]["feature"] = {"output": found[features[0]][0]}
            io["teacher"]["feature"] = {"output": seen[features[1]][0]}
        return criterion(io, {}, call.target), dict(values)

    return objective


def _keeper(values: dict[str, float], term: str, weight: float) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        values[term] = weight * float(output.detach())

    return keep


class _Answers(nn.Module):
    """A teacher without weights, that ModelOpt can hold: it asks a `Teacher`."""

    def __init__(self, teacher: Teacher, classes: int) -> None:
        super().__init__()
        self.teacher, self.classes = teacher, classes

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits."""
        return _checked(self.teacher(Call(args, kwargs, None, None))[0], self.classes, "teacher")


class _Student(nn.Module):
    """The student inside a module that ModelOpt may convert in place: the student itself stays what it is (and may be an
    `nn.Sequential`, to which ModelOpt would add a child that has no forward)."""

    def __init__(self, student: nn.Module, classes: int) -> None:
        super().__init__()
        self.student, self.classes = student, classes

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits."""
        return _checked(first_output(self.student(*args, **kwargs)), self.classes, "student")


def _modelopt(name: str, teacher: Teacher, classes: int) -> Objective:
    with _quiet():
        mtd: Any = import_module("modelopt.torch.distill")
    converted: dict[int, Any] = {}

    def convert(model: nn.Module) -> Any:
        with _quiet():
            settings = {
                "teacher_model": _Answers(teacher, classes),
                "criterion": mtd.LogitsDistillationLoss(**MODELOPT[name]),
                "loss_balancer": mtd.StaticLossBalancer(),
            }
            return mtd.convert(_Student(model, classes), mode=[("kd_loss", settings)])

    def objective(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if id(model) not in converted:
            converted[id(model)] = convert(model)
        distilled = converted[id(model)]
        task = F.cross_entropy(distilled(*call.args, **call.kwargs), call.target)
        with _quiet():  # of the mean over classes
            loss = distilled.compute_kd_loss(student_loss=task)
        weight = sum(distilled.loss_balancer._kd_loss_weight)
        return loss, {"task": (1 - weight) * task.item(), "kd": loss.item() - (1 - weight) * task.item()}

    return objective


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _checked(logits: Tensor, classes: int, whose: str) -> Tensor:
    if logits.dim() != 2 or logits.shape[1] != classes:
        raise DataError(f"logits must be [N, {classes}]; the {whose} gives {tuple(logits.shape)}")
    return logits


def _network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def main() -> int:
    """Three steps of each method on random data: the mean of each term, and which libraries are missing."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    data = Data([(torch.randn(8, 1, 10, 10, generator=g), torch.randint(0, 4, (8,), generator=g)) for _ in range(3)])
    missing: dict[str, str] = {}
    for method in METHODS:
        library, _, name = method.partition(":")
        if library in missing:
            continue
        layer = "3" if name == "pkt" else "1"
        teacher = Teacher(_network(16, 1), [layer] if name in NEED_FEATURES else [])
        try:
            made = objective(method, teacher, 4, (layer, layer))
        except ImportError as error:
            missing[library] = str(error)
            continue
        student = _network(6, 0)
        result = train(student, data, made, TrainConfig(epochs=1), evaluate=data.quality)
        epoch = result.history[-1]
        terms = ", ".join(f"{term} {value:.4f}" for term, value in epoch.terms.items())
        print(f"{method:28s} {epoch.steps} steps, loss {epoch.loss:.4f}: {terms}; {teacher.misses} answers of the teacher", flush=True)
    for library, said in missing.items():
        print(f"{library}: cannot be imported here ({said}); see benchmarks/peers/{library}.txt")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
