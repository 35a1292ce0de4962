"""Rounding: which code each weight becomes."""

from shohin.quantization.rounding.adaptive import adaround
from shohin.quantization.rounding.hqq import hqq
from shohin.quantization.rounding.second_order import descended, error_of, gptq, rescaled

__all__ = ["adaround", "descended", "error_of", "gptq", "hqq", "rescaled"]
