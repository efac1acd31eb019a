"""Encoder throughput on a GPU: forward of bodies of about 335M parameters in bf16, ours beside peers, in one process.

    python -m benchmarks.gpu_encoder --lengths 128 1024 16384 131072 --json out.json

131072 tokens a batch, no head. Every contender's blocks are compiled one by one (torch.compile of a block, shared by all). The
published DANet stands here as its block in plain PyTorch, written from the specification, sections 1 to 3.
"""

import argparse
import json
import platform
import statistics

import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel

from hf_linear_attn import DanetConfig, DanetModel

TOKENS = 131072


class PublishedDanetBlock(nn.Module):
    """Global block with MaxNorm and ReLU: h + norm(FFN(attention(norm(h) n^(-1/3)))). h (B, T, d)."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(width, width) * 1e-4)
        self.expand = nn.Parameter(torch.randn(width, 4 * width) * 0.01)
        self.contract = nn.Parameter(torch.randn(4 * width, width) * 0.01)

    def forward(self, hidden, scale):
        x = hidden / (hidden.abs().amax(-1, keepdim=True) + 1e-3) * scale
        query = x @ self.queries.T
        if hidden.shape[-1] <= hidden.shape[1]:
            mixed = query @ (x.transpose(1, 2) @ x)
        else:
            mixed = (query @ x.transpose(1, 2)) @ x
        out = torch.relu(mixed @ self.expand) @ self.contract
        return hidden + out / (out.abs().amax(-1, keepdim=True) + 1e-3)


class PublishedDanet(nn.Module):
    """Embeddings, 32 such blocks, final MaxNorm."""

    def __init__(self, length: int):
        super().__init__()
        self.words, self.positions = nn.Embedding(30528, 1024), nn.Embedding(length, 1024)
        self.layers = nn.ModuleList(PublishedDanetBlock(1024) for _ in range(32))

    def forward(self, ids):
        hidden = self.words(ids) + self.positions.weight
        hidden = hidden / (hidden.abs().amax(-1, keepdim=True) + 1e-3)
        scale = hidden.new_full((ids.shape[0], ids.shape[1], 1), ids.shape[1] ** (-1 / 3))
        for layer in self.layers:
            hidden = layer(hidden, scale)
        return hidden / (hidden.abs().amax(-1, keepdim=True) + 1e-3)


def contenders(length):
    """Name -> function that makes (model, its blocks)."""

    def ours():
        model = DanetModel(DanetConfig.preset("bert-large-128", max_position_embeddings=length, attention_mode="auto"))
        return model, model.layers

    def published():
        model = PublishedDanet(length)
        return model, model.layers

    def bert():
        size = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        config = BertConfig(vocab_size=30528, max_position_embeddings=length, attn_implementation="sdpa", **size)
        model = BertModel(config, add_pooling_layer=False)
        return model, model.encoder.layer

    return {"DANet, ours": ours, "DANet, published block": published, "BERT, FlashAttention (SDPA)": bert}


@torch.inference_mode()
def measure(make, length, runs):
    """Thousand tokens a second, median and spread, and peak GiB."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    model, layers = make()
    model = model.to("cuda", torch.bfloat16).eval()
    for layer in layers:
        layer.compile()
    ids = torch.randint(0, 30000, (max(1, TOKENS // length), length), device="cuda")
    for _ in range(2):
        model(ids)
    torch.cuda.reset_peak_memory_stats()
    speed = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        model(ids)
        end.record()
        torch.cuda.synchronize()
        speed.append(ids.numel() / start.elapsed_time(end))
    return {
        "ktokens_per_s": round(statistics.median(speed), 1),
        "spread": [round(min(speed), 1), round(max(speed), 1)],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main():
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 16384, 131072])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "dtype": "bfloat16",
        "tokens": TOKENS,
    }
    cases = []
    for length in arguments.lengths:
        for name, make in contenders(length).items():
            try:
                row = measure(make, length, arguments.runs)
            except Exception as error:
                row = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            cases.append({"length": length, "name": name, **row})
            print(length, name, row, flush=True)
            if arguments.json:
                with open(arguments.json, "w") as file:
                    json.dump({**about, "cases": cases}, file, indent=1)


if __name__ == "__main__":
    main()
