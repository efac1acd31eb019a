"""`transformers.pipeline` with our models and a real tokenizer: batches, padding, every task that our heads serve."""

import pytest
import torch
from common.families import CAUSAL, ROWS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

TEXT = "the state of union is strong and our people are good we will not give up"
WORDS = ["[PAD]", "[UNK]", "[SEP]", *TEXT.split()]
TEXTS = ["the state of the union", "we will not give up", "strong"]
rows = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name in ("leap", "fastformer", "fastformer-encoder")], ids=lambda row: row.name
)
causal = pytest.mark.parametrize(
    "row", [row for row in CAUSAL if row.name in ("leap", "fastformer")], ids=lambda row: row.name
)


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]", padding_side="left"
    )


@causal
def test_text_generation(row, tokenizer):
    """A padded batch writes what each text writes alone."""
    pipe = pipeline("text-generation", model=row.causal_lm(vocab_size=len(WORDS)), tokenizer=tokenizer)
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    together = [texts[0]["generated_text"] for texts in pipe(TEXTS, batch_size=3, **options)]
    assert together == [pipe(text, **options)[0]["generated_text"] for text in TEXTS]


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("text-classification", "AutoModelForSequenceClassification"),
        ("token-classification", "AutoModelForTokenClassification"),
        ("feature-extraction", "AutoModel"),
    ],
)
@rows
def test_a_batch_is_its_texts(row, task, head, tokenizer):
    pipe = pipeline(task, model=row.build(head, vocab_size=len(WORDS)), tokenizer=tokenizer)
    together = pipe(TEXTS, batch_size=3)
    for found, text in zip(together, TEXTS):
        alone = pipe(text)
        if task == "feature-extraction":
            found, alone = torch.tensor(found)[0], torch.tensor(alone)[0]
            torch.testing.assert_close(found[-len(alone) :], alone, atol=1e-5, rtol=1e-5)
        else:
            alone, found = (x if isinstance(x, list) else [x] for x in (alone, found))
            assert len(alone) == len(found)
            for a, b in zip(alone, found):
                assert a.keys() == b.keys()
                assert b["score"] == pytest.approx(a["score"], abs=1e-5)


@rows
def test_the_text_labels_agree(row, tokenizer):
    """`score` per label of the classifier: the pipeline's softmax of our logits."""
    model = row.build("AutoModelForSequenceClassification", vocab_size=len(WORDS))
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
    ids = tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        probability = model(**ids).logits.softmax(-1)[0]
    found = {entry["label"]: entry["score"] for entry in pipe(TEXTS[0], top_k=None)}
    assert found == pytest.approx({f"LABEL_{i}": float(p) for i, p in enumerate(probability)}, abs=1e-6)
