"""A task whose answer lies in two words of a text, and tiny models that learn it in seconds."""

import torch
from common.families import ROWS, VOCAB
from sea.hosts import make_teacher
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_linear_attn.conversion import linearize

KEYWORDS = torch.tensor([[3, 4, 5], [6, 7, 8]])  # token ids that stand for class 0 and class 1
LENGTH = 20


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: <pad>, <eos>, <unk>, w3, w4, ... (that of `common.tiny` reads its unknown word w2 inside w20)."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def keyword_batch(size: int, generator: torch.Generator, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (size, length) of noise with two keywords of the label's class anywhere but at the end; labels (size,)."""
    ids = torch.randint(10, VOCAB, (size, length), generator=generator)
    labels = torch.randint(2, (size,), generator=generator)
    places = torch.rand(size, length - 1, generator=generator).argsort(-1)[:, :2]
    words = KEYWORDS[labels].gather(1, torch.randint(3, (size, 2), generator=generator))
    return ids.scatter(1, places, words), labels


def new_classifier(family: str):
    """An untrained classifier of two classes."""
    torch.manual_seed(0)
    if family == "sea":
        sizes = {"vocab_size": VOCAB, "num_labels": 2, "initializer_range": 0.1}
        host = make_teacher("bert", "AutoModelForSequenceClassification", **sizes)
        return linearize(host, "sea", k=4, predictor_length=16)
    row = next(row for row in ROWS if row.name == family)
    changes = {"num_hidden_layers": 2, "num_labels": 2}
    if row.family in ("leap", "fastformer"):
        changes |= {"layer_windows": [None, 4]}
    return row.build("AutoModelForSequenceClassification", **changes)


def trained_classifier(family: str, steps: int = 150):
    """The same after some steps of Adam; returns the model and its accuracy on new texts."""
    model, generator = new_classifier(family).train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        ids, labels = keyword_batch(32, generator, LENGTH - step % 6)  # so that a shorter text is nothing new
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    ids, labels = keyword_batch(256, torch.Generator().manual_seed(2))
    with torch.no_grad():
        accuracy = (model(input_ids=ids).logits.argmax(-1) == labels).float().mean()
    return model, float(accuracy)


def keyword_texts(count: int) -> list[str]:
    """New texts as strings, for `word_tokenizer`."""
    ids, _ = keyword_batch(count, torch.Generator().manual_seed(3))
    return [" ".join(f"w{token}" for token in row) for row in ids.tolist()]
