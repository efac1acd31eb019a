"""`pipeline(...)` runs every family as it runs Transformers' own models: batched equals one by one."""

import pytest
import torch
from common.families import ROWS, first_rows
from common.tiny import FAMILY_ROWS, one_row_a_family, word_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, pipeline

TEXTS = ["w5 w9 w12", "w7", "w30 w31 w32 w33 w34 w35 w36 w37"]


def rows_with(head, rows=ROWS):
    return pytest.mark.parametrize("row", [row for row in rows if head in row.heads()], ids=lambda row: row.name)


def build(task, row, head, **changes):
    """A pipeline on a tiny model with the tests' tokenizer."""
    return pipeline(task, model=row.build(head, **changes), tokenizer=word_tokenizer())


@first_rows
def test_text_generation(row):
    """A batch of unequal prompts continues each as if it were alone, and as `generate` does."""
    generator = build("text-generation", row, "AutoModelForCausalLM")
    options = {"max_new_tokens": 5, "do_sample": False}
    alone = [generator(text, **options)[0]["generated_text"] for text in TEXTS]
    together = [found[0]["generated_text"] for found in generator(TEXTS, batch_size=3, **options)]
    assert together == alone
    ids = generator.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    generated = generator.model.generate(ids, pad_token_id=0, **options)
    expected = generator.tokenizer.decode(generated[0], skip_special_tokens=True)
    assert alone[0].replace(" ", "") == expected.replace(" ", "")


@first_rows
def test_text_generation_from_a_folder(row, tmp_path):
    """By the name of a folder alone; several samples a prompt."""
    row.causal_lm().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    generator = pipeline("text-generation", str(tmp_path))
    assert isinstance(generator.model, type(AutoModelForCausalLM.from_pretrained(tmp_path)))
    found = generator("w5 w9", max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert len(found) == 3
    assert all(each["generated_text"].startswith("w5 w9") for each in found)


@rows_with("AutoModelForMaskedLM")
def test_fill_mask(row):
    """The likeliest words for a gap are those of the head's logits."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "w3"})
    filler = pipeline("fill-mask", model=row.build("AutoModelForMaskedLM"), tokenizer=tokenizer)
    found = filler("w5 w3 w9 w12", top_k=4)
    with torch.no_grad():
        logits = filler.model(**tokenizer("w5 w3 w9 w12", return_tensors="pt")).logits
    expected = logits[0, 1].softmax(-1).topk(4)
    assert [each["token"] for each in found] == expected.indices.tolist()
    assert [each["score"] for each in found] == pytest.approx(expected.values.tolist(), abs=1e-5)


@one_row_a_family
def test_text_classification(row):
    """Scores of a batch equal those of each text alone."""
    classifier = build("text-classification", row, "AutoModelForSequenceClassification", num_labels=3)
    alone = [classifier(text, top_k=None) for text in TEXTS]
    together = classifier(TEXTS, batch_size=3, top_k=None)
    for one, many in zip(alone, together):
        assert [x["label"] for x in one] == [x["label"] for x in many]
        assert [x["score"] for x in one] == pytest.approx([x["score"] for x in many], abs=1e-5)


@rows_with("AutoModelForTokenClassification", FAMILY_ROWS)
def test_token_classification(row):
    """Every word gets its label, in a batch as alone."""
    tagger = build("token-classification", row, "AutoModelForTokenClassification", num_labels=3)
    options = {"ignore_labels": []}
    alone = [tagger(text, **options) for text in TEXTS]
    together = tagger(TEXTS, batch_size=3, **options)
    for text, one, many in zip(TEXTS, alone, together):
        assert [x["word"] for x in one] == text.split()
        assert [(x["word"], x["entity"], x["start"]) for x in one] == [
            (x["word"], x["entity"], x["start"]) for x in many
        ]
        assert [x["score"] for x in one] == pytest.approx([x["score"] for x in many], abs=1e-5)


@one_row_a_family
def test_feature_extraction(row):
    """Hidden states of the body."""
    extractor = build("feature-extraction", row, "AutoModel")
    ids = extractor.tokenizer(TEXTS[2], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = extractor.model(ids).last_hidden_state
    torch.testing.assert_close(torch.tensor(extractor(TEXTS[2])), expected)
    assert isinstance(extractor.model, AutoModel._model_mapping[type(extractor.model.config)])
