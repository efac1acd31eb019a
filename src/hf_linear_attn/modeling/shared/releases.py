"""Which releases of Transformers are supported, and which one is installed. Imported before anything that a release may lack."""

import logging
import re

import transformers

# The supported minor releases of Transformers; the range in pyproject.toml says the same.
OLDEST, NEWEST = (5, 17), (5, 24)
_major, _minor = re.findall(r"\d+", transformers.__version__)[:2]
RELEASE = int(_major), int(_minor)


def check_release(release: tuple[int, int]) -> None:
    """Refuse a Transformers older than the oldest supported release; say so once where it is newer than the newest tested."""
    found, newest = f"transformers {release[0]}.{release[1]}", f"{NEWEST[0]}.{NEWEST[1]}"
    wanted = f"pip install 'transformers>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}'"
    if release < OLDEST:
        raise ImportError(f"hf-linear-attn does not run on {found}: {wanted}")
    if release > NEWEST:
        logging.getLogger(__name__).warning(
            f"hf-linear-attn is tested with transformers up to {newest}, this is {found}; if anything is wrong: {wanted}"
        )


check_release(RELEASE)
