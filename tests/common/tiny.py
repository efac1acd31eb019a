"""What the tests of this folder push and load: one row of the test matrix a family, and a tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.families import ROWS, VOCAB

FAMILY_ROWS = list({row.family: row for row in reversed(ROWS)}.values())[::-1]
one_row_a_family = pytest.mark.parametrize("row", FAMILY_ROWS, ids=[row.family for row in FAMILY_ROWS])
# Every head of every family: most by the family's first row, the others by the first row that has them.
EVERY_HEAD = list({(row.family, head): (row, head) for row in reversed(ROWS) for head in row.heads()}.values())[::-1]
every_head = pytest.mark.parametrize(("row", "head"), EVERY_HEAD, ids=[f"{r.family}-{h}" for r, h in EVERY_HEAD])
# For what takes a second each: two heads of every family in every run, the others among the slow tests.
OFTEN = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
two_heads_often = pytest.mark.parametrize(
    ("row", "head"),
    [pytest.param(r, h, id=f"{r.family}-{h}", marks=[pytest.mark.slow] * (h not in OFTEN)) for r, h in EVERY_HEAD],
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the rows' vocabulary: <pad>, <eos>, and words w2, w3, ..."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="w2", padding_side="left"
    )


def some_ids(length: int = 12) -> torch.Tensor:
    """A row of token ids (1, length) without padding."""
    return torch.arange(length)[None] * 7 % (VOCAB - 2) + 2


def first_output(model, **inputs) -> torch.Tensor:
    """The tensor that a body or a head is for: logits, or hidden states."""
    inputs = inputs or {"input_ids": some_ids()}
    if type(model).__name__.endswith("MultipleChoice"):
        inputs = {name: x[:, None].expand(-1, 2, -1) for name, x in inputs.items()}
    with torch.no_grad():
        return model(**inputs)[0]
