"""The model as a program: capture, provenance, fingerprint, execution."""

from shohin.program.capture import capture, family, structural_copy
from shohin.program.execute import ProgramModule, call_inputs, interpret, joined_inputs, restore_outputs
from shohin.program.fold import Folded, fold, unfold_state, with_graph
from shohin.program.program import Origin, Program, concrete, shape_of
from shohin.program.provenance import Place, Source

__all__ = [
    "Folded",
    "Origin",
    "Place",
    "Program",
    "ProgramModule",
    "Source",
    "call_inputs",
    "capture",
    "concrete",
    "family",
    "fold",
    "interpret",
    "joined_inputs",
    "restore_outputs",
    "shape_of",
    "structural_copy",
    "unfold_state",
    "with_graph",
]
