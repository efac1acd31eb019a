"""Perplexity of a mean loss."""

import math

LARGEST_LOSS = math.log(1.7e308)


def perplexity(loss: float) -> float:
    """exp(loss) of a mean loss in nats per token; infinite where no number is that large (a run that has diverged)."""
    return math.exp(loss) if not loss > LARGEST_LOSS else math.inf
