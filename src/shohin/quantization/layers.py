"""Every layer by its own format: weights beside float activations first, then the layers that compute on integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shohin.data import Call
from shohin.evidence.calibration import Ranges
from shohin.formats import Bits, Scheme, is_scheme
from shohin.program import Program, fold
from shohin.quantization.floats import is_float_form, round_floats
from shohin.quantization.quantized import Quantized
from shohin.quantization.sites import Sites
from shohin.quantization.static import LeastScale, quantize_program
from shohin.quantization.tables import quantize_tables, tables
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
    plainly: bool = False,
) -> Quantized:
    """The program with each layer in its format.

    Args:
        formats: layer address -> "int8" or "wXaY" (weights and activations), a weight scheme, or a floating-point or block format, in
            simulation; address of an embedding -> the scheme of its table. What is absent stays float.
        rounding: of the weight schemes; see `quantize_weights`.
        ranges, smoothing, least_scale: of the integer layers; see `quantize_program`.
        plainly: round weight schemes to the nearest and correct no biases: quick, for what is only measured or compared.

    Raises:
        PlanError, DataError: as these two do.
    """
    floats = {address: text for address, text in formats.items() if is_float_form(text)}
    formats = {address: text for address, text in formats.items() if address not in floats}
    original, embeddings = fold(program).program, tables(program)
    program, held = quantize_tables(program, formats.keys() & embeddings.keys())
    formats = {address: text for address, text in formats.items() if address not in embeddings}
    shown, rounding = ([], "nearest") if plainly else (calls, rounding)
    found = _layers(program, calls, shown, formats, rounding, ranges, smoothing, least_scale, seed) if formats else _tables_alone(program)
    found = replace(found, weights={**held, **found.weights})
    if not floats:
        return found
    tensors, inputs = round_floats(found.program, original, calls, floats)
    folded = replace(found.folded, program=replace(found.program, tensors=tensors))
    return replace(found, folded=folded, inputs=inputs)


def _tables_alone(program: Program) -> Quantized:
    return Quantized(fold(program), {}, {}, Sites({}, {}, {}, {}))


def _layers(
    program: Program,
    calls: Sequence[Call],
    shown: Sequence[Call],
    formats: Mapping[str, str],
    rounding: str,
    ranges: Ranges,
    smoothing: bool,
    least_scale: LeastScale | None,
    seed: int,
) -> Quantized:
    schemes = {address: Scheme.parse(text) for address, text in formats.items() if is_scheme(text)}
    integer = {address: Bits.parse(text) for address, text in formats.items() if address not in schemes}

    def static(given: Program) -> Quantized:
        return quantize_program(given, set(integer), calls, formats=integer, ranges=ranges, smoothing=smoothing, least_scale=least_scale)

    if not schemes:
        return static(program)
    alone = quantize_weights(program, shown, schemes, rounding=rounding, seed=seed)
    if not integer:
        return alone
    both = static(alone.program)
    folded = replace(both.folded, folded=alone.folded.folded)
    return Quantized(folded, both.activations, {**alone.weights, **both.weights}, both.sites)
