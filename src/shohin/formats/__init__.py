"""Formats: how numbers are held, and quantizers: a format with its scales."""

from shohin.formats.integer import FORMATS, Format, named_format
from shohin.formats.quantizer import Quantizer

__all__ = ["FORMATS", "Format", "Quantizer", "named_format"]
