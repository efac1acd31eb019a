"""The house: where things may lie, what may import what, and who may know of Triton, hooks, autocast and compilers.

Each rule is a function of a `modeling` folder that lists what breaks it. The package breaks none, and each rule sees a small tree
in which it was broken on purpose.
"""

import ast
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

import hf_linear_attn

MODELING = Path(hf_linear_attn.__file__).parent / "modeling"
FAMILIES = {"leap", "fastformer", "danet", "sea"}
# Questions to PyTorch that only `kernels/` folders ask; other files use the words of `kernels/tracing.py`. `compat` names what
# Transformers names.
WORDS = {
    "is_grad_enabled", "set_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_autocast_dtype", "autocast",
    "is_compiling", "_dynamo", "triton", "runs_triton", "torch.compile", "torch.compiler", "_forward_hooks", "_forward_pre_hooks",
    "_backward_hooks", "_backward_pre_hooks", "has_hooks", "register_forward_hook", "register_forward_pre_hook",
    "register_full_backward_hook", "register_full_backward_pre_hook", "register_hook", "register_module_forward_hook",
}  # fmt: skip
MOST_PARAMETERS = 20  # of a kernel
MOST_FILES = 16  # in a folder
# Where mypy has to check everything.
STRICT = (
    "families",
    "modeling.shared",
    *(f"modeling.kernels.{name}" for name in ("conditions", "dispatch", "fast_paths", "plain_layers", "tracing")),
)


def files(root: Path) -> dict[str, ast.Module]:
    """Each file's place below `root` and its code."""
    return {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*.py"))
    }


def imports(root: Path, place: str, code: ast.Module):
    """Each relative import of a file: its node and the file it leads to."""
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (root / place).parents[node.level - 1]
            yield node, base.joinpath(*(node.module or "").split(".")).with_suffix(".py")


def words_in(code: ast.Module) -> set[str]:
    """The words of `WORDS` in a file's code: as a name, an attribute, a string by itself, or a part of an import's path."""
    found: set[str] = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found |= {node.attr, ast.unparse(node)}
        elif isinstance(node, ast.Constant):
            found |= {node.value} if isinstance(node.value, str) else set()
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            found |= {part for name in node.names for part in name.name.split(".")} | set(module.split("."))
            found |= {f"{module}.{name.name}" if module else name.name for name in node.names}
    return found & WORDS


def asking_pytorch(root: Path) -> list[str]:
    """Files outside of `kernels/` folders that ask PyTorch how it runs."""
    asking = {place: words_in(code) for place, code in files(root).items() if "kernels" not in place.split("/")[:-1]}
    return [f"{place}: {sorted(words)}" for place, words in asking.items() if words and place != "shared/compat.py"]


def leading_up(root: Path) -> list[str]:
    """Imports from a floor above, or from another family: families -> shared -> kernels."""
    below = {"kernels": {"kernels"}, "shared": {"shared", "kernels"}}
    wrong = []
    for place, code in files(root).items():
        here = place.split("/")[0]
        for _, to in imports(root, place, code):
            there = to.relative_to(root).parts[0] if to.is_relative_to(root) else "outside"
            if there not in below.get(here, {here, "shared", "kernels"}):
                wrong.append(f"{place} -> {to.name} of {there}")
    return wrong


def leading_out(root: Path) -> list[str]:
    """Imports of the package by its name: what travels with a checkpoint has to work without it."""
    wrong = []
    for place, code in files(root).items():
        for node in ast.walk(code):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            wrong += [f"{place}: {name}" for name in names if name.split(".")[0] == "hf_linear_attn"]
    return wrong


def not_exportable(root: Path) -> list[str]:
    """All but `from .x import name` from a file that is there, and strings that look like it; see the exporter."""
    wrong = []
    for place, code in files(root).items():
        for node, to in imports(root, place, code):
            if not node.module or [name.name for name in node.names] == ["*"] or not to.is_file():
                wrong.append(f"{place}:{node.lineno}: {ast.unparse(node)}")
        strings = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
        lines = [line.strip() for value in strings if isinstance(value, str) for line in value.splitlines()]
        wrong += [f"{place}: a string: {line}" for line in lines if line.startswith(("from .", "import ."))]
    return wrong


def too_full(root: Path) -> list[str]:
    """Folders of too many files."""
    numbers = {folder: len(list(folder.glob("*.py"))) for folder in (root, *root.rglob("*")) if folder.is_dir()}
    return [f"{x.name}: {n} files" for x, n in numbers.items() if n > MOST_FILES]


def too_many_parameters(root: Path) -> list[str]:
    """Triton kernels and their parts that take too much one by one: strides, sizes and pointers of a kind travel in tuples."""
    wrong = []
    for place, code in files(root).items():
        for node in ast.walk(code):
            if isinstance(node, ast.FunctionDef) and any("triton." in ast.unparse(x) for x in node.decorator_list):
                number = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
                wrong += [f"{place}: {node.name} takes {number}"] if number > MOST_PARAMETERS else []
    return wrong


RULES = (asking_pytorch, leading_up, leading_out, not_exportable, too_full, too_many_parameters)
# A rule, and a file that breaks it where every other file is as it should be.
FAULTS = {
    "triton": (asking_pytorch, "leap/new.py", "import triton"),
    "triton-from-the-shim": (asking_pytorch, "shared/new.py", "from ..kernels.shim import triton"),
    "compile": (asking_pytorch, "leap/new.py", "import torch\nstep = torch.compile(print)"),
    "compile-by-name": (asking_pytorch, "leap/new.py", "from torch import compile"),
    "autocast": (asking_pytorch, "leap/new.py", "import torch\nwith torch.autocast('cuda'):\n    pass"),
    "hooks": (asking_pytorch, "shared/new.py", "def f(layer):\n    return layer._forward_hooks"),
    "hooks-by-a-string": (
        asking_pytorch,
        "shared/new.py",
        "def f(layer):\n    return getattr(layer, '_forward_hooks')",
    ),
    "gradient-mode": (asking_pytorch, "leap/modeling_leap.py", "import torch\ntorch.is_grad_enabled()"),
    "another-family": (leading_up, "leap/new.py", "from ..fastformer.modeling_fastformer import x"),
    "another-family-in-a-kernel": (
        leading_up,
        "leap/kernels/new.py",
        "from ...fastformer.modeling_fastformer import x",
    ),
    "from-shared-up": (leading_up, "shared/new.py", "def f():\n    from ..leap.modeling_leap import x"),
    "from-kernels-up": (leading_up, "kernels/new.py", "from ..shared.sequence import x"),
    "relative-out": (leading_up, "shared/new.py", "from ...families import x"),
    "by-name-out": (leading_out, "leap/new.py", "import hf_linear_attn.families"),
    "by-name-from-out": (leading_out, "leap/new.py", "from hf_linear_attn import x"),
    "no-file": (not_exportable, "leap/new.py", "from .missing import x"),
    "a-module": (not_exportable, "leap/new.py", "from . import modeling_leap"),
    "a-star": (not_exportable, "leap/new.py", "from .modeling_leap import *"),
    "a-string": (not_exportable, "leap/new.py", 'TEXT = """\nfrom .modeling_leap import x\n"""'),
    "parameters": (
        too_many_parameters,
        "kernels/new.py",
        f"from .shim import triton\n@triton.jit\ndef kernel({', '.join(f'x{i}' for i in range(21))}):\n    pass",
    ),
    "files": (too_full, "kernels/full/new.py", ""),
}
TREE = ("leap/modeling_leap.py", "leap/kernels/table.py", "fastformer/modeling_fastformer.py", "shared/sequence.py",
        "kernels/shim.py", *(f"kernels/full/file{i}.py" for i in range(MOST_FILES)))  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert rule(MODELING) == []
    assert {folder.name for folder in MODELING.iterdir()} >= FAMILIES


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rule_sees_the_fault(fault, tmp_path):
    rule, place, text = FAULTS[fault]
    root = tmp_path / "kernels" / "modeling"  # the name of a folder further up excuses nothing
    for path in map(root.joinpath, TREE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [found for each in RULES for found in each(root)] == []
    (root / place).write_text(text)
    assert len(rule(root)) == 1


def test_types_are_checked_in_full_where_all_families_stand():
    """No exception of mypy's settings names a file of `STRICT`, and none is for all files."""
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["mypy"]
    assert not settings.get("disable_error_code")
    strict = [f"hf_linear_attn.{name}" for name in STRICT]
    strict += [f"hf_linear_attn.modeling.shared.{name}" for name in ("call", "states.cache")]
    exceptions = [each for each in settings["overrides"] if {"disable_error_code", "ignore_errors"} & set(each)]
    assert exceptions
    for pattern in (pattern for each in exceptions for pattern in each["module"]):
        assert not any(fnmatch(name, pattern) or pattern.startswith(f"{name}.") for name in strict), pattern


def test_what_a_type_checker_is_told_to_leave_out_has_a_name():
    """`# type: ignore` says which error it means, and whole files are no comment's business."""
    for path in MODELING.parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "# mypy:" not in text, path
        assert text.count("# type: ignore") == text.count("# type: ignore["), path
