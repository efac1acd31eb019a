"""Triton kernels of the LEAP mechanism (LEAP specification, section 2); `leap_mechanism_triton` runs them.

A row is cut into chunks of C tokens; a program does one chunk of one head. It reads the projections once, forms the weighted
sums of its chunk as products with a masked table of focus weights, adds what came before (the end of the previous chunk for a
window, a carried sum for a global layer) and writes the gated mean. Nothing but the projections is kept for backward: it forms
the same sums again, and the gradients of the sums flow back through the transposed table.
"""

try:  # inside `try`, since loading a checkpoint's own code demands every other import, also where there is no GPU
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the GPU kernels need the package triton: pip install triton") from error


@triton.jit
def _rows(x, b, t, h, T, stride_b, stride_t, stride_h, features, E: tl.constexpr):
    """Rows `t` (C,) of head h of row b of a (B, T, H, E) tensor, float32, 0 outside."""
    pointers = x + b * stride_b + t[:, None].to(tl.int64) * stride_t + h * stride_h + features[None, :]
    inside = (t[:, None] >= 0) & (t[:, None] < T) & (features[None, :] < E)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _kept(seed, b, t, h, part, features, T, H, p, E: tl.constexpr):
    """Dropout factors 0 or 1 / (1 - p) of one part (0 query, 1 focus, 2 value, 3 logits) of the tokens t: (C, E)."""
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
def _weighted(table, x, BF16: tl.constexpr):
    """Table @ x to float32 precision, for x that came in half precision or in float32."""
    if BF16:
        # x is exact in bfloat16, and two such numbers hold 16 bits of a weight: twice what the output keeps.
        high = table.to(tl.bfloat16)
        low = (table - high.to(tl.float32)).to(tl.bfloat16)
        exact = x.to(tl.bfloat16)
        return tl.dot(high, exact) + tl.dot(low, exact)
    return tl.dot(table, x, input_precision="tf32x3")


@triton.jit
def _selected(table, x, BF16: tl.constexpr):
    """Table @ x for a table of 0 and 1."""
    if BF16:
        exact = table.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(exact, high) + tl.dot(exact, low)
    return tl.dot(table, x, input_precision="tf32x3")


@triton.jit
def _load_chunk(
    x_ptr, k_ptr, mask_ptr, segment_ptr, seed, p, scale, b, t, h, T, H, sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features,
    E: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """What tokens t write: focus f, key for the logits, averaged key and value (C, E), weight, slope, document (C,)."""
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
        f *= _kept(seed, b, t, h, 1, features, T, H, p, E)
        v *= _kept(seed, b, t, h, 2, features, T, H, p, E)
        place = (((b * T + t) * H + h) * 4 + 3) * E
        kept = tl.where(tl.rand(seed, place) < p, 0.0, 1.0 / (1.0 - p))
    weight, slope = _focus(f, key, scale, kept, real)
    return f, key, k, v, weight, slope * kept, document


@triton.jit
def _sums(
    k, v, weight, document, t, x_ptr, k_ptr, mask_ptr, segment_ptr, carry_ptr, carry_norm_ptr, carry_doc_ptr,
    seed, p, scale, b, c, h, T, H, N, sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features,
    W: tl.constexpr, L: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, BF16: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Weighted sums of keys and values (C, EP) and of weights (C,) over each token's window."""
    gap = t[:, None] - t[None, :]
    visible = gap >= 0
    if W > 0:
        visible = visible & (gap < W)
    if PACKED:
        visible = visible & (document[:, None] == document[None, :])
    table = tl.where(visible, weight[None, :], 0.0)
    sum_k = _weighted(table, k, BF16)
    sum_v = _weighted(table, v, BF16)
    norm = tl.sum(table, axis=1)
    if W > 1:
        earlier = c * C - L + tl.arange(0, L)
        _, _, k0, v0, weight0, _, document0 = _load_chunk(
            x_ptr, k_ptr, mask_ptr, segment_ptr, seed, p, scale, b, earlier, h, T, H,
            sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features, E, MASKED, PACKED, DROPOUT, ROTATED,
        )  # fmt: skip
        visible = (t[:, None] - earlier[None, :]) < W
        if PACKED:
            visible = visible & (document[:, None] == document0[None, :])
        table = tl.where(visible, weight0[None, :], 0.0)
        sum_k += _weighted(table, k0, BF16)
        sum_v += _weighted(table, v0, BF16)
        norm += tl.sum(table, axis=1)
    if W == 0:
        place = (b * N + c) * H + h
        carry_k = tl.load(carry_ptr + place * 2 * EP + features)
        carry_v = tl.load(carry_ptr + place * 2 * EP + EP + features)
        carried = tl.full(t.shape, 1.0, tl.float32)
        if PACKED:
            carried = (document == tl.load(carry_doc_ptr + b * N + c)).to(tl.float32)
        sum_k += carried[:, None] * carry_k[None, :]
        sum_v += carried[:, None] * carry_v[None, :]
        norm += carried * tl.load(carry_norm_ptr + place)
    return sum_k, sum_v, norm


@triton.jit
def _load_readers(
    q_ptr, grad_ptr, mask_ptr, seed, p, b, t, h, T, H, sq_b, sq_t, sq_h, features,
    E: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Queries after dropout and gradients of the output of tokens t (C, E), and the dropout factors."""
    inside = t < T
    if MASKED:
        inside = inside & (tl.load(mask_ptr + b * T + t, mask=inside, other=0) != 0)
    q = _rows(q_ptr, b, t, h, T, sq_b, sq_t, sq_h, features, E)
    kept = 1.0
    if DROPOUT:
        kept = _kept(seed, b, t, h, 0, features, T, H, p, E)
        q *= kept
    here = ((b * T + t[:, None]) * H + h) * E + features[None, :]
    grad = tl.load(grad_ptr + here, mask=inside[:, None] & (features[None, :] < E), other=0.0).to(tl.float32)
    return q, grad, kept


@triton.jit
def _reader_gradients(q, grad, sum_k, sum_v, norm, scale, eps):
    """Gradient of the queries by 1 / `share`, of the sums of keys, values (C, E) and weights (C,)."""
    share = 1.0 / (norm + eps)
    score = tl.sum(q * sum_k, axis=1) * share
    gate = tl.sigmoid(score * scale)
    gained = tl.sum(grad * sum_v, axis=1) * share * gate
    dscore = gained * (1.0 - gate) * scale * share
    dnorm = -share * gained - dscore * score
    return dscore[:, None] * sum_k, dscore[:, None] * q, (gate * share)[:, None] * grad, dnorm


@triton.jit
def _store_writer_gradients(
    f, key, k, v, weight, slope, back_k, back_v, back_norm, dx_ptr, dk_ptr,
    seed, p, scale, b, t, h, T, H, features, E: tl.constexpr, DROPOUT: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Gradients of focus, keys and values of tokens t, from those of all sums that hold them."""
    dweight = tl.sum(back_k * k, axis=1) + tl.sum(back_v * v, axis=1) + back_norm
    dlogit = dweight * slope * scale
    dk = weight[:, None] * back_k
    dv = weight[:, None] * back_v
    df = dlogit[:, None] * key
    dkey = dlogit[:, None] * f
    if DROPOUT:
        df *= _kept(seed, b, t, h, 1, features, T, H, p, E)
        dv *= _kept(seed, b, t, h, 2, features, T, H, p, E)
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
    x_ptr, k_ptr, mask_ptr, segment_ptr, total_ptr, total_norm_ptr, seed_ptr, p, scale, T, H, N,
    sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h,
    E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """What each chunk hands on: the sums over the document that is open at its end."""
    seed = tl.load(seed_ptr) if DROPOUT else 0
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, features = c * C + tl.arange(0, C), tl.arange(0, EP)
    _, _, k, v, weight, _, document = _load_chunk(
        x_ptr, k_ptr, mask_ptr, segment_ptr, seed, p, scale, b, t, h, T, H,
        sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features, E, MASKED, PACKED, DROPOUT, ROTATED,
    )  # fmt: skip
    if PACKED:
        last = tl.minimum(c * C + C - 1, T - 1)
        weight = tl.where(document == tl.load(segment_ptr + b * T + last).to(tl.int32), weight, 0.0)
    place = (b * N + c) * H + h
    tl.store(total_ptr + place * 2 * EP + features, tl.sum(weight[:, None] * k, axis=0))
    tl.store(total_ptr + place * 2 * EP + EP + features, tl.sum(weight[:, None] * v, axis=0))
    tl.store(total_norm_ptr + place, tl.sum(weight, axis=0))


@triton.jit
def forward_kernel(
    q_ptr, x_ptr, k_ptr, mask_ptr, segment_ptr, carry_ptr, carry_norm_ptr, carry_doc_ptr, out_ptr,
    seed_ptr, p, scale, eps, T, H, N, sq_b, sq_t, sq_h, sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h,
    W: tl.constexpr, L: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, BF16: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """out_i = sigmoid(<q_i, K_i> / sqrt(E)) V_i; 0 at padding."""
    seed = tl.load(seed_ptr) if DROPOUT else 0
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, features = c * C + tl.arange(0, C), tl.arange(0, EP)
    _, _, k, v, weight, _, document = _load_chunk(
        x_ptr, k_ptr, mask_ptr, segment_ptr, seed, p, scale, b, t, h, T, H,
        sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features, E, MASKED, PACKED, DROPOUT, ROTATED,
    )  # fmt: skip
    sum_k, sum_v, norm = _sums(
        k, v, weight, document, t, x_ptr, k_ptr, mask_ptr, segment_ptr,
        carry_ptr, carry_norm_ptr, carry_doc_ptr, seed, p, scale, b, c, h, T, H, N,
        sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features,
        W, L, E, EP, C, BF16, MASKED, PACKED, DROPOUT, ROTATED,
    )  # fmt: skip
    q = _rows(q_ptr, b, t, h, T, sq_b, sq_t, sq_h, features, E)
    if DROPOUT:
        q *= _kept(seed, b, t, h, 0, features, T, H, p, E)
    share = 1.0 / (norm + eps)
    gate = tl.sigmoid(tl.sum(q * sum_k, axis=1) * share * scale)
    out = sum_v * (gate * share)[:, None]
    inside = t < T
    if MASKED:
        real = tl.load(mask_ptr + b * T + t, mask=inside, other=0) != 0
        out = tl.where(real[:, None], out, 0.0)
    pointers = out_ptr + ((b * T + t[:, None]) * H + h) * E + features[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (features[None, :] < E))


@triton.jit
def _chunk_gradients(
    q_ptr, x_ptr, k_ptr, mask_ptr, segment_ptr, carry_ptr, carry_norm_ptr, carry_doc_ptr, grad_ptr, dq_ptr, dq_t,
    seed, p, scale, eps, b, c, h, t, T, H, N, sq_b, sq_t, sq_h, sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features,
    W: tl.constexpr, L: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, BF16: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Form a chunk again and store its queries' gradients: what its tokens write (as `_load_chunk`), gradients of its sums."""
    f, key, k, v, weight, slope, document = _load_chunk(
        x_ptr, k_ptr, mask_ptr, segment_ptr, seed, p, scale, b, t, h, T, H,
        sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features, E, MASKED, PACKED, DROPOUT, ROTATED,
    )  # fmt: skip
    sum_k, sum_v, norm = _sums(
        k, v, weight, document, t, x_ptr, k_ptr, mask_ptr, segment_ptr,
        carry_ptr, carry_norm_ptr, carry_doc_ptr, seed, p, scale, b, c, h, T, H, N,
        sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features,
        W, L, E, EP, C, BF16, MASKED, PACKED, DROPOUT, ROTATED,
    )  # fmt: skip
    q, grad, kept = _load_readers(
        q_ptr, grad_ptr, mask_ptr, seed, p, b, t, h, T, H, sq_b, sq_t, sq_h, features, E, MASKED, DROPOUT
    )
    dq, dsum_k, dsum_v, dnorm = _reader_gradients(q, grad, sum_k, sum_v, norm, scale, eps)
    there = (b * T + t[:, None]) * dq_t + h * E + features[None, :]
    tl.store(dq_ptr + there, (dq * kept).to(dq_ptr.dtype.element_ty), mask=(t[:, None] < T) & (features[None, :] < E))
    return f, key, k, v, weight, slope, document, dsum_k, dsum_v, dnorm


@triton.jit
def backward_sums_kernel(
    q_ptr, x_ptr, k_ptr, mask_ptr, segment_ptr, carry_ptr, carry_norm_ptr, carry_doc_ptr, grad_ptr,
    dq_ptr, ds_ptr, dnorm_ptr, total_ptr, total_norm_ptr, dq_t,
    seed_ptr, p, scale, eps, T, H, N, sq_b, sq_t, sq_h, sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h,
    W: tl.constexpr, L: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, BF16: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, and of the sums (for the second kernel), with each chunk's totals for a global layer."""
    seed = tl.load(seed_ptr) if DROPOUT else 0
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, features = c * C + tl.arange(0, C), tl.arange(0, EP)
    _, _, _, _, _, _, document, dsum_k, dsum_v, dnorm = _chunk_gradients(
        q_ptr, x_ptr, k_ptr, mask_ptr, segment_ptr, carry_ptr, carry_norm_ptr, carry_doc_ptr, grad_ptr, dq_ptr, dq_t,
        seed, p, scale, eps, b, c, h, t, T, H, N, sq_b, sq_t, sq_h, sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features,
        W, L, E, EP, C, BF16, MASKED, PACKED, DROPOUT, ROTATED,
    )  # fmt: skip
    inside = t < T
    within = inside[:, None] & (features[None, :] < E)
    there = ((b * T + t[:, None]) * H + h) * 2 * E + features[None, :]
    tl.store(ds_ptr + there, dsum_k, mask=within)
    tl.store(ds_ptr + there + E, dsum_v, mask=within)
    tl.store(dnorm_ptr + (b * T + t) * H + h, dnorm, mask=inside)
    if W == 0:
        # Handed to the chunks before: what belongs to the document that is open at this chunk's beginning.
        flows = tl.where(inside, 1.0, 0.0)
        if PACKED:
            flows = tl.where(document == tl.load(segment_ptr + b * T + c * C).to(tl.int32), flows, 0.0)
        place = (b * N + c) * H + h
        tl.store(total_ptr + place * 2 * EP + features, tl.sum(flows[:, None] * dsum_k, axis=0))
        tl.store(total_ptr + place * 2 * EP + EP + features, tl.sum(flows[:, None] * dsum_v, axis=0))
        tl.store(total_norm_ptr + place, tl.sum(flows * dnorm, axis=0))


@triton.jit
def backward_inputs_kernel(
    x_ptr, k_ptr, mask_ptr, segment_ptr, ds_ptr, dnorm_ptr, carry_ptr, carry_norm_ptr, carry_doc_ptr,
    dx_ptr, dk_ptr, seed_ptr, p, scale, T, H, N, sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h,
    W: tl.constexpr, L: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, BF16: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Gradients of focus, keys and values from those of the sums of every token that sees them."""
    seed = tl.load(seed_ptr) if DROPOUT else 0
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, features = c * C + tl.arange(0, C), tl.arange(0, EP)
    f, key, k, v, weight, slope, document = _load_chunk(
        x_ptr, k_ptr, mask_ptr, segment_ptr, seed, p, scale, b, t, h, T, H,
        sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features, E, MASKED, PACKED, DROPOUT, ROTATED,
    )  # fmt: skip
    ds_t, ds_b = H * 2 * E, T * H * 2 * E
    dsum_k = _rows(ds_ptr, b, t, h, T, ds_b, ds_t, 2 * E, features, E)
    dsum_v = _rows(ds_ptr + E, b, t, h, T, ds_b, ds_t, 2 * E, features, E)
    dnorm = tl.load(dnorm_ptr + (b * T + t) * H + h, mask=t < T, other=0.0)
    gap = t[None, :] - t[:, None]  # row: the token written, column: the token that reads it
    visible = gap >= 0
    if W > 0:
        visible = visible & (gap < W)
    if PACKED:
        visible = visible & (document[:, None] == document[None, :])
    table = tl.where(visible, 1.0, 0.0)
    back_k = _selected(table, dsum_k, BF16)
    back_v = _selected(table, dsum_v, BF16)
    back_norm = tl.sum(table * dnorm[None, :], axis=1)
    if W > 1:
        later = (c + 1) * C + tl.arange(0, L)
        dsum_k = _rows(ds_ptr, b, later, h, T, ds_b, ds_t, 2 * E, features, E)
        dsum_v = _rows(ds_ptr + E, b, later, h, T, ds_b, ds_t, 2 * E, features, E)
        dnorm = tl.load(dnorm_ptr + (b * T + later) * H + h, mask=later < T, other=0.0)
        visible = (later[None, :] - t[:, None]) < W
        if PACKED:
            document1 = tl.load(segment_ptr + b * T + later, mask=later < T, other=-1).to(tl.int32)
            visible = visible & (document[:, None] == document1[None, :])
        table = tl.where(visible, 1.0, 0.0)
        back_k += _selected(table, dsum_k, BF16)
        back_v += _selected(table, dsum_v, BF16)
        back_norm += tl.sum(table * dnorm[None, :], axis=1)
    if W == 0:
        place = (b * N + c) * H + h
        carried = tl.full(t.shape, 1.0, tl.float32)
        if PACKED:
            carried = (document == tl.load(carry_doc_ptr + b * N + c)).to(tl.float32)
        back_k += carried[:, None] * tl.load(carry_ptr + place * 2 * EP + features)[None, :]
        back_v += carried[:, None] * tl.load(carry_ptr + place * 2 * EP + EP + features)[None, :]
        back_norm += carried * tl.load(carry_norm_ptr + place)
    _store_writer_gradients(
        f, key, k, v, weight, slope, back_k, back_v, back_norm, dx_ptr, dk_ptr,
        seed, p, scale, b, t, h, T, H, features, E, DROPOUT, ROTATED,
    )  # fmt: skip


@triton.jit
def backward_window_kernel(
    q_ptr, x_ptr, k_ptr, mask_ptr, segment_ptr, grad_ptr, dq_ptr, dx_ptr, dk_ptr, dq_t,
    seed_ptr, p, scale, eps, T, H, N, sq_b, sq_t, sq_h, sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h,
    W: tl.constexpr, L: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, BF16: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk, for windows that reach no further than L <= C tokens.

    The L tokens after the chunk, which read it, are formed again here, so that no gradient of a sum goes through memory.
    """
    seed = tl.load(seed_ptr) if DROPOUT else 0
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, features = c * C + tl.arange(0, C), tl.arange(0, EP)
    f, key, k, v, weight, slope, document, dsum_k, dsum_v, dnorm = _chunk_gradients(
        q_ptr, x_ptr, k_ptr, mask_ptr, segment_ptr, x_ptr, x_ptr, x_ptr, grad_ptr, dq_ptr, dq_t,
        seed, p, scale, eps, b, c, h, t, T, H, N, sq_b, sq_t, sq_h, sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features,
        W, L, E, EP, C, BF16, MASKED, PACKED, DROPOUT, ROTATED,
    )  # fmt: skip
    gap = t[None, :] - t[:, None]  # row: the token written, column: the token that reads it
    visible = (gap >= 0) & (gap < W)
    if PACKED:
        visible = visible & (document[:, None] == document[None, :])
    table = tl.where(visible, 1.0, 0.0)
    back_k = _selected(table, dsum_k, BF16)
    back_v = _selected(table, dsum_v, BF16)
    back_norm = tl.sum(table * dnorm[None, :], axis=1)
    if W > 1:
        later = (c + 1) * C + tl.arange(0, L)
        _, _, k1, v1, weight1, _, document1 = _load_chunk(
            x_ptr, k_ptr, mask_ptr, segment_ptr, seed, p, scale, b, later, h, T, H,
            sx_b, sx_t, sx_4, sx_h, sk_b, sk_t, sk_h, features, E, MASKED, PACKED, DROPOUT, ROTATED,
        )  # fmt: skip
        gap = later[:, None] - later[None, :]
        visible = (gap >= 0) & (gap < W)
        across = (later[:, None] - t[None, :]) < W
        if PACKED:
            visible = visible & (document1[:, None] == document1[None, :])
            across = across & (document1[:, None] == document[None, :])
        table = tl.where(visible, weight1[None, :], 0.0)
        near = tl.where(across, weight[None, :], 0.0)
        sum_k1 = _weighted(table, k1, BF16) + _weighted(near, k, BF16)
        sum_v1 = _weighted(table, v1, BF16) + _weighted(near, v, BF16)
        norm1 = tl.sum(table, axis=1) + tl.sum(near, axis=1)
        q1, grad1, _ = _load_readers(
            q_ptr, grad_ptr, mask_ptr, seed, p, b, later, h, T, H, sq_b, sq_t, sq_h, features, E, MASKED, DROPOUT
        )
        _, dsum_k1, dsum_v1, dnorm1 = _reader_gradients(q1, grad1, sum_k1, sum_v1, norm1, scale, eps)
        table = tl.trans(tl.where(across, 1.0, 0.0))
        back_k += _selected(table, dsum_k1, BF16)
        back_v += _selected(table, dsum_v1, BF16)
        back_norm += tl.sum(table * dnorm1[None, :], axis=1)
    _store_writer_gradients(
        f, key, k, v, weight, slope, back_k, back_v, back_norm, dx_ptr, dk_ptr,
        seed, p, scale, b, t, h, T, H, features, E, DROPOUT, ROTATED,
    )  # fmt: skip
