"""The house: where things may lie, what may import what, and who may know of Triton, hooks, autocast and compilers."""

import ast
from pathlib import Path

import pytest

import hf_linear_attn

MODELING = Path(hf_linear_attn.__file__).parent / "modeling"
FILES = sorted(MODELING.rglob("*.py"))
FAMILIES = [folder.name for folder in sorted(MODELING.iterdir()) if (folder / f"modeling_{folder.name}.py").is_file()]
# Questions to PyTorch that only `kernels/` folders ask; other files use the words of `kernels/tracing.py`. `compat` names what
# Transformers names.
WORDS = (
    "is_grad_enabled", "set_grad_enabled", "is_autocast_enabled", "get_autocast_dtype", "autocast", "is_compiling", "_dynamo",
    "triton", "runs_triton", "torch.compile", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "has_hooks",
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
)  # fmt: skip
EXEMPT = {"shared/compat.py"}


def place(path: Path) -> str:
    return path.relative_to(MODELING).as_posix()


def folder_of(path: Path) -> str:
    """The floor or family that a file belongs to."""
    return path.relative_to(MODELING).parts[0]


def imports(path: Path):
    """Each relative import of a file: its node and the file it leads to."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            yield node, base.joinpath(*(node.module or "").split(".")).with_suffix(".py")


def asked(path: Path) -> set[str]:
    """The words of `WORDS` that stand in a file's code, as a name, an attribute, or a part of an import's path."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found |= {node.attr, ast.unparse(node)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {part for name in node.names for part in name.name.split(".")}
            found |= set((getattr(node, "module", None) or "").split("."))
    return found & set(WORDS)


def test_only_kernels_ask_pytorch_how_it_runs():
    asking = {place(path): asked(path) for path in FILES if "kernels" not in path.parent.parts}
    asking = {name: words for name, words in asking.items() if words and name not in EXEMPT}
    assert asking == {}


def test_imports_lead_down_and_into_no_other_family():
    """Families -> shared -> kernels."""
    below = {"kernels": {"kernels"}, "shared": {"shared", "kernels"}}
    wrong = []
    for path in FILES:
        here = folder_of(path)
        allowed = below.get(here, {here, "shared", "kernels"})
        wrong += [f"{place(path)} -> {place(to)}" for _, to in imports(path) if folder_of(to) not in allowed]
    assert not wrong
    assert set(FAMILIES) >= {"leap", "fastformer", "danet", "sea"}


def test_what_travels_imports_nothing_from_outside():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert all("hf_linear_attn" not in (name or "") for name in names), place(path)


def test_every_import_can_be_exported():
    """`from .x import name`, on one line's beginning, from a file that is there: no package, no star; see the exporter."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for node, to in imports(path):
            assert node.module, f"{place(path)}:{node.lineno}: from . import"
            assert [name.name for name in node.names] != ["*"], f"{place(path)}:{node.lineno}: a star"
            assert to.is_file(), f"{place(path)}:{node.lineno}: {place(to)} is no file"
        strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        for value in strings:
            lines = value.splitlines() if isinstance(value, str) else []
            assert not any(line.strip().startswith(("from .", "import .")) for line in lines), (
                f"{place(path)}: a string"
            )


@pytest.mark.parametrize(
    "folder", [MODELING, *(x for x in sorted(MODELING.rglob("*")) if x.is_dir())], ids=lambda x: x.name
)
def test_no_folder_is_too_full(folder):
    assert len(list(folder.glob("*.py"))) <= (16 if folder.name != "sea" else 20), "20 of SEA: to be 16"
