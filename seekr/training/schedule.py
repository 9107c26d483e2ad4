"""The learning rate as a function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from seekr.training.settings import Recipe


def learning_rate(recipe: Recipe, step: int, num_steps: int) -> float:
    """Return the rate of step `step` (from 0): warm-up, then constant, linear or cosine to 0."""
    peak, warmup = recipe.learning_rate, recipe.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    match recipe.schedule:
        case "linear":
            return peak * (1.0 - progress)
        case "cosine":
            return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
        case _:
            return peak
