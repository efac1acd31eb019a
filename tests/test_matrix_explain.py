"""What a model attends to: maps and focus weights that are those of the computation."""

import pytest
import torch
from common.batches import LAYOUTS, tokens
from common.families import ROWS, causal_rows
from common.padding import padded_batch

from hf_linear_attn import FastformerAttention, LeapAttention
from hf_linear_attn.modeling.fastformer.modeling_fastformer import normalize_features
from hf_linear_attn.modeling.shared.configuration import layer_kind

explaining = [row for row in ROWS if row.explains]
explaining_rows = pytest.mark.parametrize("row", explaining, ids=[row.name for row in explaining])


@explaining_rows
def test_one_map_a_layer_whose_rows_sum_to_one(row):
    model = row.build("AutoModel", torch.float64)
    _, _, ids, mask = padded_batch(LAYOUTS["both"], (20, 9))
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_attentions=True, output_focus_weights=True, use_cache=False)
        plain = model(ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(output.last_hidden_state, plain.last_hidden_state)
    layers, heads, length = row.config().num_hidden_layers, row.config().num_attention_heads, ids.shape[1]
    assert [tuple(a.shape) for a in output.attentions] == [(2, heads, length, length)] * layers
    assert [tuple(w.shape) for w in output.focus_weights] == [(2, heads, length)] * layers
    assert plain.attentions is None
    real = mask.bool()
    for attention, weights in zip(output.attentions, output.focus_weights):
        assert (attention >= 0).all()
        sums = attention.sum(-1).transpose(1, 2)[real]
        # up to the epsilon in the denominator, which is large beside the smallest weights
        assert (sums <= 1 + 1e-9).all()
        assert sums.median() > 0.999
        assert (attention * ~real[:, None, None, :] == 0).all(), "a padded token is attended to"
        assert (weights * ~real[:, None] == 0).all()
        if row.causal:
            assert (attention.triu(1) == 0).all(), "a later token is attended to"


@explaining_rows
def test_maps_of_a_padded_batch_are_those_of_the_texts(row):
    model = row.build("AutoModel", torch.float64)
    rows, columns, ids, mask = padded_batch(LAYOUTS["inside"], (20, 9))
    options = {"output_attentions": True, "output_focus_weights": True, "use_cache": False}
    with torch.no_grad():
        together = model(ids, attention_mask=mask, **options)
        for i, (text, where) in enumerate(zip(rows, columns)):
            alone = model(text[None], **options)
            for found, wanted in zip(together.attentions, alone.attentions):
                torch.testing.assert_close(found[i][:, where][:, :, where], wanted[0], atol=1e-10, rtol=0)
            for found, wanted in zip(together.focus_weights, alone.focus_weights):
                torch.testing.assert_close(found[i][:, where], wanted[0], atol=1e-10, rtol=1e-9)


@causal_rows
def test_maps_keep_to_windows_and_documents(row):
    if not hasattr(row.config(), "layer_windows"):
        pytest.skip("no windows")
    windows = [layer_kind(entry).window for entry in row.config().layer_windows]
    model = row.build("AutoModel", torch.float64)
    position_ids = torch.cat([torch.arange(12), torch.arange(18)])[None]
    document = torch.tensor([0] * 12 + [1] * 18)
    with torch.no_grad():
        maps = model(tokens(1, 30), position_ids=position_ids, output_attentions=True, use_cache=False).attentions
    gap = torch.arange(30)[:, None] - torch.arange(30)
    for attention, window in zip(maps, windows):
        visible = (gap >= 0) & (gap < (window or 30)) & (document[:, None] == document)
        assert (attention[0, :, ~visible] == 0).all()
        assert (attention[0, :, visible] > 0).all()


@causal_rows
def test_focus_weights_explain_the_maps(row):
    """Each row of a map is the focus weights in sight, divided by their sum; half of a fading one is left after its half-life."""
    if not row.explains:
        pytest.skip("the family has no focus weights")
    model = row.build("AutoModel", torch.float64)
    with torch.no_grad():
        output = model(tokens(1, 20), output_attentions=True, output_focus_weights=True, use_cache=False)
    age = (torch.arange(20)[:, None] - torch.arange(20)).clamp(min=0)
    for mixer, attention, weights in zip(row.mixers(model), output.attentions, output.focus_weights):
        shares = weights[:, :, None] * (attention > 0)
        if getattr(mixer, "half_lives", None) is not None:
            half_lives = torch.tensor(mixer.half_lives) * 2 ** mixer.half_life_shift.detach()
            shares = shares * 2 ** (-age / half_lives[:, None, None])
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-5)
        torch.testing.assert_close(attention, shares, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("focus", ["elu", "exp"])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_leap_is_its_maps(window, focus):
    """Out = sigmoid(<q, rows k> / sqrt(E)) rows v, with the rows that are handed out."""
    row = next(row for row in ROWS if row.name == "leap")
    layer = LeapAttention(row.config(layer_windows=[window] * 3, focus_function=focus)).double()
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    output = layer(x, output_attentions=True, output_focus_weights=True)
    query, focus_vector, key, value = layer.qfkv_proj(x).view(2, 15, 4, 2, 8).unbind(2)
    key_mean, value_mean = (torch.einsum("bhij,bjhe->bihe", output.attentions, t) for t in (key, value))
    gate = torch.sigmoid((query * key_mean).sum(-1, keepdim=True) / 8**0.5)
    torch.testing.assert_close(output.hidden_states, (gate * value_mean).flatten(2))
    logit = (focus_vector * key).sum(-1).transpose(1, 2) / 8**0.5
    expected = logit.exp() if focus == "exp" else torch.where(logit > 0, logit + 1, logit.exp())
    torch.testing.assert_close(output.focus_weights, expected)


@pytest.mark.parametrize("rescale", [15.0, 80.0])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_fastformer_is_its_maps(window, rescale):
    """Out = (rows p') v, with p' the normalised products of pooled queries and keys."""
    row = next(row for row in ROWS if row.name == "fastformer")
    layer = FastformerAttention(row.config(layer_windows=[window] * 3, rescale=rescale)).double()
    with torch.no_grad():
        layer.query_vector.normal_()
        layer.key_vector.normal_()
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    output = layer(x, output_attentions=True)
    query, key, value = layer.qkv_proj(x).view(2, 15, 3, 2, 8).unbind(2)
    normal = normalize_features(query)
    logits = (normal * normalize_features(layer.query_vector)).sum(-1) * rescale / 8
    gap = torch.arange(15)[:, None] - torch.arange(15)
    visible = (gap >= 0) & (gap < (window or 15))
    weights = logits.exp().transpose(1, 2)[:, :, None] * visible
    pooled = weights / (weights.sum(-1, keepdim=True) + 1e-5)
    product = torch.einsum("bhij,bjhe->bihe", pooled, normal) * key
    mixed = torch.einsum("bhij,bjhe->bihe", output.attentions, normalize_features(product)) * value
    torch.testing.assert_close(output.hidden_states, mixed.flatten(2))
