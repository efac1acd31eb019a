"""One call of a model, worked out once for all its layers: padding, positions, documents, the cache, what is asked for.

A body makes one `Call` a forward and hands it to every layer; a layer that is used alone makes its own from the arguments that it
is called with (`takes_call`). No layer changes it. What only some layers need (where the real tokens stand, the multipliers of
rotary positions) is formed when the first of them asks, and kept for the others.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from transformers import Cache

from ..kernels.tracing import is_traced
from .compat import CACHE_NAME, rename_cache
from .positions import PositionFactors, position_factors
from .sequence import SequenceInputs, check_layer_inputs, prepare_sequence
from .token_order import TokenLayout, token_layout

State = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Call(SequenceInputs):
    """What all layers of one forward share. Of `SequenceInputs`: `mask`, `position_ids` and `segment_ids`; and

    cache: a state for each layer, read and updated at the layer's index, or None.
    state, return_state: of a layer used alone: the tensors an earlier call returned, and whether to return them.
    output_attentions: whether attention maps are asked for. output_focus_weights: True, "log" or False.
    kept_mask: (B, past + T) mask of all tokens whose keys a cache keeps; None where it keeps none, or nothing is padded.
    """

    cache: Cache | None = None
    state: State | None = None
    return_state: bool = False
    output_attentions: bool = False
    output_focus_weights: bool | str = False
    kept_mask: torch.Tensor | None = None
    _formed: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def wants_state(self) -> bool:
        """Whether a layer has to form the state after this call."""
        return self.return_state or self.cache is not None

    @property
    def wants_maps(self) -> bool:
        """Whether a layer has to show its weights or attention maps."""
        return bool(self.output_attentions or self.output_focus_weights)

    def layer_cache(self, layer_idx: int):
        """The cache's part for one layer, or None."""
        return None if self.cache is None else self.cache.layers[layer_idx]

    def state_of(self, layer_idx: int) -> State | None:
        """The state from which a layer goes on, None where it begins."""
        return self.state if self.cache is None else self.cache.layers[layer_idx].get_state()

    def layout(
        self, batch: int, length: int, device: torch.device, seen_tokens: torch.Tensor | None = None
    ) -> TokenLayout:
        """Where the real tokens of the (B, T) tokens stand: one sort a forward. `seen_tokens` (B,), which whoever looks at
        ranks knows, are those of the open document before this call.
        """
        return self.once(
            "layout", lambda: token_layout(batch, length, device, self.mask, self.segment_ids, seen_tokens)
        )

    def position_factors(self, kind: str, head_dim: int, theta: float, dtype: torch.dtype) -> PositionFactors:
        """Multipliers of relative positions (see `shared.positions`): one table a forward."""
        key = kind, head_dim, theta, dtype
        return self.once(key, lambda: position_factors(kind, self.position_ids, head_dim, theta, dtype))

    @property
    def mask_of_keys(self) -> torch.Tensor | None:
        """The mask of all tokens so far, those whose keys are in a cache included."""
        return self.mask if self.cache is None else self.kept_mask

    def positioned(self, hidden_states: torch.Tensor) -> "Call":
        """The same with positions: those of tokens (B, T, ...) that begin a text are counted where none are given.

        Raises:
            ValueError: none are given, and the tokens go on from a state or a cache.
        """
        if self.position_ids is not None:
            return self
        if self.state is not None or (self.cache is not None and self.cache.get_seq_length()):
            raise ValueError("`position_ids` are needed to go on from a state with rotary positions")
        sequence = prepare_sequence(hidden_states, self.mask, seq_idx=self.segment_ids)
        return replace(self, mask=sequence.mask, position_ids=sequence.position_ids, _formed={})

    def once(self, key, form: Callable) -> Any:
        """`form()`, which is what every layer that asks for `key` gets: formed when the first of them does."""
        if is_traced():  # a compiler sees by itself that layers ask for the same
            return form()
        if key not in self._formed:
            self._formed[key] = form()
        return self._formed[key]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Call":
        """The same on another device, all but the cache; a model over several devices asks for that before each layer."""
        device = torch.empty(0, device=device).device  # with its index
        own = {name: value for name, value in vars(self).items() if name not in ("cache", "_formed")}
        if all(x.device == device for x in _tensors(own)):
            return self
        moved = {name: _moved(value, device, non_blocking) for name, value in own.items()}
        return self.once(device, lambda: replace(self, **moved, _formed={}))


def _parts(held) -> Iterable:
    """What lies in a collection or a dataclass; nothing in anything else."""
    if isinstance(held, (tuple, list)):
        return held
    if isinstance(held, dict):
        return held.values()
    return vars(held).values() if is_dataclass(held) else ()


def _tensors(held) -> Iterator[torch.Tensor]:
    """All tensors in nested collections and dataclasses."""
    if isinstance(held, torch.Tensor):
        yield held
    for part in _parts(held):
        yield from _tensors(part)


def _moved(held, device, non_blocking):
    """The same with its tensors on another device."""
    if isinstance(held, torch.Tensor):
        return held.to(device, non_blocking=non_blocking)
    parts = [_moved(part, device, non_blocking) for part in _parts(held)]
    if isinstance(held, (tuple, list)):
        return type(held)(*parts) if hasattr(held, "_fields") else type(held)(parts)
    if isinstance(held, dict):
        return dict(zip(held, parts))
    return replace(held, **dict(zip(vars(held), parts))) if is_dataclass(held) else held


ARGUMENTS: dict[str, Any] = {
    "attention_mask": torch.Tensor | None,
    "position_ids": torch.Tensor | None,
    "segment_ids": torch.Tensor | None,
    "cache": Cache | None,
    "state": State | None,
    "return_state": bool,
    "output_attentions": bool,
    "output_focus_weights": bool | str,
}


def takes_call(*names: str):
    """Decorates a layer's `forward(self, hidden_states, call)`: it may be called with the arguments `names`, in this order or by
    name, in place of a `call`.

        layer(hidden_states, call=call)                       within a model
        layer(hidden_states, attention_mask, cache=cache)     alone

    `self.width` is the last dimension of its `hidden_states` (B, T, d), which are checked together with mask and documents
    (`check_layer_inputs`).
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    shown = []
    for name in names:
        default, annotation = (False if ARGUMENTS[name] in (bool, bool | str) else None), ARGUMENTS[name]
        shown.append(
            inspect.Parameter(CACHE_NAME if name == "cache" else name, kind, default=default, annotation=annotation)
        )

    def decorate(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def wrapper(self, hidden_states, *args, call: Call | None = None, **kwargs):
            if call is None:
                call = _own_call(self, forward, names, hidden_states, args, kwargs)
            elif args or kwargs:
                given = ", ".join([*names[: len(args)], *kwargs])
                raise TypeError(f"{forward.__qualname__}() takes `call` or what it is made of, not both: {given}")
            return forward(self, hidden_states, call)

        signature = inspect.signature(forward)
        first, second, _ = signature.parameters.values()
        last = inspect.Parameter("call", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Call | None)
        wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[first, second, *shown, last]
        )
        return wrapper

    return decorate


def _own_call(layer, forward, names, hidden_states, args, kwargs) -> Call:
    """The call of a layer that is used alone."""
    kwargs = rename_cache(kwargs, "cache")
    twice = [name for name in names[: len(args)] if name in kwargs]
    unknown = [name for name in kwargs if name not in names]
    if len(args) > len(names) or twice or unknown:
        wrong = (
            f"{len(args) + 1} positional arguments" if len(args) > len(names) else ", ".join(map(repr, twice + unknown))
        )
        raise TypeError(
            f"{forward.__qualname__}() got {wrong}, expected `hidden_states` and once each {', '.join(names)}"
        )
    given = {**dict(zip(names, args)), **kwargs}
    mask = check_layer_inputs(hidden_states, layer.width, given.pop("attention_mask", None), given.get("segment_ids"))
    return Call(mask, given.pop("position_ids", None), given.pop("segment_ids", None), **given)
