"""A decoding step as a CUDA graph: recorded once, then replayed, so that generate() waits for the GPU and not for Python.

A recurrent step reads and writes the same tensors each time: weights, the token, the states of the cache. So the kernels of one
step, recorded with their addresses, are those of all later steps. Recording takes about as long as one step in Python, where a
compiler would take a minute.
"""

import warnings

import torch
from transformers import Cache

from ...kernels.tracing import has_global_hooks
from ..compat import CACHE_NAME, is_output_recorder, rename_cache

# What a step may be called with, besides names whose value is None or False; generate() sends no others unasked.
TENSORS = ("input_ids", "position_ids")
OPTIONS = ("use_cache", "return_dict", "logits_to_keep")


class DecodingGraph:
    """Stands in for `model(...)` in a loop that decodes token by token: its second step is recorded, later ones are replayed.

    A call that a graph cannot hold (several tokens, padding, requested attention maps, a cache that keeps keys or records its
    past, a layer with hooks) goes to the model. Make one for each loop: weights must stay where they are. The returned logits are
    overwritten by the next call.
    """

    def __init__(self, model):
        self.model = model
        self._seen = self._recorded = None
        self._graph = self._output = None
        self._inputs: dict[str, torch.Tensor] = {}
        self._length = 0
        self._refused = False
        self._watched: bool | None = None

    def __call__(self, **inputs):
        """As the model, keyword arguments only."""
        inputs = rename_cache(inputs, CACHE_NAME)
        kind = None if self._refused else self._kind(inputs)
        if kind is None:
            return self.model(**inputs)
        with torch.cuda.device(inputs["input_ids"].device):
            return self._step(kind, inputs)

    def _step(self, kind, inputs):
        if kind != self._recorded:
            if kind != self._seen:  # the first of its kind: kernels are built and chosen now
                self._seen = kind
                return self.model(**inputs)
            if not self._record(inputs):
                return self.model(**inputs)
            self._recorded = kind
        elif not self._has_position(inputs[CACHE_NAME]):
            return self.model(**inputs)
        else:
            for name, tensor in self._inputs.items():
                tensor.copy_(inputs[name])
            for layer in inputs[CACHE_NAME].layers:
                if not isinstance(layer.cumulative_length, torch.Tensor):
                    layer.cumulative_length += 1
        self._length += 1
        self._graph.replay()
        return self._output

    def _kind(self, inputs):
        """What a recording depends on (shapes, addresses, options); None for a call that cannot be recorded."""
        ids, cache = inputs.get("input_ids"), inputs.get(CACHE_NAME)
        if not isinstance(ids, torch.Tensor) or not ids.is_cuda or ids.dim() != 2 or ids.shape[1] != 1:
            return None
        if torch.is_grad_enabled() or self.model.training or not isinstance(cache, Cache) or self._is_watched():
            return None
        known = (CACHE_NAME, *TENSORS, *OPTIONS)
        if any(value is not None and value is not False for name, value in inputs.items() if name not in known):
            return None
        if isinstance(inputs.get("logits_to_keep"), torch.Tensor):
            return None
        addresses = []
        for layer in cache.layers:
            tensors = layer.step_tensors() if hasattr(layer, "step_tensors") else None
            if tensors is None:
                return None
            addresses += [x.data_ptr() for x in tensors]
        shapes = [(name, tuple(inputs[name].shape)) for name in TENSORS if inputs.get(name) is not None]
        options = [inputs.get(name) for name in OPTIONS]
        return id(cache), tuple(addresses), tuple(shapes), tuple(options)

    def _is_watched(self) -> bool:
        """Whether a hook is registered on a layer (`is_watched`); looked up once a loop."""
        if self._watched is None:
            self._watched = is_watched(self.model)
        return self._watched

    def _has_position(self, cache) -> bool:
        """Whether a learned table of positions surely has a row for this token; a recording cannot look."""
        config = self.model.config
        if getattr(config, "position_embedding_type", None) != "learned":
            return True
        return self._length < config.max_position_embeddings

    def _record(self, inputs) -> bool:
        """Record the model on copies of the inputs; False (and a warning) where that is impossible."""
        cache = inputs[CACHE_NAME]
        self._length = int(cache.get_seq_length())
        if not self._has_position(cache):
            return False
        before = [layer.cumulative_length for layer in cache.layers]
        self._inputs = {name: inputs[name].clone() for name in TENSORS if inputs.get(name) is not None}
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._output = self.model(**{**inputs, **self._inputs})
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self._refused = True
            # A recording that breaks off leaves the generator of random numbers waiting for its end; a copy does not wait.
            generator = torch.cuda.default_generators[inputs["input_ids"].device.index]
            generator.graphsafe_set_state(generator.clone_state())
            for layer, length in zip(cache.layers, before):
                layer.cumulative_length = length
            warnings.warn(
                f"a decoding step cannot be recorded as a CUDA graph, steps run one by one: {error}", stacklevel=2
            )
            return False
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = graph
        return True


def is_watched(model: torch.nn.Module) -> bool:
    """Whether a hook, or a `forward` put in the place of its own, is registered on a layer: a replayed step calls neither.

    The hooks by which Transformers collects outputs on request do not count.
    """
    for layer in model.modules():
        replaced = layer is not model and "forward" in vars(layer)
        if replaced or layer._forward_pre_hooks or not all(map(is_output_recorder, layer._forward_hooks.values())):
            return True
    return has_global_hooks()
