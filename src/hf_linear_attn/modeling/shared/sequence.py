"""What the tokens of a call mean: padding, positions and documents, checked and brought to one form for every family.

* `attention_mask` (B, T): 1 or True keeps. Padding may stand anywhere; a padded token takes no position.
* positions: the rank among a document's real tokens, or what the caller says; after a cache they go on where it ended.
* documents: packed rows restart at each. Told by `cu_seq_lens_q` or `seq_idx`, or by `position_ids` that do not go on: neither by
  one (counting tokens) nor by the columns passed (counting padding, too). Three documents of lengths 2, 4 and 3 in one row:

      position_ids    0 1 0 1 2 3 0 1 2        cu_seq_lens_q   0 2 6 9
      segment_ids     0 0 1 1 1 1 2 2 2

* a cache: its open document is number 0 of the call. Position 0, or another number in `seq_idx`, begins a new one; any other
  position that does not go on is refused, and so is a mask that changes its mind about columns the cache holds.

The rule in full, with examples: docs/howto/positions.md.
"""

import functools
import inspect
from dataclasses import dataclass

import torch

from ..kernels.tracing import can_read_values, converts, is_traced
from .states.past_columns import NO_NUMBER, PastColumns

# What generate() hands from one of its steps to the next and, in some of its modes, on to forward.
GENERATION_KEYWORDS = frozenset(["assistant_model", "assistant_tokenizer", "streamer", "synced_gpus", "tokenizer"])
# Keywords that Transformers' trainers, collators and generate() may send along and that need no action here.
HARMLESS_KEYWORDS = GENERATION_KEYWORDS | frozenset(
    [
        "cu_seq_lens_k",
        "is_causal",
        "is_first_iteration",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    ]
)


# What tells documents that share a row apart, besides `position_ids`.
DOCUMENT_KEYWORDS = ("seq_idx", "cu_seq_lens_q")


# Arguments of a model that are tensors: of whole numbers, or of whatever the check of each one's own takes.
WHOLE_NUMBERS = frozenset(
    [
        "input_ids",
        "position_ids",
        "token_type_ids",
        "seq_idx",
        "cu_seq_lens_q",
        "labels",
        "shift_labels",
        "next_sentence_label",
        "start_positions",
        "end_positions",
    ]
)
TENSORS = WHOLE_NUMBERS | {"attention_mask", "inputs_embeds"}
NARROW = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32)


def as_given(model, name: str, value):
    """The argument `name` of a model's forward: narrow integers as int64, embeddings in the model's dtype, others as they are.

    Raises:
        TypeError: no tensor where one is expected (the commonest: a list, or what a tokenizer returned, without `**`).
    """
    if value is None or (name not in TENSORS and (name != "logits_to_keep" or isinstance(value, int))):
        return value
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"`{name}` is a {type(value).__name__}, expected a torch.Tensor: give `torch.as_tensor(...)`, or a tokenizer's whole "
            'answer as `model(**tokenizer(text, return_tensors="pt"))`'
        )
    if name in WHOLE_NUMBERS and value.dtype in NARROW:
        return value.long()
    if name == "inputs_embeds":
        if not value.is_floating_point():
            raise TypeError(f"`inputs_embeds` has dtype {value.dtype}, expected embeddings: token ids are `input_ids`")
        if not is_traced() and not converts(value):
            return value.to(model.dtype)
    return value


def passes_on(*names: str):
    """Decorate a model's `forward`: its tensors are checked (`as_given`), and its signature shows `names`, too, which it hands on
    in `**kwargs`.

    Trainer drops the columns of a dataset whose names it does not find there.
    """

    def show(forward):
        signature = inspect.signature(forward)
        *own, rest = signature.parameters.values()
        kind, annotation = inspect.Parameter.KEYWORD_ONLY, torch.LongTensor | None
        shown = [inspect.Parameter(name, kind, default=None, annotation=annotation) for name in names]
        places = [parameter.name for parameter in own[1:]]

        @functools.wraps(forward)
        def wrapper(self, *args, **kwargs):
            args = [as_given(self, name, value) for name, value in zip(places, args)] + list(args[len(places) :])
            kwargs = {name: as_given(self, name, value) for name, value in kwargs.items()}
            return forward(self, *args, **kwargs)

        wrapper.__signature__ = signature.replace(parameters=[*own, *shown, rest])
        return wrapper

    return show


@dataclass(frozen=True)
class SequenceInputs:
    """The checked form: `mask` (B, T) bool, None without padding; `position_ids` (B or 1, T); `segment_ids` (B, T) or None.

    Document 0 goes on with what a cache holds, the others start from nothing.
    """

    mask: torch.Tensor | None
    position_ids: torch.Tensor
    segment_ids: torch.Tensor | None = None


def prepare_sequence(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_length: int | torch.Tensor = 0,
    past_counts: torch.Tensor | None = None,
    max_positions: int | None = None,
    past: PastColumns | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **unknown,
) -> SequenceInputs:
    """Check the description of a batch and bring it to one form.

    Args:
        inputs_embeds (`torch.Tensor` of shape `(B, T, d)`): the embedded tokens; only shape and device are used.
        attention_mask (`torch.Tensor` of shape `(B, T)` or `(B, past + T)`, *optional*): 1 keeps, 0 is padding.
        position_ids (`torch.Tensor` of shape `(B, T)` or `(1, T)`, *optional*): positions; values at padding are ignored.
        past_length, past_counts, past: columns, real tokens of the open document per row `(B,)`, and what else is known of the
            columns that a cache has already seen.
        max_positions (`int`, *optional*): size of a learned position table, if there is one.
        seq_idx (`torch.Tensor` of shape `(B, T)`, *optional*), cu_seq_lens_q (`torch.Tensor` of shape `(documents + 1,)`,
            *optional*): packed documents, as `DataCollatorWithFlattening` sends them.

    Raises:
        ValueError: a shape, value or keyword that cannot be honoured.
        TypeError: an unknown keyword.
    """
    unknown = {name: value for name, value in unknown.items() if name not in HARMLESS_KEYWORDS}
    _reject_unknown(unknown)
    batch, length = inputs_embeds.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(
            f"the input is empty: batch size {batch}, sequence length {length}; both must be at least 1 (give a "
            "beginning-of-text token to start from nothing)"
        )
    mask = padding_mask(attention_mask, batch, length, past_length)
    past = PastColumns() if past is None else past
    past.check_mask(attention_mask, past_length, length)
    if position_ids is not None:
        position_ids = _checked_positions(position_ids, batch, length)
    numbers = _declared_documents(seq_idx, cu_seq_lens_q, inputs_embeds)
    if numbers is not None:
        starts = _changes(numbers.expand(batch, -1), mask)
    elif position_ids is not None and length > 1:
        starts = _restarts(position_ids.expand(batch, -1), mask)
    else:
        starts = None
    if past_counts is not None:
        numbers = numbers if seq_idx is not None else None
        starts = _first_document(starts, mask, position_ids, numbers, past_counts, past)
    segment_ids = None
    if starts is not None and not (can_read_values(starts) and not bool(starts.any())):
        segment_ids = starts.long().cumsum(1)
    chosen = position_ids is not None or past.shift is not None
    if position_ids is None:
        position_ids = _ranks(mask, segment_ids, past.next_positions(past_counts), length, inputs_embeds.device)
    if max_positions is not None:
        _check_range(position_ids, mask, max_positions, past_length, length, chosen)
    return SequenceInputs(mask, position_ids, segment_ids)


def padding_mask(attention_mask, batch: int, length: int, past_length: int | torch.Tensor = 0) -> torch.Tensor | None:
    """The part of a 2-D mask that belongs to this call, as bool (B, T); None if there is nothing to mask."""
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if attention_mask.dim() != 2 or shape[0] != batch or shape[1] < length:
        raise ValueError(
            f"`attention_mask` has shape {shape}, expected ({batch}, {length})"
            + (f" or ({batch}, past + {length}) with a cache" if not _is_zero(past_length) else "")
            + ": one 1 (keep) or 0 (padding) a token. Masks with more dimensions cannot be honoured by a running sum"
        )
    if shape[1] != length:
        if isinstance(past_length, int) and shape[1] != past_length + length:
            raise ValueError(
                f"`attention_mask` covers {shape[1]} tokens, but the call has {length} and the cache {past_length}: pass a "
                f"mask of {length} (this call) or {past_length + length} columns (everything)"
            )
        attention_mask = attention_mask[:, -length:]
    mask = attention_mask.bool()
    if can_read_values(mask):
        valid = (attention_mask == mask.to(attention_mask.dtype)).all()
        valid, full = torch.stack([valid, mask.all()]).tolist()
        if not valid:
            bad = attention_mask[attention_mask != mask.to(attention_mask.dtype)][0].item()
            raise ValueError(
                f"`attention_mask` holds {bad}, expected only 1 (keep) and 0 (padding): an additive mask (0 and -inf) must "
                "be turned into 1 and 0 first"
            )
        if full:
            return None
    return mask


def blank_padding(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T, d) with 0 at padding: whatever stands there, a NaN too, then reaches no sum and no gradient."""
    return hidden_states if mask is None else hidden_states.masked_fill(~mask[..., None], 0.0)


def check_layer_inputs(
    hidden_states: torch.Tensor, width: int, attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None
) -> torch.Tensor | None:
    """The mask of a layer that is called on its own, as `padding_mask` gives it; a body's bool mask passes without a look."""
    for name, value in (
        ("hidden_states", hidden_states),
        ("attention_mask", attention_mask),
        ("segment_ids", segment_ids),
    ):
        if not isinstance(value, torch.Tensor) and (value is not None or name == "hidden_states"):
            raise TypeError(f"`{name}` is a {type(value).__name__}, expected a torch.Tensor")
    shape = tuple(hidden_states.shape)
    if len(shape) != 3 or shape[2] != width or 0 in shape:
        raise ValueError(f"`hidden_states` has shape {shape}, expected (batch, length, {width}), none of them 0")
    if segment_ids is not None and tuple(segment_ids.shape) != shape[:2]:
        raise ValueError(f"`segment_ids` has shape {tuple(segment_ids.shape)}, expected {shape[:2]}")
    if attention_mask is not None and attention_mask.dtype == torch.bool and tuple(attention_mask.shape) == shape[:2]:
        return attention_mask
    return padding_mask(attention_mask, *shape[:2])


ONE_ANSWER = (
    "a classifier of texts gives one answer a row, and this row holds several packed documents: put each into its own row, "
    "padded, with an `attention_mask`"
)


def refuse_documents(
    tokens: torch.Tensor | None, attention_mask, position_ids, seq_idx=None, cu_seq_lens_q=None, **_
) -> None:
    """Refuse packed documents in tokens (B, T, ...) of which each row gets one answer."""
    documents = {"position_ids": position_ids, "seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q}
    if tokens is None or all(x is None for x in documents.values()) or not can_read_values(tokens):
        return
    if prepare_sequence(tokens, attention_mask, **documents).segment_ids is not None:
        raise ValueError(ONE_ANSWER)


def _is_zero(length) -> bool:
    return isinstance(length, int) and length == 0


def _reject_unknown(unknown: dict) -> None:
    # Tokenizers of the BERT kind send token types along; all zeros say nothing.
    types = unknown.pop("token_type_ids", None)
    if types is not None and can_read_values(types) and bool(types.any()):
        raise ValueError("`token_type_ids` other than 0 mean nothing to this family, which has no token type embedding")
    unknown = {name: value for name, value in unknown.items() if value is not None}
    if unknown:
        raise TypeError(
            f"unknown keyword(s) {', '.join(sorted(unknown))}: nothing would act on them. Documents are packed with "
            "`position_ids`, `seq_idx` or `cu_seq_lens_q`, padding is told by `attention_mask`"
        )


def _checked_positions(position_ids, batch, length):
    shape = tuple(position_ids.shape)
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise ValueError(f"`position_ids` has dtype {position_ids.dtype}, expected integers")
    if position_ids.dim() != 2 or shape[1] != length or shape[0] not in (1, batch):
        raise ValueError(f"`position_ids` has shape {shape}, expected ({batch}, {length}) or (1, {length})")
    return position_ids


def _declared_documents(seq_idx, cu_seq_lens_q, inputs_embeds):
    """The number (B or 1, T) of each token's document as the caller tells it, or None."""
    batch, length = inputs_embeds.shape[:2]
    if seq_idx is not None:
        if tuple(seq_idx.shape) != (batch, length):
            raise ValueError(f"`seq_idx` has shape {tuple(seq_idx.shape)}, expected ({batch}, {length})")
        if seq_idx.is_floating_point() or seq_idx.dtype == torch.bool:
            raise ValueError(f"`seq_idx` has dtype {seq_idx.dtype}, expected integers, one number a document")
    owner = None
    if cu_seq_lens_q is not None:
        if batch != 1 or cu_seq_lens_q.dim() != 1:
            raise ValueError(
                f"`cu_seq_lens_q` describes one packed row, got a batch of {batch} and shape {tuple(cu_seq_lens_q.shape)}: "
                "flatten the batch into one row, or pass `seq_idx` or `position_ids`"
            )
        if cu_seq_lens_q.numel() < 2 or cu_seq_lens_q.is_floating_point():
            raise ValueError(
                f"`cu_seq_lens_q` has {cu_seq_lens_q.numel()} entries of {cu_seq_lens_q.dtype}, expected integers: 0 and the end "
                "of each document"
            )
        if can_read_values(cu_seq_lens_q) and (int(cu_seq_lens_q[-1]) != length or int(cu_seq_lens_q[0]) != 0):
            raise ValueError(
                f"`cu_seq_lens_q` goes from {int(cu_seq_lens_q[0])} to {int(cu_seq_lens_q[-1])}, expected 0 to {length}, the "
                "length of the packed row"
            )
        if can_read_values(cu_seq_lens_q) and bool((cu_seq_lens_q.diff() < 0).any()):
            raise ValueError(
                f"`cu_seq_lens_q` falls somewhere in {cu_seq_lens_q.tolist()[:20]}, expected the ends of the documents in "
                "order"
            )
        place = torch.arange(length, device=inputs_embeds.device)
        owner = torch.searchsorted(cu_seq_lens_q.to(place), place, right=True)[None]
    if seq_idx is None or owner is None:
        return owner if seq_idx is None else seq_idx
    differ = (seq_idx.diff(dim=1) != 0) != (owner.diff(dim=1) != 0)
    if can_read_values(differ) and bool(differ.any()):
        place = int(differ[0].nonzero()[0]) + 1
        raise ValueError(
            f"`seq_idx` and `cu_seq_lens_q` contradict each other: at column {place} one begins a document and the other does "
            "not; give one of them"
        )
    return seq_idx


def _before(values, mask):
    """Of the real token before each column: whether there is one (B, T), its value, and how many columns back it stands."""
    batch, length = values.shape
    place = torch.arange(length, device=values.device).expand(batch, -1)
    real = place if mask is None else torch.where(mask, place, -1)
    before = torch.nn.functional.pad(real.cummax(1).values[:, :-1], [1, 0], value=-1)
    return before >= 0, values.gather(1, before.clamp(min=0)), place - before


def _changes(numbers, mask):
    """(B, T) bool, True at real tokens whose document has another number than that of the real token before."""
    known, value, _ = _before(numbers, mask)
    starts = known & (numbers != value)
    return starts if mask is None else starts & mask


def _restarts(position_ids, mask):
    """(B, T) bool, True at real tokens whose position does not go on from the real token before."""
    known, value, columns = _before(position_ids, mask)
    step = position_ids - value
    starts = known & (step != 1)
    return starts if mask is None else starts & (step != columns) & mask


def _first_document(starts, mask, position_ids, numbers, past_counts, past):
    """`starts` (B, T) with the first real token of each row in it, where it does not go on with the document that is open.

    A row without tokens in its state has nothing to go on with. `numbers` (B, T) are those of `seq_idx`.
    """
    if position_ids is None and (numbers is None or past.document is None):
        return starts
    batch, device = past_counts.shape[0], past_counts.device
    length = (position_ids if numbers is None else numbers).shape[1]
    column = torch.zeros(batch, dtype=torch.long, device=device) if mask is None else mask.to(torch.uint8).argmax(1)
    open_rows = (past_counts > 0) if mask is None else (past_counts > 0) & mask.any(1)
    new = torch.zeros_like(open_rows)
    if numbers is not None and past.document is not None:
        number = numbers.expand(batch, -1).gather(1, column[:, None])[:, 0]
        new = (past.document != NO_NUMBER) & (number != past.document)
    if position_ids is not None:
        position = position_ids.expand(batch, -1).gather(1, column[:, None])[:, 0]
        expected = past.next_positions(past_counts)
        passed = column if past.gap is None else column + past.gap  # padded columns since the token before
        goes_on = (position == expected) | (position == expected + passed)
        wrong = open_rows & ~new & ~goes_on & (position != 0)
        if can_read_values(wrong) and bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"`position_ids` begin with {int(position[row])} in row {row}, but the document that is open in the cache goes "
                f"on at {int(expected[row])}: give that, or 0 where a new document begins, or leave `position_ids` out"
            )
        new = new | ((position == 0) & ~goes_on)
    new = (new & open_rows)[:, None] & (torch.arange(length, device=device) == column[:, None])
    return new if starts is None else starts | new


def _ranks(mask, segment_ids, past_positions, length, device):
    """Position of each token: its rank among the real tokens of its document; the first goes on where the cache ended."""
    # Real tokens before each column: a document that begins with padding starts to count at its first real token.
    rank = torch.arange(length, device=device)[None] if mask is None else mask.long().cumsum(1) - mask.long()
    past = 0 if past_positions is None else past_positions.to(device)[:, None]
    if segment_ids is None:
        return rank + past
    rank = rank.expand(segment_ids.shape[0], -1)
    starts = torch.nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [1, 0])
    first = torch.where(starts, rank, 0).cummax(1).values
    return rank - first + torch.where(segment_ids == 0, past, 0)


def _check_range(position_ids, mask, max_positions, past_length, length, chosen):
    """Refuse positions that have no row in the table; looks at those on a GPU only where they may be too high."""
    lengths_known = isinstance(past_length, int) and isinstance(length, int)
    looks = chosen or position_ids.device.type == "cpu" or not lengths_known or past_length + length > max_positions
    highest = _extreme(position_ids, mask) if looks and can_read_values(position_ids) else None
    if highest is not None and not (highest[0] >= 0 and highest[1] < max_positions):
        wrong = highest[0] if highest[0] < 0 else highest[1]
        raise ValueError(
            f"a token has position {wrong}, but this model has learned positions 0 to {max_positions - 1} "
            f"(`max_position_embeddings`={max_positions}): shorten the text, or train a model with more of them, or with a "
            '`position_embedding_type` other than "learned", which has no limit'
        )


def _extreme(position_ids, mask):
    real = position_ids if mask is None else position_ids.expand(mask.shape)[mask]
    return (0, 0) if real.numel() == 0 else (int(real.min()), int(real.max()))


def check_token_types(token_type_ids: torch.Tensor, batch: int, length: int, count: int) -> None:
    """Refuse token types of another shape than the tokens, and types that have no embedding."""
    shape = tuple(token_type_ids.shape)
    if shape not in ((batch, length), (1, length)) or token_type_ids.is_floating_point():
        raise ValueError(
            f"`token_type_ids` has shape {shape} and dtype {token_type_ids.dtype}, expected integers of shape ({batch}, {length})"
        )
    if token_type_ids.device.type == "cpu" and can_read_values(token_type_ids):
        low, high = torch.stack([token_type_ids.min(), token_type_ids.max()]).tolist()
        if low < 0 or high >= count:
            raise ValueError(
                f"`token_type_ids` holds {low if low < 0 else high}, expected 0 to {count - 1} (`type_vocab_size`={count})"
            )


def check_token_ids(input_ids: torch.Tensor, vocab_size: int | None, training: bool) -> None:
    """Refuse ids outside the vocabulary (None: not known) with a message, where looking does not stall a GPU's queue."""
    if input_ids.dim() != 2:
        raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}, expected (batch, length)")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"`input_ids` has dtype {input_ids.dtype}, expected integers (int64 or int32) below {vocab_size}"
        )
    if vocab_size is None:
        return
    looked_at = input_ids.device.type == "cpu" or (not training and input_ids.shape[1] > 1)
    if input_ids.numel() and looked_at and can_read_values(input_ids):
        low, high = torch.stack([input_ids.min(), input_ids.max()]).tolist()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"`input_ids` holds {low if low < 0 else high}, but the vocabulary has ids 0 to {vocab_size - 1}: is this "
                "the tokenizer that the model was trained with? New tokens need `model.resize_token_embeddings(...)`"
            )
