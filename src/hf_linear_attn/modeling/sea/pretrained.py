"""What all SEA models share: construction over a host, initialisation, and the forward that prepares ranks, masks and caches."""

import functools
import inspect
import math
from dataclasses import field, make_dataclass, replace

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from ..kernels.plain_layers import table_rows
from ..kernels.tracing import can_read_values
from ..shared.body import check_direction, open_cache, read_call
from ..shared.compat import (
    CACHE_NAME,
    CACHE_NAMES,
    answer_to_both_names,
    answering_to_both_names,
    cache_keyword,
    drop_rules_without_modules,
    either_cache_name,
    init,
    keep_attention,
    rebuilt_by,
)
from ..shared.files.checkpoint import PortableCheckpointMixin
from ..shared.heads import check_classes, check_labels
from ..shared.sequence import DOCUMENT_KEYWORDS, HARMLESS_KEYWORDS, ONE_ANSWER, SequenceInputs, check_token_ids
from .attention import SeaAttentionCore
from .configuration_sea import SEA_FIELDS, SeaConfig
from .host_attention import (
    ATTENTION_NAME,
    LayerResults,
    SeaCall,
    check_attention,
    register_attention,
    sea_call,
)
from .hosts import (
    attention_layers,
    embedding_size,
    find_host,
    head_size,
    key_heads,
    know_padding,
    padding_known,
    tokens_for_host,
)
from .kernel_attention import orthogonal_gaussian_features

PACKING_KEYWORDS = frozenset(["seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"])


class SeaPreTrainedModel(PortableCheckpointMixin, PreTrainedModel):
    """A host with SEA cores: construction, initialisation, and the forward that prepares ranks, masks and caches."""

    config: SeaConfig
    base_model_prefix = "host"
    supports_gradient_checkpointing = True
    _tied_weights_keys: dict[str, str] = {}  # the host's count; PEFT looks for them only where there is a dict
    labels_of = "tokens"  # or "texts": what an answer of the model is about
    _is_stateful = False
    _can_compile_fullgraph = False
    _skip_keys_device_placement = [*CACHE_NAMES, "sea_call"]

    def _build(self, config: SeaConfig, auto_class, attribute: str | None = None, **kwargs) -> None:
        """Make the host with the registered attention and put a core into each of its layers."""
        register_attention()
        check_attention(config._attn_implementation)
        kwargs |= {"attn_implementation": ATTENTION_NAME, "dtype": torch.get_default_dtype()}
        try:
            host = auto_class.from_config(config.host_config, **kwargs)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError(
                f"Transformers has no {auto_class.__name__.removeprefix('AutoModel')} model for the host "
                f"{config.host_config.model_type!r}, so {type(self).__name__} cannot be built over it"
            ) from error
        config.host_config = host.config
        drop_rules_without_modules(host)
        layers = attention_layers(host, config.host_config)
        keep_attention(layers, config.host_config, ATTENTION_NAME)
        know_padding(host)
        for index, layer in enumerate(layers):
            if index not in config.softmax_layers:
                layer.sea = SeaAttentionCore(config.core_options())
        setattr(self, attribute or self.base_model_prefix, host)
        self.host_name = attribute or self.base_model_prefix

    def loss_of(self, output: ModelOutput, sequence: SequenceInputs, *targets, **more) -> torch.Tensor:
        """The loss of an output for this model's task, by the rules of the other families (a host's own differ): the teacher's
        loss in a distillation, too. `targets` as in forward, `count` is `num_items_in_batch`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no task")

    @property
    def host_model(self) -> PreTrainedModel:
        """The host: Transformers' own model."""
        return getattr(self, self.host_name)

    def sea_layers(self) -> dict[int, SeaAttentionCore]:
        """The SEA cores by layer."""
        layers = attention_layers(self, self.config.host_config)
        return {i: layer.sea for i, layer in enumerate(layers) if hasattr(layer, "sea")}

    def set_sparsity(self, k: int) -> None:
        """Attend to `k` keys a query and head from now on: trained with one k, a model may run with another."""
        options = replace(self.config.core_options(), k=k)
        self.config.k = k
        for module in self.modules():  # also a copy of a core, which an adapter trains instead
            if isinstance(module, SeaAttentionCore):
                module.options = options

    def redraw_features(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features in every layer (training only: the estimator must get used to them)."""
        for core in self.sea_layers().values():
            core.redraw_features(generator)

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Refuse every attention but SEA's; "eager", which asks for no other, changes nothing (ValueError otherwise)."""
        check_attention(attn_implementation)
        self.config._attn_implementation = {"": "eager", "host_config": ATTENTION_NAME}

    def get_input_embeddings(self):
        """The host's."""
        return self.host_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Set the host's."""
        self.host_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        """The host's, None for a body."""
        return self.host_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        """Set the host's."""
        self.host_model.set_output_embeddings(new_embeddings)

    @torch.no_grad()
    def initialize_weights(self):
        """First SEA's parameters, which the host's own initialisation does not know, then everything else."""
        for core in self.sea_layers().values():
            _initialize_core(core, self.config)
        super().initialize_weights()

    @either_cache_name
    def _run_host(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        use_cache=None,
        output_sea=False,
        distillation=None,
        read=None,
        **kwargs,
    ) -> tuple[ModelOutput, SeaCall]:
        """Prepare ranks, masks and caches, call the host, collect what the layers left.

        With `read` it is the host's body that is called, and `read(output, call)` makes the output in the stead of its head.
        """
        # First phase: what is refused, and what the call and the configurations ask for.
        check_call(self, input_ids, inputs_embeds, kwargs)
        kwargs.pop("is_causal", None)
        self._apply_switches(kwargs)
        tokens, causal = input_ids if inputs_embeds is None else inputs_embeds, self.config.is_causal
        self._check_token_types(kwargs)
        if distillation is not None:
            check_targets(distillation, self.config.num_hidden_layers, tokens.shape[1])
        # Second phase: the cache, positions and documents, ranks and slots: the same for all layers.
        cache = self._open_cache(cache, use_cache, distillation is not None)
        documents = {name: kwargs.pop(name, None) for name in DOCUMENT_KEYWORDS}
        kwargs = {name: value for name, value in kwargs.items() if name not in PACKING_KEYWORDS}
        call = sea_call(
            read_call(tokens, attention_mask, position_ids, cache, **documents),
            tokens,
            cache,
            output_attentions=bool(kwargs["output_attentions"]),
            distillation=distillation,
            results=LayerResults() if output_sea or distillation is not None else None,
        )
        self._check_length(call.position_ids)
        if call.documents is not None and self.labels_of == "texts":
            raise ValueError(ONE_ANSWER)
        # Third phase: the host.
        if causal:
            kwargs |= {"use_cache": cache is not None, **cache_keyword(cache)}
        kwargs |= {"return_dict": True, "position_ids": call.position_ids, "sea_call": call}
        kwargs |= tokens_for_host(self.host_model, input_ids, inputs_embeds, call.mask)
        if call.key_layout.past_slots == 0:  # what hosts do with the mask besides attention: warn
            kwargs["attention_mask"] = attention_mask
        host = self.host_model if read is None else self.host_model.base_model
        with padding_known(call.mask):
            output = host(**kwargs)
        # Last phase: the output, with what the layers left.
        output = output if read is None else read(output, call)
        if causal and cache is None and CACHE_NAME in output:
            output[CACHE_NAME] = None
        return self._extend(output, call, output_sea), call

    def _extend(self, output: ModelOutput, call: SeaCall, output_sea: bool) -> ModelOutput:
        """A host's output with the fields that were asked for, a tuple over the layers each."""
        found: dict[str, str] = {}
        if output_sea:
            found |= {"estimated_attentions": "estimated_probs", "kept_cells": "cells"}
            if call.output_attentions:
                found["kept_keys"] = "kept"
        if call.distillation is not None:
            found["attention_losses"] = "losses"
            if call.distillation.measure:
                found["fidelity"] = "fidelity"
        layers = range(self.config.num_hidden_layers)  # None in the place of one that keeps softmax attention
        results = [None if call.results is None else call.results.found.get(i) for i in layers]
        values = {name: tuple(getattr(result, each, None) for result in results) for name, each in found.items()}
        return extend_output(output, **values)

    def _apply_switches(self, kwargs: dict) -> None:
        """What a call leaves open is decided by our configuration or by the host's, whichever a user has set."""
        self.config.follow_host()
        host = self.host_model.config
        for config in (self.config, host):
            check_attention(config._attn_implementation)
        if host._attn_implementation != ATTENTION_NAME:
            host._attn_implementation = ATTENTION_NAME  # under "eager" the host would build masks
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.config, name) or getattr(host, name)

    def _check_token_types(self, kwargs: dict) -> None:
        """Take token types out of the host's arguments where it has none; refuse others than 0."""
        if find_host(self.config.host_config).token_types:
            return
        types = kwargs.pop("token_type_ids", None)
        if types is not None and can_read_values(types) and bool(types.any()):
            raise ValueError(
                f"`token_type_ids` other than 0 mean nothing to a {self.config.host_config.model_type} host"
            )

    def _open_cache(self, cache, use_cache: bool | None, distilling: bool) -> Cache | None:
        """The cache to go on from, a new one, or None."""
        causal = self.config.is_causal
        checkpointing = self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.modules())
        if cache is None:
            wanted = self.config.use_cache if use_cache is None else use_cache
            return open_cache(self, None, causal and wanted and not (checkpointing or distilling))
        if checkpointing:
            raise ValueError(f"`{CACHE_NAME}` cannot be updated under checkpointing, which runs layers twice")
        if not causal:
            raise ValueError(f"`{CACHE_NAME}` needs a causal host; a bidirectional SEA model reads whole texts")
        cache = open_cache(self, cache, use_cache)
        keys, host = cache.layers[0].keys, self.config.host_config
        if keys is not None and (keys.shape[1], keys.shape[3]) != (key_heads(host), head_size(host)):
            raise ValueError(
                f"`{CACHE_NAME}` holds {keys.shape[1]} key heads of size {keys.shape[3]}, this model has {key_heads(host)} of "
                f"{head_size(host)}: it comes from another model"
            )
        return cache

    def _check_length(self, positions: torch.Tensor) -> None:
        if not find_host(self.config.host_config).learned_positions or not can_read_values(positions):
            return
        limit = self.config.host_config.max_position_embeddings
        if positions.shape[-1] + 1 > limit or positions.device.type == "cpu":
            longest = int(positions.max()) + 1
            if longest > limit:
                raise ValueError(
                    f"the text has {longest} tokens, but the host has learned positions for {limit} "
                    "(`host_config.max_position_embeddings`): shorten it"
                )


def _initialize_core(core: SeaAttentionCore, config: SeaConfig) -> None:
    """Initial values of one core, leaving alone what a checkpoint has filled."""
    std = getattr(config.host_config, "initializer_range", None) or getattr(config.host_config, "init_std", 0.02)
    for linear in (core.encoder.linear, core.row_decoder, core.scaler):
        init.normal_(linear.weight, mean=0.0, std=std)
        init.zeros_(linear.bias)
    for module in core.modules():
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
    core.start_near_host()
    if hasattr(core, "position_table"):
        init.normal_(core.position_table)
    if core.random_features.device.type != "meta":
        drawn = orthogonal_gaussian_features(*core.random_features.shape)
        init.copy_(core.random_features, drawn.to(core.random_features))
    for module in core.modules():
        module._is_hf_initialized = True


def check_call(model, input_ids, inputs_embeds, kwargs: dict) -> None:
    """Refuse tokens of the wrong form and keywords that neither SEA nor the host acts on.

    Raises:
        ValueError: both or none of ids and embeddings, ids outside the vocabulary, embeddings of another width, a direction
            that the host does not have.
        TypeError: an unknown keyword.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of `input_ids` and `inputs_embeds`")
    width = embedding_size(model.config.host_config)
    if input_ids is not None:
        check_token_ids(input_ids, table_rows(model.get_input_embeddings()), model.training)
    elif inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width:
        raise ValueError(f"`inputs_embeds` has shape {tuple(inputs_embeds.shape)}, expected (batch, length, {width})")
    check_direction(kwargs.get("is_causal"), model.config.is_causal)
    known = set(inspect.signature(model.host_model.forward).parameters) | HARMLESS_KEYWORDS | PACKING_KEYWORDS
    known.add("token_type_ids")  # zeros say nothing; others are refused with what the host lacks
    known -= {"encoder_hidden_states", "encoder_attention_mask"}  # of cross-attention, which no host has here
    unknown = sorted(name for name, value in kwargs.items() if name not in known and value is not None)
    if unknown:
        host = model.config.host_config.model_type
        raise TypeError(
            f"unknown keyword(s) {', '.join(unknown)}: neither SEA nor its {host} host would act on "
            "them. Padding is told by `attention_mask`"
        )


def check_targets(distillation, layers: int, length: int) -> None:
    """Refuse targets of layers that the student does not have, and rows that a text of `length` tokens does not have."""
    foreign = sorted(set(distillation.targets) - set(range(layers)))
    if foreign:
        raise ValueError(
            f"`distillation.targets` has layers {foreign}, but the student has 0 to {layers - 1}: distil from a teacher with as "
            "many layers"
        )
    rows = distillation.loss_rows
    if rows is None or rows.device.type != "cpu" or not can_read_values(rows):
        return
    if not rows.numel() or int(rows.min()) < 0 or int(rows.max()) >= length:
        raise ValueError(f"`distillation.loss_rows` is {rows.tolist()}, expected some of 0 to {length - 1}")


def check_task_labels(task: str, labels: torch.Tensor | None, tokens: torch.Tensor, num_labels: int) -> None:
    """Refuse labels that do not fit the predictions: `task` is "tokens" (one a token) or "texts" (one, or a row, a text)."""
    if labels is None:
        return
    if task == "tokens":
        check_labels("labels", labels, tokens.shape[:2], "one label a token")
        check_classes("labels", labels, num_labels)
    elif labels.shape[0] != tokens.shape[0]:
        raise ValueError(f"`labels` has {labels.shape[0]} rows, expected {tokens.shape[0]}, one for each text")
    elif labels.dim() == 1 and not labels.is_floating_point() and num_labels > 1:
        check_classes("labels", labels, num_labels)


@functools.cache
def sea_output_class(host_class: type[ModelOutput]) -> type[ModelOutput]:
    """The subclass of a host's output class with SEA's fields, each None unless it was asked for.

    They are fields of a class, not keys added to an output: what takes outputs apart and puts them together again
    (DistributedDataParallel, FSDP, pipelines of stages) builds them from their fields.
    """
    fields = [(name, tuple | None, field(default=None)) for name in SEA_FIELDS]
    name, bases = f"Sea{host_class.__name__}", (answering_to_both_names(host_class),)
    made = make_dataclass(name, fields, bases=bases, namespace={"__module__": __name__})
    return rebuilt_by(made, sea_output_class, host_class)


def extend_output(output: ModelOutput, **found: tuple) -> ModelOutput:
    """`output` with these of SEA's fields."""
    return sea_output_class(type(output))(**output, **found) if found else answer_to_both_names(output)


def with_loss(output: ModelOutput, loss: torch.Tensor) -> ModelOutput:
    """An output that had no loss with this one in its place: the first of the fields, also where they become a tuple."""
    return type(output)(loss=loss, **output)
