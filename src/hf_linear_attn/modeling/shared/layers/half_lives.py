"""Half-lives that a layer learns, one a head: how fast what it sums fades."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from ...kernels.tracing import is_traced, making_buffers
from ..precision import accumulation_dtype

SHORTEST_HALF_LIFE = -6.0  # in octaves of a token: exp(-44) a token


class HalfLives:
    """Beside `nn.Module`: the half-life of head h is `half_lives[h] * 2 ** half_life_shift[h]` tokens, or there are none.

    What is learned begins at 0, so that weight decay draws it back to where it began.
    """

    half_lives: tuple[float, ...] | None
    half_life_shift: nn.Parameter | None
    _held_octaves: torch.Tensor | None

    def set_half_lives(self, half_lives: Sequence[float] | None) -> None:
        """Half-lives at first, in tokens, one a head; None: nothing fades."""
        self._held_octaves = self.half_lives = self.half_life_shift = None
        if half_lives is not None:
            self.half_lives = tuple(half_lives)
            self.half_life_shift = nn.Parameter(torch.zeros(len(self.half_lives)))

    def decay(self) -> torch.Tensor | None:
        """The rates (H,) at which terms fade, ln 2 / half-life, in float32 at least; None where they do not."""
        if self.half_life_shift is None:
            return None
        shift = self.half_life_shift.to(accumulation_dtype(self.half_life_shift.dtype))
        octaves = shift + self._octaves(shift.device, shift.dtype)
        return math.log(2) * torch.exp2(-octaves.clamp(min=SHORTEST_HALF_LIFE))

    def _octaves(self, device, dtype):
        """log2 of `half_lives` (H,), copied to a device once: a CUDA graph of a decoding step could not copy it."""
        held = self._held_octaves
        if held is None or held.device != device or held.dtype != dtype:
            with making_buffers():
                held = torch.tensor([math.log2(life) for life in self.half_lives or ()], device=device, dtype=dtype)
            if not is_traced():
                self._held_octaves = held
        return held
