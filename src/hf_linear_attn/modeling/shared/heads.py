"""Heads that families share: classification of texts and tokens, and extractive question answering; and their losses.

A family's class sets up `self.model` and the head's layers in its `__init__` and inherits `forward` from here. The body is
built directly, not through AutoModel, so that a checkpoint that carries its own code loads where this package is absent.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from ..kernels.tracing import can_read_values
from .compat import (
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
    answering_to_both_names,
    cache_keyword,
    cache_of,
    can_return_tuple,
)
from .cross_entropy import IGNORED, batch_share, cross_entropy, or_one
from .sequence import DOCUMENT_KEYWORDS, padding_mask, passes_on, refuse_documents

TextClassifierOutput = answering_to_both_names(SequenceClassifierOutputWithPast)


def check_labels(name: str, labels: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Refuse labels of another shape than the predictions."""
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"`{name}` has shape {tuple(labels.shape)}, expected {tuple(shape)}: {meaning}")


def check_classes(name: str, labels: torch.Tensor, count: int) -> None:
    """Refuse labels that are no class, where looking does not stall a GPU's queue; -100 is ignored by losses."""
    if labels.is_floating_point():
        raise ValueError(f"`{name}` has dtype {labels.dtype}, expected integers, 0 to {count - 1}")
    if labels.device.type == "cpu" and labels.numel() and can_read_values(labels):
        wrong = labels[((labels < 0) & (labels != -100)) | (labels >= count)]
        if wrong.numel():
            raise ValueError(
                f"`{name}` holds {int(wrong[0])}, expected 0 to {count - 1}, or -100 where no label counts"
            )


def check_text_labels(labels: torch.Tensor, logits: torch.Tensor, config) -> None:
    """Refuse labels of texts that do not fit the logits (B, num_labels) and the problem that the loss will see in them."""
    batch, count = logits.shape
    classes = config.problem_type == "single_label_classification"
    if config.problem_type is None:
        classes = count > 1 and labels.dtype in (torch.int64, torch.int32)
    one = classes or count == 1
    shapes = [(batch,), (batch, 1)] if one else [(batch, count)]
    if tuple(labels.shape) not in shapes:
        meaning = "one for each text" if one else "one for each text and label"
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}, expected {shapes[0]}, {meaning}")
    if classes:
        check_classes("labels", labels, count)


# The losses below: without `count` the mean over the labels that count, 0 where there are none. With it (Trainer's
# `num_items_in_batch`: the labels of all batches of a step, on all devices) what this batch adds to the mean over all of them.


def text_loss(model, logits: torch.Tensor, labels: torch.Tensor, count=None) -> torch.Tensor:
    """Loss of one class, of several labels, or of numbers for each text: logits (B, num_labels)."""
    check_text_labels(labels, logits, model.config)
    arguments = {"logits": logits, "labels": labels, "pooled_logits": logits, "config": model.config}
    if (
        model.loss_function is ForSequenceClassificationLoss
    ):  # it divides a sum over classes by this; others may not take it
        arguments["num_items_in_batch"] = or_one((labels != IGNORED).sum())
    return batch_share(model.loss_function(**arguments), labels, count)


def token_loss(model, logits: torch.Tensor, labels: torch.Tensor, count=None) -> torch.Tensor:
    """Loss of one class for each token: logits (B, T, num_labels), labels (B, T)."""
    if model.loss_function is ForTokenClassification:
        return masked_lm_loss(logits, labels, count)
    check_labels("labels", labels, logits.shape[:2], "one label a token, -100 where none counts")
    check_classes("labels", labels, logits.shape[-1])
    return batch_share(model.loss_function(logits, labels, model.config), labels, count)


def masked_lm_loss(logits: torch.Tensor, labels: torch.Tensor, count=None) -> torch.Tensor:
    """Cross-entropy, in at least float32, over the places of logits (B, T, V) whose label (B, T) is not -100."""
    check_labels("labels", labels, logits.shape[:2], "one label a token, -100 where none counts")
    check_classes("labels", labels, logits.shape[-1])
    return cross_entropy(logits.flatten(0, 1), labels.flatten().to(logits.device), count)


def answer_loss(model, start_logits, end_logits, start_positions, end_positions, count=None) -> torch.Tensor:
    """Mean loss of the two scores (B, T) of an answer's ends; an end behind the last column does not count, one before is at 0.

    `count` is a number of texts. Trainer counts `labels`, which these texts have none of: it averages over its batches.
    """
    for name, places in (("start_positions", start_positions), ("end_positions", end_positions)):
        if tuple(places.shape) not in ((start_logits.shape[0],), (start_logits.shape[0], 1)):
            raise ValueError(
                f"`{name}` has shape {tuple(places.shape)}, expected ({start_logits.shape[0]},), one for each text"
            )
        if places.is_floating_point():
            raise ValueError(f"`{name}` has dtype {places.dtype}, expected integers: columns of the text")
    if model.loss_function is not ForQuestionAnsweringLoss:
        mean = model.loss_function(start_logits, end_logits, start_positions, end_positions)
        return batch_share(mean, torch.zeros_like(start_positions), count)
    losses = []
    for logits, places in ((start_logits, start_positions), (end_logits, end_positions)):
        places = places.flatten().to(logits.device).clamp(min=0)
        losses.append(cross_entropy(logits, places.where(places < logits.shape[1], IGNORED), count))
    return (losses[0] + losses[1]) / 2


def last_real_token(hidden_states, input_ids, attention_mask, pad_token_id) -> torch.Tensor:
    """Row-wise index (B,) of the last token that is not padding, from the mask, else from the padding id, else the last."""
    batch, length = hidden_states.shape[:2]
    place = torch.arange(length, device=hidden_states.device)
    if attention_mask is not None:
        mask = padding_mask(attention_mask, batch, length)
        if mask is None:
            return place[-1].expand(batch)
        return (place * mask).argmax(-1)
    if input_ids is not None and pad_token_id is not None:
        return (place * (input_ids != pad_token_id)).argmax(-1)
    return place[-1].expand(batch)


def masked_mean(hidden_states, attention_mask) -> torch.Tensor:
    """Mean over each row's real tokens, (B, d); 0 for a row of padding alone."""
    mask = None
    if attention_mask is not None:
        mask = padding_mask(attention_mask, *hidden_states.shape[:2])
    if mask is None:
        return hidden_states.mean(1)
    total = hidden_states.masked_fill(~mask[..., None], 0.0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1).to(total.dtype)


class SequenceClassificationMixin:
    """One label, number or set of labels for a text: `score` on the last real token, or on the mean if not causal."""

    config: Any
    model: nn.Module
    loss_function: Any

    def _build_head(self, config) -> None:
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    @can_return_tuple
    @passes_on("token_type_ids", *DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Score texts.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as for the body.
            labels (`torch.Tensor` of shape `(B,)`, or `(B, num_labels)` for several labels or a regression, *optional*).

        Returns:
            `SequenceClassifierOutputWithPast`: `logits` (B, num_labels), `loss` with labels.
        """
        count = kwargs.pop("num_items_in_batch", None)
        refuse_documents(input_ids if inputs_embeds is None else inputs_embeds, attention_mask, position_ids, **kwargs)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden_states = output.last_hidden_state
        if getattr(self.config, "is_causal", True):
            index = last_real_token(hidden_states, input_ids, attention_mask, self.config.pad_token_id)
            pooled = hidden_states.gather(1, index[:, None, None].expand(-1, 1, hidden_states.shape[-1]))[:, 0]
        else:
            pooled = masked_mean(hidden_states, attention_mask)
        logits = self.score(self.dropout(pooled))
        loss = None if labels is None else text_loss(self, logits, labels, count)
        return TextClassifierOutput(
            loss=loss,
            logits=logits,
            **cache_keyword(cache_of(output)),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class TokenClassificationMixin:
    """One label for each token."""

    config: Any
    model: nn.Module
    loss_function: Any

    def _build_head(self, config) -> None:
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.score = nn.Linear(config.hidden_size, config.num_labels)

    @can_return_tuple
    @passes_on("token_type_ids", *DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Score tokens: `logits` (B, T, num_labels); labels (B, T) with -100 where no label counts."""
        count = kwargs.pop("num_items_in_batch", None)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.score(self.dropout(output.last_hidden_state))
        loss = None if labels is None else token_loss(self, logits, labels, count)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


class QuestionAnsweringMixin:
    """Start and end of an answer inside the text."""

    config: Any
    model: nn.Module
    loss_function: Any

    def _build_head(self, config) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    @can_return_tuple
    @passes_on("token_type_ids", *DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Score the places (B, T) where an answer starts and ends; the loss needs both true positions (B,)."""
        count = kwargs.pop("num_items_in_batch", None)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(output.last_hidden_state).unbind(-1)
        if (start_positions is None) != (end_positions is None):
            raise ValueError("`start_positions` and `end_positions` go together: one of them is missing")
        loss = None
        if start_positions is not None:
            loss = answer_loss(self, start_logits, end_logits, start_positions, end_positions, count)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
