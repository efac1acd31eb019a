"""One step of each of LEAP's heads over four padded rows, on two processes one row at a time: losses, weights as one number.

heads.py OUTPUT.json
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.families import ROWS
from common.tasks import task_batch, trainer_for


def train_heads(output: str) -> None:
    """Write {head: [loss, weights]}."""
    found = {}
    for head in ROWS[0].heads():
        if head == "AutoModel":
            continue
        model, batch = ROWS[0].build(head, torch.float64), task_batch(head)
        if head == "AutoModelForCausalLM":
            targets = (batch["attention_mask"] == 1) & (batch["attention_mask"].cumsum(1) > 1)
            batch["labels"] = batch["labels"].where(targets, -100)
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        options = {"per_device_train_batch_size": 4}
        if processes == 2:
            options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        trainer = trainer_for(model, tempfile.gettempdir(), batch, **options)
        trainer.train()
        weights = sum(
            (p.detach() * torch.linspace(-1, 1, p.numel()).view_as(p)).sum().item() for p in model.parameters()
        )
        found[head] = [trainer.state.log_history[0]["loss"], weights]
    if trainer.is_world_process_zero():
        Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    train_heads(sys.argv[1])
