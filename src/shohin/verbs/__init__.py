"""The verbs beside `optimize`: each combines rooms and returns a `Candidate`; none changes the user's model."""

from shohin.verbs.distillation import distill
from shohin.verbs.profiling import Profile, profile
from shohin.verbs.pruning import prune
from shohin.verbs.quantization import quantize
from shohin.verbs.shipping import export, search, verify
from shohin.verbs.structure import cut, understand, view

__all__ = ["Profile", "cut", "distill", "export", "profile", "prune", "quantize", "search", "understand", "verify", "view"]
