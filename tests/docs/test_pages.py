"""All pages: links lead somewhere, code that is named exists, and so do shown targets of make.

No page points at a private machine.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_NAMED_FILE = re.compile(r"`((?:dbmodule|cli|tests|sql|docs|scripts)/[\w./-]*)(?:::(\w+))?`")
_PRIVATE = re.compile(r"/work\b|/opt/dbm|/root\b|/tmp/|\bhttp://")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made from Markdown."""
    text = _FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_and_names_exist(page: Path) -> None:
    for path, name in _NAMED_FILE.findall(page.read_text()):
        assert (ROOT / path).exists(), path
        if name:
            assert re.search(rf"\b(def|class) {name}\b", (ROOT / path).read_text()), name


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_nothing_points_at_a_private_machine(page: Path) -> None:
    assert not _PRIVATE.search(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_shell_blocks_are_make_targets_that_exist(page: Path) -> None:
    """What is shown but not run as a session can at least be looked up."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            words = line.split("#")[0].split()
            assert words[0] == "make" and words[1] in targets, line
