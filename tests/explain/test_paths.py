"""`explain_paths` says what ran, and names what was in a faster path's way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common.families import ROWS
from gpu.test_interpreted import needs_interpreter

import hf_linear_attn
from hf_linear_attn import LeapConfig, LeapForCausalLM, RecurrentCache, explain_paths, use_backend

ROOT = Path(__file__).parents[2]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU lacks")
IDS = torch.arange(3, 15).view(2, 6)
ON_CPU = "it runs on CUDA devices, the input is on cpu"
FOLDED = "norms folded into the projections"


def build(**options):
    torch.manual_seed(0)
    size = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    return LeapForCausalLM(LeapConfig(**size, **{"layer_windows": [4, None], **options}))


def blocks(table):
    return [row for row in table if row.function == "LeapBlock.forward"]


def test_what_ran_and_where():
    table = explain_paths(build(), {"input_ids": IDS, "labels": IDS}, training=True)
    assert [row.layer for row in blocks(table)] == ["model.layers.0", "model.layers.1"]
    assert {row.path for row in blocks(table)} == {"plain PyTorch"}
    assert all(row.reasons[FOLDED] == ON_CPU for row in blocks(table))
    mechanism = [row for row in table if row.function == "leap_mechanism"]
    assert [row.path for row in mechanism] == 2 * ["backward written out"]
    assert {row.layer for row in table if row.function == "vocabulary_logits"} == {"lm_head"}


def test_it_prints_as_a_table_without_repetitions():
    text = str(explain_paths(build(), {"input_ids": IDS}, training=True))
    assert "model.layers.* (2 layers)" in text
    assert text.count(f"not {FOLDED!r}: {ON_CPU}") == 1
    assert "another kind of call" not in text


def test_it_leaves_everything_as_it_was():
    model = build().eval()
    cache = RecurrentCache(config=model.config)
    with torch.no_grad():
        model(IDS, cache=cache, use_cache=True)
    before = [x.clone() for layer in cache.layers for x in layer.saved_tensors().values()]
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    step = explain_paths(model, {"input_ids": IDS[:, :1], "cache": cache}, training=False)
    assert all("one decoding step in four kernels" in row.reasons for row in blocks(step))
    explain_paths(model, {"input_ids": IDS}, training=True)
    assert torch.rand(1) == wanted
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    after = [x for layer in cache.layers for x in layer.saved_tensors().values()]
    assert all(map(torch.equal, before, after))


def hooked(model):
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *arguments: None)
    return model


def adapted(model):
    peft = pytest.importorskip("peft", reason="needs peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"]))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "a forward or backward hook is registered on Linear"),
        (adapted, "more than a Linear with its weight: a Linear of peft (adapted"),
        (lambda model: model.double(), "it takes float32, bfloat16 or float16 throughout, not float64"),
    ],
    ids=["hook", "adapter", "float64"],
)
def test_what_is_more_than_its_weights_is_named(change, reason):
    row = blocks(explain_paths(change(build()), {"input_ids": IDS}, training=True))[0]
    assert reason in row.reasons[FOLDED]


def test_autocast_and_padding_are_named():
    with torch.autocast("cpu", torch.bfloat16):
        rows = blocks(explain_paths(build(), {"input_ids": IDS}, training=True))
    assert all("autocast is on for cpu" in row.reasons[FOLDED] for row in rows)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    near, whole = blocks(explain_paths(build(), {"input_ids": IDS, "attention_mask": mask}, training=True))
    assert "there is padding" in near.reasons["all after the projections as one step"]
    assert "padding" not in whole.reasons["all after the projections as one step"]


def test_the_backend_that_is_asked_for():
    with use_backend("torch"):
        rows = blocks(explain_paths(build(), {"input_ids": IDS}, training=True))
    assert all('use_backend("torch") is in force' in row.reasons[FOLDED] for row in rows)
    model = hooked(build())
    with use_backend("triton"), pytest.raises(ValueError, match="hook is registered on Linear"):
        explain_paths(model, {"input_ids": IDS}, training=True)


def test_a_model_without_our_layers_is_refused():
    with pytest.raises(ValueError, match="no layer of hf_linear_attn"):
        explain_paths(torch.nn.Linear(2, 2), {"input": torch.ones(1, 2)})


@pytest.mark.parametrize("row", [row for row in ROWS if row.name == row.family], ids=lambda row: row.name)
def test_every_family_runs(row):
    model = row.build("AutoModelForCausalLM")
    explain = explain_paths(model, {"input_ids": IDS, "labels": IDS}, training=True)
    assert any(entry.function == "_summed_loss" for entry in explain)


FAST = """
import torch
from explain.test_paths import IDS, RecurrentCache, blocks, build, explain_paths, use_backend
model = build().eval()
cache = RecurrentCache(config=model.config)
with torch.no_grad():
    model(IDS, cache=cache, use_cache=True)
with use_backend("triton"):
    step = explain_paths(model, {"input_ids": IDS[:, :1], "cache": cache})
    train = explain_paths(model, {"input_ids": IDS}, training=True)
print([row.path for row in blocks(step)], [row.path for row in blocks(train)])
"""


@on_cpu
@needs_interpreter
def test_kernels_that_ran_are_named():
    source = Path(hf_linear_attn.__file__).parents[1]
    path = os.pathsep.join([str(source), str(ROOT / "tests"), str(ROOT)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", FAST], capture_output=True, text=True, cwd=ROOT, env=environment)
    steps, blocks_in_training = 2 * ["one decoding step in four kernels"], 2 * ["all after the projections as one step"]
    assert done.stdout.strip() == f"{steps} {blocks_in_training}", done.stderr[-2000:]
