"""A program through a plan: view, rewrite, cut, proof."""

from shohin.surgery.cut import Cut, Skip, cut, cut_sharing_values
from shohin.surgery.parts import CutParts, Parts, cut_parts, understand_parts
from shohin.surgery.proof import Proof, prove
from shohin.surgery.rewrite import rewrite
from shohin.surgery.rewritten import CannotRewrite, Rewritten
from shohin.surgery.view import confirm, understand, view, view_of

__all__ = [
    "CannotRewrite",
    "Cut",
    "CutParts",
    "Parts",
    "Proof",
    "Rewritten",
    "Skip",
    "confirm",
    "cut",
    "cut_parts",
    "cut_sharing_values",
    "prove",
    "rewrite",
    "understand",
    "understand_parts",
    "view",
    "view_of",
]
