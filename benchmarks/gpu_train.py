"""Training throughput on a GPU: forward + backward of bodies, ours beside peers, in one process.

python -m benchmarks.gpu_train --lengths 1024 16384 --json out.json
"""

import argparse
import json
import statistics

import torch
from transformers import GPT2Config, GPT2Model

from hf_linear_attn import LeapConfig, LeapModel
from hf_linear_attn.modeling.backend import use_backend

from .published_leap import PublishedLeap

TOKENS = 65536


def bodies(length):
    """12 layers of width 768, name -> (make, compiled?, backend)."""
    size = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 64}
    leap = {**size, "max_position_embeddings": length, "hidden_dropout_prob": 0.0}
    gpt = GPT2Config(
        vocab_size=64, n_embd=768, n_layer=12, n_head=12, n_positions=length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return {
        "LEAP kernels, compiled": (lambda: LeapModel(LeapConfig(**leap)), True, "auto"),
        "LEAP kernels, eager": (lambda: LeapModel(LeapConfig(**leap)), False, "auto"),
        "LEAP torch, compiled": (lambda: LeapModel(LeapConfig(**leap)), True, "torch"),
        "published LEAP, compiled": (
            lambda: PublishedLeap(64, 768, 12, LeapConfig(**leap).layer_windows, length),
            True,
            "auto",
        ),
        "GPT-2 SDPA, compiled": (lambda: GPT2Model(gpt), True, "auto"),
        "GPT-2 SDPA, eager": (lambda: GPT2Model(gpt), False, "auto"),
    }


def measure(make, compiled, backend, length, steps=5):
    """Thousand tokens a second (median, spread) and peak GiB of forward + backward in bf16."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    model = make().to("cuda", torch.bfloat16).train()
    ids = torch.randint(0, 64, (max(1, TOKENS // length), length), device="cuda")
    run = torch.compile(model) if compiled else model

    def step():
        model.zero_grad(set_to_none=True)
        out = run(ids) if isinstance(model, PublishedLeap) else run(ids, use_cache=False).last_hidden_state
        out.float().square().mean().backward()

    with use_backend(backend):
        for _ in range(3):
            step()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(steps):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
    speed = [ids.numel() / t for t in times]
    return {
        "ktokens_per_s": round(statistics.median(speed), 1),
        "spread": [round(min(speed), 1), round(max(speed), 1)],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main():
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 16384])
    parser.add_argument("--only", default="")
    parser.add_argument("--json", help="written after every case")
    arguments = parser.parse_args()
    results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": []}
    for length in arguments.lengths:
        for name, case in bodies(length).items():
            if arguments.only and arguments.only not in name:
                continue
            try:
                row = measure(*case, length)
            except Exception as error:
                row = {"error": f"{type(error).__name__}: {str(error)[:150]}"}
            results["cases"].append({"length": length, "name": name, **row})
            print(length, name, row, flush=True)
            if arguments.json:
                with open(arguments.json, "w") as file:
                    json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
