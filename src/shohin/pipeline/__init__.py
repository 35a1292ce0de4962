"""The main job and what it leaves behind."""

from shohin.pipeline.main import METHODS, optimize, parse_time
from shohin.pipeline.reading import load

__all__ = ["METHODS", "load", "optimize", "parse_time"]
