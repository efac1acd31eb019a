"""Sums whose terms fade: S_i = sum_{j <= i} exp(-r (n_i - n_j)) x_j, in O(T) time and memory.

n_i counts the real tokens of the row up to token i, so that padding ages nothing; r_h = ln 2 / half-life is the rate of head h.
No factor is ever above 1: a term fades within its chunk, then with its chunk's total, and nothing is divided by a power.

Notation: B batch, T time, H heads, F features a head, C chunk, n chunks.
"""

import torch
import torch.nn.functional as F

from ...kernels.tracing import float32_products_are_rounded, is_traced

CHUNK = 64  # as in `windowed_mean`
# exp weights are kept relative to the largest log weight that is seen, but never to one below this floor: weights under
# exp(-30) vanish beside eps anyway, and the floor keeps exp(-reference) finite for windows that are empty.
LOG_WEIGHT_FLOOR = -30.0


def decayed_sum(
    x: torch.Tensor,
    rates: torch.Tensor,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    log_weights: torch.Tensor | None = None,
    of_chunks: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sums S (B, T, H, F) of x (B, T, H, F), within each document.

    Args:
        x: what is summed; 0 at padding (or -inf in `log_weights`).
        rates (`torch.Tensor` of shape `(H,)`): r >= 0, in the dtype of x.
        mask (`torch.Tensor` of shape `(B, T)`, *optional*): True for tokens that take a step of time.
        segment_ids (`torch.Tensor` of shape `(B, T)`, *optional*): non-decreasing document numbers.
        log_weights (`torch.Tensor` of shape `(B, T, H)`, *optional*): x_j counts exp(log_weights_j) times.
        of_chunks (`bool`): whether x are totals of chunks already. Where torch.export keeps the length symbolic they then take
            one table, since it stays symbolic through one level of chunks alone.

    Returns:
        `tuple`: the sums and, with log weights, the reference (B, T, H): the sums are to be multiplied by exp(reference).
    """
    steps = None if mask is None else mask.to(x.dtype)
    level = 1 if of_chunks and isinstance(x.shape[1], torch.SymInt) else 0
    return _decayed_sum(x, rates, steps, segment_ids, log_weights, level)


def steps_taken(length: int, like: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """n_i, the real tokens up to each token, itself included: (B or 1, T), in the dtype of `like`."""
    if mask is None:
        return torch.arange(1, length + 1, device=like.device, dtype=like.dtype)[None]
    return mask.cumsum(1).to(like.dtype)


def _decayed_sum(x, rates, steps, segments, logs, depth):
    """`decayed_sum` of terms that take `steps` (B, T) of time each; None: one each. `rates` are those of a step."""
    length = x.shape[1]
    # While compiling, the length may be dynamic and must not be asked for: three levels hold any, and chunks in pairs keep their
    # number from being 1. torch.export keeps a length dynamic through one level of tables alone.
    tracing = is_traced()
    last_level = depth == 2 or (depth == 1 and isinstance(length, torch.SymInt))
    single = last_level or (depth == 0 and length == 1) or (not tracing and length <= CHUNK)
    # First phase: cut the row into chunks. What fills the last one up stands behind all tokens, and takes no time.
    chunk = length if single else CHUNK
    pair = 2 if tracing else 1
    count = 1 if single else pair * ((length + pair * chunk - 1) // (pair * chunk))
    padding = count * chunk - length
    values = _cut(x, padding, single)  # (B, n, C, H, F)
    segments = None if segments is None else _cut(segments, padding, single)  # (B, n, C)
    logs = None if logs is None else _cut(logs, padding, single, -torch.inf).transpose(2, 3)  # (B, n, H, C)
    # Second phase: the time (C,) or (B, n, C) of each place in its chunk, and how much of term j is left at place i.
    if steps is None:
        time = torch.arange(1, chunk + 1, device=x.device, dtype=x.dtype)
    else:
        time = _cut(steps, padding, single).cumsum(-1)
    place = torch.arange(chunk, device=x.device)
    visible = place[:, None] >= place  # (C, C)
    if segments is not None:
        visible = (visible & (segments[..., :, None] == segments[..., None, :]))[:, :, None]  # (B, n, 1, C, C)
    scores = _fading(time[..., :, None] - time[..., None, :], rates)  # (H, C, C) or (B, n, H, C, C)
    scores = scores if logs is None else scores + logs[..., None, :]
    scores = scores.masked_fill(~visible, -torch.inf)
    # Third phase: the sums of all chunks before, as they stand at the end of the last of them, and what of that is left.
    before = None
    if not single:
        before, reference_before = _chunks_before(values, rates, time, steps is None, segments, logs, depth)
        left = _fading(time, rates)  # (H, C) or (B, n, H, C)
        continued = None
        if segments is not None:
            continued = (segments == _moved_on(segments[..., -1:], -1))[:, :, None]  # (B, n, 1, C)
            left = left.masked_fill(~continued, -torch.inf)
    # Fourth phase: everything relative to the largest, if there are log weights; then the products.
    reference = None
    if logs is not None:
        reference = scores.detach().amax(-1)  # (B, n, H, C)
        if before is not None:
            left = left + reference_before[..., None]
            reference = torch.maximum(reference, left.detach())
        reference = reference.clamp(min=LOG_WEIGHT_FLOOR)
        scores = scores - reference[..., None]
    sums = _product("hij,bnjhf->bnihf" if scores.dim() == 3 else "bnhij,bnjhf->bnihf", scores.exp(), values)
    if before is not None:
        left = (left if reference is None else left - reference).exp()
        sums = sums + left.transpose(-1, -2)[..., None] * before[:, :, None]
    reference = None if reference is None else _join(reference.transpose(2, 3), single, length)
    return _join(sums, single, length), reference


def _chunks_before(values, rates, time, counted, segments, logs, depth):
    """Sums (B, n, H, F) over all chunks before each, as they stand at its beginning, and their references (B, n, H) or None."""
    # First phase: what each chunk hands on, as it stands at its end: the document that is open there.
    ends = None if segments is None else segments[..., -1]
    scores = _fading(time[..., -1:] - time, rates)  # (H, C) or (B, n, H, C)
    if segments is not None:
        scores = scores.masked_fill((segments != ends[..., None])[:, :, None], -torch.inf)
    tops = None
    if logs is not None:
        scores = scores + logs
        tops = scores.detach().amax(-1).clamp(min=LOG_WEIGHT_FLOOR)  # (B, n, H)
        scores = scores - tops[..., None]
    totals = _product("hj,bnjhf->bnhf" if scores.dim() == 2 else "bnhj,bnjhf->bnhf", scores.exp(), values)
    # Second phase: the same sum over chunks, each of which takes the time of its tokens; moved on by a chunk.
    if counted:
        rates, steps = rates * values.shape[2], None
    else:
        steps = time[..., -1]
    sums, reference = _decayed_sum(totals, rates, steps, ends, tops, depth + 1)
    return _moved_on(sums, 0), None if reference is None else _moved_on(reference, LOG_WEIGHT_FLOOR)


def _fading(time, rates):
    """-r time: (...) and (H,) -> (H, C) for time (C,), (H, C, C) for (C, C), and with the heads behind (B, n) for those."""
    behind = 2 if time.dim() > 2 else 0
    return -time.unsqueeze(behind) * rates.view(-1, *[1] * (time.dim() - behind))


def _product(equation, table, x):
    """`torch.einsum` at full float32 precision, also where the user allows TF32 or bf16 inside float32 products."""
    product = torch.einsum(equation, table, x)
    if x.dtype == torch.float32 and float32_products_are_rounded():
        pairs = ((i, j) for i in range(3) for j in range(3 - i))
        tables, parts = _thirds(table.detach()), _thirds(x.detach())
        exact = sum(torch.einsum(equation, tables[i], parts[j]) for i, j in pairs)
        product = product + (exact - product).detach()
    return product


def _thirds(x):
    """Three bf16 numbers hold all 24 bits of a float32."""
    high = x.bfloat16().to(x.dtype)
    middle = (x - high).bfloat16().to(x.dtype)
    return high, middle, x - high - middle


def _cut(x, padding, single, fill=0):
    """Cut (B, T, ...) into chunks (B, n, C, ...); the last is filled up at its end."""
    if single:
        return x[:, None]
    if isinstance(padding, int) and padding == 0:
        return x.unflatten(1, (-1, CHUNK))
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, padding], value=fill).unflatten(1, (-1, CHUNK))


def _join(x, single, length):
    """Chunks (B, n, C, ...) back to (B, T, ...)."""
    if single:
        return x[:, 0]
    if isinstance(length, torch.SymInt):  # torch.export would give up a dynamic length for a slice
        return x.flatten(1, 2).index_select(1, torch.arange(length, device=x.device))
    return x.flatten(1, 2)[:, :length]


def _moved_on(x, fill):
    """Chunks (B, n, ...) moved on by one."""
    return F.pad(x, [0, 0] * (x.dim() - 2) + [1, 0], value=fill)[:, : x.shape[1]]


# Of the sums above, Inductor made wrong gradients on a GPU (torch 2.11, `comprehensive_padding`; 129 features a head, six heads),
# so that compiled models diverged. It sees one operator instead, which computes what is written, and one for the transpose.
@torch.library.custom_op("hf_linear_attn::decayed_sum", mutates_args=())
def _as_written(
    x: torch.Tensor,
    rates: torch.Tensor,
    steps: torch.Tensor | None,
    segments: torch.Tensor | None,
    logs: torch.Tensor | None,
) -> list[torch.Tensor]:
    sums, reference = _decayed_sum(x, rates, steps, segments, logs, 0)
    return [sums.contiguous()] if reference is None else [sums.contiguous(), reference.contiguous()]


@_as_written.register_fake
def _(x, rates, steps, segments, logs):
    return [x.new_empty(x.shape)] if logs is None else [x.new_empty(x.shape), x.new_empty(x.shape[:3])]


@torch.library.custom_op("hf_linear_attn::decayed_sum_backward", mutates_args=())
def _transposed(
    grad: torch.Tensor,
    sums: torch.Tensor,
    reference: torch.Tensor | None,
    x: torch.Tensor,
    rates: torch.Tensor,
    steps: torch.Tensor | None,
    segments: torch.Tensor | None,
    logs: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of x, the rates and the log weights. With S = A x: A^T grad is such a sum from the end of the row, and a rate's
    gradient is -sum_i s_i (A^T grad)_i (S_i - x_i), since a step of time s_i ages all of S_i but x_i.
    """
    back = None if steps is None else F.pad(steps[:, 1:], (0, 1)).flip(1)
    turned = None if segments is None else segments.flip(1)
    if logs is None or reference is None:
        of_x = _decayed_sum(grad.flip(1), rates, back, turned, None, 0)[0].flip(1)
        aged = (of_x * (sums - x)).sum(-1)  # (B, T, H)
        of_logs = []
    else:
        highest = reference.amax(1, keepdim=True)
        total, after = _decayed_sum(grad.flip(1), rates, back, turned, (highest - reference).flip(1), 0)
        total, after = total.flip(1), after.flip(1) - highest
        own = (after + logs).exp()
        of_x = total * own[..., None]
        of_logs = [(of_x * x).sum(-1)]
        aged = (total * sums).sum(-1) * (after + reference).exp() - of_logs[0]
    aged = aged if steps is None else aged * steps[..., None]
    return [of_x.contiguous(), -aged.sum((0, 1)), *of_logs]


@_transposed.register_fake
def _(grad, sums, reference, x, rates, steps, segments, logs):
    return [x.new_empty(x.shape), rates.new_empty(rates.shape), *([] if logs is None else [logs.new_empty(logs.shape)])]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs)


def _backward(ctx, grads):
    outputs, inputs = ctx.saved_tensors[:-5], ctx.saved_tensors[-5:]
    reference = outputs[1] if len(outputs) > 1 else None
    of_x, of_rates, *of_logs = _transposed(grads[0].contiguous(), outputs[0], reference, *inputs)
    return of_x, of_rates, None, None, of_logs[0] if of_logs else None


_as_written.register_autograd(_backward, setup_context=_save)
