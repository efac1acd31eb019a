"""What the site has beside the pages of docs/: the source of each test that the feature table links to; types without marks.

On GitHub a link like `../tests/test_x.py#L42` opens the file at that line. The site is complete in itself (it may be read without
a network, and next to any version of the code), so there such a link opens a page made here, with a place for every line.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

TEST = re.compile(r"\.\./(tests/[\w/]+)\.py#L(\d+)")
TYPE = re.compile(r"<code>([^<]*(?:`|\*optional\*)[^<]*)</code>")  # of an argument, with the marks of its docstring
REFERENCE = re.compile(r"\[(<code>[^<]*</code>)\]")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each test file that docs/features.md names."""
    text = (Path(config.docs_dir) / "features.md").read_text()
    for name in sorted({name for name, _ in TEST.findall(text)}):
        code = (Path(config.docs_dir).parent / f"{name}.py").read_text()
        fence = "`" * (max([2, *(len(run) for run in re.findall("`+", code))]) + 1)
        content = f"---\nsearch:\n  exclude: true\n---\n\n# {name}.py\n\n{fence}{{.python linenums=1}}\n{code}{fence}\n"
        files.append(File.generated(config, f"{name}.md", content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of docs/features.md there."""
    return TEST.sub(r"\1.md#__codelineno-0-\2", markdown) if page.file.src_uri == "features.md" else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Types of the reference as plain words; Transformers' docstrings mark them as Markdown, which its own site reads."""
    if not page.file.src_uri.startswith("reference/"):
        return html
    plain = TYPE.sub(lambda found: f"<code>{found[1].replace('`', '').replace('*optional*', 'optional')}</code>", html)
    return REFERENCE.sub(r"\1", plain)
