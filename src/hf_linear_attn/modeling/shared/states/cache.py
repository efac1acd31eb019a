"""A cache of states of fixed size that can be saved, loaded in another process, and forked."""

import copy
from typing import Any

import torch
from transformers import DynamicCache

from ...kernels.tracing import making_buffers
from ..compat import DynamicLayer
from ..files.state_file import read_state, write_state
from .state_layer import RecurrentStateLayer, detach_copies


def hold_in(layer, dtype: torch.dtype) -> None:
    """Turn the keys and values of a cache layer into the dtype that a model computes in, if they came from another's."""
    if layer.keys is not None and layer.keys.dtype != dtype:
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)


class RecurrentCache(DynamicCache):
    """A `DynamicCache` whose conversation can be saved, loaded in another process, and forked.

    `generate()` and `forward` make one by themselves; build one with `RecurrentCache(config=model.config)` to hold on to it.
    """

    config: Any = None  # of the model; whoever rebuilds a cache without `__init__` may leave it out

    def __init__(self, ddp_cache_data=None, config=None, **kwargs):
        super().__init__(ddp_cache_data, config, **kwargs)
        self.config = config

    def state_size(self) -> int:
        """Bytes of all tensors in the cache. For recurrent layers the number does not depend on the length of the text."""
        return sum(tensor.numel() * tensor.element_size() for layer in self.layers for tensor in _held(layer).values())

    def fork(self) -> "RecurrentCache":
        """An independent copy: two continuations of one conversation. It has no part in a backward through this one."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict) -> "RecurrentCache":
        memo[id(self.config)] = self.config  # the model's
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with making_buffers():
            for layer in self.layers:
                if not isinstance(layer, RecurrentStateLayer):
                    detach_copies(layer.__dict__, memo)
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            if isinstance(
                layer, DynamicLayer
            ):  # Transformers 5.17 would put zeros in the place of keys, and count them
                layer.keys = layer.values = None
                layer.is_initialized = False
        super().reset()

    def save(self, path) -> None:
        """Write the state to a safetensors file, from which `RecurrentCache.load` resumes exactly, in any process.

        The file also says which model it belongs to: family, and the part of the configuration that decides what is computed.

        Raises:
            ValueError: no token has been seen, or the state is not one that the model could go on from (NaN in it; layers
                that have seen different texts).
        """
        if self.config is None:
            raise ValueError(
                "this cache does not know its model, which its file has to name: build it with "
                "`RecurrentCache(config=model.config)`"
            )
        lengths = [int(layer.get_seq_length()) for layer in self.layers]
        if not any(lengths):
            raise ValueError("nothing to save: this cache has not seen a token yet; run the model on a prompt first")
        expected = self.config.state_tensors(max(lengths))
        tensors = {}
        for i, (layer, length) in enumerate(zip(self.layers, lengths)):
            for name, tensor in _held(layer).items() if length else ():
                if not hasattr(layer, "saved_tensors"):
                    # A static layer has empty columns on the right, a recording one more than its window on the left.
                    end = min(length, tensor.shape[2])
                    tensor = tensor[:, :, max(0, end - expected[i][name].shape[1]) : end]
                tensors[f"layers.{i}.{name}"] = tensor
        write_state(path, self.config, lengths, tensors)

    @classmethod
    def load(cls, path, config, device: str | torch.device | int | None = None) -> "RecurrentCache":
        """Read a state written by `save`.

        Args:
            path: the file.
            config (`PreTrainedConfig`): the configuration of the model that will go on with it.
            device (*optional*): where to put the tensors; the CPU by default.

        Raises:
            ValueError: the file is damaged, holds no state, or holds one of another model than `config` describes; the message
                names the field that differs. Files of release 0.1.0 name no model: only shapes and dtypes are compared.
            OSError: the file cannot be opened.
        """
        lengths, layers = read_state(path, config)
        cache = cls(config=config)
        for layer, length, tensors in zip(cache.layers, lengths, layers):
            if device is not None:
                tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            if not length:
                continue
            if isinstance(layer, RecurrentStateLayer):
                layer.load_tensors(tensors, length)
            else:
                layer.update(tensors["keys"], tensors["values"])
                if hasattr(
                    layer, "cumulative_length"
                ):  # of a sliding window, which holds fewer columns than it has seen
                    layer.cumulative_length = length
        return cache


def _held(layer) -> dict[str, torch.Tensor]:
    """The tensors of a layer by name, empty before the first token."""
    if isinstance(layer, RecurrentStateLayer):
        return layer.saved_tensors()
    return {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
