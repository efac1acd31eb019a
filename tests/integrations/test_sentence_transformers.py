"""sentence-transformers embeds texts with a saved folder of every family, SEA over a pretrained encoder included."""

import pytest
import torch
from common.tiny import one_row_a_family, word_tokenizer

sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs pip install sentence-transformers")
TEXTS = ["w5 w6 w7 w8", "w9", "w5 w6 w7 w8 w9 w10 w11 w12"]


def saved(model, folder):
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@one_row_a_family
def test_texts_are_embedded(row, tmp_path):
    """Means over the real tokens of the body's last hidden states, whatever else is in the batch; the same after saving."""
    body = row.build("AutoModel")
    embedder = sentence_transformers.SentenceTransformer(saved(body, tmp_path / "model"), device="cpu")
    found = embedder.encode(TEXTS, convert_to_tensor=True)
    for text, embedding in zip(TEXTS, found):
        ids = word_tokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = body(input_ids=ids).last_hidden_state.mean(1)[0]
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-4)
    embedder.save(str(tmp_path / "again"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), found)


@one_row_a_family
def test_pairs_are_scored(row, tmp_path):
    """A classifier with one label as a cross-encoder."""
    model = row.build("AutoModelForSequenceClassification", num_labels=1)
    scorer = sentence_transformers.CrossEncoder(saved(model, tmp_path), device="cpu", num_labels=1)
    found = scorer.predict([("w5 w6", "w7"), ("w8", "w9 w10 w11")], convert_to_tensor=True)
    assert found.shape == (2,)
    assert found.isfinite().all()
