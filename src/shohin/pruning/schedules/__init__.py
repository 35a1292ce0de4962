"""When zeros come: gradually, by movement, with growth, as whole units, in rounds. All use the one training loop."""

from shohin.pruning.schedules.cubic import Ramp, Shares, cubic, geometric, linear, one_shot
from shohin.pruning.schedules.forget import forget
from shohin.pruning.schedules.gradual import gradual
from shohin.pruning.schedules.iterative import Iterated, iterative
from shohin.pruning.schedules.masks import Sparse, gone_share, magnitude, weights_of
from shohin.pruning.schedules.movement import hard_movement, soft_movement
from shohin.pruning.schedules.producing import Slices, producing
from shohin.pruning.schedules.rewinding import Ticket, rewinding
from shohin.pruning.schedules.rigl import random_masks, rigl
from shohin.pruning.schedules.zeros import Zeroed, group_lasso, zero_plan

__all__ = [
    "Iterated",
    "Ramp",
    "Shares",
    "Slices",
    "Sparse",
    "Ticket",
    "Zeroed",
    "cubic",
    "forget",
    "geometric",
    "gone_share",
    "gradual",
    "group_lasso",
    "hard_movement",
    "iterative",
    "linear",
    "magnitude",
    "one_shot",
    "producing",
    "random_masks",
    "rewinding",
    "rigl",
    "soft_movement",
    "weights_of",
    "zero_plan",
]
