"""What data says of a model: streaming statistics in bounded memory, fed with tensors."""

from shohin.evidence.batchnorm import recalibrate
from shohin.evidence.divergence import Divergence, answers
from shohin.evidence.fisher import UnitSaliency, gate_gradients, unit_contributions, unit_saliency
from shohin.evidence.gram import GramAccumulator, Moments
from shohin.evidence.histogram import ChannelRange, Histogram
from shohin.evidence.ranges import grid, mse_range, percentile_range, quantization_error
from shohin.evidence.rows import Window, conv_rows, linear_rows

__all__ = [
    "ChannelRange",
    "Divergence",
    "GramAccumulator",
    "Histogram",
    "Moments",
    "UnitSaliency",
    "Window",
    "answers",
    "conv_rows",
    "gate_gradients",
    "grid",
    "linear_rows",
    "mse_range",
    "percentile_range",
    "quantization_error",
    "recalibrate",
    "unit_contributions",
    "unit_saliency",
]
