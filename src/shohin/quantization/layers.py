"""Every layer by its own format: weights beside float activations first, then the layers that compute on integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shohin.data import Call
from shohin.evidence.calibration import Ranges
from shohin.formats import Bits, Scheme, is_scheme
from shohin.program import Program, fold
from shohin.quantization.dynamic import Dynamic, dynamic_layers
from shohin.quantization.floats import is_float_form, round_floats
from shohin.quantization.quantized import Quantized
from shohin.quantization.sites import Sites
from shohin.quantization.static import LeastScale, quantize_program, weight_quantizer
from shohin.quantization.tables import quantize_tables, tables
from shohin.quantization.weights import quantize_weights, weights_by_address


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
        formats: layer address -> "int8" or "wXaY" (weights and activations), either with " dynamic" (linear layers), a weight scheme, or
            a floating-point or block format, in simulation; address of an embedding -> the scheme of its table. What is absent stays
            float.
        rounding: of the weight schemes, and of the weights of integer layers with less than 7 bits; see `quantize_weights`.
        ranges, least_scale: of the integer layers; see `quantize_program`.
        smoothing: of what integer layers read, see there; and let linear layers with weight schemes divide their inputs, see
            `quantize_weights`.
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
    found = _layers(program, calls, shown, formats, rounding, ranges, smoothing, least_scale, seed) if formats else _unchanged(program)
    found = replace(found, weights={**held, **found.weights})
    if not floats:
        return found
    tensors, inputs = round_floats(found.program, original, calls, floats)
    folded = replace(found.folded, program=replace(found.program, tensors=tensors))
    return replace(found, folded=folded, inputs={**found.inputs, **inputs})


def _unchanged(program: Program) -> Quantized:
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
    few = _few_bits(program, integer) if shown and rounding != "nearest" else {}
    found = _unchanged(program)
    if schemes or few:
        scaled = schemes.keys() if smoothing else ()
        found = quantize_weights(program, shown, {**schemes, **few}, rounding=rounding, scaled=scaled, seed=seed)
    known = {address: weight.name for address, weight in weights_by_address(found.program).items()}
    snapped = {address: found.weights[known[address]] for address in few}
    static = {address: bits for address, bits in integer.items() if not bits.dynamic}
    if static:
        both = quantize_program(
            found.program,
            set(static),
            calls,
            formats=static,
            ranges=ranges,
            smoothing=smoothing,
            least_scale=least_scale,
            snapped={known[address]: q for address, q in snapped.items() if address in static},
        )
        folded = replace(both.folded, folded=found.folded.folded)
        found = Quantized(folded, both.activations, {**found.weights, **both.weights}, both.sites)
    if len(static) == len(integer):
        return found
    moving = {address: bits for address, bits in integer.items() if bits.dynamic}
    ready = {known[address]: q for address, q in snapped.items() if address in moving}
    nodes = dynamic_layers(found.program, moving)
    weights = {
        name: ready[name] if name in ready else weight_quantizer(found.program.tensors[name], bits.weights, least_scale)
        for name, bits in nodes.values()
    }
    inputs = {node: Dynamic(bits.activations) for node, (_, bits) in nodes.items()}
    tensors = {name: q.fake(found.program.tensors[name].detach()).detach() for name, q in weights.items()}
    folded = replace(found.folded, program=replace(found.program, tensors={**found.program.tensors, **tensors}))
    return replace(found, folded=folded, weights={**found.weights, **weights}, inputs=inputs)


def _few_bits(program: Program, integer: Mapping[str, Bits]) -> dict[str, Scheme]:
    """Integer layers whose weights have so few bits that the nearest codes are not good enough, as weight schemes.

    A weight that layers share with others is left out: one alone decides.
    """
    wanted = {address: Scheme(bits.weights) for address, bits in integer.items() if bits.weights.bits < 7}
    weights = weights_by_address(program)
    by_name: dict[str, set[str]] = {}
    for address, weight in weights.items():
        by_name.setdefault(weight.name, set()).add(str(wanted.get(address)))
    return {address: s for address, s in wanted.items() if address in weights and len(by_name[weights[address].name]) == 1}
