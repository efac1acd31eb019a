"""The `hf-linear-attn` command."""
