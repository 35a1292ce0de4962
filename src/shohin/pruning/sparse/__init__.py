"""Sparse weights: patterns of zeros, which elements go, what the others become, and how they are trained and stored."""

from shohin.pruning.sparse.allocated import ALLOCATIONS, allocated
from shohin.pruning.sparse.gradients import Gradients, gradients
from shohin.pruning.sparse.layout import output_error
from shohin.pruning.sparse.masked import masked, masks_of
from shohin.pruning.sparse.obc import obc
from shohin.pruning.sparse.optimal import improved, optimal
from shohin.pruning.sparse.patterns import Pattern
from shohin.pruning.sparse.sequential import CRITERIA, DATA_FREE, sparsify
from shohin.pruning.sparse.sparsegpt import sparsegpt
from shohin.pruning.sparse.storage import pack, read, stored_bytes, unpack, write
from shohin.pruning.sparse.weights import dense_weights, patterns_for, sparse_weights

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "DATA_FREE",
    "Gradients",
    "Pattern",
    "allocated",
    "dense_weights",
    "gradients",
    "improved",
    "masked",
    "masks_of",
    "obc",
    "optimal",
    "output_error",
    "pack",
    "patterns_for",
    "read",
    "sparse_weights",
    "sparsegpt",
    "sparsify",
    "stored_bytes",
    "unpack",
    "write",
]
