"""Bits per byte: a language model's loss per byte of UTF-8 text, which does not depend on the tokenizer."""

import math

import datasets
import evaluate

DESCRIPTION = "Negative log-likelihood of texts in bits, divided by their length in UTF-8 bytes; lower is better."
INPUTS = """
Args:
    predictions: for each text the summed negative log-likelihood of its tokens, in nats (loss times predicted tokens).
    references: the texts.
Returns:
    bits_per_byte: total bits / total bytes.
    byte_perplexity: 2 ** bits_per_byte.
Example:
    >>> metric = evaluate.load(metric_path("bits_per_byte"))
    >>> metric.compute(predictions=[math.log(2) * 8], references=["four"])["bits_per_byte"]
    2.0
"""


class BitsPerByte(evaluate.Metric):
    """See DESCRIPTION."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references):
        length = sum(len(text.encode()) for text in references)
        if length == 0:
            raise ValueError("`references` hold no text: bits per byte need at least one byte")
        bits = sum(predictions) / math.log(2) / length
        return {"bits_per_byte": bits, "byte_perplexity": 2**bits if bits < 1024 else math.inf}
