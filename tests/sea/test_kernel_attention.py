import math

import pytest
import torch

from hf_linear_attn.modeling.sea.kernel_attention import (
    bidirectional_kernel_attention,
    causal_kernel_attention,
    causal_kernel_attention_reference,
    default_num_features,
    orthogonal_gaussian_features,
    relu_features,
    softmax_key_features,
    softmax_query_features,
)

from .layers import make_inputs


def test_number_of_features_divides_by_the_factor():
    assert [default_num_features(64, factor) for factor in (1, 2, 4, 8)] == [266, 133, 66, 33]


def test_features_are_orthogonal_within_a_block_with_gaussian_lengths():
    features = orthogonal_gaussian_features(2000, 16, torch.Generator().manual_seed(0))
    block = features[16:32]
    directions = block / block.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(directions @ directions.T, torch.eye(16), atol=1e-5, rtol=0)
    assert abs(features.square().sum(-1).mean() - 16) < 0.5
    again = orthogonal_gaussian_features(2000, 16, torch.Generator().manual_seed(0))
    assert torch.equal(features, again)


def test_softmax_features_converge_to_softmax_attention():
    q, k, v = (x / 2 for x in make_inputs(batch=1, heads=1, length=12, dtype=torch.float64))
    exact = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v
    errors = []
    for count in (16, 256):  # 16 times the features: a quarter of the error, until the floor of 1e-4 shows
        estimates = []
        for seed in range(8):
            features = orthogonal_gaussian_features(count, 8, torch.Generator().manual_seed(seed), dtype=torch.float64)
            phi_q, phi_k = softmax_query_features(q, features), softmax_key_features(k, features)
            estimates.append(bidirectional_kernel_attention(phi_q, phi_k, v))
        errors.append((torch.stack(estimates) - exact).abs().mean())
    assert errors[1] < errors[0] / 2.5
    assert errors[1] < 0.03 * v.abs().max()


def test_padded_keys_leave_bidirectional_attention_alone_however_large():
    q, k, v = make_inputs(batch=1, length=9)
    features = orthogonal_gaussian_features(16, 8, torch.Generator().manual_seed(0))
    keep = torch.arange(9)[None] < 6
    k[:, :, 6:] = 1e4
    padded = bidirectional_kernel_attention(
        softmax_query_features(q, features), softmax_key_features(k, features, keep), v
    )
    alone = bidirectional_kernel_attention(
        softmax_query_features(q, features)[:, :, :6], softmax_key_features(k[:, :, :6], features), v[:, :, :6]
    )
    torch.testing.assert_close(padded[:, :, :6], alone)
    nothing = softmax_key_features(k, features, torch.zeros(1, 9, dtype=torch.bool))
    assert (bidirectional_kernel_attention(softmax_query_features(q, features), nothing, v) == 0).all()


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 37])
def test_causal_chunks_equal_the_definition_in_values_and_gradients(length):
    q, k, v = make_inputs(length=length, dtype=torch.float64, requires_grad=True)
    features = orthogonal_gaussian_features(11, 8, torch.Generator().manual_seed(0), dtype=torch.float64)
    arguments = relu_features(q, features), relu_features(k, features), v
    expected = causal_kernel_attention_reference(*arguments)
    result, _ = causal_kernel_attention(*arguments, chunk_size=8)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-10)
    weights = torch.randn_like(result)
    grads = [torch.autograd.grad((x * weights).sum(), (q, k, v), retain_graph=True) for x in (result, expected)]
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


def test_causal_state_continues_and_ignores_padding():
    q, k, v = make_inputs(length=20, dtype=torch.float64)
    features = orthogonal_gaussian_features(11, 8, torch.Generator().manual_seed(0), dtype=torch.float64)
    phi_q, phi_k = relu_features(q, features), relu_features(k, features)
    whole, final = causal_kernel_attention(phi_q, phi_k, v, chunk_size=4)
    state, pieces = None, []
    for part in (slice(0, 7), slice(7, 8), slice(8, 20)):
        out, state = causal_kernel_attention(phi_q[:, :, part], phi_k[:, :, part], v[:, :, part], state, chunk_size=4)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 2), whole)
    torch.testing.assert_close(state, final)
    keep = (torch.arange(20) < 15).expand(2, -1)
    _, padded = causal_kernel_attention(phi_q, relu_features(k, features, keep), v, chunk_size=4)
    _, short = causal_kernel_attention(phi_q[:, :, :15], phi_k[:, :, :15], v[:, :, :15], chunk_size=4)
    torch.testing.assert_close(padded, short)


def test_half_precision_features_are_raised_to_float32():
    q, k, v = (x.half() for x in make_inputs(length=16))
    features = orthogonal_gaussian_features(16, 8)
    assert relu_features(q, features).dtype == torch.float32
    out, state = causal_kernel_attention(relu_features(q, features), relu_features(k, features), v)
    assert out.dtype == state.dtype == torch.float32
