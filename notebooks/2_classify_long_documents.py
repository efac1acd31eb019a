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
# # 2. Fine-tune DANet to classify long documents
#
# **You will see** a small DANet encoder first read (masked words), then learn to tell from which age a president's message
# comes, the 1790s, the 1860s or the 1940s; which ages it takes for which; how its accuracy depends on how much of a message it
# may read; and what long documents cost, beside a BERT of the same size.
#
# **It takes** about two minutes on two CPU cores. `NOTEBOOK_STEPS=400` trains longer.

# %%
import os
import tempfile
import time

import matplotlib.pyplot as plt
import torch
import transformers
from datasets import Dataset
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_linear_attn import DanetConfig
from hf_linear_attn.training.text_data import EXCERPT_FOLDER, split_of_speech
from hf_linear_attn.training.tokenized_text import train_bpe_tokenizer

transformers.logging.set_verbosity_error()
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 160))
LENGTH = 1024
set_seed(0)

# %% [markdown]
# ## Documents
#
# Stretches of 600 words from the speeches that come with the package, one beginning every 150 words. Whole messages are held
# out: no stretch of theirs is seen in training.

# %%
AGES = {"17": "1790s", "18": "1860s", "19": "1940s"}
names = list(AGES.values())
found = {"train": {"text": [], "label": []}, "held out": {"text": [], "label": []}}
for file in sorted(EXCERPT_FOLDER.glob("*.txt")):
    words = file.read_text("utf-8").split()
    part = found["train" if split_of_speech(file.name) == "train" else "held out"]
    for start in range(0, max(1, len(words) - 300), 150):
        part["text"].append(" ".join(words[start : start + 600]))
        part["label"].append(names.index(AGES[file.name[:2]]))
train_set, held_out = (Dataset.from_dict(part) for part in found.values())
tokenizer = train_bpe_tokenizer(found["train"]["text"], 2048)
_ = tokenizer.add_special_tokens({"mask_token": "<|mask|>"})


def tokenized(data, length=LENGTH):
    """Token ids of at most `length`, with labels."""
    return data.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=length), batched=True, remove_columns="text"
    )


train_rows = tokenized(train_set, 256)
print(f"{len(train_set)} stretches to learn from, of which the first 256 tokens; {len(held_out)} held out")
labels = list(held_out["label"])
print("held out:", {name: labels.count(i) for i, name in enumerate(names)})

# %% [markdown]
# ## First masked words, then labels
#
# Both are ordinary `Trainer` runs. The body of the first model becomes the body of the second through `save_pretrained` and
# `from_pretrained`, as with any Transformers model. A DANet this narrow wants larger initial weights than the default, which
# is made for a width of 1,024 (`initializer_range`), and a rate of about 2e-3 with a warm-up: at a quarter of that, and without
# the masked words, it named the most frequent age for nearly every text.

# %%
sizes = {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 192, "max_position_embeddings": LENGTH}
config = DanetConfig(
    vocab_size=len(tokenizer), layer_pattern="g", num_attention_heads=3, num_labels=len(names), initializer_range=0.1,
    pad_token_id=tokenizer.pad_token_id, **sizes,
)  # fmt: skip
folder = tempfile.TemporaryDirectory()


def arguments(steps, batch, rate):
    """The same for both runs but for size and rate."""
    return TrainingArguments(
        folder.name, max_steps=steps, per_device_train_batch_size=batch, per_device_eval_batch_size=8, learning_rate=rate,
        warmup_steps=steps // 10, logging_steps=max(1, steps // 15), save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip


short = tokenized(train_set.remove_columns("label"), 128)
reader = AutoModelForMaskedLM.from_config(config)
print(f"{sum(p.numel() for p in reader.parameters()):,} parameters")
reading = Trainer(
    model=reader, args=arguments(STEPS // 2, 16, 2e-3), train_dataset=short,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
)  # fmt: skip
reading.remove_callback(transformers.PrinterCallback)
_ = reading.train()
reader.save_pretrained(folder.name)

# %%
model = AutoModelForSequenceClassification.from_pretrained(folder.name, num_labels=len(names))
fine_tuning = Trainer(
    model=model,
    args=arguments(STEPS, 8, 2e-3),
    train_dataset=train_rows,
    data_collator=DataCollatorWithPadding(tokenizer),
)
fine_tuning.remove_callback(transformers.PrinterCallback)
_ = fine_tuning.train()
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
for axis, trainer, title in zip(axes, (reading, fine_tuning), ("masked words", "ages")):
    axis.plot(*zip(*[(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]), marker="o")
    axis.set(xlabel="step", ylabel="loss", title=title)
    axis.grid(alpha=0.3)

# %% [markdown]
# ## Which ages does it take for which?
#
# Every row is an age; where its held-out stretches went, reading up to 1,024 tokens of each.


# %%
def predictions(length):
    """The age named for every held-out stretch when only the first `length` tokens are read."""
    return fine_tuning.predict(tokenized(held_out, length)).predictions.argmax(-1)


named = predictions(LENGTH)
counts = confusion_matrix(labels, named)
figure, axis = plt.subplots(figsize=(3.6, 3.2), layout="constrained")
axis.imshow(counts / counts.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
for i, row in enumerate(counts):
    for j, count in enumerate(row):
        axis.text(j, i, count, ha="center", va="center", color="white" if count > row.sum() / 2 else "black")
axis.set(xticks=range(3), xticklabels=names, yticks=range(3), yticklabels=names, xlabel="named", ylabel="age")
frequent = max(set(labels), key=labels.count)
for name, guess in (("DANet", named), ("always the most frequent age", [frequent] * len(labels))):
    f1 = f1_score(labels, guess, average="macro", zero_division=0)
    print(f"{name}: accuracy {accuracy_score(labels, guess):.0%}, macro F1 {100 * f1:.0f}%")
assert accuracy_score(labels, named) > labels.count(frequent) / len(labels)

# %% [markdown]
# ## How much must it read?
#
# The same model on the first 16, 32, ... tokens. Always naming the most frequent age gives the dashed line.

# %%
lengths = [16, 32, 64, 128, 256, 512, 1024]
found = [accuracy_score(labels, predictions(length)) for length in lengths]
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.semilogx(lengths, found, marker="o", base=2, label="DANet")
axis.axhline(labels.count(frequent) / len(labels), linestyle="--", color="gray", label="always the most frequent age")
axis.set(xlabel="tokens read", ylabel="accuracy", ylim=(0, 1.03), title=f"{len(labels)} held-out stretches")
axis.legend(loc="lower right")
axis.grid(alpha=0.3)

# %% [markdown]
# ## What length costs
#
# One document, forward, beside a BERT of the same width and depth (softmax attention, SDPA). DANet's cost per token stays the
# same; BERT's grows.

# %%
bert = AutoModelForSequenceClassification.from_config(
    BertConfig(vocab_size=len(tokenizer), num_attention_heads=3, **(sizes | {"max_position_embeddings": 8192}))
)
costs, lengths = {"DANet": [], "BERT": []}, [256, 1024, 4096, 8192]
with torch.no_grad():
    for length in lengths:
        ids = torch.randint(5, 2000, (1, length))
        for name, contender in (("DANet", model.eval()), ("BERT", bert.eval())):
            contender(ids)
            start = time.perf_counter()
            contender(ids)
            costs[name].append(1e6 * (time.perf_counter() - start) / length)
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for name, micros in costs.items():
    axis.loglog(lengths, micros, marker="o", base=2, label=name)
axis.set(xlabel="tokens of the document", ylabel="microseconds per token", title="Forward, one document")
axis.legend()
axis.grid(alpha=0.3)
folder.cleanup()

# %% [markdown]
# **Next**: `load_classification` (training/classification_data.py) loads mails, news and your own files; notebook 4 shows what a
# classifier looks at.
