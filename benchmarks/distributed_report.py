"""Losses of the distributed example on two GPUs beside those of one process on a CPU.

python -m pytest tests/distributed/test_training_example.py -m gpu -k two_gpus --basetemp=FOLDER
python -m benchmarks.distributed_report --collect FOLDER      the folders of these runs into docs/data/distributed.json
python -m benchmarks.distributed_report                       the table, from that file

The test runs the shipped configurations (DDP, FSDP2, DeepSpeed ZeRO-2) with the same batches as the one process.
"""

import argparse
import json
from importlib import metadata
from pathlib import Path

JSON = Path(__file__).parents[1] / "docs" / "data" / "distributed.json"
CONFIGURATIONS = {"MULTI_GPU": "DDP", "FSDP": "FSDP2", "DEEPSPEED": "DeepSpeed ZeRO-2"}


def collect(folder: Path) -> dict:
    """What each run wrote down, by the model that lies beside it."""
    from .registry import machine

    alone, runs = {}, []
    for file in sorted(folder.rglob("losses.json")):
        config = json.loads((file.parent / "config.json").read_text())
        model = config["model_type"] + ("" if config.get("is_causal", True) else "-encoder")
        found = json.loads(file.read_text())
        if file.parent.parent.name == "alone":
            alone[model] = found["losses"]
        elif found["kind"] in CONFIGURATIONS and not any(path.is_symlink() for path in file.parents):
            runs.append({"model": model, **found})
    versions = {name: metadata.version(name) for name in ("accelerate", "deepspeed")}
    return {"machine": machine() | versions, "alone": alone, "runs": runs}


def main() -> None:
    """Print the table, or make the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path, default=JSON)
    options = parser.parse_args()
    if options.collect:
        options.json.write_text(json.dumps(collect(options.collect), indent=1) + "\n")
    found = json.loads(options.json.read_text())
    print("| configuration | model | processes | sharded parameters | largest difference of a loss |")
    print("|---|---|---:|---:|---:|")
    for run in found["runs"]:
        difference = max(abs(loss - found["alone"][run["model"]][step]) for step, loss in run["losses"].items())
        print(
            f"| {CONFIGURATIONS[run['kind']]} | {run['model']} | {run['processes']} | {run['sharded_parameters']} "
            f"| {difference:.0e} |"
        )


if __name__ == "__main__":
    main()
