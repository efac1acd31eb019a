"""`hf-linear-attn explain`: which tokens of a text a model looks at."""

import os
import sys
from dataclasses import replace
from typing import Any

from ..packaged import PACKAGED_MODEL
from ..terminal_text import printable
from ..training.number_range import COUNT, NumberRange
from ..training.options import path
from .parser import Parser, one_of
from .quiet import begin_work
from .result import show

DESCRIPTION = """\
Show how much each token of a text counts for a model: in colours here, and as a page with --html. The numbers come from the
layers' own focus weights (LEAP, Fastformer) or attention rows; 1 is the average token.
"""

EXAMPLES = """\
examples:
  hf-linear-attn explain outputs/leap "The people of the United States"
  hf-linear-attn explain outputs/leap "We hold these truths" --html truths.html
  hf-linear-attn explain my-classifier "What a dreadful film." --method rollout --top 3 --json
"""

METHODS = ("auto", "focus", "received", "rollout")


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="hf-linear-attn explain", description=DESCRIPTION, epilog=EXAMPLES)
    made.add_checkpoint("folder or Hub name of a model of one of our families")
    made.add_text("text", help="text to explain")
    made.add_argument(
        "--method", type=one_of(METHODS), default="auto", metavar="|".join(METHODS),
        help="focus weights, attention received, or its flow through all layers (default: what fits the model)",
    )  # fmt: skip
    made.add_number("--top", int, COUNT, "tokens in the list below (default: 10)", 10)
    made.add_argument("--html", type=path, metavar="FILE", help="also write a page")
    made.add_number("--width", int, NumberRange(least=24, most=10_000), "columns of the terminal (default: 100)", 100)
    made.add_device()
    made.add_json()
    return made


def run(arguments: list[str]) -> int:
    """Parse, load, explain. Exit codes: 0, 1 for a model or text that cannot be explained, 2 for a wrong call."""
    command = parser()
    given = command.parse(arguments)
    begin_work(given["checkpoint"])
    from ..explain import importance
    from ..hub.cards import load_with_its_head
    from ..hub.loading import load_tokenizer

    model = load_with_its_head(given["checkpoint"]).to(given["device"]).eval()
    found = importance(model, load_tokenizer(given["checkpoint"]), given["text"], method=given["method"])
    name = os.path.basename(PACKAGED_MODEL) if given["checkpoint"] == PACKAGED_MODEL else given["checkpoint"]
    found = replace(found, model_name=f"{name} ({type(model).__name__})")
    result: dict[str, Any] = {
        "method": found.method,
        "tokens": found.tokens,
        "scores": [round(score, 6) for score in found.scores.tolist()],
        "top": [{"token": token, "score": score, "position": place} for token, score, place in found.top(given["top"])],
    }
    if given["html"]:
        result["html"] = str(found.save_html(given["html"]))
    best = "\n".join(f"{each['score']:8.2f}  {printable(each['token'])}" for each in result["top"])
    special = sorted({token for token, left_out in zip(found.tokens, found.read.special.tolist()) if left_out})
    if special:
        best += f"\n(without {', '.join(map(printable, special))}, which have {found.special_share:.0%} of the sum)"
    page = f"\n\npage: {printable(result['html'])}" if given["html"] else ""
    text = f"{found.to_terminal(given['width'], color=sys.stdout.isatty())}\n\n{best}{page}"
    show(result, text, given.get("json", False), coloured=True)
    return 0
