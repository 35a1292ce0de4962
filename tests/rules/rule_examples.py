# mypy: ignore-errors
"""All examples: for every rule at least one module in which it runs on what is prunable."""

from __future__ import annotations

import rule_axes
import rule_elementwise
import rule_layers
import rule_movement

EXAMPLES = {**rule_elementwise.EXAMPLES, **rule_movement.EXAMPLES, **rule_layers.EXAMPLES, **rule_axes.EXAMPLES}
FROZEN = {**rule_movement.FROZEN, **rule_axes.FROZEN}
DECOMPOSED = "torch has no operator of this name: its function is made of others"
#: rules that no program can call, and why
EXEMPT = {name: DECOMPOSED for name in ("local_response_norm", "lp_pool1d", "lp_pool2d", "lp_pool3d", "softsign", "tanhshrink")}
