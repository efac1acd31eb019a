"""How tokens lie in tensors: heads in front, chunks, and lengths that torch.export keeps symbolic.

(B, T, H, D) tokens, (B, H, T, D) heads first, (B, n, H, C, D) chunks.
"""

import torch
import torch.nn.functional as F


def heads_first(states: torch.Tensor) -> torch.Tensor:
    """(B, T, H, D) -> (B, H, T, D), a view when the product can use it as it is, otherwise one copy."""
    first = states.transpose(1, 2)
    return first.contiguous() if states.shape[0] > 1 and states.shape[2] > 1 else first


def more_than(number: int, bound: int) -> bool:
    """`number > bound`, and True for a symbolic size: a comparison would tie an exported program to one answer."""
    return not isinstance(number, int) or number > bound


def at_most(number: int, bound: int) -> int:
    """The smaller one, or `bound` for a symbolic size, so that an exported program serves every length."""
    return bound if more_than(number, bound) else number


def chunk_padding(length: int, chunk: int) -> tuple[int, int]:
    """How many chunks hold `length` tokens, and how many empty slots stand behind the last: (3, 2) for 10 tokens in chunks of 4.

    For a symbolic length the number is even: PyTorch lays out a single chunk differently, and would ask.
    """
    group = chunk if isinstance(length, int) else 2 * chunk
    number = (length + group - 1) // group * (group // chunk)
    return number, number * chunk - length


def regroup(states: torch.Tensor, *shape: int) -> torch.Tensor:
    """`reshape`, by way of one axis: straight on, torch.export would ask how the symbolic sizes divide one another."""
    return states.contiguous().view(-1).view(shape)


def chunks_of(states: torch.Tensor, chunk: int) -> torch.Tensor:
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


def from_chunks(out: torch.Tensor, length: int) -> torch.Tensor:
    """(B, n, H, C, D) -> (B, T, H, D)."""
    batch, number, heads, chunk, head_dim = out.shape
    return crop_tokens(regroup(out.transpose(2, 3), batch, number * chunk, heads, head_dim), 0, length)


def after_first(chunks: torch.Tensor) -> torch.Tensor:
    """The chunks (axis 1) that have an earlier one; all of them where their number is symbolic (see `before_last`)."""
    return chunks[:, 1:] if isinstance(chunks.shape[1], int) else chunks


def before_last(chunks: torch.Tensor) -> torch.Tensor:
    """The chunk before each chunk of `after_first`. Where their number is symbolic, zeros stand before the first."""
    if isinstance(chunks.shape[1], int):
        return chunks[:, :-1]
    return F.pad(chunks, [0, 0] * (chunks.dim() - 2) + [1, 0])[:, : chunks.shape[1]]


def add_to_later(out: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`out` with what `after_first` chunks take from `before_last` ones added, in place if it may be."""
    if not isinstance(out.shape[1], int):
        return out + part
    out[:, 1:] += part
    return out
