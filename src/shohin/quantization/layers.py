"""Every layer by its own format: weights beside float activations first, then the layers that compute on integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shohin.data import Call
from shohin.evidence.calibration import Ranges
from shohin.formats import Scheme, is_scheme
from shohin.program import Program
from shohin.quantization.quantized import Quantized
from shohin.quantization.static import LeastScale, quantize_program
from shohin.quantization.weights import quantize_weights


def quantize_layers(
    program: Program,
    calls: Sequence[Call],
    formats: Mapping[str, str],
    *,
    rounding: str = "auto",
    ranges: Ranges = "mse",
    smoothing: bool = True,
    least_scale: LeastScale | None = None,
    seed: int = 0,
) -> Quantized:
    """The program with each layer in its format.

    Args:
        formats: layer address -> "int8" (weights and activations) or a weight scheme; a layer that is absent stays float.
        rounding: of the weight schemes; see `quantize_weights`.
        ranges, smoothing, least_scale: of the integer layers; see `quantize_program`.

    Raises:
        PlanError, DataError: as these two do.
    """
    schemes = {address: Scheme.parse(text) for address, text in formats.items() if is_scheme(text)}
    integer = formats.keys() - schemes.keys()
    if not schemes:
        return quantize_program(program, set(integer), calls, ranges=ranges, smoothing=smoothing, least_scale=least_scale)
    alone = quantize_weights(program, calls, schemes, rounding=rounding, seed=seed)
    if not integer:
        return alone
    static = quantize_program(alone.program, set(integer), calls, ranges=ranges, smoothing=smoothing, least_scale=least_scale)
    folded = replace(static.folded, folded=alone.folded.folded)
    return Quantized(folded, static.activations, {**alone.weights, **static.weights}, static.sites)
