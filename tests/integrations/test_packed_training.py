"""Packed training with Transformers' and TRL's own collators: packed equals separate, forward and backward."""

import itertools

import pytest
import torch
from common.families import causal_rows, first_rows
from common.tiny import word_tokenizer
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

DOCUMENTS = [[5, 9, 12, 30, 7], [8, 8, 31], [40, 41, 42, 43, 44, 45, 46, 47, 48], [3, 17]]


def loss_and_gradients(model, batches, count):
    """Summed loss over `batches` divided by `count` predicted tokens, and its gradients."""
    model.zero_grad()
    total = sum(model(**batch, num_items_in_batch=torch.tensor(count)).loss for batch in batches)
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_packed_equals_separate(model, packed, documents):
    """The same loss and gradients from one packed row as from each document by itself."""
    separate = [{"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])} for ids in documents]
    count = sum(len(ids) - 1 for ids in documents)
    expected, expected_gradients = loss_and_gradients(model, separate, count)
    loss, gradients = loss_and_gradients(model, packed, count)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
        )


@causal_rows
@pytest.mark.parametrize(
    "options",
    [{}, {"return_flash_attn_kwargs": True}, {"return_position_ids": False, "return_seq_idx": True}],
    ids=["positions", "cu_seq_lens", "seq_idx"],
)
def test_flattening_collator(row, options):
    """However the collator says where documents begin."""
    packed = DataCollatorWithFlattening(**options)([{"input_ids": ids, "labels": ids} for ids in DOCUMENTS])
    assert packed["input_ids"].shape == (1, sum(map(len, DOCUMENTS)))
    check_packed_equals_separate(row.causal_lm(dtype=torch.float64).train(), [packed], DOCUMENTS)


@first_rows
def test_a_leak_would_be_seen(row):
    """Control: without the collator's positions the documents run into one another, and the loss is another."""
    packed = dict(DataCollatorWithFlattening()([{"input_ids": ids, "labels": ids} for ids in DOCUMENTS]))
    model = row.causal_lm(dtype=torch.float64)
    right = model(**packed).loss
    packed.pop("position_ids")
    assert (model(**packed).loss - right).abs() > 1e-3


@first_rows
def test_trainer_with_flattening(row, tmp_path):
    """Trainer takes the collator as it is, and the loss falls."""
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=2, learning_rate=0.02, use_cpu=True, disable_tqdm=True,
        logging_steps=1, save_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in DOCUMENTS]
    trainer = Trainer(
        row.causal_lm(),
        arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


# TRL itself still uses names that Transformers will drop in its version 6.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@first_rows
@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_trl_packing(row, strategy, tmp_path):
    """`SFTConfig(packing=True)` trains; what its collator packed equals the documents one by one."""
    trl = pytest.importorskip("trl", reason="needs trl: pip install trl")
    from datasets import Dataset

    arguments = trl.SFTConfig(
        str(tmp_path), packing=True, packing_strategy=strategy, max_length=16, max_steps=4, learning_rate=0.02, use_cpu=True,
        per_device_train_batch_size=1, disable_tqdm=True, logging_steps=1, save_strategy="no", bf16=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        row.causal_lm(),
        arguments,
        train_dataset=Dataset.from_dict({"input_ids": DOCUMENTS * 2}),
        processing_class=word_tokenizer(),
    )
    batch = dict(next(iter(trainer.get_train_dataloader())))
    assert batch["input_ids"].shape[0] == 1
    if strategy == "bfd":
        starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
        ids = batch["input_ids"][0].tolist()
        documents = [ids[first:last] for first, last in itertools.pairwise(starts)]
        assert len(documents) > 1
        check_packed_equals_separate(row.causal_lm(dtype=torch.float64), [batch], documents)
    with torch.no_grad():
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), row.causal_lm()(**batch).loss)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
