"""Checkpoints on the Hub: their code and their cards."""

from .export import PushCodeCallback, add_code

__all__ = ["PushCodeCallback", "add_code"]
