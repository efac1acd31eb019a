"""Question answering, whose pipeline this package brings since Transformers has none: the spans that the logits prefer."""

from itertools import pairwise

import pytest
import torch
from common.families import ROWS
from common.tiny import word_tokenizer

from hf_linear_attn.pipelines import QuestionAnsweringPipeline

HEAD = "AutoModelForQuestionAnswering"
CONTEXT = "w30 w31 w32 w33 w34 w35 w36"
rows = pytest.mark.parametrize(
    "row", [r for r in ROWS if (r.traced or not r.causal) and HEAD in r.heads()], ids=lambda row: row.name
)


def build(row, **changes):
    """A pipeline on a tiny model."""
    return QuestionAnsweringPipeline(
        model=row.build(HEAD, **changes),
        tokenizer=word_tokenizer(),
    )


@rows
def test_answers_are_those_of_the_logits(row):
    """The best span of the context, by its start's and end's logits, with its probability; as characters of the context."""
    answerer = build(row)
    found = answerer(question="w5 w6", context=CONTEXT, top_k=3, max_answer_len=4)
    words = CONTEXT.split()
    with torch.no_grad():
        output = answerer.model(
            **answerer.tokenizer("w5 w6", CONTEXT, return_tensors="pt", return_token_type_ids=False)
        )
    start, end = output.start_logits[0, 2:], output.end_logits[0, 2:]
    spans = {(i, j): float(start[i] + end[j]) for i in range(7) for j in range(i, min(i + 4, 7))}
    total = torch.tensor(list(spans.values())).logsumexp(0)
    best = sorted(spans.items(), key=lambda item: -item[1])[:3]
    assert [each["answer"] for each in found] == [" ".join(words[i : j + 1]) for (i, j), _ in best]
    assert [each["score"] for each in found] == pytest.approx([float((s - total).exp()) for _, s in best], abs=1e-5)
    assert all(CONTEXT[each["start"] : each["end"]] == each["answer"] for each in found)


@rows
def test_lists_and_dictionaries(row):
    """Several questions give what each gives alone, however they are written."""
    answerer = build(row)
    questions, contexts = ["w5 w6", "w7"], [CONTEXT, "w40 w41 w42"]
    together = answerer(question=questions, context=contexts)
    assert together == answerer([{"question": q, "context": c} for q, c in zip(questions, contexts)])
    for found, question, context in zip(together, questions, contexts):
        alone = answerer(question=question, context=context)
        assert found["answer"] == alone["answer"]
        assert found["score"] == pytest.approx(alone["score"], abs=1e-5)


@rows
def test_long_contexts_are_read_in_windows(row):
    """Every part of a context longer than a window can be the answer."""
    answerer = build(row)
    context = " ".join(f"w{30 + i}" for i in range(34))  # words that do not begin with w2, the unknown one
    found = answerer(question="w5", context=context, max_seq_len=16, top_k=400, max_answer_len=1)
    assert {each["answer"] for each in found} == set(context.split())
    assert sum(each["score"] for each in found) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("stride", [0, 1, 5, 100])
def test_windows_share_what_was_asked_for(stride):
    """Whole context, in order, each window filled but the last; a stride as long as a window leaves one new token."""
    answerer = build(ROWS[0])
    words = [f"w{30 + i}" for i in range(34)]
    found = answerer.preprocess({"question": "w5", "context": " ".join(words)}, max_seq_len=16, doc_stride=stride)
    windows = [ids[inside].tolist() for ids, inside in zip(found["inputs"]["input_ids"], found["inside"])]
    shared, expected = min(stride, 14), answerer.tokenizer(" ".join(words))["input_ids"]
    assert windows[0] + [token for window in windows[1:] for token in window[shared:]] == expected
    assert {len(window) for window in windows[:-1]} == {15}
    assert all(later[:shared] == window[15 - shared :] for window, later in pairwise(windows))


def test_from_a_folder(tmp_path):
    """Model and tokenizer by name."""
    answerer = build(ROWS[0])
    answerer.save_pretrained(tmp_path)
    again = QuestionAnsweringPipeline.from_pretrained(tmp_path)
    assert again(question="w5", context=CONTEXT) == answerer(question="w5", context=CONTEXT)


def test_what_cannot_be_answered():
    """The argument, and what it should be."""
    answerer = build(ROWS[0])
    for arguments, message in (
        ({"question": "w5", "context": " "}, "`context` must be a text"),
        ({"question": ["w5"], "context": CONTEXT}, "equal length"),
        ({"question": "w5", "context": CONTEXT, "top_k": 0}, "`top_k`"),
        ({"question": " ".join(["w5"] * 30), "context": CONTEXT, "max_seq_len": 20}, "30 tokens"),
        ({"question": "w5", "context": CONTEXT, "topk": 2}, "topk"),
        ({"question": "w5", "context": CONTEXT, "doc_stride": -1}, "`doc_stride`"),
    ):
        with pytest.raises(ValueError, match=message):
            answerer(**arguments)
