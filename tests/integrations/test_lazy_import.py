"""Importing the package costs little and registers everything; the command line answers before anything heavy is imported."""

import ast
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import hf_linear_attn
from hf_linear_attn.families import FAMILIES
from hf_linear_attn.registration import register

PACKAGE = Path(hf_linear_attn.__file__).parent
SECONDS = 0.3  # of a processor, from the start of Python to its end


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


OURS_FIRST = """
import sys, time
import torch, transformers
from transformers import AutoModelForCausalLM
before = time.process_time()
import hf_linear_attn
seconds = time.process_time() - before
assert seconds < 0.1 * before, (seconds, before)
loaded = [name for name in sys.modules if name.startswith("hf_linear_attn.modeling.") and "shared" not in name]
assert not loaded and "transformers.modeling_utils" not in sys.modules, loaded
model = AutoModelForCausalLM.from_pretrained(hf_linear_attn.PACKAGED_MODEL)
assert type(model) is hf_linear_attn.LeapForCausalLM is transformers.LeapForCausalLM
from transformers import LeapConfig, SeaModel  # of the module that Transformers has made anew meanwhile
assert LeapConfig is type(model.config) and SeaModel is hf_linear_attn.SeaModel
assert not hasattr(transformers.models.llama, "LeapConfig")
loaded = {name.split(".")[2] for name in sys.modules if name.startswith("hf_linear_attn.modeling.danet.modeling")}
assert not loaded, "a DANet was not asked for"
"""
# Neither process says "import hf_linear_attn" first: the pickle does, in the second one.
FROM_A_PICKLE = """
import pickle, sys
from transformers import AutoModelForCausalLM, AutoConfig, pipeline
config = pickle.loads(bytes.fromhex(sys.argv[1]))
model = AutoModelForCausalLM.from_config(config)
assert type(model).__name__ == "LeapForCausalLM" and type(config) is type(AutoConfig.for_model("leap"))
import hf_linear_attn
assert type(model) is hf_linear_attn.LeapForCausalLM
write = pipeline("text-generation", hf_linear_attn.PACKAGED_MODEL)
assert write("We", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("We")
"""


def test_importing_adds_a_tenth_at_most_and_registers():
    run("-c", OURS_FIRST)


def test_a_configuration_from_another_process():
    config = hf_linear_attn.LeapConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    run("-c", FROM_A_PICKLE, pickle.dumps(config).hex())


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["train", "--help"], ["train", "--stpes", "3"], ["generate", "--wrong", "x"]],
    ids=" ".join,
)
def test_the_command_line_answers_at_once(words):
    """Seconds of a processor, not of a clock, which other programs hold up; the least of three."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "hf_linear_attn_cli", *words], capture_output=True, env=os.environ)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < SECONDS


def test_type_checkers_see_every_public_name():
    """The block of `__init__` that only they read names what `__getattr__` finds."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    named = {alias.name: f"hf_linear_attn.{node.module}" for node in block.body for alias in node.names}
    assert named == hf_linear_attn._PLACES
    assert {*named, "__version__"} == set(hf_linear_attn.__all__) <= set(dir(hf_linear_attn))
    assert all(getattr(hf_linear_attn, name) is not None for name in hf_linear_attn.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'LeapMaximum'"):
        hf_linear_attn.LeapMaximum  # noqa: B018


def test_reading_the_records_imports_nothing():
    heavy = "[name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules]"
    load = "import sys, importlib.util as u; s = u.spec_from_file_location('hf_linear_attn.families', sys.argv[1])"
    program = f"{load}; m = u.module_from_spec(s); sys.modules[s.name] = m; s.loader.exec_module(m); print({heavy})"
    assert run("-c", program, str(PACKAGE / "families.py")) == "[]\n"


def test_registering_again_changes_nothing():
    import transformers

    before = transformers.LeapForCausalLM
    for family in FAMILIES.values():
        register(family)
    assert transformers.LeapForCausalLM is before
