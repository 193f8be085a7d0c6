"""The file keeps its shape: its map is true, and sections look up only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import stockyard

SOURCE = Path(stockyard.__file__).read_text(encoding="utf-8")
BANNERS = [
    (match[1], SOURCE.count("\n", 0, match.start()) + 1)
    for match in re.finditer(r"^# ===== (.+?) =+$", SOURCE, re.MULTILINE)
]


def test_the_map_in_the_docstring_equals_the_banners() -> None:
    assert stockyard.__doc__ is not None
    listed = re.findall(
        r"^    ([A-Z][A-Za-z ]+?)  +\S", stockyard.__doc__.partition("The life of a call")[0], re.MULTILINE
    )
    assert listed == [name for name, _ in BANNERS]


def test_a_section_uses_only_sections_above_it() -> None:
    """Names of later sections may stand in annotations and inside functions of the same section, and nowhere else."""
    section_of = {}
    for node in ast.parse(SOURCE).body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else []
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names += [target.id for target in targets if isinstance(target, ast.Name)]
        for name in names:
            section_of[name] = sum(line <= node.lineno for _, line in BANNERS)
    wrong = []
    for node in ast.parse(SOURCE).body:
        here = sum(line <= node.lineno for _, line in BANNERS)
        for name in sorted(used_names(node)):
            if section_of.get(name, 0) > here:
                wrong.append(
                    f"{BANNERS[here - 1][0]}: line {node.lineno} uses {name} of {BANNERS[section_of[name] - 1][0]}"
                )
    assert not wrong, "\n".join(wrong)


def used_names(node: ast.AST) -> set[str]:
    """Names read by code; annotations are never evaluated, so they do not count."""
    if isinstance(node, ast.arg):
        return set()
    if isinstance(node, ast.AnnAssign):
        return used_names(node.value) if node.value else set()
    found = {node.id} if isinstance(node, ast.Name) else set()
    for name, child in ast.iter_fields(node):
        if name != "returns":
            for item in child if isinstance(child, list) else [child]:
                if isinstance(item, ast.AST):
                    found |= used_names(item)
    return found
