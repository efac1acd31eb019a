"""Loads every repository of a Hub with `trust_remote_code=True` and reports what came; run where the package is absent.

    python -S remote_loader.py REQUESTS.json ANSWERS.json

Requests: [{"name", "repo", "head", "causal", "again"}]. Each answer holds the outputs, the generated ids, the `auto_map` that
`save_pretrained` writes, and with "again" outputs and ids once more from that folder; or {"error": ...}.
"""

import importlib.util
import json
import sys
import tempfile
import traceback

import torch
import transformers

assert importlib.util.find_spec("hf_linear_attn") is None, "this process was to run without the package"


def outputs(model, causal, ids):
    """First output and greedy continuation, as lists."""
    many = type(model).__name__.endswith("MultipleChoice")
    with torch.no_grad():
        first = model(ids[:, None].expand(-1, 2, -1) if many else ids)[0]
    generated = None
    if causal:
        generated = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        generated = generated.tolist()
    return {"first": first.tolist(), "generated": generated}


def answer(request, ids):
    """Load, compute, save; load again, compute again."""
    auto_class = getattr(transformers, request["head"])
    model = auto_class.from_pretrained(request["repo"], trust_remote_code=True).eval()
    found = {"module": type(model).__module__, "loaded": outputs(model, request["causal"], ids)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if request["again"]:
            again = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
            found["saved again"] = outputs(again, request["causal"], ids)
        with open(f"{folder}/config.json") as file:
            found["auto_map"] = json.load(file)["auto_map"]
    return found


def main(requests_path, answers_path):
    """Answer all requests; a failure is an answer, too."""
    with open(requests_path) as file:
        work = json.load(file)
    answers = {}
    for request in work["requests"]:
        try:
            answers[request["name"]] = answer(request, torch.tensor(work["ids"]))
        except Exception:
            answers[request["name"]] = {"error": traceback.format_exc()[-3000:]}
    with open(answers_path, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
