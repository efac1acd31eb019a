import pytest
import torch

from hf_linear_attn.modeling.sea import attention as sea_attention
from hf_linear_attn.modeling.sea import losses as sea_losses
from hf_linear_attn.modeling.sea.cells import select_cells
from hf_linear_attn.modeling.sea.losses import TeacherTargets, attention_fidelity, attention_losses

from .layers import make_core, make_inputs


def setting(causal, length=19, cells=8, padded=True):
    q, k, teacher_q = make_inputs(2, 4, length, dtype=torch.float64)
    logits = torch.randn(2, 4, length, cells, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([length, length - 6 if padded else length])
    keep = torch.arange(length) < lengths[:, None]
    visible = torch.arange(1, length + 1).expand(2, -1) if causal else lengths[:, None].expand(-1, length)
    return q, k, logits, visible, keep, TeacherTargets(q=teacher_q, k=k[:, ::2], scaling=0.4)


@pytest.mark.parametrize("causal", [True, False])
def test_losses_are_means_over_real_rows_and_keys(causal):
    q, k, logits, visible, keep, teacher = setting(causal)
    result = attention_losses(q, k, 0.3, logits, visible, keep, teacher, causal, official=False)
    sums = dict.fromkeys(result, 0.0)
    rows = pairs = 0
    for b in range(2):
        n = int(keep[b].sum())
        for i in range(n):
            seen = i + 1 if causal else n
            pairs += 4 * n
            for h in range(4):
                target = (teacher.q[b, h, i] @ teacher.k[b, h // 2, :seen].T * 0.4).softmax(-1)
                cell = [((2 * r + 1) * 8 - 1) // (2 * seen) for r in range(seen)]
                rows += 1
                for name, scores in (
                    ("estimate", logits[b, h, i, cell]),
                    ("student", q[b, h, i] @ k[b, h, :seen].T * 0.3),
                ):
                    probs = scores.softmax(-1)
                    sums[f"{name}_kl"] += (target * (target / probs).log()).sum()
                    sums[f"{name}_mse"] += (target - probs).square().sum()
    for name, value in result.items():
        expected = sums[name] / (rows if name.endswith("kl") else pairs)
        torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-7)


def test_blocks_of_rows_change_neither_losses_nor_gradients(monkeypatch):
    results = []
    for elements in (1 << 24, 2 * 4 * 19 * 4):
        monkeypatch.setattr(sea_losses, "BLOCK_ELEMENTS", elements)
        q, k, logits, visible, keep, teacher = setting(True)
        leaves = [x.requires_grad_() for x in (q, k, logits)]
        losses = attention_losses(leaves[0], leaves[1], 0.3, leaves[2], visible, keep, teacher, True, False)
        results.append((losses, torch.autograd.grad(sum(losses.values()), leaves)))
    torch.testing.assert_close(results[0], results[1])


def test_sampled_rows_estimate_the_loss_of_all_rows():
    q, k, logits, visible, keep, teacher = setting(False, padded=False)
    arguments = (q, k, 0.3, logits, visible, keep, teacher, False, False)
    full = attention_losses(*arguments)
    halves = [attention_losses(*arguments, rows=rows) for rows in (torch.arange(10), torch.arange(10, 19))]
    for name, value in full.items():
        torch.testing.assert_close((10 * halves[0][name] + 9 * halves[1][name]) / 19, value)


def test_a_perfect_estimate_costs_nothing():
    core = make_core(True, dtype=torch.float64)
    q, k, v = make_inputs(length=16, dtype=torch.float64)
    out = core(q, k, v, teacher=TeacherTargets(q=q, k=k))
    assert out.losses["student_kl"] < 1e-10
    assert out.losses["estimate_kl"] > 1e-3
    same = core(q, k, v, teacher=TeacherTargets(context=out.context.detach(), q=q, k=k))
    assert same.losses["context_mse"] < 1e-20


def test_gradients_reach_what_the_specification_says():
    for causal in (True, False):
        core = make_core(causal)
        inputs = make_inputs(length=24)
        core(*inputs).context.square().sum().backward()
        cnn = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in core.cnn.parameters()]
        assert any(cnn) != causal  # the causal network learns from the loss of the estimate alone
        core(*inputs, teacher=TeacherTargets(q=inputs[0], k=inputs[1] * 2)).losses["estimate_kl"].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in core.cnn.parameters())


def test_fidelity_counts_the_teachers_strongest_keys():
    q, k, logits, visible, keep, teacher = setting(True)
    every = torch.ones_like(logits, dtype=torch.bool)
    best = attention_fidelity(every, logits, visible, keep, teacher, 3, None)
    assert best["top_k_recall"] == 1
    torch.testing.assert_close(best["attention_mass"], torch.ones((), dtype=torch.float64))
    some = attention_fidelity(
        select_cells(logits, visible, 2, "causal_batch", keep), logits, visible, keep, teacher, 3, 1
    )
    assert 0 < some["top_k_recall"] < 1
    assert some["keys_per_query"] < best["keys_per_query"]
    losses = attention_losses(q, k, 0.3, logits, visible, keep, teacher, True, False)
    torch.testing.assert_close(some["estimate_kl"], losses["estimate_kl"], atol=1e-8, rtol=1e-6)
    flat = attention_losses(q, k, 0.3, torch.zeros_like(logits), visible, keep, teacher, True, False)
    torch.testing.assert_close(some["uniform_kl"], flat["estimate_kl"], atol=1e-8, rtol=1e-6)


def test_training_on_the_loss_beats_equal_weights():
    core = make_core(True)
    q, k, v = make_inputs(batch=4, length=32)
    q[..., 0] += 2  # every row looks at the first key
    k[:, :, 0, 0] = 2
    teacher = TeacherTargets(q=q, k=k)
    optimizer = torch.optim.AdamW(core.parameters(), lr=1e-2)
    for step in range(60):
        out = core(q, k, v, teacher=teacher)
        if step == 0:
            visible, keep = torch.arange(1, 33).expand(4, -1), torch.ones(4, 32, dtype=torch.bool)
            before = attention_fidelity(out.cells, out.estimated_probs, visible, keep, teacher, 4, None)
        optimizer.zero_grad()
        out.losses["estimate_kl"].backward()
        optimizer.step()
    assert out.losses["estimate_kl"] / sea_attention.LOSS_WEIGHTS["estimate_kl"] < 0.8 * before["uniform_kl"]
