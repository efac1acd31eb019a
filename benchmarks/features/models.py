"""The tiny random models that the feature checks examine: ours, and Transformers' own or flash-linear-attention's beside them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import set_seed

import hf_linear_attn
from hf_linear_attn.conversion import linearize

VOCAB = 64
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 256}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # without an end no text stops early
WIDE = {"initializer_range": 0.2}  # weights so large that every token shows in the logits


@dataclass(frozen=True)
class Subject:
    """One column of the table.

    Args:
        name: its title.
        make: builds the model with a language modeling head, from the random state that is set before.
        ours: whether it is of this package.
        causal: whether it generates; otherwise only what encoders can do is checked.
        device: where it runs.
        tolerance: largest difference of numbers that must agree, in float32.
    """

    name: str
    make: Callable[[], Any]
    ours: bool = True
    causal: bool = True
    device: str = "cpu"
    tolerance: float = 1e-4

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32):
        """The model in evaluation mode; the same seed gives the same weights."""
        set_seed(seed)
        return self.make().to(device=self.device, dtype=dtype).eval()


def _config(name: str, **fields):
    config_class = getattr(hf_linear_attn, name, None) or getattr(transformers, name)
    return config_class(**(SIZES | IDS | WIDE | fields))


def _causal(name: str, **fields) -> Callable[[], Any]:
    return lambda: transformers.AutoModelForCausalLM.from_config(_config(name, **fields))


def _danet_encoder():
    fields = {"num_attention_heads": 2, "intermediate_size": 48, "is_causal": False, "layer_pattern": "l_sl_g"}
    fields |= {"window_size": 8, "query_initializer_range": 0.2}
    return transformers.AutoModelForMaskedLM.from_config(_config("DanetConfig", **fields))


def _sea():
    """A Llama that SEA was put into, with its estimator's weights moved away from their zeros."""
    host = _config("LlamaConfig", num_attention_heads=2, num_key_value_heads=2, intermediate_size=48)
    model = linearize(transformers.AutoModelForCausalLM.from_config(host), "sea", k=8, predictor_length=16)
    with torch.no_grad():
        for core in model.sea_layers().values():
            for name, parameter in core.named_parameters():
                if name != "position_table":
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


QWEN3_NEXT = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
DANET = {"num_attention_heads": 2, "intermediate_size": 48, "is_causal": True, "layer_pattern": "sw_g"}
DANET |= {"window_size": 8, "chunk_size": 16, "scale_length": 64, "query_initializer_range": 0.2}
LEAP = {"num_attention_heads": 2, "intermediate_size": 48}

SUBJECTS = {
    "LEAP": Subject("LEAP", _causal("LeapConfig", layer_windows=[None, 8], **LEAP)),
    "Fastformer": Subject("Fastformer", _causal("FastformerConfig", layer_windows=[None, 8], **LEAP)),
    "DANet": Subject("DANet", _causal("DanetConfig", **DANET)),
    "DANet encoder": Subject("DANet encoder", _danet_encoder, causal=False),
    "SEA": Subject("SEA", _sea),
    "GPT-2": Subject("GPT-2", _causal("GPT2Config", n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), ours=False),
    "Mamba2": Subject(
        "Mamba2", _causal("Mamba2Config", num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=16), ours=False
    ),
    "Qwen3-Next": Subject("Qwen3-Next", _causal("Qwen3NextConfig", **QWEN3_NEXT), ours=False),
}


def on_gpu(subject: Subject) -> Subject:
    """The same model on a GPU, whose kernels may multiply in TF32."""
    return replace(subject, device="cuda", tolerance=2e-2)


def flash_linear_attention(device: str = "cuda") -> dict[str, Subject]:
    """Two of its models; its kernels multiply in TF32, so numbers agree less closely."""
    import fla.models

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "fuse_cross_entropy": False,
    }
    made = {}
    for name in ("GLA", "GatedDeltaNet"):
        config_class, model_class = (getattr(fla.models, name + end) for end in ("Config", "ForCausalLM"))
        fields = sizes | IDS | WIDE | ({"head_dim": 32} if name == "GatedDeltaNet" else {})
        title = f"flash-linear-attention {name}"
        make = lambda c=config_class, m=model_class, f=fields: m(c(**f))  # noqa: E731
        made[title] = Subject(title, make, ours=False, device=device, tolerance=2e-2)
    return made
