"""What the causal language models of all families share around their bodies: labels, loss, and the head's forward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels.plain_layers import is_plain
from .body import keeps_a_state
from .compat import (
    EitherCacheName,
    ForCausalLMLoss,
    cache_keyword,
    cache_of,
    can_return_tuple,
    either_cache_name,
    keep_logits,
)
from .cross_entropy import IGNORED, cross_entropy, linear_cross_entropy, or_one
from .heads import check_classes, check_labels
from .precision import accumulation_dtype
from .sequence import (
    DOCUMENT_KEYWORDS,
    SequenceInputs,
    padding_mask,
    passes_on,
    prepare_sequence,
)
from .states.generation import RecurrentGenerationMixin
from .vocabulary_logits import vocabulary_logits


@dataclass
class RecurrentCausalLMOutput(EitherCacheName, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with `focus_weights`, a tuple of (B, H, T), one a layer, on request."""

    focus_weights: tuple[torch.FloatTensor, ...] | None = None


@either_cache_name
def mask_for_generate(config, inputs_embeds, attention_mask, cache, **kwargs):
    """What generate() hands on as `attention_mask`: this call's columns, or None, so that its shape does not grow.

    All columns where some layers keep a key for each.
    """
    if attention_mask is None or not all(map(keeps_a_state, config.layer_types)):
        return attention_mask
    # Only this call's columns are looked at: PEFT counts its virtual tokens in the cache, but not always in the mask.
    length = inputs_embeds.shape[1]
    return padding_mask(attention_mask[:, -length:], inputs_embeds.shape[0], length)


def next_token_labels(labels: torch.Tensor, sequence: SequenceInputs) -> torch.Tensor:
    """For each real token the label of the next real token of its document, else -100: (B, T).

    Padding anywhere and the borders of packed documents thus add nothing to the loss, as if each document were alone.
    """
    batch, length = labels.shape
    place = torch.arange(length, device=labels.device).expand(batch, -1)
    real = torch.ones_like(labels, dtype=torch.bool) if sequence.mask is None else sequence.mask
    upcoming = torch.where(real, place, length).flip(1).cummin(1).values.flip(1)
    following = torch.nn.functional.pad(upcoming[:, 1:], [0, 1], value=length)
    known = real & (following < length)
    following = following.clamp(max=length - 1)
    if sequence.segment_ids is not None:
        known = known & (sequence.segment_ids == sequence.segment_ids.gather(1, following))
    return torch.where(known, labels.gather(1, following), IGNORED)


def targets_of(labels: torch.Tensor, sequence: SequenceInputs, count, dtype: torch.dtype):
    """What is to be predicted at each place (None: the next column's label throughout), and what to divide the sum of losses by.

    `count` is None or Trainer's `num_items_in_batch`: the labels of all batches of a step, on all devices, but those of first
    columns. Some of them may be no targets here: a text's first word behind padding, a document's, labels of padding. As much as
    the targets of this batch are fewer than its labels, the divisor is smaller than `count`: the batch then adds its own mean,
    weighted with its share of all labels.
    """
    if sequence.mask is None and sequence.segment_ids is None:
        return None, count
    shift_labels = next_token_labels(labels, sequence)
    if count is not None:
        counted, kept = (labels[:, 1:] != IGNORED).sum(), (shift_labels != IGNORED).sum()
        count = count.to(kept.device) if isinstance(count, torch.Tensor) else count
        count = count * (kept.to(accumulation_dtype(dtype)) / or_one(counted))
    return shift_labels, count


class Backbone(nn.Module):
    """What a causal language model calls `base_model`: its output is what the output matrix is applied to.

    Fused losses (TRL's), logit lenses and value heads rest on it that `get_output_embeddings()` makes the logits of
    `base_model(...).last_hidden_state`. This stands in for a body that ends earlier, or cannot be called by itself: a call goes
    to `run`, everything else, parameters and hooks too, is the body's own.
    """

    def __init__(self, body: nn.Module, run: Callable):
        vars(self).update(_body=body, _run=run)

    def __call__(self, *args, **kwargs):
        """As the body's."""
        return self._run(*args, **kwargs)

    forward = __call__

    def get_decoder(self) -> nn.Module:
        """Itself: what Transformers calls a decoder gives the same states."""
        return self

    def __getattr__(self, name):
        if "_body" not in vars(self):  # while it is copied
            raise AttributeError(name)
        return getattr(vars(self)["_body"], name)

    def __setattr__(self, name, value):
        setattr(self._body, name, value)


class RecurrentForCausalLM(RecurrentGenerationMixin):
    """`forward` of a causal language model over `self.model` and `self.lm_head`."""

    config: Any
    model: nn.Module
    lm_head: nn.Module
    loss_function: Any
    training: bool
    get_output_embeddings: Any

    @either_cache_name
    @can_return_tuple
    @passes_on("token_type_ids", *DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> RecurrentCausalLMOutput:
        """Predict each next token.

        Args:
            input_ids (`(B, T)`), attention_mask, position_ids, cache, inputs_embeds, use_cache: as for the body.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): usually `input_ids`; shifted inside; -100 is ignored,
                and so are padding and the step from one packed document to the next. The loss is the mean over the targets that
                remain, 0 where there are none.
            logits_to_keep (`int` or `torch.Tensor`): compute only the last n logits (0: all), or those at an index.
            shift_labels (keyword, `torch.LongTensor` of shape `(B, T)`, *optional*): labels already shifted: the label at a place
                belongs to the logits there. Sequence parallel training cuts a text after shifting and leaves `labels` in
                the batch beside them: where both are given these count, as in every model of Transformers.
            num_items_in_batch (keyword, `int` or `torch.Tensor`, *optional*): Trainer's count, of the labels of all batches of a
                step; the loss is then what this batch adds to their mean (`targets_of`).

        Returns:
            [`RecurrentCausalLMOutput`]: `logits` (B, T, vocab_size), `loss` with labels, `cache` with `use_cache`.
            While training with `config.fused_linear_cross_entropy` and labels, `logits` is None: they are never all there.
        """
        # Not in the signature: Trainer takes every argument there with "label" in its name for one that each batch must have,
        # and would evaluate without a loss.
        shift_labels = kwargs.pop("shift_labels", None)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = keep_logits(output.last_hidden_state, logits_to_keep)
        wants_loss = labels is not None or shift_labels is not None
        fused = wants_loss and self.training and self.config.fused_linear_cross_entropy
        logits = None if fused else vocabulary_logits(self.lm_head, hidden_states)
        loss = None
        if wants_loss:
            count = kwargs.get("num_items_in_batch")
            if shift_labels is None:
                shift_labels, count = self._targets(
                    hidden_states, labels, output.last_hidden_state, attention_mask, position_ids, kwargs, count
                )
            if fused:
                loss = self._fused_loss(hidden_states, labels, shift_labels, count)
            else:
                loss = causal_lm_loss(self, logits, labels, shift_labels, count)
        return RecurrentCausalLMOutput(
            loss=loss,
            logits=logits,
            **cache_keyword(cache_of(output)),
            hidden_states=self._hidden_states(output),
            attentions=output.attentions,
            focus_weights=output.get("focus_weights"),
        )

    def _features(self, hidden_states):
        """What the output matrix is applied to, of the body's last hidden states."""
        return hidden_states

    def _hidden_states(self, output):
        """The body's, the last of them as the output matrix takes it; None if they were not asked for."""
        last = output.last_hidden_state
        if output.hidden_states is None or all(x is not last for x in output.hidden_states):
            return output.hidden_states
        features = self._features(last)
        return tuple(features if x is last else x for x in output.hidden_states)

    def _targets(self, kept, labels, hidden_states, attention_mask, position_ids, kwargs, count):
        """As `targets_of` a call with these arguments."""
        meaning = (
            "one label a token, usually `input_ids` themselves; `logits_to_keep` leaves some tokens without logits"
        )
        check_labels("labels", labels, kept.shape[:2], meaning)
        documents = {name: kwargs[name] for name in ("seq_idx", "cu_seq_lens_q") if kwargs.get(name) is not None}
        if attention_mask is None and position_ids is None and not documents:
            return None, count
        if attention_mask is not None:
            attention_mask = attention_mask[:, -labels.shape[1] :]
        sequence = prepare_sequence(hidden_states, attention_mask, position_ids, **documents)
        return targets_of(labels, sequence, count, hidden_states.dtype)

    def _fused_loss(self, hidden_states, labels, shift_labels, count):
        """The loss from the hidden states (B, T, d), logits a block of tokens at a time."""
        final = self.get_output_embeddings()
        if self.loss_function is not ForCausalLMLoss or not is_plain(final):
            raise ValueError(
                "`fused_linear_cross_entropy=True` reads the output matrix itself: it cannot go with another loss function "
                f"or with output embeddings that are more than a matrix ({type(final).__name__}, adapted, quantized or "
                "hooked); set `model.config.fused_linear_cross_entropy = False`"
            )
        _check_given(labels, shift_labels, hidden_states.shape[:2], final.out_features)
        shift_labels = _one_place_on(labels) if shift_labels is None else shift_labels
        return linear_cross_entropy(
            self._features(hidden_states).flatten(0, 1),
            final.weight,
            final.bias,
            shift_labels.flatten().to(hidden_states.device),
            count,
        )


def causal_lm_loss(model, logits, labels, shift_labels, count) -> torch.Tensor:
    """The loss of logits (B, T, V): labels (B, T) are shifted here, unless `shift_labels` gives them shifted; `count` as in
    `targets_of`.
    """
    _check_given(labels, shift_labels, logits.shape[:2], logits.shape[-1])
    if model.loss_function is not ForCausalLMLoss:  # the user's own
        arguments = {} if shift_labels is None else {"shift_labels": shift_labels}
        vocab_size = model.config.vocab_size
        return model.loss_function(
            logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=count, **arguments
        )
    shift_labels = _one_place_on(labels) if shift_labels is None else shift_labels
    return cross_entropy(logits.flatten(0, 1), shift_labels.flatten().to(logits.device), count)


def _check_given(labels, shift_labels, places, classes) -> None:
    """Refuse labels, or shifted ones in their stead, of another shape than `places` or beyond `classes`."""
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    check_labels(name, given, places, "one label a token")
    check_classes(name, given, classes)


def _one_place_on(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) moved to the place that predicts them."""
    return torch.nn.functional.pad(labels[:, 1:], [0, 1], value=IGNORED)
