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
# # 6. Give a pretrained model a state of fixed size
#
# **You will see** a small Llama become a Hedgehog model: exact softmax over the last tokens, learned features for all older ones.
# You will see that it predicts the same inside its window, how distillation brings it back to its teacher beyond it, layer by
# layer, and that its state stays the same size while the teacher's cache grows.
#
# **It takes** about a minute on two CPU cores. `NOTEBOOK_STEPS=400` distils longer.

# %%
import os
import tempfile

import matplotlib.pyplot as plt
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Trainer, TrainingArguments, set_seed

from hf_linear_attn.conversion import linearize
from hf_linear_attn.training import HedgehogDistillationArguments, HedgehogDistillationTrainer
from hf_linear_attn.training.hedgehog_distillation import layer_table
from hf_linear_attn.training.text_data import EXCERPT_FOLDER, load_speeches
from hf_linear_attn.training.tokenized_text import TokenBlocks, tokenize_documents, train_bpe_tokenizer

transformers.logging.set_verbosity_error()
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 60))
LENGTH, WINDOW = 128, 8
set_seed(0)

# %% [markdown]
# ## A teacher
#
# Take a model of the Hub in its place: Llama, Mistral, Qwen, SmolLM, Gemma, GPT-2, OPT. This one is trained here, on the
# presidents' speeches that come with the package.

# %%
speeches = load_speeches(EXCERPT_FOLDER)
tokenizer = train_bpe_tokenizer(speeches.documents["train"]["text"], 512)
ids = tokenize_documents(speeches, tokenizer).ids
train, held_out = TokenBlocks(ids["train"], LENGTH), TokenBlocks(ids["validation"], LENGTH, 32 * LENGTH)
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, intermediate_size=128)  # fmt: skip
teacher = AutoModelForCausalLM.from_config(config)
folder = tempfile.TemporaryDirectory()
options = {
    "output_dir": folder.name, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16,
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip
training = Trainer(
    model=teacher,
    args=TrainingArguments(learning_rate=5e-3, max_steps=150, warmup_steps=15, logging_strategy="no", **options),
    train_dataset=train,
)
training.remove_callback(transformers.PrinterCallback)
_ = training.train()
print(f"{teacher.num_parameters():,} parameters")

# %% [markdown]
# ## Conversion
#
# `linearize` keeps every weight. Inside the window there is nothing but softmax, so the student *is* the teacher there.

# %%
student = linearize(teacher, "hedgehog", window=WINDOW).eval()
teacher.eval()
text = held_out[0]["input_ids"][None]
with torch.no_grad():
    apart = (student(text).logits - teacher(text).logits).abs().amax(-1)[0]
print(
    f"largest difference of a logit, first {WINDOW} tokens: {apart[:WINDOW].max():.1e}, later ones: {apart[WINDOW:].max():.2f}"
)
figure, axis = plt.subplots(figsize=(6, 2.5))
axis.plot(apart.clamp_min(1e-7), linewidth=1)
axis.axvline(WINDOW - 0.5, color="grey", linestyle="--")
axis.set(yscale="log", xlabel="token (dashed: the window ends)", ylabel="difference of a logit")

# %% [markdown]
# ## Distillation
#
# First the feature maps alone learn each layer's attention from the teacher's queries, keys and values; then all weights learn
# the teacher's predictions. The table shows how far each layer's attention is from the teacher's: given the teacher's inputs
# (alone), and within the student (in place).

# %%
distilling = HedgehogDistillationTrainer(
    model=student,
    teacher=teacher,
    args=HedgehogDistillationArguments(
        max_steps=STEPS, transfer_share=0.5, learning_rate=1e-3, logging_steps=max(1, STEPS // 15), **options
    ),
    train_dataset=train,
    eval_dataset=held_out,
)
distilling.remove_callback(transformers.PrinterCallback)
before, layers = distilling.evaluate(), distilling.layer_errors()
_ = distilling.train()
after = distilling.evaluate()
print("\nafter both stages:", layer_table(distilling.layer_errors(), layers), sep="\n")
print(f"\n{'':22}{'teacher':>9}{'converted':>11}{'distilled':>11}")
for name in ("loss", "logits_kl"):
    told = f"{after['eval_teacher_loss']:.3f}" if name == "loss" else ""
    print(f"{name:22}{told:>9}{before['eval_' + name]:11.4f}{after['eval_' + name]:11.4f}")

# %% [markdown]
# ## The state
#
# The student's state has its size after the first token; the teacher keeps keys and values of every token.

# %%
student, teacher = student.eval(), teacher.eval()
lengths, ours, theirs = [16, 64, 256, 1024, 2048], [], []
with torch.no_grad():
    for length in lengths:
        long_text = torch.from_numpy(ids["train"][:length].astype("int64"))[None]
        ours.append(student(long_text, use_cache=True).cache.state_size() / 1024)
        cache = DynamicCache(config=teacher.config)
        teacher(long_text, past_key_values=cache)
        theirs.append(sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers) / 1024)
print("KiB of state:", [round(size) for size in ours], "of cache:", [round(size) for size in theirs])
figure, axis = plt.subplots(figsize=(6, 3))
axis.loglog(lengths, ours, marker="o", base=2, label="Hedgehog: state")
axis.loglog(lengths, theirs, marker="o", base=2, label="Llama: keys and values")
axis.set(xlabel="tokens read", ylabel="KiB")
axis.legend()
axis.grid(alpha=0.3)

# %% [markdown]
# It writes as any model does:

# %%
prompt = tokenizer("My fellow citizens", return_tensors="pt", add_special_tokens=False)
set_seed(1)
written = student.generate(**prompt, max_new_tokens=40, do_sample=True, top_k=20)
print(tokenizer.decode(written[0]))
folder.cleanup()

# %% [markdown]
# **Next**: `softmax_layers="auto:25%"` keeps softmax attention in the layers that need it most, and
# `hf-linear-attn distill --to hedgehog --teacher ...` does all of this for a model of the Hub; the page on Hedgehog in the docs
# has the equations.
