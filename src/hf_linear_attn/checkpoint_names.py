"""What the name of a checkpoint can stand for. Light to import: a mistyped folder is said before anything is loaded."""

import os
import re

# As the Hub takes them: "name" or "user/name".
HUB_NAME = re.compile(r"(?![.-])[A-Za-z0-9_.-]{1,96}(?<![.-])(/(?![.-])[A-Za-z0-9_.-]{1,96}(?<![.-]))?")


def no_such_folder(source: str | os.PathLike) -> str | None:
    """Why `source` is no checkpoint, in words: neither a folder here nor a name that the Hub could know. None if it may be one.

    "outputs/laep" beside a folder `outputs` is taken for a mistyped folder, not for a repository of the user "outputs".
    """
    name = os.path.expanduser(os.fspath(source))
    if os.path.exists(name):
        return None
    first = name.split("/", 1)[0]
    if (
        HUB_NAME.fullmatch(name)
        and "--" not in name
        and ".." not in name
        and not ("/" in name and os.path.isdir(first))
    ):
        return None
    near = f"; {first!r} has {_names_in(first)}" if "/" in name and os.path.isdir(first) and first else ""
    return f"there is no folder {name!r}{near}"


def _names_in(folder: str) -> str:
    found = sorted(each.name for each in os.scandir(folder) if each.is_dir())
    return ", ".join(map(repr, found[:5])) + (", ..." if len(found) > 5 else "") if found else "no folders"
