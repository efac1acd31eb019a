"""The loss of a language model with a vocabulary of 50,257: from hidden states (N, 768) to a number, and back, in bfloat16.

"length" is N, the tokens of a step. Peers: logits kept and PyTorch's cross-entropy in float32 (what Transformers does), and
liger-kernel's fused linear cross-entropy where that is installed.
"""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F

from ..harness import Case, Work, device, relative_error
from ..private import private

LENGTHS = (8192, 32768, 65536)
WIDTH, VOCABULARY, QUICK_VOCABULARY = 768, 50257, 50


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"unit": "ktokens_per_s", "dtype": "bfloat16", "vocab_size": VOCABULARY, "hidden_size": WIDTH}


def fused(hidden, weight, labels):
    """Ours, opt-in: `config.fused_linear_cross_entropy`."""
    return private("linear_cross_entropy")(hidden, weight, None, labels)


def kept(hidden, weight, labels):
    """Ours, default: logits kept."""
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = weight
    return private("cross_entropy")(private("vocabulary_logits")(linear, hidden[None])[0], labels)


def plain(hidden, weight, labels):
    """Logits raised to float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def liger(hidden, weight, labels):
    """liger-kernel's."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


LOSSES = {
    "ours, fused with the product": fused,
    "ours, logits kept": kept,
    "PyTorch, float32 logits": plain,
    "liger-kernel, fused": liger,
}


def inputs(rows: int, vocabulary: int, dtype=torch.bfloat16):
    """Hidden states, output matrix, labels."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, WIDTH, device=device(), dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, WIDTH, device=device()) * WIDTH**-0.5).to(dtype)
    return hidden, torch.nn.Parameter(weight), torch.randint(0, vocabulary, (rows,), device=device())


def make(loss, rows: int, vocabulary: int) -> Work:
    """Forward and backward."""
    hidden, weight, labels = inputs(rows, vocabulary)

    def step():
        hidden.grad = weight.grad = None
        loss(hidden, weight, labels).backward()

    return Work(step, rows)


def check(loss, vocabulary: int) -> tuple[float, float]:
    """The hidden states' gradient against float32, beside PyTorch's in bfloat16."""
    found = []
    hidden, weight, labels = (x.detach() for x in inputs(1024, vocabulary))
    for function, dtype in ((loss, torch.bfloat16), (plain, torch.bfloat16), (plain, torch.float32)):
        h, w = (torch.nn.Parameter(x.to(dtype)) for x in (hidden, weight))
        function(h, w, labels).backward()
        found.append(torch.cat([h.grad.flatten() / h.grad.norm(), w.grad.flatten() / w.grad.norm()]))
    return relative_error(found[0], found[2]), 2 * relative_error(found[1], found[2]) + 1e-6


def cases(suite: str, lengths: list[int], quick: bool) -> list[Case]:
    """All contenders at all sizes."""
    made, vocabulary = [], QUICK_VOCABULARY if quick else VOCABULARY
    for rows in lengths or ([16] if quick else LENGTHS):
        for name, loss in LOSSES.items():
            if loss is not liger or importlib.util.find_spec("liger_kernel"):
                gate = partial(check, loss, vocabulary) if name.startswith("ours") else None
                made.append(Case(name, rows, partial(make, loss, rows, vocabulary), gate))
    return made
