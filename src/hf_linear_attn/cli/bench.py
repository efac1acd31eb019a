"""`hf-linear-attn bench`: the speed of models on this machine, side by side."""

from typing import Any

from ..families import sized, tasks_of
from ..training.number_range import COUNT, LARGEST_INT, THREADS, NumberRange
from .parser import Parser, checkpoint, one_of
from .quiet import begin_work
from .result import show, words_aside

DESCRIPTION = """\
Measure tokens per second of reading a text, of a training step and of writing, and the bytes a model keeps of a text,
for saved models or for fresh ones of equal size. The models take turns, so that a busy machine slows all alike.
"""

EXAMPLES = """\
examples:
  hf-linear-attn bench
      a small LEAP and a GPT-2 of the same size at 128, 512 and 2048 tokens
  hf-linear-attn bench outputs/leap outputs/gpt2 --lengths 128 256 --json
  hf-linear-attn bench --families leap danet gpt2 --hidden-size 512 --num-hidden-layers 8 --device cuda --dtype bfloat16
"""

FAMILIES = tuple(name for name in sized() if "causal-lm" in tasks_of(name))
LENGTHS = [128, 512, 2048]
DTYPES = ("float32", "bfloat16", "float16")


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="hf-linear-attn bench", description=DESCRIPTION, epilog=EXAMPLES)
    made.add_argument("checkpoints", nargs="*", type=checkpoint, help="folders or Hub names of causal language models")
    made.add_argument(
        "--families", nargs="+", type=one_of(FAMILIES), default=None, metavar="NAME",
        help=f"fresh models instead, of {', '.join(FAMILIES)} (default: leap gpt2)",
    )  # fmt: skip
    numbers = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 4096}
    for name, default in numbers.items():
        about = f"of the fresh models (default: {default})"
        made.add_number("--" + name.replace("_", "-"), int, COUNT, about, default)
    made.add_number(
        "--lengths", int, NumberRange(least=2, most=LARGEST_INT),
        "tokens (default: those of 128 512 2048 that the models can read)", None,
        nargs="+",
    )  # fmt: skip
    made.add_number("--new-tokens", int, COUNT, "tokens to write (default: 32)", 32)
    made.add_number("--batch-size", int, COUNT, "texts at a time (default: 1)", 1)
    made.add_number("--rounds", int, COUNT, "how often to measure (default: 3)", 3)
    made.add_argument("--no-train", action="store_true", help="leave out the training step")
    made.add_device()
    made.add_argument(
        "--dtype", type=one_of(DTYPES), default="float32", metavar="|".join(DTYPES), help="numbers (default: float32)"
    )
    made.add_number("--threads", int, THREADS, "CPU threads (default: PyTorch's choice)")
    made.add_json()
    return made


def run(arguments: list[str]) -> int:
    """Parse, measure, print a table. Exit codes: 0, 1 for a model that cannot be measured, 2 for a wrong call."""
    command = parser()
    given = command.parse(arguments)
    if given["checkpoints"] and given["families"]:
        command.error("give checkpoints or --families, not both")
    begin_work(*given["checkpoints"])
    import torch

    from ..training.speed import compare_speed

    if given["threads"]:
        torch.set_num_threads(given["threads"])
    as_json = given.get("json", False)
    with words_aside(as_json):
        models = _models(given)
        lengths = given["lengths"] or _that_fit(models, given["new_tokens"])
        rows = compare_speed(
            models, lengths, given["batch_size"], given["new_tokens"], given["rounds"], not given["no_train"]
        )
    from ..hub.card_facts import machine

    about = {
        "machine": machine(),
        "dtype": given["dtype"],
        "batch_size": given["batch_size"],
        "rounds": given["rounds"],
    }
    about["parameters"] = {title: sum(p.numel() for p in model.parameters()) for title, model in models.items()}
    show(about | {"rows": rows}, f"{_table(rows)}\n\n{about['machine']}, {given['dtype']}", as_json)
    return 0


def _models(given: dict[str, Any]) -> dict[str, Any]:
    """Title -> model on its device, in its dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..hub.loading import load_model

    dtype = getattr(torch, given["dtype"])
    if given["checkpoints"]:
        return {
            name: load_model(AutoModelForCausalLM, name, dtype=dtype).to(given["device"])
            for name in given["checkpoints"]
        }
    return {name: _fresh(name, given).to(given["device"], dtype) for name in given["families"] or ("leap", "gpt2")}


def _that_fit(models: dict[str, Any], new_tokens: int) -> list[int]:
    """The usual lengths, without those that a model with learned positions cannot read."""
    from ..hub.card_facts import position_limit

    limits = {title: position_limit(model.config) for title, model in models.items()}
    longest = min((limit for limit in limits.values() if limit is not None), default=LARGEST_INT) - new_tokens
    fitting = [length for length in LENGTHS if length <= longest]
    if len(fitting) < len(LENGTHS):
        bounded = next(title for title, limit in limits.items() if limit is not None and limit - new_tokens == longest)
        print(f"texts of {bounded} end at {limits[bounded]:,} tokens: longer ones are left out")
    return fitting or [max(2, longest)]


def _fresh(family: str, given: dict[str, Any]):
    """A random model of a family, as `hf-linear-attn train` would start it."""
    from types import SimpleNamespace

    from transformers import AutoModelForCausalLM, set_seed

    from ..training.model_choice import build_config
    from ..training.options import TrainingOptions

    options = TrainingOptions(
        family=family, causal=bool(sized()[family].decoder), hidden_size=given["hidden_size"], vocab_size=given["vocab_size"],
        num_hidden_layers=given["num_hidden_layers"], num_attention_heads=given["num_attention_heads"],
        block_length=max(given["lengths"] or LENGTHS) + given["new_tokens"],
    )  # fmt: skip
    # All that a configuration takes of a tokenizer is its size and its special tokens.
    tokens = type("Vocabulary", (SimpleNamespace,), {"__len__": lambda self: given["vocab_size"]})
    set_seed(0)
    return AutoModelForCausalLM.from_config(
        build_config(options, tokens(pad_token_id=0, bos_token_id=1, eos_token_id=2))
    )


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'model':24} {'length':>7} {'job':>6} {'tokens/s':>12} {'quartiles':>21} {'kept of a text':>15}"]
    for row in rows:
        spread = " to ".join(f"{value:,.0f}" for value in row["quartiles"])
        lines.append(
            f"{row['model'][-24:]:24} {row['length']:7,} {row['job']:>6} {row['tokens_per_second']:12,.0f} {spread:>21} "
            f"{row['state_bytes'] / 1024:11,.1f} KiB"
        )
    return "\n".join(lines)
