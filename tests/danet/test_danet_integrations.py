"""DANet with Trainer, PEFT, pipelines and exported code; and the code of its documentation."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.dynamic_module_utils import custom_object_save

from hf_linear_attn import DanetForCausalLM, DanetForMaskedLM, DanetForSequenceClassification
from tests.danet.models import build, decoder, encoder, tokens

peft = pytest.importorskip("peft")


def arguments(folder, **kwargs):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=4,
        **kwargs,
    )


@pytest.mark.parametrize("model_class", [DanetForMaskedLM, DanetForCausalLM, DanetForSequenceClassification])
def test_trainer_in_bfloat16_with_checkpointing_lowers_the_loss(model_class, tmp_path):
    causal = model_class is DanetForCausalLM
    model = build(model_class, dtype=torch.float32, is_causal=causal, layer_pattern="sw_g" if causal else "l_sl_g")
    ids = tokens(32, 16)
    labels = ids[:, 0] % 2 if model_class is DanetForSequenceClassification else ids
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}).with_format("torch")
    names = {field.name for field in TrainingArguments.__dataclass_fields__.values()}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    trainer = Trainer(model, arguments(tmp_path, bf16=True, **{checkpointing: True}), train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks under the old name
@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("name", ["sw_sw_g swiglu", "g_softmax_sw"])
def test_lora_reaches_the_projections(name, targets):
    model = decoder(name, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    ids = tokens(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    adapters = [(n, p) for n, p in model.named_parameters() if "lora_B" in n]
    assert any("query_proj" in n for n, _ in adapters)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in adapters)
    out = model.generate(input_ids=ids, max_new_tokens=4, pad_token_id=0)
    merged = model.merge_and_unload()
    assert torch.equal(out, merged.generate(input_ids=ids, max_new_tokens=4, pad_token_id=0))


@pytest.mark.parametrize("make", [lambda: encoder("learned g relu"), lambda: decoder("sw_sw_g swiglu")])
def test_the_code_of_a_checkpoint_is_complete(make, tmp_path):
    """Every module that the model imports travels with it, side by side."""
    model = make()
    custom_object_save(model, str(tmp_path), config=model.config)
    copied = {path.stem for path in tmp_path.glob("*.py")}
    assert "modeling_danet" in copied
    for path in tmp_path.glob("*.py"):
        for name in re.findall(r"^\s*from \.(\w+) import", path.read_text(), re.M):
            assert name in copied, f"{path.name} needs {name}"


def test_configurations_are_plain_json():
    config = encoder("rotary l_sl_g swiglu").config
    assert json.loads(config.to_json_string())["layer_pattern"] == "l_sl_g"


def test_the_documentation_runs():
    page = Path(__file__).parents[2] / "docs" / "families" / "danet.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert names["logits"].shape == (4, 10)
    assert names["text"].shape == (1, 30)
    assert names["y"].shape == names["o"].shape == (8, 1024, 256)


def test_the_tests_that_the_page_names_exist():
    folder = Path(__file__).parent
    named = re.findall(r"`(test_\w+)`", (folder.parents[1] / "docs" / "families" / "danet.md").read_text())
    written = "".join(file.read_text() for file in folder.glob("test_*.py"))
    assert len(named) > 20
    assert not [name for name in named if f"def {name}(" not in written]
