"""Our layers are ordinary modules: called where they have weights, followed where these change, replaced where a user likes."""

import pytest
import torch
from common.families import CAUSAL, HYBRIDS, ROWS, first_rows, in_every_run
from common.tiny import one_row_a_family, some_ids
from torch import nn
from torch.nn.utils import parametrize, prune

# Rows of the same modules as another, which they use in the same way, are slow tests.
ALIKE = {"leap-global", "leap-rotary-exp", "fastformer-windows", "fastformer-large-rescale", "danet-cosine"}
OFTEN = [row.name for row in [*ROWS, *HYBRIDS[:2]] if row.name not in ALIKE]
EVERY = in_every_run(*OFTEN, of=[*ROWS, *HYBRIDS])
DECODERS = in_every_run(*OFTEN, of=[*CAUSAL, *HYBRIDS])
OPTIONS = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def language_model(row):
    """The row's causal language model, or its masked one, or (a Fastformer encoder) a classifier."""
    heads = row.heads()
    wanted = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification")
    return row.build(next(head for head in wanted if head in heads))


def logits(model, ids=None):
    """Logits of a fixed row."""
    with torch.no_grad():
        return model.eval()(input_ids=some_ids() if ids is None else ids).logits


def layers_with_weights(model) -> dict:
    """Name -> module, of those that own a parameter."""
    return {name: x for name, x in model.named_modules() if any(p is not None for p in x._parameters.values())}


@EVERY
def test_every_layer_with_weights_is_called(row):
    """Hooks and pre-hooks fire in a forward, in a training step and, where the row generates, in its steps."""
    model, called = language_model(row), {}
    for name, layer in layers_with_weights(model).items():
        layer.register_forward_pre_hook(lambda *_, n=name: called.setdefault(n, set()).add("before"))
        layer.register_forward_hook(lambda *_, n=name: called.setdefault(n, set()).add("after"))
    everywhere = {name: {"before", "after"} for name in layers_with_weights(model)}
    logits(model)
    assert called == everywhere
    called.clear()
    model.train()(input_ids=some_ids()).logits.sum().backward()
    assert called == everywhere
    if row.causal:
        state = model.eval().generate(some_ids(), return_dict_in_generate=True, **OPTIONS)
        called.clear()
        model.generate(state.sequences, cache=state.cache, **OPTIONS)  # one token and a state: no prompt to read
        assert called == everywhere


@EVERY
def test_changed_weights_are_followed(row):
    """Pruned (old hooks) and parametrized layers compute with what their weight now is, also after it changes again."""
    model = language_model(row)
    tied = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = [
        name for name, layer in layers_with_weights(model).items()
        if id(layer) not in tied and isinstance(layer._parameters.get("weight"), nn.Parameter)
    ]  # fmt: skip
    pruned, reference = language_model(row), language_model(row)
    for i, name in enumerate(names):
        layer = pruned.get_submodule(name)
        if i % 2:
            prune.random_unstructured(layer, "weight", 0.3)
        else:
            parametrize.register_parametrization(layer, "weight", nn.Tanh())
    for _ in range(2):
        expected = reference
        with torch.no_grad():
            for name in names:
                layer = pruned.get_submodule(name)
                if parametrize.is_parametrized(layer):
                    weight = layer.parametrizations.weight.original.mul_(0.9).tanh()
                else:
                    weight = layer.weight_orig.mul_(0.9) * layer.weight_mask
                expected.get_submodule(name).weight.copy_(weight)
        found, wanted = logits(pruned), logits(expected)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, logits(model), atol=1e-3)
    if row.causal:
        assert pruned.generate(some_ids(), **OPTIONS).tolist() == expected.generate(some_ids(), **OPTIONS).tolist()


@DECODERS
def test_what_the_output_matrix_is_applied_to(row):
    """`base_model`, the decoder and the last hidden states end where the output matrix begins, as fused losses need them."""
    model, ids = row.causal_lm(), some_ids()
    matrix = model.get_output_embeddings()
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        torch.testing.assert_close(matrix(output.hidden_states[-1]), output.logits)
        for body in (model.base_model, model.get_decoder()):
            found = body(input_ids=ids, use_cache=False, output_hidden_states=True)
            torch.testing.assert_close(found.last_hidden_state, output.hidden_states[-1])
            torch.testing.assert_close(found.hidden_states, output.hidden_states)
        by_hand = nn.functional.linear(model.base_model(ids)[0], matrix.weight, matrix.bias)
        torch.testing.assert_close(by_hand, output.logits)
    assert dict(model.base_model.named_parameters()).keys() <= {
        name.removeprefix(f"{model.base_model_prefix}.") for name, _ in model.named_parameters()
    }
    model.base_model.requires_grad_(False)
    model.base_model.eval()
    assert not model.get_input_embeddings().weight.requires_grad


@one_row_a_family
def test_embeddings_of_ones_own(row):
    """A module around the table, a subclass that takes other ids, and a longer table without a word to the configuration."""

    class Around(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.table = table

        def forward(self, ids):
            return self.table(ids)

    class Folded(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids % self.num_embeddings)

    expected = logits(language_model(row))
    table = language_model(row).get_input_embeddings().weight.detach()
    longer = torch.cat([table, torch.ones(4, table.shape[1])])
    for replacement, ids in (
        (Around(nn.Embedding.from_pretrained(table)), some_ids()),
        (Folded(*table.shape, _weight=table.clone()), some_ids() + len(table)),
        (nn.Embedding.from_pretrained(longer), some_ids()),
    ):
        model = language_model(row)
        model.set_input_embeddings(replacement)
        torch.testing.assert_close(logits(model, ids), expected)
        with torch.no_grad():
            embedded = model(inputs_embeds=replacement(ids)).logits
        torch.testing.assert_close(embedded, expected)
    assert torch.isfinite(logits(model, torch.full((1, 3), len(table) + 3))).all()


def test_a_feed_forward_layer_of_ones_own():
    """In the place of LEAP's, whose parts the block reads to run faster."""

    class Gated(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up_proj, self.gate = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x):
            return self.up_proj(x) * self.gate(x).sigmoid()

    row = ROWS[0]
    model = language_model(row)
    for layer in model.model.layers:
        layer.mlp = Gated(model.config.hidden_size)
    logits(model)
    assert model.generate(some_ids(), **OPTIONS).shape == (1, some_ids().shape[1] + 3)


def test_a_hook_may_keep_what_it_saw():
    """The ReLU after DANet's wide layer leaves alone what a hook has kept of it, in a text and in a step."""
    model = next(row for row in ROWS if row.name == "danet").causal_lm()
    kept = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: kept.append((args[0], out)))
    model.generate(some_ids(), **OPTIONS)
    for x, out in kept:
        torch.testing.assert_close(out, nn.functional.linear(x, model.model.layers[0].mlp.up_proj.weight))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@one_row_a_family
def test_dynamic_int8(row):
    """PyTorch's dynamic quantization, whose layers have no tensor called weight: forward and generate."""
    model = language_model(row)
    expected = logits(model)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(x) is nn.Linear for x in small.modules())
    difference = (logits(small) - expected).abs().mean()
    assert 0 < difference < 0.3 * expected.std()
    if row.causal:
        assert small.generate(some_ids(), **OPTIONS).shape == (1, some_ids().shape[1] + 3)


@first_rows
def test_weights_on_disk(row, tmp_path):
    """Accelerate brings each layer's weights in when it is called: the same tokens, and the same state after undoing some."""
    from accelerate import disk_offload

    model = row.causal_lm()
    expected, tokens = logits(model), model.generate(some_ids(), **OPTIONS).tolist()
    away = disk_offload(row.causal_lm(), str(tmp_path), execution_device=torch.device("cpu"), offload_buffers=True)
    assert all(p.is_meta for p in away.parameters())
    torch.testing.assert_close(logits(away), expected, rtol=0, atol=0)
    assert away.generate(some_ids(), **OPTIONS).tolist() == tokens
    ends = []
    for each in (model, away):
        cache = type(each.generate(some_ids(), return_dict_in_generate=True, **OPTIONS).cache)(config=each.config)
        cache.activate_past_recording()
        with torch.no_grad():
            each(some_ids(), cache=cache)
            cache.crop(-3)
            ends.append(each(some_ids()[:, -3:], cache=cache).logits)
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[0], expected[:, -3:], rtol=1e-4, atol=1e-4)
