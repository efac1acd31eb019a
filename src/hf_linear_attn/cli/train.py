"""`hf-linear-attn train`: one training run from the command line."""

import sys

from ..families import sized
from ..training.options import TrainingOptions
from .parser import Parser
from .quiet import begin_work
from .result import show, words_aside

DESCRIPTION = """\
Train a model on text with Trainer: a causal language model, an encoder that guesses masked words (--task mlm), or a
classifier of texts (--task classification), from new weights or from a checkpoint.

The output folder receives the model and its tokenizer (the Auto class of the task loads it), checkpoints,
learning_curve.png and .json, and training_report.json with perplexity and bits per byte (mlm: share of words guessed;
classification: accuracy and macro F1), tokens per second and peak memory.
Without --data or --dataset the text is the State of the Union speeches."""

EXAMPLES = """\
examples:
  hf-linear-attn train --steps 300 --output outputs/leap
      a small LEAP with the default windows (global, 4, 8, 16) on the speeches
  hf-linear-attn train --family gpt2 --steps 300 --output outputs/gpt2
      GPT-2 of the same size on the same batches
  hf-linear-attn train --family danet --causal --num-hidden-layers 5 --steps 300 --output outputs/danet
      a causal DANet of the same size on the same batches
  hf-linear-attn train --task mlm --family danet --block-length 128 --batch-size 16 --output outputs/danet-mlm
  hf-linear-attn train --task classification --data r8 --from-checkpoint outputs/danet-mlm --block-length 128 \\
      --batch-size 16 --epochs 3 --output outputs/danet-r8
      masked words on the speeches, then topics of Reuters messages; --family bert gives BERT's figures
  hf-linear-attn train --data book.txt --hidden-size 256 --num-hidden-layers 6 --num-attention-heads 4 \\
      --windows global,4,8,16,32,global --epochs 3 --precision bfloat16 --output outputs/book
  hf-linear-attn train --resume --output outputs/book
      go on where Ctrl-C, a kill or a crash ended the run, with the same loss curve
  hf-linear-attn generate outputs/book "It was a"
"""


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="hf-linear-attn train", description=DESCRIPTION, epilog=EXAMPLES)
    made.add_dataclass(TrainingOptions)
    made.add_json()
    return made


def run(arguments: list[str]) -> int:
    """Parse, train, print the result. Exit codes: 0, 2 for a wrong value, 130 or 143 after Ctrl-C or SIGTERM (resume
    continues).
    """
    command = parser()
    given = command.parse(arguments)
    as_json = given.pop("json", False)
    try:
        options = TrainingOptions.for_resume(given) if given.get("resume") else TrainingOptions(**given)
    except (ValueError, TypeError) as error:
        command.error(str(error))
    begin_work()
    from ..training.language_modeling import TrainingInterrupted, train_language_model

    if options.task == "classification":
        from ..training.classification import train_classifier as train
    else:
        train = train_language_model

    try:
        with words_aside(as_json):
            report = train(options)
    except TrainingInterrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 128 + stop.signal_number
    about = f"{summary(report)}\n{length_line(report)}"
    text = f"\n{about}\n\nmodel, curve and report: {options.output}\ntry it: {next_command(options)}"
    show(report | {"output": options.output}, text, as_json)
    return 0


def length_line(report: dict) -> str:
    """How long its texts may be: what a model with learned positions cannot do is said where it is made."""
    longest = report.get("longest_text")
    if longest is None:
        return "no limit of length: its positions are not learned"
    family = sized().get(report["family"])
    way_out = " (--position-embedding rotary has no such limit)" if family and "rotary" in family.positions else ""
    return f"texts end at {longest:,} tokens: its positions are learned{way_out}"


def next_command(options: TrainingOptions) -> str:
    """What a user may do with the model of that run."""
    if options.task == "causal-lm":
        words = "The beginning of a text" if options.data or options.dataset else "The people of the United States"
        return f'hf-linear-attn generate {options.output} "{words}"'
    if options.task == "mlm":
        return f"hf-linear-attn train --task classification --data speeches --from-checkpoint {options.output} --output FOLDER"
    return f"transformers.pipeline('text-classification', {options.output!r})('A text.')"


def summary(report: dict) -> str:
    """Result of a run in three lines."""
    test, validation = report["test"], report["validation"]
    if report.get("task") == "classification":
        speed = report["texts_per_second"]
        return (
            f"test: accuracy {test['accuracy']:.4f}, macro F1 {test['macro_f1']:.4f} "
            f"(validation: {validation['accuracy']:.4f}, {validation['macro_f1']:.4f})\n"
            f"{report['steps']} steps, {report['training_texts']:,} texts in {report['training_seconds']:.0f} s"
            + (f", {speed:,.1f} texts per second" if speed else "")
            + f", peak memory {report['peak_memory_mb']:.0f} MiB\n"
            f"{report['family']}, {report['parameters']:,} parameters"
        )
    speed = report["tokens_per_second"]
    kind = (
        ("accuracy", "{:.3f} of the masked words") if "accuracy" in test else ("bits_per_byte", "{:.3f} bits per byte")
    )
    name, words = kind
    return (
        f"test: perplexity {test['perplexity']:.1f}, {words.format(test[name])} "
        f"(validation: {validation['perplexity']:.1f}, {validation[name]:.3f})\n"
        f"{report['steps']} steps, {report['training_tokens']:,} tokens in {report['training_seconds']:.0f} s"
        + (f", {speed:,.0f} tokens per second" if speed else "")
        + f", peak memory {report['peak_memory_mb']:.0f} MiB\n"
        f"{report['family']}, {report['parameters']:,} parameters"
    )
