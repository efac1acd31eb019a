"""Run the notebooks' sources (.py) and write them with their outputs (.ipynb).

    python notebooks/build.py                 all of them
    python notebooks/build.py 4_what_does     those whose names begin so
    python notebooks/build.py --sync          put changed text and code into the .ipynb, keep the outputs

What goes to stderr (warnings with paths of this machine) is left out. A notebook that fails, or whose output names a folder of
this machine, is not written.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
MACHINE_PATH = re.compile(r"(?:/(?:tmp|home|root|Users|usr|opt|mnt|var)/|[A-Z]:\\Users)")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources(prefixes: list[str]) -> list[Path]:
    """The sources to build, in order."""
    found = [file for file in sorted(FOLDER.glob("[0-9]_*.py")) if file.name.startswith(tuple(prefixes) or "")]
    if not found:
        raise SystemExit(
            f"no notebook begins with {' or '.join(prefixes)}; there are {', '.join(f.stem for f in sources([]))}"
        )
    return found


def read(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs and with plain metadata and stable cell names."""
    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": KERNEL, "jupytext": {"formats": "ipynb,py:percent"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(source: Path, timeout: int) -> nbformat.NotebookNode:
    """Run a notebook in its own folder and process, and keep what it shows."""
    notebook = read(source)
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # clock times
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": KERNEL, "jupytext": {"formats": "ipynb,py:percent"}}
    return notebook


def machine_paths(notebook: nbformat.NotebookNode) -> list[str]:
    """Lines of outputs that name a folder of this machine."""
    lines = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts = [
                output.get("text", ""),
                *(v for k, v in output.get("data", {}).items() if not k.startswith("image/")),
            ]
            lines += [line for text in texts for line in str(text).splitlines() if MACHINE_PATH.search(line)]
    return lines


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="beginnings of names")
    parser.add_argument("--sync", action="store_true", help="do not run")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one cell (default: 600)")
    options = parser.parse_args()
    for source in sources(options.notebooks):
        target, start = source.with_suffix(".ipynb"), time.perf_counter()
        if options.sync:
            notebook, old = read(source), nbformat.read(target, as_version=4)
            outputs = {cell.source: cell for cell in old.cells if cell.cell_type == "code"}
            for cell in notebook.cells:
                if cell.cell_type == "code" and cell.source in outputs:
                    cell.outputs = outputs[cell.source].outputs
                    cell.execution_count = outputs[cell.source].execution_count
        else:
            notebook = execute(source, options.timeout)
        if machine_paths(notebook):
            sys.exit(f"{source.name}: outputs name folders of this machine:\n" + "\n".join(machine_paths(notebook)[:5]))
        nbformat.write(notebook, target)
        print(f"{target.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
