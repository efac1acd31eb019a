import pytest
import torch

from hf_linear_attn.conversion.sea import from_published
from hf_linear_attn.modeling.sea.attention import SeaAttentionCore, SeaOptions
from hf_linear_attn.modeling.sea.cells import KeyLayout, select_cells
from hf_linear_attn.modeling.sea.losses import TeacherTargets

from .layers import PUBLISHED_CASES, make_core, make_inputs, published_case

GROUPS = [(True, "causal_batch"), *((False, g) for g in ("causal_batch", "query", "head", "batch"))]


@pytest.mark.parametrize("name", PUBLISHED_CASES)
def test_official_form_gives_the_published_numbers(name):
    case = published_case(name)
    core = from_published("sea", case["config"], case["params"])
    with torch.no_grad():
        result = core(
            case["q"],
            case["k"],
            case["v"],
            attention_mask=case["valid"],
            teacher=(case["teacher_scores"], case["teacher_context"]),
        )
    assert torch.equal(result.kept, case["kept"].bool())
    for field in ("context", "loss", "estimated_probs", "attention_probs"):
        torch.testing.assert_close(getattr(result, field), case[field], atol=2e-5, rtol=0)


def test_published_layers_take_the_dtype_of_their_parameters():
    case = published_case("bidirectional_batch")
    core = from_published("sea", case["config"], {name: x.double() for name, x in case["params"].items()})
    context = core(*(case[name].double() for name in "qkv")).context
    torch.testing.assert_close(context, case["context"].double(), atol=2e-5, rtol=0)


def test_the_published_network_sees_each_row_where_it_stands():
    core = make_core(False, official=True)
    rows = []
    core.cnn.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0]))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, :3] = mask[0, 6] = False
    q, k, v = make_inputs(length=12)
    for token in range(12):
        other = q.clone()
        other[:, :, token] += 1.0
        rows.clear()
        core(q, k, v, attention_mask=mask)
        core(other, k, v, attention_mask=mask)
        moved = (rows[0] - rows[1]).abs().amax((0, 1, 3)) > 1e-3
        assert moved.nonzero().flatten().tolist() == [token]


@pytest.mark.parametrize("mask", [torch.full((2, 20), 0.5), torch.full((2, 20), -1e4)])
def test_a_layer_alone_refuses_other_masks_than_ones_and_zeros(mask):
    with pytest.raises(ValueError, match="1 \\(keep\\) and 0"):
        make_core(False)(*make_inputs(), attention_mask=mask)


def test_published_layer_with_missing_or_misshapen_parameters_is_refused():
    case = published_case("causal")
    short = {name: value for name, value in case["params"].items() if name != "scaler.bias"}
    for params in (short, case["params"] | {"scaler.bias": torch.zeros(3)}, case["params"] | {"extra": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"scaler\.bias|extra"):
            from_published("sea", case["config"], params)
    with pytest.raises(ValueError, match="nonsense"):
        from_published("sea", case["config"] | {"nonsense": 1}, case["params"])


@pytest.mark.parametrize(("causal", "group"), GROUPS)
@pytest.mark.parametrize("length", [1, 5, 16, 23, 47])
def test_everything_kept_and_gates_open_is_softmax_attention(causal, group, length):
    core = make_core(causal, k=64, topk_group=group, open_gates=True)
    q, k, v = make_inputs(length=length)
    result = core(q, k, v, output_attentions=True)
    scale = 1.0 if causal else 8**-0.5
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    torch.testing.assert_close(result.context, expected.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-5)
    visible = torch.ones(length, length, dtype=torch.bool)
    assert torch.equal(result.kept, (visible.tril() if causal else visible).expand_as(result.kept))


@pytest.mark.parametrize("causal", [True, False])
def test_context_mixes_gated_attention_with_the_average(causal):
    core = make_core(causal, k=64)
    q, k, v = make_inputs(length=12)
    result = core(q, k, v, output_attentions=True)
    gate = result.attention_probs.sum(-1, keepdim=True)
    assert ((gate > 0) & (gate < 1)).all()
    scores = q @ k.transpose(-1, -2) * (1 if causal else 8**-0.5)
    if causal:
        scores = scores.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf)
        average = v.cumsum(2) / torch.arange(1, 13)[:, None]
    else:
        cells = result.estimated_probs.mean(2)
        weights = cells[..., [((2 * r + 1) * 16 - 1) // 24 for r in range(12)]]
        average = (weights / weights.sum(-1, keepdim=True))[:, :, None] @ v
    sparse = result.attention_probs @ v
    torch.testing.assert_close(sparse, gate * (scores.softmax(-1) @ v), atol=1e-5, rtol=1e-5)
    context = result.context.unflatten(-1, (2, 8)).transpose(1, 2)
    mix = (
        ((context - average) / (sparse - average)).median(-1, keepdim=True).values
    )  # one number a row, for all features
    torch.testing.assert_close(mix * sparse + (1 - mix) * average, context, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("causal", "group"), GROUPS)
@pytest.mark.parametrize("key_heads", [1, 4])
def test_chunked_backend_equals_dense_in_values_and_gradients(causal, group, key_heads):
    mask = torch.ones(3, 67, dtype=torch.bool)
    mask[0, :13] = mask[1, 50:] = mask[2, 20:31] = False
    results = []
    for backend in ("dense", "chunked"):
        core = make_core(causal, num_heads=4, topk_group=group, backend=backend, k=3, dtype=torch.float64)
        inputs = make_inputs(3, 4, 67, key_heads=key_heads, dtype=torch.float64, requires_grad=True)
        out = core(*inputs, attention_mask=mask)
        loss = (out.context * torch.randn(out.context.shape, generator=torch.Generator().manual_seed(0))).sum()
        results.append((out, torch.autograd.grad(loss, (*inputs, core.scaler.weight, core.encoder.linear.weight))))
    (dense, dense_grads), (chunked, chunked_grads) = results
    assert torch.equal(dense.cells, chunked.cells)
    torch.testing.assert_close(dense.context, chunked.context, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(dense_grads, chunked_grads, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(("causal", "group"), GROUPS)
def test_padding_anywhere_changes_nothing_at_real_tokens(causal, group):
    core = make_core(causal, topk_group=group, dtype=torch.float64)
    mask = torch.zeros(4, 24, dtype=torch.bool)
    mask[0, :15] = mask[1, 9:] = True  # right, left
    mask[2, [1, 2, 5, 6, 7, 11, 13, 14, 15, 16, 18, 19, 20, 21, 23]] = True  # inside
    inputs = make_inputs(4, 2, 24, dtype=torch.float64)
    for x in inputs:  # what stands at padded tokens must not matter
        x.masked_fill_(~mask[:, None, :, None], 1e3)
    leaves = [x.requires_grad_() for x in inputs]
    out = core(*leaves, attention_mask=mask, output_attentions=True)
    weights = torch.randn(4, 24, 16, dtype=torch.float64)
    grads = torch.autograd.grad((out.context * weights).sum(), leaves)
    assert out.context.isfinite().all()
    assert (out.context[~mask] == 0).all()
    for row in range(3):
        real = mask[row]
        alone = [x.detach()[row : row + 1, :, real].requires_grad_() for x in inputs]
        single = core(*alone, output_attentions=True)
        torch.testing.assert_close(out.context[row, real], single.context[0], atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(out.attention_probs[row][:, real][:, :, real], single.attention_probs[0])
        assert not out.kept[row][:, :, ~real].any()
        single_grads = torch.autograd.grad((single.context * weights[row, real]).sum(), alone)
        for ours, theirs in zip(grads, single_grads):
            torch.testing.assert_close(ours[row][:, real], theirs[0], atol=1e-9, rtol=1e-7)
            assert (ours[row][:, ~real] == 0).all()
        if causal:
            for ours, theirs in zip(out.state, single.state):
                torch.testing.assert_close(ours[row], theirs[0], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_no_row_sees_later_tokens(backend):
    core = make_core(True, backend=backend, dtype=torch.float64)
    inputs = make_inputs(length=40, dtype=torch.float64)
    for value in (1.0, 3e5):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, :, 25:] = value * torch.randn(x[:, :, 25:].shape, generator=torch.Generator().manual_seed(5))
        before, after = core(*inputs), core(*changed)
        assert torch.equal(before.context[:, :25], after.context[:, :25])
        assert not torch.equal(before.context[:, 25:], after.context[:, 25:])
    leaves = [x.requires_grad_() for x in inputs]
    grads = torch.autograd.grad(core(*leaves).context[:, :25].sum(), leaves)
    assert all((g[:, :, 25:] == 0).all() and g[:, :, :25].abs().sum() > 0 for g in grads)


def decode(core, inputs, mask, pieces):
    """Run a layer piece by piece with a key cache; returns contexts and the last state."""
    q, k, v = inputs
    state, contexts, start = None, [], 0
    for size in pieces:
        stop = start + size
        layout = KeyLayout.from_mask(
            None if mask is None else mask[:, :stop], q.shape[0], size, q.device, past_slots=start
        )
        part = (x[:, :, start:stop] for x in (q, k, v))
        out = core(*part, layout=layout, state=state, key_cache=(k[:, :, :stop], v[:, :, :stop]))
        contexts.append(out.context)
        state, start = out.state, stop
    return torch.cat(contexts, 1), state


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("pieces", [[1] * 30, [17, *[1] * 13], [8, 8, 1, 3, 10]])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_with_a_state_equals_the_full_forward(backend, pieces, padded):
    core = make_core(True, num_heads=4, backend=backend, dtype=torch.float64)
    inputs = make_inputs(3, 4, 30, key_heads=2, dtype=torch.float64)
    mask = None
    if padded:
        mask = torch.ones(3, 30, dtype=torch.bool)
        mask[0, :7] = mask[1, 12:15] = mask[2, :2] = False
    full = core(*inputs, attention_mask=mask)
    contexts, state = decode(core, inputs, mask, pieces)
    torch.testing.assert_close(contexts, full.context, atol=1e-11, rtol=1e-9)
    for ours, theirs in zip(state, full.state):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-8)


def test_state_size_does_not_depend_on_the_length():
    core = make_core(True)
    sizes = {tuple(x.shape for x in core(*make_inputs(length=n)).state) for n in (1, 9, 60)}
    assert len(sizes) == 1


def test_permuting_a_batch_permutes_the_result():
    for causal in (True, False):
        core = make_core(causal)
        inputs = make_inputs(4, length=21)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(core(*(x[order] for x in inputs)).context, core(*inputs).context[order])


def test_a_fresh_layer_starts_close_to_sparse_attention():
    torch.manual_seed(0)
    for causal in (True, False):
        core = SeaAttentionCore(SeaOptions(2, 8, causal, k=64, predictor_length=16))
        q, k, v = make_inputs(length=30)
        scale = 1.0 if causal else 8**-0.5
        softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        context = core(q, k, v).context.unflatten(-1, (2, 8)).transpose(1, 2)
        assert (context - softmax).abs().mean() < 0.05 * softmax.abs().mean()


def test_a_fresh_causal_layer_keeps_the_first_and_the_near_keys():
    torch.manual_seed(0)
    core = SeaAttentionCore(SeaOptions(2, 8, True, k=6, predictor_length=16))
    output = core(*make_inputs(1, 2, 48), output_attentions=True)
    kept = output.kept[0, :, 32:].float()  # (H, R, S)
    near = torch.stack([kept[:, r, r + 32 - 2 : r + 33].mean() for r in range(16)]).mean()
    far = torch.stack([kept[:, r, 8 : r + 32 - 16].mean() for r in range(16)]).mean()
    assert kept[:, :, 0].mean() > 0.9
    assert near > 0.9
    assert far < 0.1
    official = SeaAttentionCore(SeaOptions(2, 8, True, k=6, predictor_length=16, official=True))
    assert (official.cnn.norm_out.bias == 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_training_steps_are_finite(causal, dtype):
    core = make_core(causal, backend="chunked").train()
    inputs = [x.to(dtype).requires_grad_() for x in make_inputs(length=33)]
    teacher = TeacherTargets(torch.randn(2, 33, 16), q=inputs[0].detach(), k=inputs[1].detach())
    with torch.autocast("cpu", dtype=dtype):
        out = core(*inputs, teacher=teacher)
        (out.context.float().square().mean() + out.loss).backward()
    for tensor in (*inputs, *core.parameters()):
        assert tensor.grad.isfinite().all()


def test_gradients_of_a_layer_agree_with_finite_differences(monkeypatch):
    for causal in (True, False):
        core = make_core(causal, num_heads=1, head_dim=4, predictor_length=8, dtype=torch.float64, backend="chunked")
        inputs = make_inputs(1, 1, 7, 4, dtype=torch.float64, requires_grad=True)
        frozen = core(*inputs).cells
        monkeypatch.setattr("hf_linear_attn.modeling.sea.attention.select_cells", lambda *_, f=frozen: f)
        assert torch.autograd.gradcheck(lambda *x, c=core: c(*x).context, inputs)
        monkeypatch.setattr("hf_linear_attn.modeling.sea.attention.select_cells", select_cells)


def test_redrawn_features_change_the_estimate_and_are_saved():
    core = make_core(True)
    inputs = make_inputs(length=20)
    before = core(*inputs).estimated_probs
    core.redraw_features(torch.Generator().manual_seed(9))
    after = core(*inputs).estimated_probs
    assert not torch.allclose(before, after)
    other = make_core(True, seed=5)
    other.load_state_dict(core.state_dict())
    assert torch.equal(other(*inputs).estimated_probs, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor_length": 6, "causal": True}, "multiple of 4"),
        ({"predictor_length": 7, "causal": False}, "multiple of 2"),
        ({"k": 0}, "`k` is 0, expected a positive integer"),
        ({"predictor_length": -4}, "`predictor_length` is -4, expected a positive integer"),
        ({"topk_group": "batch", "causal": True}, "see how later rows score"),
        ({"topk_group": "rows"}, "`topk_group` is 'rows', expected one of"),
        ({"backend": "cuda"}, "`backend` is 'cuda', expected one of"),
        ({"feature_factor": 0}, "`feature_factor` is 0, expected a positive number"),
        ({"max_keys_per_cell": 0}, "`max_keys_per_cell` is 0, expected 1 to 2,147,483,647 or None"),
    ],
)
def test_options_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SeaOptions(**({"num_heads": 2, "head_dim": 8, "causal": False} | options))


def test_inputs_that_do_not_fit_are_refused():
    core = make_core(True, max_positions=16)
    q, k, v = make_inputs(length=20)
    with pytest.raises(ValueError, match=r"20 tokens exceed the position table .* max_positions = 16"):
        core(q, k, v)
    mask = torch.arange(20).expand(2, -1) < 16
    assert core(q, k, v, attention_mask=mask).context.isfinite().all()  # 16 real tokens fit
    short = q[:, :, :9], k[:, :, :9], v[:, :, :9]
    with pytest.raises(ValueError, match="`attention_mask` has shape"):
        core(*short, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match="`attention_mask` has shape"):
        core(*short, attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match="`q` has shape"):
        core(q[:, :1], k, v)
    with pytest.raises(ValueError, match="`v` has shape"):
        core(short[0], short[1], v)
    with pytest.raises(ValueError, match="the teacher's `scores` has shape"):
        core(*short, teacher=(torch.zeros(2, 2, 8, 9), torch.zeros(2, 9, 16)))
    with pytest.raises(ValueError, match="either `scores`"):
        core(*short, teacher=TeacherTargets(torch.zeros(2, 9, 16)))
