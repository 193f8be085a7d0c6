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


@pytest.mark.parametrize(
    ("text", "entity"),
    [
        ("my NHS number is 943 476 5919", "nhs"), ("SIN: 046 454 286", "sin"), ("Aadhaar 2341 2341 2346", "aadhaar"),
        ("CPF 111.444.777-35", "cpf"), ("CNPJ 11.222.333/0001-81", "cnpj"), ("née 2 55 08 14 168 025 38", "insee"),
        ("DNI 12345678Z", "dni"), ("NIE X1234567L", "nie"), ("CF RSSMRA85T10A562S", "codice_fiscale"), ("PESEL 44051401359", "pesel"),
        ("BSN 111222333", "bsn"), ("TFN 123 456 782", "tfn"), ("ITIN 912-70-1234", "itin"), ("SSN 536904399", "ssn"),
        ("host 2001:db8::8a2e:370:7334 is", "ip"), ("mac 00:1a:2b:3c:4d:5e", "mac"), ("mac 00-1A-2B-3C-4D-5E", "mac"),
        ("call +44 20 7946 0958 now", "phone"), ("(415) 555-2671", "phone"), ("postgres://app:s3cr3tpw@db.example.com/x", "url_credentials"),
        ("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "crypto_address"), ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", "crypto_address"),
        ("0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed", "crypto_address"), ("token = 'kJ8#mP2$vL9q'", "password"),
        ("eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U", "jwt"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7bq8Qk2mFz1Yx4Vd9Lr0Jw3Hs6Tn\n-----END RSA PRIVATE KEY-----", "private_key"),
        ("AKIAIOSFODNN7EXAMPLE", "aws_access_key"), ("ghp_" + "x7Kq2mB9vL4tR8wZ1nC6yH3jD5gF0s" + "2QpTaE", "github_token"),
    ],
)  # fmt: skip
def test_each_kind_is_found(text: str, entity: str) -> None:
    assert [one[0] for one in found(text)] == [entity]


@pytest.mark.parametrize(
    "text",
    [
        "order 4111111111111112 shipped", "version 1.2.3.4", "v10.2.3.4", "pip install x==1.2.3.4", "on 2024-05-01 at 14:30:22",
        "ts 1718203948123", "id 550e8400-e29b-41d4-a716-446655440000", "commit 9fceb02d0ae598e95dc970b74767f19372d61af8", "943 476 5919 parts",
        "DE89 3704 0044 0532 0130 01", "666-12-3456 000-12-3456 123-00-4567", "078-05-1120", "std::vector<a::b> x", "@property def f(self)",
        "sk-ant-api03-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "password is required", "token: str = settings.token", "api_key=os.environ['KEY']",
        "secret = ${SECRET}", "if '-----BEGIN RSA PRIVATE KEY-----' in text", "http://localhost:8080/a@b", "price 1,234,567.89",
    ],
)  # fmt: skip
def test_what_only_looks_alike_stays(text: str) -> None:
    assert found(text) == []


def test_own_rows_are_checked_by_their_examples() -> None:
    row = s.recogniser_from_table(
        "badge",
        {"pattern": r"EMP-\d{6}", "keywords": ["emp-"], "examples": ["EMP-123456"], "counterexamples": ["EMP-1"]},
    )
    assert s.Scanner((row,), ()).find("see EMP-123456") == [s.Finding(4, 14, "badge", False)]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"pattern": r"(a+)+b"}, "linear"), ({"pattern": r"(\w{1,50}){1,50}x"}, "linear"), ({"pattern": r"(a)\1"}, "linear"), ({"pattern": "("}, "pattern"),
        ({"pattern": "a?"}, "empty"), ({"pattern": "abc", "examples": ["xyz"]}, "nothing is found"), ({"pattern": "abc", "counterexamples": ["abcdef"]}, "something"),
        ({"pattern": "abc", "colour": 1}, "colour"), ({}, "pattern"), ({"pattern": "a", "keywords": "a"}, "keywords"),
    ],
)  # fmt: skip
def test_an_own_row_that_cannot_serve_is_refused(table: dict[str, object], reason: str) -> None:
    with pytest.raises(s.SettingsError, match=reason):
        s.recogniser_from_table("own", table)
