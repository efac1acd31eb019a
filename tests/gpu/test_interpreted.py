"""The small kernel cases on a CPU, through Triton's interpreter, in a process of their own: it is chosen before Triton loads.

Also: a machine with Triton, or with flash-linear-attention, and no GPU runs everything in plain PyTorch.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Of each module one case or a few of every kernel, by their mark, in one process: all of them take four minutes.
MODULES = {
    path.stem: path.read_text()
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    if "mark.interpreted" in path.read_text() and path.name != Path(__file__).name
}


RUN_EVERY_FAMILY = """
import torch
import hf_linear_attn
from transformers import AutoConfig, AutoModel
from hf_linear_attn.modeling.kernels import dispatch as backend
assert backend.HAS_TRITON, "the machine of this test has Triton"
size = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1, "max_position_embeddings": 64}
for family in ("leap", "fastformer", "danet"):
    model = AutoModel.from_config(AutoConfig.for_model(family, **size))
    out = model(torch.randint(0, 20, (2, 40))).last_hidden_state
    out.square().mean().backward()
    with torch.no_grad():
        model.eval()(torch.randint(0, 20, (2, 40)))
from hf_linear_attn.modeling.sea.attention import SeaAttentionCore, SeaOptions
layer = SeaAttentionCore(SeaOptions(2, 8, True, 4, 8, max_positions=32))
layer(*torch.randn(3, 1, 2, 20, 8).requires_grad_()).context.sum().backward()
print("ran")
"""


def run(arguments: list[str], **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


def needs_interpreter(test):
    """Skip where there is a GPU, or no Triton."""
    test = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel tests run on the GPU itself")(test)
    reason = "needs the package triton (part of the extra `dev` on Linux)"
    return pytest.mark.skipif(not HAS_TRITON, reason=reason)(test)


def interpret(modules, *selection: str) -> str:
    """Run the modules' tests that are small enough, or those of a selection; each takes up to seconds. Lists what passed."""
    files = [f"tests/gpu/{module}.py" for module in modules]
    done = run(["-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", *files, *selection], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def quick_run():
    """The quick cases of all modules in one process: what was printed."""
    return interpret(MODULES, "-m", "interpreted")


@needs_interpreter
@pytest.mark.parametrize("module", MODULES)
def test_small_cases_through_the_interpreter(quick_run, module):
    """Of every module a case ran, and of every test that has the mark by itself."""
    assert f"PASSED tests/gpu/{module}.py::" in quick_run
    for test in re.findall(r"^@pytest\.mark\.interpreted.*\ndef (test_\w+)", MODULES[module], flags=re.MULTILINE):
        assert re.search(rf"^PASSED tests/gpu/{module}\.py::{test}\b", quick_run, flags=re.MULTILINE), test


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize("module", MODULES)
def test_all_small_cases_through_the_interpreter(module):
    assert "PASSED" in interpret([module])


def write_package(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


def path_with(folder: Path) -> str:
    return os.pathsep.join([str(folder), str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])


def test_kernel_packages_without_a_gpu(tmp_path):
    """They are installed, but nothing may load them: the stand-ins fail when imported, as the real ones may without a driver."""
    for name in ("triton", "fla"):
        if name == "triton" and HAS_TRITON:
            continue  # the real one
        write_package(tmp_path, name, f"raise RuntimeError('{name} was loaded on a machine without a GPU')\n")
    done = run(["-c", RUN_EVERY_FAMILY], PYTHONPATH=path_with(tmp_path))
    assert done.stdout.strip().endswith("ran"), done.stderr[-3000:]
