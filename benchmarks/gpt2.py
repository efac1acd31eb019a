"""The GPT-2 of the comparisons: Transformers' own, with scaled-dot-product attention and the fused spelling of its GELU."""

from typing import Any


def gpt2(
    vocab_size: int, width: int, layers: int, heads: int, positions: int, dropout: float = 0.0, **fields: Any
) -> Any:
    """A language model with new weights; `fields` are further ones of GPT2Config, such as the feed-forward width `n_inner`.

    Without an end of text, so that a measured generation never stops early.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_positions=positions,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            activation_function="gelu_pytorch_tanh",
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
            **fields,
        )
    )
