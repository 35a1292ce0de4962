"""`shohin.quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shohin.addresses import match
from shohin.budget import Budget
from shohin.candidate import Candidate
from shohin.data import Data
from shohin.errors import DataError, PlanError
from shohin.evidence.calibration import range_method
from shohin.evidence.layers import LayerWeight, layer_weights
from shohin.formats import Scheme, is_scheme
from shohin.plan import Plan
from shohin.program import Program, ProgramModule, capture, unfold_state
from shohin.targets import Target, get_target
from shohin.verbs.common import calibration, checked, one_of, seeded

if TYPE_CHECKING:
    from shohin.quantization import Quantized


def quantize(
    model: nn.Module,
    data: Data,
    format: str | Mapping[str, str] = "int8",
    target: str | Target = "onnxruntime",
    *,
    ranges: str | Mapping[str, str] = "mse",
    smoothing: bool = True,
    rounding: str = "auto",
    samples: int = 512,
    drop: str | float | None = None,
    seed: int = 0,
) -> Candidate:
    """Fewer bits, ready for `export`: integer weights and activations, or weights of few bits beside float activations.

    Args:
        format: "int8" for every convolution and linear layer; a weight scheme such as "weights int4 group 32" or "weights uint4 group 32"
            for every layer that the target has a kernel for (2 to 8 bits; "uint" formats have zero points); or patterns of layer
            addresses to these or "float32": the last pattern that matches a layer decides. A pattern that matches nothing is an error.
        target: whose rules the grids follow (pair-safe scales where its kernels saturate).
        ranges: how ranges of activations are chosen: "mse" (least squared error), "percentile" (99.99 % of the values; "percentile
            99.9" for another share), "entropy" (least divergence of the histogram), "minmax" or "moving" (moving average of each
            batch's minimum and maximum). Or patterns of activation addresses (the names in ``.evidence`` that are not parameters) to
            methods; the last pattern that matches decides, "mse" where none does, and a pattern that matches nothing is an error.
        smoothing: divide activations of "int8" layers that floating operations make (normalization, GELU, attention) by a factor for each
            channel, which the weights of the linear layers that read them take (SmoothQuant, Xiao et al. 2023; how far is chosen for each
            by the error of those layers). Only where it helps, and where ``ranges`` says "mse".
        rounding: of weights beside float activations: "nearest" and "hqq" (neither needs data), "gptq", "descent" (GPTQ, then scales and
            codes in turn), or "auto": "descent" where ``data`` has batches, else "nearest".
        samples: of the calibration batches.
        drop: most that quality on validation may fall, such as "0.3 %" of the float model's, or a number in the metric's own unit. Where it
            falls more, the fewest layers whose rounding moves the answers most stay float; ``.notes["returned"]`` names them and says why,
            ``.notes["quality"]`` what the view reached. None: whatever comes of it.

    Returns:
        A candidate whose ``.model`` holds weights snapped to their grids (batch normalization folded into them), ``.view``
        simulates all bits and ``.evidence`` holds the grids by address.

    Raises:
        PlanError: for an unknown format, rounding or range method, a pattern that matches nothing, or a format for which the target has
            no kernel at any of the layers (it names what the target has). DataError: without calibration batches, or
            if an activation on them is NaN or Inf, or if ``drop`` is given and quality cannot be told. BudgetError: if ``drop`` cannot be read.
    """
    from shohin.pipeline.job import load_tensors
    from shohin.program import structural_copy
    from shohin.pruning.amounts import check_count
    from shohin.quantization import ROUNDINGS, fewest_returned, quantize_layers

    goal = get_target(target)
    one_of("rounding", rounding, ROUNDINGS)
    check_count("samples", samples, 1)
    check_count("seed", seed, 0)
    for name, given in (("format", format), ("ranges", ranges)):
        if not isinstance(given, str) and not (isinstance(given, Mapping) and given and all(isinstance(key, str) for key in given)):
            raise PlanError(f"{name} is a text, or patterns of addresses with a text each, such as {{'*': 'int8'}}; got {given!r}")
    for method in [ranges] if isinstance(ranges, str) else ranges.values():
        range_method(method)
    allowed = None if drop is None else Budget.parse(f"drop <= {drop}")
    if allowed is not None and data.metric is None and not (data.has_batches and data.has_labels and data.loss is None):
        raise DataError("drop needs a quality to keep: give batches with integer targets, or Data(metric=(run) -> float)")
    with seeded(checked(data), seed):
        program = capture(model, data.example())
        chosen, left = _chosen(program, format, goal)
        static = "int8" in chosen.values()
        if static and not data.has_batches:
            raise DataError("static quantization needs calibration batches: give Data(train=loader)")
        calls = calibration(data, seed, samples) if data.has_batches else []
        options: dict[str, Any] = {"rounding": rounding, "ranges": ranges, "smoothing": smoothing}

        def made(formats: Mapping[str, str]) -> Quantized:
            return quantize_layers(program, calls, formats, **options, least_scale=goal.least_scale(), seed=seed)

        kept = None
        if allowed is not None:
            plain = data.quality(ProgramModule(program))

            def holds(value: float) -> bool:
                return not allowed.violations({"quality": value}, {"quality": plain}, lower_is_better=data.lower_is_better)

            kept = fewest_returned(program, calls, chosen, made, data.quality, plain, holds, seed)
            chosen = kept.formats
        quantized = made(chosen) if kept is None else kept.quantized
        own = {
            id(t): (nn.Parameter(t.detach().clone(), t.requires_grad) if isinstance(t, nn.Parameter) else t.detach().clone())
            for t in (*model.parameters(), *model.buffers())
        }
        snapped = structural_copy(model, own)
        load_tensors(snapped, unfold_state(quantized.folded, quantized.program.tensors, program.tensors))
        plan = Plan(program.fingerprint, formats=chosen)
        notes: dict[str, Any] = {"format": format if isinstance(format, str) else dict(format)}
        if static:
            notes["ranges"] = ranges if isinstance(ranges, str) else dict(ranges)
            notes["smoothed"] = [a for a, q in quantized.by_address().items() if q.axis == -1]
        if kept is not None:
            values = dict(zip(("float", "all", "kept"), kept.quality, strict=True))
            notes |= {"returned": kept.returned, "quality": values, "drop": str(drop)}
        if any(map(is_scheme, chosen.values())):
            notes |= {"rounding": rounding, "float": left}
        return Candidate("quantized", plan, snapped, quantized.view(), quantized.by_address(), notes=notes)


def _chosen(program: Program, format: str | Mapping[str, str], target: Target) -> tuple[dict[str, str], dict[str, str]]:
    """Layer address -> its format, where it is not float; and why layers that a weight scheme was asked for stay float."""
    from shohin.quantization import quantizable, weights_by_address

    layers, weights = quantizable(program), weights_by_address(program)
    chosen: dict[str, str] = {}
    left: dict[str, str] = {}
    for pattern, text in ({"*": format} if isinstance(format, str) else format).items():
        scheme = Scheme.parse(text) if isinstance(text, str) and is_scheme(text) else None
        if scheme is None:
            one_of("format", text, ("int8", "float32", "weights int4 group 32", "weights uint4 group 32"))
        found = match(pattern, layers)
        why = {} if scheme is None else {a: reason for a in found if (reason := _misfit(a, scheme, weights, target))}
        if len(why) == len(found):
            reasons = {reason: address for address, reason in reversed(why.items())}
            listed = "; ".join(f"{address}: {reason}" for reason, address in reversed(reasons.items()))
            raise PlanError(f"no layer that {pattern!r} matches can be {text!r}: {listed}")
        for address in found:
            chosen[address] = "float32" if address in why else str(scheme or text)
            left.pop(address, None)
        left |= why
    _check_shared(chosen, weights)
    formats = {address: form for address, form in sorted(chosen.items()) if form != "float32"}
    if any(map(is_scheme, formats.values())):
        _check_types(program, formats, weights)
        left |= layer_weights(program)[1]
    return formats, left


def _check_shared(chosen: Mapping[str, str], weights: Mapping[str, LayerWeight]) -> None:
    """Raises PlanError if layers that share a weight of few bits are in other formats."""
    for address, form in chosen.items():
        if is_scheme(form):
            for other, weight in weights.items():
                if weight.name == weights[address].name and chosen.get(other, "float32") != form:
                    raise PlanError(
                        f"{address} and {other} share the weight {weight.name!r}, so it cannot be {form!r} for one and "
                        f"{chosen.get(other, 'float32')!r} for the other: give both one format"
                    )


def _check_types(program: Program, chosen: Mapping[str, str], weights: Mapping[str, LayerWeight]) -> None:
    for address, form in chosen.items():
        if address in weights and (kind := program.tensors[weights[address].name].dtype) != torch.float32:
            name = str(kind).removeprefix("torch.")
            raise PlanError(f"{address} cannot be {form!r}: its weight is {name}, and the kernels take float32: quantize model.float()")


def _misfit(address: str, scheme: Scheme, weights: Mapping[str, LayerWeight], target: Target) -> str:
    if address not in weights:
        return "an operation that is no layer reads its weight too"
    why = target.misfit(scheme, weights[address].kind)
    return f"the target {target.name!r}: {why}" if why else ""
