"""The state of one recurrent layer, as a layer of Transformers' caches.

A layer holds the tensors its mechanism leaves behind (each `(B, ...)`, at least float32), and how many real tokens each row
has seen. Nothing in it grows with the text. It takes part in beam search, static caches and chunked prefill like
Transformers' own layers, and in assisted decoding by exact rollback: while past recording is on, it keeps the state before
and the inputs since the last `crop`, and undoes tokens by running the mechanism again over the inputs that stay.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch

from ...kernels.tracing import keeps_address, making_buffers, records_gradients
from ..compat import (
    STATIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    LinearAttentionLayer,
)
from .past_columns import PastColumns, count_tokens

LAYER_TYPE_PREFIX = "hf_linear_attn"  # of the layer types that are ours
LAYER_TYPE = "hf_linear_attn_state"


def detach_copies(held, memo: dict) -> None:
    """Let a `copy.deepcopy` with this memo take each tensor in `held` without what made it, which cannot be copied."""
    if isinstance(held, torch.Tensor):
        memo[id(held)] = held.detach().clone()
    elif isinstance(held, (dict, list, tuple)):
        for value in held.values() if isinstance(held, dict) else held:
            detach_copies(value, memo)


# Transformers' two bases disagree on whether `is_compileable` is a property.
class RecurrentStateLayer(LinearAttentionLayer, CacheLayerMixin):  # type: ignore[override]
    """State of one recurrent layer: `recurrent_states[0..n-1]` of the mechanism, then the row counts `(B,)` (int64)."""

    _layer_type = LAYER_TYPE  # Transformers enters subclasses that name a type into its table for dynamic caches
    supports_early_init = False
    holds_keys = False
    is_croppable = True  # `crop` puts the layer back exactly, once `activate_past_recording` has been called
    # Transformers' bases declare these more narrowly than layers use them: a static cache counts in a tensor, say.
    cumulative_length: Any
    recurrent_states: dict[int, Any]
    dtype: Any
    device: Any

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=0)
        self.cumulative_length = 0
        if max_cache_len is not None:
            with making_buffers():  # an int would be a new constant, and a new graph, at each step
                self.cumulative_length = torch.zeros((), dtype=torch.long)
        self.past = PastColumns(
            fixed=max_cache_len is not None
        )  # that of the model's first recurrent layer is kept up to date
        self._base: tuple[torch.Tensor, ...] | None = None
        self._replay: list[tuple[Callable, tuple]] = []

    def get_state(self) -> tuple[torch.Tensor, ...] | None:
        """The mechanism's tensors, or None before the first token."""
        if self.number_of_states == 0 or not self.has_previous_state[0]:
            return None
        return tuple(self.recurrent_states[i] for i in range(self.number_of_states - 1))

    def get_token_counts(self) -> torch.Tensor | None:
        """Real (unpadded) tokens of the document that is open in each row, `(B,)`; None before the first token."""
        if self.number_of_states == 0 or not self.has_previous_state[0]:
            return None
        return self.recurrent_states[self.number_of_states - 1]

    def open_tokens(self) -> torch.Tensor | None:
        """Real tokens (B,) of the document that the next call may go on with; None before the first token."""
        return self.get_token_counts()

    def update_state(
        self,
        state: tuple[torch.Tensor, ...],
        num_new_tokens: int,
        mask: torch.Tensor | None = None,
        replay: tuple[Callable, tuple[torch.Tensor | None, ...]] | None = None,
        segment_ids: torch.Tensor | None = None,
    ) -> None:
        """Replace the state by the one after `num_new_tokens` more columns.

        Args:
            state (`tuple` of `torch.Tensor`): the mechanism's new tensors, each with the batch first.
            num_new_tokens (`int`): columns of the call, padding included.
            mask (`torch.Tensor` of shape `(B, num_new_tokens)`, *optional*): which of them were real.
            replay (`tuple`, *optional*): `(advance, inputs)` with `advance(state_or_None, *inputs) -> state`; every input
                is `(B, num_new_tokens, ...)` or None. Needed for `crop`.
            segment_ids (`torch.Tensor` of shape `(B, num_new_tokens)`, *optional*): documents; the count starts anew with
                each, as positions do.
        """
        device = state[0].device
        counts = self.get_token_counts()
        new_counts = count_tokens(counts, state[0], num_new_tokens, mask, segment_ids)
        if self.record_past:
            if replay is None:
                raise RuntimeError("this layer was asked to record its past, but its model passes no `replay`")
            if not self._replay:
                self._base = None if counts is None else tuple(s.clone() for s in self._all_states())
            self._replay.append((replay[0], (*replay[1], mask, segment_ids)))
        self._store((*state, new_counts))
        if isinstance(self.cumulative_length, torch.Tensor):
            self._place_length(device)
            self.cumulative_length.add_(num_new_tokens)
        else:
            self.cumulative_length += num_new_tokens

    def take_step(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor | None]:
        """State, counts (B,) and count of columns, which the caller takes one token on in place.

        The count of columns is None where it is no tensor: that one is taken on here.
        """
        counted = isinstance(self.cumulative_length, torch.Tensor)
        if counted:
            self._place_length(self.device)
        else:
            self.cumulative_length += 1
        *state, counts = self._all_states()
        return tuple(state), counts, self.cumulative_length if counted else None

    def step_tensors(self) -> tuple[torch.Tensor, ...] | None:
        """All tensors that a step of one token changes in place; None if it may make new ones."""
        if type(self) is not RecurrentStateLayer or self.get_state() is None or self.record_past:
            return None
        counted = isinstance(self.cumulative_length, torch.Tensor)
        if counted:
            self._place_length(self.device)
        own = (self.cumulative_length,) if counted else ()
        return (*self._all_states(), *own, *(() if self.past.shift is None else (self.past.shift,)))

    def _place_length(self, device) -> None:
        """Move the count of a static cache to the states' device, once: from then on CUDA graphs rely on its address."""
        if self.cumulative_length.device != device:
            with making_buffers():
                self.cumulative_length = self.cumulative_length.to(device)
            keeps_address(self.cumulative_length)

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """What a saved cache holds of this layer, by name; empty before the first token."""
        if self.get_state() is None:
            return {}
        return {str(i): state for i, state in enumerate(self._all_states())} | self.past.tensors()

    def load_tensors(self, tensors: dict[str, torch.Tensor], length: int) -> None:
        """Take over what `saved_tensors` gave after `length` columns."""
        self._store(tuple(tensors[str(i)] for i in range(sum(name.isdigit() for name in tensors))))
        self.past.load(tensors)
        if isinstance(self.cumulative_length, torch.Tensor):
            self._place_length(self.device)
            self.cumulative_length.fill_(length)
        else:
            self.cumulative_length = length

    def _all_states(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.recurrent_states[i] for i in range(self.number_of_states))

    def _store(self, states: tuple[torch.Tensor, ...]) -> None:
        fits = self.number_of_states == len(states) and all(
            self.recurrent_states[i].shape == s.shape and self.recurrent_states[i].dtype == s.dtype
            for i, s in enumerate(states)
        )
        if not fits:
            self.number_of_states = len(states)
            self.dtype, self.device = states[0].dtype, states[0].device
            for i, s in enumerate(states):
                with making_buffers():
                    self.recurrent_states[i] = torch.zeros_like(s)
                self.is_recurrent_states_initialized[i] = True
                self.is_conv_states_initialized[i] = False
                keeps_address(self.recurrent_states[i])
        for i, s in enumerate(states):
            if records_gradients(s):
                self.recurrent_states[i] = s  # a copy into the buffer would cut or overwrite what backward needs
            elif self.recurrent_states[i].requires_grad:
                with making_buffers():
                    self.recurrent_states[i] = s.detach().clone()
            else:
                self.recurrent_states[i].copy_(s)  # in place: CUDA graphs rely on the address
            self.has_previous_state[i] = True
        self.is_initialized = True

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `-tokens_to_remove` columns exactly; 0 forgets the recorded past and changes nothing else."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"`crop` takes minus the number of tokens to remove, got {tokens_to_remove}; a recurrent state has no "
                "absolute length to cut to"
            )
        remove = -int(tokens_to_remove)  # assisted decoding of some releases counts in a tensor
        if remove:
            recorded = sum(inputs[0].shape[1] for _, inputs in self._replay)
            if not self.record_past:
                raise RuntimeError(
                    f"cannot undo {remove} tokens: none are recorded. Call `cache.activate_past_recording()` before the tokens "
                    "that may have to be undone"
                )
            if remove > recorded:
                raise RuntimeError(
                    f"cannot undo {remove} tokens: {recorded} are recorded since recording began or since the last `crop`, which "
                    "keeps what it does not undo for good. Go on from a `fork()` made earlier; assisted decoding asks for more "
                    "where assistant and model have two tokenizers: give it an assistant with the model's own"
                )
            self._rewind(recorded - remove)
            self.past.rewind(remove)
        self._replay, self._base = [], None
        self.past.forget_records()

    def _rewind(self, keep: int) -> None:
        base = self._base
        state, counts = (None, None) if base is None else (base[:-1], base[-1])
        removed = 0
        for advance, inputs in self._replay:
            length = inputs[0].shape[1]
            take = min(length, keep)
            if take:
                *arguments, mask, segment_ids = (None if x is None else x[:, :take] for x in inputs)
                state = advance(state, *arguments)
                counts = count_tokens(counts, state[0], take, mask, segment_ids)
            keep, removed = keep - take, removed + length - take
        if state is None or counts is None:
            self.has_previous_state = dict.fromkeys(range(self.number_of_states), False)
        else:
            self._store((*state, counts))
        if isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length.sub_(removed)
        else:
            self.cumulative_length -= removed

    def get_seq_length(self) -> int:
        """Columns seen, padding included, as Transformers counts them: in a static cache a 0-d tensor."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all columns."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: a state has no maximum length."""
        return -1

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing to prepare: the tensors come with the first `update_state`."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Refuse keys and values: there is no place for them."""
        raise NotImplementedError(
            "a recurrent layer keeps a state of fixed size and no keys or values: prefix tuning and quantized caches, "
            "which store keys and values per token, cannot work with it"
        )

    def reset(self) -> None:
        """Forget everything, keep the tensors' addresses."""
        for state in self.recurrent_states.values():
            if state is not None:
                state.detach_().zero_()
        self.has_previous_state = dict.fromkeys(range(self.number_of_states), False)
        self._replay, self._base = [], None
        self.past.reset()
        if isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length.zero_()
        else:
            self.cumulative_length = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give each row the state of row `beam_idx` (beam search)."""
        self._map_rows(lambda s: s.index_select(0, beam_idx.to(s.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._map_rows(lambda s: s.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self._map_rows(lambda s: s[indices.to(s.device)])

    def __deepcopy__(self, memo: dict) -> "RecurrentStateLayer":
        memo |= {id(advance): advance for advance, _ in self._replay}  # methods of the model, which is not copied along
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with making_buffers():
            detach_copies([self.__dict__, self.past.__dict__], memo)
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with making_buffers():
            for i, state in self.recurrent_states.items():
                if state is not None:
                    self.recurrent_states[i] = function(state)
        self.past.map_rows(function)
        self._base = None if self._base is None else tuple(function(s) for s in self._base)
        self._replay = [
            (advance, tuple(None if x is None else function(x) for x in inputs)) for advance, inputs in self._replay
        ]


STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = RecurrentStateLayer
