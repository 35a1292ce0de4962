"""`shohin.quantize`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from shohin.budget import Budget
from shohin.candidate import Candidate, Metrics
from shohin.data import Call, Data
from shohin.errors import BudgetError, DataError, PlanError, RunError
from shohin.evidence.calibration import range_method
from shohin.formats import is_bits, is_dynamic, is_scheme
from shohin.plan import Plan
from shohin.program import Program, ProgramModule, capture, unfold_state
from shohin.run import CHECKPOINT
from shohin.targets import Target, get_target
from shohin.verbs.common import calibration, checked, checked_folder, one_of, seeded
from shohin.verbs.formats import chosen_formats

if TYPE_CHECKING:
    from shohin.quantization import QAT, Quantized
    from shohin.quantization.fallback import Kept
    from shohin.training import TrainConfig


def quantize(
    model: nn.Module,
    data: Data,
    format: str | Mapping[str, str] | Sequence[str] = "int8",
    target: str | Target | None = "onnxruntime",
    *,
    budget: str | Budget | None = None,
    ranges: str | Mapping[str, str] = "mse",
    smoothing: bool = True,
    equalize: bool = True,
    rotate: bool | None = None,
    rounding: str = "auto",
    samples: int = 512,
    sensitivity: str = "fisher",
    drop: str | float | None = None,
    recover: str | QAT | None = None,
    epochs: int = 5,
    config: TrainConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
) -> Candidate:
    """Fewer bits, ready for `export`: integer weights and activations, or weights of few bits beside float activations.

    Args:
        format: "int8" for every convolution and linear layer, or "wXaY" with 2 to 8 bits for weights and for activations ("w4a8"); either
            with " dynamic" for linear layers that round their input in the range that it has itself, without data ("int8 dynamic"); a
            weight scheme such as "weights int4 group 32" or "weights uint4 group 32" for every layer that the target has a kernel for (2
            to 8 bits; "uint" formats have zero points); with ``target=None`` a floating-point or block format ("bf16", "e4m3",
            "mxfp4"...); or patterns of layer addresses to these or "float32": the last pattern that matches a layer decides. A pattern
            that matches nothing is an error.
        target: whose rules the grids follow (pair-safe scales where its kernels saturate). None: no runtime; any format is simulated.
        budget: bounds that the file keeps, such as "size <= 12 MB, latency <= 60 %": the formats with the least loss under it, planned
            exactly on tables of what each layer loses, of bytes, and of milliseconds fitted to files that were timed, and held against the
            file that comes of it. ``.notes`` has "met", "unmet", "planned" and "sensitivity".
        ranges: how ranges of activations are chosen: "mse" (least squared error), "percentile" (99.99 % of the values; "percentile
            99.9" for another share), "entropy" (least divergence of the histogram), "minmax" or "moving" (moving average of each
            batch's minimum and maximum). Or patterns of activation addresses (the names in ``.evidence`` that are not parameters) to
            methods; the last pattern that matches decides, "mse" where none does, and a pattern that matches nothing is an error.
        smoothing: divide activations of integer layers that floating operations make (normalization, GELU, attention) by a factor for each
            channel, which the weights of the linear layers that read them take (SmoothQuant, Xiao et al. 2023; how far is chosen for each
            by the error of those layers). Only where it helps, and where ``ranges`` says "mse". The same for linear layers with weight
            schemes, there to round finely what large activations multiply (AWQ, Lin et al. 2023), with "gptq", "adaround",
            "descent" and "blocks".
        equalize: make channels of an activation alike that a layer makes and only layers read, by factors that these layers' weights take
            (cross-layer equalization, Nagel et al. 2019), where all of them compute on integers. On the calibration data floats stay the
            same.
        rotate: mix the channels of residual streams, and of the values in attention, by an orthogonal matrix that the weights around them
            take, so that none stands out (QuaRot, Ashkboos et al. 2024): transformers with their normalization before attention. What
            ``forward`` gives in evaluation stays the same (what else the class offers, or does in training alone, need not), and the file
            computes nothing more. None: around layers with integer activations; True: around all that are not left float.
        rounding: of weights beside float activations, and of those with less than 7 bits beside integers: "nearest" and "hqq" (neither
            needs data), "gptq", "adaround", "descent" (GPTQ, then scales and codes in turn), "blocks" (then codes, scales and biases of
            several layers together, by what a residual block or half a transformer layer gives), or "auto": "descent" where ``data`` has
            batches, else "nearest". What is trained begins with the weights as they are.
        samples: of the calibration batches.
        sensitivity: of layers, for a budget: "fisher" (how far each one's rounding moves the answers, to first order), "output" (its
            error at the layer's own output) or "kl" (measured on the answers, a forward pass for each layer and format).
        drop: most that quality on validation may fall, such as "0.3 %" of the float model's, or a number in the metric's own unit. Where it
            falls more, the fewest layers whose rounding moves the answers most stay float; ``.notes["returned"]`` names them and says why,
            ``.notes["quality"]`` what the view reached. None: whatever comes of it.
        recover: "qat" trains the weights and their grids as they will be rounded, for ``epochs``, to answer as the float model does (and
            labels, where there are any); a `shohin.quantization.QAT` says how grids learn. None: nothing is trained.
        epochs, config: of that training; ``config`` instead of ``epochs`` says all, see `shohin.training.TrainConfig`.
        seed: of everything random, the order of the loaders too.
        out: a folder for the checkpoint of the training, which goes on from it when it is called again.

    Returns:
        A candidate whose ``.model`` holds weights snapped to their grids (batch normalization folded into them), ``.view``
        simulates all bits and ``.evidence`` holds the grids by address.

    Raises:
        PlanError: for an unknown format, rounding or range method, a pattern that matches nothing, or a format for which the target has
            no kernel at any of the layers (it names what the target has). DataError: without calibration batches, or
            if an activation on them is NaN or Inf, or if ``drop`` is given and quality cannot be told. BudgetError: if ``drop`` cannot be
            read. RunError: if there is a file where ``out`` should be a folder, or another training's checkpoint in it.
    """
    from shohin.quantization import quantize_layers
    from shohin.quantization.sensitivity import MEASURES

    goal = None if target is None else get_target(target)
    limits = _limits(budget, format, goal, drop)
    _check(format, ranges, rounding, samples, epochs, seed)
    qat = _wanted(recover, drop, out, epochs, config)
    one_of("sensitivity", sensitivity, MEASURES)
    if limits is None and sensitivity != "fisher":
        raise PlanError("sensitivity= is of layers under a budget: give budget='size <= ...', too")
    allowed = None if drop is None else Budget.parse(f"drop <= {drop}")
    if allowed is not None and data.metric is None and not (data.has_batches and data.has_labels and data.loss is None):
        raise DataError("drop needs a quality to keep: give batches with integer targets, or Data(metric=(run) -> float)")
    with seeded(checked(data), seed):
        original = capture(model, data.example())
        wanted = [format] if isinstance(format, (str, Mapping)) else [text for text in format if text != "float32"]
        able = [chosen_formats(original, text, goal) for text in wanted]
        _check_data(able[0][0], data, qat, allowed, limits)
        calls = calibration(data, seed, samples) if data.has_batches else []
        ready = _prepared(original, [forms for forms, _ in able], calls, equalize, rotate, seed)
        rule = None if goal is None else goal.least_scale()
        begin = "nearest" if qat is not None else rounding  # a training begins with the weights as they are
        options: dict[str, Any] = {"rounding": begin, "ranges": ranges, "smoothing": smoothing, "least_scale": rule, "seed": seed}

        def make(formats: Mapping[str, str], calls: Sequence[Call] = calls, plainly: bool = False) -> Quantized:
            return quantize_layers(ready.program, calls, formats, **options, plainly=plainly)

        metrics, told = Metrics(), dict[str, Any]()
        chosen, left = able[0]
        if limits is not None and goal is not None:
            from shohin.pipeline.mixed import mixed

            options_of = {str(text): forms for text, (forms, _) in zip(wanted, able, strict=True)}
            quick, example = partial(make, plainly=True), data.example()
            found = mixed(ready.program, calls, options_of, make, quick, goal, limits, example, measure=sensitivity, seed=seed)
            quantized, chosen, metrics, told = found.quantized, found.formats, found.metrics, dict(found.notes)
        elif allowed is None:
            quantized = make(chosen)
        else:
            kept = _kept(ready.program, data, calls, chosen, make, allowed, data.quality(ProgramModule(original)), seed)
            quantized, chosen = kept.quantized, kept.formats
            told = {"returned": kept.returned, "quality": dict(zip(("float", "all", "kept"), kept.quality, strict=True)), "drop": str(drop)}
        if not chosen:  # what is not rounded stays as it came
            ready = _Prepared(original)
            quantized = make({})
        if qat is not None:
            quantized, training = _trained(ready.program, original, quantized, data, qat, config, epochs, rule, seed, out)
            told |= training
    notes: dict[str, Any] = {"format": dict(format) if isinstance(format, Mapping) else format, **told, **ready.notes(chosen)}
    if any(map(_is_static, chosen.values())):
        notes["ranges"] = ranges if isinstance(ranges, str) else dict(ranges)
        notes["smoothed"] = [a for a, q in quantized.by_address().items() if q.axis == -1]
    if any(map(is_scheme, chosen.values())):
        notes |= {"rounding": rounding, "scaled": [name for name, q in quantized.weights.items() if q.group and q.columns is not None]}
    if left or "rounding" in notes:
        notes["float"] = left
    snapped = _snapped(model, ready.program, quantized, ready.untied)
    plan = Plan(original.fingerprint, formats=chosen)
    return Candidate("quantized", plan, snapped, quantized.view(), quantized.by_address(), metrics=metrics, notes=notes)


@dataclass(frozen=True)
class _Prepared:
    """A program that computes the same as the user's, with values that are rounded better.

    Args:
        alike: activation whose channels were equalized -> the layers that make and read it.
        turned: layers that write or read rotated channels.
        untied: names of tensors that are no longer those of other names.
    """

    program: Program
    alike: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    turned: Sequence[str] = ()
    untied: Sequence[str] = ()

    def notes(self, formats: Mapping[str, str]) -> dict[str, Any]:
        """What was done, as far as these formats are concerned by it."""
        found: dict[str, Any] = {"rotated": list(self.turned)}
        if any(map(_is_static, formats.values())):
            found["equalized"] = [a for a, layers in self.alike.items() if all(_is_static(formats.get(x, "float32")) for x in layers)]
        return found


def _prepared(
    program: Program, formats: Sequence[Mapping[str, str]], calls: Sequence[Call], equalize: bool, rotate: bool | None, seed: int
) -> _Prepared:
    from shohin.quantization import Rotated, equalized, rotated

    around = {a for forms in formats for a, text in forms.items() if rotate or is_bits(text)}
    turned = Rotated(program) if rotate is False else rotated(program, around, seed)
    program, alike = turned.program, dict[str, tuple[str, ...]]()
    if equalize and calls:
        program, alike = equalized(program, {a for forms in formats for a, text in forms.items() if _is_static(text)}, calls)
    return _Prepared(program, alike, turned.layers, turned.untied)


def _check_data(chosen: Mapping[str, str], data: Data, qat: QAT | None, allowed: object, limits: object) -> None:
    """Raises PlanError for formats that cannot be trained or judged, DataError if what is asked for needs batches."""
    from shohin.quantization import is_float_form

    floats = sorted({text for text in chosen.values() if is_float_form(text)})
    if floats and (qat is not None or allowed is not None):
        raise PlanError(f"{floats[0]!r} is only simulated: neither recover= nor drop= can go with it")
    if qat is not None and (moving := next(filter(is_dynamic, chosen.values()), None)) is not None:
        raise PlanError(f"{moving!r} has no ranges that could be trained: ask for {moving.removesuffix(' dynamic')!r} with recover=")
    if data.has_batches:
        return
    for needed, what in (
        (any(map(_is_static, chosen.values())), "static quantization needs calibration"),
        (qat is None and limits is not None, "a budget needs"),
        (qat is not None, "recover='qat' needs training"),
    ):
        if needed:
            raise DataError(f"{what} batches: give Data(train=loader)")


def _is_static(text: str) -> bool:
    return is_bits(text) and not is_dynamic(text)


def _limits(budget: str | Budget | None, format: object, target: Target | None, drop: object) -> Budget | None:
    """The bounds on a file. Raises PlanError or BudgetError if there is nothing to hold them against, or nothing to choose from."""
    several = isinstance(format, Sequence) and not isinstance(format, str)
    if budget is None:
        if several:
            raise PlanError(
                "several formats are chosen from under a budget: give budget='size <= ...', or one format, or patterns of addresses"
            )
        return None
    limits = Budget.parse(budget)
    if isinstance(format, Sequence) and not (format and all(isinstance(text, str) for text in format)):
        raise PlanError(f"format is a sequence of formats to choose from, such as ('int8', 'weights uint4 group 32'); got {format!r}")
    if format == "float32" or (several and set(format) <= {"float32"}):  # type: ignore[call-overload]
        raise PlanError("a budget chooses between formats and float32: name at least one other, such as 'int8'")
    if isinstance(format, Mapping):
        raise PlanError("patterns say which layer gets which format, so a budget has nothing to decide: give the formats to choose from")
    if target is None:
        raise PlanError("a budget is held against a file, and target=None has none: name a target")
    if drop is not None or not limits.limits or not limits.limits.keys() <= {"size_bytes", "latency_ms"}:
        raise BudgetError(f"a budget of formats bounds size and latency; got {str(limits)!r}{' beside drop=' if drop is not None else ''}")
    return limits


def _check(format: object, ranges: str | Mapping[str, str], rounding: str, samples: int, epochs: int, seed: int) -> None:
    """Raises PlanError for options that cannot be, before the work."""
    from shohin.pruning.amounts import check_count
    from shohin.quantization import ROUNDINGS

    one_of("rounding", rounding, ROUNDINGS)
    for what, value, least in (("samples", samples, 1), ("epochs", epochs, 0), ("seed", seed, 0)):
        check_count(what, value, least)
    several = isinstance(format, Sequence) and all(isinstance(text, str) for text in format)
    for name, given in (("ranges", ranges), *(() if several else (("format", format),))):
        if not isinstance(given, str) and not (isinstance(given, Mapping) and given and all(isinstance(key, str) for key in given)):
            raise PlanError(f"{name} is a text, or patterns of addresses with a text each, such as {{'*': 'int8'}}; got {given!r}")
    for method in [ranges] if isinstance(ranges, str) else ranges.values():
        range_method(method)


def _wanted(recover: str | QAT | None, drop: object, out: str | Path | None, epochs: int, config: object) -> QAT | None:
    """The training that is asked for. Raises PlanError or RunError if it, or what is asked beside it, cannot be."""
    from shohin.quantization import QAT
    from shohin.training import TrainConfig

    qat = QAT() if recover == "qat" else recover
    if qat is not None and not isinstance(qat, QAT):
        raise PlanError(f"recover={qat!r} is not known; None, 'qat', or a shohin.quantization.QAT that says how grids learn")
    if qat is not None and drop is not None:
        raise PlanError("drop= is a bound for what is not trained: give drop= or recover=, not both")
    if config is not None and not isinstance(config, TrainConfig):
        raise PlanError(f"config is a shohin.training.TrainConfig, not {type(config).__name__}")
    if qat is None and (epochs != 5 or config is not None):
        raise PlanError("epochs= and config= are of a training: give them with recover='qat'")
    if out is not None:
        if qat is None:
            raise RunError("out= is a folder for the checkpoint of a training: give it with recover='qat'; shohin.export writes files")
        checked_folder(out)
    return qat


def _kept(
    program: Program,
    data: Data,
    calls: Any,
    chosen: Mapping[str, str],
    make: Callable[[Mapping[str, str]], Quantized],
    allowed: Budget,
    plain: float,
    seed: int,
) -> Kept:
    """The program with as many layers quantized as a bound on quality allows; ``plain`` is the float model's."""
    from shohin.quantization import fewest_returned

    def holds(value: float) -> bool:
        return not allowed.violations({"quality": value}, {"quality": plain}, lower_is_better=data.lower_is_better)

    return fewest_returned(program, calls, chosen, make, data.quality, plain, holds, list(data.calls("validation", 1)), seed)


def _trained(
    program: Program,
    original: Program,
    quantized: Quantized,
    data: Data,
    qat: QAT,
    config: TrainConfig | None,
    epochs: int,
    rule: Callable[..., Any] | None,
    seed: int,
    out: str | Path | None,
) -> tuple[Quantized, dict[str, Any]]:
    from shohin.pipeline.aware import settings, train_aware
    from shohin.verbs.distillation import fitting_loss

    teacher = ProgramModule(original).eval()
    loss = fitting_loss(teacher, next(data.calls("train")))
    path = None if out is None else Path(out) / CHECKPOINT
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    found, result = train_aware(
        program, quantized, teacher, data, qat, config or settings(epochs, seed), loss=loss, least_scale=rule, checkpoint=path
    )
    return found, {"training": result.to_json(), "learn": qat.learn}


def _snapped(model: nn.Module, program: Program, quantized: Quantized, untied: Sequence[str]) -> nn.Module:
    """A copy of the user's model with the values of the quantized program."""
    from shohin.pipeline.job import load_tensors
    from shohin.program import structural_copy, untie

    own = {
        id(t): (nn.Parameter(t.detach().clone(), t.requires_grad) if isinstance(t, nn.Parameter) else t.detach().clone())
        for t in (*model.parameters(), *model.buffers())
    }
    snapped = structural_copy(model, own)
    values = unfold_state(quantized.folded, quantized.program.tensors, program.tensors)
    untie(snapped, untied)
    if untied:
        for module in snapped.modules():  # Hugging Face ties again what its configuration says is tied
            config: Any = getattr(module, "config", None)
            if getattr(config, "tie_word_embeddings", False) is True:
                config.tie_word_embeddings = False
    load_tensors(snapped, values)
    return snapped
