"""The model as a program: capture, provenance, fingerprint, execution."""

from shohin.program.capture import capture
from shohin.program.copies import structural_copy, untie
from shohin.program.execute import ProgramModule, call_inputs, interpret, joined_inputs, restore_outputs
from shohin.program.fold import Folded, fold, unfold_state, with_graph
from shohin.program.inputs import call_of
from shohin.program.origins import family
from shohin.program.program import Origin, Program, concrete, shape_of
from shohin.program.provenance import Place, Source
from shohin.program.refusals import first_lines, user_line

__all__ = [
    "Folded",
    "Origin",
    "Place",
    "Program",
    "ProgramModule",
    "Source",
    "call_inputs",
    "call_of",
    "capture",
    "concrete",
    "family",
    "first_lines",
    "fold",
    "interpret",
    "joined_inputs",
    "restore_outputs",
    "shape_of",
    "structural_copy",
    "unfold_state",
    "untie",
    "user_line",
    "with_graph",
]
