"""Run in a process of its own: load every model and saved cache under a folder, go on, save the tokens."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hf_linear_attn import RecurrentCache


def resume(folder: Path, new: int) -> None:
    """Continue `begun.pt` from `cache.safetensors` with the model in the same folder, into `ended.pt`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    cache = RecurrentCache.load(folder / "cache.safetensors", model.config)
    begun = torch.load(folder / "begun.pt")
    torch.save(model.generate(begun, cache=cache, max_new_tokens=new), folder / "ended.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        resume(each, int(sys.argv[2]))
