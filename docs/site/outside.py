"""Lets pages of the site link to files of the repository outside `docs`: they come along.

A hook of MkDocs (mkdocs.yml). On a page such a link is relative to the repository, as it has to be
where the page is read there; folders, and files that the site has no use for, become plain text.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).resolve().parents[2]
_SHOWN = {".json", ".svg", ".png", ".yaml", ".csv", ".service"}
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>(?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with links to what the site has; raises nothing for what is not there.

    That the targets exist a test of the repository's links says.
    """
    here = Path(config.docs_dir) / Path(page.file.src_uri).parent
    depth = len(Path(page.file.src_uri).parent.parts)

    def replaced(found: re.Match[str]) -> str:
        target = (here / found["target"]).resolve()
        if target.is_relative_to(config.docs_dir):
            return found[0]
        if target.suffix not in _SHOWN or not target.is_file():
            return found["text"] if found["text"].startswith("`") else f"`{found['text']}`"
        name = "repository/" + str(target.relative_to(_ROOT))
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(target)))
        return f"[{found['text']}]({'../' * depth}{name})"

    return _LINK.sub(replaced, markdown)
