"""Deleting what an explanation calls important changes a trained model's prediction more than deleting anything else."""

import pytest
import torch
from common.families import ROWS

from explain.keyword_task import keyword_texts, new_classifier, trained_classifier, word_tokenizer
from hf_linear_attn.explain import faithfulness, importance


@pytest.mark.parametrize(
    ("family", "method"), [("leap", "focus"), pytest.param("danet-encoder", "received", marks=pytest.mark.slow)]
)
def test_top_tokens_of_a_trained_model_matter_more_than_random_ones(family, method):
    model, accuracy = trained_classifier(family)
    assert accuracy > 0.9
    texts = keyword_texts(40)
    found = faithfulness(model, word_tokenizer(), texts, share=0.1)
    assert found.method == method
    assert found.texts == 40
    assert found.top > 2 * found.random
    assert found.random > found.bottom or found.bottom < 0.1
    low, high = found.interval()
    assert 0 < low < found.top - found.random < high
    assert found.wins > 0.65
    # the words that decide are among the two of twenty that are deleted far more often than by chance
    hits = [
        sum(
            name in {"w3", "w4", "w5", "w6", "w7", "w8"}
            for name, _, _ in importance(model, word_tokenizer(), text).top(2)
        )
        for text in texts
    ]
    assert sum(hits) / len(hits) > 0.8, "chance is 0.2"


def test_changes_are_those_of_masked_tokens():
    """Deleting a token is masking it: the same figures from `attention_mask`."""
    model, text = new_classifier("leap"), keyword_texts(1)[0]
    tokenizer = word_tokenizer()
    found = faithfulness(model, tokenizer, [text], share=0.25, draws=1)
    shown = importance(model, tokenizer, text)
    free = shown.scores[:-1]  # the last token stays
    order = free.argsort(descending=True)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]

    def without(places):
        mask = torch.ones_like(ids)
        mask[0, places] = 0
        with torch.no_grad():
            return model(ids, attention_mask=mask).logits.softmax(-1)[0]

    for places, change in ((order[:5], found.top), (order[-5:], found.bottom)):
        expected = (without(places) - without([])).abs().sum() / 2
        assert change == pytest.approx(float(expected), abs=1e-5)
    assert found.top_of_text == [found.top]
    assert found.ratio == pytest.approx(found.top / found.random)


def test_a_language_model_is_measured_by_its_next_token():
    row = next(row for row in ROWS if row.name == "leap")
    found = faithfulness(
        row.build("AutoModelForCausalLM"), word_tokenizer(), keyword_texts(3), method="rollout", seed=1
    )
    assert found.method == "rollout"
    assert 0 < found.random < 1
    assert 0 <= found.wins <= 1


def test_what_cannot_be_compared_is_refused():
    tokenizer, texts = word_tokenizer(), keyword_texts(1)
    rows = {row.name: row for row in ROWS}
    with pytest.raises(ValueError, match="list of at least one"):
        faithfulness(new_classifier("leap"), tokenizer, texts[0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        faithfulness(new_classifier("leap"), tokenizer, texts, share=20)
    with pytest.raises(ValueError, match="too few to compare"):
        faithfulness(new_classifier("leap"), tokenizer, ["w9 w9"])
    with pytest.raises(ValueError, match="predicts nothing"):
        faithfulness(rows["leap"].build("AutoModel"), tokenizer, texts)
    with pytest.raises(ValueError, match="not for the text"):
        faithfulness(rows["leap"].build("AutoModelForTokenClassification"), tokenizer, texts)
