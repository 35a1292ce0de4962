"""Fewer bits: sites, ranges, weight grids, rounding, bias correction and the view that simulates them."""

from shohin.quantization.aware import QAT, AwareModule
from shohin.quantization.dynamic import Dynamic, dynamic_layers
from shohin.quantization.equalization import equalized
from shohin.quantization.fallback import fewest_returned
from shohin.quantization.floats import is_float_form, needs_scale
from shohin.quantization.layers import quantize_layers
from shohin.quantization.quantized import Quantized
from shohin.quantization.rotation import Rotated, rotated, rotation
from shohin.quantization.simulate import simulate
from shohin.quantization.sites import Sites, find_sites, quantizable
from shohin.quantization.static import placeholder, quantize_program, weight_quantizer
from shohin.quantization.tables import TABLE, tables
from shohin.quantization.weights import ROUNDINGS, quantize_weights, weights_by_address

__all__ = [
    "QAT",
    "ROUNDINGS",
    "TABLE",
    "AwareModule",
    "Dynamic",
    "Quantized",
    "Rotated",
    "Sites",
    "dynamic_layers",
    "equalized",
    "fewest_returned",
    "find_sites",
    "is_float_form",
    "needs_scale",
    "placeholder",
    "quantizable",
    "quantize_layers",
    "quantize_program",
    "quantize_weights",
    "rotated",
    "rotation",
    "simulate",
    "tables",
    "weight_quantizer",
    "weights_by_address",
]
