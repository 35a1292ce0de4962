"""The model as a program: capture, provenance, fingerprint, execution."""

from shohin.program.capture import capture, family, structural_copy
from shohin.program.execute import ProgramModule, interpret
from shohin.program.program import Origin, Program, concrete, shape_of
from shohin.program.provenance import Place, Source

__all__ = [
    "Origin",
    "Place",
    "Program",
    "ProgramModule",
    "Source",
    "capture",
    "concrete",
    "family",
    "interpret",
    "shape_of",
    "structural_copy",
]
