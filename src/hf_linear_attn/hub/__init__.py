"""Checkpoints on the Hub: their code and their cards."""

from .cards import ModelCardCallback, build_card
from .export import PushCodeCallback, add_code

__all__ = ["ModelCardCallback", "PushCodeCallback", "add_code", "build_card"]
