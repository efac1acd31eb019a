"""Triton kernels of the LEAP mechanism (LEAP specification, section 2); `mechanism` runs them.

A row is cut into chunks of C tokens; a program does one chunk of one head. With A the masked table of focus weights of a chunk
(row: the token that reads, column: the token read), no sum of keys is ever formed, since only its product with the query counts:

    q_i Sk_i = sum_j A_ij G_ij        G = q k^T            out_i = factor_i (A v)_i
    dout_i Sv_i = sum_j A_ij D_ij     D = dout v^T         factor_i = sigmoid(s r_i q_i Sk_i) r_i

What came before is the end of the previous chunk for a window, or a carried sum for a global layer. Nothing but the projections
is kept for backward. The gradients through the sums are three numbers a token (m, factor and dN of `eager_backward`):

    dq = (m A) k        dk = (m A)^T q + dl f        dv = (factor A)^T dout        da_j = sum_i (m_i G_ij + factor_i D_ij + dN_i)
"""

from ...kernels.triton_shim import tl, triton


# What belongs together travels together, also into the kernels:
#   sizes    T, H and N (tokens, heads, chunks)
#   inputs   pointers to the projections, the rotated keys, the mask, the documents
#   strides  of the projections (row, token, part, head) and the rotated keys (row, token, head)
#   query    pointer to the queries and its strides (row, token, head)
#   carry    pointers to what came before each chunk: sums, their norms, the documents they belong to
#   drop     seed and probability of dropout (`_seeded`)
#   FLAGS    MASKED, PACKED, DROPOUT, ROTATED: which of these a call has; pointers of what it has not are never touched
@triton.jit
def _seeded(drop, FLAGS: tl.constexpr):
    """The seed itself in place of its pointer."""
    DROPOUT: tl.constexpr = FLAGS[2]
    seed = tl.load(drop[0]) if DROPOUT else 0
    return seed, drop[1]


@triton.jit
def _rows(x, b, t, h, T, stride_b, stride_t, stride_h, features, E: tl.constexpr):
    """Rows `t` (C,) of head h of row b of a (B, T, H, E) tensor, float32, 0 outside."""
    pointers = x + b * stride_b + t[:, None].to(tl.int64) * stride_t + h * stride_h + features[None, :]
    inside = (t[:, None] >= 0) & (t[:, None] < T) & (features[None, :] < E)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _kept(drop, b, t, h, part, features, sizes, E: tl.constexpr):
    """Dropout factors 0 or 1 / (1 - p) of one part (0 query, 1 focus, 2 value, 3 logits) of the tokens t: (C, E)."""
    seed, p = drop
    T, H, _ = sizes
    place = (((b * T + t[:, None]) * H + h) * 4 + part) * E + features[None, :]
    return tl.where(tl.rand(seed, place) < p, 0.0, 1.0 / (1.0 - p))


@triton.jit
def _focus(f, k, scale, kept, real):
    """Focus weight a = elu(l) + 1 and its derivative by l (C,), 0 where `real` is."""
    logits = tl.sum(f * k, axis=1) * scale * kept
    grown = tl.exp(tl.minimum(logits, 0.0))
    weight = tl.where(logits > 0, logits + 1.0, grown)
    slope = tl.where(logits > 0, 1.0, grown)
    return tl.where(real, weight, 0.0), tl.where(real, slope, 0.0)


@triton.jit
def _weighted(table, x, total, BF16: tl.constexpr):
    """Total + table @ x to float32 precision, for x that came in half precision or in float32."""
    if BF16:
        # x is exact in bfloat16, and two such numbers hold 16 bits of a weight: twice what the output keeps.
        high = table.to(tl.bfloat16)
        low = (table - high.to(tl.float32)).to(tl.bfloat16)
        exact = x.to(tl.bfloat16)
        return tl.dot(low, exact, tl.dot(high, exact, total))
    return tl.dot(table, x.to(tl.float32), total, input_precision="tf32x3")


@triton.jit
def _product(x, y, BF16: tl.constexpr):
    """X @ y^T to float32 precision, for rows that came in half precision or in float32."""
    if BF16:
        return tl.dot(x.to(tl.bfloat16), tl.trans(y.to(tl.bfloat16)))
    return tl.dot(x.to(tl.float32), tl.trans(y.to(tl.float32)), input_precision="tf32x3")


@triton.jit
def _load_chunk(inputs, drop, scale, b, t, h, sizes, strides, features, E: tl.constexpr, FLAGS: tl.constexpr):
    """What tokens t write: focus f, key for the logits, averaged key and value (C, E), weight, slope, document (C,)."""
    MASKED: tl.constexpr = FLAGS[0]
    PACKED: tl.constexpr = FLAGS[1]
    DROPOUT: tl.constexpr = FLAGS[2]
    ROTATED: tl.constexpr = FLAGS[3]
    x_ptr, k_ptr, mask_ptr, segment_ptr = inputs
    sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h = strides
    T, H, _ = sizes
    f = _rows(x_ptr + sx_4, b, t, h, T, sx_b, sx_t, sx_h, features, E)
    key = _rows(x_ptr + 2 * sx_4, b, t, h, T, sx_b, sx_t, sx_h, features, E)
    v = _rows(x_ptr + 3 * sx_4, b, t, h, T, sx_b, sx_t, sx_h, features, E)
    k = key
    if ROTATED:
        k = _rows(k_ptr, b, t, h, T, sk_b, sk_t, sk_h, features, E)
    inside = (t >= 0) & (t < T)
    real = inside
    if MASKED:
        real = real & (tl.load(mask_ptr + b * T + t, mask=inside, other=0) != 0)
    document = tl.zeros_like(t)
    if PACKED:
        document = tl.load(segment_ptr + b * T + t, mask=inside, other=-1).to(tl.int32)
    kept = tl.full(t.shape, 1.0, tl.float32)
    if DROPOUT:
        f *= _kept(drop, b, t, h, 1, features, sizes, E)
        v *= _kept(drop, b, t, h, 2, features, sizes, E)
        seed, p = drop
        place = (((b * T + t) * H + h) * 4 + 3) * E
        kept = tl.where(tl.rand(seed, place) < p, 0.0, 1.0 / (1.0 - p))
    weight, slope = _focus(f, key, scale, kept, real)
    return f, key, k, v, weight, slope * kept, document


@triton.jit
def _sees(document, document0, gap, W: tl.constexpr, FLAGS: tl.constexpr):
    """Whether tokens (rows) see those that stand `gap` places before them (columns)."""
    PACKED: tl.constexpr = FLAGS[1]
    visible = gap >= 0
    if W > 0:
        visible = visible & (gap < W)
    if PACKED:
        visible = visible & (document[:, None] == document0[None, :])
    return visible


@triton.jit
def _carried(carry, document, b, c, h, sizes, features, EP: tl.constexpr, FLAGS: tl.constexpr):
    """Sums of keys, values (EP,) and weights that reach a chunk, and 1 for those of its tokens (C,) that they reach."""
    PACKED: tl.constexpr = FLAGS[1]
    carry_ptr, carry_norm_ptr, carry_doc_ptr = carry
    _, H, N = sizes
    place = (b * N + c) * H + h
    keys = tl.load(carry_ptr + place * 2 * EP + features)
    values = tl.load(carry_ptr + place * 2 * EP + EP + features)
    reached = tl.full(document.shape, 1.0, tl.float32)
    if PACKED:
        reached = (document == tl.load(carry_doc_ptr + b * N + c)).to(tl.float32)
    return keys, values, tl.load(carry_norm_ptr + place), reached


@triton.jit
def _is_real(mask_ptr, b, t, T, FLAGS: tl.constexpr):
    """Whether tokens t stand in the row and are no padding."""
    MASKED: tl.constexpr = FLAGS[0]
    real = t < T
    if MASKED:
        real = real & (tl.load(mask_ptr + b * T + t, mask=real, other=0) != 0)
    return real


@triton.jit
def _load_query(query, drop, b, t, h, sizes, features, E: tl.constexpr, FLAGS: tl.constexpr):
    """Queries of tokens t after dropout (C, E)."""
    DROPOUT: tl.constexpr = FLAGS[2]
    q_ptr, sq_b, sq_t, sq_h = query
    q = _rows(q_ptr, b, t, h, sizes[0], sq_b, sq_t, sq_h, features, E)
    if DROPOUT:
        q *= _kept(drop, b, t, h, 0, features, sizes, E)
    return q


@triton.jit
def _load_readers(query, grad_ptr, inputs, drop, b, t, h, sizes, features, E: tl.constexpr, FLAGS: tl.constexpr):
    """Queries after dropout and gradients of the output of tokens t (C, E)."""
    T, H, _ = sizes
    real = _is_real(inputs[2], b, t, T, FLAGS)
    q = _load_query(query, drop, b, t, h, sizes, features, E, FLAGS)
    here = ((b * T + t[:, None]) * H + h) * E + features[None, :]
    return q, tl.load(grad_ptr + here, mask=real[:, None] & (features[None, :] < E), other=0.0).to(tl.float32)


@triton.jit
def _store_query_gradient(dq, there, drop, b, t, h, sizes, features, E: tl.constexpr, FLAGS: tl.constexpr):
    """Store the gradient (C, E) of the queries of tokens t < T; `there` is a pointer and its stride of tokens."""
    DROPOUT: tl.constexpr = FLAGS[2]
    dq_ptr, dq_t = there
    T, _, _ = sizes
    if DROPOUT:
        dq *= _kept(drop, b, t, h, 0, features, sizes, E)
    place = (b * T + t[:, None]) * dq_t + h * E + features[None, :]
    tl.store(dq_ptr + place, dq.to(dq_ptr.dtype.element_ty), mask=(t[:, None] < T) & (features[None, :] < E))


@triton.jit
def _load_numbers(reader, t, T):
    """The three numbers of tokens t that `backward_readers_kernel` left, 0 outside."""
    inside = t < T
    dscore = tl.load(reader + t, mask=inside, other=0.0)
    factor = tl.load(reader + T + t, mask=inside, other=0.0)
    return dscore, factor, tl.load(reader + 2 * T + t, mask=inside, other=0.0)


@triton.jit
def _store_output(out_ptr, out, score, norm, real, scale, eps, b, t, h, sizes, features, E: tl.constexpr):
    """Store the gated means of tokens t, from Sv, <q, Sk> and the sum of weights; 0 where they are not real."""
    T, H, _ = sizes
    share = 1.0 / (norm + eps)
    factor = tl.where(real, share * tl.sigmoid(score * share * scale), 0.0)
    pointers = out_ptr + ((b * T + t[:, None]) * H + h) * E + features[None, :]
    within = (t[:, None] < T) & (features[None, :] < E)
    tl.store(pointers, (out * factor[:, None]).to(out_ptr.dtype.element_ty), mask=within)


@triton.jit
def _reader_gradients(score, gained, norm, scale, eps):
    """From <q, Sk>, <dout, Sv> and the sum of weights of a token: the gradients of the first, of Sv by dout, of the last."""
    share = 1.0 / (norm + eps)
    score *= share
    gate = tl.sigmoid(score * scale)
    factor = gate * share
    gained *= factor
    dscore = gained * (1.0 - gate) * scale * share
    return dscore, factor, -share * gained - dscore * score


@triton.jit
def _returned(
    visible, weight, q, grad, on_k, on_v, dscore, factor, dnorm, dk, dv, dweight, BF16: tl.constexpr
):  # fmt: skip
    """Add what tokens that read (rows of `visible`) hand back to those that they read: keys, values (C, EP), weights (C,)."""
    table = tl.where(visible, weight[None, :], 0.0)
    dk = _weighted(tl.trans(dscore[:, None] * table), q, dk, BF16)
    dv = _weighted(tl.trans(factor[:, None] * table), grad, dv, BF16)
    each = dscore[:, None] * on_k + factor[:, None] * on_v + dnorm[:, None]
    return dk, dv, dweight + tl.sum(tl.where(visible, each, 0.0), axis=0)


@triton.jit
def _store_writer_gradients(
    f, key, slope, dk, dv, dweight, grads, drop, scale, b, t, h, sizes, features, E: tl.constexpr, FLAGS: tl.constexpr
):
    """Store the gradients of focus, keys and values of tokens t, from those of averaged keys, values (C, E) and weights (C,)."""
    DROPOUT: tl.constexpr = FLAGS[2]
    ROTATED: tl.constexpr = FLAGS[3]
    dx_ptr, dk_ptr = grads
    T, H, _ = sizes
    dlogit = dweight * slope * scale
    df = dlogit[:, None] * key
    dkey = dlogit[:, None] * f
    if DROPOUT:
        df *= _kept(drop, b, t, h, 1, features, sizes, E)
        dv *= _kept(drop, b, t, h, 2, features, sizes, E)
    within = (t[:, None] < T) & (features[None, :] < E)
    if ROTATED:
        here = ((b * T + t[:, None]) * H + h) * E + features[None, :]
        tl.store(dk_ptr + here, dk.to(dk_ptr.dtype.element_ty), mask=within)
        dk = dkey
    else:
        dk += dkey
    there = ((b * T + t[:, None]) * 4 * H + h) * E + features[None, :]
    tl.store(dx_ptr + there + H * E, df.to(dx_ptr.dtype.element_ty), mask=within)
    tl.store(dx_ptr + there + 2 * H * E, dk.to(dx_ptr.dtype.element_ty), mask=within)
    tl.store(dx_ptr + there + 3 * H * E, dv.to(dx_ptr.dtype.element_ty), mask=within)


@triton.jit
def totals_kernel(
    inputs, totals, drop, scale, sizes, strides,
    E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """What each chunk hands on: the sums over the document that is open at its end."""
    PACKED: tl.constexpr = FLAGS[1]
    drop = _seeded(drop, FLAGS)
    T, H, N = sizes
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, features = c * C + tl.arange(0, C), tl.arange(0, EP)
    _, _, k, v, weight, _, document = _load_chunk(inputs, drop, scale, b, t, h, sizes, strides, features, E, FLAGS)
    if PACKED:
        last = tl.minimum(c * C + C - 1, T - 1)
        weight = tl.where(document == tl.load(inputs[3] + b * T + last).to(tl.int32), weight, 0.0)
    total_ptr, total_norm_ptr = totals
    place = (b * N + c) * H + h
    tl.store(total_ptr + place * 2 * EP + features, tl.sum(weight[:, None] * k, axis=0))
    tl.store(total_ptr + place * 2 * EP + EP + features, tl.sum(weight[:, None] * v, axis=0))
    tl.store(total_norm_ptr + place, tl.sum(weight, axis=0))


@triton.jit
def forward_kernel(
    query, inputs, carry, out_ptr, drop, scale, eps, sizes, strides,
    W: tl.constexpr, L: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, BF16: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """out_i = sigmoid(<q_i, K_i> / sqrt(E)) V_i; 0 at padding."""
    drop = _seeded(drop, FLAGS)
    T, _, _ = sizes
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, features = c * C + tl.arange(0, C), tl.arange(0, EP)
    _, _, k, v, weight, _, document = _load_chunk(inputs, drop, scale, b, t, h, sizes, strides, features, E, FLAGS)
    q = _load_query(query, drop, b, t, h, sizes, features, E, FLAGS)
    table = tl.where(_sees(document, document, t[:, None] - t[None, :], W, FLAGS), weight[None, :], 0.0)
    norm = tl.sum(table, axis=1)
    score = tl.sum(table * _product(q, k, BF16), axis=1)
    out = _weighted(table, v, tl.zeros((C, EP), tl.float32), BF16)
    if W > 1:
        earlier = c * C - L + tl.arange(0, L)
        _, _, k0, v0, weight0, _, document0 = _load_chunk(
            inputs, drop, scale, b, earlier, h, sizes, strides, features, E, FLAGS
        )
        table = tl.where(_sees(document, document0, t[:, None] - earlier[None, :], W, FLAGS), weight0[None, :], 0.0)
        norm += tl.sum(table, axis=1)
        score += tl.sum(table * _product(q, k0, BF16), axis=1)
        out = _weighted(table, v0, out, BF16)
    if W == 0:
        carry_k, carry_v, carry_norm, reached = _carried(carry, document, b, c, h, sizes, features, EP, FLAGS)
        norm += reached * carry_norm
        score += reached * tl.sum(q * carry_k[None, :], axis=1)
        out += reached[:, None] * carry_v[None, :]
    real = _is_real(inputs[2], b, t, T, FLAGS)
    _store_output(out_ptr, out, score, norm, real, scale, eps, b, t, h, sizes, features, E)


@triton.jit
def backward_readers_kernel(
    query, inputs, carry, grad_ptr, dq, reader_ptr, totals, drop, scale, eps, sizes, strides,
    W: tl.constexpr, L: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, BF16: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, three numbers a token for the second kernel, and each chunk's totals for a global layer."""
    PACKED: tl.constexpr = FLAGS[1]
    drop = _seeded(drop, FLAGS)
    T, H, N = sizes
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, features = c * C + tl.arange(0, C), tl.arange(0, EP)
    _, _, k, v, weight, _, document = _load_chunk(inputs, drop, scale, b, t, h, sizes, strides, features, E, FLAGS)
    q, grad = _load_readers(query, grad_ptr, inputs, drop, b, t, h, sizes, features, E, FLAGS)
    table = tl.where(_sees(document, document, t[:, None] - t[None, :], W, FLAGS), weight[None, :], 0.0)
    norm = tl.sum(table, axis=1)
    score = tl.sum(table * _product(q, k, BF16), axis=1)
    gained = tl.sum(table * _product(grad, v, BF16), axis=1)
    sum_k = _weighted(table, k, tl.zeros((C, EP), tl.float32), BF16)
    if W > 1:
        earlier = c * C - L + tl.arange(0, L)
        _, _, k0, v0, weight0, _, document0 = _load_chunk(
            inputs, drop, scale, b, earlier, h, sizes, strides, features, E, FLAGS
        )
        table = tl.where(_sees(document, document0, t[:, None] - earlier[None, :], W, FLAGS), weight0[None, :], 0.0)
        norm += tl.sum(table, axis=1)
        score += tl.sum(table * _product(q, k0, BF16), axis=1)
        gained += tl.sum(table * _product(grad, v0, BF16), axis=1)
        sum_k = _weighted(table, k0, sum_k, BF16)
    if W == 0:
        carry_k, carry_v, carry_norm, reached = _carried(carry, document, b, c, h, sizes, features, EP, FLAGS)
        norm += reached * carry_norm
        score += reached * tl.sum(q * carry_k[None, :], axis=1)
        gained += reached * tl.sum(grad * carry_v[None, :], axis=1)
        sum_k += reached[:, None] * carry_k[None, :]
    dscore, factor, dnorm = _reader_gradients(score, gained, norm, scale, eps)
    inside = t < T
    _store_query_gradient(dscore[:, None] * sum_k, dq, drop, b, t, h, sizes, features, E, FLAGS)
    reader = reader_ptr + (b * H + h) * 3 * T + t
    tl.store(reader, dscore, mask=inside)
    tl.store(reader + T, factor, mask=inside)
    tl.store(reader + 2 * T, dnorm, mask=inside)
    if W == 0:
        # Handed to the chunks before: what belongs to the document that is open at this chunk's beginning.
        flows = tl.where(inside, 1.0, 0.0)
        if PACKED:
            flows = tl.where(document == tl.load(inputs[3] + b * T + c * C).to(tl.int32), flows, 0.0)
        total_ptr, total_norm_ptr = totals
        place = (b * N + c) * H + h
        tl.store(total_ptr + place * 2 * EP + features, tl.sum((flows * dscore)[:, None] * q, axis=0))
        tl.store(total_ptr + place * 2 * EP + EP + features, tl.sum((flows * factor)[:, None] * grad, axis=0))
        tl.store(total_norm_ptr + place, tl.sum(flows * dnorm, axis=0))


@triton.jit
def backward_writers_kernel(
    query, inputs, carry, grad_ptr, reader_ptr, grads, drop, scale, sizes, strides,
    W: tl.constexpr, L: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, BF16: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Gradients of focus, keys and values, from every token that sees them; here the carry comes from the chunks after."""
    PACKED: tl.constexpr = FLAGS[1]
    drop = _seeded(drop, FLAGS)
    T, H, _ = sizes
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, features = c * C + tl.arange(0, C), tl.arange(0, EP)
    f, key, k, v, weight, slope, document = _load_chunk(
        inputs, drop, scale, b, t, h, sizes, strides, features, E, FLAGS
    )
    q, grad = _load_readers(query, grad_ptr, inputs, drop, b, t, h, sizes, features, E, FLAGS)
    reader = reader_ptr + (b * H + h) * 3 * T
    dscore, factor, dnorm = _load_numbers(reader, t, T)
    visible = _sees(document, document, t[:, None] - t[None, :], W, FLAGS)
    nothing = tl.zeros((C, EP), tl.float32)
    dk, dv, dweight = _returned(
        visible, weight, q, grad, _product(q, k, BF16), _product(grad, v, BF16), dscore, factor, dnorm,
        nothing, nothing, tl.zeros((C,), tl.float32), BF16,
    )  # fmt: skip
    if W > 1:
        later = (c + 1) * C + tl.arange(0, L)
        q, grad = _load_readers(query, grad_ptr, inputs, drop, b, later, h, sizes, features, E, FLAGS)
        dscore, factor, dnorm = _load_numbers(reader, later, T)
        document1 = tl.zeros_like(later)
        if PACKED:
            document1 = tl.load(inputs[3] + b * T + later, mask=later < T, other=-1).to(tl.int32)
        visible = _sees(document1, document, later[:, None] - t[None, :], W, FLAGS)
        dk, dv, dweight = _returned(
            visible, weight, q, grad, _product(q, k, BF16), _product(grad, v, BF16), dscore, factor, dnorm, dk, dv, dweight, BF16
        )  # fmt: skip
    if W == 0:
        carry_k, carry_v, carry_norm, reached = _carried(carry, document, b, c, h, sizes, features, EP, FLAGS)
        dweight += reached * (tl.sum(k * carry_k[None, :] + v * carry_v[None, :], axis=1) + carry_norm)
        dk += (reached * weight)[:, None] * carry_k[None, :]
        dv += (reached * weight)[:, None] * carry_v[None, :]
    _store_writer_gradients(f, key, slope, dk, dv, dweight, grads, drop, scale, b, t, h, sizes, features, E, FLAGS)
