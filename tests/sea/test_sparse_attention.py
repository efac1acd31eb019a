import pytest
import torch

from hf_linear_attn.modeling.sea.cells import select_cells
from hf_linear_attn.modeling.sea.sparse_attention import (
    chunked_sparse_attention,
    dense_sparse_attention,
    grow_cells,
    grown_average,
    keys_per_row,
)

from .layers import make_inputs


def selection(batch, heads, length, cells, visible, k=3, group="causal_batch", seed=0):
    probs = torch.rand(batch, heads, length, cells, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    return select_cells(probs, visible, k, group)


def dense(q, k, v, cells, visible, limit, scale=0.3):
    return dense_sparse_attention(q, k, v, grow_cells(cells, visible, k.shape[2], limit), scale)[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 31, 61])
def test_chunked_equals_dense_in_values_and_gradients(causal, limit, length):
    q, k, v = make_inputs(heads=4, key_heads=2, length=length, dtype=torch.float64, requires_grad=True)
    visible = torch.arange(1, length + 1) if causal else torch.full((length,), length)
    visible = visible.expand(2, -1)
    cells = selection(2, 4, length, 8, visible)
    expected = dense(q, k, v, cells, visible, limit)
    for pairs in (1, 13, 1 << 18):
        result = chunked_sparse_attention(q, k, v, cells, visible, 0.3, limit, pairs_per_chunk=pairs)
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-10)
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad((x * weights).sum(), (q, k, v), retain_graph=True) for x in (result, expected)]
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)


def test_gradients_agree_with_finite_differences():
    q, k, v = make_inputs(batch=1, heads=2, length=6, dim=3, dtype=torch.float64, requires_grad=True)
    visible = torch.arange(1, 7)[None]
    cells = selection(1, 2, 6, 4, visible, k=2)
    assert torch.autograd.gradcheck(lambda *x: chunked_sparse_attention(*x, cells, visible, 0.5, 1), (q, k, v))


def test_keys_may_lie_anywhere_in_the_cache():
    q, k, v = make_inputs(length=9, dtype=torch.float64)
    visible = torch.arange(1, 10).expand(2, -1)
    cells = selection(2, 2, 9, 4, visible)
    slots = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(s))[:9] for s in (0, 1)])
    index = slots[:, None, :, None].expand(-1, 2, -1, 8)
    cache_k, cache_v = (torch.full((2, 2, 12, 8), torch.nan, dtype=torch.float64).scatter(2, index, x) for x in (k, v))
    result = chunked_sparse_attention(q, cache_k, cache_v, cells, visible, 1.0, key_slots=slots)
    torch.testing.assert_close(result, chunked_sparse_attention(q, k, v, cells, visible, 1.0))


def test_all_cells_give_softmax_attention_and_no_cell_gives_zero():
    q, k, v = make_inputs(length=13)
    visible = torch.arange(1, 14).expand(2, -1)
    every = torch.ones(2, 2, 13, 8, dtype=torch.bool)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)
    torch.testing.assert_close(chunked_sparse_attention(q, k, v, every, visible, 0.7), expected)
    for attend in (chunked_sparse_attention, lambda *x: dense(*x[:5], None, x[5])):
        assert (attend(q, k, v, ~every, visible, 0.7) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_to_float32_and_huge_scores_stay_finite(dtype):
    q, k, v = make_inputs(length=24)
    visible = torch.arange(1, 25).expand(2, -1)
    cells = selection(2, 2, 24, 8, visible)
    exact = chunked_sparse_attention(q, k, v, cells, visible, 1.0)
    half = chunked_sparse_attention(*(x.to(dtype) for x in (q, k, v)), cells, visible, 1.0)
    reference = dense(*(x.to(dtype) for x in (q, k, v)), cells, visible, None, 1.0)
    assert half.dtype == dtype
    assert (half.float() - exact).abs().max() <= 2 * (reference.float() - exact).abs().max() + 1e-6
    assert chunked_sparse_attention(q * 1e4, k * 1e4, v, cells, visible, 1.0).isfinite().all()


def test_mean_number_of_keys_is_k_while_cells_are_not_smaller_than_keys():
    length, k, cells = 60, 5, 16
    visible = torch.arange(1, length + 1)[None]
    kept = keys_per_row(selection(1, 3, length, cells, visible, k=k), visible, None).double()  # (1, H, T)
    per_row = kept.sum(1)[0]
    assert torch.equal(per_row[:k], 3.0 * torch.arange(1, k + 1))  # short rows see everything
    late = per_row[cells:]  # H k keys, up to the rounding of the number of cells and of their widths
    assert (late.mean() / (3 * k) - 1).abs() < 0.1


def test_average_follows_cell_weights_and_can_be_normalised():
    _, _, v = make_inputs(length=6)
    weights = torch.rand(2, 2, 4)
    length = torch.tensor([6, 3])
    for normalize in (True, False):
        result = grown_average(weights, v, length, normalize)
        for b, cell in enumerate([[0, 1, 1, 2, 3, 3], [0, 1, 3]]):
            n = len(cell)
            cell = [((2 * r + 1) * 4 - 1) // (2 * n) for r in range(n)]
            w = weights[b, :, cell]
            w = w / w.sum(-1, keepdim=True) if normalize else w
            torch.testing.assert_close(result[b, :, 0], (w[..., None] * v[b, :, :n]).sum(1))
