"""Kernels make the families faster and nothing else: in a copy of the package without their `kernels/` folders the tests pass."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_linear_attn

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[1]
# Families whose models and mechanisms run without the folder.
FAMILIES = ["leap", "fastformer"]
# A few rows of the matrix for each: a state and padding, gradients of a padded batch, generate().
TESTS = "test_calls_with_a_state_are_one_call or test_outputs_and_gradients or test_left_padded_batch"
FILES = ["test_matrix_forward.py", "test_matrix_padding.py", "test_matrix_generate.py"]

RUN = """
import sys
import hf_linear_attn, pytest
assert hf_linear_attn.__file__.startswith(sys.argv[1]), hf_linear_attn.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""


def copy_without_kernels(target: Path) -> Path:
    """The package below `target`, less the kernels of the families."""
    package = target / "src" / "hf_linear_attn"
    shutil.copytree(Path(hf_linear_attn.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for family in FAMILIES:
        shutil.rmtree(package / "modeling" / family / "kernels", ignore_errors=True)
    return package


def test_families_without_their_kernels(tmp_path):
    package = copy_without_kernels(tmp_path)
    assert not (package / "modeling" / "leap" / "kernels").exists()
    files = [str(ROOT / "tests" / name) for name in FILES]
    rows = " or ".join(FAMILIES)
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files, "-k", f"({rows}) and ({TESTS})"]
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
