"""Batches with targets for every head, and what Trainer makes of them."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from .batches import LAYOUTS, place, tokens
from .families import ROWS, VOCAB

RATE = 0.1
IGNORED = -100
LENGTHS = (5, 9, 3, 7)


def tasks_of(*names):
    """Over the heads with a loss of these rows."""
    tasks = [(row, head) for row in ROWS if row.name in names for head in row.heads() if head != "AutoModel"]
    return pytest.mark.parametrize(
        ("row", "head"), [pytest.param(row, head, id=f"{row.name}-{head}") for row, head in tasks]
    )


# A loss does not depend on the variant of a family.
every_task = tasks_of("leap", "fastformer", "danet", "danet-encoder", "sea", "sea-encoder")


def task_batch(head: str, layout: str = "left", garbage: int = 0) -> dict[str, torch.Tensor]:
    """Four padded texts with as many targets as there may be (labels of padding included), unlike in number from row to row."""
    texts = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    places = [LAYOUTS[layout](length) for length in LENGTHS]
    length = max(width for _, width in places)
    ids, mask = place(texts, [columns for columns, _ in places], length, garbage)
    batch = {"input_ids": ids, "attention_mask": mask}
    if head == "AutoModelForCausalLM":
        return batch | {"labels": ids.clamp(min=3)}
    if head in ("AutoModelForMaskedLM", "AutoModelForTokenClassification", "AutoModelForPreTraining"):
        labels = tokens(4, length, seed=1) % (VOCAB if head != "AutoModelForTokenClassification" else 2)
        if head == "AutoModelForPreTraining":  # whose pairs weigh as the words of their batch do: as many in each row
            labels = labels.where(torch.arange(length) > length - 3, IGNORED)
            return batch | {"labels": labels, "next_sentence_label": torch.tensor([1, 0, 0, 1])}
        return batch | {"labels": labels.where((mask == 1) & (torch.arange(length) % 3 != 0), IGNORED)}
    if head == "AutoModelForQuestionAnswering":
        return batch | {"start_positions": mask.argmax(1), "end_positions": mask.argmax(1) + 1}
    if head == "AutoModelForMultipleChoice":
        batch = {name: torch.stack([x, x.flip(0)], 1) for name, x in batch.items()}
    return batch | {"labels": torch.tensor([1, 0, 0, 1])}


def without_targets(batch: dict) -> dict:
    """The batch with nothing to learn from."""
    emptied = {"labels": IGNORED, "next_sentence_label": IGNORED, "start_positions": 10**6, "end_positions": 10**6}
    return {name: torch.full_like(x, emptied[name]) if name in emptied else x for name, x in batch.items()}


def trainer_for(model: nn.Module, folder, batch: dict | None = None, **options) -> Trainer:
    """A Trainer over the rows of a batch, for one step of plain gradient descent."""
    defaults = {"max_steps": 1, "optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0, "logging_steps": 1}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(folder), **quiet, **{**defaults, **options})
    rows = [] if batch is None else [{name: x[i] for name, x in batch.items()} for i in range(len(batch["input_ids"]))]
    return Trainer(model=model, args=arguments, train_dataset=rows)
