"""What can be chosen in a program."""

from shohin.graph.costs import Edge, Extent, Operator, Term
from shohin.graph.graph import Graph, understand_program, with_costs
from shohin.graph.labels.context import Frozen
from shohin.graph.regions import Region
from shohin.graph.units import UnitGroup, kept_indices

__all__ = [
    "Edge",
    "Extent",
    "Frozen",
    "Graph",
    "Operator",
    "Region",
    "Term",
    "UnitGroup",
    "kept_indices",
    "understand_program",
    "with_costs",
]
