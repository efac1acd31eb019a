"""Generation in two functions of tensors alone: the state goes in and comes out as plain tensors, for torch.export and ONNX."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.shared.states.cache import RecurrentCache
from ..modeling.shared.states.state_layer import RecurrentStateLayer


def _state_of(cache: RecurrentCache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in layer._all_states()]


def _cache_of(config, sizes: list[int], state: tuple[torch.Tensor, ...]) -> RecurrentCache:
    cache, first = RecurrentCache(config=config), 0
    for layer, size in zip(cache.layers, sizes):
        layer._store(tuple(state[first : first + size]))
        first += size
    return cache


def _empty_cache(model: PreTrainedModel, batch: int) -> RecurrentCache:
    cache = RecurrentCache(config=model.config)
    others = sorted({type(layer).__name__ for layer in cache.layers if not isinstance(layer, RecurrentStateLayer)})
    if others:
        raise ValueError(
            f"the model has layers with a growing cache ({', '.join(others)}): only models whose layers are all recurrent "
            "have a state of fixed shapes that can be exported"
        )
    # A padded token writes nothing, so what it leaves behind is the state before the first token.
    nothing = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        model(nothing, attention_mask=nothing, cache=cache, use_cache=True)
    model.train(training)
    return cache


def empty_state(model: PreTrainedModel, batch: int = 1) -> tuple[torch.Tensor, ...]:
    """The state before the first token: for each layer its tensors `(batch, ...)`, then the count of tokens `(batch,)`.

    Raises:
        ValueError: the model has layers that are not recurrent.
    """
    return tuple(_state_of(_empty_cache(model, batch)))


def state_names(model: PreTrainedModel) -> list[str]:
    """A name for each tensor of the state, in order: `state_<layer>_<tensor>`."""
    layers = _empty_cache(model, 1).layers
    return [f"state_{i}_{j}" for i, layer in enumerate(layers) for j in range(layer.number_of_states)]


class DecodeStep(nn.Module):
    """`(input_ids (B, 1), *state) -> (logits (B, vocabulary), *state)`: one token on.

    Args:
        model (`PreTrainedModel`): a causal language model of recurrent layers, in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.sizes = [layer.number_of_states for layer in _empty_cache(model, 1).layers]

    def forward(self, input_ids: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        cache = _cache_of(self.model.config, self.sizes, state)
        logits = self.model(input_ids, cache=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1], *_state_of(cache)


class Prefill(nn.Module):
    """`(input_ids (B, T)) -> (logits (B, vocabulary) after the last token, *state)`: a whole prompt at once.

    Args:
        model (`PreTrainedModel`): a causal language model of recurrent layers, in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        _empty_cache(model, 1)  # refuses what cannot be exported
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        cache = RecurrentCache(config=self.model.config)
        logits = self.model(input_ids, cache=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1], *_state_of(cache)
