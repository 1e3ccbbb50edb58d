"""Do the links of the documents lead somewhere? Files of the repository, and headings in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"]
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return _FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Return what its headings are called in links, as GitHub and MkDocs make it."""
    headings = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", each) for each in _HEADING.findall(prose(page)))
    return {re.sub(r" ", "-", re.sub(r"[^\w\- ]", "", each.lower()).strip()) for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for found in _LINK.finditer(prose(page)):
        target, _, anchor = found["target"].partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{found['target']}: there is no {there}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{found['target']}: there is no such heading"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 500
