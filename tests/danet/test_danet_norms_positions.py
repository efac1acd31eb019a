"""Norms and positions of DANet against their formulas."""

import pytest
import torch

from hf_linear_attn.modeling.danet.norms import NORM_NAMES, build_norm
from hf_linear_attn.modeling.shared.positions import (
    apply_position_factors,
    position_factors,
    sinusoidal_embeddings,
)

X = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
G = torch.linspace(0.5, 2.0, 8, dtype=torch.float64)

FORMULAS = {
    "max_norm": lambda x: x / (x.abs().amax(-1, True) + 1e-3),
    "scaled_max_norm": lambda x: G * x / (x.abs().amax(-1, True) + 1e-12),
    "prescaled_max_norm": lambda x: G * x / ((G * x).abs().amax(-1, True) + 1e-12),
    "uncentered_ln": lambda x: G * x / (x.abs().mean(-1, True) + 1e-12),
    "uncentered_fixed_ln": lambda x: x / (x.abs().mean(-1, True) + 1e-12),
    "standard_ln": lambda x: G * (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt(),
    "hardtanh": lambda x: x.clamp(-1, 1),
    "no_ln": lambda x: x,
    "leaky_relu_0.1": lambda x: torch.where(x > 0, x, 0.1 * x),
}


def make(name):
    norm = build_norm(name, 8).double()
    if hasattr(norm, "weight"):
        norm.weight.data.copy_(G)
    return norm


@pytest.mark.parametrize("name", FORMULAS)
def test_norms_are_their_formulas(name):
    torch.testing.assert_close(make(name)(X), FORMULAS[name](X))


@pytest.mark.parametrize("name", NORM_NAMES)
def test_row_scale_and_residual_are_only_shortcuts(name):
    norm, scale, residual = make(name), torch.rand(2, 3, 1, dtype=torch.float64), torch.randn_like(X)
    torch.testing.assert_close(norm(X, scale, residual), residual + scale * norm(X))
    torch.testing.assert_close(norm(X, scale), scale * norm(X))
    torch.testing.assert_close(norm(X, residual=residual), residual + norm(X))


@pytest.mark.parametrize("name", ["max_norm", "scaled_max_norm", "prescaled_max_norm", "uncentered_ln", "standard_ln"])
def test_gradients(name):
    norm = make(name)
    assert torch.autograd.gradcheck(norm, X.clone().requires_grad_())  # random numbers: away from ties


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["max_norm", "scaled_max_norm", "prescaled_max_norm", "uncentered_ln", "standard_ln"])
def test_a_zero_row_with_scale_zero_gives_zero_gradient(name, dtype):
    norm = build_norm(name, 8).to(dtype)
    x = torch.zeros(1, 2, 8, dtype=dtype)
    x[:, 0] = torch.linspace(-0.5, 0.5, 8)
    x.requires_grad_()
    norm(x, torch.tensor([[[1.0], [0.0]]])).sum().mul(100).backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[0, 1] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in norm.parameters())


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="layernorm"):
        build_norm("layernorm", 8)


def angles(exponent):
    return torch.tensor([[0.0, 1.0, 5.0]], dtype=torch.float64)[..., None] * 10000.0 ** -torch.tensor(
        exponent, dtype=torch.float64
    )


def test_cosine_has_a_frequency_for_every_feature():
    factors = position_factors("cosine", torch.tensor([[0, 1, 5]]), 4, 1e4, torch.float64)
    torch.testing.assert_close(factors[0][:, :, 0], angles([0, 0.25, 0.5, 0.75]).cos())
    factors = position_factors("cos_minus_sin", torch.tensor([[0, 1, 5]]), 4, 1e4, torch.float64)
    expected = angles([0, 0.25, 0.5, 0.75])
    torch.testing.assert_close(factors[0][:, :, 0], expected.cos() - expected.sin())


def test_rope_rotates_the_halves_of_each_head():
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    out = apply_position_factors(x, position_factors("rotary", torch.tensor([[0, 1, 5]]), 4, 1e4, torch.float64))
    angle = angles([0, 0.5])[:, :, None]
    torch.testing.assert_close(out[..., :2], x[..., :2] * angle.cos() - x[..., 2:] * angle.sin())
    torch.testing.assert_close(out[..., 2:], x[..., 2:] * angle.cos() + x[..., :2] * angle.sin())


def test_rope_scores_depend_on_the_offset_alone_for_any_number_of_heads():
    q, k = torch.randn(2, 1, 6, 3, 4, dtype=torch.float64)
    scores = []
    for start in (0, 1000):
        factors = position_factors("rotary", torch.arange(start, start + 6)[None], 4, 1e4, torch.float64)
        scores.append(
            torch.einsum("bihd,bjhd->bhij", apply_position_factors(q, factors), apply_position_factors(k, factors))
        )
    torch.testing.assert_close(*scores, rtol=1e-10, atol=1e-10)


def test_sinusoids():
    out = sinusoidal_embeddings(torch.tensor([[0, 1, 5]]), 6, 1e4, torch.float64)
    expected = angles([0, 2 / 6, 4 / 6])
    torch.testing.assert_close(out[..., 0::2], expected.sin())
    torch.testing.assert_close(out[..., 1::2], expected.cos())


def test_half_precision_positions_are_computed_in_float32():
    exact = position_factors("rotary", torch.tensor([[4097]]), 8, 1e4, torch.float64)[0]
    half = position_factors("rotary", torch.tensor([[4097]]), 8, 1e4, torch.bfloat16)[0]
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", ["rotary", "cosine", "cos_minus_sin", "sinusoidal"])
def test_positions_are_exact_to_ten_million(kind):
    """float32 tables are the float64 ones rounded, at any position."""
    positions = torch.tensor([[4097, 10**6 + 1, 10**7 + 1]])
    for dtype in (torch.float32, torch.float64):
        if kind == "sinusoidal":
            tables = [sinusoidal_embeddings(positions, 8, 1e4, dtype)]
        else:
            tables = [x for x in position_factors(kind, positions, 8, 1e4, dtype) if x is not None]
        if dtype == torch.float32:
            found = tables
    for ours, exact in zip(found, tables, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-7)


def test_an_unknown_position_kind_is_refused():
    with pytest.raises(ValueError, match="rope"):
        position_factors("rope", torch.tensor([[0]]), 4, 1e4, torch.float32)
