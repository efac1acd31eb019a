"""The product orders of DenseAttention, without Python loops over tokens: full, chunked, banded and per document.

Shapes: query, key, value and every result are (B, T, H, D); inside, chunks are (B, n, H, C, D). Where `value` is `key`
(no positions on the keys, or the same on both), it is carried as one tensor. Zero rows write nothing: padding to whole
chunks is free.
"""

import torch
import torch.nn.functional as F

from .backend import runs_triton
from .dense_attention_state import accumulation_dtype
from .gram import gram
from .running_sum import running_sum

LARGEST_KERNEL_HEAD = 128
LARGEST_KERNEL_WINDOW = 1024  # beyond it, products with whole windows keep the matrix units busier


def _heads_first(states: torch.Tensor) -> torch.Tensor:
    """(B, T, H, D) -> (B, H, T, D), a view when the product can use it as it is, otherwise one copy."""
    return (
        states.transpose(1, 2).contiguous() if states.shape[0] > 1 and states.shape[2] > 1 else states.transpose(1, 2)
    )


def more_than(number: int, bound: int) -> bool:
    """`number > bound`, and True for the symbolic sizes of torch.export:
    a comparison would tie the program to one answer.
    """
    return not isinstance(number, int) or number > bound


def at_most(number: int, bound: int) -> int:
    """The smaller one, or `bound` for a symbolic size, so that an exported program serves every length."""
    return bound if more_than(number, bound) else number


def chunk_padding(length: int, chunk: int) -> tuple[int, int]:
    """How many chunks hold `length` tokens, and how many empty slots stand behind the last token:
    10 tokens in chunks of 4 give (3, 2).

    For the symbolic lengths of torch.export the number is even: PyTorch lays out a single chunk differently, and would ask.
    """
    group = chunk if isinstance(length, int) else 2 * chunk
    number = (length + group - 1) // group * (group // chunk)
    return number, number * chunk - length


def regroup(states: torch.Tensor, *shape: int) -> torch.Tensor:
    """`reshape`, by way of one axis: straight on, torch.export would ask how the symbolic sizes divide one another."""
    return states.contiguous().view(-1).view(shape)


def _chunks(states: torch.Tensor, chunk: int) -> torch.Tensor:
    """(B, T, H, D) -> (B, n, H, C, D), zeros behind the last token."""
    number, behind = chunk_padding(states.shape[1], chunk)
    if more_than(behind, 0):
        states = F.pad(states, (0, 0, 0, 0, 0, behind))
    return states.unflatten(1, (number, chunk)).transpose(2, 3)


def crop_tokens(states: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """Tokens `start` to `start + length` of `(B, T, ...)`."""
    if isinstance(length, int):
        return states[:, start : start + length]
    # Whether a slice is contiguous depends on its length, which an exported program may not ask: it copies.
    return states.index_select(1, torch.arange(start, start + length, device=states.device))


def _from_chunks(out: torch.Tensor, length: int) -> torch.Tensor:
    """(B, n, H, C, D) -> (B, T, H, D)."""
    batch, number, heads, chunk, head_dim = out.shape
    return crop_tokens(regroup(out.transpose(2, 3), batch, number * chunk, heads, head_dim), 0, length)


def _after_first(chunks: torch.Tensor) -> torch.Tensor:
    """The chunks (axis 1) that have an earlier one; all of them where their number is symbolic (see `_before_last`)."""
    return chunks[:, 1:] if isinstance(chunks.shape[1], int) else chunks


def _before_last(chunks: torch.Tensor) -> torch.Tensor:
    """The chunk before each chunk of `_after_first`. Where their number is symbolic, zeros stand before the first."""
    if isinstance(chunks.shape[1], int):
        return chunks[:, :-1]
    return F.pad(chunks, [0, 0] * (chunks.dim() - 2) + [1, 0])[:, : chunks.shape[1]]


def _add_to_later(out: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`out` with what `_after_first` chunks take from `_before_last` ones added, in place if it may be."""
    if not isinstance(out.shape[1], int):
        return out + part
    out[:, 1:] += part
    return out


def bidirectional_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mode: str) -> torch.Tensor:
    """All tokens see all tokens: Q (K^T V), 4 T D^2 operations a head, or (Q K^T) V, 4 T^2 D.

    "auto" is linear when D <= T, and for the symbolic T of torch.export: one program serves every length, and `mode`
    chooses the other order for it. Specification 1.2.
    """
    linear = mode == "linear" or (mode == "auto" and more_than(query.shape[1], query.shape[3] - 1))
    shared = value is key
    if query.device.type == "cpu" and query.shape[2] > 1:
        # Head by head: one copy, of the result, instead of one of each tensor.
        heads = zip(query.unbind(2), key.unbind(2), value.unbind(2))
        return torch.stack(
            [q @ (k.transpose(1, 2) @ v) if linear else (q @ k.transpose(1, 2)) @ v for q, k, v in heads], dim=2
        )
    query, key = _heads_first(query), _heads_first(key)
    value = key if shared else _heads_first(value)
    if linear:
        out = query @ (gram(key) if shared else key.transpose(-1, -2) @ value)
    else:
        out = (query @ key.transpose(-1, -2)) @ value
    return out.transpose(1, 2)


def folded_attention(weight: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """W_h^T (K_h^T K_h) of all heads beside each other, (B, d, d): x times it is bidirectional attention of q = x W^T, k = v = x.

    weight (d, d), key (B, T, H, D). Queries are never made: 2 T d (D + d) operations and 2 d^2 D once, instead of
    2 T d (2 D + d). So it pays when T > d. Products in the key's dtype, as in the other orders.
    """
    batch, _, heads, head_dim = key.shape
    key = _heads_first(key)
    memory = gram(key)  # (B, H, D, D)
    folded = weight.view(heads, head_dim, -1).transpose(1, 2) @ memory  # (B, H, d, D)
    return folded.transpose(1, 2).reshape(batch, -1, heads * head_dim)


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunk: int,
    memory: torch.Tensor | None,
    keeps_memory: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """tril(Q K^T) V in chunks, from an initial memory `(B, H, D, D)` or none; also returns the memory after the last
    token, which has a gradient only with `keeps_memory`.

        O_c = tril(Q_c K_c^T) V_c + Q_c (M_in + sum_{c' < c} K_c'^T V_c')        specification 1.3 and 1.5

    O(T (C + D)) a feature. Products run in the input's dtype, the running sum over chunks in float32 at least.
    """
    length, shared = query.shape[1], value is key
    if runs_triton(query, _kernel_obstacle(query, key, None, keeps_memory or memory is not None)):
        from .dense_attention_triton import causal_bilinear

        return causal_bilinear(query, key, value, None, memory)
    chunk = at_most(length, chunk)
    query, key = _chunks(query, chunk), _chunks(key, chunk)
    value = key if shared else _chunks(value, chunk)
    # First phase: tokens of the same chunk.
    out = (query @ key.transpose(-1, -2)).tril() @ value  # (B, n, H, C, D)
    # Second phase: what each chunk writes, summed up to and including it.
    written = (key.transpose(-1, -2) @ value).to(accumulation_dtype(query.dtype))  # (B, n, H, D, D)
    sums = running_sum(written, 1) if more_than(written.shape[1], 1) else written
    if memory is not None:
        sums = sums + memory[:, None].to(sums.dtype)
        out[:, :1] += query[:, :1] @ memory[:, None].to(query.dtype)
    # Third phase: tokens of earlier chunks.
    if more_than(out.shape[1], 1):
        out = _add_to_later(out, _after_first(query) @ _before_last(sums).to(query.dtype))
    return _from_chunks(out, length), sums[:, -1]


def sliding_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> torch.Tensor:
    """Causal window of w keys including the token itself: own chunk and the upper triangle of the previous one.

    Row r of a chunk sees r + 1 keys of its own chunk and w - 1 - r of the previous one. Specification 1.4; O(T w).
    """
    length, shared = query.shape[1], value is key
    if runs_triton(query, _kernel_obstacle(query, key, window, False)):
        from .dense_attention_triton import causal_bilinear

        return causal_bilinear(query, key, value, window)[0]
    chunk = at_most(length, window)
    query, key = _chunks(query, chunk), _chunks(key, chunk)
    value = key if shared else _chunks(value, chunk)
    out = (query @ key.transpose(-1, -2)).tril() @ value
    if more_than(out.shape[1], 1):
        scores = (_after_first(query) @ _before_last(key).transpose(-1, -2)).triu(1)
        out = _add_to_later(out, scores @ _before_last(value))
    return _from_chunks(out, length)


def _kernel_obstacle(query: torch.Tensor, key: torch.Tensor, window: int | None, has_state: bool) -> str | None:
    """Why the Triton kernel cannot do this causal call, or None."""
    if query.shape[3] > LARGEST_KERNEL_HEAD:
        return f"its heads end at {LARGEST_KERNEL_HEAD} features, these have {query.shape[3]}"
    if window is not None and window > LARGEST_KERNEL_WINDOW:
        return f"its windows end at {LARGEST_KERNEL_WINDOW} tokens, this one has {window}"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {query.dtype}"
    if has_state and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "it gives no gradient to states"
    return None


def _band(chunks: torch.Tensor, causal: bool) -> torch.Tensor:
    """Each chunk (axis 1) with its previous, and unless causal its next, chunk: the token axis (3) grows to 2 C or 3
    C.
    """
    empty = torch.zeros_like(chunks[:, :1])
    previous = torch.cat((empty, chunks[:, :-1]), dim=1)
    if causal:
        return torch.cat((previous, chunks), dim=3)
    return torch.cat((previous, chunks, torch.cat((chunks[:, 1:], empty), dim=1)), dim=3)


def banded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment_ids: torch.Tensor,
    starts: torch.Tensor,
    window: int,
    causal: bool,
    sliding: bool,
) -> torch.Tensor:
    """Windows of at most w consecutive slots that may begin anywhere: each chunk of w tokens against its neighbours.
    O(T w).

    segment_ids: (B, T) documents. starts: (B, T) first slot of each token's window, or the token's own slot if
        `sliding`.
    """
    length, shared = query.shape[1], value is key
    chunk = at_most(length, window)
    query, key = _chunks(query, chunk), _band(_chunks(key, chunk), causal)
    value = key if shared else _band(_chunks(value, chunk), causal)

    def pair(ids, fill):  # (B, T) -> (B, n, 1, C, 1) for queries and (B, n, 1, 1, 2 C or 3 C) for keys
        number, behind = chunk_padding(length, chunk)
        ids = F.pad(ids, (0, behind), value=fill).unflatten(1, (number, chunk))[:, :, None, :, None]
        return ids, _band(ids, causal).transpose(-1, -2)

    # A band has empty slots before the first chunk: +1 keeps their zero apart from document 0.
    query_segment, key_segment = pair(segment_ids + 1, -1)
    query_start, key_start = pair(starts, -1)
    allowed = query_segment == key_segment
    slot = torch.arange(chunk, device=query.device)
    key_slot = torch.arange(-chunk, key.shape[3] - chunk, device=query.device)
    if sliding:
        allowed = allowed & (query_start - key_start < window)
    else:
        allowed = allowed & (query_start == key_start)
    if causal:
        allowed = allowed & (key_slot <= slot[:, None])
    scores = torch.where(allowed, query @ key.transpose(-1, -2), 0.0)  # half precision may overflow between documents
    return _from_chunks(scores @ value, length)


def _document_sums(written: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Running sums along chunks that restart when the document changes: `edges` (B, n), `written` (B, n, H, D, D).

    Chunks of one document are adjacent, so a doubling scan adds the partial sum `step` chunks back if it is of the same
    document.
    """
    step = 1
    while step < written.shape[1]:
        same = (edges[:, step:] == edges[:, :-step])[..., None, None, None]
        earlier = torch.where(same, written[:, :-step], 0.0)
        written = torch.cat((written[:, :step], written[:, step:] + earlier), dim=1)
        step *= 2
    return written


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment_ids: torch.Tensor,
    causal: bool,
    chunk: int,
    memory: torch.Tensor | None,
) -> torch.Tensor:
    """Global attention inside each packed document. `memory` (B, H, D, D) is what document 0 wrote before this row.

    A chunk meets at most one document that began before it (the one of the slot before its first) and one that goes on
    after it.
    """
    batch, length, heads, head_dim = query.shape
    chunk, shared = at_most(length, chunk), value is key
    wide = accumulation_dtype(query.dtype)
    query, key = _chunks(query, chunk), _chunks(key, chunk)
    value = key if shared else _chunks(value, chunk)
    number, behind = chunk_padding(length, chunk)
    ids = F.pad(segment_ids, (0, behind), value=-1).unflatten(1, (number, chunk))  # (B, n, C)
    same = ids[:, :, :, None] == ids[:, :, None, :]
    scores = torch.where(same[:, :, None], query @ key.transpose(-1, -2), 0.0)  # as in `banded_attention`
    out = (scores.tril() if causal else scores) @ value

    def written_at(edge):  # (B, n): what each chunk writes to the document of its edge slot
        mine = (ids == edge[..., None])[:, :, None, :, None].to(key.dtype)
        return ((key * mine).transpose(-1, -2) @ value).to(wide)

    def read(sums, queries, documents, edge):
        mine = (documents == edge[..., None])[:, :, None, :, None]
        return torch.where(mine, queries @ sums.to(query.dtype), 0.0)

    if memory is None:
        memory = query.new_zeros(batch, heads, head_dim, head_dim, dtype=wide)
    # Earlier chunks: the state's document (id 0) stands before the first one. Slots behind the end carry -1, so amax is
    # the last.
    edges = F.pad(ids.amax(-1), (1, 0))
    before = _document_sums(torch.cat((memory[:, None].to(wide), written_at(edges[:, 1:])), dim=1), edges)
    out = out + read(before[:, :-1], query, ids, edges[:, :-1])
    if not causal and more_than(out.shape[1], 1):
        # Later chunks: the same scan from the other side, with the document of the first slot.
        edges = ids[:, :, 0]
        after = _document_sums(written_at(edges).flip(1), edges.flip(1)).flip(1)
        later = read(after[:, 1:], query[:, :-1], ids[:, :-1], edges[:, 1:])
        out = torch.cat((out[:, :-1] + later, out[:, -1:]), dim=1)
    return _from_chunks(out, length)
