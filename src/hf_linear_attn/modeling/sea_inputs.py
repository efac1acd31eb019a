"""What a SEA model refuses before its host sees it, and what it does to the host around one call."""

import inspect
import threading
from contextlib import contextmanager

import torch
from torch import nn

from .compat import can_read_values
from .plain_layers import table_rows
from .sea_hosts import embedding_size
from .sequence_inputs import HARMLESS_KEYWORDS, blank_padding, check_token_ids
from .task_heads import check_classes, check_labels

PACKING_KEYWORDS = frozenset(["seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"])


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
    causal, host = model.config.is_causal, model.config.host_config.model_type
    if kwargs.get("is_causal") is not None and bool(kwargs["is_causal"]) != causal:
        what = "each token sees only earlier ones" if causal else "it is an encoder, whose tokens see all others"
        raise ValueError(
            f"`is_causal={kwargs['is_causal']}` cannot be honoured by a {model.config.host_config.model_type} host: {what}"
        )
    known = set(inspect.signature(model.host_model.forward).parameters) | HARMLESS_KEYWORDS | PACKING_KEYWORDS
    known.add("token_type_ids")  # zeros say nothing; others are refused with what the host lacks
    known -= {"encoder_hidden_states", "encoder_attention_mask"}  # of cross-attention, which no host has here
    unknown = sorted(name for name, value in kwargs.items() if name not in known and value is not None)
    if unknown:
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


@contextmanager
def without_padding(host: nn.Module, mask: torch.Tensor | None):
    """While the context is open, padding (`mask` (B, T) bool is False) is nothing to the host around its attention.

    It is embedded as 0, and BERT's pooler, which reads the first column, gets the first real token of each row. In this thread
    alone: others may run the same host on other rows (a server's threads, `DataParallel`'s replicas).
    """
    caller = threading.get_ident()
    handles = []

    def first_real(module, inputs):
        if threading.get_ident() != caller:
            return None
        rows = torch.arange(mask.shape[0], device=mask.device)
        return (inputs[0][rows, mask.to(torch.uint8).argmax(dim=1)][:, None],)

    def blank(module, inputs, output):
        return blank_padding(output, mask) if threading.get_ident() == caller else None

    if mask is not None:
        poolers = (module for module in host.modules() if type(module).__name__ == "BertPooler")
        handles = [pooler.register_forward_pre_hook(first_real) for pooler in poolers]
        handles.append(host.get_input_embeddings().register_forward_hook(blank))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
