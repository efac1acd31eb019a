"""The cache of one causal SEA layer: keys and values of all tokens, and the estimator's state of fixed size."""

from collections.abc import Callable

import torch

from ..shared.compat import STATIC_LAYER_TYPE_MAPPING
from ..shared.states.cache import hold_in
from ..shared.states.past_columns import count_tokens, making_buffers
from ..shared.states.state_layer import RecurrentStateLayer

SEA_LAYER_TYPE = "hf_linear_attn_sea"


class SeaCacheLayer(RecurrentStateLayer):
    """Keys and values (B, G, S, D) by slot, which slots hold real tokens, and the state that `RecurrentStateLayer`
    keeps.

    Sparse attention may pick any earlier key, so keys and values grow with the text, as in softmax attention; what
    the estimator adds does not. With `max_cache_len` (a static cache) the buffers are made once. A layer that keeps
    softmax attention uses the same class and leaves the state empty.
    """

    _layer_type = SEA_LAYER_TYPE
    holds_keys = True
    is_compileable = False  # which keys are read depends on the data

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.key_mask: torch.Tensor | None = None  # (B, slots) bool; None: no slot is padded
        self.slots = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append keys and values (B, G, T, D); returns those of all slots (a static cache: its whole buffers)."""
        new = key_states.shape[2]
        hold_in(self, key_states.dtype)
        if self.max_cache_len is None:
            self.keys = key_states if self.keys is None else torch.cat([self.keys, key_states], dim=2)
            self.values = value_states if self.values is None else torch.cat([self.values, value_states], dim=2)
        else:
            if self.slots + new > self.max_cache_len:
                raise ValueError(
                    f"a static cache of {self.max_cache_len} tokens cannot hold {self.slots} + {new}: make it with a larger "
                    "`max_cache_len`"
                )
            if self.keys is None:
                shape = (*key_states.shape[:2], self.max_cache_len)
                with making_buffers():
                    self.keys = key_states.new_zeros(*shape, key_states.shape[3])
                    self.values = value_states.new_zeros(*shape, value_states.shape[3])
            self.keys[:, :, self.slots : self.slots + new] = key_states
            self.values[:, :, self.slots : self.slots + new] = value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.slots += new
        self.is_initialized = True
        return self.keys, self.values

    def append_mask(self, mask: torch.Tensor | None, batch: int, new: int, device: torch.device) -> None:
        """Note which of the `new` last slots hold real tokens: (B, new) bool, None for all."""
        if mask is None and self.key_mask is None:
            return
        if mask is None:
            mask = torch.ones(batch, new, dtype=torch.bool, device=device)
        past = self.key_mask
        if past is None:
            past = torch.ones(batch, self.slots - new, dtype=torch.bool, device=device)
        self.key_mask = torch.cat([past, mask], dim=1)

    def begin_state(self, state: tuple[torch.Tensor, ...], columns: int, mask: torch.Tensor | None) -> None:
        """Take over the state after the `columns` seen so far, of which none had been kept; mask (B, columns), None for all."""
        self._store((*state, count_tokens(None, state[0], columns, mask, None)))
        if not isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length = columns
        else:
            self._place_length(state[0].device)
            self.cumulative_length.fill_(columns)

    def open_tokens(self) -> torch.Tensor | None:
        """As for every layer, from the slots in use: one that keeps softmax attention has no state that counts."""
        if not self.slots:
            return None
        if self.key_mask is not None:
            return self.key_mask.sum(1)
        return torch.full(self.keys.shape[:1], self.slots, device=self.keys.device)

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """State, keys, values and the mask of slots."""
        if self.keys is None:
            return {}
        own = {"keys": self.keys[:, :, : self.slots], "values": self.values[:, :, : self.slots]} | self.past.tensors()
        if self.key_mask is not None:
            own["key_mask"] = self.key_mask
        return super().saved_tensors() | own

    def load_tensors(self, tensors: dict[str, torch.Tensor], length: int) -> None:
        """Take over what `saved_tensors` gave."""
        if "0" in tensors:
            super().load_tensors(tensors, length)
        self.past.load(tensors)
        self.update(tensors["keys"], tensors["values"])
        self.key_mask = tensors.get("key_mask")

    def get_seq_length(self) -> int:
        """Slots in use, padding included."""
        return self.slots

    def get_max_length(self) -> int:
        """The size of a static cache, else -1."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `-tokens_to_remove` columns: the state by replay, keys and values by cutting."""
        tokens_to_remove = int(tokens_to_remove)  # generate() of some releases passes a tensor
        if self.number_of_states or tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        else:
            self.past.rewind(-tokens_to_remove)
            self.past.forget_records()
        keep = self.slots + tokens_to_remove
        if tokens_to_remove and self.max_cache_len is None and self.keys is not None:
            self.keys, self.values = self.keys[:, :, :keep], self.values[:, :, :keep]
        if self.key_mask is not None:
            self.key_mask = self.key_mask[:, :keep]
        self.slots = keep

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.slots, self.key_mask = 0, None
        if self.max_cache_len is None:
            self.keys = self.values = None

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(function)
        with making_buffers():
            for name in ("keys", "values", "key_mask"):
                if getattr(self, name) is not None:
                    setattr(self, name, function(getattr(self, name)))


STATIC_LAYER_TYPE_MAPPING[SEA_LAYER_TYPE] = SeaCacheLayer
