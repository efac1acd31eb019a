"""Question answering as a pipeline: Transformers 5 keeps the heads, but its `pipeline()` refuses the task."""

import os
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, Pipeline

from .hub.safe_weights import from_safetensors

LONGEST = 384  # tokens of a question with a part of its context, where the model has no limit of its own


class QuestionAnsweringPipeline(Pipeline):
    """Answers questions by a part of their context.

        >>> answer = QuestionAnsweringPipeline.from_pretrained("user/model")
        >>> answer(question="Who wrote it?", context="It was written by Jefferson.")
        {"score": 0.9, "start": 18, "end": 27, "answer": "Jefferson"}

    A context longer than the model is read in overlapping windows; the best answer of all of them counts. The score is the
    probability of the span among all that begin and end in the context and have at most `max_answer_len` tokens.

    Args of a call:
        question, context (`str` or `list` of `str`): or a dictionary (or list of them) with these two keys.
        top_k (`int`, defaults to 1): how many answers; a list if more than 1.
        max_answer_len (`int`, defaults to 15): longest answer in tokens.
        max_seq_len (`int`, *optional*): tokens of a window, question included; the model's limit, at most 384.
        doc_stride (`int`, *optional*): tokens that neighbouring windows share; a quarter of a window.

    Raises:
        ValueError: no question or context, or a limit outside its range.
    """

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, device: str | int | None = None, **kwargs):
        """Model and tokenizer from a folder or the Hub; other arguments as of `AutoModelForQuestionAnswering`."""
        model = from_safetensors(AutoModelForQuestionAnswering, name, **kwargs)
        return cls(model=model, tokenizer=AutoTokenizer.from_pretrained(name), device=device)

    def _sanitize_parameters(self, top_k=None, max_answer_len=None, max_seq_len=None, doc_stride=None, **unknown):
        if unknown:
            raise ValueError(f"unknown argument(s) {sorted(unknown)} of the question-answering pipeline")
        for name, value in (("top_k", top_k), ("max_answer_len", max_answer_len), ("max_seq_len", max_seq_len)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if doc_stride is not None and doc_stride < 0:
            raise ValueError(f"`doc_stride` must be at least 0, got {doc_stride}: it is what windows share")
        reading = {"max_seq_len": max_seq_len, "doc_stride": doc_stride}
        answering = {"top_k": top_k, "max_answer_len": max_answer_len}
        return (
            {name: value for name, value in reading.items() if value is not None},
            {},
            {name: value for name, value in answering.items() if value is not None},
        )

    def __call__(self, inputs=None, *, question=None, context=None, batch_size=None, **kwargs):
        """See the class. Each text's windows are a batch, so `batch_size` changes nothing."""
        if inputs is None:
            several = isinstance(question, list)
            if several != isinstance(context, list) or (several and len(question) != len(context)):
                raise ValueError("`question` and `context` must be two strings, or two lists of equal length")
            pairs = zip(question, context) if several else [(question, context)]
            inputs = [{"question": q, "context": c} for q, c in pairs]
            inputs = inputs if several else inputs[0]
        return super().__call__(inputs, **kwargs)

    def preprocess(self, inputs: dict[str, str], max_seq_len: int | None = None, doc_stride: int | None = None):
        """Windows of question and context, as one batch."""
        for name in ("question", "context"):
            if not isinstance(inputs.get(name), str) or not inputs[name].strip():
                raise ValueError(f"`{name}` must be a text, got {inputs.get(name)!r}")
        limit = getattr(self.model.config, "max_position_embeddings", None) or LONGEST
        length = max_seq_len or min(limit, LONGEST)
        texts = inputs["question"], inputs["context"]
        # Cut by hand: tokenizers 0.23.1, which Transformers 5.17 allows, loses what a truncation leaves over.
        encoded = self.tokenizer(*texts, return_offsets_mapping=True, return_token_type_ids=False, verbose=False)
        parts = encoded.sequence_ids()
        if 1 not in parts:
            raise ValueError(f"no token of `context` is left by the tokenizer: {inputs['context']!r}")
        first, last = parts.index(1), len(parts) - parts[::-1].index(1)
        before, after = list(range(first)), list(range(last, len(parts)))
        room = length - len(before) - len(after)
        if room < 1:
            raise ValueError(
                f"the question has {parts.count(0)} tokens, which leaves no room for a context in {length}"
            )
        step = room - min(room - 1, room // 4 if doc_stride is None else doc_stride)
        begins = range(first, max(first, last - room) + step, step)
        windows = [[*before, *range(begin, min(begin + room, last)), *after] for begin in begins]
        rows = {"input_ids": [[encoded["input_ids"][i] for i in window] for window in windows]}
        padded = self.tokenizer.pad(rows, return_tensors="pt")
        real = padded["attention_mask"].bool()
        inside = torch.zeros_like(real)
        offsets = torch.zeros(*real.shape, 2, dtype=torch.long)
        inside[real] = torch.tensor([parts[i] == 1 for window in windows for i in window])
        offsets[real] = torch.tensor([encoded["offset_mapping"][i] for window in windows for i in window])
        return {"inputs": dict(padded), "offsets": offsets, "inside": inside, "context": inputs["context"]}

    def _forward(self, model_inputs: dict[str, Any]):
        output = self.model(**model_inputs.pop("inputs"))
        return model_inputs | {"start": output.start_logits, "end": output.end_logits}

    def postprocess(self, found: dict[str, Any], top_k: int = 1, max_answer_len: int = 15):
        """The likeliest spans of the context, as characters of it."""
        inside, offsets = found["inside"].cpu(), found["offsets"].cpu()
        start = found["start"].float().cpu().masked_fill(~inside, -torch.inf)
        end = found["end"].float().cpu().masked_fill(~inside, -torch.inf)
        spans = start[:, :, None] + end[:, None, :]  # (windows, first token, last token)
        allowed = torch.ones_like(spans[0], dtype=torch.bool).triu().tril(max_answer_len - 1)
        flat = spans.masked_fill(~allowed, -torch.inf).flatten().softmax(0)
        answers: dict[tuple[int, int], float] = {}
        count, length = spans.shape[0] * spans.shape[1] * spans.shape[2], spans.shape[1]
        for place in flat.argsort(descending=True)[: min(count, top_k * spans.shape[0])].tolist():
            if flat[place] == 0:  # only spans that are not allowed are left
                break
            window, rest = divmod(place, length * length)
            first, last = divmod(rest, length)
            where = (int(offsets[window, first, 0]), int(offsets[window, last, 1]))
            answers[where] = answers.get(where, 0.0) + flat[place].item()  # the same words in two windows
        best = sorted(answers.items(), key=lambda item: -item[1])[:top_k]
        made = [{"score": s, "start": a, "end": b, "answer": found["context"][a:b]} for (a, b), s in best]
        return made[0] if top_k == 1 else made
