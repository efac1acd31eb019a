"""README.md as a package index shows it, where no link can be relative, and the addresses of the project.

pyproject.toml names the repository's address in one place, `tool.hatch.metadata.hooks.custom` (the environment variable
HF_LINEAR_ATTN_REPOSITORY goes before it, for a fork). With it links and pictures become absolute, and the package gets its
`[project.urls]`. Without it, as long as there is no public address, links become their words and pictures are left out: an index
shows nothing that is dead.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURE = re.compile(r"!\[([^\]]*)\]\((?!https?://|data:)([^)\s]+)\)")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?://|mailto:|#)([^)\s]+)\)")
PAGES = {"Documentation": "blob/HEAD/docs/index.md", "Changelog": "blob/HEAD/CHANGELOG.md", "Issues": "issues"}


def for_an_index(readme: str, repository: str) -> str:
    """The text without relative links, whether the repository has an address or not."""
    if repository:
        readme = PICTURE.sub(rf"![\1]({repository}/raw/HEAD/\2)", readme)
        return LINK.sub(rf"[\1]({repository}/blob/HEAD/\2)", readme)
    readme = re.sub(rf"^{PICTURE.pattern}\n\n?", "", readme, flags=re.MULTILINE)
    return LINK.sub(r"\1", PICTURE.sub("", readme))


class ProjectMetadata(MetadataHookInterface):
    """Fills the dynamic fields `readme` and `urls`."""

    def update(self, metadata: dict) -> None:
        repository = os.environ.get("HF_LINEAR_ATTN_REPOSITORY", self.config.get("repository", "")).rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_an_index(text, repository)}
        if repository:
            metadata["urls"] = {"Repository": repository} | {k: f"{repository}/{v}" for k, v in PAGES.items()}
