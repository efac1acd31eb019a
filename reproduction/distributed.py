"""Losses of the distributed example on two GPUs beside those of one process on a CPU.

    python -m pytest tests/distributed/test_training_example.py -m gpu -k two_gpus --basetemp=FOLDER
    python -m reproduction distributed collect --folder FOLDER   the folders of these runs into docs/data/distributed.json
    python -m reproduction distributed table

The test runs the shipped configurations (DDP, FSDP2, DeepSpeed ZeRO-2) with the same batches as the one process.
"""

import argparse
import json
from importlib import metadata
from pathlib import Path

from benchmarks.harness import machine

from .recipe import DATA, Recipe, option, write

CONFIGURATIONS = {"MULTI_GPU": "DDP", "FSDP": "FSDP2", "DEEPSPEED": "DeepSpeed ZeRO-2"}


def collect(options: argparse.Namespace) -> None:
    """What each run wrote down, by the model that lies beside it, into one file."""
    alone, runs = {}, []
    for file in sorted(options.folder.rglob("losses.json")):
        config = json.loads((file.parent / "config.json").read_text())
        model = config["model_type"] + ("" if config.get("is_causal", True) else "-encoder")
        found = json.loads(file.read_text())
        if file.parent.parent.name == "alone":
            alone[model] = found["losses"]
        elif found["kind"] in CONFIGURATIONS and not any(path.is_symlink() for path in file.parents):
            runs.append({"model": model, **found})
    versions = {name: metadata.version(name) for name in ("accelerate", "deepspeed")}
    write(options.json, {"machine": machine() | versions, "alone": alone, "runs": runs})


def table(options: argparse.Namespace) -> None:
    """The largest difference of each run."""
    found = json.loads(options.json.read_text())
    print("| configuration | model | processes | sharded parameters | largest difference of a loss |")
    print("|---|---|---:|---:|---:|")
    for run in found["runs"]:
        difference = max(abs(loss - found["alone"][run["model"]][step]) for step, loss in run["losses"].items())
        print(
            f"| {CONFIGURATIONS[run['kind']]} | {run['model']} | {run['processes']} | {run['sharded_parameters']} "
            f"| {difference:.0e} |"
        )


_JSON = option("--json", DATA / "distributed.json")
RECIPE = Recipe(
    reproduces="nothing published: several processes learn what one learns",
    results=("distributed.json",),
    stages={collect: [_JSON, option("--folder", help="of the test's runs", type=Path, required=True)], table: [_JSON]},
)
