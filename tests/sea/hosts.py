"""Tiny hosts with weights large enough that every part of the computation shows in the logits."""

import torch
import transformers
from transformers import BertConfig, GPT2Config, LlamaConfig, OPTConfig

from hf_linear_attn.conversion import linearize

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def host_config(name: str, **changes):
    """bert, llama (grouped queries), opt (project_in/out, scaled queries), gpt2 (scores scaled by layer)."""
    if name == "bert":
        fields = {"num_attention_heads": 2, "intermediate_size": 24, "initializer_range": 0.3, "pad_token_id": 0}
        return BertConfig(**(SIZES | fields | changes))
    if name == "llama":
        fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "initializer_range": 0.3}
        return LlamaConfig(**(SIZES | TOKENS | fields | changes))
    if name == "opt":
        fields = {"num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 8, "init_std": 0.3}
        return OPTConfig(**(SIZES | TOKENS | fields | changes))
    fields = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True}
    return GPT2Config(**({"vocab_size": 40, "initializer_range": 0.3} | TOKENS | fields | changes))


HOSTS = ("bert", "llama", "opt", "gpt2")
CAUSAL_HOSTS = ("llama", "opt", "gpt2")


def make_teacher(name: str, task: str | None = None, seed: int = 0, **changes):
    """A random host model in eval mode."""
    torch.manual_seed(seed)
    task = task or ("AutoModelForMaskedLM" if name == "bert" else "AutoModelForCausalLM")
    return getattr(transformers, task).from_config(host_config(name, **changes)).eval()


def make_student(name: str, task: str | None = None, seed: int = 0, open_gates: bool = False, host=None, **options):
    """`linearize` of a random host, with random weights everywhere in SEA, so that no two cells tie."""
    options = {"k": 4, "predictor_length": 16} | options
    student = linearize(make_teacher(name, task, seed, **(host or {})), "sea", **options)
    randomize(student, seed, open_gates)
    return student


@torch.no_grad()
def randomize(student, seed: int = 0, open_gates: bool = False):
    """Move every parameter of SEA away from its initial value."""
    torch.manual_seed(seed + 1)
    for core in student.sea_layers().values():
        for name, parameter in core.named_parameters():
            if name != "position_table":
                parameter.add_(torch.randn_like(parameter) * 0.3)
        if hasattr(core, "position_table"):
            core.cnn.conv1.bias.add_(0.5)
            core.cnn.conv2.bias.add_(0.5)
        if open_gates:
            core.scaler.weight.zero_()
            core.scaler.bias.fill_(30.0)


def make_ids(batch=2, length=20, seed=0):
    """Random token ids without special tokens."""
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(seed))
