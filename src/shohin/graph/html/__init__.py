"""A graph as one page: the model with its unit groups coloured."""

from shohin.graph.html.page import to_html

__all__ = ["to_html"]
