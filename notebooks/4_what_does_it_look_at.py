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
# # 4. What does the model look at?
#
# **You will see** a text coloured by LEAP's focus weights, each layer's and head's own weights, which token acts on which, how
# willing each token is to listen (alignment), whether the explanation is true of the model (the prediction must change more
# without the coloured tokens than without others), and how far back a language model looks, by its weights and by what it
# loses without the rest.
#
# **It takes** about two minutes on two CPU cores. `NOTEBOOK_STEPS=1000` trains the models longer.

# %%
import os

# %matplotlib inline
import matplotlib.pyplot as plt
import torch
import transformers
from IPython.display import display
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from hf_linear_attn import DanetConfig, LeapConfig
from hf_linear_attn.explain import (
    alignments,
    attention_maps,
    context_losses,
    effective_context,
    faithfulness,
    importance,
    influence,
)
from hf_linear_attn.training.classification_data import load_speech_paragraphs
from hf_linear_attn.training.text_data import EXCERPT_FOLDER
from hf_linear_attn.training.tokenized_text import train_bpe_tokenizer

transformers.logging.set_verbosity_error()
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 200))
set_seed(0)

# %% [markdown]
# ## A classifier
#
# Was this paragraph of a president's message spoken before Congress, or sent as a letter? A few lines of PyTorch train a
# LEAP for it, from 529 paragraphs: it learns these better than the rule behind them, and is explained all the same.

# %%
rows = load_speech_paragraphs(EXCERPT_FOLDER)
names = rows["train"].features["label"].names
tokenizer = train_bpe_tokenizer(rows["train"]["text"], 2048)
tokenizer.padding_side = "right"
sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 512}  # fmt: skip


def train(model, rate=2e-3, batch=16, length=96, steps=STEPS):
    """AdamW with a falling rate; a text is its own target for a language model."""
    texts, labels = list(rows["train"]["text"]), torch.tensor(rows["train"]["label"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        places = torch.randint(len(texts), (batch,))
        inputs = tokenizer(
            [texts[i] for i in places], truncation=True, max_length=length, padding=True, return_tensors="pt"
        )
        target = inputs["input_ids"] if hasattr(model, "lm_head") else labels[places]
        loss = model(**inputs, labels=target).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), float(loss.detach())


def accuracy(model):
    """Share of held-out paragraphs labelled right."""
    texts, labels = list(rows["test"]["text"]), torch.tensor(rows["test"]["label"])
    inputs = tokenizer(texts, truncation=True, max_length=96, padding=True, return_tensors="pt")
    with torch.no_grad():
        return float((model(**inputs).logits.argmax(-1) == labels).float().mean())


config = LeapConfig(layer_windows=[None, 4], num_labels=len(names), **sizes)
classifier, _ = train(AutoModelForSequenceClassification.from_config(config))
labels = list(rows["test"]["label"])
majority = max(labels.count(0), labels.count(1)) / len(labels)
print(
    f"{accuracy(classifier):.0%} of {len(labels)} held-out paragraphs are labelled right; always the same answer: {majority:.0%}"
)

# %% [markdown]
# ## The importance map
#
# A focus weight says how much a token counts for everything that follows. `importance` shows their mean over layers and
# heads; rest the pointer on a token to see its number. In a terminal, `to_terminal()` prints the same.

# %%
text = " ".join(rows["test"]["text"][5].split()[:70])
found = importance(classifier, tokenizer, text)
display(found)
for token, score, position in found.top(5):
    print(f"{score:5.2f} times the average: {token!r} (token {position})")

# %% [markdown]
# ## Layers and heads
#
# Heads divide the work: each row below is one head's focus weights over the tokens of a sentence. Under it are the rows of
# attention that the layers really computed: the first layer averages over everything so far, the second over four tokens.

# %%
sentence = " ".join(text.split()[:24])
display(importance(classifier, tokenizer, sentence).draw_layers())
display(attention_maps(classifier, tokenizer, sentence).draw())

# %% [markdown]
# ## Which token acts on which
#
# Rollout multiplies the layers' attention, with one half for the residual stream. The last row is what the classifier reads.

# %%
flow = influence(classifier, tokenizer, sentence)
display(flow.draw())
print("what acts most on the last token:", [(token, round(share, 3)) for token, share, _ in flow.on(-1, 5)])

# %% [markdown]
# ## Alignment
#
# Focus is what a token says to all, alignment how much a token takes of what it sees: the gate of each query, between 0 and 1.

# %%
read, gates = alignments(classifier, tokenizer, sentence)
figure, axis = plt.subplots(figsize=(min(12, 2 + 0.22 * len(read)), 2.4), layout="constrained")
image = axis.imshow(gates.flatten(0, 1).numpy(), aspect="auto", cmap="Greens", vmin=0, vmax=1)
axis.set_xticks(range(len(read)), read.names, rotation=90, fontsize=7)
axis.set_yticks(range(4), [f"layer {layer} head {head}" for layer in range(2) for head in range(2)], fontsize=7)
figure.colorbar(image, ax=axis, pad=0.01).set_label("alignment", fontsize=8)

# %% [markdown]
# ## Is it true?
#
# The test: delete the fifth of the tokens that count most, and as many random ones. If the map is true of the model, its
# prediction changes more without the first. The change is the distance between the probabilities before and after.
#
# DANet has no focus weights. Its scores are signed and not normalised; `importance` takes their size, relative to the row's
# sum, as attention that a token receives, and leaves the sign to `attention_maps`, which draws it (blue is negative).

# %%
danet_config = DanetConfig(layer_pattern="l_g", window_size=32, num_labels=len(names), **sizes)
danet, _ = train(AutoModelForSequenceClassification.from_config(danet_config))
texts = list(rows["test"]["text"])
results = {
    f"{family}, {method}": faithfulness(model, tokenizer, texts, method=method, share=0.2, draws=4, max_tokens=96)
    for family, model, method in (
        ("LEAP", classifier, "focus"),
        ("LEAP", classifier, "rollout"),
        ("DANet", danet, "received"),
    )
}
figure, axis = plt.subplots(figsize=(7, 3))
for shift, kind in enumerate(("top", "random", "bottom")):
    places = [i + 0.25 * (shift - 1) for i in range(len(results))]
    axis.bar(places, [getattr(result, kind) for result in results.values()], 0.22, label=f"without the {kind} tokens")
axis.set_xticks(range(len(results)), results)
axis.set(ylabel="change of the prediction", title=f"{len(texts)} held-out paragraphs, a fifth of the tokens deleted")
axis.legend(fontsize=8)
for name, result in results.items():
    low, high = result.interval()
    print(f"{name:15} top {result.top:.3f}, random {result.random:.3f}; difference {low:+.3f} to {high:+.3f} (95 %)")
display(attention_maps(danet, tokenizer, sentence).draw())

# %% [markdown]
# ## How far back does a language model look?
#
# Two small LEAP language models: windows (global, 4) and all-global. By their weights: the distance within which lie nine
# tenths of a token's attention. By what they do: the loss on the same words with only the last 1, 2, 4, ... tokens before
# them. What more context does not improve is not used.

# %%
figure, axis = plt.subplots(figsize=(6, 3))
page = "\n".join(rows["test"]["text"][:6])
for name, windows in (("windows global, 4", [None, 4]), ("all global", [None, None])):
    config = LeapConfig(layer_windows=windows, position_embedding_type="rotary", **sizes)
    model, loss = train(AutoModelForCausalLM.from_config(config), rate=4e-3, length=128, steps=STEPS // 2)
    reach = effective_context(model, tokenizer, page, max_tokens=256)
    print(f"{name}: loss {loss:.2f}\n{reach.table()}")
    losses = context_losses(model, tokenizer, page, contexts=(1, 2, 4, 8, 16, 32, 64), targets=128)
    print(f"within 1 % of its lowest loss from {losses.effective()} tokens on\n")
    axis.semilogx(losses.contexts, losses.losses, marker="o", base=2, label=name)
axis.set(xlabel="tokens of context", ylabel="loss (nats per token)", title=f"Loss on {losses.targets} tokens")
axis.legend()
axis.grid(alpha=0.3)

# %% [markdown]
# **Next**: the page "Explain" in the docs defines each number; `hf-linear-attn explain CHECKPOINT TEXT --html FILE` writes the
# map of any checkpoint.
