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
# **It takes** about three minutes on two CPU cores. `NOTEBOOK_STEPS=200` fine-tunes longer.

# %%
import os

# %matplotlib inline
import matplotlib.pyplot as plt
import torch
import transformers
from IPython.display import display
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from hf_linear_attn import PACKAGED_MODEL, DanetConfig
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

transformers.logging.set_verbosity_error()
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 80))
set_seed(0)

# %% [markdown]
# ## A classifier
#
# Was this paragraph of a president's message spoken before Congress, or sent as a letter? The LEAP that comes with the package
# has read such messages; a few lines of PyTorch fine-tune it on 529 paragraphs.

# %%
rows = load_speech_paragraphs(EXCERPT_FOLDER)
names = rows["train"].features["label"].names
tokenizer = AutoTokenizer.from_pretrained(PACKAGED_MODEL)
tokenizer.padding_side = "right"


def train(model, rate, steps=STEPS, batch=16, length=96):
    """AdamW with a falling rate."""
    texts, labels = list(rows["train"]["text"]), torch.tensor(rows["train"]["label"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        places = torch.randint(len(texts), (batch,))
        inputs = tokenizer(
            [texts[i] for i in places], truncation=True, max_length=length, padding=True, return_tensors="pt"
        )
        loss = model(**inputs, labels=labels[places]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(model):
    """Share of held-out paragraphs labelled right."""
    texts, labels = list(rows["test"]["text"]), torch.tensor(rows["test"]["label"])
    inputs = tokenizer(texts, truncation=True, max_length=96, padding=True, return_tensors="pt")
    with torch.no_grad():
        return float((model(**inputs).logits.argmax(-1) == labels).float().mean())


classifier = train(AutoModelForSequenceClassification.from_pretrained(PACKAGED_MODEL, num_labels=len(names)), 1e-3)
print(f"{sum(p.numel() for p in classifier.parameters()):,} parameters, windows {classifier.config.layer_windows}")
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
# attention that the first four layers really computed: over everything so far, and over the last 4, 8 and 16 tokens.

# %%
sentence = " ".join(text.split()[:24])
display(importance(classifier, tokenizer, sentence).draw_layers())
display(attention_maps(classifier, tokenizer, sentence).draw(layers=range(4)))

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
count, heads, _ = gates.shape
figure, axis = plt.subplots(figsize=(min(12, 2 + 0.22 * len(read)), 4), layout="constrained")
image = axis.imshow(gates.flatten(0, 1).numpy(), aspect="auto", cmap="Greens", vmin=0, vmax=1)
axis.set_xticks(range(len(read)), read.names, rotation=90, fontsize=7)
rows_named = [f"layer {layer} head {head}" for layer in range(count) for head in range(heads)]
axis.set_yticks(range(count * heads), rows_named, fontsize=7)
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
danet_config = DanetConfig(
    vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, layer_pattern="l_g",
    window_size=32, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, num_labels=len(names),
)  # fmt: skip
danet = train(AutoModelForSequenceClassification.from_config(danet_config), 2e-3, steps=2 * STEPS)
print(f"{accuracy(danet):.0%} of the held-out paragraphs are labelled right by a small DANet with new weights")
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
# The packaged LEAP as the language model that it is. By its weights: the distance within which lie nine tenths of a token's
# attention. By what it does: the loss on the same words with only the last 1, 2, 4, ... tokens before them. What more context
# does not improve is not used.

# %%
writer = AutoModelForCausalLM.from_pretrained(PACKAGED_MODEL).eval()
page = "\n".join(rows["test"]["text"][:6])
print(effective_context(writer, tokenizer, page, max_tokens=256).table())
losses = context_losses(writer, tokenizer, page, contexts=(1, 2, 4, 8, 16, 32, 64, 128), targets=128)
print(f"within 1 % of its lowest loss from {losses.effective()} tokens on")
figure, axis = plt.subplots(figsize=(6, 3))
axis.semilogx(losses.contexts, losses.losses, marker="o", base=2)
axis.set(xlabel="tokens of context", ylabel="loss (nats per token)", title=f"Loss on {losses.targets} tokens")
axis.grid(alpha=0.3)

# %% [markdown]
# **Next**: the page "Explain" in the docs defines each number; `hf-linear-attn explain CHECKPOINT TEXT --html FILE` writes the
# map of any checkpoint.
