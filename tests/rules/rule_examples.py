# mypy: ignore-errors
"""All examples: for every rule at least one module in which it runs on what is prunable."""

from __future__ import annotations

import rule_axes
import rule_elementwise
import rule_layers
import rule_movement

EXAMPLES = {**rule_elementwise.EXAMPLES, **rule_movement.EXAMPLES, **rule_layers.EXAMPLES, **rule_axes.EXAMPLES}
FROZEN = {**rule_movement.FROZEN, **rule_axes.FROZEN}
