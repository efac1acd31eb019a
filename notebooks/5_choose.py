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
# # 5. Which one, from which length on?
#
# **You will see** speed and memory against length on this machine, for reading a text and for writing one, with the lengths
# at which the linear families overtake softmax attention; then the same from the committed measurements on two CPU cores and
# on a GPU, and quality at equal size and training.
#
# **It takes** about a minute and a half on two CPU cores. The live figures are those of a small model on whatever else this
# machine is doing; the committed ones are in `docs/data`, with their commands in the docs.

# %%
import json
import math
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, set_seed

from hf_linear_attn import DanetConfig, FastformerConfig, LeapConfig, RecurrentCache
from hf_linear_attn.modeling.shared.compat import cache_keyword

transformers.logging.set_verbosity_error()
set_seed(0)
DATA = next((p / "docs/data" for p in (Path.cwd(), *Path.cwd().parents) if (p / "docs/data").is_dir()), None)
if DATA is None:
    raise FileNotFoundError("docs/data is not above this folder: run the notebook in a clone of the repository")


def crossover(lengths, ours, theirs):
    """The length from which ours is faster, between the measured ones by a straight line in log-log; None if never."""
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a >= b and all(x >= y for x, y in zip(ours[i:], theirs[i:])):
            if i == 0:
                return lengths[0]
            before, after = math.log(ours[i - 1] / theirs[i - 1]), math.log(a / b)
            share = -before / (after - before)
            return round(math.exp(math.log(lengths[i - 1]) + share * math.log(lengths[i] / lengths[i - 1])))
    return None


def draw(axis, lengths, speeds, title, baseline):
    """Speeds against length; a line where each overtakes the baseline. Prints the crossovers."""
    for name, values in speeds.items():
        (line,) = axis.loglog(lengths[: len(values)], values, marker="o", base=2, label=name)
        if name != baseline:
            point = crossover(lengths, values, speeds[baseline])
            where = "nowhere in the measured range" if point is None else f"from {point:,} tokens on"
            if point == lengths[0]:
                where = f"from {point:,} tokens on (the shortest measured)"
            print(f"{title}: {name} is faster than {baseline} {where}")
            if point is not None:
                axis.axvline(point, color=line.get_color(), linestyle=":", alpha=0.6)
    axis.set(xlabel="tokens", ylabel="tokens per second", title=title)
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3, which="both")


# %% [markdown]
# ## Reading, here and now
#
# One forward pass over a text, width 64, 4 layers, float32. GPT-2 uses PyTorch's fused attention (SDPA). Contenders take
# turns, and the median of three rounds counts.

# %%
sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
LONGEST = 8192
configs = {
    "GPT-2": GPT2Config(vocab_size=512, n_embd=64, n_layer=4, n_head=2, n_positions=LONGEST + 64),
    "LEAP": LeapConfig(position_embedding_type="rotary", **sizes),
    "Fastformer": FastformerConfig(position_embedding_type="none", **sizes),
    "DANet": DanetConfig(is_causal=True, layer_pattern="sw_sw_g", window_size=64, scale_length=1024, **sizes),
}
models = {name: AutoModelForCausalLM.from_config(config).eval() for name, config in configs.items()}
for name, model in models.items():
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    print(f"{name:11}{sum(p.numel() for p in model.parameters()) - embeddings:>10,} parameters without embeddings")


@torch.no_grad()
def seconds(model, ids, **arguments):
    """One forward pass."""
    start = time.perf_counter()
    model(ids, logits_to_keep=1, **arguments)
    return time.perf_counter() - start


lengths = [128, 512, 2048, LONGEST]
reading = {name: [] for name in models}
for length in lengths:
    ids = torch.randint(5, 512, (1, length))
    rounds = [{name: seconds(model, ids, use_cache=False) for name, model in models.items()} for _ in range(4)]
    for name in models:
        reading[name].append(length / statistics.median(r[name] for r in rounds[1:]))
figure, axis = plt.subplots(figsize=(6, 3.5))
draw(axis, lengths, reading, "Reading", "GPT-2")

# %% [markdown]
# ## Writing, here and now
#
# Time of one more token after a context, and what is kept of that context. A state costs the same after any context; a cache
# grows, and so does the time to look through it.

# %%
contexts, steps = [128, 1024, 4096, LONGEST], 24
writing, kept = {name: [] for name in models}, {name: [] for name in models}
for context in contexts:
    ids, caches = torch.randint(5, 512, (1, context)), {}
    with torch.no_grad():
        for name, model in models.items():
            cache = (
                transformers.DynamicCache(config=model.config)
                if name == "GPT-2"
                else RecurrentCache(config=model.config)
            )
            model(ids, use_cache=True, logits_to_keep=1, **cache_keyword(cache))
            caches[name] = cache
            held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) if name == "GPT-2" else cache.state_size()
            kept[name].append(held / 1024)
    token = torch.tensor([[7]])
    rounds = [
        {name: seconds(model, token, use_cache=True, **cache_keyword(caches[name])) for name, model in models.items()}
        for _ in range(steps)
    ]
    for name in models:
        writing[name].append(1 / statistics.median(r[name] for r in rounds[2:]))
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
draw(axes[0], contexts, writing, "Writing", "GPT-2")
for name, values in kept.items():
    axes[1].loglog(contexts, values, marker="o", base=2, label=name)
axes[1].set(xlabel="tokens of context", ylabel="KiB", title="Kept of the context")
axes[1].set_xticks(contexts, [f"{n:,}" for n in contexts])
axes[1].legend(fontsize=7)
axes[1].grid(alpha=0.3, which="both")

# %% [markdown]
# ## The committed measurements
#
# Two CPU cores, width 256, 6 layers, batch 8: writing after 100 and 8,000 tokens. And encoders of 335M parameters on one
# NVIDIA H200, 131,072 tokens a batch.

# %%
cpu = json.loads((DATA / "cpu-leap-decode.json").read_text())
for row in cpu["rows"]:
    print(f"{row['job']:32} {row['contender']:36} {row['tokens_per_second']:8,.0f} tokens/s")
gpu = json.loads((DATA / "h200-encoder.json").read_text())
speeds: dict[str, dict[int, float]] = {}
for case in gpu["cases"]:
    if case.get("ktokens_per_s") and "published" not in case["name"]:
        speeds.setdefault(case["name"], {})[case["length"]] = 1000 * case["ktokens_per_s"]
gpu_lengths = sorted(set.intersection(*(set(found) for found in speeds.values())))
print("\npeak memory at 131,072 tokens a row:")
for case in gpu["cases"]:
    if case["length"] == 131072 and "published" not in case["name"]:
        print(f"{case['name']:36} {case['peak_gib']:.1f} GiB")
figure, axis = plt.subplots(figsize=(6, 3.5))
baseline = next(name for name in speeds if name.startswith("BERT"))
draw(
    axis,
    gpu_lengths,
    {name: [found[n] for n in gpu_lengths] for name, found in speeds.items()},
    gpu["device"],
    baseline,
)

# %% [markdown]
# ## Quality
#
# Speed is worth nothing by itself: language models of ten million parameters with the same text, steps and optimiser, on eight
# million tokens of the speeches and in one pass over 90 MB of English with mark-up (`docs/results.md` has the setting). The
# order depends on how long they are trained: a window is a head start, and softmax attention catches up.

# %%
names = {"gpt2": "GPT-2", "llama": "Llama-style", "leap-windowed": "LEAP, windowed", "leap-global": "LEAP, all global",
         "fastformer": "Fastformer", "danet": "DANet, causal"}  # fmt: skip
trained = json.loads((DATA / "language-models.json").read_text())
figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
for axis, (corpus, key) in zip(axes, {"speeches": "perplexity", "docs8": "bits_per_byte"}.items()):
    print(f"{corpus}: {key.replace('_', ' ')}")
    for place, (name, label) in enumerate(names.items()):
        runs = [run for run in trained[corpus]["runs"] if run["model"] == name]
        first = [run for run in runs if run["seed"] == 0]
        rate = min(first, key=lambda run: run["validation"]["loss"])["rate"]
        values = [run["test"][key] for run in runs if run["rate"] == rate]
        print(f"  {label:18} {statistics.mean(values):8.3f}  (seeds: {', '.join(f'{value:.3f}' for value in values)})")
        color = "tab:orange" if name in ("gpt2", "llama") else "tab:blue"
        axis.barh(place, statistics.mean(values), color=color, alpha=0.7)
        axis.plot(values, [place] * len(values), "k|")
    axis.set_yticks(range(len(names)), list(names.values()))
    axis.set(xlabel=f"{corpus}: {key.replace('_', ' ')} (lower is better)")
    axis.invert_yaxis()

# %% [markdown]
# ## So
#
# * **Writing long texts, many at once, or on little memory**: LEAP with windows. Its state does not grow; below the crossover
#   above, a GPT-2 with its cache is as fast or faster. It learns fast, and a long training leaves it behind GPT-2.
# * **Reading long documents** (classification, masked words): DANet; below the crossover above softmax attention
#   is as fast, and is the safer choice.
# * **A pretrained model that should read longer texts**: SEA, by distillation (notebook 3).
# * **All-global LEAP** is the simplest, with the smallest state, and a clearly worse language model. **Fastformer** (with
#   windows) lies between LEAP and GPT-2 on docs8 and next to LEAP on the speeches, and trains the slowest of the six.
# * **Short texts and quality first**: softmax attention.
