"""Stockyard: a self-hosted LLM proxy in one file. Change one URL, and every LLM call goes through it.

Run it: `stockyard` serves on 127.0.0.1:4200; `stockyard demo` needs no key; `stockyard --help` tells the rest.

The file is the architecture. Its sections are its layers, in order; a section uses only sections above it:

    Imports and constants    limits, with their unit in the name
    Primitives               ids, money, strict JSON, server-sent events
    Errors                   one tree; each ends in one body and one log row
    Domain                   Usage, Call, Attempt, Transcript, Translation
    Dialects                 how bytes look: one class a wire format, around one canonical shape
    Providers                whom we call: one row each
    Dialect register         the names that rows use
    Prices                   price rows, matching, cost of a usage
    Settings                 rows of name, default, help
    Router                   from a name to targets
    Cache                    which answers may be given again, under which key, in which form
    Recognisers              what is personal, secret, or an attack in a text: rows, checks, one scanner
    Ledger                   virtual keys, budgets with holds and settlement, rate limits, bounds of a call
    Echo                     the built-in provider
    Streams                  flows: provider bytes in, client bytes out
    ~~~ waterline: everything above is pure; below, things happen ~~~
    Store                    SQLite: one writer, grouped commits, queries
    Upstream                 the only code that opens connections for calls
    Gateway                  the life of a call
    Lane                     the short way in for hot requests
    Server                   routes, roles, the error boundary, passthrough, admin JSON
    Process                  lock, listener, signals, assembly
    Command line             verbs; `main` last

The life of a call (`Gateway.answer`):

    1  the lane or an aiohttp handler makes a Call of plain values: headers, body bytes
    2  admit      may it go on: draining, log bound, keys, budgets, limits
    3  read       strict JSON, model name, canonical request
    4  route      ordered targets; a name nobody serves is a 404 that says what to set; a kept answer ends here, an equal
                  call under way is joined
    5  prepare    the client's bytes where they may pass, else encoded in the provider's dialect
    6  attempt    send, read, retry what may pass, go on to the next target of a route; streams are held back until
                  their first content
    7  learn      usage, finish reason, cost by a versioned price
    8  settle     one log row, however it ended

Words: client, call, attempt (one try at one target), target (provider and its model name), provider (whom), dialect
(how its bytes look), upstream key (theirs) and virtual key (ours), route (a name with targets of its own), retry (same target), fallback
(next target), breaker, hedge (two targets at once), branch (one of them), shadow, usage, price, cost, flow (a stream's translation),
entry (a kept answer), hit, miss, coalesced, flight (one upstream call for equal calls), rider (one of those calls),
passthrough (bytes unchanged), hold and settle (money), verdict (of a guardrail), span.
"""

# ===== Imports and constants ==========================================================================================
# Standard library first, then the two packages of the owner. Limits carry their unit in the name. uvloop is bundled in
# the executable and used where it imports; nothing depends on it.

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import collections
import contextlib
import copy
import csv
import dataclasses
import datetime
import difflib
import email.utils
import fcntl
import functools
import gc
import hashlib
import hmac
import html
import http
import importlib
import importlib.metadata
import importlib.util
import io
import ipaddress
import itertools
import json
import math
import os
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import sys
import tempfile
import threading
import time
import tomllib
import traceback
import unicodedata
import urllib.parse
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final, NamedTuple, Protocol, TypeVar, cast

import aiohttp
import orjson
import yarl
from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser, HttpResponseParser
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_protocol import _ErrInfo as ErrorMessage

__version__ = "0.1.0"

Json = dict[str, Any]
T = TypeVar("T")

NANOUSD_PER_USD: Final = 1_000_000_000
JSON_MAX_DEPTH: Final = 100
SSE_MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
UPSTREAM_MAX_BODY_BYTES: Final = 256 * 1024 * 1024
HEARTBEAT_S: Final = 15.0
SEE_README: Final = "see README.md"


# ===== Primitives =====================================================================================================
# Ids, money, strict JSON in, JSON out, and server-sent events. Everything here is pure: time and randomness come in as
# arguments. JSON from clients passes `parse_json_object` and nothing else, so that what Stockyard checked is what the
# provider reads (no duplicate keys, NaN, broken UTF-8, or depth that makes two parsers disagree).

CROCKFORD: Final = "0123456789abcdefghjkmnpqrstvwxyz"


def encode_base32(value: int, digits: int) -> str:
    """Write `value` as `digits` lower-case Crockford base-32 digits, so that text order is number order."""
    letters = []
    for _ in range(digits):
        letters.append(CROCKFORD[value & 31])
        value >>= 5
    return "".join(reversed(letters))


class IdSource:
    """Mints ids that sort by time and never repeat: 9 digits of milliseconds, 5 of a counter, 8 random ones per process.

    The billing of a call hangs on its id, so ids are made here and never taken from a client.
    """

    def __init__(self, now_ms: Callable[[], int], random_bits: Callable[[int], int]) -> None:
        self._now_ms = now_ms
        self._suffix = encode_base32(random_bits(40), 8)
        self._counter = random_bits(24)
        self._stamp_ms = -1
        self._stamp = ""

    def __call__(self, prefix: str) -> str:
        now_ms = self._now_ms()
        if now_ms != self._stamp_ms:
            self._stamp_ms, self._stamp = now_ms, encode_base32(now_ms, 9)
        self._counter += 1
        return f"{prefix}{self._stamp}{self._counter & 0x1FFFFFF:07x}{self._suffix}"


def format_usd(nanousd: int) -> str:
    """Print nano-dollars as dollars, exactly: 1_500_000 -> `0.0015`."""
    sign, nanousd = ("-", -nanousd) if nanousd < 0 else ("", nanousd)
    whole, rest = divmod(nanousd, NANOUSD_PER_USD)
    return f"{sign}{whole}.{rest:09d}".rstrip("0").rstrip(".") if rest else f"{sign}{whole}"


def parse_usd(text: str | int | float) -> int:
    """Read dollars as nano-dollars, exactly; ValueError when finer than one nano-dollar or not a finite number."""
    try:
        text = f"{Decimal(repr(text)):f}" if isinstance(text, float) else text  # 1e-06 is an amount, too
        whole, _, rest = str(text).strip().removeprefix("$").partition(".")
        if not (whole + rest).isdigit() or len(rest.rstrip("0")) > 9:
            raise ValueError
        return int(whole or "0") * NANOUSD_PER_USD + int(rest.rstrip("0").ljust(9, "0") or "0")
    except (ValueError, InvalidOperation):
        raise ValueError(f"{text!r} is no amount in dollars, such as 20 or 0.005") from None


def dump_json(value: Any) -> bytes:
    """Serialise compactly; integers beyond 64 bits and lone surrogates fall back to the standard library."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "replace")


SPACED_KEY: Final = re.compile(rb'"\s+:')


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> Json:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {name!r} appears twice in one object")
    return members


def _count_keys(value: Any) -> int:
    """Count the object members in a parsed document. Recursion is bounded: the caller has checked the depth."""
    if isinstance(value, dict):
        total = len(value)
        for child in value.values():
            if isinstance(child, dict | list):
                total += _count_keys(child)
        return total
    total = 0
    for child in value:
        if isinstance(child, dict | list):
            total += _count_keys(child)
    return total


def _json_depth(body: bytes) -> int:
    """The nesting depth of `body`; strings are removed first, so that brackets in text do not count."""
    depth = deepest = 0
    for byte in re.sub(rb'"(?:[^"\\]|\\.)*"', b"", body, flags=re.DOTALL):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def parse_json_object(body: bytes) -> Json:
    """Parse a client's JSON object strictly; ValueError with a sentence for everything doubtful.

    Refused: anything but UTF-8, NaN and infinities, lone surrogates, duplicate keys, depth over 100, trailing text.
    The duplicate check is cheap in the usual cases: what is written again as the same bytes lost nothing, and a text
    whose `":` are as many as its parsed members cannot hold a member twice; only otherwise (a quoted `":` in some text)
    the slower exact parser decides.
    """
    if body.count(b"[") + body.count(b"{") > JSON_MAX_DEPTH and _json_depth(body) > JSON_MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {JSON_MAX_DEPTH} levels")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(str(error)) from None
    if not isinstance(value, dict):
        raise ValueError("it must be an object")
    if len(body) < 16_384 and orjson.dumps(value) == body:
        return value
    if body.count(b'":') != _count_keys(value) or SPACED_KEY.search(body):
        json.loads(body.decode("utf-8"), object_pairs_hook=_refuse_duplicates, parse_int=str)
    return value


def splice_string(body: bytes, document: Json, name: str, value: str) -> bytes:
    """Replace the text of the top-level member `name` in the bytes of `document`, leaving every other byte alone.

    Where the member cannot be told from its bytes with certainty, the whole document is written anew.
    """
    key, old = b'"%b":' % name.encode(), orjson.dumps(document[name])
    for spaced in (key + old, key + b" " + old):
        if body.count(spaced) == 1 and body.count(key) == 1 and b"\\" + key not in body:
            at = body.index(spaced)
            start = at + len(spaced) - len(old)
            return body[:start] + orjson.dumps(value) + body[start + len(old) :]
    return dump_json({**document, name: value})


def splice_member(body: bytes, document: Json, name: str, value: Any) -> bytes:
    """Add the member `name` to a non-empty object's bytes, or replace it (by writing the document anew)."""
    if name in document or not document:
        return dump_json({**document, name: value})
    at = body.index(b"{") + 1
    return body[:at] + b'"%b":%b,' % (name.encode(), dump_json(value)) + body[at:]


class MalformedStream(ValueError):
    """A stream of events that no reader can make sense of."""


class SseReader:
    """An incremental reader of server-sent events: bytes in any split, `(event name, data)` pairs out.

    Line ends may be LF, CR or CRLF, also split between two reads; a BOM, comments, and unknown fields are passed over;
    `data` lines are joined. Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """

    def __init__(self) -> None:
        self._tail = b""
        self._began = self._after_cr = False

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        if not data:
            return []
        if self._after_cr and data[:1] == b"\n":
            data = data[1:]
        if b"\r" in data or self._after_cr:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        data = self._tail + data
        if not self._began and len(data) >= 3:
            self._began = True
            data = data.removeprefix(b"\xef\xbb\xbf")
        *blocks, self._tail = data.split(b"\n\n")
        if len(self._tail) > SSE_MAX_EVENT_BYTES:
            raise MalformedStream("the provider sent an event without end")
        return [event for block in blocks if (event := parse_sse_block(block))]

    def close(self) -> list[tuple[str, bytes]]:
        """Read what an ended stream left without its blank line: some providers forget the last one."""
        tail, self._tail = self._tail, b""
        event = parse_sse_block(tail)
        return [event] if event else []


def parse_sse_block(block: bytes) -> tuple[str, bytes] | None:
    """Read one event's lines; None for one without data (comments, heartbeats)."""
    if block.startswith(b"data: ") and b"\n" not in block:
        return "", block[6:]
    name, data = "", []
    for line in block.split(b"\n"):
        label, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if label == b"data":
            data.append(value)
        elif label == b"event":
            name = value.decode("utf-8", "replace")
    return (name, b"\n".join(data)) if data else None


def sse_event(value: Any, name: str = "") -> bytes:
    """Write one event with a JSON payload; dialects that name their events pass `name`."""
    if name:
        return b"event: %b\ndata: %b\n\n" % (name.encode(), dump_json(value))
    return b"data: %b\n\n" % dump_json(value)


# ===== Errors =========================================================================================================
# Every failure ends in one of these, one body in the client's dialect, and one log row. `message` is for the client and
# says what to do; the cause is logged by class name only and never sent.
#
#   GatewayError 500
#   ├── InvalidRequest 400        ├── UnknownModel 404        ├── Unauthenticated 401     ├── Forbidden 403
#   ├── PayloadTooLarge 413       ├── GuardrailBlocked 400    ├── StorageUnavailable 503  ├── Draining 503
#   ├── LimitExceeded 429 ── BudgetExceeded 429
#   ├── ClientGone 499
#   └── UpstreamError 502 ── UpstreamTimeout 504, UpstreamRefused (their 4xx), UpstreamExhausted 503


class GatewayError(Exception):
    """The root: what a client is told, and how retries see it.

    `fields` are further members of the error object (a budget's arithmetic, a provider's own details);
    `retry_after_s` becomes the header; `attempted` is true where a provider may have done (and billed) the work.
    """

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        fields: Json | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.type = type or self.type
        self.code = code or self.code
        self.param = param
        self.fields = fields or {}
        self.retry_after_s = retry_after_s


class InvalidRequest(GatewayError):
    status, type, code = 400, "invalid_request_error", "invalid_request"


class UnknownModel(GatewayError):
    status, type, code = 404, "invalid_request_error", "model_not_found"


class NotFound(GatewayError):
    status, type, code = 404, "invalid_request_error", "not_found"


class Unauthenticated(GatewayError):
    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class Forbidden(GatewayError):
    status, type, code = 403, "permission_error", "forbidden"


class PayloadTooLarge(GatewayError):
    status, type, code = 413, "invalid_request_error", "payload_too_large"


class LimitExceeded(GatewayError):
    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class BudgetExceeded(LimitExceeded):
    type, code = "insufficient_quota", "insufficient_quota"


class GuardrailBlocked(GatewayError):
    status, type, code = 400, "invalid_request_error", "content_filter"


class StorageUnavailable(GatewayError):
    status, type, code = 503, "server_error", "storage_unavailable"


class Draining(GatewayError):
    status, type, code = 503, "server_error", "shutting_down"


class ClientGone(GatewayError):
    status, type, code = 499, "client_error", "client_closed_request"


class UpstreamError(GatewayError):
    """The provider, or the way to it, failed. `retryable` says whether another try may help."""

    status, type, code = 502, "upstream_error", "upstream_error"
    retryable = True


class UpstreamTimeout(UpstreamError):
    status, code = 504, "upstream_timeout"


class UpstreamRefused(UpstreamError):
    """The provider's own 4xx, told on in the client's dialect with the provider's status, type and code."""

    status, type, code = 400, "invalid_request_error", "upstream_refused"
    retryable = False


class UpstreamExhausted(UpstreamError):
    status, code = 503, "upstream_exhausted"
    retryable = False


# ===== Domain =========================================================================================================
# The values that travel between the sections. Frozen where they are facts; `Call` alone is a growing record, owned by
# one task, and becomes the log row.


class Usage(NamedTuple):
    """Tokens of one call in disjoint buckets; `reasoning_tokens` alone is a part of `output_tokens`."""

    input_tokens: int = 0
    cached_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    input_audio_tokens: int = 0
    cached_audio_tokens: int = 0
    output_audio_tokens: int = 0
    input_image_tokens: int = 0
    output_image_tokens: int = 0
    searches: int = 0

    @property
    def prompt_tokens(self) -> int:
        """All input as OpenAI counts it, cached and written parts included."""
        return (
            self.input_tokens + self.cached_tokens + self.cache_write_5m_tokens + self.cache_write_1h_tokens
            + self.input_audio_tokens + self.cached_audio_tokens + self.input_image_tokens
        )  # fmt: skip

    @property
    def completion_tokens(self) -> int:
        """All output as OpenAI counts it: text, reasoning, audio and images."""
        return self.output_tokens + self.output_audio_tokens + self.output_image_tokens


def _count(value: Any) -> int:
    """A token count from a provider: some send floats, null, or nothing."""
    if type(value) is int:
        return value if value > 0 else 0
    return max(0, int(value)) if isinstance(value, float) and math.isfinite(value) else 0


#: Counters that few answers have, and that most of those which have them leave at zero.
RARE_USAGE: Final = ("num_search_queries",)
RARE_DETAILS: Final = (
    "audio_tokens",
    "image_tokens",
    "cache_write_tokens",
    "cache_creation",
    "cache_creation_input_tokens",
)


def read_openai_usage(usage: Mapping[str, Any]) -> Usage:
    """Read a `usage` object in OpenAI's words (chat or Responses names) into disjoint buckets.

    Covers the spellings of the compatible providers: DeepSeek's `prompt_cache_hit_tokens`, Mistral's and Moonshot's
    top-level counters, DashScope's `cache_creation_input_tokens`. Details are subsets of the totals.
    Source: https://platform.openai.com/docs/api-reference/chat/object and the providers' own pages.
    """
    total_in = _count(usage.get("prompt_tokens") or usage.get("input_tokens"))
    total_out = _count(usage.get("completion_tokens") or usage.get("output_tokens"))
    details = (
        usage.get("prompt_tokens_details")
        or usage.get("input_tokens_details")
        or usage.get("prompt_token_details")
        or {}
    )
    out = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
    cached = _count(
        details.get("cached_tokens") or usage.get("prompt_cache_hit_tokens")
        or usage.get("cached_tokens") or usage.get("num_cached_tokens")
    )  # fmt: skip
    reasoning = _count(out.get("reasoning_tokens"))
    if (
        not any(map(usage.get, RARE_USAGE))
        and not any(map(details.get, RARE_DETAILS))
        and not any(map(out.get, RARE_DETAILS))
    ):
        cached = min(cached, total_in)
        return Usage(total_in - cached, cached, output_tokens=total_out, reasoning_tokens=reasoning)
    creation = details.get("cache_creation") or {}
    write_1h = _count(creation.get("ephemeral_1h_input_tokens"))
    write = _count(details.get("cache_write_tokens") or details.get("cache_creation_input_tokens"))
    audio_in, image_in = _count(details.get("audio_tokens")), _count(details.get("image_tokens"))
    audio_out, image_out = _count(out.get("audio_tokens")), _count(out.get("image_tokens"))
    return Usage(
        input_tokens=max(0, total_in - cached - write - audio_in - image_in),
        cached_tokens=cached,
        cache_write_5m_tokens=max(0, write - write_1h),
        cache_write_1h_tokens=min(write, write_1h),
        output_tokens=max(0, total_out - audio_out - image_out),
        reasoning_tokens=reasoning,
        input_audio_tokens=audio_in,
        output_audio_tokens=audio_out,
        input_image_tokens=image_in,
        output_image_tokens=image_out,
        searches=_count(usage.get("num_search_queries")),
    )


def write_openai_usage(usage: Usage) -> Json:
    """Write usage in OpenAI's chat words; the inverse of `read_openai_usage`."""
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    write = usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
    details: Json = {"cached_tokens": usage.cached_tokens + usage.cached_audio_tokens}
    details["audio_tokens"] = usage.input_audio_tokens + usage.cached_audio_tokens
    if write:
        details["cache_write_tokens"] = write
    if usage.cache_write_1h_tokens:
        details["cache_creation"] = {
            "ephemeral_5m_input_tokens": usage.cache_write_5m_tokens,
            "ephemeral_1h_input_tokens": usage.cache_write_1h_tokens,
        }
    if usage.input_image_tokens:
        details["image_tokens"] = usage.input_image_tokens
    out: Json = {"reasoning_tokens": usage.reasoning_tokens, "audio_tokens": usage.output_audio_tokens}
    if usage.output_image_tokens:
        out["image_tokens"] = usage.output_image_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": details,
        "completion_tokens_details": out,
    }


@dataclass(slots=True)
class Translation:
    """What one attempt's encoder and decoder share: where the request goes, and what it lost on the way.

    `names` lets a decoder undo what the encoder did (a custom tool sent as a function, a tool id made fit);
    `new_id` and `now_s` are the clock and randomness of an otherwise pure dialect.
    """

    model: str
    provider: Provider
    stream: bool
    now_s: int
    new_id: Callable[[str], str]
    strict: bool = False
    #: Whether the client speaks another dialect than the canonical one, so that extensions must be carried or named.
    foreign: bool = False
    dropped: list[str] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)

    def drop(self, what: str, why: str = "") -> None:
        """Note that the target cannot carry `what`; an error where the client asked for strictness."""
        if self.strict:
            reason = f": {why}" if why else ""
            raise InvalidRequest(f"{self.provider.name} cannot carry `{what}` for {self.model}{reason}", param=what)
        if what not in self.dropped:
            self.dropped.append(what)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds: to connect, to the first byte, between two bytes, in all; and what a stream must bring in `idle_s`."""

    connect_s: float
    first_byte_s: float
    idle_s: float
    total_s: float
    min_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A client route that reaches a provider: its kind, the client's dialect, and whether it may stream."""

    kind: str
    path: str
    dialect: str = "openai"
    streams: bool = False
    upload: bool = False


#: The output cap by the names that dialects give it.
OUTPUT_CAP_FIELDS: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")
#: Failures after which a provider may have done and billed the work.
BILLED_PERHAPS: Final = frozenset({
    "upstream_timeout", "upstream_disconnected", "upstream_truncated", "upstream_malformed", "upstream_too_large", "upstream_stalled",
    "client_closed_request", "internal_error",
})  # fmt: skip


@dataclass(slots=True)
class Attempt:
    """One try at one target, for the log: when it began, how it ended."""

    provider: str
    model: str
    started_ms: float
    ended_ms: float = 0.0
    status: int = 0
    error: str = ""
    #: Where money is limited: the budgets (id and window), what was held in each, and what was charged for it.
    budget: Json | None = None

    @property
    def billed(self) -> str:
        """`yes`, `no`, or `perhaps` where the provider may have done the work and did not tell."""
        if self.status == 200:
            return "yes"
        return "no" if self.status >= 400 and self.error not in BILLED_PERHAPS else "perhaps"

    def to_json(self) -> Json:
        times = {"started_ms": round(self.started_ms, 3), "ended_ms": round(self.ended_ms, 3)}
        ended = {"status": self.status, "error": self.error, "billed": self.billed}
        told = {"provider": self.provider, "model": self.model, **times, **ended}
        return told if self.budget is None else {**told, "budget": self.budget}


class Call:
    """One client call: what came in, and, as it is learned, what came of it. It becomes the log row.

    Times ending in `_s` are of the monotonic clock; `ts_ms` is Unix time. Defaults stand on the class, so that making a
    call costs what it sets.
    """

    canonical: Json | None = None
    model: str = ""
    stream: bool = False
    key_id: str = ""
    key: VirtualKey | None = None
    tags: str = ""
    tag_map: Mapping[str, str] = {}
    rate_hold: RateHold | None = None
    rated: bool = False
    #: The output cap that a budget needs in the provider's own field, and whether it is less than what was asked for.
    output_cap: int | None = None
    clamped: bool = False
    session: str = ""
    targets: Sequence[Target] = ()
    #: The dialect that the logged request was translated to, and the arithmetic of a limit that refused the call.
    sent_dialect: str = ""
    refusal: Json | None = None
    #: Where it is one of several branches that run at once.
    race: Race | None = None
    #: The route that `model` names, and the upstream key of the last attempt (it never leaves this object).
    route: Route | None = None
    upstream_key: str = ""
    #: The id of the call that this one shadows.
    shadow_of: str = ""
    #: The id of the logged call that this one repeats.
    replay_of: str = ""
    provider: str = ""
    upstream_model: str = ""
    status: int = 0
    error: str = ""
    cache: str = "bypass"
    usage: Usage | None = None
    usage_estimated: bool = False
    cost_nanousd: int | None = None
    saved_nanousd: int = 0
    price_id: str = ""
    upstream_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0
    redactions: int = 0
    verdicts: str = ""
    finish_reason: str = ""
    sent_body: bytes = b""
    answer: bytes = b""
    transcript: Transcript | None = None
    request: Json = {}  # noqa: RUF012 - replaced, never changed
    path_parameters: Mapping[str, str] = {}
    dropped: Sequence[str] = ()
    #: The request was changed before it was read (a resumed conversation), so its bytes cannot pass.
    must_translate: bool = False
    #: The most that rules added to what the body holds.
    added_bytes: int = 0
    #: The client hung up; and the work goes on all the same, for equal calls that wait for its answer.
    is_gone: bool = False
    is_carried: bool = False

    def __init__(
        self,
        id: str,
        ts_ms: int,
        started_s: float,
        endpoint: Endpoint,
        headers: Mapping[str, str],
        body: bytes,
        client_ip: str = "",
    ) -> None:
        self.id, self.ts_ms, self.started_s = id, ts_ms, started_s
        self.endpoint, self.headers, self.body, self.client_ip = endpoint, headers, body, client_ip
        self.attempts: list[Attempt] = []

    @property
    def latency_ms(self) -> float:
        return (self.ended_s - self.started_s) * 1000


#: The commonest event by far, as OpenAI writes it; runs of nothing else are read with this one pattern.
PLAIN_DELTA: Final = re.compile(rb'"choices":\[\{"index":0,"delta":\{"content":"([^"\\]*(?:\\.[^"\\]*)*)"\}')


class Transcript:
    """Gathers what a stream said, for the log: text, reasoning and tool calls by choice, in bounded memory.

    Raw blocks of events are kept until `FOLD_BYTES`, then folded into text; so a long stream costs its text, not its
    framing, and the folding of a short one is left to whoever reads it (the log writer's thread).
    """

    FOLD_BYTES: ClassVar[int] = 4096
    MAX_TEXT: ClassVar[int] = 1_000_000

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._size = self._text_size = 0
        self._choices: dict[int, Json] = {}
        self.head: Json = {}
        self.model = ""

    def add_block(self, block: bytes) -> None:
        """Keep a run of whole events, as bytes."""
        self._blocks.append(block)
        self._size += len(block)
        if self._size > self.FOLD_BYTES:
            self._fold()

    def add_chunk(self, chunk: Json) -> None:
        """Keep what one canonical chunk says."""
        if chunk.get("model"):
            self.model = chunk["model"]
        for choice in chunk.get("choices") or ():
            self._add_choice(choice)

    def _fold(self) -> None:
        blocks, self._blocks, self._size = b"".join(self._blocks), [], 0
        plain = PLAIN_DELTA.findall(blocks)
        if plain and len(plain) == blocks.count(b"\n\n"):
            self._add_choice({"delta": {"content": orjson.loads(b'"%b"' % b"".join(plain))}})
            return
        for block in blocks.split(b"\n\n"):
            event = parse_sse_block(block)
            if event and event[1][:1] == b"{":
                with contextlib.suppress(orjson.JSONDecodeError):
                    self.add_chunk(orjson.loads(event[1]))

    def _add_choice(self, choice: Json) -> None:
        kept = self._choices.setdefault(choice.get("index") or 0, {"parts": {}, "tools": {}, "finish_reason": None})
        delta = choice.get("delta") or {}
        if choice.get("finish_reason"):
            kept["finish_reason"] = choice["finish_reason"]
        for name in ("content", "refusal", "reasoning_content", "reasoning", "text"):
            text = choice.get("text") if name == "text" else delta.get(name)
            if isinstance(text, str) and text and self._text_size < self.MAX_TEXT:
                self._text_size += len(text)
                kept["parts"].setdefault(name, []).append(text)
        for call in delta.get("tool_calls") or ():
            self._add_tool_call(kept["tools"], call)

    def _add_tool_call(self, tools: dict[int, Json], call: Json) -> None:
        kept = tools.setdefault(call.get("index") or 0, {"id": "", "type": "function", "name": "", "arguments": []})
        function = call.get("function") or {}
        kept["id"] = call.get("id") or kept["id"]
        kept["name"] = function.get("name") or kept["name"]
        if self._text_size < self.MAX_TEXT and isinstance(function.get("arguments"), str):
            self._text_size += len(function["arguments"])
            kept["arguments"].append(function["arguments"])

    def completion(self) -> Json:
        """The stream as the plain answer it stands for."""
        self._fold()
        choices = []
        for index, kept in sorted(self._choices.items()):
            texts = {name: "".join(parts) for name, parts in kept["parts"].items()}
            message: Json = {"role": "assistant", "content": texts.pop("content", None), **texts}
            if kept["tools"]:
                message["tool_calls"] = [
                    {
                        "id": c["id"],
                        "type": "function",
                        "function": {"name": c["name"], "arguments": "".join(c["arguments"])},
                    }
                    for _, c in sorted(kept["tools"].items())
                ]
            choices.append({"index": index, "message": message, "finish_reason": kept["finish_reason"]})
        return {"object": "chat.completion", "model": self.model, "choices": choices}

    def output_tokens(self) -> int:
        """A rough count for streams that ended without usage: four bytes of text a token, as OpenAI's rule of thumb."""
        self._fold()
        return (self._text_size + 3) // 4


# ===== Dialects =======================================================================================================
# How bytes look. One stateless class a wire format, a second-level banner each; the verbs have the same names and order
# everywhere. In the middle stands one canonical shape, OpenAI's chat completion as parsed JSON, so that N client and M
# provider dialects need N + M converters. Where that shape cannot carry something, these extensions do, and every
# encoder either carries them or names them with `translation.drop`:
#
#   message.reasoning_content      reasoning as text (`reasoning` is its mirror in answers)
#   message.thinking_blocks        opaque blocks to give back unchanged: {"type": "thinking", "thinking", "signature"},
#                                  {"type": "redacted_thinking", "data"}, {"type": "reasoning_item", "item"}
#   ….extra_content.google         {"thought_signature"} on a message or on one of its tool calls
#   part.cache_control             on content parts, messages and tools, as Anthropic defines it
#   part type "file"               {"file_data": data URI | "file_url" | "file_id", "filename"}; "media" likewise (video)
#   message.is_error               a tool result that reports a failure
#   tool type "native"             {"dialect", "tool"}: a provider's own server-side tool, for that dialect only
#   message.annotations            citations: {"type": "url_citation", "url_citation": {…}}, others kept as they came
#
# A stream is a `Decoder` (provider bytes in, canonical chunks out, `complete` once its terminal event was seen) and a
# `Renderer` (canonical chunks in, client bytes out). Errors are raised as UpstreamError by `feed`.
# To add a dialect: subclass, fill in the verbs, register it in DIALECTS.


class Decoder(Protocol):
    """Reads one provider stream. `feed` takes bytes in any split; `complete` proves a whole answer."""

    complete: bool

    def feed(self, data: bytes) -> list[Json]: ...
    def close(self) -> list[Json]: ...


class Renderer(Protocol):
    """Writes one client stream from canonical chunks; `close` ends a successful one, `fail` a broken one."""

    def feed(self, chunk: Json) -> bytes: ...
    def close(self) -> bytes: ...
    def fail(self, error: GatewayError, request_id: str) -> bytes: ...


AUTH_STATUSES: Final = frozenset({401, 403})
RETRYABLE_STATUSES: Final = frozenset({408, 409, 425, 429, 498, 500, 502, 503, 504, 520, 522, 524, 529})
SPENT_CODES: Final = frozenset({"insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached"})
CLIENT_STATUS: Final = {529: 503, 498: 429, 424: 502, 499: 502, 520: 502, 522: 502, 524: 504}


def upstream_failure(
    status: int,
    message: str,
    *,
    type: str | None = None,
    code: str | None = None,
    param: str | None = None,
    fields: Json | None = None,
    retry_after_s: float | None = None,
    bad_key: bool = False,
) -> UpstreamError:
    """Sort a provider's error by what the client may learn and whether another try may help.

    A provider that refuses *our* key is a 502: the client's own key is fine. Overload keeps its class, 529 becomes 503.
    """
    if bad_key or status in AUTH_STATUSES:
        what = f"the provider refused Stockyard's key or account: {message}"
        return UpstreamError(what, code="upstream_authentication", fields=fields)
    if status in RETRYABLE_STATUSES and code not in SPENT_CODES:
        error_type = type or ("rate_limit_error" if status == 429 else "upstream_error")
        return UpstreamError(
            message, status=CLIENT_STATUS.get(status, status), type=error_type, code=code or f"upstream_{status}",
            param=param, fields=fields, retry_after_s=retry_after_s,
        )  # fmt: skip
    if 400 <= status < 500:
        return UpstreamRefused(
            message, status=CLIENT_STATUS.get(status, status), type=type, code=code, param=param, fields=fields,
            retry_after_s=retry_after_s,
        )  # fmt: skip
    return UpstreamError(message, code=code or f"upstream_{status}", fields=fields)


def read_error_members(body: bytes) -> Json:
    """Find message, type, code and param in any provider's error body; never raises.

    Shapes met: {"error": {…}}, {"error": "text", "code"}, [{"error": {…}}] (Gemini), {"message": …} (Cohere, Mistral,
    Bedrock), {"detail": "text" | [{"loc", "msg"}]} (FastAPI), RFC 7807 {"title", "detail"}, and plain text or HTML.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        text = body[:300].decode("utf-8", "replace").strip()
        return {"message": "the provider answered an HTML page" if text.startswith("<") else text}
    if isinstance(document, list):
        document = document[0] if document else {}
    if not isinstance(document, dict):
        return {"message": str(document)[:300]}
    error = document.get("error")
    if isinstance(error, str):
        return {"message": error, "code": document.get("code")}
    members: Json = error if isinstance(error, dict) else document
    message = members.get("message") or members.get("Message") or members.get("detail") or members.get("title")
    if isinstance(message, list):
        message = "; ".join(
            f"{'.'.join(map(str, item.get('loc', ())))}: {item.get('msg')}" if isinstance(item, dict) else str(item)
            for item in message
        )
    return {**members, "message": message if isinstance(message, str) else dump_json(message or members).decode()}


class Dialect:
    """One wire format. The defaults of the client side are OpenAI chat's, which is also the canonical shape."""

    name: ClassVar[str] = ""
    #: Dialects of one family are the same on the wire; bytes pass between them.
    family: ClassVar[str] = ""
    #: Request headers of a client that may travel to a provider of the same dialect.
    forwarded_headers: ClassVar[tuple[str, ...]] = ()
    #: Headers every request to a provider of this dialect carries.
    fixed_headers: ClassVar[Mapping[str, str]] = {}
    stream_type: ClassVar[str] = "text/event-stream; charset=utf-8"
    #: How many texts one embeddings call takes; more are sent as several calls.
    embeddings_at_once: ClassVar[int] = 2048
    #: Whether its streams are server-sent events.
    events: ClassVar[bool] = True
    #: Whether an answer may only name the address where the real one is got.
    follows: ClassVar[bool] = False
    #: Whether a request without `store` is kept by the provider; whether a stream tells its usage only when asked.
    stores_unasked: ClassVar[bool] = False
    usage_on_request: ClassVar[bool] = False
    heartbeat: ClassVar[bytes] = b": heartbeat\n\n"

    def __init_subclass__(cls) -> None:
        if "family" not in cls.__dict__ and not cls.family:
            cls.family = cls.name

    # -- client side

    def parse(self, body: Json, path: Mapping[str, str]) -> Json:
        """A client's body as a canonical request; InvalidRequest says what is wrong. `path` holds URL parameters."""
        raise NotImplementedError

    def render(self, completion: Json, request: Json) -> Json:
        """A canonical completion as this dialect's answer; `request` is the client's own body."""
        raise NotImplementedError

    def renderer(self, request: Json, new_id: Callable[[str], str], now_s: int) -> Renderer:
        raise NotImplementedError

    def render_error(self, error: GatewayError, request_id: str) -> tuple[int, Json]:
        """The HTTP status and body of an error."""
        raise NotImplementedError

    def wants_stream(self, request: Json, path: Mapping[str, str]) -> bool:
        stream = request.get("stream")
        if stream is not None and not isinstance(stream, bool):
            raise InvalidRequest("`stream` must be true or false", param="stream")
        return bool(stream)

    def stream_type_of(self, request: Json) -> str:
        """The content type of a streamed answer."""
        return self.stream_type

    def refuse_elsewhere(self, canonical: Json) -> None:
        """InvalidRequest where a request cannot be sent to a provider of any other dialect."""

    def must_render(self, request: Json) -> bool:
        """Whether an answer must be rendered anew even from a provider of the same dialect."""
        return False

    def render_models(self, rows: list[Json]) -> Json:
        """The merged list of models, as this dialect's listing endpoint answers it."""
        return {"object": "list", "data": rows}

    def render_model(self, row: Json) -> Json:
        return row

    def parse_embeddings(self, body: Json, path: Mapping[str, str]) -> Json:
        """A client's embeddings request as OpenAI's."""
        return body

    def render_embeddings(self, answer: Json, request: Json, path: Mapping[str, str]) -> Json:
        """OpenAI's embeddings answer, with lists of floats, as this dialect's."""
        return answer

    def count_tokens(self, canonical: Json, request: Json) -> Json:
        """An estimate of a request's input tokens, as this dialect's counting endpoint answers it."""
        raise NotImplementedError

    # -- provider side

    def path(self, provider: Provider, model: str, stream: bool) -> str:
        """The path below the provider's base URL that answers chat calls."""
        raise NotImplementedError

    def encode(self, request: Json, translation: Translation) -> Json:
        """A canonical request as the provider's body."""
        raise NotImplementedError

    def decode(self, answer: Json, translation: Translation) -> Json:
        """The provider's answer as a canonical completion."""
        raise NotImplementedError

    def decoder(self, translation: Translation) -> Decoder:
        raise NotImplementedError

    def encode_embeddings(self, request: Json, translation: Translation) -> Json:
        """OpenAI's embeddings request as the provider's."""
        raise NotFound(f"{translation.provider.name} offers no embeddings", code="unsupported_endpoint")

    def decode_embeddings(self, answer: Json, translation: Translation) -> Json:
        """The provider's embeddings as OpenAI's answer, with lists of floats."""
        raise NotImplementedError

    def encode_rerank(self, request: Json, translation: Translation) -> Json:
        """`{model, query, documents, top_n}` as the provider's body."""
        return request

    def decode_rerank(self, answer: Json, translation: Translation) -> Json:
        return answer

    def read_usage(self, answer: Json) -> Usage | None:
        """The usage in a provider's plain answer; None where it tells none."""
        raise NotImplementedError

    def read_error(self, status: int, body: bytes) -> UpstreamError:
        raise NotImplementedError

    def read_error_answer(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError:
        """An error answer with its headers, for dialects that say something in them."""
        return self.read_error(status, body)

    def headers_for(self, stream: bool) -> Mapping[str, str]:
        """Headers of a call that depend on whether it streams."""
        return {}

    def with_output_cap(self, request: Json, tokens: int) -> Json:
        """This dialect's own request with a real cap on the output, under the one name that binds."""
        names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
        name = next((name for name in names if name in request), names[0])
        return {**{key: value for key, value in request.items() if key not in names}, name: tokens}

    def texts_at_once(self, model: str) -> int:
        """How many texts one embeddings call of this model takes."""
        return self.embeddings_at_once

    def follow(self, answer: Json, translation: Translation) -> str | None:
        """Where to get the real answer (`follows`); None where this is it."""
        return None

    def read_models(self, answer: Any) -> list[Json]:
        """A provider's list of models as rows with an `id`; some answer a bare array."""
        rows = answer if isinstance(answer, list) else answer.get("data") or answer.get("models") or []
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]


# ----- OpenAI model facts ---------------------------------------------------------------------------------------------
# What one family of models takes, as rows: which refuse sampling parameters while they reason, which take function
# tools only on /responses. Both OpenAI dialects ask these rows, nobody asks for a model by name. To add a model, add a
# row: the longest prefix wins that ends where the name ends, or before `-`, `:` or `@`.
# Sources: https://developers.openai.com/api/docs/guides/reasoning, /latest-model and /deployment-checklist; docs.x.ai.

SAMPLING_DEFAULTS: Final[Mapping[str, Any]] = {
    "temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "logprobs": False,
    "top_logprobs": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model takes. The defaults are those of a current reasoning model.

    `active` says that it reasons where no effort is asked for, `sampling` that it takes sampling parameters even then;
    `chat` that /chat/completions serves it; `chat_tools` when that endpoint takes function tools: `any`, `no_effort`
    (only where effort is absent or none), `effort_none` (only where effort is none) or `never`.
    """

    reasons: bool = True
    active: bool = True
    sampling: bool = False
    takes_effort: bool = True
    takes_none: bool = False
    takes_minimal: bool = False
    takes_stop: bool = False
    chat: bool = True
    chat_tools: str = "any"

    def effort(self, asked: str | None) -> str | None:
        """The effort to send for `asked`: itself, the nearest the model takes, or None for none at all."""
        if asked is None or not self.reasons or not self.takes_effort:
            return None
        if asked == "none" and not self.takes_none:
            return "minimal" if self.takes_minimal else "low"
        return "low" if asked == "minimal" and not self.takes_minimal else asked

    def reasoning_active(self, asked: str | None) -> bool:
        effort = self.effort(asked)
        return self.reasons and (self.active if effort is None else effort != "none")

    def refused(self, request: Json) -> list[str]:
        """The members of a chat request that this model answers with a 400."""
        names = [] if self.takes_stop or request.get("stop") is None else ["stop"]
        if not self.sampling and self.reasoning_active(_effort_of(request)):
            names += [name for name in SAMPLING_DEFAULTS if request.get(name) is not None]
        return names

    def needs_responses(self, request: Json) -> bool:
        """Whether this chat request must be sent to /responses and its answer translated back."""
        if not (self.chat and request.get("tools")):
            return not self.chat
        effort = self.effort(_effort_of(request))
        open_to = {"any": True, "no_effort": effort in (None, "none"), "effort_none": effort == "none", "never": False}
        return not open_to[self.chat_tools]


def _effort_of(request: Json) -> str | None:
    effort = request.get("reasoning_effort")
    return effort if isinstance(effort, str) else None


UNKNOWN_MODEL: Final = ModelFacts(active=False, sampling=True, takes_none=True, takes_minimal=True, takes_stop=True)
PLAIN: Final = ModelFacts(reasons=False, active=False, takes_stop=True)
OPT_IN: Final = ModelFacts(active=False, takes_none=True, takes_minimal=True)
FIXED: Final = ModelFacts(takes_effort=False)
RESPONSES_ONLY: Final = ModelFacts(chat=False, chat_tools="never")
GROK: Final = ModelFacts(sampling=True, takes_none=True)

OPENAI_MODELS: Final[Mapping[str, ModelFacts]] = {
    # Never asked for what they do not have; not OpenAI's to serve.
    "gpt-oss": UNKNOWN_MODEL,
    # A name newer than these rows: reasons, takes tools where every model takes them.
    "gpt": ModelFacts(chat_tools="never"),
    "gpt-3.5": PLAIN, "gpt-4": PLAIN, "gpt-4o": PLAIN, "gpt-4.1": PLAIN, "gpt-4.5": PLAIN, "chatgpt": PLAIN,
    "o1": ModelFacts(takes_stop=True), "o3": ModelFacts(), "o4": ModelFacts(),
    "o1-pro": RESPONSES_ONLY, "o3-pro": RESPONSES_ONLY, "o3-deep-research": RESPONSES_ONLY,
    "o4-mini-deep-research": RESPONSES_ONLY, "codex": RESPONSES_ONLY, "computer-use": RESPONSES_ONLY,
    "gpt-5": ModelFacts(takes_minimal=True),
    "gpt-5-chat": PLAIN, "gpt-5-pro": RESPONSES_ONLY, "gpt-5-codex": RESPONSES_ONLY,
    "gpt-5.1": OPT_IN, "gpt-5.1-chat": FIXED, "gpt-5.1-codex": RESPONSES_ONLY,
    "gpt-5.2": OPT_IN, "gpt-5.2-chat": FIXED, "gpt-5.2-pro": RESPONSES_ONLY,
    "gpt-5.2-codex": ModelFacts(active=False, takes_none=True, chat=False, chat_tools="never"),
    "gpt-5.3": OPT_IN, "gpt-5.3-chat": FIXED,
    "gpt-5.3-codex": ModelFacts(active=False, takes_none=True, chat=False, chat_tools="never"),
    "gpt-5.4": ModelFacts(active=False, takes_none=True, takes_minimal=True, chat_tools="no_effort"),
    "gpt-5.4-pro": RESPONSES_ONLY,
    "gpt-5.5": ModelFacts(takes_none=True, takes_minimal=True, chat_tools="no_effort"),
    "gpt-5.5-pro": RESPONSES_ONLY,
    "gpt-5.6": ModelFacts(takes_none=True, chat_tools="no_effort"),
    "gpt-6-astra": ModelFacts(chat_tools="never"),
    "gpt-6-sol": ModelFacts(takes_none=True, chat_tools="effort_none"),
    "gpt-6-luna": ModelFacts(takes_none=True, chat_tools="effort_none"),
    "gpt-6.1-sol": ModelFacts(chat_tools="never"),
    "gpt-6.2": ModelFacts(chat_tools="never"),
    # xAI's, so that its Responses door needs no dialect of its own.
    "grok": GROK, "grok-4.5": ModelFacts(sampling=True),
    "grok-4.20": ModelFacts(sampling=True, takes_effort=False),
}  # fmt: skip


@functools.lru_cache(maxsize=1024)
def openai_model_facts(model: str) -> ModelFacts:
    """The row of `model`; a vendor (`openai/…`) or fine-tune (`ft:…`) mark in front does not matter."""
    name = model.lower().rpartition("/")[2].removeprefix("ft:")
    ends = sorted((at for at, letter in enumerate(name) if letter in "-:@"), reverse=True)
    for end in (len(name), *ends):
        if name[:end] in OPENAI_MODELS:
            return OPENAI_MODELS[name[:end]]
    return UNKNOWN_MODEL


# ----- OpenAI chat ----------------------------------------------------------------------------------------------------
# Also the canonical shape. Compatible providers differ by the row fields of their Provider: drops, renames, usage traits.
# Source: https://platform.openai.com/docs/api-reference/chat; quirks from the pages named in the provider table.

FINISH_REASONS: Final = {
    "eos": "stop", "stop_sequence": "stop", "end_turn": "stop", "model_length": "length", "max_tokens": "length",
    "model_context_window_exceeded": "length", "sensitive": "content_filter", "tool_use": "tool_calls",
}  # fmt: skip
FAILED_FINISHES: Final = frozenset({"error", "network_error", "insufficient_system_resource"})


def _split_content_list(parts: list[Any]) -> tuple[str, str]:
    """Mistral's content lists hold thinking and text items: their text, their reasoning."""
    text, reasoning = [], []
    for part in parts:
        if isinstance(part, str):
            text.append(part)
        elif part.get("type") == "thinking":
            inner = part.get("thinking")
            reasoning.append(inner if isinstance(inner, str) else "".join(p.get("text", "") for p in inner or ()))
        elif isinstance(part.get("text"), str):
            text.append(part["text"])
    return "".join(text), "".join(reasoning)


def normalise_openai_message(message: Json) -> Json:
    """Bring a compatible provider's message or delta to the canonical spelling (in place)."""
    content = message.get("content")
    if isinstance(content, list):
        message["content"], reasoning = _split_content_list(content)
        if reasoning:
            message["reasoning_content"] = reasoning
    if message.get("reasoning") and not message.get("reasoning_content") and isinstance(message["reasoning"], str):
        message["reasoning_content"] = message["reasoning"]
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        if isinstance(function.get("arguments"), dict | list):
            function["arguments"] = dump_json(function["arguments"]).decode()
    return message


class OpenAiDecoder:
    """Reads a compatible provider's chat stream into canonical chunks."""

    def __init__(self, dialect: OpenAiChat, translation: Translation) -> None:
        self._dialect, self._translation = dialect, translation
        self._events = SseReader()
        self.complete = False

    def feed(self, data: bytes) -> list[Json]:
        return [chunk for _, payload in self._events.feed(data) if (chunk := self.read(payload)) is not None]

    def close(self) -> list[Json]:
        return [chunk for _, payload in self._events.close() if (chunk := self.read(payload)) is not None]

    def read(self, payload: bytes) -> Json | None:
        """One event's payload as a chunk; None for `[DONE]`. UpstreamError for an error inside the stream."""
        if payload.strip() == b"[DONE]":
            self.complete = True
            return None
        chunk = read_event_json(payload)
        refuse_error_event(chunk, self._dialect)
        for choice in chunk.get("choices") or ():
            normalise_openai_message(choice.get("delta") or {})
            reason = choice.get("finish_reason")
            if reason in FAILED_FINISHES:
                raise UpstreamError(f"the provider stopped with `{reason}`", code=f"upstream_{reason}")
            if reason:
                choice["finish_reason"] = FINISH_REASONS.get(reason, reason)
                self.complete = True
        usage = chunk.get("usage") or (chunk.get("x_groq") or {}).get("usage")
        if usage:
            chunk["usage"] = write_openai_usage(self._dialect.usage_of(usage, self._translation.provider))
        return chunk


def read_event_json(payload: bytes) -> Json:
    """Parse an event's JSON object; UpstreamError for anything else (a broken event is never passed on silently)."""
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise UpstreamError("the provider sent an event that is no JSON object", code="upstream_malformed")
    return value


def refuse_error_event(event: Json, dialect: Dialect) -> None:
    """Raise the error that some providers put inside a 200 stream."""
    error = event.get("error") or (event.get("x_groq") or {}).get("error")
    if error:
        status = error.get("code") if isinstance(error, dict) else None
        status = status if isinstance(status, int) and 400 <= status < 600 else 502
        raise dialect.read_error(status, dump_json({"error": error}))


class OpenAiRenderer:
    """Writes canonical chunks for an OpenAI chat client; the usage chunk only where the client asked for it."""

    def __init__(self, include_usage: bool) -> None:
        self._include_usage = include_usage

    def feed(self, chunk: Json) -> bytes:
        if not chunk.get("choices"):
            return sse_event(chunk) if self._include_usage and chunk.get("usage") else b""
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            if delta.get("reasoning_content"):
                delta["reasoning"] = delta["reasoning_content"]
        if not self._include_usage:
            chunk.pop("usage", None)
        return sse_event(chunk)

    def close(self) -> bytes:
        return b"data: [DONE]\n\n"

    def fail(self, error: GatewayError, request_id: str) -> bytes:
        return sse_event(openai_error_body(error, request_id))


def openai_error_body(error: GatewayError, request_id: str) -> Json:
    members = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return {"error": {**error.fields, **members, "request_id": request_id}}


#: Message members of the canonical shape that OpenAI's own does not have.
MESSAGE_EXTENSIONS: Final = (
    "thinking_blocks",
    "native_blocks",
    "extra_content",
    "is_error",
    "cache_control",
    "annotations",
    "images",
)


def without_extensions(request: Json, translation: Translation) -> Json:
    """A canonical request from another client dialect as plain OpenAI chat; what cannot be carried is named."""
    body = {name: value for name, value in request.items() if name != "extra_body" and value is not None}
    for members in (request.get("extra_body") or {}).values():
        for name in members:
            translation.drop(name)
    for name in translation.provider.foreign_drops & body.keys():
        del body[name]
        translation.drop(name)
    if "messages" in body:
        body["messages"] = [plain_message(message, translation) for message in body["messages"]]
    if body.get("tools"):
        body["tools"] = [
            tool for tool in map(functools.partial(plain_tool, translation=translation), body["tools"]) if tool
        ]
        if not body["tools"]:
            del body["tools"]
            body.pop("tool_choice", None)
            body.pop("parallel_tool_calls", None)
    return body


def plain_message(message: Json, translation: Translation) -> Json:
    plain = {name: value for name, value in message.items() if name not in MESSAGE_EXTENSIONS}
    for name in ("thinking_blocks", "native_blocks", "cache_control"):
        if message.get(name):
            translation.drop(name)
    if not translation.provider.replays_reasoning:
        if plain.pop("reasoning_content", None):
            translation.drop("reasoning_content")
        plain.pop("reasoning", None)
    if isinstance(message.get("content"), list):
        parts = [plain_part(part, translation) for part in message["content"] if isinstance(part, dict)]
        plain["content"] = [part for part in parts if part] or ""
    if message.get("is_error") and isinstance(plain.get("content"), str):
        plain["content"] = f"Error: {plain['content']}"
    if message.get("tool_calls"):
        plain["tool_calls"] = [
            {k: v for k, v in call.items() if k != "extra_content"} for call in message["tool_calls"]
        ]
    return plain


def plain_part(part: Json, translation: Translation) -> Json | None:
    """A content part without extensions; None, and named, where OpenAI chat has nothing like it."""
    if part.get("cache_control"):
        translation.drop("cache_control")
    file = part.get("file") or {}
    if part.get("type") == "media" or (
        part.get("type") == "file" and not (file.get("file_data") or file.get("file_id"))
    ):
        translation.drop(f"content.{part['type']}")
        return None
    return {name: value for name, value in part.items() if name not in ("cache_control", "extra_content", "citations")}


def plain_tool(tool: Json, translation: Translation) -> Json | None:
    if tool.get("type") == "native":
        named = tool.get("tool") or {}
        translation.drop(f"tools.{named.get('type') or named.get('name') or next(iter(named), 'native')}")
        return None
    return {name: value for name, value in tool.items() if name not in ("cache_control", "extra_content")}


def pack_floats(answer: Json) -> Json:
    """An embeddings answer with its vectors as base64 of little-endian float32, which OpenAI's SDKs ask for."""
    rows = [{**row, "embedding": pack_vector(row["embedding"])} for row in answer["data"]]
    return {**answer, "data": rows}


def pack_vector(vector: list[float] | str) -> str:
    """Some providers pack it themselves."""
    return vector if isinstance(vector, str) else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


class OpenAiChat(Dialect):
    name = "openai"
    usage_on_request = True
    forwarded_headers = ("openai-beta", "x-title", "http-referer")

    def parse(self, body: Json, path: Mapping[str, str]) -> Json:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise InvalidRequest("`messages` must be a non-empty array", param="messages")
        for at, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InvalidRequest(f"`messages[{at}]` must be an object with a `role`", param=f"messages[{at}]")
        return body

    def render(self, completion: Json, request: Json) -> Json:
        for choice in completion["choices"]:
            message = choice["message"]
            if message.get("reasoning_content"):
                message["reasoning"] = message["reasoning_content"]
        return completion

    def renderer(self, request: Json, new_id: Callable[[str], str], now_s: int) -> Renderer:
        return OpenAiRenderer(bool((request.get("stream_options") or {}).get("include_usage")))

    def render_error(self, error: GatewayError, request_id: str) -> tuple[int, Json]:
        return error.status, openai_error_body(error, request_id)

    def parse_embeddings(self, body: Json, path: Mapping[str, str]) -> Json:
        if not body.get("input"):
            raise InvalidRequest("`input` must be a text or a non-empty array of texts", param="input")
        return body

    def render_embeddings(self, answer: Json, request: Json, path: Mapping[str, str]) -> Json:
        return pack_floats(answer) if request.get("encoding_format") == "base64" else answer

    def path(self, provider: Provider, model: str, stream: bool) -> str:
        return provider.path("chat", model)

    def encode_embeddings(self, request: Json, translation: Translation) -> Json:
        body = {**request, "encoding_format": "float"} if translation.foreign else request
        return self.encode(body, translation)

    def decode_embeddings(self, answer: Json, translation: Translation) -> Json:
        if not isinstance(answer.get("data"), list):
            refuse_error_event(answer, self)
            raise UpstreamError("the provider's answer has no `data`", code="upstream_malformed")
        return answer

    def encode(self, request: Json, translation: Translation) -> Json:
        """Apply the provider's row. An OpenAI client's own fields travel untouched, known or not."""
        provider = translation.provider
        if translation.foreign:
            request = without_extensions(request, translation)
        body = {provider.renames.get(name, name): value for name, value in request.items()}
        body |= provider.aliases.get(translation.model) or {"model": translation.model}
        for name in provider.drops & body.keys():
            del body[name]
            translation.drop(name)
        if provider.adapt is not None:
            provider.adapt(body, translation)
        if translation.stream and provider.stream_usage == "stream_options":
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        elif provider.stream_usage == "always":
            body.pop("stream_options", None)
        return body

    def decode(self, answer: Json, translation: Translation) -> Json:
        choices = answer.get("choices")
        if not isinstance(choices, list):
            refuse_error_event(answer, self)
            raise UpstreamError("the provider's answer has no `choices`", code="upstream_malformed")
        for choice in choices:
            normalise_openai_message(choice.get("message") or {})
            reason = choice.get("finish_reason")
            choice["finish_reason"] = FINISH_REASONS.get(reason, reason)
        usage = self.read_usage_for(answer, translation.provider)
        if usage:
            answer["usage"] = write_openai_usage(usage)
        return answer

    def decoder(self, translation: Translation) -> OpenAiDecoder:
        return OpenAiDecoder(self, translation)

    def read_usage(self, answer: Json) -> Usage | None:
        usage = answer.get("usage") or (answer.get("x_groq") or {}).get("usage")
        return read_openai_usage(usage) if isinstance(usage, dict) else None

    def read_usage_for(self, answer: Json, provider: Provider) -> Usage | None:
        usage = answer.get("usage") or (answer.get("x_groq") or {}).get("usage")
        return self.usage_of(usage, provider) if isinstance(usage, dict) else None

    def usage_of(self, usage: Json, provider: Provider) -> Usage:
        """Read usage, minding providers whose completion count leaves reasoning out (xAI)."""
        read = read_openai_usage(usage)
        if provider.reasoning_apart and read.reasoning_tokens:
            return read._replace(output_tokens=read.output_tokens + read.reasoning_tokens)
        return read

    def read_error(self, status: int, body: bytes) -> UpstreamError:
        members = read_error_members(body)
        code, kind = members.get("code"), members.get("type")
        text = str(members.get("message"))
        known = {"message", "type", "code", "param", "object", "request_id"}
        return upstream_failure(
            status, text or f"the provider answered {status}",
            type=kind if isinstance(kind, str) else None,
            code=str(code) if code is not None else None,
            param=members.get("param") if isinstance(members.get("param"), str) else None,
            fields={name: value for name, value in members.items() if name not in known},
            bad_key=status == 400 and ("api key" in text.lower() or "api_key" in text.lower()),
        )  # fmt: skip


# ----- OpenAI Responses -----------------------------------------------------------------------------------------------
# Input items and chat messages tell the same conversation, cut differently: one assistant turn is several items here.
# `ResponsesReader` and `ResponsesWriter` turn one into the other, `ResponsesDecoder` and `ResponsesRenderer` do it for
# streams. Upstream nothing is stored (`store: false`), so reasoning travels encrypted inside its items; these are kept
# whole in `thinking_blocks`, with `calls_before` and `text_before` where they stood later in their turn, and go back to
# that place. The other way round, opaque state of other providers (signatures) travels through Responses clients as the
# `encrypted_content` of a reasoning item, marked by STATE_MARK: bytes with that mark must not be passed through.
# The state behind `previous_response_id` is a list of items: see `stored_items` and `resume`.
# Source: https://platform.openai.com/docs/api-reference/responses and recorded traffic.

STATE_MARK: Final = "stockyard.1."
#: Where the gateway puts the items an `item_reference` may name: {id: item}. Read by `parse`, never sent.
ITEMS_KEY: Final = "stockyard_items"

SAME_IN_CHAT: Final = frozenset({
    "metadata", "moderation", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier", "service_tier", "temperature", "top_p", "user",
})  # fmt: skip
#: Read by `parse` itself, or (store, include_obfuscation) without meaning for whoever answers in the provider's place.
READ_IN_RESPONSES: Final = SAME_IN_CHAT | {
    "model", "input", "instructions", "max_output_tokens", "reasoning", "text", "tools", "tool_choice", "top_logprobs",
    "include", "store", "stream", "stream_options", ITEMS_KEY,
}  # fmt: skip
READ_IN_CHAT: Final = SAME_IN_CHAT | SAMPLING_DEFAULTS.keys() | {
    "model", "messages", "max_tokens", "max_completion_tokens", "reasoning_effort", "response_format", "verbosity",
    "tools", "tool_choice", "stream", "stream_options", "stop", "extra_body",
}  # fmt: skip
#: Chat members without a counterpart whose given value asks for nothing, and so is not a loss.
CHAT_DEFAULTS: Final[Mapping[str, Any]] = {
    **SAMPLING_DEFAULTS, "n": 1, "store": False, "modalities": ["text"], "stop": [], "functions": [],
}  # fmt: skip
#: Members whose default says nothing, so that they need not travel.
RESPONSES_DEFAULTS: Final[Mapping[str, Any]] = {"background": False, "truncation": "disabled"}

#: What the model's host did on its own side; another host does without it. All other items carry the conversation.
HOST_ITEMS: Final = frozenset({
    "reasoning", "web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call",
    "mcp_list_tools",
})  # fmt: skip
ITEM_PREFIXES: Final = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_", "custom_tool_call": "ctc_"}
#: Failures told inside a 200, by code or type.
FAILURE_STATUSES: Final = {
    "rate_limit_exceeded": 429, "rate_limit_error": 429, "too_many_requests": 429, "insufficient_quota": 429,
    "slow_down": 429, "request_rate_limit_exceeded": 429, "server_error": 500, "server_is_overloaded": 503,
    "service_unavailable_error": 503, "overloaded": 503, "invalid_prompt": 400, "invalid_request_error": 400,
    "invalid_request": 400, "context_length_exceeded": 400, "bio_policy": 400, "image_content_policy_violation": 400,
    "misalignment_policy_violation": 400, "invalid_image": 400, "invalid_image_url": 400, "image_too_large": 400,
    "invalid_api_key": 401, "authentication_error": 401,
}  # fmt: skip

JSON_KINDS: Final = {dict: "an object", list: "an array", str: "a string", bool: "true or false", int: "a whole number"}


def expect_json(value: Any, kind: type, where: str) -> Any:
    """Give back `value` if it is of `kind`; InvalidRequest names the place otherwise."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidRequest(f"`{where}` must be {JSON_KINDS[kind]}", param=where)
    return value


def optional_json(value: Any, kind: type, where: str) -> Any:
    """The same where null or nothing stands for an empty one."""
    return kind() if value is None else expect_json(value, kind, where)


def expect_objects(value: Any, where: str) -> list[tuple[str, Json]]:
    """An array of objects with the place of each; null stands for an empty one."""
    members = enumerate(optional_json(value, list, where))
    return [(f"{where}[{at}]", expect_json(member, dict, f"{where}[{at}]")) for at, member in members]


def pack_state(blocks: list[Json]) -> str:
    """Opaque blocks as the text of an `encrypted_content`; `unpack_state` is the inverse, byte for byte."""
    return STATE_MARK + base64.urlsafe_b64encode(dump_json(blocks)).decode()


def unpack_state(text: str, where: str) -> list[Json]:
    try:
        blocks = orjson.loads(base64.urlsafe_b64decode(text.removeprefix(STATE_MARK)))
    except (binascii.Error, ValueError):
        blocks = None
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise InvalidRequest(f"`{where}` was changed since Stockyard wrote it: give it back as it came", param=where)
    return blocks


def reasoning_text(item: Json) -> str:
    """The readable text of a reasoning item: the raw chain where a host shows it, else the summary."""
    for name, joint in (("content", ""), ("summary", "\n\n")):
        parts = item.get(name)
        texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        if text := joint.join(text for text in texts if isinstance(text, str)):
            return text
    return ""


# Tools: flat here, nested in chat; grammars of custom tools likewise. Custom tools as functions serve targets that know
# functions only: one text argument `input`, taken out again on the way back.

CUSTOM_AS_FUNCTION: Final = {
    "type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"], "additionalProperties": False,
}  # fmt: skip


def read_tool(tool: Json, where: str) -> tuple[Json, Json]:
    """A Responses tool as a chat tool, and its members that chat has no place for."""
    kind = expect_json(tool.get("type"), str, f"{where}.type")
    if kind == "function":
        expect_json(tool.get("name"), str, f"{where}.name")
        names = ("name", "description", "parameters", "strict")
        function = {name: tool[name] for name in names if tool.get(name) is not None}
        rest = {name: value for name, value in tool.items() if name not in (*names, "type") and value is not None}
        return {"type": "function", "function": function}, rest
    if kind == "custom":
        custom = {name: value for name, value in tool.items() if name != "type" and value is not None}
        expect_json(custom.get("name"), str, f"{where}.name")
        grammar = custom.get("format")
        if isinstance(grammar, dict) and grammar.get("type") == "grammar":
            inner = {name: value for name, value in grammar.items() if name != "type"}
            custom["format"] = {"type": "grammar", "grammar": inner}
        return {"type": "custom", "custom": custom}, {}
    return {"type": "native", "dialect": "responses", "tool": tool}, {}


def write_custom_tool(custom: Json) -> Json:
    form = custom.get("format")
    if isinstance(form, dict) and isinstance(form.get("grammar"), dict):
        return {**custom, "type": "custom", "format": {"type": "grammar", **form["grammar"]}}
    return {**custom, "type": "custom"}


def read_tool_choice(choice: Any, where: str = "tool_choice") -> Any:
    """A Responses tool choice as chat's; None for the choice of a provider's own tool."""
    if isinstance(choice, str):
        return choice
    kind = expect_json(choice, dict, where).get("type")
    if kind in ("function", "custom"):
        return {"type": kind, kind: {"name": expect_json(choice.get("name"), str, f"{where}.name")}}
    if kind == "allowed_tools":
        tools = [read_tool_choice(tool, place) or tool for place, tool in expect_objects(choice.get("tools"), where)]
        return {"type": kind, kind: {"mode": choice.get("mode", "auto"), "tools": tools}}
    return None


def write_tool_choice(choice: Any, where: str = "tool_choice") -> Any:
    if isinstance(choice, str):
        return choice
    kind = expect_json(choice, dict, where).get("type")
    if kind in ("function", "custom"):
        return {"type": kind, "name": expect_json(choice.get(kind), dict, f"{where}.{kind}").get("name")}
    if kind == "allowed_tools":
        allowed = expect_json(choice.get(kind), dict, f"{where}.{kind}")
        tools = [write_tool_choice(tool, place) for place, tool in expect_objects(allowed.get("tools"), where)]
        return {"type": kind, "mode": allowed.get("mode", "auto"), "tools": tools}
    return choice


def customs_as_functions(request: Json) -> tuple[Json, frozenset[str]]:
    """A canonical request whose custom tools became functions, and their names; the same request if it has none."""
    tools = [tool for _, tool in expect_objects(request.get("tools"), "tools")]
    customs = [expect_json(tool.get("custom"), dict, "tools.custom") for tool in tools if tool.get("type") == "custom"]
    if not customs:
        return request, frozenset()
    messages = [
        {**message, "tool_calls": [_custom_as_call(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list) else message
        for _, message in expect_objects(request.get("messages"), "messages")
    ]  # fmt: skip
    changed = {**request, "messages": messages, "tools": [_custom_as_tool(tool) for tool in tools]}
    if isinstance(request.get("tool_choice"), dict):
        changed["tool_choice"] = _custom_as_choice(request["tool_choice"])
    return changed, frozenset(str(custom.get("name")) for custom in customs)


def _custom_as_tool(tool: Json) -> Json:
    if tool.get("type") != "custom":
        return tool
    custom = tool["custom"]
    form = custom.get("format") or {}
    grammar = form.get("grammar") if isinstance(form, dict) else None
    text = str(custom.get("description") or "")
    if isinstance(grammar, dict):
        text += f"\n\n`input` must follow this {grammar.get('syntax')} grammar:\n{grammar.get('definition')}"
    function = {"name": custom.get("name"), "description": text.strip(), "parameters": CUSTOM_AS_FUNCTION}
    return {"type": "function", "function": function}


def _custom_as_call(call: Any) -> Any:
    if not isinstance(call, dict) or call.get("type") != "custom":
        return call
    custom = expect_json(call.get("custom"), dict, "tool_calls.custom")
    arguments = dump_json({"input": custom.get("input") or ""}).decode()
    kept = {name: value for name, value in call.items() if name != "custom"}
    return {**kept, "type": "function", "function": {"name": custom.get("name"), "arguments": arguments}}


def _custom_as_choice(choice: Json) -> Json:
    if choice.get("type") == "custom":
        return {"type": "function", "function": choice.get("custom")}
    allowed = choice.get("allowed_tools")
    if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list):
        return choice
    tools = [_custom_as_choice(tool) if isinstance(tool, dict) else tool for tool in allowed["tools"]]
    return {**choice, "allowed_tools": {**allowed, "tools": tools}}


def custom_input(arguments: str) -> str:
    """The text a custom tool gets from the arguments of the function it was sent as."""
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    text = value.get("input") if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments


class ResponsesReader:
    """Reads input items into canonical messages.

    Reasoning, calls and texts of one assistant turn become one message. A tool result that holds more than text is told
    as its text, with the rest in a user message after the results. What chat has no place for is left in `extra`.
    """

    def __init__(self, items: Json) -> None:
        self.messages: list[Json] = []
        self.extra: Json = {}
        self._items = items
        self._turn: Json | None = None
        self._attached: list[Json] = []

    def read(self, place: str, item: Json) -> None:
        kind: str = expect_json(item.get("type") or ("message" if "role" in item else None), str, f"{place}.type")
        if kind not in ("function_call_output", "custom_tool_call_output"):
            self._attach()
        self.READERS.get(kind, ResponsesReader._native)(self, place, item)

    def close(self) -> list[Json]:
        self._attach()
        self._end_turn()
        return self.messages

    def _open_turn(self) -> Json:
        if self._turn is None:
            self._turn = {"role": "assistant", "content": None}
            self.messages.append(self._turn)
        return self._turn

    def _end_turn(self) -> None:
        """Drop a turn of nothing but reasoning: an aborted one, which no provider takes back."""
        turn, self._turn = self._turn, None
        if turn is None or turn["content"] is not None or turn.get("tool_calls") or turn.get("refusal"):
            return
        if all(block.get("item", block).get("type") in HOST_ITEMS for block in turn.get("thinking_blocks") or ()):
            self.messages.remove(turn)
        else:
            turn["content"] = ""

    def _attach(self) -> None:
        if self._attached:
            self.messages.append({"role": "user", "content": self._attached})
            self._attached = []

    def _reference(self, place: str, item: Json) -> None:
        name = expect_json(item.get("id"), str, f"{place}.id")
        if not isinstance(self._items.get(name), dict):
            raise InvalidRequest(f"Item with id '{name}' not found.", status=404, code="item_not_found", param=place)
        if self._items[name].get("type") == "item_reference":
            raise InvalidRequest(f"`{place}` refers to another reference", param=place)
        self.read(place, self._items[name])

    def _message(self, place: str, item: Json) -> None:
        role = expect_json(item.get("role"), str, f"{place}.role")
        if role not in ("user", "assistant", "system", "developer"):
            raise InvalidRequest(f"`{place}.role` must be user, assistant, system or developer", param=f"{place}.role")
        parts = self._parts(item.get("content"), f"{place}.content")
        if role == "assistant":
            self._said(parts, item)
            return
        self._end_turn()
        plain = len(parts) == 1 and parts[0].keys() == {"type", "text"}
        content: Any = parts[0]["text"] if plain else parts or ""
        self.messages.append({"role": role, "content": content})

    def _said(self, parts: list[Json], item: Json) -> None:
        turn = self._open_turn()
        if refusal := "".join(part["refusal"] for part in parts if part["type"] == "refusal"):
            turn["refusal"] = turn.get("refusal", "") + refusal
        parts = [part for part in parts if part["type"] != "refusal"]
        if all(part.keys() == {"type", "text"} for part in parts) and not isinstance(turn["content"], list):
            text = "".join(part["text"] for part in parts)
            turn["content"] = f"{turn['content']}\n\n{text}" if turn["content"] and text else turn["content"] or text
        else:
            before = turn["content"] if isinstance(turn["content"], list) else []
            before = before or ([{"type": "text", "text": turn["content"]}] if turn["content"] else [])
            turn["content"] = before + parts
        if item.get("phase") is not None:
            self.extra.setdefault("input.phase", {})[str(len(self.messages) - 1)] = item["phase"]

    def _parts(self, content: Any, place: str) -> list[Json]:
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise InvalidRequest(f"`{place}` must be a string or an array of parts", param=place)
        return [self._part(where, part) for where, part in expect_objects(content, place)]

    def _part(self, place: str, part: Json) -> Json:
        kind = part.get("type")
        if kind in ("input_text", "output_text", "text"):
            read: Json = {"type": "text", "text": expect_json(part.get("text"), str, f"{place}.text")}
        elif kind == "refusal":
            read = {"type": "refusal", "refusal": expect_json(part.get("refusal"), str, f"{place}.refusal")}
        elif kind == "input_image":
            read = self._image(place, part)
        elif kind == "input_file":
            names = ("file_data", "file_url", "file_id", "filename", "detail")
            read = {"type": "file", "file": {name: part[name] for name in names if part.get(name) is not None}}
        elif kind == "input_audio":
            read = {"type": "input_audio", "input_audio": expect_json(part.get("input_audio"), dict, place)}
        else:
            raise InvalidRequest(f"`{place}.type` is {kind!r}, which is no content part", param=f"{place}.type")
        if part.get("prompt_cache_breakpoint") is not None:
            read["prompt_cache_breakpoint"] = part["prompt_cache_breakpoint"]
        return read

    def _image(self, place: str, part: Json) -> Json:
        detail = {"detail": part["detail"]} if part.get("detail") is not None else {}
        if part.get("file_id") is not None and part.get("image_url") is None:
            return {"type": "file", "file": {"file_id": part["file_id"], "image": True, **detail}}
        url = expect_json(part.get("image_url"), str, f"{place}.image_url")
        return {"type": "image_url", "image_url": {"url": url, **detail}}

    def _call(self, place: str, item: Json) -> None:
        name = expect_json(item.get("name"), str, f"{place}.name")
        call: Json = {"id": expect_json(item.get("call_id"), str, f"{place}.call_id")}
        if item["type"] == "custom_tool_call":
            text = expect_json(item.get("input"), str, f"{place}.input")
            call.update(type="custom", custom={"name": name, "input": text})
        else:
            text = expect_json(item.get("arguments"), str, f"{place}.arguments")
            call.update(type="function", function={"name": name, "arguments": text})
        if item.get("namespace") is not None:
            self.extra.setdefault("input.namespace", {})[call["id"]] = item["namespace"]
        turn = self._open_turn()
        turn.setdefault("tool_calls", []).append(self._restore(turn, call))

    def _restore(self, turn: Json, call: Json) -> Json:
        """Give a call the signature that travelled ahead of it."""
        for block in turn.get("thinking_blocks") or ():
            if block.get("type") == "extra_content" and block.get("call_id") == call["id"]:
                call["extra_content"] = block.get("extra_content")
                turn["thinking_blocks"].remove(block)
                break
        return call

    def _result(self, place: str, item: Json) -> None:
        call_id = expect_json(item.get("call_id"), str, f"{place}.call_id")
        parts = self._parts(item.get("output"), f"{place}.output")
        self._end_turn()
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        others = [part for part in parts if part["type"] != "text"]
        if others:
            self._attached += [{"type": "text", "text": f"Attached to the result of {call_id}:"}, *others]
        content = text or ("The result is attached to the next message." if others else "")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})

    def _reasoning(self, place: str, item: Json) -> None:
        secret, turn = item.get("encrypted_content"), self._open_turn()
        if isinstance(secret, str) and secret.startswith(STATE_MARK):
            for block in unpack_state(secret, f"{place}.encrypted_content"):
                self._give_back(turn, block)
        elif secret or item.get("content"):
            self._place(turn, {"type": "reasoning_item", "item": item})
        if text := reasoning_text(item):
            before = turn.get("reasoning_content")
            turn["reasoning_content"] = f"{before}\n\n{text}" if before else text

    def _give_back(self, turn: Json, block: Json) -> None:
        """Put a block of ours back: a signature to what it signs (a call still to come takes it itself)."""
        signed = [turn] if block.get("call_id") is None else turn.get("tool_calls") or ()
        for holder in signed if block.get("type") == "extra_content" else ():
            if holder.get("id") == block.get("call_id"):
                holder["extra_content"] = block.get("extra_content")
                return
        turn.setdefault("thinking_blocks", []).append(block)

    def _native(self, place: str, item: Json) -> None:
        self._place(self._open_turn(), {"type": "reasoning_item", "item": item})

    def _place(self, turn: Json, block: Json) -> None:
        calls, text = len(turn.get("tool_calls") or ()), turn["content"] is not None
        placed = {**block, **({"calls_before": calls} if calls else {}), **({"text_before": True} if text else {})}
        turn.setdefault("thinking_blocks", []).append(placed)

    READERS: ClassVar[Mapping[str, Callable[[ResponsesReader, str, Json], None]]] = {
        "message": _message, "function_call": _call, "custom_tool_call": _call, "reasoning": _reasoning,
        "function_call_output": _result, "custom_tool_call_output": _result, "item_reference": _reference,
    }  # fmt: skip


class ResponsesWriter:
    """Writes canonical messages as input items; `extra` is what `ResponsesReader` left."""

    def __init__(self, dialect: OpenAiResponses, translation: Translation, extra: Json) -> None:
        self.items: list[Json] = []
        self._dialect, self._translation = dialect, translation
        told = {} if dialect.closed else extra
        self._phases = optional_json(told.get("input.phase"), dict, "input.phase")
        self._namespaces = optional_json(told.get("input.namespace"), dict, "input.namespace")
        self._customs: set[str] = set()

    def write(self, at: int, message: Json) -> None:
        place, role = f"messages[{at}]", message.get("role")
        for name in ("name", "audio", "images", "function_call", "is_error"):
            if message.get(name):
                self._translation.drop(f"messages.{name}")
        if message.get("cache_control"):
            self._translation.drop("cache_control")
        if role in ("user", "system", "developer"):
            self.items.append({"role": role, "content": self._content(message.get("content"), place)})
        elif role == "assistant":
            self._turn(message, place, self._phases.get(str(at)))
        elif role == "tool":
            self._result(message, place)
        else:
            raise InvalidRequest(f"`{place}.role` {role!r} has no place in this dialect", param=f"{place}.role")

    def _content(self, content: Any, place: str, text_type: str = "input_text") -> Any:
        if content is None or isinstance(content, str):
            return content or ""
        parts = [self._part(part, where, text_type) for where, part in expect_objects(content, f"{place}.content")]
        return [part for part in parts if part is not None]

    def _part(self, part: Json, place: str, text_type: str) -> Json | None:
        kind = part.get("type")
        if part.get("cache_control"):
            self._translation.drop("cache_control")
        mark = {name: part[name] for name in ("prompt_cache_breakpoint",) if part.get(name) is not None}
        if kind == "text":
            return {"type": text_type, "text": expect_json(part.get("text"), str, f"{place}.text"), **mark}
        if kind == "refusal":
            return {"type": "refusal", "refusal": part.get("refusal")}
        if kind == "image_url":
            image = expect_json(part.get("image_url"), dict, f"{place}.image_url")
            detail = {"detail": image["detail"]} if image.get("detail") else {}
            return {"type": "input_image", "image_url": image.get("url"), **detail, **mark}
        if kind == "input_audio":
            return {"type": "input_audio", "input_audio": part.get("input_audio"), **mark}
        if kind == "file":
            file = expect_json(part.get("file"), dict, f"{place}.file")
            rest = {name: value for name, value in file.items() if name != "image"}
            return {"type": "input_image" if file.get("image") else "input_file", **rest, **mark}
        self._translation.drop(f"content.{kind}")
        return None

    def _turn(self, message: Json, place: str, phase: Any) -> None:
        """One assistant turn: reasoning where it stood, the text, then the calls with theirs in front."""
        blocks = self._blocks(message, place)
        calls = [call for _, call in expect_objects(message.get("tool_calls"), f"{place}.tool_calls")]
        self.items += [item for before, text, item in blocks if not before and not text]
        content = self._content(message.get("content"), place, "output_text")
        if message.get("refusal"):
            content = [{"type": "output_text", "text": content}] if content and isinstance(content, str) else content
            content = [*(content or ()), {"type": "refusal", "refusal": message["refusal"]}]
        if content:
            said = {"role": "assistant", "content": content}
            self.items.append({**said, "phase": phase} if phase is not None else said)
        for at, call in enumerate(calls):
            self.items += [item for before, text, item in blocks if before == at and (before or text)]
            self._call(call, f"{place}.tool_calls[{at}]")
        last = len(calls)
        self.items += [item for before, text, item in blocks if before >= last and (before or text)]

    def _blocks(self, message: Json, place: str) -> list[tuple[int, bool, Json]]:
        """The items among the opaque blocks, with where they stood. Those of another provider stay behind."""
        found = []
        for where, block in expect_objects(message.get("thinking_blocks"), f"{place}.thinking_blocks"):
            item, origin = block.get("item"), block.get("provider")
            mine = origin is None or origin == self._translation.provider.id
            if block.get("type") != "reasoning_item" or not mine or not self._dialect.takes_items:
                self._translation.drop("thinking_blocks")
                continue
            before = block.get("calls_before")
            at = before if isinstance(before, int) else 0
            found.append((at, bool(block.get("text_before")), expect_json(item, dict, f"{where}.item")))
        if message.get("reasoning_content") and not any(item.get("type") == "reasoning" for _, _, item in found):
            self._translation.drop("reasoning_content")
        if message.get("extra_content"):
            self._translation.drop("extra_content")
        return found

    def _call(self, call: Json, place: str) -> None:
        kind = "custom" if call.get("type") == "custom" else "function"
        inner = expect_json(call.get(kind), dict, f"{place}.{kind}")
        call_id = fit_call_id(expect_json(call.get("id"), str, f"{place}.id"))
        if call.get("extra_content"):
            self._translation.drop("extra_content")
        space = self._namespaces.get(call["id"])
        named = {"call_id": call_id, "name": inner.get("name"), **({"namespace": space} if space is not None else {})}
        if kind == "custom":
            self._customs.add(call_id)
            self.items.append({"type": "custom_tool_call", **named, "input": inner.get("input") or ""})
        else:
            self.items.append({"type": "function_call", **named, "arguments": inner.get("arguments") or "{}"})

    def _result(self, message: Json, place: str) -> None:
        call_id = fit_call_id(expect_json(message.get("tool_call_id"), str, f"{place}.tool_call_id"))
        kind = "custom_tool_call_output" if call_id in self._customs else "function_call_output"
        output = self._content(message.get("content"), place)
        if isinstance(output, list) and all(part.keys() == {"type", "text"} for part in output):
            output = "\n".join(part["text"] for part in output)
        self.items.append({"type": kind, "call_id": call_id, "output": output})


def fit_call_id(call_id: str) -> str:
    """Call ids end at 64 characters here; a longer one becomes its digest, the same in call and result."""
    return call_id if len(call_id) <= 64 else f"call_{hashlib.sha256(call_id.encode()).hexdigest()[:40]}"


def responses_usage(usage: Json | None) -> Json | None:
    """Canonical usage in the words of this dialect, with the details its SDKs insist on."""
    if not usage:
        return None
    read = read_openai_usage(usage)
    written = read.cache_write_5m_tokens + read.cache_write_1h_tokens
    cached = read.cached_tokens + read.cached_audio_tokens
    return {
        "input_tokens": read.prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        "output_tokens": read.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": read.reasoning_tokens},
        "total_tokens": read.prompt_tokens + read.completion_tokens,
    }


def read_annotation(annotation: Json) -> Json:
    if annotation.get("type") != "url_citation":
        return annotation
    return {"type": "url_citation", "url_citation": {name: annotation[name] for name in annotation if name != "type"}}


def write_annotation(annotation: Json) -> Json:
    inner = annotation.get("url_citation")
    if not isinstance(inner, dict):
        return annotation
    return {"type": "url_citation", "start_index": 0, "end_index": 0, "title": "", "url": "", **inner}


def cited_results(item: Json) -> list[Json]:
    """Perplexity names its sources in an item of their own; they are citations of the whole text."""
    results = [result for result in item.get("results") or () if isinstance(result, dict) and result.get("url")]
    sources = [{"url": result["url"], "title": result.get("title") or ""} for result in results]
    return [{"type": "url_citation", "url_citation": {"start_index": 0, "end_index": 0, **one}} for one in sources]


def image_of(item: Json) -> Json:
    kind = item.get("output_format") or "png"
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{item['result']}"}}


@dataclass(slots=True)
class ItemProgress:
    """One output item: where its turn stood when it began, and how many characters of which part were told on.

    With these a final text only adds what its deltas left out.
    """

    calls_before: int
    text_before: bool
    call: int | None = None
    custom: bool = False
    held: bool = False
    sent: dict[Any, int] = field(default_factory=dict)
    thoughts: str = ""
    done: bool = False

    def rest(self, key: Any, full: Any) -> str:
        if not isinstance(full, str):
            return ""
        start = self.sent.get(key, 0)
        self.sent[key] = max(start, len(full))
        return full[start:]


@contextlib.contextmanager
def malformed_is_theirs() -> Iterator[None]:
    """Members of another type than documented are the provider's failure, not ours."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as cause:
        raise UpstreamError("the provider sent an event of an unknown shape", code="upstream_malformed") from cause


class ResponsesDecoder:
    """Reads a Responses stream into canonical chunks.

    Deltas are told on as they come. What only an item's end, or the whole response at the very end, says is added then,
    so that missing events cost nothing but time. A plain answer is read by the same code, as a stream of its end alone.
    """

    def __init__(self, dialect: OpenAiResponses, translation: Translation) -> None:
        self._dialect, self._translation = dialect, translation
        self._events = SseReader()
        self._items: dict[Any, ItemProgress] = {}
        self._head: Json = {}
        self._out: list[Json] = []
        self._calls = 0
        self._texts = False
        self.complete = False

    def feed(self, data: bytes) -> list[Json]:
        return self._read_all(self._events.feed(data))

    def close(self) -> list[Json]:
        return self._read_all(self._events.close())

    def _read_all(self, events: Iterable[tuple[str, bytes]]) -> list[Json]:
        self._out = []
        for name, payload in events:
            if not self.complete and payload.strip() != b"[DONE]":
                event = read_event_json(payload)
                self.read(str(event.get("type") or name), event)
        return self._out

    def read(self, kind: str, event: Json) -> None:
        if kind == "error" or (event.get("error") and "response" not in event):
            raise self._dialect.failure(event.get("error") or event)
        reader = self.READERS.get(kind)
        if reader is not None:
            with malformed_is_theirs():
                reader(self, event)

    def finish(self, response: Json) -> list[Json]:
        """Read the final response: what was not told yet, why it ended, and what it took."""
        self._dialect.refuse_failed(response)
        self._open(response)
        output = response.get("output")
        for at, item in enumerate(output if isinstance(output, list) else ()):
            if isinstance(item, dict):
                self._end_item(self._item_at(at), item)
        self._emit({}, self._reason(response))
        usage = self._dialect.read_usage(response)
        if usage is not None:
            self._out.append({**self._head, "choices": [], "usage": self._dialect.canonical_usage(usage)})
        self.complete = True
        return self._out

    def _reason(self, response: Json) -> str:
        why = (response.get("incomplete_details") or {}).get("reason")
        if response.get("status") == "incomplete":
            return "content_filter" if why == "content_filter" else "length"
        return "tool_calls" if self._calls else "stop"

    def _open(self, response: Json) -> None:
        if self._head:
            return
        made = response.get("created_at")
        self._head = {
            "id": response.get("id") or self._translation.new_id("chatcmpl-"),
            "object": "chat.completion.chunk",
            "created": int(made) if isinstance(made, int | float) else self._translation.now_s,
            "model": response.get("model") or self._translation.model,
        }
        self._emit({"role": "assistant", "content": ""})

    def _emit(self, delta: Json, reason: str | None = None, logprobs: Any = None) -> None:
        if not self._head:
            self._open({})
        choice: Json = {"index": 0, "delta": delta, "finish_reason": reason}
        if logprobs:
            choice["logprobs"] = {"content": logprobs, "refusal": None}
        self._out.append({**self._head, "choices": [choice]})

    def _progress(self, event: Json) -> ItemProgress:
        at = event.get("output_index")
        key = at if isinstance(at, int) else event.get("item_id") or (event.get("item") or {}).get("id")
        return self._item_at(key)

    def _item_at(self, key: Any) -> ItemProgress:
        if key not in self._items:
            self._items[key] = ItemProgress(calls_before=self._calls, text_before=self._texts)
        return self._items[key]

    def _created(self, event: Json) -> None:
        self._open(event.get("response") or {})

    def _added(self, event: Json) -> None:
        item, progress = event.get("item") or {}, self._progress(event)
        if item.get("type") in ("function_call", "custom_tool_call"):
            self._start_call(progress, item)

    def _start_call(self, progress: ItemProgress, item: Json) -> None:
        if progress.call is not None or not item.get("name"):
            return
        progress.call, self._calls = self._calls, self._calls + 1
        wrapped = item["name"] in (self._translation.names.get("custom_tools") or ())
        progress.custom = wrapped or item["type"] == "custom_tool_call"
        progress.held = wrapped
        kind, text = ("custom", "input") if progress.custom else ("function", "arguments")
        call_id = item.get("call_id") or item.get("id") or self._translation.new_id("call_")
        inner = {"name": item["name"], text: ""}
        self._emit({"tool_calls": [{"index": progress.call, "id": call_id, "type": kind, kind: inner}]})

    def _argue(self, progress: ItemProgress, text: str) -> None:
        if text:
            kind, name = ("custom", "input") if progress.custom else ("function", "arguments")
            self._emit({"tool_calls": [{"index": progress.call, kind: {name: text}}]})

    def _call_delta(self, event: Json) -> None:
        progress, text = self._progress(event), event.get("delta")
        if progress.call is not None and not progress.held and isinstance(text, str):
            progress.sent["call"] = progress.sent.get("call", 0) + len(text)
            self._argue(progress, text)

    def _text_delta(self, event: Json) -> None:
        self._delta(event, ("text", event.get("content_index")), "content")

    def _refusal_delta(self, event: Json) -> None:
        self._delta(event, ("refusal", event.get("content_index")), "refusal")

    def _thought_delta(self, event: Json) -> None:
        self._think(event, "content", event.get("content_index"))

    def _summary_delta(self, event: Json) -> None:
        self._think(event, "summary", event.get("summary_index"))

    def _think(self, event: Json, kind: str, at: Any) -> None:
        """A host may tell both its chain and a summary of it: the first kind to come is the one told on."""
        progress = self._progress(event)
        progress.thoughts = progress.thoughts or kind
        if progress.thoughts == kind:
            if kind == "summary" and at and not progress.sent.get((kind, at)):
                self._emit({"reasoning_content": "\n\n"})
            self._delta(event, (kind, at), "reasoning_content")

    def _delta(self, event: Json, key: Any, name: str) -> None:
        text = event.get("delta")
        if isinstance(text, str) and text:
            progress = self._progress(event)
            progress.sent[key] = progress.sent.get(key, 0) + len(text)
            self._texts = self._texts or name != "reasoning_content"
            self._emit({name: text}, logprobs=event.get("logprobs"))

    def _annotated(self, event: Json) -> None:
        if isinstance(event.get("annotation"), dict):
            key = ("annotations", event.get("content_index"))
            progress = self._progress(event)
            progress.sent[key] = progress.sent.get(key, 0) + 1
            self._emit({"annotations": [read_annotation(event["annotation"])]})

    def _done(self, event: Json) -> None:
        if isinstance(event.get("item"), dict):
            self._end_item(self._progress(event), event["item"])

    def _end_item(self, progress: ItemProgress, item: Json) -> None:
        if progress.done:
            return
        progress.done = True
        self.ENDERS.get(str(item.get("type")), ResponsesDecoder._end_native)(self, progress, item)

    def _end_message(self, progress: ItemProgress, item: Json) -> None:
        for at, part in enumerate(item.get("content") or ()):
            if not isinstance(part, dict):
                continue
            for kind, name in (("text", "content"), ("refusal", "refusal")):
                if text := progress.rest((kind, at), part.get(kind)):
                    self._texts = True
                    self._emit({name: text}, logprobs=part.get("logprobs"))
            notes = [note for note in part.get("annotations") or () if isinstance(note, dict)]
            fresh = notes[progress.sent.get(("annotations", at), 0) :]
            if fresh:
                self._emit({"annotations": [read_annotation(note) for note in fresh]})

    def _end_call(self, progress: ItemProgress, item: Json) -> None:
        self._start_call(progress, item)
        if progress.held:
            self._argue(progress, custom_input(item.get("arguments") or ""))
        elif progress.call is not None:
            full = item.get("input") if item["type"] == "custom_tool_call" else item.get("arguments")
            self._argue(progress, progress.rest("call", full))

    def _end_reasoning(self, progress: ItemProgress, item: Json) -> None:
        if not progress.thoughts and (text := reasoning_text(item)):
            self._emit({"reasoning_content": text})
        self._end_native(progress, item)

    def _end_native(self, progress: ItemProgress, item: Json) -> None:
        if not self._dialect.takes_items:
            return
        block: Json = {"type": "reasoning_item", "item": item, "provider": self._translation.provider.id}
        if progress.calls_before:
            block["calls_before"] = progress.calls_before
        if progress.text_before:
            block["text_before"] = True
        self._emit({"thinking_blocks": [block]})

    def _end_image(self, progress: ItemProgress, item: Json) -> None:
        if isinstance(item.get("result"), str):
            self._emit({"images": [image_of(item)]})

    def _end_results(self, progress: ItemProgress, item: Json) -> None:
        if sources := cited_results(item):
            self._emit({"annotations": sources})

    def _completed(self, event: Json) -> None:
        self.finish(event.get("response") or {})

    def _failed(self, event: Json) -> None:
        response = event.get("response") or {}
        raise self._dialect.failure(response.get("error") or {"message": f"the answer ended as `{event.get('type')}`"})

    READERS: ClassVar[Mapping[str, Callable[[ResponsesDecoder, Json], None]]] = {
        "response.created": _created, "response.in_progress": _created, "response.output_item.added": _added,
        "response.output_text.delta": _text_delta, "response.refusal.delta": _refusal_delta,
        "response.reasoning_text.delta": _thought_delta, "response.reasoning_summary_text.delta": _summary_delta,
        "response.output_text.annotation.added": _annotated, "response.output_item.done": _done,
        "response.function_call_arguments.delta": _call_delta, "response.custom_tool_call_input.delta": _call_delta,
        "response.completed": _completed, "response.incomplete": _completed,
        "response.failed": _failed, "response.cancelled": _failed,
    }  # fmt: skip
    ENDERS: ClassVar[Mapping[str, Callable[[ResponsesDecoder, ItemProgress, Json], None]]] = {
        "message": _end_message, "function_call": _end_call, "custom_tool_call": _end_call,
        "reasoning": _end_reasoning, "image_generation_call": _end_image, "search_results": _end_results,
    }  # fmt: skip


def join_chunks(chunks: Sequence[Json]) -> Json:
    """Whole canonical chunks as one completion."""
    message: Json = {"role": "assistant", "content": None}
    calls: dict[int, Json] = {}
    completion: Json = {**chunks[0], "object": "chat.completion", "choices": []}
    choice: Json = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    for chunk in chunks:
        if chunk.get("usage"):
            completion["usage"] = chunk["usage"]
        for part in chunk["choices"]:
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
            if tokens := (part.get("logprobs") or {}).get("content"):
                before = choice["logprobs"]["content"] if choice["logprobs"] else []
                choice["logprobs"] = {"content": before + tokens, "refusal": None}
            _join_delta(message, calls, part.get("delta") or {})
    if calls:
        message["tool_calls"] = list(calls.values())
    completion["choices"] = [choice]
    return completion


def _join_delta(message: Json, calls: dict[int, Json], delta: Json) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            for piece in value or ():
                _join_call(calls, piece)
        elif isinstance(value, list):
            message.setdefault(name, []).extend(value)
        elif name != "role" and value:
            message[name] = (message.get(name) or "") + value


def _join_call(calls: dict[int, Json], piece: Json) -> None:
    kind, text = ("custom", "input") if "custom" in piece else ("function", "arguments")
    blank = {"id": piece.get("id"), "type": kind, kind: {"name": "", text: ""}}
    call = calls.setdefault(piece.get("index") or 0, blank)
    inner = piece.get(kind) or {}
    call[kind]["name"] = call[kind]["name"] or inner.get("name") or ""
    call[kind][text] += inner.get(text) or ""


#: Members of the client's request that its response repeats, with what stands for a missing one.
REPEATED: Final[Mapping[str, Any]] = {
    "background": False, "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {},
    "parallel_tool_calls": True, "previous_response_id": None, "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None}, "safety_identifier": None, "service_tier": "default", "store": True,
    "temperature": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_logprobs": 0,
    "top_p": None, "truncation": "disabled", "user": None,
}  # fmt: skip


def response_shell(request: Json, response_id: str, now_s: int) -> Json:
    """A response that has just begun."""
    repeated = {name: request[name] if request.get(name) is not None else REPEATED[name] for name in REPEATED}
    head = {"id": response_id, "object": "response", "created_at": now_s, "status": "in_progress", "error": None}
    return {**head, "incomplete_details": None, "model": request.get("model"), "output": [], **repeated, "usage": None}


@dataclass(slots=True)
class OpenItem:
    """An output item on its way: the text so far of the part (or call) that is open, and state that ends with it."""

    at: int
    item: Json
    part: Json | None = None
    text: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    blocks: list[Json] = field(default_factory=list)


@dataclass(slots=True)
class OpenCall:
    """A tool call on its way; `open` once its item was announced, `closed` when all of it was told."""

    call_id: str
    name: str = ""
    custom: bool = False
    text: list[str] = field(default_factory=list)
    blocks: list[Json] = field(default_factory=list)
    open: OpenItem | None = None
    closed: bool = False

    @property
    def whole(self) -> bool:
        """Whether the arguments are complete: only then can nothing but another call follow."""
        text = "".join(self.text)
        try:
            return text.rstrip().endswith("}") and isinstance(orjson.loads(text), dict)
        except orjson.JSONDecodeError:
            return False


class ResponsesRenderer:
    """Writes canonical chunks as the events of this dialect, one item after the other.

    Text and reasoning close each other; the first tool call streams, further ones wait until it is whole. `response` is
    the answer so far. The end is written in `close`, when the usage is known; `fail` writes an `error` event, on whose
    `error` member the official SDKs raise, and then `response.failed`, so that no response is left without its end.
    """

    def __init__(self, request: Json, new_id: Callable[[str], str], now_s: int) -> None:
        self.response = response_shell(request, new_id("resp_"), now_s)
        self._new_id = new_id
        self._events: list[bytes] = []
        self._sequence = 0
        self._begun = False
        self._prose: OpenItem | None = None
        self._calls: list[OpenCall] = []
        self._by_index: dict[Any, OpenCall] = {}
        self._state: list[Json] = []
        self._finish = "stop"
        self._usage: Json | None = None
        tools = request.get("tools")
        customs = [tool for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
        self._customs = {tool.get("name") for tool in customs if tool.get("type") == "custom"}

    def feed(self, chunk: Json) -> bytes:
        self._events.clear()
        self._begin(chunk)
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        for choice in chunk.get("choices") or ():
            if not choice.get("index"):
                self._read(choice)
        return b"".join(self._events)

    def close(self) -> bytes:
        self._events.clear()
        self._begin({})
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(self._finish)
        status = "incomplete" if reason else "completed"
        self._end_prose(status)
        for call in self._calls:
            self._open_call(call)
            self._end_call(call, status)
        self._end_state()
        self.response["status"] = status
        self.response["incomplete_details"] = {"reason": reason} if reason else None
        self.response["usage"] = responses_usage(self._usage)
        self._emit(f"response.{status}", response=self.response)
        return b"".join(self._events)

    def fail(self, error: GatewayError, request_id: str) -> bytes:
        self._events.clear()
        self._begin({})
        members = openai_error_body(error, request_id)["error"]
        flat = {"code": error.code, "message": error.message, "param": error.param}
        self._emit("error", **flat, error=members)
        self._cut()
        self.response["status"] = "failed"
        self.response["error"] = {"code": error.code, "message": error.message}
        self.response["usage"] = responses_usage(self._usage)
        self._emit("response.failed", response=self.response)
        return b"".join(self._events)

    def _cut(self) -> None:
        """Leave open items as they are, so that the failed response shows what had come."""
        prose = self._prose
        if prose is not None and prose.part is not None and prose.item["type"] == "message":
            name = "refusal" if prose.part["type"] == "refusal" else "text"
            prose.item["content"].append({**prose.part, name: "".join(prose.text)})
        for item in self.response["output"]:
            if item.get("status") == "in_progress":
                item["status"] = "incomplete"

    def _emit(self, kind: str, **members: Any) -> None:
        self._events.append(sse_event({"type": kind, "sequence_number": self._sequence, **members}, kind))
        self._sequence += 1

    def _begin(self, chunk: Json) -> None:
        if not self._begun:
            self._begun = True
            self.response["model"] = chunk.get("model") or self.response["model"]
            self._emit("response.created", response=self.response)
            self._emit("response.in_progress", response=self.response)

    def _read(self, choice: Json) -> None:
        delta = choice.get("delta") or {}
        if text := delta.get("reasoning_content") or delta.get("reasoning"):
            self._think(text)
        for block in delta.get("thinking_blocks") or ():
            self._keep(block)
        if delta.get("extra_content"):
            self._state.append({"type": "extra_content", "extra_content": delta["extra_content"]})
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        if delta.get("content"):
            self._say("output_text", delta["content"], logprobs)
        if delta.get("refusal"):
            self._say("refusal", delta["refusal"], [])
        for annotation in delta.get("annotations") or ():
            self._annotate(write_annotation(annotation))
        for image in delta.get("images") or ():
            self._show(image)
        for piece in delta.get("tool_calls") or ():
            self._call(piece)
        self._finish = choice.get("finish_reason") or self._finish

    # -- items

    def _open_item(self, item: Json) -> OpenItem:
        """Announce an item. It stands in the response from its first event on, so that a failure shows it."""
        opened = OpenItem(len(self.response["output"]), item)
        self._emit("response.output_item.added", output_index=opened.at, item=item)
        self.response["output"].append(item)
        return opened

    def _end_item(self, opened: OpenItem, status: str | None = None) -> None:
        if status:
            opened.item["status"] = status
        self._emit("response.output_item.done", output_index=opened.at, item=opened.item)

    def _tell(self, opened: OpenItem, kind: str, **members: Any) -> None:
        self._emit(f"response.{kind}", item_id=opened.item["id"], output_index=opened.at, **members)

    def _end_prose(self, status: str = "completed") -> None:
        prose, self._prose = self._prose, None
        if prose is not None and prose.item["type"] == "reasoning":
            self._end_thoughts(prose)
        elif prose is not None:
            self._end_part(prose)
            self._end_item(prose, status)

    def _prose_of(self, kind: str) -> OpenItem:
        if self._prose is None or self._prose.item["type"] != kind:
            self._end_prose()
            item: Json = {"id": self._new_id(ITEM_PREFIXES[kind]), "type": kind}
            if kind == "reasoning":
                item["summary"] = []
            else:
                item.update(status="in_progress", role="assistant", content=[])
            self._prose = self._open_item(item)
        return self._prose

    # -- reasoning

    def _think(self, text: str) -> None:
        prose = self._prose_of("reasoning")
        if prose.part is None:
            prose.part = {"type": "summary_text", "text": ""}
            self._tell(prose, "reasoning_summary_part.added", summary_index=0, part=prose.part)
        prose.text.append(text)
        self._tell(prose, "reasoning_summary_text.delta", summary_index=0, delta=text)

    def _end_thoughts(self, prose: OpenItem) -> None:
        if prose.part is not None:
            text = prose.part["text"] = "".join(prose.text)
            prose.item["summary"] = [prose.part]
            self._tell(prose, "reasoning_summary_text.done", summary_index=0, text=text)
            self._tell(prose, "reasoning_summary_part.done", summary_index=0, part=prose.part)
        if prose.blocks:
            prose.item["encrypted_content"] = pack_state(prose.blocks)
        self._end_item(prose)

    def _keep(self, block: Json) -> None:
        """An opaque block ends the reasoning it belongs to; an item that stands alone is given as it came."""
        item = block.get("item")
        thinking = self._prose is not None and self._prose.item["type"] == "reasoning"
        if block.get("type") == "reasoning_item" and isinstance(item, dict) and not thinking:
            self._end_prose()
            kind = str(item.get("type"))
            return self._end_item(self._open_item({"id": self._new_id(ITEM_PREFIXES.get(kind, "item_")), **item}))
        self._prose_of("reasoning").blocks.append(block)
        return self._end_prose()

    def _end_state(self) -> None:
        if self._state:
            self._prose_of("reasoning").blocks += self._state
            self._state = []
            self._end_prose()

    # -- text

    def _say(self, kind: str, text: str, logprobs: list[Any]) -> None:
        prose = self._part_of(kind)
        prose.text.append(text)
        prose.logprobs += logprobs
        at = len(prose.item["content"])
        if kind == "refusal":
            self._tell(prose, "refusal.delta", content_index=at, delta=text)
        else:
            self._tell(prose, "output_text.delta", content_index=at, delta=text, logprobs=logprobs)

    def _part_of(self, kind: str) -> OpenItem:
        prose = self._prose_of("message")
        if prose.part is not None and prose.part["type"] != kind:
            self._end_part(prose)
        if prose.part is None:
            blank: Json = {"text": "", "annotations": [], "logprobs": []} if kind == "output_text" else {"refusal": ""}
            prose.part = {"type": kind, **blank}
            self._tell(prose, "content_part.added", content_index=len(prose.item["content"]), part=prose.part)
        return prose

    def _end_part(self, prose: OpenItem) -> None:
        part, prose.part = prose.part, None
        if part is None:
            return
        at, text = len(prose.item["content"]), "".join(prose.text)
        if part["type"] == "refusal":
            part["refusal"] = text
            self._tell(prose, "refusal.done", content_index=at, refusal=text)
        else:
            part.update(text=text, logprobs=prose.logprobs)
            self._tell(prose, "output_text.done", content_index=at, text=text, logprobs=prose.logprobs)
        self._tell(prose, "content_part.done", content_index=at, part=part)
        prose.item["content"].append(part)
        prose.text, prose.logprobs = [], []

    def _annotate(self, annotation: Json) -> None:
        prose = self._part_of("output_text")
        notes = prose.part["annotations"] if prose.part else []
        where = {"content_index": len(prose.item["content"]), "annotation_index": len(notes)}
        self._tell(prose, "output_text.annotation.added", **where, annotation=annotation)
        notes.append(annotation)

    def _show(self, image: Json) -> None:
        """A picture in the answer, as the item of the picture tool."""
        url = str((image.get("image_url") or {}).get("url") or "")
        self._end_prose()
        item = {"id": self._new_id("ig_"), "type": "image_generation_call", "status": "in_progress", "result": None}
        opened = self._open_item(item)
        item["result"] = url.partition(";base64,")[2] or url
        self._end_item(opened, "completed")

    # -- calls

    def _call(self, piece: Json) -> None:
        call = self._call_of(piece)
        inner = piece.get("custom") or piece.get("function") or {}
        call.name = call.name or inner.get("name") or ""
        call.custom = call.custom or "custom" in piece
        if piece.get("extra_content"):
            state = {"type": "extra_content", "call_id": call.call_id, "extra_content": piece["extra_content"]}
            call.blocks.append(state)
        text = inner.get("input" if call.custom else "arguments") or ""
        if call.closed:
            return
        if text:
            call.text.append(text)
        if call.open is not None:
            self._argue(call, text)
        elif call.name and self._free(call):
            self._open_call(call)

    def _call_of(self, piece: Json) -> OpenCall:
        """The call a piece belongs to. Some hosts leave `index` out or always send 0: then a new id is a new call."""
        at, call_id = piece.get("index"), piece.get("id")
        known = self._by_index.get(at if at is not None else call_id)
        named = (piece.get("function") or piece.get("custom") or {}).get("name")
        if at is None and call_id is None and not named and self._calls:
            known = self._calls[-1]
        if known is None or (call_id and named and call_id != known.call_id):
            known = OpenCall(call_id or self._new_id("call_"))
            self._calls.append(known)
            self._by_index[at if at is not None else known.call_id] = known
        return known

    def _free(self, call: OpenCall) -> bool:
        """Whether `call` may stream: every earlier one is told, or is whole and now is."""
        for earlier in self._calls:
            if earlier is call:
                return True
            if not earlier.closed and (earlier.open is None or earlier.custom or not earlier.whole):
                return False
            self._end_call(earlier, "completed")
        return True

    def _wrapped(self, call: OpenCall) -> bool:
        """Whether a custom tool of the client was sent on as a function."""
        return not call.custom and call.name in self._customs

    def _open_call(self, call: OpenCall) -> None:
        if call.open is not None or call.closed:
            return
        self._end_prose()
        self._end_blocks(call)
        custom = call.custom or self._wrapped(call)
        kind, text = ("custom_tool_call", "input") if custom else ("function_call", "arguments")
        named = {"call_id": call.call_id, "name": call.name, text: ""}
        call.open = self._open_item(
            {"id": self._new_id(ITEM_PREFIXES[kind]), "type": kind, "status": "in_progress", **named}
        )
        self._argue(call, "".join(call.text))

    def _end_blocks(self, call: OpenCall) -> None:
        if call.blocks:
            self._prose_of("reasoning").blocks += call.blocks
            call.blocks = []
            self._end_prose()

    def _argue(self, call: OpenCall, text: str) -> None:
        if text and call.open is not None and not self._wrapped(call):
            kind = "custom_tool_call_input" if call.custom else "function_call_arguments"
            self._tell(call.open, f"{kind}.delta", delta=text)

    def _end_call(self, call: OpenCall, status: str) -> None:
        if call.closed or call.open is None:
            return
        call.closed = True
        text, wrapped = "".join(call.text), self._wrapped(call)
        if wrapped:
            text = custom_input(text)
            self._tell(call.open, "custom_tool_call_input.delta", delta=text)
        elif not call.custom and text.strip() in ("", "null"):
            if not text:
                self._tell(call.open, "function_call_arguments.delta", delta="{}")
            text = "{}"
        if call.custom or wrapped:
            call.open.item["input"] = text
            self._tell(call.open, "custom_tool_call_input.done", input=text)
        else:
            call.open.item["arguments"] = text
            self._tell(call.open, "function_call_arguments.done", name=call.name, arguments=text)
        self._end_item(call.open, status)
        self._end_blocks(call)


class SilentResponsesRenderer(ResponsesRenderer):
    """Builds the same response without writing events: how a plain answer is made."""

    def _emit(self, kind: str, **members: Any) -> None:
        pass


def message_deltas(message: Json) -> Iterator[Json]:
    """A whole message as deltas in the order its items stood."""
    blocks = [block for block in message.get("thinking_blocks") or () if isinstance(block, dict)]
    items = [block for block in blocks if block.get("type") == "reasoning_item"]
    late = [block for block in items if block.get("calls_before") or block.get("text_before")]
    if not any((block.get("item") or {}).get("type") == "reasoning" for block in items):
        yield {"reasoning_content": message.get("reasoning_content") or message.get("reasoning")}
    yield {"thinking_blocks": [block for block in blocks if block not in late]}
    yield {name: message.get(name) for name in ("content", "refusal", "annotations", "images", "extra_content")}
    calls = message.get("tool_calls") or ()
    for at, call in enumerate(calls):
        yield {"thinking_blocks": [block for block in late if block.get("calls_before", 0) == at]}
        yield {"tool_calls": [{**call, "index": at}]}
    yield {"thinking_blocks": [block for block in late if block.get("calls_before", 0) >= len(calls)]}


class OpenAiResponses(Dialect):
    """Both sides of OpenAI's Responses API. A stricter host is a subclass with other class attributes."""

    name = "responses"
    stores_unasked = True
    forwarded_headers: ClassVar[tuple[str, ...]] = ("openai-beta",)
    #: Whether the host knows custom tools, takes items it did not define, and refuses members it does not know.
    custom_tools: ClassVar[bool] = True
    takes_items: ClassVar[bool] = True
    closed: ClassVar[bool] = False
    #: Members sent with every call that was translated.
    fixed: ClassVar[Mapping[str, Any]] = {"store": False}
    #: Chat members that are not sent.
    unsent: ClassVar[frozenset[str]] = frozenset()
    #: The efforts the host's schema lists; empty where the model alone decides.
    efforts: ClassVar[frozenset[str]] = frozenset()
    min_output_tokens: ClassVar[int] = 16

    # -- client side

    def parse(self, body: Json, path: Mapping[str, str]) -> Json:
        """A Responses body as a canonical request.

        `previous_response_id` must have been resolved by `resume`; items that `item_reference`s name stand in the
        body's ITEMS_KEY member. What only a Responses provider can carry ends in `extra_body.responses`, under its
        dotted path; `refuse_foreign` says which of that no other provider may be asked without.
        """
        request: Json = {"model": expect_json(body.get("model"), str, "model")}
        reader = ResponsesReader(optional_json(body.get(ITEMS_KEY), dict, ITEMS_KEY))
        request["messages"] = self._messages(body, reader)
        request.update({name: body[name] for name in SAME_IN_CHAT if body.get(name) is not None})
        for name, chat_name in (("stream", "stream"), ("max_output_tokens", "max_completion_tokens")):
            if body.get(name) is not None:
                request[chat_name] = expect_json(body[name], bool if name == "stream" else int, name)
        extra = reader.extra
        self._read_shape(body, request, extra)
        self._read_tools(body, request, extra)
        self._read_include(body, request, extra)
        for name, value in body.items():
            if name not in READ_IN_RESPONSES and value is not None and value != RESPONSES_DEFAULTS.get(name):
                extra[name] = value
        if extra:
            request["extra_body"] = {self.name: extra}
        return request

    def _messages(self, body: Json, reader: ResponsesReader) -> list[Json]:
        if body.get("instructions") is not None:
            text = expect_json(body["instructions"], str, "instructions")
            reader.messages += [{"role": "system", "content": text}] if text else []
        given = body.get("input")
        if isinstance(given, str):
            reader.messages.append({"role": "user", "content": given})
        elif isinstance(given, list):
            for place, item in expect_objects(given, "input"):
                reader.read(place, item)
        elif given is not None or body.get("prompt") is None:
            raise InvalidRequest("`input` must be a string or an array of items", param="input")
        messages = reader.close()
        if not messages and body.get("prompt") is None:
            raise InvalidRequest("`input` holds no message", param="input")
        return messages

    def _read_shape(self, body: Json, request: Json, extra: Json) -> None:
        """`reasoning` and `text`: one member of each has a place in chat, or two."""
        reasoning = optional_json(body.get("reasoning"), dict, "reasoning")
        text = optional_json(body.get("text"), dict, "text")
        for group, members, known in (("reasoning", reasoning, ("effort",)), ("text", text, ("format", "verbosity"))):
            rest = {f"{group}.{name}": value for name, value in members.items() if name not in known}
            extra.update({name: value for name, value in rest.items() if value is not None})
        if reasoning.get("effort") is not None:
            request["reasoning_effort"] = expect_json(reasoning["effort"], str, "reasoning.effort")
        if text.get("verbosity") is not None:
            request["verbosity"] = text["verbosity"]
        form = optional_json(text.get("format"), dict, "text.format")
        if form.get("type") == "json_schema":
            inner = {name: value for name, value in form.items() if name != "type" and value is not None}
            request["response_format"] = {"type": "json_schema", "json_schema": inner}
        elif form and form != {"type": "text"}:
            request["response_format"] = form

    def _read_tools(self, body: Json, request: Json, extra: Json) -> None:
        tools = []
        for place, tool in expect_objects(body.get("tools"), "tools"):
            read, rest = read_tool(tool, place)
            tools.append(read)
            for name, value in rest.items():
                extra.setdefault(f"tools.{name}", {})[tool["name"]] = value
        if tools:
            request["tools"] = tools
        if body.get("tool_choice") is not None:
            choice = read_tool_choice(body["tool_choice"])
            (extra if choice is None else request)["tool_choice"] = body["tool_choice"] if choice is None else choice

    def _read_include(self, body: Json, request: Json, extra: Json) -> None:
        include = [expect_json(name, str, "include[]") for name in optional_json(body.get("include"), list, "include")]
        if "message.output_text.logprobs" in include:
            request["logprobs"] = True
        if body.get("top_logprobs"):
            request.update(logprobs=True, top_logprobs=expect_json(body["top_logprobs"], int, "top_logprobs"))
        known = ("message.output_text.logprobs", "reasoning.encrypted_content")
        if rest := [name for name in include if name not in known]:
            extra["include"] = rest

    def refuse_elsewhere(self, canonical: Json) -> None:
        refuse_foreign(canonical)

    def with_output_cap(self, request: Json, tokens: int) -> Json:
        return {**request, "max_output_tokens": tokens}

    def render(self, completion: Json, request: Json) -> Json:
        """A canonical completion as a response. Its ids come from the completion's, which should be Stockyard's own."""
        stem = str(completion.get("id") or "").removeprefix("resp_").removeprefix("chatcmpl-")
        count = iter(range(1_000_000))
        made = completion.get("created")

        def new_id(prefix: str) -> str:
            at = next(count)
            return f"{prefix}{stem}{f'_{at}' if at else ''}"

        renderer = SilentResponsesRenderer(request, new_id, made if isinstance(made, int) else 0)
        renderer.feed({"model": completion.get("model"), "choices": []})
        for choice in completion.get("choices") or ():
            for delta in message_deltas(choice.get("message") or {}):
                told = {"logprobs": choice.get("logprobs")} if delta.get("content") else {}
                renderer.feed({"choices": [{"index": choice.get("index"), "delta": delta, **told}]})
            renderer.feed({"choices": [{"index": choice.get("index"), "finish_reason": choice.get("finish_reason")}]})
        renderer.feed({"usage": completion.get("usage")})
        renderer.close()
        return renderer.response

    def renderer(self, request: Json, new_id: Callable[[str], str], now_s: int) -> Renderer:
        return ResponsesRenderer(request, new_id, now_s)

    def render_error(self, error: GatewayError, request_id: str) -> tuple[int, Json]:
        return error.status, openai_error_body(error, request_id)

    # -- provider side

    def path(self, provider: Provider, model: str, stream: bool) -> str:
        return "/responses"

    def encode(self, request: Json, translation: Translation) -> Json:
        if not self.custom_tools:
            request, translation.names["custom_tools"] = customs_as_functions(request)
        facts = openai_model_facts(translation.model)
        extra = self._extra(request, translation)
        body: Json = {"model": translation.model, **self._conversation(request, translation, extra), **self.fixed}
        if translation.stream:
            body["stream"] = True
        same = SAME_IN_CHAT - self.unsent
        body.update({name: request[name] for name in sorted(same) if request.get(name) is not None})
        self._write_tools(body, request, translation, extra)
        self._write_shape(body, request, translation, facts)
        self._write_sampling(body, request, translation, facts)
        self._note_losses(request, translation)
        self._merge(body, extra, translation)
        return body

    def _extra(self, request: Json, translation: Translation) -> Json:
        """What a client of this dialect said beyond chat; the other dialects' extras cannot be carried."""
        extras = optional_json(request.get("extra_body"), dict, "extra_body")
        for dialect, members in extras.items():
            if dialect != OpenAiResponses.name:
                for name in members if isinstance(members, dict) else (dialect,):
                    translation.drop(name)
        return dict(optional_json(extras.get(OpenAiResponses.name), dict, "extra_body"))

    def _conversation(self, request: Json, translation: Translation, extra: Json) -> Json:
        """`instructions` from a first system message that is plain text, `input` from the rest."""
        messages = expect_objects(request.get("messages"), "messages")
        writer = ResponsesWriter(self, translation, extra)
        first = messages[0][1] if messages else {}
        plain = isinstance(first.get("content"), str) and first["content"] and not first.get("cache_control")
        lead = len(messages) > 1 and plain and first.get("role") in ("system", "developer")
        for at, (_, message) in enumerate(messages):
            if at or not lead:
                writer.write(at, message)
        return {**({"instructions": first["content"]} if lead else {}), "input": writer.items}

    def _write_tools(self, body: Json, request: Json, translation: Translation, extra: Json) -> None:
        tools = [self._tool(tool, place, translation) for place, tool in expect_objects(request.get("tools"), "tools")]
        body["tools"] = [tool for tool in tools if tool is not None]
        for name in [name for name in extra if name.startswith("tools.") and not self.closed]:
            values = optional_json(extra[name], dict, name)
            for tool in body["tools"]:
                if tool.get("type") == "function" and tool.get("name") in values:
                    tool[name.removeprefix("tools.")] = values[tool["name"]]
        if not body["tools"]:
            del body["tools"]
            body.pop("parallel_tool_calls", None)
        elif request.get("tool_choice") is not None:
            body["tool_choice"] = self._tool_choice(write_tool_choice(request["tool_choice"]))

    def _tool_choice(self, choice: Any) -> Any:
        return choice

    def _tool(self, tool: Json, place: str, translation: Translation) -> Json | None:
        kind = tool.get("type") or ("function" if "function" in tool else None)
        if tool.get("cache_control"):
            translation.drop("cache_control")
        if kind == "native" and tool.get("dialect") == OpenAiResponses.name:
            return expect_json(tool.get("tool"), dict, f"{place}.tool")  # type: ignore[no-any-return]
        if kind == "custom":
            return write_custom_tool(expect_json(tool.get("custom"), dict, f"{place}.custom"))
        if kind != "function":
            translation.drop(f"tools.{tool.get('dialect') or kind}")
            return None
        function = expect_json(tool.get("function"), dict, f"{place}.function")
        expect_json(function.get("name"), str, f"{place}.function.name")
        # Chat's tools are lenient unless they say otherwise, the tools here are strict: so it is said.
        lenient = {"parameters": {"type": "object", "properties": {}}, "strict": False}
        given = {name: value for name, value in function.items() if value is not None}
        return {"type": "function", **lenient, **given}

    def _write_shape(self, body: Json, request: Json, translation: Translation, facts: ModelFacts) -> None:
        limits = [request[name] for name in ("max_completion_tokens", "max_tokens") if request.get(name) is not None]
        if limits:
            limit = expect_json(limits[0], int, "max_completion_tokens")
            if limit < self.min_output_tokens:
                translation.drop("max_completion_tokens", f"the least is {self.min_output_tokens}")
            body["max_output_tokens"] = max(limit, self.min_output_tokens)
        asked = request.get("reasoning_effort")
        if asked is not None:
            effort = facts.effort(expect_json(asked, str, "reasoning_effort"))
            effort = effort if not self.efforts or effort in self.efforts else None
            if effort != asked and not (asked == "none" and not facts.reasons):
                translation.drop("reasoning_effort", f"the model knows no effort `{asked}`")
            if effort is not None:
                body["reasoning"] = {"effort": effort}
        if request.get("response_format") is not None:
            self._write_format(body, expect_json(request["response_format"], dict, "response_format"))
        if request.get("verbosity") is not None and "verbosity" not in self.unsent:
            body.setdefault("text", {})["verbosity"] = request["verbosity"]
        if facts.reasons and not self.closed:
            body["include"] = ["reasoning.encrypted_content"]

    def _write_format(self, body: Json, form: Json) -> None:
        if form.get("type") == "json_schema":
            inner = expect_json(form.get("json_schema"), dict, "response_format.json_schema")
            form = {"type": "json_schema", "name": "response", **inner}
        body.setdefault("text", {})["format"] = form

    def _write_sampling(self, body: Json, request: Json, translation: Translation, facts: ModelFacts) -> None:
        for name in facts.refused(request):
            body.pop(name, None)
            if request[name] != CHAT_DEFAULTS[name]:
                translation.drop(name, "not while the model reasons")
        if "logprobs" in self.unsent or "logprobs" in facts.refused(request) or request.get("logprobs") is not True:
            return
        body.setdefault("include", []).append("message.output_text.logprobs")
        if request.get("top_logprobs"):
            body["top_logprobs"] = request["top_logprobs"]

    def _note_losses(self, request: Json, translation: Translation) -> None:
        silent = {"presence_penalty", "frequency_penalty", "logit_bias", "stop"} | self.unsent
        for name, value in request.items():
            lost = name in silent or name not in READ_IN_CHAT
            if lost and value is not None and value != CHAT_DEFAULTS.get(name):
                translation.drop(name)

    def _merge(self, body: Json, extra: Json, translation: Translation) -> None:
        """Give back what this dialect's own clients said: whole members, and dotted ones in their group."""
        for name, value in extra.items():
            group, _, member = name.partition(".")
            if group in ("input", "tools") and member:
                continue
            if name == "include":
                body["include"] = list(dict.fromkeys([*body.get("include", ()), *optional_json(value, list, name)]))
            elif member:
                body.setdefault(group, {})[member] = value
            else:
                body[name] = value

    def decode(self, answer: Json, translation: Translation) -> Json:
        if not isinstance(answer.get("output"), list) and not answer.get("error"):
            raise UpstreamError("the provider's answer has no `output`", code="upstream_malformed")
        if answer.get("status") in ("queued", "in_progress"):
            raise UpstreamError("the provider answered before it had finished", code="upstream_malformed")
        with malformed_is_theirs():
            return join_chunks(ResponsesDecoder(self, translation).finish(answer))

    def decoder(self, translation: Translation) -> Decoder:
        return ResponsesDecoder(self, translation)

    def canonical_usage(self, usage: Usage) -> Json:
        """Usage in chat's words; the number of searches rides along under the name `read_openai_usage` knows."""
        written = write_openai_usage(usage)
        return {**written, "num_search_queries": usage.searches} if usage.searches else written

    def read_usage(self, answer: Json) -> Usage | None:
        usage = answer.get("usage")
        if not isinstance(usage, dict):
            return None
        output = answer.get("output")
        items = [item for item in output if isinstance(item, dict)] if isinstance(output, list) else []
        calls = [item.get("action") or {} for item in items if item.get("type") == "web_search_call"]
        searches = sum(1 for action in calls if action.get("type", "search") == "search")
        told = (usage.get("tool_calls_details") or {}).get("search_web") or {}
        searches = searches or (told.get("invocation") if isinstance(told, dict) else 0) or 0
        return read_openai_usage(usage)._replace(searches=searches)

    def read_error(self, status: int, body: bytes) -> UpstreamError:
        return OpenAiChat().read_error(status, body)

    def failure(self, error: Any) -> UpstreamError:
        """An error told inside a 200, in a stream or as a failed response."""
        members = error if isinstance(error, dict) else {"message": str(error)}
        code, kind = members.get("code"), members.get("type")
        status = code if isinstance(code, int) and 400 <= code < 600 else None
        status = status or FAILURE_STATUSES.get(str(code)) or FAILURE_STATUSES.get(str(kind)) or 502
        told = {name: value for name, value in members.items() if name != "sequence_number" and value is not None}
        if kind == "error":
            told.pop("type")
        return self.read_error(status, dump_json({"error": told}))

    def refuse_failed(self, response: Json) -> None:
        """Raise for a response that ended without an answer, which is a 200 here."""
        status = response.get("status")
        if status in ("failed", "cancelled") or (response.get("error") and status != "completed"):
            raise self.failure(response.get("error") or {"message": f"the response was {status}"})


class PerplexityAgent(OpenAiResponses):
    """Perplexity's Agent API: the same shape with a closed schema, where any unknown member is a 400.

    Source: https://docs.perplexity.ai (Agent API) and its guide for leaving Sonar chat completions.
    """

    name = "perplexity"
    family = "perplexity"  # its schema is closed: bytes of Responses clients do not pass
    forwarded_headers = ()
    custom_tools = False
    takes_items = False
    closed = True
    fixed: ClassVar[Mapping[str, Any]] = {}
    efforts = frozenset({"minimal", "low", "medium", "high", "xhigh", "max"})
    unsent = frozenset({
        "logprobs", "top_logprobs", "moderation", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier", "service_tier", "user", "verbosity",
    })  # fmt: skip
    #: Names of the retired chat API and what stands in their place; searching is asked for, it is not automatic.
    models: ClassVar[Mapping[str, Json]] = {
        "sonar": {"model": "perplexity/sonar", "tools": [{"type": "web_search"}]},
        "sonar-pro": {"preset": "low"},
        "sonar-reasoning": {"preset": "low"},
        "sonar-reasoning-pro": {"preset": "low"},
        "sonar-deep-research": {"preset": "medium"},
    }
    #: Vendors whose models need a limit, and the one sent where the client gave none.
    needed_output_tokens: ClassVar[Mapping[str, int]] = {"anthropic": 8192}
    #: Where the search options of the retired chat API stand in the search tool.
    filters: ClassVar[frozenset[str]] = frozenset({
        "search_domain_filter", "search_recency_filter", "search_after_date_filter", "search_before_date_filter",
        "last_updated_after_filter", "last_updated_before_filter",
    })  # fmt: skip
    kept: ClassVar[frozenset[str]] = frozenset({
        "background", "language_preference", "max_steps", "max_tool_calls", "models", "preset", "previous_response_id",
        "tool_choice", "truncation",
    })  # fmt: skip

    def encode(self, request: Json, translation: Translation) -> Json:
        search = self._search_tool(request)
        used = self.filters | {"num_search_results", "web_search_options", "language_preference"}
        body = super().encode({name: value for name, value in request.items() if name not in used}, translation)
        if request.get("language_preference") is not None:
            body["language_preference"] = request["language_preference"]
        replaced = self.models.get(translation.model)
        if replaced is not None:
            del body["model"]
            body.update({name: value for name, value in replaced.items() if name != "tools"})
        wanted = [{**tool, **search} for tool in (replaced or {}).get("tools", [])] or ([search] if search else [])
        if wanted and not any(tool.get("type") == "web_search" for tool in body.get("tools", ())):
            body["tools"] = [*wanted, *body.get("tools", ())]
        vendor = translation.model.partition("/")[0]
        if vendor in self.needed_output_tokens:
            body.setdefault("max_output_tokens", self.needed_output_tokens[vendor])
        return body

    def _search_tool(self, request: Json) -> Json:
        """The search options of a chat client, as the tool they became; empty where none was given."""
        options = optional_json(request.get("web_search_options"), dict, "web_search_options")
        names = ("search_context_size", "user_location")
        tool = {name: options[name] for name in names if options.get(name) is not None}
        if request.get("num_search_results") is not None:
            tool["max_results"] = request["num_search_results"]
        if filters := {name: request[name] for name in sorted(self.filters) if request.get(name) is not None}:
            tool["filters"] = filters
        return {"type": "web_search", **tool} if tool else {}

    def _tool_choice(self, choice: Any) -> Any:
        """A function is named without a type here."""
        return {"name": choice["name"]} if isinstance(choice, dict) and choice.get("type") == "function" else choice

    def _write_format(self, body: Json, form: Json) -> None:
        body["response_format"] = form

    def _merge(self, body: Json, extra: Json, translation: Translation) -> None:
        for name in sorted(extra.keys() - self.kept):
            translation.drop(name)
        super()._merge(body, {name: value for name, value in extra.items() if name in self.kept}, translation)


# ----- Responses state ------------------------------------------------------------------------------------------------
# A stored response is the list of its items: what came in, what went out. The lists of a chain, in order, are what
# `previous_response_id` stands for; instructions are not part of it.


def input_items(request: Json) -> list[Json]:
    """The request's own input as items; a plain string is a user message."""
    given = request.get("input")
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [item for item in given if isinstance(item, dict)] if isinstance(given, list) else []


def stored_items(request: Json, response: Json) -> list[Json]:
    """What to keep so that `response` can be continued: every input item (with an id, references resolved), then the
    output. Given the client's own body the list holds this turn alone; given the resumed one it holds the whole chain.
    """
    stem = str(response.get("id") or "").removeprefix("resp_")
    known = request.get(ITEMS_KEY)
    items = []
    for at, item in enumerate(input_items(request)):
        if item.get("type") == "item_reference" and isinstance(known, dict):
            item = known.get(item.get("id"), item)
        kind = str(item.get("type") or "message")
        prefix = ITEM_PREFIXES.get(kind, "item_")
        items.append({"type": kind, **item, "id": item.get("id") or f"{prefix}{stem}_in{at}"})
    return items + list(response.get("output") or ())


def resume(request: Json, previous_items: Sequence[Json]) -> Json:
    """The request with the earlier items in front of its own, and without its `previous_response_id`."""
    rest = {name: value for name, value in request.items() if name != "previous_response_id"}
    return {**rest, "input": [*previous_items, *input_items(request)]}


def referenced_ids(request: Json) -> list[str]:
    """The ids that `item_reference`s in the input name, for the gateway to look up into ITEMS_KEY."""
    found = [item.get("id") for item in input_items(request) if item.get("type") == "item_reference"]
    return [name for name in found if isinstance(name, str)]


def refuse_foreign(request: Json) -> None:
    """InvalidRequest where a canonical request holds what no provider but a Responses one may be asked without.

    To be asked before a call is translated to any other dialect: these are not options but the conversation itself.
    """
    extra = (request.get("extra_body") or {}).get(OpenAiResponses.name) or {}
    if extra.get("previous_response_id") is not None:
        message = f"Previous response with id '{extra['previous_response_id']}' not found."
        raise InvalidRequest(message, code="previous_response_not_found", param="previous_response_id")
    for name in ("conversation", "prompt", "background"):
        if extra.get(name):
            raise InvalidRequest(f"`{name}` needs a provider of OpenAI's Responses API", param=name)
    for message in request.get("messages") or ():
        for block in message.get("thinking_blocks") or ():
            kind = (block.get("item") or {}).get("type") if isinstance(block, dict) else None
            if kind is not None and block.get("type") == "reasoning_item" and kind not in HOST_ITEMS:
                message = f"an input item `{kind}` needs a provider of OpenAI's Responses API"
                raise InvalidRequest(message, param="input")


# ----- Gemini ---------------------------------------------------------------------------------------------------------
# Google's generateContent, on the Developer API and on Vertex. Four things differ from every other dialect: the model
# and the method stand in the path; a whole tool call is one part; STOP also ends an answer full of tool calls; and
# usage grows on every event, so that only the last one counts. Opaque signatures hang on single parts. They travel to
# OpenAI clients in `extra_content.google` and are never decoded; a foreign provider's opaque blocks travel through
# Gemini clients the other way, packed into a signature of our own (`pack_blocks`).
#
# What canonical requests cannot hold is kept in `extra_body.gemini` under its dotted path
# (`generationConfig.speechConfig`), so that another dialect can name exactly what it drops. What differs by model is a
# row of GEMINI_FAMILIES; what differs on Vertex is a class attribute of GeminiVertex.
# Sources: https://ai.google.dev/api/generate-content and https://docs.cloud.google.com/vertex-ai/generative-ai/docs


@dataclass(frozen=True, slots=True, kw_only=True)
class GeminiFamily:
    """What a family of models takes; the defaults are the newest family's."""

    #: Values of thinkingLevel, lowest first; empty where the family counts tokens instead.
    levels: tuple[str, ...] = ("LOW", "MEDIUM", "HIGH")
    #: Lowest and highest thinkingBudget in tokens; None without any thinking.
    budget_tokens: tuple[int, int] | None = None
    can_stop_thinking: bool = False
    #: A tool call in the history without its thought signature is a 400.
    needs_signatures: bool = True
    #: A function response may carry media of its own.
    media_results: bool = True
    #: A file may be named by any public https address.
    web_files: bool = True
    #: Takes JSON Schema; else the OpenAPI subset.
    json_schema: bool = True
    json_with_tools: bool = True
    #: Function calling mode VALIDATED, which keeps arguments to their schema.
    validated: bool = True
    system: bool = True
    #: Google bills each search query; else one search a grounded answer.
    counts_queries: bool = True

    @property
    def thinks(self) -> bool:
        return bool(self.levels) or self.budget_tokens is not None


GEMINI_NEWEST: Final = GeminiFamily()
GEMINI_3: Final = GeminiFamily(levels=("MINIMAL", "LOW", "MEDIUM", "HIGH"))
GEMINI_2_5: Final = GeminiFamily(
    levels=(), budget_tokens=(0, 24576), can_stop_thinking=True, needs_signatures=False, media_results=False,
    json_with_tools=False, counts_queries=False,
)  # fmt: skip
GEMINI_2_5_IMAGE: Final = dataclasses.replace(GEMINI_2_5, budget_tokens=None, can_stop_thinking=False, validated=False)
GEMINI_2: Final = dataclasses.replace(GEMINI_2_5_IMAGE, web_files=False, json_schema=False)
GEMMA_3: Final = dataclasses.replace(GEMINI_2, system=False)

#: The first pattern that matches the start of a model's name wins.
GEMINI_FAMILIES: Final = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        (r"gemini-3[\d.]*-pro", GEMINI_NEWEST),
        (r"gemini-3\.[78]-flash", GEMINI_NEWEST),
        (r"gemini-3", GEMINI_3),
        (r"gemini-2\.5-pro", dataclasses.replace(GEMINI_2_5, budget_tokens=(128, 32768), can_stop_thinking=False)),
        (r"gemini-2\.5-flash-lite", dataclasses.replace(GEMINI_2_5, budget_tokens=(512, 24576))),
        (r"gemini-2\.5-flash-image", GEMINI_2_5_IMAGE),
        (r"gemini-2\.5", GEMINI_2_5),
        (r"gemini-[12][.-]|learnlm", GEMINI_2),
        (r"gemma-3", GEMMA_3),
        (r"gemma", GEMINI_2),
        (r"", GEMINI_NEWEST),
    )
)


def gemini_family(model: str) -> GeminiFamily:
    name = model.rpartition("/")[2]
    return next(family for pattern, family in GEMINI_FAMILIES if pattern.match(name))


#: reasoning_effort -> thinkingLevel (raised to the family's lowest), thinkingBudget (held to the family's bounds).
GEMINI_EFFORTS: Final[Mapping[str, tuple[str, int]]] = {
    "none": ("MINIMAL", 0), "minimal": ("MINIMAL", 512), "low": ("LOW", 1024), "medium": ("MEDIUM", 8192),
    "high": ("HIGH", 24576), "xhigh": ("HIGH", 32768), "max": ("HIGH", 32768),
}  # fmt: skip
GEMINI_BLOCKED: Final = frozenset({
    "SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR", "ESCALATION",
    "PUP_LIMITED_DISABLED", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "IMAGE_OTHER",
})  # fmt: skip
GEMINI_FINISHES: Final[Mapping[str, str]] = {
    "STOP": "stop", "MAX_TOKENS": "length", "CONTINUATION": "length", **dict.fromkeys(GEMINI_BLOCKED, "content_filter"),
}  # fmt: skip
GEMINI_FAILED: Final = frozenset({
    "MALFORMED_FUNCTION_CALL", "MALFORMED_RESPONSE", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS", "OTHER", "NO_IMAGE",
})  # fmt: skip
GEMINI_CLIENT_FINISHES: Final[Mapping[str, str]] = {"length": "MAX_TOKENS", "content_filter": "SAFETY"}
GEMINI_STATUSES: Final[Mapping[int, str]] = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 409: "ABORTED",
    413: "INVALID_ARGUMENT", 422: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED", 499: "CANCELLED", 500: "INTERNAL",
    501: "UNIMPLEMENTED", 502: "UNAVAILABLE", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip

#: Google's documented stand-in for the signature of a call that another provider's model made.
SIGNATURE_DUMMY: Final = "skip_thought_signature_validator"
#: base64 of `stockyard`: how a packed signature of ours begins in either alphabet.
PACKED_PREFIX: Final = "c3RvY2t5YXJk"
GOOGLE_FILES: Final = "https://generativelanguage.googleapis.com/v1beta/"
GOOGLE_FILE_URL: Final = re.compile(r"https://generativelanguage\.googleapis\.com/(?:[\w.]+/)?files/")
YOUTUBE_URL: Final = re.compile(r"https://(?:(?:www|m)\.youtube\.com|youtube\.com|youtu\.be)/")
MEDIA_TYPES: Final[Mapping[str, str]] = {
    "png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif",
    "heic": "image/heic", "heif": "image/heif", "avif": "image/avif", "bmp": "image/bmp", "pdf": "application/pdf",
    "txt": "text/plain", "md": "text/markdown", "csv": "text/csv", "html": "text/html", "htm": "text/html",
    "xml": "text/xml", "json": "application/json", "mp4": "video/mp4", "m4v": "video/mp4", "mov": "video/quicktime",
    "webm": "video/webm", "mpeg": "video/mpeg", "mpg": "video/mpeg", "avi": "video/x-msvideo", "wmv": "video/x-ms-wmv",
    "flv": "video/x-flv", "3gp": "video/3gpp", "mp3": "audio/mp3", "wav": "audio/wav", "ogg": "audio/ogg",
    "flac": "audio/flac", "aac": "audio/aac", "aiff": "audio/aiff", "m4a": "audio/mp4",
}  # fmt: skip
RESULT_MEDIA: Final = frozenset({"image/png", "image/jpeg", "image/webp", "application/pdf", "text/plain"})
GEMINI_IMAGE_TOKENS: Final = 258
FUNCTION_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]{0,63}\Z")
DATA_URI: Final = re.compile(r"data:([^;,]*)((?:;[^;,]*)*),", re.ASCII)
LABEL: Final = re.compile(r"[a-z0-9_-]{0,63}\Z")


def want_object(value: Any, where: str) -> Json:
    if not isinstance(value, dict):
        raise InvalidRequest(f"`{where}` must be an object", param=where)
    return value


def want_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRequest(f"`{where}` must be an array", param=where)
    return value


def want_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"`{where}` must be a string", param=where)
    return value


def want_number(value: Any, where: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"`{where}` must be a number", param=where)
    return value


def want_whole(value: Any, where: str) -> int:
    """A whole number; JSON writers of some languages send 40.0."""
    number = want_number(value, where)
    if number != int(number):
        raise InvalidRequest(f"`{where}` must be a whole number", param=where)
    return int(number)


def want_flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"`{where}` must be true or false", param=where)
    return value


def want_texts(value: Any, where: str) -> list[str]:
    return [want_text(item, f"{where}[{at}]") for at, item in enumerate(want_list(value, where))]


def camel_case(name: str) -> str:
    if "_" not in name:
        return name
    first, *rest = name.split("_")
    return first + "".join(word[:1].upper() + word[1:] for word in rest)


def google_object(value: Any, where: str) -> Json:
    """A client's object with camelCase names; Google takes snake_case too, and null for absent."""
    return {camel_case(name): child for name, child in want_object(value, where).items() if child is not None}


def google_list(value: Any, where: str) -> list[Any]:
    """A client's array; Google's own examples write a single object where an array belongs."""
    return [value] if isinstance(value, dict) else want_list(value, where)


def standard_base64(text: str) -> str:
    """Google's SDKs write the URL alphabet, which no other provider reads."""
    text = text.translate({45: "+", 95: "/"})
    return text + "=" * (-len(text) % 4)


def pack_blocks(blocks: list[Any]) -> str:
    """Write another provider's opaque blocks as a signature, so that Gemini clients give them back unchanged."""
    return base64.urlsafe_b64encode(b"stockyard:" + dump_json(blocks)).decode()


def unpack_blocks(signature: str, where: str) -> list[Json] | None:
    """The blocks in a signature of ours; None for a signature of Google's."""
    if not signature.startswith(PACKED_PREFIX):
        return None
    try:
        blocks = orjson.loads(base64.b64decode(standard_base64(signature)).removeprefix(b"stockyard:"))
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"`{where}` is damaged: send it back as it came", param=where) from None
    return [want_object(block, where) for block in want_list(blocks, where)]


def read_arguments(text: Any) -> Json:
    """A call's arguments as the object Gemini demands; what is no object is kept whole under `arguments`."""
    if not text or text == "null":
        return {}
    value = load_object(text) if isinstance(text, str) else text
    return value if isinstance(value, dict) else {"arguments": text}


def load_object(text: str) -> Json | None:
    """Parse text that holds a JSON object, exactly (integers of any size); None for all else."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def media_type_of(name: str) -> str | None:
    """Guess a media type from the extension of a file name or URL."""
    path = urllib.parse.urlsplit(name).path if "://" in name else name
    return MEDIA_TYPES.get(path.rpartition(".")[2].lower()) if "." in path else None


def read_data_uri(uri: str, where: str) -> tuple[str, str]:
    """Split a data URI into its media type and standard base64."""
    match = DATA_URI.match(uri)
    if match is None:
        raise InvalidRequest(f"`{where}` must be a data URI with a comma, or a URL", param=where)
    kind, data = match[1].lower() or "text/plain", uri[match.end() :]
    if ";base64" not in match[2].lower():
        data = base64.b64encode(urllib.parse.unquote_to_bytes(data)).decode()
    return {"image/jpg": "image/jpeg", "audio/mpeg": "audio/mp3"}.get(kind, kind), data


# Schemas: JSON Schema trimmed to what Gemini reads, and the OpenAPI subset of older models, both ways.

SCHEMA_SILENT: Final = frozenset({
    "$schema", "$id", "$comment", "$anchor", "$defs", "definitions", "title", "examples", "discriminator", "deprecated",
    "readOnly", "writeOnly", "strict", "contentMediaType", "contentEncoding",
})  # fmt: skip
SCHEMA_BOTH: Final = frozenset({
    "type", "format", "description", "enum", "items", "minItems", "maxItems", "properties", "required", "minimum",
    "maximum", "minLength", "maxLength", "minProperties", "maxProperties", "pattern", "anyOf", "default", "nullable",
    "propertyOrdering",
})  # fmt: skip
SCHEMA_JSON: Final = SCHEMA_BOTH | {"$ref", "$defs", "definitions", "prefixItems", "additionalProperties"}
SCHEMA_FORMATS: Final = frozenset({"enum", "date-time", "date", "time", "duration"})
JSON_TYPES: Final = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"))


class SchemaWriter:
    """Rewrites one JSON Schema for Gemini; constraints it cannot carry go to `drop` by their keyword."""

    def __init__(self, root: Json, whole: bool, drop: Callable[[str], None]) -> None:
        """`whole` keeps JSON Schema; else the OpenAPI subset is written, with references put in place."""
        self._root, self._whole, self._drop = root, whole, drop
        self._open: list[str] = []

    def write(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return {} if schema is True else schema
        if "$ref" in schema:
            return self._reference(schema)
        kept = self._rewrite(dict(schema))
        allowed = SCHEMA_JSON if self._whole else SCHEMA_BOTH
        for name in [name for name in kept if name not in allowed]:
            value = kept.pop(name)
            if name not in SCHEMA_SILENT and not (name == "additionalProperties" and value is False):
                self._drop(name)
        return {name: self._child(name, value) for name, value in kept.items()}

    def _child(self, name: str, value: Any) -> Any:
        if name in ("properties", "$defs", "definitions") and isinstance(value, dict):
            return {key: self.write(child) for key, child in value.items()}
        if name in ("anyOf", "prefixItems") and isinstance(value, list):
            return [self.write(child) for child in value]
        return self.write(value) if name in ("items", "additionalProperties") and isinstance(value, dict) else value

    def _reference(self, schema: Json) -> Any:
        beside = {name: value for name, value in schema.items() if name != "$ref" and name not in SCHEMA_SILENT}
        if self._whole:  # a reference bears no siblings
            return self.write({**beside, "anyOf": [{"$ref": schema["$ref"]}]}) if beside else {"$ref": schema["$ref"]}
        name = str(schema["$ref"])
        if name in self._open:
            self._drop("$ref")
            return {"type": "object"}
        self._open.append(name)
        target = self._find(name)
        written = self.write({**target, **beside})
        self._open.pop()
        return written

    def _find(self, name: str) -> Json:
        target: Any = self._root
        for step in name.removeprefix("#").split("/")[1:]:
            target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        return want_object(target, f"$ref {name}")

    def _rewrite(self, schema: Json) -> Json:
        if "const" in schema:
            schema["enum"] = [schema.pop("const")]
        if isinstance(schema.get("oneOf"), list):
            schema.setdefault("anyOf", schema.pop("oneOf"))
        if isinstance(schema.get("allOf"), list):
            self._merge(schema, schema.pop("allOf"))
        self._whole_bounds(schema)
        self._name_format(schema)
        if isinstance(schema.get("enum"), list) and schema["enum"] and "type" not in schema:
            first = schema["enum"][0]
            schema.update(next(({"type": name} for kind, name in JSON_TYPES if isinstance(first, kind)), {}))
        if not self._whole:
            self._openapi(schema)
        return schema

    def _merge(self, schema: Json, parts: list[Any]) -> None:
        for part in parts:
            if isinstance(part, dict) and "$ref" in part:
                part = {**self._find(str(part["$ref"])), **part}
                del part["$ref"]
            for name, value in part.items() if isinstance(part, dict) else ():
                old = schema.get(name)
                if isinstance(old, dict) and isinstance(value, dict):
                    schema[name] = {**old, **value}
                elif name == "required" and isinstance(old, list) and isinstance(value, list):
                    schema[name] = list(dict.fromkeys(old + value))
                else:
                    schema.setdefault(name, value)

    def _whole_bounds(self, schema: Json) -> None:
        """Among whole numbers, above 3 is the same as at least 4."""
        for name, bound, step in (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1)):
            value = schema.get(name)
            if schema.get("type") == "integer" and type(value) is int:
                schema[bound] = schema.pop(name) + step

    def _name_format(self, schema: Json) -> None:
        """A format that Gemini would refuse is told in words instead."""
        name = schema.get("format")
        if schema.get("type") == "string" and isinstance(name, str) and name not in SCHEMA_FORMATS:
            del schema["format"]
            schema["description"] = f"{schema.get('description', '')} (format: {name})".strip()

    def _openapi(self, schema: Json) -> None:
        kinds = schema.get("type")
        if isinstance(kinds, list):
            rest = [kind for kind in kinds if kind != "null"]
            if len(rest) < len(kinds):
                schema["nullable"] = True
            schema["type"] = rest[0] if rest else "string"
            if len(rest) > 1:
                del schema["type"]
                schema["anyOf"] = [{"type": kind} for kind in rest]
        if isinstance(schema.get("anyOf"), list) and {"type": "null"} in schema["anyOf"]:
            schema["anyOf"] = [option for option in schema["anyOf"] if option != {"type": "null"}]
            schema["nullable"] = True
        if isinstance(schema.get("enum"), list) and not all(isinstance(item, str) for item in schema["enum"]):
            del schema["enum"]
            self._drop("enum")


def read_openapi_schema(schema: Any, where: str) -> Json:
    """A client's OpenAPI-style schema as JSON Schema: lower-case types, `nullable` as a type of its own."""
    schema = google_object(schema, where)
    result: Json = {}
    for name, value in schema.items():
        if name == "type":
            result["type"] = want_text(value, f"{where}.type").lower()
        elif name in ("properties", "defs"):
            members = want_object(value, f"{where}.{name}").items()
            inner = {key: read_openapi_schema(child, f"{where}.{name}.{key}") for key, child in members}
            result["$defs" if name == "defs" else name] = inner
        elif name == "anyOf":
            options = enumerate(want_list(value, f"{where}.anyOf"))
            result[name] = [read_openapi_schema(child, f"{where}.anyOf[{at}]") for at, child in options]
        elif name == "items" or (name == "additionalProperties" and isinstance(value, dict)):
            result[name] = read_openapi_schema(value, f"{where}.{name}")
        elif name in ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"):
            result[name] = int(value) if isinstance(value, str) and value.isdecimal() else value  # int64 may be text
        elif name not in ("nullable", "propertyOrdering", "example") and (name, value) != ("format", "enum"):
            result["$ref" if name == "ref" else name] = value
    if schema.get("nullable") is True:
        result = {**result, "type": [result["type"], "null"]} if "type" in result else result
    return result


# Canonical request -> generateContent body.

#: Members of a canonical request that a single member of generationConfig carries as it stands.
GEMINI_PLAIN: Final[Mapping[str, str]] = {
    "max_tokens": "maxOutputTokens", "max_completion_tokens": "maxOutputTokens", "temperature": "temperature",
    "top_p": "topP", "top_k": "topK", "seed": "seed", "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty", "logprobs": "responseLogprobs", "top_logprobs": "logprobs",
}  # fmt: skip
#: Members that need no word: carried elsewhere, or the only way Gemini works.
GEMINI_IMPLIED: Final = frozenset({
    "model", "messages", "stream", "stream_options", "tool_choice", "reasoning", "include_reasoning", "extra_body",
    "tools", "reasoning_effort",
})  # fmt: skip
MESSAGE_MEMBERS: Final = frozenset({
    "role", "content", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "refusal", "extra_content",
    "is_error", "images", "thought_signature",
})  # fmt: skip
#: Google's names inside `extra_body` that belong deeper in the body; objects whose members count one by one.
GEMINI_MOVED: Final[Mapping[str, str]] = {"thinkingConfig": "generationConfig.thinkingConfig"}
GEMINI_NESTED: Final = frozenset({
    "generationConfig", "toolConfig", "generationConfig.thinkingConfig", "toolConfig.functionCallingConfig",
})  # fmt: skip


def dotted_members(members: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk a partial body as dotted paths and values, such as `generationConfig.seed`, 7."""
    for name, value in members.items():
        path = prefix + ".".join(camel_case(step) for step in name.split("."))
        path = GEMINI_MOVED.get(path, path)
        if path in GEMINI_NESTED and isinstance(value, dict):
            yield from dotted_members(value, path + ".")
        else:
            yield path, value


def set_dotted(body: Json, path: str, value: Any) -> None:
    *steps, last = path.split(".")
    for step in steps:
        body = body.setdefault(step, {})
    body[last] = value


class GeminiEncoder:
    """Builds one generateContent body. One object a request: it remembers calls and names on the way."""

    def __init__(self, dialect: GeminiGenerate, request: Json, translation: Translation) -> None:
        self._dialect, self._request, self._translation = dialect, request, translation
        self._family = gemini_family(translation.model)
        self._config: Json = {}
        self._body: Json = {}
        self._system: list[Json] = []
        self._contents: list[Json] = []
        self._calls: dict[str, tuple[int, str]] = {}  # id -> order, name
        self._results: list[tuple[int, Json, list[Json]]] = []
        self._fitted: dict[str, str] = {}

    def build(self) -> Json:
        self._write_messages()
        self._write_tools()
        self._write_thinking()
        for name, value in self._request.items():
            if value is None or name in GEMINI_IMPLIED:
                continue
            if name in GEMINI_PLAIN:
                self._config[GEMINI_PLAIN[name]] = value
            elif (writer := self.WRITERS.get(name)) is not None:
                writer(self, value)
            else:
                self._translation.drop(name)
        body = {"contents": self._contents, **self._body}
        if self._config:
            body["generationConfig"] = self._config
        self._write_extras(body)
        return self._without_cached(body)

    # -- messages

    def _write_messages(self) -> None:
        for at, message in enumerate(want_list(self._request.get("messages"), "messages")):
            where = f"messages[{at}]"
            message = want_object(message, where)
            role = message.get("role")
            self._name_lost(message, role)
            if role == "tool":
                self._tool(message, where)
                continue
            self._flush_results()
            if role in ("system", "developer"):
                self._instruct(message, where)
            elif role == "assistant":
                self._append("model", self._assistant(message, where))
            elif role == "user":
                opaque = self._google(message, where).get("parts") or []
                self._append("user", self._parts(message.get("content"), where) + opaque)
            else:
                raise InvalidRequest(f"`{where}.role` {role!r} is not known", param=f"{where}.role")
        self._flush_results()
        if self._system and (not self._contents or not self._family.system):  # contents must not be empty
            merged = self._contents and self._contents[0]["role"] == "user"
            parts = self._contents.pop(0)["parts"] if merged else []
            self._contents.insert(0, {"role": "user", "parts": self._system + parts})
        elif self._system:
            self._body["systemInstruction"] = {"parts": self._system}
        if not self._contents:
            raise InvalidRequest("`messages` hold nothing to send", param="messages")

    def _name_lost(self, message: Json, role: Any) -> None:
        for name, value in message.items():
            if name not in MESSAGE_MEMBERS and value and not (name == "name" and role == "tool"):
                self._translation.drop(f"messages.{name}")

    def _append(self, role: str, parts: list[Json]) -> None:
        if parts and self._contents and self._contents[-1]["role"] == role:
            self._contents[-1]["parts"].extend(parts)
        elif parts:
            self._contents.append({"role": role, "parts": parts})

    def _instruct(self, message: Json, where: str) -> None:
        """Only leading instructions can be instructions; later ones are folded into the user's text."""
        parts = self._parts(message.get("content"), where)
        if self._contents:
            self._append("user", parts)
        else:
            self._system.extend(parts)

    def _google(self, holder: Json, where: str) -> Json:
        where += ".extra_content"
        google = want_object(holder.get("extra_content") or {}, where).get("google") or {}
        google = want_object(google, f"{where}.google")
        want_text(google.get("thought_signature") or "", f"{where}.google.thought_signature")
        for at, part in enumerate(want_list(google.get("parts") or [], f"{where}.google.parts")):
            want_object(part, f"{where}.google.parts[{at}]")
        return google

    def _assistant(self, message: Json, where: str) -> list[Json]:
        google = self._google(message, where)
        parts: list[Json] = list(google.get("parts") or ())
        self._remember(message, parts, where)
        text = self._parts(message.get("content"), where)
        if isinstance(message.get("refusal"), str):
            text += [{"text": message["refusal"]}]
        signature = google.get("thought_signature") or message.get("thought_signature")
        calls = self._tool_calls(message, where, None if text else signature)
        if text and signature:
            text[-1] = {**text[-1], "thoughtSignature": signature}
        elif signature and not calls:
            text = [{"text": "", "thoughtSignature": signature}]
        for at, image in enumerate(want_list(message.get("images") or [], f"{where}.images")):
            text += self._image(image, f"{where}.images[{at}]")
        return parts + text + calls

    def _remember(self, message: Json, parts: list[Json], where: str) -> None:
        """Give reasoning back as a thought, unless a signed thought among the opaque parts already is it."""
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if not isinstance(reasoning, str) or not reasoning or any(part.get("thought") for part in parts):
            return
        if self._family.thinks:
            parts.insert(0, {"text": reasoning, "thought": True})
        else:
            self._translation.drop("messages.reasoning_content")

    def _tool_calls(self, message: Json, where: str, signature: Any) -> list[Json]:
        parts: list[Json] = []
        kept = self._translation.names.get("signatures") or {}
        for at, call in enumerate(want_list(message.get("tool_calls") or [], f"{where}.tool_calls")):
            inside = f"{where}.tool_calls[{at}]"
            call = want_object(call, inside)
            part = {"functionCall": self._call(call, inside)}
            own = self._google(call, inside).get("thought_signature") or kept.get(call.get("id"))
            own = own or (signature if not parts else None)
            if own is None and not parts and self._family.needs_signatures:
                own = SIGNATURE_DUMMY
            parts.append({**part, "thoughtSignature": own} if own else part)
        return parts

    def _call(self, call: Json, where: str) -> Json:
        if call.get("type") == "custom":
            custom = want_object(call.get("custom"), f"{where}.custom")
            name, args = custom.get("name"), {"input": custom.get("input") or ""}
        else:
            function = want_object(call.get("function"), f"{where}.function")
            name, args = function.get("name"), read_arguments(function.get("arguments"))
        name = self._fit(want_text(name, f"{where}.function.name"))
        key = call.get("id")
        written: Json = {"name": name, "args": args}
        if isinstance(key, str) and key:
            self._calls[key] = (len(self._calls), name)
            if self._dialect.sends_call_ids and self._family.needs_signatures:
                written["id"] = key
        return written

    def _tool(self, message: Json, where: str) -> None:
        key = message.get("tool_call_id")
        key = key if isinstance(key, str) else ""
        order, name = self._calls.get(key, (len(self._calls), message.get("name")))
        if not isinstance(name, str):
            where += ".tool_call_id"
            raise InvalidRequest(f"`{where}` answers no tool call before it", param=where)
        content = message.get("content")
        parts = self._parts(content, where) if isinstance(content, list) else []
        text = "".join(part["text"] for part in parts if "text" in part) if parts else content
        answer: Json = {"name": self._fit(name), "response": self._response(text, bool(message.get("is_error")))}
        if key in self._calls and self._dialect.sends_call_ids and self._family.needs_signatures:
            answer["id"] = key
        media = [part for part in parts if "text" not in part]
        inside = [part for part in media if self._fits_result(part)]
        if inside:
            answer["parts"] = inside
        self._results.append((order, {"functionResponse": answer}, [part for part in media if part not in inside]))

    def _fits_result(self, part: Json) -> bool:
        return self._family.media_results and part.get("inlineData", {}).get("mimeType") in RESULT_MEDIA

    def _response(self, text: Any, is_error: bool) -> Json:
        text = text if isinstance(text, str) else "" if text is None else dump_json(text).decode()
        value = load_object(text)
        if is_error:
            return {"error": text}
        if value is None:
            return {"output": text}
        return {"output": value} if value.keys() & {"output", "error"} else value  # Gemini reads these two names itself

    def _flush_results(self) -> None:
        """Put parallel results in the order of their calls, media that cannot travel inside them after."""
        results = sorted(self._results, key=lambda result: result[0])
        self._append("user", [part for _, part, _ in results] + [part for *_, media in results for part in media])
        self._results = []

    # -- content parts

    def _parts(self, content: Any, where: str) -> list[Json]:
        if content is None or content == "":
            return []
        if isinstance(content, str):
            return [{"text": content}]
        parts = []
        for at, part in enumerate(want_list(content, f"{where}.content")):
            inside = f"{where}.content[{at}]"
            part = {"type": "text", "text": part} if isinstance(part, str) else want_object(part, inside)
            reader = self.PARTS.get(str(part.get("type")))
            if "cache_control" in part:
                self._translation.drop("cache_control")
            if reader is None:
                self._translation.drop(f"content.{part.get('type')}")
                continue
            beside = {camel_case(name): value for name, value in self._google(part, inside).items()}
            parts += [{**written, **beside} for written in reader(self, part, inside)]
        return parts

    def _text(self, part: Json, where: str) -> list[Json]:
        text = want_text(part.get("text", part.get("refusal")), f"{where}.text")
        return [{"text": text}] if text else []

    def _image(self, part: Json, where: str) -> list[Json]:
        part = want_object(part, where)
        kind = str(part.get("type") or "image_url")
        image = part.get(kind) or part.get("image_url")
        image = {"url": image} if isinstance(image, str) else want_object(image, f"{where}.{kind}")
        if image.get("detail") not in (None, "auto"):
            self._translation.drop(f"content.{kind}.detail")
        written = self._address(want_text(image.get("url"), f"{where}.{kind}.url"), None, kind, where)
        google = self._google(part, where)
        if written and google.get("thought_signature"):
            written[0]["thoughtSignature"] = google["thought_signature"]
        return written

    def _audio(self, part: Json, where: str) -> list[Json]:
        audio = want_object(part.get("input_audio"), f"{where}.input_audio")
        data = want_text(audio.get("data"), f"{where}.input_audio.data")
        kind = want_text(audio.get("format"), f"{where}.input_audio.format").lower()
        return [{"inlineData": {"mimeType": MEDIA_TYPES.get(kind, f"audio/{kind}"), "data": data}}]

    def _file(self, part: Json, where: str) -> list[Json]:
        kind = part["type"]
        file = part.get(kind)
        file = part if file is None else want_object(file, f"{where}.{kind}")
        name = file.get("filename") or ""
        named = file.get("mime_type") or media_type_of(want_text(name, f"{where}.{kind}.filename"))
        if file.get("file_data") is not None:
            return self._file_data(want_text(file["file_data"], f"{where}.{kind}.file_data"), named, f"{where}.{kind}")
        address = want_text(file.get("file_url") or file.get("file_id"), f"{where}.{kind}.file_url")
        if address.startswith("files/"):
            address = GOOGLE_FILES + address
        return self._address(address, named, kind, where)

    def _file_data(self, data: str, named: str | None, where: str) -> list[Json]:
        if data.startswith("data:"):
            kind, data = read_data_uri(data, f"{where}.file_data")
            named = kind if kind != "application/octet-stream" else named
        if named is None:
            raise InvalidRequest(f"`{where}.file_data` must be a data URI that names its media type", param=where)
        return [{"inlineData": {"mimeType": named, "data": data}}]

    def _address(self, url: str, kind: str | None, what: str, where: str) -> list[Json]:
        """Pass a file on by its address where Gemini fetches such addresses: Stockyard itself never does."""
        if url.startswith("data:"):
            kind, data = read_data_uri(url, f"{where}.{what}")
            return [{"inlineData": {"mimeType": kind, "data": data}}]
        if YOUTUBE_URL.match(url):
            return [{"fileData": {"fileUri": url, "mimeType": kind or "video/mp4"}}]
        kind = kind or media_type_of(url)
        if GOOGLE_FILE_URL.match(url) and self._dialect.google_files:
            return [{"fileData": {"fileUri": url, **({"mimeType": kind} if kind else {})}}]
        if why := self._refusal(url, kind):
            self._translation.drop(f"content.{what}", why)
            return []
        return [{"fileData": {"fileUri": url, "mimeType": kind}}]

    def _refusal(self, url: str, kind: str | None) -> str:
        """Why an address cannot be passed on; empty where it can."""
        if url.startswith("gs://") and not self._dialect.bucket_files:
            return "only Vertex AI reads gs:// addresses"
        if not url.startswith(("https://", "gs://")):
            return "the file must be sent inline, as a data URI"
        if url.startswith("https://") and not (self._dialect.web_files or self._family.web_files):
            return "this model fetches no addresses; send the file inline, as a data URI"
        return "" if kind else "its media type cannot be told from the address; send it inline, as a data URI"

    # -- tools

    def _fit(self, name: str) -> str:
        """A function name as Gemini takes it; `names["gemini_tools"]` lets the decoder put the original back."""
        if name not in self._fitted:
            fit = name
            if not FUNCTION_NAME.match(name):
                fit = re.sub(r"[^A-Za-z0-9_.:-]", "_", name)[:60]
                fit = fit if re.match(r"[A-Za-z_]", fit) else f"_{fit}"
                while fit in self._fitted.values():
                    fit += "_"
                self._translation.names.setdefault("gemini_tools", {})[fit] = name
            self._fitted[name] = fit
        return self._fitted[name]

    def _write_tools(self) -> None:
        functions: list[Json] = []
        native: list[Json] = []
        strict = []
        for at, tool in enumerate(want_list(self._request.get("tools") or [], "tools")):
            where = f"tools[{at}]"
            tool = want_object(tool, where)
            if "cache_control" in tool:
                self._translation.drop("cache_control")
            kind = tool.get("type") or ("function" if "function" in tool else None)
            if kind == "function":
                function = want_object(tool.get("function"), f"{where}.function")
                functions.append(self._declare(function, f"{where}.function"))
                strict.append(function.get("strict") is True)
            elif kind == "custom":
                functions.append(self._declare_custom(want_object(tool.get("custom"), f"{where}.custom"), where))
                strict.append(False)
            elif kind == "native" and tool.get("dialect") == "gemini":
                native += self._native(want_object(tool.get("tool"), f"{where}.tool"))
            else:
                self._translation.drop(f"tools.{self._tool_name(tool)}")
        tools = [{"functionDeclarations": functions}] if functions else []
        if tools + native:
            self._body["tools"] = tools + native
        self._choose(functions, bool(strict) and all(strict))

    def _tool_name(self, tool: Json) -> str:
        inner = tool.get("tool")
        return str(inner.get("type") or next(iter(inner), "")) if isinstance(inner, dict) else str(tool.get("type"))

    def _native(self, tool: Json) -> list[Json]:
        kept = {}
        for name, value in google_object(tool, "tools.tool").items():
            if f"tools.{name}" in self._dialect.refused:
                self._translation.drop(f"tools.{name}")
            else:
                kept[name] = value
        return [kept] if kept else []

    def _declare(self, function: Json, where: str) -> Json:
        declaration: Json = {"name": self._fit(want_text(function.get("name"), f"{where}.name"))}
        if function.get("description"):
            declaration["description"] = function["description"]
        schema = want_object(function.get("parameters") or {}, f"{where}.parameters")
        if schema.get("properties") or schema.keys() - {"type", "properties", "required", "additionalProperties"}:
            self._write_schema(declaration, schema, "parametersJsonSchema", "parameters", "tools.parameters")
        where = "extra_body.gemini.functionDeclarations"
        kept = want_object(self._extras_of("gemini").get("functionDeclarations") or {}, where)
        return {**declaration, **want_object(kept.get(function["name"]) or {}, where)}

    def _declare_custom(self, custom: Json, where: str) -> Json:
        """A tool of free text becomes a function of one text; the decoder turns its calls back."""
        name = want_text(custom.get("name"), f"{where}.custom.name")
        if (custom.get("format") or {"type": "text"}) != {"type": "text"}:
            self._translation.drop("tools.custom.format")
        self._translation.names.setdefault("gemini_custom", set()).add(name)
        schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
        return self._declare({"name": name, "description": custom.get("description"), "parameters": schema}, where)

    def _write_schema(self, holder: Json, schema: Json, whole: str, subset: str, where: str) -> None:
        def drop(keyword: str) -> None:
            self._translation.drop(f"{where}.{keyword}", "Gemini's schemas do not know it")

        name = whole if self._family.json_schema else subset
        holder[name] = SchemaWriter(schema, self._family.json_schema, drop).write(schema)

    def _choose(self, functions: list[Json], strict: bool) -> None:
        choice = self._request.get("tool_choice")
        if not functions:
            if choice not in (None, "auto", "none"):
                self._translation.drop("tool_choice")
            return
        mode, names = self._mode(choice)
        if mode == "AUTO" and (names or (strict and self._family.validated)):
            mode = "VALIDATED"
        elif strict and mode == "AUTO":
            self._translation.drop("tools.strict")
        if mode == "AUTO" and choice is None:
            return
        config: Json = {"mode": mode}
        if names:
            config["allowedFunctionNames"] = [self._fit(name) for name in names]
        self._body["toolConfig"] = {"functionCallingConfig": config}

    def _mode(self, choice: Any) -> tuple[str, list[str]]:
        if choice is None or isinstance(choice, str):
            mode = {None: "AUTO", "auto": "AUTO", "none": "NONE", "required": "ANY", "any": "ANY"}.get(choice)
            if mode is None:
                raise InvalidRequest("`tool_choice` must be auto, none, required, or an object", param="tool_choice")
            return mode, []
        choice = want_object(choice, "tool_choice")
        kind = choice.get("type")
        if kind == "allowed_tools":
            allowed = want_object(choice.get("allowed_tools"), "tool_choice.allowed_tools")
            tools = want_list(allowed.get("tools"), "tool_choice.allowed_tools.tools")
            names = [self._chosen(want_object(tool, "tool_choice.allowed_tools.tools")) for tool in tools]
            return ("ANY" if allowed.get("mode") == "required" else "AUTO"), names
        return "ANY", [self._chosen(choice)]

    def _chosen(self, choice: Json) -> str:
        inner = choice.get(str(choice.get("type") or "function"))
        return want_text(inner.get("name") if isinstance(inner, dict) else None, "tool_choice.function.name")

    # -- generation

    def _write_thinking(self) -> None:
        reasoning = self._request.get("reasoning") or {}
        reasoning = want_object(reasoning, "reasoning")
        effort = self._request.get("reasoning_effort") or reasoning.get("effort")
        budget = reasoning.get("max_tokens")
        asked = effort or budget or reasoning.get("enabled") or self._request.get("include_reasoning")
        if not asked:
            return
        if not self._family.thinks:
            self._translation.drop("reasoning_effort" if self._request.get("reasoning_effort") else "reasoning")
            return
        if effort and str(effort) not in GEMINI_EFFORTS:
            known = ", ".join(GEMINI_EFFORTS)
            raise InvalidRequest(f"`reasoning_effort` must be one of {known}", param="reasoning_effort")
        thinking = self._thinking(effort, want_whole(budget, "reasoning.max_tokens") if budget else None)
        if effort != "none" and not reasoning.get("exclude") and self._request.get("include_reasoning") is not False:
            thinking["includeThoughts"] = True
        self._config["thinkingConfig"] = thinking

    def _thinking(self, effort: str | None, budget_tokens: int | None) -> Json:
        """The level or the budget, never both: that is a 400."""
        if effort is None and budget_tokens is None:
            return {}
        if budget_tokens is None:
            level, budget_tokens = GEMINI_EFFORTS[effort or "medium"]
        else:
            level = next(level for level, most in GEMINI_EFFORTS.values() if budget_tokens <= most or most == 32768)
        if self._family.budget_tokens is None:
            return {"thinkingLevel": level if level in self._family.levels else self._family.levels[0]}
        if budget_tokens == 0 and self._family.can_stop_thinking:
            return {"thinkingBudget": 0}
        lowest, highest = self._family.budget_tokens
        return {"thinkingBudget": min(max(budget_tokens, lowest), highest)}

    def _stop(self, value: Any) -> None:
        stops = [value] if isinstance(value, str) else want_texts(value, "stop")
        if len(stops) > 5:
            self._translation.drop("stop[5:]", "Gemini takes five at most")
        if stops:
            self._config["stopSequences"] = stops[:5]

    def _choices(self, value: Any) -> None:
        if value != 1:
            self._config["candidateCount"] = value

    def _parallel(self, value: Any) -> None:
        if value is False:
            self._translation.drop("parallel_tool_calls")

    def _format(self, value: Any) -> None:
        kind = want_object(value, "response_format").get("type")
        if kind not in ("json_object", "json_schema"):
            return
        if "tools" in self._body and not self._family.json_with_tools:
            self._translation.drop("response_format", "this model takes no JSON format beside tools")
            return
        self._config["responseMimeType"] = "application/json"
        if kind == "json_schema":
            wrapper = want_object(value.get("json_schema"), "response_format.json_schema")
            schema = want_object(wrapper.get("schema") or {}, "response_format.json_schema.schema")
            if wrapper.get("description"):
                schema = {"description": wrapper["description"], **schema}
            self._write_schema(self._config, schema, "responseJsonSchema", "responseSchema", "response_format")

    def _modalities(self, value: Any) -> None:
        names = [name.upper() for name in want_texts(value, "modalities")]
        if names != ["TEXT"]:
            self._config["responseModalities"] = names

    def _voice(self, value: Any) -> None:
        audio = want_object(value, "audio")
        if audio.get("voice"):
            voice = {"prebuiltVoiceConfig": {"voiceName": audio["voice"]}}
            self._config["speechConfig"] = {"voiceConfig": voice}
        if audio.get("format") not in (None, "pcm16"):
            self._translation.drop("audio.format")

    def _tier(self, value: Any) -> None:
        tier = {"default": "standard", "standard": "standard", "flex": "flex", "priority": "priority"}.get(str(value))
        if tier:
            self._body["serviceTier"] = tier
        elif value != "auto":
            self._translation.drop("service_tier")

    def _labels(self, value: Any) -> None:
        """Vertex bills by labels; the Developer API knows none."""
        name, labels = ("metadata", value) if isinstance(value, dict) else ("user", {"user": value})
        fits = all(isinstance(item, str) and LABEL.match(item) for pair in labels.items() for item in pair)
        if self._dialect.labels and fits:
            self._body.setdefault("labels", {}).update(labels)
        else:
            self._translation.drop(name)

    def _store(self, value: Any) -> None:
        if value:
            self._translation.drop("store")

    def _safety(self, value: Any) -> None:
        self._body["safetySettings"] = value

    def _cached(self, value: Any) -> None:
        self._body["cachedContent"] = value

    # -- extras

    def _extras_of(self, dialect: str) -> Json:
        extra = want_object(self._request.get("extra_body") or {}, "extra_body")
        return want_object(extra.get(dialect) or {}, f"extra_body.{dialect}")

    def _write_extras(self, body: Json) -> None:
        """Merge what was said in Gemini's own words; name what was said in another dialect's."""
        for dialect in self._request.get("extra_body") or {}:
            members = self._extras_of(dialect)
            if dialect not in ("gemini", "google"):
                for name in members:
                    self._translation.drop(name)
                continue
            for path, value in dotted_members(members):
                if path in self._dialect.refused or path in ("contents", "model"):
                    self._translation.drop(path)
                elif path != "functionDeclarations":
                    set_dotted(body, path, value)
                    if path.startswith("generationConfig.thinkingConfig.thinking"):
                        self._keep_one(body["generationConfig"]["thinkingConfig"], path.rpartition(".")[2])

    def _keep_one(self, thinking: Json, name: str) -> None:
        thinking.pop("thinkingBudget" if name == "thinkingLevel" else "thinkingLevel", None)

    def _without_cached(self, body: Json) -> Json:
        """A cached content already holds instructions and tools: to repeat them is a 400."""
        for name, said in (("systemInstruction", "system"), ("tools", "tools"), ("toolConfig", "tool_choice")):
            if "cachedContent" in body and body.pop(name, None) is not None:
                self._translation.drop(said, "it must be part of the cached content")
        return body

    PARTS: ClassVar[Mapping[str, Callable[[GeminiEncoder, Json, str], list[Json]]]] = {
        "text": _text, "input_text": _text, "refusal": _text, "image_url": _image, "video_url": _image,
        "input_audio": _audio, "file": _file, "media": _file,
    }  # fmt: skip
    WRITERS: ClassVar[Mapping[str, Callable[[GeminiEncoder, Any], None]]] = {
        "stop": _stop, "n": _choices, "parallel_tool_calls": _parallel, "response_format": _format,
        "modalities": _modalities, "audio": _voice, "service_tier": _tier, "user": _labels, "metadata": _labels,
        "store": _store, "safety_settings": _safety, "cached_content": _cached,
    }  # fmt: skip


# generateContent answer -> canonical completion.


def read_gemini_call(part: Json, translation: Translation) -> Json:
    call = part["functionCall"]
    name = str(call.get("name") or "")
    name = (translation.names.get("gemini_tools") or {}).get(name, name)
    args = call.get("args") or {}
    result: Json = {"id": call.get("id") or translation.new_id("call_"), "type": "function"}
    if name in (translation.names.get("gemini_custom") or ()):
        given = args.get("input") if isinstance(args, dict) else None
        text = given if isinstance(given, str) else dump_json(args).decode()
        result.update(type="custom", custom={"name": name, "input": text})
    else:
        result["function"] = {"name": name, "arguments": dump_json(args).decode()}
    if part.get("thoughtSignature"):
        result["extra_content"] = {"google": {"thought_signature": part["thoughtSignature"]}}
    return result


def read_gemini_media(part: Json, message: Json, translation: Translation) -> None:
    blob = part["inlineData"]
    kind, data = str(blob.get("mimeType") or ""), blob.get("data") or ""
    if kind.startswith("audio/"):
        audio = message.setdefault("audio", {"id": translation.new_id("audio_"), "data": "", "transcript": ""})
        audio["data"] += data
        return
    image: Json = {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
    if part.get("thoughtSignature"):
        image["extra_content"] = {"google": {"thought_signature": part["thoughtSignature"]}}
    message.setdefault("images", []).append(image)


def read_gemini_citations(candidate: Json, text: str) -> list[Json]:
    """Grounding and citations as URL citations. Google counts bytes, so cited text is looked up instead."""
    grounding = candidate.get("groundingMetadata") or {}
    chunks = grounding.get("groundingChunks") or ()
    sources = [chunk.get("web") or chunk.get("retrievedContext") or {} for chunk in chunks]
    found = []
    for support in grounding.get("groundingSupports") or ():
        segment = (support.get("segment") or {}).get("text") or ""
        start = max(text.find(segment), 0)
        for at in support.get("groundingChunkIndices") or ():
            if isinstance(at, int) and 0 <= at < len(sources) and sources[at].get("uri"):
                found.append((sources[at], start, start + len(segment)))
    if not grounding.get("groundingSupports"):
        found += [(source, 0, 0) for source in sources if source.get("uri")]
    citations = candidate.get("citationMetadata") or {}
    for cited in citations.get("citations") or citations.get("citationSources") or ():
        if cited.get("uri"):
            found.append((cited, cited.get("startIndex") or 0, cited.get("endIndex") or 0))
    return [
        {"type": "url_citation", "url_citation": {
            "url": source["uri"], "title": source.get("title") or "", "start_index": start, "end_index": end,
        }}
        for source, start, end in found
    ]  # fmt: skip


def read_gemini_message(candidate: Json, translation: Translation) -> Json:
    """A candidate's parts as a canonical message, or as the delta of one event."""
    text, thoughts, calls = [], [], []
    message: Json = {}
    google: Json = {}
    opaque: list[Json] = []
    for part in (candidate.get("content") or {}).get("parts") or ():
        signature = part.get("thoughtSignature")
        if isinstance(part.get("functionCall"), dict):
            calls.append(read_gemini_call(part, translation))
        elif part.get("thought"):
            thoughts.append(part.get("text") or "")
            opaque += [part] if signature else []
        elif isinstance(part.get("text"), str):
            text.append(part["text"])
            google.update({"thought_signature": signature} if signature else {})
        elif isinstance(part.get("inlineData"), dict):
            read_gemini_media(part, message, translation)
        else:
            opaque.append(part)
    if opaque:
        google["parts"] = opaque
    if candidate.get("groundingMetadata"):
        google["grounding_metadata"] = candidate["groundingMetadata"]
    found = {"content": "".join(text), "reasoning_content": "".join(thoughts), "tool_calls": calls}
    message.update({name: value for name, value in found.items() if value})
    if google:
        message["extra_content"] = {"google": google}
    return message


def read_gemini_logprobs(candidate: Json) -> Json | None:
    result = candidate.get("logprobsResult")
    if not isinstance(result, dict):
        return None
    tops = result.get("topCandidates") or []
    content = []
    for at, chosen in enumerate(result.get("chosenCandidates") or ()):
        others = tops[at].get("candidates") or () if at < len(tops) else ()
        content.append({**read_gemini_token(chosen), "top_logprobs": [read_gemini_token(other) for other in others]})
    return {"content": content, "refusal": None}


def read_gemini_token(token: Json) -> Json:
    text = str(token.get("token") or "")
    written = list(text.encode("utf-8", "replace"))
    return {"token": text, "logprob": token.get("logProbability") or 0.0, "bytes": written}


def read_gemini_finish(candidate: Json, called: bool) -> str | None:
    """The canonical finish reason; UpstreamError where the model failed rather than ended."""
    reason = candidate.get("finishReason")
    if not reason or reason == "FINISH_REASON_UNSPECIFIED":
        return None
    if reason in GEMINI_FAILED:
        said = candidate.get("finishMessage") or "the model's answer is unusable"
        raise UpstreamError(f"the provider stopped with `{reason}`: {said}", code=f"upstream_{reason.lower()}")
    if reason == "MISSING_THOUGHT_SIGNATURE":
        said = "a tool call in the history lacks the `extra_content.google.thought_signature` it came with"
        raise UpstreamRefused(said, code="missing_thought_signature", param="messages")
    finish = GEMINI_FINISHES.get(reason, "stop")
    return "tool_calls" if finish == "stop" and called else finish


def modality_tokens(details: Any) -> dict[str, int]:
    """Tokens by modality; `details` is a list of {"modality", "tokenCount"}."""
    counts: dict[str, int] = {}
    for detail in details if isinstance(details, list) else ():
        detail = detail if isinstance(detail, dict) else {}
        name = str(detail.get("modality"))
        counts[name] = counts.get(name, 0) + _count(detail.get("tokenCount"))
    return counts


def read_gemini_usage(meta: Mapping[str, Any], searches: int = 0) -> Usage:
    """Read usageMetadata into disjoint buckets. Prompt counts include cached ones, candidates leave thoughts out."""
    prompt, cached = modality_tokens(meta.get("promptTokensDetails")), modality_tokens(meta.get("cacheTokensDetails"))
    output = modality_tokens(meta.get("candidatesTokensDetails"))
    cached_total, thoughts = _count(meta.get("cachedContentTokenCount")), _count(meta.get("thoughtsTokenCount"))
    audio, image = (max(0, prompt.get(name, 0) - cached.get(name, 0)) for name in ("AUDIO", "IMAGE"))
    total = _count(meta.get("promptTokenCount")) + _count(meta.get("toolUsePromptTokenCount"))
    audio_out, image_out = output.get("AUDIO", 0), output.get("IMAGE", 0)
    return Usage(
        input_tokens=max(0, total - cached_total - audio - image),
        cached_tokens=max(0, cached_total - cached.get("AUDIO", 0)),
        output_tokens=max(0, _count(meta.get("candidatesTokenCount")) - audio_out - image_out) + thoughts,
        reasoning_tokens=thoughts,
        input_audio_tokens=audio,
        cached_audio_tokens=cached.get("AUDIO", 0),
        output_audio_tokens=audio_out,
        input_image_tokens=image,
        output_image_tokens=image_out,
        searches=searches,
    )


def count_searches(candidates: Any, model: str) -> int:
    total = 0
    with contextlib.suppress(AttributeError, TypeError):  # a count must not fail the call it is about
        total = sum(
            len((item.get("groundingMetadata") or {}).get("webSearchQueries") or ()) for item in candidates or ()
        )
    return total if gemini_family(model).counts_queries else min(total, 1)


def write_gemini_canonical_usage(usage: Usage) -> Json:
    written = write_openai_usage(usage)
    if usage.searches:
        written["num_search_queries"] = usage.searches
    return written


@contextlib.contextmanager
def google_shape() -> Iterator[None]:
    """Answers are read without checks, as Google documents them; where one strays, this says so."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, InvalidRequest):
        raise UpstreamError("the provider's answer has another shape", code="upstream_malformed") from None


class GoogleEvents:
    """Reads Google's event stream; a broken one may end in bare JSON, and the wrong door answers nothing else."""

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, data: bytes) -> list[bytes]:
        *blocks, self._tail = (self._tail + data).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._tail) > SSE_MAX_EVENT_BYTES:
            raise UpstreamError("the provider sent an event without end", code="upstream_malformed")
        return [payload for block in blocks if (payload := self._payload(block))]

    def close(self) -> list[bytes]:
        tail, self._tail = self._tail, b""
        return [payload] if (payload := self._payload(tail)) else []

    def _payload(self, block: bytes) -> bytes:
        event = parse_sse_block(block.removeprefix(b"\xef\xbb\xbf").strip(b"\n"))
        if event:
            return event[1]
        bare = block.strip()
        return bare if bare[:1] in (b"{", b"[") else b""


class GeminiDecoder:
    """Reads a stream of partial answers. Ends are held until `close`: some models repeat their finishReason."""

    def __init__(self, dialect: GeminiGenerate, translation: Translation) -> None:
        self._dialect, self._translation = dialect, translation
        self._events = GoogleEvents()
        self._id, self._model = "", translation.model
        self._calls: dict[int, int] = {}  # candidate -> calls seen
        self._text: dict[int, list[str]] = {}
        self._finish: dict[int, str] = {}
        self._grounded: dict[int, Json] = {}
        self._usage: Json | None = None
        self.complete = self._closed = False

    def feed(self, data: bytes) -> list[Json]:
        return [chunk for payload in self._events.feed(data) for chunk in self._read(payload)]

    def close(self) -> list[Json]:
        if self._closed:
            return []
        self._closed = True
        chunks = [chunk for payload in self._events.close() for chunk in self._read(payload)]
        for index, reason in sorted(self._finish.items()):
            with google_shape():
                text = "".join(self._text.get(index, ()))
                annotations = read_gemini_citations(self._grounded.get(index, {}), text)
            chunks.append(self._chunk(index, {"annotations": annotations} if annotations else {}, reason))
        if self._usage is not None:
            searches = count_searches(self._grounded.values(), self._translation.model)
            usage = write_gemini_canonical_usage(read_gemini_usage(self._usage, searches))
            chunks.append({**self._frame(), "choices": [], "usage": usage})
        return chunks

    def _read(self, payload: bytes) -> list[Json]:
        events = read_event_json(b'{"all":%b}' % payload)["all"]
        with google_shape():
            chunks = [chunk for event in google_list(events, "") for chunk in self._read_event(event)]
        self.complete = bool(self._finish) and self._finish.keys() >= self._calls.keys()
        return chunks

    def _read_event(self, event: Json) -> list[Json]:
        refuse_error_event(event, self._dialect)
        self._id = self._id or event.get("responseId") or ""
        self._model = event.get("modelVersion") or self._model
        if isinstance(event.get("usageMetadata"), dict):
            self._usage = event["usageMetadata"]
        chunks = [chunk for item in event.get("candidates") or () for chunk in self._read_candidate(item)]
        if (event.get("promptFeedback") or {}).get("blockReason") and not self._calls:
            chunks += self._open(0)
            self._finish[0] = "content_filter"
        return chunks

    def _open(self, index: int) -> list[Json]:
        if index in self._calls:
            return []
        self._calls[index] = 0
        return [self._chunk(index, {"role": "assistant", "content": ""}, None)]

    def _read_candidate(self, candidate: Json) -> list[Json]:
        index = candidate.get("index") or 0
        chunks = self._open(index)
        delta = read_gemini_message(candidate, self._translation)
        for call in delta.get("tool_calls") or ():
            call["index"] = self._calls[index]
            self._calls[index] += 1
        self._text.setdefault(index, []).append(delta.get("content") or "")
        grounding = {name: candidate[name] for name in ("groundingMetadata", "citationMetadata") if candidate.get(name)}
        if grounding:
            self._grounded[index] = {**self._grounded.get(index, {}), **grounding}
        logprobs = read_gemini_logprobs(candidate)
        if delta or logprobs:
            chunks.append(self._chunk(index, delta, None))
            if logprobs:
                chunks[-1]["choices"][0]["logprobs"] = logprobs
        reason = read_gemini_finish(candidate, self._calls[index] > 0)
        if reason:
            self._finish[index] = reason
        elif self._finish.get(index) == "stop" and self._calls[index]:
            self._finish[index] = "tool_calls"
        return chunks

    def _frame(self) -> Json:
        self._id = self._id or self._translation.new_id("chatcmpl-")
        now_s = self._translation.now_s
        return {"id": self._id, "object": "chat.completion.chunk", "created": now_s, "model": self._model}

    def _chunk(self, index: int, delta: Json, reason: str | None) -> Json:
        return {**self._frame(), "choices": [{"index": index, "delta": delta, "finish_reason": reason}]}


# Client side: generateContent body -> canonical request.

GEMINI_READ: Final[Mapping[str, tuple[str, Callable[[Any, str], Any]]]] = {
    "maxOutputTokens": ("max_completion_tokens", want_whole), "temperature": ("temperature", want_number),
    "topP": ("top_p", want_number), "topK": ("top_k", want_whole), "candidateCount": ("n", want_whole),
    "stopSequences": ("stop", want_texts), "seed": ("seed", want_whole), "logprobs": ("top_logprobs", want_whole),
    "presencePenalty": ("presence_penalty", want_number), "frequencyPenalty": ("frequency_penalty", want_number),
    "responseLogprobs": ("logprobs", want_flag),
}  # fmt: skip
PART_DATA: Final = frozenset({
    "text", "thought", "thoughtSignature", "inlineData", "fileData", "functionCall", "functionResponse",
})  # fmt: skip


class GeminiParser:
    """Reads one client's body. One object a request: it pairs results with calls on the way."""

    def __init__(self, body: Json, model: str) -> None:
        self._body = google_object(body, "body")
        self._model = model
        self._messages: list[Json] = []
        self._extra: Json = {}
        self._pending: list[tuple[str, str]] = []  # id, name of calls not yet answered

    def parse(self) -> Json:
        body = self._body
        if "contents" not in body:
            raise InvalidRequest("`contents` must be a non-empty array", param="contents")
        if "systemInstruction" in body:
            self._system(body["systemInstruction"])
        contents = google_list(body["contents"], "contents")
        for at, content in enumerate(contents):
            self._content(content, at)
        if not any(message["role"] != "system" for message in self._messages):
            raise InvalidRequest("`contents` must hold a part", param="contents")
        request: Json = {"model": self._model, "messages": self._messages}
        self._tools(request)
        self._generation(request)
        self._rest(request)
        if self._extra:
            request["extra_body"] = {"gemini": self._extra}
        return request

    # -- contents

    def _system(self, value: Any) -> None:
        if isinstance(value, str):
            value = {"parts": [{"text": value}]}
        parts = google_list(google_object(value, "systemInstruction").get("parts") or [], "systemInstruction.parts")
        texts = []
        for at, part in enumerate(parts):
            where = f"systemInstruction.parts[{at}]"
            texts.append(want_text(google_object(part, where).get("text"), f"{where}.text"))
        if texts:
            self._messages.append({"role": "system", "content": "\n\n".join(texts)})

    def _content(self, value: Any, turn: int) -> None:
        where = f"contents[{turn}]"
        content = {"parts": [{"text": value}]} if isinstance(value, str) else google_object(value, where)
        role = content.get("role") or "user"
        parts = google_list(content.get("parts") or [], f"{where}.parts")
        parts = [google_object(part, f"{where}.parts[{at}]") for at, part in enumerate(parts)]
        if role == "model":
            self._model_turn(parts, where, turn)
        elif role in ("user", "function", "tool"):
            self._user_turn(parts, where)
        else:
            raise InvalidRequest(f"`{where}.role` must be user or model", param=f"{where}.role")

    def _user_turn(self, parts: list[Json], where: str) -> None:
        content: list[Json] = []
        opaque: list[Json] = []
        for at, part in enumerate(parts):
            inside = f"{where}.parts[{at}]"
            if "functionResponse" in part:
                self._messages.append(self._result(part["functionResponse"], inside))
            elif (read := self._part(part, inside)) is not None:
                content.append(read)
            else:
                opaque.append(part)
        if not content and not opaque:
            return
        plain = len(content) == 1 and content[0].keys() == {"type", "text"} and not opaque
        message: Json = {"role": "user", "content": content[0]["text"] if plain else content}
        if opaque:
            message["extra_content"] = {"google": {"parts": opaque}}
        self._messages.append(message)

    def _part(self, part: Json, where: str) -> Json | None:
        """One user part; None for one that only Gemini knows. What stands beside its data stays with it."""
        if "text" in part:
            read: Json = {"type": "text", "text": want_text(part["text"], f"{where}.text")}
        elif "inlineData" in part:
            read = self._inline(part["inlineData"], f"{where}.inlineData")
        elif "fileData" in part:
            read = self._file(part["fileData"], f"{where}.fileData")
        elif not part:
            raise InvalidRequest(f"`{where}` must hold text, inlineData, fileData or functionResponse", param=where)
        else:
            return None
        beside = {name: value for name, value in part.items() if name not in PART_DATA}
        return {**read, "extra_content": {"google": beside}} if beside else read

    def _inline(self, value: Any, where: str) -> Json:
        blob = google_object(value, where)
        kind = want_text(blob.get("mimeType"), f"{where}.mimeType").lower()
        data = standard_base64(want_text(blob.get("data"), f"{where}.data"))
        family, _, form = kind.partition("/")
        if family == "image":
            return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
        if family == "audio":
            form = {"mpeg": "mp3", "x-wav": "wav", "wave": "wav"}.get(form, form)
            return {"type": "input_audio", "input_audio": {"data": data, "format": form}}
        name = blob.get("displayName") or f"file.{form.rpartition('.')[2] or 'bin'}"
        part_type = "media" if family == "video" else "file"
        return {"type": part_type, part_type: {"file_data": f"data:{kind};base64,{data}", "filename": name}}

    def _file(self, value: Any, where: str) -> Json:
        file = google_object(value, where)
        uri = want_text(file.get("fileUri"), f"{where}.fileUri")
        kind = want_text(file.get("mimeType") or "", f"{where}.mimeType")
        if kind.startswith("image/") and uri.startswith("https://") and not GOOGLE_FILE_URL.match(uri):
            return {"type": "image_url", "image_url": {"url": uri}}
        part_type = "media" if kind.startswith("video/") or YOUTUBE_URL.match(uri) else "file"
        return {"type": part_type, part_type: {"file_url": uri, **({"mime_type": kind} if kind else {})}}

    def _model_turn(self, parts: list[Json], where: str, turn: int) -> None:
        self._pending = []
        message: Json = {"role": "assistant", "content": None}
        google: Json = {}
        blocks: list[Json] = []
        for at, part in enumerate(parts):
            self._model_part(part, message, google, blocks, f"{where}.parts[{at}]", turn)
        if google:
            message["extra_content"] = {"google": google}
        if blocks:
            message["thinking_blocks"] = blocks
        if len(message) > 2 or message["content"]:
            self._messages.append(message)

    def _model_part(self, part: Json, message: Json, google: Json, blocks: list[Json], where: str, turn: int) -> None:
        signature = want_text(part.get("thoughtSignature", ""), f"{where}.thoughtSignature")
        packed = unpack_blocks(signature, f"{where}.thoughtSignature") if signature else None
        if packed is not None:
            blocks += packed
            signature = ""
        if "functionCall" in part:
            calls = message.setdefault("tool_calls", [])
            calls.append(self._call(part["functionCall"], signature, where, f"call_{turn}_{len(calls)}"))
        elif part.get("thought"):
            text = want_text(part.get("text", ""), f"{where}.text")
            message["reasoning_content"] = message.get("reasoning_content", "") + text
            if signature:
                google.setdefault("parts", []).append(part)
        elif "text" in part:
            message["content"] = (message["content"] or "") + want_text(part["text"], f"{where}.text")
            if signature:
                google["thought_signature"] = signature
        elif "inlineData" in part and (image := self._inline(part["inlineData"], where))["type"] == "image_url":
            if signature:
                image["extra_content"] = {"google": {"thought_signature": signature}}
            message.setdefault("images", []).append(image)
        else:
            google.setdefault("parts", []).append(part)

    def _call(self, value: Any, signature: str, where: str, minted: str) -> Json:
        call = google_object(value, f"{where}.functionCall")
        name = want_text(call.get("name"), f"{where}.functionCall.name")
        args = want_object(call.get("args") or {}, f"{where}.functionCall.args")
        key = want_text(call.get("id") or minted, f"{where}.functionCall.id")
        self._pending.append((key, name))
        read: Json = {"id": key, "type": "function", "function": {"name": name, "arguments": dump_json(args).decode()}}
        if signature:
            read["extra_content"] = {"google": {"thought_signature": signature}}
        return read

    def _result(self, value: Any, where: str) -> Json:
        where += ".functionResponse"
        answer = google_object(value, where)
        name = want_text(answer.get("name", ""), f"{where}.name")
        key = self._answered(want_text(answer.get("id", ""), f"{where}.id"), name, where)
        response = want_object(answer.get("response") or {}, f"{where}.response")
        text, is_error = self._unwrap(response)
        message: Json = {"role": "tool", "tool_call_id": key, "content": text}
        media = []
        for at, part in enumerate(google_list(answer.get("parts") or [], f"{where}.parts")):
            read = self._part(google_object(part, f"{where}.parts[{at}]"), f"{where}.parts[{at}]")
            media += [read] if read else []
        if media:
            message["content"] = [{"type": "text", "text": text}, *media]
        if is_error:
            message["is_error"] = True
        return message

    def _unwrap(self, response: Json) -> tuple[str, bool]:
        """The text of a result; Gemini reads a lone `output` or `error` as the result itself."""
        if len(response) == 1:
            name, value = next(iter(response.items()))
            if name in ("output", "result", "error"):
                return value if isinstance(value, str) else dump_json(value).decode(), name == "error"
        return dump_json(response).decode(), False

    def _answered(self, key: str, name: str, where: str) -> str:
        """The id of the call that a result answers: by its id, else the first open call of that name."""
        matches = [call for call in self._pending if call[0] == key] if key else []
        matches = matches or [call for call in self._pending if call[1] == name]
        if not matches:
            raise InvalidRequest(f"`{where}` answers no functionCall of the model's turn before it", param=where)
        self._pending.remove(matches[0])
        return matches[0][0]

    # -- tools

    def _tools(self, request: Json) -> None:
        tools: list[Json] = []
        for at, tool in enumerate(google_list(self._body.get("tools") or [], "tools")):
            where = f"tools[{at}]"
            for name, value in google_object(tool, where).items():
                if name == "functionDeclarations":
                    functions = google_list(value, f"{where}.{name}")
                    tools += [self._function(item, f"{where}.{name}[{n}]") for n, item in enumerate(functions)]
                else:
                    tools.append({"type": "native", "dialect": "gemini", "tool": {name: value}})
        if tools:
            request["tools"] = tools
        config = google_object(self._body.get("toolConfig") or {}, "toolConfig")
        calling = config.pop("functionCallingConfig", None)
        self._extra.update({f"toolConfig.{name}": value for name, value in config.items()})
        if calling is not None and any(tool["type"] == "function" for tool in tools):
            self._calling(google_object(calling, "toolConfig.functionCallingConfig"), request)

    def _function(self, value: Any, where: str) -> Json:
        declaration = google_object(value, where)
        name = want_text(declaration.pop("name", None), f"{where}.name")
        function: Json = {"name": name}
        if "description" in declaration:
            function["description"] = want_text(declaration.pop("description"), f"{where}.description")
        subset, whole = declaration.pop("parameters", None), declaration.pop("parametersJsonSchema", None)
        if whole is not None:
            function["parameters"] = want_object(whole, f"{where}.parametersJsonSchema")
        else:
            empty = {"type": "object", "properties": {}}
            function["parameters"] = read_openapi_schema(subset, f"{where}.parameters") if subset else empty
        if declaration:
            self._extra.setdefault("functionDeclarations", {})[name] = declaration
        return {"type": "function", "function": function}

    def _calling(self, calling: Json, request: Json) -> None:
        where = "toolConfig.functionCallingConfig"
        mode = want_text(calling.pop("mode", "AUTO"), f"{where}.mode").upper()
        names = want_texts(calling.pop("allowedFunctionNames", []), f"{where}.allowedFunctionNames")
        self._extra.update({f"{where}.{name}": value for name, value in calling.items()})
        plain = {"MODE_UNSPECIFIED": "auto", "AUTO": "auto", "VALIDATED": "auto", "ANY": "required", "NONE": "none"}
        if mode not in plain:
            raise InvalidRequest(f"`{where}.mode` must be AUTO, ANY, NONE or VALIDATED", param=f"{where}.mode")
        if names and mode in ("ANY", "VALIDATED"):
            chosen = [{"type": "function", "function": {"name": name}} for name in names]
            many = {"type": "allowed_tools", "allowed_tools": {"mode": plain[mode], "tools": chosen}}
            request["tool_choice"] = chosen[0] if len(names) == 1 and mode == "ANY" else many
            return
        request["tool_choice"] = plain[mode]
        if mode == "VALIDATED":
            self._extra[f"{where}.mode"] = mode

    # -- generation

    def _generation(self, request: Json) -> None:
        config = google_object(self._body.get("generationConfig") or {}, "generationConfig")
        for name, value in config.items():
            where = f"generationConfig.{name}"
            if name in GEMINI_READ:
                to, want = GEMINI_READ[name]
                request[to] = want(value, where)
            elif name == "thinkingConfig":
                self._thinking(google_object(value, where), request)
            elif name == "responseModalities":
                request["modalities"] = [kind.lower() for kind in want_texts(value, where)]
            elif name not in ("responseMimeType", "responseSchema", "responseJsonSchema"):
                self._extra[where] = value
        self._format(config, request)

    def _format(self, config: Json, request: Json) -> None:
        kind = want_text(config.get("responseMimeType", "text/plain"), "generationConfig.responseMimeType")
        whole = config.get("responseJsonSchema")
        if whole is not None:
            schema = want_object(whole, "generationConfig.responseJsonSchema")
        elif config.get("responseSchema") is not None:
            schema = read_openapi_schema(config["responseSchema"], "generationConfig.responseSchema")
        else:
            schema = {}
        if kind == "application/json" and schema:
            named = {"name": "response", "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        elif kind == "application/json":
            request["response_format"] = {"type": "json_object"}
        elif kind != "text/plain":
            names = ("responseMimeType", "responseSchema", "responseJsonSchema")
            self._extra.update({f"generationConfig.{name}": config[name] for name in names if name in config})

    def _thinking(self, thinking: Json, request: Json) -> None:
        where = "generationConfig.thinkingConfig"
        level = thinking.pop("thinkingLevel", None)
        if level is not None:
            request["reasoning_effort"] = want_text(level, f"{where}.thinkingLevel").lower()
            if request["reasoning_effort"] not in GEMINI_EFFORTS:
                raise InvalidRequest(f"`{where}.thinkingLevel` is not known", param=f"{where}.thinkingLevel")
        budget = thinking.get("thinkingBudget")
        if budget is not None and (tokens := want_whole(budget, f"{where}.thinkingBudget")) >= 0:
            efforts = ("none", "low", "medium", "high")
            effort = next((name for name in efforts if tokens <= GEMINI_EFFORTS[name][1]), "high")
            request.setdefault("reasoning_effort", effort)
        self._extra.update({f"{where}.{name}": value for name, value in thinking.items()})

    def _rest(self, request: Json) -> None:
        tier = self._body.get("serviceTier")
        if tier is not None:
            tier = want_text(tier, "serviceTier").lower()
            request["service_tier"] = "default" if tier == "standard" else tier
        known = {"contents", "systemInstruction", "tools", "toolConfig", "generationConfig", "model", "serviceTier"}
        rest = {name: value for name, value in self._body.items() if name not in known}
        self._extra.update({name: value for name, value in rest.items() if name[:1] != "$"})


# Canonical completion -> generateContent answer.


def write_gemini_usage(usage: Json) -> Json:
    read = read_openai_usage(usage)
    thoughts = min(read.reasoning_tokens, read.completion_tokens)
    images, audio = read.input_image_tokens, read.input_audio_tokens
    counts = {"TEXT": read.prompt_tokens - images - audio, "IMAGE": images, "AUDIO": audio}
    meta: Json = {
        "promptTokenCount": read.prompt_tokens,
        "candidatesTokenCount": read.completion_tokens - thoughts,
        "totalTokenCount": read.prompt_tokens + read.completion_tokens,
        "promptTokensDetails": [{"modality": name, "tokenCount": count} for name, count in counts.items() if count],
    }
    optional = {"thoughtsTokenCount": thoughts, "cachedContentTokenCount": read.cached_tokens}
    return {**meta, **{name: count for name, count in optional.items() if count}}


def write_gemini_call(call: Json) -> Json:
    """A whole canonical tool call as a part."""
    if call.get("type") == "custom":
        custom = call.get("custom") or {}
        name, args = custom.get("name"), {"input": custom.get("input") or ""}
    else:
        function = call.get("function") or {}
        name, args = function.get("name"), read_arguments(function.get("arguments"))
    part: Json = {"functionCall": {"name": name or "", "args": args}}
    if call.get("id"):
        part["functionCall"]["id"] = call["id"]
    signature = google_extra(call).get("thought_signature")
    return {**part, "thoughtSignature": signature} if signature else part


def google_extra(holder: Json) -> Json:
    google = (holder.get("extra_content") or {}).get("google")
    return google if isinstance(google, dict) else {}


def write_gemini_media(message: Json) -> list[Json]:
    """Images and audio of an answer; one that is only named by its address is passed on as such."""
    parts = []
    for image in message.get("images") or ():
        url = ((image.get("image_url") or {}).get("url") or "") if isinstance(image, dict) else ""
        if url.startswith("data:"):
            kind, data = read_data_uri(url, "images")
            part: Json = {"inlineData": {"mimeType": kind, "data": data}}
        else:
            part = {"fileData": {"fileUri": url, "mimeType": media_type_of(url) or "image/png"}}
        signature = google_extra(image).get("thought_signature") if isinstance(image, dict) else None
        parts.append({**part, "thoughtSignature": signature} if signature else part)
    audio = message.get("audio") or {}
    if audio.get("data"):
        parts.append({"inlineData": {"mimeType": f"audio/{audio.get('format') or 'pcm'}", "data": audio["data"]}})
    return parts


def write_gemini_citations(message: Json) -> Json:
    """The groundingMetadata of an answer: Google's own, or made of its URL citations."""
    own = google_extra(message).get("grounding_metadata")
    if own:
        return {"groundingMetadata": own}
    chunks, supports = [], []
    for annotation in message.get("annotations") or ():
        cited = annotation.get("url_citation")
        if not isinstance(cited, dict):
            continue
        chunks.append({"web": {"uri": cited.get("url"), "title": cited.get("title") or ""}})
        if cited.get("end_index"):
            segment = {"startIndex": cited.get("start_index") or 0, "endIndex": cited["end_index"]}
            supports.append({"segment": segment, "groundingChunkIndices": [len(chunks) - 1]})
    if not chunks:
        return {}
    return {"groundingMetadata": {"groundingChunks": chunks, **({"groundingSupports": supports} if supports else {})}}


def write_gemini_logprobs(logprobs: Any) -> Json:
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not tokens:
        return {}
    chosen = [{"token": token.get("token"), "logProbability": token.get("logprob")} for token in tokens]
    tops = [
        {"candidates": [{"token": top.get("token"), "logProbability": top.get("logprob")} for top in tops]}
        for tops in (token.get("top_logprobs") or () for token in tokens)
    ]
    return {"logprobsResult": {"chosenCandidates": chosen, "topCandidates": tops}}


def sign_parts(parts: list[Json], calls: list[Json], signature: str, blocks: list[Any]) -> list[Json]:
    """Hang a message's opaque state where Gemini clients look for it: the first call, else the last text."""
    if blocks and not signature and not any("thoughtSignature" in part for part in parts + calls):
        signature = pack_blocks(blocks)
    if signature and calls and "thoughtSignature" not in calls[0]:
        return [*parts, {**calls[0], "thoughtSignature": signature}, *calls[1:]]
    if signature and parts and "text" in parts[-1] and not parts[-1].get("thought"):
        parts = [*parts[:-1], {**parts[-1], "thoughtSignature": signature}]
    elif signature:
        parts = [*parts, {"text": "", "thoughtSignature": signature}]
    return parts + calls


def wants_thoughts(request: Json) -> bool:
    config = request.get("generationConfig") or request.get("generation_config") or {}
    thinking = config.get("thinkingConfig") or config.get("thinking_config") or {}
    return bool(thinking.get("includeThoughts") or thinking.get("include_thoughts"))


class GeminiRenderer:
    """Writes partial answers: text as it comes; whole calls, ends and usage in one last event.

    As server-sent events for `alt=sse`, else as one JSON array in pieces.
    """

    def __init__(self, request: Json) -> None:
        self._thoughts = wants_thoughts(request)
        self._array = request.get("$alt") != "sse"
        self._began = False
        self._frame: Json = {}
        self._usage: Json | None = None
        self._ends: dict[int, Json] = {}

    def feed(self, chunk: Json) -> bytes:
        if not self._frame:
            self._frame = {"modelVersion": chunk.get("model") or "", "responseId": chunk.get("id") or ""}
        self._usage = chunk.get("usage") or self._usage
        written = []
        for choice in chunk.get("choices") or ():
            index = choice.get("index") or 0
            blank: Json = {"calls": {}, "blocks": [], "google": {}, "annotations": [], "logprobs": [], "reason": None}
            end = self._ends.setdefault(index, blank)
            parts = self._parts(choice.get("delta") or {}, end)
            end["reason"] = choice.get("finish_reason") or end["reason"]
            end["logprobs"] += (choice.get("logprobs") or {}).get("content") or ()
            if parts:
                written.append({"content": {"parts": parts, "role": "model"}, "index": index})
        return self._event({"candidates": written, **self._frame}) if written else b""

    def _parts(self, delta: Json, end: Json) -> list[Json]:
        google = google_extra(delta)
        end["google"].update({name: value for name, value in google.items() if name != "parts"})
        end["blocks"] += delta.get("thinking_blocks") or ()
        end["annotations"] += delta.get("annotations") or ()
        for call in delta.get("tool_calls") or ():
            self._gather(end["calls"], call)
        parts: list[Json] = list(google.get("parts") or ())
        if self._thoughts and delta.get("reasoning_content"):
            parts.append({"text": delta["reasoning_content"], "thought": True})
        text = (delta.get("content") or "") + (delta.get("refusal") or "")
        if text:
            parts.append({"text": text})
        return parts + write_gemini_media(delta)

    def _gather(self, calls: dict[int, Json], delta: Json) -> None:
        """Add one piece of a call; pieces of parallel calls may interleave, and a late id or name still counts."""
        index = delta.get("index")
        if not isinstance(index, int):  # without an index, an id begins the next call
            index = len(calls) if delta.get("id") or not calls else max(calls)
        call = calls.setdefault(index, {"type": "function", "function": {"arguments": ""}, "custom": {"input": ""}})
        for name in ("id", "type", "extra_content"):
            call[name] = delta.get(name) or call.get(name)
        function, custom = delta.get("function") or {}, delta.get("custom") or {}
        call["function"]["name"] = function.get("name") or call["function"].get("name")
        call["function"]["arguments"] += function.get("arguments") or ""
        call["custom"]["name"] = custom.get("name") or call["custom"].get("name")
        call["custom"]["input"] += custom.get("input") or ""

    def close(self) -> bytes:
        candidates = [self._end(index, end) for index, end in sorted(self._ends.items())]
        last: Json = {"candidates": candidates}
        if self._usage:
            last["usageMetadata"] = write_gemini_usage(self._usage)
        return self._event({**last, **self._frame}) + (b"]" if self._array else b"")

    def _end(self, index: int, end: Json) -> Json:
        calls = [write_gemini_call(call) for _, call in sorted(end["calls"].items())]
        parts = sign_parts([], calls, end["google"].get("thought_signature") or "", end["blocks"])
        reason = GEMINI_CLIENT_FINISHES.get(end["reason"], "STOP")
        message = {"annotations": end["annotations"], "extra_content": {"google": end["google"]}}
        extras = {**write_gemini_citations(message), **write_gemini_logprobs({"content": end["logprobs"]})}
        content = {"parts": parts or [{"text": ""}], "role": "model"}
        return {"content": content, "finishReason": reason, "index": index, **extras}

    def fail(self, error: GatewayError, request_id: str) -> bytes:
        return self._event(gemini_error_body(error, request_id)) + (b"]" if self._array else b"")

    def _event(self, value: Json) -> bytes:
        if not self._array:
            return b"data: %b\r\n\r\n" % dump_json(value)
        opening, self._began = (b",\r\n" if self._began else b"["), True
        return opening + dump_json(value)


def gemini_error_body(error: GatewayError, request_id: str) -> Json:
    """Google's error object: code, message, status, and typed details with the reason and our request id."""
    metadata = {name: str(value) for name, value in error.fields.items() if name not in ("status", "details")}
    metadata["request_id"] = request_id
    if error.param:
        metadata["param"] = error.param
    reason = re.sub(r"\W", "_", error.code).upper()
    google = "type.googleapis.com/google.rpc."
    whole: Json = {"@type": f"{google}ErrorInfo", "reason": reason, "domain": "stockyard", "metadata": metadata}
    details = [whole]
    if error.retry_after_s is not None:
        details.append({"@type": f"{google}RetryInfo", "retryDelay": f"{error.retry_after_s:g}s"})
    theirs = error.fields.get("details")
    theirs = [item for item in theirs if isinstance(item, dict)] if isinstance(theirs, list) else []
    details += [item for item in theirs if not str(item.get("@type")).endswith("RetryInfo")]
    status = GEMINI_STATUSES.get(error.status, "INVALID_ARGUMENT" if error.status < 500 else "INTERNAL")
    return {"error": {"code": error.status, "message": error.message, "status": status, "details": details}}


class GeminiGenerate(Dialect):
    """Google's generateContent on the Developer API."""

    name = "gemini"
    #: Google's own SDK takes a comment line for broken JSON; an empty line says nothing in both of its stream formats.
    heartbeat = b"\r\n"
    #: Dotted members and native tools that this door answers with 400, or that would split calls into pieces.
    refused: ClassVar[frozenset[str]] = frozenset({
        "labels", "modelArmorConfig", "generationConfig.routingConfig", "generationConfig.modelSelectionConfig",
        "generationConfig.audioTimestamp", "tools.retrieval", "tools.enterpriseWebSearch",
        "toolConfig.functionCallingConfig.streamFunctionCallArguments",
    })  # fmt: skip
    labels: ClassVar[bool] = False
    #: Addresses beyond the model's own: any public https address, gs:// buckets, the Files API.
    web_files: ClassVar[bool] = False
    bucket_files: ClassVar[bool] = False
    google_files: ClassVar[bool] = True
    sends_call_ids: ClassVar[bool] = True
    #: How many texts one embeddings call takes.
    embeddings_at_once: ClassVar[int] = 100

    # -- client side

    def parse(self, body: Json, path: Mapping[str, str]) -> Json:
        """`path` holds `model` and `method`, as in /v1beta/models/{model}:{method}."""
        request = GeminiParser(body, path["model"].removeprefix("models/")).parse()
        if path.get("method", "").startswith("stream"):
            request["stream"] = True
        return request

    def render(self, completion: Json, request: Json) -> Json:
        thoughts = wants_thoughts(request)
        answer: Json = {"candidates": [self._candidate(choice, thoughts) for choice in completion.get("choices") or ()]}
        if completion.get("usage"):
            answer["usageMetadata"] = write_gemini_usage(completion["usage"])
        return {**answer, "modelVersion": completion.get("model") or "", "responseId": completion.get("id") or ""}

    def _candidate(self, choice: Json, thoughts: bool) -> Json:
        message = choice.get("message") or {}
        google = google_extra(message)
        parts: list[Json] = list(google.get("parts") or ())
        if thoughts and message.get("reasoning_content"):
            parts.append({"text": message["reasoning_content"], "thought": True})
        text = (message.get("content") or "") + (message.get("refusal") or "")
        if text:
            parts.append({"text": text})
        parts = [*write_gemini_media(message), *parts]
        calls = [write_gemini_call(call) for call in message.get("tool_calls") or ()]
        parts = sign_parts(parts, calls, google.get("thought_signature") or "", message.get("thinking_blocks") or [])
        reason = GEMINI_CLIENT_FINISHES.get(choice.get("finish_reason") or "", "STOP")
        candidate = {"content": {"parts": parts, "role": "model"}, "finishReason": reason}
        extras = {**write_gemini_citations(message), **write_gemini_logprobs(choice.get("logprobs"))}
        return {**candidate, "index": choice.get("index") or 0, **extras}

    def renderer(self, request: Json, new_id: Callable[[str], str], now_s: int) -> Renderer:
        """`request["$alt"]` is the query's `alt`: `sse` for events, anything else for a JSON array."""
        return GeminiRenderer(request)

    def stream_type_of(self, request: Json) -> str:
        """The content type of a stream answer: it depends on the query, not on the dialect alone."""
        return "text/event-stream" if request.get("$alt") == "sse" else "application/json; charset=UTF-8"

    def wants_stream(self, request: Json, path: Mapping[str, str]) -> bool:
        return path.get("method") == "streamGenerateContent"

    def must_render(self, request: Json) -> bool:
        return request.get("$alt") != "sse"

    def with_output_cap(self, request: Json, tokens: int) -> Json:
        name = "generation_config" if "generation_config" in request else "generationConfig"
        config = {key: value for key, value in (request.get(name) or {}).items() if key != "max_output_tokens"}
        return {**request, name: {**config, "maxOutputTokens": tokens}}

    def render_error(self, error: GatewayError, request_id: str) -> tuple[int, Json]:
        return error.status, gemini_error_body(error, request_id)

    def render_models(self, rows: list[Json]) -> Json:
        return {"models": [self.render_model(row) for row in rows]}

    def render_model(self, row: Json) -> Json:
        """One canonical model row; limits appear where the row knows them."""
        embeds = row.get("mode") == "embedding" or "embed" in row["id"]
        methods = ["embedContent", "batchEmbedContents"] if embeds else ["generateContent", "streamGenerateContent"]
        model: Json = {"name": f"models/{row['id']}", "displayName": row.get("name") or row["id"], "version": "001"}
        limits = {
            "inputTokenLimit": row.get("context_window") or row.get("max_input_tokens"),
            "outputTokenLimit": row.get("max_output_tokens"),
        }
        model.update({name: limit for name, limit in limits.items() if limit})
        return {**model, "supportedGenerationMethods": [*methods, "countTokens"]}

    def read_models(self, answer: Any) -> list[Json]:
        rows = answer.get("models") or []
        return [
            {**row, "id": str(row["name"]).removeprefix("models/"), "owned_by": "google"}
            for row in rows
            if row.get("name")
        ]

    def count_tokens(self, canonical: Json, request: Json) -> Json:
        """Answer :countTokens by an estimate: a token is four bytes of text, and media count as one image each."""
        body = google_object(request, "body")
        whole = google_object(body.get("generateContentRequest") or body, "generateContentRequest")
        if "contents" not in whole:
            raise InvalidRequest("`contents` must be a non-empty array", param="contents")
        counted = [whole[name] for name in ("contents", "systemInstruction", "tools") if name in whole]
        total = sum(map(estimate_gemini_tokens, counted))
        return {"totalTokens": total, "promptTokensDetails": [{"modality": "TEXT", "tokenCount": total}]}

    # -- provider side

    def path(self, provider: Provider, model: str, stream: bool) -> str:
        model = model.removeprefix("models/")
        path = provider.path("stream" if stream else "chat", model)
        return path.replace("/models/tunedModels%2F", "/tunedModels/")

    def encode(self, request: Json, translation: Translation) -> Json:
        return GeminiEncoder(self, request, translation).build()

    def decode(self, answer: Json, translation: Translation) -> Json:
        refuse_error_event(answer, self)
        with google_shape():
            choices = [self._choice(candidate, translation) for candidate in answer.get("candidates") or ()]
        if not choices:
            choices = [self._blocked(answer)]
        completion: Json = {
            "id": answer.get("responseId") or translation.new_id("chatcmpl-"),
            "object": "chat.completion",
            "created": translation.now_s,
            "model": answer.get("modelVersion") or translation.model,
            "choices": choices,
        }
        if isinstance(answer.get("usageMetadata"), dict):
            searches = count_searches(answer.get("candidates"), translation.model)
            usage = read_gemini_usage(answer["usageMetadata"], searches)
            completion["usage"] = write_gemini_canonical_usage(usage)
        return completion

    def _choice(self, candidate: Json, translation: Translation) -> Json:
        message = {"role": "assistant", "content": None, **read_gemini_message(candidate, translation)}
        reason = read_gemini_finish(candidate, bool(message.get("tool_calls"))) or "stop"
        if message["content"] is None and not message.get("tool_calls"):
            message["content"] = ""
        citations = read_gemini_citations(candidate, message["content"] or "")
        if citations:
            message["annotations"] = citations
        choice = {"index": candidate.get("index") or 0, "message": message, "finish_reason": reason}
        logprobs = read_gemini_logprobs(candidate)
        return {**choice, "logprobs": logprobs} if logprobs else choice

    def _blocked(self, answer: Json) -> Json:
        if not (answer.get("promptFeedback") or {}).get("blockReason"):
            raise UpstreamError("the provider's answer has no `candidates`", code="upstream_malformed")
        message = {"role": "assistant", "content": ""}
        return {"index": 0, "message": message, "finish_reason": "content_filter"}

    def decoder(self, translation: Translation) -> GeminiDecoder:
        return GeminiDecoder(self, translation)

    def read_usage(self, answer: Json) -> Usage | None:
        meta = answer.get("usageMetadata")
        if not isinstance(meta, dict):
            return None
        return read_gemini_usage(meta, count_searches(answer.get("candidates"), answer.get("modelVersion") or ""))

    def read_error(self, status: int, body: bytes) -> UpstreamError:
        """Google's details say what its status hides: a bad key is a 400, and waiting times are details too."""
        members = read_error_members(body)
        details = [item for item in members.get("details") or () if isinstance(item, dict)]
        reason = next((str(item["reason"]) for item in details if item.get("reason")), "")
        text = str(members.get("message") or f"the provider answered {status}")
        bad_key = reason == "API_KEY_INVALID" or (status == 400 and "api key" in text.lower())
        code = reason or str(members.get("status") or "") or None
        if status == 400 and "exceeds the maximum number of tokens" in text:
            code = "context_length_exceeded"
        return upstream_failure(
            status, text, code=code, bad_key=bad_key, retry_after_s=read_retry_delay_s(details),
            fields={"status": members["status"], "details": details} if members.get("status") and not bad_key else {},
        )  # fmt: skip

    # -- embeddings

    def encode_embeddings(self, request: Json, translation: Translation) -> Json:
        """An OpenAI embeddings request as `batchEmbedContents`; notes the texts' length for an estimate of usage."""
        options, contents = self._embedding_options(request, translation)
        model = f"models/{translation.model.removeprefix('models/')}"
        return {"requests": [{"model": model, "content": content, **options} for content in contents]}

    def _embedding_options(self, request: Json, translation: Translation) -> tuple[Json, list[Json]]:
        texts = read_embedding_texts(request.get("input"))
        translation.names["embedding_bytes"] = [len(text.encode("utf-8", "replace")) for text in texts]
        contents: list[Json] = [{"parts": [{"text": text}]} for text in texts]
        options: Json = {}
        if request.get("dimensions") is not None:
            options["outputDimensionality"] = want_whole(request["dimensions"], "dimensions")
        extra = want_object(request.get("extra_body") or {}, "extra_body")
        for dialect, members in extra.items():
            members = google_object(members, f"extra_body.{dialect}")
            if dialect == "gemini":
                given = want_list(members.pop("contents", contents), "extra_body.gemini.contents")
                contents = [want_object(content, "extra_body.gemini.contents") for content in given]
                options.update(members)
            else:
                for name in members:
                    translation.drop(name)
        for name, value in request.items():
            if value is not None and name not in ("model", "input", "dimensions", "encoding_format", "extra_body"):
                translation.drop(name)
        return options, contents

    def decode_embeddings(self, answer: Json, translation: Translation) -> Json:
        refuse_error_event(answer, self)
        with google_shape():
            vectors, tokens = self._vectors(answer)
        if not tokens:
            tokens = sum(-(-size // 4) for size in translation.names.get("embedding_bytes") or ())
        rows = [{"object": "embedding", "index": at, "embedding": vector} for at, vector in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": rows, "model": translation.model, "usage": usage}

    def _vectors(self, answer: Json) -> tuple[list[list[float]], int]:
        items = answer.get("embeddings") or ([answer["embedding"]] if answer.get("embedding") else None)
        if not isinstance(items, list):
            raise UpstreamError("the provider's answer has no `embeddings`", code="upstream_malformed")
        tokens = _count((answer.get("usageMetadata") or {}).get("promptTokenCount"))
        return [item.get("values") or [] for item in items], tokens

    def parse_embeddings(self, body: Json, path: Mapping[str, str]) -> Json:
        """`:embedContent` and `:batchEmbedContents` as an OpenAI embeddings request for one or more texts."""
        body = google_object(body, "body")
        single = path.get("method") == "embedContent"
        items = [body] if single else google_list(body.get("requests") or [], "requests")
        if not items:
            raise InvalidRequest("`requests` must be a non-empty array", param="requests")
        reads = [self._embed_item(item, "body" if single else f"requests[{at}]") for at, item in enumerate(items)]
        options = reads[0][2]
        if any(other != options for *_, other in reads):
            raise InvalidRequest("all `requests` must have the same options", param="requests")
        request: Json = {"model": path["model"].removeprefix("models/"), "input": [text for text, *_ in reads]}
        if "outputDimensionality" in options:
            request["dimensions"] = want_whole(options.pop("outputDimensionality"), "outputDimensionality")
        if not all(plain for _, plain, _ in reads):
            options["contents"] = [google_object(item, "requests")["content"] for item in items]
        return {**request, "extra_body": {"gemini": options}} if options else request

    def _embed_item(self, item: Any, where: str) -> tuple[str, bool, Json]:
        """One request's text, whether that is all of its content, and its options."""
        item = google_object(item, where)
        content = item.pop("content", None)
        content = {"parts": [{"text": content}]} if isinstance(content, str) else content
        content = google_object(content, f"{where}.content")
        item.pop("model", None)
        nested = google_object(item.pop("embedContentConfig", {}), f"{where}.embedContentConfig")
        parts = google_list(content.get("parts") or [], f"{where}.content.parts")
        parts = [google_object(part, f"{where}.content.parts[{at}]") for at, part in enumerate(parts)]
        if not parts:
            raise InvalidRequest(f"`{where}.content` must hold a part", param=f"{where}.content")
        text = "".join(want_text(part.get("text", ""), f"{where}.content.parts.text") for part in parts)
        plain = all(part.keys() == {"text"} for part in parts)
        return text, plain, {**nested, **{name: value for name, value in item.items() if name[:1] != "$"}}

    def render_embeddings(self, answer: Json, request: Json, path: Mapping[str, str]) -> Json:
        """Canonical vectors for `path["method"]`: one `embedding`, or `embeddings` in the order of the requests."""
        rows = sorted(answer.get("data") or (), key=lambda row: row.get("index") or 0)
        vectors = [{"values": row["embedding"]} for row in rows]
        tokens = _count((answer.get("usage") or {}).get("prompt_tokens"))
        meta: Json = {"usageMetadata": {"promptTokenCount": tokens, "totalTokenCount": tokens}} if tokens else {}
        if path.get("method") == "embedContent":
            return {"embedding": vectors[0], **meta}
        return {"embeddings": vectors, **meta}


class GeminiVertex(GeminiGenerate):
    """generateContent on Vertex AI: other paths (in the provider's row), labels, buckets, and `:predict` embeddings."""

    name = "vertex"
    refused: ClassVar[frozenset[str]] = frozenset({
        "store", "tools.fileSearch", "tools.mcpServers", "toolConfig.includeServerSideToolInvocations",
        "toolConfig.functionCallingConfig.streamFunctionCallArguments",
    })  # fmt: skip
    labels = True
    web_files = True
    bucket_files = True
    google_files = False
    sends_call_ids = False
    embeddings_at_once = 1

    def encode_embeddings(self, request: Json, translation: Translation) -> Json:
        options, contents = self._embedding_options(request, translation)
        named = {"taskType": "task_type", "title": "title"}
        extras = {named[name]: options.pop(name) for name in named if name in options}
        instances = []
        for content in contents:
            parts = [want_object(part, "content.parts") for part in want_list(content.get("parts"), "content.parts")]
            if any("text" not in part for part in parts):
                translation.drop("contents", "Vertex AI's :predict embeds text only")
            texts = [want_text(part.get("text") or "", "content.parts.text") for part in parts]
            instances.append({"content": "".join(texts), **extras})
        return {"instances": instances, **({"parameters": options} if options else {})}

    def _vectors(self, answer: Json) -> tuple[list[list[float]], int]:
        if not isinstance(answer.get("predictions"), list):
            return super()._vectors(answer)
        found = [item.get("embeddings") or {} for item in answer["predictions"]]
        tokens = sum(_count((item.get("statistics") or {}).get("token_count")) for item in found)
        return [item.get("values") or [] for item in found], tokens


def read_embedding_texts(value: Any) -> list[str]:
    """The texts of an OpenAI embeddings input; token arrays mean nothing to another tokenizer."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("`input` must be text or an array of texts: token ids mean nothing here", param="input")
    return texts


def read_retry_delay_s(details: list[Json]) -> float | None:
    """Seconds from a RetryInfo detail such as {"retryDelay": "37.5s"}."""
    for detail in details:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)s", str(detail.get("retryDelay") or ""))
        if match:
            return float(match[1])
    return None


def estimate_gemini_tokens(value: Any) -> int:
    if isinstance(value, str):
        return -(-len(value.encode("utf-8", "replace")) // 4)
    if isinstance(value, list):
        return sum(map(estimate_gemini_tokens, value))
    if not isinstance(value, dict):
        return 1 if value is not None else 0
    total = 0
    for name, child in value.items():
        if camel_case(name) in ("inlineData", "fileData"):
            total += GEMINI_IMAGE_TOKENS
        elif camel_case(name) not in ("role", "thoughtSignature"):
            total += estimate_gemini_tokens(child)
    return total


# ----- Anthropic ------------------------------------------------------------------------------------------------------
# The Messages API. Three things differ from every other dialect: content is a list of typed blocks on both sides, tool
# results stand in user turns, and a stream names its events and opens and closes its blocks one after the other. What
# one Claude takes and another refuses is a row of CLAUDE_MODELS. Blocks of Anthropic's own server tools are no tool
# calls of the client's: they travel whole in `message.native_blocks`, for Anthropic clients only.
# Sources: https://platform.claude.com/docs/en/api/messages, …/api/versioning, …/build-with-claude/thinking


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaudeFacts:
    """What one family of Claude takes. `thinking` lists the values of thinking.type, `on` whether it thinks unasked."""

    thinking: frozenset[str] = frozenset({"adaptive"})
    on: bool = True
    sampling: bool = False
    #: Forced tool choice: always, never, or only while it does not think.
    forced: str = "never"
    efforts: tuple[str, ...] = ("low", "medium", "high", "xhigh", "max")
    inline_system: bool = False
    default_output_tokens: int = 32_000


_EFFORTS_OF_46: Final = ("low", "medium", "high", "max")
CLAUDE_MODELS: Final[Mapping[str, ClaudeFacts]] = {
    "claude-fable-5": ClaudeFacts(inline_system=True),
    "claude-mythos-5": ClaudeFacts(inline_system=True),
    "claude-opus-5-5": ClaudeFacts(inline_system=True),
    "claude-sonnet-5-5": ClaudeFacts(thinking=frozenset({"adaptive", "between_tools"})),
    "claude-opus-5": ClaudeFacts(thinking=frozenset({"adaptive", "disabled"}), forced="always", inline_system=True),
    "claude-opus-4-8": ClaudeFacts(thinking=frozenset({"adaptive", "disabled"}), on=False, forced="always", inline_system=True),
    "claude-opus-4-7": ClaudeFacts(thinking=frozenset({"adaptive", "disabled"}), on=False, forced="always"),
    "claude-sonnet-5": ClaudeFacts(thinking=frozenset({"adaptive", "disabled"}), forced="always"),
    "claude-opus-4-6": ClaudeFacts(
        thinking=frozenset({"adaptive", "enabled", "disabled"}), on=False, sampling=True, forced="always", efforts=_EFFORTS_OF_46
    ),
    "claude-sonnet-4-6": ClaudeFacts(
        thinking=frozenset({"adaptive", "enabled", "disabled"}), on=False, sampling=True, forced="always", efforts=_EFFORTS_OF_46
    ),
    "claude-opus-4-5": ClaudeFacts(
        thinking=frozenset({"enabled", "disabled"}), on=False, sampling=True, forced="unthinking", efforts=("low", "medium", "high")
    ),
    # Older models, and the safe guess for names that are not known: no effort, thinking by budget, sampling taken.
    "claude": ClaudeFacts(
        thinking=frozenset({"enabled", "disabled"}), on=False, sampling=True, forced="unthinking", efforts=(),
        default_output_tokens=8192,
    ),
}  # fmt: skip
#: Thinking budgets of the models that count tokens, by effort.
THINKING_BUDGETS: Final = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16_384, "xhigh": 24_576, "max": 32_000}
CLAUDE_IMAGES: Final = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
CLAUDE_FINISHES: Final = {
    "end_turn": "stop", "stop_sequence": "stop", "pause_turn": "stop", "compaction": "stop", "max_tokens": "length",
    "model_context_window_exceeded": "length", "tool_use": "tool_calls", "refusal": "content_filter",
}  # fmt: skip
STOP_REASONS: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
ANTHROPIC_ERRORS: Final = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
    409: "conflict_error", 413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
    504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
#: Canonical members that this encoder reads; what else is set, and says something, is dropped by name.
CLAUDE_READS: Final = frozenset(
    "model messages max_tokens max_completion_tokens temperature top_p top_k stop stream stream_options tools tool_choice "
    "parallel_tool_calls response_format reasoning_effort user safety_identifier service_tier extra_body functions cache_control".split()
)
SAYS_LITTLE: Final[Mapping[str, Any]] = {
    "n": 1,
    "store": False,
    "logprobs": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
}


def claude_facts(model: str) -> ClaudeFacts:
    """The row of a model under any host's decoration (`us.anthropic.`, `anthropic/`, `@date`): the longest prefix."""
    at = model.find("claude")
    name = model[at:].replace("@", "-") if at >= 0 else "claude"
    known = max(
        (prefix for prefix in CLAUDE_MODELS if name == prefix or name.startswith(f"{prefix}-")),
        key=len,
        default="claude",
    )
    return CLAUDE_MODELS[known]


class SchemaForClaude:
    """JSON Schema trimmed to the subset of structured outputs; what a keyword said goes into the description."""

    DROPPED: ClassVar = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength",
                         "pattern", "maxItems", "uniqueItems", "minProperties", "maxProperties")  # fmt: skip
    FORMATS: ClassVar = frozenset("date-time time date duration email hostname uri ipv4 ipv6 uuid".split())

    def write(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        kept = {
            name: self._member(name, value)
            for name, value in schema.items()
            if name not in (*self.DROPPED, "$schema", "strict")
        }
        if "oneOf" in kept:
            kept["anyOf"] = kept.pop("oneOf")
        told = [f"{name}: {dump_json(schema[name]).decode()}" for name in self.DROPPED if name in schema]
        if kept.get("format") not in (None, *self.FORMATS):
            told.append(f"format: {kept.pop('format')}")
        if isinstance(kept.get("minItems"), int) and kept["minItems"] > 1:
            told.append(f"minItems: {kept.pop('minItems')}")
        if told:
            kept["description"] = "; ".join([*([str(kept["description"])] if kept.get("description") else []), *told])
        if kept.get("type") == "object" or "properties" in kept:
            kept["additionalProperties"] = False
        return kept

    def _member(self, name: str, value: Any) -> Any:
        if name in ("properties", "$defs", "definitions") and isinstance(value, dict):
            return {key: self.write(inner) for key, inner in value.items()}
        if name in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            return [self.write(inner) for inner in value]
        return self.write(value) if name == "items" else value


class AnthropicEncoder:
    """One canonical request as a Messages body."""

    def __init__(self, request: Json, translation: Translation) -> None:
        self._request, self._names = customs_as_functions(request)
        self._translation = translation
        self._facts = claude_facts(translation.model)
        self._turns: list[Json] = []
        self._system: list[Json] = []

    def build(self) -> Json:
        request, translation = self._request, self._translation
        for message in request.get("messages") or ():
            self._add(message)
        body: Json = {"model": translation.model, "messages": self._turns}
        if self._system:
            plain = all(block.keys() == {"type", "text"} for block in self._system)
            body["system"] = "\n\n".join(block["text"] for block in self._system) if plain else self._system
        self._write_limits(body)
        self._write_tools(body)
        self._write_thinking(body)
        self._write_format(body)
        if translation.stream:
            body["stream"] = True
        user = request.get("safety_identifier") or request.get("user")
        if user:
            body["metadata"] = {"user_id": user}
        if request.get("service_tier") in ("auto", "default"):
            body["service_tier"] = "auto" if request["service_tier"] == "auto" else "standard_only"
        elif request.get("service_tier") is not None:
            translation.drop("service_tier")
        if request.get("cache_control"):
            body["cache_control"] = request["cache_control"]
        self._write_extras(body)
        return body

    # -- conversation

    def _add(self, message: Json) -> None:
        role = message.get("role")
        if role in ("system", "developer"):
            self._add_system(message)
        elif role in ("tool", "function"):
            self._add_result(message)
        elif role == "assistant":
            self._append("assistant", self._assistant(message))
        else:
            self._append("user", self._parts(message.get("content")))

    def _add_system(self, message: Json) -> None:
        blocks = [block for block in self._parts(message.get("content")) if block.get("type") == "text"]
        if not self._turns:
            self._system += blocks
        elif self._facts.inline_system and blocks:
            self._turns.append({"role": "system", "content": blocks})
        elif blocks:
            text = "\n\n".join(block["text"] for block in blocks)
            self._append("user", [{"type": "text", "text": f"<system>\n{text}\n</system>"}])

    def _append(self, role: str, blocks: list[Json]) -> None:
        """Add blocks to the turn of this role, opening it where another spoke last. Tool results come first in a turn."""
        if not blocks:
            return
        if not self._turns or self._turns[-1]["role"] != role:
            self._turns.append({"role": role, "content": []})
        content = self._turns[-1]["content"]
        if blocks[0]["type"] == "tool_result":
            at = sum(block["type"] == "tool_result" for block in content)
            content[at:at] = blocks
        else:
            content += blocks

    def _add_result(self, message: Json) -> None:
        content = message.get("content")
        block: Json = {
            "type": "tool_result",
            "tool_use_id": fit_claude_id(message.get("tool_call_id") or message.get("name") or ""),
        }
        parts = self._parts(content)
        if isinstance(content, str):
            block["content"] = content
        elif parts:
            block["content"] = parts
        if message.get("is_error"):
            block["is_error"] = True
        if message.get("cache_control"):
            block["cache_control"] = message["cache_control"]
        self._append("user", [block])

    def _assistant(self, message: Json) -> list[Json]:
        blocks: list[Json] = []
        for block in message.get("thinking_blocks") or ():
            if block.get("type") in ("thinking", "redacted_thinking") and (block.get("signature") or block.get("data")):
                blocks.append(block)
            else:
                self._translation.drop("thinking_blocks")
        if message.get("reasoning_content") and not message.get("thinking_blocks"):
            self._translation.drop("reasoning_content")  # without a signature it would be refused
        for native in message.get("native_blocks") or ():
            if native.get("dialect") == "anthropic":
                blocks.append(native["block"])
            else:
                self._translation.drop("native_blocks")
        blocks += self._parts(message.get("content") or message.get("refusal"))
        for call in message.get("tool_calls") or ():
            function = call.get("function") or {}
            block = {"type": "tool_use", "id": fit_claude_id(call.get("id") or ""), "name": function.get("name")}
            blocks.append({**block, "input": read_arguments(function.get("arguments")), **cache_mark(call)})
        return blocks

    def _parts(self, content: Any) -> list[Json]:
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if content.strip() else []
        parts = [self._part(part) for part in content or () if isinstance(part, dict)]
        return [part for part in parts if part is not None]

    def _part(self, part: Json) -> Json | None:
        kind = part.get("type")
        if kind in ("text", "refusal", "input_text", "output_text"):
            text = part.get("text") or part.get("refusal") or ""
            return {"type": "text", "text": text, **cache_mark(part)} if text.strip() else None
        if kind == "image_url":
            image = part.get("image_url")
            return self._image(image.get("url", "") if isinstance(image, dict) else str(image), part)
        if kind == "file":
            return self._file(part)
        if kind == "native" and part.get("dialect") == "anthropic":
            return dict(part["block"])
        raise InvalidRequest(
            f"a content part of the type `{kind}` cannot be sent to {self._translation.model}", param="messages"
        )

    def _image(self, url: str, part: Json) -> Json | None:
        if not url.startswith("data:"):
            return {"type": "image", "source": {"type": "url", "url": url}, **cache_mark(part)}
        kind, data = read_data_uri(url, "image_url.url")
        if kind not in CLAUDE_IMAGES:
            raise InvalidRequest(
                f"images of the type {kind} are not taken by {self._translation.model}", param="image_url"
            )
        return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}, **cache_mark(part)}

    def _file(self, part: Json) -> Json | None:
        file = part.get("file") or {}
        named: Json = {"title": file["filename"]} if file.get("filename") else {}
        if file.get("file_url"):
            source: Json = {"type": "url", "url": file["file_url"]}
        elif file.get("file_id"):
            source = {"type": "file", "file_id": file["file_id"]}
        else:
            kind, data = read_data_uri(str(file.get("file_data") or ""), "file.file_data")
            if kind.startswith("text/"):
                text = base64.b64decode(data).decode("utf-8", "replace")
                source = {"type": "text", "media_type": "text/plain", "data": text}
            else:
                source = {"type": "base64", "media_type": kind, "data": data}
        extra = {name: part[name] for name in ("citations", "context") if part.get(name)}
        return {"type": "document", "source": source, **named, **extra, **cache_mark(part)}

    # -- everything else

    def _write_limits(self, body: Json) -> None:
        request, facts = self._request, self._facts
        cap = request.get("max_completion_tokens") or request.get("max_tokens")
        body["max_tokens"] = cap if isinstance(cap, int) and cap > 0 else facts.default_output_tokens
        for name in ("temperature", "top_p", "top_k"):
            value = request.get(name)
            if value is None:
                continue
            if not facts.sampling or (name == "top_p" and "temperature" in body):
                self._translation.drop(name)
            else:
                body[name] = min(value, 1) if name == "temperature" else value
        stop = request.get("stop")
        if stop:
            body["stop_sequences"] = [text for text in ([stop] if isinstance(stop, str) else stop) if text.strip()]

    def _write_tools(self, body: Json) -> None:
        request = self._request
        choice = request.get("tool_choice")
        tools = [tool for tool in map(self._tool, request.get("tools") or ()) if tool]
        if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            allowed = choice.get("allowed_tools") or choice
            names = {(tool.get("function") or tool).get("name") for tool in allowed.get("tools") or ()}
            tools, choice = [tool for tool in tools if tool["name"] in names], allowed.get("mode")
        if not tools:
            return
        body["tools"] = tools
        written: Json = {"type": "auto"}
        if choice == "none":
            written = {"type": "none"}
        elif choice == "required":
            written = {"type": "any"}
        elif isinstance(choice, dict):
            written = {"type": "tool", "name": (choice.get("function") or choice).get("name")}
        if written["type"] in ("any", "tool") and self._facts.forced == "never":
            self._translation.drop("tool_choice", "this model cannot be forced to call a tool")
            written = {"type": "auto"}
        if request.get("parallel_tool_calls") is False and written["type"] != "none":
            written["disable_parallel_tool_use"] = True
        if choice is not None or len(written) > 1:
            body["tool_choice"] = written

    def _tool(self, tool: Json) -> Json | None:
        if tool.get("type") == "native":
            if tool.get("dialect") == "anthropic":
                return dict(tool["tool"])
            self._translation.drop(f"tools.{(tool.get('tool') or {}).get('type') or 'native'}")
            return None
        function = tool.get("function") or {}
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        written: Json = {"name": function.get("name"), "input_schema": {"type": "object", **schema}}
        if function.get("description"):
            written["description"] = function["description"]
        if function.get("strict"):
            written |= {"strict": True, "input_schema": SchemaForClaude().write(schema)}
        return {**written, **cache_mark(tool)}

    def _write_thinking(self, body: Json) -> None:
        """Reasoning effort in the words of the model's generation."""
        effort, facts = self._request.get("reasoning_effort"), self._facts
        if effort is None:
            return
        if effort == "none":
            off = next((word for word in ("disabled", "between_tools") if word in facts.thinking), "")
            body |= (
                {"thinking": {"type": off}} if off and facts.on else {} if off else {"output_config": {"effort": "low"}}
            )
            return
        forced = body.get("tool_choice", {}).get("type") in ("any", "tool")
        if "adaptive" in facts.thinking:
            body["thinking"] = {"type": "adaptive", "display": "summarized"}
        elif facts.forced == "unthinking" and forced:
            self._translation.drop("reasoning_effort", "it does not go with a forced tool choice")
            return
        else:
            budget = min(THINKING_BUDGETS.get(effort, 8192), max(1024, body["max_tokens"] * 3 // 4))
            if budget >= body["max_tokens"]:  # the cap is the client's, and money may be held by it: it is never raised
                self._translation.drop("reasoning_effort", "the output cap leaves no room to think")
                return
            body["thinking"] = {"type": "enabled", "budget_tokens": budget}
            for name in ("temperature", "top_k", "top_p"):
                if body.pop(name, None) is not None:
                    self._translation.drop(name)
        if facts.efforts:
            near = {"minimal": "low", "xhigh": "xhigh" if "xhigh" in facts.efforts else facts.efforts[-1]}.get(
                effort, effort
            )
            body.setdefault("output_config", {})["effort"] = near if near in facts.efforts else facts.efforts[-1]

    def _write_format(self, body: Json) -> None:
        form = self._request.get("response_format") or {}
        if form.get("type") == "json_schema":
            schema = (form.get("json_schema") or {}).get("schema") or {}
            body.setdefault("output_config", {})["format"] = {
                "type": "json_schema",
                "schema": SchemaForClaude().write(schema),
            }
        elif form.get("type") == "json_object":
            asked = "Answer with one JSON object and nothing else."
            system = body.get("system")
            body["system"] = (
                [*system, {"type": "text", "text": asked}]
                if isinstance(system, list)
                else f"{system}\n\n{asked}"
                if system
                else asked
            )

    def _write_extras(self, body: Json) -> None:
        for dialect, members in (self._request.get("extra_body") or {}).items():
            for name, value in members.items():
                if dialect == "anthropic":
                    body[name] = (
                        {**body[name], **value}
                        if isinstance(value, dict) and isinstance(body.get(name), dict)
                        else value
                    )
                else:
                    self._translation.drop(name)
        for name, value in self._request.items():
            if name not in CLAUDE_READS and value is not None and SAYS_LITTLE.get(name, self) != value:
                self._translation.drop(name)


def cache_mark(holder: Json) -> Json:
    """The cache mark of a part, a call or a tool; OpenAI's breakpoints count as one."""
    if holder.get("cache_control"):
        return {"cache_control": holder["cache_control"]}
    return {"cache_control": {"type": "ephemeral"}} if holder.get("prompt_cache_breakpoint") else {}


def fit_claude_id(call_id: str) -> str:
    """A tool id of letters, digits, `_` and `-`; the same for the same foreign id."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", call_id):
        return call_id
    return f"toolu_{hashlib.sha256(call_id.encode()).hexdigest()[:24]}"


def read_claude_usage(usage: Mapping[str, Any]) -> Usage:
    """Anthropic counts uncached input alone; reads and writes of the cache stand beside it."""
    creation = usage.get("cache_creation") or {}
    write, write_1h = (
        _count(usage.get("cache_creation_input_tokens")),
        _count(creation.get("ephemeral_1h_input_tokens")),
    )
    details = usage.get("output_tokens_details") or {}
    tools = usage.get("server_tool_use") or {}
    return Usage(
        input_tokens=_count(usage.get("input_tokens")),
        cached_tokens=_count(usage.get("cache_read_input_tokens")),
        cache_write_5m_tokens=max(0, write - write_1h),
        cache_write_1h_tokens=min(write, write_1h),
        output_tokens=_count(usage.get("output_tokens")),
        reasoning_tokens=_count(details.get("thinking_tokens")),
        searches=_count(tools.get("web_search_requests")),
    )


def canonical_claude_usage(usage: Usage) -> Json:
    told = write_openai_usage(usage)
    return {**told, "num_search_queries": usage.searches} if usage.searches else told


def write_claude_usage(usage: Json | None) -> Json:
    """Canonical usage in Anthropic's words."""
    read = read_openai_usage(usage or {})
    write = read.cache_write_5m_tokens + read.cache_write_1h_tokens
    told: Json = {
        "input_tokens": max(0, read.prompt_tokens - read.cached_tokens - read.cached_audio_tokens - write),
        "cache_creation_input_tokens": write,
        "cache_read_input_tokens": read.cached_tokens + read.cached_audio_tokens,
        "output_tokens": read.completion_tokens,
    }
    return {**told, "cost": usage["cost"]} if usage and "cost" in usage else told


class AnthropicDecoder:
    """Reads a Messages stream into canonical chunks. Block indices become running tool indices."""

    def __init__(self, dialect: AnthropicMessages, translation: Translation) -> None:
        self._dialect, self._translation = dialect, translation
        self._events = SseReader()
        self._blocks: dict[int, Json] = {}
        self._tools: dict[int, int] = {}
        self._usage: Json = {}
        self._head: Json = {"object": "chat.completion.chunk", "created": translation.now_s, "model": translation.model}
        self.complete = False

    def feed(self, data: bytes) -> list[Json]:
        return [chunk for _, payload in self._events.feed(data) for chunk in self._read(payload)]

    def close(self) -> list[Json]:
        return [chunk for _, payload in self._events.close() for chunk in self._read(payload)]

    def _read(self, payload: bytes) -> list[Json]:
        event = read_event_json(payload)
        if event.get("type") == "error" or "error" in event:
            raise self._dialect.read_error(_error_status(event), payload)
        read = getattr(self, f"_on_{event.get('type')}", None)
        with malformed_is_theirs():
            return read(event) if read is not None else []

    def _chunk(self, delta: Json, finish: str | None = None) -> Json:
        return {**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    def _on_message_start(self, event: Json) -> list[Json]:
        message = event["message"]
        self._head |= {
            "id": message.get("id") or self._translation.new_id("chatcmpl-"),
            "model": message.get("model") or self._translation.model,
        }
        self._usage = dict(message.get("usage") or {})
        return [self._chunk({"role": "assistant", "content": ""})]

    def _on_content_block_start(self, event: Json) -> list[Json]:
        block = self._blocks[event["index"]] = dict(event["content_block"])
        kind = block.get("type")
        if kind == "tool_use":
            at = self._tools[event["index"]] = len(self._tools)
            block["json"] = ""
            function = {"name": block.get("name"), "arguments": ""}
            return [
                self._chunk(
                    {"tool_calls": [{"index": at, "id": block.get("id"), "type": "function", "function": function}]}
                )
            ]
        if kind == "text":
            return [self._chunk({"content": block["text"]})] if block.get("text") else []
        if kind == "thinking":
            return [self._chunk({"reasoning_content": block["thinking"]})] if block.get("thinking") else []
        if kind == "redacted_thinking":
            return [self._chunk({"thinking_blocks": [{"type": "redacted_thinking", "data": block.get("data")}]})]
        return []

    def _on_content_block_delta(self, event: Json) -> list[Json]:
        block, delta = self._blocks.get(event["index"], {}), event["delta"]
        kind = delta.get("type")
        if kind == "text_delta":
            return [self._chunk({"content": delta["text"]})]
        if kind == "thinking_delta":
            block["thinking"] = (block.get("thinking") or "") + delta["thinking"]
            return [self._chunk({"reasoning_content": delta["thinking"]})]
        if kind == "signature_delta":
            block["signature"] = (block.get("signature") or "") + delta["signature"]
        elif kind == "input_json_delta":
            return self._argument(event["index"], block, delta["partial_json"])
        elif kind == "citations_delta":
            return [self._chunk({"annotations": [read_claude_citation(delta["citation"])]})]
        return []

    def _argument(self, index: int, block: Json, text: str) -> list[Json]:
        block["json"] = block.get("json", "") + text
        if index not in self._tools or not text:
            return []
        return [self._chunk({"tool_calls": [{"index": self._tools[index], "function": {"arguments": text}}]})]

    def _on_content_block_stop(self, event: Json) -> list[Json]:
        block = self._blocks.pop(event["index"], {})
        kind = block.get("type")
        if kind == "tool_use" and not block["json"]:
            text = dump_json(block.get("input") or {}).decode()
            return [
                self._chunk({"tool_calls": [{"index": self._tools[event["index"]], "function": {"arguments": text}}]})
            ]
        if kind == "thinking" and block.get("signature"):
            return [
                self._chunk(
                    {"thinking_blocks": [{name: block.get(name) or "" for name in ("type", "thinking", "signature")}]}
                )
            ]
        if kind not in ("text", "thinking", "redacted_thinking", "tool_use", None):
            text = block.pop("json", "")
            whole = {**block, "input": read_arguments(text)} if text else block
            return [self._chunk({"native_blocks": [{"dialect": "anthropic", "block": whole}]})]
        return []

    def _on_message_delta(self, event: Json) -> list[Json]:
        self._usage |= {name: value for name, value in (event.get("usage") or {}).items() if value is not None}
        delta = event.get("delta") or {}
        reason = delta.get("stop_reason")
        if not reason:
            return []
        told: Json = (
            {"refusal": (delta.get("stop_details") or {}).get("explanation") or ""} if reason == "refusal" else {}
        )
        chunk = self._chunk({name: value for name, value in told.items() if value}, CLAUDE_FINISHES.get(reason, "stop"))
        if delta.get("stop_sequence"):
            chunk["choices"][0]["stop_sequence"] = delta["stop_sequence"]
        return [chunk]

    def _on_message_stop(self, event: Json) -> list[Json]:
        self.complete = True
        return [{**self._head, "choices": [], "usage": canonical_claude_usage(read_claude_usage(self._usage))}]


def _error_status(event: Json) -> int:
    kind = str((event.get("error") or {}).get("type") if isinstance(event.get("error"), dict) else "")
    by_type = {kind: status for status, kind in ANTHROPIC_ERRORS.items()}
    return by_type.get(kind, 502)


def read_claude_citation(citation: Json) -> Json:
    """A citation with a URL is OpenAI's url_citation; any other is kept as it came."""
    if citation.get("url"):
        told = {"url": citation["url"], "title": citation.get("title") or "", "start_index": 0, "end_index": 0}
        return {"type": "url_citation", "url_citation": told, "anthropic": citation}
    return {"type": "citation", "anthropic": citation}


class AnthropicParser:
    """One Messages body as a canonical request."""

    def __init__(self, body: Json) -> None:
        self._body = body
        self._messages: list[Json] = []
        self._extra: Json = {}

    def parse(self) -> Json:
        body = self._body
        request: Json = {"model": want_text(body.get("model"), "model"), "messages": self._messages}
        if body.get("system"):
            self._messages.append({"role": "system", "content": self._text_parts(body["system"], "system")})
        for at, message in enumerate(want_list(body.get("messages"), "messages")):
            where = f"messages[{at}]"
            self._read_message(want_object(message, where), where)
        if not self._messages:
            raise InvalidRequest("`messages` must not be empty", param="messages")
        if "max_tokens" in body:
            request["max_completion_tokens"] = want_whole(body["max_tokens"], "max_tokens")
        renamed = {
            "temperature": "temperature",
            "top_p": "top_p",
            "top_k": "top_k",
            "stop_sequences": "stop",
            "stream": "stream",
        }
        request |= {name: body[given] for given, name in renamed.items() if body.get(given) is not None}
        self._read_tools(request)
        self._read_thinking(request)
        if body.get("metadata"):
            request["user"] = want_object(body["metadata"], "metadata").get("user_id")
        if body.get("service_tier"):
            request["service_tier"] = {"standard_only": "default"}.get(body["service_tier"], body["service_tier"])
        if body.get("cache_control"):
            request["cache_control"] = body["cache_control"]
        known = {*renamed, "model", "messages", "system", "max_tokens", "tools", "tool_choice", "thinking", "output_config", "metadata",
                 "service_tier", "cache_control"}  # fmt: skip
        self._extra |= {name: value for name, value in body.items() if name not in known and value is not None}
        return {**request, "extra_body": {"anthropic": self._extra}} if self._extra else request

    def _text_parts(self, content: Any, where: str) -> Any:
        if isinstance(content, str):
            return content
        blocks = [want_object(block, f"{where}[{at}]") for at, block in enumerate(want_list(content, where))]
        return [
            {"type": "text", "text": want_text(block.get("text"), f"{where}.text"), **cache_mark(block)}
            for block in blocks
        ]

    def _read_message(self, message: Json, where: str) -> None:
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise InvalidRequest(f"`{where}.role` must be user or assistant", param=f"{where}.role")
        if role == "system":
            self._messages.append({"role": "system", "content": self._text_parts(content, f"{where}.content")})
        elif isinstance(content, str):
            self._messages.append({"role": role, "content": content})
        else:
            blocks = [want_object(block, f"{where}.content") for block in want_list(content, f"{where}.content")]
            read = self._read_user if role == "user" else self._read_assistant
            read(blocks, f"{where}.content")

    def _read_user(self, blocks: list[Json], where: str) -> None:
        """Tool results become messages of their own, before the rest of the turn."""
        after: list[Json] = []
        for block in blocks:
            if block.get("type") == "tool_result":
                self._read_result(block, where)
            else:
                after.append(self._part(block, where))
        if after:
            plain = len(after) == 1 and after[0].keys() == {"type", "text"}
            self._messages.append({"role": "user", "content": after[0]["text"] if plain else after})

    def _read_result(self, block: Json, where: str) -> None:
        content = block.get("content") or ""
        message: Json = {"role": "tool", "tool_call_id": want_text(block.get("tool_use_id"), f"{where}.tool_use_id")}
        if isinstance(content, list):
            parts = [self._part(want_object(part, where), where) for part in content]
            plain = all(part.keys() == {"type", "text"} for part in parts)
            content = "\n".join(part["text"] for part in parts) if plain else parts
        message["content"] = content
        if block.get("is_error"):
            message["is_error"] = True
        self._messages.append({**message, **cache_mark(block)})

    def _part(self, block: Json, where: str) -> Json:
        kind = block.get("type")
        if kind == "text":
            return {"type": "text", "text": want_text(block.get("text"), f"{where}.text"), **cache_mark(block)}
        if kind == "image":
            return {"type": "image_url", "image_url": {"url": self._source_url(block, where)}, **cache_mark(block)}
        if kind == "document":
            return self._document(block, where)
        if kind == "search_result":
            texts = [
                part.get("text") or "" for part in want_list(block.get("content"), where) if isinstance(part, dict)
            ]
            return {
                "type": "text",
                "text": f"{block.get('title') or ''} ({block.get('source') or ''})\n" + "\n".join(texts),
                **cache_mark(block),
            }
        raise InvalidRequest(f"a block of the type `{kind}` is not understood in `{where}`", param=where)

    def _source_url(self, block: Json, where: str) -> str:
        source = want_object(block.get("source"), f"{where}.source")
        if source.get("type") == "base64":
            return f"data:{source.get('media_type')};base64,{want_text(source.get('data'), f'{where}.source.data')}"
        if source.get("type") == "url":
            return want_text(source.get("url"), f"{where}.source.url")
        raise InvalidRequest(
            f"a source of the type `{source.get('type')}` is known to Anthropic alone", param=f"{where}.source"
        )

    def _document(self, block: Json, where: str) -> Json:
        source = want_object(block.get("source"), f"{where}.source")
        file: Json = {"filename": block["title"]} if block.get("title") else {}
        if source.get("type") == "text":
            data = base64.b64encode(want_text(source.get("data"), f"{where}.source.data").encode()).decode()
            file["file_data"] = f"data:text/plain;base64,{data}"
        elif source.get("type") == "content":
            content = source.get("content")
            texts = (
                [content]
                if isinstance(content, str)
                else [part.get("text") or "" for part in content or () if isinstance(part, dict)]
            )
            return {"type": "text", "text": "\n".join(texts), **cache_mark(block)}
        elif source.get("type") == "file":
            file["file_id"] = source.get("file_id")
        elif source.get("type") == "url":
            file["file_url"] = self._source_url(block, where)
        else:
            file.setdefault("filename", "document.pdf")
            file["file_data"] = self._source_url(block, where)
        extra = {name: block[name] for name in ("citations", "context") if block.get(name)}
        return {"type": "file", "file": file, **extra, **cache_mark(block)}

    def _read_assistant(self, blocks: list[Json], where: str) -> None:
        message: Json = {"role": "assistant", "content": None}
        texts, calls, thoughts, natives = [], [], [], []
        for block in blocks:
            kind = block.get("type")
            if kind == "text":
                texts.append(self._part({name: value for name, value in block.items() if name != "citations"}, where))
            elif kind == "tool_use":
                function = {
                    "name": want_text(block.get("name"), f"{where}.name"),
                    "arguments": dump_json(block.get("input") or {}).decode(),
                }
                calls.append(
                    {
                        "id": want_text(block.get("id"), f"{where}.id"),
                        "type": "function",
                        "function": function,
                        **cache_mark(block),
                    }
                )
            elif kind in ("thinking", "redacted_thinking"):
                thoughts.append(block)
            else:
                natives.append({"dialect": "anthropic", "block": block})
        if texts:
            message["content"] = texts[0]["text"] if len(texts) == 1 and texts[0].keys() == {"type", "text"} else texts
        reasoning = "".join(str(block.get("thinking") or "") for block in thoughts)
        found = {
            "tool_calls": calls,
            "thinking_blocks": thoughts,
            "reasoning_content": reasoning,
            "native_blocks": natives,
        }
        self._messages.append({**message, **{name: value for name, value in found.items() if value}})

    def _read_tools(self, request: Json) -> None:
        body = self._body
        tools = [
            self._tool(want_object(tool, f"tools[{at}]"))
            for at, tool in enumerate(want_list(body.get("tools") or [], "tools"))
        ]
        if tools:
            request["tools"] = tools
        choice = want_object(body.get("tool_choice") or {}, "tool_choice")
        named = {"type": "function", "function": {"name": choice.get("name")}}
        words = {"auto": "auto", "any": "required", "none": "none", "tool": named}
        if choice and choice.get("type") not in words:
            raise InvalidRequest("`tool_choice.type` must be auto, any, tool or none", param="tool_choice")
        if choice:
            request["tool_choice"] = words[choice["type"]]
        if choice.get("disable_parallel_tool_use"):
            request["parallel_tool_calls"] = False

    def _tool(self, tool: Json) -> Json:
        if "input_schema" not in tool:
            return {"type": "native", "dialect": "anthropic", "tool": tool}
        function = {
            "name": want_text(tool.get("name"), "tools.name"),
            "parameters": want_object(tool["input_schema"], "tools.input_schema"),
        }
        function |= {name: tool[name] for name in ("description", "strict") if tool.get(name) is not None}
        return {"type": "function", "function": function, **cache_mark(tool)}

    def _read_thinking(self, request: Json) -> None:
        config = want_object(self._body.get("output_config") or {}, "output_config")
        thinking = want_object(self._body.get("thinking") or {}, "thinking")
        effort = config.get("effort")
        if thinking.get("type") == "enabled":
            budget = _count(thinking.get("budget_tokens"))
            effort = effort or ("low" if budget < 2000 else "medium" if budget < 10_000 else "high")
        elif thinking.get("type") in ("disabled", "between_tools"):
            effort = "none"
        elif thinking:
            effort = effort or "medium"
        if effort:
            request["reasoning_effort"] = effort
        form = config.get("format")
        if isinstance(form, dict) and form.get("type") == "json_schema":
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "response", "schema": form.get("schema") or {}},
            }
        rest = {name: value for name, value in config.items() if name not in ("effort", "format")}
        if rest:
            self._extra["output_config"] = rest


class AnthropicRenderer:
    """Writes canonical chunks as a Messages stream: blocks strictly one after the other, the end held until close.

    Tool calls may come interleaved from OpenAI-like providers; the first open one streams, others wait for their turn.
    """

    def __init__(self, request: Json, new_id: Callable[[str], str]) -> None:
        self._model = str(request.get("model") or "")
        self._new_id = new_id
        self._began = self._ended = False
        self._open = ""
        self._index = -1
        self._signed = False
        self._tools: dict[int, Json] = {}
        self._current: int | None = None
        self._stop = "end_turn"
        self._refused = False
        self._stop_sequence: str | None = None
        self._usage: Json | None = None

    def feed(self, chunk: Json) -> bytes:
        out = [] if self._began else [self._begin(chunk)]
        for choice in chunk.get("choices") or ():
            if not choice.get("index"):
                out += self._choice(choice)
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        return b"".join(out)

    def _begin(self, chunk: Json) -> bytes:
        self._began = True
        self._model = chunk.get("model") or self._model
        given = str(chunk.get("id") or "")
        message: Json = {
            "id": given if given.startswith("msg_") else self._new_id("msg_"), "type": "message", "role": "assistant", "model": self._model,
            "content": [], "stop_reason": None, "stop_sequence": None, "usage": write_claude_usage(chunk.get("usage")),
        }  # fmt: skip
        return self._event("message_start", {"message": message})

    @staticmethod
    def _event(kind: str, members: Json) -> bytes:
        return sse_event({"type": kind, **members}, kind)

    def _choice(self, choice: Json) -> list[bytes]:
        delta, out = choice.get("delta") or {}, []
        if delta.get("reasoning_content"):
            out += self._text("thinking", "thinking_delta", delta["reasoning_content"])
        for block in delta.get("thinking_blocks") or ():
            out += self._thinking_block(block)
        for native in delta.get("native_blocks") or ():
            if native.get("dialect") == "anthropic":
                out += [*self._close(), self._start(native["block"]), *self._close()]
        if delta.get("content"):
            out += self._text("text", "text_delta", delta["content"])
        if delta.get("refusal"):
            self._refused = True
            out += self._text("text", "text_delta", delta["refusal"])
        for note in delta.get("annotations") or ():
            if note.get("anthropic") and self._open == "text":
                out.append(
                    self._event(
                        "content_block_delta",
                        {"index": self._index, "delta": {"type": "citations_delta", "citation": note["anthropic"]}},
                    )
                )
        for call in delta.get("tool_calls") or ():
            out += self._tool(call)
        reason = choice.get("finish_reason")
        if reason:
            self._stop = STOP_REASONS.get(reason, "end_turn")
            self._stop_sequence = choice.get("stop_sequence")
            self._stop = "stop_sequence" if self._stop_sequence else "refusal" if self._refused else self._stop
        return out

    def _start(self, block: Json) -> bytes:
        self._index += 1
        self._open = block["type"]
        return self._event("content_block_start", {"index": self._index, "content_block": block})

    def _close(self) -> list[bytes]:
        if not self._open:
            return []
        self._open, self._current = "", None
        return [self._event("content_block_stop", {"index": self._index})]

    def _text(self, kind: str, delta_kind: str, text: str) -> list[bytes]:
        out = []
        if self._open != kind:
            empty = (
                {"type": "text", "text": ""}
                if kind == "text"
                else {"type": "thinking", "thinking": "", "signature": ""}
            )
            out = [*self._close(), *self._flush_tools(), self._start(empty)]
        name = kind if kind == "thinking" else "text"
        return [
            *out,
            self._event("content_block_delta", {"index": self._index, "delta": {"type": delta_kind, name: text}}),
        ]

    def _thinking_block(self, block: Json) -> list[bytes]:
        if block.get("type") == "redacted_thinking":
            return [*self._close(), self._start(block), *self._close()]
        if block.get("type") != "thinking" or not block.get("signature"):
            return []
        out = (
            []
            if self._open == "thinking"
            else [*self._close(), self._start({"type": "thinking", "thinking": "", "signature": ""})]
        )
        signed = {"type": "signature_delta", "signature": block["signature"]}
        return [*out, self._event("content_block_delta", {"index": self._index, "delta": signed}), *self._close()]

    def _tool(self, call: Json) -> list[bytes]:
        at = call.get("index") or 0
        kept = self._tools.setdefault(at, {"id": "", "name": "", "waiting": "", "started": False, "done": False})
        function = call.get("function") or {}
        kept["id"] = call.get("id") or kept["id"]
        kept["name"] = function.get("name") or kept["name"]
        kept["waiting"] += function.get("arguments") or ""
        if self._current is None and not kept["done"] and kept["name"]:
            return [*self._close(), *self._begin_tool(at)]
        if self._current is not None and at > self._current and kept["name"] and self._is_whole(self._current):
            return [*self._end_tool(), *self._begin_tool(at)]
        return self._drain_tool(at) if at == self._current else []

    def _is_whole(self, at: int) -> bool:
        """Whether a call's arguments are a whole JSON value, so that the next call may begin."""
        return load_object(self._tools[at].get("said", "")) is not None

    def _begin_tool(self, at: int) -> list[bytes]:
        kept = self._tools[at]
        kept["started"], self._current = True, at
        block = {"type": "tool_use", "id": kept["id"] or self._new_id("toolu_"), "name": kept["name"], "input": {}}
        out = [self._start(block)]
        self._current = at
        return [*out, *self._drain_tool(at)]

    def _drain_tool(self, at: int) -> list[bytes]:
        kept = self._tools[at]
        text, kept["waiting"] = kept["waiting"], ""
        kept["said"] = kept.get("said", "") + text
        if not text:
            return []
        return [
            self._event(
                "content_block_delta",
                {"index": self._index, "delta": {"type": "input_json_delta", "partial_json": text}},
            )
        ]

    def _end_tool(self) -> list[bytes]:
        if self._current is not None:
            self._tools[self._current]["done"] = True
        return self._close()

    def _flush_tools(self) -> list[bytes]:
        """Write the calls that waited, whole."""
        out = self._end_tool() if self._current is not None else []
        for at, kept in sorted(self._tools.items()):
            if not kept["done"] and kept["name"]:
                kept["done"] = True
                out += [*self._begin_tool(at), *self._end_tool()]
        return out

    def close(self) -> bytes:
        out = [] if self._began else [self._begin({})]
        out += [*self._flush_tools(), *self._close()]
        delta = {"stop_reason": self._stop, "stop_sequence": self._stop_sequence}
        out.append(self._event("message_delta", {"delta": delta, "usage": write_claude_usage(self._usage)}))
        return b"".join([*out, self._event("message_stop", {})])

    def fail(self, error: GatewayError, request_id: str) -> bytes:
        return self._event(
            "error",
            {name: value for name, value in anthropic_error_body(error, request_id)[1].items() if name != "type"},
        )


def anthropic_error_body(error: GatewayError, request_id: str) -> tuple[int, Json]:
    status = 529 if error.status == 503 else error.status
    kind = ANTHROPIC_ERRORS.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    told = {**error.fields, "type": kind, "message": error.message}
    details = {"error_code": error.code, **({"param": error.param} if error.param else {})}
    return status, {"type": "error", "error": {**told, "details": details}, "request_id": request_id}


class AnthropicMessages(Dialect):
    """Both sides of Anthropic's Messages API."""

    name = "anthropic"
    forwarded_headers = ("anthropic-version", "anthropic-beta")
    fixed_headers: ClassVar[Mapping[str, str]] = {"anthropic-version": "2023-06-01"}

    def with_output_cap(self, request: Json, tokens: int) -> Json:
        return {**request, "max_tokens": tokens}

    heartbeat = b'event: ping\ndata: {"type": "ping"}\n\n'

    def parse(self, body: Json, path: Mapping[str, str]) -> Json:
        return AnthropicParser(body).parse()

    def render(self, completion: Json, request: Json) -> Json:
        choice = (completion.get("choices") or [{}])[0]
        message = choice.get("message") or {}
        content: list[Json] = [
            block
            for block in message.get("thinking_blocks") or ()
            if block.get("type") in ("thinking", "redacted_thinking")
        ]
        if message.get("reasoning_content") and not content:
            content.append({"type": "thinking", "thinking": message["reasoning_content"], "signature": ""})
        content += [
            native["block"] for native in message.get("native_blocks") or () if native.get("dialect") == "anthropic"
        ]
        text = (message.get("content") or "") + (message.get("refusal") or "")
        if text:
            cited = [note["anthropic"] for note in message.get("annotations") or () if note.get("anthropic")]
            content.append({"type": "text", "text": text, **({"citations": cited} if cited else {})})
        for call in message.get("tool_calls") or ():
            function = call.get("function") or {}
            content.append(
                {
                    "type": "tool_use",
                    "id": call.get("id"),
                    "name": function.get("name"),
                    "input": read_arguments(function.get("arguments")),
                }
            )
        given, sequence = str(completion.get("id") or ""), choice.get("stop_sequence")
        return {
            "id": given if given.startswith("msg_") else f"msg_{given.removeprefix('chatcmpl-')}", "type": "message", "role": "assistant",
            "model": completion.get("model") or request.get("model"), "content": content,
            "stop_reason": "stop_sequence" if sequence else "refusal" if message.get("refusal")
            else STOP_REASONS.get(choice.get("finish_reason") or "", "end_turn"),
            "stop_sequence": sequence, "usage": write_claude_usage(completion.get("usage")),
        }  # fmt: skip

    def renderer(self, request: Json, new_id: Callable[[str], str], now_s: int) -> Renderer:
        return AnthropicRenderer(request, new_id)

    def render_error(self, error: GatewayError, request_id: str) -> tuple[int, Json]:
        return anthropic_error_body(error, request_id)

    def render_models(self, rows: list[Json]) -> Json:
        data = [self.render_model(row) for row in rows]
        edges = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"data": data, "has_more": False, **edges}

    def render_model(self, row: Json) -> Json:
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row.get("created") or 0))
        return {
            "type": "model",
            "id": row["id"],
            "display_name": row.get("display_name") or row["id"],
            "created_at": made,
        }

    def count_tokens(self, canonical: Json, request: Json) -> Json:
        """An estimate: four bytes of text a token, and what a message and a picture cost at the least."""
        counted = {name: canonical.get(name) for name in ("messages", "tools") if canonical.get(name)}
        text = re.sub(rb'"data:[^"]{200,}"', b'"%b"' % (b"x" * 6000), dump_json(counted))
        return {"input_tokens": (len(text) + 3) // 4}

    def path(self, provider: Provider, model: str, stream: bool) -> str:
        return provider.path("chat", model)

    def encode(self, request: Json, translation: Translation) -> Json:
        return AnthropicEncoder(request, translation).build()

    def decode(self, answer: Json, translation: Translation) -> Json:
        if answer.get("type") == "error":
            raise self.read_error(_error_status(answer), dump_json(answer))
        if not isinstance(answer.get("content"), list):
            raise UpstreamError("the provider's answer has no `content`", code="upstream_malformed")
        with malformed_is_theirs():
            message = self._message(answer["content"])
        reason = answer.get("stop_reason")
        if reason == "refusal" and (answer.get("stop_details") or {}).get("explanation"):
            message["refusal"] = answer["stop_details"]["explanation"]
        choice: Json = {"index": 0, "message": message, "finish_reason": CLAUDE_FINISHES.get(str(reason), "stop")}
        if answer.get("stop_sequence"):
            choice["stop_sequence"] = answer["stop_sequence"]
        usage = self.read_usage(answer)
        return {
            "id": answer.get("id") or translation.new_id("chatcmpl-"), "object": "chat.completion", "created": translation.now_s,
            "model": answer.get("model") or translation.model, "choices": [choice],
            **({"usage": canonical_claude_usage(usage)} if usage else {}),
        }  # fmt: skip

    @staticmethod
    def _message(blocks: list[Json]) -> Json:
        of = {
            kind: [block for block in blocks if block.get("type") == kind]
            for kind in ("text", "tool_use", "thinking", "redacted_thinking")
        }
        message: Json = {"role": "assistant", "content": "".join(block["text"] for block in of["text"]) or None}
        if of["tool_use"]:
            message["tool_calls"] = [
                {
                    "id": block["id"],
                    "type": "function",
                    "function": {"name": block["name"], "arguments": dump_json(block.get("input") or {}).decode()},
                }
                for block in of["tool_use"]
            ]
        elif message["content"] is None:
            message["content"] = ""
        thoughts = [block for block in blocks if block.get("type") in ("thinking", "redacted_thinking")]
        reasoning = "".join(block.get("thinking") or "" for block in of["thinking"])
        natives = [{"dialect": "anthropic", "block": block} for block in blocks if block.get("type") not in of]
        notes = [read_claude_citation(citation) for block in of["text"] for citation in block.get("citations") or ()]
        found = {
            "thinking_blocks": thoughts,
            "reasoning_content": reasoning,
            "native_blocks": natives,
            "annotations": notes,
        }
        return {**message, **{name: value for name, value in found.items() if value}}

    def decoder(self, translation: Translation) -> Decoder:
        return AnthropicDecoder(self, translation)

    def read_usage(self, answer: Json) -> Usage | None:
        usage = answer.get("usage")
        return read_claude_usage(usage) if isinstance(usage, dict) else None

    def read_error(self, status: int, body: bytes) -> UpstreamError:
        members = read_error_members(body)
        kind = members.get("type")
        code = (members.get("details") or {}).get("error_code") if isinstance(members.get("details"), dict) else None
        code = code or (kind if isinstance(kind, str) and kind != "error" else None)
        spent = isinstance(code, str) and code.endswith("spend_limit_reached")
        text = str(members.get("message") or f"the provider answered {status}")
        return upstream_failure(
            status, text, code="insufficient_quota" if spent else code, bad_key=kind == "authentication_error"
        )


# ----- Cohere ---------------------------------------------------------------------------------------------------------
# Cohere v2: near to OpenAI's chat, but text beside tool calls is a `tool_plan`, tools cannot be chosen by name, schemas
# nest differently, and unknown members are refused. First come the parts that every provider dialect from here on
# shares: which values say nothing, tools and their choice, histories, and the writers of canonical chunks.
# What differs by model is a row of COHERE_FAMILIES.
# Sources: https://docs.cohere.com/v2/reference/chat, …/embed, …/rerank; the types of the vendor's Python SDK 7.3

#: Members of a canonical request that ask for nothing beyond what happens anyway when they have these values.
SAYS_NOTHING: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "frequency_penalty": (0,), "presence_penalty": (0,),
    "parallel_tool_calls": (True,), "store": (False,), "service_tier": ("auto", "default"), "modalities": (["text"],),
    "response_format": ({"type": "text"},), "tool_choice": ("auto",), "logit_bias": ({},), "metadata": ({},),
    "stop": ("", []), "tools": ([],), "functions": ([],), "function_call": ("auto",), "extra_body": ({},),
}  # fmt: skip
#: Members that every encoder carries by itself.
ALWAYS_CARRIED: Final = frozenset({
    "model", "messages", "stream", "stream_options", "tools", "tool_choice", "functions", "function_call", "extra_body",
})  # fmt: skip
CARRIED_IN_MESSAGES: Final = frozenset({
    "role", "content", "tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "refusal",
    "thinking_blocks", "is_error", "cache_control",
})  # fmt: skip
#: The schema of a custom (free text) tool sent as a function; `read_call` and `CallWriter` undo it.
CUSTOM_SCHEMA: Final[Json] = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
ANY_OBJECT: Final[Json] = {"type": "object", "properties": {}}


def says_nothing(name: str, value: Any) -> bool:
    return value is None or value in SAYS_NOTHING.get(name, ())


@contextlib.contextmanager
def provider_shape() -> Iterator[None]:
    """An answer of an unforeseen shape is the provider's failure, not ours."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UpstreamError("the provider's answer has an unknown shape", code="upstream_malformed") from error


def with_effort(request: Json) -> Json:
    """A request whose effort, if it came in OpenRouter's `reasoning`, stands in `reasoning_effort`."""
    reasoning = request.get("reasoning")
    if not isinstance(reasoning, dict) or reasoning.keys() != {"effort"} or request.get("reasoning_effort"):
        return request
    return {**request, "reasoning_effort": reasoning["effort"], "reasoning": None}


def own_extras(request: Json, dialect: str, translation: Translation) -> Json:
    """The members kept for `dialect` in `extra_body`; those for others are named as dropped."""
    mine: Json = {}
    for owner, members in want_object(request.get("extra_body") or {}, "extra_body").items():
        for name, value in want_object(members, f"extra_body.{owner}").items():
            if owner == dialect:
                mine[name] = value
            else:
                translation.drop(name)
    return mine


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """One function that the model may call; a custom tool is one, too."""

    name: str
    description: str
    parameters: Json
    strict: bool
    cache_control: Any


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`mode` is auto, required or none; `names` are the only tools allowed, None for all; `named` if just one is."""

    mode: str = "auto"
    names: frozenset[str] | None = None
    named: bool = False


def read_tools(request: Json, dialect: str, translation: Translation) -> tuple[list[ToolSpec], list[Json]]:
    """The tools of a canonical request: functions, and this dialect's own tools as they came. Others are dropped."""
    functions: list[ToolSpec] = []
    native: list[Json] = []
    tools = want_list(request.get("tools") or [], "tools")
    legacy = [{"type": "function", "function": each} for each in want_list(request.get("functions") or [], "functions")]
    for at, tool in enumerate([*tools, *legacy]):
        tool = want_object(tool, f"tools[{at}]")
        kind = tool.get("type") or ("function" if "function" in tool else None)
        if kind in ("function", "custom"):
            inner = want_object(tool.get(kind), f"tools[{at}].{kind}")
            functions.append(_read_tool(inner, f"tools[{at}].{kind}", kind, tool.get("cache_control"), translation))
        elif kind == "native" and tool.get("dialect") == dialect:
            native.append(want_object(tool.get("tool"), f"tools[{at}].tool"))
        else:
            own = tool.get("tool")
            what = (own.get("type") or next(iter(own), "")) if isinstance(own, dict) else kind
            translation.drop(f"tools.{what}")
    return functions, native


def _read_tool(inner: Json, where: str, kind: str, cache_control: Any, translation: Translation) -> ToolSpec:
    name = want_text(inner.get("name"), f"{where}.name")
    description = want_text(inner.get("description") or "", f"{where}.description")
    if kind == "custom":
        if inner.get("format") not in (None, {"type": "text"}):
            translation.drop("tools.custom.format")
        translation.names.setdefault("custom_tools", set()).add(name)
        return ToolSpec(name, description, CUSTOM_SCHEMA, False, cache_control)
    schema = want_object(inner.get("parameters") or ANY_OBJECT, f"{where}.parameters")
    schema = schema if schema.get("type") else {"type": "object", **schema}
    return ToolSpec(name, description, schema, inner.get("strict") is True, cache_control)


def read_chosen_tools(request: Json) -> ToolChoice:
    """OpenAI's `tool_choice`, its legacy `function_call`, and the list of allowed tools, as one value."""
    choice = request.get("tool_choice") or request.get("function_call") or "auto"
    if choice in ("auto", "required", "none"):
        return ToolChoice(choice)
    choice = want_object(choice, "tool_choice")
    if choice.get("type") == "allowed_tools":
        allowed = want_object(choice.get("allowed_tools") or choice, "tool_choice.allowed_tools")
        tools = want_list(allowed.get("tools"), "tool_choice.tools")
        names = frozenset(_chosen_name(want_object(tool, "tool_choice.tools")) for tool in tools)
        return ToolChoice("required" if allowed.get("mode") == "required" else "auto", names)
    return ToolChoice("required", frozenset({_chosen_name(choice)}), True)


def _chosen_name(choice: Json) -> str:
    inner = choice.get("function") or choice.get("custom") or choice
    return want_text(want_object(inner, "tool_choice").get("name"), "tool_choice.name")


def read_messages(request: Json, translation: Translation) -> Iterator[tuple[Json, str, str]]:
    """The messages with their roles and places; members no encoder carries are named as dropped."""
    for at, message in enumerate(want_list(request.get("messages"), "messages")):
        where = f"messages[{at}]"
        message = want_object(message, where)
        role = want_text(message.get("role"), f"{where}.role")
        if role == "function":  # the calls of 2023 had no ids
            message = {**message, "role": "tool", "tool_call_id": f"call_{message.get('name')}"}
        elif message.get("name"):
            translation.drop("messages.name")
        for name, value in message.items():
            if value and name not in CARRIED_IN_MESSAGES and name != "name":
                translation.drop(f"messages.{name}")
        yield message, {"developer": "system"}.get(role, message["role"]), where


def read_parts(content: Any, where: str) -> list[Json]:
    """A message's content as parts; text is one part, null none."""
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = []
    for at, part in enumerate(want_list(content, where)):
        part = {"type": "text", "text": part} if isinstance(part, str) else want_object(part, f"{where}[{at}]")
        if part.get("type") in ("text", "refusal", "input_text", "output_text"):
            text = want_text(part.get("text") or part.get("refusal") or "", f"{where}[{at}].text")
            part = {**part, "type": "text", "text": text}
        parts.append(part)
    return parts


def read_history_calls(message: Json, where: str) -> list[tuple[str, str, str]]:
    """The tool calls of an assistant's message as ids, names and arguments in JSON."""
    found = []
    calls = want_list(message.get("tool_calls") or [], f"{where}.tool_calls")
    for at, call in enumerate(calls):
        place = f"{where}.tool_calls[{at}]"
        call = want_object(call, place)
        kind = "custom" if call.get("type") == "custom" else "function"
        inner = want_object(call.get(kind), f"{place}.{kind}")
        given = dump_json({"input": inner.get("input") or ""}).decode() if kind == "custom" else inner.get("arguments")
        name = want_text(inner.get("name"), f"{place}.{kind}.name")
        found.append((want_text(call.get("id") or f"call_{name}", f"{place}.id"), name, argument_text(given)))
    if isinstance(legacy := message.get("function_call"), dict) and not calls:
        name = want_text(legacy.get("name"), f"{where}.function_call.name")
        found.append((f"call_{name}", name, argument_text(legacy.get("arguments"))))
    return found


def argument_text(arguments: Any) -> str:
    """A call's arguments as JSON text; a call without any may come as null, "null", "" or not at all."""
    if not isinstance(arguments, str):
        return dump_json(arguments).decode() if arguments else "{}"
    return "{}" if arguments.strip() in ("", "null") else arguments


def read_reasoning(message: Json) -> str:
    """An assistant's reasoning as text, from whichever member holds it."""
    text = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(text, str) and text:
        return text
    blocks = message.get("thinking_blocks")
    blocks = blocks if isinstance(blocks, list) else ()
    return "".join(str(block.get("thinking") or "") for block in blocks if isinstance(block, dict))


def read_stops(value: Any) -> list[str]:
    """Stop sequences as a list; blank ones are refused by several models and mean nothing."""
    stops = [value] if isinstance(value, str) else want_list(value, "stop")
    return [text for text in stops if want_text(text, "stop").strip()]


def original_name(name: Any, translation: Translation) -> str:
    """The client's own name of a tool whose name had to be made fit for the provider."""
    names: dict[str, str] = translation.names.get("tool_names") or {}
    return names.get(str(name), str(name))


def read_call(call_id: Any, name: Any, arguments: Any, translation: Translation) -> Json:
    """A provider's tool call as a canonical one; a function that stands for a custom tool becomes one again."""
    name, call_id = original_name(name or "", translation), call_id or translation.new_id("call_")
    text = argument_text(arguments)
    if name in (translation.names.get("custom_tools") or ()):
        return {"id": call_id, "type": "custom", "custom": {"name": name, "input": custom_text(text)}}
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def custom_text(arguments: str) -> str:
    given = load_object(arguments)
    text = given.get("input") if given else None
    return text if isinstance(text, str) else arguments


@dataclass(slots=True)
class PendingCall:
    """A tool call whose arguments are still arriving; `held` is what was not passed on yet."""

    index: int
    custom: bool
    held: str = ""
    sent: bool = False
    ended: bool = False


class CallWriter:
    """Turns a provider's tool-call events into canonical deltas; calls may interleave, `key` tells them apart.

    Text that may still become `null` is held back, so that a call without arguments always ends as `{}`.
    """

    def __init__(self, translation: Translation) -> None:
        self._translation = translation
        self._calls: dict[Any, PendingCall] = {}
        self._started = 0

    def start(self, key: Any, call_id: Any, name: Any) -> list[Json]:
        ended = self.end(key)
        name = original_name(name or "", self._translation)
        custom = name in (self._translation.names.get("custom_tools") or ())
        self._calls[key] = call = PendingCall(self._started, custom)
        self._started += 1
        body = {"name": name, "input": ""} if custom else {"name": name, "arguments": ""}
        kind = "custom" if custom else "function"
        return ended + self._delta(call, id=call_id or self._translation.new_id("call_"), type=kind, **{kind: body})

    def add(self, key: Any, arguments: Any) -> list[Json]:
        """Pass on a piece of a call's arguments. A piece without a start opens a nameless call rather than get lost."""
        deltas = [] if key in self._calls else self.start(key, None, None)
        call = self._calls[key]
        call.held += arguments if isinstance(arguments, str) else dump_json(arguments).decode() if arguments else ""
        if call.custom or (not call.sent and "null".startswith(call.held.strip())):
            return deltas
        text, call.held, call.sent = call.held, "", True
        return deltas + self._delta(call, function={"arguments": text})

    def end(self, key: Any) -> list[Json]:
        call = self._calls.get(key)
        if call is None or call.ended:
            return []
        call.ended = True
        if call.custom:
            return self._delta(call, type="custom", custom={"input": custom_text(call.held)})
        return [] if call.sent else self._delta(call, function={"arguments": argument_text(call.held)})

    def end_all(self) -> list[Json]:
        return [delta for key in self._calls for delta in self.end(key)]

    @property
    def any(self) -> bool:
        return self._started > 0

    def _delta(self, call: PendingCall, **members: Any) -> list[Json]:
        return [{"tool_calls": [{"index": call.index, **members}]}]


class ChunkWriter:
    """Makes the canonical chunks of an answer with one choice: the same head on each, the role on the first."""

    def __init__(self, translation: Translation) -> None:
        self._translation = translation
        self.id = ""
        self._begun = False

    def delta(self, delta: Json, finish: str | None = None, logprobs: Json | None = None) -> Json:
        if not self._begun:
            self._begun, delta = True, {"role": "assistant", **delta}
        choice: Json = {"index": 0, "delta": delta, "finish_reason": finish}
        return self._frame([{**choice, "logprobs": logprobs} if logprobs else choice])

    def deltas(self, deltas: Iterable[Json]) -> list[Json]:
        return [self.delta(delta) for delta in deltas]

    def usage(self, usage: Json, **members: Any) -> Json:
        return {**self._frame([]), "usage": usage, **members}

    def _frame(self, choices: list[Json]) -> Json:
        self.id = self.id or self._translation.new_id("chatcmpl-")
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self._translation.now_s}
        return {**head, "model": self._translation.model, "choices": choices}


def write_completion(message: Json, finish: str, usage: Json | None, translation: Translation, **members: Any) -> Json:
    """A canonical completion with one choice. Absent content is null beside tool calls, and empty text otherwise."""
    content = message.pop("content", "") or (None if message.get("tool_calls") else "")
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    logprobs = members.pop("logprobs", None)
    if logprobs is not None:
        choice["logprobs"] = logprobs
    answer = {
        "id": members.pop("id", None) or translation.new_id("chatcmpl-"), "object": "chat.completion",
        "created": translation.now_s, "model": translation.model, "choices": [choice], **members,
    }  # fmt: skip
    return {**answer, "usage": usage} if usage is not None else answer


def write_embeddings(vectors: Sequence[Any], input_tokens: int, translation: Translation) -> Json:
    """OpenAI's embeddings answer with lists of floats."""
    if not all(isinstance(vector, list) for vector in vectors):
        raise UpstreamError("the provider's answer has no embeddings", code="upstream_malformed")
    rows = [{"object": "embedding", "index": at, "embedding": vector} for at, vector in enumerate(vectors)]
    usage = {"prompt_tokens": input_tokens, "total_tokens": input_tokens}
    return {"object": "list", "data": rows, "model": translation.model, "usage": usage}


@dataclass(frozen=True, slots=True, kw_only=True)
class CohereFamily:
    """What a family of Cohere's models takes; the defaults are the newest family's."""

    thinks: bool = True
    tool_choice: bool = True
    images: bool = True
    #: Embedding models: input types, and dimensions of the caller's choice.
    typed_inputs: bool = True
    dimensions: bool = True


#: The first pattern that matches the start of a model's name wins.
COHERE_FAMILIES: Final = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        (r"command-a-vision|c4ai-aya-vision", CohereFamily(thinks=False)),
        (r"command-a-reasoning", CohereFamily(images=False)),
        (r"command-a-plus", CohereFamily()),
        (r"command-(a-03|a-translate|r7b)", CohereFamily(thinks=False, images=False)),
        (r"command|c4ai-", CohereFamily(thinks=False, images=False, tool_choice=False)),
        (r"embed-(english|multilingual)(-light)?-v2", CohereFamily(typed_inputs=False, dimensions=False)),
        (r"embed-(english|multilingual)", CohereFamily(dimensions=False)),
        (r"", CohereFamily()),
    )
)
#: reasoning_effort -> thinking budget in tokens; an effort that is not listed has no bound.
COHERE_BUDGETS: Final[Mapping[str, int]] = {"minimal": 1024, "low": 2048, "medium": 8192}
COHERE_FINISHES: Final[Mapping[str, str]] = {
    "COMPLETE": "stop", "STOP_SEQUENCE": "stop", "MAX_TOKENS": "length", "TOOL_CALL": "tool_calls",
}  # fmt: skip
COHERE_FAILED: Final = frozenset({"ERROR", "TIMEOUT", "ERROR_TOXIC", "ERROR_LIMIT", "USER_CANCEL"})
#: Canonical members under Cohere's names; the second group are Cohere's own, which OpenAI's SDK sends by `extra_body`.
COHERE_PLAIN: Final[Mapping[str, str]] = {
    "max_tokens": "max_tokens", "max_completion_tokens": "max_tokens", "temperature": "temperature", "seed": "seed",
    "top_k": "k", "logprobs": "logprobs",
    **{name: name for name in ("k", "p", "documents", "citation_options", "safety_mode", "priority", "thinking")},
    "strict_tools": "strict_tools",
}  # fmt: skip
COHERE_RANGES: Final[Mapping[str, tuple[str, float, float]]] = {
    "frequency_penalty": ("frequency_penalty", 0.0, 1.0), "presence_penalty": ("presence_penalty", 0.0, 1.0),
    "top_p": ("p", 0.01, 0.99),
}  # fmt: skip
COHERE_MAX_STOPS: Final = 5


def cohere_family(model: str) -> CohereFamily:
    return next(family for pattern, family in COHERE_FAMILIES if pattern.match(model))


class CohereEncoder:
    """Builds the body of one `/v2/chat` call."""

    def __init__(self, request: Json, translation: Translation) -> None:
        self._request, self._translation = with_effort(request), translation
        self._family = cohere_family(translation.model)
        self._body: Json = {"model": translation.model, "messages": [], "stream": translation.stream}

    def build(self) -> Json:
        for message, role, where in read_messages(self._request, self._translation):
            self._write_message(message, role, where)
        self._write_tools()
        for name, value in self._request.items():
            if name in ALWAYS_CARRIED or says_nothing(name, value):
                continue
            if name in COHERE_PLAIN:
                self._body[COHERE_PLAIN[name]] = value
            elif name in COHERE_RANGES:
                self._write_bounded(name, value)
            elif (writer := self.WRITERS.get(name)) is not None:
                writer(self, value)
            else:
                self._translation.drop(name)
        self._body.update(own_extras(self._request, "cohere", self._translation))
        return self._body

    def _write_message(self, message: Json, role: str, where: str) -> None:
        writer = self.ROLES.get(role)
        if writer is None:
            raise InvalidRequest(f"`{where}.role` is {role!r}, which is no role", param=f"{where}.role")
        if message.get("cache_control"):
            self._translation.drop("cache_control")
        self._body["messages"].append(writer(self, message, where))

    def _plain(self, message: Json, where: str) -> Json:
        return {"role": "system", "content": self._text(message, where)}

    def _text(self, message: Json, where: str) -> str:
        return "".join(part["text"] for part in self._parts(message, where) if part["type"] == "text")

    def _user(self, message: Json, where: str) -> Json:
        parts = self._parts(message, where)
        plain = len(parts) == 1 and isinstance(message["content"], str)
        return {"role": "user", "content": parts[0]["text"] if plain else parts or ""}

    def _parts(self, message: Json, where: str) -> list[Json]:
        kept: list[Json] = []
        for part in read_parts(message.get("content"), f"{where}.content"):
            if part.get("cache_control"):
                self._translation.drop("cache_control")
            if part.get("type") == "text":
                kept.append({"type": "text", "text": part["text"]})
            elif part.get("type") == "image_url" and self._family.images and message["role"] == "user":
                kept.append({"type": "image_url", "image_url": part.get("image_url")})
            elif part.get("type") == "document" and message["role"] == "tool":
                kept.append({"type": "document", "document": part.get("document")})
            else:
                self._translation.drop(f"content.{part.get('type')}")
        return kept

    def _assistant(self, message: Json, where: str) -> Json:
        """Text beside tool calls is the plan; reasoning is a content item of its own, without any signature."""
        text = self._text(message, where) or str(message.get("refusal") or "")
        calls = read_history_calls(message, where)
        reasoning = read_reasoning(message)
        if any(block.get("signature") or block.get("data") for block in _blocks(message)):
            self._translation.drop("messages.thinking_blocks")
        content: list[Json] = [{"type": "thinking", "thinking": reasoning}] if reasoning else []
        if text and not calls:
            content.append({"type": "text", "text": text})
        written: Json = {"role": "assistant"}
        if content:
            written["content"] = content if reasoning else text
        if calls:
            written["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for call_id, name, arguments in calls
            ]
            written.update({"tool_plan": text} if text else {})
        return written if content or calls else {"role": "assistant", "content": ""}

    def _tool(self, message: Json, where: str) -> Json:
        if message.get("is_error"):
            self._translation.drop("messages.is_error")
        call_id = want_text(message.get("tool_call_id"), f"{where}.tool_call_id")
        content = message.get("content")
        content = content if isinstance(content, str) else self._parts(message, where) or ""
        return {"role": "tool", "tool_call_id": call_id, "content": content}

    ROLES: ClassVar[Mapping[str, Callable[[CohereEncoder, Json, str], Json]]] = {
        "system": _plain, "user": _user, "assistant": _assistant, "tool": _tool,
    }  # fmt: skip

    def _write_tools(self) -> None:
        """Tools cannot be chosen by name, but the others can be left out."""
        functions, _ = read_tools(self._request, "cohere", self._translation)
        choice = read_chosen_tools(self._request)
        if any(tool.cache_control for tool in functions):
            self._translation.drop("cache_control")
        strict = [tool.strict for tool in functions]
        functions = [tool for tool in functions if choice.names is None or tool.name in choice.names]
        if choice.mode != "auto" and not self._family.tool_choice:
            if choice.mode == "none":
                return
            self._translation.drop("tool_choice", "this model decides by itself")
        elif choice.mode != "auto" and functions:
            self._body["tool_choice"] = choice.mode.upper()
        if functions:
            self._body["tools"] = [_write_cohere_tool(tool) for tool in functions]
        if strict and all(strict):
            self._body["strict_tools"] = True
        elif any(strict):
            self._translation.drop("tools.strict", "it holds for all tools or none")

    def _write_bounded(self, name: str, value: Any) -> None:
        """Penalties and top_p have narrower ranges; a penalty outside is brought to the edge and named."""
        target, low, high = COHERE_RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequest(f"`{name}` must be a number", param=name)
        self._body[target] = bounded = min(max(value, low), high)
        if bounded != value and target == name:
            self._translation.drop(name, f"its range is {low:g} to {high:g}")

    def _stop(self, value: Any) -> None:
        stops = read_stops(value)
        if len(stops) > COHERE_MAX_STOPS:
            self._translation.drop(f"stop[{COHERE_MAX_STOPS}:]", "Cohere takes five at most")
        self._body["stop_sequences"] = stops[:COHERE_MAX_STOPS]

    def _response_format(self, value: Any) -> None:
        form = want_object(value, "response_format")
        if self._body.get("tools") or self._request.get("documents"):
            self._translation.drop("response_format", "Cohere takes no JSON format beside tools or documents")
            return
        written: Json = {"type": "json_object"}
        if form.get("type") == "json_schema":
            schema = want_object(form.get("json_schema"), "response_format.json_schema")
            written["json_schema"] = want_object(schema.get("schema") or {}, "response_format.json_schema.schema")
        self._body["response_format"] = written

    def _effort(self, value: Any) -> None:
        if not self._family.thinks:
            if value != "none":
                self._translation.drop("reasoning_effort", "this model does not think")
        elif "thinking" not in self._request:
            budget = COHERE_BUDGETS.get(want_text(value, "reasoning_effort"))
            thinking: Json = {"type": "disabled" if value == "none" else "enabled"}
            self._body["thinking"] = {**thinking, "token_budget": budget} if budget else thinking

    WRITERS: ClassVar[Mapping[str, Callable[[CohereEncoder, Any], None]]] = {
        "stop": _stop, "response_format": _response_format, "reasoning_effort": _effort,
    }  # fmt: skip


def _blocks(message: Json) -> list[Json]:
    blocks = message.get("thinking_blocks")
    return [block for block in blocks if isinstance(block, dict)] if isinstance(blocks, list) else []


def _write_cohere_tool(tool: ToolSpec) -> Json:
    function: Json = {"name": tool.name, "parameters": tool.parameters}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def read_cohere_usage(usage: Json) -> Usage:
    """Tokens as the model saw them. Cohere bills `billed_units`, which leave its own prompt template out."""
    tokens, billed = usage.get("tokens") or {}, usage.get("billed_units") or {}
    total = _count(tokens.get("input_tokens") or billed.get("input_tokens"))
    cached = min(total, _count(usage.get("cached_tokens")))
    return Usage(
        input_tokens=total - cached, cached_tokens=cached, searches=_count(billed.get("search_units")),
        output_tokens=_count(tokens.get("output_tokens") or billed.get("output_tokens")),
        reasoning_tokens=_count(tokens.get("reasoning_tokens")),
    )  # fmt: skip


def write_cohere_usage(usage: Json) -> Json:
    written = write_openai_usage(read_cohere_usage(usage))
    return {**written, "billed_units": usage["billed_units"]} if usage.get("billed_units") else written


def read_cohere_citations(citations: Any, offsets: Mapping[int, int]) -> list[Json]:
    """Citations with addresses as URL citations in the joined text; all others as they came."""
    found: list[Json] = []
    for citation in [citations] if isinstance(citations, dict) else citations or ():
        offset = offsets.get(citation.get("content_index") or 0, 0)
        sources = citation.get("sources") or ()
        named = [source.get("document") or source.get("tool_output") or {} for source in sources]
        cited = [source for source in named if isinstance(source, dict) and source.get("url")]
        if not cited or citation.get("type") not in (None, "TEXT_CONTENT"):
            found.append({"type": "cohere_citation", "cohere_citation": citation})
            continue
        start, end = _count(citation.get("start")) + offset, _count(citation.get("end")) + offset
        for source in cited:
            where = {"start_index": start, "end_index": end}
            url_citation = {"url": source["url"], "title": source.get("title") or "", **where}
            found.append({"type": "url_citation", "url_citation": url_citation})
    return found


def read_cohere_logprobs(items: Any) -> Json | None:
    """Log probabilities by piece of text: a piece of several tokens has the sum of theirs."""
    items = [items] if isinstance(items, dict) else items or ()
    content = []
    for item in items:
        text = str(item.get("text") or "")
        total = float(sum(item.get("logprobs") or ()))
        content.append({"token": text, "logprob": total, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": content, "refusal": None} if content else None


def read_cohere_message(message: Json, translation: Translation) -> Json:
    """An answer's message: the plan comes before the text, thinking apart, citations counted in the joined text."""
    content = message.get("content") or []
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text, thinking = str(message.get("tool_plan") or ""), ""
    offsets: dict[int, int] = {}
    for at, item in enumerate(content):
        if item.get("type") == "thinking":
            thinking += item.get("thinking") or ""
        else:
            offsets[at] = len(text)
            text += item.get("text") or ""
    read: Json = {"content": text}
    if thinking:
        read["reasoning_content"] = thinking
    if message.get("tool_calls"):
        calls = [(call.get("id"), call.get("function") or {}) for call in message["tool_calls"]]
        read["tool_calls"] = [read_call(i, f.get("name"), f.get("arguments"), translation) for i, f in calls]
    if annotations := read_cohere_citations(message.get("citations"), offsets):
        read["annotations"] = annotations
    return read


class CohereDecoder:
    """Reads a v2 chat stream. `message-end` ends it; `[DONE]` after it is not always sent."""

    def __init__(self, dialect: CohereChat, translation: Translation) -> None:
        self._dialect = dialect
        self._events = SseReader()
        self._chunks = ChunkWriter(translation)
        self._calls = CallWriter(translation)
        self._offsets: dict[int, int] = {}
        self._length = 0
        self.complete = False

    def feed(self, data: bytes) -> list[Json]:
        return [chunk for name, payload in self._events.feed(data) for chunk in self._read(name, payload)]

    def close(self) -> list[Json]:
        return [chunk for name, payload in self._events.close() for chunk in self._read(name, payload)]

    def _read(self, name: str, payload: bytes) -> list[Json]:
        if self.complete or payload.strip() == b"[DONE]":
            return []
        event = read_event_json(payload)
        kind = event["type"] = str(event.get("type") or name)
        reader = self.READERS.get(kind)
        if reader is None:
            if "error" in kind or event.get("error") or (event.get("message") and not kind):
                raise self._dialect.read_error(_event_status(event), payload)
            return []
        with provider_shape():
            delta = event.get("delta") or {}
            return reader(self, event, delta.get("message") or {})

    def _start(self, event: Json, message: Json) -> list[Json]:
        self._chunks.id = event.get("id") or ""
        return [self._chunks.delta({"content": ""})]

    def _content(self, event: Json, message: Json) -> list[Json]:
        content = message.get("content") or {}
        content = content[0] if isinstance(content, list) else content
        if event["type"] == "content-start" and content.get("type") != "thinking":
            self._offsets[event.get("index") or 0] = self._length
        if content.get("thinking"):
            return [self._chunks.delta({"reasoning_content": content["thinking"]})]
        return self._text(content.get("text"), event)

    def _text(self, text: Any, event: Json) -> list[Json]:
        if not text:
            return []
        self._length += len(text)
        logprobs = read_cohere_logprobs(event.get("logprobs"))
        return [self._chunks.delta({"content": text}, logprobs=logprobs)]

    def _plan(self, event: Json, message: Json) -> list[Json]:
        return self._text(message.get("tool_plan"), event)

    def _call_start(self, event: Json, message: Json) -> list[Json]:
        deltas = []
        for call in _listed(message.get("tool_calls")):
            function = call.get("function") or {}
            deltas += self._calls.start(event.get("index"), call.get("id"), function.get("name"))
            deltas += self._calls.add(event.get("index"), function.get("arguments"))
        return self._chunks.deltas(deltas)

    def _call_delta(self, event: Json, message: Json) -> list[Json]:
        deltas = []
        for call in _listed(message.get("tool_calls")):
            deltas += self._calls.add(event.get("index"), (call.get("function") or {}).get("arguments"))
        return self._chunks.deltas(deltas)

    def _call_end(self, event: Json, message: Json) -> list[Json]:
        return self._chunks.deltas(self._calls.end(event.get("index")))

    def _citation(self, event: Json, message: Json) -> list[Json]:
        found = read_cohere_citations(message.get("citations"), self._offsets)
        return [self._chunks.delta({"annotations": found})] if found else []

    def _end(self, event: Json, message: Json) -> list[Json]:
        delta = event.get("delta") or {}
        finish = read_cohere_finish(delta.get("finish_reason"), delta.get("error"))
        chunks = self._chunks.deltas(self._calls.end_all())
        chunks.append(self._chunks.delta({}, finish))
        if delta.get("usage"):
            chunks.append(self._chunks.usage(write_cohere_usage(delta["usage"])))
        self.complete = True
        return chunks

    READERS: ClassVar[Mapping[str, Callable[[CohereDecoder, Json, Json], list[Json]]]] = {
        "message-start": _start, "content-start": _content, "content-delta": _content, "tool-plan-delta": _plan,
        "tool-call-start": _call_start, "tool-call-delta": _call_delta, "tool-call-end": _call_end,
        "citation-start": _citation, "message-end": _end,
    }  # fmt: skip


def _listed(value: Any) -> list[Any]:
    """Cohere's stream has an object where its plain answers have an array."""
    return value if isinstance(value, list) else [value] if value else []


def _event_status(event: Json) -> int:
    status = event.get("status_code") or event.get("status")
    return status if isinstance(status, int) and 400 <= status < 600 else 502


def read_cohere_finish(reason: Any, error: Any) -> str:
    """A canonical finish reason; UpstreamError for an answer that failed after its 200."""
    if error or reason in COHERE_FAILED:
        code = f"upstream_{str(reason or 'error').lower()}"
        raise UpstreamError(str(error or f"the provider stopped with `{reason}`"), code=code)
    return COHERE_FINISHES.get(str(reason), "stop")


class CohereChat(Dialect):
    """Cohere's v2 API as a provider: chat, and embeddings and reranking beside it."""

    name = "cohere"
    embeddings_at_once: ClassVar[int] = 96

    def path(self, provider: Provider, model: str, stream: bool) -> str:
        return "/v2/chat"

    def encode(self, request: Json, translation: Translation) -> Json:
        return CohereEncoder(request, translation).build()

    def decode(self, answer: Json, translation: Translation) -> Json:
        with provider_shape():
            message = answer["message"]
            finish = read_cohere_finish(answer.get("finish_reason"), answer.get("error"))
            usage = write_cohere_usage(answer["usage"]) if answer.get("usage") else None
            read = read_cohere_message(message, translation)
            logprobs = read_cohere_logprobs(answer.get("logprobs"))
            return write_completion(read, finish, usage, translation, id=answer.get("id"), logprobs=logprobs)

    def decoder(self, translation: Translation) -> CohereDecoder:
        return CohereDecoder(self, translation)

    def read_usage(self, answer: Json) -> Usage | None:
        """Usage of a chat, embeddings or rerank answer; `searches` are rerank's search units."""
        usage = answer.get("usage") or answer.get("meta")
        with provider_shape():
            return read_cohere_usage(usage) if isinstance(usage, dict) else None

    def read_error(self, status: int, body: bytes) -> UpstreamError:
        """498 is a bad key here; 499 and 501 are Cohere's own doing, so another try may help."""
        members = read_error_members(body)
        code = members.get("code")
        return upstream_failure(
            {499: 502}.get(status, status), str(members.get("message") or f"the provider answered {status}"),
            code=str(code) if code else None, bad_key=status == 498,
            fields={"id": members["id"]} if isinstance(members.get("id"), str) else None,
        )  # fmt: skip

    # -- embeddings

    def encode_embeddings(self, request: Json, translation: Translation) -> Json:
        """An OpenAI embeddings request for `/v2/embed`; `input_type` may come beside OpenAI's members."""
        family = cohere_family(translation.model)
        body = write_cohere_embed(request, family, "cohere", translation)
        return {"model": translation.model, "embedding_types": ["float"], **body}

    def decode_embeddings(self, answer: Json, translation: Translation) -> Json:
        with provider_shape():
            found = answer["embeddings"]
            vectors = found["float"] if isinstance(found, dict) else found
            usage = read_cohere_usage(answer.get("meta") or {})
        return write_embeddings(vectors, usage.input_tokens, translation)

    # -- rerank

    def encode_rerank(self, request: Json, translation: Translation) -> Json:
        """A rerank request for `/v2/rerank`, which takes texts only and gives none back; `decode_rerank` does."""
        documents = want_list(request.get("documents"), "documents")
        texts = [rerank_text(document, f"documents[{at}]") for at, document in enumerate(documents)]
        body: Json = {"model": translation.model, "query": want_text(request.get("query"), "query"), "documents": texts}
        if request.get("return_documents"):
            translation.names["documents"] = documents
        for name, value in request.items():
            if name in ("top_n", "max_tokens_per_doc", "priority", "relevant_spans") and value is not None:
                body[name] = value
            elif value is not None and name not in (*body, "return_documents", "extra_body"):
                translation.drop(name)
        return {**body, **own_extras(request, "cohere", translation)}

    def decode_rerank(self, answer: Json, translation: Translation) -> Json:
        documents = translation.names.get("documents")
        with provider_shape():
            results = [dict(result) for result in answer["results"]]
            for result in results:
                if documents is not None:
                    document = documents[result["index"]]
                    result["document"] = {"text": document} if isinstance(document, str) else document
            usage = read_cohere_usage(answer.get("meta") or {})
        tokens = usage.input_tokens
        counts = {"prompt_tokens": tokens, "total_tokens": tokens, "search_units": usage.searches}
        answer_id = answer.get("id") or translation.new_id("rerank-")
        return {"id": answer_id, "model": translation.model, "results": results, "usage": counts}


def rerank_text(document: Any, where: str) -> str:
    """A document to rank as text; an object without a `text` is ranked by its JSON."""
    if isinstance(document, str):
        return document
    text = want_object(document, where).get("text")
    return text if isinstance(text, str) else dump_json(document).decode()


def write_cohere_embed(request: Json, family: CohereFamily, dialect: str, translation: Translation) -> Json:
    """What Cohere's own embeddings API and Bedrock's copy of it have in common."""
    texts = read_embedding_texts(request.get("input"))
    translation.names["embedding_bytes"] = sum(len(text.encode("utf-8", "replace")) for text in texts)
    body: Json = {"texts": texts}
    if family.typed_inputs:
        body["input_type"] = want_text(request.get("input_type") or "search_document", "input_type")
    for name, value in request.items():
        if value is None or name in ("model", "input", "input_type", "encoding_format", "extra_body"):
            continue
        if name == "dimensions" and family.dimensions:
            body["output_dimension"] = want_whole(value, "dimensions")
        elif name in ("truncate", "priority", "max_tokens"):
            body[name] = value
        else:
            translation.drop(name)
    extras = own_extras(request, dialect, translation)
    if "images" in extras or "inputs" in extras:
        del body["texts"]
    return {**body, **extras}


# ----- Bedrock --------------------------------------------------------------------------------------------------------
# AWS Bedrock's Converse and ConverseStream. One body for all vendors' models, but hardly two families take the same:
# the rows of BEDROCK_FAMILIES hold what was seen to be refused. Streams are binary frames with checksums, and usage
# comes after the end of the answer. Requests carry a bearer token, or are signed by `sign_v4` once the body is final.
# Blocks of the provider's own tools stay in `thinking_blocks` as {"type": "bedrock_block", "block"} and go back as they
# came, for they are no calls of the client's.
# Sources: https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html; botocore's service model


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaudeThinking:
    """How a Claude model is asked to think. Source: the vendor's pages on adaptive thinking and on each model."""

    adaptive: bool = True
    #: What stands for `reasoning_effort: none`; empty where thinking cannot be turned off (then the effort is lowest).
    off: str = "disabled"
    efforts: tuple[str, ...] = ("low", "medium", "high", "xhigh", "max")
    samples: bool = False
    forced_choice: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BedrockFamily:
    """What a family of models takes on Converse; the defaults are the plainest family's."""

    #: Values of toolChoice that are not refused.
    choices: frozenset[str] = frozenset()
    #: The conversation may begin with the assistant.
    leading_assistant: bool = False
    #: Kinds of blocks that may stand beside tool results, and media kinds inside them.
    beside_results: frozenset[str] = frozenset({"text", "image", "document", "video", "audio", "guardContent"})
    inside_results: frozenset[str] = frozenset({"image"})
    result_status: bool = True
    #: `strict` tools and JSON schemas for answers (one list of models at AWS).
    structured: bool = False
    #: Where top_k goes in additionalModelRequestFields; empty where nowhere.
    top_k: tuple[str, ...] = ()
    caches: bool = False
    caches_tools: bool = False
    #: `signed` reasoning goes back only with its signature, `plain` without, "" not at all.
    replays: str = ""
    #: The member that holds the reasoning effort, and its values by OpenAI's.
    effort: str = ""
    efforts: Mapping[str, str] = field(default_factory=dict)
    claude: ClaudeThinking | None = None
    inline_system: bool = False
    #: Members of another dialect's extras that this model reads in additionalModelRequestFields.
    adopts: Mapping[str, frozenset[str]] = field(default_factory=dict)


ALL_CHOICES: Final = frozenset({"auto", "any", "tool"})
ALONE: Final[frozenset[str]] = frozenset()
CLAUDE: Final = BedrockFamily(
    choices=ALL_CHOICES, leading_assistant=True, beside_results=frozenset({"text", "image"}),
    inside_results=frozenset({"image", "document"}), top_k=("top_k",), caches=True, caches_tools=True, replays="signed",
    adopts={"anthropic": frozenset({"thinking", "output_config", "anthropic_beta", "context_management"})},
)  # fmt: skip
CLAUDE_OLD: Final = ClaudeThinking(adaptive=False, efforts=(), samples=True)
CLAUDE_46: Final = ClaudeThinking(efforts=("low", "medium", "high", "max"), samples=True)
CLAUDE_5: Final = dataclasses.replace(CLAUDE, claude=ClaudeThinking())
CLAUDE_ALWAYS: Final = ClaudeThinking(off="", forced_choice=False)
CLAUDE_BETWEEN: Final = ClaudeThinking(off="between_tools", forced_choice=False)
NOVA: Final = BedrockFamily(choices=ALL_CHOICES, top_k=("inferenceConfig", "topK"), caches=True)
MISTRAL: Final = BedrockFamily(beside_results=ALONE, inside_results=frozenset({"document"}))
QWEN: Final = BedrockFamily(leading_assistant=True, inside_results=ALONE)
QWEN_EFFORTS: Final = {"minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high", "max": "high"}
GPT_OSS_EFFORTS: Final = {**QWEN_EFFORTS, "medium": "medium"}

#: The first pattern that matches the start of a model's name, without its geography, wins.
BEDROCK_FAMILIES: Final = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        (r"anthropic\.claude-(fable|mythos)-5", dataclasses.replace(CLAUDE, claude=CLAUDE_ALWAYS, inline_system=True)),
        (r"anthropic\.claude-opus-5-5", dataclasses.replace(CLAUDE, claude=CLAUDE_ALWAYS, inline_system=True)),
        (r"anthropic\.claude-sonnet-5-5", dataclasses.replace(CLAUDE, claude=CLAUDE_BETWEEN)),
        (r"anthropic\.claude-(opus-5|opus-4-8)", dataclasses.replace(CLAUDE_5, inline_system=True)),
        (r"anthropic\.claude-(sonnet-5|haiku-5|opus-4-7)", CLAUDE_5),
        (r"anthropic\.claude-(opus|sonnet)-4-6", dataclasses.replace(CLAUDE, claude=CLAUDE_46, structured=True)),
        (r"anthropic\.claude-(opus|sonnet|haiku)-4-5", dataclasses.replace(CLAUDE, claude=CLAUDE_OLD, structured=True)),
        (r"anthropic\.claude-((opus|sonnet)-4|3-7)", dataclasses.replace(CLAUDE, claude=CLAUDE_OLD)),
        (r"anthropic\.claude-(3|instant|v2)", CLAUDE),
        (r"anthropic\.", CLAUDE_5),
        (r"amazon\.nova", NOVA),
        (r"meta\.", BedrockFamily(beside_results=ALONE, inside_results=frozenset({"image", "document"}))),
        (r"mistral\.(magistral-small|ministral-3|mistral-large-3|voxtral)", dataclasses.replace(MISTRAL, structured=True)),
        (r"mistral\.mistral-large", dataclasses.replace(MISTRAL, choices=frozenset({"auto", "any"}))),
        (r"mistral\.", MISTRAL),
        (r"writer\.", BedrockFamily(beside_results=ALONE, result_status=False)),
        (r"qwen\.qwen3", dataclasses.replace(QWEN, structured=True, effort="reasoning_config", efforts=QWEN_EFFORTS)),
        (r"qwen\.", QWEN),
        (r"openai\.gpt-oss", BedrockFamily(effort="reasoning_effort", efforts=GPT_OSS_EFFORTS)),
        (r"deepseek\..*r1", BedrockFamily(replays="plain")),
        (r"zai\.", BedrockFamily(choices=ALL_CHOICES, leading_assistant=True, structured=True)),
        (r"moonshot(ai)?\.", BedrockFamily(
            choices=ALL_CHOICES, leading_assistant=True, structured=True, inside_results=ALONE)),
        (r"(minimax\.minimax-m2|nvidia\.nemotron-nano|google\.gemma-3-(12b|27b))", BedrockFamily(structured=True)),
        (r"", BedrockFamily()),
    )
)  # fmt: skip
BEDROCK_GEOGRAPHY: Final = re.compile(r"(us|eu|apac|jp|au|ca|global|us-gov)\.")
#: Thinking budgets in tokens for Claude models that are not adaptive.
CLAUDE_BUDGETS: Final[Mapping[str, int]] = {
    "minimal": 1024, "low": 2048, "medium": 8192, "high": 16384, "xhigh": 32768, "max": 32768,
}  # fmt: skip
BEDROCK_FINISHES: Final[Mapping[str, str]] = {
    "end_turn": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "max_tokens": "length",
    "model_context_window_exceeded": "length", "guardrail_intervened": "content_filter",
    "content_filtered": "content_filter",
}  # fmt: skip
BEDROCK_FAILED: Final = frozenset({"malformed_model_output", "malformed_tool_use"})
#: Converse's own members, which may come beside OpenAI's or in `extra_body.bedrock`.
BEDROCK_OWN: Final = frozenset({
    "guardrailConfig", "additionalModelRequestFields", "additionalModelResponseFieldPaths", "promptVariables",
    "requestMetadata", "performanceConfig", "serviceTier", "outputConfig", "inferenceConfig",
})  # fmt: skip
BEDROCK_TIERS: Final = frozenset({"priority", "default", "flex", "reserved"})
BEDROCK_TOOL_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
BEDROCK_METADATA: Final = re.compile(r"[A-Za-z0-9\s:_@$#=/+,.-]{1,256}\Z", re.ASCII)
#: Media types by the block that carries them; the value is the block's `format`.
BEDROCK_MEDIA: Final[Mapping[str, tuple[str, str]]] = {
    **{f"image/{kind}": ("image", kind) for kind in ("png", "jpeg", "gif", "webp")},
    "application/pdf": ("document", "pdf"), "text/csv": ("document", "csv"), "text/html": ("document", "html"),
    "text/plain": ("document", "txt"), "text/markdown": ("document", "md"), "application/msword": ("document", "doc"),
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": ("document", "docx"),
    "application/vnd.ms-excel": ("document", "xls"),
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": ("document", "xlsx"),
    "video/mp4": ("video", "mp4"), "video/quicktime": ("video", "mov"), "video/x-matroska": ("video", "mkv"),
    "video/webm": ("video", "webm"), "video/x-flv": ("video", "flv"), "video/mpeg": ("video", "mpeg"),
    "video/x-ms-wmv": ("video", "wmv"), "video/3gpp": ("video", "three_gp"), "audio/mp3": ("audio", "mp3"),
    "audio/wav": ("audio", "wav"), "audio/x-wav": ("audio", "wav"), "audio/aac": ("audio", "aac"),
    "audio/flac": ("audio", "flac"), "audio/ogg": ("audio", "ogg"), "audio/opus": ("audio", "opus"),
    "audio/mp4": ("audio", "mp4"), "audio/webm": ("audio", "webm"),
}  # fmt: skip
BEDROCK_EXTENSIONS: Final[Mapping[str, tuple[str, str]]] = {
    **{form: (block, form) for block, form in BEDROCK_MEDIA.values() if block != "audio"},
    "jpg": ("image", "jpeg"), "htm": ("document", "html"), "mpg": ("video", "mpg"), "3gp": ("video", "three_gp"),
}  # fmt: skip
#: What the APIs need a text for where the client has none; blank text is refused.
FILLER: Final = "."


def bedrock_family(model: str) -> BedrockFamily:
    """The row of a model by its id, inference profile or ARN."""
    name = BEDROCK_GEOGRAPHY.sub("", model.rpartition("/")[2] if model.startswith("arn:") else model, count=1)
    return next(family for pattern, family in BEDROCK_FAMILIES if pattern.match(name))


class BedrockEncoder:
    """Builds one Converse body. Turns are collected first, for the rules on their order span several messages."""

    def __init__(self, request: Json, translation: Translation) -> None:
        self._request, self._translation = with_effort(request), translation
        self._family = bedrock_family(translation.model)
        self._system: list[Json] = []
        self._turns: list[Json] = []
        self._fields: Json = {}
        self._config: Json = {}
        self._body: Json = {}
        self._fitted: dict[str, str] = {}
        self._documents: set[str] = set()
        self._outside: list[Json] = []
        self._thinks = False

    def build(self) -> Json:
        for message, role, where in read_messages(self._request, self._translation):
            self._write_message(message, role, where)
        self._flush()
        for name, value in self._request.items():
            if name in ALWAYS_CARRIED or says_nothing(name, value):
                continue
            if (writer := self.WRITERS.get(name)) is not None:
                writer(self, value)
            elif name not in BEDROCK_OWN:
                self._translation.drop(name)
        body: Json = {"messages": self._ordered(), **self._body}
        for name, value in (
            ("system", self._system), ("inferenceConfig", self._config), ("additionalModelRequestFields", self._fields)
        ):  # fmt: skip
            if value:
                body[name] = value
        self._merge_own(body)
        self._fit_thinking(body)
        self._write_tools(body)
        return {name: value for name, value in body.items() if value or name not in self.OPTIONAL}

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"inferenceConfig", "additionalModelRequestFields"})

    def _merge_own(self, body: Json) -> None:
        """Add what the client said in Converse's own words, and what a Claude model reads of Anthropic's."""
        request = self._request
        extras = dict(want_object(request.get("extra_body") or {}, "extra_body"))
        for dialect, names in self._family.adopts.items():
            members = want_object(extras.get(dialect) or {}, f"extra_body.{dialect}")
            adopted = {name: value for name, value in members.items() if name in names}
            extras[dialect] = {name: value for name, value in members.items() if name not in names}
            if adopted:
                merge_members(body, {"additionalModelRequestFields": adopted})
        merge_members(body, {name: request[name] for name in BEDROCK_OWN if request.get(name) is not None})
        merge_members(body, own_extras({"extra_body": extras}, "bedrock", self._translation))

    def _fit_thinking(self, body: Json) -> None:
        """Make room for a Claude model's thinking; drop the sampling that it refuses always, or while it thinks."""
        claude = self._family.claude
        config = want_object(body.get("inferenceConfig") or {}, "inferenceConfig")
        fields = want_object(body.get("additionalModelRequestFields") or {}, "additionalModelRequestFields")
        thinking = want_object(fields.get("thinking") or {}, "thinking")
        self._thinks = thinking.get("type") in ("enabled", "adaptive", "between_tools")
        budget, cap = thinking.get("budget_tokens"), config.get("maxTokens")
        if isinstance(budget, int) and isinstance(cap, int) and cap <= budget:
            config["maxTokens"] = cap + budget  # thinking counts against the cap
        if claude is None or (claude.samples and not self._thinks):
            return
        for holder, name, said, fine in (
            (config, "temperature", "temperature", claude.samples and config.get("temperature") == 1),
            (config, "topP", "top_p", claude.samples and _at_least(config.get("topP"), 0.95)),
            (fields, "top_k", "top_k", False),
        ):
            if name in holder and not fine:
                del holder[name]
                self._translation.drop(said, "this model takes no sampling parameters, or none while it thinks")

    # -- messages

    def _write_message(self, message: Json, role: str, where: str) -> None:
        writer = self.ROLES.get(role)
        if writer is None:
            raise InvalidRequest(f"`{where}.role` is {role!r}, which is no role", param=f"{where}.role")
        if role != "tool":
            self._flush()
        writer(self, message, where)

    def _flush(self) -> None:
        """Add the media that tools gave: only now, for all results of a turn must stand together."""
        outside, self._outside = self._outside, []
        self._add("user", outside)

    def _add(self, role: str, blocks: list[Json]) -> None:
        """Add to the turn of the same role, for turns must alternate; tool results come first in theirs."""
        if not blocks:
            return
        if not self._turns or self._turns[-1]["role"] != role:
            self._turns.append({"role": role, "content": blocks})
            return
        content = self._turns[-1]["content"]
        if any("toolResult" in block for block in [*content, *blocks]) and not self._fits(content, blocks):
            filler = {"role": "user" if role == "assistant" else "assistant", "content": [{"text": FILLER}]}
            self._turns += [filler, {"role": role, "content": blocks}]
        else:
            content += blocks

    def _fits(self, *lists: list[Json]) -> bool:
        """Whether blocks may share a turn with tool results; marks of the cache count for nothing."""
        kinds = {next(iter(block)) for blocks in lists for block in blocks} - {"toolResult", "cachePoint"}
        return kinds <= self._family.beside_results

    def _instruct(self, message: Json, where: str) -> None:
        """Leading instructions stand apart; later ones inline where the model honours that, else as marked text."""
        blocks = self._content(message, where, frozenset())
        if not self._turns:
            self._system += blocks
        elif self._family.inline_system:
            self._add("system", blocks)
        else:
            texts = [block["text"] for block in blocks if "text" in block]
            self._add("user", [{"text": f"<system>\n{text}\n</system>"} for text in texts])

    def _user(self, message: Json, where: str) -> None:
        blocks = self._content(message, where, frozenset({"image", "document", "video", "audio"}))
        if any("document" in block for block in blocks) and not any("text" in block for block in blocks):
            blocks.insert(0, {"text": FILLER})
        self._add("user", blocks)

    def _assistant(self, message: Json, where: str) -> None:
        blocks = self._reasoning(message)
        blocks += self._content(message, where, frozenset())
        if not blocks and message.get("refusal"):
            blocks.append({"text": want_text(message["refusal"], f"{where}.refusal")})
        for call_id, name, arguments in read_history_calls(message, where):
            use = {"toolUseId": self._fit(call_id), "name": self._fit_name(name), "input": read_arguments(arguments)}
            blocks.append({"toolUse": use})
        self._add("assistant", blocks)

    def _reasoning(self, message: Json) -> list[Json]:
        """Reasoning to give back: signed blocks unchanged, plain text where no signature is asked for."""
        blocks = []
        for block in _blocks(message):
            if block.get("type") == "bedrock_block":
                blocks.append(want_object(block.get("block"), "thinking_blocks.block"))
            elif self._family.replays == "signed" and block.get("signature"):
                signed = {"text": block.get("thinking") or "", "signature": block["signature"]}
                blocks.append({"reasoningContent": {"reasoningText": signed}})
            elif self._family.replays == "signed" and block.get("data"):
                blocks.append({"reasoningContent": {"redactedContent": block["data"]}})
            elif block.get("signature") or block.get("data") or block.get("item"):
                self._translation.drop("messages.thinking_blocks")
        text = read_reasoning(message)
        if text and self._family.replays == "plain":
            blocks.append({"reasoningContent": {"reasoningText": {"text": text}}})
        elif text and not any("reasoningContent" in block for block in blocks):
            self._translation.drop("messages.reasoning_content", "this model takes none back without a signature")
        return blocks

    def _tool(self, message: Json, where: str) -> None:
        """A tool's result; media that the model refuses inside follow behind the turn's results."""
        call_id = want_text(message.get("tool_call_id"), f"{where}.tool_call_id")
        blocks = self._content({**message, "cache_control": None}, where, frozenset({"image", "document", "video"}))
        marks = [block for block in blocks if "cachePoint" in block]
        allowed = self._family.inside_results | {"text"}
        inside = [block for block in blocks if next(iter(block)) in allowed]
        outside = [block for block in blocks if next(iter(block)) not in allowed | {"cachePoint"}]
        self._outside += outside
        content = inside or [{"text": "(see below)" if outside else "(empty)"}]
        result: Json = {"toolUseId": self._fit(call_id), "content": content}
        if message.get("is_error") and not self._family.result_status:
            self._translation.drop("messages.is_error")
        elif message.get("is_error"):
            result["status"] = "error"
        self._add("user", [{"toolResult": result}, *(marks or self._mark(message))])

    ROLES: ClassVar[Mapping[str, Callable[[BedrockEncoder, Json, str], None]]] = {
        "system": _instruct, "user": _user, "assistant": _assistant, "tool": _tool,
    }  # fmt: skip

    def _content(self, message: Json, where: str, media: frozenset[str]) -> list[Json]:
        blocks: list[Json] = []
        for part in read_parts(message.get("content"), f"{where}.content"):
            block = self._block(part, f"{where}.content")
            if block is not None and next(iter(block)) not in media | {"text", "guardContent", "searchResult"}:
                block = None
                self._translation.drop(f"content.{part.get('type')}")
            if block is not None:
                blocks += [block, *self._mark(part)]
        return blocks + (self._mark(message) if blocks and "cachePoint" not in blocks[-1] else [])

    def _mark(self, holder: Json) -> list[Json]:
        """The cache mark that a part, a message or a tool asks for behind itself."""
        mark = holder.get("cache_control")
        if not isinstance(mark, dict):
            return []
        if not self._family.caches:
            self._translation.drop("cache_control")
            return []
        return [{"cachePoint": {"type": "default", **({"ttl": mark["ttl"]} if mark.get("ttl") else {})}}]

    def _block(self, part: Json, where: str) -> Json | None:
        """One content part as a block; None for blank text and for what cannot be carried, which is named."""
        kind = part.get("type")
        if kind == "text":
            return {"text": part["text"]} if part["text"].strip() else None
        if kind == "native" and part.get("dialect") == "bedrock":
            return want_object(part.get("part"), f"{where}.part")
        if kind == "image_url":
            holder = want_object(part.get("image_url"), f"{where}.image_url")
            return self._media(want_text(holder.get("url"), f"{where}.image_url.url"), part, str(kind), where)
        if kind in ("file", "media"):
            holder = want_object(part.get(kind) if isinstance(part.get(kind), dict) else part, f"{where}.{kind}")
            source = holder.get("file_data") or holder.get("file_url") or holder.get("file_id")
            return self._media(want_text(source, f"{where}.{kind}.file_data"), holder, str(kind), where)
        if kind == "input_audio":
            audio = want_object(part.get("input_audio"), f"{where}.input_audio")
            return {"audio": {"format": audio.get("format") or "wav", "source": {"bytes": audio.get("data")}}}
        self._translation.drop(f"content.{kind}")
        return None

    def _media(self, source: str, holder: Json, kind: str, where: str) -> Json | None:
        """Bytes from a data URI, or a place in S3; Bedrock fetches nothing from the web."""
        name = holder.get("filename") or ""
        if source.startswith("s3://"):
            block = BEDROCK_EXTENSIONS.get(source.rpartition(".")[2].lower())
            place: Json = {"s3Location": {"uri": source}}
        elif source.startswith("data:"):
            media_type, data = read_data_uri(source, where)
            block = BEDROCK_MEDIA.get(media_type) or BEDROCK_EXTENSIONS.get(str(name).rpartition(".")[2].lower())
            place = {"bytes": data}
        else:
            block, place = None, {}
        if block is None:
            self._translation.drop(f"content.{kind}", "Bedrock takes known kinds of files, as data URIs or from S3")
            return None
        carried: Json = {"format": block[1], "source": place}
        if block[0] == "document":
            carried["name"] = self._document_name(str(name))
            if isinstance(holder.get("citations"), dict):
                carried["citations"] = holder["citations"]
        return {block[0]: carried}

    def _document_name(self, filename: str) -> str:
        """A name of the letters that Bedrock allows, and no name twice."""
        stem = filename.rpartition(".")[0] or filename
        stem = re.sub(r"[^A-Za-z0-9\-()\[\]]+", " ", stem).strip()[:190] or "document"
        name, number = stem, 1
        while name in self._documents:
            number += 1
            name = f"{stem} {number}"
        self._documents.add(name)
        return name

    def _fit(self, call_id: str) -> str:
        """A call's id as Bedrock takes it, the same for the same foreign id."""
        if BEDROCK_TOOL_ID.match(call_id):
            return call_id
        return hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:40]

    def _fit_name(self, name: str) -> str:
        """A tool's name as Bedrock takes it; `names["tool_names"]` lets the decoder put the original back."""
        if name not in self._fitted:
            fit = name
            if not BEDROCK_TOOL_ID.match(name):
                fit = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:60] or "tool"
                while fit in self._fitted.values():
                    fit += "_"
                self._translation.names.setdefault("tool_names", {})[fit] = name
            self._fitted[name] = fit
        return self._fitted[name]

    def _ordered(self) -> list[Json]:
        """The turns, beginning with the user where the model insists."""
        if not self._turns or (self._turns[0]["role"] == "assistant" and not self._family.leading_assistant):
            return [{"role": "user", "content": [{"text": FILLER}]}, *self._turns]
        return self._turns

    # -- tools

    def _write_tools(self, body: Json) -> None:
        functions, native = read_tools(self._request, "bedrock", self._translation)
        choice = read_chosen_tools(self._request)
        functions = [tool for tool in functions if choice.names is None or tool.name in choice.names]
        blocks = [block for turn in self._turns for block in turn["content"]]
        called = [block["toolUse"]["name"] for block in blocks if "toolUse" in block and "type" not in block["toolUse"]]
        if choice.mode == "none" and not called:
            functions = []
        tools = [written for tool in functions for written in self._write_tool(tool)] + native
        if not tools and any("toolUse" in block or "toolResult" in block for block in blocks):
            # A history with tool blocks is refused without any declaration.
            names = dict.fromkeys(called or ["tool"])
            tools = [{"toolSpec": {"name": name, "inputSchema": {"json": ANY_OBJECT}}} for name in names]
        if not tools:
            return
        wanted = self._choose(choice)
        config = {"tools": tools} if wanted is None else {"tools": tools, "toolChoice": wanted}
        body["toolConfig"] = {**config, **want_object(body.get("toolConfig") or {}, "toolConfig")}

    def _choose(self, choice: ToolChoice) -> Json | None:
        """The choice in Converse's words, weakened and named where the model refuses it. There is no `none`."""
        if choice.mode == "auto":
            return None
        claude = self._family.claude
        kind = "none" if choice.mode == "none" else "tool" if choice.named else "any"
        forced = claude is None or (claude.forced_choice and (claude.adaptive or not self._thinks))
        if kind == "tool" and kind not in self._family.choices:
            kind = "any"  # the other tools have been left out
        if kind not in self._family.choices or not forced:
            self._translation.drop("tool_choice", "this model decides by itself")
            return None
        names = [self._fit_name(name) for name in choice.names or ()]
        return {"tool": {"name": names[0]}} if kind == "tool" else {"any": {}}

    def _write_tool(self, tool: ToolSpec) -> list[Json]:
        spec: Json = {"name": self._fit_name(tool.name), "inputSchema": {"json": tool.parameters}}
        if tool.description.strip():
            spec["description"] = tool.description
        if tool.strict and self._family.structured:
            spec["strict"] = True
        elif tool.strict:
            self._translation.drop("tools.strict")
        if tool.cache_control and not self._family.caches_tools:
            self._translation.drop("cache_control")
            return [{"toolSpec": spec}]
        return [{"toolSpec": spec}, *self._mark({"cache_control": tool.cache_control})]

    # -- members

    def _max_tokens(self, value: Any) -> None:
        self._config["maxTokens"] = want_whole(value, "max_tokens")

    def _temperature(self, value: Any) -> None:
        self._config["temperature"] = min(value, 1) if isinstance(value, int | float) else value

    def _top_p(self, value: Any) -> None:
        self._config["topP"] = value

    def _stop(self, value: Any) -> None:
        self._config["stopSequences"] = read_stops(value)

    def _top_k(self, value: Any) -> None:
        if not self._family.top_k:
            self._translation.drop("top_k")
            return
        for step in reversed(self._family.top_k):
            value = {step: value}
        merge_members(self._fields, want_object(value, "top_k"))

    def _effort(self, value: Any) -> None:
        effort = want_text(value, "reasoning_effort")
        if self._family.claude is not None:
            self._think(effort, self._family.claude)
        elif effort in self._family.efforts:
            self._fields[self._family.effort] = self._family.efforts[effort]
        else:
            self._translation.drop("reasoning_effort")

    def _think(self, effort: str, claude: ClaudeThinking) -> None:
        if effort == "none" and claude.off:
            self._fields["thinking"] = {"type": claude.off}
            return
        if not claude.adaptive:
            budget = CLAUDE_BUDGETS.get(effort, CLAUDE_BUDGETS["medium"])
            self._fields["thinking"] = {"type": "enabled", "budget_tokens": budget}
            return
        fitting = {"none": "low", "minimal": "low", "xhigh": "max"}.get(effort, effort)
        self._fields["thinking"] = {"type": "adaptive"}
        self._fields["output_config"] = {"effort": effort if effort in claude.efforts else fitting}

    def _response_format(self, value: Any) -> None:
        form = want_object(value, "response_format")
        if form.get("type") != "json_schema" or not self._family.structured:
            self._translation.drop("response_format", "this model has no JSON format on Bedrock")
            return
        inner = want_object(form.get("json_schema"), "response_format.json_schema")
        schema: Json = {"schema": dump_json(inner.get("schema") or {"type": "object"}).decode()}
        schema.update({name: inner[name] for name in ("name", "description") if inner.get(name)})
        text_format = {"type": "json_schema", "structure": {"jsonSchema": schema}}
        merge_members(self._body, {"outputConfig": {"textFormat": text_format}})

    def _tier(self, value: Any) -> None:
        if not isinstance(value, str) or value not in BEDROCK_TIERS:
            self._translation.drop("service_tier")
        else:
            self._body["serviceTier"] = {"type": value}

    def _metadata(self, value: Any) -> None:
        entries = want_object(value, "metadata")
        texts = [text for entry in entries.items() for text in entry]
        if len(entries) <= 16 and all(isinstance(text, str) and BEDROCK_METADATA.match(text) for text in texts):
            self._body["requestMetadata"] = dict(entries)
        else:
            self._translation.drop("metadata")

    WRITERS: ClassVar[Mapping[str, Callable[[BedrockEncoder, Any], None]]] = {
        "max_tokens": _max_tokens, "max_completion_tokens": _max_tokens, "temperature": _temperature, "top_p": _top_p,
        "stop": _stop, "top_k": _top_k, "reasoning_effort": _effort, "response_format": _response_format,
        "service_tier": _tier, "metadata": _metadata,
    }  # fmt: skip


def _at_least(value: Any, least: float) -> bool:
    return isinstance(value, int | float) and value >= least


def merge_members(body: Json, members: Json) -> None:
    """Merge objects into objects, all the way down, and share none; anything else replaces what was there."""
    for name, value in members.items():
        if isinstance(value, dict):
            held = body.get(name)
            body[name] = dict(held) if isinstance(held, dict) else {}
            merge_members(body[name], value)
        else:
            body[name] = value


def read_bedrock_usage(usage: Json) -> Usage:
    """Converse leaves cached and written tokens out of `inputTokens`; `cacheDetails` tells the one-hour writes."""
    written = _count(usage.get("cacheWriteInputTokens"))
    details = usage.get("cacheDetails") or ()
    hour = min(written, sum(_count(item.get("inputTokens")) for item in details if item.get("ttl") == "1h"))
    return Usage(
        input_tokens=_count(usage.get("inputTokens")),
        cached_tokens=_count(usage.get("cacheReadInputTokens")),
        cache_write_5m_tokens=written - hour,
        cache_write_1h_tokens=hour,
        output_tokens=_count(usage.get("outputTokens")),
    )


def read_bedrock_finish(reason: Any, called: bool) -> str:
    """A canonical finish reason. A turn that used only the provider's own tools has no calls for the client."""
    if reason in BEDROCK_FAILED:
        raise UpstreamError(f"the provider stopped with `{reason}`", code=f"upstream_{reason}")
    finish = BEDROCK_FINISHES.get(str(reason), "stop")
    return "stop" if finish == "tool_calls" and not called else finish


def read_bedrock_extras(answer: Json) -> Json:
    """What the client asked Converse for by name: traces and further fields of the model; and the tier it got."""
    names = ("trace", "additionalModelResponseFields", "performanceConfig")
    kept = {name: answer[name] for name in names if answer.get(name)}
    extras: Json = {"extra_content": {"bedrock": kept}} if kept else {}
    tier = (answer.get("serviceTier") or {}).get("type")
    return {**extras, "service_tier": tier} if tier else extras


def read_bedrock_citation(citation: Json, start: int, end: int) -> Json:
    web = (citation.get("location") or {}).get("web") or {}
    if not web.get("url"):
        return {"type": "bedrock_citation", "start_index": start, "end_index": end, "bedrock_citation": citation}
    span = {"start_index": start, "end_index": end}
    return {"type": "url_citation", "url_citation": {"url": web["url"], "title": citation.get("title") or "", **span}}


def read_bedrock_image(image: Json) -> Json:
    url = f"data:image/{image.get('format')};base64,{(image.get('source') or {}).get('bytes') or ''}"
    return {"type": "image_url", "image_url": {"url": url}}


class BedrockMessage:
    """Reads the blocks of a plain answer into a canonical message."""

    def __init__(self, translation: Translation) -> None:
        self._translation = translation
        self._text: list[str] = []
        self._length = 0
        self._thinking: list[str] = []
        self._lists: dict[str, list[Json]] = {}

    def read(self, content: Iterable[Json]) -> Json:
        for block in content:
            for kind, value in block.items():
                if (reader := self.READERS.get(kind)) is not None:
                    reader(self, value)
                    break
        message: Json = {"content": "".join(self._text), **self._lists}
        if self._thinking:
            message["reasoning_content"] = "".join(self._thinking)
        return message

    def _append(self, name: str, value: Json) -> None:
        self._lists.setdefault(name, []).append(value)

    def _plain(self, text: str) -> None:
        self._text.append(text)
        self._length += len(text)

    def _use(self, use: Json) -> None:
        if use.get("type") == "server_tool_use":
            self._append("thinking_blocks", {"type": "bedrock_block", "block": {"toolUse": use}})
            return
        call = read_call(use.get("toolUseId"), use.get("name"), use.get("input"), self._translation)
        self._append("tool_calls", call)

    def _result(self, result: Json) -> None:
        self._append("thinking_blocks", {"type": "bedrock_block", "block": {"toolResult": result}})

    def _reasoning(self, reasoning: Json) -> None:
        if reasoning.get("redactedContent"):
            self._append("thinking_blocks", {"type": "redacted_thinking", "data": reasoning["redactedContent"]})
            return
        text = reasoning.get("reasoningText") or {}
        self._thinking.append(text.get("text") or "")
        if text.get("signature"):
            block = {"type": "thinking", "thinking": text.get("text") or "", "signature": text["signature"]}
            self._append("thinking_blocks", block)

    def _cited(self, cited: Json) -> None:
        start = self._length
        for item in cited.get("content") or ():
            self._plain(item.get("text") or "")
        for citation in cited.get("citations") or ():
            self._append("annotations", read_bedrock_citation(citation, start, self._length))

    def _image(self, image: Json) -> None:
        self._append("images", read_bedrock_image(image))

    READERS: ClassVar[Mapping[str, Callable[[BedrockMessage, Any], None]]] = {
        "text": _plain, "toolUse": _use, "toolResult": _result, "reasoningContent": _reasoning,
        "citationsContent": _cited, "image": _image,
    }  # fmt: skip


# Frames of `application/vnd.amazon.eventstream`: lengths, checksum of the lengths, headers, payload, checksum of all.

FRAME_OVERHEAD_BYTES: Final = 16
FRAME_MAX_HEADERS_BYTES: Final = 128 * 1024
FRAME_MAX_BYTES: Final = 24 * 1024 * 1024 + FRAME_MAX_HEADERS_BYTES + FRAME_OVERHEAD_BYTES
#: Header value types of a fixed size: how many bytes, and their struct format. 0 and 1 are true and false.
FRAME_NUMBERS: Final[Mapping[int, str]] = {2: "b", 3: "h", 4: "i", 5: "q", 8: "q"}
FRAME_TEXTS: Final = frozenset({6, 7})
FRAME_UUID: Final = 9


def _broken_frame(what: str) -> UpstreamError:
    return UpstreamError(f"the provider sent a broken frame: {what}", code="upstream_malformed")


class EventStreamReader:
    """An incremental reader of AWS's binary event stream: bytes in any split, `(headers, payload)` pairs out.

    Raises UpstreamError for a wrong checksum, a length beyond AWS's limits, or headers that cannot be read.
    Source: https://smithy.io/2.0/aws/amazon-eventstream.html
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._total = 0  # the checked length of the frame in front, 0 while unknown

    def feed(self, data: bytes) -> list[tuple[dict[str, Any], bytes]]:
        self._data += data
        frames = []
        at = 0
        while len(self._data) - at >= 12:
            total = self._total or self._check_prelude(at)
            if len(self._data) - at < total:
                self._total = total
                break
            frames.append(read_frame(bytes(memoryview(self._data)[at : at + total])))
            at, self._total = at + total, 0
        del self._data[:at]
        return frames

    def _check_prelude(self, at: int) -> int:
        total, headers, checksum = struct.unpack_from(">III", self._data, at)
        if zlib.crc32(bytes(self._data[at : at + 8])) != checksum:
            raise _broken_frame("the checksum of its lengths is wrong")
        room = min(total - FRAME_OVERHEAD_BYTES, FRAME_MAX_HEADERS_BYTES)
        if not 0 <= headers <= room or total > FRAME_MAX_BYTES:
            raise _broken_frame("its lengths are impossible")
        return int(total)


def read_frame(frame: bytes) -> tuple[dict[str, Any], bytes]:
    """One whole frame, whose lengths have been checked, as its headers and payload."""
    (checksum,) = struct.unpack_from(">I", frame, len(frame) - 4)
    if zlib.crc32(memoryview(frame)[:-4]) != checksum:
        raise _broken_frame("its checksum is wrong")
    end = 12 + int.from_bytes(frame[4:8], "big")
    try:
        return _read_frame_headers(frame, end), frame[end:-4]
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise _broken_frame("its headers cannot be read") from error


def _read_frame_headers(frame: bytes, end: int) -> dict[str, Any]:
    headers: dict[str, Any] = {}
    at = 12
    while at < end:
        start = at + 1
        at = start + frame[at]
        name, kind = frame[start:at].decode(), frame[at]
        at += 1
        if kind in FRAME_TEXTS:
            start = at + 2
            at = start + int.from_bytes(frame[at:start], "big")
            headers[name] = frame[start:at].decode() if kind == 7 else frame[start:at]
        elif kind in FRAME_NUMBERS:
            (headers[name],) = struct.unpack_from(">" + FRAME_NUMBERS[kind], frame, at)
            at += struct.calcsize(">" + FRAME_NUMBERS[kind])
        elif kind == FRAME_UUID:
            headers[name], at = frame[at : at + 16], at + 16
        elif kind in (0, 1):
            headers[name] = kind == 0
        else:
            raise IndexError(kind)
    if at != end:
        raise IndexError(at)
    return headers


#: AWS's exceptions by the HTTP status that sorts them best; a model's own failure may pass on another try.
BEDROCK_EXCEPTIONS: Final[Mapping[str, int]] = {
    "accessdeniedexception": 403, "unrecognizedclientexception": 403, "expiredtokenexception": 403,
    "invalidsignatureexception": 403, "missingauthenticationtokenexception": 403, "resourcenotfoundexception": 404,
    "validationexception": 400, "servicequotaexceededexception": 400, "conflictexception": 400,
    "throttlingexception": 429, "toomanyrequestsexception": 429, "modelnotreadyexception": 429,
    "modeltimeoutexception": 408, "modelerrorexception": 502, "modelstreamerrorexception": 502,
    "internalserverexception": 500, "internalfailure": 500, "serviceunavailableexception": 503,
}  # fmt: skip


class BedrockDecoder:
    """Reads a ConverseStream. `messageStop` proves a whole answer; usage follows in `metadata`."""

    def __init__(self, dialect: BedrockConverse, translation: Translation) -> None:
        self._dialect = dialect
        self._frames = EventStreamReader()
        self._chunks = ChunkWriter(translation)
        self._calls = CallWriter(translation)
        self._blocks: dict[int, Json] = {}  # thinking, server tools and images, put together until their block stops
        self._cited: dict[int, int] = {}
        self._length = 0
        self.complete = False

    def feed(self, data: bytes) -> list[Json]:
        return [chunk for headers, payload in self._frames.feed(data) for chunk in self._read(headers, payload)]

    def close(self) -> list[Json]:
        return []

    def _read(self, headers: Mapping[str, Any], payload: bytes) -> list[Json]:
        kind = headers.get(":message-type")
        if kind == "exception":
            raise self._dialect.read_error(502, payload, str(headers.get(":exception-type") or ""))
        if kind == "error":
            body = dump_json({"message": headers.get(":error-message") or "the provider broke the stream off"})
            raise self._dialect.read_error(502, body, str(headers.get(":error-code") or ""))
        reader = self.READERS.get(str(headers.get(":event-type")))
        if reader is None:
            return []
        event = read_event_json(payload)
        with provider_shape():
            return self._chunks.deltas(reader(self, event)) if reader in self.PLAIN else reader(self, event)

    def _start(self, event: Json) -> list[Json]:
        return [{"content": ""}]

    def _open(self, event: Json) -> list[Json]:
        index, start = event.get("contentBlockIndex") or 0, event.get("start") or {}
        use = start.get("toolUse") or {}
        if use and use.get("type") != "server_tool_use":
            return self._calls.start(index, use.get("toolUseId"), use.get("name"))
        for kind in ("toolUse", "toolResult", "image"):
            if start.get(kind):
                self._blocks[index] = {"kind": kind, "start": start[kind], "text": "", "parts": []}
        return []

    def _delta(self, event: Json) -> list[Json]:
        index, delta = event.get("contentBlockIndex") or 0, event.get("delta") or {}
        for kind, value in delta.items():
            if (reader := self.DELTAS.get(kind)) is not None:
                return reader(self, index, value)
        return []

    def _text(self, index: int, text: str) -> list[Json]:
        self._cited.setdefault(index, self._length)
        self._length += len(text)
        return [{"content": text}] if text else []

    def _input(self, index: int, use: Json) -> list[Json]:
        block = self._blocks.get(index)
        if block is None:
            return self._calls.add(index, use.get("input"))
        block["text"] += use.get("input") or ""
        return []

    def _result(self, index: int, parts: list[Json]) -> list[Json]:
        self._blocks.setdefault(index, {"kind": "toolResult", "start": {}, "text": "", "parts": []})["parts"] += parts
        return []

    def _image(self, index: int, image: Json) -> list[Json]:
        block = self._blocks.setdefault(index, {"kind": "image", "start": {}, "text": "", "parts": []})
        block["text"] += (image.get("source") or {}).get("bytes") or ""
        return []

    def _reasoning(self, index: int, reasoning: Json) -> list[Json]:
        block = self._blocks.setdefault(index, {"kind": "reasoning", "text": "", "signature": "", "data": ""})
        block["signature"] += reasoning.get("signature") or ""
        block["data"] = join_base64(block["data"], reasoning.get("redactedContent") or "")
        text = reasoning.get("text") or ""
        block["text"] += text
        return [{"reasoning_content": text}] if text else []

    def _citation(self, index: int, citation: Json) -> list[Json]:
        start = self._cited.get(index, self._length)
        return [{"annotations": [read_bedrock_citation(citation, start, self._length)]}]

    def _stop(self, event: Json) -> list[Json]:
        index = event.get("contentBlockIndex") or 0
        block = self._blocks.pop(index, None)
        return self._calls.end(index) if block is None else close_bedrock_block(block)

    def _end(self, event: Json) -> list[Json]:
        finish = read_bedrock_finish(event.get("stopReason"), self._calls.any)
        open_blocks = [delta for index in sorted(self._blocks) for delta in close_bedrock_block(self._blocks[index])]
        self._blocks.clear()
        chunks = self._chunks.deltas([*open_blocks, *self._calls.end_all()])
        if self.complete:
            return chunks
        self.complete = True
        extra = read_bedrock_extras(event).get("extra_content")
        return [*chunks, self._chunks.delta({"extra_content": extra} if extra else {}, finish)]

    def _meta(self, event: Json) -> list[Json]:
        if not event.get("usage"):
            return []
        usage = write_openai_usage(read_bedrock_usage(event["usage"]))
        return [self._chunks.usage(usage, **read_bedrock_extras(event))]

    READERS: ClassVar[Mapping[str, Callable[[BedrockDecoder, Json], list[Json]]]] = {
        "messageStart": _start, "contentBlockStart": _open, "contentBlockDelta": _delta, "contentBlockStop": _stop,
        "messageStop": _end, "metadata": _meta,
    }  # fmt: skip
    #: Readers that give deltas; the others give whole chunks.
    PLAIN: ClassVar[tuple[Callable[[BedrockDecoder, Json], list[Json]], ...]] = (_start, _open, _delta, _stop)
    DELTAS: ClassVar[Mapping[str, Callable[[BedrockDecoder, int, Any], list[Json]]]] = {
        "text": _text, "toolUse": _input, "toolResult": _result, "image": _image, "reasoningContent": _reasoning,
        "citation": _citation,
    }  # fmt: skip


def join_base64(first: str, second: str) -> str:
    """Two pieces of base64 as one; each stands for bytes of its own, so the texts cannot simply be joined."""
    if not first or not second:
        return first or second
    try:
        return base64.b64encode(base64.b64decode(first) + base64.b64decode(second)).decode()
    except binascii.Error:
        return first + second


def close_bedrock_block(block: Json) -> list[Json]:
    """What a block that was put together adds to the message when it stops."""
    kind, start = block["kind"], block.get("start") or {}
    if kind == "reasoning":
        if block["data"]:
            return [{"thinking_blocks": [{"type": "redacted_thinking", "data": block["data"]}]}]
        signed = {"type": "thinking", "thinking": block["text"], "signature": block["signature"]}
        return [{"thinking_blocks": [signed]}] if block["signature"] else []
    if kind == "image":
        return [{"images": [read_bedrock_image({"format": start.get("format"), "source": {"bytes": block["text"]}})]}]
    more = {"input": read_arguments(block["text"])} if kind == "toolUse" else {"content": block["parts"]}
    return [{"thinking_blocks": [{"type": "bedrock_block", "block": {kind: {**start, **more}}}]}]


@dataclass(frozen=True, slots=True, kw_only=True)
class BedrockEmbedder:
    """One family of embedding models behind `/invoke`; `batch_inputs` false means one text a call."""

    write: Callable[[Json, Translation], Json]
    read: Callable[[Json], list[Any]]
    batch_inputs: bool = False


def _bedrock_text(request: Json, translation: Translation, taken: Mapping[str, str]) -> tuple[str, Json]:
    """The one text of a request, and its members under the model's names."""
    texts = read_embedding_texts(request.get("input"))
    if len(texts) > 1:
        raise InvalidRequest(f"{translation.model} embeds one text a call", param="input")
    translation.names["embedding_bytes"] = len(texts[0].encode("utf-8", "replace"))
    options: Json = {}
    for name, value in request.items():
        if value is not None and name in taken:
            options[taken[name]] = value
        elif value is not None and name not in ("model", "input", "encoding_format", "extra_body"):
            translation.drop(name)
    return texts[0], {**options, **own_extras(request, "bedrock", translation)}


def _write_titan(request: Json, translation: Translation) -> Json:
    text, options = _bedrock_text(request, translation, {"dimensions": "dimensions", "normalize": "normalize"})
    return {"inputText": text, **options}


def _write_titan_v1(request: Json, translation: Translation) -> Json:
    text, options = _bedrock_text(request, translation, {})
    return {"inputText": text, **options}


def _write_titan_image(request: Json, translation: Translation) -> Json:
    text, options = _bedrock_text(request, translation, {"dimensions": "outputEmbeddingLength"})
    length = options.pop("outputEmbeddingLength", None)
    config = {"embeddingConfig": {"outputEmbeddingLength": length}} if length else {}
    return {"inputText": text, **config, **options}


def _write_nova_embed(request: Json, translation: Translation) -> Json:
    named = {"dimensions": "embeddingDimension", "truncate": "truncationMode", "input_type": "embeddingPurpose"}
    text, options = _bedrock_text(request, translation, named)
    purpose = {"search_query": "GENERIC_RETRIEVAL", "search_document": "GENERIC_INDEX"}
    asked = str(options.pop("embeddingPurpose", "search_document"))
    part = {"truncationMode": options.pop("truncationMode", "NONE"), "value": text}
    params = {"embeddingPurpose": purpose.get(asked, asked.upper()), "text": part, **options}
    return {"taskType": "SINGLE_EMBEDDING", "singleEmbeddingParams": params}


def _write_bedrock_cohere(request: Json, translation: Translation) -> Json:
    newest = re.search(r"embed-v[4-9]", translation.model) is not None
    body = write_cohere_embed(request, CohereFamily(dimensions=newest), "bedrock", translation)
    return {**body, "embedding_types": ["float"]}


def _read_bedrock_cohere(answer: Json) -> list[Any]:
    found = answer["embeddings"]
    return list(found["float"] if isinstance(found, dict) else found)


BEDROCK_EMBEDDERS: Final = (
    (re.compile(r"amazon\.titan-embed-(g1-)?text-v1|amazon\.titan-embed-g1"), BedrockEmbedder(
        write=_write_titan_v1, read=lambda answer: [answer["embedding"]])),
    (re.compile(r"amazon\.titan-embed-image"), BedrockEmbedder(
        write=_write_titan_image, read=lambda answer: [answer["embedding"]])),
    (re.compile(r"amazon\.titan-embed"), BedrockEmbedder(
        write=_write_titan, read=lambda answer: [answer["embedding"]])),
    (re.compile(r"amazon\.nova.*embed"), BedrockEmbedder(
        write=_write_nova_embed, read=lambda answer: [item["embedding"] for item in answer["embeddings"]])),
    (re.compile(r"cohere\.embed"), BedrockEmbedder(
        write=_write_bedrock_cohere, read=_read_bedrock_cohere, batch_inputs=True)),
)  # fmt: skip


def bedrock_embedder(model: str) -> BedrockEmbedder:
    name = BEDROCK_GEOGRAPHY.sub("", model.rpartition("/")[2] if model.startswith("arn:") else model, count=1)
    for pattern, embedder in BEDROCK_EMBEDDERS:
        if pattern.match(name):
            return embedder
    raise InvalidRequest(f"{model} is no embedding model that Stockyard knows on Bedrock", param="model")


class BedrockConverse(Dialect):
    """AWS Bedrock as a provider: Converse for chat, InvokeModel for embeddings."""

    name = "bedrock"
    stream_type: ClassVar[str] = "application/vnd.amazon.eventstream"
    #: Right for every family; `texts_at_once` tells those that take more.
    embeddings_at_once: ClassVar[int] = 1
    events: ClassVar[bool] = False

    def path(self, provider: Provider, model: str, stream: bool) -> str:
        return f"/model/{urllib.parse.quote(model, safe='')}/converse{'-stream' if stream else ''}"

    def encode(self, request: Json, translation: Translation) -> Json:
        return BedrockEncoder(request, translation).build()

    def decode(self, answer: Json, translation: Translation) -> Json:
        with provider_shape():
            message = BedrockMessage(translation).read(answer["output"]["message"]["content"])
            finish = read_bedrock_finish(answer.get("stopReason"), bool(message.get("tool_calls")))
            usage = self.read_usage(answer)
            written = write_openai_usage(usage) if usage else None
            return write_completion(message, finish, written, translation, **read_bedrock_extras(answer))

    def decoder(self, translation: Translation) -> BedrockDecoder:
        return BedrockDecoder(self, translation)

    def read_usage(self, answer: Json) -> Usage | None:
        """Usage of a Converse answer, or of a Titan embedding."""
        usage = answer.get("usage")
        with provider_shape():
            if isinstance(usage, dict):
                return read_bedrock_usage(usage)
            counted = answer.get("inputTextTokenCount")
            return None if counted is None else Usage(input_tokens=_count(counted))

    def read_error(self, status: int, body: bytes, kind: str = "") -> UpstreamError:
        """An error by its status and, where known, AWS's name for it: the header `x-amzn-ErrorType` or a frame's type.

        The name says what the status cannot inside a stream. 424 is the model's own failure and worth another try.
        """
        members = read_error_members(body)
        words = re.split(r"[:#]", kind or str(members.get("__type") or ""))
        name = next((word for word in words if word.lower() in BEDROCK_EXCEPTIONS), "")
        status = BEDROCK_EXCEPTIONS.get(name.lower(), 502 if status == 424 else status)
        message = str(members.get("message") or members.get("originalMessage") or f"the provider answered {status}")
        return upstream_failure(status, message, code=name[:1].upper() + name[1:] or None)

    # -- embeddings

    def batch_inputs(self, model: str) -> bool:
        """Whether one call embeds several texts; where not, the caller makes one call a text and joins the answers."""
        return bedrock_embedder(model).batch_inputs

    def read_error_answer(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError:
        return self.read_error(status, body, headers.get("x-amzn-errortype", ""))

    def texts_at_once(self, model: str) -> int:
        return CohereChat.embeddings_at_once if self.batch_inputs(model) else self.embeddings_at_once

    def encode_embeddings(self, request: Json, translation: Translation) -> Json:
        return bedrock_embedder(translation.model).write(request, translation)

    def decode_embeddings(
        self, answer: Json, translation: Translation, headers: Mapping[str, str] | None = None
    ) -> Json:
        """OpenAI's embeddings answer. Titan counts tokens in its body, others in a header; else they are estimated."""
        with provider_shape():
            vectors = bedrock_embedder(translation.model).read(answer)
            counted = (headers or {}).get("x-amzn-bedrock-input-token-count")
            tokens = int(counted) if counted else _count(answer.get("inputTextTokenCount"))
        estimate = -(-int(translation.names.get("embedding_bytes") or 0) // 4)
        return write_embeddings(vectors, tokens or estimate, translation)


# Signature Version 4, for requests whose path stands percent-encoded already.
# Source: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html

#: Headers that proxies and clients may change on the way.
UNSIGNED_HEADERS: Final = frozenset({
    "connection", "expect", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "transfer-encoding", "upgrade", "user-agent", "x-amzn-trace-id", "authorization",
})  # fmt: skip


def sign_v4(
    method: str, url: str, headers: Mapping[str, str], body: bytes, access_key: str, secret_key: str,
    session_token: str | None, region: str, service: str, now_s: float,
) -> dict[str, str]:  # fmt: skip
    """The headers of a request with its signature: `headers`, plus x-amz-date, x-amz-security-token, authorization.

    `url` is exactly what will be sent; its path is encoded once more for the signature (`%3A` -> `%253A`), as every AWS
    service but S3 does. Pure: `now_s` is the time in seconds since 1970; AWS refuses more than five minutes of skew.
    Headers added later than this are not covered, `host` is taken from the URL.
    """
    parts = urllib.parse.urlsplit(url)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
    added = {"x-amz-date": stamp, **({"x-amz-security-token": session_token} if session_token else {})}
    sent = {name: value for name, value in headers.items() if name.lower() not in {*added, "authorization"}}
    sent.update(added)
    signed = {"host": _signed_host(parts), **{name.lower(): " ".join(value.split()) for name, value in sent.items()}}
    signed = {name: signed[name] for name in sorted(signed) if name not in UNSIGNED_HEADERS}
    names = ";".join(signed)
    canonical = "\n".join((
        method.upper(), _signed_path(parts.path), _signed_query(parts.query),
        *(f"{name}:{value}" for name, value in signed.items()), "", names, hashlib.sha256(body).hexdigest(),
    ))  # fmt: skip
    scope = f"{stamp[:8]}/{region}/{service}/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{secret_key}".encode()
    for step in (*scope.split("/"), text):
        key = hmac.digest(key, step.encode(), "sha256")
    credential = f"Credential={access_key}/{scope}"
    sent["authorization"] = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={key.hex()}"
    return sent


def _signed_host(parts: urllib.parse.SplitResult) -> str:
    """The host as it is sent: with the port only where it is not the scheme's own."""
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return host if parts.port in (None, {"http": 80, "https": 443}.get(parts.scheme)) else f"{host}:{parts.port}"


def _signed_path(path: str) -> str:
    """The path without dot segments and doubled slashes, and encoded once more."""
    kept: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            kept = kept[:-1]
        elif segment not in ("", "."):
            kept.append(segment)
    tail = "/" if kept and path.endswith("/") else ""
    return urllib.parse.quote("/" + "/".join(kept) + tail, safe="/~")


def _signed_query(query: str) -> str:
    pairs = sorted(pair.partition("=")[::2] for pair in query.split("&")) if query else []
    return "&".join(f"{name}={value}" for name, value in pairs)


# ----- Replicate ------------------------------------------------------------------------------------------------------
# Replicate runs models as predictions: a POST makes one, a GET tells how it fares, and a stream has an address of its
# own. `follow` says which address to ask next; nothing else differs for the caller. Each model has its own input
# schema, so a conversation becomes a prompt by a row of REPLICATE_TEMPLATES. There are no tools, and no finish reasons.
# Sources: https://replicate.com/docs/reference/http, …/topics/predictions/streaming, and the models' own API pages


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicateTemplate:
    """How a family of models wants its input; empty names are members that it does not have."""

    #: The whole conversation as a list of messages; empty where a prompt must be built.
    messages: str = ""
    prompt: str = "prompt"
    system: str = "system_prompt"
    image: str = ""
    #: `image` takes a list.
    many_images: bool = False
    #: The least that the output cap may be.
    least_tokens: int = 1
    #: Canonical members that travel under the model's names.
    takes: Mapping[str, str] = field(default_factory=dict)
    #: Values of reasoning_effort; others are brought to the nearest below, or dropped where none is given.
    efforts: tuple[str, ...] = ()


def _named(text: str, **renamed: str) -> dict[str, str]:
    return {**{name: name for name in text.split()}, **renamed}


def _capped(name: str) -> dict[str, str]:
    return {"max_tokens": name, "max_completion_tokens": name}


_PENALTIES: Final = "presence_penalty frequency_penalty"
_SAMPLING: Final = _named("temperature top_p")
#: The first pattern that matches the start of `owner/name` wins; read on the models' pages in November 2026.
REPLICATE_TEMPLATES: Final = tuple(
    (re.compile(pattern), template)
    for pattern, template in (
        (r"openai/gpt-oss|deepseek-ai/", ReplicateTemplate(
            system="", takes={**_SAMPLING, **_capped("max_tokens"), **_named(_PENALTIES)})),
        (r"openai/(gpt-[5-9]|o\d)", ReplicateTemplate(
            messages="messages", image="image_input", many_images=True,
            takes={**_capped("max_completion_tokens"), **_named("verbosity")},
            efforts=("none", "minimal", "low", "medium", "high", "xhigh"))),
        (r"openai/", ReplicateTemplate(
            messages="messages", image="image_input", many_images=True,
            takes={**_SAMPLING, **_capped("max_completion_tokens"), **_named(_PENALTIES)})),
        (r"anthropic/claude-(sonnet|opus|haiku|fable)-5", ReplicateTemplate(
            image="image", takes=_capped("max_tokens"), least_tokens=1024, efforts=("low", "medium", "high", "max"))),
        (r"anthropic/claude-3\.5", ReplicateTemplate(image="image", takes=_capped("max_tokens"))),
        (r"anthropic/", ReplicateTemplate(image="image", takes=_capped("max_tokens"), least_tokens=1024)),
        (r"google/gemini", ReplicateTemplate(
            system="system_instruction", image="images", many_images=True,
            takes={**_SAMPLING, **_capped("max_output_tokens")})),
        (r"meta/llama-2", ReplicateTemplate(
            takes={**_SAMPLING, **_capped("max_new_tokens"), **_named("top_k seed", stop="stop_sequences")})),
        (r"mistralai/", ReplicateTemplate(
            system="", takes={**_SAMPLING, **_capped("max_new_tokens"), **_named("top_k")})),
        (r"meta/", ReplicateTemplate(
            takes={**_SAMPLING, **_capped("max_tokens"), **_named(f"top_k seed {_PENALTIES}", stop="stop_sequences")})),
        (r"", ReplicateTemplate(takes={**_SAMPLING, **_capped("max_tokens")})),
    )
)  # fmt: skip
#: Members of a canonical request that every encoder here carries by itself.
REPLICATE_CARRIED: Final = frozenset({"model", "messages", "stream", "stream_options", "extra_body", "input"})
REPLICATE_RUNNING: Final = frozenset({"starting", "processing"})
REPLICATE_SPEAKERS: Final[Mapping[str, str]] = {"user": "User", "assistant": "Assistant", "system": "System"}


def replicate_template(model: str) -> ReplicateTemplate:
    return next(template for pattern, template in REPLICATE_TEMPLATES if pattern.match(model))


class ReplicateEncoder:
    """Builds the input of one prediction."""

    def __init__(self, request: Json, translation: Translation) -> None:
        self._request, self._translation = with_effort(request), translation
        self._template = replicate_template(translation.model)
        self._input: Json = {}
        self._images: list[str] = []

    def build(self) -> Json:
        turns = [turn for turn in self._turns() if turn["content"]]
        if self._template.messages:
            self._input[self._template.messages] = turns
        else:
            self._write_prompt(turns)
        self._write_images()
        for name, value in self._request.items():
            if name in REPLICATE_CARRIED or says_nothing(name, value):
                continue
            if name == "reasoning_effort" and self._template.efforts:
                self._write_effort(value)
            elif (target := self._template.takes.get(name)) is not None:
                self._input[target] = self._fit(name, value)
            else:
                self._translation.drop(name)
        self._input.update(want_object(self._request.get("input") or {}, "input"))
        self._input.update(own_extras(self._request, "replicate", self._translation))
        version = self._translation.model.partition(":")[2]
        body: Json = {"version": version} if version else {}
        return {**body, "input": self._input, **({"stream": True} if self._translation.stream else {})}

    def _turns(self) -> Iterator[Json]:
        for message, role, where in read_messages(self._request, self._translation):
            if role not in (*REPLICATE_SPEAKERS, "tool"):
                raise InvalidRequest(f"`{where}.role` is {role!r}, which is no role", param=f"{where}.role")
            for name in ("tool_calls", "function_call", "thinking_blocks", "reasoning_content", "cache_control"):
                if message.get(name):
                    self._translation.drop(f"messages.{name}")
            if role == "tool":
                self._translation.drop("messages.tool")
            else:
                yield {"role": role, "content": self._text(message, where)}

    def _text(self, message: Json, where: str) -> str:
        texts = []
        for part in read_parts(message.get("content"), f"{where}.content"):
            if part.get("type") == "text":
                texts.append(part["text"])
            elif part.get("type") == "image_url" and self._template.image:
                holder = want_object(part.get("image_url"), f"{where}.content.image_url")
                self._images.append(want_text(holder.get("url"), f"{where}.content.image_url.url"))
            else:
                self._translation.drop(f"content.{part.get('type')}")
            if part.get("cache_control"):
                self._translation.drop("cache_control")
        return "".join(texts)

    def _write_prompt(self, turns: list[Json]) -> None:
        """One question stands as it is; a conversation is written out with its speakers, for the model to go on."""
        leading = 0
        while leading < len(turns) and turns[leading]["role"] == "system":
            leading += 1
        system = "\n\n".join(turn["content"] for turn in turns[:leading])
        rest = turns[leading:]
        if len(rest) == 1 and rest[0]["role"] == "user":
            prompt = rest[0]["content"]
        else:
            lines = [f"{REPLICATE_SPEAKERS[turn['role']]}: {turn['content']}" for turn in rest]
            prompt = "\n\n".join([*lines, "Assistant:"])
        if system and self._template.system:
            self._input[self._template.system] = system
        elif system:
            prompt = f"{system}\n\n{prompt}"
        self._input[self._template.prompt] = prompt

    def _write_images(self) -> None:
        if self._images and self._template.many_images:
            self._input[self._template.image] = self._images
        elif self._images:
            self._input[self._template.image] = self._images[-1]
            if len(self._images) > 1:
                self._translation.drop("content.image_url[:-1]", "this model sees one image")

    def _write_effort(self, value: Any) -> None:
        efforts = self._template.efforts
        order = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
        if value not in order:
            self._translation.drop("reasoning_effort")
            return
        below = [effort for effort in efforts if order.index(effort) <= order.index(value)]
        self._input["effort" if "max" in efforts else "reasoning_effort"] = below[-1] if below else efforts[0]

    def _fit(self, name: str, value: Any) -> Any:
        if name == "stop":
            return ",".join(read_stops(value))
        if name in ("max_tokens", "max_completion_tokens"):
            return max(want_whole(value, name), self._template.least_tokens)
        return value


def read_replicate_output(output: Any) -> str:
    """A prediction's output as text: most models give a list of pieces."""
    if output is None:
        return ""
    if isinstance(output, list):
        return "".join(piece if isinstance(piece, str) else dump_json(piece).decode() for piece in output)
    return output if isinstance(output, str) else dump_json(output).decode()


def replicate_failure(status: Any, error: Any) -> UpstreamError:
    """The error of a prediction that ended without success."""
    status = str(status)
    if status in REPLICATE_RUNNING:
        return UpstreamTimeout("the provider's prediction has not ended in time", code="upstream_timeout")
    message = error if isinstance(error, str) and error else f"the provider's prediction ended as `{status}`"
    what = "canceled" if status in ("canceled", "aborted") else "failed"
    return UpstreamError(message, code=f"upstream_prediction_{what}")


class ReplicateDecoder:
    """Reads the stream of a prediction: pieces of text, logs, and `done`, which alone ends it.

    The stream tells no usage; the finished prediction at its `urls.get` does.
    """

    def __init__(self, dialect: ReplicatePredictions, translation: Translation) -> None:
        self._dialect = dialect
        self._events = SseReader()
        self._chunks = ChunkWriter(translation)
        self.complete = False

    def feed(self, data: bytes) -> list[Json]:
        return [chunk for name, payload in self._events.feed(data) for chunk in self._read(name, payload)]

    def close(self) -> list[Json]:
        return [chunk for name, payload in self._events.close() for chunk in self._read(name, payload)]

    def _read(self, name: str, payload: bytes) -> list[Json]:
        if self.complete:
            return []
        if name == "output":
            return [self._chunks.delta({"content": payload.decode("utf-8", "replace")})] if payload else []
        if name == "error":
            raise self._dialect.read_error(502, payload)
        return self._done(payload) if name == "done" else []

    def _done(self, payload: bytes) -> list[Json]:
        reason = read_event_json(payload or b"{}").get("reason")
        if reason:
            raise replicate_failure({"error": "failed"}.get(str(reason), reason), None)
        self.complete = True
        return [self._chunks.delta({}, "stop")]


class ReplicatePredictions(Dialect):
    """Replicate as a provider of chat."""

    name = "replicate"
    follows = True

    def path(self, provider: Provider, model: str, stream: bool) -> str:
        """Official models have a path of their own; `owner/name:version` is told in the body (`encode`)."""
        name, _, version = model.partition(":")
        return "/predictions" if version else f"/models/{urllib.parse.quote(name, safe='/')}/predictions"

    def headers_for(self, stream: bool) -> Mapping[str, str]:
        """A plain call waits for its prediction, up to a minute; a streamed one must not."""
        return {} if stream else {"prefer": "wait"}

    def encode(self, request: Json, translation: Translation) -> Json:
        return ReplicateEncoder(request, translation).build()

    def follow(self, answer: Json, translation: Translation) -> str | None:
        """The address to GET next, with the same key, in place of reading `answer`; None where `answer` is the end.

        A streamed call: the stream's address, asked once, with `accept: text/event-stream`. A plain call: the
        prediction's own, asked again until it has ended. UpstreamError for an address that is not Replicate's.
        """
        urls = answer.get("urls")
        urls = urls if isinstance(urls, dict) else {}
        status = str(answer.get("status") or "starting")
        if status != "succeeded" and status not in REPLICATE_RUNNING:
            raise replicate_failure(status, answer.get("error"))
        if translation.stream:
            url = urls.get("stream")
            if not url:
                raise UpstreamError("this model of the provider does not stream", code="upstream_no_stream")
        else:
            url = urls.get("get") if status in REPLICATE_RUNNING else None
        return self._checked(url, translation.provider) if url else None

    def _checked(self, url: Any, provider: Provider) -> str:
        """An address out of an answer gets the key only on the provider's own hosts."""
        parts, base = urllib.parse.urlsplit(str(url)), urllib.parse.urlsplit(provider.base_url)
        host = parts.hostname or ""
        same = (parts.scheme, parts.netloc) == (base.scheme, base.netloc)
        if same or (parts.scheme == "https" and parts.port in (None, 443) and host.endswith(".replicate.com")):
            return str(url)
        raise UpstreamError("the provider's answer names an address that is not its own", code="upstream_malformed")

    def decode(self, answer: Json, translation: Translation) -> Json:
        if answer.get("status") != "succeeded":
            raise replicate_failure(answer.get("status"), answer.get("error"))
        usage = self.read_usage(answer)
        written = write_openai_usage(usage) if usage else None
        message = {"content": read_replicate_output(answer.get("output"))}
        return write_completion(message, "stop", written, translation, id=answer.get("id"))

    def decoder(self, translation: Translation) -> ReplicateDecoder:
        return ReplicateDecoder(self, translation)

    def read_usage(self, answer: Json) -> Usage | None:
        """Token counts of a finished prediction; None for models that are billed by the second."""
        metrics = answer.get("metrics")
        if not isinstance(metrics, dict) or "input_token_count" not in metrics:
            return None
        given, made = metrics["input_token_count"], metrics.get("output_token_count")
        return Usage(input_tokens=_count(given), output_tokens=_count(made))

    def read_error(self, status: int, body: bytes) -> UpstreamError:
        members = read_error_members(body)
        title = members.get("title")
        message = str(members.get("message") or title or f"the provider answered {status}")
        fields = {"title": title} if isinstance(title, str) and title != message else None
        return upstream_failure(status, message, fields=fields)

    def read_models(self, answer: Any) -> list[Json]:
        """Replicate's list of models as rows with the ids that calls use."""
        rows = answer.get("results") if isinstance(answer, dict) else None
        rows = rows if isinstance(rows, list) else []
        named = [row for row in rows if isinstance(row, dict) and row.get("owner") and row.get("name")]
        return [{"id": f"{row['owner']}/{row['name']}"} for row in named]


# ===== Providers ======================================================================================================
# Whom we call: one frozen row a provider, nothing but facts; `dialect` says how its bytes look. A difference between
# two compatible providers is a field of the row, so no code outside this table asks for a provider by name. Rows are
# validated at import: a misspelt parameter, a bad URL or a doubled id fails with a sentence.
#
# To add one: a row here, a line in README's table; the contract test in tests/test_providers.py does the rest.
# Facts were read on the vendors' pages in November 2026. `{VAR|OTHER|=default}` in a URL is filled from settings.

OPENAI_PATHS: Final[Mapping[str, str]] = {
    "chat": "/chat/completions",
    "completions": "/completions",
    "embeddings": "/embeddings",
    "models": "/models",
    "responses": "/responses",
    "moderations": "/moderations",
    "images": "/images/generations",
    "image_edits": "/images/edits",
    "speech": "/audio/speech",
    "transcriptions": "/audio/transcriptions",
    "translations": "/audio/translations",
    "rerank": "/rerank",
    "files": "/files",
    "batches": "/batches",
}
ANTHROPIC_PATHS: Final[Mapping[str, str]] = {
    "chat": "/v1/messages",
    "count_tokens": "/v1/messages/count_tokens",
    "models": "/v1/models?limit=1000",
    "batches": "/v1/messages/batches",
    "files": "/v1/files",
}
GEMINI_PATHS: Final[Mapping[str, str]] = {
    "chat": "/v1beta/models/{model}:generateContent",
    "stream": "/v1beta/models/{model}:streamGenerateContent?alt=sse",
    "embeddings": "/v1beta/models/{model}:batchEmbedContents",
    "count_tokens": "/v1beta/models/{model}:countTokens",
    "models": "/v1beta/models?pageSize=1000",
    "images": "/v1beta/openai/images/generations",
}
VERTEX_PATHS: Final[Mapping[str, str]] = {
    "chat": "/models/{model}:generateContent",
    "stream": "/models/{model}:streamGenerateContent?alt=sse",
    "embeddings": "/models/{model}:predict",
    "count_tokens": "/models/{model}:countTokens",
}
#: Parameters that clients of the OpenAI dialect may send; `drops` and `renames` must name some of them.
OPENAI_PARAMETERS: Final = frozenset(
    "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens "
    "messages metadata modalities model n parallel_tool_calls prediction presence_penalty prompt_cache_key "
    "prompt_cache_options reasoning_effort response_format safety_identifier seed service_tier stop store "
    "stream stream_options temperature tool_choice tools top_logprobs top_p user verbosity web_search_options "
    "moderation dimensions encoding_format input top_k top_n documents query".split()
)


@dataclass(frozen=True, slots=True)
class Variant:
    """Fields of a row that change when the environment variable `env` is set (another door of the same provider)."""

    env: str
    changes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Signing:
    """AWS signatures in place of a key: the variables that hold the credentials, the region's template, the service."""

    access_env: str
    secret_env: str
    session_env: str
    region: str
    service: str


@dataclass(frozen=True, slots=True)
class Credentials:
    """What signs requests to one provider."""

    access_key: str
    secret_key: str
    session_token: str
    region: str
    service: str


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One provider. `key_env` names its variables, any one enables it; without a key it needs `base_env` to be set."""

    id: str
    name: str
    key_env: tuple[str, ...] = ()
    base_url: str
    base_env: tuple[str, ...] = ()
    dialect: str = "openai"
    auth_header: str = "authorization"
    auth_prefix: str = "Bearer "
    #: Bare model names that can only be this provider's (regular expression from the start of the name, any case).
    pattern: str = ""
    offers: frozenset[str] = frozenset({"chat", "models"})
    paths: Mapping[str, str] = field(default_factory=lambda: OPENAI_PATHS)
    drops: frozenset[str] = frozenset()
    renames: Mapping[str, str] = field(default_factory=dict)
    #: Last touches to a body of the OpenAI dialect; called only when one of the parameters `adapts` is present.
    adapt: Callable[[Json, Translation], None] | None = None
    adapts: frozenset[str] = frozenset({"messages"})
    #: Names that the vendor retired, with what to send instead.
    aliases: Mapping[str, Json] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    #: `stream_options`: usage in a stream must be asked for; `always`: it comes unasked and asking may be an error.
    stream_usage: str = "stream_options"
    reasoning_apart: bool = False
    #: Wants the reasoning of earlier turns back as `reasoning_content`.
    replays_reasoning: bool = False
    #: Parameters of other client dialects that this provider does not know.
    foreign_drops: frozenset[str] = frozenset()
    #: Client dialects that pass through although `dialect` is another: the provider has a door for them.
    also_speaks: frozenset[str] = frozenset()
    #: Picks another dialect for a canonical request and model, where the usual door would refuse it; "" for the usual.
    choose_dialect: Callable[[Json, str], str] | None = None
    #: Answers need rewriting even for a client of the same dialect (content lists, foreign finish reasons).
    rewrites_answers: bool = False
    key_optional: bool = False
    #: Further variables that must be set as well, beside a key.
    requires: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    retired: str = ""
    #: Requests are signed where the key came from `signing.access_env`.
    signing: Signing | None = None
    #: The key variable holds the path of a Google credentials file, from which tokens are got.
    key_is_file: bool = False
    #: Whether closing the connection stops the provider's billing for a plain or streamed call.
    cancel_stops_billing: bool = True

    def path(self, endpoint: str, model: str) -> str:
        """The path below the base URL; `{model}` stands percent-encoded. NotFound where the provider has no such door."""
        template = self.paths.get(endpoint)
        if template is None or endpoint not in self.offers:
            raise NotFound(f"{self.name} offers no {endpoint.replace('_', ' ')} endpoint", code="unsupported_endpoint")
        return template.replace("{model}", urllib.parse.quote(model, safe="")) if "{" in template else template

    @functools.cached_property
    def touched(self) -> frozenset[str]:
        """The parameters whose presence means that a client's body cannot pass as it came."""
        return self.drops | self.renames.keys() | (self.adapts if self.adapt is not None else frozenset())

    @property
    def base_variables(self) -> tuple[str, ...]:
        return (f"{self.id.upper()}_BASE_URL", *self.base_env)


def _offers(extra: str = "") -> frozenset[str]:
    return frozenset({"chat", "models", *extra.split()})


def _drops(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _adapt_mistral(body: Json, translation: Translation) -> None:
    """Mistral: `tool_choice: none` beside tools gives garbage, so the tools go; tool ids are 9 letters or digits."""
    if body.get("tool_choice") == "required":
        body["tool_choice"] = "any"
    elif body.get("tool_choice") == "none":
        body.pop("tools", None)
        body.pop("tool_choice", None)
    fit = functools.partial(_fit_tool_id, length=9)
    body["messages"] = [_with_tool_ids(message, fit) for message in body.get("messages", ())]


def _fit_tool_id(call_id: str, length: int) -> str:
    """A tool id of exactly `length` letters and digits, the same for the same foreign id."""
    if len(call_id) == length and call_id.isalnum() and call_id.isascii():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:length]


def _with_tool_ids(message: Json, fit: Callable[[str], str]) -> Json:
    if message.get("tool_call_id"):
        return {**message, "tool_call_id": fit(message["tool_call_id"])}
    if message.get("tool_calls"):
        calls = [{**call, "id": fit(call.get("id") or "")} for call in message["tool_calls"]]
        return {**message, "tool_calls": calls}
    return message


def _adapt_groq(body: Json, translation: Translation) -> None:
    """Groq rejects `name` on messages and more than one choice. Source: console.groq.com/docs/openai."""
    if (body.get("n") or 1) > 1:
        body["n"] = 1
        translation.drop("n")
    if any("name" in message for message in body.get("messages", ())):
        body["messages"] = [{k: v for k, v in message.items() if k != "name"} for message in body["messages"]]
        translation.drop("messages.name")


def _adapt_deepseek(body: Json, translation: Translation) -> None:
    """DeepSeek wants `reasoning_content` on assistant turns with tool calls, empty when unknown."""
    body["messages"] = [
        {**message, "reasoning_content": message.get("reasoning_content") or message.get("reasoning") or ""}
        if message.get("tool_calls") else message
        for message in body.get("messages", ())
    ]  # fmt: skip


def _bedrock_door(canonical: Json, model: str) -> str:
    """Open-weight OpenAI models are served in OpenAI's dialect on the same host."""
    return "openai" if re.match(r"((us|eu|apac|global)\.)?openai\.", model) else ""


def _openai_door(canonical: Json, model: str) -> str:
    """The newest OpenAI models take function tools on /responses only."""
    return "responses" if openai_model_facts(model).needs_responses(canonical) else ""


def _adapt_openai(body: Json, translation: Translation) -> None:
    """`max_tokens` is a 400 on o-series and gpt-5 and later; what a reasoning model refuses and other clients send goes."""
    if "max_tokens" in body and re.match(r"(o[134](-|$)|gpt-([5-9]|\d\d)|codex-)", translation.model):
        body.setdefault("max_completion_tokens", body["max_tokens"])
        del body["max_tokens"]
    for name in openai_model_facts(translation.model).refused(body) if translation.foreign else ():
        del body[name]
        translation.drop(name)


def _one_cap(name: str) -> Mapping[str, str]:
    """Providers that know only one of the two names for the output cap."""
    return {"max_completion_tokens": "max_tokens"} if name == "max_tokens" else {"max_tokens": "max_completion_tokens"}


_MAX_TOKENS = _one_cap("max_tokens")
_NATIVE_RESPONSES = frozenset({"responses"})

# The columns of a row: whose, which variables, where; what bare names are its own; what it offers; its quirks.
PROVIDERS: Final[tuple[Provider, ...]] = (
    Provider(
        id="openai", name="OpenAI", key_env=("OPENAI_API_KEY",), base_url="https://api.openai.com/v1",
        pattern=r"gpt-(?!oss)|chatgpt-|o[134](?=-|$)|codex-|computer-use-|ft:gpt-|text-embedding-(3|ada)-|gpt-image-|dall-e-|tts-|whisper-|omni-moderation-|sora-",
        offers=frozenset(OPENAI_PATHS) - {"rerank"}, adapt=_adapt_openai, adapts=frozenset({"max_tokens"}),
        also_speaks=_NATIVE_RESPONSES, choose_dialect=_openai_door, foreign_drops=_drops("top_k"),
        headers={"openai-organization": "{OPENAI_ORG_ID}", "openai-project": "{OPENAI_PROJECT_ID}"},
    ),
    Provider(
        id="groq", name="Groq", key_env=("GROQ_API_KEY",), base_url="https://api.groq.com/openai/v1",
        offers=_offers("embeddings responses speech transcriptions translations files batches"),
        drops=_drops("logprobs logit_bias top_logprobs"), adapt=_adapt_groq, cancel_stops_billing=False,
    ),
    Provider(
        id="mistral", name="Mistral AI", key_env=("MISTRAL_API_KEY",), base_url="https://api.mistral.ai/v1",
        pattern=r"mistral-|ministral-|magistral-|codestral|devstral-|pixtral-|voxtral-|open-mistral-|open-mixtral-",
        offers=_offers("embeddings responses moderations transcriptions speech files batches"),
        drops=_drops("user logit_bias logprobs top_logprobs store stream_options safety_identifier verbosity"),
        renames={"seed": "random_seed", "dimensions": "output_dimension", **_MAX_TOKENS}, adapt=_adapt_mistral,
        stream_usage="always", rewrites_answers=True, cancel_stops_billing=False,
    ),
    Provider(
        id="together", name="Together AI", key_env=("TOGETHER_API_KEY",), base_url="https://api.together.ai/v1",
        offers=_offers("completions embeddings rerank images speech transcriptions"), renames=_MAX_TOKENS,
    ),
    Provider(
        id="fireworks", name="Fireworks AI", key_env=("FIREWORKS_API_KEY",), base_url="https://api.fireworks.ai/inference/v1",
        pattern=r"accounts/[^/]+/(models|deployments)/", offers=_offers("completions embeddings responses rerank"),
        renames=_MAX_TOKENS,
    ),
    Provider(
        id="deepseek", name="DeepSeek", key_env=("DEEPSEEK_API_KEY",), base_url="https://api.deepseek.com",
        pattern=r"deepseek-(?!ai/)(?!r1:)(?=[^:/]+$)", offers=_offers("responses"), renames=_MAX_TOKENS, adapt=_adapt_deepseek,
        also_speaks=_NATIVE_RESPONSES, replays_reasoning=True,
        aliases={
            "deepseek-chat": {"model": "deepseek-flash", "thinking": {"type": "disabled"}},
            "deepseek-reasoner": {"model": "deepseek-flash", "thinking": {"type": "enabled"}},
        },
    ),
    Provider(
        id="xai", name="xAI", key_env=("XAI_API_KEY",), base_url="https://api.x.ai/v1", pattern=r"grok-",
        offers=_offers("responses images embeddings files batches"), reasoning_apart=True, also_speaks=_NATIVE_RESPONSES,
    ),
    Provider(
        id="openrouter", name="OpenRouter", key_env=("OPENROUTER_API_KEY",), base_url="https://openrouter.ai/api/v1",
        offers=_offers("completions embeddings responses"), renames=_MAX_TOKENS, also_speaks=_NATIVE_RESPONSES,
    ),
    Provider(
        id="azure", name="Azure OpenAI", key_env=("AZURE_OPENAI_API_KEY", "AZURE_OPENAI_AD_TOKEN"),
        base_url="{AZURE_OPENAI_ENDPOINT}/openai/v1", requires=("AZURE_OPENAI_ENDPOINT",),
        auth_header="api-key", auth_prefix="", also_speaks=_NATIVE_RESPONSES, choose_dialect=_openai_door,
        adapt=_adapt_openai, adapts=frozenset({"max_tokens"}), foreign_drops=_drops("top_k"),
        offers=_offers("embeddings responses completions images image_edits speech transcriptions translations files batches"),
        variants=(
            Variant("AZURE_OPENAI_AD_TOKEN", {"auth_header": "authorization", "auth_prefix": "Bearer "}),
            Variant("OPENAI_API_VERSION", {
                "base_url": "{AZURE_OPENAI_ENDPOINT}/openai",
                "paths": {
                    **{name: f"/deployments/{{model}}{path}?api-version={{OPENAI_API_VERSION}}" for name, path in OPENAI_PATHS.items()},
                    **{name: f"{OPENAI_PATHS[name]}?api-version={{OPENAI_API_VERSION}}" for name in ("models", "files", "batches", "responses")},
                },
            }),
        ),
    ),
    Provider(
        id="ollama", name="Ollama", key_env=("OLLAMA_API_KEY",), base_url="http://localhost:11434/v1", base_env=("OLLAMA_HOST",),
        key_optional=True, pattern=r"(?!ft:)[^/:]+:[^/:]+$", renames=_MAX_TOKENS, offers=_offers("completions embeddings responses"),
        variants=(Variant("OLLAMA_API_KEY", {"base_url": "https://ollama.com/v1"}),),
    ),
    Provider(
        id="lmstudio", name="LM Studio", key_env=("LMSTUDIO_API_KEY",), base_url="http://localhost:1234/v1", key_optional=True, renames=_MAX_TOKENS,
        offers=_offers("completions embeddings responses"),
    ),
    Provider(
        id="openai_compatible", name="OpenAI-compatible server (vLLM, llama.cpp, …)", key_env=("OPENAI_COMPATIBLE_API_KEY",),
        base_url="http://localhost:8000/v1", key_optional=True, renames=_MAX_TOKENS, offers=frozenset(OPENAI_PATHS),
    ),
    Provider(
        id="cerebras", name="Cerebras", key_env=("CEREBRAS_API_KEY",), base_url="https://api.cerebras.ai/v1", pattern=r"zai-glm-",
        offers=_offers("completions"), drops=_drops("frequency_penalty presence_penalty logit_bias service_tier"),
    ),
    Provider(
        id="nvidia", name="NVIDIA NIM", key_env=("NVIDIA_API_KEY", "NIM_API_KEY"), base_url="https://integrate.api.nvidia.com/v1",
        offers=_offers("completions embeddings"),
    ),
    Provider(
        id="huggingface", name="Hugging Face router", key_env=("HF_TOKEN", "HUGGINGFACE_API_KEY"),
        base_url="https://router.huggingface.co/v1", offers=_offers("responses"),
    ),
    Provider(
        id="moonshot", name="Moonshot AI", key_env=("MOONSHOT_API_KEY", "MOONSHOTAI_API_KEY"), base_url="https://api.moonshot.ai/v1",
        pattern=r"kimi-|moonshot-", replays_reasoning=True, renames=_MAX_TOKENS, offers=_offers("responses files batches"),
    ),
    Provider(
        id="zai", name="Z.ai", key_env=("ZAI_API_KEY", "ZHIPU_API_KEY"), base_url="https://api.z.ai/api/paas/v4", pattern=r"glm-",
        offers=_offers("embeddings"), renames=_MAX_TOKENS,
    ),
    Provider(
        id="dashscope", name="Alibaba Model Studio", key_env=("DASHSCOPE_API_KEY", "ALIBABA_API_KEY"),
        base_url="https://dashscope-intl.aliyuncs.com/compatible-mode/v1", offers=_offers("embeddings responses"),
        pattern=r"(qwen-|qwen[23]|qwq-|qvq-)(?=[^:/]*$)|text-embedding-v[34]",
    ),
    Provider(
        id="sambanova", name="SambaNova", key_env=("SAMBANOVA_API_KEY",), base_url="https://api.sambanova.ai/v1",
        offers=_offers("embeddings"), drops=_drops("n logprobs top_logprobs logit_bias seed frequency_penalty presence_penalty"),
    ),
    Provider(
        id="perplexity", name="Perplexity", key_env=("PERPLEXITY_API_KEY", "PPLX_API_KEY"), base_url="https://api.perplexity.ai/v1",
        dialect="perplexity", pattern=r"sonar(?=-|$)", offers=_offers("responses") - {"models"}, stream_usage="always",
    ),
    Provider(
        id="cohere", name="Cohere", key_env=("CO_API_KEY", "COHERE_API_KEY"), base_env=("CO_API_URL",), base_url="https://api.cohere.com",
        dialect="cohere", offers=_offers("embeddings rerank"), stream_usage="always",
        pattern=r"command-|c4ai-|embed-v4|embed-english-|embed-multilingual-|rerank-",
        paths={"chat": "/v2/chat", "embeddings": "/v2/embed", "rerank": "/v2/rerank", "models": "/v1/models?page_size=1000"},
    ),
    Provider(
        id="bedrock", name="AWS Bedrock", key_env=("AWS_BEARER_TOKEN_BEDROCK", "AWS_ACCESS_KEY_ID"),
        base_url="https://bedrock-runtime.{AWS_REGION|AWS_DEFAULT_REGION|=us-east-1}.amazonaws.com", dialect="bedrock",
        offers=_offers("embeddings") - {"models"}, paths={"chat": "/openai/v1/chat/completions", "embeddings": "/model/{model}/invoke"},
        pattern=r"((us|eu|apac|global|jp|au|us-gov)\.)?(anthropic|amazon|meta|mistral|cohere|ai21|deepseek|openai|qwen|writer|moonshotai|zai)\.|arn:aws",
        choose_dialect=_bedrock_door, cancel_stops_billing=False,
        signing=Signing("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "{AWS_REGION|AWS_DEFAULT_REGION|=us-east-1}", "bedrock"),
    ),
    Provider(
        id="replicate", name="Replicate", key_env=("REPLICATE_API_TOKEN",), base_url="https://api.replicate.com/v1", dialect="replicate",
        offers=_offers(), paths={"chat": "/predictions", "models": "/models"},
    ),
    Provider(
        id="anthropic", name="Anthropic", key_env=("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"), base_url="https://api.anthropic.com",
        dialect="anthropic", auth_header="x-api-key", auth_prefix="", pattern=r"claude-", paths=ANTHROPIC_PATHS,
        offers=_offers("count_tokens batches files"), stream_usage="always",
    ),
    Provider(
        id="gemini", name="Google Gemini", key_env=("GOOGLE_API_KEY", "GEMINI_API_KEY", "GOOGLE_GENERATIVE_AI_API_KEY"),
        base_url="https://generativelanguage.googleapis.com", dialect="gemini", auth_header="x-goog-api-key", auth_prefix="",
        offers=_offers("stream embeddings count_tokens images"), stream_usage="always", paths=GEMINI_PATHS,
        pattern=r"(models/)?(gemini-|gemma-(?=[^:]*$)|learnlm-|imagen-|veo-)", cancel_stops_billing=False,
    ),
    Provider(
        id="vertex", name="Google Vertex AI", key_env=("GOOGLE_APPLICATION_CREDENTIALS", "VERTEX_ACCESS_TOKEN"),
        base_url="https://{VERTEX_HOST|=aiplatform.googleapis.com}", dialect="vertex", requires=("GOOGLE_CLOUD_PROJECT",),
        offers=_offers("stream embeddings count_tokens") - {"models"}, stream_usage="always", cancel_stops_billing=False,
        paths={name: f"/v1/projects/{{GOOGLE_CLOUD_PROJECT}}/locations/{{GOOGLE_CLOUD_LOCATION|=global}}/publishers/google{path}"
               for name, path in VERTEX_PATHS.items()},
        variants=(Variant("GOOGLE_APPLICATION_CREDENTIALS", {"key_is_file": True}),),
    ),
    Provider(
        id="github_models", name="GitHub Models", key_env=(), base_url="https://models.github.ai/inference",
        retired="GitHub retired GitHub Models on 2026-07-30; name another provider",
    ),
    Provider(
        id="echo", name="Echo (built in)", base_url="builtin:echo", pattern=r"echo(?=$|-)", key_optional=True,
        offers=_offers("completions embeddings"),
    ),
)  # fmt: skip


def check_providers(rows: Sequence[Provider], dialects: Iterable[str]) -> dict[str, Provider]:
    """Validate the table; ValueError with a sentence naming the row. Returns the rows by id."""
    by_id: dict[str, Provider] = {}
    known = set(dialects)
    for row in rows:
        where = f"provider row {row.id!r}"
        if row.id in by_id:
            raise ValueError(f"{where} stands twice in the table")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", row.id):
            raise ValueError(f"{where}: an id has lower-case letters, digits and underscores")
        if row.dialect not in known:
            raise ValueError(f"{where}: no dialect is called {row.dialect!r}")
        if not re.match(r"https://|http://localhost|builtin:|\{[A-Z_]+\}/", row.base_url):
            raise ValueError(f"{where}: {row.base_url!r} is no https URL")
        for name in row.drops | row.renames.keys():
            if name not in OPENAI_PARAMETERS:
                raise ValueError(f"{where}: {name!r} is no parameter that clients send")
        missing = [name for name in row.offers if name not in row.paths]
        if missing:
            raise ValueError(f"{where}: it offers {missing[0]!r} but has no path for it")
        if row.stream_usage not in ("stream_options", "always"):
            raise ValueError(f"{where}: stream_usage is {row.stream_usage!r}")
        re.compile(row.pattern)
        by_id[row.id] = row
    return by_id


@dataclass(frozen=True, slots=True)
class ConfiguredProvider:
    """A provider that this process may call: its row with the variables filled in, and its keys."""

    row: Provider
    base_url: str
    keys: tuple[str, ...]
    headers: Mapping[str, str]
    source: str
    credentials: Credentials | None = None

    @property
    def id(self) -> str:
        return self.row.id


def fill_template(template: str, variables: Mapping[str, str]) -> str:
    """Fill `{A|B|=default}` from variables; an unset name without a default becomes empty. `{model}` is left alone."""

    def value(match: re.Match[str]) -> str:
        for name in match[1].split("|"):
            if name.startswith("="):
                return name[1:]
            if variables.get(name):
                return variables[name].rstrip("/")  # an endpoint copied from a portal ends in one
        return ""

    return re.sub(r"\{([A-Z][A-Z0-9_|=a-z.-]*)\}", value, template)


def fit_base_url(given: str, usual: str) -> str:
    """Bring a user's base URL to the form of the table's: one `/v1` too many or too few is understood.

    A bare `host:port` (as in OLLAMA_HOST) gets `http://`, and 0.0.0.0 is where one listens, not where one calls.
    """
    url = given.strip().rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{given!r} is no http or https URL")
    url = url.replace("//0.0.0.0", "//127.0.0.1", 1)
    versioned = re.search(r"/v\d+[a-z0-9]*$", url)
    usual_path = urllib.parse.urlsplit(usual).path
    if usual_path.endswith("/v1"):
        return re.sub(r"(/v1){2,}$", "/v1", url) if versioned else url + "/v1"
    if versioned and not re.search(r"/v\d+[a-z0-9]*$", usual_path):
        return url[: versioned.start()]
    return url


def configure_provider(row: Provider, variables: Mapping[str, str]) -> ConfiguredProvider | None:
    """Turn a row on where its variables are set; None where they are not. ValueError for a bad URL."""
    keys: tuple[str, ...] = ()
    source = ""
    for name in row.key_env:
        if variables.get(name, "").strip():
            keys, source = tuple(key.strip() for key in variables[name].split(",") if key.strip()), name
            break
    base_name = next((name for name in row.base_variables if variables.get(name)), "")
    built_in = row.base_url.startswith("builtin:")
    if row.retired or not (built_in or keys or (row.key_optional and base_name)):
        return None
    if any(not variables.get(name) for name in row.requires) and not base_name:
        return None
    for variant in row.variants:
        if variables.get(variant.env):
            row = dataclasses.replace(row, **variant.changes)
    paths = {name: fill_template(path, variables) for name, path in row.paths.items()}
    row = dataclasses.replace(row, paths=paths)
    usual = fill_template(row.base_url, variables)
    base_url = fit_base_url(variables[base_name], usual) if base_name else usual
    headers = {name: text for name, raw in row.headers.items() if (text := fill_template(raw, variables))}
    credentials = sign_with(row.signing, variables) if row.signing and source == row.signing.access_env else None
    if row.signing and source == row.signing.access_env and credentials is None:
        return None
    return ConfiguredProvider(row, base_url.rstrip("/"), keys, headers, source or base_name or "built in", credentials)


def sign_with(signing: Signing, variables: Mapping[str, str]) -> Credentials | None:
    """The credentials that sign; None where only half of them is set."""
    secret = variables.get(signing.secret_env, "")
    region = fill_template(signing.region, variables)
    session = variables.get(signing.session_env, "")
    return Credentials(variables[signing.access_env], secret, session, region, signing.service) if secret else None


def enabling_variable(row: Provider) -> str:
    """The variables that would enable a provider, for error messages and the first screen."""
    names = [*row.requires, row.key_env[0]] if row.key_env and not row.key_optional else [row.base_variables[0]]
    return " and ".join(names)


# ===== Dialect register ===============================================================================================
# The dialects by the names that provider rows and endpoints use; the table is checked against it at import.

DIALECTS: Final[Mapping[str, Dialect]] = {
    dialect.name: dialect
    for dialect in (
        OpenAiChat(),
        OpenAiResponses(),
        PerplexityAgent(),
        GeminiGenerate(),
        GeminiVertex(),
        AnthropicMessages(),
        CohereChat(),
        BedrockConverse(),
        ReplicatePredictions(),
    )
}
PROVIDERS_BY_ID: Final = check_providers(PROVIDERS, DIALECTS)


# ===== Prices =========================================================================================================
#
# What a usage costs, in whole nano-dollars. The table (stockyard_assets/prices.json, made by .build/prices.py) has
# `providers`: which price lists a provider reads, in order, and how its names are decorated; and `lists`: one row a
# model with its exact names, patterns (`*` at the ends, `#` for a digit) and price blocks. An amount is a decimal
# string: dollars per million tokens, per thousand searches or requests; `["2.5", [272000, "5"]]` is a tier. Several
# blocks are a schedule of which the last one in force holds (`from` a day, `daily` between two times, UTC).
# - Exact names win, then the longest pattern, then nothing: an unknown model is unpriced, never priced as its family.
# - Amounts are integers from the moment they are read, and a cost is rounded once, half up, at the end.
# - A tier is chosen by the whole prompt (cached and written tokens too) and then holds for the whole call.
# To change a price use `[prices]` of the settings; to carry another unit add a row to RATES and a bucket to Usage.


class InvalidPrices(ValueError):
    """The price table or a `[prices]` row cannot be used; the message is a sentence that names the row."""


class Rate(NamedTuple):
    """One priced unit: its key in the table, its bucket of Usage, what it costs where a row does not say, its side."""

    key: str
    bucket: str
    falls_back_to: tuple[str, ...] = ()
    side: str = "input"
    units: int = 1_000_000


# In the order of the fields of Rates. A fallback stands above the row that names it.
RATES: Final = (
    Rate("input", "input_tokens"),
    Rate("cached", "cached_tokens", ("input",)),
    Rate("cache_write", "cache_write_5m_tokens", ("input",)),
    Rate("cache_write_1h", "cache_write_1h_tokens", ("cache_write", "input")),
    Rate("input_audio", "input_audio_tokens", ("input",)),
    Rate("cached_audio", "cached_audio_tokens", ("input_audio", "cached", "input")),
    Rate("input_image", "input_image_tokens", ("input",)),
    Rate("output", "output_tokens", side="output"),
    Rate("reasoning", "reasoning_tokens", ("output",), side="output"),
    Rate("output_audio", "output_audio_tokens", ("output",), side="output"),
    Rate("output_image", "output_image_tokens", ("output",), side="output"),
    Rate("searches", "searches", side="search", units=1000),
    Rate("requests", "", side="request", units=1000),
)
RATE_BY_KEY: Final = {rate.key: rate for rate in RATES}

SECONDS_PER_DAY: Final = 86_400
MAX_REMEMBERED_MODELS: Final = 4096

# A compact date inside a name: `-20251211` for `-2025-12-11`, as OpenRouter and LiteLLM write it.
COMPACT_DATE: Final = re.compile(r"-(20[0-9]{2})(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])(?=-|:|$)")
# Below a million dollars: more is a slip of the unit. Nine decimals: a nano-dollar per million is the finest we keep.
USD: Final = re.compile(r"([0-9]{1,6})(?:\.([0-9]{1,9}))?", re.ASCII)
PATTERN: Final = re.compile(r"\*?[^*#]+\*?|[^*]+\*?", re.ASCII)  # `#` wants an anchored start, see _matches
DAILY: Final = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Rates:
    """Nano-dollars per million of each unit, in force for prompts of more than `above_tokens` tokens in all."""

    above_tokens: int
    input: int
    cached: int
    cache_write: int
    cache_write_1h: int
    input_audio: int
    cached_audio: int
    input_image: int
    output: int
    reasoning: int
    output_audio: int
    output_image: int
    searches: int
    requests: int

    def dearest(self, side: str) -> int:
        found: list[int] = [getattr(self, rate.key) for rate in RATES if rate.side == side]
        return max(found)


@dataclass(frozen=True, slots=True)
class Price:
    """What one model costs at one time. `id` names provider, row, table date and, where they matter, terms."""

    id: str
    tiers: tuple[Rates, ...]  # ascending by above_tokens; the first is the base and holds from zero
    dearest: tuple[tuple[int, int, int], ...]  # per tier: above_tokens, dearest input and output up to here
    listed: tuple[str, ...]  # the table keys that the row states itself
    unpriced: tuple[str, ...] = ()  # buckets of Usage that this price cannot charge
    variant: str = ""  # the request trait it is for, e.g. "service_tier=priority"; "" is the standard price
    context_tokens: int | None = None
    max_output_tokens: int | None = None
    deprecated: bool = False

    def cost(self, usage: Usage) -> int:
        """Nano-dollars of one call, its per-request fee included. Ask `covers` whether all of it could be charged."""
        u = usage
        rates = self.tiers[0]
        if len(self.tiers) > 1:
            rates = self._tier(usage)
        total = u.input_tokens * rates.input + u.output_tokens * rates.output + rates.requests
        if u.cached_tokens:
            total += u.cached_tokens * rates.cached
        if u.cache_write_5m_tokens or u.cache_write_1h_tokens:
            total += u.cache_write_5m_tokens * rates.cache_write + u.cache_write_1h_tokens * rates.cache_write_1h
        if u.input_audio_tokens or u.cached_audio_tokens or u.output_audio_tokens:
            total += u.input_audio_tokens * rates.input_audio + u.cached_audio_tokens * rates.cached_audio
            total += u.output_audio_tokens * rates.output_audio
        if u.input_image_tokens or u.output_image_tokens:
            total += u.input_image_tokens * rates.input_image + u.output_image_tokens * rates.output_image
        if u.searches:
            total += u.searches * rates.searches
        if u.reasoning_tokens and rates.reasoning != rates.output:
            # Capped, so that a provider that reports reasoning beside the output cannot make the rest negative.
            total += min(u.reasoning_tokens, u.output_tokens) * (rates.reasoning - rates.output)
        return (total + 500_000) // 1_000_000

    def covers(self, usage: Usage) -> bool:
        """False where the usage holds something this price does not list, so that its cost would be too low."""
        return not any(getattr(usage, bucket) for bucket in self.unpriced)

    def upper_bound(self, input_tokens: int, output_tokens: int, requests: int = 1, searches: int = 0) -> int:
        """Nano-dollars that no usage within these totals can exceed, however it falls into buckets and tiers.

        `input_tokens` bounds the prompt in all, `output_tokens` text, reasoning, audio and image together; both are
        totals over all `requests` (at least 1), whose fees are counted. Searches are not bounded by tokens, so a call
        that may search states how many times.
        """
        _, input_rate, output_rate = self.dearest[0]
        for above_tokens, tier_input, tier_output in self.dearest[1:]:
            if input_tokens > above_tokens:
                input_rate, output_rate = tier_input, tier_output
        base = self.tiers[0]
        total = input_tokens * input_rate + output_tokens * output_rate
        return -(-(total + requests * base.requests + searches * base.searches) // 1_000_000)

    def per_million_usd(self) -> dict[str, str]:
        """Decimal dollars for people: per million tokens, per thousand searches or requests.

        Keys are those of the table, with ` above N` for what a tier changes; what the row does not list is left out.
        """
        shown: dict[str, str] = {}
        for rates in self.tiers:
            for key in self.listed:
                amount = getattr(rates, key)
                if rates is self.tiers[0]:
                    shown[key] = _usd(amount, RATE_BY_KEY[key].units)
                elif amount != getattr(self.tiers[0], key):
                    shown[f"{key} above {rates.above_tokens}"] = _usd(amount, RATE_BY_KEY[key].units)
        return shown

    def lines(self, usage: Usage) -> list[Json]:
        """The arithmetic of `cost`: `{"unit", "count", "usd", "per", "total_usd"}` a rate, `usd` being for `per` units."""
        rates = self._tier(usage)
        counts = {rate.key: getattr(usage, rate.bucket) if rate.bucket else 1 for rate in RATES}
        if rates.reasoning == rates.output:
            counts["reasoning"] = 0
        counts["reasoning"] = min(counts["reasoning"], counts["output"])
        counts["output"] -= counts["reasoning"]
        return [
            {"unit": rate.key, "count": counts[rate.key], "usd": _usd(amount, rate.units), "per": rate.units,
             "total_usd": counts[rate.key] * amount / (NANOUSD_PER_USD * 1_000_000)}
            for rate in RATES if (amount := getattr(rates, rate.key)) and counts[rate.key]
        ]  # fmt: skip

    def _tier(self, usage: Usage) -> Rates:
        u = usage
        prompt_tokens = u.input_tokens + u.cached_tokens + u.cache_write_5m_tokens + u.cache_write_1h_tokens
        prompt_tokens += u.input_audio_tokens + u.cached_audio_tokens + u.input_image_tokens
        chosen = self.tiers[0]
        for rates in self.tiers:
            if prompt_tokens > rates.above_tokens:
                chosen = rates
        return chosen


class Terms(NamedTuple):
    """One entry of a schedule: its price holds from `start_s` on, where `daily_s` is set only within these hours."""

    start_s: float
    daily_s: tuple[int, int] | None
    price: Price


class Schedule(NamedTuple):
    """Prices of one model over time, for models whose price has changed or changes with the hour."""

    terms: tuple[Terms, ...]

    def at(self, at_s: float) -> Price:
        """The last price in force; before any of them the first, which is the oldest known."""
        for start_s, daily_s, price in reversed(self.terms):
            if at_s >= start_s and (daily_s is None or _within(daily_s, at_s % SECONDS_PER_DAY)):
                return price
        return self.terms[0].price


class NameTable:
    """The rows of one price list by name. Built once, then only read."""

    __slots__ = ("_patterns", "exact")

    def __init__(self, rows: Iterable[dict[str, Any]], where: str) -> None:
        self.exact: dict[str, dict[str, Any]] = {}
        patterns = []
        for row in rows:
            for name in _exact_names(row):
                if self.exact.setdefault(name, row) is not row:
                    raise InvalidPrices(f'{where} names the model "{name}" twice.')
            for like in row.get("like", ()):
                patterns.append((like, row))
        # Stable, so that of two patterns of one length the earlier row wins: the same answer in every process.
        self._patterns = sorted(patterns, key=lambda found: -len(found[0].strip("*")))

    def match(self, name: str) -> dict[str, Any] | None:
        """The row of this lower-case name: exact, else by the longest pattern, else None."""
        if (row := self.exact.get(name)) is not None:
            return row
        for like, row in self._patterns:
            if _matches(like, name) and not any(_matches(unlike, name) for unlike in row.get("unlike", ())):
                return row
        return None


class Names(NamedTuple):
    """How a provider's model names lead to price lists: one entry of `providers` in the table."""

    lists: tuple[str, ...] = ()
    by_suffix: Mapping[str, str] = {}  # `org/model:suffix` -> the list of whoever serves it
    cut: tuple[str, ...] = ()  # decorations of which only what follows the last occurrence counts
    strip: tuple[str, ...] = ()  # leading decorations of which one is dropped
    free: bool = False

    def candidates(self, model: str) -> list[str]:
        """The name as sent first, then without decorations, then with its compact date spelled out."""
        names = [model.lower()]
        for mark in self.cut:
            names.append(names[-1].rpartition(mark)[2])
        for prefix in self.strip:
            if names[-1].startswith(prefix):
                names.append(names[-1].removeprefix(prefix))
                break
        names.append(COMPACT_DATE.sub(r"-\1-\2-\3", names[-1]))
        return list(dict.fromkeys(names))


class PriceBook:
    """All known prices. `find` is on the path of every call, so its answers are remembered, up to a bound."""

    __slots__ = ("_lists", "_own", "_providers", "_remembered", "date", "version")

    def __init__(
        self,
        date: str,
        version: str,
        providers: Mapping[str, Names],
        lists: Mapping[str, NameTable],
        own: Mapping[str, NameTable] | None = None,
    ) -> None:
        self.date = date  # the day the table was taken, part of every price id
        self.version = version  # of its source
        self._providers = providers
        self._lists = lists
        self._own = own or {}  # rows of the settings by provider id, "" for any provider
        self._remembered: dict[tuple[str, str, str], Price | Schedule | None] = {}

    @classmethod
    def load(cls, raw: bytes) -> PriceBook:
        """Read and check a whole table. Raises InvalidPrices with a sentence that names the offending row."""
        try:
            table = json.loads(raw)
        except ValueError as error:
            raise InvalidPrices(f"The price table is not JSON: {error}.") from error
        if not isinstance(table, dict) or table.get("format") != 1:
            raise InvalidPrices("The price table is not of format 1.")
        for key, kind in (("date", str), ("version", str), ("providers", dict), ("lists", dict)):
            if not isinstance(table.get(key), kind):
                raise InvalidPrices(f'The price table has no usable "{key}".')
        lists = {name: _name_table(rows, f'Price list "{name}"') for name, rows in table["lists"].items()}
        providers = {name: _names(name, entry, lists) for name, entry in table["providers"].items()}
        return cls(table["date"], table["version"], providers, lists)

    def with_overrides(self, rows: Sequence[Mapping[str, Any]]) -> PriceBook:
        """A book in which these rows of `[prices]` win over the table, replacing overrides given before.

        A row is `{"model": name or pattern, "provider": id (optional), "input": usd, "output": usd, ...}` with any
        key of RATES, amounts as decimal strings or numbers, and optionally `context` and `max_output` in tokens; or
        `"free": true` in place of amounts. Raises InvalidPrices with a sentence.
        """
        by_provider: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_provider.setdefault(str(row.get("provider", "")), []).append(_own_row(row))
        own = {provider: NameTable(found, "[prices]") for provider, found in by_provider.items()}
        return PriceBook(self.date, self.version, self._providers, self._lists, own)

    def lists(self, provider: str, model: str) -> bool:
        """Whether a provider's own price list holds this very name (no pattern): then it serves the model."""
        names = self._providers.get(provider) or Names()
        return any(model in self._lists[name].exact for name in names.lists[:1])

    def find(self, provider: str, model: str, at_s: float, variant: str = "") -> Price | None:
        """The price of a provider's model at a time (seconds since 1970), None where it is not known.

        `variant` is a trait of the request that the provider prices apart, `service_tier=priority` for one. Where the
        table has no such variant the standard price answers, whose own `variant` is then "".
        """
        key = (provider, model, variant)
        try:
            found = self._remembered[key]
        except KeyError:
            found = self._remember(key)
        return found.at(at_s) if isinstance(found, Schedule) else found

    def _remember(self, key: tuple[str, str, str]) -> Price | Schedule | None:
        if len(self._remembered) >= MAX_REMEMBERED_MODELS:
            self._remembered.clear()  # names come from clients; a full memory is emptied rather than kept in order
        found = self._remembered[key] = self._look_up(*key)
        return found

    def _look_up(self, provider: str, model: str, variant: str) -> Price | Schedule | None:
        names = self._providers.get(provider) or Names()
        candidates = names.candidates(model)
        own = [self._own[owner] for owner in (provider, "") if owner in self._own]
        if (row := _first_match(own, candidates)) is not None:
            return _priced(row, row["id"], "")
        if names.free:
            return FREE
        lists = [self._lists[name] for name in names.lists]
        bare, _, suffix = candidates[0].rpartition(":")
        if (served_by := names.by_suffix.get(suffix)) is not None:
            lists, candidates = [self._lists[served_by]], [bare]
        row = _first_match(lists, candidates)
        return None if row is None else _priced(row, f"{provider}/{row['id']}@{self.date}", variant)


def _within(daily_s: tuple[int, int], second: float) -> bool:
    begin_s, end_s = daily_s
    if begin_s <= end_s:
        return begin_s <= second < end_s
    return second >= begin_s or second < end_s  # over midnight


def _first_match(lists: Sequence[NameTable], candidates: Sequence[str]) -> dict[str, Any] | None:
    for name in candidates:
        for rows in lists:
            if (row := rows.match(name)) is not None:
                return row
    return None


def _matches(like: str, name: str) -> bool:
    core = like.strip("*")
    if "#" in core:
        long_enough = len(name) >= len(core) if like.endswith("*") else len(name) == len(core)
        return long_enough and all(p == c or (p == "#" and c in "0123456789") for p, c in zip(core, name, strict=False))
    if like.startswith("*"):
        return core in name if like.endswith("*") else name.endswith(core)
    return name.startswith(core) if like.endswith("*") else name == core


def _exact_names(row: dict[str, Any]) -> list[str]:
    return [*([] if row.get("abstract") else [row["id"].lower()]), *row.get("names", ())]


def _priced(row: dict[str, Any], price_id: str, variant: str) -> Price | Schedule:
    """Turn a checked row into its price, or into its prices over time."""
    standard = _terms(row, row["prices"], price_id, "")
    terms = standard
    if variant in row.get("variants", ()):
        special = _terms(row, row["variants"][variant], f"{price_id};{variant}", variant)
        # A variant is known from some day on; before that day the standard price is all there is.
        terms = special if special[0].start_s == 0 else (*standard, *special)
    return terms[0].price if len(terms) == 1 else Schedule(terms)


def _terms(row: dict[str, Any], blocks: Any, price_id: str, variant: str) -> tuple[Terms, ...]:
    return tuple(
        _one_term(row, block, price_id, variant) for block in ([blocks] if isinstance(blocks, dict) else blocks)
    )


def _one_term(row: dict[str, Any], block: dict[str, Any], price_id: str, variant: str) -> Terms:
    start_s, daily_s = 0.0, None
    if start := block.get("from"):
        price_id += f";from={start}"
        start_s = _day_start_s(start)
    if hours := block.get("daily"):
        price_id += f";daily={hours}"
        daily_s = _daily_seconds(hours)
    return Terms(start_s, daily_s, _price(row, block, price_id, variant))


def _price(row: dict[str, Any], block: dict[str, Any], price_id: str, variant: str) -> Price:
    starts = sorted({start for amount in block.values() if isinstance(amount, list) for start, _ in amount[1:]})
    tiers = tuple(_rates(block, above_tokens) for above_tokens in (0, *starts))
    return Price(
        id=price_id,
        tiers=tiers,
        dearest=_dearest(tiers),
        listed=tuple(rate.key for rate in RATES if rate.key in block),
        unpriced=tuple(rate.bucket for rate in RATES if rate.bucket and _source(rate, block) is None),
        variant=variant,
        context_tokens=row.get("context"),
        max_output_tokens=row.get("max_output"),
        deprecated=row.get("deprecated", False),
    )


def _source(rate: Rate, block: dict[str, Any]) -> str | None:
    """The key of the block that prices this unit: its own, else that of the unit it is billed as."""
    return next((key for key in (rate.key, *rate.falls_back_to) if key in block), None)


def _rates(block: dict[str, Any], above_tokens: int) -> Rates:
    nanousd = []
    for rate in RATES:
        key = _source(rate, block)
        usd = "0" if key is None else _amount_above(block[key], above_tokens)
        nanousd.append(_nanousd(usd) * (1_000_000 // rate.units))
    return Rates(above_tokens, *nanousd)


def _amount_above(amount: str | list[Any], above_tokens: int) -> str:
    if isinstance(amount, str):
        return amount
    chosen: str = amount[0]
    for start, usd in amount[1:]:
        if start <= above_tokens and above_tokens:
            chosen = usd
    return chosen


def _dearest(tiers: tuple[Rates, ...]) -> tuple[tuple[int, int, int], ...]:
    """A dearer low tier counts in the tiers above it: a bound on the prompt says nothing of the prompt's size."""
    found: list[tuple[int, int, int]] = []
    highest_input = highest_output = 0
    for rates in tiers:
        highest_input = max(highest_input, rates.dearest("input"))
        highest_output = max(highest_output, rates.dearest("output"))
        found.append((rates.above_tokens, highest_input, highest_output))
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _nanousd(usd: str) -> int:
    """Nano-dollars of a decimal string. Raises ValueError where they are not a whole number, or a slip of the unit."""
    found = USD.fullmatch(usd)
    if found is None:
        raise ValueError(usd)
    return int(found[1]) * 1_000_000_000 + int((found[2] or "").ljust(9, "0"))


def _usd(nanousd_per_million: int, units: int) -> str:
    return f"{(Decimal(nanousd_per_million) * units).scaleb(-15).normalize():f}"


def _day_start_s(day: str) -> float:
    return datetime.datetime.combine(datetime.date.fromisoformat(day), datetime.time(), datetime.UTC).timestamp()


def _daily_seconds(hours: str) -> tuple[int, int]:
    found = DAILY.fullmatch(hours)
    if found is None:
        raise ValueError(hours)
    begin_hour, begin_minute, end_hour, end_minute = map(int, found.groups())
    return begin_hour * 3600 + begin_minute * 60, end_hour * 3600 + end_minute * 60


# ----- checks of a table ----------------------------------------------------------------------------------------------

ROW_KEYS: Final = frozenset(
    {"id", "abstract", "names", "like", "unlike", "context", "max_output", "deprecated", "prices", "variants"}
)
NAMES_KEYS: Final = frozenset(Names._fields)


def _names(provider: str, entry: Any, lists: Mapping[str, NameTable]) -> Names:
    where = f'Price table, provider "{provider}"'
    if not isinstance(entry, dict) or not entry.keys() <= NAMES_KEYS:
        raise InvalidPrices(f"{where}: it may only have {', '.join(sorted(NAMES_KEYS))}.")
    by_suffix = entry.get("by_suffix", {})
    if not isinstance(by_suffix, dict):
        raise InvalidPrices(f'{where}: "by_suffix" must be an object of price lists.')
    names = Names(
        lists=_strings(entry.get("lists", []), f'{where}: "lists"'),
        by_suffix=by_suffix,
        cut=_strings(entry.get("cut", []), f'{where}: "cut"'),
        strip=_strings(entry.get("strip", []), f'{where}: "strip"'),
        free=entry.get("free", False) is True,
    )
    for name in (*names.lists, *names.by_suffix.values()):
        if name not in lists:
            raise InvalidPrices(f'{where}: there is no price list "{name}".')
    return names


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(part, str) and part for part in value):
        raise InvalidPrices(f"{where} must be a list of names.")
    return tuple(value)


def _name_table(rows: Any, where: str) -> NameTable:
    if not isinstance(rows, list):
        raise InvalidPrices(f"{where} is not a list of rows.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not row["id"]:
            raise InvalidPrices(f'{where}, row {number}: it has no "id".')
        _check_row(row, f'{where}, model "{row["id"]}"')
    return NameTable(rows, where)


def _check_row(row: dict[str, Any], where: str) -> None:
    if not row.keys() <= ROW_KEYS:
        unknown = ", ".join(sorted(map(str, row.keys() - ROW_KEYS)))
        raise InvalidPrices(f"{where}: unknown key {unknown}.")
    for key in ("names", "like", "unlike"):
        if key in row:
            _check_patterns(row[key], key, where)
    for key in ("context", "max_output"):
        if key in row and (type(row[key]) is not int or row[key] <= 0):
            raise InvalidPrices(f'{where}: "{key}" must be a positive number of tokens.')
    for key in ("abstract", "deprecated"):
        if type(row.get(key, False)) is not bool:
            raise InvalidPrices(f'{where}: "{key}" must be true or false.')
    if not isinstance(variants := row.get("variants", {}), dict):
        raise InvalidPrices(f'{where}: "variants" must be an object.')
    for blocks in (row.get("prices"), *variants.values()):
        _check_schedule(blocks, where)


def _check_patterns(value: Any, key: str, where: str) -> None:
    for pattern in _strings(value, f'{where}: "{key}"'):
        if pattern != pattern.lower():
            raise InvalidPrices(f'{where}: the name "{pattern}" must be in lower case.')
        if key != "names" and not PATTERN.fullmatch(pattern):
            raise InvalidPrices(f'{where}: the pattern "{pattern}" may have "*" at its ends only, and none before "#".')


def _check_schedule(blocks: Any, where: str) -> None:
    if not isinstance(blocks, (dict, list)) or not blocks:
        raise InvalidPrices(f"{where}: it has no prices.")
    for block in [blocks] if isinstance(blocks, dict) else blocks:
        if not isinstance(block, dict):
            raise InvalidPrices(f"{where}: a price block must be an object.")
        _check_block(block, where)


def _check_block(block: dict[str, Any], where: str) -> None:
    for key, amount in block.items():
        try:
            if key == "from":
                _day_start_s(amount)
            elif key == "daily":
                _daily_seconds(amount)
            elif key not in RATE_BY_KEY:
                raise InvalidPrices(f'{where}: unknown price "{key}"; known are {", ".join(RATE_BY_KEY)}.')
            elif type(amount) is str:
                _nanousd(amount)
            else:
                _check_tiers(key, amount)
        except (ValueError, TypeError) as error:
            if isinstance(error, InvalidPrices):
                raise
            raise InvalidPrices(f'{where}: "{key}" is {json.dumps(amount)}; {_expected(key)}.') from error


def _expected(key: str) -> str:
    if key == "from":
        return "it must be a day such as 2026-11-22"
    if key == "daily":
        return "it must be a time of day in UTC such as 16:30-00:30"
    per = "million tokens" if RATE_BY_KEY[key].units == 1_000_000 else "thousand"
    return f"it must be dollars per {per}, a decimal string below a million with at most nine decimals, or tiers of it"


def _check_tiers(key: str, amount: Any) -> None:
    """Raises ValueError or TypeError; the caller knows the row."""
    if not isinstance(amount, list) or len(amount) < 2 or RATE_BY_KEY[key].units != 1_000_000:
        raise ValueError(key)
    _nanousd(amount[0])
    last = 0
    for start, usd in amount[1:]:
        if type(start) is not int or start <= last:
            raise ValueError(start)
        last = start
        _nanousd(usd)


def _own_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A `[prices]` row of the settings as a row of the table, with an id that changes when its amounts do."""
    model, provider = row.get("model"), row.get("provider", "")
    if not isinstance(model, str) or not model:
        raise InvalidPrices('A [prices] row has no "model".')
    where = f'[prices], model "{model}"'
    if not isinstance(provider, str):
        raise InvalidPrices(f'{where}: "provider" must be a provider id.')
    found: dict[str, Any] = {key: row[key] for key in ("context", "max_output") if key in row}
    block = _own_block(row, where)
    digest = hashlib.blake2s(json.dumps(block, sort_keys=True).encode(), digest_size=4).hexdigest()
    found["id"] = f"own/{provider + '/' if provider else ''}{model}@{digest}"
    found |= {"abstract": True, "like" if "*" in model else "names": [model.lower()], "prices": block}
    _check_row(found, where)
    return found


def _own_block(row: Mapping[str, Any], where: str) -> dict[str, str]:
    given = {key: value for key, value in row.items() if key not in ("model", "provider", "context", "max_output")}
    free = given.pop("free", False)
    if free is True and not given:
        return dict.fromkeys(RATE_BY_KEY, "0")
    if free is not False or "input" not in given:
        raise InvalidPrices(f'{where}: give "input" and "output" in dollars per million tokens, or "free": true.')
    return {key: _decimal(value, key, where) for key, value in given.items()}


def _decimal(value: Any, key: str, where: str) -> str:
    """The shortest decimal of a number as people write it: 0.1 means a tenth, not the float nearest to it."""
    try:
        if isinstance(value, (str, int, float, Decimal)) and not isinstance(value, bool):
            return f"{Decimal(str(value)).normalize():f}"
    except InvalidOperation:
        pass
    raise InvalidPrices(f'{where}: "{key}" is {value!r}; it must be an amount in dollars.')


FREE: Final = Price("free", (Rates(0, *[0] * len(RATES)),), ((0, 0, 0),), ("input", "output"))


# ===== Settings =======================================================================================================
# Rows of name, default and help: the fields of `Settings`. Precedence: flag, environment (`STOCKYARD_<NAME>`),
# stockyard.toml, default. Reading them is pure: the caller brings the flags, the environment and the file's text.
# A wrong name or value is a SettingsError that names the line or the variable. To add one: a field here, and README.


class SettingsError(ValueError):
    """A setting that cannot be used; the message says where it stands and what would be right."""


def _row(default: Any, help: str, read: Callable[[str], Any] = str) -> Any:
    return field(default=default, metadata={"help": help, "read": read})


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return text.lower()

    return read


def _number(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError(f"must be between {low:g} and {high:g}")
        return value

    return read


def _integer(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(f"must be a whole number between {low} and {high}")
        return value

    return read


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    host: str = _row("127.0.0.1", "address to listen on")
    port: int = _row(4200, "port to listen on; 0 picks a free one (also read from PORT)", _integer(0, 65535))
    data_dir: str = _row("~/.stockyard", "where stockyard.db and admin.key live (0700)")
    admin_key: str = _row("", "the admin key; made at first start and kept in admin.key when unset")
    hosts: str = _row("", "further Host names to answer to, comma separated (DNS rebinding guard)")
    require_key: str = _row(
        "auto", "auto, always or never: whether clients must send a virtual key", _one_of("auto", "always", "never")
    )
    client_keys: str = _row("off", "on: a client may bring its own key for a provider it names", _one_of("on", "off"))
    cache: str = _row(
        "deterministic", "off, deterministic or all: which answers are cached", _one_of("off", "deterministic", "all")
    )
    cache_scope: str = _row(
        "key", "key or shared: whether virtual keys see each other's cached answers", _one_of("key", "shared")
    )
    cache_ttl: float = _row(3600.0, "seconds a cached answer lives", _number(0, 31_536_000))
    cache_mb: float = _row(256.0, "memory and disk bound of the cache in MB", _number(1, 1_000_000))
    budget: str = _row("", "a hard spend limit for everything, such as 20/day (USD; day, week, month or total)")
    rate_limit: str = _row("", "such as 600rpm,1000000tpm,64parallel")
    redact: str = _row(
        "off", "off, mask or reversible: personal data in requests", _one_of("off", "mask", "reversible")
    )
    guard_injection: str = _row("off", "off, flag or block: prompt injection", _one_of("off", "flag", "block"))
    guard_secrets: str = _row(
        "off", "off, flag, redact or block: keys and passwords in requests", _one_of("off", "flag", "redact", "block")
    )
    log_bodies: str = _row(
        "on", "on, redacted or none: what of requests and answers is logged", _one_of("on", "redacted", "none")
    )
    log_retention: float = _row(30.0, "days that log rows are kept", _number(0.01, 36500))
    log_mb: float = _row(1024.0, "size bound of the log in MB", _number(1, 10_000_000))
    durability: str = _row(
        "process", "process: rows survive kill -9; full: also power loss (fsync)", _one_of("process", "full")
    )
    connect_timeout: float = _row(5.0, "seconds to connect to a provider", _number(0.01, 3600))
    first_byte_timeout: float = _row(120.0, "seconds until a provider's first byte", _number(0.01, 36000))
    idle_timeout: float = _row(60.0, "seconds between two bytes of a provider", _number(0.01, 36000))
    total_timeout: float = _row(900.0, "seconds for one call to a provider", _number(0.01, 360000))
    body_timeout: float = _row(30.0, "seconds a client may take to send its body", _number(0.05, 36000))
    drain_timeout: float = _row(30.0, "seconds that running calls get at a stop", _number(0, 36000))
    max_body_mb: float = _row(32.0, "largest request body in MB", _number(0.001, 4096))
    retries: int = _row(1, "further tries of the same target after a failure that may pass", _integer(0, 10))
    models_ttl: float = _row(300.0, "seconds that providers' model lists are kept", _number(0, 86400))
    workers: str = _row(
        "1",
        "processes sharing the port; auto is one per core",
        lambda text: text if text == "auto" else str(_integer(1, 256)(text)),
    )
    tables: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def deadlines(self) -> Deadlines:
        return Deadlines(self.connect_timeout, self.first_byte_timeout, self.idle_timeout, self.total_timeout)

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir).expanduser()

    @property
    def is_loopback(self) -> bool:
        if self.host in ("localhost", ""):
            return self.host == "localhost"
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


SETTING_ROWS: Final = tuple(row for row in dataclasses.fields(Settings) if row.metadata)
#: Settings of the contract that this version does not act on yet, with the values that ask for nothing. Any other value
#: is refused: a limit that is set and not kept would be worse than none.
NOT_YET: Final[Mapping[str, frozenset[Any]]] = {
    "client_keys": frozenset({"off"}), "redact": frozenset({"off"}), "guard_injection": frozenset({"off"}),
    "guard_secrets": frozenset({"off"}), "log_bodies": frozenset({"on", "none"}), "workers": frozenset({"1"}),
}  # fmt: skip
SECRET_SETTINGS: Final = frozenset({"admin_key"})
#: Tables of stockyard.toml beside the settings, each read by the section that owns it.
TOML_TABLES: Final = frozenset({"providers", "prices", "budgets", "routes", "aliases"})
#: What a reload changes in a running process, see `prepare_settings`; a change of any other setting or table needs a restart.
LIVE_SETTINGS: Final = frozenset({
    "require_key", "cache_scope", "cache_ttl", "budget", "rate_limit", "connect_timeout", "first_byte_timeout", "idle_timeout",
    "total_timeout", "body_timeout", "drain_timeout", "max_body_mb", "retries", "models_ttl",
})  # fmt: skip
LIVE_TABLES: Final = frozenset({"providers", "prices", "budgets", "routes", "aliases"})


def read_setting(row: dataclasses.Field[Any], text: str, where: str) -> Any:
    try:
        return row.metadata["read"](text)
    except ValueError as error:
        reason = str(error) if str(error).startswith("must") else f"{text!r} is not understood"
        raise SettingsError(f"{where}: {row.name} {reason}") from None


def parse_toml(text: str, path: str) -> tuple[Json, dict[str, Any]]:
    """Split stockyard.toml into settings and tables; SettingsError names the line of an unknown name."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: {error}") from None
    names = {row.name for row in SETTING_ROWS}
    for name in document.keys() - names - TOML_TABLES:
        line = next(
            (at for at, row in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[*\s*{re.escape(name)}\b", row)), 1
        )
        close = [known for known in sorted(names | TOML_TABLES) if known[:4] == name[:4]]
        hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(names))}"
        raise SettingsError(f"{path}, line {line}: no setting is called {name!r}{hint}")
    values = {name: value for name, value in document.items() if name in names}
    return values, {name: value for name, value in document.items() if name in TOML_TABLES}


def read_settings(
    flags: Mapping[str, str | None], environment: Mapping[str, str], toml: str = "", toml_path: str = "stockyard.toml"
) -> Settings:
    """Merge flags, environment and file into Settings; SettingsError for anything unknown or unfit."""
    known = {f"STOCKYARD_{row.name.upper()}" for row in SETTING_ROWS} | {"STOCKYARD_CONFIG"}
    unknown = sorted(name for name in environment if name.startswith("STOCKYARD_") and name not in known)
    if unknown:
        raise SettingsError(f"environment: no setting is called {unknown[0]}; `stockyard config check` lists them all")
    from_file, tables = parse_toml(toml, toml_path) if toml else ({}, {})
    values: Json = {}
    sources = dict.fromkeys(tables, toml_path)
    for row in SETTING_ROWS:
        variable = f"STOCKYARD_{row.name.upper()}"
        if flags.get(row.name) is not None:
            text, source = str(flags[row.name]), f"flag --{row.name.replace('_', '-')}"
        elif environment.get(variable):
            text, source = environment[variable], variable
        elif row.name == "port" and environment.get("PORT"):
            text, source = environment["PORT"], "PORT"
        elif row.name in from_file:
            text, source = str(from_file[row.name]), toml_path
        else:
            sources[row.name] = "default"
            continue
        values[row.name], sources[row.name] = read_setting(row, text, source), source
    settings = Settings(**values, tables=tables, sources=sources)
    for name, inert in NOT_YET.items():
        if getattr(settings, name) not in inert:
            raise SettingsError(
                f"{sources[name]}: {name} = {getattr(settings, name)} is not built into version {__version__} yet"
            )
    if settings.require_key == "never" and not settings.is_loopback:
        raise SettingsError(
            f"{sources['require_key']}: require_key never is refused on {settings.host}, where others can reach this proxy; "
            "use --host 127.0.0.1, or --require-key auto with a key from `stockyard keys create`"
        )
    return settings


def changed_settings(before: Settings, after: Settings) -> list[str]:
    """The settings and tables that differ; SettingsError where one of them cannot change while the process runs."""
    names = [row.name for row in SETTING_ROWS if getattr(before, row.name) != getattr(after, row.name)]
    tables = [name for name in sorted(TOML_TABLES) if before.tables.get(name) != after.tables.get(name)]
    fixed = [name for name in (*names, *tables) if name not in LIVE_SETTINGS | LIVE_TABLES]
    if fixed:
        raise SettingsError(f"{', '.join(fixed)} can be changed by a restart only; nothing was changed")
    return [*names, *tables]


def edit_toml(text: str, changes: Mapping[str, Any]) -> str:
    """stockyard.toml with settings set, or taken out where the value is None; all else stays as it was written."""
    head, table, rest = text, "", ""
    if found := re.search(r"^\s*\[", text, re.MULTILINE):
        head, table, rest = text[: found.start()], found[0], text[found.end() :]
    for name, value in changes.items():
        head = re.sub(rf"^[ \t]*{name}[ \t]*=.*\n?", "", head, flags=re.MULTILINE)
        if value is not None:
            head = f"{name} = {json.dumps(value, ensure_ascii=False)}\n{head}"
    return head + table + rest


def provider_variables(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that providers are configured from: the environment over `[providers.<id>]` of stockyard.toml."""
    variables: dict[str, str] = {}
    table = settings.tables.get("providers", {})
    for provider_id, values in table.items():
        row = PROVIDERS_BY_ID.get(provider_id)
        if row is None or not isinstance(values, dict):
            raise SettingsError(
                f"[providers.{provider_id}]: no provider is called so; known are {', '.join(PROVIDERS_BY_ID)}"
            )
        for name, value in values.items():
            target = {"api_key": row.key_env[0] if row.key_env else "", "base_url": row.base_variables[0]}.get(name)
            if not target:
                raise SettingsError(f"[providers.{provider_id}]: {name!r} is not known; use api_key and base_url")
            variables[target] = ",".join(value) if isinstance(value, list) else str(value)
    return {**variables, **{name: value for name, value in environment.items() if value}}


# ===== Router =========================================================================================================
# From the name in a request to ordered targets, and what failures mean for them. Plain state: the clock (monotonic
# seconds) and randomness come in as arguments. Never a random or default provider: a name that belongs to no configured
# provider is a 404 that says which variable would enable it. The same name goes the same way every time.
# Order: forced by header, route or alias of stockyard.toml, `provider/model`, exact name in a provider's list,
# recognisable prefix; the longest match wins, then the order of the table.
#
# - Another target is tried only where a route names it. What a failure means is a row of REACTIONS.
# - A Health (breaker, latency, calls in flight) is kept for targets that routes name; upstream keys rest one by one.
# - Further tries of one target, and hedges, draw on RetryBudget; fallbacks are bounded by the route and the breakers.
# To add a strategy: a row of STRATEGIES; to add a member of routes: a field of Route.


class Reaction(NamedTuple):
    """What a failure means: may the same target answer another try, may another one, does it count against the
    breaker, and how long does the key rest (seconds; `Retry-After` goes before it)."""

    again: bool
    elsewhere: bool
    breaks: bool
    key_rests_s: float = 0.0


FINAL: Final = Reaction(False, False, False)
PASSING: Final = Reaction(True, True, True)
THROTTLED: Final = Reaction(True, True, False, 2.0)
BAD_KEY: Final = Reaction(False, True, False, 600.0)
SPENT: Final = Reaction(False, True, False, 600.0)
MISPLACED: Final = Reaction(False, True, True)
#: By the provider's code where that says more than the status, else by status. What stands in neither is FINAL where
#: the provider refused the request (any other 4xx), and PASSING where it or the way to it failed.
REACTIONS: Final[Mapping[str | int, Reaction]] = {
    408: PASSING, 409: PASSING, 425: PASSING, 429: THROTTLED, 402: SPENT, 500: PASSING, 502: PASSING, 503: PASSING, 504: PASSING,
    "upstream_authentication": BAD_KEY, **dict.fromkeys(SPENT_CODES, SPENT),
    "slow_down": THROTTLED, "server_is_overloaded": PASSING,  # OpenAI
    "billing_error": SPENT, "rate_limit_error": THROTTLED, "overloaded_error": PASSING,  # Anthropic
    "RESOURCE_EXHAUSTED": THROTTLED, "UNAVAILABLE": PASSING,  # Google
    "ThrottlingException": THROTTLED, "ModelNotReadyException": PASSING,  # Bedrock
    "upstream_tls": MISPLACED, "upstream_redirect": MISPLACED, "upstream_misconfigured": MISPLACED, "upstream_too_large": FINAL,
}  # fmt: skip
RETRY_WAIT_MAX_S: Final = 5.0


def reaction_to(error: UpstreamError) -> Reaction:
    return REACTIONS.get(error.code) or REACTIONS.get(error.status) or (PASSING if error.retryable else FINAL)


class Health:
    """How one target does: a breaker, its latency as a peak EWMA, and its calls in flight.

    The breaker opens after BREAK_AFTER failures in a row, or when half of a window's calls fail; it is half open once
    its time is over: a single probe goes through, which closes it or opens it for twice as long.
    """

    BREAK_AFTER: ClassVar[int] = 5
    OPEN_S: ClassVar[float] = 5.0
    OPEN_MAX_S: ClassVar[float] = 60.0
    WINDOW_S: ClassVar[float] = 10.0
    LATENCY_S: ClassVar[float] = 10.0

    __slots__ = ("_bad", "_good", "_in_row", "_measured_s", "_open_s", "_window_s", "in_flight", "is_probing", "latency_s", "open_until_s")  # fmt: skip

    def __init__(self) -> None:
        self.in_flight = self._good = self._bad = self._in_row = 0
        self.latency_s = self.open_until_s = self._measured_s = self._window_s = 0.0
        self._open_s = self.OPEN_S
        self.is_probing = False

    def state(self, now_s: float) -> str:
        """`closed`, `open`, or `half_open`."""
        return "closed" if not self.open_until_s else "open" if now_s < self.open_until_s else "half_open"

    def view(self, now_s: float) -> Json:
        latency_ms = round(self.latency_s * 1000, 1)
        return {"breaker": self.state(now_s), "in_flight": self.in_flight, "latency_ms": latency_ms}

    def admits(self, now_s: float) -> bool:
        return not self.open_until_s or (now_s >= self.open_until_s and not self.is_probing)

    def begin(self, now_s: float) -> bool:
        """An attempt begins; True where it is the probe of a half-open breaker, which `end` wants to know."""
        self.in_flight += 1
        is_probe = bool(self.open_until_s) and now_s >= self.open_until_s and not self.is_probing
        self.is_probing = self.is_probing or is_probe
        return is_probe

    def end(self, is_probe: bool, outcome: bool | None, latency_s: float, now_s: float) -> None:
        """It ended: True for an answer, False for a failure that counts, None for what says nothing (429, cancelled)."""
        self.in_flight -= 1
        if is_probe:
            self.is_probing = False
        if outcome is None:
            return
        if now_s - self._window_s > self.WINDOW_S:
            self._good, self._bad, self._window_s = 0, 0, now_s
        if outcome:
            self._good, self._in_row = self._good + 1, 0
            if is_probe:  # an answer to a call from before it opened proves nothing
                self.open_until_s, self._open_s = 0.0, self.OPEN_S
            self._measure(latency_s, now_s)
            return
        self._bad, self._in_row = self._bad + 1, self._in_row + 1
        many = self._in_row >= self.BREAK_AFTER or self._bad >= max(2 * self.BREAK_AFTER, self._good)
        if is_probe or (many and not self.open_until_s):
            self._open_s = min(self.OPEN_MAX_S, self._open_s * 2) if is_probe else self._open_s
            self.open_until_s, self._good, self._bad = now_s + self._open_s, 0, 0

    def _measure(self, latency_s: float, now_s: float) -> None:
        """Up at once, down slowly: a target that turned slow is known by its first slow answer."""
        kept = math.exp((self._measured_s - now_s) / self.LATENCY_S)
        self.latency_s = max(latency_s, self.latency_s * kept + latency_s * (1 - kept))
        self._measured_s = now_s


#: By provider and model.
HealthBook = dict[tuple[str, str], Health]


class RetryBudget:
    """A bucket that every call fills a little and every further try of the same target, and every hedge, draws on; so
    a provider that fails all calls sees at most a fifth more of them. `calls` is counted up by whoever answers calls."""

    SHARE: ClassVar[float] = 0.2
    FLOOR_PER_S: ClassVar[float] = 1.0
    MOST: ClassVar[float] = 100.0

    def __init__(self, tokens: float = 20.0) -> None:
        self.calls = 0
        self._tokens, self._at_s = tokens, math.inf

    def take(self, now_s: float) -> bool:
        """Whether one more try is allowed; then it is drawn."""
        grown = self._tokens + self.SHARE * self.calls + self.FLOOR_PER_S * max(0.0, now_s - self._at_s)
        self.calls, self._at_s = 0, now_s
        self._tokens = min(self.MOST, grown)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(frozen=True, slots=True)
class Target:
    """Where an attempt goes: a configured provider and the model name as that provider knows it."""

    provider: ConfiguredProvider
    model: str
    via: str = ""
    #: Kept for targets that a route names.
    health: Health | None = field(default=None, compare=False)


class Asked(NamedTuple):
    """What of a call decides about its targets. `session` is what sticks: the client's session, else its key."""

    prompt_tokens: int = 0
    tags: Mapping[str, str] = {}
    session: str = ""


def _as_choices(value: Any) -> tuple[Json, ...]:
    rows = tuple({"to": row} if isinstance(row, str) else row for row in value) if isinstance(value, list) else ()
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError('must be a list of targets, such as ["openai/gpt-4o-mini", {to = "groq/…", weight = 2}]')
    return rows


#: What no rule may set: what a call is about, how it is delivered, and the output cap, which is `max_output_tokens`.
NOT_RULED: Final = frozenset(
    "model messages stream stream_options input documents query max_tokens max_completion_tokens".split()
)


def _as_parameters(value: Any) -> Json:
    known = OPENAI_PARAMETERS - NOT_RULED
    if not isinstance(value, dict) or not value.keys() <= known:
        raise ValueError(f"must be a table of parameters of OpenAI's chat; known are {', '.join(sorted(known))}")
    return value


#: Headers that a route may add to requests. Keys travel in none of them.
ROUTE_HEADERS: Final = frozenset(
    {"anthropic-beta", "http-referer", "openai-beta", "openai-organization", "openai-project", "user-agent", "x-title"}
)


def _as_headers(value: Any) -> tuple[tuple[str, str], ...]:
    pairs = tuple((name.lower(), text) for name, text in value.items()) if isinstance(value, dict) else ()
    if not pairs or not all(
        name in ROUTE_HEADERS and isinstance(text, str) and text.isascii() and text.isprintable()
        for name, text in pairs
    ):
        raise ValueError(f"must be a table of header texts; known are {', '.join(sorted(ROUTE_HEADERS))}")
    return pairs


def _as_tags(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError('must be a table of texts, such as {team = "search"}')
    return value


def _as_flag(text: str) -> bool:
    return bool(_one_of("true", "false")(text) == "true")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One target of a route, and which calls it takes: all of `tags`, a prompt within the bounds (estimated tokens)."""

    to: str = _row("", "provider/model")
    weight: float = _row(1.0, "its share under `weighted`", _number(0.0001, 1_000_000))
    tags: Mapping[str, str] | None = _row(None, "tags that a call must have", _as_tags)
    min_prompt_tokens: int = _row(0, "smallest prompt it takes", _integer(0, 100_000_000))
    max_prompt_tokens: int = _row(100_000_000, "largest prompt it takes", _integer(1, 100_000_000))
    target: Target

    def refuses(self, asked: Asked) -> str:
        """Why it does not take a call; empty where it does."""
        if not self.min_prompt_tokens <= asked.prompt_tokens <= self.max_prompt_tokens:
            return f"prompt of about {asked.prompt_tokens} tokens"
        return next((f"tag {name}" for name, text in (self.tags or {}).items() if asked.tags.get(name) != text), "")


class Lot(NamedTuple):
    """What strategies order by: one choice, the call, a random number in 0…1 that sticks where the call does."""

    choice: Choice
    asked: Asked
    draw: float
    prices: PriceBook
    at_s: float


def _cost_of(lot: Lot) -> float:
    target = lot.choice.target
    price = lot.prices.find(target.provider.id, target.model, lot.at_s)
    return math.inf if price is None else price.upper_bound(max(1000, lot.asked.prompt_tokens), 500)


def _health(lot: Lot) -> Health:
    assert lot.choice.target.health is not None
    return lot.choice.target.health


#: Targets go by ascending value; equal ones stay in the order of the file.
STRATEGIES: Final[Mapping[str, Callable[[Lot], float]]] = {
    "ordered": lambda lot: 0.0,
    "weighted": lambda lot: -math.log(lot.draw) / lot.choice.weight,  # rendezvous hashing, where the draw sticks
    "least_latency": lambda lot: _health(lot).latency_s * (_health(lot).in_flight + 1),
    "cheapest": _cost_of,
    "fewest_in_flight": lambda lot: _health(lot).in_flight / lot.choice.weight,
}


def with_system_prefix(messages: list[Json], prefix: str) -> list[Json]:
    """Canonical messages whose system text begins with `prefix`."""
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": prefix}, *messages]
    content = first.get("content")
    if isinstance(content, list):
        return [{**first, "content": [{"type": "text", "text": prefix}, *content]}, *messages[1:]]
    return [{**first, "content": f"{prefix}\n\n{content or ''}"}, *messages[1:]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A name of `[routes]`: its targets, what is tried after them, and what it changes in requests."""

    name: str
    strategy: str = _row("ordered", "how targets are ordered", _one_of(*STRATEGIES))
    targets: tuple[Any, ...] = _row((), "where calls go", _as_choices)
    fallbacks: tuple[Any, ...] = _row((), "tried in order when the targets fail", _as_choices)
    sticky: bool = _row(True, "weighted: one session, else one key, stays where it was", _as_flag)
    retries: int | None = _row(None, "further tries of each target", _integer(0, 10))
    hedge_after_ms: float = _row(0.0, "ask the next target as well after so long", _number(1, 600_000))
    connect_timeout: float | None = _row(None, "as the setting", _number(0.01, 3600))
    first_byte_timeout: float | None = _row(None, "as the setting", _number(0.01, 36000))
    idle_timeout: float | None = _row(None, "as the setting", _number(0.01, 36000))
    total_timeout: float | None = _row(None, "as the setting", _number(0.01, 360000))
    min_bytes_per_s: float = _row(0.0, "a stream slower than this over one idle_timeout is stalled", _number(0, 1e9))
    shadow: tuple[Any, ...] = _row((), "gets copies of calls; its answers are thrown away", _as_choices)
    shadow_fraction: float = _row(1.0, "share of the calls that are copied", _number(0, 1))
    defaults: Mapping[str, Any] | None = _row(None, "parameters where the client sends none", _as_parameters)
    forced: Mapping[str, Any] | None = _row(None, "parameters whatever the client sends", _as_parameters)
    system_prefix: str = _row("", "text before the client's system text")
    max_output_tokens: int | None = _row(None, "most output tokens", _integer(1, 100_000_000))
    headers: tuple[tuple[str, str], ...] = _row((), "request headers to add", _as_headers)
    deadlines: Deadlines | None = None

    @property
    def choices(self) -> tuple[Choice, ...]:
        return (*self.targets, *self.fallbacks)

    @property
    def changes_body(self) -> bool:
        return bool(self.defaults or self.forced or self.system_prefix or self.max_output_tokens)

    def ruled(self, asked: Json) -> Json:
        """A canonical request under the route's rules."""
        defaults = {name: value for name, value in (self.defaults or {}).items() if asked.get(name) is None}
        ruled = {**asked, **defaults, **(self.forced or {})}
        if (most := self.max_output_tokens) is not None:
            usual = "max_completion_tokens" if "messages" in ruled else "max_tokens"
            for name in [name for name in OUTPUT_CAP_FIELDS if ruled.get(name) is not None] or [usual]:
                asked_for = ruled.get(name)
                ruled[name] = min(asked_for, most) if isinstance(asked_for, int) else most
        if self.system_prefix and "messages" in ruled:
            ruled["messages"] = with_system_prefix(ruled["messages"], self.system_prefix)
        return ruled

    @property
    def rules_text(self) -> str:
        """What its rules are, for the keys of the cache."""
        return repr((self.defaults, self.forced, self.system_prefix, self.max_output_tokens, self.headers))


def _raw(value: Any) -> Any:
    """A value as rows read it: scalars as the text that an environment variable would hold, the rest as it is."""
    return value if isinstance(value, dict | list) else str(value).lower() if isinstance(value, bool) else str(value)


def read_table(kind: type[T], table: Any, where: str, **given: Any) -> T:
    """A table of stockyard.toml as a `kind`, whose fields tell how each name is read; SettingsError names the table."""
    rows = {row.name: row for row in dataclasses.fields(cast(Any, kind)) if row.metadata}
    unknown = [name for name in table if name not in rows] if isinstance(table, dict) else ["…"]
    if unknown:
        raise SettingsError(f"{where}: {unknown[0]!r} is not known; it is a table of {', '.join(rows)}")
    values = {name: read_setting(rows[name], _raw(value), where) for name, value in table.items()}
    return kind(**given, **values)


class RouteReader:
    """Reads `[routes]` and `[aliases]` against the configured providers; SettingsError for whatever cannot work."""

    def __init__(self, providers: Mapping[str, ConfiguredProvider], deadlines: Deadlines, health: HealthBook) -> None:
        self._providers, self._deadlines = providers, deadlines
        self.health = dict(health)

    def routes(self, table: Mapping[str, Any]) -> dict[str, Route]:
        return {name: self._route(name, row) for name, row in table.items()}

    def aliases(self, table: Mapping[str, Any]) -> dict[str, str]:
        for name, to in table.items():
            if not isinstance(to, str) or not to or to in table:
                raise SettingsError(f"[aliases]: {name} must name a model, `provider/model` or a route, and no alias")
            if to.partition("/")[0] in PROVIDERS_BY_ID and "/" in to:
                self._target(to, f"[aliases] {name}")
        return dict(table)

    def _route(self, name: str, table: Any) -> Route:
        where = f"[routes.{name}]"
        route = read_table(Route, table, where, name=name)
        if not route.targets:
            raise SettingsError(f'{where}: say where calls go with targets = ["provider/model", …]')
        if len(route.shadow) > 1:
            raise SettingsError(f"{where}: shadow takes one target")
        read = {
            part: self._choices(getattr(route, part), f"{where} {part}") for part in ("targets", "fallbacks", "shadow")
        }
        given = {"min_bytes_per_s": route.min_bytes_per_s}
        given |= {f"{name}_s": getattr(route, f"{name}_timeout") for name in ("connect", "first_byte", "idle", "total")}
        changed = {name: value for name, value in given.items() if value}
        deadlines = dataclasses.replace(self._deadlines, **changed) if changed else None
        return dataclasses.replace(route, **cast(Json, read), deadlines=deadlines)

    def _choices(self, rows: tuple[Json, ...], where: str) -> tuple[Choice, ...]:
        return tuple(
            read_table(Choice, row, f"{where}[{at}]", target=self._target(row.get("to"), f"{where}[{at}]"))
            for at, row in enumerate(rows)
        )

    def _target(self, to: Any, where: str) -> Target:
        head, _, model = to.partition("/") if isinstance(to, str) else ("", "", "")
        row = PROVIDERS_BY_ID.get(head)
        if row is None or not model:
            known = ", ".join(self._providers)
            raise SettingsError(f"{where}: {to!r} must be provider/model; configured providers are {known}")
        if head not in self._providers:
            raise SettingsError(f"{where}: {row.name} is not configured; set {enabling_variable(row)}")
        return Target(self._providers[head], model, "route", self.health.setdefault((head, model), Health()))


class Router:
    """Resolves names, orders the targets of routes, and remembers which of them and which upstream keys may be asked."""

    def __init__(
        self, providers: Mapping[str, ConfiguredProvider], prices: PriceBook, routes: Mapping[str, Route] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.providers = dict(providers)
        self.aliases = dict(aliases or {})
        self.routes = dict(routes or {})
        self.routes |= {name: self.routes[to] for name, to in self.aliases.items() if to in self.routes}
        self.retries = RetryBudget()
        choices = [choice for route in self.routes.values() for choice in route.choices]
        self.health: HealthBook = {
            (choice.target.provider.id, choice.target.model): choice.target.health
            for choice in choices
            if choice.target.health
        }
        self._prices = prices
        self._listed: dict[str, frozenset[str]] = {}
        self._memo: dict[tuple[str, str], list[Target]] = {}
        self._turn: collections.Counter[str] = collections.Counter()
        self._rests: dict[tuple[str, str], float] = {}

    @classmethod
    def load(
        cls, providers: Mapping[str, ConfiguredProvider], prices: PriceBook, tables: Mapping[str, Any], deadlines: Deadlines,
        before: Router | None = None,
    ) -> Router:  # fmt: skip
        """A router with the routes and aliases of stockyard.toml; SettingsError where one cannot work. What the router
        `before` a reload knew of targets and keys stays known."""
        reader = RouteReader(providers, deadlines, before.health if before is not None else {})
        routes, aliases = reader.routes(tables.get("routes", {})), reader.aliases(tables.get("aliases", {}))
        both = sorted(routes.keys() & aliases.keys())
        if both:
            raise SettingsError(f"[aliases]: {both[0]} is a route as well; rename one of them")
        router = cls(providers, prices, routes, aliases)
        if before is not None:
            router.retries, router._rests = before.retries, before._rests
        return router

    # -- names

    def learn(self, provider_id: str, models: Iterable[str]) -> None:
        """Remember a provider's own list of models."""
        self._listed[provider_id] = frozenset(models)
        self._memo.clear()

    def targets(self, model: str, forced: str = "") -> list[Target]:
        """The targets of a name, in the order of the file for a route; UnknownModel says what would make it known."""
        found = self._memo.get((model, forced))
        if found is None:
            found = self._resolve(model, forced)
            if len(self._memo) > 10_000:
                self._memo.clear()
            self._memo[model, forced] = found
        return found

    def _resolve(self, model: str, forced: str) -> list[Target]:
        if forced:
            return [self._forced(model, forced)]
        if model in self.routes:
            return [choice.target for choice in self.routes[model].choices]
        if model in self.aliases:
            return [dataclasses.replace(target, via="alias") for target in self._resolve_name(self.aliases[model])]
        return self._resolve_name(model)

    def _resolve_name(self, model: str) -> list[Target]:
        head, slash, rest = model.partition("/")
        if slash and rest and head.lower() in self.providers:
            return [self._target(self.providers[head.lower()], rest, "provider prefix")]
        claims = [claim for provider in self.providers.values() if (claim := self._claim(model, provider))]
        if claims:
            return [max(claims, key=lambda claim: claim[0])[1]]
        raise self._unknown(model)

    def _target(self, provider: ConfiguredProvider, model: str, via: str) -> Target:
        return Target(provider, model, via, self.health.get((provider.id, model)))

    def _claim(self, model: str, provider: ConfiguredProvider) -> tuple[tuple[int, int, int], Target] | None:
        """How strongly a provider claims a bare name: listed, then the longest own prefix, then table order."""
        listed = model in self._listed.get(provider.id, ()) or self._prices.lists(provider.id, model)
        prefix = re.match(provider.row.pattern, model, re.IGNORECASE) if provider.row.pattern else None
        order = -list(self.providers).index(provider.id)
        if not (listed or prefix):
            return None
        strength = (int(bool(listed)), len(prefix[0]) + 1 if prefix else 0, order)
        return strength, self._target(provider, model, "model list" if listed else "prefix")

    def _forced(self, model: str, forced: str) -> Target:
        provider = self.providers.get(forced.lower())
        if provider is None:
            row = PROVIDERS_BY_ID.get(forced.lower())
            if row is None:
                raise InvalidRequest(
                    f"x-stockyard-provider: no provider is called {forced!r}; known are {', '.join(PROVIDERS_BY_ID)}"
                )
            raise UnknownModel(f"the provider {row.name} is not configured; set {enabling_variable(row)}")
        return self._target(provider, model.removeprefix(f"{forced.lower()}/"), "x-stockyard-provider")

    def _unknown(self, model: str) -> UnknownModel:
        head = model.partition("/")[0].lower()
        owner = PROVIDERS_BY_ID.get(head) if "/" in model else None
        owner = owner or next(
            (row for row in PROVIDERS if row.pattern and re.match(row.pattern, model, re.IGNORECASE)), None
        )
        if owner is not None and owner.retired:
            return UnknownModel(f"the model `{model}` is gone: {owner.retired}", param="model")
        if owner is not None and owner.id not in self.providers:
            say = f"the model `{model}` belongs to {owner.name}, which is not configured; set {enabling_variable(owner)} and restart"
            return UnknownModel(say, param="model")
        ready = ", ".join(self.providers)
        say = (
            f"no configured provider serves a model called `{model}`; configured: {ready}. "
            "Name the provider as `provider/model`, or set its variable (for example OPENAI_API_KEY, ANTHROPIC_API_KEY, GROQ_API_KEY)"
        )
        return UnknownModel(say, param="model")

    # -- routes

    def order(self, route: Route, asked: Asked, randomness: random.Random, at_s: float) -> list[Target]:
        """The targets that take such a call, the first choice first, then the fallbacks; UnknownModel for none."""
        lots = [
            Lot(
                choice, asked, self._draw(choice, asked.session if route.sticky else "", randomness), self._prices, at_s
            )
            for choice in route.targets
            if not choice.refuses(asked)
        ]
        lots.sort(key=STRATEGIES[route.strategy])
        found = [lot.choice.target for lot in lots]
        found += [choice.target for choice in route.fallbacks if not choice.refuses(asked)]
        if not found:
            why = "; ".join(f"{choice.to}: {choice.refuses(asked)}" for choice in route.choices)
            raise UnknownModel(f"no target of the route `{route.name}` takes this call ({why})", param="model")
        return found

    @staticmethod
    def _draw(choice: Choice, session: str, randomness: random.Random) -> float:
        if not session:
            return max(1e-12, randomness.random())
        digest = hashlib.blake2b(f"{session}\0{choice.to}".encode(), digest_size=6).digest()
        return (int.from_bytes(digest, "big") + 1) / 2**48

    def rests(self, target: Target, now_s: float) -> float:
        """Seconds until a target may be asked: its breaker is open or its keys rest. 0 where it may be asked now."""
        wait_s, health = 0.0, target.health
        if self._rests:
            wait_s = min(self._rest(target.provider, key, now_s) for key in self._names(target.provider))
        if health is not None and not health.admits(now_s):
            wait_s = max(wait_s, health.open_until_s - now_s, 1.0)
        return wait_s

    def _rest(self, provider: ConfiguredProvider, key: str, now_s: float) -> float:
        return max(0.0, self._rests.get((provider.id, key), 0.0) - now_s)

    @staticmethod
    def _names(provider: ConfiguredProvider) -> tuple[str, ...]:
        """What rests: each key; the provider as a whole (the name "") where requests are signed, or tokens fetched."""
        apart = provider.keys and provider.credentials is None and not provider.row.key_is_file
        return provider.keys if apart else ("",)

    def next_key(self, provider: ConfiguredProvider, now_s: float) -> str:
        """The provider's keys in turn, passing over those that rest while others do not."""
        keys = provider.keys
        if len(keys) < 2:
            return keys[0] if keys else ""
        self._turn[provider.id] += 1
        first = self._turn[provider.id] % len(keys)
        turned = (*keys[first:], *keys[:first])
        return min(turned, key=lambda key: self._rest(provider, key, now_s)) if self._rests else turned[0]

    def has_other_key(self, provider: ConfiguredProvider, now_s: float) -> bool:
        return len(provider.keys) > 1 and any(not self._rest(provider, key, now_s) for key in provider.keys)

    def note_failure(self, target: Target, key: str, error: UpstreamError, now_s: float) -> None:
        """Let the key that failed rest, as the kind of failure or `Retry-After` says."""
        reaction, told_s = reaction_to(error), error.retry_after_s or 0.0
        rest_s = told_s if told_s and reaction is THROTTLED else max(told_s, reaction.key_rests_s)
        if rest_s and reaction.elsewhere:
            self._rests = {at: until_s for at, until_s in self._rests.items() if until_s > now_s}
            named = key if key in self._names(target.provider) else ""
            self._rests[target.provider.id, named] = now_s + rest_s

    def retry_wait_s(
        self, target: Target, error: UpstreamError, tries: int, most: int, now_s: float, draw: float
    ) -> float | None:
        """How long to wait before the same target is tried again; None where it is not.

        Another key may help at once. Else a failure that may pass is waited out, with full jitter, as the provider says.
        """
        reaction = reaction_to(error)
        if reaction.key_rests_s and tries < len(target.provider.keys) and self.has_other_key(target.provider, now_s):
            return 0.0
        wait_s = max(draw * 0.2 * 2.0 ** min(tries, 5), error.retry_after_s or 0.0)
        may = reaction.again and tries <= most and wait_s <= RETRY_WAIT_MAX_S
        return wait_s if may and self.retries.take(now_s) else None

    def view(
        self, model: str, forced: str, asked: Asked, randomness: random.Random, now_s: float, at_s: float
    ) -> list[Json]:
        """Where a name would go, in order, and why: what `stockyard route` and GET /api/route show."""
        route = None if forced else self.routes.get(model)
        targets = self.targets(model, forced) if route is None else self.order(route, asked, randomness, at_s)
        shown = [self._show(target, now_s, at_s) for target in targets]
        if route is None:
            return shown
        by_target = {(choice.target.provider.id, choice.target.model): choice for choice in reversed(route.choices)}
        for row in shown:
            choice = by_target[row["provider"], row["upstream_model"]]
            row |= {
                "route": route.name,
                "strategy": route.strategy,
                "weight": choice.weight,
                "fallback": choice not in route.targets,
            }
        left_out = [(choice, why) for choice in route.choices if (why := choice.refuses(asked))]
        return shown + [
            {**self._show(choice.target, now_s, at_s), "route": route.name, "left_out": why} for choice, why in left_out
        ]

    def _show(self, target: Target, now_s: float, at_s: float) -> Json:
        price, health = self._prices.find(target.provider.id, target.model, at_s), target.health
        shown: Json = {
            "provider": target.provider.id, "upstream_model": target.model, "via": target.via,
            "base_url": target.provider.base_url, "dialect": target.provider.row.dialect,
            "price": price.per_million_usd() if price is not None else None,
            "rests_s": round(self.rests(target, now_s), 3),
            "keys_resting": sum(self._rest(target.provider, key, now_s) > 0 for key in target.provider.keys),
        }  # fmt: skip
        return shown if health is None else {**shown, **health.view(now_s)}

    def view_provider(self, provider: ConfiguredProvider, now_s: float) -> Json:
        """How many of a provider's keys rest, and how the targets do that routes name."""
        resting = sum(self._rest(provider, key, now_s) > 0 for key in self._names(provider))
        named = [(model, health) for (owner, model), health in self.health.items() if owner == provider.id]
        return {"keys_resting": resting, "targets": [{"model": model, **health.view(now_s)} for model, health in named]}


# ===== Cache ==========================================================================================================
# Which answers may be given again, under which key, and in which form. Pure: the clock comes in as an argument, what is
# kept on disk and what is shared in flight lies below (Store, Gateway).
#
# - The key is a SHA-256 over the tenant's scope (an argument of its own, so that nothing in a body can imitate it), the
#   place, the targets, the headers that travel, the redaction mode, and the whole body: keys sorted, white space gone.
#   Only how the answer is delivered is left out, so that plain and streamed calls share what is kept.
# - Kept are whole answers alone: never errors, truncated or filtered answers, or streams that did not complete.
# - A streamed answer is kept as its events. Asked for in the other form, an entry is converted through the client's own
#   dialect where that loses nothing; otherwise the call is a miss.
# To let more calls in, change `is_cacheable`; to let more of a request decide, change `cache_key` and CACHE_FORMAT.

CACHE_FORMAT: Final = 1
#: Kinds of calls whose answers may be kept, by policy.
KINDS_KEPT: Final[Mapping[str, frozenset[str]]] = {
    "off": frozenset(),
    "deterministic": frozenset({"chat", "completions", "embeddings"}),
    "all": frozenset({"chat", "completions", "embeddings", "moderations", "rerank", "images", "speech"}),
}
#: Members by which a provider searches, runs code or calls others while it answers.
SERVER_SIDE_MEMBERS: Final = frozenset(
    {"web_search_options", "plugins", "search_parameters", "enable_search", "mcp_servers"}
)
#: Members that make an answer hang on state that no key can see.
STATEFUL_MEMBERS: Final = frozenset({"conversation", "background"})
CLIENT_SIDE_TOOLS: Final = frozenset({"function", "custom"})
#: Members that say how an answer is delivered, not what it is.
DELIVERY_MEMBERS: Final = frozenset({"stream", "stream_options"})
WHOLE_FINISHES: Final = frozenset({"stop", "tool_calls", "function_call"})
#: What an entry costs beside its bytes: its objects in memory, its row and key on disk.
ENTRY_OVERHEAD_BYTES: Final = 800
#: One entry may take this share of the cache, so that one large answer cannot push out all others.
ENTRY_MAX_SHARE: Final = 16


def is_cacheable(policy: str, kind: str, asked: Json, request: Json, stores_unasked: bool = False) -> bool:
    """Whether the answer to a request may be kept. `asked` is the canonical request, `request` the client's own.

    The usual call (neither temperature 0 nor a seed) is told by two lookups.
    """
    is_random = kind != "embeddings" and asked.get("temperature") != 0 and asked.get("seed") is None
    if is_random and policy != "all":
        return False
    if kind not in KINDS_KEPT[policy] or not STATEFUL_MEMBERS.isdisjoint(request):
        return False
    return policy == "all" or not has_side_effects(asked, request, stores_unasked)


def has_side_effects(asked: Json, request: Json, stores_unasked: bool) -> bool:
    """Whether a request asks for several answers, is kept by the provider, or makes it do more than answer."""
    store = request.get("store")
    if (stores_unasked if store is None else store) or asked.get("n") not in (None, 1):
        return True
    if not SERVER_SIDE_MEMBERS.isdisjoint(request) or not SERVER_SIDE_MEMBERS.isdisjoint(asked):
        return True
    tools = asked.get("tools") or ()
    return any(not isinstance(tool, dict) or tool.get("type") not in CLIENT_SIDE_TOOLS for tool in tools)


def cache_key(
    scope: str,
    place: str,
    dialect: str,
    targets: Sequence[Target],
    request: Json,
    headers: Sequence[Any],
    redaction: str,
) -> bytes:
    """The key of a request's answer. `scope` is the virtual key's id, empty where there is none or all share.

    `place` tells endpoints apart, `headers` are the (name, value) pairs that change what a provider answers.
    """
    told = {name: value for name, value in request.items() if name not in DELIVERY_MEMBERS}
    where = [(target.provider.id, target.provider.base_url, target.model) for target in targets]
    parts = [CACHE_FORMAT, scope, place, dialect, where, headers, redaction, told]
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).digest()


@dataclass(frozen=True, slots=True)
class Entry:
    """One kept answer in one form: a plain body, or the events of a stream in three parts.

    `usage_event` stands between `body` and `tail` and goes only to clients who asked for usage. `cost_nanousd` is what
    the answer cost when it was got, so what a hit saves; None where that is unknown.
    """

    key: bytes
    scope: str
    stream: bool
    expires_ms: int
    content_type: str
    body: bytes
    usage_event: bytes = b""
    tail: bytes = b""
    provider: str = ""
    upstream_model: str = ""
    usage: Usage | None = None
    usage_estimated: bool = False
    cost_nanousd: int | None = None
    price_id: str = ""
    finish_reason: str = ""
    dropped: Sequence[str] = ()
    #: The transcript of a stream, once it was given again: all its hits share one.
    transcripts: list[KeptTranscript] = field(default_factory=list, compare=False, repr=False)

    @property
    def slot(self) -> bytes:
        """Where it is kept: a plain answer and a streamed one of the same key stand side by side."""
        return slot_of(self.key, self.stream)

    @property
    def size_bytes(self) -> int:
        return len(self.body) + len(self.usage_event) + len(self.tail) + ENTRY_OVERHEAD_BYTES

    def events(self, with_usage: bool) -> bytes:
        """A kept stream's bytes, for a client who asked for usage or did not."""
        return b"".join((self.body, self.usage_event if with_usage else b"", self.tail))

    def pack(self) -> tuple[bytes, bytes]:
        """Head and body as they are kept on disk; the inverse of `unpack_entry`."""
        head = {name: getattr(self, name) for name in PACKED_MEMBERS}
        lengths = [len(self.body), len(self.usage_event)]
        head |= {"usage": self.usage and self.usage._asdict(), "lengths": lengths, "dropped": list(self.dropped)}
        return dump_json(head), self.events(with_usage=True)


PACKED_MEMBERS: Final = (
    "stream", "content_type", "provider", "upstream_model", "usage_estimated", "cost_nanousd", "price_id", "finish_reason",
)  # fmt: skip


def slot_of(key: bytes, stream: bool) -> bytes:
    return key + (b"s" if stream else b"p")


def unpack_entry(slot: bytes, scope: str, expires_ms: int, head: bytes, body: bytes) -> Entry:
    """An entry as it was kept on disk."""
    members = orjson.loads(head)
    middle, length = members.pop("lengths")
    usage = members.pop("usage")
    parts = body[:middle], body[middle : middle + length], body[middle + length :]
    return Entry(
        slot[:-1], scope, members.pop("stream"), expires_ms, members.pop("content_type"), *parts,
        usage=Usage(**usage) if usage else None, **members,
    )  # fmt: skip


class CacheMemory:
    """Entries by slot, bounded by bytes: the least recently used go first, expired ones when they are met."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        #: Entries that were pushed out may live until then elsewhere.
        self.pushed_out_until_ms = 0
        self._entries: collections.OrderedDict[bytes, Entry] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, slot: bytes, now_ms: int) -> Entry | None:
        entry = self._entries.get(slot)
        if entry is None:
            return None
        if entry.expires_ms <= now_ms:
            self.drop(slot)
            return None
        self._entries.move_to_end(slot)
        return entry

    def put(self, entry: Entry) -> None:
        self.drop(entry.slot)
        self._entries[entry.slot] = entry
        self.size_bytes += entry.size_bytes
        while self.size_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.size_bytes -= oldest.size_bytes
            self.pushed_out_until_ms = max(self.pushed_out_until_ms, oldest.expires_ms)

    def clear(self) -> None:
        self._entries.clear()
        self.size_bytes = self.pushed_out_until_ms = 0

    def drop(self, slot: bytes) -> None:
        entry = self._entries.pop(slot, None)
        if entry is not None:
            self.size_bytes -= entry.size_bytes


class Tape:
    """What a stream said, piece by piece, up to a bound; past it nothing is kept and `whole` is false."""

    __slots__ = ("_max_bytes", "pieces", "size_bytes", "usage_at", "whole")

    def __init__(self, max_bytes: int) -> None:
        self.pieces: list[bytes] = []
        self.size_bytes = 0
        self.whole = True
        #: The index of the event that only tells usage; -1 where there is none.
        self.usage_at = -1
        self._max_bytes = max_bytes

    def add(self, piece: bytes) -> None:
        self.size_bytes += len(piece)
        if self.size_bytes > self._max_bytes:
            self.whole = False
            self.pieces.clear()
        elif piece:
            self.pieces.append(piece)

    def add_usage(self, event: bytes) -> None:
        self.usage_at = len(self.pieces)
        self.add(event)

    def parts(self) -> tuple[bytes, bytes, bytes]:
        """The bytes before the usage event, that event, and the bytes after it."""
        at = self.usage_at if 0 <= self.usage_at < len(self.pieces) else len(self.pieces)
        return b"".join(self.pieces[:at]), b"".join(self.pieces[at : at + 1]), b"".join(self.pieces[at + 1 :])


def free_of_charge(chunk: Json) -> Json:
    """A chunk whose usage says that it cost nothing, as it does when it is given again."""
    return {**chunk, "usage": {**chunk["usage"], "cost": 0}} if isinstance(chunk.get("usage"), dict) else chunk


def finishes_of(completion: Json) -> set[str]:
    """How the answers of a completion ended, in OpenAI's words."""
    reasons = [str(choice.get("finish_reason") or "") for choice in completion.get("choices") or () if choice]
    return {FINISH_REASONS.get(reason, reason) for reason in reasons}


def completion_of(events: bytes, dialect: Dialect, translation: Translation) -> Json | None:
    """A kept stream as the canonical completion it stands for; None where joining its chunks would lose something."""
    decoder = dialect.decoder(translation)
    chunks = [{**chunk, "choices": chunk.get("choices") or []} for chunk in (*decoder.feed(events), *decoder.close())]
    if not decoder.complete or not chunks or not all(map(is_joinable, chunks)):
        return None
    return join_chunks(chunks)


def is_joinable(chunk: Json) -> bool:
    return all(
        not choice.get("index")
        and all(value is None or isinstance(value, str | list) for value in (choice.get("delta") or {}).values())
        for choice in chunk["choices"]
    )


#: Members of a message that `message_deltas` tells.
TOLD_MEMBERS: Final = frozenset({
    "role", "content", "refusal", "annotations", "images", "extra_content", "reasoning_content", "reasoning", "thinking_blocks",
    "tool_calls",
})  # fmt: skip


def chunks_of(completion: Json) -> list[Json] | None:
    """A canonical completion as the chunks of a stream; None where a message holds what chunks cannot tell."""
    head = {name: value for name, value in completion.items() if name not in ("choices", "usage")}
    head["object"] = "chat.completion.chunk"
    chunks: list[Json] = []
    for choice in completion.get("choices") or ():
        message, index = choice.get("message") or {}, choice.get("index") or 0
        if any(message[name] is not None for name in message.keys() - TOLD_MEMBERS):
            return None
        deltas: list[Json] = [{"role": "assistant", "content": None if message.get("content") is None else ""}]
        deltas += [{name: value for name, value in delta.items() if value} for delta in message_deltas(message)]
        for delta in filter(None, deltas):
            logprobs = choice.get("logprobs") if delta.get("content") else None
            told = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
            chunks.append({**head, "choices": [told]})
        end = {"index": index, "delta": {}, "logprobs": None, "finish_reason": choice.get("finish_reason")}
        chunks.append({**head, "choices": [end]})
    if completion.get("usage"):
        chunks.append(free_of_charge({**head, "choices": [], "usage": completion["usage"]}))
    return chunks


class KeptTranscript(Transcript):
    """The transcript of a stream that is given again: its events are read once, when the log first needs them."""

    def __init__(self, events: bytes, dialect: Dialect, translation: Translation) -> None:
        super().__init__()
        self._unread, self._decoder = events, dialect.decoder(translation)
        self._told: Json | None = None

    def completion(self) -> Json:
        if self._told is None:
            with contextlib.suppress(GatewayError, LookupError, TypeError, AttributeError):
                for chunk in self._decoder.feed(self._unread):
                    self.add_chunk(chunk)
            self._told, self._unread = super().completion(), b""
        return {**self._told}


# ===== Recognisers ====================================================================================================
# What in a text is personal or secret, and what tries to take a model over. Pure: text in, places and scores out.
#
# - A row says what to find: cheap signs first (SPOTS in the text's shape, keywords), then a pattern that runs in linear
#   time and only around those signs, then a check of the value itself (check digits, tables, decoding, randomness).
# - A text's shape is its bytes with every letter as `a` and every digit as `0`: fixed sequences are sought in it at the
#   speed of memchr, so that plain prose costs a few microseconds whatever the number of rows.
# - Ids whose digits could be anything else count only near a word that says what they are (`context`).
# - Text is read as a person would: full-width digits, zero-width characters and escapes are undone, offsets kept.
# Names and addresses are not sought: without a model that cannot be done honestly. To add a kind, add a row; what the
# tests hold against each row are its examples and counterexamples.


class Finding(NamedTuple):
    start: int
    end: int
    entity: str
    secret: bool


@dataclass(frozen=True, slots=True)
class Recogniser:
    """One kind of thing. `keywords` (lower case): one must stand in the text, or in the spot when `spot` is given.

    A finding spans the pattern's group `value` if it has one. `context` must match within CONTEXT_CHARS before it or
    right after it. `reach`: the pattern runs only this many characters around each keyword (0: over the whole text).
    """

    entity: str
    pattern: re.Pattern[str]
    keywords: tuple[str, ...] = ()
    validator: Callable[[re.Match[str]], bool] | None = None
    secret: bool = False
    spot: str = ""
    context: re.Pattern[str] | None = None
    reach: int = 0
    examples: tuple[str, ...] = ()
    counterexamples: tuple[str, ...] = ()

    def accepts(self, match: re.Match[str]) -> bool:
        if self.context is not None:
            before = match.string[max(match.start() - CONTEXT_CHARS, 0) : match.start()]
            if not self.context.search(before) and not self.context.search(
                match.string[match.end() : match.end() + CONTEXT_AFTER_CHARS]
            ):
                return False
        return self.validator is None or self.validator(match)


CONTEXT_CHARS: Final = 48
CONTEXT_AFTER_CHARS: Final = 24
SHORTEST_CHARS: Final = 6
#: Matches in one spot that may fail their check before the search goes on behind them, not one character further.
FAILED_CHECKS_MAX: Final = 500
SHAPE: Final = bytes(
    0x30 if chr(byte) in "0123456789" else 0x61 if chr(byte).isascii() and chr(byte).isalpha() else byte
    for byte in range(256)
)
TOKEN_MARK: Final = bytes(
    32 if byte <= 32 or byte >= 127 or chr(byte) in "\"'`<>()[]{},;|\\" else 0x78 for byte in range(256)
)


class Spot(NamedTuple):
    """Where rows of one kind can begin at all: a pattern over the shape (or over marked tokens), widened both ways."""

    pattern: re.Pattern[bytes]
    before: int
    after: int
    marks: bool = False


SPOTS: Final[Mapping[str, Spot]] = {
    "digits": Spot(re.compile(rb"0(?:[ .()/\-]{0,3}+0){6,}+"), 6, 8),
    "dotted": Spot(re.compile(rb"0{1,3}+\.0{1,3}+\.0{1,3}+\.0{1,3}"), 1, 4),
    "colons": Spot(re.compile(rb":[0a]{0,4}+:"), 5, 40),
    "dashes": Spot(re.compile(rb"-[0a][0a]-"), 3, 16),
    "iban": Spot(re.compile(rb"aa00"), 1, 80),
    "tax": Spot(re.compile(rb"aaaaaa0"), 1, 18),
    "token": Spot(re.compile(rb"x{20,}+"), 0, 0, marks=True),
}
LONG_TOKEN: Final = b"x" * 20

# ----- Reading as a person would

ZERO_WIDTH: Final = "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff\u20e3"
FOREIGN: Final = re.compile(f"[{ZERO_WIDTH}\u0660-\u0669\u06f0-\u06f9\u0966-\u096f\u09e6-\u09ef\u0e50-\u0e59]")
DISGUISED: Final = re.compile(
    r"\\u[0-9A-Fa-f]{4}|\\x[0-9A-Fa-f]{2}|\\[nrt\"/\\]|%[2-7][0-9A-Fa-f]|&(?:#[0-9]{2,6}|#[xX][0-9A-Fa-f]{2,5}|[a-zA-Z]{2,8});|[^\x00-\x7f]"
)
ONE_LETTER_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t"}


class Reading(NamedTuple):
    """A text as read, and where each of its characters stood: `starts` and `ends` are None where nothing changed."""

    text: str
    starts: list[int] | None = None
    ends: list[int] | None = None


def read_through(text: str) -> Reading:
    """Undo escapes, compatibility forms and invisible characters; plain text comes back as it is."""
    if text.isascii():
        if "\\" not in text and "%" not in text and "&" not in text:
            return Reading(text)
    elif unicodedata.is_normalized("NFKC", text) and not FOREIGN.search(text) and not ("\\" in text or "%" in text):
        return Reading(text)
    pieces: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    done = 0
    for match in DISGUISED.finditer(text):
        start, end = match.span()
        plain = _undisguise(match[0])
        if plain == match[0]:
            continue
        pieces += (text[done:start], plain)
        starts.extend(range(done, start))
        ends.extend(range(done + 1, start + 1))
        starts.extend([start] * len(plain))
        ends.extend([end] * len(plain))
        done = end
    if not done:
        return Reading(text)
    starts.extend(range(done, len(text)))
    ends.extend(range(done + 1, len(text) + 1))
    return Reading("".join(pieces) + text[done:], starts, ends)


@functools.lru_cache(maxsize=4096)
def _undisguise(piece: str) -> str:
    if piece[0] == "\\":
        if len(piece) == 2:
            return ONE_LETTER_ESCAPES.get(piece[1], piece[1])
        return chr(int(piece[2:], 16))
    if piece[0] == "%":
        return chr(int(piece[1:], 16))
    if piece[0] == "&":
        return html.unescape(piece)
    if FOREIGN.match(piece):
        return str(unicodedata.decimal(piece, ""))
    return unicodedata.normalize("NFKC", piece)


# ----- Checks of values


def luhn(digits: str) -> bool:
    doubled = sum(map(int, digits[-2::-2].translate(LUHN_DOUBLED)))
    return (sum(map(int, digits[-1::-2])) + doubled) % 10 == 0


LUHN_DOUBLED: Final = str.maketrans("0123456789", "0246813579")


def digits_of(match: re.Match[str]) -> str:
    return NOT_DIGITS.sub("", match[0])


NOT_DIGITS: Final = re.compile("[^0-9]+")
#: Issuer ranges as (first, last, lengths): the identification numbers of ISO/IEC 7812 that schemes publish.
CARD_RANGES: Final = (
    ("34", "34", {15}), ("37", "37", {15}), ("300", "305", {14, 16, 19}), ("3095", "3095", {14, 16, 19}), ("36", "36", {14, 16, 19}),
    ("38", "39", {14, 16, 19}), ("3528", "3589", {16, 17, 18, 19}), ("4", "4", {13, 16, 19}), ("51", "55", {16}),
    ("2221", "2720", {16}), ("50", "50", set(range(12, 20))), ("56", "58", set(range(12, 20))), ("6", "6", set(range(12, 20))),
    ("2200", "2205", {16, 17, 18, 19}), ("9792", "9792", {16}), ("1", "1", {15}),
)  # fmt: skip


def is_card(match: re.Match[str]) -> bool:
    digits = digits_of(match)
    size = len(digits)
    return (
        any(low <= digits[: len(low)] <= high and size in sizes for low, high, sizes in CARD_RANGES)
        and len(set(digits)) > 1
        and luhn(digits)
    )


IBAN_CHARS: Final[Mapping[str, int]] = {
    country: int(size)
    for size, countries in (
        line.split(":")
        for line in (
            "15:NO 16:BE 18:DK,FO,FI,GL,NL,FK,SD 19:MK,SI 20:AT,BA,EE,KZ,LT,LU,MN,XK 21:CH,HR,LI,LV 22:BG,BH,CR,DE,GB,GE,IE,ME,RS,VA "
            "23:AE,GI,IL,IQ,OM,SO,TL 24:AD,CZ,ES,MD,PK,RO,SA,SE,SK,TN,VG 25:LY,PT,ST 26:IS,TR 27:FR,GR,IT,MC,MR,SM,BI,DJ "
            "28:AL,AZ,CY,DO,GT,HU,LB,PL,SV,BY,NI,HN 29:BR,PS,QA,UA,EG 30:JO,KW,MU,YE 31:MT,SC 32:LC 33:RU"
        ).split()
    )
    for country in countries.split(",")
}


IBAN: Final = r"(?i)(?<![A-Z0-9])(?:{})(?![A-Z0-9])".format(
    "|".join(rf"{country}\d\d(?:[ -]?[A-Z0-9]){{{size - 4}}}" for country, size in IBAN_CHARS.items())
)


def is_iban(match: re.Match[str]) -> bool:
    text = match[0].replace(" ", "").replace("-", "").upper()
    return int("".join(str(int(letter, 36)) for letter in text[4:] + text[:4])) % 97 == 1


def is_ssn(match: re.Match[str]) -> bool:
    """Rules of the US Social Security Administration; the two numbers that adverts made famous are nobody's."""
    digits = digits_of(match)
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return not (area in ("000", "666") or area[0] == "9" or group == "00" or serial == "0000") and digits not in (
        "078051120",
        "219099999",
    )


def is_ip(match: re.Match[str]) -> bool:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or match[0].startswith("255.255."))


def looks_random(text: str) -> bool:
    """Whether a key's tail could have been drawn, not typed: enough different characters, no `xxxx`, no `abcdef`."""
    return len(set(text)) >= min(8, len(text) // 2)


def _row_of(entity: str, pattern: str, **fields: Any) -> Recogniser:
    context = fields.pop("context", None)
    if context:
        fields["context"] = re.compile(rf"(?<![a-z])(?:{context})(?![a-z])", re.ASCII | re.IGNORECASE)
    return Recogniser(entity, re.compile(pattern, re.ASCII), **fields)


LEFT: Final = r"(?<![\w-])(?<!\d[.,])"
RIGHT: Final = r"(?!\w|-\w|[.,]\d)"
EMAIL: Final = r"(?<![\w.%+'-])[\w](?:[\w.+%'-]{0,62}[\w+-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w-])"
PERSONAL: Final[tuple[Recogniser, ...]] = (
    _row_of("email", EMAIL, keywords=("@",), reach=255),
    _row_of("iban", IBAN, validator=is_iban, spot="iban"),
    _row_of("card", LEFT + r"\d(?:[ -]?\d){11,18}" + RIGHT, validator=is_card, spot="digits"),
    _row_of("ssn", LEFT + r"\d{3}([- ])\d{2}\1\d{4}" + RIGHT, validator=is_ssn, spot="digits"),
    _row_of("ip", r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w)", validator=is_ip, spot="dotted"),
)  # fmt: skip
SECRETS: Final[tuple[Recogniser, ...]] = (
    _row_of("openai_key", r"\bsk-(?:proj-|svcacct-|admin-)?[\w-]{20,200}", keywords=("sk-",), secret=True, spot="token"),
    _row_of("aws_access_key", r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b", keywords=("akia", "asia"), secret=True, spot="token"),
)  # fmt: skip
RECOGNISERS: Final[tuple[Recogniser, ...]] = PERSONAL + SECRETS
PHONE_REGIONS: Final = ("US", "GB", "DE", "FR")

# ----- The scanner


class Scanner:
    """Finds what its rows describe. Built once from settings and stateless afterwards."""

    def __init__(
        self, recognisers: Sequence[Recogniser] = RECOGNISERS, phone_regions: Sequence[str] = PHONE_REGIONS
    ) -> None:
        self._rank = {row: rank for rank, row in reversed(list(enumerate(recognisers)))}
        self._texts = [row for row in recognisers if not row.spot]
        self._spots = [
            (SPOTS[name], _Spotted([row for row in recognisers if row.spot == name]))
            for name in SPOTS
            if any(row.spot == name for row in recognisers)
        ]

    def find(self, text: str) -> list[Finding]:
        """All findings, disjoint and in order; of two that overlap the longer stays, then the earlier row's."""
        if len(text) < SHORTEST_CHARS:
            return []
        reading = read_through(text)
        found = [
            (start - end, self._rank[row], start, end, row)
            for row, low, high in self._places(reading.text)
            for start, end in _spans(row, reading.text, low, high)
        ]
        if not found:
            return []
        taken, kept = bytearray(len(reading.text)), []
        for _, _, start, end, row in sorted(found, key=lambda one: one[:4]):
            if taken.find(1, start, end) < 0:
                taken[start:end] = b"\1" * (end - start)
                kept.append((start, end, row))
        kept.sort(key=lambda one: one[0])
        starts, ends = reading.starts, reading.ends
        if starts is None or ends is None:
            return [Finding(start, end, row.entity, row.secret) for start, end, row in kept]
        return [Finding(starts[start], ends[end - 1], row.entity, row.secret) for start, end, row in kept]

    def _places(self, text: str) -> Iterator[tuple[Recogniser, int, int]]:
        lowered = text.lower()
        for row in self._texts:
            if not row.keywords:
                yield row, 0, len(text)
            elif row.reach:
                for low, high in _windows(lowered, row.keywords, row.reach):
                    yield row, low, high
            elif any(keyword in lowered for keyword in row.keywords):
                yield row, 0, len(text)
        shape = text.encode("ascii", "replace")
        marks = shape.translate(TOKEN_MARK)
        shape = shape.translate(SHAPE)
        for spot, spotted in self._spots:
            if spot.marks and LONG_TOKEN not in marks:
                continue
            last = 0
            for match in spot.pattern.finditer(marks if spot.marks else shape):
                low, high = max(match.start() - spot.before, last), min(match.end() + spot.after, len(text))
                for row in spotted.rows(text, low, high):
                    yield row, low, high
                last = match.end()


class _Spotted:
    """The rows of one spot: those that always run, and those that a keyword inside the spot calls."""

    def __init__(self, rows: Sequence[Recogniser]) -> None:
        self._always = tuple(row for row in rows if not row.keywords)
        keywords = sorted({word for row in rows for word in row.keywords}, key=len, reverse=True)
        self._by_keyword = {
            word: [row for row in rows if any(word.startswith(own) for own in row.keywords)] for word in keywords
        }
        self._keywords = re.compile("(?=(" + "|".join(map(re.escape, keywords)) + "))") if keywords else None

    def rows(self, text: str, low: int, high: int) -> Iterable[Recogniser]:
        if self._keywords is None:
            return self._always
        words = set(self._keywords.findall(text[low:high].lower()))
        if not words:
            return self._always
        return dict.fromkeys([*self._always, *(row for word in words for row in self._by_keyword[word])])


def _windows(lowered: str, keywords: tuple[str, ...], reach: int) -> Iterator[tuple[int, int]]:
    for keyword in keywords:
        at = lowered.find(keyword)
        while at >= 0:
            low, high = max(at - reach, 0), at + reach
            while 0 <= (at := lowered.find(keyword, at + 1)) < high:
                high = at + reach
            yield low, min(high, len(lowered))


def _spans(row: Recogniser, text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    group = row.pattern.groupindex.get("value", 0)
    failed = 0
    while match := row.pattern.search(text, low, high):
        if row.accepts(match):
            yield match.span(group)
            low = match.end()
        else:
            failed += 1
            low = match.start() + 1 if failed < FAILED_CHECKS_MAX else match.end()


# ----- Own rows


def recogniser_from_table(name: str, table: Mapping[str, Any]) -> Recogniser:
    """A row of stockyard.toml: `[recognisers.NAME]` with pattern, keywords, examples, counterexamples, secret.

    SettingsError for a pattern that could take more than linear time and for an example that does not hold.
    """
    where = f"[recognisers.{name}]"
    unknown = sorted(table.keys() - {"pattern", "keywords", "examples", "counterexamples", "secret"})
    if unknown:
        raise SettingsError(f"{where}: {unknown[0]!r} is not known; use pattern, keywords, examples, counterexamples")
    pattern, secret = table.get("pattern"), table.get("secret", False)
    if not isinstance(pattern, str) or not pattern:
        raise SettingsError(f"{where}: pattern must be a regular expression")
    lists = {key: table.get(key, []) for key in ("keywords", "examples", "counterexamples")}
    for key, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise SettingsError(f"{where}: {key} must be a list of texts")
    try:
        choices = pattern_choices(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise SettingsError(f"{where}: pattern: {error}") from None
    if choices > CHOICES_MAX:
        raise SettingsError(
            f"{where}: pattern could take more than linear time; give every repeat an upper bound (\\d{{1,20}} in place "
            "of \\d+) and put no repeat inside another"
        )
    compiled = re.compile(pattern)
    if compiled.search(""):
        raise SettingsError(f"{where}: pattern matches the empty text")
    keywords, examples, counterexamples = (tuple(lists[key]) for key in lists)
    row = Recogniser(
        name,
        compiled,
        tuple(map(str.lower, keywords)),
        None,
        bool(secret),
        examples=examples,
        counterexamples=counterexamples,
    )
    alone = Scanner((row,))
    for example in examples:
        if not alone.find(example):
            raise SettingsError(f"{where}: nothing is found in the example {example!r}")
    for example in counterexamples:
        if alone.find(example):
            raise SettingsError(f"{where}: something is found in the counterexample {example!r}")
    return row


CHOICES_MAX: Final = 10_000


def pattern_choices(pattern: str) -> float:
    """How many ways a pattern has to match from one place, at most; infinite for unbounded or backward-looking parts."""
    return _ways(importlib.import_module("re._parser").parse(pattern))


def _ways(part: Any) -> float:
    ways = 1.0
    for code, argument in part:
        match str(code):
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                low, high, inner = argument
                if int(high) >= CHOICES_MAX:
                    return math.inf
                each = _ways(inner)
                ways *= (high - low + 1) * (each ** float(high) if each > 1 else 1)
            case "BRANCH":
                ways *= sum(_ways(branch) for branch in argument[1])
            case "SUBPATTERN":
                ways *= _ways(argument[3])
            case "ASSERT" | "ASSERT_NOT":
                ways *= _ways(argument[1])
            case "ATOMIC_GROUP":
                ways *= _ways(argument)
            case "GROUPREF" | "GROUPREF_EXISTS":
                return math.inf
        if ways > CHOICES_MAX:
            return math.inf
    return ways


# ----- Injection


class InjectionRule(NamedTuple):
    """`weight` is how sure the rule alone is; a text's score is the chance that at least one rule is right."""

    name: str
    weight: float
    keywords: tuple[str, ...]
    pattern: re.Pattern[str]


def _rule(name: str, weight: float, keywords: str, pattern: str) -> InjectionRule:
    return InjectionRule(name, weight, tuple(keywords.split()), re.compile(pattern))


INJECTION_THRESHOLD: Final = 0.7
INJECTION_RULES: Final[tuple[InjectionRule, ...]] = (
    _rule("ignore_instructions", 0.8, "ignore disregard forget",
          r"\b(?:ignore|disregard|forget)\b.{0,40}\b(?:previous|prior|above|all)\b.{0,30}\b(?:instructions?|prompts?|rules)\b"),
    _rule("reveal_prompt", 0.7, "prompt instructions",
          r"\b(?:reveal|print|show|repeat|output)\b.{0,30}\b(?:system|initial|hidden) (?:prompt|instructions)\b"),
)  # fmt: skip


def injection_score(text: str) -> tuple[float, list[str]]:
    """How likely a text tries to take the model over, from 0 to 1, and the names of the rules that say so."""
    lowered = read_through(text).text.lower()
    names, innocence = [], 1.0
    for rule in INJECTION_RULES:
        if any(word in lowered for word in rule.keywords) and rule.pattern.search(lowered):
            names.append(rule.name)
            innocence *= 1 - rule.weight
    return round(1 - innocence, 4), names


# ===== Ledger =========================================================================================================
# Who may call, how often, and for how much. Everything here is a pure state machine: time comes in as an argument and
# every change of money comes out as a record, which the store must have written before the request it allows leaves.
#
#   held(w) ──settle(cost)──> settled      the cost is known; unknown usage is charged at the whole hold
#      └─────release──────> released       the attempt surely cost nothing: never sent, or refused unbilled
#
# - For every hard budget and window `settled + held + w <= limit` before w is held. All matching budgets or none are
#   taken, in one call without an await, so no number of concurrent calls can pass on the same remainder.
# - Each attempt (first, retry, fallback, hedge) holds anew. A hold ends exactly once; a second end is only counted.
# - A hold belongs to the window it was made in, and windows never go back: a clock that jumps reopens nothing.
# - `Books` replays the records to the same balances; `Ledger.restore` settles what a dead process left open.
# Balances are integers of nano-dollars. Rates are counted apart, in memory and on the monotonic clock: losing them in a
# crash costs a minute of precision, not money. To scope a budget by something new, add a row to SCOPES and to `_match`.

DAY_MS: Final = 86_400_000
NEVER_MS: Final = 1 << 62
EPOCH: Final = datetime.date(1970, 1, 1)
PERIODS: Final = ("day", "week", "month", "total")
SCOPES: Final = ("global", "key", "tag", "model", "provider")
ROLES: Final = ("client", "viewer", "admin")
MODES: Final = ("hard", "soft")
ALARM_PERCENTS: Final = (50, 80, 100)
MAX_BUDGET_NANOUSD: Final = 1_000_000_000 * NANOUSD_PER_USD
MAX_RATE: Final = 10**12
HELD_RETRY_S: Final = 1.0
PERIOD_WORDS: Final = {"day": "a day", "week": "a week", "month": "a month", "total": "in all"}


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether `name` fits `pattern`, in which `*` stands for any text. Linear in the name: names come from clients."""
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == name
    last = rest.pop()
    if not name.startswith(first) or not name.endswith(last) or len(name) < len(first) + len(last):
        return False
    at, end = len(first), len(name) - len(last)
    for piece in rest:
        found = name.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def format_moment(at_ms: int) -> str:
    """Milliseconds since the epoch as ISO 8601 in UTC, to the second."""
    return (datetime.datetime(1970, 1, 1) + datetime.timedelta(milliseconds=at_ms)).strftime("%Y-%m-%dT%H:%M:%SZ")


# ----- Budgets and limits ---------------------------------------------------------------------------------------------
# The values, and how people write them: `20/day`, `600rpm,64parallel`, and the JSON of the admin endpoints.


@dataclass(frozen=True, slots=True)
class Budget:
    """Money over a window of UTC time. `soft` only warns; `clamp` allows to shorten an answer so that it fits.

    `value` is the key id, `name=value` of a tag, a model pattern or a provider id; empty for the global scope.
    """

    id: str
    limit_nanousd: int
    period: str
    scope: str = "global"
    value: str = ""
    mode: str = "hard"
    clamp: bool = False


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Requests and tokens in any 60 seconds, and calls in flight at once; None where there is no such limit."""

    rpm: int | None = None
    tpm: int | None = None
    parallel: int | None = None


class Window(NamedTuple):
    key: str
    end_ms: int


def window_at(period: str, now_ms: int) -> Window:
    """The window of `period` at `now_ms`: `2026-11-22`, `2026-W47` (ISO, from Monday), `2026-11` or `total`."""
    if period == "total":
        return Window("total", NEVER_MS)
    today = EPOCH + datetime.timedelta(days=now_ms // DAY_MS)
    if period == "day":
        key, end = today.isoformat(), today + datetime.timedelta(days=1)
    elif period == "week":
        year, week, weekday = today.isocalendar()
        key, end = f"{year}-W{week:02d}", today + datetime.timedelta(days=8 - weekday)
    else:
        key, end = today.isoformat()[:7], (today.replace(day=1) + datetime.timedelta(days=32)).replace(day=1)
    return Window(key, (end - EPOCH).days * DAY_MS)


def window_start_ms(key: str) -> int:
    """When the window of that key began; 0 for `total`. The latest one known is the high-water mark of the clock."""
    if key == "total":
        return 0
    if "W" in key:
        start = datetime.date.fromisocalendar(int(key[:4]), int(key[6:]), 1)
    else:
        start = datetime.date.fromisoformat(key if len(key) == 10 else key + "-01")
    return (start - EPOCH).days * DAY_MS


def _invalid(param: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"`{param}` must be {what}", param=param)


def _read_object(value: Any, param: str, allowed: Iterable[str]) -> Json:
    allowed = tuple(allowed)
    if not isinstance(value, dict):
        raise _invalid(param, f"an object with some of {', '.join(allowed)}")
    for name in value:
        if name not in allowed:
            raise InvalidRequest(f"`{param}` has no member `{name}`; it may hold {', '.join(allowed)}", param=param)
    return value


def _read_choice(value: Any, param: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise _invalid(param, f"one of {', '.join(choices)}")
    return value


def _read_text(value: Any, param: str, most: int = 200) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > most or not value.isprintable():
        raise _invalid(param, f"printable text of 1 to {most} characters")
    return value


def _read_usd(value: Any, param: str) -> int:
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            nanousd = parse_usd(value)
            if nanousd <= MAX_BUDGET_NANOUSD:
                return nanousd
    except ValueError:
        pass
    raise _invalid(param, "an amount in dollars from 0 to a billion, such as 20 or 0.005")


BUDGET_MEMBERS: Final = ("usd", "period", "mode", "clamp")


def read_budget(value: Any, param: str, scope: str, scope_value: str) -> Budget:
    """The JSON of one budget, `{"usd": 5, "period": "month"}` with optional `mode` and `clamp`; InvalidRequest if bad.

    The id is made of scope, value and period, so that a budget keeps its balance when it is written again.
    """
    members = _read_object(value, param, BUDGET_MEMBERS)
    period = _read_choice(members.get("period"), f"{param}.period", PERIODS)
    clamp = members.get("clamp", False)
    if not isinstance(clamp, bool):
        raise _invalid(f"{param}.clamp", "true or false")
    return Budget(
        id=f"{scope}:{scope_value}:{period}" if scope_value else f"{scope}:{period}",
        limit_nanousd=_read_usd(members.get("usd"), f"{param}.usd"),
        period=period,
        scope=scope,
        value=scope_value,
        mode=_read_choice(members.get("mode", "hard"), f"{param}.mode", MODES),
        clamp=clamp,
    )


def read_budgets(value: Any, param: str = "budgets") -> list[Budget]:
    """The list that PUT /api/budgets takes: each a budget's JSON with `scope` and (but for `global`) `value`."""
    if not isinstance(value, list):
        raise _invalid(param, "an array of budgets")
    found: dict[str, Budget] = {}
    for at, row in enumerate(value):
        where = f"{param}[{at}]"
        row = _read_object(row, where, (*BUDGET_MEMBERS, "scope", "value"))
        scope = _read_choice(row.get("scope", "global"), f"{where}.scope", SCOPES)
        scope_value = "" if scope == "global" else _read_text(row.get("value"), f"{where}.value")
        if scope == "tag" and "=" not in scope_value:
            raise _invalid(f"{where}.value", "a tag written as name=value")
        budget = read_budget({k: v for k, v in row.items() if k in BUDGET_MEMBERS}, where, scope, scope_value)
        if budget.id in found:
            raise InvalidRequest(f"`{where}` repeats the budget {budget.id}", param=where)
        found[budget.id] = budget
    return list(found.values())


def read_rate_limit(value: Any, param: str) -> RateLimit:
    """The JSON of a rate limit: whole numbers `rpm`, `tpm`, `parallel`, at least one of them."""
    members = _read_object(value, param, ("rpm", "tpm", "parallel"))
    for name, number in members.items():
        if number is not None and (type(number) is not int or not 0 < number <= MAX_RATE):
            raise _invalid(f"{param}.{name}", "a whole number from 1")
    if not any(members.values()):
        raise _invalid(param, "an object with at least one of rpm, tpm, parallel")
    return RateLimit(**members)


def parse_budget(text: str) -> Budget:
    """The setting `20/day`: a hard budget over everything. ValueError with a sentence for anything else."""
    usd, _, period = text.strip().partition("/")
    if period.strip() not in PERIODS:
        raise ValueError(f"{text!r} is no budget; write dollars and a period, such as 20/day, 100/month or 500/total")
    limit_nanousd = parse_usd(usd)
    if limit_nanousd > MAX_BUDGET_NANOUSD:
        raise ValueError(f"{text!r} is over a billion dollars")
    return Budget(f"global:{period.strip()}", limit_nanousd, period.strip())


def parse_rate_limit(text: str) -> RateLimit:
    """The setting `600rpm,1000000tpm,64parallel`, in any order. ValueError with a sentence for anything else."""
    found: dict[str, int] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,12})\s*(rpm|tpm|parallel)\s*", item)
        if match is None or match[2] in found or int(match[1]) == 0:
            raise ValueError(f"{item.strip()!r} is no rate limit; write such as 600rpm,1000000tpm,64parallel")
        found[match[2]] = int(match[1])
    return RateLimit(**found)


# ----- Virtual keys ---------------------------------------------------------------------------------------------------
# A key's secret is shown once and kept only as an HMAC under the server's pepper, so a stolen database opens nothing.

KEY_PREFIX: Final = "sy-"
SECRET_BYTES: Final = 20
NOBODY_DIGEST: Final = "0" * 64
MAX_TAGS: Final = 32
MAX_REMEMBERED_DIGESTS: Final = 4096
TAG_NAME: Final = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")


@dataclass(frozen=True, slots=True)
class VirtualKey:
    """A key a client, viewer or admin presents. Times are milliseconds since the epoch; secrets stay out of `repr`."""

    id: str
    name: str
    digest: str = field(repr=False)
    created_at_ms: int
    role: str = "client"
    tags: Mapping[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    budget: Budget | None = None
    rate_limit: RateLimit | None = None
    provider_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    expires_at_ms: int | None = None
    revoked_at_ms: int | None = None
    previous_digest: str = field(default="", repr=False)
    previous_until_ms: int = 0

    def status(self, now_ms: int) -> str:
        if self.revoked_at_ms is not None:
            return "revoked"
        return "expired" if self.expires_at_ms is not None and now_ms >= self.expires_at_ms else "active"

    def check(self, provider: str, *models: str) -> None:
        """Forbidden unless the allow-lists take `provider` and one of the names the model goes by."""
        if self.models and not any(matches_pattern(pattern, name) for pattern in self.models for name in models):
            raise Forbidden(f"the key {self.name!r} may not use the model {models[0]!r}", code="model_not_allowed")
        if self.providers and not any(matches_pattern(pattern, provider) for pattern in self.providers):
            raise Forbidden(f"the key {self.name!r} may not use the provider {provider!r}", code="provider_not_allowed")

    def tagged(self, tags: Mapping[str, str]) -> Mapping[str, str]:
        """A call's tags; the key's own win, so that a client cannot tag itself out of a budget."""
        return {**tags, **self.tags} if tags else self.tags

    def rotated(self, digest: str, now_ms: int, grace_ms: int) -> VirtualKey:
        """This key with a new secret; the old one works for another `grace_ms`."""
        return dataclasses.replace(
            self, digest=digest, previous_digest=self.digest, previous_until_ms=now_ms + grace_ms
        )

    def as_json(self, now_ms: int) -> Json:
        """What admin endpoints show: no secret, no digest; of the key's own provider keys only whose they are."""
        return {
            "id": self.id,
            "name": self.name,
            "role": self.role,
            "status": self.status(now_ms),
            "tags": dict(self.tags),
            "models": list(self.models),
            "providers": list(self.providers),
            "provider_keys": sorted(self.provider_keys),
            "budget": _show_budget(self.budget) if self.budget else None,
            "rate_limit": dataclasses.asdict(self.rate_limit) if self.rate_limit else None,
            "created_at": format_moment(self.created_at_ms),
            "expires_at": None if self.expires_at_ms is None else format_moment(self.expires_at_ms),
            "revoked_at": None if self.revoked_at_ms is None else format_moment(self.revoked_at_ms),
        }

    def as_record(self) -> Json:
        """Everything, for the store alone: holds digests, and provider keys in the clear, which it must encrypt."""
        return {**dataclasses.asdict(self), "tags": dict(self.tags), "provider_keys": dict(self.provider_keys)}

    @classmethod
    def from_record(cls, record: Json) -> VirtualKey:
        """The inverse of `as_record`, also after a round trip through JSON."""
        budget, limit = record["budget"], record["rate_limit"]
        members = {
            **record,
            "models": tuple(record["models"]),
            "providers": tuple(record["providers"]),
            "budget": Budget(**budget) if budget else None,
            "rate_limit": RateLimit(**limit) if limit else None,
        }
        return cls(**members)


def _show_budget(budget: Budget) -> Json:
    usd = format_usd(budget.limit_nanousd)
    shown = float(usd) if "." in usd else int(usd)
    return {"usd": shown, "period": budget.period, "mode": budget.mode, "clamp": budget.clamp}


def _read_names(value: Any, param: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _invalid(param, "an array of names, in which `*` stands for any text")
    return tuple(_read_text(name, f"{param}[{at}]") for at, name in enumerate(value))


def read_tags(value: Any, param: str) -> dict[str, str]:
    """Tags as an object of texts; InvalidRequest naming the first bad one."""
    if not isinstance(value, dict) or len(value) > MAX_TAGS:
        raise _invalid(param, f"an object of at most {MAX_TAGS} texts")
    for name, text in value.items():
        if not TAG_NAME.fullmatch(name):
            raise InvalidRequest(f"`{param}`: {name[:70]!r} is no tag name (letters, digits, `_.:/-`)", param=param)
        if "," in _read_text(text, f"{param}.{name}"):
            raise _invalid(f"{param}.{name}", "text without commas")
    return value


def _read_moment(value: Any, param: str) -> int:
    try:
        if isinstance(value, str):
            moment = datetime.datetime.fromisoformat(value)
            value = int((moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp())
        if type(value) is int and 0 < value < 1 << 34:
            return value * 1000
    except (ValueError, OverflowError):
        pass
    raise _invalid(param, "a time such as 2026-12-31T00:00:00Z, or seconds since the epoch")


def _read_provider_keys(value: Any, param: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _invalid(param, "an object of provider ids and their keys")
    return {name: _read_text(secret, f"{param}.{name}", most=4096) for name, secret in value.items()}


# Members of the create and patch bodies: the field each becomes, how it is read, and what null resets it to.
KEY_MEMBERS: Final[dict[str, tuple[str, Callable[[Any, str], Any], Any]]] = {
    "name": ("name", _read_text, ""),
    "role": ("role", functools.partial(_read_choice, choices=ROLES), "client"),
    "models": ("models", _read_names, ()),
    "providers": ("providers", _read_names, ()),
    "budget": ("budget", functools.partial(read_budget, scope="key", scope_value=""), None),
    "rate_limit": ("rate_limit", read_rate_limit, None),
    "tags": ("tags", read_tags, {}),
    "expires_at": ("expires_at_ms", _read_moment, None),
    "provider_keys": ("provider_keys", _read_provider_keys, {}),
}


def _read_key_members(body: Any, key_id: str) -> Json:
    fields: Json = {}
    for name, value in _read_object(body, "body", KEY_MEMBERS).items():
        target, read, empty = KEY_MEMBERS[name]
        fields[target] = empty if value is None else read(value, name)
    budget = fields.get("budget")
    if budget:
        fields["budget"] = dataclasses.replace(budget, id=f"key:{key_id}:{budget.period}", value=key_id)
    return fields


def create_key(body: Any, key_id: str, digest: str, now_ms: int) -> VirtualKey:
    """A key from the body of POST /api/keys. InvalidRequest names the field that is wrong."""
    fields = _read_key_members(body, key_id)
    return VirtualKey(**{"name": key_id, **fields}, id=key_id, digest=digest, created_at_ms=now_ms)


def patch_key(key: VirtualKey, body: Any) -> VirtualKey:
    """The key with the members of a PATCH body changed; null clears one. InvalidRequest as for `create_key`."""
    fields = _read_key_members(body, key.id)
    return dataclasses.replace(key, **{**fields, "name": fields.get("name") or key.name})


def mint_secret(random_bytes: bytes) -> str:
    """A new secret, `sy-` and 32 base-32 digits, from exactly 20 random bytes (160 bits)."""
    if len(random_bytes) != SECRET_BYTES:
        raise ValueError(f"a secret is made of {SECRET_BYTES} random bytes")
    return KEY_PREFIX + encode_base32(int.from_bytes(random_bytes, "big"), 32)


def digest_secret(secret: str, pepper: bytes) -> str:
    """HMAC-SHA256 in hex. Header text may hold stray surrogates, which must not raise."""
    return hmac.digest(pepper, secret.encode("utf-8", "surrogatepass"), "sha256").hex()


class KeyRing:
    """All virtual keys, found by the secret presented."""

    def __init__(self, pepper: bytes, keys: Iterable[VirtualKey] = ()) -> None:
        self.pepper = pepper
        self._nobody = VirtualKey("", "", NOBODY_DIGEST, 0, revoked_at_ms=0)
        self.by_id: dict[str, VirtualKey] = {}
        self._by_digest: dict[str, VirtualKey] = {}
        self._digests: dict[bytes, str] = {}
        for key in keys:
            self.put(key)

    def __len__(self) -> int:
        return len(self.by_id)

    def put(self, key: VirtualKey) -> None:
        """Add a key, or replace the one of the same id."""
        self.drop(key.id)
        self.by_id[key.id] = self._by_digest[key.digest] = key
        if key.previous_digest:
            self._by_digest[key.previous_digest] = key

    def drop(self, key_id: str) -> None:
        key = self.by_id.pop(key_id, None)
        if key is not None:
            self._by_digest.pop(key.digest, None)
            self._by_digest.pop(key.previous_digest, None)

    def authenticate(self, secret: str, now_ms: int) -> VirtualKey:
        """The key of this secret. Unknown, expired and revoked ones do the same work and raise the same error.

        The dict is asked for an HMAC that an attacker cannot aim at, so its timing tells nothing of stored digests.
        """
        name = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        digest = self._digests.get(name) or digest_secret(secret, self.pepper)
        key = self._by_digest.get(digest, self._nobody)
        current = hmac.compare_digest(digest, key.digest)
        previous = hmac.compare_digest(digest, key.previous_digest or NOBODY_DIGEST) and now_ms < key.previous_until_ms
        if (current or previous) and key.status(now_ms) == "active":
            self._remember(name, digest)
            return key
        raise Unauthenticated("this API key is not valid here; ask the operator of this Stockyard for another")

    def _remember(self, name: bytes, digest: str) -> None:
        """Spare a known secret its HMAC the next time. It is checked against the keys as they are then all the same."""
        if name not in self._digests:
            if len(self._digests) >= MAX_REMEMBERED_DIGESTS:
                self._digests.clear()
            self._digests[name] = digest


# ----- Sign-in --------------------------------------------------------------------------------------------------------
# Sessions of people at the dashboard, in memory as digests: a restart signs everybody out. The cookie alone reads; a
# change needs the session's header token as well, which a page of another origin cannot learn.

SESSION_COOKIE: Final = "stockyard_session"
SESSION_MS: Final = 12 * 3_600_000
LINK_MS: Final = 15 * 60_000
MAX_SESSIONS: Final = 100
SESSION_IN_COOKIE: Final = re.compile(rf"(?:^|; ?){SESSION_COOKIE}=([0-9a-z]{{32}})(?:;|$)")


@dataclass(frozen=True, slots=True)
class Session:
    """Who signed in: the role, the virtual key (empty: the admin key or a link), the header token, the end."""

    role: str
    key_id: str
    csrf: str
    expires_ms: int

    def takes_header(self, headers: Mapping[str, str]) -> bool:
        given = headers.get("x-stockyard-csrf", "").encode("utf-8", "surrogatepass")
        return hmac.compare_digest(given, self.csrf.encode())


class Sessions:
    """All sessions, found by their cookie, and the links that open one, once. The newest MAX_SESSIONS are kept."""

    def __init__(self, random_bytes: Callable[[int], bytes]) -> None:
        self._random_bytes = random_bytes
        self._open: dict[bytes, Session] = {}
        self._links: dict[bytes, int] = {}

    def _mint(self) -> str:
        return encode_base32(int.from_bytes(self._random_bytes(SECRET_BYTES), "big"), 32)

    @staticmethod
    def _digest(secret: str) -> bytes:
        return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()

    def offer(self, now_ms: int) -> str:
        """A token that signs in as admin, once, within LINK_MS."""
        token = self._mint()
        self._links[self._digest(token)] = now_ms + LINK_MS
        return token

    def redeem(self, token: str, now_ms: int) -> bool:
        return self._links.pop(self._digest(token), 0) > now_ms

    def begin(self, role: str, key_id: str, now_ms: int) -> tuple[str, Session]:
        """A new session and the secret of its cookie."""
        secret, session = self._mint(), Session(role, key_id, self._mint(), now_ms + SESSION_MS)
        if len(self._open) >= MAX_SESSIONS:
            del self._open[next(iter(self._open))]
        self._open[self._digest(secret)] = session
        return secret, session

    def find(self, cookie: str, now_ms: int) -> Session | None:
        """The session that a Cookie header names, while it lives."""
        found = SESSION_IN_COOKIE.search(cookie)
        session = self._open.get(self._digest(found[1])) if found else None
        return session if session is not None and session.expires_ms > now_ms else None

    def end(self, session: Session) -> None:
        self._open = {digest: kept for digest, kept in self._open.items() if kept is not session}


# ----- Holds and settlement -------------------------------------------------------------------------------------------
# Records are {"op": "hold"|"settle"|"release", "id", "budgets": [(budget id, window)], "nanousd", "held", "at"}:
# `nanousd` is what the operation means (amount held, cost, 0), `held` the hold that it opens or closes.


@dataclass(frozen=True, slots=True)
class ThresholdCrossed:
    """Spend reached `percent` of a budget; told once in a window."""

    budget_id: str
    window: str
    percent: int
    settled_nanousd: int
    limit_nanousd: int


class Balance:
    """What one budget has settled and held in one window. `alarm_nanousd` is the next threshold, to compare cheaply."""

    __slots__ = ("alarm_nanousd", "budget", "end_ms", "held_nanousd", "percent", "settled_nanousd", "window")

    def __init__(self, budget: Budget, window: Window, settled_nanousd: int = 0) -> None:
        self.window, self.end_ms = window
        self.settled_nanousd, self.held_nanousd, self.percent = settled_nanousd, 0, 0
        self.adopt(budget)
        self.crossed()

    def adopt(self, budget: Budget) -> None:
        """Take on a changed limit. Thresholds already told stay told."""
        self.budget = budget
        ahead = [percent for percent in ALARM_PERCENTS if percent > self.percent]
        self.alarm_nanousd = max(1, -(-budget.limit_nanousd * ahead[0] // 100)) if ahead else NEVER_MS

    def crossed(self) -> list[ThresholdCrossed]:
        """The thresholds that the settled amount has newly reached."""
        events = []
        while self.settled_nanousd >= self.alarm_nanousd:
            budget = self.budget
            self.percent = next(percent for percent in ALARM_PERCENTS if percent > self.percent)
            events.append(
                ThresholdCrossed(budget.id, self.window, self.percent, self.settled_nanousd, budget.limit_nanousd)
            )
            self.adopt(budget)
        return events


class Hold:
    """Money set aside for one attempt; `balances` are those of the windows it was made in. Ended by the ledger only."""

    __slots__ = ("at_ms", "balances", "bounded", "id", "nanousd", "open")

    def __init__(self, hold_id: str, nanousd: int | None, balances: tuple[Balance, ...], at_ms: int) -> None:
        self.id, self.balances, self.at_ms = hold_id, balances, at_ms
        self.nanousd, self.bounded = nanousd or 0, nanousd is not None
        self.open = True

    @property
    def record(self) -> Json | None:
        """What must be durable before the request leaves; None where no budget is concerned."""
        return self.record_of("hold", self.nanousd, self.at_ms)

    def record_of(self, op: str, nanousd: int, at_ms: int) -> Json | None:
        if not self.balances:
            return None
        budgets = [(balance.budget.id, balance.window) for balance in self.balances]
        return {"op": op, "id": self.id, "budgets": budgets, "nanousd": nanousd, "held": self.nanousd, "at": at_ms}


class Settlement(NamedTuple):
    """The end of a hold: what to write (None: nothing), what to tell. `cost_nanousd` is 0 for a repeated end."""

    cost_nanousd: int
    record: Json | None
    events: list[ThresholdCrossed]


class Account:
    """A budget and its balance in the current window."""

    __slots__ = ("balance", "budget", "is_hard", "limit_nanousd")

    def __init__(self, budget: Budget, balance: Balance) -> None:
        self.budget, self.balance = budget, balance
        self.limit_nanousd, self.is_hard = budget.limit_nanousd, budget.mode == "hard"

    def at(self, now_ms: int) -> Balance:
        if self.balance.end_ms <= now_ms:
            self.balance = Balance(self.budget, window_at(self.budget.period, now_ms))
        return self.balance

    def room(self, now_ms: int) -> int:
        balance = self.at(now_ms)
        return max(0, self.limit_nanousd - balance.settled_nanousd - balance.held_nanousd)


class Books:
    """Balances as the records tell them: `settled` by (budget id, window), and the records of `open` holds by id.

    Applying a record twice changes nothing, so that a journal may overlap what a database already has, if `closed`
    names the holds of that overlap which the database has settled.
    """

    def __init__(
        self,
        settled: Mapping[tuple[str, str], int] | None = None,
        open_holds: Iterable[Json] = (),
        closed: Iterable[str] = (),
    ) -> None:
        self.settled = dict(settled or {})
        self.open = {record["id"]: record for record in open_holds}
        self._closed = set(closed)

    def apply(self, record: Json) -> None:
        hold_id = record["id"]
        if record["op"] == "hold":
            if hold_id not in self._closed:
                self.open[hold_id] = record
        elif self.open.pop(hold_id, None) is not None:
            self._closed.add(hold_id)
            for budget_id, window in record["budgets"]:
                self.settled[budget_id, window] = self.settled.get((budget_id, window), 0) + record["nanousd"]

    def held(self) -> dict[tuple[str, str], int]:
        """What open holds take of each (budget id, window)."""
        held: dict[tuple[str, str], int] = {}
        for record in self.open.values():
            for budget_id, window in record["budgets"]:
                held[budget_id, window] = held.get((budget_id, window), 0) + record["nanousd"]
        return held


class Ledger:
    """Admits attempts against all matching budgets, and settles them. One per process that admits.

    `new_id` mints hold ids; they are never a client's, since billing hangs on them.
    """

    def __init__(self, budgets: Iterable[Budget], new_id: Callable[[str], str], now_ms: int) -> None:
        self._new_id = new_id
        self._high_ms = now_ms
        self._accounts: dict[str, Account] = {}
        self._exact: dict[str, dict[str, list[Account]]] = {scope: {} for scope in SCOPES}
        self._patterns: list[Account] = []
        self.open: dict[str, Hold] = {}
        self.bound_violations = 0
        self.repeated_ends = 0
        for budget in budgets:
            self.put_budget(budget, now_ms)

    # -- budgets

    def put_budget(self, budget: Budget, now_ms: int, settled: Mapping[tuple[str, str], int] | None = None) -> None:
        """Add or replace a budget. Its balance goes on; `settled`, the stored ones, tells what is not in memory."""
        window = window_at(budget.period, self._now(now_ms))
        balance = self._known_balance(budget.id, window.key)
        if balance is None:
            balance = Balance(budget, window, (settled or {}).get((budget.id, window.key), 0))
        balance.adopt(budget)
        self.drop_budget(budget.id)
        account = self._accounts[budget.id] = Account(budget, balance)
        self._shelf(budget).append(account)

    def drop_budget(self, budget_id: str) -> None:
        """Forget a budget; holds made under it still settle and are still recorded."""
        account = self._accounts.pop(budget_id, None)
        if account is None:
            return
        shelf = self._shelf(account.budget)
        shelf.remove(account)
        if not shelf and shelf is not self._patterns:
            del self._exact[account.budget.scope][account.budget.value]

    def _shelf(self, budget: Budget) -> list[Account]:
        if budget.scope == "model" and "*" in budget.value:
            return self._patterns
        return self._exact[budget.scope].setdefault(budget.value, [])

    def _known_balance(self, budget_id: str, window: str) -> Balance | None:
        account = self._accounts.get(budget_id)
        known = [account.balance] if account else []
        known += [balance for hold in self.open.values() for balance in hold.balances]
        return next((b for b in known if b.budget.id == budget_id and b.window == window), None)

    def _match(self, key_id: str, tags: Mapping[str, str], model: str, provider: str) -> list[Account]:
        exact = self._exact
        found = [*exact["global"].get("", ()), *exact["key"].get(key_id, ())]
        if tags and exact["tag"]:
            for name, value in tags.items():
                found += exact["tag"].get(f"{name}={value}", ())
        if exact["model"]:
            found += exact["model"].get(model, ())
        if exact["provider"]:
            found += exact["provider"].get(provider, ())
        if self._patterns:
            found += [account for account in self._patterns if matches_pattern(account.budget.value, model)]
        return found

    def _now(self, now_ms: int) -> int:
        """The wall clock, never earlier than it has been."""
        if now_ms < self._high_ms:
            return self._high_ms
        self._high_ms = now_ms
        return now_ms

    # -- attempts

    def admit(
        self,
        key: VirtualKey | None,
        tags: Mapping[str, str],
        model: str,
        provider: str,
        price_upper_bound: int | None,
        now_ms: int,
    ) -> Hold:
        """Hold `price_upper_bound` nano-dollars in every matching budget, or raise BudgetExceeded and take nothing.

        None means that no bound is known: refused under a hard budget, held as nothing elsewhere.
        """
        now_ms = self._now(now_ms)
        nanousd = price_upper_bound or 0
        if nanousd < 0:
            raise ValueError("a price bound is never negative")
        balances = []
        for account in self._match(key.id if key else "", tags, model, provider):
            balance = account.balance
            if balance.end_ms <= now_ms:
                balance = account.at(now_ms)
            if account.is_hard and (
                price_upper_bound is None
                or balance.settled_nanousd + balance.held_nanousd + nanousd > account.limit_nanousd
            ):
                raise _refusal(balance, model, price_upper_bound, now_ms)
            balances.append(balance)
        if not balances:
            return Hold("", price_upper_bound, (), now_ms)
        for balance in balances:
            balance.held_nanousd += nanousd
        hold = Hold(self._new_id("hold_"), price_upper_bound, tuple(balances), now_ms)
        self.open[hold.id] = hold
        return hold

    def headroom(
        self, key: VirtualKey | None, tags: Mapping[str, str], model: str, provider: str, needed: int, now_ms: int
    ) -> int:
        """The most of `needed` that could be held now: all of it, what clamping budgets leave, or 0.

        0 where a budget that does not clamp is too small: such a budget refuses rather than shortens.
        """
        now_ms = self._now(now_ms)
        most = needed
        for account in self._match(key.id if key else "", tags, model, provider):
            if account.is_hard and (room := account.room(now_ms)) < needed:
                most = min(most, room) if account.budget.clamp else 0
        return most

    def is_hard_limited(self, key: VirtualKey | None, tags: Mapping[str, str], model: str, provider: str) -> bool:
        """Whether a hard budget matches, so that the output cap must be real and every part of the input bounded."""
        return any(account.is_hard for account in self._match(key.id if key else "", tags, model, provider))

    def settle(self, hold: Hold, cost_nanousd: int | None, now_ms: int) -> Settlement:
        """Charge an attempt's cost; None (usage unknown) charges the whole hold. A second end changes nothing."""
        cost = hold.nanousd if cost_nanousd is None else cost_nanousd
        if cost < 0:
            raise ValueError("a cost is never negative")
        if hold.open and hold.bounded and cost > hold.nanousd:
            self.bound_violations += 1
        return self._end(hold, "settle", cost, now_ms)

    def release(self, hold: Hold, now_ms: int) -> Settlement:
        """Give back the hold of an attempt that surely cost nothing."""
        return self._end(hold, "release", 0, now_ms)

    def _end(self, hold: Hold, op: str, cost: int, now_ms: int) -> Settlement:
        if not hold.open:
            self.repeated_ends += 1
            return Settlement(0, None, [])
        hold.open = False
        if not hold.balances:
            return Settlement(cost, None, [])
        del self.open[hold.id]
        events: list[ThresholdCrossed] = []
        for balance in hold.balances:
            balance.held_nanousd -= hold.nanousd
            balance.settled_nanousd += cost
            if balance.settled_nanousd >= balance.alarm_nanousd:
                events += balance.crossed()
        return Settlement(cost, hold.record_of(op, cost, self._now(now_ms)), events)

    # -- views, start

    def snapshot(self, now_ms: int) -> list[Json]:
        """The budgets as GET /api/budgets shows them: amounts as decimal dollars and as nano-dollars."""
        now_ms = self._now(now_ms)
        return [_show_account(account, now_ms) for account in self._accounts.values()]

    @property
    def held_nanousd(self) -> int:
        """Money in open holds, each counted once however many budgets it touches. Zero when idle."""
        return sum(hold.nanousd for hold in self.open.values())

    def books(self) -> Books:
        """The balances in memory: of current windows, and of older ones that open holds belong to."""
        balances = [account.balance for account in self._accounts.values()]
        balances += [balance for hold in self.open.values() for balance in hold.balances]
        records = [record for hold in self.open.values() if (record := hold.record)]
        return Books({(b.budget.id, b.window): b.settled_nanousd for b in balances}, records)

    @staticmethod
    def replay(records: Iterable[Json], books: Books | None = None) -> Books:
        """Apply records in order to `books` (new ones if None)."""
        books = books or Books()
        for record in records:
            books.apply(record)
        return books

    @classmethod
    def restore(
        cls, budgets: Iterable[Budget], books: Books, new_id: Callable[[str], str], now_ms: int
    ) -> tuple[Ledger, list[Settlement]]:
        """A ledger that goes on from stored books. Holds of the dead process are charged whole, since nobody knows.

        The settlements come back for the store to write and the operator to see; their log rows end as `crashed`.
        """
        starts = [window_start_ms(window) for _, window in books.settled]
        starts += [record["at"] for record in books.open.values()]
        ledger = cls((), new_id, max(starts, default=now_ms))
        for budget in budgets:
            ledger.put_budget(budget, now_ms, books.settled)
        return ledger, [ledger._settle_orphan(record) for record in books.open.values()]

    def _settle_orphan(self, record: Json) -> Settlement:
        balances = [self._orphan_balance(budget_id, window) for budget_id, window in record["budgets"]]
        hold = Hold(record["id"], record["nanousd"], tuple(balances), record["at"])
        for balance in balances:
            balance.held_nanousd += hold.nanousd
        self.open[hold.id] = hold
        return self.settle(hold, None, self._high_ms)

    def _orphan_balance(self, budget_id: str, window: str) -> Balance:
        # An older window, or a budget that is gone: only the record matters, so the limit is one that never alarms.
        known = self._known_balance(budget_id, window)
        return known or Balance(Budget(budget_id, NEVER_MS, "total", mode="soft"), Window(window, NEVER_MS))


def _amounts(**amounts_nanousd: int) -> Json:
    """Each amount twice: exact decimal dollars for people, nano-dollars for programs."""
    shown: Json = {}
    for name, nanousd in amounts_nanousd.items():
        shown[f"{name}_usd"], shown[f"{name}_nanousd"] = format_usd(nanousd), nanousd
    return shown


def _show_account(account: Account, now_ms: int) -> Json:
    budget, balance = account.budget, account.at(now_ms)
    settled, held = balance.settled_nanousd, balance.held_nanousd
    amounts = _amounts(limit=budget.limit_nanousd, settled=settled, held=held, remaining=account.room(now_ms))
    return {
        "id": budget.id,
        "scope": budget.scope,
        "value": budget.value,
        "period": budget.period,
        "mode": budget.mode,
        "clamp": budget.clamp,
        "window": balance.window,
        **amounts,
        "resets_at": _resets_at(balance),
    }


def _resets_at(balance: Balance) -> str | None:
    return None if balance.end_ms == NEVER_MS else format_moment(balance.end_ms)


def _refusal(balance: Balance, model: str, needed: int | None, now_ms: int) -> BudgetExceeded:
    budget = balance.budget
    limit, spent, held = budget.limit_nanousd, balance.settled_nanousd, balance.held_nanousd
    fields = {"budget": budget.id, "scope": budget.scope, "window": balance.window, "resets_at": _resets_at(balance)}
    fields |= _amounts(limit=limit, spent=spent, held=held)
    if needed is None:
        what = (
            f"the most this call to {model!r} could cost is not known (no price, or a part without a bound), and the "
            f"budget {budget.id} is a hard one; set a price for the model or make the budget soft"
        )
        return BudgetExceeded(what, fields={**fields, "needed_usd": None, "needed_nanousd": None})
    resets = f"it resets at {_resets_at(balance)}" if _resets_at(balance) else "it does not reset"
    what = (
        f"the budget {budget.id} allows ${format_usd(limit)} {PERIOD_WORDS[budget.period]}: ${format_usd(spent)} is "
        f"spent, ${format_usd(held)} is held by calls in flight, and this call may cost ${format_usd(needed)}; "
        f"{resets}, and a lower max_tokens needs less"
    )
    retry_after_s = _retry_after_s(balance, needed, now_ms)
    return BudgetExceeded(what, fields={**fields, **_amounts(needed=needed)}, retry_after_s=retry_after_s)


def _retry_after_s(balance: Balance, needed: int, now_ms: int) -> float | None:
    """Soon where only open holds stand in the way; None where waiting does not help."""
    limit = balance.budget.limit_nanousd
    if needed <= limit - balance.settled_nanousd:
        return HELD_RETRY_S
    if needed > limit or balance.end_ms == NEVER_MS:
        return None
    return float(-(-(balance.end_ms - now_ms) // 1000))


# ----- Rate windows ---------------------------------------------------------------------------------------------------
# A sum over the current second and the sixty before it: 61 counters, so that any 60 seconds, wherever they begin, lie
# inside what was counted. All times are of the monotonic clock. Tokens are reserved by an estimate and corrected later.

RATE_SLOTS: Final = 61
PARALLEL_RETRY_S: Final = 1.0


class SlidingSum:
    """A sum over the last 61 whole seconds, kept by second. Time that goes back is taken as now."""

    __slots__ = ("_newest_s", "_ring", "total", "used_s")

    def __init__(self, now_s: int) -> None:
        self._ring = [0] * RATE_SLOTS
        self._newest_s = self.used_s = now_s
        self.total = 0

    def advance(self, now_s: int) -> None:
        gone = now_s - self._newest_s
        if gone <= 0:
            return
        if gone >= RATE_SLOTS:
            self._ring, self.total = [0] * RATE_SLOTS, 0
        else:
            ring = self._ring
            for second in range(self._newest_s + 1, now_s + 1):
                self.total -= ring[second % RATE_SLOTS]
                ring[second % RATE_SLOTS] = 0
        self._newest_s = now_s

    def add(self, amount: int) -> int:
        """Count `amount` in the newest second; the second, to correct it by."""
        second = self.used_s = self._newest_s
        self._ring[second % RATE_SLOTS] += amount
        self.total += amount
        return second

    def correct(self, amount: int, second: int) -> None:
        """Add to a second of the past; one that has left the window gives nothing back, but owes what it exceeded."""
        if self._newest_s - second < RATE_SLOTS:
            self._ring[second % RATE_SLOTS] += amount
            self.total += amount
        elif amount > 0:
            self.add(amount)

    def wait_ms(self, most: int, now_ms: int) -> int:
        """Milliseconds until the sum is at most `most` if nothing is added."""
        left = self.total
        for second in range(self._newest_s - RATE_SLOTS + 1, self._newest_s + 1):
            if left <= most:
                return max(0, (second - 1 + RATE_SLOTS) * 1000 - now_ms)
            left -= self._ring[second % RATE_SLOTS]
        return max(0, (self._newest_s + RATE_SLOTS) * 1000 - now_ms)

    def reset_ms(self, now_ms: int) -> int:
        """Milliseconds until the sum is zero if nothing is added."""
        return max(0, (self.used_s + RATE_SLOTS) * 1000 - now_ms) if self.total else 0


class Meter:
    """The counters of one scope: a key, a model pattern, or everything."""

    __slots__ = ("limit", "parallel", "requests", "scope", "tokens")

    def __init__(self, scope: str, limit: RateLimit, now_s: int) -> None:
        self.scope, self.parallel = scope, 0
        self.requests, self.tokens = SlidingSum(now_s), SlidingSum(now_s)
        self.limit = limit

    def check(self, tokens: int, now_ms: int) -> None:
        """LimitExceeded unless one more request of so many tokens fits."""
        limit, now_s = self.limit, now_ms // 1000
        if limit.rpm is not None:
            self.requests.advance(now_s)
            if self.requests.total >= limit.rpm:
                raise self._refusal("rpm", limit.rpm, self.requests.total, 1, self.requests, now_ms)
        if limit.tpm is not None:
            self.tokens.advance(now_s)
            if self.tokens.total + tokens > limit.tpm:
                raise self._refusal("tpm", limit.tpm, self.tokens.total, tokens, self.tokens, now_ms)
        if limit.parallel is not None and self.parallel >= limit.parallel:
            raise self._refusal("parallel", limit.parallel, self.parallel, 1, None, now_ms)

    def _refusal(
        self, name: str, limit: int, used: int, needed: int, window: SlidingSum | None, now_ms: int
    ) -> LimitExceeded:
        fields = {"limit_name": name, "scope": self.scope, "limit": limit, "used": used, "needed": needed}
        what = f"{self.scope} is limited to {limit} {RATE_WORDS[name]}; {used} are used, {needed} more asked for"
        if needed > limit:
            return LimitExceeded(f"{what}, which never fits; ask for less (a lower max_tokens)", fields=fields)
        retry_s = float(-(-window.wait_ms(limit - needed, now_ms) // 1000)) if window else PARALLEL_RETRY_S
        return LimitExceeded(f"{what}; try again in {retry_s:g} s", fields=fields, retry_after_s=retry_s)

    def is_idle(self, now_s: int) -> bool:
        newest_s = max(self.requests.used_s, self.tokens.used_s)
        return not self.parallel and now_s - newest_s >= RATE_SLOTS


RATE_WORDS: Final = {"rpm": "requests a minute", "tpm": "tokens a minute", "parallel": "calls at once"}


class RateHold:
    """What one call took of its rate limits, until it ends."""

    __slots__ = ("meters", "open", "reserved", "tokens")

    def __init__(self, meters: list[Meter], tokens: int, reserved: list[tuple[SlidingSum, int]]) -> None:
        self.meters, self.tokens, self.reserved = meters, tokens, reserved
        self.open = True


class RateLimiter:
    """Rate limits per key, per model pattern and for all, taken together or not at all. O(1) a call.

    Meters of keys live while the key is in use: each new one looks at the two eldest and drops them if idle.
    """

    def __init__(self, everything: RateLimit | None, models: Mapping[str, RateLimit], now_ms: int) -> None:
        now_s = now_ms // 1000
        self._everything = [Meter("this Stockyard", everything, now_s)] if everything else []
        self._models = [(pattern, Meter(f"the model {pattern}", limit, now_s)) for pattern, limit in models.items()]
        self._keys: collections.OrderedDict[str, Meter] = collections.OrderedDict()
        self.repeated_ends = 0

    def __len__(self) -> int:
        return len(self._keys)

    def admit(self, key: VirtualKey | None, model: str, tokens: int, now_ms: int) -> RateHold:
        """Count one request of an estimated `tokens`, or raise LimitExceeded and count nothing."""
        meters = self._meters(key, model, now_ms)
        for meter in meters:
            meter.check(tokens, now_ms)
        reserved = []
        for meter in meters:
            meter.parallel += 1
            if meter.limit.rpm is not None:
                meter.requests.add(1)
            if meter.limit.tpm is not None:
                reserved.append((meter.tokens, meter.tokens.add(tokens)))
        return RateHold(meters, tokens, reserved)

    def settle(self, hold: RateHold, tokens: int | None) -> None:
        """End a call: free its places, and count what it really used (None: unknown, the estimate stays)."""
        if not hold.open:
            self.repeated_ends += 1
            return
        hold.open = False
        for meter in hold.meters:
            meter.parallel -= 1
        if tokens is not None and tokens != hold.tokens:
            for window, second in hold.reserved:
                window.correct(tokens - hold.tokens, second)

    def headers(self, key: VirtualKey | None, model: str, now_ms: int) -> dict[str, str]:
        """The x-ratelimit headers in OpenAI's form, each of the limit that has least left; none where none is set.

        Source: https://platform.openai.com/docs/guides/rate-limits
        """
        found: dict[str, str] = {}
        meters = self._meters(key, model, now_ms)
        for names, read in RATE_HEADERS:
            rows = []
            for limit, window in map(read, meters):
                if limit is not None:
                    window.advance(now_ms // 1000)
                    rows.append((limit - window.total, limit, window))
            if rows:
                left, limit, window = rows[0] if len(rows) == 1 else min(rows, key=lambda row: row[:2])
                found[names[0]], found[names[1]] = str(limit), str(max(0, left))
                found[names[2]] = format_duration(window.reset_ms(now_ms))
        return found

    def _meters(self, key: VirtualKey | None, model: str, now_ms: int) -> list[Meter]:
        meters = self._everything.copy()
        if key is not None and key.rate_limit is not None:
            meter = self._keys.get(key.id) or self._new_meter(key, now_ms // 1000)
            meter.limit = key.rate_limit
            meters.append(meter)
        if self._models:
            meters += [meter for pattern, meter in self._models if matches_pattern(pattern, model)]
        return meters

    def _new_meter(self, key: VirtualKey, now_s: int) -> Meter:
        for _ in range(min(2, len(self._keys))):
            eldest_id, eldest = next(iter(self._keys.items()))
            if eldest.is_idle(now_s):
                del self._keys[eldest_id]
            else:
                self._keys.move_to_end(eldest_id)
        meter = self._keys[key.id] = Meter("this key", key.rate_limit or RateLimit(), now_s)
        return meter


def _rate_header_names(what: str) -> tuple[str, str, str]:
    return f"x-ratelimit-limit-{what}", f"x-ratelimit-remaining-{what}", f"x-ratelimit-reset-{what}"


RATE_HEADERS: Final[tuple[tuple[tuple[str, str, str], Callable[[Meter], tuple[int | None, SlidingSum]]], ...]] = (
    (_rate_header_names("requests"), lambda meter: (meter.limit.rpm, meter.requests)),
    (_rate_header_names("tokens"), lambda meter: (meter.limit.tpm, meter.tokens)),
)


def format_duration(duration_ms: int) -> str:
    """A time as OpenAI's headers write it: `120ms`, `1s`, `1.5s`, `6m0s`, `1h2m3s`."""
    if 0 < duration_ms < 1000:
        return f"{duration_ms}ms"
    minutes, rest_ms = divmod(duration_ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h" if hours else ""
    return text + (f"{minutes}m" if hours or minutes else "") + f"{rest_ms / 1000:g}s"


# ----- Bounds of a call -----------------------------------------------------------------------------------------------
# The largest number of tokens a request can be billed for. Text: tokens never outnumber the UTF-8 bytes of byte-level
# BPE and byte-fallback vocabularies; what providers add themselves is a row of INPUT_BOUNDS. Parts whose tokens do not
# follow from their bytes take the model's whole window; what is fetched from elsewhere has no bound, and is refused.


class InputBound(NamedTuple):
    """What a wire format's providers may bill beside the bytes sent, at most; in tokens."""

    request: int
    tools: int
    image: int
    message: int = 16
    tool: int = 64


# Images: OpenAI's dearest is gpt-4o-mini, 2,833 + 8 x 5,667 (newer ones stay below it, and so do 16,384 patches of
# Qwen); Claude cuts patches of 28 pixels from at most 2,576 x 2,576; Gemini takes at most 2,240 at ultra-high
# resolution and older ones 258 a tile of at most 32. Requests and tools: the largest seen, doubled (Cohere 1,430 and
# Claude 1,160).
# Sources: https://platform.openai.com/docs/guides/images-vision https://ai.google.dev/gemini-api/docs/media-resolution
# https://platform.claude.com/docs/en/build-with-claude/vision
INPUT_BOUNDS: Final = {
    "openai": InputBound(request=1024, tools=1024, image=48_200),
    "responses": InputBound(request=1024, tools=1024, image=48_200),
    "anthropic": InputBound(request=2048, tools=2560, image=8_500),
    "bedrock": InputBound(request=2048, tools=2560, image=16_400),
    "gemini": InputBound(request=512, tools=1024, image=10_000),
    "cohere": InputBound(request=3072, tools=2048, image=16_400),
}
DEAREST_BOUND: Final = InputBound(*(max(column) for column in zip(*INPUT_BOUNDS.values(), strict=True)))

TEXT_PARTS: Final = frozenset(
    {"text", "input_text", "output_text", "refusal", "thinking", "redacted_thinking", "reasoning_item"}
)
BOUNDED_TOOLS: Final = frozenset({"function", "custom"})
# Members that make a provider read, search or generate what the request does not show, or bill another model.
UNBOUNDED_MEMBERS: Final = frozenset({
    "previous_response_id", "conversation", "cached_content", "cachedContent", "container", "context_management",
    "mcp_servers", "web_search_options", "search_parameters", "enable_search", "plugins", "data_sources", "models",
    "prediction", "file_ids",
})  # fmt: skip
UNKNOWN_OUTPUT_TOKENS: Final = 4096


def text_bytes(body: bytes, document: Json) -> int:
    """The bytes to bound a body's tokens by: its own, or more where a tokenizer that normalises would expand them.

    Some vocabularies apply NFKC first, which makes 33 bytes of one Arabic ligature; escapes hide such letters.
    """
    escaped = b"\\u" in body
    if not escaped and body.isascii():
        return len(body)
    text = dump_json(document).decode() if escaped else body.decode()
    if unicodedata.is_normalized("NFKC", text):
        return len(body)
    return max(len(body), len(unicodedata.normalize("NFKC", text).encode()))


def token_estimate(body_bytes: int, output_cap_tokens: int | None) -> int:
    """What a call will likely use, for rate limits: four bytes a token, and the answer it asked for."""
    return body_bytes // 4 + (256 if output_cap_tokens is None else output_cap_tokens)


def input_token_bound(
    request: Json, body_bytes: int, dialect: str = "", context_tokens: int | None = None
) -> int | None:
    """The most input tokens a canonical request can be billed for, or None where nothing bounds them.

    `body_bytes` is of `text_bytes`; `dialect` is the provider's (the dearest row if unknown); `context_tokens` is the
    model's window, which bounds inline documents, video and odd audio; without it these give None too.
    """
    if not _is_self_contained(request):
        return None
    row = INPUT_BOUNDS.get(dialect, DEAREST_BOUND)
    messages, tools = request.get("messages") or (), request.get("tools") or ()
    total = body_bytes + row.request + row.message * len(messages) + row.tool * len(tools) + (row.tools if tools else 0)
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            extra = _part_bound(part, row, context_tokens)
            if extra is None:
                return None
            total += extra
    return total + _rerank_bound(request)


def _is_self_contained(request: Json) -> bool:
    """False where a member or a tool makes the provider bill what the request does not hold."""
    extras = request.get("extra_body")
    for members in (request, *(extras.values() if isinstance(extras, dict) else ())):
        if isinstance(members, dict) and any(members.get(name) for name in UNBOUNDED_MEMBERS & members.keys()):
            return False
    if isinstance(request.get("prompt"), dict):
        return False
    tools = request.get("tools") or ()
    return all(isinstance(tool, dict) and tool.get("type", "function") in BOUNDED_TOOLS for tool in tools)


def _part_bound(part: Any, row: InputBound, context_tokens: int | None) -> int | None:
    """Tokens of one content part beyond its bytes (less than none for an image: its bytes are not read as text)."""
    kind = part.get("type") if isinstance(part, dict) else "text"
    if kind in TEXT_PARTS:
        return 0
    if kind == "image_url":
        image = part.get("image_url")
        return row.image - _inline_bytes(image.get("url") if isinstance(image, dict) else image)
    if kind == "input_audio":
        audio = part.get("input_audio")
        return 0 if isinstance(audio, dict) and _is_dense_audio(audio) else context_tokens
    source = part.get(kind) if kind in ("file", "media") else None
    data = source.get("file_data") if isinstance(source, dict) else None
    if not isinstance(data, str):
        return None
    return 0 if data.startswith("data:text/") else context_tokens


def _inline_bytes(url: Any) -> int:
    return len(url) if isinstance(url, str) and url.startswith("data:") else 0


def _is_dense_audio(audio: Json) -> bool:
    """Whether a second of it takes more bytes than the 32 tokens that the dearest provider counts.

    MP3 has a header each 0.072 s or less; plain WAV takes a byte a sample, so a false sample rate is what to look for.
    """
    data = audio.get("data")
    if audio.get("format") == "mp3":
        return isinstance(data, str) and data.startswith(("SUQz", "//"))  # "ID3" or the frame's sync bits
    try:
        head = base64.b64decode(data[:48], validate=True) if isinstance(data, str) else b""
    except (binascii.Error, ValueError):
        return False
    is_plain = head[:4] == b"RIFF" and head[8:16] == b"WAVEfmt " and head[20:22] in (b"\x01\0", b"\x03\0")
    return is_plain and int.from_bytes(head[24:28], "little") >= 4000


def _rerank_bound(request: Json) -> int:
    """Rerankers read the query once for each document."""
    query, documents = request.get("query"), request.get("documents")
    return len(query.encode("utf-8", "replace")) * len(documents) if query and documents else 0


class OutputCap(NamedTuple):
    """The cap of one answer; `injected`: it must be written into the provider's field. `total_tokens` is for all n."""

    tokens: int
    injected: bool
    total_tokens: int


def output_token_cap(
    request: Json, provider_cap_field: str, model_max: int | None, affordable_tokens: int | None = None
) -> OutputCap:
    """The real bound of a call's output: what the client asked, else the model's maximum, else 4,096 tokens.

    `affordable_tokens` (over all answers) clamps it. A cap under another name than the provider's counts as not yet
    written: only `provider_cap_field` in the outgoing body binds the provider. InvalidRequest for anything but numbers.
    """
    names = (provider_cap_field, *OUTPUT_CAP_FIELDS)
    name = next((name for name in names if request.get(name) is not None), None)
    asked = None if name is None else _read_count(request[name], name, 0)
    counts = [_read_count(request[many], many, 1) for many in ("n", "best_of") if request.get(many) is not None]
    answers = max(counts, default=1)
    tokens = (model_max or UNKNOWN_OUTPUT_TOKENS) if asked is None else asked
    if affordable_tokens is not None:
        tokens = min(tokens, affordable_tokens // answers)
    return OutputCap(tokens, request.get(provider_cap_field) != tokens, tokens * answers)


def _read_count(value: Any, param: str, least: int) -> int:
    if type(value) is not int or not least <= value < 1 << 40:
        raise _invalid(param, f"a whole number from {least}")
    return value


# ===== Echo ===========================================================================================================
# The built-in provider: deterministic answers without a key or a network, for the first minute and for tests. It says
# back the last user message; it honours `stream`, `tools`, the output cap, and `delay_ms` (before the answer) and
# `chunk_ms` (between the pieces of a stream). A word counts as a token. Only models called `echo` or `echo-…` come here.


@dataclass(frozen=True, slots=True)
class EchoAnswer:
    """What the echo sends: pieces of a body, with pauses in seconds."""

    content_type: str
    pieces: list[bytes]
    delay_s: float
    gap_s: float


def echo(kind: str, body: bytes) -> EchoAnswer:
    """Answer a request of the OpenAI dialect; `kind` is the endpoint's."""
    request = orjson.loads(body)
    delay_s, gap_s = (
        min(600_000.0, max(0.0, float(request.get(name) or 0))) / 1000 for name in ("delay_ms", "chunk_ms")
    )
    if kind == "models":
        return EchoAnswer(
            "application/json", [dump_json({"object": "list", "data": [{"id": "echo", "object": "model"}]})], 0, 0
        )
    if kind == "embeddings":
        return EchoAnswer("application/json", [dump_json(echo_embeddings(request))], delay_s, 0)
    completion = echo_completion(request, legacy=kind == "completions")
    if request.get("stream"):
        asked = (request.get("stream_options") or {}).get("include_usage")
        return EchoAnswer("text/event-stream", [*echo_events(completion, bool(asked))], delay_s, gap_s)
    return EchoAnswer("application/json", [dump_json(completion)], delay_s, 0)


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or the text parts of a list."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return " ".join(part.get("text") or f"[{part.get('type')}]" for part in parts if isinstance(part, dict))


def echo_completion(request: Json, legacy: bool) -> Json:
    messages = request.get("messages") or [{"role": "user", "content": request.get("prompt")}]
    prompt = sum(len(text_of(message.get("content")).split()) for message in messages)
    last = messages[-1]
    message: Json = {"role": "assistant", "content": f"Echo: {text_of(last.get('content'))}".rstrip()}
    finish, called = "stop", echo_tool_call(request, last)
    words = re.findall(r"\s*\S+", message["content"])
    cap = request.get("max_completion_tokens") or request.get("max_tokens")
    if called:
        message, finish, words = {"role": "assistant", "content": None, "tool_calls": [called]}, "tool_calls", ["call"]
    elif isinstance(cap, int) and 0 < cap < len(words):
        message["content"], finish, words = "".join(words[:cap]), "length", words[:cap]
    choice: Json = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    if legacy:
        choice = {"index": 0, "text": message["content"], "logprobs": None, "finish_reason": finish}
    usage = {"prompt_tokens": prompt, "completion_tokens": len(words), "total_tokens": prompt + len(words)}
    digest = hashlib.sha256(dump_json(messages)).hexdigest()[:16]
    kind = "text_completion" if legacy else "chat.completion"
    return {
        "id": f"chatcmpl-echo{digest}",
        "object": kind,
        "created": 0,
        "model": request.get("model"),
        "choices": [choice],
        "usage": usage,
    }


def echo_tool_call(request: Json, last: Json) -> Json | None:
    """The call the echo makes: the tool that is forced, or named in the last user message; none after a tool's result."""
    tools = [tool["function"] for tool in request.get("tools") or () if isinstance(tool.get("function"), dict)]
    choice = request.get("tool_choice")
    if not tools or choice == "none" or last.get("role") == "tool":
        return None
    forced = (choice.get("function") or {}).get("name") if isinstance(choice, dict) else None
    said = text_of(last.get("content"))
    wanted = [
        tool for tool in tools if tool.get("name") == forced or (forced is None and str(tool.get("name")) in said)
    ]
    if not wanted and choice != "required":
        return None
    tool = (wanted or tools)[0]
    arguments = dump_json(sample_of(tool.get("parameters") or {})).decode()
    digest = hashlib.sha256(arguments.encode()).hexdigest()[:20]
    return {"id": f"call_{digest}", "type": "function", "function": {"name": tool.get("name"), "arguments": arguments}}


def sample_of(schema: Json) -> Any:
    """A smallest value that fits a JSON schema, for the echo's tool arguments."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object" or (kind is None and "properties" in schema) or not schema:
        return {
            name: sample_of(inner)
            for name, inner in (schema.get("properties") or {}).items()
            if isinstance(inner, dict)
        }
    return {"string": "echo", "integer": 1, "number": 1.0, "boolean": True, "array": []}.get(str(kind))


def echo_events(completion: Json, include_usage: bool) -> Iterator[bytes]:
    """A completion as the events of a stream, word by word."""
    usage = completion.pop("usage")
    legacy = completion["object"] == "text_completion"
    head = {**completion, "object": completion["object"] if legacy else "chat.completion.chunk"}
    choice = completion["choices"][0]
    text = choice.get("text") if legacy else choice["message"]["content"]

    def chunk(delta: Any, finish: str | None) -> bytes:
        said = {"text": delta} if legacy else {"delta": delta}
        return sse_event({**head, "choices": [{"index": 0, **said, "finish_reason": finish}]})

    if not legacy:
        yield chunk({"role": "assistant", "content": None if text is None else ""}, None)
        for called in choice["message"].get("tool_calls") or ():
            function = called["function"]
            yield chunk(
                {"tool_calls": [{"index": 0, **called, "function": {"name": function["name"], "arguments": ""}}]}, None
            )
            yield chunk({"tool_calls": [{"index": 0, "function": {"arguments": function["arguments"]}}]}, None)
    for word in re.findall(r"\s*\S+", text or ""):
        yield chunk(word if legacy else {"content": word}, None)
    yield chunk("" if legacy else {}, choice["finish_reason"])
    if include_usage:
        yield sse_event({**head, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def echo_embeddings(request: Json) -> Json:
    """Eight (or `dimensions`) numbers a text, from its hash; base64 where asked, as the official SDKs do."""
    given = request.get("input")
    texts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    size = request.get("dimensions") if isinstance(request.get("dimensions"), int) else 8
    rows = []
    for index, text in enumerate(texts):
        seed = hashlib.shake_256(dump_json(text)).digest(4 * min(4096, max(1, size or 8)))
        numbers = [value / 2**31 - 1 for (value,) in struct.iter_unpack("<I", seed)]
        packed = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
        rows.append(
            {
                "object": "embedding",
                "index": index,
                "embedding": packed if request.get("encoding_format") == "base64" else numbers,
            }
        )
    words = sum(len(str(text).split()) for text in texts)
    return {
        "object": "list",
        "data": rows,
        "model": request.get("model"),
        "usage": {"prompt_tokens": words, "total_tokens": words},
    }


# ===== Streams ========================================================================================================
# A flow turns a provider's stream bytes into the client's, and learns on the way what must be known: whether content
# was seen (before it, everything may be retried), whether the terminal event came (only that proves a whole answer),
# usage and finish reason. Flows raise UpstreamError for an error inside the stream. All are pure.


class Flow:
    """What all flows know. `feed` and `close` give the bytes to send on; `close` is called at the provider's end."""

    #: Where the flow notes what it gives, for those who get the same answer later; None where nobody may.
    tape: Tape | None = None

    def __init__(self, transcript: Transcript, cost_of: Callable[[Usage], int | None]) -> None:
        self.transcript = transcript
        self.content_seen = False
        self.finishes: set[str] = set()
        self.usage: Usage | None = None
        self.finish_reason = ""
        self.answer_id = ""
        self.signatures: dict[str, str] = {}
        self._cost_of = cost_of

    @property
    def complete(self) -> bool:
        raise NotImplementedError

    def feed(self, data: bytes) -> bytes:
        raise NotImplementedError

    def close(self) -> bytes:
        raise NotImplementedError

    def observe(self, chunk: Json) -> None:
        """Learn from one canonical chunk."""
        for choice in chunk.get("choices") or ():
            reason = choice.get("finish_reason")
            if reason:
                self.finish_reason = reason
                self.finishes.add(reason)
            if not self.content_seen and (reason or has_content(choice)):
                self.content_seen = True
            delta = choice.get("delta")
            if isinstance(delta, dict) and delta.get("tool_calls"):
                self.signatures |= signatures_of(delta)

    def note(self, out: bytes) -> bytes:
        """Give bytes of the answer on, noted on the tape."""
        if self.tape is not None:
            self.tape.add(out)
        return out

    def note_usage(self, chunk: Json, usage: Usage) -> None:
        """Keep the usage and add the cost to the event that carries it."""
        self.usage = usage
        cost = self._cost_of(usage)
        if cost is not None and isinstance(chunk.get("usage"), dict):
            chunk["usage"]["cost"] = cost / NANOUSD_PER_USD


def signatures_of(message: Json) -> dict[str, str]:
    """Thought signatures of a message's tool calls, by call id: many clients drop the field that carries them."""
    found = {}
    for call in message.get("tool_calls") or ():
        signature = ((call.get("extra_content") or {}).get("google") or {}).get("thought_signature")
        if signature and call.get("id"):
            found[call["id"]] = signature
    return found


def has_content(choice: Json) -> bool:
    """Whether a chunk's choice says more than its role."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return bool(choice.get("text"))
    return any(value and name != "role" for name, value in delta.items())


class WholeEvents:
    """Cuts bytes in any split into runs of whole events; line ends become LF, a BOM goes."""

    def __init__(self) -> None:
        self._tail = b""
        self._began = self._after_cr = False

    def feed(self, data: bytes) -> bytes:
        if not data:
            return b""
        if self._after_cr or b"\r" in data:
            data = self._with_lf(data)
        if self._tail:
            data = self._tail + data
        if not self._began:
            self._began = len(data) > 3
            data = data.removeprefix(b"\xef\xbb\xbf")
        if data.endswith(b"\n\n"):
            self._tail = b""
            return data
        cut = data.rfind(b"\n\n") + 2
        if cut == 1:
            cut = 0
        self._tail = data[cut:]
        if len(self._tail) > SSE_MAX_EVENT_BYTES:
            raise UpstreamError("the provider sent an event without end", code="upstream_malformed")
        return data[:cut]

    def _with_lf(self, data: bytes) -> bytes:
        if self._after_cr and data[:1] == b"\n":
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def close(self) -> bytes:
        """The last event, where the provider forgot its blank line."""
        tail, self._tail = self._tail.strip(b"\n"), b""
        return tail + b"\n\n" if tail else b""


class OpenAiFlow(Flow):
    """OpenAI on both sides: whole events go on as they came, and only those that tell something are parsed.

    Telling are, before the first content, all; then those with a finish reason, a usage object, an error, or [DONE]. A
    byte count finds them: a quoted name inside text is escaped, so that it never matches; at worst a parse is wasted.
    """

    def __init__(
        self,
        dialect: OpenAiChat,
        provider: Provider,
        include_usage: bool,
        transcript: Transcript,
        cost_of: Callable[[Usage], int | None],
    ) -> None:
        super().__init__(transcript, cost_of)
        self._dialect, self._provider, self._include_usage = dialect, provider, include_usage
        self._events = WholeEvents()
        self._done = False

    @property
    def complete(self) -> bool:
        return self._done or bool(self.finish_reason)

    def feed(self, data: bytes) -> bytes:
        run = self._events.feed(data)
        if (
            self.content_seen
            and b'"error"' not in run
            and b"[DONE]" not in run
            and run.count(b'"finish_reason"') == run.count(b'"finish_reason":null')
            and run.count(b'"usage"') == run.count(b'"usage":null')
        ):
            self.transcript.add_block(run)
            if self.tape is not None:
                self.tape.add(run)
            return run
        return self._read(run)

    def close(self) -> bytes:
        last = self._read(self._events.close())
        return last if self._done or not self.finish_reason else last + self.note(b"data: [DONE]\n\n")

    def _read(self, run: bytes) -> bytes:
        return b"".join([self._event(block) for block in run.split(b"\n\n") if block])

    def _event(self, block: bytes) -> bytes:
        event = parse_sse_block(block)
        if event is None:
            return block + b"\n\n"
        if event[1].strip() == b"[DONE]":
            self._done = True
            return self.note(block + b"\n\n")
        chunk = read_event_json(event[1])
        refuse_error_event(chunk, self._dialect)
        self.transcript.add_chunk(chunk)
        changed = self._rename_finish(chunk)
        self.observe(chunk)
        usage = chunk.get("usage") or (chunk.get("x_groq") or {}).get("usage")
        if not usage:
            return self.note(sse_event(chunk) if changed else block + b"\n\n")
        self.note_usage(chunk, self._dialect.usage_of(usage, self._provider))
        if self.tape is not None:
            (self.tape.add if chunk.get("choices") else self.tape.add_usage)(sse_event(free_of_charge(chunk)))
        if not chunk.get("choices") and not self._include_usage:
            return b""
        return sse_event(chunk) if self._include_usage or changed else block + b"\n\n"

    def _rename_finish(self, chunk: Json) -> bool:
        changed = False
        for choice in chunk.get("choices") or ():
            reason = choice.get("finish_reason")
            if reason in FAILED_FINISHES:
                raise UpstreamError(f"the provider stopped with `{reason}`", code=f"upstream_{reason}")
            if reason in FINISH_REASONS:
                choice["finish_reason"] = FINISH_REASONS[reason]
                changed = True
        return changed


class NativeFlow(Flow):
    """The same dialect on both sides, not OpenAI's: events go on as they came; the decoder only watches."""

    def __init__(self, decoder: Decoder, transcript: Transcript, cost_of: Callable[[Usage], int | None]) -> None:
        super().__init__(transcript, cost_of)
        self._decoder = decoder
        self._events = WholeEvents()

    @property
    def complete(self) -> bool:
        return self._decoder.complete

    def feed(self, data: bytes) -> bytes:
        return self._watch(self._events.feed(data))

    def close(self) -> bytes:
        run = self._watch(self._events.close())
        for chunk in self._decoder.close():
            self._learn(chunk)
        return run

    def _watch(self, run: bytes) -> bytes:
        if run:
            for chunk in self._decoder.feed(run):
                self._learn(chunk)
        return self.note(run)

    def _learn(self, chunk: Json) -> None:
        self.answer_id = self.answer_id or str(chunk.get("id") or "")
        self.transcript.add_chunk(chunk)
        self.observe(chunk)
        if chunk.get("usage"):
            self.usage = read_openai_usage(chunk["usage"])


def shape_of(document: Any) -> str:
    """The dialect family that an answer or an event is clearly written in; "" where it could be any."""
    if not isinstance(document, dict):
        return ""
    kind = str(document.get("object") or "")
    if kind.startswith("chat.completion"):
        return "openai"
    if kind == "response" or str(document.get("type") or "").startswith("response."):
        return "responses"
    if document.get("type") in ("message", "message_start"):
        return "anthropic"
    return "gemini" if "candidates" in document else ""


def shape_of_stream(start: bytes) -> str | None:
    """The same for the start of a stream; None while its first event is not whole."""
    for _, payload in SseReader().feed(start):
        with contextlib.suppress(orjson.JSONDecodeError):
            return shape_of(orjson.loads(payload))
        return ""
    return None if len(start) < 65_536 else ""


class TranslatingFlow(Flow):
    """Two dialects: every event is decoded, and every chunk rendered."""

    def __init__(
        self, decoder: Decoder, renderer: Renderer, transcript: Transcript, cost_of: Callable[[Usage], int | None]
    ) -> None:
        super().__init__(transcript, cost_of)
        self._decoder, self._renderer = decoder, renderer
        self._paid = b""

    @property
    def complete(self) -> bool:
        return self._decoder.complete

    def feed(self, data: bytes) -> bytes:
        return b"".join([self._render(chunk) for chunk in self._decoder.feed(data)])

    def close(self) -> bytes:
        last = [self._render(chunk) for chunk in self._decoder.close()]
        if self._decoder.complete:
            end = self._renderer.close()
            last.append(end)
            self.note(end.replace(self._paid, b'"cost":0') if self._paid else end)
        return b"".join(last)

    def _render(self, chunk: Json) -> bytes:
        self.transcript.add_chunk(chunk)
        self.observe(chunk)
        if chunk.get("usage"):
            self.note_usage(chunk, read_openai_usage(chunk["usage"]))
        return self._rendered(chunk) if self.tape is not None else self._renderer.feed(chunk)

    def _rendered(self, chunk: Json) -> bytes:
        """A chunk rendered, and noted as it will be given again: free of charge, its usage for those who ask."""
        assert self.tape is not None
        if isinstance(self._renderer, OpenAiRenderer):
            usage = free_of_charge({**chunk, "choices": []}) if chunk.get("usage") else None
            out = self._renderer.feed(chunk)
            if chunk.get("choices"):
                chunk.pop("usage", None)
                self.tape.add(sse_event(chunk) if usage else out)
            if usage:
                self.tape.add_usage(sse_event(usage))
            return out
        cost = (chunk.get("usage") or {}).get("cost")
        if cost is not None:
            self._paid = b'"cost":' + orjson.dumps(cost)
        out = self._renderer.feed(chunk)
        self.tape.add(out.replace(self._paid, b'"cost":0') if self._paid else out)
        return out


# ===== Store ==========================================================================================================
# SQLite, and the journals that run ahead of it. Exactly one connection ever writes or checkpoints, in its own thread
# (SQLite before 3.51.3 can corrupt a WAL database that two connections checkpoint); readers are read-only connections
# of other threads. The event loop appends to a queue, and to a journal by `write`: a line before a call leaves, one
# before the end of its answer does. So a kill loses no row; a start takes over what SQLite lacks. Commits are grouped:
# the writer takes what has gathered, and rests a moment after each. What it cannot commit it keeps and tries again.
# A row is small: what calls have in common stands once in `labels`, and `seq` is the row's time. One index, by label,
# serves every filter; the sums by minute and label (`rollups`) are written with the rows and answer every chart. Bodies
# of one group lie together in one compressed block. Old blocks go first, then rows; the sums stay.
# To change the schema: append a migration; they run in order, each in one transaction, and a newer schema is refused.

MIGRATIONS: Final = (
    """
    CREATE TABLE requests (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, ts_ms INTEGER NOT NULL, key_id TEXT NOT NULL, tags TEXT NOT NULL,
        client_dialect TEXT NOT NULL, endpoint TEXT NOT NULL, model TEXT NOT NULL, provider TEXT NOT NULL,
        upstream_model TEXT NOT NULL, stream INTEGER NOT NULL, status INTEGER NOT NULL, error TEXT NOT NULL,
        cache TEXT NOT NULL, attempts INTEGER NOT NULL, input_tokens INTEGER, output_tokens INTEGER, cached_tokens INTEGER,
        cache_write_tokens INTEGER, reasoning_tokens INTEGER, cost_nanousd INTEGER, price_id TEXT NOT NULL,
        latency_ms REAL NOT NULL, first_token_ms REAL, overhead_ms REAL NOT NULL, redactions INTEGER NOT NULL,
        verdicts TEXT NOT NULL, finish_reason TEXT NOT NULL, client_ip TEXT NOT NULL, user_agent TEXT NOT NULL,
        session TEXT NOT NULL, attempt_log TEXT NOT NULL, dropped TEXT NOT NULL, usage TEXT NOT NULL,
        block INTEGER, request_at INTEGER NOT NULL, request_bytes INTEGER NOT NULL, answer_bytes INTEGER NOT NULL
    );
    CREATE INDEX requests_by_time ON requests (ts_ms);
    CREATE TABLE blocks (block INTEGER PRIMARY KEY, compressed INTEGER NOT NULL, bodies BLOB NOT NULL);
    """,
    """
    CREATE TABLE keys (id TEXT PRIMARY KEY, record TEXT NOT NULL);
    CREATE TABLE budgets (id TEXT PRIMARY KEY, record TEXT NOT NULL);
    CREATE TABLE ledger (only INTEGER PRIMARY KEY CHECK (only = 1), generation INTEGER NOT NULL, books TEXT NOT NULL);
    """,
    """
    CREATE TABLE responses (
        id TEXT PRIMARY KEY, ts_ms INTEGER NOT NULL, key_id TEXT NOT NULL, provider TEXT NOT NULL, response BLOB, items BLOB
    );
    """,
    """
    CREATE TABLE cache (
        slot BLOB PRIMARY KEY, scope TEXT NOT NULL, expires_ms INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
        head BLOB NOT NULL, body BLOB NOT NULL
    );
    CREATE INDEX cache_by_expiry ON cache (expires_ms);
    """,
    """
    ALTER TABLE requests ADD COLUMN notes TEXT NOT NULL DEFAULT '';
    ALTER TABLE requests ADD COLUMN saved_nanousd INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE feedback (
        request_id TEXT NOT NULL, ts_ms INTEGER NOT NULL, key_id TEXT NOT NULL, score REAL, label TEXT NOT NULL,
        comment TEXT NOT NULL
    );
    CREATE INDEX feedback_by_request ON feedback (request_id);
    """,
    "CREATE INDEX requests_by_session ON requests (session, seq) WHERE session != '';",
    """
    CREATE TABLE labels (
        label INTEGER PRIMARY KEY, key_id TEXT NOT NULL, client_dialect TEXT NOT NULL, endpoint TEXT NOT NULL,
        model TEXT NOT NULL, provider TEXT NOT NULL, upstream_model TEXT NOT NULL, stream INTEGER NOT NULL,
        status INTEGER NOT NULL, error TEXT NOT NULL, cache TEXT NOT NULL, finish_reason TEXT NOT NULL, price_id TEXT NOT NULL,
        UNIQUE (model, provider, key_id, status, upstream_model, client_dialect, endpoint, stream, error, cache,
                finish_reason, price_id)
    );
    CREATE TABLE calls (
        seq INTEGER PRIMARY KEY, label INTEGER NOT NULL, id TEXT NOT NULL, tags TEXT NOT NULL, attempts INTEGER NOT NULL,
        input_tokens INTEGER, output_tokens INTEGER, cached_tokens INTEGER, cache_write_tokens INTEGER,
        reasoning_tokens INTEGER, cost_nanousd INTEGER, latency_ms REAL NOT NULL, first_token_ms REAL, overhead_ms REAL NOT NULL,
        redactions INTEGER NOT NULL, verdicts TEXT NOT NULL, client_ip TEXT NOT NULL, user_agent TEXT NOT NULL,
        session TEXT NOT NULL, attempt_log TEXT NOT NULL, dropped TEXT NOT NULL, usage TEXT NOT NULL, notes TEXT NOT NULL,
        saved_nanousd INTEGER NOT NULL,
        block INTEGER, request_at INTEGER NOT NULL, request_bytes INTEGER NOT NULL, answer_bytes INTEGER NOT NULL
    );
    CREATE TABLE blocks_of_calls (
        block INTEGER PRIMARY KEY, seqs BLOB NOT NULL, compressed INTEGER NOT NULL, bodies BLOB NOT NULL
    );
    CREATE TABLE rollups (
        tag TEXT NOT NULL, start_s INTEGER NOT NULL, label INTEGER NOT NULL, requests INTEGER NOT NULL,
        unpriced INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
        cache_write_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL, cost_nanousd INTEGER, latency_ms REAL NOT NULL,
        first_token_ms REAL NOT NULL, first_tokens INTEGER NOT NULL, overhead_ms REAL NOT NULL, redactions INTEGER NOT NULL,
        saved_nanousd INTEGER NOT NULL, PRIMARY KEY (tag, start_s, label)
    ) WITHOUT ROWID;
    CREATE TABLE spreads (
        start_s INTEGER NOT NULL, label INTEGER NOT NULL, what INTEGER NOT NULL, step INTEGER NOT NULL, calls INTEGER NOT NULL,
        PRIMARY KEY (start_s, label, what, step)
    ) WITHOUT ROWID;

    INSERT INTO labels SELECT DISTINCT NULL, key_id, client_dialect, endpoint, model, provider, upstream_model, stream,
        status, error, cache, finish_reason, price_id FROM requests;
    INSERT INTO blocks_of_calls SELECT (MAX(ts_ms) << 10) + (block & 1023), x'', compressed, bodies
        FROM blocks JOIN requests USING (block) GROUP BY block;
    INSERT INTO calls SELECT (ts_ms << 21) + (seq & 2097151), label, id, tags, attempts, input_tokens, output_tokens,
        cached_tokens, cache_write_tokens, reasoning_tokens, cost_nanousd, latency_ms, first_token_ms, overhead_ms, redactions,
        verdicts, client_ip, user_agent, session, attempt_log, dropped, usage, notes, saved_nanousd,
        (MAX(ts_ms) OVER (PARTITION BY block) << 10) + (block & 1023), request_at, request_bytes, answer_bytes
        FROM requests JOIN labels USING (model, provider, key_id, status, upstream_model, client_dialect, endpoint, stream,
        error, cache, finish_reason, price_id);
    INSERT INTO rollups SELECT '', (seq >> 21) / 60000 * 60, label, COUNT(*), SUM(cost_nanousd IS NULL AND status < 400),
        TOTAL(input_tokens), TOTAL(output_tokens), TOTAL(cached_tokens), TOTAL(cache_write_tokens), TOTAL(reasoning_tokens),
        SUM(cost_nanousd), TOTAL(latency_ms), TOTAL(first_token_ms), COUNT(first_token_ms), TOTAL(overhead_ms),
        TOTAL(redactions), TOTAL(saved_nanousd)
        FROM calls JOIN labels USING (label) GROUP BY 2, 3;
    DROP TABLE requests;
    DROP TABLE blocks;
    ALTER TABLE blocks_of_calls RENAME TO blocks;
    CREATE INDEX calls_by_label ON calls (label);
    CREATE INDEX calls_by_session ON calls (session) WHERE session != '';
    CREATE INDEX responses_by_time ON responses (ts_ms);
    DROP INDEX cache_by_expiry;
    CREATE INDEX cache_by_expiry ON cache (expires_ms, size_bytes);
    """,
)

#: The fields of a log row as users see them, in this order; also the CSV header.
LOG_FIELDS: Final = tuple(
    "id ts key_id tags client_dialect endpoint model provider upstream_model stream status error cache "
    "attempts input_tokens output_tokens cached_tokens cache_write_tokens reasoning_tokens cost_usd price_id "
    "priced latency_ms first_token_ms overhead_ms redactions verdicts finish_reason client_ip user_agent "
    "session".split()
)
#: SQLite releases with the WAL-reset bug (https://sqlite.org/wal.html), fixed in 3.51.3, 3.50.7 and 3.44.6.
WAL_BUG_FIXED: Final = ((3, 51, 3), (3, 50, 7), (3, 44, 6))
LOGGED_BODY_MAX_BYTES: Final = 1_000_000
#: What waits for the writer, at most; past it calls are refused, so that none goes without its row.
QUEUE_MAX_ROWS: Final = 20_000
QUEUE_MAX_BYTES: Final = 256 * 1024 * 1024
COMMIT_REST_S: Final = 0.04
COMMIT_MAX_ROWS: Final = 500
COMMIT_RETRY_S: Final = 0.25
UPKEEP_REST_S: Final = 5.0
#: A row's `seq` is its time and a counter, so that order, time and id need no index of their own; a block's likewise.
SEQ_BITS: Final = 21
BLOCK_BITS: Final = 10
LABEL_FIELDS: Final = (
    "key_id", "client_dialect", "endpoint", "model", "provider", "upstream_model", "stream", "status", "error", "cache",
    "finish_reason", "price_id",
)  # fmt: skip
OWN_FIELDS: Final = tuple(
    "id tags attempts input_tokens output_tokens cached_tokens cache_write_tokens reasoning_tokens cost_nanousd latency_ms "
    "first_token_ms overhead_ms redactions verdicts client_ip user_agent session attempt_log dropped usage notes "
    "saved_nanousd".split()
)
CRASHED: Final = "crashed"


class LogRow(NamedTuple):
    """One call as it is kept: its place in time, what it has in common with others, and the columns of its own.

    `label` has the values of `LABEL_FIELDS`, `own` those of `OWN_FIELDS`.
    """

    seq: int
    label: tuple[Any, ...]
    own: tuple[Any, ...]

    def fields(self) -> Json:
        """The row by column, as it will be read; all but where its bodies lie."""
        label, own = (zip(*pair, strict=True) for pair in ((LABEL_FIELDS, self.label), (OWN_FIELDS, self.own)))
        return {"seq": self.seq, "ts_ms": self.seq >> SEQ_BITS, **dict(label), **dict(own)}


def has_wal_bug(version: tuple[int, int, int]) -> bool:
    """Whether a SQLite of this version can corrupt a WAL database that several connections checkpoint."""
    return version < WAL_BUG_FIXED[0] and not any(
        version[:2] == fixed[:2] and version >= fixed for fixed in WAL_BUG_FIXED
    )


def seq_of(call_id: str, ts_ms: int) -> int:
    """The place of a call in the log: its millisecond, then the counter that stands in its id."""
    return ts_ms << SEQ_BITS | int(call_id[-15:-8], 16) & (1 << SEQ_BITS) - 1


def log_row(call: Call) -> LogRow:
    """What is kept of a call that has ended, but for its bodies."""
    usage, endpoint = call.usage, call.endpoint
    label = (
        call.key_id, endpoint.dialect, endpoint.path, call.model[:200], call.provider, call.upstream_model, call.stream,
        call.status, call.error, call.cache, call.finish_reason, call.price_id,
    )  # fmt: skip
    tokens = (None,) * 5 if usage is None else (
        usage.input_tokens, usage.output_tokens, usage.cached_tokens,
        usage.cache_write_5m_tokens + usage.cache_write_1h_tokens, usage.reasoning_tokens,
    )  # fmt: skip
    attempts, latency_ms = call.attempts, call.latency_ms
    own = (
        call.id, call.tags, len(attempts), *tokens, call.cost_nanousd, round(latency_ms, 3),
        round((call.first_token_s - call.started_s) * 1000, 3) if call.first_token_s else None,
        round(max(0.0, latency_ms - call.upstream_s * 1000), 3), call.redactions, call.verdicts, call.client_ip,
        clean_agent(call.headers.get("user-agent", "")), call.session,
        attempts_text(call), ",".join(call.dropped) if call.dropped else "", usage_text(usage, call.usage_estimated),
        call_notes(call), call.saved_nanousd,
    )  # fmt: skip
    return LogRow(seq_of(call.id, call.ts_ms), label, own)


def intent_line(call: Call) -> bytes:
    """A call that is about to leave, as a line of the journal: what `crashed_row` needs."""
    endpoint = call.endpoint
    return dump_json((
        call.id, call.ts_ms, call.key_id, endpoint.dialect, endpoint.path, call.model[:200], call.provider,
        call.upstream_model, call.stream, call.cache, call.tags, call.session, call.client_ip,
    ))  # fmt: skip


def crashed_row(intent: Sequence[Any]) -> LogRow:
    """The row of a call that left and never ended, because the process did."""
    call_id, ts_ms, key_id, dialect, path, model, provider, upstream_model, stream, cache, tags, session, client_ip = (
        intent
    )
    label = (key_id, dialect, path, model, provider, upstream_model, stream, 500, CRASHED, cache, "", "")
    own = (call_id, tags, 1, *(None,) * 6, 0.0, None, 0.0, 0, "", client_ip, "", session, "", "", "", "", 0)
    return LogRow(seq_of(call_id, ts_ms), label, own)


@functools.lru_cache(maxsize=512)
def clean_agent(text: str) -> str:
    return text[:200].encode("utf-8", "replace").decode()


def attempts_text(call: Call) -> str:
    """The attempts as JSON; empty for the usual one without a fault, whose times `call_notes` keeps."""
    attempts = call.attempts
    if len(attempts) > 1 or call.error or (attempts and attempts[0].budget):
        return dump_json([attempt.to_json() for attempt in attempts]).decode()
    return ""


def call_notes(call: Call) -> str:
    """What `explain` tells beyond the columns, as JSON: how the name was routed, the one attempt's times, limits."""
    notes: Json = {}
    if call.output_cap is not None:
        notes["output_cap"], notes["clamped"] = call.output_cap, call.clamped
    if call.rate_hold is not None:
        notes["limits"] = [meter.scope for meter in call.rate_hold.meters]
        notes["estimated_tokens"] = call.rate_hold.tokens
    for name in ("replay_of", "shadow_of", "sent_dialect", "refusal"):
        if value := getattr(call, name):
            notes[name] = value
    if len(call.targets) > 1:
        notes["targets"] = [[target.provider.id, target.model, target.via] for target in call.targets]
    if call.targets and len(call.attempts) == 1 and not call.error:
        via, at = call.targets[0].via, call.attempts[0]
        if not notes:  # nearly every call: written without a detour
            return f'{{"via":"{via}","at":[{at.started_ms:.2f},{at.ended_ms:.2f}]}}'
        notes["at"] = [round(at.started_ms, 2), round(at.ended_ms, 2)]
    if call.targets:
        notes["via"] = call.targets[0].via
    return dump_json(notes).decode() if notes else ""


def usage_text(usage: Usage | None, estimated: bool) -> str:
    """The buckets that are not in columns of their own, as JSON; empty where there is nothing to add."""
    if usage is None:
        return ""
    rare = {
        name: value for name in ("cache_write_1h_tokens", "input_audio_tokens", "cached_audio_tokens", "output_audio_tokens",
                                 "input_image_tokens", "output_image_tokens", "searches") if (value := getattr(usage, name))
    }  # fmt: skip
    if estimated:
        rare["estimated"] = True
    return dump_json(rare).decode() if rare else ""


def format_time(ts_ms: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ts_ms / 1000)) + f".{ts_ms % 1000:03d}Z"


def public_row(row: sqlite3.Row | Json) -> Json:
    """A stored row in the fields that users see."""
    values: Json = {name: row[name] for name in row.keys() if name in LOG_FIELDS}  # noqa: SIM118 - sqlite3.Row is no dict
    values["ts"] = format_time(row["ts_ms"])
    values["stream"] = bool(row["stream"])
    values["priced"] = row["cost_nanousd"] is not None
    values["cost_usd"] = None if row["cost_nanousd"] is None else row["cost_nanousd"] / NANOUSD_PER_USD
    return {name: values[name] for name in LOG_FIELDS}


class Logged(NamedTuple):
    """A finished call on its way to the log: its row, what was asked, and what was answered or a stream's transcript."""

    row: LogRow
    asked: bytes = b""
    answered: bytes = b""
    transcript: Transcript | None = None
    usage: Usage | None = None
    #: From the journal of an earlier process, so that it may be in the database already.
    is_old: bool = False


class Write(NamedTuple):
    """A statement of ours for the writer thread, beside the log rows of its group."""

    sql: str
    parameters: tuple[Any, ...]


class StoreError(RuntimeError):
    """The data directory or the database cannot be used; the message says what to do."""


def prepare_data_dir(path: Path) -> None:
    """Make the data directory private (0700); StoreError where others could write to it or it cannot be made."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise StoreError(
            f"the data directory {path} cannot be used ({error.strerror}); set STOCKYARD_DATA_DIR to one that can"
        ) from error


def open_writer(path: Path, full_sync: bool) -> sqlite3.Connection:
    """Open the one writing connection and bring the schema up to date; StoreError with what to do otherwise."""
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
        path.chmod(0o600)
        connection.row_factory = sqlite3.Row
        if not connection.execute("PRAGMA page_count").fetchone()[0]:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # later it would do nothing
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {'FULL' if full_sync else 'NORMAL'}")
        connection.execute(f"PRAGMA journal_size_limit = {64 * 1024 * 1024}")
        migrate(connection, path)
        for table in ("ledger", "keys", "budgets"):  # what money and access hang on; the log itself would take long
            if (found := connection.execute(f"PRAGMA quick_check('{table}')").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)
    except sqlite3.DatabaseError as error:
        raise StoreError(
            f"{path} cannot be opened ({error}); nothing was changed. Move it away to start anew, or recover it: sqlite3 {path.name} .recover"
        ) from error
    return connection


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{path} was written by a newer Stockyard (schema {version}, this one knows {len(MIGRATIONS)}); run that one"
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")


def open_reader(path: Path) -> sqlite3.Connection:
    """A read-only connection: it can neither write nor checkpoint."""
    connection = sqlite3.connect(
        f"file:{urllib.parse.quote(str(path))}?mode=ro", uri=True, check_same_thread=False, timeout=5.0
    )
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    return connection


@dataclass(slots=True)
class Group:
    """What one commit takes from the queue: calls, statements, and what is to be done once they are committed."""

    rows: list[Logged] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    barriers: list[Callable[[], object]] = field(default_factory=list)
    size_bytes: int = 0


def may_pass(error: Exception) -> bool:
    """Whether it is the disk or a foreign lock that stands in the way, and not what was to be written."""
    return type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError)


class LogStore:
    """The request log: `begin` and `put` from the event loop, everything else in threads. One writer connection and thread.

    `keep_ms` and `max_bytes` bound the log; the bodies of the oldest calls go first, then their rows.
    """

    def __init__(
        self, path: Path, *, bodies: bool = True, full_sync: bool = False, keep_ms: float = math.inf, max_bytes: float = math.inf,
        now_ms: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:  # fmt: skip
        self.path, self.full_sync = path, full_sync
        self.lost_rows = self.crashed_rows = 0
        self.last_error = ""
        self._bodies, self._keep_ms, self._max_bytes, self._now_ms = bodies, keep_ms, max_bytes, now_ms
        self._connection = open_writer(path, full_sync)
        self._labels: dict[tuple[Any, ...], int] = {}
        self._tags_of_hour: tuple[int, set[str]] = (0, set())
        self._last_block = self._connection.execute("SELECT MAX(block) FROM blocks").fetchone()[0] or 0
        self._queue: collections.deque[Logged | Write | Callable[[], object]] = collections.deque()
        self._group: Group | None = None  # could not be committed, and is tried again
        self._queued_bytes = self._written_bytes = 0
        self._wake, self._hurry = threading.Event(), threading.Event()
        self._closing = False
        self._upkeep_at_s = self._folded_s = self._fold_at_s = 0.0
        self._reader: sqlite3.Connection | None = None
        self._reader_lock, self._backup_lock = threading.Lock(), threading.Lock()
        self.journal = self._replay()
        self._thread = threading.Thread(target=self._run, name="stockyard-log", daemon=True)
        self._thread.start()

    def _replay(self) -> CallJournal:
        """Take over what the last process wrote to its journal and not to SQLite; calls that never ended have crashed."""
        directory = self.path.parent
        last, ended, intents = CallJournal.leftovers(directory)
        self.crashed_rows = len(intents)
        journal = CallJournal(directory, last + 1, self.full_sync)
        self._queue.extend(Logged(row, is_old=True) for row in [*ended, *map(crashed_row, intents)])
        if last:
            self._queue.append(functools.partial(journal.drop_before, last + 1))
        return journal

    # -- event loop side

    @property
    def is_full(self) -> bool:
        return len(self._queue) >= QUEUE_MAX_ROWS or self._queued_bytes - self._written_bytes >= QUEUE_MAX_BYTES

    @property
    def is_behind(self) -> bool:
        """Whether the writer has enough to do, so that only what must be kept should be put."""
        return len(self._queue) >= QUEUE_MAX_ROWS // 16

    def trouble(self) -> str:
        """Why rows cannot be written now; empty where they can. What has passed is noticed by asking."""
        if self.journal.error:
            self.journal.keep(b"")
        return self.last_error or self.journal.error

    def begin(self, call: Call) -> None:
        """Note that a call is about to leave, so that it has a row even if this process ends before it does."""
        self.journal.begin(call.id, intent_line(call))

    def put(self, call: Call) -> None:
        """Hand a finished call over. Never blocks; never raises. A kill from here on does not lose its row.

        The row is made here, so that a call's objects die where and while they are in the processor's cache.
        """
        asked = (call.sent_body or call.body)[:LOGGED_BODY_MAX_BYTES]
        transcript = None if call.answer else call.transcript
        row, answered = log_row(call), call.answer[:LOGGED_BODY_MAX_BYTES]
        journal = self.journal
        journal.end(call.id, dump_json(tuple(row)))  # orjson takes no named tuples
        self._queued_bytes += len(asked) + len(answered)
        self._queue.append(Logged(row, asked, answered, transcript, call.usage))
        if journal.is_long:
            self._queue.append(functools.partial(journal.drop_before, journal.turn()))
        if not self._wake.is_set():
            self._wake.set()

    def put_write(self, sql: str, *parameters: Any) -> None:
        """Hand one statement over, to be committed with the rows around it."""
        self._queue.append(Write(sql, parameters))
        self._wake.set()

    async def flush(self, patience_s: float = 10.0) -> None:
        """Return once everything handed over before is committed; StorageUnavailable where it cannot be in time."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        self._queue.append(lambda: loop.call_soon_threadsafe(done.set))
        self._hurry.set()
        self._wake.set()
        try:
            await asyncio.wait_for(done.wait(), patience_s)
        except TimeoutError:
            raise StorageUnavailable("the database cannot be written now; see the disk") from None

    async def catch_up(self) -> None:
        """Before reading: have what was handed over committed, but do not wait for a disk that is stuck."""
        if not self.last_error:
            with contextlib.suppress(StorageUnavailable):
                await self.flush(1.0)

    def close(self) -> None:
        """Write what is left; what cannot be written stays in the journal for the next start."""
        self._closing = True
        self._hurry.set()
        self._wake.set()
        self._thread.join(timeout=30)
        self.journal.close(all_is_written=not self._queue and self._group is None)
        if self._reader is not None:
            self._reader.close()
        self._connection.close()

    # -- writer thread

    def _run(self) -> None:
        while True:
            self._wake.wait(max(0.0, self._upkeep_at_s - time.monotonic()))
            self._wake.clear()
            while True:
                committed = self._commit_group()
                if self._closing and not (committed and self._queue):
                    return
                self._keep_up()
                if committed and len(self._queue) < COMMIT_MAX_ROWS and not self._closing:
                    break
            # Rest, so that rows gather while the loop works: small groups cost it the interpreter lock each time.
            self._hurry.wait(COMMIT_REST_S)
            self._hurry.clear()

    def _take(self) -> Group:
        group, queue = Group(), self._queue
        while queue and len(group.rows) < COMMIT_MAX_ROWS and group.size_bytes < 32 * LOGGED_BODY_MAX_BYTES:
            item = queue.popleft()
            if isinstance(item, Write):
                group.writes.append(item)
            elif isinstance(item, Logged):
                group.rows.append(item)
                group.size_bytes += len(item.asked) + len(item.answered)
            else:
                group.barriers.append(item)
        return group

    def _commit_group(self) -> bool:
        group = self._group = self._group or self._take()
        try:
            if group.rows or group.writes:
                self._write(group)
        except Exception as error:
            if not self._give_way(group, error):
                return False
        self._group = None
        self._written_bytes += group.size_bytes
        self.last_error = ""
        for barrier in group.barriers:
            with contextlib.suppress(RuntimeError, OSError):  # a loop that has ended, a file that is gone
                barrier()
        return True

    def _give_way(self, group: Group, error: Exception) -> bool:
        """After a failure: wait where it may pass (a full disk, a foreign lock), else lose as little as possible."""
        self.last_error = f"{type(error).__name__}: {error}"
        if not may_pass(error):
            try:
                self._write_singly(group)
                return True
            except sqlite3.DatabaseError as passing:  # the whole group again; what was written of it is noticed
                self.last_error = f"{type(passing).__name__}: {passing}"
        time.sleep(COMMIT_RETRY_S)
        return False

    def _write_singly(self, group: Group) -> None:
        """Something in a group cannot be written as it is; the rest of it must be."""
        for call in group.rows:
            if not self._has_row(call.row):
                self._write_one(Group(rows=[call._replace(row=self._repaired(call.row))]))
        for write in group.writes:
            self._write_one(Group(writes=[write]))

    def _write_one(self, group: Group) -> None:
        try:
            self._write(group)
        except Exception as error:
            if may_pass(error):
                raise
            self.lost_rows += len(group.rows)

    def _has_row(self, row: LogRow) -> bool:
        sql = "SELECT 1 FROM calls WHERE seq BETWEEN ? AND ? AND id = ?"
        return self._connection.execute(sql, (row.seq, row.seq + 8, row.own[0])).fetchone() is not None

    def _repaired(self, row: LogRow) -> LogRow:
        """The row in a free place, its texts and numbers such as SQLite takes."""
        seq = row.seq
        while self._connection.execute("SELECT 1 FROM calls WHERE seq = ?", (seq,)).fetchone():
            seq += 1
        label, own = (
            [min(value, 2**63 - 1) if isinstance(value, int) else value for value in orjson.loads(dump_json(values))]
            for values in (row.label, row.own)
        )
        return LogRow(seq, tuple(label), tuple(own))

    def _write(self, group: Group) -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            if group.rows:
                self._insert([call for call in group.rows if not (call.is_old and self._has_row(call.row))])
            for write in group.writes:
                connection.execute(write.sql, write.parameters)
            connection.execute("COMMIT")
        except Exception:
            self._labels.clear()
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _insert(self, calls: list[Logged]) -> None:
        """The rows of a group, the block of their bodies, and their sums."""
        rows = [call.row for call in calls]
        labels = [self._label(row.label) for row in rows]
        block, places = self._keep_bodies(calls)
        insert_rows(self._connection, [
            (row.seq, label, *row.own, block, *place) for row, label, place in zip(rows, labels, places, strict=True)
        ])  # fmt: skip
        self._roll_up(rows)
        spreads = collections.Counter(
            step for row, label in zip(rows, labels, strict=True) for step in steps_of(row, label)
        )
        self._connection.executemany(ADD_SPREAD, [(*step, calls) for step, calls in spreads.items()])

    def _label(self, values: tuple[Any, ...]) -> int:
        label = self._labels.get(values)
        if label is None:
            if len(self._labels) > 20_000:
                self._labels.clear()
            sql = f"SELECT label FROM labels WHERE {' AND '.join(f'{name} = ?' for name in LABEL_FIELDS)}"  # noqa: S608 - our names
            known = self._connection.execute(sql, values).fetchone()
            sql = f"INSERT INTO labels VALUES (NULL{', ?' * len(LABEL_FIELDS)})"  # noqa: S608 - question marks only
            label = known[0] if known else self._connection.execute(sql, values).lastrowid
            self._labels[values] = cast(int, label)
        return cast(int, label)

    def _keep_bodies(self, calls: list[Logged]) -> tuple[int, list[tuple[int, int, int]]]:
        """Write the bodies of a group as one block, which also tells its rows; its number, and each call's place in it."""
        places: list[tuple[int, int, int]] = []
        bodies: list[bytes] = []
        at = 0
        for call in calls if self._bodies else ():
            answered = call.answered if call.transcript is None else self._assembled(call.transcript, call.usage)
            places.append((at, len(call.asked), len(answered)))
            bodies += (call.asked, answered)
            at += len(call.asked) + len(answered)
        raw = b"".join(bodies)
        stored = zlib.compress(raw, 1) if at > 512 else raw
        block = self._last_block = max(self._last_block + 1, self._now_ms() << BLOCK_BITS)
        seqs = struct.pack(f"<{len(calls)}q", *[call.row.seq for call in calls])
        self._connection.execute("INSERT INTO blocks VALUES (?, ?, ?, ?)", (block, seqs, at > 512, stored))
        return block, places or [(0, 0, 0)] * len(calls)

    @staticmethod
    def _assembled(transcript: Transcript, usage: Usage | None) -> bytes:
        """What a stream said, as the plain answer it stands for."""
        completion = transcript.completion()
        if usage is not None:
            completion["usage"] = write_openai_usage(usage)
        return dump_json(completion)[:LOGGED_BODY_MAX_BYTES]

    def _roll_up(self, rows: list[LogRow]) -> None:
        """Add the rows to the sums of their minutes; to those of their tags as well, where they have any."""
        tagged: dict[str, list[int]] = {"": [row.seq for row in rows]}
        for row in rows:
            for tag in row.own[1].split(",") if row.own[1] else ():
                tagged.setdefault(self._known_tag(tag), []).append(row.seq)
        for tag, seqs in tagged.items():
            self._connection.execute(ROLL_UP, (tag, dump_json(seqs).decode()))

    def _known_tag(self, tag: str) -> str:
        """The tag; one word for the rest where a client makes up new tags without end."""
        hour = self._now_ms() // 3_600_000
        if self._tags_of_hour[0] != hour:
            self._tags_of_hour = (hour, set())
        known = self._tags_of_hour[1]
        if len(known) < TAGS_PER_HOUR or tag in known:
            known.add(tag)
            return tag[:200]
        return "(others)"

    # -- writer thread: the bounds

    def _keep_up(self) -> None:
        """One small step of upkeep where one is due; the next at once where there is more to do."""
        if time.monotonic() < self._upkeep_at_s or self._closing:
            return
        more = False
        with contextlib.suppress(sqlite3.Error):  # a disk that is full or locked is told by the rows
            more = self._prune() or self._shrink() or self._fold()
        self._upkeep_at_s = time.monotonic() + (0.0 if more else UPKEEP_REST_S)

    def _pages(self, what: str) -> int:
        return int(self._connection.execute(f"PRAGMA {what}").fetchone()[0])

    def _log_bytes(self) -> float:
        """What the log takes of the file: neither free pages nor the cache, which has a bound of its own."""
        used = (self._pages("page_count") - self._pages("freelist_count")) * self._pages("page_size")
        if used > self._max_bytes:
            used -= self._connection.execute("SELECT TOTAL(size_bytes) FROM cache").fetchone()[0]
        return used

    def _prune(self) -> bool:
        """Drop some of what is too old; where the log is too large, of its oldest bodies, then of its oldest rows."""
        delete = self._connection.execute
        cutoff_ms = int(self._now_ms() - self._keep_ms) if self._keep_ms < math.inf else 0
        dropped = delete(PRUNE_BLOCKS, (cutoff_ms << BLOCK_BITS, 16)).rowcount
        dropped += delete(PRUNE_CALLS, (cutoff_ms << SEQ_BITS, 1000)).rowcount
        dropped += delete(PRUNE_RESPONSES, (cutoff_ms,)).rowcount
        dropped += delete(PRUNE_FEEDBACK, (cutoff_ms,)).rowcount
        if not dropped and self._log_bytes() > self._max_bytes:
            dropped = delete(PRUNE_BLOCKS, (2**62, 16)).rowcount or delete(PRUNE_CALLS, (2**62, 1000)).rowcount
        return dropped > 0

    def _shrink(self) -> bool:
        """Give free pages back to the disk, where they are many."""
        free = self._pages("freelist_count")
        if free < 4096 or free * 8 < self._pages("page_count") or self._pages("auto_vacuum") != 2:
            return False
        self._connection.executescript("PRAGMA incremental_vacuum(512)")  # `execute` would stop after one page
        return True

    def _fold(self) -> bool:
        """Old sums of minutes become sums of hours, and those become sums of days."""
        now_s = self._now_ms() // 1000
        if now_s < self._fold_at_s:
            return False
        self._fold_at_s = now_s + 3600
        for table, fold, span_s, kept_s in FOLDS:
            bounds = {"span": span_s, "before": (now_s - kept_s) // 86_400 * 86_400}
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.execute(fold, bounds)
                connection.execute(f"DELETE FROM {table} WHERE start_s < :before AND start_s % :span", bounds)  # noqa: S608 - rows of FOLDS
                connection.execute("COMMIT")
            except sqlite3.Error:
                connection.execute("ROLLBACK")
                raise
        return False

    # -- readers (any thread)

    def read(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        """Run one query of ours on the read-only connection."""
        with self._reader_lock:
            if self._reader is None:
                self._reader = open_reader(self.path)
            return self._reader.execute(sql, parameters).fetchall()

    def snapshot(self) -> BinaryIO:
        """A whole and consistent copy of the database as of now, as an open file that is gone once it is closed."""
        path = self.path.with_suffix(".backup")
        with self._backup_lock:
            path.unlink(missing_ok=True)
            with contextlib.closing(open_reader(self.path)) as connection:
                connection.execute("VACUUM INTO ?", (str(path),))
            file = open(path, "rb")  # noqa: SIM115 - closed by whoever reads it
            path.unlink()
        return file


ROW_VALUES: Final = f"({', '.join('?' * (2 + len(OWN_FIELDS) + 4))})"


def insert_rows(connection: sqlite3.Connection, rows: list[tuple[Any, ...]]) -> None:
    """Insert rows, many with one statement: each step of SQLite lets go of the interpreter lock and must win it back."""
    at = 0
    for count in (64, 8, 1):
        statement = "INSERT INTO calls VALUES " + ", ".join([ROW_VALUES] * count)  # noqa: S608 - question marks only
        while len(rows) - at >= count:
            connection.execute(statement, [value for row in rows[at : at + count] for value in row])
            at += count


TAGS_PER_HOUR: Final = 1000
#: The columns of `rollups` that are sums, in order; each with what it is the sum of.
SUMS: Final[Mapping[str, str]] = {
    "requests": "COUNT(*)", "unpriced": "SUM(cost_nanousd IS NULL AND status < 400)", "input_tokens": "TOTAL(input_tokens)",
    "output_tokens": "TOTAL(output_tokens)", "cached_tokens": "TOTAL(cached_tokens)",
    "cache_write_tokens": "TOTAL(cache_write_tokens)", "reasoning_tokens": "TOTAL(reasoning_tokens)",
    "cost_nanousd": "SUM(cost_nanousd)", "latency_ms": "TOTAL(latency_ms)", "first_token_ms": "TOTAL(first_token_ms)",
    "first_tokens": "COUNT(first_token_ms)", "overhead_ms": "TOTAL(overhead_ms)", "redactions": "TOTAL(redactions)",
    "saved_nanousd": "TOTAL(saved_nanousd)",
}  # fmt: skip
#: A sum that is null (the cost of calls that have none) stays so until there is something to add.
_ADD: Final = ", ".join(f"{name} = COALESCE({name} + excluded.{name}, {name}, excluded.{name})" for name in SUMS)
_UPSERT: Final = f"ON CONFLICT (tag, start_s, label) DO UPDATE SET {_ADD}"
ROLL_UP: Final = (
    f"INSERT INTO rollups SELECT ?, (seq >> {SEQ_BITS}) / 60000 * 60, label, {', '.join(SUMS.values())} "  # noqa: S608 - our names
    "FROM json_each(?) AS wanted CROSS JOIN calls ON seq = wanted.value CROSS JOIN labels USING (label) "
    f"WHERE 1 GROUP BY 2, 3 {_UPSERT}"
)
FOLD_ROLLUPS: Final = (
    f"INSERT INTO rollups SELECT tag, start_s - start_s % :span, label, {', '.join(f'SUM({name})' for name in SUMS)} "  # noqa: S608 - our names
    f"FROM rollups WHERE start_s < :before AND start_s % :span GROUP BY 1, 2, 3 {_UPSERT}"
)
#: How many calls took about how long, for quantiles: by hour and label, of the whole call (0) and of the first token (1).
#: A step is an eighth of a doubling, so that a quantile read from it is off by 5 % at the most.
STEPS_PER_DOUBLING: Final = 8
ADD_SPREAD: Final = (
    "INSERT INTO spreads VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET calls = calls + excluded.calls"
)
FOLD_SPREADS: Final = (
    "INSERT INTO spreads SELECT start_s - start_s % :span, label, what, step, SUM(calls) FROM spreads "
    "WHERE start_s < :before AND start_s % :span GROUP BY 1, 2, 3, 4 ON CONFLICT DO UPDATE SET calls = calls + excluded.calls"
)


#: What is folded into buckets of how many seconds, once it is so old.
FOLDS: Final = (
    ("rollups", FOLD_ROLLUPS, 3600, 2 * 86_400),
    ("rollups", FOLD_ROLLUPS, 86_400, 90 * 86_400),
    ("spreads", FOLD_SPREADS, 86_400, 8 * 86_400),
)


def steps_of(row: LogRow, label: int) -> Iterator[tuple[int, int, int, int]]:
    """The rows of `spreads` that a call counts in: its whole time if it was answered, and its first token's."""
    hour_s = (row.seq >> SEQ_BITS) // 3_600_000 * 3600
    _, _, _, _, _, _, _, _, _, latency_ms, first_token_ms, *_ = row.own
    if row.label[7] < 400:
        yield hour_s, label, 0, round(math.log2(max(latency_ms, 0.001)) * STEPS_PER_DOUBLING)
    if first_token_ms is not None:
        yield hour_s, label, 1, round(math.log2(max(first_token_ms, 0.001)) * STEPS_PER_DOUBLING)


def quantiles_of(steps: Sequence[tuple[int, int]]) -> Json:
    """p50, p95 and p99 in milliseconds from (step, calls) in ascending order; null where there are none."""
    total, told = sum(calls for _, calls in steps), cast(Json, dict.fromkeys(QUANTILES))
    for name, share in QUANTILES.items():
        below = 0
        for step, calls in steps:
            below += calls
            if below >= share * total:
                told[name] = round(2 ** (step / STEPS_PER_DOUBLING), 3)
                break
    return told


PRUNE_BLOCKS: Final = (
    "DELETE FROM blocks WHERE block IN (SELECT block FROM blocks WHERE block < ? ORDER BY block LIMIT ?)"
)
PRUNE_CALLS: Final = "DELETE FROM calls WHERE seq IN (SELECT seq FROM calls WHERE seq < ? ORDER BY seq LIMIT ?)"
PRUNE_FEEDBACK: Final = (  # in the order in which it was said, so the oldest are looked at first
    "DELETE FROM feedback WHERE rowid IN "
    "(SELECT place FROM (SELECT rowid AS place, ts_ms FROM feedback ORDER BY rowid LIMIT 20) WHERE ts_ms < ?)"
)
PRUNE_RESPONSES: Final = (
    "DELETE FROM responses WHERE id IN (SELECT id FROM responses WHERE ts_ms < ? ORDER BY ts_ms LIMIT 20)"
)

#: Filters on what calls have in common, and on the row itself. `before` is the cursor.
LABEL_FILTERS: Final[Mapping[str, str]] = {
    "model": "(model = :model OR upstream_model = :model)",
    "provider": "provider = :provider",
    "key": "key_id = :key",
    "status": "status BETWEEN :status_low AND :status_high",
    "error": "error = :error",
    "cache": "cache = :cache",
}
ROW_FILTERS: Final[Mapping[str, str]] = {
    "session": "session = :session AND session != ''",  # so that the index of those that have one serves
    "tag": "instr(',' || tags || ',', ',' || :tag || ',')",
}
LOG_FILTERS: Final = (*LABEL_FILTERS, *ROW_FILTERS, "q", "since", "until", "before")
SELECT_CALLS: Final = f"SELECT calls.*, labels.*, seq >> {SEQ_BITS} AS ts_ms FROM calls CROSS JOIN labels USING (label)"  # noqa: S608 - our names


@dataclass(frozen=True, slots=True)
class LogFilter:
    """What is wanted of the log: a range of `seq`, conditions on labels and on rows with their parameters, and a text."""

    low: int
    high: int
    labels: tuple[str, ...]
    rows: tuple[str, ...]
    parameters: Json
    text: str = ""


def log_filter(wanted: Mapping[str, str], now_ms: int, known: Sequence[str] = LOG_FILTERS) -> LogFilter:
    """Read filters as a user gives them; InvalidRequest for one that is not known or not understood."""
    low, high, parameters = 0, 2**63 - 1, cast(Json, {})
    for name, text in wanted.items():
        if name not in known:
            raise InvalidRequest(f"unknown filter {name!r}; known are {', '.join(known)}", param=name)
        if name == "status":
            parameters["status_low"], parameters["status_high"] = parse_status_range(text)
        elif name == "since":
            low = parse_time(text, now_ms) << SEQ_BITS
        elif name == "until":
            high = min(high, parse_time(text, now_ms) << SEQ_BITS)
        elif name == "before":
            high = min(high, int(text) if text.isdigit() else 0)
        else:
            parameters[name] = text
    labels = tuple(clause for name, clause in LABEL_FILTERS.items() if name in wanted)
    rows = tuple(clause for name, clause in ROW_FILTERS.items() if name in wanted)
    return LogFilter(low, high, labels, rows, parameters, wanted.get("q", ""))


def parse_status_range(text: str) -> tuple[int, int]:
    """`429`, or a class such as `5xx`, `error` (400 and up) or `ok` (below 400)."""
    words = {"ok": (0, 399), "error": (400, 999)}
    if text in words:
        return words[text]
    if re.fullmatch(r"[1-5]xx", text):
        return int(text[0]) * 100, int(text[0]) * 100 + 99
    if text.isdigit():
        return int(text), int(text)
    raise InvalidRequest(f"status {text!r} is not understood; use 429, 5xx, ok or error", param="status")


def parse_time(text: str, now_ms: int) -> int:
    """A moment as Unix milliseconds: `15m`, `24h`, `7d` ago, an ISO time (UTC unless it says), or Unix seconds."""
    ago = re.fullmatch(r"(\d+)([smhdw])", text)
    if ago:
        return now_ms - int(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[ago[2]] * 1000
    if re.fullmatch(r"\d{9,11}(\.\d+)?", text):
        return int(float(text) * 1000)
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(f"the time {text!r} is not understood; use 24h, 7d, or 2026-11-22T10:00") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp() * 1000)


#: One page looks at so much at most: rows for a tag or a text, and time. The cursor goes on from there.
PAGE_MAX_S: Final = 0.25
PAGE_STEP_ROWS: Final = 500
LABELS_MAX: Final = 2000


@dataclass(frozen=True, slots=True)
class Page:
    """Rows, the newest first, and the cursor to go on from; None where there is no more."""

    rows: list[sqlite3.Row]
    cursor: int | None


def find_requests(store: LogStore, wanted: Mapping[str, str], limit: int, now_ms: int) -> list[sqlite3.Row]:
    return find_page(store, wanted, limit, now_ms).rows


def find_page(store: LogStore, wanted: Mapping[str, str], limit: int, now_ms: int) -> Page:
    """One page of the log. With a text or a tag it may hold fewer rows than `limit` and still have a next one."""
    asked = log_filter(wanted, now_ms)
    labels = wanted_labels(store, asked) if asked.labels else None
    if not asked.text and "tag" not in asked.parameters:
        rows = newest_rows(store, asked, labels, asked.high, limit + 1)
        return Page(rows[:limit], rows[limit - 1]["seq"] if len(rows) > limit else None)
    found: list[sqlite3.Row] = []
    cursor, give_up_s, needles = asked.high, time.monotonic() + PAGE_MAX_S, text_needles(asked.text)
    blocks: dict[int, bytes] = {}
    while time.monotonic() < give_up_s:
        rows = newest_rows(store, asked, labels, cursor, PAGE_STEP_ROWS)
        for row in rows:
            if needles is None or says(store, row, needles, blocks):
                found.append(row)
                if len(found) == limit:
                    return Page(found, row["seq"])
            cursor = row["seq"]
        if len(rows) < PAGE_STEP_ROWS:
            return Page(found, None)
    return Page(found, cursor)


def rows_where(asked: LogFilter) -> tuple[str, Json]:
    """The condition on rows joined with their labels; for questions about many of them."""
    parameters = {**asked.parameters, "low": asked.low, "high": asked.high}
    return " AND ".join(["seq >= :low", "seq < :high", *asked.rows, *asked.labels]), parameters


def wanted_labels(store: LogStore, asked: LogFilter) -> list[int]:
    sql = f"SELECT label FROM labels WHERE {' AND '.join(asked.labels)}"  # noqa: S608 - clauses of LABEL_FILTERS
    return [row["label"] for row in store.read(sql, asked.parameters)]


def newest_rows(
    store: LogStore, asked: LogFilter, labels: list[int] | None, high: int, limit: int
) -> list[sqlite3.Row]:
    """The newest rows below `high` that fit. Each label has its rows in order in one index; the newest of all are wanted."""
    parameters = {**asked.parameters, "low": asked.low, "high": high, "limit": limit}
    clauses = ["seq >= :low", "seq < :high", *asked.rows]
    if labels is not None and asked.rows:
        clauses.append("label IN (SELECT value FROM json_each(:labels))")
        parameters["labels"] = dump_json(labels).decode()
    elif labels is not None and len(labels) <= LABELS_MAX:
        own = "SELECT seq FROM calls WHERE label = ? AND seq >= ? AND seq < ? ORDER BY seq DESC LIMIT ?"
        seqs = [row["seq"] for label in labels for row in store.read(own, (label, asked.low, high, limit))]
        clauses.append("seq IN (SELECT value FROM json_each(:seqs))")
        parameters["seqs"] = dump_json(sorted(seqs, reverse=True)[:limit]).decode()
    elif labels is not None:
        clauses += asked.labels
    sql = f"{SELECT_CALLS} WHERE {' AND '.join(clauses)} ORDER BY seq DESC LIMIT :limit"
    return store.read(sql, parameters)


def text_needles(text: str) -> tuple[bytes, ...] | None:
    """How a text may stand in a body: as it is, or with JSON's escapes. Bodies are compared in ASCII's small letters."""
    if not text:
        return None
    texts = (text, text.lower())
    forms = {*texts, *(json.dumps(form, ensure_ascii=escaped)[1:-1] for form in texts for escaped in (True, False))}
    return tuple(form.encode("utf-8", "replace").lower() for form in forms)


def says(store: LogStore, row: sqlite3.Row, needles: tuple[bytes, ...], blocks: dict[int, bytes]) -> bool:
    """Whether a call's bodies hold one of the texts. Blocks are looked at in order, so the last few are kept."""
    block = row["block"]
    if block not in blocks:
        while len(blocks) > 3:
            del blocks[next(iter(blocks))]
        blocks[block] = read_block(store, block).lower()
    end = row["request_at"] + row["request_bytes"] + row["answer_bytes"]
    return any(blocks[block].find(needle, row["request_at"], end) >= 0 for needle in needles)


def export_rows(store: LogStore, wanted: Mapping[str, str], now_ms: int) -> Iterator[list[Json]]:
    """All rows that fit, the newest first, in steps, so that neither memory nor the database's log of writes grows."""
    cursor: int | None = None
    while True:
        page = find_page(store, {**wanted, "before": str(cursor)} if cursor else wanted, PAGE_STEP_ROWS, now_ms)
        yield [public_row(row) for row in page.rows]
        if (cursor := page.cursor) is None:
            return


def find_new_requests(
    store: LogStore, block: int, wanted: Mapping[str, str], now_ms: int
) -> tuple[list[sqlite3.Row], int]:
    """Rows committed after this block, in their order, that fit; and the last block."""
    asked, rows = log_filter(wanted, now_ms), cast(list[sqlite3.Row], [])
    needles = text_needles(asked.text)
    clauses = " AND ".join(["seq IN (SELECT value FROM json_each(:seqs))", *asked.labels, *asked.rows])
    for found in store.read("SELECT block, seqs FROM blocks WHERE block > ? ORDER BY block LIMIT 100", (block,)):
        block = found["block"]
        seqs = struct.unpack(f"<{len(found['seqs']) // 8}q", found["seqs"])
        parameters = {**asked.parameters, "seqs": dump_json(seqs).decode()}
        fresh = store.read(f"{SELECT_CALLS} WHERE {clauses} ORDER BY seq", parameters)
        rows += [row for row in fresh if needles is None or says(store, row, needles, {})]
    return rows, block


def last_block(store: LogStore) -> int:
    return cast(int, store.read("SELECT MAX(block) AS block FROM blocks")[0]["block"] or 0)


def time_of_id(request_id: str) -> int | None:
    """The Unix milliseconds that stand in an id; None where it is none of ours."""
    found = re.fullmatch(rf"[a-z]+_([{CROCKFORD}]{{9}})[0-9a-f]{{7}}[{CROCKFORD}]{{8}}", request_id)
    return functools.reduce(lambda value, letter: value * 32 + CROCKFORD.index(letter), found[1], 0) if found else None


def find_row(store: LogStore, request_id: str) -> sqlite3.Row | None:
    """The row of an id: its time stands in it, give or take what passed between two looks at the clock."""
    at_ms = time_of_id(request_id)
    if at_ms is None:
        return None
    bounds = (at_ms - 2000 << SEQ_BITS, at_ms + 1 << SEQ_BITS, request_id)
    rows = store.read(f"{SELECT_CALLS} WHERE seq > ? AND seq < ? AND id = ? ORDER BY seq DESC LIMIT 1", bounds)
    return rows[0] if rows else None


def find_request(store: LogStore, request_id: str) -> Json | None:
    """One row with all that is kept of it; None where the id is unknown.

    Beside the log fields: `attempt_log`, `spans`, `dropped`, `usage` (rare buckets), `saved_usd`, `notes` (see
    `call_notes`), `feedback`, `request` and `response` (as logged: null where no body was kept).
    """
    row = find_row(store, request_id)
    if row is None:
        return None
    asked, answered = read_bodies(store, row)
    notes = orjson.loads(row["notes"]) if row["notes"] else {}
    attempts = orjson.loads(row["attempt_log"]) if row["attempt_log"] else []
    if "at" in notes and not attempts:
        started_ms, ended_ms = notes["at"]
        attempts = [Attempt(row["provider"], row["upstream_model"], started_ms, ended_ms, 200).to_json()]
    found = public_row(row)
    return {
        **found,
        "attempt_log": attempts,
        "spans": spans_of(found, attempts),
        "dropped": [name for name in row["dropped"].split(",") if name],
        "usage": orjson.loads(row["usage"]) if row["usage"] else {},
        "saved_usd": row["saved_nanousd"] / NANOUSD_PER_USD,
        "notes": notes,
        "feedback": find_feedback(store, request_id),
        "request": body_json(asked),
        "response": body_json(answered),
    }


def read_block(store: LogStore, block: int | None) -> bytes:
    """The bodies of a group of calls; empty where they have been dropped."""
    found = store.read("SELECT compressed, bodies FROM blocks WHERE block = ?", (block,))
    if not found:
        return b""
    return zlib.decompress(found[0]["bodies"]) if found[0]["compressed"] else cast(bytes, found[0]["bodies"])


def spans_of(found: Json, attempts: Sequence[Json]) -> list[Json]:
    """What took how long, as `{"name", "start_ms", "end_ms"}` from the start of the call, for a waterfall."""
    spans = [("call", 0.0, found["latency_ms"])]
    if attempts:
        spans.append(("admit, read, route", 0.0, attempts[0]["started_ms"]))
    spans += [
        (f"attempt {number}: {line['provider']}", line["started_ms"], line["ended_ms"])
        for number, line in enumerate(attempts, 1)
    ]
    if found["first_token_ms"] is not None:
        spans.append(("stream", found["first_token_ms"], found["latency_ms"]))
    return [{"name": name, "start_ms": start_ms, "end_ms": end_ms} for name, start_ms, end_ms in spans]


def find_feedback(store: LogStore, request_id: str) -> list[Json]:
    """What people said of an answer, the oldest first."""
    rows = store.read("SELECT * FROM feedback WHERE request_id = ? ORDER BY rowid", (request_id,))
    return [
        {"ts": format_time(row["ts_ms"]), **{name: row[name] for name in ("key_id", "score", "label", "comment")}}
        for row in rows
    ]


def read_bodies(store: LogStore, row: sqlite3.Row) -> tuple[bytes, bytes]:
    raw, at = read_block(store, row["block"]), row["request_at"]
    middle = at + row["request_bytes"]
    return raw[at:middle], raw[middle : middle + row["answer_bytes"]]


def body_json(body: bytes) -> Any:
    """A logged body for people: JSON where it is, text where not, null where none was kept."""
    try:
        return orjson.loads(body) if body else None
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response of /v1/responses that may be continued: whole where Stockyard keeps it, else only whose it is."""

    id: str
    provider: str
    response: Json | None
    items: list[Json]


def keep_response(
    store: LogStore, call: Call, response_id: str, response: Json | None, items: list[Json] | None
) -> None:
    packed = [zlib.compress(dump_json(value), 1) if value is not None else None for value in (response, items)]
    row = (response_id, call.ts_ms, call.key_id, call.provider, *packed)
    store.put_write("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)", *row)


def find_response(store: LogStore, response_id: str, key_id: str) -> StoredResponse | None:
    """A stored response of this key; another key's is not found."""
    rows = store.read("SELECT * FROM responses WHERE id = ? AND key_id = ?", (response_id, key_id))
    if not rows:
        return None
    response, items = (
        orjson.loads(zlib.decompress(rows[0][name])) if rows[0][name] else None for name in ("response", "items")
    )
    return StoredResponse(response_id, rows[0]["provider"], response, items or [])


def find_items(store: LogStore, ids: Sequence[str], key_id: str) -> dict[str, Json]:
    """Stored items by id, from this key's newest responses."""
    wanted, found = set(ids), cast(dict[str, Json], {})
    rows = store.read(
        "SELECT items FROM responses WHERE key_id = ? AND items IS NOT NULL ORDER BY ts_ms DESC LIMIT 1000", (key_id,)
    )
    for row in rows:
        for item in orjson.loads(zlib.decompress(row["items"])):
            if item.get("id") in wanted:
                found.setdefault(item["id"], item)
        if len(found) == len(wanted):
            break
    return found


SPEND_BY: Final[Mapping[str, str]] = {
    "model": "model", "provider": "provider", "key": "key_id", "day": "strftime('%Y-%m-%d', start_s, 'unixepoch')",
    "tag": "tag", "status": "status", "endpoint": "endpoint",
}  # fmt: skip
#: Summed from the rows themselves, for as long as those are kept: there are too many of them for sums of their own.
SPEND_BY_ROWS: Final = ("session",)
SPEND_FILTERS: Final = (*LABEL_FILTERS, "since", "until")
TOLD_SUMS: Final = (
    "requests", "errors", "input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens", "unpriced",
)  # fmt: skip
_SUM_COLUMNS: Final = ", ".join(f"SUM({name}) AS {name}" for name in SUMS) + (
    ", SUM(requests * (status >= 400)) AS errors, SUM(requests * (cache IN ('hit', 'coalesced'))) AS cache_hits"
)


def sums_where(asked: LogFilter, now_ms: int, by: str = "", width_s: int = 60) -> tuple[str, Json]:
    """The condition on sums: of all calls, or of those with tags; in whole minutes or hours, as they are kept."""
    tags = "tag > ''" if by == "tag" else "tag = ''"
    low_s, high_s = ((edge >> SEQ_BITS) // 1000 // width_s * width_s for edge in (asked.low, asked.high))
    if high_s >= now_ms // 1000 // width_s * width_s:
        high_s = 2**62  # the minute under way belongs to a span that ends in it
    clauses = [*([tags] if width_s == 60 else []), "start_s >= :low_s", "start_s < :high_s", *asked.labels]
    return " AND ".join(clauses), {**asked.parameters, "low_s": low_s, "high_s": high_s}


def as_usd(nanousd: int | None) -> float | None:
    return None if nanousd is None else nanousd / NANOUSD_PER_USD


def find_spend(store: LogStore, by: str, wanted: Mapping[str, str], now_ms: int) -> list[Json]:
    """Calls, tokens and cost by one dimension, dearest first; unpriced calls are counted beside, never as zero.

    Read from sums of minutes (of hours after two days, of days after ninety), so `since` is as exact as those.
    """
    asked = log_filter(wanted, now_ms, SPEND_FILTERS)
    if by in SPEND_BY_ROWS:
        where, parameters = rows_where(asked)
        columns = ", ".join(f"{what} AS {name}" for name, what in SUMS.items()) + ", SUM(status >= 400) AS errors"
        source = f"calls CROSS JOIN labels USING (label) WHERE {by} != '' AND {where}"
    else:
        where, parameters = sums_where(asked, now_ms, by)
        columns, source = _SUM_COLUMNS, f"rollups CROSS JOIN labels USING (label) WHERE {where}"
    rows = store.read(
        f"SELECT {SPEND_BY.get(by, by)} AS name, {columns} FROM {source} GROUP BY name ORDER BY cost_nanousd DESC, name",  # noqa: S608 - rows of our tables
        parameters,
    )
    return [
        {by: row["name"], **{name: row[name] or 0 for name in TOLD_SUMS}, "cost_usd": as_usd(row["cost_nanousd"])}
        for row in rows
    ]


def find_sessions(store: LogStore, wanted: Mapping[str, str], limit: int, now_ms: int) -> list[Json]:
    """Conversations, by x-stockyard-session, the latest first: what was called, from when to when, and its cost.

    The filters are those of the log; `before` is a session's `cursor`.
    """
    where, parameters = rows_where(
        log_filter({name: text for name, text in wanted.items() if name != "before"}, now_ms)
    )
    before = wanted.get("before", "")
    rows = store.read(
        "SELECT session, COUNT(*) AS requests, SUM(status >= 400) AS errors, SUM(input_tokens) AS input_tokens, "  # noqa: S608 - clauses of LOG_FILTERS
        "SUM(cached_tokens) AS cached_tokens, SUM(output_tokens) AS output_tokens, SUM(cost_nanousd) AS cost_nanousd, "
        "GROUP_CONCAT(DISTINCT model) AS models, MIN(seq) AS first, MAX(seq) AS cursor "
        f"FROM calls CROSS JOIN labels USING (label) WHERE session != '' AND {where} GROUP BY session HAVING cursor < :before "
        "ORDER BY cursor DESC LIMIT :limit",
        {**parameters, "before": int(before) if before.isdigit() else 2**63 - 1, "limit": limit},
    )
    return [
        {"session": row["session"], "first": format_time(row["first"] >> SEQ_BITS), "last": format_time(row["cursor"] >> SEQ_BITS),
         **{name: row[name] or 0 for name in ("requests", "errors", "input_tokens", "cached_tokens", "output_tokens")},
         "cost_usd": None if row["cost_nanousd"] is None else row["cost_nanousd"] / NANOUSD_PER_USD,
         "models": row["models"].split(","), "cursor": str(row["cursor"])}
        for row in rows
    ]  # fmt: skip


def logged_usage(found: Json) -> Usage | None:
    """The usage of a logged call, as it was charged."""
    if found["input_tokens"] is None:
        return None
    rare = {name: count for name, count in found["usage"].items() if name != "estimated"}
    same = {name: found[name] for name in ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens")}
    written = found["cache_write_tokens"] - rare.get("cache_write_1h_tokens", 0)
    return Usage(**same, **rare, cache_write_5m_tokens=written)


def explain_request(found: Json, prices: PriceBook) -> Json:
    """Why a logged call went as it did, from `find_request`: facts by subject, and `summary`, the same in sentences."""
    notes, usage = found["notes"], logged_usage(found)
    routed = notes.get("targets") or (
        [[found["provider"], found["upstream_model"], notes["via"]]] if "via" in notes else []
    )
    price = prices.find(found["provider"], found["upstream_model"], parse_time(found["ts"], 0) / 1000)
    same_price = price if price is not None and price.id == found["price_id"] else None
    kept = found["cache"] in ("hit", "coalesced") and not found["attempt_log"]
    cost: Json = {
        "price_id": found["price_id"] or None, "priced": found["priced"], "cost_usd": found["cost_usd"], "saved_usd": found["saved_usd"],
        "estimated": bool(found["usage"].get("estimated")), "price": same_price.per_million_usd() if same_price else None,
        "paid_before": kept, "lines": same_price.lines(usage) if same_price and usage and not kept else [],
    }  # fmt: skip
    budgets = [line["budget"] for line in found["attempt_log"] if "budget" in line]
    told: Json = {
        "id": found["id"],
        "route": {"asked": found["model"], "targets": [dict(zip(("provider", "upstream_model", "via"), row, strict=True)) for row in routed]},
        "attempts": found["attempt_log"],
        "cache": {"result": found["cache"], "saved_usd": found["saved_usd"]},
        "budget": {"holds": budgets, "output_cap": notes.get("output_cap"), "clamped": notes.get("clamped", False)},
        "limits": {"taken": notes.get("limits", []), "estimated_tokens": notes.get("estimated_tokens")},
        "refusal": notes.get("refusal"), "verdicts": found["verdicts"], "redactions": found["redactions"], "dropped": found["dropped"],
        "cost": cost,
    }  # fmt: skip
    return {**told, "summary": explain_lines(found, told)}


CACHE_WORDS: Final[Mapping[str, str]] = {
    "hit": "Cache: answered from the cache, which saved ${saved}; no provider was asked.",
    "coalesced": "Cache: an equal call was under way and its answer was shared, which saved ${saved}.",
    "miss": "Cache: the answer may be kept, but none was; the provider was asked.",
    "bypass": "Cache: not used; the policy does not cover this call, or x-stockyard-cache was off.",
}


def explain_lines(found: Json, told: Json) -> list[str]:
    """The sentences of an explanation, in the order in which things happened."""
    targets = [f"{row['provider']} as {row['upstream_model']} (by {row['via']})" for row in told["route"]["targets"]]
    lines = [f"Route: `{found['model']}` " + (f"goes to {', else '.join(targets)}." if targets else "was not routed.")]
    lines.append(CACHE_WORDS[found["cache"]].replace("{saved}", shown_usd(found["saved_usd"])))
    for number, line in enumerate(told["attempts"], 1):
        ended = f"{line['status']} {line['error']}".strip()
        took_ms = line["ended_ms"] - line["started_ms"]
        lines.append(
            f"Attempt {number}: {line['provider']} at {line['started_ms']:.1f} ms, {ended} after {took_ms:.1f} ms."
        )
        if "budget" in line:
            names = ", ".join(f"{name} ({window})" for name, window in line["budget"]["budgets"])
            held, charged = (shown_usd(line["budget"][name]) for name in ("held_usd", "charged_usd"))
            lines.append(f"Budget: ${held} was held in {names}; ${charged} was charged.")
    if told["budget"]["output_cap"] is not None:
        why = "what the budget had left" if told["budget"]["clamped"] else "what the held amount pays for"
        lines.append(f"Output cap: {told['budget']['output_cap']} tokens, {why}.")
    if told["limits"]["taken"]:
        lines.append(
            f"Limits: counted for {', '.join(told['limits']['taken'])} at {told['limits']['estimated_tokens']} tokens."
        )
    if told["refusal"]:
        lines.append("Refusal: " + ", ".join(f"{name} {value}" for name, value in told["refusal"].items()))
    if found["dropped"]:
        lines.append(f"Dropped, because the target cannot carry it: {', '.join(found['dropped'])}.")
    if found["verdicts"] or found["redactions"]:
        lines.append(f"Guardrails: {found['verdicts'] or 'no verdict'}; {found['redactions']} values redacted.")
    lines.append(explain_cost(told["cost"]))
    lines.append(
        f"End: {found['status']} {found['error'] or found['finish_reason']}".rstrip()
        + f" after {found['latency_ms']:.1f} ms."
    )
    return lines


def shown_usd(usd: float) -> str:
    return format_usd(round(usd * NANOUSD_PER_USD))


def explain_cost(cost: Json) -> str:
    if not cost["priced"]:
        return "Cost: not known; no price is known for this model, or no usage was told."
    total = shown_usd(cost["cost_usd"])
    if cost["paid_before"]:
        return f"Cost: ${total}; the answer was paid for before, at price {cost['price_id'] or 'unknown'}."
    if not cost["lines"]:
        why = "which charges nothing for it" if cost["price"] is not None else "which the table does not hold any more"
        return f"Cost: ${total} by price {cost['price_id']}, {why}."
    terms = " + ".join(f"{line['count']} {line['unit']} x ${line['usd']}/{line['per']}" for line in cost["lines"])
    guess = " The usage is an estimate." if cost["estimated"] else ""
    return f"Cost: {terms} = ${total} by price {cost['price_id']}.{guess}"


POINTS_BY: Final[Mapping[str, str]] = {"total": "''", "model": "model", "provider": "provider", "key": "key_id"}
POINT_FILTERS: Final = ("model", "provider", "key", "since", "until")
BUCKETS_MS: Final[Mapping[str, int]] = {"hour": 3_600_000, "day": DAY_MS}
MAX_BUCKETS: Final = 2200
QUANTILES: Final[Mapping[str, float]] = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
POINT_COUNTS: Final = (
    "requests", "errors", "cache_hits", "input_tokens", "cached_tokens", "output_tokens", "unpriced", "redactions",
)  # fmt: skip


def find_points(store: LogStore, by: str, bucket_ms: int, wanted: Mapping[str, str], now_ms: int) -> list[Json]:
    """What was called, bucket by bucket (the whole span where `bucket_ms` is 0), oldest first, by one of POINTS_BY.

        A point is `{"ts", "name", *POINT_COUNTS, "cost_usd", "saved_usd", "latency_ms": {"p50", "p95", "p99"},
    "first_token_ms": the same}`. `ts` is the bucket's start (null for the whole span), `name` empty for the total.
    Quantiles are of answered calls and null where there are none, kept by hour, within 5 %; `cost_usd` is null where none
    was priced. Buckets without calls are left out. All of it is read from sums, so a span is as exact as those: a minute,
    later an hour, then a day.
    """
    asked = log_filter(wanted, now_ms, SPEND_FILTERS)
    at, name = (f"start_s / {bucket_ms // 1000} * {bucket_ms}" if bucket_ms else "0"), POINTS_BY[by]
    where, parameters = sums_where(asked, now_ms)
    rows = store.read(
        f"SELECT {at} AS at, {name} AS name, {_SUM_COLUMNS} FROM rollups CROSS JOIN labels USING (label) WHERE {where} "  # noqa: S608 - rows of our tables
        "GROUP BY at, name ORDER BY at, requests DESC",
        parameters,
    )
    where, parameters = sums_where(asked, now_ms, width_s=3600)
    steps: dict[tuple[int, str, int], list[tuple[int, int]]] = {}
    for row in store.read(
        f"SELECT {at} AS at, {name} AS name, what, step, SUM(calls) AS calls FROM spreads CROSS JOIN labels USING (label) "  # noqa: S608 - rows of our tables
        f"WHERE {where} GROUP BY at, name, what, step ORDER BY step",
        parameters,
    ):
        steps.setdefault((row["at"], row["name"], row["what"]), []).append((row["step"], row["calls"]))
    return [
        {"ts": format_moment(row["at"]) if bucket_ms else None, "name": row["name"], **{count: row[count] or 0 for count in POINT_COUNTS},
         "cost_usd": as_usd(row["cost_nanousd"]), "saved_usd": as_usd(row["saved_nanousd"]),
         **{told: quantiles_of(steps.get((row["at"], row["name"], what), ()))
            for what, told in enumerate(("latency_ms", "first_token_ms"))}}
        for row in rows
    ]  # fmt: skip


class CacheShelf:
    """The cache's entries on disk, so that hits survive a restart: newest kept, bounded by bytes.

    Everything is written by the store's one writer; reading goes through its read-only connection, in threads.
    """

    def __init__(self, store: LogStore, max_bytes: int, now_ms: int) -> None:
        self._store, self._max_bytes, self._unpruned_bytes = store, max_bytes, 0
        self.prune(now_ms)
        #: Entries that only the disk holds live at most until then.
        self.holds_until_ms: int = store.read("SELECT MAX(expires_ms) AS last FROM cache")[0]["last"] or 0

    def put(self, entry: Entry, now_ms: int) -> None:
        """Keep an entry, where the writer has time: the log, which every call needs, goes first."""
        if self._store.is_behind:
            return
        head, body = entry.pack()
        row = (entry.slot, entry.scope, entry.expires_ms, entry.size_bytes, head, body)
        self._store.put_write("INSERT OR REPLACE INTO cache VALUES (?, ?, ?, ?, ?, ?)", *row)
        self._unpruned_bytes += entry.size_bytes
        if self._unpruned_bytes * ENTRY_MAX_SHARE > self._max_bytes:
            self.prune(now_ms)

    def prune(self, now_ms: int) -> None:
        """Drop what has expired, then the oldest until what is put before the next pruning has room."""
        self._unpruned_bytes = 0
        self._store.put_write("DELETE FROM cache WHERE expires_ms <= ?", now_ms)
        self._store.put_write(
            "DELETE FROM cache WHERE rowid IN (SELECT place FROM (SELECT rowid AS place, "
            "SUM(size_bytes) OVER (ORDER BY rowid DESC) AS newer FROM cache) WHERE newer > ?)",
            self._max_bytes - 2 * self._max_bytes // ENTRY_MAX_SHARE,
        )

    def find(self, slot: bytes, other: bytes, now_ms: int) -> list[Entry]:
        """Entries that live, of one slot or the other; the first is the better one."""
        sql = "SELECT * FROM cache WHERE slot IN (?, ?) AND expires_ms > ?"
        rows = sorted(self._store.read(sql, (slot, other, now_ms)), key=lambda row: row["slot"] != slot)
        return [unpack_entry(row["slot"], row["scope"], row["expires_ms"], row["head"], row["body"]) for row in rows]

    def drop(self, slot: bytes) -> None:
        self._store.put_write("DELETE FROM cache WHERE slot = ?", slot)

    def clear(self) -> None:
        self._store.put_write("DELETE FROM cache")

    def size(self, now_ms: int) -> tuple[int, int]:
        """How many entries live, and their bytes."""
        sql = "SELECT COUNT(*) AS entries, COALESCE(SUM(size_bytes), 0) AS bytes FROM cache WHERE expires_ms > ?"
        [row] = self._store.read(sql, (now_ms,))
        return row["entries"], row["bytes"]


class Journal:
    """Every movement of money, one JSON line each, written before what it allows happens.

    A `write` to an append-only file survives the death of the process; with `full_sync` it also survives a power cut.
    Balances go to SQLite now and then (`checkpoint`), with the number of the journal that continues them: a start reads
    them, replays the journals from that number on, and so loses and doubles nothing.
    """

    NAME: ClassVar[str] = "ledger"
    TURN_BYTES: ClassVar[int] = 8 * 1024 * 1024

    def __init__(self, directory: Path, generation: int, full_sync: bool) -> None:
        self._directory, self.generation, self._full_sync = directory, generation, full_sync
        self._file = self._open()
        self._size = 0

    def _path(self, generation: int) -> Path:
        return self._directory / f"{self.NAME}-{generation:08d}.journal"

    def _open(self) -> int:
        return os.open(self._path(self.generation), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def append(self, record: Json) -> None:
        """Write one record; StorageUnavailable where it cannot be kept, and then nothing may be spent on it."""
        line = orjson.dumps(record) + b"\n"
        try:
            if os.write(self._file, line) != len(line):
                raise OSError("short write")
            if self._full_sync:
                os.fsync(self._file)
        except OSError as error:
            raise StorageUnavailable(
                "spending cannot be recorded, so calls under a budget are refused; see the disk"
            ) from error
        self._size += len(line)

    @property
    def is_long(self) -> bool:
        return self._size > self.TURN_BYTES

    def turn(self) -> int:
        """Go on in a new journal; its number. Where none can be opened, the old one goes on; OSError."""
        before = self._file
        self.generation += 1
        self._size = 0
        try:
            self._file = self._open()
        except OSError:
            self.generation -= 1
            raise
        os.close(before)
        return self.generation

    def drop_before(self, generation: int) -> None:
        for number, path in self.paths(self._directory):
            if number < generation:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._file)

    @classmethod
    def paths(cls, directory: Path) -> list[tuple[int, Path]]:
        """The journals of a directory with their numbers, the oldest first."""
        found = directory.glob(f"{cls.NAME}-*.journal")
        return sorted((int(path.stem.removeprefix(f"{cls.NAME}-")), path) for path in found)

    @classmethod
    def read(cls, directory: Path, generation: int) -> Iterator[Any]:
        """The records from this journal on; a line that a crash cut short is the last, and was never acted on."""
        for number, path in cls.paths(directory):
            if number >= generation:
                for line in path.read_bytes().split(b"\n"):
                    with contextlib.suppress(orjson.JSONDecodeError):
                        yield orjson.loads(line)


class CallJournal(Journal):
    """Calls that have left and calls that have ended, for as long as SQLite may lack their rows.

    The lines are those of `intent_line`, and rows. A line that cannot be written refuses no call: its row still waits in
    memory, and `error` tells the operator. With `full_sync`, `synced` is awaited before a call leaves and before the
    last of its answer does; calls that wait together share one fsync.
    """

    NAME: ClassVar[str] = "calls"

    def __init__(self, directory: Path, generation: int, full_sync: bool) -> None:
        super().__init__(directory, generation, full_sync)
        self.error = ""
        self._open_calls: dict[str, bytes] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._syncing: asyncio.Task[None] | None = None

    def begin(self, call_id: str, line: bytes) -> None:
        if call_id not in self._open_calls:
            self._open_calls[call_id] = line
            self.keep(line)

    def end(self, call_id: str, line: bytes) -> None:
        self._open_calls.pop(call_id, None)
        self.keep(line)

    def keep(self, line: bytes) -> None:
        try:
            if os.write(self._file, line + b"\n") <= len(line):
                raise OSError("the disk is full")
            self._size += len(line) + 1
            if self.error:
                self.error = ""
        except OSError as error:
            self.error = f"the journal cannot be written: {error.strerror or error}"
            with contextlib.suppress(OSError):  # so that the next line does not run on from half of this one
                os.write(self._file, b"\n")

    def turn(self) -> int:
        """Go on in a new journal, which also knows the calls under way; its number, 0 where the old one must go on."""
        try:
            if self._full_sync:
                os.fsync(self._file)
            super().turn()
        except OSError as error:
            self.error = f"no journal can be opened: {error.strerror}"
            return 0
        for line in self._open_calls.values():
            self.keep(line)
        return self.generation

    async def synced(self) -> None:
        """Return once what was written before is on the disk itself; StorageUnavailable where that fails."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._sync())
        await waiter

    async def _sync(self) -> None:
        while self._waiting:
            waiters, self._waiting = self._waiting, []
            file, failure = self._file, ""
            try:
                await asyncio.to_thread(os.fsync, file)
            except OSError as error:
                failure = f"the journal cannot be written: {error.strerror}" if file == self._file else ""
            for waiter in waiters:
                if waiter.done():
                    continue
                waiter.set_exception(StorageUnavailable(failure)) if failure else waiter.set_result(None)
        self._syncing = None

    def close(self, all_is_written: bool = False) -> None:
        super().close()
        if all_is_written:
            self.drop_before(self.generation + 1)

    @classmethod
    def leftovers(cls, directory: Path) -> tuple[int, list[LogRow], list[list[Any]]]:
        """What earlier processes left: the last number, rows of calls that ended, intents of calls that did not."""
        rows: dict[str, LogRow] = {}
        intents: dict[str, list[Any]] = {}
        for record in cls.read(directory, 0):
            if not isinstance(record, list):
                continue
            if len(record) == 3:
                rows[record[2][0]] = LogRow(record[0], tuple(record[1]), tuple(record[2]))
            else:
                intents[record[0]] = record
        numbers = [number for number, _ in cls.paths(directory)]
        return max(numbers, default=0), [*rows.values()], [intents[name] for name in intents if name not in rows]


def read_records(store: LogStore, table: str) -> list[Json]:
    """All records of one of the small tables, `keys` or `budgets`."""
    sql = {"keys": "SELECT record FROM keys ORDER BY id", "budgets": "SELECT record FROM budgets ORDER BY id"}[table]
    return [orjson.loads(row["record"]) for row in store.read(sql)]


def read_books(store: LogStore, directory: Path) -> tuple[Books, int]:
    """The balances as the last process left them, and the number of the next journal."""
    rows = store.read("SELECT generation, books FROM ledger")
    stored = orjson.loads(rows[0]["books"]) if rows else {"settled": [], "open": []}
    generation = rows[0]["generation"] if rows else 0
    settled = {(budget, window): nanousd for budget, window, nanousd in stored["settled"]}
    books = Ledger.replay(Journal.read(directory, generation), Books(settled, stored["open"]))
    last = max(
        (int(path.stem.removeprefix("ledger-")) for path in directory.glob("ledger-*.journal")), default=generation
    )
    return books, last + 1


def write_books(store: LogStore, books: Books, generation: int) -> None:
    settled = [[budget, window, nanousd] for (budget, window), nanousd in books.settled.items()]
    text = dump_json({"settled": settled, "open": list(books.open.values())}).decode()
    store.put_write("INSERT OR REPLACE INTO ledger VALUES (1, ?, ?)", generation, text)


# ===== Upstream =======================================================================================================
# The only code that opens connections to providers for calls: a pool per origin over asyncio.Protocol, with aiohttp's C
# response parser (strict framing). A provider's key travels only in the head that is built from that provider's own
# base URL. TLS is always verified, redirects are never followed, compressed answers are not asked for. Deadlines are kept
# by one ticking sweep over the calls under way, so that a call costs no timer of its own. uploads and odd
# methods go through aiohttp's client instead, behind the same rules (see the passthrough handlers).


class Sink(Protocol):
    """What a connection tells about one exchange. `head` once, `data` any times, then `end` or `fail`, exactly one."""

    def head(self, status: int, headers: Mapping[str, str]) -> None: ...
    def data(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def fail(self, error: UpstreamError) -> None: ...


@dataclass(slots=True)
class Origin:
    """One scheme, host and port, and its idle connections, the newest last."""

    scheme: str
    host: str
    port: int
    idle: list[UpstreamConnection] = field(default_factory=list)


def take_buffered(payload: Any) -> bytes:
    """All that a parser's payload holds. `read_nowait` does the same with book-keeping for readers that wait."""
    if payload is EMPTY_PAYLOAD or not payload._buffer:
        return b""
    buffer = payload._buffer
    data: bytes = buffer[0] if len(buffer) == 1 else b"".join(buffer)
    buffer.clear()
    payload._size = 0
    if payload._http_chunk_splits:
        payload._http_chunk_splits.clear()
    return data


class Pace:
    """Stands before a sink and counts what comes, where a route asks for a minimum rate."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._bytes, self._since_s = sink, 0, 0.0
        self.fail, self.end = sink.fail, sink.end

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self._since_s = 0.0
        self._sink.head(status, headers)

    def data(self, data: bytes) -> None:
        self._bytes += len(data)
        self._sink.data(data)

    def restart(self, now_s: float) -> None:
        self._bytes, self._since_s = 0, now_s

    def is_stalled(self, now_s: float, deadlines: Deadlines) -> bool:
        """Whether less came over one idle time than the rate asks for; looked at once in such a time."""
        if not self._since_s:
            self.restart(now_s)
        if now_s - self._since_s < deadlines.idle_s:
            return False
        few = self._bytes < deadlines.min_bytes_per_s * (now_s - self._since_s)
        self.restart(now_s)
        return few


class UpstreamConnection(asyncio.Protocol):
    """One connection to a provider. Carries one exchange at a time and returns to its origin's pool between two."""

    __slots__ = (
        "_held",
        "_loop",
        "_origin",
        "_parser",
        "_payload",
        "_reusable",
        "_upstream",
        "answered",
        "began_s",
        "deadlines",
        "idle_since_s",
        "pace",
        "sink",
        "touched_s",
        "transport",
    )  # fmt: skip

    def __init__(self, upstream: Upstream, origin: Origin) -> None:
        self._loop = upstream.loop
        self._upstream, self._origin = upstream, origin
        self._parser: Any = None
        self._payload: Any = None
        self._reusable = False
        self.sink: Sink | None = None
        self.transport: asyncio.Transport | None = None
        self.idle_since_s = self.touched_s = self.began_s = 0.0
        self.answered = self._held = False
        self.deadlines = upstream.deadlines
        self.pace: Pace | None = None

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        with contextlib.suppress(OSError, AttributeError):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._parser = HttpResponseParser(
            self, self._loop, 2**22, max_line_size=16_384, max_field_size=16_384, max_headers=256,  # type: ignore[arg-type]
            payload_exception=aiohttp.ClientPayloadError, response_with_body=True, read_until_eof=True, auto_decompress=False,
        )  # fmt: skip

    def data_received(self, data: bytes) -> None:
        sink = self.sink
        if sink is None:  # a provider that speaks unasked cannot be trusted with the next request
            self.abort()
            return
        self.touched_s = self._loop.time()
        try:
            messages, _, _ = self._parser.feed_data(data)
        except HttpProcessingError as error:
            self._fail(
                UpstreamError(
                    f"the provider's answer is no valid HTTP: {type(error).__name__}", code="upstream_malformed"
                )
            )
            return
        for message, payload in messages:
            if message.code >= 200 and self._payload is None:
                self.answered = True
                self._payload, self._reusable = payload, not message.should_close
                sink.head(message.code, message.headers)
        payload = self._payload
        if payload is None:
            return
        if payload.exception() is not None:
            self._fail(UpstreamError("the provider's answer broke off", code="upstream_truncated"))
            return
        chunk = take_buffered(payload)
        if chunk:
            sink.data(chunk)
        if payload.is_eof() and self.sink is sink:
            self._finish()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.sink is None:
            with contextlib.suppress(ValueError):
                self._origin.idle.remove(self)
        elif self._payload is not None and self._ended_by_close():
            self._finish()
        elif self._payload is not None:
            self._fail(UpstreamError("the provider's answer broke off", code="upstream_truncated"))
        else:
            self._fail(
                UpstreamError("the provider closed the connection without an answer", code="upstream_disconnected")
            )
        self.transport = self._parser = None

    def pause_writing(self) -> None:  # a request body is written whole; its size is bounded by max_body_mb
        pass

    def resume_writing(self) -> None:
        pass

    # -- called by the parser's payload, which holds far more than one read, so that it never needs to pause

    def pause_reading(self) -> None:
        self.hold(True)

    def resume_reading(self, resume_parser: bool = True) -> None:
        pass

    # -- one exchange

    def begin(self, sink: Sink, request: bytes, now_s: float, deadlines: Deadlines) -> None:
        assert self.transport is not None
        self.sink, self._payload, self.answered, self.deadlines = sink, None, False, deadlines
        self.pace = None
        if deadlines.min_bytes_per_s:
            self.sink = self.pace = Pace(sink)
        self.began_s = self.touched_s = now_s
        self._upstream.watch(self)
        self.transport.write(request)

    def hold(self, paused: bool) -> None:
        """Stop or go on reading: the client at the other end is slow, or has caught up."""
        if paused is not self._held and self.transport is not None and not self.transport.is_closing():
            self._held = paused
            self.touched_s = self._loop.time()
            if self.pace is not None:
                self.pace.restart(self.touched_s)
            if paused:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def abort(self) -> None:
        """End the exchange now, without telling the sink: the client is gone, or has enough."""
        self.sink = None
        self._upstream.unwatch(self)
        if self.transport is not None:
            self.transport.abort()

    def expired(self, now_s: float) -> str:
        """Which deadline has passed, if one has."""
        if not self.answered and now_s - self.began_s > self.deadlines.first_byte_s:
            return "first byte"
        if self.answered and now_s - self.touched_s > self.deadlines.idle_s:
            return "next byte"
        if self.pace is not None and self.answered and not self._held and self.pace.is_stalled(now_s, self.deadlines):
            return "share of bytes"
        return "whole answer" if now_s - self.began_s > self.deadlines.total_s else ""

    def time_out(self, which: str) -> None:
        code = "upstream_stalled" if which == "share of bytes" else None
        self._fail(UpstreamTimeout(f"the provider took too long for its {which}", code=code))

    def _ended_by_close(self) -> bool:
        """Whether the end of the connection is the proper end of this answer (no length, not chunked)."""
        try:
            self._parser.feed_eof()
        except Exception:
            return False
        return bool(self._payload.is_eof())

    def _finish(self) -> None:
        sink, self.sink, self._payload = self.sink, None, None
        self._upstream.unwatch(self)
        if self.transport is not None and not self.transport.is_closing():
            if self._reusable:
                self.idle_since_s = self.touched_s
                self.hold(False)
                self._origin.idle.append(self)
            else:
                self.transport.close()
        if sink is not None:
            sink.end()

    def _fail(self, error: UpstreamError) -> None:
        sink = self.sink
        self.abort()
        if sink is not None:
            sink.fail(error)


class EchoExchange:
    """The built-in provider's stand-in for a connection: answers from memory, after a delay where one is asked for."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sink: Sink, answer: EchoAnswer) -> None:
        self._loop, self._sink = loop, sink
        self._pieces = collections.deque(answer.pieces)
        self._gap_s = answer.gap_s
        self._paused = self._stopped = False
        self._content_type = answer.content_type
        self._handle: asyncio.Handle = (
            loop.call_later(answer.delay_s, self._start) if answer.delay_s else loop.call_soon(self._start)
        )

    def _start(self) -> None:
        self._sink.head(200, {"content-type": self._content_type})
        self._step()

    def _step(self) -> None:
        while self._pieces and not (self._paused or self._stopped):
            self._sink.data(self._pieces.popleft())
            if self._gap_s and self._pieces:
                self._handle = self._loop.call_later(self._gap_s, self._step)
                return
        if not self._pieces and not self._stopped:
            self._stopped = True
            self._sink.end()

    def hold(self, paused: bool) -> None:
        self._paused = paused
        if not paused and not self._stopped:
            self._handle = self._loop.call_soon(self._step)

    def abort(self) -> None:
        self._stopped = True
        self._handle.cancel()


class Upstream:
    """Opens, keeps and watches connections to providers."""

    IDLE_MAX_S: ClassVar[float] = 55.0

    def __init__(self, loop: asyncio.AbstractEventLoop, deadlines: Deadlines) -> None:
        self.loop = loop
        self.deadlines = deadlines
        self._tick_s = 0.5
        self.heed(deadlines)
        self._tls: ssl.SSLContext | None = None
        self._origins: dict[tuple[str, str, int], Origin] = {}
        self._watched: set[UpstreamConnection] = set()
        self._sweep: asyncio.TimerHandle | None = None

    def heed(self, deadlines: Deadlines) -> None:
        """Look often enough to keep such deadlines."""
        self._tick_s = max(
            0.02, min(self._tick_s, min(deadlines.first_byte_s, deadlines.idle_s, deadlines.total_s) / 4)
        )

    def origin(self, base_url: str) -> Origin:
        parts = urllib.parse.urlsplit(base_url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        key = (parts.scheme, parts.hostname or "", port)
        return self._origins.setdefault(key, Origin(*key))

    async def send(
        self, origin: Origin, request: bytes, sink: Sink, deadlines: Deadlines | None = None
    ) -> UpstreamConnection:
        """Write one request, on a kept connection where a live one is at hand. UpstreamError where none can be opened."""
        now_s, deadlines = self.loop.time(), deadlines or self.deadlines
        while origin.idle:
            kept = origin.idle.pop()
            if kept.transport is None or kept.transport.is_closing():
                continue
            if now_s - kept.idle_since_s > self.IDLE_MAX_S:
                kept.transport.close()
                continue
            kept.begin(sink, request, now_s, deadlines)
            return kept
        connection = await self._connect(origin, deadlines.connect_s)
        connection.begin(sink, request, self.loop.time(), deadlines)
        return connection

    async def _connect(self, origin: Origin, connect_s: float) -> UpstreamConnection:
        where = f"{origin.host}:{origin.port}"
        try:
            async with asyncio.timeout(connect_s):
                _, connection = await self.loop.create_connection(
                    lambda: UpstreamConnection(self, origin), origin.host, origin.port,
                    ssl=self._tls_context() if origin.scheme == "https" else None,
                )  # fmt: skip
        except TimeoutError:
            raise UpstreamTimeout(
                f"connecting to {where} took longer than {connect_s:g} s",
                code="upstream_connect_timeout",
            ) from None
        except ssl.SSLError as error:
            raise UpstreamError(
                f"{where} has no TLS that can be trusted: {error.reason or type(error).__name__}", code="upstream_tls"
            ) from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UpstreamError(f"{where} cannot be reached: {reason}", code="upstream_unreachable") from error
        return connection

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def watch(self, connection: UpstreamConnection) -> None:
        self._watched.add(connection)
        if self._sweep is None:
            self._sweep = self.loop.call_later(self._tick_s, self._check_deadlines)

    def unwatch(self, connection: UpstreamConnection) -> None:
        self._watched.discard(connection)

    def _check_deadlines(self) -> None:
        now_s = self.loop.time()
        self._sweep = self.loop.call_later(self._tick_s, self._check_deadlines) if self._watched else None
        for connection in [*self._watched]:
            which = connection.expired(now_s)
            if which:
                connection.time_out(which)

    async def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in [*self._watched]:
            connection.abort()
        for origin in self._origins.values():
            for connection in origin.idle:
                if connection.transport is not None:
                    connection.transport.close()
        await asyncio.sleep(0)


class PlainAnswer:
    """Gathers a provider's whole answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.done: asyncio.Future[None] = loop.create_future()
        self._parts: list[bytes] = []
        self._size = 0

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status, self.headers = status, headers

    def data(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > UPSTREAM_MAX_BODY_BYTES:
            self.fail(UpstreamError("the provider's answer is too large", code="upstream_too_large"))
        else:
            self._parts.append(data)

    def end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, error: UpstreamError) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    @property
    def body(self) -> bytes:
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)


# ----- Google credentials ---------------------------------------------------------------------------------------------
# Vertex wants a short-lived token, got with a credentials file: a service account signs a claim (RS256), a user's file
# holds a refresh token. Source: https://developers.google.com/identity/protocols/oauth2/service-account

SHA256_DIGEST_INFO: Final = bytes.fromhex("3031300d060960864801650304020105000420")
GOOGLE_SCOPE: Final = "https://www.googleapis.com/auth/cloud-platform"


def read_der(data: bytes, at: int) -> tuple[int, bytes, int]:
    """One DER element at an offset: its tag, its content, where the next begins."""
    tag, length, start = data[at], data[at + 1], at + 2
    if length & 0x80:
        start = at + 2 + (length & 0x7F)
        length = int.from_bytes(data[at + 2 : start])
    return tag, data[start : start + length], start + length


def read_rsa_key(pem: str) -> tuple[int, int]:
    """Modulus and private exponent of a PKCS #8 RSA key."""
    der = base64.b64decode("".join(line for line in pem.strip().splitlines() if "-----" not in line))
    _, outer, _ = read_der(der, 0)
    at = read_der(outer, 0)[2]  # version
    at = read_der(outer, at)[2]  # algorithm
    _, inner, _ = read_der(read_der(outer, at)[1], 0)
    numbers: list[int] = []
    at = 0
    while at < len(inner) and len(numbers) < 4:
        _, content, at = read_der(inner, at)
        numbers.append(int.from_bytes(content))
    return numbers[1], numbers[3]


def sign_rs256(message: bytes, pem: str) -> bytes:
    """RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, section 8.2.1)."""
    modulus, exponent = read_rsa_key(pem)
    size = (modulus.bit_length() + 7) // 8
    info = SHA256_DIGEST_INFO + hashlib.sha256(message).digest()
    padded = b"\x00\x01" + b"\xff" * (size - len(info) - 3) + b"\x00" + info
    return pow(int.from_bytes(padded), exponent, modulus).to_bytes(size)


def google_grant(credentials: Json, now_s: int) -> tuple[str, bytes]:
    """Where to ask for a token with a credentials file, and the form to send. UpstreamError for an unknown kind."""
    uri = credentials.get("token_uri") or "https://oauth2.googleapis.com/token"
    if credentials.get("type") == "authorized_user":
        names = ("client_id", "client_secret", "refresh_token")
        form = {"grant_type": "refresh_token", **{name: credentials.get(name, "") for name in names}}
    elif credentials.get("type") == "service_account":
        claim = {
            "iss": credentials["client_email"],
            "scope": GOOGLE_SCOPE,
            "aud": uri,
            "iat": now_s,
            "exp": now_s + 3600,
        }
        parts = [
            base64.urlsafe_b64encode(dump_json(part)).rstrip(b"=") for part in ({"alg": "RS256", "typ": "JWT"}, claim)
        ]
        signature = sign_rs256(b".".join(parts), credentials["private_key"])
        assertion = b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()
        form = {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": assertion}
    else:
        kind = clean_kind(credentials.get("type"))
        raise UpstreamError(f"Google credentials of the kind {kind} are not understood", code="upstream_misconfigured")
    return uri, urllib.parse.urlencode(form).encode()


def clean_kind(kind: Any) -> str:
    return repr(kind)[:40]


class GoogleTokens:
    """Tokens by credentials file, asked for anew a minute before they end."""

    def __init__(self, upstream: Upstream, clock: Callable[[], float]) -> None:
        self._upstream, self._clock = upstream, clock
        self._tokens: dict[str, tuple[str, float]] = {}

    def current(self, path: str) -> str:
        return self._tokens[path][0]

    async def refresh(self, path: str) -> None:
        """Have a fresh token for a file. UpstreamError where none can be had."""
        if path in self._tokens and self._tokens[path][1] > self._clock() + 60:
            return
        try:
            credentials = orjson.loads(await asyncio.to_thread(Path(path).read_bytes))
            uri, form = google_grant(credentials, int(self._clock()))
        except (OSError, ValueError, KeyError, IndexError) as error:
            what = f"GOOGLE_APPLICATION_CREDENTIALS cannot be used ({type(error).__name__})"
            raise UpstreamError(what, code="upstream_misconfigured") from error
        parts = urllib.parse.urlsplit(uri)
        head = (
            f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/x-www-form-urlencoded\r\n"
        )
        request = f"{head}accept-encoding: identity\r\ncontent-length: {len(form)}\r\n\r\n".encode() + form
        answer = PlainAnswer(self._upstream.loop)
        await self._upstream.send(self._upstream.origin(uri), request, answer)
        await answer.done
        document = orjson.loads(answer.body) if answer.status == 200 else {}
        if not document.get("access_token"):
            raise UpstreamError(f"Google refused a token ({answer.status})", code="upstream_authentication")
        self._tokens[path] = (document["access_token"], self._clock() + float(document.get("expires_in") or 3600))


# ===== Gateway ========================================================================================================
# One object holds what a process needs, and `answer` is the life of a call. It takes and gives plain values and knows no
# web framework: whatever carries a request in (the lane, or aiohttp) makes a `Call` and offers a `Client` to stream to.
# Settlement is synchronous, so that no cancellation can come between an answer and its row.


@dataclass(slots=True)
class Reply:
    """A whole answer: status, headers in order, body."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Client(Protocol):
    """The other end of a streamed call. `begin_stream` once, `send` any times, then `end_stream`; `broken` closes the connection."""

    def begin_stream(self, headers: list[tuple[str, str]]) -> None: ...
    def send(self, data: bytes) -> None: ...
    def end_stream(self, broken: bool) -> None: ...

    #: Set by a relay: called with True when the client reads too slowly, False when it has caught up.
    throttle: Callable[[bool], None] | None


@dataclass(slots=True)
class Outgoing:
    """One request as it goes to a provider. `translation` is None where the client's own dialect passes through."""

    origin: Origin
    head: bytes
    body: bytes
    dialect: Dialect
    translation: Translation | None
    kind: str
    deadlines: Deadlines | None = None

    def to_bytes(self) -> bytes:
        return b"%b%d\r\n\r\n%b" % (self.head, len(self.body), self.body)


class Race:
    """Which branch of a hedged call is the one that the client gets: the first to show content, or to end well."""

    def __init__(self, call: Call, loop: asyncio.AbstractEventLoop) -> None:
        self.call = call
        self.winner: Call | None = None
        self.decided: asyncio.Future[None] = loop.create_future()

    def branch(self) -> Call:
        branch = copy.copy(self.call)
        branch.race = self
        return branch

    def wins(self, branch: Call) -> bool:
        """Whether a branch whose content comes now may show it; the first one decides."""
        if self.winner is None:
            self.winner, branch.status = branch, self.call.status  # a heartbeat may have sent the headers
            self.end(branch)
            self.call.status = 200
            self.decided.set_result(None)
        return self.winner is branch

    def end(self, branch: Call) -> None:
        """The call becomes what came of one branch; whether its client is there is the call's own."""
        branch.status = branch.status or self.call.status
        kept = ("race", "is_gone", "is_carried")
        vars(self.call).update({name: value for name, value in vars(branch).items() if name not in kept})


class Relay:
    """Carries one stream attempt from a provider's connection to the client, through a flow.

    Before the first content everything is held back, so that a failure can be retried; then `commit` sends the headers.
    """

    def __init__(
        self, gateway: Gateway, call: Call, client: Client, flow_of: Callable[[Dialect | None], Flow], dialect: Dialect
    ) -> None:
        self._gateway, self._call, self._client, self._dialect = gateway, call, client, dialect
        self._flow_of = flow_of
        self.flow = flow_of(None)
        self._start = b""
        self._looked = False
        self.done: asyncio.Future[None] = gateway.loop.create_future()
        self._held: list[bytes] = []
        self._refused: PlainAnswer | None = None
        self.sent_content = False
        self.throttle: Callable[[bool], None] | None = None

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        kind = headers.get("content-type", "")
        if status >= 300:
            self._refused = PlainAnswer(self._gateway.loop)
            self._refused.head(status, headers)
        elif kind and not kind.startswith(STREAM_TYPES):
            self._end(
                UpstreamError(f"the provider answered `{kind[:60]}` instead of a stream", code="upstream_malformed")
            )
        elif headers.get("content-encoding", "identity") != "identity":
            self._end(UpstreamError("the provider sent a compressed stream unasked", code="upstream_malformed"))

    def data(self, data: bytes) -> None:
        if self._refused is not None:
            self._refused.data(data)
            return
        if self.done.done():
            return
        try:
            if not self._looked and (data := self._look(data)) == b"":
                return
            out = self.flow.feed(data)
        except UpstreamError as error:
            self._end(error)
            return
        except MalformedStream as error:
            self._end(UpstreamError(str(error), code="upstream_malformed"))
            return
        if self.sent_content:
            if out:
                self._client.send(out)
        elif self.flow.content_seen:
            if self._call.race is not None and not self._call.race.wins(self._call):
                return  # another branch was first; this one is being cut off
            self._client.throttle = self.throttle
            self._call.first_token_s = self._gateway.tick()
            self.sent_content = True
            self._gateway.commit(self._call, self._client)
            self._client.send(b"".join([*self._held, out]))
        elif out:
            self._held.append(out)

    def _look(self, data: bytes) -> bytes:
        """Hold bytes back until the first event tells whether the provider speaks the dialect it was asked in.

        Several doors of one host may stand behind one address; the answer says best which one it was.
        """
        data, self._start = self._start + data, b""
        shape = shape_of_stream(data) if self._dialect.events else ""
        if shape is None:
            self._start = data
            return b""
        self._looked = True
        if shape and shape != self._dialect.family and shape in DIALECTS:
            self.flow = self._flow_of(DIALECTS[shape])
        return data

    def end(self) -> None:
        if self._refused is not None:
            self._refused.done.cancel()
            self._end(read_refusal(self._dialect, self._refused))
            return
        if self.done.done():
            return
        try:
            last = self.flow.feed(self._start) if self._start else b""
            last += self.flow.close()
            if not self.flow.complete:
                raise UpstreamError("the provider's stream ended before its answer did", code="upstream_truncated")
        except UpstreamError as error:
            self._end(error)
            return
        if not self.sent_content:  # an answer may be empty, and still be whole
            if self._call.race is not None and not self._call.race.wins(self._call):
                return
            self.sent_content = True
            self._gateway.commit(self._call, self._client)
            last = b"".join([*self._held, last])
        if last:
            self._client.send(last)
        self.done.set_result(None)

    def fail(self, error: UpstreamError) -> None:
        self._end(error)

    def _end(self, error: UpstreamError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


STREAM_TYPES: Final = ("text/event-stream", "application/x-ndjson", "application/vnd.amazon.eventstream", "text/plain")


def read_refusal(dialect: Dialect, answer: PlainAnswer) -> UpstreamError:
    """A provider's error answer as an error of ours, with its Retry-After."""
    if 300 <= answer.status < 400:
        return UpstreamError(
            f"the provider answered a redirect ({answer.status}), which is never followed", code="upstream_redirect"
        )
    error = dialect.read_error_answer(answer.status, answer.headers, answer.body)
    error.retry_after_s = error.retry_after_s or read_retry_after(answer.headers)
    return error


def read_retry_after(headers: Mapping[str, str], now_s: float | None = None) -> float | None:
    """Seconds to wait, at most an hour: `retry-after-ms`, else `retry-after` in seconds or as an HTTP date, else the
    longest reset among the limits of which nothing remains (`x-ratelimit-reset-tokens: 6m0s`, Anthropic's dates)."""
    now_s = time.time() if now_s is None else now_s
    waits: list[float | None] = []
    if headers.get("retry-after-ms", "").replace(".", "", 1).isdigit():
        waits = [float(headers["retry-after-ms"]) / 1000]
    elif "retry-after" in headers:
        waits = [read_wait_s(headers["retry-after"], now_s)]
    else:
        waits = [
            read_wait_s(text, now_s) for name, text in headers.items()
            if "ratelimit" in name.lower() and "reset" in name.lower()
            and headers.get(name.lower().replace("reset", "remaining")) == "0"
        ]  # fmt: skip
    found = [wait_s for wait_s in waits if wait_s is not None]
    return min(3600.0, max(0.0, *found, 0.0)) if found else None


WAIT_UNITS_S: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}


def read_wait_s(text: str, now_s: float) -> float | None:
    """A time to wait as providers write it: `20`, `1.5`, `6m0s`, `120ms`, an HTTP date, an ISO time, Unix seconds."""
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)(ms|h|m|s|)", text)
    if parts and "".join(number + unit for number, unit in parts) == text.strip():
        wait_s = sum(float(number) * WAIT_UNITS_S[unit] for number, unit in parts)
        return wait_s - now_s if wait_s > 1e9 else wait_s
    for read in (email.utils.parsedate_to_datetime, datetime.datetime.fromisoformat):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return read(text.strip()).timestamp() - now_s
    return None


#: Headers of a provider's answer that a client gets to see.
ANSWER_HEADERS: Final = ("x-request-id", "openai-processing-ms", "request-id", "cf-ray")
LIMIT_HEADERS: Final = tuple(
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
)


#: Kinds of calls whose cost has an upper bound; any other is refused under a hard budget.
BOUNDED_KINDS: Final = frozenset({"chat", "completions", "embeddings"})
MIN_CLAMPED_TOKENS: Final = 16
#: What a header that turns something on may say.
YES: Final = frozenset({"1", "true", "on", "yes"})


def parse_tags(text: str) -> Json:
    """`a=b,c=d` as an object; InvalidRequest for anything else."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if not all(middle for _, middle, _ in pairs):
        raise InvalidRequest("x-stockyard-tags is written a=b,c=d", param="x-stockyard-tags")
    return {name.strip(): value.strip() for name, _, value in pairs}


def read_max_cost(text: str) -> int:
    try:
        return parse_usd(text)
    except ValueError as error:
        raise InvalidRequest(f"x-stockyard-max-cost-usd: {error}", param="x-stockyard-max-cost-usd") from None


def presented_key(headers: Mapping[str, str], path_parameters: Mapping[str, str]) -> str:
    """The key a client sent, wherever its dialect puts it."""
    bearer = headers.get("authorization", "")
    if bearer[:7].lower() == "bearer ":
        return bearer[7:].strip()
    return (
        headers.get("x-api-key")
        or headers.get("x-goog-api-key")
        or headers.get("api-key")
        or path_parameters.get("$key", "")
    )


def is_admin_key(given: str, admin_key: str) -> bool:
    """Compared by digest, in constant time."""
    mine = hashlib.sha256(admin_key.encode()).digest()
    return hmac.compare_digest(hashlib.sha256(given.encode("utf-8", "surrogatepass")).digest(), mine)


#: The verbs that translate each kind of call: client's parse and render, provider's encode and decode.
VERBS_OF_KIND: Final[Mapping[str, tuple[str, str]]] = {
    "chat": ("encode", "decode"),
    "embeddings": ("encode_embeddings", "decode_embeddings"),
    "rerank": ("encode_rerank", "decode_rerank"),
}


class Cache:
    """The answers kept, in memory and on disk, the calls that equal ones wait for, and what all that saved.

    Bodies that may not lie on disk (`log_bodies` other than on, or redaction, whose originals come back in answers) are
    kept in memory alone.
    """

    def __init__(self, settings: Settings, store: LogStore, now_ms: Callable[[], int]) -> None:
        self.policy, self.ttl_ms = settings.cache, settings.cache_ttl * 1000
        self.is_shared = settings.cache_scope == "shared"
        self.memory = CacheMemory(int(settings.cache_mb * 1024 * 1024))
        self.entry_max_bytes = self.memory.max_bytes // ENTRY_MAX_SHARE
        on_disk = self.policy != "off" and settings.log_bodies == "on" and settings.redact == "off"
        self.shelf = CacheShelf(store, self.memory.max_bytes, now_ms()) if on_disk else None
        self.flights: dict[tuple[bytes, bytes], Flight] = {}
        self.generation = 0
        self.hits = self.misses = self.coalesced = self.saved_nanousd = 0
        self._store, self._now_ms = store, now_ms

    def covers(self, call: Call) -> bool:
        """Whether the call's answer may be kept; asked for every call, so it looks at no header and no key."""
        kind, dialect = call.endpoint.kind, DIALECTS[call.endpoint.dialect]
        return is_cacheable(self.policy, kind, call.canonical or call.request, call.request, dialect.stores_unasked)

    def recall(self, key: bytes, stream: bool) -> Entry | None:
        """An entry that memory holds, better in the form that is asked for."""
        now_ms = self._now_ms()
        return self.memory.get(slot_of(key, stream), now_ms) or self.memory.get(slot_of(key, not stream), now_ms)

    async def fetch(self, key: bytes, stream: bool) -> Entry | None:
        """An entry that only the disk holds; it goes back to memory."""
        now_ms, generation = self._now_ms(), self.generation
        if self.shelf is None or now_ms >= max(self.shelf.holds_until_ms, self.memory.pushed_out_until_ms):
            return None
        find = functools.partial(self.shelf.find, slot_of(key, stream), slot_of(key, not stream), now_ms)
        try:
            found = await asyncio.to_thread(find)
        except (sqlite3.Error, ValueError, TypeError, LookupError):  # what cannot be read is not there
            return None
        if not found or generation != self.generation:
            return None
        self.memory.put(found[0])
        return found[0]

    def put(self, entry: Entry, generation: int, replaces_all: bool = False) -> None:
        """Keep an entry, unless it is too large or the cache was emptied since its call began.

        With `replaces_all` the answer in the other form goes: a fresh one was asked for.
        """
        if replaces_all:
            other = slot_of(entry.key, not entry.stream)
            self.memory.drop(other)
            if self.shelf is not None:
                self.shelf.drop(other)
        if generation == self.generation and entry.size_bytes <= self.entry_max_bytes:
            self.memory.put(entry)
            if self.shelf is not None:
                self.shelf.put(entry, self._now_ms())

    async def clear(self) -> None:
        """Empty it. Answers on their way to it, from providers or from disk, are not kept either."""
        self.generation += 1
        self.memory.clear()
        if self.shelf is not None:
            self.shelf.clear()
            await self._store.flush()
            self.shelf.holds_until_ms = 0
            self.generation += 1
            self.memory.clear()

    async def view(self) -> Json:
        """For the operator: sizes now, counts since this process began."""
        entries, size = len(self.memory), self.memory.size_bytes
        if self.shelf is not None:
            await self._store.catch_up()
            entries, size = await asyncio.to_thread(self.shelf.size, self._now_ms())
        asked = self.hits + self.coalesced + self.misses
        scope = "shared" if self.is_shared else "key"
        return {
            "policy": self.policy, "scope": scope, "ttl_s": self.ttl_ms / 1000, "on_disk": self.shelf is not None,
            "max_bytes": self.memory.max_bytes, "entries": entries, "bytes": size,
            "memory_entries": len(self.memory), "memory_bytes": self.memory.size_bytes, "in_flight": len(self.flights),
            "hits": self.hits, "misses": self.misses, "coalesced": self.coalesced,
            "hit_ratio": (self.hits + self.coalesced) / asked if asked else None,
            "saved_usd": self.saved_nanousd / NANOUSD_PER_USD,
        }  # fmt: skip


class Rider:
    """One of the calls that a flight answers. While its client reads too slowly, what it has not got yet waits here."""

    def __init__(self, call: Call, client: Client | None) -> None:
        self.call, self.client = call, client
        self.got_content = self.is_paused = False
        self.renderer: Renderer | None = None
        self.landed: asyncio.Future[None] | None = None
        self.waiting: collections.deque[bytes] = collections.deque()
        self.waiting_bytes = 0

    def give(self, data: bytes) -> None:
        if self.is_paused or self.waiting:
            self.waiting.append(data)
            self.waiting_bytes += len(data)
        elif self.client is not None:
            self.client.send(data)

    def catch_up(self, whole: bool = False) -> None:
        """Give what waits until the client is full again, or all of it."""
        while self.waiting and self.client is not None and (whole or not self.is_paused):
            piece = self.waiting.popleft()
            self.waiting_bytes -= len(piece)
            self.client.send(piece)


class Flight:
    """One call to a provider for equal calls of clients: it is a `Client` to the stream, and gives to all riders.

    The work is done on the leader's Call, in a task of its own, so that no client's hang-up ends it for the others; the
    last one to leave ends it. Those who come late get a stream from its start. The provider is made to wait while no
    rider keeps up, or one is too far behind.
    """

    BEHIND_MAX_BYTES: ClassVar[int] = 1024 * 1024

    def __init__(self, gateway: Gateway, leader: Call, place: tuple[bytes, bytes]) -> None:
        self.leader = leader
        self.generation = gateway.cache.generation
        self.throttle: Callable[[bool], None] | None = None
        self.streamed: StreamedCall | None = None
        self.reply: Reply | None = None
        self.entry: Entry | None = None
        self._gateway, self._place = gateway, place
        self._riders: list[Rider] = []
        self._tape = Tape(gateway.cache.entry_max_bytes)
        self._holding = self._is_slow = False
        self._task: asyncio.Task[None] | None = None

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        self._gateway.cache.flights.setdefault(self._place, self)
        self._task = self._gateway.loop.create_task(work)
        self._task.add_done_callback(self._landed)

    @property
    def takes_riders(self) -> bool:
        """Whether one who comes now still gets all of it."""
        return self._tape.whole

    async def ride(self, rider: Rider) -> None:
        """Return when the flight has landed and the rider has got everything; raise what the flight ended with."""
        assert self._task is not None
        self._riders.append(rider)
        if rider.client is not None:
            rider.client.throttle = functools.partial(self._throttle, rider)
            self._board(rider)
        try:
            if not self._task.done():
                rider.landed = self._gateway.loop.create_future()
                await rider.landed
        finally:
            rider.renderer = self.streamed.renderer if self.streamed is not None else None
            self._leave(rider)
        rider.catch_up(whole=True)
        self._task.result()

    def _board(self, rider: Rider) -> None:
        """Give a late rider what was said so far."""
        if self._tape.pieces:
            self._begin(rider)
            self._mark(rider)
            for piece in self._tape.pieces:
                rider.give(piece)

    def _leave(self, rider: Rider) -> None:
        assert self._task is not None
        self._riders.remove(rider)
        if rider.client is not None:
            rider.client.throttle = None
        if self._task.done():
            return
        if rider.call is self.leader:
            rider.call.is_carried = True
        if self._riders:
            self._balance()
        else:
            self._unlist()
            self._task.cancel()

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._unlist()
        if not task.cancelled():
            task.exception()  # the riders raise it; where the last has left, nobody needs to
        for rider in self._riders:
            if rider.landed is not None and not rider.landed.done():
                rider.landed.set_result(None)
        if self.leader.is_carried:
            self._gateway.finish(self.leader)

    def _unlist(self) -> None:
        if self._gateway.cache.flights.get(self._place) is self:
            del self._gateway.cache.flights[self._place]

    # -- Client: the stream's end of it

    def begin_stream(self, headers: list[tuple[str, str]]) -> None:
        for rider in self._riders:
            if rider.call is self.leader and rider.client is not None:
                rider.client.begin_stream(headers)
            else:
                self._begin(rider)

    def send(self, data: bytes) -> None:
        self._tape.add(data)
        for rider in self._riders:
            if not rider.got_content:
                self._begin(rider)
                self._mark(rider)
            rider.give(data)
        if self._is_slow:
            self._balance()

    def end_stream(self, broken: bool) -> None:
        """Each rider ends its own."""

    def _begin(self, rider: Rider) -> None:
        if rider.call.status == 0 and rider.client is not None:
            rider.call.provider, rider.call.upstream_model = self.leader.provider, self.leader.upstream_model
            rider.call.dropped = self.leader.dropped
            self._gateway.commit(rider.call, rider.client)

    def _mark(self, rider: Rider) -> None:
        """Note a rider's first content; heartbeats before it do not count."""
        if not rider.got_content and self.streamed is not None and self.streamed.sent_content:
            rider.got_content = True
            rider.call.first_token_s = rider.call.first_token_s or self._gateway.tick()

    def _throttle(self, rider: Rider, paused: bool) -> None:
        rider.is_paused = paused
        if not paused:
            rider.catch_up()
        self._balance()

    def _balance(self) -> None:
        self._is_slow = any(rider.is_paused for rider in self._riders)
        behind = any(rider.waiting_bytes > self.BEHIND_MAX_BYTES for rider in self._riders)
        holding = behind or (bool(self._riders) and all(rider.is_paused for rider in self._riders))
        if holding is not self._holding and self.throttle is not None:
            self._holding = holding
            self.throttle(holding)


class Watcher:
    """One reader of the live log: events wait here up to a bound; past it they are dropped, counted, and told."""

    MAX_EVENTS: ClassVar[int] = 1000

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._lost = 0
        self.more = asyncio.Event()

    @property
    def is_full(self) -> bool:
        return len(self._events) >= self.MAX_EVENTS

    def put(self, event: bytes) -> None:
        if self.is_full:
            self._lost += 1
        else:
            self._events.append(event)
            self.more.set()

    async def take(self) -> bytes:
        """What has gathered; a comment where nothing comes for HEARTBEAT_S."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.more.wait(), HEARTBEAT_S)
        self.more.clear()
        events, self._events = self._events, []
        if self._lost:
            events.append(sse_event({"lost": self._lost}, "lost"))
            self._lost = 0
        return b"".join(events) or b": waiting\n\n"


class Gateway:
    """Everything one process needs to answer calls; made by `open_gateway`."""

    MAX_SHADOWS: ClassVar[int] = 64

    def __init__(
        self, settings: Settings, router: Router, prices: PriceBook, store: LogStore, upstream: Upstream, admin_key: str,
        clock: Callable[[], float] = time.time, randomness: random.Random | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.router, self.prices, self.store, self.upstream = settings, router, prices, store, upstream
        self.admin_key = admin_key
        self.clock = clock
        self.random = randomness or random.SystemRandom()
        self.loop = upstream.loop
        self.tick = time.monotonic  # uvloop's own clock moves in whole milliseconds
        self.new_id = IdSource(lambda: int(clock() * 1000), self.random.getrandbits)
        self.max_body_bytes = int(settings.max_body_mb * 1024 * 1024)
        self.cache = Cache(settings, store, lambda: int(clock() * 1000))
        self.draining = False
        self.in_flight = 0
        self.shadows: set[asyncio.Task[None]] = set()
        self.internal_errors = 0
        self.keys = KeyRing(b"")
        self.sessions = Sessions(self.random.randbytes)
        self.watchers: list[Watcher] = []
        self.ledger = Ledger((), self.new_id, int(clock() * 1000))
        self.rates = RateLimiter(None, {}, int(time.monotonic() * 1000))
        self.has_budgets = self.has_rates = False
        self.key_required = True
        self.decide_keys()
        self.journal: Journal | None = None
        #: Reads the settings anew: with what changes in stockyard.toml, and whether only to check. See `reloader`.
        self.reload: Callable[[Mapping[str, Any], bool], list[str]] | None = None
        self.stored_settled: Mapping[tuple[str, str], int] = {}
        self.set_budget_ids: list[str] = []
        self.signatures: dict[str, str] = {}
        self.google_tokens = GoogleTokens(upstream, clock)
        self._without_doors: set[str] = set()
        self.heed_routes()
        self._heads: dict[tuple[Any, ...], tuple[Origin, bytes]] = {}
        self._models_at_s: dict[str, float] = {}
        self._models: dict[str, list[Json]] = {}

    def adopt(self, settings: Settings, router: Router, prices: PriceBook) -> None:
        """Go on with other settings, providers and prices; calls under way end with what they began with."""
        self.settings, self.router, self.prices, self.upstream.deadlines = settings, router, prices, settings.deadlines
        self.upstream.heed(settings.deadlines)
        self.max_body_bytes = int(settings.max_body_mb * 1024 * 1024)
        self.cache.ttl_ms, self.cache.is_shared = settings.cache_ttl * 1000, settings.cache_scope == "shared"
        self.decide_keys()
        self._heads.clear()
        self._models.clear()
        self._models_at_s.clear()
        self.heed_routes()

    def heed_routes(self) -> None:
        for route in self.router.routes.values():
            self.upstream.heed(route.deadlines or self.upstream.deadlines)

    # -- the life of a call

    def begin(
        self,
        endpoint: Endpoint,
        headers: Mapping[str, str],
        body: bytes,
        client_ip: str,
        path_parameters: Mapping[str, str] | None = None,
    ) -> Call:
        now = self.clock()
        call = Call(self.new_id("req_"), int(now * 1000), self.tick(), endpoint, headers, body, client_ip)
        if path_parameters:
            call.path_parameters = path_parameters
        return call

    async def answer(self, call: Call, client: Client) -> Reply | None:
        """One client call from start to end; None when it was streamed through `client`."""
        self.in_flight += 1
        try:
            self.admit(call)
            self.read(call)
            if call.endpoint.dialect == "responses":
                await self.recall(call)
            self.interpret(call)
            self.limit(call)
            if call.stream:
                await self.stream(call, client)
                return None
            if call.endpoint.kind == "count_tokens":
                return await self.count(call)
            return await self.complete(call)
        except GatewayError as error:
            return self.refuse(call, error)
        except asyncio.CancelledError:
            call.is_gone = True
            raise
        except Exception as error:
            return self.refuse(call, self.internal_error(error))
        finally:
            if not call.is_carried:
                self.finish(call)

    def finish(self, call: Call) -> None:
        self.in_flight -= 1
        self.settle(call)

    def admit(self, call: Call) -> None:
        """Keys and limits; raises a GatewayError for a call that may not go on."""
        if self.draining:
            raise Draining("Stockyard is shutting down; send the request again in a moment", retry_after_s=1)
        if self.store.is_full:
            raise StorageUnavailable(
                "the request log cannot keep up; send the request again in a moment", retry_after_s=1
            )
        call.session = clean_header(call.headers.get("x-stockyard-session", ""))
        self.authenticate(call)

    def authenticate(self, call: Call) -> None:
        """Whose call it is, where a key is required; else whatever was sent is ignored. Tags of the key win."""
        tags = call.headers.get("x-stockyard-tags", "")
        call.tag_map = read_tags(parse_tags(tags), "x-stockyard-tags") if tags else {}
        if self.key_required:
            secret = presented_key(call.headers, call.path_parameters)
            if not (is_admin_key(secret, self.admin_key) if secret else self.is_dashboard(call.headers)):
                key = self.keys.authenticate(secret, int(self.clock() * 1000))
                if key.role != "client":
                    raise Unauthenticated("this key reads the log; calls need a client's key")
                call.key, call.key_id = key, key.id
                call.tag_map = key.tagged(call.tag_map)
        call.tags = ",".join(f"{name}={value}" for name, value in call.tag_map.items())

    def session_of(self, headers: Mapping[str, str]) -> Session | None:
        """The dashboard session of a request; a session that a virtual key opened ends with the key."""
        now_ms = int(self.clock() * 1000)
        session = self.sessions.find(headers.get("cookie", ""), now_ms)
        if session is not None and session.key_id:
            key = self.keys.by_id.get(session.key_id)
            return session if key is not None and key.status(now_ms) == "active" and key.role == session.role else None
        return session

    def is_dashboard(self, headers: Mapping[str, str]) -> bool:
        """Whether a call comes from the dashboard's playground: an admin's session with its header token."""
        session = self.session_of(headers)
        return session is not None and session.role == "admin" and session.takes_header(headers)

    def decide_keys(self) -> None:
        """Whether clients must send a key; decided anew whenever one is made."""
        mode = self.settings.require_key
        self.key_required = mode == "always" or (
            mode == "auto" and (len(self.keys) > 0 or not self.settings.is_loopback)
        )

    def limit(self, call: Call) -> None:
        """Take the call's place in its rate limits; LimitExceeded where there is none."""
        if self.has_rates or (call.key is not None and call.key.rate_limit is not None):
            asked = call.canonical or call.request
            cap = next((asked[name] for name in OUTPUT_CAP_FIELDS if isinstance(asked.get(name), int)), None)
            call.rate_hold = self.rates.admit(
                call.key, call.model, token_estimate(len(call.body), cap), int(time.monotonic() * 1000)
            )
            call.rated = True

    def read(self, call: Call) -> None:
        """The body as JSON, strictly, and what routing needs of it."""
        try:
            request = parse_json_object(call.body)
        except ValueError as error:
            raise InvalidRequest(f"the body is no JSON that Stockyard can pass on: {error}") from error
        call.request = request
        model = call.path_parameters.get("model") or request.get("model")
        if not isinstance(model, str) or not model:
            raise InvalidRequest("`model` must be a string that names a model, see GET /v1/models", param="model")
        call.model = model
        if self.router.routes and "x-stockyard-provider" not in call.headers:
            call.route = self.router.routes.get(model)

    def interpret(self, call: Call) -> None:
        """The canonical request, which translation, routing and guardrails read."""
        request, dialect = call.request, DIALECTS[call.endpoint.dialect]
        call.stream = call.endpoint.streams and dialect.wants_stream(request, call.path_parameters)
        if call.endpoint.kind in ("chat", "count_tokens"):
            call.canonical = dialect.parse(request, call.path_parameters)
        elif call.endpoint.kind == "embeddings":
            call.canonical = dialect.parse_embeddings(request, call.path_parameters)
        if call.route is not None and call.route.changes_body and call.endpoint.kind in ("chat", "completions"):
            self.apply_rules(call, call.route)
        if "$alt" in call.path_parameters:
            call.request = {**request, "$alt": call.path_parameters["$alt"]}

    @staticmethod
    def apply_rules(call: Call, route: Route) -> None:
        """Change what is asked as the route's rules say; where they change nothing, the client's bytes may still pass."""
        asked = call.request if call.canonical is None else call.canonical
        ruled = route.ruled(asked)
        if ruled == asked:
            return
        if asked is call.request:
            call.request, call.body = ruled, dump_json(ruled)
            call.canonical = ruled if call.canonical is not None else None
        else:
            call.canonical, call.must_translate, call.added_bytes = ruled, True, len(route.rules_text.encode())

    async def recall(self, call: Call) -> None:
        """Put what a stateful request refers to in its place: earlier turns and items that Stockyard keeps."""
        request, store = call.request, self.store
        previous, ids = request.get("previous_response_id"), referenced_ids(request)
        call.must_translate = STATE_MARK.encode() in call.body
        request.pop(ITEMS_KEY, None)
        if not isinstance(previous, str) and not ids:
            return
        await store.flush()
        stored = (
            await asyncio.to_thread(find_response, store, previous, call.key_id) if isinstance(previous, str) else None
        )
        items = await asyncio.to_thread(find_items, store, ids, call.key_id) if ids else {}
        if stored is not None and stored.response is not None:
            request = resume(request, stored.items)
            call.must_translate = True
        if items:
            request = {**request, ITEMS_KEY: items}
            call.must_translate = True
        call.request = request

    def remember(self, call: Call, response: Json | None, native: bool) -> None:
        """Keep a response that may be continued or fetched: whole, or only whose it is where the provider keeps it."""
        if response is None or call.endpoint.dialect != "responses" or call.request.get("store") is False:
            return
        response_id = response.get("id")
        if isinstance(response_id, str) and response_id:
            kept = (None, None) if native else (response, stored_items(call.request, response))
            keep_response(self.store, call, response_id, *kept)

    async def complete(self, call: Call) -> Reply:
        """A plain call: kept, or shared with an equal one under way, or the first attempt that succeeds."""
        key = await self.cache_key(call) if self.cache.covers(call) else None
        if key is None:
            return await self.first_success(call, self.attempt_plain, may_retry=lambda: True)
        if (entry := await self.kept(call, key)) is not None:
            self.credit(call, entry, "hit")
            return self.replay(call, entry)
        flight = await self.share(call, Rider(call, None), key)
        if flight.leader is call and flight.reply is not None:
            return flight.reply
        assert flight.entry is not None
        self.credit(call, flight.entry, "coalesced")
        return self.replay(call, flight.entry)

    async def count(self, call: Call) -> Reply:
        """Count input tokens: the provider's own count where it speaks the client's dialect, else an estimate."""
        [target, *_] = await self.route(call)
        client = DIALECTS[call.endpoint.dialect]
        row = target.provider.row
        if "count_tokens" in row.offers and DIALECTS[row.dialect].family == client.family:
            return await self.attempted(call, target, self.attempt_plain)
        call.provider, call.upstream_model, call.status = row.id, target.model, 200
        call.answer = dump_json(client.count_tokens(call.canonical or {}, call.request))
        return Reply(200, [("content-type", "application/json"), *self.answer_headers(call)], call.answer)

    async def stream(self, call: Call, client: Client) -> None:
        """A streamed call: kept, or shared with an equal one under way, or asked for."""
        key = await self.cache_key(call) if self.cache.covers(call) else None
        if key is None:
            streamed = StreamedCall(self, call, client)
            await self.end_stream(call, client, self.run_stream(streamed, call), lambda: streamed.renderer)
        elif (entry := await self.kept(call, key)) is not None:
            self.credit(call, entry, "hit")
            self.replay_stream(call, client, entry)
        else:
            rider = Rider(call, client)
            await self.end_stream(call, client, self.share_stream(call, rider, key), lambda: rider.renderer)

    async def end_stream(
        self, call: Call, client: Client, work: Awaitable[None], renderer: Callable[[], Renderer | None]
    ) -> None:
        """End a client's stream as its work ends: a failure after its headers went out is an event of the stream."""
        try:
            await work
            await self.close_row(call)
            client.end_stream(broken=False)
        except GatewayError as error:
            if call.status == 0:
                raise
            call.status, call.error = error.status, error.code
            client.send((renderer() or self.renderer(call)).fail(error, call.id))
            await self.close_row(call)
            client.end_stream(broken=True)

    async def share_stream(self, call: Call, rider: Rider, key: bytes) -> None:
        flight = await self.share(call, rider, key)
        if flight.leader is not call:
            assert flight.entry is not None
            self.credit(call, flight.entry, "coalesced")
            call.transcript = flight.leader.transcript

    async def run_stream(self, streamed: StreamedCall, call: Call) -> None:
        """The first attempt that reaches its first content decides; after that nothing is retried."""
        try:
            await self.first_success(call, streamed.attempt, may_retry=lambda: not streamed.sent_content)
            call.status = call.status or 200
            if streamed.response is not None:
                self.remember(call, streamed.response, native=streamed.is_native)
        finally:
            streamed.close()

    def renderer(self, call: Call) -> Renderer:
        return DIALECTS[call.endpoint.dialect].renderer(call.request, self.new_id, int(self.clock()))

    # -- answers kept and shared

    async def cache_key(self, call: Call) -> bytes | None:
        """The key of the call's answer; None where the client wants nothing to do with the cache."""
        control = call.headers.get("x-stockyard-cache", "")
        if control and control not in ("off", "refresh"):
            raise InvalidRequest("x-stockyard-cache is `off` or `refresh`", param="x-stockyard-cache")
        if control == "off":
            return None
        targets = await self.route(call)
        if call.key is not None:  # what was kept may be more than the key may have by now
            call.key.check(targets[0].provider.id, call.model, targets[0].model)
        call.cache = "miss"
        endpoint, dialect = call.endpoint, DIALECTS[call.endpoint.dialect]
        names = (*dialect.forwarded_headers, "x-stockyard-strict")
        headers = [(name, clean_header(text)) for name in names if (text := call.headers.get(name))]
        if call.route is not None:  # any of its targets may have given the answer, and rules changed the question
            targets = sorted(targets, key=lambda target: (target.provider.id, target.model))
            headers.append(("route", call.route.rules_text))
        scope = "" if self.cache.is_shared else call.key_id
        place = endpoint.kind if endpoint.streams else endpoint.path
        return cache_key(scope, place, endpoint.dialect, targets, call.request, headers, self.settings.redact)

    async def kept(self, call: Call, key: bytes) -> Entry | None:
        """The kept answer in the form that the call asks for; None where there is none, or a fresh one is wanted."""
        if "x-stockyard-cache" not in call.headers:
            entry = self.cache.recall(key, call.stream) or await self.cache.fetch(key, call.stream)
            if entry is not None and entry.stream is not call.stream:
                entry = self.converted(call, entry)
                if entry is not None:
                    self.cache.memory.put(entry)
            if entry is not None and (not call.stream or entry.content_type == self.stream_type(call)):
                return entry
        return None

    def converted(self, call: Call, entry: Entry) -> Entry | None:
        """A plain answer as a stream of the same dialect, or the other way round; None where something would be lost."""
        if call.endpoint.kind != "chat":
            return None
        dialect = DIALECTS[call.endpoint.dialect]
        translation = self.translation(call, self.target_of(entry))
        try:
            if call.stream:
                chunks = chunks_of(dialect.decode(orjson.loads(entry.body), translation))
                return None if chunks is None else self.rendered_stream(call, entry, chunks)
            completion = completion_of(entry.events(with_usage=True), dialect, translation)
            if completion is None:
                return None
            body = dump_json(self.rendered(call, completion))
            return dataclasses.replace(
                entry, stream=False, content_type="application/json", body=body, usage_event=b"", tail=b""
            )
        except (GatewayError, ValueError, LookupError, TypeError, AttributeError):
            return None  # not a shape that can be told in the other form: the call is a miss

    def rendered_stream(self, call: Call, entry: Entry, chunks: list[Json]) -> Entry:
        renderer, usage_event = self.renderer(call), b""
        if DIALECTS[call.endpoint.dialect].usage_on_request and not chunks[-1]["choices"]:
            usage_event = sse_event(chunks.pop())
        body, kind = b"".join(map(renderer.feed, chunks)), self.stream_type(call)
        return dataclasses.replace(
            entry, stream=True, content_type=kind, body=body, usage_event=usage_event, tail=renderer.close()
        )

    def target_of(self, answered: Call | Entry) -> Target:
        """Who gave an answer. The key of an entry names its targets, so they are configured."""
        return Target(self.router.providers[answered.provider], answered.upstream_model)

    @staticmethod
    def stream_type(call: Call) -> str:
        return DIALECTS[call.endpoint.dialect].stream_type_of(call.request)

    def credit(self, call: Call, entry: Entry, how: str) -> None:
        """What the log tells of an answer that was not asked for anew: it cost nothing, and saved what it once cost."""
        call.cache, call.cost_nanousd, call.price_id = how, 0, entry.price_id
        call.provider, call.upstream_model, call.dropped = entry.provider, entry.upstream_model, entry.dropped
        call.usage, call.usage_estimated, call.finish_reason = entry.usage, entry.usage_estimated, entry.finish_reason
        call.saved_nanousd = entry.cost_nanousd or 0
        self.cache.saved_nanousd += call.saved_nanousd
        if how == "hit":
            self.cache.hits += 1
        else:
            self.cache.coalesced += 1

    def replay(self, call: Call, entry: Entry) -> Reply:
        call.status, call.answer = 200, entry.body
        return Reply(200, [("content-type", entry.content_type), *self.answer_headers(call)], entry.body)

    def replay_stream(self, call: Call, client: Client, entry: Entry) -> None:
        dialect = DIALECTS[call.endpoint.dialect]
        asked = not dialect.usage_on_request or bool((call.request.get("stream_options") or {}).get("include_usage"))
        events = entry.events(asked)
        if not entry.transcripts:
            entry.transcripts.append(KeptTranscript(events, dialect, self.translation(call, self.target_of(entry))))
        call.transcript = entry.transcripts[0]
        self.commit(call, client)
        call.first_token_s = self.tick()
        client.send(events)
        client.end_stream(broken=False)

    async def share(self, call: Call, rider: Rider, key: bytes) -> Flight:
        """Ride along with an equal call under way, or lead.

        A leader's failure is not believed: whoever waited tries again, the first of them leading the others. A second
        failure of the provider is; otherwise many calls would wait for each other's time-outs in turn.
        """
        place = (key, dump_json(call.request.get("stream_options")) if call.stream else b"")
        failures = 0
        while (flight := self.cache.flights.get(place)) is not None and flight.takes_riders:
            if "x-stockyard-cache" in call.headers:  # `refresh`: what is under way began before it was asked for
                break
            call.cache, call.cost_nanousd = "coalesced", 0
            try:
                await flight.ride(rider)
                return flight
            except GatewayError as error:
                failures += isinstance(error, UpstreamError)
                if failures == 2 or rider.got_content:
                    raise
        call.cache, call.cost_nanousd = "miss", None
        self.cache.misses += 1
        flight = Flight(self, call, place)
        flight.start(self.fly(flight, key))
        await flight.ride(rider)
        return flight

    async def fly(self, flight: Flight, key: bytes) -> None:
        """The work of a flight: ask the provider on the leader's call, and keep the answer where it may be kept."""
        call = flight.leader
        if call.stream:
            streamed = flight.streamed = StreamedCall(self, call, flight, self.cache.entry_max_bytes)
            await self.run_stream(streamed, call)
            body, usage_event, tail = streamed.tape.parts()
            is_whole = streamed.tape.whole and bool(streamed.finishes) and streamed.finishes <= WHOLE_FINISHES
            entry = self.entry_of(call, key, self.stream_type(call), body, usage_event, tail)
        else:
            reply = flight.reply = await self.first_success(call, self.attempt_plain, may_retry=lambda: True)
            is_whole = reply.status == 200 and self.is_whole(call, reply.body)
            entry = self.entry_of(call, key, dict(reply.headers)["content-type"], reply.body)
        flight.entry = entry
        if is_whole and self.cache.ttl_ms > 0:
            self.cache.put(entry, flight.generation, replaces_all="x-stockyard-cache" in call.headers)

    def is_whole(self, call: Call, body: bytes) -> bool:
        """Whether a plain answer was neither truncated nor filtered."""
        if call.endpoint.kind not in ("chat", "completions"):
            return True
        if call.finish_reason and (call.canonical or call.request).get("n") in (None, 1):
            return FINISH_REASONS.get(call.finish_reason, call.finish_reason) in WHOLE_FINISHES
        try:
            completion: Json = orjson.loads(body)
            if call.endpoint.kind == "chat":
                translation = self.translation(call, self.target_of(call))
                completion = DIALECTS[call.endpoint.dialect].decode(completion, translation)
            finishes = finishes_of(completion)
        except (GatewayError, ValueError, LookupError, TypeError, AttributeError):
            return False
        return bool(finishes) and finishes <= WHOLE_FINISHES

    def entry_of(
        self, call: Call, key: bytes, content_type: str, body: bytes, usage_event: bytes = b"", tail: bytes = b""
    ) -> Entry:
        return Entry(
            key, call.key_id, call.stream, int(self.clock() * 1000 + self.cache.ttl_ms), content_type, body, usage_event, tail,
            call.provider, call.upstream_model, call.usage, call.usage_estimated, call.cost_nanousd, call.price_id,
            call.finish_reason, tuple(call.dropped),
        )  # fmt: skip

    # -- attempts

    async def first_success(
        self, call: Call, attempt: Callable[[Call, Target], Awaitable[T]], may_retry: Callable[[], bool]
    ) -> T:
        """The first answer: of the one target that the name means, or of those that its route names."""
        targets = await self.route(call)
        self.router.retries.calls += 1
        if call.route is None:
            return await self.tried(call, targets[0], attempt, may_retry, self.settings.retries)
        if call.route.shadow:
            self.shadow(call, call.route)
        work = functools.partial(self.in_turn, route=call.route, attempt=attempt, may_retry=may_retry)
        if call.route.hedge_after_ms:
            return await self.hedged(call, targets, work, call.route.hedge_after_ms / 1000)
        return await work(call, iter(targets))

    async def in_turn(
        self, call: Call, pending: Iterator[Target], route: Route, attempt: Callable[[Call, Target], Awaitable[T]],
        may_retry: Callable[[], bool],
    ) -> T:  # fmt: skip
        """Try a route's targets in order, passing over those whose breaker is open or whose keys rest."""
        several, last = len(call.targets) > 1, None
        retries = route.retries if route.retries is not None else 0 if several else self.settings.retries
        for target in pending:
            if several and self.router.rests(target, self.tick()):
                continue
            try:
                return await self.tried(call, target, attempt, may_retry, retries)
            except UpstreamError as error:
                if not several or not may_retry() or not reaction_to(error).elsewhere:
                    raise
                last = error
            except (Forbidden, BudgetExceeded):  # of a fallback: it is no more open to this call than one that failed
                if last is None:
                    raise
        raise self.exhausted(call, route) from last

    async def hedged(
        self, call: Call, targets: Sequence[Target], work: Callable[[Call, Iterator[Target]], Coroutine[Any, Any, T]], after_s: float
    ) -> T:  # fmt: skip
        """Ask the next target as well when none has answered in time. The first answer, or first content, wins; the
        other is cut off and its hold settled. Each runs on a branch of the call, so that they cannot mix."""
        race, pending, timeout_s = Race(call, self.loop), collections.deque(targets), cast(float | None, after_s)
        running: dict[asyncio.Future[Any], Call] = {}

        def turns() -> Iterator[Target]:
            while pending:
                yield pending.popleft()

        def run() -> None:
            branch = race.branch()
            running[self.loop.create_task(work(branch, turns() if pending else iter(targets[:1])))] = branch

        run()
        try:
            while True:
                wanted = [*running] if race.winner is not None else [*running, race.decided]
                done, _ = await asyncio.wait(wanted, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                timeout_s = None
                for task in done - {race.decided}:
                    branch = running.pop(task)
                    if not running or branch is race.winner or (race.winner is None and task.exception() is None):
                        race.winner = branch
                        return cast(T, task.result())
                if race.winner is not None:
                    await self.cut_off([task for task, branch in running.items() if branch is not race.winner])
                    running = {task: branch for task, branch in running.items() if branch is race.winner}
                elif not done and self.router.retries.take(self.tick()):
                    run()
        finally:
            await self.cut_off(running)
            if race.winner is not None:
                race.end(race.winner)

    @staticmethod
    async def cut_off(tasks: Iterable[asyncio.Future[Any]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def shadow(self, call: Call, route: Route) -> None:
        """Send a copy of some calls to the route's shadow target as well. It has a row and a hold of its own, and its
        answer goes nowhere; where many are under way, or money is short, there is none."""
        if self.random.random() >= route.shadow_fraction or len(self.shadows) >= self.MAX_SHADOWS:
            return
        copied = copy.copy(call)
        copied.id, copied.shadow_of, copied.attempts = self.new_id("req_"), call.id, []
        copied.cache, copied.cost_nanousd, copied.rate_hold, copied.rated = "bypass", None, None, False
        copied.status, copied.is_carried = 0, False
        copied.targets = [route.shadow[0].target]
        self.in_flight += 1
        task = self.loop.create_task(self.run_shadow(copied))
        self.shadows.add(task)
        task.add_done_callback(self.shadows.discard)

    async def run_shadow(self, call: Call) -> None:
        [target] = call.targets
        try:
            if call.stream:
                streamed = StreamedCall(self, call, Nobody())
                try:
                    await self.attempted(call, target, streamed.attempt)
                finally:
                    streamed.close()
            else:
                await self.attempted(call, target, self.attempt_plain)
        except GatewayError as error:
            call.status, call.error = error.status, error.code
        except Exception as error:
            call.status, call.error = 500, self.internal_error(error).code
        finally:
            self.finish(call)

    def exhausted(self, call: Call, route: Route) -> UpstreamExhausted:
        """Every target failed or rests: which, how, and when another try may help."""
        tried = [
            {"provider": line.provider, "model": line.model, "status": line.status, "code": line.error,
             "ms": round(line.ended_ms - line.started_ms, 1)}
            for line in call.attempts
        ]  # fmt: skip
        rests = [rest_s for target in call.targets if (rest_s := self.router.rests(target, self.tick()))]
        throttled = bool(tried) and all(line["status"] == LimitExceeded.status for line in tried)
        shown = (
            ", ".join(f"{line['provider']}/{line['model']}: {line['code']}" for line in tried)
            or "all of them rest after failures"
        )
        return UpstreamExhausted(
            f"no target of the route `{route.name}` answered ({shown})",
            status=LimitExceeded.status if throttled else None, type=LimitExceeded.type if throttled else None,
            fields={"attempts": tried}, retry_after_s=min(rests, default=None),
        )  # fmt: skip

    async def tried(
        self, call: Call, target: Target, attempt: Callable[[Call, Target], Awaitable[T]], may_retry: Callable[[], bool],
        retries: int,
    ) -> T:  # fmt: skip
        """One target, again after a failure that may pass: with another key at once, else after a while."""
        tries = 0
        while True:
            try:
                return await self.attempted(call, target, attempt)
            except UpstreamError as error:
                tries += 1
                wait_s = self.router.retry_wait_s(target, error, tries, retries, self.tick(), self.random.random())
                if wait_s is None or not may_retry():
                    raise
            await asyncio.sleep(wait_s)

    async def attempted(self, call: Call, target: Target, attempt: Callable[[Call, Target], Awaitable[T]]) -> T:
        """One attempt, with its hold, its line in the log, and what it tells of its target."""
        if call.key is not None:
            call.key.check(target.provider.id, call.model, target.model)
        hold = self.hold(call, target)
        call.provider, call.upstream_model = target.provider.id, target.model
        began_s, health = self.tick(), target.health
        is_probe, outcome = health is not None and health.begin(began_s), None
        line = Attempt(target.provider.id, target.model, (began_s - call.started_s) * 1000)
        call.attempts.append(line)
        try:
            if len(call.attempts) == 1:
                self.store.begin(call)
                if self.store.full_sync:
                    await self.store.journal.synced()
            if target.provider.row.key_is_file:
                await self.google_tokens.refresh(target.provider.keys[0])
            try:
                result = await attempt(call, target)
            except UpstreamRefused as error:
                if not self._lacks_door(call, target, error):
                    raise
                result = await attempt(call, target)
            line.status, outcome = 200, True
            return result
        except GatewayError as error:
            line.status, line.error = error.status, error.code
            if isinstance(error, UpstreamError):
                self.router.note_failure(target, call.upstream_key, error, self.tick())
                outcome = False if reaction_to(error).breaks else None
            raise
        except asyncio.CancelledError:
            line.error = "cancelled"
            raise
        finally:
            if hold is not None:
                self.charge(call, hold, line)
            ended_s = self.tick()
            call.upstream_s += ended_s - began_s
            line.ended_ms = (ended_s - call.started_s) * 1000
            if health is not None:
                health.end(is_probe, outcome, (call.first_token_s or ended_s) - began_s, ended_s)

    def hold(self, call: Call, target: Target, bounded: bool = True) -> Hold | None:
        """Set the most an attempt can cost aside in every budget it touches, durably; None where no money is limited."""
        most = call.headers.get("x-stockyard-max-cost-usd")
        if not self.has_budgets and most is None:
            return None
        now_ms, provider, tags = int(self.clock() * 1000), target.provider.id, call.tag_map
        hard = self.ledger.is_hard_limited(call.key, tags, call.model, provider)
        cap, needed = self.cost_bound(call, target) if bounded else (None, None)
        if hard and needed and cap is not None:
            room = self.ledger.headroom(call.key, tags, call.model, provider, needed, now_ms)
            if 0 < room < needed:
                cap, needed = self.cost_bound(call, target, room)
                call.clamped = True
        if most is not None and (needed is None or needed > read_max_cost(most)):
            shown = "is not known" if needed is None else f"may be ${format_usd(needed)}"
            raise BudgetExceeded(
                f"the cost of this call {shown}, more than x-stockyard-max-cost-usd allows ({clean_header(most, 20)})"
            )
        hold = self.ledger.admit(call.key, tags, call.model, provider, needed, now_ms)
        call.output_cap = cap.tokens if cap is not None and cap.injected and (hard or most is not None) else None
        if hold.record is not None and self.journal is not None:
            try:
                self.journal.append(hold.record)
            except StorageUnavailable:
                self.ledger.release(hold, now_ms)
                raise
        return hold

    def cost_bound(
        self, call: Call, target: Target, room_nanousd: int | None = None
    ) -> tuple[OutputCap | None, int | None]:
        """The output cap and the most the attempt can cost under it; None where no bound is known.

        With `room_nanousd` the cap is lowered until the cost fits.
        """
        price = self.prices.find(target.provider.id, target.model, call.ts_ms / 1000)
        request = call.canonical or call.request
        if price is None or call.endpoint.kind not in BOUNDED_KINDS:
            return None, None
        family = DIALECTS[target.provider.row.dialect].family
        tokens_in = input_token_bound(
            request, text_bytes(call.body, call.request) + call.added_bytes, family, price.context_tokens
        )
        if tokens_in is None:
            return None, None
        if call.endpoint.kind == "embeddings":
            return None, price.upper_bound(tokens_in, 0)
        name = next((name for name in OUTPUT_CAP_FIELDS if request.get(name) is not None), OUTPUT_CAP_FIELDS[0])
        cap = output_token_cap(request, name, price.max_output_tokens)
        if room_nanousd is not None:
            affordable = cap.total_tokens
            while affordable and price.upper_bound(tokens_in, affordable) > room_nanousd:
                base = price.upper_bound(tokens_in, 0)
                spare = room_nanousd - base
                step = (price.upper_bound(tokens_in, affordable) - base) / affordable
                affordable = min(affordable - 1, int(spare / step)) if spare > 0 else 0
            if affordable < MIN_CLAMPED_TOKENS:
                return cap, price.upper_bound(tokens_in, cap.total_tokens)
            cap = output_token_cap(request, name, price.max_output_tokens, affordable)
        return cap, price.upper_bound(tokens_in, cap.total_tokens)

    def charge(self, call: Call, hold: Hold, line: Attempt) -> None:
        """End a hold exactly once: at the cost where it is known, released where surely nothing was billed, else whole."""
        now_ms = int(self.clock() * 1000)
        exact = call.usage is not None and not call.usage_estimated and call.cost_nanousd is not None
        if line.status == 200 and exact:
            ended = self.ledger.settle(hold, call.cost_nanousd, now_ms)
        elif line.billed == "no":
            ended = self.ledger.release(hold, now_ms)
        else:
            ended = self.ledger.settle(hold, None if hold.bounded else call.cost_nanousd or 0, now_ms)
        if hold.balances:
            line.budget = {
                "budgets": [[balance.budget.id, balance.window] for balance in hold.balances],
                "held_usd": hold.nanousd / NANOUSD_PER_USD,
                "charged_usd": ended.cost_nanousd / NANOUSD_PER_USD,
            }
        self.record_end(ended)

    def record_end(self, ended: Settlement) -> None:
        if ended.record is not None and self.journal is not None:
            try:
                self.journal.append(ended.record)
            except StorageUnavailable as error:  # the hold stays on disk: the next start charges it whole, never less
                print_error(f"a settlement could not be recorded: {error.message}")
            if self.journal.is_long:
                self.checkpoint()
        for event in ended.events:
            spent = f"${format_usd(event.settled_nanousd)} of ${format_usd(event.limit_nanousd)}"
            print_error(f"budget {event.budget_id}: {event.percent} % spent in {event.window} ({spent})")

    def checkpoint(self) -> None:
        """Keep the balances in SQLite and go on in a new journal; the old ones go once that is committed."""
        if self.journal is None:
            return
        generation = self.journal.turn()
        books, year_ago_ms = self.ledger.books(), int(self.clock() * 1000) - 366 * DAY_MS
        # Balances of budgets that are not configured now are kept as well: taking one away and back reopens nothing.
        kept = {
            at: nanousd
            for at, nanousd in self.stored_settled.items()
            if at[1] == "total" or window_start_ms(at[1]) > year_ago_ms
        }
        books.settled = {**kept, **books.settled}
        write_books(self.store, books, generation)

    def _lacks_door(self, call: Call, target: Target, error: UpstreamRefused) -> bool:
        """Whether a host behind a moved base URL has no path for the client's own dialect: then its usual one is asked."""
        row = target.provider.row
        unknown_path = error.status in (404, 405) and error.code not in (
            "model_not_found",
            "previous_response_not_found",
        )
        if not unknown_path or call.endpoint.dialect not in row.also_speaks or row.id in self._without_doors:
            return False
        if target.provider.base_url == row.base_url:
            return False
        self._without_doors.add(row.id)
        return True

    async def attempt_plain(self, call: Call, target: Target) -> Reply:
        if call.endpoint.kind == "embeddings" and (pieces := self.pieces_of(call, target)):
            return await self.attempt_pieces(call, target, *pieces)
        outgoing = self.prepare(call, target)
        answer = await self.fetch(target, outgoing)
        if answer.status >= 300:
            raise read_refusal(outgoing.dialect, answer)
        while outgoing.dialect.follows and (url := self.next_address(outgoing, answer)):
            answer = await self.fetch(target, self.following(target, outgoing, url))
        body = self.read_answer(call, target, outgoing, answer)
        call.status, call.answer = answer.status, body
        kind = (
            answer.headers.get("content-type", "application/json")
            if outgoing.translation is None
            else "application/json"
        )
        headers = [("content-type", kind), *self.answer_headers(call)]
        names = ANSWER_HEADERS if call.rated else (*ANSWER_HEADERS, *LIMIT_HEADERS)
        headers += [(name, answer.headers[name]) for name in names if name in answer.headers]
        return Reply(answer.status, headers, body)

    def pieces_of(self, call: Call, target: Target) -> tuple[list[Any], int] | None:
        """The texts to embed and how many one call takes, where they are more than that."""
        texts = (call.canonical or {}).get("input")
        size = self.dialect_for(call, target).texts_at_once(target.model)
        return (texts, size) if isinstance(texts, list) and len(texts) > size and isinstance(texts[0], str) else None

    async def attempt_pieces(self, call: Call, target: Target, texts: list[Any], size: int) -> Reply:
        """Embeddings of more texts than one call takes: several calls, one answer."""
        gate = asyncio.Semaphore(8)

        async def embed(piece: list[Any]) -> Json:
            outgoing = self.prepare(call, target, {**(call.canonical or {}), "input": piece})
            async with gate:
                answer = await self.fetch(target, outgoing)
            if answer.status >= 300:
                raise read_refusal(outgoing.dialect, answer)
            assert outgoing.translation is not None
            return outgoing.dialect.decode_embeddings(orjson.loads(plain_body(answer)), outgoing.translation)

        answers = await asyncio.gather(*(embed(texts[at : at + size]) for at in range(0, len(texts), size)))
        rows = [row for answer in answers for row in answer["data"]]
        tokens = sum(_count(answer["usage"].get("prompt_tokens")) for answer in answers)
        merged = {**answers[0], "data": [{**row, "index": at} for at, row in enumerate(rows)]}
        merged["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
        self.learn(call, target, read_openai_usage(merged["usage"]), "")
        call.status, call.answer = 200, dump_json(self.rendered(call, merged))
        return Reply(200, [("content-type", "application/json"), *self.answer_headers(call)], call.answer)

    @staticmethod
    def next_address(outgoing: Outgoing, answer: PlainAnswer) -> str | None:
        assert outgoing.translation is not None
        if answer.status >= 300:
            raise read_refusal(outgoing.dialect, answer)
        try:
            return outgoing.dialect.follow(orjson.loads(plain_body(answer)), outgoing.translation)
        except orjson.JSONDecodeError:
            raise UpstreamError("the provider's answer is no JSON", code="upstream_malformed") from None

    def following(self, target: Target, outgoing: Outgoing, url: str) -> Outgoing:
        """The request for an address that an answer named; the dialect has checked whose it is."""
        parts = urllib.parse.urlsplit(url)
        there = dataclasses.replace(target.provider, base_url=f"{parts.scheme}://{parts.netloc}")
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        passed = (("accept", "text/event-stream"),) if outgoing.translation and outgoing.translation.stream else ()
        head = build_head(there, outgoing.dialect, path, self.next_key(target.provider), passed, method="GET")
        return dataclasses.replace(outgoing, origin=self.upstream.origin(there.base_url), head=head, body=b"")

    async def fetch(self, target: Target, outgoing: Outgoing) -> PlainAnswer:
        """Send one request and gather the whole answer; the provider is cut off when the caller is cancelled."""
        answer = PlainAnswer(self.loop)
        exchange = await self.exchange(target, outgoing, answer)
        try:
            await answer.done
        finally:
            if not answer.done.done() or answer.done.cancelled():
                exchange.abort()
        return answer

    async def exchange(self, target: Target, outgoing: Outgoing, sink: Sink) -> UpstreamConnection | EchoExchange:
        if target.provider.base_url.startswith("builtin:"):
            return EchoExchange(self.loop, sink, echo(outgoing.kind, outgoing.body))
        return await self.upstream.send(outgoing.origin, outgoing.to_bytes(), sink, outgoing.deadlines)

    def read_answer(self, call: Call, target: Target, outgoing: Outgoing, answer: PlainAnswer) -> bytes:
        """Learn usage and cost from a plain answer, and give the body for the client."""
        body = plain_body(answer)
        if call.endpoint.kind in BINARY_KINDS and not answer.headers.get("content-type", "").startswith(
            "application/json"
        ):
            return body
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise UpstreamError(
                "the provider answered 200 with something that is no JSON", code="upstream_malformed"
            ) from None
        if not isinstance(document, dict):
            raise UpstreamError("the provider's answer is no JSON object", code="upstream_malformed")
        spoken = shape_of(document)
        if outgoing.kind == "chat" and spoken and spoken != outgoing.dialect.family and spoken in DIALECTS:
            translation = outgoing.translation or self.translation(call, target)
            outgoing = dataclasses.replace(outgoing, dialect=DIALECTS[spoken], translation=translation)
        if outgoing.translation is None:
            if document.get("error") and "choices" not in document:
                refuse_error_event(document, outgoing.dialect)
            usage = read_usage(outgoing.dialect, document, target.provider.row)
            self.learn(call, target, usage, finish_reason_of(document))
            self.remember(call, document, native=True)
            return body
        completion = getattr(outgoing.dialect, VERBS_OF_KIND[outgoing.kind][1])(document, outgoing.translation)
        usage = read_openai_usage(completion["usage"]) if completion.get("usage") else None
        for choice in completion.get("choices") or ():
            self.keep_signatures(signatures_of(choice.get("message") or {}))
        self.learn(call, target, usage, finish_reason_of(completion))
        call.dropped = outgoing.translation.dropped
        if call.endpoint.dialect == "responses":
            completion["id"] = call.id  # it will be asked for by this id, so it must be ours and never repeat
        answered = self.rendered(call, completion)
        self.remember(call, answered, native=False)
        return dump_json(answered)

    @staticmethod
    def rendered(call: Call, completion: Json) -> Json:
        """A canonical answer in the client's dialect."""
        client = DIALECTS[call.endpoint.dialect]
        if call.endpoint.kind == "embeddings":
            return client.render_embeddings(completion, call.request, call.path_parameters)
        return client.render(completion, call.request) if call.endpoint.kind == "chat" else completion

    def keep_signatures(self, found: Mapping[str, str]) -> None:
        """Remember signatures for the next turn of the conversation; the newest ten thousand."""
        self.signatures |= found
        while len(self.signatures) > 10_000:
            del self.signatures[next(iter(self.signatures))]

    def learn(self, call: Call, target: Target, usage: Usage | None, finish_reason: str) -> None:
        call.finish_reason = finish_reason
        if usage is not None:
            call.usage = usage
            self.price(call, target, usage)

    def price(self, call: Call, target: Target, usage: Usage) -> int | None:
        """Charge a usage to the call; None, never zero, where the price is unknown."""
        price = self.prices.find(target.provider.id, target.model, call.ts_ms / 1000)
        if price is None:
            return None
        call.price_id, call.cost_nanousd = price.id, price.cost(usage)
        return call.cost_nanousd

    def refuse(self, call: Call, error: GatewayError) -> Reply:
        """An error as the client's dialect says it."""
        status, body = DIALECTS[call.endpoint.dialect].render_error(error, call.id)
        call.status, call.error = status, error.code
        if isinstance(error, LimitExceeded):
            call.refusal = error.fields
        call.answer = dump_json(body)
        headers = [("content-type", "application/json"), *self.answer_headers(call)]
        if error.retry_after_s is not None:
            headers.append(("retry-after", str(max(1, math.ceil(error.retry_after_s)))))
        elif status in (429, 503):
            headers.append(("retry-after", "1"))
        if isinstance(error, UpstreamError):  # the official SDKs would otherwise multiply the tries made here
            headers.append(("x-should-retry", "false"))
        return Reply(status, headers, call.answer)

    def turn_away(self, call: Call, error: GatewayError) -> Reply:
        """Refuse a call whose body was never read, with its row."""
        reply = self.refuse(call, error)
        self.settle(call)
        return reply

    def internal_error(self, error: Exception) -> GatewayError:
        self.internal_errors += 1
        print_error(f"internal error: {type(error).__name__}", error)
        return GatewayError("Stockyard met an error of its own; its log has the details under this request id")

    def settle(self, call: Call) -> None:
        """Close the call: exactly one row, however it ended; a stream's before its last byte leaves."""
        if call.ended_s:
            return
        call.ended_s = self.tick()
        if call.is_gone:
            call.status, call.error = ClientGone.status, ClientGone.code
        call.status = call.status or 500
        if call.rate_hold is not None:
            told = call.usage.prompt_tokens + call.usage.completion_tokens if call.usage else None
            self.rates.settle(call.rate_hold, told if call.attempts else 0)
        self.store.put(call)
        if self.watchers:
            self.tell(call)

    def tell(self, call: Call) -> None:
        """Show a finished call to those who watch the log."""
        event = b""
        for watcher in self.watchers:
            if not event and not watcher.is_full:
                row = log_row(call).fields()
                event = sse_event(public_row(row), "request")
            watcher.put(event)

    async def close_row(self, call: Call) -> None:
        """Close the call, on the disk itself where that is asked for: the end of its answer may leave."""
        self.settle(call)
        if self.store.full_sync:
            with contextlib.suppress(StorageUnavailable):  # the answer is paid for; /ready tells of the disk
                await self.store.journal.synced()

    # -- requests out

    async def route(self, call: Call) -> Sequence[Target]:
        if call.route is not None:
            return call.targets or self.route_targets(call, call.route)
        forced = call.headers.get("x-stockyard-provider", "")
        try:
            call.targets = targets = self.router.targets(call.model, forced)
        except UnknownModel:
            if forced or not await self.refresh_models():
                raise
            call.targets = targets = self.router.targets(call.model, forced)
        return targets

    def route_targets(self, call: Call, route: Route) -> list[Target]:
        """The targets that a route has for this call; the first alone where the client wants no fallback."""
        asked = Asked(len(call.body) // 4, call.tag_map, call.session or call.key_id)
        targets = self.router.order(route, asked, self.random, self.clock())
        call.targets = targets[:1] if call.headers.get("x-stockyard-no-fallback", "").lower() in YES else targets
        return list(call.targets)

    def prepare(self, call: Call, target: Target, canonical: Json | None = None) -> Outgoing:
        """One attempt's request: the client's bytes where they may pass, else the translated ones."""
        row, kind = target.provider.row, call.endpoint.kind
        dialect = self.dialect_for(call, target)
        translation = None
        if kind in VERBS_OF_KIND and (self.is_foreign(call, dialect, row) or canonical is not None):
            translation = self.translation(call, target)
            if kind == "chat" and dialect.family != call.endpoint.dialect:
                DIALECTS[call.endpoint.dialect].refuse_elsewhere(call.canonical or {})
            encode = getattr(dialect, VERBS_OF_KIND[kind][0])
            canonical = canonical or call.canonical or call.request
            if call.output_cap is not None:
                canonical = DIALECTS["openai"].with_output_cap(canonical, call.output_cap)
            body = dump_json(encode(canonical, translation))
            call.dropped, call.sent_dialect = translation.dropped, dialect.name
        else:
            body = self.passing_body(call, target, dialect)
        path = dialect.path(row, target.model, call.stream) if kind == "chat" else row.path(kind, target.model)
        origin, head = self.request_head(target.provider, dialect, path, call)
        if target.provider.credentials is not None:
            head = sign_head(head, target.provider, path, body, self.clock())
        call.sent_body = body if body is not call.body else b""
        deadlines = call.route.deadlines if call.route is not None else None
        return Outgoing(origin, head, body, dialect, translation, kind, deadlines)

    def dialect_for(self, call: Call, target: Target) -> Dialect:
        """The provider's dialect for this call: its own, the client's where it has a door for that, or the one it must be."""
        row = target.provider.row
        if call.endpoint.dialect in row.also_speaks and row.id not in self._without_doors:
            return DIALECTS[call.endpoint.dialect]
        chosen = row.choose_dialect(call.canonical, target.model) if row.choose_dialect and call.canonical else ""
        return DIALECTS[chosen or row.dialect]

    @staticmethod
    def is_foreign(call: Call, dialect: Dialect, row: Provider) -> bool:
        client = DIALECTS[call.endpoint.dialect]
        if dialect.family != client.family or row.rewrites_answers or call.must_translate:
            return True
        return call.stream and client.must_render(call.request)

    def translation(self, call: Call, target: Target) -> Translation:
        strict = call.headers.get("x-stockyard-strict", "").lower() in YES
        foreign = call.endpoint.dialect != "openai"
        names = {"signatures": self.signatures}
        row, now_s = target.provider.row, int(self.clock())
        return Translation(target.model, row, call.stream, now_s, self.new_id, strict, foreign, names=names)

    def passing_body(self, call: Call, target: Target, dialect: Dialect) -> bytes:
        """The client's own bytes, changed only where the provider's row or the model name demands it."""
        request, body, row = call.request, call.body, target.provider.row
        if call.output_cap is not None:
            request = dialect.with_output_cap(request, call.output_cap)
            body = dump_json({name: value for name, value in request.items() if name != "$alt"})
        if dialect.name == "openai" and (not row.touched.isdisjoint(request) or target.model in row.aliases):
            translation = self.translation(call, target)
            body = dump_json(DIALECTS["openai"].encode({**request, "model": target.model}, translation))
            call.dropped = translation.dropped
            return body
        if "model" in request and request["model"] != target.model:
            body = splice_string(body, request, "model", target.model)
            request = {**request, "model": target.model} if call.stream else request
        if call.stream and dialect.name == "openai" and row.stream_usage == "stream_options":
            options = request.get("stream_options")
            if not options:
                body = splice_member(body, request, "stream_options", {"include_usage": True})
            elif not options.get("include_usage"):
                body = dump_json({**request, "stream_options": {**options, "include_usage": True}})
        return body

    def request_head(
        self, provider: ConfiguredProvider, dialect: Dialect, path: str, call: Call
    ) -> tuple[Origin, bytes]:
        """The head of a request up to its length. A key is written only into heads for its own provider's origin."""
        key = call.upstream_key = "" if provider.credentials else self.next_key(provider)
        passed = tuple(
            [(name, clean_header(text)) for name in dialect.forwarded_headers if (text := call.headers.get(name))]
        )
        if more := dialect.headers_for(call.stream):
            passed += tuple(more.items())
        if call.route is not None:
            passed += call.route.headers
        memo = (provider.id, path, key, dialect.name, passed)
        found = self._heads.get(memo)
        if found is None:
            if len(self._heads) > 4096:
                self._heads.clear()
            head = build_head(provider, dialect, path, key, passed)
            found = self._heads[memo] = (self.upstream.origin(provider.base_url), head)
        return found

    def next_key(self, provider: ConfiguredProvider) -> str:
        """The provider's keys in turn; where the key is a file, the token got with it."""
        if provider.row.key_is_file:
            return self.google_tokens.current(provider.keys[0])
        return self.router.next_key(provider, self.tick())

    # -- keys and budgets

    def create_key(self, body: Json) -> tuple[VirtualKey, str]:
        """A new virtual key and its secret, which is shown this once."""
        if body.get("provider_keys"):
            raise InvalidRequest(
                "keys with provider keys of their own are not built into this version yet", param="provider_keys"
            )
        secret = mint_secret(self.random.randbytes(SECRET_BYTES))
        digest = digest_secret(secret, self.keys.pepper)
        return self.keep_key(create_key(body, self.new_id("key_"), digest, int(self.clock() * 1000))), secret

    def rotate_key(self, key: VirtualKey, grace_ms: int) -> tuple[VirtualKey, str]:
        secret = mint_secret(self.random.randbytes(SECRET_BYTES))
        digest = digest_secret(secret, self.keys.pepper)
        return self.keep_key(key.rotated(digest, int(self.clock() * 1000), grace_ms)), secret

    def keep_key(self, key: VirtualKey) -> VirtualKey:
        """Put a key into the ring, its budget into the ledger, and both on disk."""
        before = self.keys.by_id.get(key.id)
        if (
            before is not None
            and before.budget is not None
            and (key.budget is None or key.budget.id != before.budget.id)
        ):
            self.drop_budget(before.budget.id)
        self.keys.put(key)
        self.decide_keys()
        if key.budget is not None:
            self.put_budget(key.budget)
        self.store.put_write("INSERT OR REPLACE INTO keys VALUES (?, ?)", key.id, dump_json(key.as_record()).decode())
        return key

    def put_budget(self, budget: Budget) -> None:
        books = self.ledger.books()
        self.ledger.put_budget(budget, int(self.clock() * 1000), {**self.stored_settled, **books.settled})
        self.has_budgets = True

    def drop_budget(self, budget_id: str) -> None:
        """Take a budget away; what it has settled is remembered, so that the same one put back reopens nothing."""
        self.stored_settled = {**self.stored_settled, **self.ledger.books().settled}
        self.ledger.drop_budget(budget_id)

    def set_budgets(self, budgets: list[Budget]) -> None:
        """Replace the budgets that were set by PUT /api/budgets; those of keys and settings stay."""
        for budget_id in self.set_budget_ids:
            self.drop_budget(budget_id)
        self.set_budget_ids = [budget.id for budget in budgets]
        self.store.put_write("DELETE FROM budgets")
        for budget in budgets:
            self.put_budget(budget)
            self.store.put_write(
                "INSERT OR REPLACE INTO budgets VALUES (?, ?)",
                budget.id,
                dump_json(dataclasses.asdict(budget)).decode(),
            )

    # -- answers

    def answer_headers(self, call: Call) -> list[tuple[str, str]]:
        headers = [
            ("cache-control", "private, no-store"),
            ("vary", "Authorization"),
            ("x-stockyard-request-id", call.id),
            ("x-stockyard-provider", call.provider),
            ("x-stockyard-model", header_value(call.upstream_model or call.model)),
            ("x-stockyard-cache", call.cache),
            ("x-stockyard-attempts", str(len(call.attempts))),
        ]
        if call.cost_nanousd is not None and not call.stream:
            headers.append(("x-stockyard-cost-usd", format_usd(call.cost_nanousd)))
        if call.rated:
            headers += self.rates.headers(call.key, call.model, int(time.monotonic() * 1000)).items()
        if call.clamped and call.output_cap is not None:
            headers.append(("x-stockyard-clamped-max-tokens", str(call.output_cap)))
        if call.dropped:
            headers.append(("x-stockyard-dropped", header_value(",".join(call.dropped))))
        return headers

    def commit(self, call: Call, client: Client) -> None:
        """Send a stream's headers, once; from here on failures are events of the stream."""
        if call.status == 0:
            call.status = 200
            client.begin_stream(
                [
                    ("content-type", DIALECTS[call.endpoint.dialect].stream_type_of(call.request)),
                    *self.answer_headers(call),
                ]
            )

    # -- models

    async def refresh_models(self) -> bool:
        """Ask the providers whose lists are old for their models; True when anything was learned."""
        now_s = self.tick()
        stale = [
            provider for provider in self.router.providers.values()
            if "models" in provider.row.offers and now_s - self._models_at_s.get(provider.id, -1e9) > self.settings.models_ttl
        ]  # fmt: skip
        for provider in stale:
            self._models_at_s[provider.id] = now_s
        return any(await asyncio.gather(*(self.refresh_provider(provider) for provider in stale)))

    async def refresh_provider(self, provider: ConfiguredProvider) -> bool:
        try:
            rows = await self.list_models(provider)
        except GatewayError:
            return False  # its models stay reachable by prefix and as provider/model; doctor and check tell why
        self._models[provider.id] = rows
        self.router.learn(provider.id, [row["id"] for row in rows])
        return True

    async def list_models(self, provider: ConfiguredProvider) -> list[Json]:
        """A provider's own list, as rows with an `id`. GatewayError where it cannot be had."""
        if provider.base_url.startswith("builtin:"):
            return [{"id": "echo", "object": "model", "created": 0, "owned_by": "stockyard"}]
        dialect = DIALECTS[provider.row.dialect]
        head = build_head(provider, dialect, provider.row.path("models", ""), self.next_key(provider), method="GET")
        outgoing = Outgoing(self.upstream.origin(provider.base_url), head, b"", dialect, None, "models")
        answer = await self.fetch(Target(provider, ""), outgoing)
        if answer.status >= 300:
            raise read_refusal(dialect, answer)
        try:
            return dialect.read_models(orjson.loads(plain_body(answer)))
        except (orjson.JSONDecodeError, AttributeError, TypeError, KeyError):
            raise UpstreamError("the provider's list of models cannot be read", code="upstream_malformed") from None

    async def models(self) -> list[Json]:
        """The merged list: every configured provider's models, named so that they route back to it."""
        await self.refresh_models()
        merged: dict[str, Json] = {}
        for provider_id, rows in self._models.items():
            for row in rows:
                public = self.public_model(provider_id, row)
                merged.setdefault(public["id"], public)
        named = (*self.router.routes, *self.router.aliases)
        mine: Json = {"object": "model", "created": 0, "owned_by": "stockyard", "provider": "", "price": None}
        return [
            *({"id": name, **mine} for name in dict.fromkeys(named)),
            *(row for row in merged.values() if row["id"] not in named),
        ]

    def public_model(self, provider_id: str, row: Json) -> Json:
        bare = str(row["id"])
        try:
            routed = self.router.targets(bare)[0].provider.id == provider_id
        except UnknownModel:
            routed = False
        name = bare if routed else f"{provider_id}/{bare}"
        price = self.prices.find(provider_id, bare, self.clock())
        created = row.get("created")
        public = {
            "id": name,
            "object": "model",
            "created": created if isinstance(created, int) else 0,
            "owned_by": row.get("owned_by") or provider_id,
        }
        return {**public, "provider": provider_id, "price": price.per_million_usd() if price is not None else None}


class Nobody:
    """A client that is not there: what shadows stream to."""

    throttle: Callable[[bool], None] | None = None

    def begin_stream(self, headers: list[tuple[str, str]]) -> None: ...
    def send(self, data: bytes) -> None: ...
    def end_stream(self, broken: bool) -> None: ...


class StreamedCall:
    """The attempts of one streamed call, and what they share: the client, its heartbeat, what was sent."""

    def __init__(self, gateway: Gateway, call: Call, client: Client, tape_bytes: int = 0) -> None:
        self._gateway, self._call, self._client = gateway, call, client
        self._dialect = DIALECTS[call.endpoint.dialect]
        #: What was said and how it ended, where the answer may be kept.
        self._tape_bytes, self.tape, self.finishes = tape_bytes, Tape(tape_bytes), cast(set[str], set())
        self._written_s = gateway.tick()
        self._beat = gateway.loop.call_later(HEARTBEAT_S, self._heartbeat)
        self._relay: Relay | None = None
        self.renderer = gateway.renderer(call)
        self.is_native = False
        self.native_id = ""

    @property
    def sent_content(self) -> bool:
        return self._relay is not None and self._relay.sent_content

    @property
    def started(self) -> bool:
        return self._call.status != 0

    @property
    def response(self) -> Json | None:
        """The whole response that a stateful dialect streamed, once it ended."""
        if self.is_native:
            return {"id": self.native_id} if self.native_id else None
        return getattr(self.renderer, "response", None)

    async def attempt(self, call: Call, target: Target) -> None:
        if call is not self._call:
            return await self._attempt_branch(call, target)
        gateway = self._gateway
        outgoing = gateway.prepare(call, target)
        if outgoing.dialect.follows:
            created = await gateway.fetch(target, outgoing)
            outgoing = gateway.following(target, outgoing, gateway.next_address(outgoing, created) or "")
        call.transcript = Transcript()
        flow_of = functools.partial(self._taped_flow, call, target, outgoing)
        relay = self._relay = Relay(gateway, call, self._client, flow_of, outgoing.dialect)
        exchange = await gateway.exchange(target, outgoing, relay)
        relay.throttle = exchange.hold
        try:
            await relay.done
        finally:
            if relay.sent_content:
                self._client.throttle = None
            if not relay.done.done() or relay.done.cancelled() or relay.done.exception():
                exchange.abort()
            self._learn(call, target, relay.flow)

    async def _attempt_branch(self, call: Call, target: Target) -> None:
        """An attempt of a hedged call: with a state of its own, which is kept where its content was the first."""
        mine = copy.copy(self)
        mine._call, mine._relay = call, None
        try:
            await mine.attempt(call, target)
        finally:
            if mine.sent_content:
                kept = ("_call", "_beat")
                vars(self).update({name: value for name, value in vars(mine).items() if name not in kept})

    def _taped_flow(self, call: Call, target: Target, outgoing: Outgoing, spoken: Dialect | None = None) -> Flow:
        flow = self._flow(call, target, outgoing, spoken)
        if self._tape_bytes:
            self.tape, self.finishes = flow.tape, flow.finishes = Tape(self._tape_bytes), set()
        return flow

    def _flow(self, call: Call, target: Target, outgoing: Outgoing, spoken: Dialect | None = None) -> Flow:
        """The flow of an attempt; `spoken` is the dialect the provider turned out to answer in, if another."""
        cost_of = functools.partial(self._gateway.price, call, target)
        assert call.transcript is not None
        if spoken is not None:
            translation = outgoing.translation or self._gateway.translation(call, target)
            outgoing = dataclasses.replace(outgoing, dialect=spoken, translation=translation)
            if spoken.family == DIALECTS[call.endpoint.dialect].family and not isinstance(spoken, OpenAiChat):
                outgoing.translation = None
        if outgoing.translation is not None:
            decoder = outgoing.dialect.decoder(outgoing.translation)
            self.renderer, self.is_native = self._gateway.renderer(call), False
            return TranslatingFlow(decoder, self.renderer, call.transcript, cost_of)
        if isinstance(outgoing.dialect, OpenAiChat):
            asked = bool((call.request.get("stream_options") or {}).get("include_usage"))
            return OpenAiFlow(outgoing.dialect, target.provider.row, asked, call.transcript, cost_of)
        self.is_native = True
        return NativeFlow(outgoing.dialect.decoder(self._gateway.translation(call, target)), call.transcript, cost_of)

    def _learn(self, call: Call, target: Target, flow: Flow) -> None:
        """Usage and finish for the log; estimated from the text where the stream ended without telling."""
        usage = flow.usage
        if usage is None and flow.content_seen:
            usage = Usage(input_tokens=(len(call.body) + 3) // 4, output_tokens=flow.transcript.output_tokens())
            call.usage_estimated = True
        self.native_id = flow.answer_id
        self._gateway.keep_signatures(flow.signatures)
        self._gateway.learn(call, target, usage, flow.finish_reason)

    def _heartbeat(self) -> None:
        """Keep an idle connection alive; this commits to a stream, but nothing of an answer was said yet."""
        self._gateway.commit(self._call, self._client)
        self._client.send(self._dialect.heartbeat)
        self._beat = self._gateway.loop.call_later(HEARTBEAT_S, self._heartbeat)

    def close(self) -> None:
        self._beat.cancel()


BINARY_KINDS: Final = frozenset({"speech", "transcriptions", "translations"})


def plain_body(answer: PlainAnswer) -> bytes:
    """The bytes of an answer; compression was not asked for, but some servers insist. Bounded against bombs."""
    coding = answer.headers.get("content-encoding", "identity").strip().lower()
    if coding in ("identity", ""):
        return answer.body
    if coding not in ("gzip", "deflate"):
        raise UpstreamError(
            f"the provider answered in `{coding[:20]}`, which was not asked for", code="upstream_malformed"
        )
    try:
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        body = unpacker.decompress(answer.body, UPSTREAM_MAX_BODY_BYTES)
    except zlib.error:
        raise UpstreamError("the provider's compressed answer cannot be read", code="upstream_malformed") from None
    if unpacker.unconsumed_tail:
        raise UpstreamError("the provider's answer is too large", code="upstream_too_large")
    return body


def read_usage(dialect: Dialect, document: Json, row: Provider) -> Usage | None:
    return dialect.read_usage_for(document, row) if isinstance(dialect, OpenAiChat) else dialect.read_usage(document)


def finish_reason_of(document: Json) -> str:
    choices = document.get("choices")
    return (
        str(choices[0].get("finish_reason") or "")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict)
        else ""
    )


def build_head(
    provider: ConfiguredProvider,
    dialect: Dialect,
    path: str,
    key: str,
    passed: Sequence[tuple[str, str]] = (),
    method: str = "POST",
) -> bytes:
    """A request's head up to `content-length: `, bound to the provider's origin.

    Provider keys and paths are checked when they are configured or encoded; a control character here would be ours.
    """
    parts = urllib.parse.urlsplit(provider.base_url)
    row = provider.row
    fixed = {**dialect.fixed_headers, **provider.headers, **dict(passed)}
    lines = [f"{method} {parts.path}{path} HTTP/1.1", f"host: {parts.netloc.rpartition('@')[2]}"]
    if key:
        lines.append(f"{row.auth_header}: {row.auth_prefix}{key}")
    lines += [f"{name}: {value}" for name, value in fixed.items()]
    lines += [
        f"user-agent: stockyard/{__version__}",
        *(["accept: application/json, text/event-stream"] if "accept" not in fixed else []),
        "accept-encoding: identity",
    ]
    lines += ["content-type: application/json"] if method == "POST" else []
    head = "\r\n".join(lines)
    if any(ord(letter) < 32 for line in lines for letter in line):
        raise UpstreamError(
            "a header for the provider holds a control character; check its key", code="upstream_misconfigured"
        )
    return f"{head}\r\ncontent-length: ".encode("latin-1", "replace")


def sign_head(head: bytes, provider: ConfiguredProvider, path: str, body: bytes, now_s: float) -> bytes:
    """Add AWS's signature over the final bytes to a head that ends in `content-length: `."""
    signer = provider.credentials
    assert signer is not None
    signed = sign_v4(
        "POST", provider.base_url + path, {"content-type": "application/json"}, body, signer.access_key, signer.secret_key,
        signer.session_token or None, signer.region, signer.service, now_s,
    )  # fmt: skip
    added = "".join(f"{name}: {value}\r\n" for name, value in signed.items() if name != "content-type")
    return head.removesuffix(b"content-length: ") + added.encode() + b"content-length: "


def clean_header(value: str, limit: int = 200) -> str:
    """A client's header value for the log: printable, bounded."""
    return "".join(letter for letter in value[:limit] if letter.isprintable()) if value else ""


def header_value(text: str) -> str:
    """A value that is safe in a response header: visible ASCII, bounded."""
    return (
        text
        if text.isascii() and text.isprintable() and len(text) < 200
        else text[:200].encode("ascii", "replace").decode().translate(_NO_CONTROLS)
    )


_NO_CONTROLS: Final = dict.fromkeys([*range(32), 127], "?")


def print_error(message: str, error: BaseException | None = None) -> None:
    """One line on stderr; the traceback's place, never its values, which may hold a client's text."""
    place = ""
    if error is not None and error.__traceback__ is not None:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        place = " at " + " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
    print(f"stockyard: {message}{place}", file=sys.stderr, flush=True)


# ===== Lane ===========================================================================================================
# The short way in for the hot endpoints. A subclass of aiohttp's own connection handler, on the same listener: aiohttp's
# C parser alone decides framing; a whole, plain, hot request is answered here with one task and one write; everything
# else goes on to aiohttp untouched. Both ways end in `Gateway.answer`, so they cannot differ in what they do.
# The lane keeps order: while it answers, what else arrives on the connection waits, and past a small cap is not read.

HOT_ENDPOINTS: Final[Mapping[str, Endpoint]] = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint("chat", "/v1/chat/completions", streams=True),
        Endpoint("completions", "/v1/completions", streams=True),
        Endpoint("embeddings", "/v1/embeddings"),
        Endpoint("chat", "/v1/responses", "responses", streams=True),
        Endpoint("chat", "/v1/messages", "anthropic", streams=True),
    )
}
LATE_BODY: Final = dump_json(
    {
        "error": {
            "message": "the request's body did not arrive in time",
            "type": "invalid_request_error",
            "param": None,
            "code": "request_timeout",
        }
    }
)
LANE_MAX_WAITING: Final = 8
STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in http.HTTPStatus if status.value >= 200
}  # fmt: skip


def hot_endpoint(message: Any, max_body_bytes: int) -> Endpoint | None:
    """The endpoint of a request that the lane may take: hot path, known and fit length, nothing odd about it."""
    endpoint = HOT_ENDPOINTS.get(message.path)
    if endpoint is None or message.method != "POST" or message.chunked or message.upgrade or message.compression:
        return None
    headers = message.headers
    if message.version != aiohttp.HttpVersion11 or "expect" in headers or "content-encoding" in headers:
        return None
    return endpoint if int(headers.get("content-length", 0)) <= max_body_bytes else None


class Lane(RequestHandler):
    """One client connection. `gateway` and `guard` are set on the class that `open_server` makes for a gateway."""

    __slots__ = ("_awaited", "_body_timer", "_call", "_handed", "_keep", "_sent_head", "_task", "_waiting", "throttle")

    gateway: ClassVar[Gateway]
    guard: ClassVar[RequestGuard]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._call: Call | None = None
        self._waiting: collections.deque[tuple[Any, Any]] = collections.deque()
        self._awaited: tuple[Any, Any, Endpoint] | None = None
        self._task: asyncio.Task[None] | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._keep = True
        self._handed = False
        self._sent_head = False
        self.throttle: Callable[[bool], None] | None = None

    # -- what arrives

    def data_received(self, data: bytes) -> None:
        if self._payload_parser is not None or self._upgraded:
            super().data_received(data)
            return
        if self._force_close or self._close:
            return
        try:
            messages, upgraded, tail = self._parser.feed_data(data)  # type: ignore[union-attr]
        except HttpProcessingError as error:
            messages, upgraded, tail = (
                [(ErrorMessage(status=400, exc=error, message=error.message), EMPTY_PAYLOAD)],
                False,
                b"",
            )
        for message, payload in messages:
            self._request_count += 1
            if self._awaited is not None or self._task is not None:
                self._waiting.append((message, payload))
            else:
                self._sort(message, payload)
        if upgraded:
            self._upgraded = upgraded
            self._message_tail = tail
        if self._awaited is not None and self._task is None:
            self._try_begin()
        if len(self._waiting) >= LANE_MAX_WAITING and not self._buffer_paused:
            self._pause_reading_for_buffer()

    def _sort(self, message: Any, payload: Any) -> None:
        """Take a request into the lane, or hand it to aiohttp."""
        endpoint = (
            None
            if isinstance(message, ErrorMessage) or self._is_aiohttp_busy()
            else hot_endpoint(message, self.gateway.max_body_bytes)
        )
        if endpoint is None:
            self._hand_over(message, payload)
        else:
            self._parser.message_consumed()  # type: ignore[union-attr]
            self._awaited = (message, payload, endpoint)

    def _is_aiohttp_busy(self) -> bool:
        return self._handed and not (self._waiter is not None and not self._waiter.done() and not self._messages)

    def _hand_over(self, message: Any, payload: Any) -> None:
        """What aiohttp's own `data_received` does with a message."""
        self._handed = True
        self._messages.append((message, payload))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if not self._buffer_paused and len(self._messages) >= self._max_msg_queue_size:
            self._pause_reading_for_buffer()

    def _try_begin(self) -> None:
        """Begin the awaited call once its body is whole; a body that is late is refused."""
        assert self._awaited is not None
        message, payload, endpoint = self._awaited
        if payload.is_eof():
            self._awaited = None  # first: reading may call back into data_received
            self._begin(message, take_buffered(payload), endpoint)
        elif self._body_timer is None:
            payload.set_read_chunk_size(
                self.gateway.max_body_bytes
            )  # else the parser would pause before the body is whole
            self._body_timer = self._loop.call_later(self.gateway.settings.body_timeout, self._body_is_late)

    def _begin(self, message: Any, body: bytes, endpoint: Endpoint) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        self._keep = not message.should_close
        self._sent_head = False
        call = self._call = self.gateway.begin(endpoint, message.headers, body, self._client_ip())
        self._task = self._loop.create_task(self._serve(call))

    def _client_ip(self) -> str:
        peer = self.peername
        return str(peer[0]) if isinstance(peer, tuple) else ""

    def _body_is_late(self) -> None:
        self._body_timer = None
        if self._awaited is not None:
            self._awaited = None
            self._write_plain(Reply(408, [("content-type", "application/json")], LATE_BODY), keep=False)

    def resume_reading(self, resume_parser: bool = True) -> None:
        if self._reading_paused:  # every finished body calls this; there is seldom anything to resume
            super().resume_reading(resume_parser)

    # -- the call

    async def _serve(self, call: Call) -> None:
        try:
            refusal = self.guard.check(call.headers)
            reply = self.gateway.turn_away(call, refusal) if refusal else await self.gateway.answer(call, self)
            if reply is not None:
                if self.gateway.store.full_sync:
                    await self.gateway.close_row(call)
                self._write_plain(reply, self._keep)
        finally:
            self._task = self._call = None
        self._next()

    def _write_plain(self, reply: Reply, keep: bool) -> None:
        if self.transport is None:
            return
        lines = [f"{name}: {value}\r\n" for name, value in reply.headers]
        end = "" if keep else "connection: close\r\n"
        status_line = STATUS_LINES.get(reply.status) or f"HTTP/1.1 {reply.status} Error\r\n"
        last = f"{end}content-length: {len(reply.body)}\r\ndate: {rfc822_formatted_time()}\r\n\r\n"
        head = f"{status_line}{''.join(lines)}{last}"
        self.transport.write(head.encode("latin-1", "replace") + reply.body)
        if not keep:
            self.close_now()

    def _next(self) -> None:
        """Go on with what waited behind the call."""
        if self.transport is None:
            return
        if not self._keep or self._force_close or self.gateway.draining:
            self.close_now()
            return
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        while self._waiting and self._awaited is None:
            self._sort(*self._waiting.popleft())
        if self._awaited is not None:
            self._try_begin()
        if self._buffer_paused and len(self._waiting) <= LANE_MAX_WAITING // 2:
            self._resume_reading_if_drained()

    def close_now(self) -> None:
        """Close once everything written is sent, and let aiohttp's idle task end."""
        self.close()
        if self.transport is not None:
            self.transport.close()

    def _process_keepalive(self) -> None:
        if self._task is not None:  # aiohttp's timer means idle connections; this one is at work
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
        if self._task is not None:
            self._task.cancel()
        super().connection_lost(exc)

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """aiohttp's part of a stop; the gateway has drained the calls under way before."""
        if self._task is not None:
            self._task.cancel()
        await super().shutdown(timeout)

    # -- Client: a streamed answer

    def begin_stream(self, headers: list[tuple[str, str]]) -> None:
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
        end = "" if self._keep else "connection: close\r\n"
        head = f"HTTP/1.1 200 OK\r\n{lines}{end}transfer-encoding: chunked\r\ndate: {rfc822_formatted_time()}\r\n\r\n"
        self._sent_head = True
        if self.transport is not None:
            self.transport.write(head.encode("latin-1", "replace"))

    def send(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self, broken: bool) -> None:
        if self.transport is not None:
            self.transport.write(b"0\r\n\r\n")
            if broken:
                self._keep = False

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.throttle is not None:
            self.throttle(True)
            self._body_timer = self._loop.call_later(self.gateway.settings.idle_timeout, self._reader_is_stuck)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        if self.throttle is not None:
            self.throttle(False)

    def _reader_is_stuck(self) -> None:
        """A client that reads nothing for so long is gone; its provider is cut off with it."""
        if self.transport is not None:
            self.transport.abort()


# ===== Server =========================================================================================================
# The listener and everything that is not hot. ROUTES says for each path who may call it; one boundary turns every
# failure into the error body of the client's dialect. Handlers take aiohttp requests and stay short; what they do lies
# in the gateway and the store.


class RequestGuard:
    """Host and Origin checks for every route: they stop DNS rebinding and cross-site requests.

    IP addresses and localhost names cannot be rebound; any other name must be declared with `hosts`.
    """

    def __init__(self, settings: Settings) -> None:
        declared = {name.strip().lower() for name in settings.hosts.split(",") if name.strip()}
        self._names = {"localhost", settings.host.lower(), *declared}
        self._good: set[str] = set()

    def check(self, headers: Mapping[str, str]) -> GatewayError | None:
        host = headers.get("host", "")
        if host not in self._good:
            if not self._is_ours(host):
                return Forbidden(
                    f"the host name {clean_header(host, 80)!r} is not served here; declare it with STOCKYARD_HOSTS",
                    code="unknown_host",
                )
            if len(self._good) < 1000:
                self._good.add(host)
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            return Forbidden(
                "requests from other origins are refused; call Stockyard from your server", code="cross_origin"
            )
        return None

    def _is_ours(self, host: str) -> bool:
        name = re.sub(r":\d+$", "", host.strip().lower()).strip("[]").rstrip(".")
        if name in self._names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


#: Client endpoints whose body is JSON and passes through by model name.
JSON_ENDPOINTS: Final = (
    Endpoint("moderations", "/v1/moderations"),
    Endpoint("images", "/v1/images/generations"),
    Endpoint("speech", "/v1/audio/speech"),
    Endpoint("rerank", "/v1/rerank"),
    Endpoint("count_tokens", "/v1/messages/count_tokens", "anthropic"),
)
#: Those whose body is an upload: it is streamed, and the model is found in its first part.
UPLOAD_ENDPOINTS: Final = (
    Endpoint("transcriptions", "/v1/audio/transcriptions", upload=True),
    Endpoint("translations", "/v1/audio/translations", upload=True),
    Endpoint("image_edits", "/v1/images/edits", upload=True),
)
RESPONSES_ENDPOINT: Final = Endpoint("stored", "/v1/responses", "responses")
GEMINI_ENDPOINTS: Final[Mapping[str, Endpoint]] = {
    "generateContent": Endpoint("chat", "/v1beta/models:generateContent", "gemini", streams=True),
    "streamGenerateContent": Endpoint("chat", "/v1beta/models:streamGenerateContent", "gemini", streams=True),
    "embedContent": Endpoint("embeddings", "/v1beta/models:embedContent", "gemini"),
    "batchEmbedContents": Endpoint("embeddings", "/v1beta/models:batchEmbedContents", "gemini"),
    "countTokens": Endpoint("count_tokens", "/v1beta/models:countTokens", "gemini"),
}
PROXY_ENDPOINT: Final = Endpoint("passthrough", "/proxy", upload=True)
GATEWAY_KEY: Final = web.AppKey("gateway", Gateway)
GUARD_KEY: Final = web.AppKey("guard", RequestGuard)
UPLOADS_KEY: Final = web.AppKey("uploads", aiohttp.ClientSession)
#: Of a request that may see or change things: the id of its virtual key, empty for the admin key.
ACTOR_KEY: Final = web.RequestKey("actor", str)
ALL_METHODS: Final = "GET POST PUT PATCH DELETE"


@dataclass(frozen=True, slots=True)
class RouteRow:
    """A path, the methods it takes, who may call it, and whether it can cost money.

    Roles: `anyone`; `client` (a virtual key, where keys are required); `viewer` (the admin key, or a key or session of
    the role viewer or admin); `admin` (the same, but a viewer may only GET).
    """

    methods: str
    path: str
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    role: str
    spends: bool = False
    endpoint: Endpoint | None = None


class WebClient:
    """A streamed answer on aiohttp's side: the gateway pushes, the handler writes in its own pace."""

    def __init__(self) -> None:
        self.throttle: Callable[[bool], None] | None = None
        self.headers: list[tuple[str, str]] | None = None
        self.broken = False
        self._pieces: collections.deque[bytes] = collections.deque()
        self._size = 0
        self._more = asyncio.Event()
        self._ended = False

    def begin_stream(self, headers: list[tuple[str, str]]) -> None:
        self.headers = headers
        self._more.set()

    def send(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data)
        if self._size > 262_144 and self.throttle is not None:
            self.throttle(True)
        self._more.set()

    def end_stream(self, broken: bool) -> None:
        self.broken = broken
        self.end()

    def end(self) -> None:
        self._ended = True
        self._more.set()

    async def started(self) -> None:
        while self.headers is None and not self._ended:
            await self._more.wait()

    async def pieces(self) -> AsyncIterator[bytes]:
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                self._size -= len(piece)
                yield piece
                if self._size < 65_536 and self.throttle is not None:
                    self.throttle(False)
            if self._ended:
                return
            self._more.clear()
            await self._more.wait()


def too_large_error(gateway: Gateway) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the body is larger than {gateway.settings.max_body_mb:g} MB; raise STOCKYARD_MAX_BODY_MB where that is meant"
    )


async def read_body(request: web.Request, gateway: Gateway) -> bytes:
    """A request's whole body within its size and its time; GatewayError otherwise."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise GatewayError(
            "compressed request bodies are not taken; send it plain",
            status=415,
            type="invalid_request_error",
            code="unsupported_encoding",
        )
    if (request.content_length or 0) > gateway.max_body_bytes:
        raise too_large_error(gateway)
    body = bytearray()
    try:
        async with asyncio.timeout(gateway.settings.body_timeout):
            async for piece in request.content.iter_any():
                body += piece
                if len(body) > gateway.max_body_bytes:
                    raise too_large_error(gateway)
    except TimeoutError:
        raise GatewayError(
            "the request's body did not arrive in time",
            status=408,
            type="invalid_request_error",
            code="request_timeout",
        ) from None
    return bytes(body)


def peer_ip(request: web.Request) -> str:
    peer = request.transport.get_extra_info("peername") if request.transport else None
    return str(peer[0]) if isinstance(peer, tuple) else ""


async def answer_call(request: web.Request) -> web.StreamResponse:
    """A model call that did not fit the lane, or is not hot: the same pipeline, aiohttp's writer."""
    gateway = request.app[GATEWAY_KEY]
    endpoint = request.match_info.route.resource.endpoint  # type: ignore[union-attr]
    call = gateway.begin(endpoint, request.headers, b"", peer_ip(request), dict(request.match_info))
    return await read_and_run(request, gateway, call)


async def read_and_run(request: web.Request, gateway: Gateway, call: Call) -> web.StreamResponse:
    try:
        call.body = await read_body(request, gateway)
    except GatewayError as error:
        response = to_response(gateway.turn_away(call, error))
        response.force_close()
        return response
    return await run_call(request, gateway, call)


async def answer_gemini(request: web.Request) -> web.StreamResponse:
    """Gemini's routes: the model and the method stand in the path, `alt` in the query."""
    gateway = request.app[GATEWAY_KEY]
    model, _, method = request.match_info["target"].rpartition(":")
    endpoint = GEMINI_ENDPOINTS.get(method)
    if endpoint is None or not model:
        raise NotFound(f"no method {clean_header(method, 40)!r} is served; known are {', '.join(GEMINI_ENDPOINTS)}")
    parameters = {
        "model": model.removeprefix("models/"),
        "method": method,
        "$alt": request.query.get("alt", "json"),
        "$key": request.query.get("key", ""),
    }
    call = gateway.begin(endpoint, request.headers, b"", peer_ip(request), parameters)
    return await read_and_run(request, gateway, call)


async def run_call(request: web.Request, gateway: Gateway, call: Call) -> web.StreamResponse:
    client = WebClient()
    task = asyncio.create_task(gateway.answer(call, client))
    task.add_done_callback(lambda _: client.end())
    try:
        await client.started()
        if client.headers is None:
            reply = await task
            assert reply is not None
            await gateway.close_row(call)
            return to_response(reply)
        response = web.StreamResponse(headers=dict(client.headers))
        await response.prepare(request)
        async for piece in client.pieces():
            await response.write(piece)
        await task
        if client.broken:
            response.force_close()
        await response.write_eof()
        return response
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def to_response(reply: Reply) -> web.Response:
    return web.Response(status=reply.status, body=reply.body, headers=dict(reply.headers))


def json_response(value: Any, status: int = 200) -> web.Response:
    headers = {"cache-control": "private, no-store", "vary": "Authorization"}
    return web.Response(status=status, body=dump_json(value), content_type="application/json", headers=headers)


# ----- Passthrough ----------------------------------------------------------------------------------------------------
# Uploads, files and /proxy: bodies go through in both directions without being held; usage is read where it shows.

PROXY_HEADERS: Final = frozenset(
    {"accept", "content-type", "idempotency-key", "prefer", "range", "http-referer", "x-title", "openai-beta"}
)
PROXY_HEADER_PREFIXES: Final = ("anthropic-", "x-goog-api-client", "x-amzn-bedrock-")
PROXY_ANSWER_HEADERS: Final = frozenset(
    {"content-type", "content-disposition", "content-range", "x-request-id", "request-id", "retry-after"}
)
WATCHED_ANSWER_BYTES: Final = 4 * 1024 * 1024
MODEL_PART: Final = re.compile(rb'name="model"[^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,300})\r\n')


async def pass_upload(request: web.Request) -> web.StreamResponse:
    """An upload that names its model in a form part before the file: routed by it, streamed on."""
    gateway = request.app[GATEWAY_KEY]
    call = gateway.begin(request.match_info.route.resource.endpoint, request.headers, b"", peer_ip(request))  # type: ignore[union-attr]

    async def work() -> web.StreamResponse:
        gateway.admit(call)
        head = bytearray()
        while (
            not (found := MODEL_PART.search(head))
            and len(head) < 262_144
            and (piece := await request.content.readany())
        ):
            head += piece
        if found is None:
            raise InvalidRequest(
                "the form has no `model` part before its file; put `model` first, or use /proxy/{provider}/…",
                param="model",
            )
        call.model = found[1].decode("utf-8", "replace")
        target = (await gateway.route(call))[0]
        changed = target.model.encode()
        grown = len(changed) - len(found[1])
        whole = bytes(head[: found.start(1)]) + changed + bytes(head[found.end(1) :])
        path = target.provider.row.path(call.endpoint.kind, target.model)
        return await forward(request, gateway, call, target, path, whole, grown)

    return await logged(gateway, call, work)


async def pass_files(request: web.Request) -> web.StreamResponse:
    """Files and batches: they name no model, so the provider is the forced one, or the only one that offers them."""
    kind = request.path.split("/")[2]
    gateway = request.app[GATEWAY_KEY]
    call = gateway.begin(Endpoint(kind, f"/v1/{kind}", upload=True), request.headers, b"", peer_ip(request))

    async def work() -> web.StreamResponse:
        gateway.admit(call)
        provider = files_provider(gateway, request.headers.get("x-stockyard-provider", ""), kind)
        rest = request.rel_url.raw_path.removeprefix(f"/v1/{kind}")
        return await forward(
            request, gateway, call, Target(provider, ""), provider.row.path(kind, "") + safe_path(rest)
        )

    return await logged(gateway, call, work)


def files_provider(gateway: Gateway, forced: str, kind: str) -> ConfiguredProvider:
    able = [provider for provider in gateway.router.providers.values() if kind in provider.row.offers]
    if forced:
        able = [provider for provider in able if provider.id == forced.lower()]
    if len(able) != 1:
        names = ", ".join(provider.id for provider in able) or "none is configured"
        raise InvalidRequest(f"{kind} name no model: say whose with the header x-stockyard-provider (able: {names})")
    return able[0]


async def pass_proxy(request: web.Request) -> web.StreamResponse:
    """`/proxy/{provider}/{path}`: the provider's own interface, authenticated, admitted, logged, and priced where it shows."""
    gateway = request.app[GATEWAY_KEY]
    name = request.match_info["provider"]
    call = gateway.begin(PROXY_ENDPOINT, request.headers, b"", peer_ip(request))

    async def work() -> web.StreamResponse:
        gateway.admit(call)
        provider = gateway.router.providers.get(name)
        if provider is None or provider.base_url.startswith("builtin:"):
            known = PROVIDERS_BY_ID.get(name)
            hint = (
                f"set {enabling_variable(known)}"
                if known and known.key_env
                else f"known are {', '.join(PROVIDERS_BY_ID)}"
            )
            raise NotFound(
                f"the provider {clean_header(name, 40)!r} is not configured; {hint}", code="unknown_provider"
            )
        path = safe_path(request.rel_url.raw_path.removeprefix(f"/proxy/{name}"))
        version = re.match(r"/v\d+[a-z0-9]*(?=/|$)", path)
        if version and provider.base_url.endswith(version[0]):
            path = path[len(version[0]) :]
        return await forward(request, gateway, call, Target(provider, ""), path)

    return await logged(gateway, call, work)


def safe_path(path: str) -> str:
    """A path below a provider's base URL that stays below it; InvalidRequest for anything that could climb out."""
    decoded = urllib.parse.unquote(urllib.parse.unquote(path))
    if (
        any(part in ("..", ".") for part in re.split(r"[/\\]", decoded))
        or "\\" in decoded
        or "//" in path
        or not decoded.isprintable()
    ):
        raise InvalidRequest("the path holds `..`, `//` or control characters")
    return path


async def logged(gateway: Gateway, call: Call, work: Callable[[], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Run one passthrough call inside the same boundary as `Gateway.answer`: one row, one error body."""
    gateway.in_flight += 1
    try:
        return await work()
    except GatewayError as error:
        response = to_response(gateway.refuse(call, error))
        response.force_close()
        return response
    except asyncio.CancelledError:
        call.status, call.error = ClientGone.status, ClientGone.code
        raise
    except (ConnectionResetError, aiohttp.ClientConnectionResetError):
        call.status, call.error = ClientGone.status, ClientGone.code
        raise
    except Exception as error:
        return to_response(gateway.refuse(call, gateway.internal_error(error)))
    finally:
        gateway.in_flight -= 1
        gateway.settle(call)


async def forward(
    request: web.Request,
    gateway: Gateway,
    call: Call,
    target: Target,
    path: str,
    read_ahead: bytes = b"",
    grown: int = 0,
) -> web.StreamResponse:
    """Send the client's request on as it streams in, and the answer back as it streams out."""
    provider, settings = target.provider, gateway.settings
    call.provider, call.upstream_model = provider.id, target.model
    url = yarl.URL(provider.base_url + path + forwarded_query(request, "?" in path), encoded=True)
    headers = {
        **DIALECTS[provider.row.dialect].fixed_headers,
        **provider.headers,
        "accept-encoding": "identity",
        "user-agent": f"stockyard/{__version__}",
    }
    headers |= {
        name.lower(): value for name, value in request.headers.items()
        if name.lower() in PROXY_HEADERS or name.lower().startswith(PROXY_HEADER_PREFIXES)
    }  # fmt: skip
    key = gateway.next_key(provider)
    if key:
        headers[provider.row.auth_header] = provider.row.auth_prefix + key
    body = upload_body(request, read_ahead) if request.can_read_body or read_ahead else None
    if request.content_length is not None and body is not None:
        headers["content-length"] = str(request.content_length + grown)
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=settings.connect_timeout, sock_read=settings.first_byte_timeout
    )
    if call.key is not None:
        call.key.check(provider.id, call.model or "*")
    hold = gateway.hold(call, target, bounded=False)
    line = Attempt(provider.id, target.model, round((gateway.tick() - call.started_s) * 1000, 3))
    call.attempts.append(line)
    began_s = gateway.tick()
    try:
        gateway.store.begin(call)
        if gateway.store.full_sync:
            await gateway.store.journal.synced()
        async with request.app[UPLOADS_KEY].request(
            request.method,
            url,
            headers=headers,
            data=body,
            timeout=timeout,
            allow_redirects=False,
            auto_decompress=False,
        ) as answer:
            line.status = answer.status
            return await pass_answer(request, gateway, call, target, answer)
    except TimeoutError:
        raise UpstreamTimeout("the provider took too long") from None
    except aiohttp.ClientConnectorError as error:
        raise UpstreamError(
            f"{provider.row.name} cannot be reached: {error.strerror or 'connection failed'}",
            code="upstream_unreachable",
        ) from error
    except aiohttp.ClientError as error:
        raise UpstreamError(
            f"the provider's answer broke off ({type(error).__name__})", code="upstream_disconnected"
        ) from error
    finally:
        if hold is not None:
            gateway.charge(call, hold, line)
        call.upstream_s += gateway.tick() - began_s


def forwarded_query(request: web.Request, joined: bool) -> str:
    """The client's query without its `key`, which is a secret of some dialects."""
    pairs = [
        pair for pair in request.rel_url.raw_query_string.split("&") if pair and not pair.lower().startswith("key=")
    ]
    return ("&" if joined else "?") + "&".join(pairs) if pairs else ""


async def upload_body(request: web.Request, read_ahead: bytes) -> AsyncIterator[bytes]:
    if read_ahead:
        yield read_ahead
    async for piece in request.content.iter_any():
        yield piece


async def pass_answer(
    request: web.Request, gateway: Gateway, call: Call, target: Target, answer: aiohttp.ClientResponse
) -> web.StreamResponse:
    if 300 <= answer.status < 400:
        raise UpstreamError(
            f"the provider answered a redirect ({answer.status}), which is never followed", code="upstream_redirect"
        )
    call.status = answer.status
    call.error = f"upstream_{answer.status}" if answer.status >= 400 else ""
    headers = {name.lower(): value for name, value in answer.headers.items() if name.lower() in PROXY_ANSWER_HEADERS}
    if answer.headers.get("content-encoding"):
        headers["content-encoding"] = answer.headers["content-encoding"]
    response = web.StreamResponse(status=answer.status, headers={**headers, **dict(gateway.answer_headers(call))})
    if answer.content_length is not None and answer.status not in (204, 304):
        response.content_length = answer.content_length
    await response.prepare(request)
    watched = bytearray()
    async for piece in answer.content.iter_any():
        if len(watched) < WATCHED_ANSWER_BYTES:
            watched += piece
        await response.write(piece)
    watch_answer(gateway, call, target, answer.content_type, bytes(watched))
    await response.write_eof()
    return response


def watch_answer(gateway: Gateway, call: Call, target: Target, content_type: str, body: bytes) -> None:
    """Read usage from a passed answer where its dialect shows it: JSON, or the events of a stream."""
    dialect = DIALECTS[target.provider.row.dialect]
    call.answer = body[:LOGGED_BODY_MAX_BYTES] if content_type.startswith(("application/json", "text/")) else b""
    usage, model, finish = None, target.model, ""
    try:
        if content_type == "application/json":
            document = orjson.loads(body)
            if isinstance(document, dict):
                usage, finish = read_usage(dialect, document, target.provider.row), finish_reason_of(document)
                model = document.get("model") or model
        elif content_type == "text/event-stream":
            decoder = dialect.decoder(gateway.translation(call, target))
            for chunk in [*decoder.feed(body), *decoder.close()]:
                model = chunk.get("model") or model
                usage = read_openai_usage(chunk["usage"]) if chunk.get("usage") else usage
    except (orjson.JSONDecodeError, GatewayError, AttributeError, TypeError, KeyError):
        return  # not a shape of this dialect: passed on all the same, logged without usage
    call.model = call.model or str(model or "")
    gateway.learn(call, dataclasses.replace(target, model=str(model or "")), usage, finish)


# ----- Handlers -------------------------------------------------------------------------------------------------------


async def get_health(request: web.Request) -> web.Response:
    """Whether the process lives."""
    return json_response({"status": "ok", "version": __version__})


async def get_ready(request: web.Request) -> web.Response:
    """Whether it takes calls: 503 while it shuts down, or where the log cannot be written."""
    gateway = request.app[GATEWAY_KEY]
    trouble = "shutting down" if gateway.draining else gateway.store.trouble()
    return json_response({"status": trouble or "ready"}, status=503 if trouble else 200)


def list_dialect(request: web.Request) -> Dialect:
    """Whose list of models a client expects: Gemini's and Anthropic's SDKs name themselves in a header."""
    if (
        request.path.startswith("/v1beta")
        or "x-goog-api-key" in request.headers
        or "x-goog-api-client" in request.headers
    ):
        return DIALECTS["gemini"]
    return DIALECTS["anthropic" if "anthropic-version" in request.headers else "openai"]


async def get_models(request: web.Request) -> web.Response:
    """The models of all configured providers, in the client's dialect."""
    return json_response(list_dialect(request).render_models(await request.app[GATEWAY_KEY].models()))


async def get_model(request: web.Request) -> web.Response:
    """One model."""
    gateway, name = request.app[GATEWAY_KEY], request.match_info["id"].removeprefix("models/")
    for row in await gateway.models():
        if name in (row["id"], f"{row['provider']}/{row['id']}"):
            return json_response(list_dialect(request).render_model({**row, "id": name}))
    target = gateway.router.targets(name)[0]  # known by prefix though not listed; else UnknownModel
    row = {**gateway.public_model(target.provider.id, {"id": target.model}), "id": name}
    return json_response(list_dialect(request).render_model(row))


async def get_response(request: web.Request) -> web.StreamResponse:
    """GET and DELETE of a stored response, and its input items; those a provider keeps are asked there."""
    gateway, response_id = request.app[GATEWAY_KEY], request.match_info["id"]
    asked = gateway.begin(RESPONSES_ENDPOINT, request.headers, b"", peer_ip(request))
    gateway.authenticate(asked)  # a response is for the key that made it
    await gateway.store.flush()
    stored = await asyncio.to_thread(find_response, gateway.store, response_id, asked.key_id)
    if stored is None:
        raise NotFound(
            f"no response has the id {clean_header(response_id, 80)!r}", code="response_not_found", param="id"
        )
    if stored.response is None:
        return await pass_response(request, gateway, stored)
    if request.method == "DELETE":
        gateway.store.put_write("DELETE FROM responses WHERE id = ?", response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})
    if not request.match_info["rest"]:
        return json_response(stored.response)
    if request.match_info["rest"] != "/input_items":
        raise NotFound("a stored response has /input_items and nothing else")
    said = {item.get("id") for item in stored.response.get("output") or ()}
    items = [item for item in stored.items if item.get("id") not in said]
    edges = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {"first_id": None, "last_id": None}
    return json_response({"object": "list", "data": items, "has_more": False, **edges})


async def pass_response(request: web.Request, gateway: Gateway, stored: StoredResponse) -> web.StreamResponse:
    provider = gateway.router.providers.get(stored.provider)
    if provider is None:
        raise NotFound("the provider that keeps this response is not configured any more", code="response_not_found")
    call = gateway.begin(RESPONSES_ENDPOINT, request.headers, b"", peer_ip(request))

    async def work() -> web.StreamResponse:
        gateway.admit(call)
        rest = request.rel_url.raw_path.removeprefix("/v1/responses")
        return await forward(
            request, gateway, call, Target(provider, ""), provider.row.path("responses", "") + safe_path(rest)
        )

    return await logged(gateway, call, work)


async def get_requests(request: web.Request) -> web.Response:
    """The log, the newest first: `{"data": [rows], "next": cursor or null}`."""
    gateway, wanted, limit = request.app[GATEWAY_KEY], wanted_of(request), page_size(request.query.get("limit", "50"))
    await gateway.store.catch_up()
    page = await asyncio.to_thread(find_page, gateway.store, wanted, limit, int(gateway.clock() * 1000))
    more = str(page.cursor) if page.cursor else None
    return json_response({"data": [public_row(row) for row in page.rows], "next": more})


async def get_sessions(request: web.Request) -> web.Response:
    """Conversations by x-stockyard-session, the latest first, with what they cost."""
    gateway, wanted, limit = request.app[GATEWAY_KEY], wanted_of(request), page_size(request.query.get("limit", "50"))
    await gateway.store.catch_up()
    rows = await asyncio.to_thread(find_sessions, gateway.store, wanted, limit + 1, int(gateway.clock() * 1000))
    return json_response({"data": rows[:limit], "next": rows[limit - 1]["cursor"] if len(rows) > limit else None})


def wanted_of(request: web.Request) -> dict[str, str]:
    """The filters in a query; its cursor is one of them."""
    own = ("limit", "cursor", "by", "bucket")
    wanted = {name: value for name, value in request.query.items() if name not in own}
    return {**wanted, "before": request.query["cursor"]} if request.query.get("cursor") else wanted


async def export_requests(request: web.Request) -> web.StreamResponse:
    """The whole log, or what the filters leave of it, as CSV or as one JSON object a line; memory stays small."""
    gateway, form = request.app[GATEWAY_KEY], request.path.rpartition(".")[2]
    steps = export_rows(gateway.store, wanted_of(request), int(gateway.clock() * 1000))
    await gateway.store.catch_up()
    rows = await asyncio.to_thread(next, steps, None)  # a wrong filter is refused before the answer begins
    response = web.StreamResponse(headers={"cache-control": "private, no-store", "vary": "Authorization"})
    response.content_type = {"csv": "text/csv", "jsonl": "application/jsonl"}[form]
    await response.prepare(request)
    if form == "csv":
        await response.write(",".join(LOG_FIELDS).encode() + b"\r\n")
    while rows is not None:
        await response.write(await asyncio.to_thread(csv_lines if form == "csv" else json_lines, rows))
        rows = await asyncio.to_thread(next, steps, None)
    await response.write_eof()
    return response


def csv_lines(rows: Sequence[Json]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, LOG_FIELDS).writerows(map(csv_cells, rows))
    return text.getvalue().encode()


def csv_cells(row: Json) -> Json:
    """A row for spreadsheets, which would run what a client wrote as a formula."""
    return {
        name: f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
        for name, value in row.items()
    }


def json_lines(rows: Sequence[Json]) -> bytes:
    return b"".join(dump_json(row) + b"\n" for row in rows)


def page_size(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1000:
        raise InvalidRequest("`limit` must be a whole number from 1 to 1000", param="limit")
    return int(text)


async def logged_request(request: web.Request) -> Json:
    """The logged call that the path names; NotFound where there is none."""
    gateway = request.app[GATEWAY_KEY]
    await gateway.store.catch_up()
    found = await asyncio.to_thread(find_request, gateway.store, request.match_info["id"])
    if found is None:
        raise NotFound("no request has this id; it may have been older than the log keeps")
    return found


async def get_request(request: web.Request) -> web.Response:
    """One logged call with all that is kept of it, see find_request."""
    return json_response(await logged_request(request))


async def explain(request: web.Request) -> web.Response:
    """Route, attempts, cache, budget, limits, verdicts, dropped fields, price and arithmetic, and all in sentences."""
    return json_response(explain_request(await logged_request(request), request.app[GATEWAY_KEY].prices))


# What a logged request may be asked through again: the client's own endpoint, or that of the dialect it was sent in.
REPLAY_ENDPOINTS: Final[Mapping[str, Endpoint]] = {
    endpoint.path: endpoint for endpoint in (*HOT_ENDPOINTS.values(), *JSON_ENDPOINTS, *GEMINI_ENDPOINTS.values())
}
REPLAY_BY_FAMILY: Final[Mapping[str, Endpoint]] = {
    endpoint.dialect: endpoint for endpoint in REPLAY_ENDPOINTS.values() if endpoint.kind == "chat"
}


async def replay(request: web.Request) -> web.Response:
    """Ask a logged request again, on `{"model", "provider"}` or where it went: a call of its own, never from the cache.

    Answers `{"original": side, "replay": side, "same": bool, "diff": [{"op", "before", "after"}], "cost_usd",
    "latency_ms"}`: a side is ids, target, status, tokens, cost, times and `text`; the last two are differences.
    """
    gateway, found = request.app[GATEWAY_KEY], await logged_request(request)
    wanted = await body_json_of(request) if request.can_read_body else {}
    model, provider = wanted.get("model") or "", wanted.get("provider") or ""
    if not isinstance(model, str) or not isinstance(provider, str):
        raise InvalidRequest("`model` and `provider` are names", param="model")
    call = replay_call(gateway, found, model, provider, peer_ip(request))
    reply = await gateway.answer(call, WebClient())
    assert reply is not None
    await gateway.store.flush()
    again = await asyncio.to_thread(find_request, gateway.store, call.id)
    answered = {**(again or found), "response": body_json(reply.body)}
    sides = [replay_side(found, gateway.new_id), replay_side(answered, gateway.new_id)]
    return json_response(await asyncio.to_thread(compare_sides, *sides))


def replay_call(gateway: Gateway, found: Json, model: str, provider: str, client_ip: str) -> Call:
    """The call that repeats a logged one, unstreamed; InvalidRequest says why it cannot be repeated."""
    body, sent = found["request"], found["notes"].get("sent_dialect", "")
    endpoint = REPLAY_ENDPOINTS.get(found["endpoint"])
    if endpoint is not None and sent and DIALECTS[sent].family != endpoint.dialect:
        endpoint = REPLAY_BY_FAMILY.get(DIALECTS[sent].family) if endpoint.kind == "chat" else None
    why = ""
    if found["redactions"] or gateway.settings.log_bodies == "redacted":
        why = "it was logged redacted, so that asking it again would ask something else"
    elif body is None:
        why = "its body was not logged (see STOCKYARD_LOG_BODIES), or is older than the log keeps bodies"
    elif not isinstance(body, dict):
        why = "its logged body is no whole JSON object"
    elif endpoint is None:
        why = (
            f"requests to {found['endpoint']}{' as sent to ' + sent if sent else ''} cannot be asked again from the log"
        )
    if why or endpoint is None:
        raise InvalidRequest(f"this request cannot be replayed: {why}", code="not_replayable")
    headers = {"x-stockyard-cache": "off", "user-agent": f"stockyard-replay/{__version__}"}
    if not model:
        model, provider = found["upstream_model"] or found["model"], provider or found["provider"]
    if provider:
        headers["x-stockyard-provider"] = provider
    if gateway.key_required:  # who may replay is an admin
        headers["authorization"] = f"Bearer {gateway.admin_key}"
    body = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    parameters = {}
    if endpoint.dialect == "gemini":
        method = endpoint.path.rpartition(":")[2].replace("streamGenerate", "generate")
        parameters = {"model": model, "method": method, "$alt": "json"}
    else:
        body["model"] = model
    call = gateway.begin(endpoint, headers, dump_json(body), client_ip, parameters)
    call.replay_of = found["id"]
    return call


SIDE_FIELDS: Final = (
    "id", "model", "provider", "upstream_model", "status", "error", "input_tokens", "output_tokens", "cost_usd", "latency_ms",
    "first_token_ms", "finish_reason",
)  # fmt: skip


def replay_side(found: Json, new_id: Callable[[str], str]) -> Json:
    return {**{name: found[name] for name in SIDE_FIELDS}, "text": answer_text(found["response"], new_id)}


def answer_text(document: Any, new_id: Callable[[str], str]) -> str:
    """What an answer says, whatever its dialect: reasoning, text and tool calls; other answers as JSON."""
    try:
        if family := shape_of(document):
            translation = Translation("", PROVIDERS[0], False, 0, new_id, names={"signatures": {}})
            completion = DIALECTS[family].decode(document, translation)
            return "\n".join(said for choice in completion["choices"] for said in message_texts(choice["message"]))
    except (GatewayError, ValueError, LookupError, TypeError, AttributeError):
        pass  # not the shape it looked like: shown as it is
    return document if isinstance(document, str) else dump_json(document).decode() if document is not None else ""


def message_texts(message: Json) -> Iterator[str]:
    for name in ("reasoning_content", "content", "refusal"):
        said = message.get(name)
        if said:
            yield said if isinstance(said, str) else dump_json(said).decode()
    for tool in message.get("tool_calls") or ():
        function = tool.get("function") or tool.get("custom") or {}
        yield f"{function.get('name')}({function.get('arguments') or function.get('input') or ''})"


MAX_COMPARED: Final = 1500


def compare_sides(before: Json, after: Json) -> Json:
    both = (before["cost_usd"], after["cost_usd"])
    return {
        "original": before, "replay": after, "same": before["text"] == after["text"], "diff": compare_texts(before["text"], after["text"]),
        "cost_usd": None if None in both else round(both[1] - both[0], 9), "latency_ms": round(after["latency_ms"] - before["latency_ms"], 3),
    }  # fmt: skip


def compare_texts(before: str, after: str) -> list[Json]:
    """Steps from one text to the other, by words; long texts by lines, very long ones whole."""
    for pattern in (r"\s+|\S+", r".*\n|.+"):
        old, new = re.findall(pattern, before), re.findall(pattern, after)
        if max(len(old), len(new)) <= MAX_COMPARED:
            steps = difflib.SequenceMatcher(None, old, new).get_opcodes()
            return [{"op": op, "before": "".join(old[a:b]), "after": "".join(new[c:d])} for op, a, b, c, d in steps]
    return [{"op": "equal" if before == after else "replace", "before": before, "after": after}]


async def post_feedback(request: web.Request) -> web.Response:
    """`{"score": a number, "label": up to 100 letters, "comment": up to 4000}`, one of them at least."""
    gateway, found, body = request.app[GATEWAY_KEY], await logged_request(request), await body_json_of(request)
    odd = next((name for name in body if name not in FEEDBACK_TEXTS and name != "score"), None)
    score, texts = body.get("score"), {name: body.get(name, "") for name in FEEDBACK_TEXTS}
    if odd is not None or not (score is not None or any(texts.values())):
        raise InvalidRequest("feedback is `score`, `label` or `comment`", param=odd)
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise InvalidRequest("`score` must be a number", param="score")
    for name, most in FEEDBACK_TEXTS.items():
        if not isinstance(texts[name], str) or len(texts[name]) > most:
            raise InvalidRequest(f"`{name}` must be text of at most {most} letters", param=name)
    now_ms, actor = int(gateway.clock() * 1000), request[ACTOR_KEY]
    row = (found["id"], now_ms, actor, score, texts["label"], texts["comment"])
    gateway.store.put_write("INSERT INTO feedback VALUES (?, ?, ?, ?, ?, ?)", *row)
    await gateway.store.flush()
    return json_response({"ts": format_time(now_ms), "key_id": actor, "score": score, **texts}, status=201)


FEEDBACK_TEXTS: Final[Mapping[str, int]] = {"label": 100, "comment": 4000}


async def get_spend(request: web.Request) -> web.Response:
    """Calls, tokens and cost by one dimension, the dearest first."""
    gateway, by = request.app[GATEWAY_KEY], read_choice(request, "by", (*SPEND_BY, *SPEND_BY_ROWS), "model")
    await gateway.store.catch_up()
    rows = await asyncio.to_thread(find_spend, gateway.store, by, wanted_of(request), int(gateway.clock() * 1000))
    return json_response({"data": rows, "next": None})


async def get_backup(request: web.Request) -> web.StreamResponse:
    """The database as one consistent file, made while calls go on; with the balances as of now."""
    gateway = request.app[GATEWAY_KEY]
    gateway.checkpoint()
    await gateway.store.flush()
    try:
        file = await asyncio.to_thread(gateway.store.snapshot)
    except (sqlite3.Error, OSError) as error:
        raise StorageUnavailable(f"the copy could not be made: {error}") from error
    with file:
        response = web.StreamResponse(headers={"cache-control": "private, no-store"})
        response.content_type, response.content_length = "application/vnd.sqlite3", os.fstat(file.fileno()).st_size
        await response.prepare(request)
        while piece := await asyncio.to_thread(file.read, 1024 * 1024):
            await response.write(piece)
        await response.write_eof()
    return response


def read_span(request: web.Request, usual: str) -> tuple[dict[str, str], int, int]:
    """The filters of a chart, and its span in Unix milliseconds; `usual` is how far it goes back unasked."""
    wanted = {name: value for name, value in request.query.items() if name not in ("bucket", "by")}
    odd = next((name for name in wanted if name not in POINT_FILTERS), None)
    if odd is not None:
        raise InvalidRequest(f"unknown filter {odd!r}; known are {', '.join(POINT_FILTERS)}", param=odd)
    now_ms = int(request.app[GATEWAY_KEY].clock() * 1000)
    since_ms = parse_time(wanted.get("since", usual), now_ms)
    until_ms = parse_time(wanted["until"], now_ms) if "until" in wanted else now_ms + 1
    return {**wanted, "since": format_time(since_ms), "until": format_time(until_ms)}, since_ms, until_ms


def read_choice(request: web.Request, name: str, choices: Iterable[str], usual: str) -> str:
    chosen = request.query.get(name, usual)
    if chosen not in choices:
        raise InvalidRequest(f"`{name}` must be one of {', '.join(choices)}", param=name)
    return chosen


async def get_timeseries(request: web.Request) -> web.Response:
    """`?bucket=hour|day&by=total|model|provider|key`, the filters model, provider and key, and since and until.

    Answers `{"bucket", "by", "since", "until", "data": [points of find_points], "next": null}`. Unasked it is by hour
    over a day, or by day over 30 days, in total.
    """
    gateway = request.app[GATEWAY_KEY]
    bucket, by = read_choice(request, "bucket", BUCKETS_MS, "hour"), read_choice(request, "by", POINTS_BY, "total")
    wanted, since_ms, until_ms = read_span(request, {"hour": "24h", "day": "30d"}[bucket])
    if (until_ms - since_ms) / BUCKETS_MS[bucket] > MAX_BUCKETS:
        raise InvalidRequest(f"that is more than {MAX_BUCKETS} buckets; choose a shorter span, or days", param="since")
    await gateway.store.catch_up()
    now_ms = int(gateway.clock() * 1000)
    points = await asyncio.to_thread(find_points, gateway.store, by, BUCKETS_MS[bucket], wanted, now_ms)
    told = {"bucket": bucket, "by": by, "since": wanted["since"], "until": wanted["until"]}
    return json_response({**told, "data": points, "next": None})


async def get_overview(request: web.Request) -> web.Response:
    """Totals of a span (24 hours unasked), of the one as long before it, and by model, provider and key, busiest first.

    Answers `{"since", "until", "total": point or null, "before": point or null, "model": [points], "provider": [points],
    "key": [points], "lost_rows", "cache": as GET /api/cache, "held_usd"}`; points as find_points tells them.
    """
    gateway = request.app[GATEWAY_KEY]
    wanted, since_ms, until_ms = read_span(request, "24h")
    earlier = {**wanted, "since": format_time(2 * since_ms - until_ms), "until": wanted["since"]}
    await gateway.store.catch_up()

    def points(by: str, span: Mapping[str, str]) -> list[Json]:
        return find_points(gateway.store, by, 0, span, until_ms)

    def collect() -> Json:
        total, before = (next(iter(points("total", span)), None) for span in (wanted, earlier))
        return {"total": total, "before": before, **{by: points(by, wanted) for by in ("model", "provider", "key")}}

    told = {"since": wanted["since"], "until": wanted["until"], **await asyncio.to_thread(collect)}
    told["cache"], told["lost_rows"] = await gateway.cache.view(), gateway.store.lost_rows
    return json_response({**told, "held_usd": gateway.ledger.held_nanousd / NANOUSD_PER_USD})


async def get_providers(request: web.Request) -> web.Response:
    """The configured providers, keys masked, with resting keys and breakers; `others`: what would enable the rest."""
    gateway = request.app[GATEWAY_KEY]
    router, now_s = gateway.router, gateway.tick()
    rows = [
        {**provider_view(provider), **router.view_provider(provider, now_s)} for provider in router.providers.values()
    ]
    others = [
        {"id": row.id, "name": row.name, "set": enabling_variable(row), "retired": row.retired}
        for row in PROVIDERS if row.id not in router.providers
    ]  # fmt: skip
    return json_response({"data": rows, "others": others, "next": None})


def provider_view(provider: ConfiguredProvider) -> Json:
    """A configured provider for people; its keys masked."""
    return {
        "id": provider.id, "name": provider.row.name, "base_url": provider.base_url, "dialect": provider.row.dialect,
        "keys": [mask_secret(key) for key in provider.keys], "source": provider.source, "offers": sorted(provider.row.offers),
    }  # fmt: skip


def mask_secret(secret: str) -> str:
    return f"{secret[:3]}…{secret[-2:]}" if len(secret) >= 16 else "…"


async def check_provider(request: web.Request) -> web.Response:
    """Ask a provider for its list of models: whether it answers and takes our key."""
    gateway, name = request.app[GATEWAY_KEY], request.match_info["name"]
    provider = gateway.router.providers.get(name)
    if provider is None:
        raise NotFound(f"the provider {clean_header(name, 40)!r} is not configured")
    return json_response(await probe_provider(gateway, provider))


async def probe_provider(gateway: Gateway, provider: ConfiguredProvider) -> Json:
    """One models-list call, timed: does the provider answer, and does it take our key?"""
    began_s = gateway.tick()
    try:
        rows = await gateway.list_models(provider)
    except GatewayError as error:
        return {"id": provider.id, "ok": False, "error": error.message, "code": error.code}
    return {"id": provider.id, "ok": True, "models": len(rows), "ms": round((gateway.tick() - began_s) * 1000, 1)}


async def get_route(request: web.Request) -> web.Response:
    """Where a model name goes, and why."""
    gateway, model = request.app[GATEWAY_KEY], request.query.get("model", "")
    if not model:
        raise InvalidRequest("say which name with ?model=", param="model")
    query, tokens = request.query, request.query.get("tokens", "0")
    if not (tokens.isascii() and tokens.isdigit() and len(tokens) < 10):
        raise InvalidRequest("`tokens` must be a whole number", param="tokens")
    asked = Asked(int(tokens), parse_tags(query.get("tags", "")), query.get("session", ""))
    rows = gateway.router.view(model, query.get("provider", ""), asked, gateway.random, gateway.tick(), gateway.clock())
    return json_response({"model": model, "targets": rows})


async def body_json_of(request: web.Request) -> Json:
    try:
        return parse_json_object(await read_body(request, request.app[GATEWAY_KEY]))
    except ValueError as error:
        raise InvalidRequest(f"the body is no JSON object: {error}") from None


# ----- Admin JSON -----------------------------------------------------------------------------------------------------


async def post_session(request: web.Request) -> web.Response:
    """Sign in: `{"key": the admin key, or a virtual key of the role viewer or admin}`, or `{"token": of the link}`.

    Answers `{"role", "key_id", "csrf", "expires_at"}` and sets the cookie; `csrf` goes into x-stockyard-csrf.
    """
    gateway, body = request.app[GATEWAY_KEY], await body_json_of(request)
    now_ms, role, key_id = int(gateway.clock() * 1000), "admin", ""
    given, token = body.get("key"), body.get("token")
    if isinstance(token, str):
        if not gateway.sessions.redeem(token, now_ms):
            raise Unauthenticated("this link was used or is too old; sign in with the admin key")
    elif not isinstance(given, str):
        raise InvalidRequest("sign in with `key` or `token`", param="key")
    elif not is_admin_key(given, gateway.admin_key):
        key = gateway.keys.authenticate(given, now_ms)
        if key.role == "client":
            raise Forbidden("a key of the role client may not sign in")
        role, key_id = key.role, key.id
    secret, session = gateway.sessions.begin(role, key_id, now_ms)
    response = json_response(session_view(session))
    secure = request.secure or request.headers.get("x-forwarded-proto") == "https"
    response.set_cookie(
        SESSION_COOKIE, secret, max_age=SESSION_MS // 1000, httponly=True, samesite="Strict", secure=secure
    )
    return response


def session_view(session: Session) -> Json:
    until = format_moment(session.expires_ms)
    return {"role": session.role, "key_id": session.key_id, "csrf": session.csrf, "expires_at": until}


async def get_session(request: web.Request) -> web.Response:
    """GET: the session of the cookie, as sign-in told it. DELETE: end it."""
    gateway = request.app[GATEWAY_KEY]
    session = gateway.session_of(request.headers)
    if session is None:
        raise NotFound("this request has a key and no session")
    response = json_response(session_view(session))
    if request.method == "DELETE":
        gateway.sessions.end(session)
        response.del_cookie(SESSION_COOKIE, httponly=True, samesite="Strict")
    return response


MAX_WATCHERS: Final = 32


async def get_events(request: web.Request) -> web.StreamResponse:
    """The live log as server-sent events: `request` (a log row as it is made), `lost` (`{"lost": count}`: what a slow
    reader missed). Ends with the session or key that opened it."""
    gateway, watcher = request.app[GATEWAY_KEY], Watcher()
    if len(gateway.watchers) >= MAX_WATCHERS:
        raise LimitExceeded(f"{MAX_WATCHERS} readers watch the log already", retry_after_s=HEARTBEAT_S)
    headers = {"content-type": "text/event-stream", "cache-control": "private, no-store", "x-accel-buffering": "no"}
    response = web.StreamResponse(headers=headers)
    gateway.watchers.append(watcher)
    try:
        await response.prepare(request)
        await response.write(b": watching\n\n")
        while not gateway.draining:
            events = await watcher.take()
            require_role(request, gateway, "admin")
            await response.write(events)
    except (Forbidden, Unauthenticated):
        pass
    finally:
        gateway.watchers.remove(watcher)
    return response


async def post_key(request: web.Request) -> web.Response:
    """Make a virtual key; its secret `key` is told this once."""
    gateway = request.app[GATEWAY_KEY]
    key, secret = gateway.create_key(await body_json_of(request))
    await gateway.store.flush()
    return json_response({**key.as_json(int(gateway.clock() * 1000)), "key": secret}, status=201)


async def get_keys(request: web.Request) -> web.Response:
    """All virtual keys, without their secrets."""
    gateway = request.app[GATEWAY_KEY]
    now_ms = int(gateway.clock() * 1000)
    return json_response({"data": [key.as_json(now_ms) for key in gateway.keys.by_id.values()], "next": None})


def key_of(request: web.Request) -> VirtualKey:
    key = request.app[GATEWAY_KEY].keys.by_id.get(request.match_info["id"])
    if key is None:
        raise NotFound("no key has this id")
    return key


async def change_key(request: web.Request) -> web.Response:
    """GET, PATCH and DELETE (revoke) of one key."""
    gateway, key = request.app[GATEWAY_KEY], key_of(request)
    now_ms = int(gateway.clock() * 1000)
    if request.method == "PATCH":
        key = gateway.keep_key(patch_key(key, await body_json_of(request)))
    elif request.method == "DELETE":
        key = gateway.keep_key(dataclasses.replace(key, revoked_at_ms=now_ms))
    await gateway.store.flush()
    return json_response(key.as_json(now_ms))


async def rotate_key(request: web.Request) -> web.Response:
    """Give a key another secret; the old one works for `grace_s` more seconds."""
    gateway, key = request.app[GATEWAY_KEY], key_of(request)
    body = await body_json_of(request) if request.can_read_body else {}
    grace_s = body.get("grace_s", 0)
    if not isinstance(grace_s, int) or not 0 <= grace_s <= 31 * 86_400:
        raise InvalidRequest("`grace_s` must be whole seconds, at most 31 days", param="grace_s")
    key, secret = gateway.rotate_key(key, grace_s * 1000)
    await gateway.store.flush()
    return json_response({**key.as_json(int(gateway.clock() * 1000)), "key": secret})


async def get_budgets(request: web.Request) -> web.Response:
    """Every budget: limit, spent, held, left."""
    gateway = request.app[GATEWAY_KEY]
    return json_response({"data": gateway.ledger.snapshot(int(gateway.clock() * 1000)), "next": None})


async def put_budgets(request: web.Request) -> web.Response:
    """Replace the budgets that were set here before; those of keys and settings stay."""
    gateway = request.app[GATEWAY_KEY]
    body = await body_json_of(request)
    gateway.set_budgets(read_budgets(body.get("budgets", body.get("data"))))
    await gateway.store.flush()
    return await get_budgets(request)


async def get_cache(request: web.Request) -> web.Response:
    """Sizes, hits, misses and what the cache saved."""
    return json_response(await request.app[GATEWAY_KEY].cache.view())


async def delete_cache(request: web.Request) -> web.Response:
    """Empty the cache."""
    cache = request.app[GATEWAY_KEY].cache
    entries = (await cache.view())["entries"]
    await cache.clear()
    return json_response({"deleted": entries})


async def get_config(request: web.Request) -> web.Response:
    """Every setting: `{"name", "value", "source", "default", "live": changed by a reload, "help"}`; secrets masked."""
    return json_response({"data": config_view(request.app[GATEWAY_KEY].settings), "next": None})


async def post_config(request: web.Request) -> web.Response:
    """Change settings: `{name: value, or null for the default}`, kept in stockyard.toml. All or nothing.

    With `?check=true` nothing is changed. Answers `{"changed": names, "data": as GET}`.
    """
    body = await body_json_of(request)
    odd = next(
        (name for name, value in body.items() if name not in LIVE_SETTINGS or isinstance(value, dict | list)), None
    )
    if odd is not None:
        raise InvalidRequest(f"{odd!r} cannot be set here; what can: {', '.join(sorted(LIVE_SETTINGS))}", param=odd)
    return reload_now(request, body)


async def reload_config(request: web.Request) -> web.Response:
    """Read environment and stockyard.toml anew, all or nothing. Answers `{"changed": names, "data": as GET}`."""
    return reload_now(request, {})


def reload_now(request: web.Request, changes: Json) -> web.Response:
    gateway = request.app[GATEWAY_KEY]
    if gateway.reload is None:
        raise InvalidRequest(
            "this process was started with settings that it cannot read again", code="invalid_settings"
        )
    try:
        changed = gateway.reload(changes, request.query.get("check") == "true")
    except SettingsError as error:
        raise InvalidRequest(str(error), code="invalid_settings") from None
    return json_response({"changed": changed, "data": config_view(gateway.settings)})


def shown_value(settings: Settings, name: str) -> Any:
    value = getattr(settings, name)
    return mask_secret(value) if name in SECRET_SETTINGS and value else value


SECRET_MEMBER: Final = re.compile(r"(^|_)(keys?|secret|token|password)$")


def mask_members(value: Any, name: str = "") -> Any:
    """A table of stockyard.toml with every text masked that a name such as `api_key` holds."""
    if isinstance(value, dict):
        return {member: mask_members(inner, member) for member, inner in value.items()}
    if isinstance(value, list):
        return [mask_members(inner, name) for inner in value]
    return mask_secret(value) if isinstance(value, str) and SECRET_MEMBER.search(name) else value


def config_view(settings: Settings) -> list[Json]:
    """Every setting and table with its value and where that came from; secrets masked."""
    rows = [(row.name, shown_value(settings, row.name), row.default, row.metadata["help"]) for row in SETTING_ROWS]
    rows += [(name, mask_members(table), None, "a table of stockyard.toml") for name, table in settings.tables.items()]
    return [
        {"name": name, "value": value, "source": settings.sources.get(name, "default"), "default": default,
         "live": name in LIVE_SETTINGS | LIVE_TABLES, "help": words}
        for name, value, default, words in rows
    ]  # fmt: skip


# ----- Description ----------------------------------------------------------------------------------------------------
# /openapi.json is written from ROUTES: a row's handler gives the summary, its role the security and the statuses. What a
# row cannot say stands in these small tables, by method and path or by path.

BODIES: Final[Mapping[str, Mapping[str, str]]] = {
    "POST /api/session": {"key": "string", "token": "string"},
    "POST /api/requests/{id}/replay": {"model": "string", "provider": "string"},
    "POST /api/requests/{id}/feedback": {"score": "number", "label": "string", "comment": "string"},
    "POST /api/keys": dict.fromkeys(KEY_MEMBERS, ""), "PATCH /api/keys/{id}": dict.fromkeys(KEY_MEMBERS, ""),
    "POST /api/keys/{id}/rotate": {"grace_s": "integer"},
    "PUT /api/budgets": {"budgets": "array"}, "POST /api/config": dict.fromkeys(sorted(LIVE_SETTINGS), ""),
}  # fmt: skip
PAGE_FILTERS: Final = tuple(name for name in LOG_FILTERS if name != "before")
QUERIES: Final[Mapping[str, tuple[str, ...]]] = {
    "/api/requests": (*PAGE_FILTERS, "limit", "cursor"),
    "/api/requests.csv": PAGE_FILTERS, "/api/requests.jsonl": PAGE_FILTERS,
    "/api/sessions": (*(name for name in LOG_FILTERS if name != "before"), "limit", "cursor"),
    "/api/spend": ("by", *SPEND_FILTERS), "/api/timeseries": ("bucket", "by", *POINT_FILTERS), "/api/overview": POINT_FILTERS,
    "/api/route": ("model", "provider", "tags", "session", "tokens"), "POST /api/config": ("check",), "POST /api/config/reload": ("check",),
}  # fmt: skip
SUCCESSES: Final[Mapping[str, int]] = {"POST /api/keys": 201, "POST /api/requests/{id}/feedback": 201}
EVENT_STREAMS: Final = frozenset({"/api/events"})
STATUS_WORDS: Final[Mapping[str, str]] = {
    "400": "The request is not understood, or a guardrail refuses it; `param` and `code` name what.",
    "401": "The key, session or link is missing, or not valid here.",
    "403": "The Host, the Origin, the role or the header token does not allow it.",
    "404": "Nothing has this name.", "408": "The body did not arrive in time.", "413": "The body is too large.",
    "415": "Compressed bodies are not taken.", "429": "A limit or a budget is used up; `retry-after` says for how long.",
    "4XX": "The provider's own refusal, in the client's dialect.", "500": "A fault of Stockyard's own, logged.",
    "502": "The provider failed or cannot be reached.", "503": "Shutting down, or the log cannot be written.",
    "504": "The provider took too long.",
}  # fmt: skip
ROLE_STATUSES: Final[Mapping[str, tuple[str, ...]]] = {
    "anyone": ("400", "401", "403", "500", "503"), "client": ("400", "401", "403", "404", "500", "502", "504"),
    "viewer": ("400", "401", "403", "404", "500"), "admin": ("400", "401", "403", "404", "429", "500"),
}  # fmt: skip
ROLE_SECURITY: Final[Mapping[str, list[Json]]] = {
    "anyone": [{}], "client": [{}, {"bearer": []}, {"key": []}, {"session": []}],
    "viewer": [{"bearer": []}, {"session": []}], "admin": [{"bearer": []}, {"session": []}],
}  # fmt: skip


def plain_paths(path: str) -> list[str]:
    """A route's path as OpenAPI writes it; two where its last part may be left out."""
    head, tail, _ = path.partition("{rest:")
    shown = re.sub(r"\{(\w+)(:[^{}]*)?\}", r"{\1}", head)
    return [shown, f"{shown}/{{rest}}"] if tail else [shown]


def describe_body(row: RouteRow, method: str, path: str) -> Json | None:
    members = BODIES.get(f"{method} {path}")
    if members is None and (method in ("GET", "DELETE") or not row.spends):
        return None
    if members is None:
        kind = "multipart/form-data" if row.endpoint and row.endpoint.upload else "application/json"
        required = {"required": ["model"], "properties": {"model": {"type": "string"}}} if row.endpoint else {}
        return {"required": True, "content": {kind: {"schema": {"type": "object", **required}}}}
    properties: Json = {name: {"type": kind} if kind else {} for name, kind in members.items()}
    return {"content": {"application/json": {"schema": {"type": "object", "properties": properties}}}}


def describe_operation(row: RouteRow, method: str, path: str) -> Json:
    text = " ".join((row.handler.__doc__ or row.handler.__name__.replace("_", " ")).split())
    names = re.findall(r"\{(\w+)\}", path)
    queries = QUERIES.get(path, ()) if method == "GET" else QUERIES.get(f"{method} {path}", ())
    body = describe_body(row, method, path)
    streams = path in EVENT_STREAMS or (row.endpoint is not None and row.endpoint.streams)
    kinds = ["text/event-stream"] * streams + ["application/json"] * (path not in EVENT_STREAMS)
    told = {kind: {"schema": {"type": "object" if kind == "application/json" else "string"}} for kind in kinds}
    failures = {
        *ROLE_STATUSES[row.role],
        *(("408", "413", "415") if body else ()),
        *(("429", "503", "4XX") if row.spends else ()),
    }
    operation: Json = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
        "summary": text.partition(". ")[0].rstrip("."), "description": text, "tags": [row.role], "security": ROLE_SECURITY[row.role],
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        + [{"name": name, "in": "query", "schema": {"type": "string"}} for name in queries],
        "responses": {str(SUCCESSES.get(f"{method} {path}", 200)): {"description": "Done.", "content": told},
                      **{code: {"$ref": f"#/components/responses/{code}"} for code in sorted(failures)}},
    }  # fmt: skip
    return operation if body is None else {**operation, "requestBody": body}


def describe_routes(routes: Iterable[RouteRow]) -> Json:
    """The OpenAPI 3.1 document of these routes. Paths that differ in the names of their parts only are one."""
    paths: dict[str, Json] = {}
    known: dict[str, str] = {}
    for row in routes:
        for shown in plain_paths(row.path):
            path = known.setdefault(re.sub(r"\{\w+\}", "{}", shown), shown)
            for method in row.methods.split():
                paths.setdefault(path, {}).setdefault(method.lower(), describe_operation(row, method, path))
    error = {"message": "string", "type": "string", "code": "string", "param": ""}
    members = {name: {"type": kind} if kind else {} for name, kind in error.items()}
    schemas = {"Error": {"type": "object", "properties": {"error": {"type": "object", "properties": members}}}}
    security = {
        "bearer": {"type": "http", "scheme": "bearer"}, "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        "session": {"type": "apiKey", "in": "cookie", "name": SESSION_COOKIE},
    }  # fmt: skip
    about = {"title": "Stockyard", "version": __version__, "license": {"name": "MIT", "identifier": "MIT"}}
    problem = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses = {code: {"description": text, "content": problem} for code, text in STATUS_WORDS.items()}
    components = {"schemas": schemas, "responses": responses, "securitySchemes": security}
    return {"openapi": "3.1.0", "info": about, "servers": [{"url": "/"}], "paths": paths, "components": components}


async def get_openapi(request: web.Request) -> web.Response:
    """This description."""
    return json_response(describe_routes(ROUTES))


ROUTES: Final[tuple[RouteRow, ...]] = (
    *(
        RouteRow("POST", endpoint.path, answer_call, "client", spends=True, endpoint=endpoint)
        for endpoint in HOT_ENDPOINTS.values()
    ),
    *(
        RouteRow("POST", endpoint.path, answer_call, "client", spends=True, endpoint=endpoint)
        for endpoint in JSON_ENDPOINTS
    ),
    *(
        RouteRow("POST", endpoint.path, pass_upload, "client", spends=True, endpoint=endpoint)
        for endpoint in UPLOAD_ENDPOINTS
    ),
    RouteRow("GET POST DELETE", "/v1/files{rest:(/.*)?}", pass_files, "client", spends=True),
    RouteRow("GET POST DELETE", "/v1/batches{rest:(/.*)?}", pass_files, "client", spends=True),
    RouteRow(ALL_METHODS, "/proxy/{provider}/{path:.*}", pass_proxy, "client", spends=True),
    RouteRow("GET POST DELETE", "/v1/responses/{id}{rest:(/.*)?}", get_response, "client", spends=True),
    RouteRow("GET", "/v1/models", get_models, "client"),
    RouteRow("GET", "/v1/models/{id:.+}", get_model, "client"),
    RouteRow("POST", "/v1/models/{target:.+}", answer_gemini, "client", spends=True),
    RouteRow("GET", "/v1beta/models", get_models, "client"),
    RouteRow("GET", "/v1beta/models/{id:.+}", get_model, "client"),
    RouteRow("POST", "/v1beta/models/{target:.+}", answer_gemini, "client", spends=True),
    RouteRow("GET", "/health", get_health, "anyone"),
    RouteRow("GET", "/ready", get_ready, "anyone"),
    RouteRow("GET", "/openapi.json", get_openapi, "anyone"),
    RouteRow("POST", "/api/session", post_session, "anyone"),
    RouteRow("GET DELETE", "/api/session", get_session, "viewer"),
    RouteRow("GET", "/api/events", get_events, "admin"),
    RouteRow("GET", "/api/requests", get_requests, "admin"),
    RouteRow("GET", "/api/requests.csv", export_requests, "admin"),
    RouteRow("GET", "/api/requests.jsonl", export_requests, "admin"),
    RouteRow("GET", "/api/requests/{id}", get_request, "admin"),
    RouteRow("GET", "/api/requests/{id}/explain", explain, "admin"),
    RouteRow("POST", "/api/requests/{id}/replay", replay, "admin", spends=True),
    RouteRow("POST", "/api/requests/{id}/feedback", post_feedback, "admin"),
    RouteRow("GET", "/api/sessions", get_sessions, "admin"),
    RouteRow("GET", "/api/spend", get_spend, "admin"),
    RouteRow("GET", "/api/timeseries", get_timeseries, "admin"),
    RouteRow("GET", "/api/overview", get_overview, "admin"),
    RouteRow("POST", "/api/backup", get_backup, "admin"),
    RouteRow("GET", "/api/providers", get_providers, "admin"),
    RouteRow("POST", "/api/providers/{name}/check", check_provider, "admin"),
    RouteRow("GET", "/api/models", get_models, "admin"),
    RouteRow("GET", "/api/route", get_route, "admin"),
    RouteRow("GET", "/api/cache", get_cache, "admin"),
    RouteRow("DELETE", "/api/cache", delete_cache, "admin"),
    RouteRow("GET", "/api/config", get_config, "admin"),
    RouteRow("POST", "/api/config", post_config, "admin"),
    RouteRow("POST", "/api/config/reload", reload_config, "admin"),
    RouteRow("POST", "/api/keys", post_key, "admin"),
    RouteRow("GET", "/api/keys", get_keys, "admin"),
    RouteRow("GET PATCH DELETE", "/api/keys/{id}", change_key, "admin"),
    RouteRow("POST", "/api/keys/{id}/rotate", rotate_key, "admin"),
    RouteRow("GET", "/api/budgets", get_budgets, "admin"),
    RouteRow("PUT", "/api/budgets", put_budgets, "admin"),
)


@web.middleware
async def boundary(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Host and Origin first, then the route's role, then the handler; every failure becomes one error body."""
    gateway = request.app[GATEWAY_KEY]
    row = request.match_info.route.name and ROUTES_BY_NAME.get(request.match_info.route.name)
    try:
        refusal = request.app[GUARD_KEY].check(request.headers) or odd_request(request)
        if refusal is not None:
            raise refusal
        if row and (
            row.role in ("viewer", "admin") or (row.role == "client" and not row.spends and gateway.key_required)
        ):
            request[ACTOR_KEY] = require_role(request, gateway, row.role)
        return await handler(request)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        failure: GatewayError = GatewayError(
            f"this path takes {allowed}", status=405, type="invalid_request_error", code="method_not_allowed"
        )
    except web.HTTPException as error:
        where = clean_header(request.path, 100)
        failure = NotFound(f"nothing is served at {request.method} {where}; {SEE_README}") if error.status == 404 else GatewayError(
            error.reason, status=error.status, type="invalid_request_error", code="bad_request"
        )  # fmt: skip
    except GatewayError as error:
        failure = error
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception as error:
        failure = gateway.internal_error(error)
    status, body = dialect_of_path(request.path).render_error(failure, gateway.new_id("req_"))
    response = json_response(body, status)
    if failure.retry_after_s is not None:
        response.headers["retry-after"] = str(max(1, math.ceil(failure.retry_after_s)))
    if status in (400, 413):
        response.force_close()
    return response


def dialect_of_path(path: str) -> Dialect:
    return DIALECTS[next((name for prefix, name in PATH_DIALECTS if path.startswith(prefix)), "openai")]


PATH_DIALECTS: Final = (("/v1beta/", "gemini"), ("/v1/messages", "anthropic"))


def odd_request(request: web.Request) -> GatewayError | None:
    """Requests that two servers in a row may read differently."""
    if request.version not in (aiohttp.HttpVersion10, aiohttp.HttpVersion11):
        return InvalidRequest("only HTTP/1.0 and HTTP/1.1 are spoken here")
    if "upgrade" in request.headers and "upgrade" in request.headers.get("connection", "").lower():
        return InvalidRequest("this server upgrades no connections")
    if not request.raw_path.startswith("/"):
        return InvalidRequest("the request line must hold a path, not a whole URL")
    return None


def require_role(request: web.Request, gateway: Gateway, role: str) -> str:
    """Pass the admin key, or a virtual key or session whose role is enough, and give the key's id."""
    given, had, key_id = presented_key(request.headers, {}), "admin", ""
    if not given and (session := gateway.session_of(request.headers)) is not None:
        had, key_id = session.role, session.key_id
        if request.method != "GET" and not session.takes_header(request.headers):
            raise Forbidden("changes by session need its header token, x-stockyard-csrf", code="csrf")
    elif not is_admin_key(given, gateway.admin_key):
        key = key_for_admin(gateway, given)
        had, key_id = key.role, key.id
    if role != "client" and had != "admin" and not (had == "viewer" and (role == "viewer" or request.method == "GET")):
        raise Forbidden(f"a key of the role {had} may not do this")
    return key_id


def key_for_admin(gateway: Gateway, given: str) -> VirtualKey:
    try:
        return gateway.keys.authenticate(given, int(gateway.clock() * 1000))
    except Unauthenticated:
        message = "this needs the admin key as `Authorization: Bearer …`; it lies in admin.key in the data directory"
        raise Unauthenticated(message) from None


ROUTES_BY_NAME: Final[Mapping[str, RouteRow]] = {f"route{number}": row for number, row in enumerate(ROUTES)}


def make_app(gateway: Gateway, guard: RequestGuard) -> web.Application:
    app = web.Application(middlewares=[boundary], client_max_size=0)
    app[GATEWAY_KEY], app[GUARD_KEY] = gateway, guard
    for name, row in ROUTES_BY_NAME.items():
        resource = app.router.add_resource(row.path, name=name)
        resource.endpoint = row.endpoint  # type: ignore[attr-defined]
        for method in row.methods.split():
            resource.add_route(method, row.handler)

    async def uploads(app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        async with aiohttp.ClientSession(
            connector=connector, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
        ) as session:
            app[UPLOADS_KEY] = session
            yield

    app.cleanup_ctx.append(uploads)
    return app


@contextlib.asynccontextmanager
async def open_server(gateway: Gateway, listener: socket.socket) -> AsyncIterator[None]:
    """Serve on a bound socket until the block ends; then finish what is under way, to a deadline."""
    guard = RequestGuard(gateway.settings)
    runner = web.AppRunner(
        make_app(gateway, guard),
        access_log=None,
        keepalive_timeout=75.0,
        handler_cancellation=True,
        auto_decompress=False,
    )
    await runner.setup()
    lane = cast(type[Lane], type("GatewayLane", (Lane,), {"gateway": gateway, "guard": guard, "__slots__": ()}))
    manager = runner.server
    assert manager is not None
    options = manager._kwargs
    server = await gateway.loop.create_server(
        lambda: lane(manager, loop=gateway.loop, **options), sock=listener, backlog=1024
    )
    try:
        yield
    finally:
        gateway.draining = True
        server.close()
        for watcher in gateway.watchers:
            watcher.more.set()
        await drain(gateway, gateway.settings.drain_timeout)
        await runner.shutdown()
        await manager.shutdown(1.0)
        await runner.cleanup()


async def drain(gateway: Gateway, timeout_s: float) -> None:
    """Wait until no call is under way, at most `timeout_s`."""
    deadline_s = gateway.tick() + timeout_s
    while gateway.in_flight and gateway.tick() < deadline_s:
        await asyncio.sleep(0.02)
    await gateway.cut_off(gateway.shadows)


# ===== Process ========================================================================================================
# What a process is made of and how it lives: the lock on its data directory, the listener, signals, and the assembly of
# a Gateway from settings. One instance a data directory: two counters of one budget would both be wrong.

ASSETS: Final = "stockyard_assets"


def read_asset(name: str) -> bytes:
    """A file shipped beside the module: in a checkout, after `pip install`, and in the packed executable alike."""
    return (Path(__file__).resolve().parent / ASSETS / name).read_bytes()


class DirectoryInUse(StoreError):
    """Another process holds the data directory."""


class DirectoryLock:
    """Holds a data directory for this process; StoreError names the holder otherwise."""

    def __init__(self, path: Path) -> None:
        self._file = open(path / "lock", "a+", opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115 - held while we live
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise DirectoryInUse(
                f"{path} is in use by {holder}; stop it, or set STOCKYARD_DATA_DIR to another directory"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def load_admin_key(settings: Settings) -> str:
    """The admin key of the settings, else of admin.key, made on first use (0600)."""
    if settings.admin_key:
        return settings.admin_key
    path = settings.data_path / "admin.key"
    if not path.exists():
        with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(f"sy-admin-{secrets.token_urlsafe(32)}\n")
    return path.read_text().strip()


def derived_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables that follow from others: Vertex has a host for every location."""
    location = variables.get("GOOGLE_CLOUD_LOCATION", "global")
    hosts = {
        "global": "aiplatform.googleapis.com",
        "us": "aiplatform.us.rep.googleapis.com",
        "eu": "aiplatform.eu.rep.googleapis.com",
    }
    return {**variables, "VERTEX_HOST": hosts.get(location, f"{location}-aiplatform.googleapis.com")}


def configured_providers(variables: Mapping[str, str]) -> dict[str, ConfiguredProvider]:
    """All providers that the variables turn on; SettingsError for a bad URL or key."""
    found: dict[str, ConfiguredProvider] = {}
    variables = derived_variables(variables)
    for row in PROVIDERS:
        try:
            provider = configure_provider(row, variables)
        except ValueError as error:
            raise SettingsError(f"{row.base_variables[0]}: {error}") from None
        if provider is None:
            continue
        if any(not key.isascii() or not key.isprintable() or " " in key for key in provider.keys):
            raise SettingsError(f"{provider.source}: the key holds spaces or characters that no header can carry")
        found[row.id] = provider
    return found


def load_prices(settings: Settings) -> PriceBook:
    return with_own_prices(PriceBook.load(read_asset("prices.json")), settings)


def with_own_prices(book: PriceBook, settings: Settings) -> PriceBook:
    """The table with the rows of stockyard.toml over it, in place of those it had."""
    try:
        return book.with_overrides(settings.tables.get("prices", []))
    except InvalidPrices as error:
        raise SettingsError(f"[[prices]]: {error}") from None


def load_router(
    settings: Settings, environment: Mapping[str, str], prices: PriceBook, before: Router | None = None
) -> Router:
    """The providers that are on, and the routes and aliases over them. SettingsError where one cannot work."""
    providers = configured_providers(provider_variables(settings, environment))
    return Router.load(providers, prices, settings.tables, settings.deadlines, before)


def load_pepper(settings: Settings) -> bytes:
    """What key digests are made with: a file beside the database, so that neither alone tells a key."""
    path = settings.data_path / "pepper"
    if not path.exists():
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(secrets.token_bytes(32))
    return path.read_bytes()


def configured_budgets(settings: Settings) -> list[Budget]:
    """Budgets of the settings and of stockyard.toml; SettingsError where one is not understood."""
    try:
        budgets = [parse_budget(settings.budget)] if settings.budget else []
        return budgets + (read_budgets(settings.tables["budgets"]) if "budgets" in settings.tables else [])
    except (InvalidRequest, ValueError) as error:
        raise SettingsError(f"budget: {getattr(error, 'message', error)}") from None


def configured_rates(settings: Settings) -> RateLimit | None:
    try:
        return parse_rate_limit(settings.rate_limit) if settings.rate_limit else None
    except (InvalidRequest, ValueError) as error:
        raise SettingsError(f"rate_limit: {getattr(error, 'message', error)}") from None


def open_ledger(gateway: Gateway) -> None:
    """Keys, budgets and balances as the last process left them. Holds it left open are charged whole, and told."""
    settings, store, path = gateway.settings, gateway.store, gateway.settings.data_path
    keys = [VirtualKey.from_record(record) for record in read_records(store, "keys")]
    gateway.keys = KeyRing(load_pepper(settings), keys)
    gateway.decide_keys()
    stored = [Budget(**record) for record in read_records(store, "budgets")]
    gateway.set_budget_ids = [budget.id for budget in stored]
    budgets = [*configured_budgets(settings), *stored, *(key.budget for key in keys if key.budget is not None)]
    books, generation = read_books(store, path)
    now_ms = int(gateway.clock() * 1000)
    gateway.ledger, orphans = Ledger.restore(budgets, books, gateway.new_id, now_ms)
    gateway.journal = Journal(path, generation, settings.durability == "full")
    gateway.stored_settled = {**books.settled}  # before this process; what it settles itself lies in the ledger
    gateway.has_budgets = bool(budgets)
    for ended in orphans:
        gateway.record_end(ended)
    if orphans:
        total = sum(ended.cost_nanousd for ended in orphans)
        print_error(
            f"{len(orphans)} calls were cut off by the last stop; their holds are charged whole (${format_usd(total)})"
        )
    rates = configured_rates(settings)
    gateway.has_rates = rates is not None
    gateway.rates = RateLimiter(rates, {}, int(time.monotonic() * 1000))


@contextlib.asynccontextmanager
async def open_gateway(settings: Settings, environment: Mapping[str, str]) -> AsyncIterator[Gateway]:
    """Everything a process needs to answer calls, closed in order at the end. SettingsError, StoreError."""
    prices = load_prices(settings)
    router = load_router(settings, environment, prices)
    prepare_data_dir(settings.data_path)
    lock = DirectoryLock(settings.data_path)
    try:
        store = LogStore(
            settings.data_path / "stockyard.db",
            bodies=settings.log_bodies != "none",
            full_sync=settings.durability == "full",
            keep_ms=settings.log_retention * DAY_MS,
            max_bytes=settings.log_mb * 1024 * 1024,
        )
    except BaseException:
        lock.release()
        raise
    upstream = Upstream(asyncio.get_running_loop(), settings.deadlines)
    try:
        gateway = Gateway(settings, router, prices, store, upstream, load_admin_key(settings))
        open_ledger(gateway)
        if not settings.is_loopback and settings.require_key == "auto" and not len(gateway.keys):
            raise SettingsError(
                f"{settings.host} can be reached by others, and there is no virtual key yet: make one with "
                "`stockyard keys create --name me`, or listen on this machine alone with `--host 127.0.0.1`"
            )
        yield gateway
        gateway.checkpoint()
        try:
            await store.flush()
        except StorageUnavailable as error:  # all of it stays in the journals, for the next start
            print_error(f"the log could not be written out at this stop: {error.message}")
        else:
            if gateway.journal is not None:
                gateway.journal.drop_before(gateway.journal.generation)
                gateway.journal.close()
    finally:
        await upstream.close()
        await asyncio.to_thread(store.close)
        lock.release()


def find_config(environment: Mapping[str, str], flags: Mapping[str, str | None]) -> tuple[str, str]:
    """The text and path of stockyard.toml: ./, the data directory, STOCKYARD_CONFIG; empty where there is none."""
    data_dir = flags.get("data_dir") or environment.get("STOCKYARD_DATA_DIR") or "~/.stockyard"
    places = [Path("stockyard.toml"), Path(data_dir).expanduser() / "stockyard.toml"]
    named = flags.get("config") or environment.get("STOCKYARD_CONFIG")
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise SettingsError(f"STOCKYARD_CONFIG: there is no file {path}")
        places = [path] if flags.get("config") else [*places, path]
    for path in places:
        with contextlib.suppress(PermissionError):
            if path.is_file():
                return path.read_text(encoding="utf-8"), str(path)
    return "", ""


def prepare_settings(gateway: Gateway, settings: Settings, environment: Mapping[str, str]) -> Callable[[], None]:
    """What changes a running gateway to other settings; all that can fail is done here, before anything changes."""
    prices = with_own_prices(gateway.prices, settings)
    router = load_router(settings, environment, prices, gateway.router)
    budgets, rates = configured_budgets(settings), configured_rates(settings)
    gone = {budget.id for budget in configured_budgets(gateway.settings)} - {budget.id for budget in budgets}

    def apply() -> None:
        if settings.rate_limit != gateway.settings.rate_limit:  # else what was counted in this minute stays counted
            gateway.has_rates = rates is not None
            gateway.rates = RateLimiter(rates, {}, int(time.monotonic() * 1000))
        for budget_id in gone:
            gateway.drop_budget(budget_id)
        for budget in budgets:
            gateway.put_budget(budget)
        gateway.adopt(settings, router, prices)

    return apply


def reloader(
    gateway: Gateway, environment: Mapping[str, str], flags: Mapping[str, str | None]
) -> Callable[[Mapping[str, Any], bool], list[str]]:
    """What `Gateway.reload` is: read file, environment and flags again, with changes to the file, and apply them."""

    def reload(changes: Mapping[str, Any], only_check: bool) -> list[str]:
        text, path = find_config(environment, flags)
        text = edit_toml(text, changes)
        settings = read_settings(flags, environment, text, path or "stockyard.toml")
        for name in changes:
            if settings.sources[name] not in ("default", path or "stockyard.toml"):
                raise SettingsError(f"{name} is set by {settings.sources[name]}, which stockyard.toml cannot change")
        changed = changed_settings(gateway.settings, settings)
        apply = prepare_settings(gateway, settings, environment)
        if not only_check:
            if changes:
                replace_file(Path(path) if path else settings.data_path / "stockyard.toml", text)
            apply()
        return changed

    return reload


def replace_file(path: Path, text: str) -> None:
    """Write a private file whole or not at all; a link stays one."""
    path = path.resolve()
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(text)
        draft.replace(path)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from None


def reload_on_signal(gateway: Gateway) -> None:
    """SIGHUP: reload, and say on stderr what changed, or why nothing did."""
    try:
        assert gateway.reload is not None
        print_error(f"settings read again; changed: {', '.join(gateway.reload({}, False)) or 'nothing'}")
    except SettingsError as error:
        print_error(f"settings not changed: {error}")


def bind(settings: Settings) -> socket.socket:
    """The listening socket; SettingsError where the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(
            f"cannot listen on {settings.host}:{settings.port}: {reason}; choose another with --port"
        ) from None
    listener.setblocking(False)
    return listener


def raise_file_limit() -> None:
    """As many open files as the system allows: every stream holds two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1_048_576), hard))


def harden_process() -> None:
    """No core dumps, which would hold provider keys; files private by default."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    raise_file_limit()
    gc.set_threshold(25_000, 20, 50)  # cycles are rare on the data path, so they are looked for rarely


async def serve(
    settings: Settings,
    environment: Mapping[str, str],
    ready: Callable[[Gateway, str], Awaitable[None]],
    flags: Mapping[str, str | None],
) -> None:
    """Listen until SIGTERM or SIGINT, then drain; a second signal ends at once. SIGHUP reads the settings again."""
    listener = bind(settings)
    try:
        async with open_gateway(settings, environment) as gateway, open_server(gateway, listener):
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()

            def on_signal() -> None:
                if stop.is_set():
                    os._exit(1)
                stop.set()

            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, on_signal)
            gateway.reload = reloader(gateway, environment, flags)
            loop.add_signal_handler(signal.SIGHUP, reload_on_signal, gateway)
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            gc.collect()
            gc.freeze()  # what was made so far stays: prices, routes, code
            await ready(gateway, f"http://{shown}:{port}")
            await stop.wait()
    finally:
        listener.close()


def run_loop(program: Awaitable[None]) -> None:
    """Run on uvloop where it imports, else on asyncio's own loop."""
    factory = None
    if importlib.util.find_spec("uvloop") is not None and not os.environ.get("PYTHONASYNCIODEBUG"):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(cast(Any, program))


# ===== Command line ===================================================================================================
# One function a verb, each short: parse, do, print. `main` stands last and reads as the program's summary.

PROGRAM: Final = "stockyard"
EXAMPLE_TOML: Final = """\
# stockyard.toml: read from ./, else from the data directory, else from STOCKYARD_CONFIG.
# Flags and environment variables win over this file. Every setting of `stockyard config check` may stand here.

# port = 4200
# cache = "deterministic"

# [providers.openai]                  # instead of OPENAI_API_KEY and OPENAI_BASE_URL
# api_key = "sk-..."
# base_url = "https://api.openai.com/v1"

# [aliases]
# fast = "groq/llama-3.3-70b-versatile"

# [routes.chat]                       # clients ask for the model "chat"
# strategy = "weighted"               # ordered, weighted, least_latency, cheapest, fewest_in_flight
# targets = ["openai/gpt-4o-mini", {to = "groq/llama-3.3-70b-versatile", weight = 0.5, max_prompt_tokens = 100000}]
# fallbacks = ["anthropic/claude-haiku-4-5"]    # where calls go when the targets fail; nowhere else, ever
# first_byte_timeout = 20             # also connect_, idle_ and total_timeout, retries
# hedge_after_ms = 3000               # ask the next target as well; min_bytes_per_s = 20 ends streams that crawl
# shadow = ["openai/gpt-4.1-mini"]    # gets a copy of shadow_fraction of the calls; its answers are thrown away
# defaults = {temperature = 0.2}      # also forced, system_prefix, max_output_tokens, headers

# [[prices]]                          # your own price of a model, USD per million tokens
# model = "my-model"
# provider = "openai_compatible"
# input = 0.10
# output = 0.40
"""


def curl_example(url: str, model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello, Stockyard!"}]})
    return f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"


def example_model(gateway: Gateway) -> str:
    """A model that a first try is likely to reach."""
    usual = {
        "openai": "gpt-4o-mini",
        "anthropic": "claude-haiku-4-5",
        "gemini": "gemini-2.5-flash",
        "groq": "groq/llama-3.3-70b-versatile",
    }
    return next((usual[name] for name in gateway.router.providers if name in usual), "echo")


def dashboard_line(gateway: Gateway, url: str) -> str:
    """The way in for a person: a link that signs in once, soon. Empty where no dashboard is built in."""
    if not any(row.path == "/ui" for row in ROUTES):
        return ""
    return f"\n  dashboard (signs in once, within {LINK_MS // 60_000} minutes):  {url}/ui?token={gateway.sessions.offer(int(gateway.clock() * 1000))}\n"


async def print_banner(gateway: Gateway, url: str) -> None:
    """The first screen: one line a provider, where to look, and a line to paste."""
    print(f"Stockyard {__version__} on {url}, data in {gateway.settings.data_path}")
    real = [provider for provider in gateway.router.providers.values() if not provider.base_url.startswith("builtin:")]
    for provider in real:
        count = f", {len(provider.keys)} keys" if len(provider.keys) > 1 else ""
        print(f"  {provider.id:18} {provider.base_url}  (from {provider.source}{count})")
    if not real:
        print(
            "  No provider key is set. Set one and start again, for example OPENAI_API_KEY, ANTHROPIC_API_KEY, GEMINI_API_KEY,"
        )
        print(
            "  GROQ_API_KEY or OLLAMA_HOST; `stockyard providers` lists all. Until then the built-in model `echo` answers:"
        )
    print(f"{dashboard_line(gateway, url)}\n  {curl_example(url, example_model(gateway))}\n", flush=True)
    if has_wal_bug(sqlite3.sqlite_version_info):
        print_error(
            f"note: SQLite {sqlite3.sqlite_version} has the WAL-reset bug; Stockyard keeps one writer, let no other program write to stockyard.db"
        )


def load_settings(options: argparse.Namespace) -> Settings:
    flags = given_flags(options)
    toml, path = find_config(os.environ, flags)
    return read_settings(flags, os.environ, toml, path)


def given_flags(options: argparse.Namespace) -> dict[str, str | None]:
    return {name: value for name, value in vars(options).items() if value is not None}


def run_serve(options: argparse.Namespace) -> int:
    settings = load_settings(options)
    harden_process()
    run_loop(serve(settings, os.environ, print_banner, given_flags(options)))
    return 0


def run_demo(options: argparse.Namespace) -> int:
    """The proxy on an empty temporary data directory, one completion through it, then it keeps serving."""
    harden_process()
    with tempfile.TemporaryDirectory(prefix="stockyard-demo-") as directory:
        options.data_dir = directory
        settings = load_settings(options)
        environment = {name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_TOKEN"))}

        async def show(gateway: Gateway, url: str) -> None:
            print(
                f"Stockyard {__version__} demo on {url}, with the built-in echo provider and an empty database in {directory}"
            )
            print(f"{dashboard_line(gateway, url)}\n$ {curl_example(url, 'echo')}")
            print(await ask_once(url), flush=True)
            await gateway.store.flush()
            [row] = await asyncio.to_thread(find_requests, gateway.store, {}, 1, 0)
            print(
                f"\nLogged as {row['id']}: {row['status']} in {row['latency_ms']:.2f} ms, {row['input_tokens']} + {row['output_tokens']} tokens, cost $0."
            )
            print(
                "It keeps serving; press Ctrl-C to stop. For a real provider, set its key and run `stockyard`.",
                flush=True,
            )
            if options.once:
                os.kill(os.getpid(), signal.SIGTERM)

        run_loop(serve(settings, environment, show, given_flags(options)))
    return 0


async def ask_once(url: str) -> str:
    body = {"model": "echo", "messages": [{"role": "user", "content": "Hello, Stockyard!"}]}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", json=body) as answer:
        return await answer.text()


def run_doctor(options: argparse.Namespace) -> int:
    """Check what a working proxy needs; exit status 1 on a fault."""
    checks: list[Json] = []

    def note(name: str, ok: bool | None, detail: str) -> None:
        checks.append({"check": name, "ok": ok is not False, "warning": ok is None, "detail": detail})

    note("python", sys.version_info >= (3, 11), sys.version.split()[0])
    note("sqlite", None if has_wal_bug(sqlite3.sqlite_version_info) else True, sqlite3.sqlite_version)
    note(
        "aiohttp",
        tuple(map(int, aiohttp.__version__.split(".")[:3])) >= (3, 14, 5),
        f"{aiohttp.__version__} (3.14.5 or later)",
    )
    note("http parser in C", "_http_parser" in HttpRequestParser.__module__, HttpRequestParser.__module__)
    note("uvloop", True, "used" if importlib.util.find_spec("uvloop") else "not installed, asyncio's own loop is used")
    try:
        settings = load_settings(options)
        note("settings", True, "understood")
        prepare_data_dir(settings.data_path)
        free_mb = shutil.disk_usage(settings.data_path).free // 1_000_000
        note(
            "data directory",
            None if free_mb < 2 * settings.log_mb else True,
            f"{settings.data_path}, {free_mb} MB free",
        )
        asyncio.run(check_providers_now(settings, note))
    except (SettingsError, StoreError) as error:
        note("settings", False, str(error))
    failed = not all(check["ok"] for check in checks)
    if options.json:
        print(dump_json({"ok": not failed, "checks": checks}).decode())
    else:
        for check in checks:
            mark = "FAIL" if not check["ok"] else "warn" if check["warning"] else "ok"
            print(f"{mark:5} {check['check']:24} {check['detail']}")
    return 1 if failed else 0


async def check_providers_now(settings: Settings, note: Callable[[str, bool | None, str], None]) -> None:
    deadlines = Deadlines(settings.connect_timeout, min(20, settings.first_byte_timeout), 20, 30)
    upstream = Upstream(asyncio.get_running_loop(), deadlines)
    with tempfile.TemporaryDirectory() as directory:
        store = LogStore(Path(directory) / "doctor.db")
        prices = load_prices(settings)
        gateway = Gateway(settings, load_router(settings, os.environ, prices), prices, store, upstream, "doctor")
        for provider in gateway.router.providers.values():
            result = await probe_provider(gateway, provider)
            detail = (
                f"{result['models']} models in {result['ms']} ms"
                if result["ok"]
                else f"{result['code']}: {result['error']}"
            )
            note(provider.id, result["ok"], detail)
        await upstream.close()
        store.close()


def run_providers(options: argparse.Namespace) -> int:
    settings = load_settings(options)
    configured = configured_providers(provider_variables(settings, os.environ))
    rows = [
        {"id": row.id, "name": row.name, "configured": row.id in configured, "set": enabling_variable(row), "retired": row.retired,
         "base_url": configured[row.id].base_url if row.id in configured else row.base_url}
        for row in PROVIDERS
    ]  # fmt: skip
    return print_rows(
        rows,
        options,
        lambda row: (
            f"{'*' if row['configured'] else ' '} {row['id']:18} {row['retired'] or row['set']:44} {row['base_url']}"
        ),
    )


def run_models(options: argparse.Namespace) -> int:
    settings = load_settings(options)

    async def collect() -> list[Json]:
        upstream = Upstream(asyncio.get_running_loop(), settings.deadlines)
        with tempfile.TemporaryDirectory() as directory:
            store, prices = LogStore(Path(directory) / "models.db"), load_prices(settings)
            router = load_router(settings, os.environ, prices)
            rows = await Gateway(settings, router, prices, store, upstream, "models").models()
            await upstream.close()
            store.close()
        return rows

    def line(row: Json) -> str:
        price = row["price"]
        shown = f"${price.get('input', '0')} in, ${price.get('output', '0')} out per million" if price else "unpriced"
        return f"{row['id']:48} {row['provider']:18} {shown}"

    return print_rows(asyncio.run(collect()), options, line)


def run_route(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in ("model", "tags", "tokens", "session") if getattr(options, name)}
    path = f"/api/route?{urllib.parse.urlencode(given)}"
    answer = asyncio.run(ask_admin(load_settings(options), "GET", path, environment=os.environ))
    return print_rows(answer["targets"], options, functools.partial(route_line, options.model))


def route_line(model: str, row: Json) -> str:
    why = f"route {row['route']}, {row['strategy']}" if "strategy" in row else row["via"]
    notes = [f"weight {row['weight']:g}"] if "weight" in row else []
    notes += ["fallback"] if row.get("fallback") else []
    notes += [f"left out: {row['left_out']}"] if "left_out" in row else []
    notes += [f"breaker {row['breaker']}"] if row.get("breaker", "closed") != "closed" else []
    notes += [f"rests {row['rests_s']:g} s"] if row["rests_s"] else []
    price = row["price"] or {}
    notes.append(", ".join(f"{name} ${price[name]}" for name in ("input", "output") if name in price) or "unpriced")
    where = f"{row['provider']} as {row['upstream_model']}"
    return f"{model} -> {where} (by {why}), {row['base_url']}; {'; '.join(notes)}"


def print_rows(rows: Sequence[Json], options: argparse.Namespace, line: Callable[[Json], str]) -> int:
    """Rows as lines for people, or as one JSON array with --json."""
    if getattr(options, "json", False):
        print(dump_json(rows).decode())
    else:
        for row in rows:
            print(line(row))
    return 0


class LogReader:
    """The log of a data directory, read beside a running proxy; shaped as the store's readers expect."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise StoreError(f"there is no log at {path}; start Stockyard once, or set STOCKYARD_DATA_DIR")
        self._connection = open_reader(path)
        version = self.read("PRAGMA user_version")[0][0]
        if version != len(MIGRATIONS):
            which = "this Stockyard once, which brings it up to date" if version < len(MIGRATIONS) else "the newer one"
            raise StoreError(f"{path} was written by another version of Stockyard; start {which}")

    def read(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        return self._connection.execute(sql, parameters).fetchall()


NO_VARIABLES: Final[Mapping[str, str]] = {}


def open_log(options: argparse.Namespace) -> LogStore:
    return cast(LogStore, LogReader(load_settings(options).data_path / "stockyard.db"))


def log_line(row: Json) -> str:
    cost = "unpriced" if row["cost_usd"] is None else f"${row['cost_usd']:.6f}"
    tokens = f"{row['input_tokens'] or 0:>6}+{row['output_tokens'] or 0:<6}"
    mark = row["error"] or row["finish_reason"]
    what = f"{row['status']}  {row['model'][:28]:28} {row['provider'][:12]:12} {row['latency_ms']:>9.1f} ms"
    return f"{row['ts']}  {row['id']}  {what} {tokens} {cost:>11} {mark}"


def run_logs(options: argparse.Namespace) -> int:
    store, now_ms = open_log(options), int(time.time() * 1000)
    names = ("model", "key", "status", "since", "until", "provider", "session", "tag", "q")
    wanted = {name: value for name in names if (value := getattr(options, name, None))}
    block = last_block(store)
    if options.csv:
        print(",".join(LOG_FIELDS))
    steps = export_rows(store, wanted, now_ms)
    if options.limit:
        rows = [*itertools.islice(itertools.chain.from_iterable(steps), options.limit)]
        steps = iter([rows[::-1]])
    for rows in steps:
        print_log(rows, options)
    while options.follow:
        time.sleep(0.5)
        fresh, block = find_new_requests(store, block, wanted, now_ms)
        print_log([public_row(row) for row in fresh], options)
    return 0


def print_log(rows: Sequence[Json], options: argparse.Namespace) -> None:
    if options.csv or options.json:
        sys.stdout.write((csv_lines(rows) if options.csv else json_lines(rows)).decode())
    else:
        for row in rows:
            print(log_line(row))
    sys.stdout.flush()


def run_show(options: argparse.Namespace) -> int:
    found = find_request(open_log(options), options.id)
    if found is None:
        print(f"no request has the id {options.id}", file=sys.stderr)
        return 1
    print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    return 0


def run_explain(options: argparse.Namespace) -> int:
    settings = load_settings(options)
    found = find_request(open_log(options), options.id)
    if found is None:
        print(f"no request has the id {options.id}", file=sys.stderr)
        return 1
    told = explain_request(found, load_prices(settings))
    print(dump_json(told).decode() if options.json else "\n".join(told["summary"]))
    return 0


def run_costs(options: argparse.Namespace) -> int:
    wanted = {"since": options.since} if options.since else {}
    rows = find_spend(open_log(options), options.by, wanted, int(time.time() * 1000))

    def line(row: Json) -> str:
        cost = "unpriced" if row["cost_usd"] is None else f"${row['cost_usd']:.6f}"
        unpriced = f"  ({row['unpriced']} unpriced)" if row["unpriced"] and row["cost_usd"] is not None else ""
        return f"{row[options.by] or '-'!s:40} {row['requests']:>8} calls {row['input_tokens']:>10} in {row['output_tokens']:>10} out {cost:>14}{unpriced}"

    return print_rows(rows, options, line)


def run_backup(options: argparse.Namespace) -> int:
    settings, path = load_settings(options), Path(options.file)
    if not (settings.data_path / "stockyard.db").exists():
        raise StoreError(f"there is no database in {settings.data_path}; set STOCKYARD_DATA_DIR")
    try:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            asyncio.run(ask_admin(settings, "POST", "/api/backup", into=file))
    except FileExistsError:
        raise StoreError(f"{path} exists, and is not overwritten") from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    size_bytes = path.stat().st_size
    print(
        f"{path}: {size_bytes} bytes. Virtual keys are checked with the file pepper of the data directory: keep a copy of it."
    )
    return 0


async def ask_admin(
    settings: Settings,
    method: str,
    path: str,
    body: Json | None = None,
    environment: Mapping[str, str] = NO_VARIABLES,
    into: BinaryIO | None = None,
) -> Json:
    """Ask the running proxy of a data directory; where none runs, a short-lived one of our own.

    So keys and budgets are written by one process only, and the command line and the API cannot differ. Ours
    has the providers and routes that `environment` turns on.

    With `into` the answer is no JSON but a file, and goes there.
    """

    async def ask(url: str, admin_key: str) -> Json:
        headers = {"authorization": f"Bearer {admin_key}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.request(method, url + path, json=body, timeout=aiohttp.ClientTimeout(sock_read=600)) as answer,
        ):
            if into is not None and answer.status < 400:
                async for piece in answer.content.iter_any():
                    into.write(piece)
                return {}
            document: Json = await answer.json()
            if answer.status >= 400:
                raise SettingsError(document["error"]["message"])
            return document

    host = settings.host if settings.is_loopback else "127.0.0.1"
    tables = {
        name: table for name, table in settings.tables.items() if environment or name not in ("routes", "aliases")
    }
    local = dataclasses.replace(settings, host="127.0.0.1", port=0, tables=tables)
    try:
        async with open_gateway(local, environment) as gateway:
            listener = bind(local)
            async with open_server(gateway, listener):
                return await ask(f"http://127.0.0.1:{listener.getsockname()[1]}", gateway.admin_key)
    except DirectoryInUse:
        try:
            return await ask(f"http://{host}:{settings.port}", load_admin_key(settings))
        except aiohttp.ClientConnectionError as error:
            what = f"a proxy uses {settings.data_path}, but does not answer on {host}:{settings.port}; name its port with --port"
            raise SettingsError(what) from error


def run_replay(options: argparse.Namespace) -> int:
    wanted = {name: value for name in ("model", "provider") if (value := getattr(options, name))}
    path = f"/api/requests/{urllib.parse.quote(options.id, safe='')}/replay"
    told = asyncio.run(ask_admin(load_settings(options), "POST", path, wanted, os.environ))
    if options.json:
        print(dump_json(told).decode())
        return 0
    for name in ("original", "replay"):
        side = told[name]
        cost = "unpriced" if side["cost_usd"] is None else f"${shown_usd(side['cost_usd'])}"
        what = f"{side['provider']} {side['upstream_model']}  {side['latency_ms']:.1f} ms  {cost}"
        print(f"{name:8}  {side['id']}  {side['status']} {side['error']:1} {what}")
    marks = {
        "equal": "{after}",
        "delete": "[-{before}-]",
        "insert": "{{+{after}+}}",
        "replace": "[-{before}-]{{+{after}+}}",
    }
    print("\n" + "".join(marks[step["op"]].format(**step) for step in told["diff"]))
    return 0


def run_keys(options: argparse.Namespace) -> int:
    settings = load_settings(options)
    if options.action in ("revoke", "rotate") and not options.id:
        raise SettingsError(f"keys {options.action} needs the id of a key; `stockyard keys list` shows them")
    path = f"/api/keys/{options.id}" if options.id else "/api/keys"
    if options.action == "list":
        rows = asyncio.run(ask_admin(settings, "GET", "/api/keys"))["data"]
        return print_rows(
            rows,
            options,
            lambda row: f"{row['id']}  {row['status']:8} {row['role']:7} {row['name']:24} {show_budget(row['budget'])}",
        )
    if options.action == "create":
        answer = asyncio.run(ask_admin(settings, "POST", path, key_body(options)))
    elif options.action == "rotate":
        answer = asyncio.run(ask_admin(settings, "POST", f"{path}/rotate", {"grace_s": options.grace}))
    else:
        answer = asyncio.run(ask_admin(settings, "DELETE", path))
    if options.json or options.action == "revoke":
        return print_rows([answer], options, lambda row: f"{row['id']} is {row['status']}")
    print(
        f"{answer['key']}\n\nThis is the secret of {answer['id']} ({answer['name']}). It is shown this once; Stockyard keeps a digest only."
    )
    return 0


def key_body(options: argparse.Namespace) -> Json:
    """The flags of `keys create` as the body of POST /api/keys."""
    body: Json = {"name": options.name} if options.name else {}
    if options.role:
        body["role"] = options.role
    if options.models:
        body["models"] = options.models.split(",")
    if options.limit_usd:
        amount, _, period = options.limit_usd.partition("/")
        body["budget"] = {"usd": read_amount(amount), "period": period or "total"}
    if options.limit_rate:
        limit = parse_rate_limit(options.limit_rate)
        body["rate_limit"] = {name: value for name, value in dataclasses.asdict(limit).items() if value is not None}
    return body


def read_amount(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SettingsError(f"--limit-usd {text!r} is not understood; write 20/day") from None


def show_budget(budget: Json | None) -> str:
    return f"${budget['usd']}/{budget['period']}" if budget else "no budget"


def run_budgets(options: argparse.Namespace) -> int:
    rows = asyncio.run(ask_admin(load_settings(options), "GET", "/api/budgets"))["data"]

    def line(row: Json) -> str:
        spent = (
            f"${row['settled_usd']} spent, ${row['held_usd']} held, ${row['remaining_usd']} left of ${row['limit_usd']}"
        )
        return f"{row['id']:48} {row['mode']:5} {row['window']:12} {spent}"

    return print_rows(rows, options, line)


def run_config(options: argparse.Namespace) -> int:
    if options.action == "example":
        print(EXAMPLE_TOML, end="")
        return 0
    settings = load_settings(options)
    load_router(settings, os.environ, load_prices(settings))
    return print_rows(
        config_view(settings),
        options,
        lambda row: f"{row['name']:20} {row['value']!s:28} {row['source']:28} {row['help']}",
    )


def run_version(options: argparse.Namespace) -> int:
    print(f"{PROGRAM} {__version__}")
    if options.deps:
        for name in sorted({"aiohttp", "orjson", "uvloop", *DEPENDENCIES}):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                print(f"{name} {importlib.metadata.version(name)}")
        print(
            f"python {sys.version.split()[0]}\nsqlite {sqlite3.sqlite_version}\nopenssl {ssl.OPENSSL_VERSION.split()[1]}"
        )
    return 0


DEPENDENCIES: Final = (
    "aiohappyeyeballs",
    "aiosignal",
    "attrs",
    "frozenlist",
    "idna",
    "multidict",
    "propcache",
    "typing_extensions",
    "yarl",
)


@dataclass(frozen=True, slots=True)
class Verb:
    """A command: its function, its help, and what adds its own arguments."""

    name: str
    run: Callable[[argparse.Namespace], int]
    help: str
    arguments: tuple[tuple[str, Json], ...] = ()
    serves: bool = False


_JSON: Final = ("--json", {"action": "store_true", "help": "print JSON"})
_SINCE: Final = ("--since", {"help": "only later ones: 15m, 24h, 7d, or an ISO time"})
VERBS: Final = (
    Verb("serve", run_serve, "run the proxy (what `stockyard` alone does)", serves=True),
    Verb("demo", run_demo, "run the proxy with the built-in echo provider and show one completion", (
        ("--once", {"action": "store_true", "help": "stop after the completion"}),
    ), serves=True),
    Verb("doctor", run_doctor, "check settings, data directory, versions and every configured provider", (_JSON,)),
    Verb("providers", run_providers, "list all providers; * marks the configured ones", (_JSON,)),
    Verb("models", run_models, "list the models of the configured providers with their prices", (_JSON,)),
    Verb("route", run_route, "say where a model name would go, and why", (
        ("model", {"help": "the name as a client sends it"}), ("--tags", {"help": "the call's tags: a=b,c=d"}),
        ("--tokens", {"type": int, "help": "the size of its prompt"}), ("--session", {"help": "its session"}), _JSON,
    )),
    Verb("logs", run_logs, "list logged calls, the newest last", (
        ("--follow", {"action": "store_true", "help": "go on as calls come in"}),
        ("--model", {"help": "only this model"}), ("--key", {"help": "only this virtual key"}), ("--provider", {"help": "only this provider"}),
        ("--status", {"help": "only this status: 429, 5xx, ok, error"}), ("--session", {"help": "only this session"}), _SINCE,
        ("--until", {"help": "only earlier ones"}), ("--tag", {"help": "only this tag: team=search"}),
        ("--q", {"help": "only those whose request or answer holds this text"}),
        ("--limit", {"type": int, "default": 50, "help": "how many at the most (50); 0 is all, the newest first"}), _JSON,
        ("--csv", {"action": "store_true", "help": "print CSV"}),
    )),
    Verb("show", run_show, "print one logged call with its attempts and bodies", (("id", {"help": "the id from x-stockyard-request-id"}),)),
    Verb("explain", run_explain, "say why a logged call went where it went, and the arithmetic of its cost", (
        ("id", {"help": "the id from x-stockyard-request-id"}), _JSON,
    )),
    Verb("replay", run_replay, "ask a logged request again and compare answer, cost and time", (
        ("id", {"help": "the id from x-stockyard-request-id"}), ("--model", {"help": "another model than the one that answered"}),
        ("--provider", {"help": "the provider to ask"}), _JSON,
    )),
    Verb("costs", run_costs, "print what was spent", (
        ("--by", {"choices": sorted(SPEND_BY), "default": "model", "help": "what to add up by (model)"}), _SINCE, _JSON,
    )),
    Verb("backup", run_backup, "write the database to a new file, whole and consistent, also while the proxy runs", (
        ("file", {"help": "the file to make"}),
    )),
    Verb("keys", run_keys, "create, list, revoke or rotate virtual keys", (
        ("action", {"choices": ("create", "list", "revoke", "rotate")}), ("id", {"nargs": "?", "help": "the key, for revoke and rotate"}),
        ("--name", {"help": "a name for people"}), ("--role", {"choices": ROLES, "help": "what it may do (client)"}),
        ("--models", {"help": "only these models, comma separated; * stands for any text"}),
        ("--limit-usd", {"help": "a hard budget, such as 20/day"}), ("--limit-rate", {"help": "such as 600rpm,100000tpm,8parallel"}),
        ("--grace", {"type": int, "default": 0, "help": "seconds that the old secret goes on working after rotate (0)"}), _JSON,
    )),
    Verb("budgets", run_budgets, "list all budgets with what is spent, held and left", (_JSON,)),
    Verb("config", run_config, "check: print the merged settings and their sources; example: print a commented stockyard.toml", (
        ("action", {"choices": ("check", "example")}), _JSON,
    )),
    Verb("version", run_version, "print the version", (("--deps", {"action": "store_true", "help": "also print the bundled packages"}),)),
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM, description="A self-hosted LLM proxy in one file. Without a command it serves."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    settings = argparse.ArgumentParser(add_help=False)
    group = settings.add_argument_group("settings (also as STOCKYARD_<NAME> in the environment, or in stockyard.toml)")
    group.add_argument("--config", help="path of stockyard.toml")
    for row in SETTING_ROWS:
        if row.name not in SECRET_SETTINGS:  # a secret on a command line shows in every process list
            group.add_argument(
                f"--{row.name.replace('_', '-')}",
                help=f"{row.metadata['help']} (default: {row.default})".replace("%", "%%"),
            )
    commands = parser.add_subparsers(dest="verb", metavar="command")
    for verb in VERBS:
        command = commands.add_parser(verb.name, help=verb.help, description=verb.help, parents=[settings])
        for name, options in verb.arguments:
            if name == "--config":
                continue
            command.add_argument(name, **options)
        command.set_defaults(run=verb.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; faults of the user's making are one line on stderr and exit status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help", "--version")):
        given.insert(0, "serve")
    options = make_parser().parse_args(given)
    try:
        return int(options.run(options))
    except (SettingsError, StoreError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except InvalidRequest as error:
        print(f"{PROGRAM}: {error.message}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
