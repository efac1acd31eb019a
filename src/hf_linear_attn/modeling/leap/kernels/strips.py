"""The Triton kernel of the LEAP mechanism's backward for near windows (LEAP specification, section 2).

A program walks along a strip of S chunks of C tokens of one head and keeps the chunk before in registers: a window that reaches
no further than C tokens back needs nothing else, so every input is read once, while the step before is at work. The gradients of
a chunk's keys and values are finished one step later, when the tokens that still read them are there; one chunk more than the
strip is formed for that.
"""

from ...kernels.triton_shim import tl, triton
from .chunks import (
    _load_chunk,
    _load_readers,
    _product,
    _reader_gradients,
    _returned,
    _seeded,
    _sees,
    _store_query_gradient,
    _store_writer_gradients,
    _weighted,
)


@triton.jit
def backward_strip_kernel(
    query, inputs, grad_ptr, dq_there, grads, drop, scale, eps, sizes, strides,
    W: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr,
    BF16: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """All gradients of a strip."""
    held: tl.constexpr = tl.float32 if FLAGS[2] else inputs[0].dtype.element_ty
    drop = _seeded(drop, FLAGS)
    first, h, b = tl.program_id(0) * S * C, tl.program_id(1), tl.program_id(2).to(tl.int64)
    place, features = tl.arange(0, C), tl.arange(0, EP)
    f0, key0, k0, v0, weight0, slope0, document0 = _load_chunk(
        inputs, drop, scale, b, first - C + place, h, sizes, strides, features, E, FLAGS
    )
    f0, key0, k0, v0 = f0.to(held), key0.to(held), k0.to(held), v0.to(held)
    nothing = tl.zeros((C, EP), tl.float32)
    gap = place[:, None] - place[None, :]  # row: the token that reads, column: the token read
    no_weights = tl.zeros((C,), tl.float32)
    dk0, dv0, dweight0 = nothing, nothing, no_weights
    for step in tl.range(S + 1, num_stages=STAGES):
        t = first + step * C + place
        f, key, k, v, weight, slope, document = _load_chunk(
            inputs, drop, scale, b, t, h, sizes, strides, features, E, FLAGS
        )
        q, grad = _load_readers(query, grad_ptr, inputs, drop, b, t, h, sizes, features, E, FLAGS)
        visible = _sees(document, document, gap, W, FLAGS)
        visible0 = _sees(document, document0, gap + C, W, FLAGS)
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
            _store_query_gradient(dq, dq_there, drop, b, t, h, sizes, features, E, FLAGS)
        if step > 0:
            dk0, dv0, dweight0 = _returned(
                visible0, weight0, q, grad, on_k0, on_v0, dscore, factor, dnorm, dk0, dv0, dweight0, BF16
            )
            _store_writer_gradients(
                f0.to(tl.float32), key0.to(tl.float32), slope0, dk0, dv0, dweight0, grads,
                drop, scale, b, t - C, h, sizes, features, E, FLAGS,
            )  # fmt: skip
        dk0, dv0, dweight0 = _returned(
            visible, weight, q, grad, on_k, on_v, dscore, factor, dnorm, nothing, nothing, no_weights, BF16
        )
        f0, key0, k0, v0 = f.to(held), key.to(held), k.to(held), v.to(held)
        weight0, slope0, document0 = weight, slope, document
