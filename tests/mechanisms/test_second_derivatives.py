"""Steps that write out their own backward: differentiated again they are right, or refuse (float64; kernels: tests/gpu).

`gradgradcheck` alone would not do: in a gradient penalty the incoming gradient is a constant, and a backward without a graph of
its own then gives no second derivative at all, in silence.
"""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common.batches import LAYOUTS
from common.families import FIRST, ROWS
from common.padding import padded_batch

import hf_linear_attn
from hf_linear_attn.modeling.danet.kernels import relu_feed_forward
from hf_linear_attn.modeling.danet.kernels import self_attention as dense_self_attention
from hf_linear_attn.modeling.kernels import normed_linear
from hf_linear_attn.modeling.leap.formula import gated_means
from hf_linear_attn.modeling.leap.mechanism import leap_mechanism
from hf_linear_attn.modeling.sea import sparse_attention
from hf_linear_attn.modeling.shared import cross_entropy
from hf_linear_attn.modeling.shared.kernels.padded_vocabulary import PaddedLinear
from hf_linear_attn.modeling.shared.positions import apply_position_factors, position_factors


def turned(projected):
    """Queries and keys after rotation."""
    factors = position_factors("rotary", torch.arange(5)[None], projected.shape[-1], 1e4, projected.dtype)
    return tuple(apply_position_factors(projected[:, :, i], factors) for i in (0, 2))


def leap_with_rotation(projected):
    """Rotated queries and keys are made from the projections, which the step takes as well."""
    return leap_mechanism(projected, None, rotated=turned(projected))[0]


def leap_formula(projected):
    return gated_means(projected, turned(projected), None)[0]


CELLS = torch.rand(1, 2, 5, 4, generator=torch.Generator().manual_seed(1)) < 0.7
SEEN = torch.arange(1, 6)[None]


def chunked(q, k, v):
    return sparse_attention.chunked_sparse_attention(q, k, v, CELLS, SEEN, 0.5, pairs_per_chunk=4)


def dense(q, k, v):
    return sparse_attention.dense_sparse_attention(q, k, v, sparse_attention.grow_cells(CELLS, SEEN, 5), 0.5)[0]


def normed(x, weight, bias, matrix, shift):
    stream, out = normed_linear._NormedLinear.apply(x, weight, bias, matrix, shift, 1e-5)
    return torch.cat([stream, out], -1)


def normed_formula(x, weight, bias, matrix, shift):
    return torch.cat([x, F.linear(F.layer_norm(x, (4,), weight, bias), matrix, shift)], -1)


def on_itself(run):
    """The same tensor for both arguments: each is counted once."""
    return lambda x: run(x, x)


LABELS = torch.tensor([1, -100, 0])
# the step's class -> the step, its formula, the shapes of its arguments
STEPS = {
    "_Leap": (leap_with_rotation, leap_formula, [(1, 5, 4, 1, 4)]),
    "_BlockwiseCrossEntropy": (
        lambda x: cross_entropy.cross_entropy(x, LABELS),
        lambda x: F.cross_entropy(x, LABELS),
        [(3, 6)],
    ),
    "_ChunkedSparseAttention": (chunked, dense, [(1, 2, 5, 3), (1, 1, 5, 3), (1, 1, 5, 3)]),
    "_ChunkedSparseAttention on itself": (
        lambda x, v: chunked(x, x, v),
        lambda x, v: dense(x, x, v),
        [(1, 2, 5, 3), (1, 2, 5, 3)],
    ),
    "_Linear": (
        lambda x, w: dense_self_attention.self_attention(x, w, True),
        dense_self_attention._formula,
        [(2, 5, 4), (4, 4)],
    ),
    "_Quadratic": (
        lambda x, w: dense_self_attention.self_attention(x, w, False),
        dense_self_attention._formula,
        [(2, 5, 4), (4, 4)],
    ),
    "_Quadratic on itself": (
        on_itself(lambda x, w: dense_self_attention.self_attention(x[None], w, False)),
        on_itself(lambda x, w: dense_self_attention._formula(x[None], w)),
        [(4, 4)],
    ),
    "_ReluFeedForward": (
        lambda *inputs: relu_feed_forward._ReluFeedForward.apply(*inputs),
        lambda x, m, d: F.linear((x @ m).relu(), d),
        [(2, 3, 4), (4, 6), (4, 6)],
    ),
    "relu_product": (relu_feed_forward._relu_product, lambda x, m: (x @ m).relu(), [(2, 3, 4), (4, 6)]),
    "_NormedLinear": (normed, normed_formula, [(2, 3, 4), (4,), (4,), (6, 4), (6,)]),
    "PaddedLinear": (
        lambda *inputs: PaddedLinear.apply(*inputs),
        F.linear,
        [(2, 3, 4), (11, 4), (11,)],
    ),
}
# Tested on kernels (tests/gpu/test_second_derivatives.py), or refused (below).
ELSEWHERE = {"_Rest", "_BetweenBlocks", "_LeaveStream", "_KernelCrossEntropy", "LinearCrossEntropy"}


def inputs_of(shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def penalty_gradients(run, inputs):
    """The gradient of |d sum(out) / d inputs|^2, a gradient penalty: ones come in, a constant."""
    first = torch.autograd.grad(run(*inputs).sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", STEPS)
def test_gradient_penalty(name):
    step, formula, shapes = STEPS[name]
    inputs = inputs_of(shapes)
    torch.testing.assert_close(step(*inputs), formula(*inputs))
    found, wanted = penalty_gradients(step, inputs), penalty_gradients(formula, inputs)
    assert any(x.abs().max() > 1e-3 for x in wanted)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", STEPS)
def test_gradgradcheck(name):
    step, _, shapes = STEPS[name]
    assert torch.autograd.gradgradcheck(step, inputs_of(shapes), fast_mode=True)


def test_every_step_of_its_own_is_here():
    """Each class with a backward of its own in the package; operators have theirs in tests/gpu."""
    package = Path(hf_linear_attn.__file__).parent
    classes = {
        node.name
        for text in (path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
        if "autograd.Function" in text
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("autograd.Function") for base in node.bases)
    }
    assert classes == {name for name in STEPS if name.lstrip("_")[0].isupper() and " " not in name} | ELSEWHERE


@pytest.mark.parametrize("row", FIRST[:3], ids=lambda row: row.name)
def test_fused_cross_entropy_refuses(row):
    model = row.causal_lm(fused_linear_cross_entropy=True)
    ids = torch.randint(3, 20, (1, 9))
    embeds = model.get_input_embeddings()(ids)
    loss = model.train()(inputs_embeds=embeds, labels=ids).loss
    with pytest.raises(RuntimeError, match="fused_linear_cross_entropy = False"):
        torch.autograd.grad(loss, embeds, create_graph=True)


@pytest.mark.parametrize("row", [row for row in ROWS if row.family in ("leap", "fastformer")], ids=lambda row: row.name)
def test_gradient_penalty_of_a_padded_batch(row):
    """That of the texts alone; finite at padding, whose rows are constant."""
    model = row.build("AutoModel", torch.float64)
    rows, columns, ids, mask = padded_batch(LAYOUTS["both"], (9, 4))

    def penalty(ids, mask, places):
        embeds = model.get_input_embeddings()(ids)
        hidden = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        total = sum(hidden[i, place].sin().sum() for i, place in enumerate(places))
        return torch.autograd.grad(total, embeds, create_graph=True)[0].square().sum()

    parameters = list(model.parameters())
    options = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(penalty(ids, mask, columns), parameters, **options)
    alone = sum(penalty(text[None], None, [slice(None)]) for text in rows)
    wanted = torch.autograd.grad(alone, parameters, **options)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8 * max(1, theirs.abs().max()), rtol=1e-7)
