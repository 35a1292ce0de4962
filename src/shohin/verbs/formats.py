"""Which format each layer gets: what the user asked for by patterns, as far as the target can run it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from shohin.addresses import match
from shohin.errors import PlanError
from shohin.evidence.layers import LayerWeight, layer_weights
from shohin.formats import BLOCK_FORMATS, FLOAT_FORMATS, Bits, Scheme, is_bits, is_dynamic, is_scheme
from shohin.program import Program, family
from shohin.targets import Target
from shohin.verbs.common import one_of


def chosen_formats(program: Program, format: str | Mapping[str, str], target: Target | None) -> tuple[dict[str, str], dict[str, str]]:
    """Layer address -> its format, where it is not float; and why layers that a weight scheme was asked for stay float."""
    from shohin.quantization import TABLE, is_float_form, quantizable, tables, weights_by_address

    layers, weights, embeddings = quantizable(program), weights_by_address(program), tables(program)
    if not layers and not embeddings:
        raise PlanError("the model has no convolution, linear layer or embedding with a weight of its own: there is nothing to quantize")
    linear = {program.origins[node.name].address for node in program.graph.nodes if node.op == "call_function" and family(node) == "linear"}
    chosen: dict[str, str] = {}
    left: dict[str, str] = {}
    for pattern, text in ({"*": format} if isinstance(format, str) else format).items():
        scheme = Scheme.parse(text) if isinstance(text, str) and is_scheme(text) else None
        bits = Bits.parse(text) if isinstance(text, str) and is_bits(text) else None
        named = match(pattern, [*layers, *embeddings])
        found = [address for address in named if address not in embeddings]
        simulated = isinstance(text, str) and is_float_form(text)
        if simulated and target is not None:
            have = (
                "'int8', 'w4a8' (weights of 2 to 8 bits)"
                + ", 'int8 dynamic'" * target.dynamic
                + " and weight schemes such as 'weights uint4 group 32'"
            )
            raise PlanError(f"the target {target.name!r} has no kernels for {text!r}; it has {have}, and target=None simulates {text!r}")
        if scheme is None and bits is None and not simulated:
            names = (
                "float32",
                "int8",
                "w4a8",
                "int8 dynamic",
                "weights int4 group 32",
                "weights uint4 group 32",
                *FLOAT_FORMATS,
                *BLOCK_FORMATS,
            )
            one_of("format", text, names)
        if bits is not None and target is not None and (why := target.unfit(bits)):
            raise PlanError(f"{pattern!r} cannot be {text!r}: {why}")
        unfit = {a: reason for a in found if (reason := _misfit(a, scheme or bits, linear, weights, target))}
        if found and len(unfit) == len(found):
            reasons = {reason: address for address, reason in reversed(unfit.items())}
            listed = "; ".join(f"{address}: {reason}" for reason, address in reversed(reasons.items()))
            raise PlanError(f"no layer that {pattern!r} matches can be {text!r}: {listed}")
        for address in found:
            chosen[address] = "float32" if address in unfit else str(scheme or text)
            left.pop(address, None)
        left |= unfit
        table = "" if target is None else target.misfit(TABLE, "table")
        for address in set(named) - set(found):  # in 8 bits, whatever few bits were asked for
            chosen[address] = text if simulated else "float32" if text == "float32" or table else str(TABLE)
            if table and text != "float32":
                left[address] = table
    _check_shared(chosen, weights)
    formats = {address: form for address, form in sorted(chosen.items()) if form != "float32"}
    if target is not None:
        _check_types(program, formats, weights)
    if any(is_scheme(form) for address, form in formats.items() if address not in embeddings):
        left |= {name: why for name, why in layer_weights(program)[1].items() if name not in embeddings.values()}
    return formats, left


def _check_shared(chosen: Mapping[str, str], weights: Mapping[str, LayerWeight]) -> None:
    """Raises PlanError if layers that share a weight of few bits, or one beside ranges of the values at hand, are in other formats."""
    for address, form in chosen.items():
        if is_scheme(form) or is_dynamic(form):
            for other, weight in weights.items():
                if address in weights and weight.name == weights[address].name and chosen.get(other, "float32") != form:
                    raise PlanError(
                        f"{address} and {other} share the weight {weight.name!r}, so it cannot be {form!r} for one and "
                        f"{chosen.get(other, 'float32')!r} for the other: give both one format"
                    )


def _check_types(program: Program, chosen: Mapping[str, str], weights: Mapping[str, LayerWeight]) -> None:
    for address, form in chosen.items():
        if address in weights and (kind := program.tensors[weights[address].name].dtype) != torch.float32:
            name = str(kind).removeprefix("torch.")
            raise PlanError(f"{address} cannot be {form!r}: its weight is {name}, and the kernels take float32: quantize model.float()")


def _misfit(
    address: str, form: Scheme | Bits | None, linear: Collection[str], weights: Mapping[str, LayerWeight], target: Target | None
) -> str:
    """Why a layer cannot be held so; "" if it can."""
    if isinstance(form, Bits) and form.dynamic and address not in linear:
        return "only linear layers round their input in its own range: ask for 'int8' for convolutions"
    if not isinstance(form, Scheme):
        return ""
    if address not in weights:
        return "an operation that is no layer reads its weight too"
    if target is None:
        return ""
    why = target.misfit(form, weights[address].kind)
    return f"the target {target.name!r}: {why}" if why else ""
