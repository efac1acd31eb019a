"""TRL forms its losses from `base_model(...)` and the output matrix: they are the model's own, and train every part of it."""

import math

import pytest
import torch
from common.families import FIRST, HYBRIDS, first_rows, in_every_run
from common.tiny import some_ids, word_tokenizer

trl = pytest.importorskip("trl", reason="needs trl: pip install trl")
datasets = pytest.importorskip("datasets", reason="needs datasets: pip install datasets")
# TRL itself still uses names that Transformers will drop in its version 6.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

TEXTS = [[5, 9, 12, 30, 7], [8, 8, 31], [40, 41, 42, 43, 44, 45, 46, 47, 48], [3, 17]]
ROWS = pytest.mark.parametrize("row", [*first_rows.args[1], HYBRIDS[0]], ids=lambda row: row.name)
FEW_STEPS = {
    "max_steps": 2,
    "learning_rate": 0.02,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "bf16": False,
}


def sft_trainer(row, folder, model=None, **options):
    """TRL's trainer with its default loss on rows of unequal length, which it pads."""
    arguments = trl.SFTConfig(
        str(folder), per_device_train_batch_size=len(TEXTS), save_strategy="no", **FEW_STEPS, **options
    )
    rows = datasets.Dataset.from_dict({"input_ids": TEXTS})
    model = row.causal_lm() if model is None else model
    return trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=word_tokenizer())


def gradients(model) -> dict:
    """Of the parameters that have one other than 0."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return found


@ROWS
def test_sft_trains_the_models_own_loss(row, tmp_path):
    """Loss and gradients on a padded batch are the model's own; every part they reach moves; generation goes on."""
    trainer = sft_trainer(row, tmp_path)
    model, batch = trainer.model.train(), dict(next(iter(trainer.get_train_dataloader())))
    assert (batch["labels"] == -100).any()
    own = row.causal_lm().train()
    expected = own(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    expected.backward()
    trainer.compute_loss(model, batch).backward()
    found, wanted = gradients(model), gradients(own)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(expected.item(), rel=1e-4)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == set(wanted)
    ids = some_ids()
    assert trainer.model.eval().generate(ids, max_new_tokens=3, pad_token_id=0).shape == (1, ids.shape[1] + 3)


@in_every_run("leap", "danet", "sea", of=FIRST)
def test_adapters_of_sft(row, tmp_path):
    """Every adapter that the model's own loss reaches is trained, those in front of the output matrix, too."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install hf-linear-attn[peft]")
    model = peft.get_peft_model(row.causal_lm(), peft.LoraConfig(r=2, target_modules="all-linear"))
    model.train()(input_ids=some_ids(), labels=some_ids()).loss.backward()
    reached = gradients(model).keys()
    assert reached
    trainer = sft_trainer(row, tmp_path, model)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert reached <= moved
    assert all("lora_" in name for name in moved)


@in_every_run("leap", "sea", of=FIRST)
def test_dpo(row, tmp_path):
    """Policy and reference agree at first, so the loss begins at log 2; then the policy moves."""
    # Adam's first step moves every weight by the rate: at 0.02 past the minimum, where SEA's masks choose other cells.
    options = FEW_STEPS | {"learning_rate": 0.002}
    arguments = trl.DPOConfig(str(tmp_path), per_device_train_batch_size=2, save_strategy="no", **options)
    pairs = {"prompt": ["w5 w9 w3", "w8 w31"], "chosen": [" w12 w30", " w7"], "rejected": [" w40 w41 w42", " w9 w9"]}
    trainer = trl.DPOTrainer(
        row.causal_lm(),
        row.causal_lm(),
        arguments,
        train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] < losses[0]
