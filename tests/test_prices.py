"""Prices: matching, cost to the nano-dollar, upper bounds, overrides, and tables that must be refused."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockyard import RATES, InvalidPrices, Price, PriceBook, Usage

HERE = Path(__file__).parent
RAW = (HERE.parent / "stockyard_assets" / "prices.json").read_bytes()
BOOK = PriceBook.load(RAW)
GOLDEN = json.loads((HERE / "wire" / "prices.json").read_bytes())
NOON_S = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()


def priced(provider: str, model: str, at_s: float = NOON_S, variant: str = "", book: PriceBook = BOOK) -> Price:
    found = book.find(provider, model, at_s, variant)
    assert found is not None, f"{provider}/{model} has no price"
    return found


def table(*rows: dict[str, Any], **providers: dict[str, Any]) -> bytes:
    found = {"p": {"lists": ["rows"]}} | providers
    return json.dumps(
        {"format": 1, "version": "1", "date": "2026-11-22", "providers": found, "lists": {"rows": list(rows)}}
    ).encode()


def row(name: str, usd: str = "1", **more: Any) -> dict[str, Any]:
    return {"id": name, "prices": {"input": usd, "output": usd}} | more


# ----- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['provider']}/{c['model']}@{c['at_s']:.0f}")
def test_cost_equals_the_sources_own_calculation(case: dict[str, Any]) -> None:
    price = priced(case["provider"], case["model"], case["at_s"], case["variant"])
    assert [price.cost(Usage(**usage)) for usage in GOLDEN["usages"]] == case["nanousd"]


def test_goldens_reach_every_bucket_and_both_sides_of_every_tier() -> None:
    assert len(GOLDEN["cases"]) * len(GOLDEN["usages"]) >= 80
    assert {key for usage in GOLDEN["usages"] for key in usage} == set(Usage._fields)
    assert any(len(priced(c["provider"], c["model"]).tiers) > 1 for c in GOLDEN["cases"])


@pytest.mark.parametrize(("prompt_tokens", "usd_per_million"), [(199_999, 2), (200_000, 2), (200_001, 5)])
def test_tier_holds_for_the_whole_call_once_the_prompt_is_above_it(prompt_tokens: int, usd_per_million: int) -> None:
    tiered = {"id": "m", "prices": {"input": ["2", [200_000, "5"]], "output": "0"}}
    price = priced("p", "m", book=PriceBook.load(table(tiered)))
    assert price.cost(Usage(input_tokens=prompt_tokens)) == prompt_tokens * usd_per_million * 1000
    assert price.cost(Usage(input_tokens=1, cached_tokens=prompt_tokens - 1)) == prompt_tokens * usd_per_million * 1000


def test_cost_is_rounded_once_and_half_up() -> None:
    # 500 nano-dollars per million: 1,000 tokens of each are half a nano-dollar each, and one together.
    price = priced("p", "m", book=PriceBook.load(table(row("m", "0.0000005"))))
    assert price.cost(Usage(input_tokens=1000)) == 1
    assert price.cost(Usage(input_tokens=999)) == 0
    assert price.cost(Usage(input_tokens=1000, output_tokens=1000)) == 1


def test_more_reasoning_than_output_never_lowers_the_cost_below_the_reasoning_rate() -> None:
    cheap = {"id": "m", "prices": {"input": "1", "output": "8", "reasoning": "3"}}
    price = priced("p", "m", book=PriceBook.load(table(cheap)))
    assert price.cost(Usage(output_tokens=10, reasoning_tokens=4)) == (6 * 8 + 4 * 3) * 1000
    assert price.cost(Usage(output_tokens=10, reasoning_tokens=99)) == 10 * 3 * 1000


def test_covers_names_what_a_price_cannot_charge() -> None:
    embedding = priced("openai", "text-embedding-3-small")
    assert embedding.covers(Usage(input_tokens=5, cached_tokens=5))
    assert not embedding.covers(Usage(output_tokens=1))
    assert not embedding.covers(Usage(searches=1))
    assert priced("anthropic", "claude-opus-5-5").covers(Usage(input_tokens=1, cache_write_1h_tokens=1, searches=1))


def test_every_claude_is_charged_for_an_hour_of_cache_wherever_it_runs() -> None:
    """Twice the input: https://platform.claude.com/docs/en/build-with-claude/prompt-caching"""
    rows = [row for rows in json.loads(RAW)["lists"].values() for row in rows if "claude" in row["id"]]
    own = [row["prices"] if isinstance(row["prices"], list) else [row["prices"]] for row in rows]
    blocks = [
        block for row, blocks in zip(rows, own, strict=True) for block in sum(row.get("variants", {}).values(), blocks)
    ]
    cached = [block for block in blocks if "cache_write" in block]
    assert len(cached) > 100
    for block in cached:
        price = priced(
            "p", "m", book=PriceBook.load(table({"id": "m", "prices": {k: v for k, v in block.items() if k != "from"}}))
        )
        assert [rates.cache_write_1h for rates in price.tiers] == [2 * rates.input for rates in price.tiers], block


# ----- upper bound ----------------------------------------------------------------------------------------------------

TOKENS = st.integers(0, 400_000)
USAGES = st.builds(
    lambda output, reasoning, **rest: Usage(output_tokens=output, reasoning_tokens=min(output, reasoning), **rest),
    output=TOKENS,
    reasoning=TOKENS,
    input_tokens=TOKENS,
    cached_tokens=TOKENS,
    cache_write_5m_tokens=TOKENS,
    cache_write_1h_tokens=TOKENS,
    input_audio_tokens=TOKENS,
    cached_audio_tokens=TOKENS,
    output_audio_tokens=TOKENS,
    input_image_tokens=TOKENS,
    output_image_tokens=TOKENS,
    searches=st.integers(0, 9),
)
USD = st.integers(0, 10**12).map(lambda nanousd: f"{Decimal(nanousd).scaleb(-9):f}")


@st.composite
def amounts(draw: st.DrawFn) -> str | list[Any]:
    starts = draw(st.lists(st.integers(1, 500_000), unique=True, max_size=3).map(sorted))
    return [draw(USD), *([start, draw(USD)] for start in starts)] if starts else draw(USD)


@st.composite
def prices(draw: st.DrawFn) -> Price:
    keys = draw(st.sets(st.sampled_from([rate.key for rate in RATES if rate.units != 1000])))
    block: dict[str, Any] = {key: draw(amounts()) for key in sorted(keys | {"input"})}
    block |= {key: draw(USD) for key in draw(st.sets(st.sampled_from(["searches", "requests"])))}
    return priced("p", "m", book=PriceBook.load(table({"id": "m", "prices": block})))


@given(
    price=prices() | st.sampled_from([priced(c["provider"], c["model"], c["at_s"]) for c in GOLDEN["cases"]]),
    usage=USAGES,
    spare=st.integers(0, 300_000),
)
@settings(max_examples=300)
def test_upper_bound_holds_for_any_usage_within_it(price: Price, usage: Usage, spare: int) -> None:
    prompt = usage.input_tokens + usage.cached_tokens + usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
    prompt += usage.input_audio_tokens + usage.cached_audio_tokens + usage.input_image_tokens
    output = usage.output_tokens + usage.output_audio_tokens + usage.output_image_tokens
    usage = usage._replace(searches=0)  # which nothing bounds
    assert price.cost(usage) <= price.upper_bound(prompt + spare, output + spare)


def test_upper_bound_is_tight_for_a_plain_price_and_counts_the_request() -> None:
    plain = {"id": "m", "prices": {"input": "2", "output": "8", "requests": "5"}}
    price = priced("p", "m", book=PriceBook.load(table(plain)))
    assert price.upper_bound(100, 10) == price.cost(Usage(input_tokens=100, output_tokens=10)) == 5_280_000


def test_upper_bound_takes_the_cache_write_and_only_tiers_in_reach() -> None:
    price = priced("anthropic", "claude-haiku-5-5")
    rates = price.tiers
    assert price.upper_bound(100_000, 0) == rates[0].cache_write_1h // 10
    assert price.upper_bound(200_000, 0) == rates[1].cache_write_1h // 5 > rates[0].cache_write_1h // 5


# ----- matching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "model", "row_id"),
    [
        ("openai", "gpt-4o", "gpt-4o"),
        ("openai", "GPT-4o", "gpt-4o"),
        ("openai", "gpt-4o-mini-2024-07-18", "gpt-4o-mini"),
        ("openai", "gpt-4o-2024-05-13", "gpt-4o-2024-05-13"),
        ("openai", "gpt-4o-20241120", "gpt-4o"),
        ("openai", "ft:gpt-4o-mini-2024-07-18:acme::x1", "ft:gpt-4o-mini"),
        ("openai", "ft:gpt-4o-2024-08-06:acme::x1", "ft:gpt-4o"),
        ("openai", "gpt-6.1-sol-2026-10-30", "gpt-6.1-sol"),
        ("gemini", "models/gemini-2.5-flash", "gemini-2.5-flash"),
        ("gemini", "gemini-2.0-flash-lite-001", "gemini-2.0-flash-lite"),
        ("gemini", "gemini-3.8-flash-tts", "gemini-3.8-flash-tts"),
        ("vertex", "projects/a/locations/b/publishers/google/models/gemini-2.5-pro", "gemini-2.5-pro"),
        ("vertex", "publishers/anthropic/models/claude-opus-5-5", "claude-opus-5-5"),
        ("bedrock", "us.openai.gpt-5.5", "openai.gpt-5.5"),
        ("bedrock", "global.anthropic.claude-opus-4-6-v1:0", "global.anthropic.claude-opus-4-6-v1:0"),
        ("bedrock", "eu.anthropic.claude-opus-4-6-v1:0", "regional.anthropic.claude-opus-4-6-v1:0"),
        ("bedrock", "arn:aws:bedrock:us-east-1:1:inference-profile/us.openai.gpt-5.5", "openai.gpt-5.5"),
        ("openrouter", "openai/gpt-oss-120b:free", "openai/gpt-oss-120b:free"),
        ("huggingface", "openai/gpt-oss-120b:together", "openai/gpt-oss-120b"),
    ],
)
def test_names_lead_to_their_own_row(provider: str, model: str, row_id: str) -> None:
    assert priced(provider, model).id.split(";")[0] == f"{provider}/{row_id}@2026-11-22"


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-4o-foo-bar"),
        ("openai", "gpt-6.1-sol-pro"),
        ("openai", "gpt-6.1-sol-2026-10-3x"),
        ("openai", "whisper-1"),  # billed by the second, which no token price can say
        ("gemini", "gemini-2.5-pro-something-tts"),
        ("vertex", "gemma-3-27b-it"),  # free on the Gemini API alone
        ("bedrock", "arn:aws:bedrock:us-east-1:1:application-inference-profile/abc"),
        ("openrouter", "openai/gpt-oss-120b:nitro"),
        ("openrouter", "command-r"),
        ("huggingface", "openai/gpt-oss-120b"),
        ("huggingface", "openai/gpt-oss-120b:fastest"),
        ("openai_compatible", "gpt-4o"),
        ("nobody", "gpt-4o"),
        ("openai", ""),
    ],
)
def test_unknown_models_have_no_price(provider: str, model: str) -> None:
    assert BOOK.find(provider, model, NOON_S) is None


def test_exact_name_then_longest_pattern_whatever_the_order_of_rows() -> None:
    rows = [row("a*", like=["a*"], abstract=True), row("a-b*", like=["a-b*"], abstract=True), row("a-b-c")]
    rows.append(row("dated", like=["a-####-##", "*-z"], unlike=["*-no-z"], abstract=True))
    for order in (rows, rows[::-1]):
        book = PriceBook.load(table(*order))
        found = {name: priced("p", name, book=book).id for name in ("a-x", "a-b-x", "a-b-c", "a-2026-11", "q-z")}
        assert found == {
            "a-x": "p/a*@2026-11-22",
            "a-b-x": "p/a-b*@2026-11-22",
            "a-b-c": "p/a-b-c@2026-11-22",
            "a-2026-11": "p/dated@2026-11-22",
            "q-z": "p/dated@2026-11-22",
        }
        assert book.find("p", "q-no-z", NOON_S) is None


def test_local_providers_are_free_and_say_so() -> None:
    for provider in ("ollama", "lmstudio", "echo"):
        price = priced(provider, "whatever:7b")
        assert price.id == "free"
        assert price.cost(Usage(input_tokens=10**9, output_tokens=10**9, searches=5)) == 0
        assert price.upper_bound(10**9, 10**9) == 0
        assert price.covers(Usage(input_tokens=1, output_tokens=1, searches=1))


def test_memory_of_names_is_bounded_and_stays_right() -> None:
    book = PriceBook.load(RAW)
    for number in range(9000):
        assert book.find("openai", f"made-up-{number}", NOON_S) is None
    assert len(book._remembered) <= 4096
    assert book.find("openai", "gpt-4o", NOON_S) == BOOK.find("openai", "gpt-4o", NOON_S)


# ----- time and variants ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hour", "usd"), [("00:29", "1"), ("00:30", "2"), ("16:29", "2"), ("16:30", "1"), ("22:59", "1"), ("23:00", "3")]
)
def test_hours_of_the_day_are_utc_and_may_cross_midnight(hour: str, usd: str) -> None:
    schedule = [
        {"input": "1"},
        {"daily": "23:00-00:10", "input": "3"},
        {"daily": "00:30-16:30", "input": "2"},
    ]
    book = PriceBook.load(table({"id": "m", "prices": schedule}))
    at = datetime.fromisoformat(f"2026-11-20T{hour}:00+00:00")
    assert priced("p", "m", at.timestamp(), book=book).per_million_usd() == {"input": usd}


def test_before_the_first_day_of_a_schedule_its_oldest_price_holds() -> None:
    schedule = [{"from": "2026-01-01", "input": "1"}, {"from": "2026-02-01", "input": "2"}]
    book = PriceBook.load(table({"id": "m", "prices": schedule}))
    assert priced("p", "m", 0.0, book=book).per_million_usd() == {"input": "1"}


def test_midnight_belongs_to_hours_that_cross_it() -> None:
    schedule = [{"input": "1"}, {"daily": "23:00-00:10", "input": "3"}]
    book = PriceBook.load(table({"id": "m", "prices": schedule}))
    at = datetime(2026, 11, 20, 0, 9, tzinfo=UTC).timestamp()
    assert priced("p", "m", at, book=book).id == "p/m@2026-11-22;daily=23:00-00:10"
    assert priced("p", "m", at + 60, book=book).id == "p/m@2026-11-22"


def test_days_of_a_schedule_start_at_midnight_utc_and_the_id_says_which() -> None:
    day = datetime(2026, 3, 13, tzinfo=UTC).timestamp()
    before, after = priced("anthropic", "claude-opus-4-6", day - 1), priced("anthropic", "claude-opus-4-6", day)
    assert (len(before.tiers), len(after.tiers)) == (2, 1)
    assert (before.id, after.id) == (
        "anthropic/claude-opus-4-6@2026-11-22",
        "anthropic/claude-opus-4-6@2026-11-22;from=2026-03-13",
    )


def test_variant_has_its_own_price_and_an_unknown_one_is_visibly_standard() -> None:
    standard, priority = priced("openai", "gpt-5.5"), priced("openai", "gpt-5.5", variant="service_tier=priority")
    assert priority.variant == "service_tier=priority"
    assert priority.id.endswith(";service_tier=priority;from=2026-10-12")
    assert priority.tiers[0].input > standard.tiers[0].input
    assert priced("openai", "gpt-5.5", variant="service_tier=unheard-of") == standard
    assert standard.variant == ""


# ----- showing prices -------------------------------------------------------------------------------------------------


def test_per_million_usd_shows_what_the_row_lists_as_decimals() -> None:
    shown = {
        "id": "m",
        "prices": {"input": ["2.50", [272_000, "5"]], "output": "100", "searches": "10", "requests": "0.4"},
    }
    price = priced("p", "m", book=PriceBook.load(table(shown)))
    assert price.per_million_usd() == {
        "input": "2.5",
        "output": "100",
        "searches": "10",
        "requests": "0.4",
        "input above 272000": "5",
    }


# ----- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_win_and_carry_an_id_that_follows_their_amounts() -> None:
    cheap, dear = (
        priced("openai", "GPT-4o", book=BOOK.with_overrides([{"model": "gpt-4o", "input": usd, "output": 10}]))
        for usd in (0.1, "2.5")
    )
    assert cheap.cost(Usage(input_tokens=1_000_000)) == 100_000_000  # a tenth exactly, though 0.1 is a float
    assert cheap.id.startswith("own/gpt-4o@")
    assert cheap.id != dear.id


def test_override_of_one_provider_goes_before_one_of_all_and_leaves_others_alone() -> None:
    book = BOOK.with_overrides(
        [
            {"model": "my-*", "input": "1", "output": "2", "cached": "0.5", "cache_write": "1.25"},
            {
                "model": "my-model",
                "provider": "ollama",
                "input": "3",
                "output": "4",
                "context": 8192,
                "max_output": 100,
            },
            {"model": "gift", "provider": "openai_compatible", "free": True},
        ]
    )
    anywhere, mine = priced("openai_compatible", "my-model", book=book), priced("ollama", "my-model", book=book)
    assert anywhere.per_million_usd() == {"input": "1", "cached": "0.5", "cache_write": "1.25", "output": "2"}
    assert (mine.per_million_usd()["input"], mine.context_tokens, mine.max_output_tokens) == ("3", 8192, 100)
    assert priced("ollama", "other", book=book).id == "free"
    assert priced("openai_compatible", "gift", book=book).cost(Usage(input_tokens=9, searches=9)) == 0
    assert book.find("openai_compatible", "other", NOON_S) is None
    assert book.find("openai", "gpt-4o", NOON_S) == BOOK.find("openai", "gpt-4o", NOON_S)
    assert BOOK.find("openai_compatible", "my-model", NOON_S) is None


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"input": 1}, 'A [prices] row has no "model".'),
        ({"model": "m"}, '[prices], model "m": give "input"'),
        ({"model": "m", "output": 1}, '[prices], model "m": give "input"'),
        ({"model": "m", "free": True, "input": 1}, 'give "input" and "output"'),
        ({"model": "m", "input": "cheap"}, "\"input\" is 'cheap'; it must be an amount in dollars"),
        ({"model": "m", "input": True}, "it must be an amount in dollars"),
        ({"model": "m", "input": -1}, '"input" is "-1"; it must be dollars per million tokens'),
        ({"model": "m", "input": float("nan")}, '"input" is "NaN"'),
        ({"model": "m", "input": "0.0000000001"}, "with at most nine decimals"),
        ({"model": "m", "input": "2500000"}, "below a million"),
        ({"model": "m", "input": 1, "inptu": 1}, 'unknown price "inptu"; known are input, cached'),
        ({"model": "a*b", "input": 1}, 'the pattern "a*b" may have "*" at its ends only'),
        ({"model": "m", "input": 1, "context": "8k"}, '"context" must be a positive number of tokens'),
        ({"model": "m", "input": 1, "provider": 3}, '"provider" must be a provider id'),
    ],
)
def test_bad_override_is_refused_with_a_sentence(bad: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidPrices) as caught:
        BOOK.with_overrides([bad])
    assert sentence in str(caught.value)


def test_one_model_overridden_twice_is_refused() -> None:
    with pytest.raises(InvalidPrices, match=r'^\[prices\] names the model "m" twice\.$'):
        BOOK.with_overrides([{"model": "m", "input": 1}, {"model": "M", "input": 2}])


# ----- tables that must be refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"{", "The price table is not JSON"),
        (b"[]", "The price table is not of format 1."),
        (b'{"format":2}', "The price table is not of format 1."),
        (b'{"format":1,"date":"2026-11-22","version":"1","lists":{}}', 'has no usable "providers"'),
        (table(p={"lists": ["nowhere"]}), 'Price table, provider "p": there is no price list "nowhere".'),
        (table(p={"lists": "rows"}), '"lists" must be a list of names'),
        (table(p={"list": ["rows"]}), "it may only have by_suffix, cut, free, lists, strip"),
        (table(p={"by_suffix": ["rows"]}), '"by_suffix" must be an object'),
        (
            b'{"format":1,"date":"d","version":"1","providers":{},"lists":{"a":1}}',
            'Price list "a" is not a list of rows',
        ),
        (table({"prices": {"input": "1"}}), 'Price list "rows", row 1: it has no "id".'),
        (table(row("m"), row("M")), 'Price list "rows" names the model "m" twice.'),
        (table(row("m", contxt=1)), 'model "m": unknown key contxt.'),
        (table(row("m", context=0)), '"context" must be a positive number of tokens'),
        (table(row("m", deprecated="yes")), '"deprecated" must be true or false'),
        (table(row("m", names=["Big"])), 'the name "Big" must be in lower case'),
        (table(row("m", names=[""])), '"names" must be a list of names'),
        (table(row("m", like=["*"])), 'the pattern "*" may have'),
        (table(row("m", like=["*a-##"])), 'the pattern "*a-##" may have'),
        (table(row("m", variants=[])), '"variants" must be an object'),
        (table(row("m", prices={})), "it has no prices"),
        (table(row("m", prices=[3])), "a price block must be an object"),
        (table(row("m", prices={"inptu": "1"})), 'unknown price "inptu"'),
        (table(row("m", prices={"input": 2.5})), '"input" is 2.5; it must be dollars per million tokens'),
        (table(row("m", prices={"input": "1e-3"})), '"input" is "1e-3"'),
        (table(row("m", prices={"input": "0.0000000005"})), "at most nine decimals"),
        (table(row("m", prices={"input": ["1", [5, "2"], [5, "3"]]})), '"input" is ["1", [5, "2"], [5, "3"]]'),
        (table(row("m", prices={"input": ["1"]})), '"input" is ["1"]'),
        (table(row("m", prices={"searches": ["1", [5, "2"]]})), "it must be dollars per thousand"),
        (table(row("m", prices=[{"input": "1", "from": "soon"}])), '"from" is "soon"; it must be a day'),
        (table(row("m", prices=[{"input": "1", "daily": "25:00-26:00"}])), "it must be a time of day in UTC"),
        (table(row("m", variants={"a=b": [{"input": "x"}]})), '"input" is "x"'),
    ],
)
def test_bad_table_is_refused_with_a_sentence(raw: bytes, sentence: str) -> None:
    with pytest.raises(InvalidPrices) as caught:
        PriceBook.load(raw)
    assert sentence in str(caught.value)


def test_every_exact_name_of_the_shipped_table_leads_to_its_row_at_all_times_and_for_all_variants() -> None:
    shipped = json.loads(RAW)
    seen = 0
    for provider, spec in shipped["providers"].items():
        for found in (found for name in spec.get("lists", ())[:1] for found in shipped["lists"][name]):
            names = [*([] if found.get("abstract") else [found["id"]]), *found.get("names", ())]
            for name, variant in ((name, variant) for name in names for variant in ("", *found.get("variants", ()))):
                for at_s in (0.0, NOON_S):
                    assert priced(provider, name, at_s, variant).id.startswith(f"{provider}/{found['id']}@")
                    seen += 1
    assert seen > 2000
