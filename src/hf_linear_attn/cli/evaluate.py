"""`hf-linear-attn evaluate`: what a checkpoint scores on a text or on labelled rows."""

from ..training.number_range import COUNT, LARGEST_INT, SEED, NumberRange
from ..training.options import path
from .parser import Parser, one_of
from .quiet import begin_work
from .result import show, words_aside

DESCRIPTION = """\
Measure a saved model, by what its head predicts:
  a language model        loss, perplexity and bits per byte (which compare models with different tokenizers)
  a masked language model the same of masked words, and how many of them it names
  a text classifier       accuracy and macro F1 on rows with the columns text and label

Without --data or --dataset the text is the State of the Union speeches' test split.
"""

EXAMPLES = """\
examples:
  hf-linear-attn evaluate
      the small LEAP that comes with the package, on the speeches' test split
  hf-linear-attn evaluate outputs/leap
  hf-linear-attn evaluate outputs/leap --data book.txt --json
  hf-linear-attn evaluate my-classifier --data test.csv
Tasks of the lm-evaluation-harness: lm_eval run --model hf --model_args pretrained=CHECKPOINT,trust_remote_code=True ...
"""


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="hf-linear-attn evaluate", description=DESCRIPTION, epilog=EXAMPLES)
    made.add_checkpoint("folder or Hub name of a saved model with its tokenizer")
    made.add_argument(
        "--data", nargs="+", type=path, default=[], metavar="FILE",
        help=".txt, .jsonl, .csv or .parquet; for a classifier also a set: speeches, spam-assassin, r8, bbc",
    )  # fmt: skip
    made.add_argument("--dataset", type=path, metavar="NAME", help="data set of the Hub instead of files")
    made.add_argument("--dataset-config", metavar="NAME", help="its configuration")
    made.add_argument(
        "--text-column", default="text", metavar="NAME", help="column that holds the text (default: text)"
    )
    made.add_argument("--join-rows", action="store_true", help="rows are lines of one text, not documents")
    made.add_argument(
        "--split",
        type=one_of(("train", "validation", "test")),
        metavar="train|validation|test",
        help="which part (default: test of the speeches and of --dataset, all of the files of --data)",
    )
    made.add_argument(
        "--label-column", default="label", metavar="NAME", help="column that holds the class (default: label)"
    )
    made.add_number(
        "--block-length",
        int,
        NumberRange(least=2, most=LARGEST_INT),
        "tokens in a row (default: the model's, at most 512)",
    )
    made.add_number("--batch-size", int, COUNT, "rows at a time (default: 4)", 4)
    made.add_number("--max-tokens", int, COUNT, "measure a sample of that many tokens (default: all)")
    made.add_number("--seed", int, SEED, "which words are masked (default: 0)", 0)
    made.add_device()
    made.add_json()
    return made


def run(arguments: list[str]) -> int:
    """Parse, load, measure. Exit codes: 0, 1 for a model or data that cannot be used, 2 for a wrong call."""
    command = parser()
    given = command.parse(arguments)
    if given["data"] and given["dataset"]:
        command.error("give --data or --dataset, not both")
    as_json = given.pop("json", False)
    begin_work(given["checkpoint"])
    from ..training.evaluation import evaluate_checkpoint

    with words_aside(as_json):
        result = evaluate_checkpoint(**given)
    shown = {k: v for k, v in result.items() if isinstance(v, int | float)}
    width = max(map(len, shown))
    rows = [f"{k:{width}}  {v:,}" if isinstance(v, int) else f"{k:{width}}  {v:.4g}" for k, v in shown.items()]
    show(result, "\n".join([f"{result['class']} on {result['data']}", *rows]), as_json)
    return 0
