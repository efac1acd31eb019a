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
# # 1. Train a LEAP language model, let it write, and watch its state
#
# **You will see** a small LEAP learn English from presidents' speeches with the ordinary `Trainer`, its learning curve, text
# that it writes with `generate()`, and what it remembers of that text: a state whose size does not change, beside the cache
# of a GPT-2 of the same size, which grows with every token. At the end the state is saved and taken up again.
#
# **It takes** about two minutes on two CPU cores. `NOTEBOOK_STEPS=2000` in the environment gives a better writer in about
# half an hour.

# %%
import os
import tempfile

import matplotlib.pyplot as plt
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments, set_seed

from hf_linear_attn import LeapConfig, RecurrentCache
from hf_linear_attn.training.text_data import EXCERPT_FOLDER, load_speeches
from hf_linear_attn.training.tokenized_text import TokenBlocks, tokenize_documents, train_bpe_tokenizer

transformers.logging.set_verbosity_error()
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 130))
set_seed(0)

# %% [markdown]
# ## Text
#
# Twenty-two speeches come with the package. A byte-level tokenizer of 1,024 pieces is trained on the training part, and the
# text is cut into blocks of 128 tokens.

# %%
data = load_speeches(EXCERPT_FOLDER)
tokenizer = train_bpe_tokenizer(data.documents["train"]["text"], 1024)
text = tokenize_documents(data, tokenizer)
blocks = {split: TokenBlocks(ids, 128) for split, ids in text.ids.items()}
print({split: f"{len(ids):,} tokens" for split, ids in text.ids.items()})

# %% [markdown]
# ## Model and training
#
# A configuration, an Auto class, a Trainer: nothing here is special to LEAP. Its layers average over all tokens so far and
# over windows of 4, 8 and 16 tokens; `rotary` positions put no limit on the length.

# %%
config = LeapConfig(
    vocab_size=len(tokenizer),
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=2,
    position_embedding_type="rotary",
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
model = AutoModelForCausalLM.from_config(config)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, windows {config.layer_windows}")

# %%
folder = tempfile.TemporaryDirectory()
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        folder.name,
        max_steps=STEPS,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        learning_rate=3e-3,
        warmup_steps=STEPS // 10,
        lr_scheduler_type="cosine",
        logging_steps=max(1, STEPS // 20),
        eval_strategy="steps",
        eval_steps=max(1, STEPS // 5),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=blocks["train"],
    eval_dataset=torch.utils.data.Subset(blocks["validation"], range(32)),
)
trainer.remove_callback(transformers.PrinterCallback)
_ = trainer.train()

# %%
history = trainer.state.log_history
figure, axis = plt.subplots(figsize=(6, 3))
for key, name in (("loss", "training"), ("eval_loss", "validation")):
    points = [(row["step"], row[key]) for row in history if key in row]
    axis.plot(*zip(*points), marker="o", markersize=3, label=name)
axis.set(xlabel="step", ylabel="loss (nats per token)", title="A LEAP learns to write")
axis.legend()
axis.grid(alpha=0.3)

# %% [markdown]
# ## Writing
#
# `generate()` is Transformers' own. After so few steps the model knows common words and endings, and little grammar; the
# demo (`make demo`) trains longer.

# %%
prompt = tokenizer("The people of the United States", return_tensors="pt")
model.eval()
torch.manual_seed(0)
output = model.generate(
    **prompt, max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.9, return_dict_in_generate=True
)
print(tokenizer.decode(output.sequences[0]))

# %% [markdown]
# ## The size of the state
#
# What the model keeps of the past is in `cache`, which older releases of Transformers call `past_key_values`. LEAP's holds a few
# sums and windows for each layer, whether 10 or 1,000 tokens have been read. GPT-2 keeps a key and a value of every token in
# every layer.

# %%
gpt2 = AutoModelForCausalLM.from_config(
    GPT2Config(vocab_size=len(tokenizer), n_embd=128, n_layer=4, n_head=2, n_positions=2048)
)
reading = torch.from_numpy(text.ids["train"][:1000].astype("int64"))[None]
lengths, sizes = [10, 100, 250, 500, 1000], {"LEAP": [], "GPT-2": []}
with torch.no_grad():
    for length in lengths:
        state = RecurrentCache(config=model.config)
        model(reading[:, :length], cache=state, use_cache=True)
        sizes["LEAP"].append(state.state_size() / 1024)
        _, cache = gpt2(reading[:, :length], use_cache=True, return_dict=False)
        sizes["GPT-2"].append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 1024)
figure, axis = plt.subplots(figsize=(6, 3))
for name, kilobytes in sizes.items():
    axis.plot(lengths, kilobytes, marker="o", label=name)
axis.set(xlabel="tokens read", ylabel="KiB", title="What is kept of the past")
axis.legend()
axis.grid(alpha=0.3)
for length, ours, theirs in zip(lengths, sizes["LEAP"], sizes["GPT-2"]):
    print(f"{length:5} tokens: LEAP's state {ours:7.1f} KiB, GPT-2's cache {theirs:8.1f} KiB")
assert len(set(sizes["LEAP"])) == 1  # the same at every length

# %% [markdown]
# ## Stop, save, go on
#
# The state is a few tensors: saved after one sentence, it goes on in another process as if nothing had happened.

# %%
with tempfile.TemporaryDirectory() as place:
    path = os.path.join(place, "state.safetensors")
    first, second = reading[:, :600], reading[:, 600:700]
    state = RecurrentCache(config=model.config)
    with torch.no_grad():
        model(first, cache=state, use_cache=True)
        state.save(path)
        print(f"saved after {first.shape[1]} tokens: {os.path.getsize(path) / 1024:.1f} KiB on disk")
        resumed = model(second, cache=RecurrentCache.load(path, model.config), use_cache=True).logits
        whole = model(reading[:, :700]).logits[:, 600:]
print(f"largest difference from reading all 700 tokens at once: {(resumed - whole).abs().max():.1e}")
assert (resumed - whole).abs().max() < 1e-3
folder.cleanup()

# %% [markdown]
# **Next**: `hf-linear-attn train --help` trains with every knob and resumes; notebook 5 shows from which length on a LEAP is
# faster than a GPT-2.
