"""Hedgehog: a pretrained causal Transformer (the host) whose attention keeps a state of fixed size.

    host:      x = x + O softmax(Q K^T) V,     x = x + MLP(x)           as Transformers wrote it, with its own weights
    Hedgehog:  the same, with softmax(Q K^T) V in each layer replaced by `mechanism`: exact softmax over the last w tokens,
    learned
               positive features for all older ones, under one normaliser

The host's body lies in `model.host` with the names of its parameters; what is learned anew is called `hedgehog` in each of its
attention layers. Sources: Hedgehog (arXiv 2402.04347), LoLCATs (arXiv 2410.10254).
"""

import torch
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel

from ..shared.body import (
    RecurrentModelOutput,
    asks_for_attentions,
    check_direction,
    embed_inputs,
    open_cache,
    read_call,
    without_cache_in_training,
)
from ..shared.causal_lm import RecurrentForCausalLM, mask_for_generate
from ..shared.compat import (
    CACHE_NAMES,
    cache_keyword,
    can_return_tuple,
    drop_rules_without_modules,
    either_cache_name,
    keep_attention,
    merge_with_config_defaults,
)
from ..shared.files.checkpoint import PortableCheckpointMixin
from ..shared.heads import SequenceClassificationMixin
from ..shared.sequence import DOCUMENT_KEYWORDS, blank_padding, passes_on
from .configuration_hedgehog import HedgehogConfig
from .host_attention import HedgehogAttention, HedgehogCall, register_attention
from .hosts import ATTENTION_NAME, attention_layers, exits_early, learned_positions, name_in
from .softmax_layers import softmax_masks


@either_cache_name
def hedgehog_mask_for_generate(config, inputs_embeds, attention_mask, cache, **kwargs):
    """What generate() hands on as `attention_mask`: this call's columns, but all of them where softmax layers need them."""
    if config.softmax_layers:
        return attention_mask
    return mask_for_generate(config, inputs_embeds, attention_mask, cache, **kwargs)


class HedgehogPreTrainedModel(PortableCheckpointMixin, PreTrainedModel):
    """Weights' initialisation and what Transformers needs to know of the family."""

    config: HedgehogConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [*CACHE_NAMES, "hedgehog_call"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    create_masks_for_generate = staticmethod(hedgehog_mask_for_generate)

    def hedgehog_layers(self) -> dict[int, HedgehogAttention]:
        """The linear layers' learned parts, by layer."""
        return {module.layer_idx: module for module in self.modules() if isinstance(module, HedgehogAttention)}

    def set_softmax_layers(self, layers: list[int]) -> None:
        """Let `layers` alone keep softmax attention from now on; one that becomes linear begins with new feature maps.

        Raises:
            ValueError: a layer that the host does not have, or all of them.
        """
        self.config.keep_softmax(layers)
        body = self if isinstance(self, HedgehogModel) else self.model
        put_into(attention_layers(body.host, self.config.host_config), self.config)

    @torch.no_grad()
    def initialize_weights(self):
        """First the learned parts, which the host's own initialisation does not know, then everything else."""
        for core in self.hedgehog_layers().values():
            core.reset_parameters()
            core._is_hf_initialized = True
        super().initialize_weights()

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Choose the attention function of the softmax layers; the host's linear layers keep ours."""
        own = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
        super().set_attn_implementation(own | {"host_config": ATTENTION_NAME}, *args, **kwargs)


def put_into(layers: list[nn.Module], config: HedgehogConfig) -> None:
    """Give each of the host's attention modules that is to be linear its learned part, and take it from the others."""
    for index, layer in enumerate(layers):
        has, keeps = hasattr(layer, "hedgehog"), index not in config.linear_layers
        if has and keeps:
            del layer.hedgehog
        elif not has and not keeps:
            like = next(layer.parameters())
            layer.hedgehog = HedgehogAttention(config, index).to(like.device, like.dtype)


class HedgehogModel(HedgehogPreTrainedModel):
    """The host's body with Hedgehog in its attention. Returns hidden states (B, T, d)."""

    def __init__(self, config: HedgehogConfig):
        super().__init__(config)
        register_attention()
        dtype = torch.get_default_dtype()
        self.host = AutoModel.from_config(config.host_config, attn_implementation=ATTENTION_NAME, dtype=dtype)
        self.host.config = config.host_config  # whose number of layers counts, while a draft is written with fewer
        config.host_config._attn_implementation = ATTENTION_NAME
        layers = attention_layers(self.host, config.host_config)
        keep_attention(layers, config.host_config, ATTENTION_NAME)
        put_into(layers, config)
        drop_rules_without_modules(self.host)
        self.max_positions = (
            config.max_position_embeddings if learned_positions(self.host, config.host_config) else None
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        """The host's."""
        return self.host.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Set the host's."""
        self.host.set_input_embeddings(value)

    @either_cache_name
    @without_cache_in_training
    @merge_with_config_defaults
    @can_return_tuple
    @passes_on(*DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> RecurrentModelOutput:
        """Run the body.

        Args:
            input_ids (`(B, T)`) or inputs_embeds (`(B, T, d)`): the tokens.
            attention_mask (`(B, T)`, or with a cache `(B, past + T)`, *optional*): 1 keeps, 0 is padding, on any side.
            position_ids (`(B, T)`, *optional*): restarting positions mark packed documents.
            cache (`Cache`, *optional*): the states to go on from; updated in place.
            use_cache (`bool`, *optional*): whether to make and return states.
            **kwargs: `seq_idx`, `cu_seq_lens_q` (packed documents), `output_hidden_states`, `output_attentions` ((B, H, T, T) a
            layer,
                the weights of window and features together: for small T).

        Returns:
            [`RecurrentModelOutput`].
        """
        hidden_states = embed_inputs(self, input_ids, inputs_embeds)  # the host adds positions, and scales them
        call = self._open_call(hidden_states, attention_mask, position_ids, cache, use_cache, **kwargs)
        positions = call.position_ids
        if call.mask is not None:
            positions = positions.masked_fill(~call.mask, 0)  # padding, whose position means nothing, takes the first
        wanted = kwargs.get("output_hidden_states")
        output = self.host(
            inputs_embeds=blank_padding(hidden_states, call.mask),
            position_ids=positions,
            use_cache=False,
            output_hidden_states=self.config.output_hidden_states if wanted is None else wanted,
            output_attentions=call.output_attentions,
            return_dict=True,
            hedgehog_call=call,
        )
        return RecurrentModelOutput(
            last_hidden_state=output.last_hidden_state,
            **cache_keyword(call.cache),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _open_call(self, hidden_states, attention_mask, position_ids, cache, use_cache, **kwargs) -> HedgehogCall:
        """Check the inputs and open the cache: what all layers share."""
        check_direction(kwargs.get("is_causal"), causal=True)
        cache = open_cache(self, cache, use_cache)
        past_length = 0 if cache is None else cache.get_seq_length()
        sequence = read_call(hidden_states, attention_mask, position_ids, cache, self.max_positions, **kwargs)
        masks = {}
        if self.config.softmax_layers:
            if cache is not None:
                past = cache.layers[self.config.linear_layers[0]].past
                attention_mask = past.mask_of_keys(attention_mask, past_length, hidden_states.shape[1])
            masks = softmax_masks(self.config, hidden_states, attention_mask, sequence.segment_ids, cache)
        return HedgehogCall(
            sequence.mask,
            sequence.position_ids,
            sequence.segment_ids,
            cache=cache,
            output_attentions=asks_for_attentions(self, kwargs),
            softmax_masks=masks,
            softmax_function=self.config._attn_implementation,
        )


class HedgehogForCausalLM(RecurrentForCausalLM, HedgehogPreTrainedModel, GenerationMixin):
    """The host's causal language model with Hedgehog: generates from a state of fixed size."""

    def __init__(self, config: HedgehogConfig):
        super().__init__(config)
        self.model = HedgehogModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.exits_early = exits_early(self.model.host)
        embedding = name_in(self.model, self.model.get_input_embeddings())
        self._tied_weights_keys = {"lm_head.weight": f"model.{embedding}.weight"}
        self.post_init()


class HedgehogForSequenceClassification(SequenceClassificationMixin, HedgehogPreTrainedModel):
    """Hedgehog with a label for a whole text, read from its last token."""

    def __init__(self, config: HedgehogConfig):
        super().__init__(config)
        self.model = HedgehogModel(config)
        self._build_head(config)
        self.post_init()


__all__ = ["HedgehogForCausalLM", "HedgehogForSequenceClassification", "HedgehogModel", "HedgehogPreTrainedModel"]
