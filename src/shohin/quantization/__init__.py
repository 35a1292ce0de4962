"""Fewer bits: sites, ranges, weight grids, bias correction and the view that simulates them."""

from shohin.quantization.simulate import simulate
from shohin.quantization.sites import Sites, find_sites, quantizable
from shohin.quantization.static import Quantized, placeholder, quantize_program, weight_quantizer

__all__ = ["Quantized", "Sites", "find_sites", "placeholder", "quantizable", "quantize_program", "simulate", "weight_quantizer"]
