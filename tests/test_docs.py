"""README says what the code does: the tables equal the rows, and every command has its help."""

from __future__ import annotations

import configparser
import re
import tomllib
from pathlib import Path

import pytest

import stockyard

README = (Path(stockyard.__file__).parent / "README.md").read_text(encoding="utf-8")


def table(name: str) -> list[list[str]]:
    """The rows of the table after `<!-- name -->`, without its head."""
    lines = README.partition(f"<!-- {name} -->\n")[2].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_providers_equals_the_rows() -> None:
    assert [(row[0], row[1], row[3]) for row in table("providers")] == [
        (p.id, p.name, p.dialect) for p in stockyard.PROVIDERS
    ]
    for row, provider in zip(table("providers"), stockyard.PROVIDERS, strict=True):
        if not provider.retired and not provider.base_url.startswith("builtin:"):
            assert row[2] == stockyard.enabling_variable(provider)


def test_the_table_of_settings_equals_the_rows() -> None:
    rows = [(f"STOCKYARD_{row.name.upper()}", row.metadata["help"]) for row in stockyard.SETTING_ROWS]
    assert [(row[0], row[2]) for row in table("settings")] == rows


def test_every_command_has_help_and_stands_in_readme() -> None:
    for verb in stockyard.VERBS:
        assert verb.help
        assert re.search(rf"`(stockyard )?{verb.name}\b", README), verb.name


def test_readme_is_short_enough_to_read() -> None:
    assert len(README.splitlines()) <= 250


def test_the_files_that_config_prints_name_real_settings(capsys: pytest.CaptureFixture[str]) -> None:
    known = {f"STOCKYARD_{row.name.upper()}": row for row in stockyard.SETTING_ROWS}
    for action in stockyard.CONFIG_FILES:
        assert stockyard.main(["config", action]) == 0
        text = capsys.readouterr().out
        if action == "example":
            names = re.findall(r"^# ([a-z_]+) = ", text.partition("[")[0], re.MULTILINE)
            assert {f"STOCKYARD_{name.upper()}" for name in names} <= known.keys()
            tomllib.loads(re.sub(r"^# (?=\[|\S+ = )", "", text, flags=re.MULTILINE))
        else:
            assert set(re.findall(r"STOCKYARD_\w+", text)) <= known.keys()
        if action == "containerfile":
            assert f"EXPOSE {known['STOCKYARD_PORT'].default}\n" in text
        if action == "unit":
            unit = configparser.RawConfigParser(strict=False)
            unit.read_string(text)
            assert int(unit["Service"]["TimeoutStopSec"]) > float(known["STOCKYARD_DRAIN_TIMEOUT"].default)
