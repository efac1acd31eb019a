"""The Triton kernel of the LEAP mechanism's backward for near windows (LEAP specification, section 2).

A program walks along a strip of S chunks of C tokens of one head and keeps the chunk before in registers: a window that reaches
no further than C tokens back needs nothing else, so every input is read once, while the step before is at work. The gradients of
a chunk's keys and values are finished one step later, when the tokens that still read them are there; one chunk more than the
strip is formed for that.
"""

try:  # inside `try`, since loading a checkpoint's own code demands every other import, also where there is no GPU
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the GPU kernels need the package triton: pip install triton") from error

from .leap_triton_kernels import (
    _load_chunk,
    _load_readers,
    _product,
    _reader_gradients,
    _returned,
    _sees,
    _store_query_gradient,
    _store_writer_gradients,
    _weighted,
)


@triton.jit
def backward_strip_kernel(
    q_ptr, x_ptr, k_ptr, mask_ptr, segment_ptr, grad_ptr, dq_ptr, dx_ptr, dk_ptr, dq_t,
    seed_ptr, p, scale, eps, T, H, sq_b, sq_t, sq_h, sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h,
    W: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr,
    BF16: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """All gradients of a strip."""
    held: tl.constexpr = tl.float32 if DROPOUT else x_ptr.dtype.element_ty
    seed = tl.load(seed_ptr) if DROPOUT else 0
    first, h, b = tl.program_id(0) * S * C, tl.program_id(1), tl.program_id(2).to(tl.int64)
    place, features = tl.arange(0, C), tl.arange(0, EP)
    f0, key0, k0, v0, weight0, slope0, document0 = _load_chunk(
        x_ptr, k_ptr, mask_ptr, segment_ptr, seed, p, scale, b, first - C + place, h, T, H,
        sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features, E, MASKED, PACKED, DROPOUT, ROTATED,
    )  # fmt: skip
    f0, key0, k0, v0 = f0.to(held), key0.to(held), k0.to(held), v0.to(held)
    nothing = tl.zeros((C, EP), tl.float32)
    gap = place[:, None] - place[None, :]  # row: the token that reads, column: the token read
    no_weights = tl.zeros((C,), tl.float32)
    dk0, dv0, dweight0 = nothing, nothing, no_weights
    for step in tl.range(S + 1, num_stages=STAGES):
        t = first + step * C + place
        f, key, k, v, weight, slope, document = _load_chunk(
            x_ptr, k_ptr, mask_ptr, segment_ptr, seed, p, scale, b, t, h, T, H,
            sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features, E, MASKED, PACKED, DROPOUT, ROTATED,
        )  # fmt: skip
        q, grad = _load_readers(
            q_ptr, grad_ptr, mask_ptr, seed, p, b, t, h, T, H, sq_b, sq_t, sq_h, features, E, MASKED, DROPOUT
        )
        visible = _sees(document, document, gap, W, PACKED)
        visible0 = _sees(document, document0, gap + C, W, PACKED)
        table, table0 = tl.where(visible, weight[None, :], 0.0), tl.where(visible0, weight0[None, :], 0.0)
        on_k, on_k0 = _product(q, k, BF16), _product(q, k0, BF16)
        on_v, on_v0 = _product(grad, v, BF16), _product(grad, v0, BF16)
        norm = tl.sum(table, axis=1) + tl.sum(table0, axis=1)
        score = tl.sum(table * on_k, axis=1) + tl.sum(table0 * on_k0, axis=1)
        gained = tl.sum(table * on_v, axis=1) + tl.sum(table0 * on_v0, axis=1)
        dscore, factor, dnorm = _reader_gradients(score, gained, norm, scale, eps)
        dq = _weighted(dscore[:, None] * table, k, nothing, BF16)
        dq = _weighted(dscore[:, None] * table0, k0, dq, BF16)
        if step < S:
            _store_query_gradient(dq, dq_ptr, dq_t, seed, p, b, t, h, T, H, features, E, DROPOUT)
        if step > 0:
            dk0, dv0, dweight0 = _returned(
                visible0, weight0, q, grad, on_k0, on_v0, dscore, factor, dnorm, dk0, dv0, dweight0, BF16
            )
            _store_writer_gradients(
                f0.to(tl.float32), key0.to(tl.float32), slope0, dk0, dv0, dweight0, dx_ptr, dk_ptr,
                seed, p, scale, b, t - C, h, T, H, features, E, DROPOUT, ROTATED,
            )  # fmt: skip
        dk0, dv0, dweight0 = _returned(
            visible, weight, q, grad, on_k, on_v, dscore, factor, dnorm, nothing, nothing, no_weights, BF16
        )
        f0, key0, k0, v0 = f.to(held), key.to(held), k.to(held), v.to(held)
        weight0, slope0, document0 = weight, slope, document
