"""The verbs beside `optimize`: each combines rooms and returns a `Candidate`; none changes the user's model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from shohin.addresses import match
from shohin.budget import Budget
from shohin.candidate import Candidate, Measurement, Metrics
from shohin.data import Call, Data
from shohin.errors import CaptureError, DataError, ModelError, PlanError, RunError
from shohin.graph import Graph
from shohin.graph.describe import layer_details
from shohin.graph.memory import Memory, memory
from shohin.plan import Plan
from shohin.program import capture, unfold_state
from shohin.result import Result
from shohin.surgery import Parts, understand_parts
from shohin.surgery import understand as _understand
from shohin.targets import Target, get_target
from shohin.training.randomness import generators_of, isolated, mix, seed_everything

if TYPE_CHECKING:
    from shohin.distillation import Teacher
    from shohin.training import TrainConfig

#: graphs of models that `understand` has seen, so that `cut(model, plan)` needs no example again
_GRAPHS: weakref.WeakKeyDictionary[nn.Module, Graph | Parts] = weakref.WeakKeyDictionary()


def understand(model: nn.Module, example: Any) -> Graph | Parts:
    """What can be chosen in a model: ``.groups``, ``.regions``, ``.sites``, ``.costs``, ``.frozen``.

    A model that cannot be captured as a whole (a branch or a size that depends on values) gives `Parts`: the groups and
    regions of the largest sub-modules that can, and in ``.frozen`` what refused, and why. `cut` takes plans for either.

    Args:
        example: arguments of one call: a tensor, a tuple, or a `shohin.Data`. Dimension 0 is the batch.

    Raises:
        ModelError: if the model does not run on the example or cannot be captured.
    """
    call = _call(example)
    try:
        graph: Graph | Parts = _understand(model, call)
    except CaptureError:
        graph = understand_parts(model, call)
        if not graph.groups and not graph.regions:
            raise
    _GRAPHS[model] = graph
    return graph


def _whole(model: nn.Module, example: Any) -> Graph:
    """The graph of a model that must be captured as a whole."""
    graph = _understand(model, _call(example))
    _GRAPHS[model] = graph
    return graph


def _call(example: Any) -> Any:
    if isinstance(example, Data):
        with _seeded(example, 0):
            return example.example()
    return (example,) if isinstance(example, Tensor) else example


@contextmanager
def _seeded(data: Data, seed: int) -> Iterator[None]:
    """Inside, everything random, the loaders' order too, comes from the seed; afterwards it is as before."""
    generators = generators_of(data.train, data.validation)
    with isolated(generators):
        seed_everything(mix(seed), generators)
        yield


def _checked(data: Any) -> Data:
    if not isinstance(data, Data):
        raise DataError(
            f"data must be a shohin.Data, not {type(data).__name__}: write shohin.Data(train=loader) or shohin.Data(example=(x,))"
        )
    return data


def _graph(model: nn.Module, example: Any) -> Graph | Parts:
    if example is not None:
        return understand(model, example)
    if model not in _GRAPHS:
        raise ModelError("this model has not been understood yet: give example=(x,), or call shohin.understand(model, (x,)) first")
    return _GRAPHS[model]


def cut(model: nn.Module, plan: Plan, example: Any = None) -> nn.Module:
    """A physically smaller copy: the user's own class where it could be repaired and proved, else the program as a module.

    Args:
        plan: its widths and skips are applied; formats are for `quantize` and `export`.
        example: arguments of one call; not needed after `understand`.

    Raises:
        PlanError: if the plan is for another model. ModelError: if there is no example, if the model has changed since it was
            understood, or if what comes out cannot be proved to be what the plan means.
    """
    from shohin.surgery import cut as cut_
    from shohin.surgery import cut_parts

    if not isinstance(plan, Plan):
        raise PlanError(f"plan must be a shohin.Plan, not {type(plan).__name__}: Plan(graph.program.fingerprint, {{group: kept units}})")
    graph = _graph(model, example)
    made = cut_parts(model, graph, graph.split(plan)) if isinstance(graph, Parts) else cut_(model, graph, plan)
    if not made.proof.holds:
        raise ModelError(
            f"the cut could not be proved ({made.proof.where}, relative error {made.proof.error:.1e}): keep more units of groups that a "
            "normalization or a standard deviation sees, and give an example with usual values"
        )
    return made.model


def view(model: nn.Module, plan: Plan, example: Any = None) -> nn.Module:
    """The model seen through a plan, as a program with sliced tensors. Arguments and errors as for `cut`."""
    from shohin.surgery import view as view_

    graph = _graph(model, example)
    if isinstance(graph, Parts):
        raise ModelError("a model that is captured by its sub-modules has no program of its own to view: use shohin.cut(model, plan)")
    return view_(graph, plan)


def prune(
    model: nn.Module,
    data: Data,
    keep: float = 0.5,
    of: str = "macs",
    criterion: str = "taylor",
    granularity: str = "channel",
    recover: str | None = "auto",
    *,
    epochs: int = 5,
    align: int = 8,
    uniform: bool = False,
    seed: int = 0,
) -> Candidate:
    """Removes units so that at most ``keep`` of the model's ``of`` is left.

    Args:
        keep: share in (0, 1].
        of: "macs" or "params".
        criterion: "taylor" (expected loss of removal, needs batches) or "magnitude" (squared weights of the producing
            slices; Data(example=(x,)) is enough).
        granularity: "channel" (any unit group: channels, heads, neurons).
        recover: None; "compensate" (layer-wise least squares and new normalization statistics, unlabelled batches);
            "distill" (that, then ``epochs`` of distillation from the original); or "auto": "compensate" if ``data`` has
            batches, else None.
        align: kept channels are multiples of this.
        uniform: for a model of Hugging Face ``transformers``: the same share in all layers, which its configuration can express,
            so that ``save_pretrained`` and ``from_pretrained`` work. ``align`` is not used then.
        seed: of everything random, the order of the loaders too.

    Returns:
        A candidate with ``.plan``, ``.model`` and ``.removed``.

    Raises:
        PlanError: for an unknown option, or a share that the model's groups cannot reach.
        DataError: if batches are needed and there are none.
    """
    from shohin.pipeline.job import load_tensors, own_tensors
    from shohin.pipeline.share import magnitudes, uniform_cut, widths_within
    from shohin.pruning.layerwise import refit
    from shohin.pruning.saliency import group_saliency
    from shohin.surgery import cut_sharing_values

    _one_of("of", of, ("macs", "params"))
    _one_of("criterion", criterion, ("taylor", "magnitude"))
    _one_of("granularity", granularity, ("channel",))
    _one_of("recover", recover, (None, "auto", "compensate", "distill"))
    if not 0 < keep <= 1:
        raise PlanError(f"keep must be a share in (0, 1]; got {keep}")
    if recover == "auto":
        recover = "compensate" if _checked(data).has_batches else None
    if not _checked(data).has_batches:
        if criterion == "taylor":
            raise DataError("criterion='taylor' needs batches: give Data(train=loader), or criterion='magnitude'")
        if recover is not None:
            raise DataError(f"recover={recover!r} needs batches: give Data(train=loader), or recover=None")
    with _seeded(data, seed):
        graph = _whole(model, data)
        calls = _calibration(data, seed) if data.has_batches else []
        if criterion == "taylor":
            saliency = {n: s.tolist() for n, s in group_saliency(graph, data, calls, seed=seed).items()}
        else:
            saliency = magnitudes(graph)
        if uniform:
            plan, left, made = uniform_cut(model, graph, keep, of, saliency)
        else:
            plan, left = widths_within(graph, keep, of, align, saliency)
            made = cut_sharing_values(model, graph, plan)
        notes: dict[str, Any] = {
            "form": made.form,
            "form_reason": made.reason,
            "proof": made.proof.error,
            "left": left,
        }
        if recover is not None and not plan.is_identity:
            start = made.rewritten.sliced()
            start.update(own_tensors(made.model, start))
            load_tensors(made.model, refit(graph, plan, made.rewritten, start, calls, seed=seed))
        if recover == "distill" and not plan.is_identity:
            notes["training"] = _distilled(made.model, model, data, epochs, seed)
        return Candidate("pruned", plan, made.model, None, {}, None, _static(graph, plan, made.model), notes, made.removed)


def _calibration(data: Data, seed: int, samples: int = 256) -> list[Call]:
    with _seeded(data, seed):  # whatever was drawn before
        return list(data.calls("train", samples))


def _static(graph: Graph, plan: Plan, model: nn.Module) -> Metrics:
    how = "estimated: counted from shapes"
    params = float(sum(p.numel() for p in model.parameters()))
    return Metrics(macs=Measurement(graph.macs(plan), how + ", one sample"), params=Measurement(params, how))


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise PlanError(f"{name}={value!r} is not known; one of {', '.join(map(repr, allowed))}")


def _distilled(student: nn.Module, teacher: nn.Module, data: Data, epochs: int, seed: int) -> dict[str, Any]:
    from shohin.distillation import distill as distill_
    from shohin.training import TrainConfig

    result = distill_(student, teacher, data, config=TrainConfig(epochs=epochs, lr=2e-3, seed=seed), alpha=0.2 if data.has_labels else 0.0)
    return result.to_json()


def quantize(
    model: nn.Module,
    data: Data,
    format: str | Mapping[str, str] = "int8",
    target: str | Target = "onnxruntime",
    *,
    ranges: str = "mse",
    seed: int = 0,
) -> Candidate:
    """Static integer weights and activations, ready for `export`.

    Args:
        format: "int8" for every convolution and linear layer, or patterns of layer addresses to formats ("int8" or
            "float32"); the last pattern that matches a layer decides. A pattern that matches nothing is an error.
        target: whose rules the grids follow (pair-safe scales where its kernels saturate).
        ranges: "mse", "percentile" or "minmax".

    Returns:
        A candidate whose ``.model`` holds weights snapped to their grids (batch normalization folded into them), ``.view``
        simulates all bits and ``.evidence`` holds the grids by address.

    Raises:
        PlanError: for an unknown format or a pattern that matches nothing. DataError: without calibration batches.
    """
    from shohin.pipeline.job import load_tensors
    from shohin.program import structural_copy
    from shohin.quantization import quantizable, quantize_program

    goal = get_target(target)
    with _seeded(_checked(data), seed):
        program = capture(model, data.example())
        layers = quantizable(program)
        chosen = {a: "float32" for a in layers}
        for pattern, name in ({"*": format} if isinstance(format, str) else format).items():
            _one_of("format", name, ("int8", "float32"))
            chosen.update(dict.fromkeys(match(pattern, layers), name))
        int8 = {a for a, f in chosen.items() if f == "int8"}
        if not data.has_batches:
            raise DataError("static quantization needs calibration batches: give Data(train=loader)")
        quantized = quantize_program(program, int8, _calibration(data, seed), ranges=ranges, least_scale=goal.least_scale())
        own = {
            id(t): (nn.Parameter(t.detach().clone(), t.requires_grad) if isinstance(t, nn.Parameter) else t.detach().clone())
            for t in (*model.parameters(), *model.buffers())
        }
        snapped = structural_copy(model, own)
        load_tensors(snapped, unfold_state(quantized.folded, quantized.program.tensors, program.tensors))
        plan = Plan(program.fingerprint, formats=dict.fromkeys(sorted(int8), "int8"))
        return Candidate("quantized", plan, snapped, quantized.view(), quantized.by_address(), notes={"format": "int8", "ranges": ranges})


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | Teacher,
    data: Data,
    losses: Sequence[str] | None = None,
    epochs: int = 5,
    *,
    config: TrainConfig | None = None,
    inherit: bool = True,
    seed: int = 0,
) -> Candidate:
    """A copy of ``student``, trained to answer as ``teacher`` does; labels are used if there are any.

    Args:
        teacher: a model, several whose probabilities are averaged, or a `shohin.distillation.Teacher` that keeps its answers on disk
            or runs in a faster form.
        losses: the name of one loss between answers (see `shohin.distillation.Mix`), and "features" to follow the teacher's features
            too, matched by what one tells of the other (`shohin.distillation.match`); default ("kd",).
        epochs: passes over ``data.train``.
        config: how to train, instead of ``epochs`` and ``seed``; see `shohin.training.TrainConfig`.
        inherit: begin with the teacher's weights where a plan makes the student's architecture out of the teacher's (the same modules,
            fewer channels, heads or layers), unless the student's own already answer more like the teacher. The candidate's ``.plan``
            is that plan.

    Raises:
        DataError: for an unknown loss or batches that cannot be used.
        ModelError: if no feature of the student matches one of the teacher.
    """
    from shohin.distillation import Ensemble, FeatureTap, Teacher, match
    from shohin.distillation import distill as distill_
    from shohin.pipeline.inherit import inherit as inherit_
    from shohin.training import TrainConfig

    names = tuple(losses or ("kd",))
    answers = [n for n in names if n != "features"] or ["kd"]
    if len(answers) != 1:
        raise DataError(f"one loss between answers at a time; got {answers}")
    own = copy.deepcopy(student)
    whose = teacher if isinstance(teacher, (nn.Module, Teacher)) else Ensemble(teacher)
    config = config or TrainConfig(epochs=epochs, seed=seed)
    with _seeded(_checked(data), config.seed):
        model = whose.model if isinstance(whose, Teacher) else whose
        plan = inherit_(own, model, data, _calibration(data, config.seed), config.seed) if inherit else None
        taps: tuple[FeatureTap, ...] = ()
        if "features" in names:
            taps = match(own, model, list(data.calls("train", limit=128)))
            whose = Teacher(model, [tap.teacher_module for tap in taps]) if isinstance(whose, Teacher) else whose
        result = distill_(
            own,
            whose,
            data,
            config=config,
            loss=answers[0],
            alpha=0.2 if data.has_labels else 0.0,
            feature_weight=0.2 if taps else 0.0,
            taps=taps,
        )
    quality = Measurement(result.best_quality, "measured: validation, in torch") if result.best_quality is not None else None
    return Candidate("distilled", plan or Plan(""), own, metrics=Metrics(quality=quality), notes={"training": result.to_json()})


def search(
    model_or_space: nn.Module,
    data: Data,
    target: str | Target = "onnxruntime",
    budget: str | Budget | None = None,
    *,
    time_limit: float | str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> Result:
    """Architecture search alone: widths and depth of the user's own model under a measured budget, in float32.

    Arguments, result and errors as for `shohin.optimize`.
    """
    from shohin.pipeline import optimize

    if not isinstance(model_or_space, nn.Module):
        raise ModelError(f"search takes a model; spaces of building blocks are not supported yet (got {type(model_or_space).__name__})")
    return optimize(model_or_space, data, target, budget, out=out, time_limit=time_limit, seed=seed, methods=("prune", "skip", "distill"))


def export(
    candidate_or_model: Candidate | nn.Module, data: Data, target: str | Target = "onnxruntime", path: str | Path = "m.onnx"
) -> Candidate:
    """Lowers to the file that ships and verifies it against the view; stores what `verify` needs beside it.

    Returns:
        A candidate with ``.artifact`` and ``.metrics`` (size, latency; quality if ``data`` can tell).

    Raises:
        TargetError: if the file does not equal the view, or the target cannot run it.
    """
    from shohin.pipeline.reading import requantized
    from shohin.pipeline.ship import expected_formats, lower_program, lower_quantized, verify_export

    goal, path = get_target(target), Path(path)
    given = candidate_or_model if isinstance(candidate_or_model, Candidate) else Candidate("exported", Plan(""), candidate_or_model)
    if given.model is None:
        raise RunError(f"candidate {given.name!r} has no model; load it with shohin.load(folder, model=..., example=...)")
    with _seeded(_checked(data), 0):
        example = data.example()
        program = capture(given.model, example)
        quantized = requantized(program, given) if given.plan.formats else None
        path.parent.mkdir(parents=True, exist_ok=True)
        if quantized is None:
            shown, notes = lower_program(goal, program, path, example.args, example.kwargs)
        else:
            shown, _, notes = lower_quantized(goal, quantized, path, example.args, example.kwargs)
        checked = verify_export(goal, shown, path, expected_formats(program, quantized), [example], integer=quantized is not None)
        timing = goal.measure({"file": path}, example.args, kwargs=example.kwargs)["file"]
        quality = None
        if data.metric is not None or (data.has_batches and data.has_labels and data.loss is None):
            quality = Measurement(data.quality(goal.runner(path)), "measured: the metric over the file, on validation")
    metrics = Metrics(
        quality=quality, latency_ms=timing.measurement(), size_bytes=Measurement(float(path.stat().st_size), "measured: bytes of the file")
    )
    return Candidate(
        given.name,
        given.plan,
        given.model,
        shown,
        given.evidence,
        path,
        metrics,
        {**given.notes, "parity": checked, "lowering": notes},
        given.removed,
    )


@dataclass(frozen=True)
class Profile:
    """A table of layers with measured milliseconds. ``str`` gives it with groups, regions and what is frozen, in 100 columns.

    Args:
        rows: ``{"address", "kind", "inputs", "output", "macs", "params", "bytes", "moved", "intensity", "ms_before", "format"}``
            for each operation that costs time: shapes ("B" is the batch), bytes of the weights, bytes read and written for
            one sample, MACs per byte.
        total_ms: measured time of the whole model.
        error: median leave-one-out error of the attribution's latency model.
        repeatability: of the timings.
        graph: groups, regions, frozen.
        environment: CPU, instruction sets, versions, threads.
        memory: of the activations of one sample in float32, in program order, elementwise operations writing over their
            arguments.
    """

    rows: list[dict[str, Any]]
    total_ms: float
    error: float
    repeatability: float
    graph: Graph
    environment: dict[str, Any] = field(default_factory=dict)
    memory: Memory | None = None

    def __str__(self) -> str:
        from shohin.report.profile_text import profile_text

        return profile_text(self)


def profile(model: nn.Module, data: Data, target: str | Target = "onnxruntime", *, seed: int = 0) -> Profile:
    """Layers with shapes, MACs, bytes and measured milliseconds (attributed by a regression on whole-model timings).

    An example is enough: ``Data(example=(x,))``.

    Raises:
        ModelError, TargetError: if the model cannot be captured or lowered.
    """
    import tempfile

    from shohin.pipeline.formats import MAIN, precisions
    from shohin.pipeline.job import Job
    from shohin.pipeline.timing import profile as profile_
    from shohin.run import Run

    goal = get_target(target)
    with _seeded(_checked(data), seed), tempfile.TemporaryDirectory(prefix="shohin-") as folder, Run(folder, {"version": 1}) as run:
        graph = _whole(model, data)
        job = Job(run, model, data, goal, Budget(), seed, graph, None, frozenset(("quantize", "skip")), False)
        run.append("precisions", "", {name: 0.0 for name in precisions(job) if name in MAIN})  # times need no losses
        profile_(job, lambda: None)
        found = (run.find("profile") or {})["data"]
    details = layer_details(graph)
    rows = [{**row, **details.get(row["address"], {})} for row in found["layers"]]
    error = found["leave_one_out"]["median"]
    return Profile(rows, found["ms"][0], error, found["repeatability"], graph, found["environment"], memory(graph, reuse=True))


def verify(path: str | Path) -> dict[str, Any]:
    """Repeats the parity checks of a run, a candidate's folder or a file, on this machine.

    Args:
        path: a run folder, a candidate's folder, or ``model.onnx`` with its parity files beside it.

    Returns:
        ``{"passes": bool, "files": {path: {"passes", "max_rel", "snr_db", "argmax_agree", "argmax_total", "tolerance"}}}``.

    Raises:
        RunError: if there is nothing to verify, or a file is missing or damaged.
    """
    from shohin.pipeline.ship import verify_stored

    path = Path(path)
    if path.is_dir() and (path / "candidates").is_dir():
        files = sorted(p.with_name("model.onnx") for p in (path / "candidates").glob("*/candidate.json"))  # what is finished
    elif path.is_dir():
        files = sorted(path.glob("*.onnx"))
    else:
        files = [path]
    if not files or not all(f.exists() for f in files):
        raise RunError(f"{path}: nothing to verify here; give a run folder, a candidate's folder or a file with its parity beside it")
    found = {str(f): verify_stored(f) for f in files}
    return {"passes": all(f["passes"] for f in found.values()), "files": found}


__all__ = ["Profile", "cut", "distill", "export", "profile", "prune", "quantize", "search", "understand", "verify", "view"]
