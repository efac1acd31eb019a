"""The LEAP mechanism in plain PyTorch with its backward written out (LEAP specification, section 2).

Between its matrix products the mechanism is bound by passes over memory, and autograd makes about twice as many as are needed: a
zero-filled gradient for each projection, a division that could be a factor of one number a head, sums of pieces. So eager
training runs `_Leap` (a compiler fuses the passes of the formula itself). With S_i = sum of a_j x_j over the window,
r_i = 1 / (sum of a_j + eps), s = 1 / sqrt(E):

    g_i = sigmoid(s r_i <q_i, Sk_i>)            out_i = g_i r_i Sv_i

    c_i  = <dout_i, Sv_i>                       m_i   = s r_i g_i (1 - g_i) r_i c_i      (gradient of <q_i, Sk_i>)
    dq_i = m_i Sk_i    dSk_i = m_i q_i          dSv_i = g_i r_i dout_i
    dN_i = -r_i (g_i r_i c_i + m_i <q_i, Sk_i>)                                          (gradient of the sum of a)

and, with D the sums of dSk, dSv, dN over the tokens that see j, and elu'(l) = min(a, 1):

    da_j = <Dk_j, k_j> + <Dv_j, v_j> + DN_j     dl_j = s da_j min(a_j, 1)
    df_j = dl_j k_j    dk_j = a_j Dk_j + dl_j f_j                  dv_j = a_j Dv_j
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...kernels.conditions import untransformed
from ...kernels.second_derivatives import differentiable_gradients
from ...kernels.tracing import as_written, records_gradients
from ...shared.precision import accumulation_dtype
from ...shared.windowed_mean import EPS, windowed_sum
from ..formula import dropped, gated_means


def runs_backward(projected, *args, **kwargs) -> bool:
    """Whether a backward will come that is worth writing out."""
    return records_gradients(projected)


def eager_covers(
    projected, window=None, *, rotated=None, exponential=False, dropout=0.0, mask=None, segment_ids=None, initial_state=None,
    return_state=False, layout=None, decay=None,
) -> str | None:  # fmt: skip
    """Why `eager_mechanism` cannot do this call, or None; arguments as for `leap_mechanism`."""
    if type(projected) is not torch.Tensor:
        return f"the projections are a {type(projected).__name__}, which knows PyTorch's own operators only"
    if exponential:
        return "it has no exp focus"
    if decay is not None:
        return "it has no weights that fade"
    if initial_state is not None or return_state:
        return "it gives no gradient to states"
    if window is not None and mask is not None:
        return "it has no windows over padded tokens"
    return untransformed(projected)


def eager_mechanism(
    projected, window=None, *, rotated=None, exponential=False, dropout=0.0, mask=None, segment_ids=None, initial_state=None,
    return_state=False, layout=None, decay=None,
):  # fmt: skip
    """`leap_mechanism` by `_Leap`."""
    projected, rotated, kept = dropped(projected, rotated, dropout)
    return _Leap.apply(projected, *(rotated or (None, None)), window, kept, mask, segment_ids), None


def plain_mechanism(window, kept, mask, segment_ids) -> Callable:
    """Projections, rotated queries and keys (or None) -> output, by the formula: for gradients that are differentiated again."""

    def formula(projected, query, key):
        rotated = None if key is None else (query, key)
        return gated_means(projected, rotated, window, kept, mask=mask, segment_ids=segment_ids)[0]

    return formula


class _Leap(torch.autograd.Function):
    """One layer's mechanism. Keeps the projections, the sums, and a few numbers a token and head."""

    @staticmethod
    def forward(ctx, projected, query, key, window, kept, mask, segment_ids):
        with as_written(projected):
            q, f, focus_key, v, k = _parts(projected, query, key)
            scratch = f * focus_key
            logits = scratch.sum(-1).mul_(f.shape[-1] ** -0.5)
            if kept is not None:
                logits *= kept
            weights = F.elu(logits, inplace=True).add_(1)
            if mask is not None:
                weights *= mask[..., None]
            written = _empty_sums(v)
            write_k, write_v, write_norm = _split(written, v)
            torch.mul(k, weights[..., None], out=write_k)
            torch.mul(v, weights[..., None], out=write_v)
            write_norm.copy_(weights)
            sums = windowed_sum(written, window, segment_ids)
            sum_k, sum_v, norm = _split(sums, v)
            share = (norm + EPS).reciprocal_()
            score = torch.mul(q, sum_k, out=scratch).sum(-1)
            gate = torch.sigmoid(score * share * f.shape[-1] ** -0.5)
            out = sum_v * (gate * share)[..., None]
            if mask is not None:
                out *= mask[..., None, None]
        ctx.save_for_backward(projected, query, key, kept, mask, segment_ids, sums, weights, share, score, gate)
        ctx.window = window
        return out.to(projected.dtype)

    @staticmethod
    def backward(ctx, grad):
        if records_gradients():  # create_graph=True: the gradient must have one itself
            return _through_formula(ctx, grad)
        projected, query, key, kept, mask, segment_ids, sums, weights, share, score, gate = ctx.saved_tensors
        with as_written(projected):
            q, f, focus_key, v, k = _parts(projected, query, key)
            scale = f.shape[-1] ** -0.5
            sum_k, sum_v, _ = _split(sums, v)
            dsums = _empty_sums(v)
            dsum_k, dsum_v, dnorm = _split(dsums, v)
            dx = torch.empty(projected.shape, dtype=v.dtype, device=v.device)
            grad = grad.to(v.dtype)
            if mask is not None:
                grad = grad * mask[..., None, None]
            # Through the gate and the mean, to the sums.
            factor = gate * share
            scratch = grad * sum_v
            gained = scratch.sum(-1).mul_(factor)
            dscore = gained * share * (1 - gate) * scale
            torch.mul(grad, factor[..., None], out=dsum_v)
            torch.mul(q, dscore[..., None], out=dsum_k)
            torch.mul(gained + dscore * score, -share, out=dnorm)
            dquery = torch.mul(sum_k, dscore[..., None], out=dx[:, :, 0])
            # Back to what each token wrote.
            back_k, back_v, back_norm = _split(windowed_sum(dsums, ctx.window, segment_ids, reverse=True), v)
            torch.mul(back_k, k, out=scratch).addcmul_(back_v, v)
            dlogits = scratch.sum(-1).add_(back_norm).mul_(weights.clamp(max=1)).mul_(scale)
            if kept is not None:
                dlogits *= kept
            torch.mul(focus_key, dlogits[..., None], out=dx[:, :, 1])
            torch.mul(back_v, weights[..., None], out=dx[:, :, 3])
            rotated = None, None
            if key is None:
                torch.mul(back_k, weights[..., None], out=dx[:, :, 2]).addcmul_(f, dlogits[..., None])
            else:
                rotated = dquery.to(query.dtype, copy=True), (back_k * weights[..., None]).to(key.dtype)
                dx[:, :, 0] = 0
                torch.mul(f, dlogits[..., None], out=dx[:, :, 2])
        return dx.to(projected.dtype), *rotated, None, None, None, None


def _through_formula(ctx, grad):
    """The gradients by autograd, which can be differentiated again."""
    *inputs, kept, mask, segment_ids = ctx.saved_tensors[:6]

    formula = plain_mechanism(ctx.window, kept, mask, segment_ids)
    return *differentiable_gradients(formula, inputs, ctx.needs_input_grad, grad), None, None, None, None


def _parts(projected, query, key):
    """Queries, focus, keys of the logits, values, averaged keys (B, T, H, E), in at least float32."""
    x = projected.to(accumulation_dtype(projected.dtype))
    q, f, focus_key, v = x.unbind(2)
    return q if query is None else query.to(x.dtype), f, focus_key, v, focus_key if key is None else key.to(x.dtype)


def _empty_sums(v):
    """Room for the sums of keys, values and weights side by side, (B, T, 2 H E + H): one product sums all of them."""
    batch, length, heads, width = v.shape
    return torch.empty(batch, length, heads * (2 * width + 1), dtype=v.dtype, device=v.device)


def _split(sums, v):
    """Views of such a buffer: keys (B, T, H, E), values (B, T, H, E), weights (B, T, H)."""
    features = v.shape[2] * v.shape[3]
    keys, values, norm = sums.split([features, features, v.shape[2]], dim=-1)
    return keys.unflatten(-1, v.shape[2:]), values.unflatten(-1, v.shape[2:]), norm
