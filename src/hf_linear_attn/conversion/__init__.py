"""Published checkpoints and pretrained models into our families."""

from .linearize import linearize
from .published import from_published

__all__ = ["from_published", "linearize"]
