"""Packed rows in SEA: each document is attended to as if it had a row of its own.

SEA's estimator looks over whole rows (positions, convolutions, cells and averages are relative to the row), so documents that
share a row are taken apart before a layer and put back after it:

    segments   0 0 0 1 2 2        rows of the layer   a b c     (documents of like length together,
    tokens     a b c d e f                            e f .      d in a call of its own)

Documents are grouped by the power of two above their length, so that padding less than doubles the tokens, whatever the
lengths are: time and memory stay linear in the tokens of the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..attention import SeaAttentionCore, SeaCoreOutput, SeaState
from ..cells import KeyLayout
from ..losses import TeacherTargets
from .short import attend


@dataclass(frozen=True)
class DocumentGroup:
    """N documents of like length; L is the longest.

    Attributes:
        rows: (N,) row of the batch that holds each.
        tokens: (N, L) place of each token among the B T of the batch; after a document's end its last one, and no other's.
        keep: (N, L) bool, True within the document.
        last: (N,) bool, whether it is the last of its row.
        continues: whether they go on with what a cache holds.
        layout: ranks and slots, the cache's included.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    keep: torch.Tensor
    last: torch.Tensor
    continues: bool
    layout: KeyLayout


@dataclass(frozen=True)
class PackedRows:
    """The documents of one call, (B, T) tokens after `past` slots of a cache.

    Attributes:
        groups: the documents, each in one group.
        open_slots: (B, past + T) bool, the slots of the last document of each row: all that later calls may see.
    """

    groups: list[DocumentGroup]
    open_slots: torch.Tensor
    past: int

    @classmethod
    def find(
        cls, segment_ids: torch.Tensor, mask: torch.Tensor | None, key_mask: torch.Tensor | None, past: int
    ) -> "PackedRows | None":
        """Read documents (B, T), non-decreasing along a row; 0 goes on with what the cache holds. None: nothing but padding.

        mask: (B, T) bool, real tokens; key_mask: (B, past + T) bool, real slots; None if nothing is padded.
        """
        batch, length = segment_ids.shape
        device = segment_ids.device
        mask = torch.ones_like(segment_ids, dtype=torch.bool) if mask is None else mask
        key_mask = torch.ones(batch, past + length, dtype=torch.bool, device=device) if key_mask is None else key_mask
        # First phase: the documents. A run of real tokens of one row and one number is one.
        places = mask.flatten().nonzero()[:, 0]  # real tokens, row by row
        if not places.numel():
            return None
        row, segment = places // length, segment_ids.flatten()[places]
        pairs, counts = torch.unique_consecutive(torch.stack([row, segment]), dim=1, return_counts=True)
        rows, segments = pairs
        starts = counts.cumsum(0) - counts
        last = torch.ones_like(rows, dtype=torch.bool)
        last[:-1] = rows[1:] != rows[:-1]
        continues = (segments == 0) & (past > 0)
        # Second phase: groups of like length, by the power of two above it; those that go on with a cache apart.
        doubling = (counts - 1).clamp_min(0).to(torch.float64).add(0.5).log2().floor().long()  # of 2: 1, of 3 and 4: 2
        groups = []
        for goes_on, size in torch.unique(torch.stack([continues.long(), doubling]), dim=1).T.tolist():
            chosen = ((continues == bool(goes_on)) & (doubling == size)).nonzero()[:, 0]
            step = torch.arange(int(counts[chosen].max()), device=device)
            keep = step < counts[chosen, None]
            tokens = places[starts[chosen, None] + step.minimum(counts[chosen, None] - 1)]
            seen = torch.cat([key_mask[rows[chosen], : past * goes_on], keep], dim=1)
            layout = KeyLayout.from_mask(seen, len(chosen), len(step), device, past * goes_on)
            groups.append(DocumentGroup(rows[chosen], tokens, keep, last[chosen], bool(goes_on), layout))
        # Last phase: what stays open. -1: the call has no real token of this row.
        final = torch.where(mask, segment_ids, -1).amax(dim=1, keepdim=True)
        open_slots = torch.cat([key_mask[:, :past] & (final <= 0), mask & (segment_ids == final)], dim=1)
        return cls(groups, open_slots, past)

    def attend(
        self,
        core: SeaAttentionCore,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        state: SeaState | None,
        past_keys: tuple[torch.Tensor, torch.Tensor] | None,
        teacher: TeacherTargets | None,
        loss_rows: torch.Tensor | None,
        **options,
    ) -> SeaCoreOutput:
        """The layer on each document by itself: what `SeaAttentionCore` returns for (B, T) tokens.

        q is (B, H, T, D), k and v are (B, G, T, D) of the new tokens, `past_keys` are (B, G, past, D) each; `options` are handed
        on. Losses and fidelity are means of the groups' own, weighted by their tokens.
        """
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B T, heads, D)
        outputs = []
        for group in self.groups:
            new_q, new_k, new_v = (x[group.tokens].transpose(1, 2) for x in flat)  # (N, heads, L, D)
            past_state = keys = None
            if group.continues:
                past_state = None if state is None else SeaState(*(x[group.rows] for x in state))
                joined = zip(past_keys, (new_k, new_v), strict=True)
                keys = tuple(torch.cat([past[group.rows], new], dim=2) for past, new in joined)
            length = group.tokens.shape[1]
            outputs.append(
                attend(
                    core,
                    new_q,
                    new_k,
                    new_v,
                    teacher=None if teacher is None else _targets_of(teacher, group),
                    layout=group.layout,
                    state=past_state,
                    key_cache=keys,
                    loss_rows=None if loss_rows is None else (loss_rows * length // q.shape[2]).unique(),
                    **options,
                )
            )
        return self._join(outputs, q, state, options["output_attentions"])

    def _join(self, outputs: list[SeaCoreOutput], q, state: SeaState | None, has_maps: bool) -> SeaCoreOutput:
        """The groups' outputs, documents beside each other, as one of (B, T) tokens."""
        batch, _, length, _ = q.shape
        shares = [int(group.keep.sum()) for group in self.groups]

        def tokens(name: str, dim: int) -> torch.Tensor | None:
            """Put the groups' tokens, axis `dim` of the field, back into rows."""
            if getattr(outputs[0], name) is None:
                return None
            pieces = [getattr(output, name).movedim(dim, 1)[group.keep] for output, group in self._with(outputs)]
            place = torch.cat([group.tokens[group.keep] for group in self.groups])
            joined = pieces[0].new_zeros(batch * length, *pieces[0].shape[1:]).index_copy(0, place, torch.cat(pieces))
            return joined.unflatten(0, (batch, length)).movedim(1, dim)

        def mean(found: list[dict]) -> dict:
            return {
                name: sum(share * each[name] for share, each in zip(shares, found, strict=True)) / max(1, sum(shares))
                for name in (found[0] if found else {})
            }

        def maps(name: str) -> torch.Tensor | None:
            return self._join_maps([getattr(output, name) for output in outputs], batch, length) if has_maps else None

        losses = mean([output.losses for output in outputs])
        measured = outputs[0].fidelity is not None
        return SeaCoreOutput(
            context=tokens("context", 1),
            loss=sum(losses.values()) if losses else None,
            losses=losses,
            estimated_probs=tokens("estimated_probs", 2),
            cells=tokens("cells", 2),
            kept=maps("kept"),
            attention_probs=maps("attention_probs"),
            state=self._join_states(outputs, state, batch) if outputs[0].state is not None else None,
            fidelity=mean([output.fidelity for output in outputs]) if measured else None,
        )

    def _with(self, outputs: list) -> Iterator[tuple]:
        return zip(outputs, self.groups, strict=True)

    def _join_maps(self, maps: list[torch.Tensor], batch: int, length: int) -> torch.Tensor:
        """Maps (N, H, L, S) of the documents -> (B, H, T, past + T), 0 between documents."""
        joined = maps[0].new_zeros(batch * length, self.past + length, maps[0].shape[1])
        for found, group in self._with(maps):
            columns = self.past + group.tokens % length  # slot of each new key
            seen = group.keep
            if group.continues:
                before = torch.arange(self.past, device=columns.device).expand(len(columns), -1)
                columns = torch.cat([before, columns], dim=1)
                seen = torch.cat([torch.ones_like(before).bool(), seen], dim=1)
            pair = group.keep[:, :, None] & seen[:, None]
            place = group.tokens[:, :, None].expand_as(pair)[pair], columns[:, None].expand_as(pair)[pair]
            joined = joined.index_put(place, found.movedim(1, 3)[pair])
        return joined.unflatten(0, (batch, length)).permute(0, 3, 1, 2)

    def _join_states(self, outputs: list[SeaCoreOutput], state: SeaState | None, batch: int) -> SeaState:
        """The state after the last document of each row; a row without real tokens keeps what it had."""
        parts = []
        for i, like in enumerate(outputs[0].state):
            joined = like.new_zeros(batch, *like.shape[1:]) if state is None else state[i].to(like.dtype)
            for output, group in self._with(outputs):
                joined = joined.index_copy(0, group.rows[group.last], output.state[i][group.last])
            parts.append(joined)
        return SeaState(*parts)


def _targets_of(teacher: TeacherTargets, group: DocumentGroup) -> TeacherTargets:
    """A teacher's targets of the documents of a group."""
    if teacher.q is None or teacher.k is None:
        raise ValueError("targets for packed rows need the teacher's q and k, not its scores, which cross documents")

    def of_group(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(0, 1)[group.tokens].transpose(1, 2)

    context = None if teacher.context is None else teacher.context.flatten(0, 1)[group.tokens]
    return replace(teacher, context=context, q=of_group(teacher.q), k=of_group(teacher.k), scores=None)
