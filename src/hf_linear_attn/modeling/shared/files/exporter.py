"""The code of a family, brought from the folders it is written in to the one flat folder that a checkpoint carries.

Transformers' loader of custom code follows `from .sibling import name` and nothing else: imports from other folders are not
found, and the form that names no file is silently lost. So an export walks the imports from the family's modeling file, writes
each file that it reaches under a name of its own (`leap/kernels/strips.py` as `leap_kernels_strips.py`; `modeling_*.py` and
`configuration_*.py` keep theirs), and changes the module's name in import lines alone: every line keeps its number, which
tracebacks rely on, and Triton, which reads the source of its kernels. What was exported exports to the same bytes.
"""

import ast
import functools
import re
from pathlib import Path

# In the package this file lies two folders below `modeling/`; in an export all files lie side by side.
_HERE = Path(__file__).resolve()
ROOT = _HERE.parents[2] if _HERE.stem == "exporter" else _HERE.parent
# What Transformers' loader takes for an import, also where it stands in a docstring.
LOOKS_LIKE_IMPORT = re.compile(r"^\s*(?:from\s+\.\S*\s+import|import\s+\.)")


def export_code(entry: Path, folder: Path, root: Path = ROOT) -> list[Path]:
    """Write the file `entry` and all files of `root` that it imports, directly or through others, side by side into `folder`.

    Returns:
        The files written, sorted.

    Raises:
        ValueError: an import that Transformers' loader would not follow, or two files that would get one name.
        OSError: `folder` cannot be written to.
    """
    sources: dict[Path, str] = {}
    waiting = [Path(entry).resolve()]
    while waiting:
        file = waiting.pop()
        if file not in sources:
            sources[file], imported = _flat_source(file, root, file.stat().st_mtime_ns)
            waiting += imported
    names: dict[str, Path] = {}
    for file in sources:
        other = names.setdefault(_flat_name(file, root), file)
        if other is not file:
            raise ValueError(
                f"{other} and {file} would both be exported as {_flat_name(file, root)}.py: rename one of them"
            )
    for name, file in names.items():
        (Path(folder) / f"{name}.py").write_text(sources[file], encoding="utf-8")
    return sorted(Path(folder) / f"{name}.py" for name in names)


def _flat_name(file: Path, root: Path) -> str:
    if file.stem.startswith(("modeling_", "configuration_")):
        return file.stem
    return "_".join(file.relative_to(root).with_suffix("").parts)


@functools.cache  # a checkpoint is saved many times, and reading the package takes a third of a second
def _flat_source(file: Path, root: Path, changed: int) -> tuple[str, list[Path]]:
    """The text of a file with its imports of files of `root` rewritten, and these files. `changed`: when it last did."""
    text = file.read_text(encoding="utf-8")
    lines, imported, rewritten = text.splitlines(keepends=True), [], set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        number = node.lineno - 1
        where = f"{file}, line {number + 1}: {lines[number].strip()!r}"
        if node.module is None or any(alias.name == "*" for alias in node.names):
            raise ValueError(f"{where} cannot be exported: import names, from a file")
        target = file.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py").resolve()
        if not target.is_file() or root not in target.parents:
            raise ValueError(f"{where} names no file of {root}")
        imported.append(target)
        lines[number] = lines[number].replace("." * node.level + node.module, f".{_flat_name(target, root)}", 1)
        rewritten.add(number)
    for number, line in enumerate(lines):
        if number not in rewritten and LOOKS_LIKE_IMPORT.match(line):
            raise ValueError(f"{file}, line {number + 1}: {line.strip()!r} would be read as an import: rephrase it")
    return "".join(lines), imported
