"""Hedgehog in pretrained hosts: nothing but softmax inside the window, which hosts fit, and what is refused."""

import pytest
import torch
import transformers
from common.batches import tokens
from common.families import CAUSAL, HYBRIDS, VOCAB
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from hf_linear_attn import HedgehogConfig, HedgehogForCausalLM, HedgehogModel
from hf_linear_attn.conversion import linearize

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
HOSTS = {
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 20},
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 8},
    "SmolLM3": GROUPED,
    "Gemma": GROUPED | {"head_dim": 8},
    "Gemma2": GROUPED
    | {"head_dim": 8, "final_logit_softcapping": None, "attn_logit_softcapping": 2.0, "sliding_window": 20},
    "Phi": SIZES,
    "GPTNeoX": SIZES,
    "GPT2": SIZES | {"scale_attn_by_inverse_layer_idx": True},
    "OPT": SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 8},
}
ROW = next(row for row in CAUSAL if row.name == "hedgehog")


def teacher_of(name: str, auto_class=AutoModelForCausalLM, **changes):
    set_seed(0)
    config = getattr(transformers, f"{name}Config")(**HOSTS[name] | changes)
    model = auto_class.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_every_host_is_what_it_was_inside_the_window(name):
    """Before any training, padded or not, in one call or with a state; behind the window it is another model."""
    teacher = teacher_of(name)
    student = linearize(teacher, "hedgehog", window=10)
    assert isinstance(student, HedgehogForCausalLM)
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    wanted = teacher(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[mask.bool()]
    found = student(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    cache, parts = None, []
    for part in ids.split([6, 1, 3], 1):
        output = student(part, cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), teacher(ids).logits, atol=1e-4, rtol=1e-4)
    longer = tokens(1, 18)
    assert (student(longer).logits - teacher(longer).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2", "Gemma2"])
@torch.no_grad()
def test_softmax_layers_are_the_hosts_own(name):
    """With one linear layer the others do what they did; a sliding window of the host is kept in them."""
    teacher = teacher_of(name)
    student = linearize(teacher, "hedgehog", window=10, softmax_layers=[0, 2])
    assert list(student.hedgehog_layers()) == [1]
    ids = tokens(2, 40)
    middle = {name: module for name, module in student.model.host.named_modules() if hasattr(module, "hedgehog")}
    (core,) = (module.hedgehog for module in middle.values())
    core.window, core.chunk_size = 20, 8  # of the sliding hosts: their windows are of 20 tokens
    if name in ("Mistral", "Gemma2"):
        ids = ids[:, :20]
    else:
        core.window = 40
    torch.testing.assert_close(student(ids, use_cache=False).logits, teacher(ids).logits, atol=1e-4, rtol=1e-4)
    cache, parts = None, []
    for part in ids.split([15, 1, ids.shape[1] - 16], 1):
        output = student(part, cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), teacher(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_state_stays_the_same_size():
    model = ROW.causal_lm()
    with torch.no_grad():
        sizes = {model(tokens(1, length), use_cache=True).cache.state_size() for length in (5, 50, 250)}
    assert len(sizes) == 1
    heads, window, size = 2, 4, 4  # of keys
    numbers = 2 * window * heads * size + heads * 2 * size * (size + 1)
    assert sizes == {3 * (4 * numbers + 2 * 8)}  # float32, and two counts


def test_maps_are_what_the_layers_do():
    model = ROW.causal_lm(torch.float64)
    with torch.no_grad():
        maps = model(tokens(1, 12), output_attentions=True).attentions
    assert [tuple(x.shape) for x in maps] == [(1, 4, 12, 12)] * 3
    for x in maps:
        torch.testing.assert_close(x.sum(-1), torch.ones_like(x[..., 0]))
        assert not x.triu(1).any()
    assert len(HYBRIDS[-1].causal_lm()(tokens(1, 12), output_attentions=True).attentions) == 3


def test_gradcheck():
    """Over a host that computes in float64 throughout, which Llama's norms do not."""
    teacher = teacher_of("GPT2", hidden_size=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = linearize(teacher, "hedgehog", window=2, forgetting="token").double().eval()
    embeds = model.get_input_embeddings()(tokens(1, 6)).detach().requires_grad_()
    mask = torch.tensor([[0, 1, 1, 0, 1, 1]])

    def logits(x):
        return model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits[mask.bool()].tanh()

    assert torch.autograd.gradcheck(logits, embeds, fast_mode=True)


def test_forgetting_starts_near_none():
    teacher = teacher_of("Llama")
    plain, head, token = (linearize(teacher, "hedgehog", window=4, forgetting=f) for f in ("none", "head", "token"))
    with torch.no_grad():
        wanted = plain(tokens(1, 20)).logits
        for model in (head, token):
            assert 1e-8 < (model(tokens(1, 20)).logits - wanted).abs().max() < 0.1


def test_a_classifier_keeps_its_head():
    teacher = teacher_of("Llama", AutoModelForSequenceClassification, num_labels=3)
    student = linearize(teacher, "hedgehog", window=10)
    ids = tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, atol=1e-4, rtol=1e-4)
    assert student.config.num_labels == 3


@torch.no_grad()
def test_layers_are_chosen_by_what_they_cost(capsys):
    """The layer that reads far is kept: here the last, because the others' values are near nothing."""
    teacher = teacher_of("Llama")
    for layer in teacher.model.layers[:2]:
        layer.self_attn.o_proj.weight.mul_(1e-3)
    student = linearize(teacher, "hedgehog", window=4, softmax_layers="auto:25%", calibration=tokens(2, 40))
    assert student.config.softmax_layers == [2]
    assert list(student.hedgehog_layers()) == [0, 1]
    shown = capsys.readouterr().out
    assert "KL of the predictions when a layer alone is linear, 2 texts of 40 tokens" in shown
    assert shown.count("linear\n") == 2
    assert shown.count("softmax\n") == 1
    measured = student.softmax_choice["kl"]
    assert measured[2] > 10 * max(measured[:2]) > 0
    assert linearize(teacher, "hedgehog", window=4, softmax_layers="auto:0%").config.softmax_layers == []


def test_auto_classes_save_and_load(tmp_path):
    student = linearize(teacher_of("Llama"), "hedgehog", window=4, softmax_layers=[1])
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens(1, 20)).logits, student(tokens(1, 20)).logits)
    assert (
        again.lm_head.weight.data_ptr() == student.lm_head.weight.data_ptr() or not student.config.tie_word_embeddings
    )


LLAMA = transformers.LlamaConfig(**GROUPED)
BAD = {
    "window": (lambda: HedgehogConfig(window=0), "`window` is 0, expected at least 1"),
    "features": (lambda: HedgehogConfig(feature_map="relu"), "`feature_map` is 'relu'.*features have to be positive"),
    "feature-size": (lambda: HedgehogConfig(feature_size=0), "`feature_size` is 0, expected at least 1"),
    "forgetting": (lambda: HedgehogConfig(forgetting="often"), "`forgetting` is 'often', expected one of"),
    "layer": (
        lambda: HedgehogConfig(host_config=LLAMA, softmax_layers=[3]),
        r"names \[3\], but the host has layers 0 to 2",
    ),
    "all-layers": (lambda: HedgehogConfig(host_config=LLAMA, softmax_layers=[0, 1, 2]), "nothing would be linear"),
    "size-of-host": (lambda: HedgehogConfig(hidden_size=8), "`hidden_size` belongs to the host"),
    "no-type": (lambda: HedgehogConfig(host_config={"hidden_size": 8}), "must name its `model_type`"),
    "encoder-decoder": (
        lambda: HedgehogConfig(host_config=transformers.T5Config()),
        "an encoder with a decoder|has no `",
    ),
    "cross-attention": (
        lambda: HedgehogConfig(host_config=transformers.GPT2Config(add_cross_attention=True)),
        "it has cross-attention",
    ),
    "scaled-logits": (
        lambda: HedgehogConfig(host_config=transformers.CohereConfig(**GROUPED)),
        "its logits are more than a matrix .*`logit_scale`",
    ),
    "bert": (
        lambda: HedgehogModel(HedgehogConfig(host_config=transformers.BertConfig(**SIZES))),
        "cannot be put into a",
    ),
    "sinks": (
        lambda: HedgehogModel(
            HedgehogConfig(host_config=transformers.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2))
        ),
        "a parameter beside its projections .`sinks`",
    ),
    "wider-than-the-host": (
        lambda: HedgehogConfig(host_config=transformers.MistralConfig(**HOSTS["Mistral"]), window=21),
        "`window` is 21, but layers of the host see 20 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("share", ["auto:100%", "auto:-5%", "auto:half", "25%"])
def test_shares_outside_their_range(share):
    with pytest.raises(ValueError, match=r"`softmax_layers` is .* expected a list of layers, or"):
        linearize(teacher_of("Llama"), "hedgehog", softmax_layers=share)


def test_bad_calibration():
    teacher = teacher_of("Llama")
    options = {"window": 8, "softmax_layers": "auto:50%"}
    with pytest.raises(ValueError, match="too little: rows of more than twice the window of 8"):
        linearize(teacher, "hedgehog", **options, calibration=tokens(2, 16))
    with pytest.raises(ValueError, match="`calibration` holds 90, expected token ids 0 to 63"):
        linearize(teacher, "hedgehog", **options, calibration=torch.full((1, 40), 90))
    with pytest.raises(ValueError, match=r"token ids .N, T. for a model in memory"):
        linearize(teacher, "hedgehog", **options)
    with pytest.raises(ValueError, match="which needs `softmax_layers"):
        linearize(teacher, "hedgehog", window=8, calibration=tokens(2, 40))
    with pytest.raises(ValueError, match=r"unknown option.*'k'.*HedgehogConfig"):
        linearize(teacher, "hedgehog", k=3)


def test_a_host_called_by_itself_says_so():
    with pytest.raises(ValueError, match="this layer belongs to a Hedgehog model"):
        ROW.causal_lm().model.host(tokens(1, 4))
