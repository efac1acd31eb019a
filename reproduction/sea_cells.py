"""How much of a language model's attention SEA could keep: k keys chosen with knowledge of it, whole cells, and cells without.

    python -m reproduction sea-language prepare --output outputs/sea-language
    python -m reproduction sea-cells measure --data outputs/sea-language --json docs/data/sea-cells.json
    python -m reproduction sea-cells table --json docs/data/sea-cells.json

The teacher (SmolLM2 as packed, before fine-tuning) reads one row of test text. For sampled query rows of every layer: the share
of the attention on

* keys: the H k keys of largest weight in a row, over all heads (no cells);
* cells: the best whole cells of the budget, the most that an estimator of M cells can reach;
* fixed: the cells that are best for a head on average over the rows, as an estimator keeps that knows heads, but not texts;
* prior: those of a converted model before distillation (the first and the near ones, alike in all heads).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import machine
from hf_linear_attn.modeling.sea.cells import cell_budget, key_to_cell
from hf_linear_attn.modeling.sea.losses import TeacherTargets
from hf_linear_attn.training.sea_distillation import record_targets
from hf_linear_attn.training.tokenized_text import TokenizedText

from .compact_weights import unpack
from .recipe import Recipe, option, write

CELLS = (64, 128, 256, 512)
FIRST_ROW, STEP = 300, 37  # earlier rows see few keys more than they may keep


def measure(options: argparse.Namespace) -> None:
    """Read the row, write the shares by layer."""
    ids = TokenizedText.load(options.data / "tokens.npz").ids["test"]
    row = ids[options.row * options.length : (options.row + 1) * options.length]
    model = unpack(options.data / "smollm2.npz", AutoModelForCausalLM).eval()
    targets, _ = record_targets(model, {"input_ids": torch.from_numpy(row.astype(np.int64))[None]})
    layers = [shares(targets[layer], options.k) for layer in sorted(targets)]
    report = {"k": options.k, "length": options.length, "row": options.row, "layers": layers, "machine": machine()}
    write(options.json, report)


def shares(layer: TeacherTargets, k: int) -> dict:
    """Of one layer: "keys", and "cells", "fixed" and "prior" by M."""
    heads, length = layer.q.shape[1:3]
    rows = torch.arange(FIRST_ROW, length, STEP)
    rank, visible = torch.arange(length), rows + 1
    scores = layer.rows(rows)[0].float().masked_fill(rank > rows[:, None], -torch.inf)  # (H, R, T)
    probs = scores.softmax(dim=-1)
    found: dict = {"keys": _kept(probs, probs, torch.full_like(rows, heads * k))}
    for cells in CELLS:
        cell = key_to_cell(rank, visible[:, None], cells).expand_as(probs)
        pooled = torch.zeros(heads, len(rows), cells).scatter_add_(-1, cell, probs)
        budget = cell_budget(visible, k, heads, cells, "causal_batch")
        prior = -torch.arange(cells - 1, -1, -1).float().log1p()
        prior[0] = 0.0
        orders = {
            "cells": pooled,
            "fixed": pooled.mean(dim=1, keepdim=True).expand_as(pooled),
            "prior": prior.expand_as(pooled),
        }
        for name, order in orders.items():
            found.setdefault(name, {})[cells] = _kept(pooled, order, budget)
    return found


def _kept(weights: torch.Tensor, order: torch.Tensor, budget: torch.Tensor) -> float:
    """Mean share of the weights (H, R, X) in the first `budget` (R,) entries of each row by `order`, over all heads."""
    ranked = order.permute(1, 2, 0).flatten(1).argsort(dim=-1, descending=True, stable=True)  # ties: heads in turn
    sums = weights.permute(1, 2, 0).flatten(1).gather(-1, ranked).cumsum(-1)
    return (sums.gather(-1, budget[:, None] - 1).mean() / weights.shape[0]).item()


def table(options: argparse.Namespace) -> None:
    """Means over layers, and over the groups of layers that differ."""
    report = json.loads(options.json.read_text())
    layers, k = report["layers"], report["k"]
    groups = {"all layers": layers, "layer 0": layers[:1], "layers 3 to 8": layers[3:9], "layers 10 on": layers[10:]}
    print("| share of the attention kept | " + " | ".join(groups) + " |")
    print("|---|" + "---:|" * len(groups))

    def line(name: str, values) -> None:
        print(
            f"| {name} | "
            + " | ".join(f"{np.mean([values(x) for x in group]):.0%}" for group in groups.values())
            + " |"
        )

    line(f"the best {k} keys a head", lambda layer: layer["keys"])
    for cells in map(str, CELLS):
        for kind, words in (
            ("cells", "the best cells"),
            ("fixed", "the best fixed cells"),
            ("prior", "the prior's cells"),
        ):
            line(f"{words}, M = {cells}", lambda layer, kind=kind, cells=cells: layer[kind][cells])


_JSON = option("--json", Path("outputs/sea-cells.json"))
RECIPE = Recipe(
    reproduces="nothing published: what SEA's k keys in M cells can hold of a pretrained model's attention",
    results=("sea-cells.json",),
    stages={
        measure: [
            option("--data", Path("outputs/sea-language")),
            option("--k", 64),
            option("--length", 2048),
            option("--row", 20),
            _JSON,
        ],
        table: [_JSON],
    },
)
