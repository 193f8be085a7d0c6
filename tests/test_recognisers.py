"""What is found in a text, what is left alone, and at what cost."""
# ruff: noqa: RUF001

from __future__ import annotations

import pytest

import stockyard as s

SCANNER = s.Scanner()


def found(text: str) -> list[tuple[str, str]]:
    return [(one.entity, text[one.start : one.end]) for one in SCANNER.find(text)]


@pytest.mark.parametrize(
    ("text", "entity", "value"),
    [
        ("write to bob.smith@example.com today", "email", "bob.smith@example.com"),
        ("pay 4111 1111 1111 1111 thanks", "card", "4111 1111 1111 1111"),
        ("pay ４１１１ １１１１ １１１１ １１１１ thanks", "card", "４１１１ １１１１ １１１１ １１１１"),
        ("to DE89 3704 0044 0532 0130 00 is it", "iban", "DE89 3704 0044 0532 0130 00"),
        ("mine is 536-90-4399.", "ssn", "536-90-4399"),
        ("from 10.2.3.4, it says", "ip", "10.2.3.4"),
        ("user%40example.com asks", "email", "user%40example.com"),
        ('{"to":"a\\nfoo@bar.com"}', "email", "foo@bar.com"),
    ],
)
def test_a_value_is_found_where_it_stands(text: str, entity: str, value: str) -> None:
    assert found(text) == [(entity, value)]
