"""`hf-linear-attn card`: a model card for a checkpoint, from its own data."""

import os
from pathlib import Path

from ..packaged import PACKAGED_MODEL
from ..training.options import path
from .parser import Parser
from .quiet import begin_work
from .result import show

DESCRIPTION = """\
Write the model card of a saved model: what it is, how it was trained (from the folder's training_report.json or Trainer
log), what it scores, the size of its state and its speed, measured here, how to load it, limits, licence, citation.
The metadata on top is what the Hub reads.
"""

EXAMPLES = """\
examples:
  hf-linear-attn card outputs/leap
      writes outputs/leap/README.md
  hf-linear-attn card outputs/leap --repo user/leap-speeches --license apache-2.0 --language en --overwrite
  hf-linear-attn card outputs/leap --no-speed --output card.md
"""


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="hf-linear-attn card", description=DESCRIPTION, epilog=EXAMPLES)
    made.add_checkpoint("folder of a saved model")
    made.add_argument("--output", type=path, metavar="FILE", help="where to write (default: README.md in the folder)")
    made.add_argument("--repo", metavar="NAME", help="name on the Hub to load it by (default: the folder's name)")
    made.add_argument(
        "--license", default="apache-2.0", metavar="ID", help="licence as the Hub names it (default: apache-2.0)"
    )
    made.add_argument("--language", metavar="CODE", help="language of the data, for instance en")
    made.add_argument("--dataset", metavar="NAME", help="the data's name on the Hub")
    made.add_argument("--no-speed", action="store_true", help="do not run the model to measure it")
    made.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    made.add_json()
    return made


def run(arguments: list[str]) -> int:
    """Parse, build, write. Exit codes: 0, or 2 for a wrong value."""
    command = parser()
    given = command.parse(arguments)
    folder = Path(given["checkpoint"])
    if not os.path.isfile(folder / "config.json"):
        command.error(f"there is no config.json in {str(folder)!r}: give the folder of a saved model")
    if given["checkpoint"] == PACKAGED_MODEL and not given["output"]:
        command.error("the package is no place for a card: name its file with --output")
    output = Path(given["output"] or folder / "README.md")
    if output.exists() and not given["overwrite"]:
        command.error(f"{output} is there already; --overwrite replaces it")
    if given["repo"]:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(given["repo"])
        except HFValidationError as error:
            command.error(f"--repo is no name on the Hub: {error}")
    begin_work()
    from ..hub.cards import build_card
    from ..modeling.shared.files.whole_files import write_whole

    about = {name: given[name] for name in ("repo", "license", "language", "dataset")}
    beside = output.resolve().parent == folder.resolve()
    card = build_card(folder, speed=not given["no_speed"], picture=beside, **about)
    write_whole(output, card.save)
    show({"card": str(output), "metadata": card.data.to_dict()}, f"card: {output}", given.get("json", False))
    return 0
