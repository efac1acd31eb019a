"""Masked words: Transformers' dynamic masking for training, masks drawn once for evaluation, and how many words are guessed."""

import zlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback

from ..modeling.shared.heads import masked_lm_loss
from .tokenized_text import TokenBlocks

EVALUATION_SEED = 0


class BlocksToMask(torch.utils.data.Dataset):
    """Blocks as the masking collator wants them: ids without labels."""

    def __init__(self, blocks: TokenBlocks):
        self.blocks = blocks.blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self.blocks[index].astype(np.int64))}


class MaskingCollator:
    """Rows of `BlocksToMask` -> a batch with new masks each time; rows that carry labels are stacked as they are.

    Of the share of tokens drawn, 80 % become the mask token, 10 % another token, 10 % stay; labels are -100 elsewhere. Special
    tokens are never drawn. The draw depends on the batch, the epoch and the seed alone, so a resumed run draws the same: data
    loaders fetch batches ahead, and a generator that counted draws would go on from the wrong place.
    """

    def __init__(self, tokenizer, share: float, seed: int = 0):
        if tokenizer.mask_token is None:
            raise ValueError(
                "the tokenizer has no mask token: train without tokenizer (a BPE with one is made), or name another tokenizer"
            )
        self.special = torch.tensor(sorted(tokenizer.all_special_ids))
        self.seed, self.epoch = seed, 0
        self.mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=share)

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        if "labels" in stacked:
            return stacked
        ids = stacked["input_ids"]
        digest = zlib.crc32(ids.numpy().tobytes(), self.epoch + 1)
        self.mask.generator = torch.Generator().manual_seed(digest + (self.seed << 32))
        ids, labels = self.mask.torch_mask_tokens(ids, torch.isin(ids, self.special))
        return {"input_ids": ids, "labels": labels}


class NewMasksEachEpoch(TrainerCallback):
    """Tells the collator which epoch begins or is resumed."""

    def __init__(self, collator: MaskingCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Epochs are counted in fractions, which rounding may leave just below a whole number."""
        self.collator.epoch = int((state.epoch or 0.0) + 1e-6)


class MaskedOnce(torch.utils.data.Dataset):
    """Blocks whose masks are drawn once from a seed of their own: every evaluation and every model guesses the same words."""

    def __init__(self, blocks: TokenBlocks, collator: MaskingCollator):
        plain = BlocksToMask(blocks)
        seed, epoch, collator.seed, collator.epoch = collator.seed, collator.epoch, EVALUATION_SEED, 0
        batch = collator([plain[i] for i in range(len(plain))])
        collator.seed, collator.epoch = seed, epoch
        self.ids, self.labels = batch["input_ids"], batch["labels"]
        if not (self.labels != -100).any():
            raise ValueError(
                f"none of the {self.ids.numel()} tokens to evaluate on was drawn to be masked: give more text or a larger share "
                "of masked words"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class MaskedWordsTrainer(Trainer):
    """Trains and evaluates on the mean over masked words, for any model of masked words.

    The loss is made here, not by the model: Transformers' BERT heeds no count of the words in accumulated batches and is NaN for
    a batch without any. Trainer's own evaluation weighs batches by their rows, whatever number of words each of them has.
    """

    def __init__(self, *args, **kwargs):
        measures = {"compute_metrics": measures_of_words, "preprocess_logits_for_metrics": guesses_and_losses}
        super().__init__(*args, compute_loss_func=loss_of_words, **measures, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in Trainer, with a loss over words."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = output.metrics.pop(f"{metric_key_prefix}_loss_of_words")
        return output


def loss_of_words(output: Any, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Cross-entropy over the words of this batch, divided by the number of those of all accumulated batches."""
    return masked_lm_loss(output["logits"], labels, num_items_in_batch)


def guesses_and_losses(logits: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, vocabulary) -> each place's likeliest word and loss, (B, T) both, so that Trainer need not keep the logits."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    masked = labels != -100
    losses = torch.zeros(labels.shape, device=logits.device)
    losses[masked] = F.cross_entropy(logits[masked].float(), labels[masked], reduction="none")
    return logits.argmax(-1), losses


def measures_of_words(prediction: Any) -> dict[str, float]:
    """Of the masked words alone: the share whose likeliest guess is right, and their mean loss."""
    guesses, losses = prediction.predictions
    masked = prediction.label_ids != -100
    right = (guesses == prediction.label_ids)[masked]
    return {"accuracy": float(right.mean()), "loss_of_words": float(losses[masked].mean(dtype=np.float64))}
