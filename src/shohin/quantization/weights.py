"""Weights on grids while activations stay float: layer by layer, each on the inputs that the rounded layers before it give."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shohin.data import Call
from shohin.errors import DataError, PlanError, closest
from shohin.evidence.hessian import aimed
from shohin.evidence.layers import LayerWeight, layer_weights
from shohin.evidence.reach import picked
from shohin.evidence.walk import Seen, changed_in_turn, looked_at
from shohin.formats import Quantizer, Scheme
from shohin.program import Folded, Program, fold, joined_inputs
from shohin.quantization.grids import fitted_grid
from shohin.quantization.quantized import Quantized
from shohin.quantization.reconstruction import reconstructed
from shohin.quantization.rounding import adaround, descended, gptq, hqq, rescaled
from shohin.quantization.scaling import searched
from shohin.quantization.sites import Sites, base

#: those that need no data; "auto" is "descent" where there are batches, else "nearest"
ROUNDINGS = ("auto", "nearest", "hqq", "gptq", "adaround", "descent", "blocks")
SECOND_ORDER = ("gptq", "adaround", "descent", "blocks")
#: rounds of scales, then codes, after GPTQ
_ROUNDS = 4


def weights_by_address(program: Program) -> dict[str, LayerWeight]:
    """Address of each layer whose weight no operation but layers reads -> that weight."""
    found, _ = layer_weights(program)
    return {program.origins[node].address: weight for weight in found for node in weight.nodes}


def quantize_weights(
    program: Program,
    calls: Sequence[Call],
    schemes: Mapping[str, Scheme],
    *,
    rounding: str = "auto",
    scaled: Collection[str] = (),
    follow: bool = True,
    samples: int = 512,
    rows: int = 16384,
    damp: float = 1e-2,
    seed: int = 0,
) -> Quantized:
    """The program with these layers' weights on grids.

    Memory beside the model: see `shohin.evidence.walk.changed_in_turn`, and about six float64 matrices of the weight that is rounded; for
    "blocks" also `shohin.quantization.reconstruction.reconstructed`.

    Args:
        calls: calibration batches, without labels. May be empty for "nearest" and "hqq".
        schemes: layer address -> how its weight is held.
        rounding: one of `ROUNDINGS`; with batches each of them also moves biases by what rounding moved on the samples. "gptq" rounds the
            columns in the order of their importance and moves each one's error to the rest; "descent" goes on from there: scales by
            least squares for the codes, then codes one by one beside all others, in turn. "adaround" learns for each weight whether it is
            rounded up or down. "blocks" goes on from "descent": codes, scales and biases of a residual block, or of half a transformer
            layer, learn together what the block gives (see `shohin.quantization.reconstruction`).
            A layer with fewer rows than inputs is rounded to the nearest: of so few, correlations are chance.
        scaled: addresses of linear layers whose inputs may be divided by a factor for each channel, if that makes them more exact; needs a
            rounding of second order, and one layer for each weight. See `shohin.quantization.scaling`.
        follow: aim each layer at what the original gave, so that later layers correct what earlier ones left.
        samples, rows, damp, seed: see `shohin.pruning.sparse.sparsify`.

    Raises:
        PlanError: for an unknown rounding or address, or layers that share a weight and are asked for different schemes.
        DataError: if the rounding needs batches and there are none, or an activation is NaN.
    """
    if rounding not in ROUNDINGS:
        raise PlanError(f"rounding={rounding!r} is not known; one of {', '.join(map(repr, ROUNDINGS))}{closest(str(rounding), ROUNDINGS)}")
    if rounding == "auto":
        rounding = "descent" if calls else "nearest"
    if rounding in SECOND_ORDER and not calls:
        raise DataError(f"rounding={rounding!r} needs calibration batches: give Data(train=loader), or rounding='nearest' or 'hqq'")
    folded = fold(program)
    chosen = _chosen(folded.program, schemes)
    quantizers: dict[str, Quantizer] = {}
    factors: dict[str, Tensor | None] = {}
    together = _read_together(folded.program, chosen, scaled)

    def make(weight: LayerWeight, value: Tensor, seen: Seen) -> Tensor:
        scheme, hessian = chosen[weight.name][1], seen.shrunk
        few = seen.moments is not None and hessian is not None and seen.moments.rows < hessian.shape[-1]
        if hessian is None or few or rounding not in SECOND_ORDER:
            q = quantizers[weight.name] = hqq(value, scheme) if rounding == "hqq" else fitted_grid(value, scheme)
            return q.fake(value).detach()
        aim = value if seen.cross is None else aimed(value, hessian, seen.cross).to(value.dtype)
        names = together.get(weight.name, ())
        if names and weight.name not in factors:
            found = searched(
                [folded.program.tensors[name] for name in names], hessian[0], lambda w, h: _rounded(w, h, scheme, damp, rounding)
            )
            factors.update(dict.fromkeys(names, found))
        s = factors.get(weight.name)
        if s is not None:
            aim, hessian = aim * s, hessian / (s[:, None] * s)
        q, codes = _rounded(aim, hessian, scheme, damp, rounding)
        q = quantizers[weight.name] = q if s is None else replace(q, columns=(1 / s).float().double())
        return q.decoded(codes).to(value.dtype)

    weights = [w for w, _ in chosen.values()]
    with torch.no_grad():
        if calls:
            inputs = joined_inputs(folded.program, calls, samples)
            second_order = rounding in SECOND_ORDER
            layers = looked_at(folded.program, weights)
            places = picked(folded.program, inputs, layers, dict.fromkeys(layers, rows), seed)
            changed = changed_in_turn(folded.program, inputs, places, weights, make, moments=second_order, follow=follow and second_order)
        else:
            changed = {w.name: make(w, folded.program.tensors[w.name].detach(), Seen(None)) for w in weights}
    changed |= {alias: changed[w.name] for w in weights for alias in w.names}
    tensors = {**folded.program.tensors, **changed}
    if rounding == "blocks":
        learned, grids = reconstructed(folded.program, tensors, quantizers, weights, calls, samples=samples, seed=seed)
        tensors, quantizers = tensors | learned, quantizers | grids
    done = replace(folded.program, tensors=tensors)
    return Quantized(Folded(done, folded.folded), {}, quantizers, Sites({}, {}, {}, {}))


def _read_together(
    program: Program, chosen: Mapping[str, tuple[LayerWeight, Scheme]], scaled: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """Weight -> all weights of linear layers that read the same activation and are held in the same scheme, for those that may be scaled."""
    nodes = {node.name: node for node in program.graph.nodes}
    found: dict[tuple[str, str], list[str]] = {}
    for weight, scheme in chosen.values():
        node = nodes[weight.nodes[0]]
        alone = len(weight.nodes) == 1 and weight.kind == "linear" and scheme.granularity != "tensor"
        if alone and program.origins[node.name].address in scaled:
            source: Any = node.args[0]
            found.setdefault((base(source).name, str(scheme)), []).append(weight.name)
    return {name: tuple(names) for names in found.values() for name in names}


def _rounded(aim: Tensor, hessian: Tensor, scheme: Scheme, damp: float, rounding: str) -> tuple[Quantizer, Tensor]:
    importance = hessian.diagonal(dim1=-2, dim2=-1).repeat_interleave(len(aim) // len(hessian), 0)
    q = fitted_grid(aim, scheme, importance)
    if rounding == "adaround":
        return q, adaround(aim, hessian, q, damp=damp)
    codes = gptq(aim, hessian, q, damp=damp)
    if rounding in ("descent", "blocks"):
        codes = descended(aim, hessian, q, codes, damp=damp)
        for _ in range(_ROUNDS):
            q = rescaled(aim, hessian, q, codes, damp=damp)
            codes = descended(aim, hessian, q, codes, damp=damp, sweeps=1)
    return q, codes


def _chosen(program: Program, schemes: Mapping[str, Scheme]) -> dict[str, tuple[LayerWeight, Scheme]]:
    known = weights_by_address(program)
    found: dict[str, tuple[LayerWeight, Scheme]] = {}
    for address, scheme in schemes.items():
        if address not in known:
            raise PlanError(f"{address!r} is no layer with a weight of its own{closest(address, known)}")
        weight = known[address]
        if found.setdefault(weight.name, (weight, scheme))[1] != scheme:
            raise PlanError(f"{address!r} shares the weight {weight.name!r} with a layer that is asked for {str(found[weight.name][1])!r}")
    return {w.name: found[w.name] for w in known.values() if w.name in found}  # in the program's order
