"""forward(): the same text in one call or in many, what is handed out, and that the Auto classes know every head."""

import pytest
import torch
import transformers
from common.batches import tokens
from common.families import VOCAB, all_rows, causal_number_rows, causal_rows, first_rows, rows_with_heads
from common.padding import TOLERANCE
from common.tasks import task_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.auto import modeling_auto

from hf_linear_attn.families import FAMILIES
from hf_linear_attn.registration import AUTO_CLASSES

LENGTH = 80


@pytest.mark.parametrize("calls", [[1] * LENGTH, [40, 40], [10, 1, 64, 2, 3]], ids=["steps", "halves", "mixed"])
@causal_number_rows
def test_calls_with_a_state_are_one_call(row, calls):
    model = row.causal_lm(torch.float64)
    ids = tokens(2, LENGTH)
    cache, found = None, []
    with torch.no_grad():
        for part in ids.split(calls, 1):
            output = model(part, cache=cache, use_cache=True)
            cache = output.cache
            found.append(output.logits)
        torch.testing.assert_close(torch.cat(found, 1), model(ids, use_cache=False).logits, **TOLERANCE)


@causal_rows
def test_control_a_stale_state_is_seen(row):
    """The last call starting from the first call's state gives something else."""
    model = row.causal_lm(torch.float64)
    ids = tokens(2, 30)
    with torch.no_grad():
        cache = model(ids[:, :10], use_cache=True).cache
        stale = cache.fork()
        model(ids[:, 10:20], cache=cache)
        fresh, wrong = (model(ids[:, 20:], cache=c).logits for c in (cache, stale))
    assert (fresh - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@causal_rows
def test_states_are_at_least_float32(row, dtype):
    model = row.causal_lm(dtype)
    with torch.no_grad():
        output = model(tokens(2, 9), use_cache=True)
    assert output.logits.dtype == dtype
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    states = [state for layer in output.cache.layers for state in layer.get_state()]
    found = {state.dtype for state in states if state.is_floating_point()}
    assert wanted in found
    assert found <= ({wanted, dtype} if row.keeps_inputs else {wanted})


@causal_rows
def test_logits_to_keep(row):
    model = row.causal_lm(torch.float64)
    ids = tokens(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
        for keep, wanted in [
            (0, logits),
            (1, logits[:, -1:]),
            (4, logits[:, -4:]),
            (torch.tensor([0, 3, 8]), logits[:, [0, 3, 8]]),
        ]:
            torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, wanted, **TOLERANCE)


@causal_rows
def test_shifted_labels(row):
    """`shift_labels` are `labels` moved by the caller; where both come, these count, as in Transformers' own models."""
    model = row.causal_lm(torch.float64)
    ids = tokens(2, 9)
    shifted = torch.nn.functional.pad(ids[:, 1:], [0, 1], value=-100)
    with torch.no_grad():
        wanted = model(ids, labels=ids).loss
        for labels in (None, ids, shifted, tokens(2, 9, seed=1)):
            torch.testing.assert_close(model(ids, labels=labels, shift_labels=shifted).loss, wanted, **TOLERANCE)


@rows_with_heads
def test_outputs_as_a_tuple(row, head):
    """In the order of the fields: with targets the loss comes first."""
    model = row.build(head)
    batch = task_batch(head) if head != "AutoModel" else {"input_ids": tokens(2, 9)}
    with torch.no_grad():
        for inputs in ({"input_ids": batch["input_ids"]}, batch):
            named = model(**inputs, output_hidden_states=True)
            plain = model(**inputs, output_hidden_states=True, return_dict=False)
            assert isinstance(plain, tuple)
            assert len(plain) == len(named.to_tuple())
            assert torch.equal(named[0], plain[0])
    if head != "AutoModel":
        assert torch.equal(plain[0], named.loss)
        assert plain[1].shape == model(input_ids=batch["input_ids"])[0].shape


@first_rows
def test_shapes_alone(row):
    """What estimates memory runs a model on fake tensors, which hold no values to look at."""
    model = row.causal_lm()
    mask = torch.ones_like(tokens(2, 9))
    mask[0, :3] = 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        ids, mask = mode.from_tensor(tokens(2, 9)), mode.from_tensor(mask)
        for given in (None, mask):
            assert model(ids, attention_mask=given).logits.shape == (2, 9, VOCAB)


@causal_rows
def test_no_cache_unless_wanted(row):
    model = row.causal_lm()
    assert model(tokens(1, 4)).cache is not None  # config.use_cache
    assert model(tokens(1, 4), use_cache=False).cache is None
    assert row.causal_lm(use_cache=False)(tokens(1, 4)).cache is None


@rows_with_heads
def test_auto_classes_and_name_tables(row, head):
    family = FAMILIES[row.family]
    model = getattr(transformers, head).from_config(row.config())
    assert type(model) is family.head(head)
    assert getattr(modeling_auto, AUTO_CLASSES[head])[row.family] == family.heads[head]
    assert transformers.AutoConfig.for_model(row.family).__class__ is family.config_class()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@all_rows
def test_built_in_half_precision(row, dtype):
    """`from_config(dtype=...)` makes that the default while the model is built and its weights are drawn."""
    model = transformers.AutoModel.from_config(row.config(), dtype=dtype).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(tokens(2, 9)).last_hidden_state.isfinite().all()
