"""Download the source archive of the installed transformers and unpack its shared test mixins under `.cache/`.

They are not part of the wheel. `make test` runs this; when the files are there it does nothing.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache"


def folder() -> Path:
    """Where the mixins of the installed version lie."""
    return CACHE / f"transformers-{version('transformers')}-tests"


def fetch() -> None:
    """Download and unpack, all or nothing."""
    target = folder()
    if target.is_dir():
        return
    wanted = version("transformers")
    print(f"== source archive of transformers {wanted} (its test mixins)", flush=True)
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # The metadata of an archive is only known by building it; setuptools is enough for that.
        command += ["--no-binary", "transformers", f"transformers=={wanted}", "--dest", work]
        subprocess.run(command, check=True)
        unpacked = Path(work) / "tests"
        unpacked.mkdir()
        prefix = f"transformers-{wanted}/tests/"
        with tarfile.open(next(Path(work).glob("*.tar.gz"))) as archive:
            for member in archive:
                name = member.name.removeprefix(prefix)
                if member.isfile() and member.name.startswith(prefix) and name.endswith(".py") and "/" not in name:
                    (unpacked / name).write_bytes(archive.extractfile(member).read())
        (unpacked / "__init__.py").touch()  # the archive lacks it, and test_configuration_common.py loads it
        os.rename(unpacked, target)


if __name__ == "__main__":
    fetch()
