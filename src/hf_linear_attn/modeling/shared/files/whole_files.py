"""Files and checkpoints that are replaced only by whole ones: whoever is killed leaves the old or the new, never a mixture.

Everything is written into a staging folder beside its place first. A single file then comes into its place by one rename.
For the many files of a checkpoint a sequence of renames would not do; but `config.json` can name the weights
(`transformers_weights`) and the code (`auto_map`), so one rename of it switches all to the staging folder. While it points
there, the other files come into their usual places; then it is replaced by the usual one, and the staging folder goes.
"""

import contextlib
import errno
import filecmp
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

CONFIG_NAME, GENERATION_CONFIG_NAME = "config.json", "generation_config.json"
CODE_FOLDER = "code"  # of a checkpoint, beside its weights; release 0.1.0 put the code beside them
# A module's path may hold no dot (`auto_map`), so the name has none; `.saving-*` is what release 0.1.0 left behind.
PREFIX = "saving-in-progress-"
LEFTOVER = re.compile(rf"{PREFIX}[0-9a-f]{{8}}|\.saving-\w+")
READY, STALE, SWITCH, SWITCH_INDEX = "ready", "stale.json", "switch.json", "switch.safetensors.index.json"
WITHOUT_LOCKS = 24 * 3600  # seconds after which a staging folder counts as left behind where nothing can be locked
SHARD = re.compile(r"-\d{5}-of-\d{5}")
INDEX = re.compile(r"(.+)\.safetensors\.index(\.\w+)?\.json")  # with the variant
RANK_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # of `distributed_checkpoint=True`
IMPORTED = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


class OnlyPartlyInPlace(OSError):
    """The new checkpoint is whole in the folder, or the message says what is; but not every file came into its place."""


def write_whole(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Let `write(path of a part)` make a file, then put it, and what it wrote beside it, in place of earlier ones.

    The part has the file's own name, so that writers which look at it do as they would. Links are followed. Pipes and
    devices are written to as they are.

    Raises:
        OSError: the file could not be written; an earlier one is unchanged.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        write(path)
        return
    with staging_folder(path.parent) as staging:
        write(staging / path.name)
        if path.exists():
            shutil.copymode(path, staging / path.name)
        names = sorted((each.name for each in staging.iterdir()), key=lambda name: name == path.name)
        flush(staging / name for name in names)
        for name in names:
            os.replace(staging / name, path.parent / name)
        flush([path.parent])


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder`, for this process alone, that is removed at the end; those of killed ones go first."""
    with _locked(folder):
        _sweep(folder)
        staging = folder / f"{PREFIX}{secrets.token_hex(4)}"
        staging.mkdir()
        lock = _lock(staging)
    try:
        yield staging
    finally:
        try:
            if _in_use(folder, staging):  # interrupted after the switch: go on to the end
                with _locked(folder):
                    _settle(folder, staging)
            shutil.rmtree(staging, ignore_errors=True)
        finally:
            if lock is not None:
                os.close(lock)


def files_in(folder: Path) -> set[str]:
    """The files of a checkpoint in `folder`, those in its code folder as `code/name`."""
    code = folder / CODE_FOLDER
    inside = {f"{CODE_FOLDER}/{path.name}" for path in code.iterdir() if path.is_file()} if code.is_dir() else set()
    return inside | {path.name for path in folder.iterdir() if path.is_file()}


def put_in_place(staging: Path, folder: Path) -> None:
    """Make the checkpoint in `staging`, a folder of `staging_folder`, that of `folder`; files that are equal stay.

    Old weights under other names, and old code, are removed. Everything else in `folder` is left alone.

    Raises:
        OnlyPartlyInPlace: an error after the switch.
        OSError: an error before it. What was in `folder` is unchanged.
    """
    with _locked(folder):
        written = files_in(staging)
        changed = sorted(name for name in written if not _same(staging / name, folder / name))
        taken = [name for name in changed if (folder / name).is_dir()]
        if taken:
            raise IsADirectoryError(
                errno.EISDIR, "a folder stands where a file is to be written", str(folder / taken[0])
            )
        if any("/" in name for name in changed):
            (folder / CODE_FOLDER).mkdir(exist_ok=True)  # FileExistsError where a file of that name stands
        stale = _stale(folder, written)
        fresh = not (folder / CONFIG_NAME).is_file()
        # Code in a new folder can be had again from who saved it, and flushing forty files takes as long as all the rest.
        flush([*(staging / name for name in changed if not (fresh and name.endswith(".py"))), *_folders(staging)])
        if len(changed) + len(stale) > 1 and CONFIG_NAME in written and not fresh:
            _prepare_switch(staging, written, changed, stale)
            os.replace(staging / SWITCH, folder / CONFIG_NAME)
            try:
                flush([folder])
                _settle(folder, staging)
            except OSError as error:
                raise OnlyPartlyInPlace(
                    f"the new checkpoint is whole in {folder}, and loads, but not all of its files could take the place of "
                    f"the earlier one's ({error}): the next save into the folder goes on with that"
                ) from error
        else:
            _move(staging, folder, changed, stale)


def _move(staging: Path, folder: Path, changed: list[str], stale: list[str]) -> None:
    """One file that changes; or several where no earlier checkpoint is: it is none before `config.json` comes last."""
    fresh, placed = not (folder / CONFIG_NAME).exists(), []
    try:
        for name in sorted(changed, key=lambda name: name == CONFIG_NAME):
            os.replace(staging / name, folder / name)
            placed.append(name)
        _remove(folder, stale)
        flush(_folders(folder))
    except OSError as error:
        if fresh and CONFIG_NAME in changed and CONFIG_NAME not in placed:
            for name in placed:
                (folder / name).unlink(missing_ok=True)
        elif placed:
            raise OnlyPartlyInPlace(
                f"{', '.join(placed)} of the new checkpoint came into {folder}, what follows did not: {error}"
            ) from error
        raise


def flush(paths: Iterable[Path]) -> None:
    """Wait until files and folders are on the disk; all at once, which takes about as long as one."""
    paths = list(paths)
    if len(paths) > 2:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(_flush, paths))
    else:
        for path in paths:
            _flush(path)


def _flush(path: Path) -> None:
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


def _prepare_switch(staging: Path, written: set[str], changed: list[str], stale: list[str]) -> None:
    """Make the `config.json` that points into `staging`, and second names for the files there, which go to the folder."""
    ready = staging / READY
    ready.mkdir()
    (ready / CODE_FOLDER).mkdir()
    for name in {*changed, CONFIG_NAME}:
        try:
            os.link(staging / name, ready / name)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            shutil.copyfile(staging / name, ready / name)  # a file system without links
            flush([ready / name])
    config = json.loads((staging / CONFIG_NAME).read_text(encoding="utf-8"))
    made = {STALE: stale, SWITCH: config}
    weights = sorted(name for name in written if name.endswith(".safetensors"))
    indices = [name for name in written if INDEX.fullmatch(name)]
    if indices:
        index = json.loads((staging / indices[0]).read_text(encoding="utf-8"))
        index["weight_map"] = {name: f"{staging.name}/{file}" for name, file in index["weight_map"].items()}
        made[SWITCH_INDEX] = index
        config["transformers_weights"] = f"{staging.name}/{SWITCH_INDEX}"
    elif weights:
        config["transformers_weights"] = f"{staging.name}/{weights[0]}"
    if any(name.endswith(".py") for name in changed):
        for auto_class, reference in config.get("auto_map", {}).items():
            if isinstance(reference, str) and f"{reference.partition('.')[0]}.py" in written:
                config["auto_map"][auto_class] = f"{staging.name}/{reference}"
    for name, content in made.items():
        (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    flush([*(staging / name for name in made), *_folders(ready), staging])


def _settle(folder: Path, staging: Path) -> None:
    """After the switch: put what is ready in its usual place, `config.json` last. Goes on where another was killed."""
    ready = staging / READY
    for name in sorted(files_in(ready) - {CONFIG_NAME}):
        os.replace(ready / name, folder / name)
    _remove(folder, json.loads((staging / STALE).read_text()))
    flush(_folders(folder))
    os.replace(ready / CONFIG_NAME, folder / CONFIG_NAME)
    flush([folder])


def _folders(folder: Path) -> list[Path]:
    """A checkpoint's folder and, if it has one, that of its code."""
    return [each for each in (folder / CODE_FOLDER, folder) if each.is_dir()]


def _remove(folder: Path, stale: Iterable[str]) -> None:
    """Remove files, and the code folder with the last of them."""
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or other files are in it
        (folder / CODE_FOLDER).rmdir()


def _same(new: Path, old: Path) -> bool:
    """Whether a small file is there already. Weights are not compared: reading them takes as long as writing."""
    if not old.is_file() or new.suffix == ".safetensors" or new.stat().st_size != old.stat().st_size:
        return False
    return filecmp.cmp(new, old, shallow=False)


def _weights_of(name: str) -> str | None:
    """The name that the weights in a shard or an index would have as one file; None for other files."""
    index = INDEX.fullmatch(name)
    if index:
        return f"{index[1]}{index[2] or ''}.safetensors"
    return SHARD.sub("", name) if name.endswith(".safetensors") else None


def _stale(folder: Path, written: set[str]) -> list[str]:
    """Files of the earlier checkpoint in `folder` that are none of the new one's, and would be taken for them."""
    there = files_in(folder) - written
    replaced = {_weights_of(name) for name in written} - {None}
    stale = {name for name in there if _weights_of(name) in replaced}
    if "model.safetensors" in replaced:
        stale |= {name for name in there if RANK_SHARD.fullmatch(name)}
    if CONFIG_NAME in written and (folder / CONFIG_NAME).is_file():
        if replaced:
            stale |= there & {GENERATION_CONFIG_NAME}
        if any(name.endswith(".py") for name in there):
            stale |= there & _code_of(folder)
    return sorted(stale)


def _code_of(folder: Path) -> set[str]:
    """The code files of the checkpoint in `folder`, if it is of this package: those in its `auto_map`, and their imports."""
    from ..configuration import FORMAT_FIELD  # here, since it imports torch, and writing a file needs none

    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError:
        return set()
    if FORMAT_FIELD not in config:
        return set()
    open_files = {
        f"{each.partition('.')[0]}.py" for each in config.get("auto_map", {}).values() if isinstance(each, str)
    }
    found: set[str] = set()
    while open_files:
        name = open_files.pop()
        if name not in found and (folder / name).is_file():
            found.add(name)
            imported = IMPORTED.findall((folder / name).read_text(encoding="utf-8"))
            open_files |= {Path(name).with_name(f"{each}.py").as_posix() for each in imported}
    return found


def _in_use(folder: Path, staging: Path) -> bool:
    """Whether the `config.json` of `folder` points into `staging`."""
    if not (staging / READY).is_dir() or not (folder / CONFIG_NAME).is_file():
        return False
    return staging.name in (folder / CONFIG_NAME).read_text(encoding="utf-8", errors="replace")


def _sweep(folder: Path) -> None:
    """Remove what killed processes left in `folder`; a checkpoint that was switched to is put in place first."""
    for name in os.listdir(folder) if os.access(folder, os.R_OK) else ():
        leftover = folder / name
        if not LEFTOVER.fullmatch(name) or not leftover.is_dir() or leftover.is_symlink():
            continue
        try:
            lock = _lock(leftover, wait=False)
        except BlockingIOError:  # its process lives
            continue
        try:
            if lock is None and time.time() - leftover.stat().st_mtime < WITHOUT_LOCKS:
                continue
            if _in_use(folder, leftover):
                _settle(folder, leftover)
            shutil.rmtree(leftover, ignore_errors=True)
        finally:
            if lock is not None:
                os.close(lock)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let no other process, and no other thread, change the checkpoint in `folder` meanwhile."""
    lock = _lock(folder)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, wait: bool = True) -> int | None:
    """A descriptor that locks a folder until it is closed, or its process ends; None where folders cannot be locked."""
    if fcntl is None or not os.access(folder, os.R_OK):
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor
