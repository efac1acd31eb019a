"""The loss of a language model with a vocabulary of 50,257: from hidden states (N, 768) to a number, and back, in bfloat16.

"length" is N, the tokens of a step. Peers: logits kept and PyTorch's cross-entropy in float32 (what Transformers does), and
liger-kernel's fused linear cross-entropy where that is installed.
"""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F

from hf_linear_attn.modeling.cross_entropy import cross_entropy, linear_cross_entropy
from hf_linear_attn.modeling.vocabulary_logits import vocabulary_logits

from ..registry import Case, Work, device, relative_error

LENGTHS = (8192, 32768, 65536)
WIDTH, VOCABULARY = 768, 50257


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"unit": "ktokens_per_s", "dtype": "bfloat16", "vocab_size": VOCABULARY, "hidden_size": WIDTH}


def fused(hidden, weight, labels):
    """Ours, opt-in: `config.fused_linear_cross_entropy`."""
    return linear_cross_entropy(hidden, weight, None, labels)


def kept(hidden, weight, labels):
    """Ours, default: logits kept."""
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = weight
    return cross_entropy(vocabulary_logits(linear, hidden[None])[0], labels)


def plain(hidden, weight, labels):
    """Logits raised to float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def liger(hidden, weight, labels):
    """liger-kernel's."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def inputs(rows: int, dtype=torch.bfloat16):
    """Hidden states, output matrix, labels."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, WIDTH, device=device(), dtype=dtype, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH, device=device()) * WIDTH**-0.5).to(dtype)
    return hidden, torch.nn.Parameter(weight), torch.randint(0, VOCABULARY, (rows,), device=device())


def make(loss, rows: int) -> Work:
    """Forward and backward."""
    hidden, weight, labels = inputs(rows)

    def step():
        hidden.grad = weight.grad = None
        loss(hidden, weight, labels).backward()

    return Work(step, rows)


def check(loss) -> tuple[float, float]:
    """The hidden states' gradient against float32, beside PyTorch's in bfloat16."""
    found = []
    hidden, weight, labels = (x.detach() for x in inputs(1024))
    for function, dtype in ((loss, torch.bfloat16), (plain, torch.bfloat16), (plain, torch.float32)):
        h, w = (torch.nn.Parameter(x.to(dtype)) for x in (hidden, weight))
        function(h, w, labels).backward()
        found.append(torch.cat([h.grad.flatten() / h.grad.norm(), w.grad.flatten() / w.grad.norm()]))
    return relative_error(found[0], found[2]), 2 * relative_error(found[1], found[2]) + 1e-6


def cases(suite: str, lengths: list[int]) -> list[Case]:
    """All contenders at all sizes."""
    made = []
    for rows in lengths or LENGTHS:
        made.append(Case("ours, fused with the product", rows, partial(make, fused, rows), partial(check, fused)))
        made.append(Case("ours, logits kept", rows, partial(make, kept, rows), partial(check, kept)))
        made.append(Case("PyTorch, float32 logits", rows, partial(make, plain, rows)))
        if importlib.util.find_spec("liger_kernel"):
            made.append(Case("liger-kernel, fused", rows, partial(make, liger, rows)))
    return made
