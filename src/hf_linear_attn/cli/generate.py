"""`hf-linear-attn generate`: continue a prompt with a trained model, word by word, and show what its memory of the
past costs.
"""

import os
import time

from ..packaged import PACKAGED_MODEL
from ..terminal_text import printable
from ..training.number_range import COUNT, SEED, NumberRange
from .parser import Parser
from .quiet import begin_work
from .result import show, words_aside

DESCRIPTION = """\
Continue a prompt with a model from a folder or the Hub, printing the text as it comes, then the size of the state
that the model carries and the tokens per second. A linear attention model's state does not grow with the text;
GPT-2's cache does.
"""

EXAMPLES = """\
examples:
  hf-linear-attn generate "My fellow citizens"
      with the small LEAP that comes with the package
  hf-linear-attn generate outputs/leap "The people of the United States"
  hf-linear-attn generate outputs/leap "My fellow citizens" --max-new-tokens 400 --temperature 0.7 --seed 3
  hf-linear-attn generate outputs/leap "We" --greedy
"""

# Classes saved for something else than writing; their body alone would write, without having learnt it.
ANSWER_HEADS = ("Classification", "ForQuestionAnswering", "ForMultipleChoice", "ForMaskedLM")


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="hf-linear-attn generate", description=DESCRIPTION, epilog=EXAMPLES)
    made.add_checkpoint("folder or Hub name of a causal language model")
    made.add_text("prompt", help="text to continue")
    made.add_number("--max-new-tokens", int, COUNT, "tokens to write (default: 120)", 120)
    made.add_number(
        "--temperature", float, NumberRange(least=1e-4, most=1e4, reason="--greedy takes the likeliest token"),
        "lower is safer (default: the model's own, else 0.8)",
    )  # fmt: skip
    made.add_number(
        "--top-p", float, NumberRange(above=0, most=1),
        "share of the probability to draw from (default: the model's own, else 0.95)",
    )  # fmt: skip
    made.add_argument("--greedy", action="store_true", help="always the likeliest token")
    made.add_number("--seed", int, SEED, "seed of the draws (default: 0)", 0)
    made.add_device()
    made.add_json()
    return made


def run(arguments: list[str]) -> int:
    """Parse, load, generate. Exit codes: 0, or 2 for a wrong value."""
    command = parser()
    given = command.parse(arguments)
    as_json = given.pop("json", False)
    checkpoint = given.pop("checkpoint")
    # os.path answers for any text; Path asks the system, which refuses a long one.
    if checkpoint == PACKAGED_MODEL and os.path.isfile(os.path.join(given["prompt"], "config.json")):
        command.error(f"{given['prompt']!r} is the folder of a model: give the text to continue after it")
    begin_work(checkpoint)
    model, tokenizer = load(checkpoint, given.pop("device"))
    with words_aside(as_json):
        result = write_text(model, tokenizer, given.pop("prompt"), **given)
    show(result, figures(result), as_json)
    return 0


def load(checkpoint: str, device: str):
    """Model and tokenizer through Transformers' Auto classes."""
    from transformers import AutoModelForCausalLM

    from ..hub.loading import load_model, load_tokenizer

    check_writes(checkpoint)
    return load_model(AutoModelForCausalLM, checkpoint).to(device).eval(), load_tokenizer(checkpoint)


def check_writes(checkpoint: str) -> None:
    """ValueError for a model that was saved for something else than writing, OSError where there is none."""
    from ..hub.loading import load_config, saved_class

    saved = saved_class(load_config(checkpoint)) or ""
    if saved.endswith(ANSWER_HEADS):
        raise ValueError(
            f"{checkpoint} holds a {saved}, which writes no text: give a causal language model, or call this one with "
            "`transformers.pipeline`"
        )


def _sampling(own, temperature: float | None, top_p: float | None, greedy: bool) -> dict:
    """How the next token is chosen, as arguments of generate(); `own` is the model's generation_config."""
    if greedy:
        return {"do_sample": False, "temperature": None, "top_p": None}
    temperature = temperature or (own.temperature if own.do_sample else None) or 0.8
    top_p = top_p or (own.top_p if own.do_sample else None) or 0.95
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def write_text(
    model,
    tokenizer,
    prompt: str,
    max_new_tokens: int = 120,
    temperature: float | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    seed: int = 0,
) -> dict:
    """Print prompt and continuation while it is made. Returns the text, tokens, seconds and state bytes at the start
    and end. Temperature and share not given are those of a model whose generation_config samples, else 0.8 and 0.95.

    ValueError where the model's learned positions end before the text would.
    """
    import torch
    from transformers import TextStreamer

    from ..hub.card_facts import position_limit
    from ..modeling.shared.compat import cache_keyword
    from ..modeling.shared.states.cache import RecurrentCache

    prompt = prompt or tokenizer.bos_token
    if not prompt:
        raise ValueError("the prompt is empty, and this tokenizer has no token that begins a text: give some words")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    limit = position_limit(model.config)
    if limit is not None and length + max_new_tokens > limit:
        raise ValueError(
            f"prompt ({length} tokens) and max_new_tokens={max_new_tokens} exceed the model's {limit} positions: "
            f"ask for at most {max(0, limit - length)} tokens (models without learned positions have no such limit)"
        )
    torch.manual_seed(seed)
    cache = RecurrentCache(config=model.config)
    with torch.no_grad():
        model(**inputs, use_cache=True, **cache_keyword(cache))
    bytes_after_prompt = cache.state_size()
    cache = RecurrentCache(config=model.config)

    class Printed(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    streamer = Printed(tokenizer, skip_special_tokens=True)
    start = time.perf_counter()
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id,
        **cache_keyword(cache),
        **_sampling(model.generation_config, temperature, top_p, greedy),
    )
    seconds = time.perf_counter() - start
    return {
        "text": tokenizer.decode(ids[0], skip_special_tokens=True),
        "new_tokens": ids.shape[1] - length,
        "prompt_tokens": length,
        "seconds": seconds,
        "state_bytes_after_prompt": bytes_after_prompt,
        "state_bytes": cache.state_size(),
    }


def figures(result: dict) -> str:
    """What the generation cost, in one line."""
    prompt, after = result["state_bytes_after_prompt"] / 1024, result["state_bytes"] / 1024
    return (
        f"\n{result['new_tokens']} tokens, {result['new_tokens'] / result['seconds']:.0f} per second; "
        f"state {prompt:.1f} KiB after the prompt of {result['prompt_tokens']} tokens, {after:.1f} KiB at the end"
    )
