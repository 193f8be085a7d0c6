"""Writes stockyard_assets/prices.json from the newest `genai-prices` (PyPI, MIT). Build time only, never imported.

    python .build/prices.py --date 2026-11-22   (also --out and --goldens, see --help)

The same package and the same --date give the same bytes: everything is sorted, nothing reads the clock. The date goes
into every price id, so a release states the day its prices were taken. The table's format is described at the top of
the Prices section; this script only translates, and stops with a sentence where the source says something new:

- Match clauses become exact names and patterns (`*` at the ends, `#` for one digit), so no regex is shipped.
- Units that our usage has no bucket for either fall back to a bucket (IGNORED says why that is right) or, where
  ignoring them would under-bill, take the whole row out: the model is then unpriced, which is visible.
- A row with no price at all is free only where FREE says so, otherwise it is left out.
- Prices finer than a nano-dollar per million tokens (float noise in the source) are rounded to it, and counted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from genai_prices import Usage, calc_price
from genai_prices.data import providers as SOURCE
from genai_prices.types import (
    ClauseAnd,
    ClauseContains,
    ClauseEndsWith,
    ClauseEquals,
    ClauseOr,
    ClauseRegex,
    ClauseStartsWith,
    ConditionalPrice,
    ModelInfo,
    ModelPrice,
    PriceVariant,
    StartDateConstraint,
    Tier,
    TieredPrices,
    TimeOfDateConstraint,
)

# Our provider id -> price lists tried in order, and the decorations its names may carry (`cut`: only what follows the
# last of these; `strip`: one leading prefix). A hosted provider reads its own list alone: the maker's price is not the
# host's price. Azure and Vertex
# sell the makers' models at the makers' prices and publish few rows of their own: there the makers' lists follow.
PROVIDERS: dict[str, dict[str, Any]] = {
    "openai": {"lists": ["openai"]},
    "anthropic": {"lists": ["anthropic"]},
    "gemini": {"lists": ["google", "google_free"], "cut": ["models/"]},
    "vertex": {"lists": ["google", "anthropic", "mistral"], "cut": ["models/"]},
    "groq": {"lists": ["groq"]},
    "mistral": {"lists": ["mistral"]},
    "together": {"lists": ["together"]},
    "fireworks": {"lists": ["fireworks"]},
    "deepseek": {"lists": ["deepseek"]},
    "perplexity": {"lists": ["perplexity"]},
    "cohere": {"lists": ["cohere"]},
    "xai": {"lists": ["x-ai"]},
    "openrouter": {"lists": ["openrouter"]},
    "azure": {"lists": ["azure", "openai", "anthropic", "mistral", "deepseek", "x-ai"]},
    # `global.` is not stripped: it is cheaper than the regional rows and has rows of its own.
    "bedrock": {
        "lists": ["aws"],
        "cut": ["/"],
        "strip": ["us.", "eu.", "apac.", "jp.", "au.", "in.", "ca.", "us-gov."],
    },
    "cerebras": {"lists": ["cerebras"]},
    "moonshot": {"lists": ["moonshotai"]},
    "zai": {"lists": ["zai"]},
    # The router bills what the provider behind it bills, which `org/model:provider` names. Without it: unpriced.
    "huggingface": {
        "by_suffix": {p.id.split("_", 1)[1]: p.id for p in SOURCE if p.id.startswith("huggingface_")},
    },
    # These run on the user's own machine.
    "echo": {"free": True},
    "lmstudio": {"free": True},
    "ollama": {"free": True},
}

# Price key of the source -> (our key, units the source's price is for). Prices stay in dollars per million tokens,
# per thousand searches, per thousand requests.
CARRIED = {
    "input_mtok": "input",
    "cache_read_mtok": "cached",
    "cache_write_mtok": "cache_write",
    "cache_write_1h_mtok": "cache_write_1h",
    "input_audio_mtok": "input_audio",
    "cache_audio_read_mtok": "cached_audio",
    "input_image_mtok": "input_image",
    "output_mtok": "output",
    "output_reasoning_mtok": "reasoning",
    "output_audio_mtok": "output_audio",
    "output_image_mtok": "output_image",
    "web_searches_kcount": "searches",
    "requests_kcount": "requests",
}

IGNORED = {
    "cache_image_read_mtok": "cached image tokens are part of cached_tokens",
    "output_citation_mtok": "cheaper than output, as which citations are billed",
    "storage_searches_kcount": "a tool fee of hosted file search, refused under hard budgets like every unpriced tool",
    "input_video_mtok": "video parts are refused under hard budgets",
}

# Rows without any price that the source documents as free of charge. Gemma is free on the Gemini API alone.
FREE = {("openai", "moderation"), *(("google", f"gemma-{n}") for n in ("3", "3n", "4-26b-a4b-it", "4-31b-it"))}

# A batch's cost is known from its result file, not from a call; standard prices bound it from above.
UNUSED_TRAITS = {"processing=batch"}

# OpenRouter serves `vendor/model` alone; the source still lists bare names of an older import.
VENDOR_ONLY = {"openrouter"}

NOT_SPEECH = r"^(?!.*-[tT][tT][sS](?:$|-))"
NANO = Decimal("1e-9")


class Untranslatable(ValueError):
    """The source says something that the table cannot express; the message names the row."""


class Build:
    def __init__(self) -> None:
        self.rounded: list[str] = []
        self.left_out: list[str] = []

    def amount(self, price: Decimal, where: str) -> str:
        exact = price.quantize(NANO, ROUND_HALF_UP)
        if exact != price:
            self.rounded.append(f"{where} {price} -> {exact.normalize():f}")
        return f"{exact.normalize():f}"

    def block(self, prices: ModelPrice, where: str) -> dict[str, Any] | None:
        """One price block, or None where the row bills units that we cannot count."""
        found = {key: value for key, value in prices.__dict__.items() if value is not None}
        if found.keys() - CARRIED.keys() - IGNORED.keys():
            return None
        if "claude" in where and "cache_write_mtok" in found:
            found.setdefault("cache_write_1h_mtok", doubled(found["input_mtok"]))
        return {ours: self.rate(found[key], where) for key, ours in CARRIED.items() if key in found}

    def rate(self, price: Decimal | TieredPrices, where: str) -> str | list[Any]:
        if isinstance(price, Decimal):
            return self.amount(price, where)
        return [self.amount(price.base, where), *([t.start, self.amount(t.price, where)] for t in price.tiers)]

    def schedule(self, prices: list[ConditionalPrice], where: str) -> list[dict[str, Any]] | None:
        blocks = []
        for entry in prices:
            block = self.block(entry.prices, where)
            if block is None:
                return None
            blocks.append(constraint(entry.constraint) | block)
        return blocks

    def row(self, provider: str, model: ModelInfo, taken: set[str]) -> dict[str, Any] | None:
        where = f"{provider}/{model.id}"
        entries = model.prices if isinstance(model.prices, list) else [ConditionalPrice(prices=model.prices)]
        blocks = self.schedule(entries, where)
        free = model.id.endswith(":free") or (provider, model.id) in FREE
        if blocks is None or not (free or all(block.keys() - {"from", "daily"} for block in blocks)):
            self.left_out.append(where)
            return None
        if free:
            blocks = [{"input": "0", "output": "0"}]
        matching = names(model, where, taken)
        if provider in VENDOR_ONLY and matching.get("names"):
            matching["names"] = [name for name in matching["names"] if "/" in name]
        if not any(matching.values()):
            return None  # no name left: an earlier row has it, or nobody could send it
        row: dict[str, Any] = {"id": model.id, **shortened(matching, model.id.lower())}
        if model.context_window:
            row["context"] = model.context_window
        if model.deprecated:
            row["deprecated"] = True
        row["prices"] = blocks[0] if len(blocks) == 1 and blocks[0].keys().isdisjoint({"from", "daily"}) else blocks
        if variants := self.variants(model, entries, where):
            row["variants"] = variants
        return row

    def variants(self, model: ModelInfo, entries: list[ConditionalPrice], where: str) -> dict[str, Any]:
        """Prices by request trait (`service_tier=priority`), laid over the standard ones day by day."""
        found = {}
        traits = {trait_of(variant, where) for variant in model.price_variants or ()}
        for trait in sorted(traits - UNUSED_TRAITS):
            own = [variant for variant in model.price_variants or () if trait_of(variant, where) == trait]
            if blocks := self.variant_blocks(own, entries, where):
                found[trait] = blocks
        return found

    def variant_blocks(
        self, own: list[PriceVariant], entries: list[ConditionalPrice], where: str
    ) -> list[dict[str, Any]]:
        if not any(variant.prices.__dict__ for variant in own):
            return []
        days = sorted(
            {start_day(c, where) for c in [part.constraint for part in own] + [e.constraint for e in entries]}
        )
        first = min(start_day(variant.constraint, where) for variant in own)
        blocks: list[dict[str, Any]] = []
        for day in (day for day in days if day >= first):
            active = [entry.prices for entry in entries if start_day(entry.constraint, where) <= day]
            merged = dict((active or [entries[0].prices])[-1].__dict__)
            laid: dict[str, Any] = {}
            for variant in own:
                if start_day(variant.constraint, where) <= day:
                    for key, price in variant.prices.__dict__.items():
                        laid.setdefault(key, price)
            block = self.block(ModelPrice(**(merged | laid)), where)
            if block is None:
                raise Untranslatable(f"{where}: the price variants bill a unit that the table cannot carry")
            if not blocks or block != {k: v for k, v in blocks[-1].items() if k != "from"}:
                blocks.append(({"from": day} if day else {}) | block)
        return blocks


def doubled(price: Decimal | TieredPrices) -> Decimal | TieredPrices:
    """What Claude's cache costs for an hour, of the input's price, wherever it runs; many rows of the source lack it.

    https://platform.claude.com/docs/en/build-with-claude/prompt-caching
    """
    if isinstance(price, Decimal):
        return 2 * price
    return TieredPrices(
        base=2 * price.base, tiers=[Tier(start=tier.start, price=2 * tier.price) for tier in price.tiers]
    )


def trait_of(variant: PriceVariant, where: str) -> str:
    if len(variant.when) != 1:
        raise Untranslatable(f"{where}: a price variant depends on {len(variant.when)} traits of the request")
    return "=".join(next(iter(variant.when.items())))


def start_day(constraint: object, where: str) -> str:
    """The first day of a constraint, "" for always."""
    if isinstance(constraint, TimeOfDateConstraint):
        raise Untranslatable(f"{where}: price variants together with times of day")
    return constraint.start_date.isoformat() if isinstance(constraint, StartDateConstraint) else ""


def constraint(source: StartDateConstraint | TimeOfDateConstraint | None) -> dict[str, Any]:
    if source is None:
        return {}
    if isinstance(source, StartDateConstraint):
        return {"from": source.start_date.isoformat()}
    for time in (source.start_time, source.end_time):
        if time.utcoffset() or time.second or time.microsecond:
            raise Untranslatable(f"time of day {time} is not a whole minute in UTC")
    return {"daily": f"{source.start_time:%H:%M}-{source.end_time:%H:%M}"}


def names(model: ModelInfo, where: str, taken: set[str]) -> dict[str, list[str]]:
    """Exact names, patterns and exceptions of a row. The first row to name a model keeps it, as in the source."""
    exact: set[str] = set()
    like: set[str] = set()
    unlike: set[str] = set()
    for clause in alternatives(model.match):
        if isinstance(clause, ClauseAnd):
            clause = positive_part(clause, where)
            unlike |= {"*-tts", "*-tts-*"}
        for pattern in patterns(clause, where):
            (like if set("*#") & set(pattern) else exact).add(pattern)
    exact -= taken
    taken |= exact
    found = {"names": exact, "like": like, "unlike": unlike}
    return {key: sorted(value) for key, value in found.items() if value}


def shortened(matching: dict[str, list[str]], own: str) -> dict[str, Any]:
    """The id is a name of its row unless the row is `abstract`, so the common row needs no names at all."""
    exact = matching.get("names", [])
    others = [name for name in exact if name != own]
    # What a pattern of the row covers anyway needs no mark; `#` patterns never match an id (it is no dated name).
    covered = any(glob(like, own) for like in matching.get("like", [])) and "unlike" not in matching
    found: dict[str, Any] = {} if own in exact or covered else {"abstract": True}
    return found | ({"names": others} if others else {}) | {k: v for k, v in matching.items() if k != "names"}


def glob(like: str, name: str) -> bool:
    start, end = like.endswith("*"), like.startswith("*")
    core = like.strip("*")
    return core in name if start and end else name.startswith(core) if start else end and name.endswith(core)


def alternatives(clause: Any) -> Iterator[Any]:
    if isinstance(clause, ClauseOr):
        for part in clause.or_:
            yield from alternatives(part)
    else:
        yield clause


def positive_part(clause: ClauseAnd, where: str) -> Any:
    parts = [part for part in clause.and_ if getattr(part, "regex", "") != NOT_SPEECH]
    if len(parts) != 1 or len(clause.and_) != 2:
        raise Untranslatable(f"{where}: an `and` clause that is not `pattern and not a speech model`")
    return parts[0]


def patterns(clause: Any, where: str) -> list[str]:
    for kind, field, form in (
        (ClauseEquals, "equals", "{}"),
        (ClauseStartsWith, "starts_with", "{}*"),
        (ClauseEndsWith, "ends_with", "*{}"),
        (ClauseContains, "contains", "*{}*"),
    ):
        if isinstance(clause, kind):
            literal = getattr(clause, field).lower()
            if set("*#") & set(literal):
                raise Untranslatable(f"{where}: the name {literal!r} contains a wildcard")
            return [form.format(literal)]
    if isinstance(clause, ClauseRegex):
        return from_regex(clause.regex, where)
    raise Untranslatable(f"{where}: a match clause of kind {type(clause).__name__}")


def from_regex(regex: str, where: str) -> list[str]:
    """`^name-\\d{8}$` and friends: an anchored literal with digits; `[-@]` gives two patterns."""
    body = regex[1:].removesuffix("$")
    body = re.sub(r"\\d(?:\{(\d)\})?", lambda m: "#" * int(m[1] or 1), body).replace("\\.", ".")
    both = [body.replace("[-@]", "-"), body.replace("[-@]", "@")] if "[-@]" in body else [body]
    if not regex.startswith("^") or not all(re.fullmatch(r"[a-z0-9./#@-]+", pattern) for pattern in both):
        raise Untranslatable(f"{where}: the regex {regex!r}")
    return [pattern if regex.endswith("$") else f"{pattern}*" for pattern in both]


def table(date: str, build: Build) -> dict[str, Any]:
    wanted = {
        name for spec in PROVIDERS.values() for name in [*spec.get("lists", ()), *spec.get("by_suffix", {}).values()]
    }
    lists: dict[str, list[dict[str, Any]]] = {"google_free": []}
    for provider in SOURCE:
        if provider.id not in wanted:
            continue
        taken: set[str] = set()
        rows = [row for model in provider.models if (row := build.row(provider.id, model, taken)) is not None]
        free = {model for owner, model in FREE if owner == provider.id == "google"}
        lists["google_free"] += [row for row in rows if row["id"] in free]
        lists[provider.id] = [row for row in rows if row["id"] not in free]
    if missing := wanted - lists.keys():
        raise Untranslatable(f"the source no longer has the price lists {', '.join(sorted(missing))}")
    return {
        "format": 1,
        "source": "genai-prices",
        "notice": "genai-prices, MIT License, Copyright (c) Pydantic Services Inc. 2025 to present",
        "version": importlib.metadata.version("genai-prices"),
        "date": date,
        "providers": dict(sorted(PROVIDERS.items())),
        "lists": dict(sorted(lists.items())),
    }


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def rendered(found: dict[str, Any]) -> str:
    """Compact JSON with one model a line, so that a price change is a readable diff."""
    head = {key: value for key, value in found.items() if key != "lists"}
    lists = ",\n".join(
        f"{compact(name)}:[\n" + ",\n".join(map(compact, rows)) + "\n]" for name, rows in found["lists"].items()
    )
    return compact(head)[:-1] + ',"lists":{\n' + lists + "\n}}\n"


# ----- goldens: what the source itself makes of some usages -----------------------------------------------------------

# Provider id of ours, name, ISO time, request trait. Old dated names, schedules, hours, tiers, traits, hosts.
SAMPLES = """
openai gpt-4o 2026-11-20T12:00
openai gpt-4o-2024-05-13 2026-11-20T12:00
openai gpt-4o-mini-2024-07-18 2026-11-20T12:00
openai gpt-4o-audio-preview-2024-12-17 2026-11-20T12:00
openai gpt-realtime 2026-11-20T12:00
openai gpt-image-1.5 2026-11-20T12:00
openai o3 2025-05-01T00:00
openai o3 2026-11-20T12:00
openai gpt-5.5 2026-11-20T12:00
openai gpt-5.5 2026-11-20T12:00 service_tier=priority
openai gpt-5.5 2026-10-11T23:59 service_tier=priority
openai gpt-5.5-20260423 2026-11-20T12:00
openai gpt-5.6-sol 2026-08-01T00:00
openai gpt-5.6-sol-2026-09-09 2026-11-20T12:00 service_tier=flex
openai gpt-6-astra 2026-11-20T12:00
openai text-embedding-3-small 2026-11-20T12:00
anthropic claude-3-5-haiku-20241022 2026-11-20T12:00
anthropic claude-opus-4-6 2026-03-12T23:59
anthropic claude-opus-4-6 2026-03-13T00:00
anthropic claude-haiku-5-5 2026-11-20T12:00
anthropic claude-fable-5-2 2026-11-20T12:00 speed=fast
gemini gemini-2.5-pro 2026-11-20T12:00
gemini gemini-2.5-flash 2026-11-20T12:00
gemini gemini-3.8-flash 2026-11-20T12:00
gemini gemini-3.1-pro-preview-customtools 2026-11-20T12:00
vertex claude-haiku-5-5@20261001 2026-11-20T12:00
bedrock us.anthropic.claude-sonnet-4-5-20250929-v1:0 2026-11-20T12:00
bedrock global.anthropic.claude-haiku-5-5-v1:0 2026-11-20T12:00
bedrock us.openai.gpt-5.6-sol 2026-11-20T12:00
azure o4-mini 2026-11-20T12:00
groq llama-3.3-70b-versatile 2026-11-20T12:00
mistral mistral-large-latest 2026-11-20T12:00
deepseek deepseek-chat 2026-11-20T12:00
deepseek deepseek-chat 2026-11-20T18:00
deepseek deepseek-v4-pro 2026-08-16T02:00
deepseek deepseek-v4-pro 2026-11-20T05:00
deepseek deepseek-v4-pro 2026-11-20T09:59
perplexity sonar-pro 2026-11-20T12:00
perplexity perplexity/sonar 2026-11-20T12:00 search_type=fast
cohere command-a-03-2025 2026-11-20T12:00
xai grok-4.5 2026-11-20T12:00
xai grok-4-latest 2026-11-20T12:00
openrouter openai/gpt-5.5 2026-11-20T12:00
openrouter perplexity/sonar-deep-research 2026-11-20T12:00
openrouter openai/gpt-oss-120b:free 2026-11-20T12:00
cerebras gpt-oss-120b 2026-11-20T12:00
moonshot kimi-k3 2026-11-20T12:00
zai glm-5.3 2026-11-20T12:00
fireworks accounts/fireworks/models/deepseek-v4-pro 2026-11-20T12:00
together openai/gpt-oss-120b 2026-11-20T12:00
huggingface openai/gpt-oss-120b:groq 2026-11-20T12:00
"""

# Buckets of our Usage. Prompt totals stand below, at and above the thresholds 100,000, 199,999, 200,000 and 272,000.
USAGES: list[dict[str, int]] = [
    {"input_tokens": 1234, "output_tokens": 567},
    {"input_tokens": 3, "cached_tokens": 99_997, "output_tokens": 41, "reasoning_tokens": 40},
    {"input_tokens": 100_001, "output_tokens": 77},
    {"input_tokens": 150_000, "cached_tokens": 49_999, "cache_write_5m_tokens": 1, "output_tokens": 9},
    {"input_tokens": 1, "cached_tokens": 200_000, "output_tokens": 1, "searches": 2},
    {"input_tokens": 271_000, "cache_write_1h_tokens": 500, "cache_write_5m_tokens": 500, "output_tokens": 11},
    {"input_tokens": 272_001, "output_tokens": 1, "reasoning_tokens": 1},
    {"input_tokens": 700, "input_audio_tokens": 333, "cached_audio_tokens": 77, "output_audio_tokens": 21},
    {"input_tokens": 50, "input_image_tokens": 1111, "output_tokens": 3, "output_image_tokens": 4160},
]


def source_usage(u: dict[str, int]) -> Usage:
    def total(*buckets: str) -> int:
        return sum(u.get(f"{bucket}_tokens", 0) for bucket in buckets)

    write = ("cache_write_5m", "cache_write_1h")
    return Usage(
        input_tokens=total("input", "cached", *write, "input_audio", "cached_audio", "input_image"),
        cache_read_tokens=total("cached", "cached_audio"),
        cache_write_tokens=total(*write),
        cache_write_5m_tokens=total("cache_write_5m"),
        cache_write_1h_tokens=total("cache_write_1h"),
        input_audio_tokens=total("input_audio", "cached_audio"),
        cache_audio_read_tokens=total("cached_audio"),
        input_image_tokens=total("input_image"),
        output_tokens=total("output", "output_audio", "output_image"),
        output_reasoning_tokens=total("reasoning"),
        output_audio_tokens=total("output_audio"),
        output_image_tokens=total("output_image"),
        web_searches=u.get("searches", 0),
    )


def goldens() -> dict[str, Any]:
    cases = []
    for sample in SAMPLES.split("\n")[1:-1]:
        provider, model, at, trait = [*sample.split(), ""][:4]
        context = dict([trait.split("=")]) if trait else None
        source, name = source_name(provider, model)
        moment = datetime.fromisoformat(at).replace(tzinfo=UTC)
        found = [
            calc_price(
                source_usage(usage),
                name,
                provider_id=source,
                genai_request_timestamp=moment,
                price_context=context,
            ).total_price
            for usage in USAGES
        ]
        nanousd = [int((price * 10**9).to_integral_value(ROUND_HALF_UP)) for price in found]
        cases.append(
            {
                "provider": provider,
                "model": model,
                "at_s": int(moment.timestamp()),
                "variant": trait,
                "nanousd": nanousd,
            }
        )
    return {"usages": USAGES, "cases": cases}


def source_name(provider: str, model: str) -> tuple[str, str]:
    spec = PROVIDERS[provider]
    if "lists" in spec:
        return spec["lists"][0], model
    bare, _, suffix = model.rpartition(":")
    return spec["by_suffix"][suffix], bare


def rendered_goldens(found: dict[str, Any]) -> str:
    usages, cases = (",\n".join(map(compact, found[key])) for key in ("usages", "cases"))
    return f'{{"usages":[\n{usages}\n],"cases":[\n{cases}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--date", required=True, help="the day the prices were taken, YYYY-MM-DD")
    parser.add_argument("--out", type=Path, default=Path("stockyard_assets/prices.json"))
    parser.add_argument("--goldens", type=Path, default=Path("tests/wire/prices.json"))
    arguments = parser.parse_args()
    build = Build()
    found = table(arguments.date, build)
    text = rendered(found)
    arguments.out.write_text(text, encoding="utf-8")
    arguments.goldens.write_text(rendered_goldens(goldens()), encoding="utf-8")
    print(f"{len(text):,} bytes, {sum(map(len, found['lists'].values()))} models, {len(build.rounded)} amounts rounded")
    print("models by list:", dict(Counter({name: len(rows) for name, rows in found["lists"].items()})))
    print("left out:", ", ".join(build.left_out))


if __name__ == "__main__":
    main()
