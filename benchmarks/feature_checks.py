"""What works unchanged: 31 checks of a causal language model in Transformers, the same for every model, on tiny random ones.

    python -m benchmarks.feature_checks                      every model that needs no GPU; writes docs/data/features.json
    python -m benchmarks.feature_checks --only LEAP Mamba2   some of them; the others stay in the file as they were
    python -m benchmarks.feature_checks --gpu                flash-linear-attention (and the same of ours), on a GPU
    python -m benchmarks.feature_table                       docs/features.md from that file

A check passes only where the numbers agree: within 1e-4 in float32 unless it says otherwise.
"""

import argparse
import contextlib
import io
import json
import platform
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

from .features import inference, integrations, training
from .features.models import SUBJECTS, Subject, flash_linear_attention, on_gpu

RESULTS = Path(__file__).parents[1] / "docs" / "data" / "features.json"
CHECKS = {check.__name__: check for check in (*inference.CHECKS, *training.CHECKS)}
MORE = {check.__name__: check for check in integrations.CHECKS}
# What a model that does not generate has no use for.
NEEDS_CAUSAL = {
    "right_padded_prefill", "ragged_generation", "one_token_a_step", "two_chunks", "fixed_state", "greedy", "beam",
    "several_returns", "prefill_chunks", "static_cache", "assisted", "packing_by_positions", "packing_by_offsets",
    "compiled_decode", "logits_to_keep", "prompt_lookup", "forked_state", "saved_state", "prompt_tuning", "prefix_tuning",
    "pipeline_generation",
}  # fmt: skip


def examine(subject: Subject, names: list[str] | None = None) -> dict[str, dict]:
    """Run the checks: name -> {"passed": True, False or None (does not apply), "reason": first line of the error}."""
    found = {}
    for name in names or (*CHECKS, *MORE):
        if name in NEEDS_CAUSAL and not subject.causal:
            found[name] = {"passed": None, "reason": "an encoder: it sees both sides of a token and does not generate"}
            continue
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                (CHECKS | MORE)[name](subject)
            found[name] = {"passed": True, "reason": ""}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            found[name] = {"passed": False, "reason": f"{type(error).__name__}: {lines[0]}"[:300]}
    return found


def title(name: str) -> str:
    """What a check says it checks."""
    return ((CHECKS | MORE)[name].__doc__ or name).strip()


def main(arguments: list[str] | None = None) -> int:
    """Examine, print a line a model, and merge into the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument(
        "--checks", nargs="+", choices=[*CHECKS, *MORE], metavar="CHECK", help="some of the checks alone"
    )
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    subjects = SUBJECTS
    if options.gpu:
        subjects = flash_linear_attention() | {name: on_gpu(each) for name, each in SUBJECTS.items()}
    wanted = options.only or list(subjects)
    unknown = sorted(set(wanted) - set(subjects))
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(subjects)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in wanted:
        started = time.perf_counter()
        key = f"{name} on a GPU" if options.gpu and name in SUBJECTS else name
        place = results.setdefault(key, {"checks": {}})
        place["measured on"] = _machine(subjects[name])
        for check in options.checks or (*CHECKS, *MORE):
            result = examine(subjects[name], [check])[check]
            place["checks"][check] = result
            if result["passed"] is False:
                print(f"    {check}: {result['reason'][:160]}", flush=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n")
        verdicts = [place["checks"][check]["passed"] for check in CHECKS if check in place["checks"]]
        asked = sum(each is not None for each in verdicts)
        print(f"{name}: {verdicts.count(True)} of {asked} in {time.perf_counter() - started:.0f} s", flush=True)
    return 0


def _machine(subject: Subject) -> str:
    device = torch.cuda.get_device_name() if subject.device == "cuda" else "CPU"
    return f"{device}, Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


if __name__ == "__main__":
    sys.exit(main())
