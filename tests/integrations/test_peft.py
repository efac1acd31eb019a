"""PEFT beyond one LoRA adapter: default targets, several adapters, prompt tuning, 8-bit weights, and what must refuse."""

import pytest
import torch
import transformers
from common.families import CAUSAL, ROWS, first_rows
from common.tiny import one_row_a_family, some_ids
from packaging.version import Version
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_linear_attn.families import FAMILIES
from hf_linear_attn.modeling.shared.releases import RELEASE

peft = pytest.importorskip("peft", reason="needs peft: pip install hf-linear-attn[peft]")
# PEFT itself still asks for a name that Transformers will drop in its version 6.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


# One language model a family, and an encoder, which guesses masked words.
LANGUAGE_MODELS = [*{row.family: row for row in reversed(CAUSAL)}.values()][::-1]
LANGUAGE_MODELS += [row for row in ROWS if row.name == "danet-encoder"]
language_models = pytest.mark.parametrize("row", LANGUAGE_MODELS, ids=[row.name for row in LANGUAGE_MODELS])


def head_of(row) -> str:
    """Auto class of the row's language model."""
    return "AutoModelForCausalLM" if row.causal else "AutoModelForMaskedLM"


def logits(model):
    """Logits of a fixed row."""
    with torch.no_grad():
        return model.eval()(input_ids=some_ids()).logits


def stirred(model, name="default"):
    """Give the adapter `name` weights that do something (a new one adds 0)."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{name}." in path and "lora_B" in path:
                parameter.normal_(std=0.3, generator=generator)
    return model


@one_row_a_family
def test_default_targets(row):
    """LoRA that names no target finds the table's layers, every one trains, and nothing else does."""
    model = peft.get_peft_model(row.build("AutoModel"), peft.LoraConfig(r=2))
    found = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_" in name}
    assert found
    assert found <= set(FAMILIES[row.family].lora_targets)  # a hybrid family also names the layers of its other blocks
    stirred(model)
    output = model(input_ids=some_ids()).last_hidden_state
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@language_models
def test_train_save_load_merge(row, tmp_path):
    """Trainer lowers the loss of the adapter alone; saved, loaded on a fresh base and merged it computes the same."""
    base = row.build(head_of(row))
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM" if row.causal else None))
    rows = [{"input_ids": some_ids()[0], "labels": some_ids()[0]} for _ in range(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        learning_rate=0.05,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            own = name.removeprefix("base_model.model.").replace(".base_layer", "")
            torch.testing.assert_close(parameter, before[own], rtol=0, atol=0)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    loaded = peft.PeftModel.from_pretrained(row.build(head_of(row)), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = getattr(transformers, head_of(row)).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(merged))


@language_models
def test_several_adapters(row, tmp_path):
    """Two adapters on one base: each by its name, both blended, none, and each saved by itself."""
    base = logits(row.build(head_of(row)))
    model = peft.get_peft_model(row.build(head_of(row)), peft.LoraConfig(r=2), adapter_name="law")
    model.add_adapter("medicine", peft.LoraConfig(r=4))
    for name in ("law", "medicine"):
        stirred(model, name)
    outputs = {}
    for name in ("law", "medicine"):
        model.set_adapter(name)
        outputs[name] = logits(model)
        assert not torch.allclose(outputs[name], base, atol=1e-3)
    assert not torch.allclose(outputs["law"], outputs["medicine"], atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
    model.add_weighted_adapter(["law", "medicine"], [1.0, 0.0], "mostly_law", combination_type="cat")
    model.set_adapter("mostly_law")
    torch.testing.assert_close(logits(model), outputs["law"], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["law", "medicine"])
    again = peft.PeftModel.from_pretrained(row.build(head_of(row)), tmp_path / "medicine", adapter_name="medicine")
    torch.testing.assert_close(logits(again), outputs["medicine"])
    again.load_adapter(tmp_path / "law", adapter_name="law")
    again.set_adapter("law")
    torch.testing.assert_close(logits(again), outputs["law"])
    again.delete_adapter("law")
    assert list(again.peft_config) == ["medicine"]


def check_adapter(row, config, **changes):
    """The adapter changes the logits, generation goes on with it, and merged it computes the same."""
    base = row.build(head_of(row), **changes)
    before = logits(base)
    model = stirred(peft.get_peft_model(base, config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted = logits(model)
    assert not torch.allclose(adapted, before, atol=1e-3)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(input_ids=some_ids(), **options).tolist() if row.causal else None
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-3, atol=1e-3)
    assert not row.causal or merged.generate(input_ids=some_ids(), **options).tolist() == tokens


@language_models
def test_lora_on_the_embedding(row):
    """PEFT's wrapper is no `nn.Embedding`. Of a tied matrix it would adapt one side alone until it is merged."""
    check_adapter(row, peft.LoraConfig(r=2, target_modules=["embed_tokens"]), tie_word_embeddings=False)


@language_models
def test_new_tokens_are_trained(row):
    """`trainable_token_indices`, in a tied output matrix, too; PEFT's own layer there leaves out the bias."""
    config = peft.LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[9, 16, 23])
    untouched = peft.get_peft_model(row.build(head_of(row)), config)
    torch.testing.assert_close(logits(untouched), logits(row.build(head_of(row))), rtol=1e-4, atol=1e-4)
    check_adapter(row, config)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["conv1", "conv2", "conv3"])
def test_lora_on_the_convolutions_of_sea(name, dora):
    """Of a causal and of a bidirectional estimator: the first two of the causal one skip every other row."""
    for row in (row for row in ROWS if row.family == "sea"):
        check_adapter(row, peft.LoraConfig(r=2, target_modules=[name], use_dora=dora))


@pytest.mark.parametrize("part", ["attention", "mlp", "attention_norm", "embed_tokens", "sea", "lm_head", "decoder"])
def test_parts_trained_in_full(part):
    """`modules_to_save` puts a copy beside the part: the copy is what computes, in generation, too."""
    found = 0
    for row in LANGUAGE_MODELS[:4]:
        names = [name for name, _ in row.causal_lm().named_modules() if name.split(".")[-1] == part]
        if names and not (part == "decoder" and row.family == "sea"):
            found += 1
            check_adapter(
                row, peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=names, exclude_modules=names)
            )
    assert found


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.22" if RELEASE >= (5, 24) else "0.19.1"),
    reason="Transformers itself asks for a newer PEFT here (test_get_peft_model_works_where_add_adapter_refuses)",
)
@first_rows
def test_adapters_of_transformers_own(row, tmp_path):
    """`model.add_adapter` / `load_adapter` without PEFT's wrapper; the folder then holds the adapter alone."""
    if row.family == "sea" and Version(peft.__version__) < Version("0.21"):
        pytest.skip("this PEFT finds the adapters of a body called `model` only; SEA's is called `host`")
    model = row.causal_lm()
    model.add_adapter(
        peft.LoraConfig(r=2, target_modules=list(FAMILIES[row.family].lora_targets)), adapter_name="default"
    )
    stirred(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} & {"config.json", "model.safetensors"} == set()
    again = row.causal_lm()
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"), reason="this PEFT gives generate() a mask without its virtual tokens"
)
@first_rows
def test_prompt_tuning(row, tmp_path):
    """Virtual tokens train, `generate` sees them, and they come back from a folder."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(row.causal_lm(), config)
    with torch.no_grad():
        model.prompt_encoder.default.embedding.weight.normal_(std=2.0)
    ids = some_ids()
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    assert model.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0
    model.eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with_prompt = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    prompted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
    assert (prompted - row.causal_lm()(ids).logits[:, -1]).abs().max() > 1e-3
    # The same by hand: the virtual tokens' embeddings before those of the text.
    base = model.get_base_model()
    prompt = model.prompt_encoder.default.embedding.weight[None]
    embedded = torch.cat([prompt, base.get_input_embeddings()(ids)], dim=1)
    by_hand = base.generate(inputs_embeds=embedded, attention_mask=torch.ones(1, embedded.shape[1]), **options)
    assert with_prompt[0, ids.shape[1] :].tolist() == by_hand[0].tolist()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(row.causal_lm(), tmp_path).eval()
    loaded = again.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert loaded.tolist() == with_prompt.tolist()


@first_rows
def test_prefix_tuning_refuses(row):
    """It would write keys and values into a cache that has none: an error with the reason, at the first call."""
    model = row.causal_lm()
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        num_layers=model.config.num_hidden_layers,
        token_dim=model.config.hidden_size,
        num_attention_heads=model.config.num_attention_heads,
    )
    with pytest.raises((ValueError, NotImplementedError), match=r"prefix tuning.*no place.*prompt tuning"):
        peft.get_peft_model(model, config)(input_ids=some_ids())


class TestTorchao:
    """8-bit weights through torchao."""

    @pytest.fixture(autouse=True)
    def _needs_torchao(self):
        pytest.importorskip("torchao", reason="needs torchao: pip install hf-linear-attn[quantization]")

    @first_rows
    def test_int8_weights(self, row, tmp_path):
        """Loaded with int8 weights: close logits, smaller linear layers, generation runs."""
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        model = row.causal_lm()
        model.save_pretrained(tmp_path)
        small = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
        )
        kinds = {type(p).__name__ for p in getattr(small.model, "host", small.model).layers.parameters()}
        assert any("Int8" in kind or "Quantized" in kind for kind in kinds), kinds
        exact, rounded = logits(model), logits(small)
        assert (exact - rounded).abs().max() < 0.2 * exact.std()  # a step of int8 is 1/127 of a row's largest weight
        assert not torch.equal(exact, rounded)
        generated = small.generate(some_ids(), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert generated.shape == (1, some_ids().shape[1] + 4)
