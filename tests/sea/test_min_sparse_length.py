"""Below `min_sparse_length` a layer is its host's dense attention, token by token and however a text is cut into calls."""

import pytest
import torch
from transformers import StaticCache

from hf_linear_attn.modeling.sea.configuration_sea import SeaConfig
from hf_linear_attn.modeling.sea.host_attention import Distillation
from hf_linear_attn.modeling.shared.states.cache import RecurrentCache
from hf_linear_attn.training.sea_distillation import record_targets

from .hosts import CAUSAL_HOSTS, HOSTS, host_config, make_ids, make_student, make_teacher

SHORT, N = 6, 9
EXACT = {"atol": 1e-9, "rtol": 1e-9}


def student_of(host: str, **options):
    """A student in float64 with random weights everywhere in SEA."""
    return make_student(host, **({"min_sparse_length": N} | options)).double()


def masks(length: int) -> list[torch.Tensor | None]:
    """No padding, padding left, right and within."""
    left, right, within = (torch.ones(3, length, dtype=torch.long) for _ in range(3))
    left[0, :4] = left[1, : length - 3] = 0
    right[0, length - 4 :] = right[1, 3:] = 0
    within[0, 2:5] = within[1, 1::2] = 0
    return [None, left, right, within]


def real(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x[mask.bool()]


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_a_text_shorter_than_that_is_the_host(host):
    student, teacher, ids = student_of(host), make_teacher(host).double(), make_ids(3, N - 1)
    for mask in masks(N - 1):
        found = student(ids, attention_mask=mask).logits
        for row in range(3):  # alone, since hosts have other views of padding
            keep = slice(None) if mask is None else mask[row].bool()
            torch.testing.assert_close(found[row, keep], teacher(ids[row, keep][None]).logits[0], **EXACT)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_longer_texts_join_both_kinds_of_tokens(host, backend):
    """Where k covers the text and the gates are open sparse attention is dense, too: whatever N, it is the teacher."""
    ids, teacher = make_ids(3, 20), make_teacher(host).double()
    for shortest in (2, N, 20):
        student = student_of(host, min_sparse_length=shortest, k=32, open_gates=True, backend=backend)
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, atol=1e-8, rtol=1e-8)


@torch.no_grad()
def test_tokens_from_there_on_are_sparse():
    ids = make_ids(2, 20)
    short, sparse = student_of("llama"), student_of("llama", min_sparse_length=0)
    teacher = make_teacher("llama").double()(ids).logits
    found, always = short(ids).logits, sparse(ids).logits
    torch.testing.assert_close(found[:, : N - 1], teacher[:, : N - 1], **EXACT)
    assert (found - teacher)[:, N - 1 :].abs().amax(-1).min() > 1e-3
    assert (always - teacher)[:, 5:].abs().max() > 1e-3
    torch.testing.assert_close(student_of("llama", min_sparse_length=1)(ids).logits, always, atol=0, rtol=0)


@pytest.mark.parametrize("host", CAUSAL_HOSTS)
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_text_in_pieces_is_the_text_in_one(host, static):
    length = 20
    for backend in ("dense", "chunked"):
        student, ids = student_of(host, backend=backend), make_ids(3, length)
        for mask in masks(length):
            whole = student(ids, attention_mask=mask, use_cache=False).logits
            for cuts in ([*range(1, length)], [5, 8], [N - 1], [N], [3, 15]):
                cache = StaticCache(config=student.config, max_cache_len=length) if static else None
                cache, pieces = RecurrentCache(config=student.config) if cache is None else cache, []
                for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
                    seen = None if mask is None else mask[:, :stop]
                    output = student(ids[:, start:stop], attention_mask=seen, cache=cache)
                    cache = output.cache
                    pieces.append(output.logits)
                torch.testing.assert_close(real(torch.cat(pieces, 1), mask), real(whole, mask), **EXACT)


@pytest.mark.parametrize("host", ["bert", "llama"])
@torch.no_grad()
def test_each_row_is_as_if_alone(host):
    student, ids = student_of(host), make_ids(3, 20)
    for mask in masks(20)[1:]:
        found = student(ids, attention_mask=mask, output_sea=True, output_attentions=True)
        for row in range(3):
            keep = mask[row].bool()
            alone = student(ids[row, keep][None], output_sea=True, output_attentions=True)
            torch.testing.assert_close(found.logits[row, keep], alone.logits[0], **EXACT)
            for name in ("estimated_attentions", "kept_cells"):
                torch.testing.assert_close(found[name][0][row][:, keep], alone[name][0][0], **EXACT)
            for name in ("attentions", "kept_keys"):
                torch.testing.assert_close(found[name][0][row][:, keep][:, :, keep], alone[name][0][0], **EXACT)


@pytest.mark.parametrize("lengths", [[5, 12, 3], [14, 6], [20]])
@torch.no_grad()
def test_documents_of_a_row_are_as_if_alone(lengths):
    student, ids = student_of("llama"), make_ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = student(ids, position_ids=positions)
    alone = [student(piece).logits for piece in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed.logits, torch.cat(alone, 1), **EXACT)
    more = make_ids(1, 9, seed=5)  # the cache goes on with the last document
    found = student(more, cache=packed.cache).logits
    whole = student(torch.cat([ids[:, -lengths[-1] :], more], 1)).logits[:, lengths[-1] :]
    torch.testing.assert_close(found, whole, **EXACT)


@pytest.mark.parametrize(
    ("before", "after", "undone"), [(3, 4, 2), (3, 10, 8), (7, 3, 3), (7, 4, 3), (12, 4, 2), (8, 5, 5)]
)
@torch.no_grad()
def test_tokens_are_undone_across_that_length(before, after, undone):
    student, ids = student_of("llama"), make_ids(2, before + after)
    cache = RecurrentCache(config=student.config)
    student(ids[:, :before], cache=cache)
    cache.activate_past_recording()
    for i in range(before, before + after):
        student(ids[:, i : i + 1], cache=cache)
    cache.crop(-undone)
    more = make_ids(2, 7, seed=3)
    kept = ids[:, : before + after - undone]
    found = student(more, cache=cache).logits
    wanted = student(torch.cat([kept, more], 1)).logits[:, kept.shape[1] :]
    torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("length", [SHORT, N - 1, N, 14])
@torch.no_grad()
def test_a_saved_cache_goes_on(length, tmp_path):
    student, ids = student_of("llama"), make_ids(2, 20)
    cache = student(ids[:, :length]).cache
    cache.save(tmp_path / "state.safetensors")
    loaded = RecurrentCache.load(tmp_path / "state.safetensors", student.config)
    found = student(ids[:, length:], cache=loaded).logits
    torch.testing.assert_close(found, student(ids).logits[:, length:], **EXACT)
    assert (cache.layers[0].get_state() is None) == (length < N)  # nothing is kept before it is needed


@torch.no_grad()
def test_generate_is_the_full_forward():
    student = student_of("llama")
    ids = make_ids(2, 4)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    out = student.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    mask = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], 1)
    logits = student(out, attention_mask=mask).logits
    torch.testing.assert_close(out[:, 4:], logits[:, 3:-1].argmax(-1))
    beams = student.generate(ids, num_beams=3, max_new_tokens=12, do_sample=False, eos_token_id=None)
    plain = student.generate(ids, num_beams=3, max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=False)
    torch.testing.assert_close(beams, plain)


def test_distillation_is_sparse_at_every_length():
    teacher, inputs = make_teacher("llama"), {"input_ids": make_ids(2, 20)}
    targets = Distillation(record_targets(teacher, inputs)[0])
    found = [make_student("llama", min_sparse_length=n)(**inputs, distillation=targets) for n in (0, N)]
    torch.testing.assert_close(found[1].logits, found[0].logits, atol=0, rtol=0)
    assert all(losses for losses in found[1].attention_losses)


def test_gradients_reach_the_host_through_both_kinds():
    student = student_of("gpt2").train(False)
    ids = make_ids(2, 20)
    student(ids, labels=ids).loss.backward()
    weight = student.get_input_embeddings().weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    slope = (weight.grad * direction).sum()
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            weight.add_(sign * 1e-6 * direction)
            losses.append(student(ids, labels=ids).loss)
            weight.sub_(sign * 1e-6 * direction)
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-6, slope, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrong", [-1, 1.5, "sometimes", None, 1 << 40])
def test_lengths_that_mean_nothing_are_refused(wrong):
    with pytest.raises(Exception, match="min_sparse_length"):
        SeaConfig(host_config=host_config("llama"), min_sparse_length=wrong)


def test_the_published_layer_is_sparse_at_every_length():
    with pytest.raises(ValueError, match="official"):
        SeaConfig(host_config=host_config("llama"), official=True, min_sparse_length=8)


def test_auto_is_a_length_of_the_device():
    options = SeaConfig(host_config=host_config("bert"), k=13, min_sparse_length="auto").core_options()
    assert 512 <= options.dense_below(torch.device("cpu")) < options.dense_below(torch.device("cuda"))
