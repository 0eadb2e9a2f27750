"""Every rule of the correctness page names code and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "correctness.md").read_text()


def rows() -> list[list[str]]:
    """Cells of the rows of all tables with four columns, without their headings."""
    found = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    return [cells for cells in found if len(cells) == 4 and cells[0] != "hazard"]


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`(tests/[^`]+)`", PAGE))))
def test_the_tests_that_are_named_exist(named: str) -> None:
    path, _, name = named.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert not name or name in functions


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`(dbmodule/[^`]+\.py)`", PAGE))))
def test_the_code_that_is_named_exists(named: str) -> None:
    assert (ROOT / named).is_file()


def test_every_row_has_a_status() -> None:
    assert len(rows()) > 60
    for cells in rows():
        status = cells[3]
        assert re.search(r"tested|covered|refused|\*\*open\*\*|by construction", status), cells[0]
        assert "tested" not in status or "`tests/" in status, cells[0]
