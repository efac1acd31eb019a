"""Pooling and prediction heads of DANet. Source: DANet specification, section 5.1."""

import torch
from torch import nn

from ..kernels.step_linear import step_linear
from ..shared.heads import last_real_token
from ..shared.sequence import padding_mask
from ..shared.vocabulary_logits import vocabulary_logits
from .configuration_danet import DanetConfig
from .norms import ACTIVATIONS, build_norm


class DanetPooler(nn.Module):
    """One vector (B, d) for each text: a token, the mean or the maximum, then dense layer, activation and norm.

    Padding is left out on any side; `pooler_mask_padding=False` takes all columns, as the published model does.
    A row of padding alone pools to a finite vector.
    """

    def __init__(self, config: DanetConfig):
        super().__init__()
        self.pooler = config.pooler
        self.mask_padding = config.pooler_mask_padding
        self.pad_token_id = config.pad_token_id
        self.activation = ACTIVATIONS[config.pooler_act]
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if config.pooler_dense else None
        self.norm = None
        if config.pooler_norm is not None:
            self.norm = build_norm(config.pooler_norm, config.hidden_size, config.maxnorm_eps, config.scaled_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pool `(B, T, d)`; `input_ids` help "last" to see padding where no mask is given."""
        pooled = self._pool(hidden_states, attention_mask, input_ids)
        if self.dense is None:
            return pooled
        pooled = self.activation(self.dense(pooled))
        return pooled if self.norm is None else self.norm(pooled)

    def _pool(self, hidden_states, attention_mask, input_ids):
        mask = None
        if attention_mask is not None and self.mask_padding:
            mask = padding_mask(attention_mask, *hidden_states.shape[:2])
        if self.pooler == "last":
            index = last_real_token(
                hidden_states, input_ids, attention_mask if self.mask_padding else None, self.pad_token_id
            )
        elif self.pooler == "first":
            if mask is None:
                return hidden_states[:, 0]
            index = mask.int().argmax(-1)
        elif self.pooler == "mean":
            if mask is None:
                return hidden_states.mean(1)
            total = hidden_states.masked_fill(~mask[..., None], 0.0).sum(1)
            return total / mask.sum(1, keepdim=True).clamp(min=1).to(total.dtype)
        else:
            if mask is None:
                return hidden_states.amax(1)
            hidden_states = hidden_states.masked_fill(~(mask | ~mask.any(1, keepdim=True))[..., None], -torch.inf)
            return hidden_states.amax(1)
        return hidden_states.gather(1, index[:, None, None].expand(-1, 1, hidden_states.shape[-1]))[:, 0]


class DanetLMHead(nn.Module):
    """Dense layer, activation and norm, then logits from the (tied) embedding matrix with a bias for each word."""

    def __init__(self, config: DanetConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.activation = ACTIVATIONS[config.lm_head_act]
        # The published head builds its norm with the small epsilon whatever the kind.
        eps = config.scaled_norm_eps
        self.norm = build_norm(config.lm_head_norm or "no_ln", config.hidden_size, eps, eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor, with_logits: bool = True) -> torch.Tensor:
        """(..., d) -> (..., vocab_size), or without logits what they are made of, (..., d)."""
        features = self.norm(self.activation(step_linear(self.dense, hidden_states)))
        return vocabulary_logits(self.decoder, features) if with_logits else features


class TiedHeadMixin:
    """Where Transformers finds the output embeddings of models with a `DanetLMHead`."""

    _tied_weights_keys = {"lm_head.decoder.weight": "model.embed_tokens.weight"}

    def get_output_embeddings(self):
        """The layer that makes logits."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings):
        """Replace the layer that makes logits."""
        self.lm_head.decoder = new_embeddings
