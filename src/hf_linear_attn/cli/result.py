"""How a command reports: words for people, or with `--json` one JSON object on stdout and everything else on stderr."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def words_aside(as_json: bool) -> Iterator[None]:
    """While open, what is printed goes to stderr if the result is to be JSON."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def show(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Print the result: as JSON, or the text that says the same."""
    print(json.dumps(result, default=str) if as_json else text)
