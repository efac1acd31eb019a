"""What a cache remembers of the columns it has seen, besides the states: where each row stands, and which columns were padding.

A state alone tells how many tokens of the open document it holds. That is not enough to read the next call rightly: its
positions may be the caller's own, its documents numbered, its mask may say something else of earlier columns than the calls that
wrote them. Here is what decides such questions. Everything is None while nothing departs from the ordinary: positions are ranks,
nothing is padded, documents have no numbers.
"""

from collections.abc import Callable

import torch

from ...kernels.tracing import can_read_values, is_traced, keeps_address, making_buffers

NO_NUMBER = torch.iinfo(torch.int64).min


def count_tokens(counts, like, length, mask, segment_ids) -> torch.Tensor:
    """Real tokens (B,) of the document open after `length` more columns, from the count before them; document 0 goes on."""
    if segment_ids is None:
        new = torch.full((like.shape[0],), length, device=like.device) if mask is None else mask.sum(1)
        return new if counts is None else counts + new
    last = segment_ids == segment_ids[:, -1:]
    new = (last if mask is None else last & mask.bool()).sum(1)
    return new if counts is None else new + counts * (segment_ids[:, -1] == 0)


def last_real(mask: torch.Tensor) -> torch.Tensor:
    """Column (B,) of the last real token of each row of a mask (B, T), -1 where there is none."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, place, -1).amax(1)


def fingerprint(padded: torch.Tensor, start: int | torch.Tensor = 0) -> torch.Tensor:
    """A number (B,) for the set of columns where `padded` (B, T) is True, its first column being column `start` of the text.

    Numbers of disjoint sets add up, so that a cache of fixed size can tell whether a mask over all its columns is the one it
    was written with. Two sets share a number once in 2^64.
    """
    column = torch.arange(padded.shape[1], device=padded.device) + start
    mixed = (column + 1) * -7046029254386353131  # odd multipliers and shifts spread the bits (integers wrap around)
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return torch.where(padded, mixed ^ (mixed >> 32), 0).sum(1)


class PastColumns:
    """Of the columns that a cache has seen, each (B,) int64 or None:

    shift: position of the row's next token less the tokens of its open document; None: positions are ranks.
    gap: padded columns since the row's last real token; None: none.
    document: number that `seq_idx` gave the open document, `NO_NUMBER` where it gave none.
    padding: `fingerprint` of the padded columns; None: nothing was padded.
    kept_mask: (B, columns) bool, True for real tokens, kept where some layers keep a key a column (`keeps_mask`); None: all are.

    `fixed`: of a static cache, whose compiled calls find everything at one address: zeros stand for None in `COUNTED`.
    """

    NAMES = ("shift", "gap", "document", "padding", "kept_mask")
    COUNTED = ("shift", "gap", "padding")

    def __init__(self, fixed: bool = False):
        self.fixed = fixed
        self.shift = self.gap = self.document = self.padding = None
        self.kept_mask: torch.Tensor | None = None
        self.keeps_mask = False
        self._recorded: list[tuple] = []  # a call a piece: what was known before it, and its arguments of `take_in`

    def next_positions(self, counts: torch.Tensor | None) -> torch.Tensor | None:
        """Position (B,) of each row's next token, from the tokens of its open document; None before the first call."""
        return counts if counts is None or self.shift is None else counts + self.shift

    def check_mask(self, attention_mask: torch.Tensor | None, columns, length: int) -> None:
        """Refuse a mask (B, columns + length) that says of earlier columns what the calls that wrote them did not."""
        if attention_mask is None or not can_read_values(attention_mask):
            return
        columns = int(columns)
        if columns == 0 or attention_mask.shape[1] != columns + length:
            return
        padded = ~attention_mask[:, :columns].bool()
        known = 0 if self.padding is None else self.padding
        wrong = fingerprint(padded) != known
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"`attention_mask` takes {int(padded[row].sum())} of the {columns} columns in the cache for padding in row "
                f"{row}, but not those that were padding when they were read, and a state gives no token back. (generate() "
                "fills rows that end early with padding, which enters their states; and where it is given no mask, it takes "
                "`pad_token_id` in the text for padding.) Read the whole text again without a cache; or, if the cache is right "
                f"as it is, pass the mask of this call's {length} columns alone"
            )

    def mask_of_keys(self, attention_mask: torch.Tensor | None, columns, length: int) -> torch.Tensor | None:
        """The mask over all keys, those of the call that was just taken in included: (B, columns + length), or None.

        It need not be told again: `attention_mask` may be that of the call alone.
        """
        if self.kept_mask is not None or attention_mask is None:
            return self.kept_mask
        # While the code is traced, or behind calls that were, only the caller knows.
        covered = attention_mask.shape[1] != length or (isinstance(columns, int) and columns == 0)
        return attention_mask if covered else None

    def take_in(self, columns, counts, like, mask, segment_ids, position_ids=None, seq_idx=None, record=False) -> None:
        """Note a call of T tokens after `columns` others.

        Args:
            columns (`int` or 0-d `torch.Tensor`), counts ((B,) or None): columns and tokens of the open document before it.
            like (`torch.Tensor` of shape `(B, T, ...)`): for sizes and device.
            mask ((B, T) bool or None), segment_ids ((B, T) or None; document 0 goes on): as `SequenceInputs` has them.
            position_ids, seq_idx ((B or 1, T), *optional*): what the caller gave.
            record (`bool`): keep what `rewind` needs.
        """
        batch, length = like.shape[:2]
        if self.fixed and not is_traced():
            for name in self.COUNTED:
                held = getattr(self, name)
                if held is None or held.shape[0] != batch:  # the first call, also after `reset`
                    self._place(name, torch.zeros(batch, dtype=torch.long, device=like.device))
        if record:
            before = {name: _copied(getattr(self, name)) for name in self.NAMES}
            inputs = tuple(_copied(x) for x in (counts, mask, segment_ids, position_ids, seq_idx))
            self._recorded.append((before, length, columns, like[:, :0], *inputs))
        place = None if mask is None else last_real(mask)
        old_shift, old_gap, old_number = (0 if x is None else x for x in (self.shift, self.gap, self.document))
        if position_ids is not None:
            new_counts = count_tokens(counts, like, length, mask, segment_ids)
            positions = position_ids.expand(batch, -1)
            last = positions[:, -1] if place is None else positions.gather(1, place.clamp(min=0)[:, None])[:, 0]
            shift = last + 1 - new_counts
            shift = shift if place is None else torch.where(place >= 0, shift, old_shift)
            self._put("shift", shift if not can_read_values(shift) or bool(shift.any()) else None)
        elif segment_ids is not None and self.shift is not None:
            self._put("shift", torch.where(segment_ids[:, -1] == 0, self.shift, 0))
        if seq_idx is not None:
            number = seq_idx.expand(batch, -1).long()
            last = number[:, -1] if place is None else number.gather(1, place.clamp(min=0)[:, None])[:, 0]
            if place is not None:
                last = torch.where(place >= 0, last, NO_NUMBER if self.document is None else old_number)
            self._put("document", last)
        elif segment_ids is not None and self.document is not None:
            self._put("document", torch.where(segment_ids[:, -1] == 0, self.document, NO_NUMBER))
        if mask is not None and place is not None:
            gap = torch.where(place >= 0, length - 1 - place, length + old_gap)
            self._put("gap", gap if not can_read_values(gap) or bool(gap.any()) else None)
            new = fingerprint(~mask, columns)
            self._put("padding", new if self.padding is None else self.padding + new)
        else:
            self._put("gap", None)
        if self.keeps_mask and (mask is not None or self.kept_mask is not None):
            self._keep_mask(mask, batch, columns, length, like.device)

    def _keep_mask(self, mask, batch, columns, length, device) -> None:
        if self.kept_mask is None and not isinstance(columns, int):
            if not can_read_values(columns):
                return  # a traced call over a static cache gets the whole mask from its caller
            columns = int(columns)
        self.kept_mask = join_masks(self.kept_mask, mask, batch, columns, length, device)

    def rewind(self, columns: int) -> None:
        """Undo the last `columns` columns, as far as they are recorded."""
        while columns > 0 and self._recorded:
            before, length, start, like, *inputs = self._recorded.pop()
            for name, value in before.items():
                self._put(name, value)
            if columns < length:
                keep = length - columns
                counts, *rest = inputs
                self.take_in(start, counts, like.new_empty(like.shape[0], keep), *(_first(x, keep) for x in rest))
            columns -= length

    def forget_records(self) -> None:
        """`rewind` will not be asked for the columns so far."""
        self._recorded = []

    def reset(self) -> None:
        """Nothing has been seen."""
        for name in self.NAMES:
            self._put(name, None)
        self._recorded = []

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Give each row what `function` makes of tensors with the rows first."""
        with making_buffers():
            for name in self.NAMES:
                if getattr(self, name) is not None:
                    setattr(self, name, function(getattr(self, name)))
        self._recorded = [
            (
                {name: None if x is None else function(x) for name, x in before.items()},
                length,
                columns,
                *(x if x is None or x.shape[0] != like.shape[0] else function(x) for x in (like, *inputs)),
            )
            for before, length, columns, like, *inputs in self._recorded
        ]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a saved cache holds of this, by name."""
        held = {name: getattr(self, name) for name in self.NAMES if getattr(self, name) is not None}
        return {name: x for name, x in held.items() if not (self.fixed and name in self.COUNTED and not bool(x.any()))}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `tensors` gave."""
        for name in self.NAMES:
            self._put(name, tensors.get(name))

    def _put(self, name: str, value: torch.Tensor | None) -> None:
        """Write in place where the tensor has its place already: CUDA graphs rely on addresses."""
        old = getattr(self, name)
        if old is None:
            if value is not None:
                self._place(name, value)
        elif value is None and name in self.COUNTED and (self.fixed or not can_read_values(old)):
            old.zero_()  # a traced step must not change what the next one depends on
        elif value is not None and old.shape == value.shape:
            old.copy_(value)
        else:
            setattr(self, name, None)
            self._put(name, value)

    def _place(self, name: str, value: torch.Tensor) -> None:
        with making_buffers():
            buffer = torch.zeros_like(value)
        setattr(self, name, buffer.copy_(value))
        if self.fixed:
            keeps_address(buffer)


def join_masks(old, new, batch: int, past: int, length: int, device) -> torch.Tensor | None:
    """(B, past + T) bool over all columns, None if nothing is padded."""
    if old is None and new is None:
        return None
    old = torch.ones(batch, past, dtype=torch.bool, device=device) if old is None else old
    new = torch.ones(batch, length, dtype=torch.bool, device=device) if new is None else new
    return torch.cat([old, new], dim=1)


def _copied(x):
    return None if x is None else x.clone()


def _first(x, keep: int):
    return None if x is None else x[:, :keep]
