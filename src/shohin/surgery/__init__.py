"""A program through a plan: view, rewrite, cut, proof."""

from shohin.surgery.cut import Cut, Skip, cut, cut_sharing_values
from shohin.surgery.proof import Proof, prove
from shohin.surgery.rewrite import rewrite
from shohin.surgery.rewritten import CannotRewrite, Rewritten
from shohin.surgery.view import confirm, understand, view, view_of

__all__ = [
    "CannotRewrite",
    "Cut",
    "Proof",
    "Rewritten",
    "Skip",
    "confirm",
    "cut",
    "cut_sharing_values",
    "prove",
    "rewrite",
    "understand",
    "view",
    "view_of",
]
