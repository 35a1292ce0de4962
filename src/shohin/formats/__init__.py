"""Formats: how numbers are held, and quantizers: a format with its scales."""

from shohin.formats.bits import INT8, Bits, is_bits, is_dynamic
from shohin.formats.blocks import BLOCK_FORMATS, BlockFormat, named_block
from shohin.formats.floating import FLOAT_FORMATS, FloatFormat, named_float
from shohin.formats.integer import FORMATS, Format, named_format
from shohin.formats.powers import power_of_two
from shohin.formats.quantizer import Quantizer
from shohin.formats.scheme import Scheme, is_scheme

__all__ = [
    "BLOCK_FORMATS",
    "FLOAT_FORMATS",
    "FORMATS",
    "INT8",
    "Bits",
    "BlockFormat",
    "FloatFormat",
    "Format",
    "Quantizer",
    "Scheme",
    "is_bits",
    "is_dynamic",
    "is_scheme",
    "named_block",
    "named_float",
    "named_format",
    "power_of_two",
]
