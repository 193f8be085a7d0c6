"""Spans of calls and attempts, as a collector gets them: OTLP/HTTP JSON with the GenAI conventions."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from conftest import Start
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from upstreams import COMPLETION, FakeUpstream, fake_upstream, plain

import stockyard

CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi canary-text"}]}
PATH = "/v1/chat/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
IDS = {"traceId", "spanId", "parentSpanId"}
KINDS = {"stringValue": str, "intValue": str, "doubleValue": float, "boolValue": bool, "arrayValue": dict}


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeUpstream]:
    monkeypatch.setattr(stockyard.Poster, "WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(stockyard.Traces, "EVERY_S", 3600.0)
    async with fake_upstream() as fake:
        fake.answers = [plain({})]
        yield fake


def variables(collector: FakeUpstream) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}/",
        "OTEL_EXPORTER_OTLP_HEADERS": "X-Api-Key=canary%20collector, a=b=c",
        "OTEL_SERVICE_NAME": "shop-proxy",
    }


def read_value(value: dict[str, Any]) -> Any:
    ((kind, inner),) = value.items()
    assert type(inner) is KINDS[kind], value
    if kind == "arrayValue":
        assert inner.keys() == {"values"}
        return [read_value(member) for member in inner["values"]]
    if kind == "intValue":
        assert re.fullmatch(r"-?[0-9]+", inner)
        return int(inner)
    return inner


def read_attributes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    assert all(row.keys() == {"key", "value"} for row in rows)
    found = {row["key"]: read_value(row["value"]) for row in rows}
    assert len(found) == len(rows)
    return found


def read_as_protobuf(sent: dict[str, Any]) -> None:
    """Read what was sent by OpenTelemetry's own schema, which refuses unknown members; its ids are hex, not base64."""

    def with_base64_ids(value: Any) -> Any:
        if isinstance(value, list):
            return [with_base64_ids(member) for member in value]
        if not isinstance(value, dict):
            return value
        ids = {name: base64.b64encode(bytes.fromhex(value[name])).decode() for name in IDS & value.keys()}
        return {name: with_base64_ids(member) for name, member in value.items()} | ids

    read = json_format.ParseDict(with_base64_ids(sent), ExportTraceServiceRequest())
    spans = [span for resource in read.resource_spans for scoped in resource.scope_spans for span in scoped.spans]
    assert spans
    for span in spans:
        assert (len(span.trace_id), len(span.span_id), len(span.parent_span_id) % 8) == (16, 8, 0)
        assert span.kind in (span.SPAN_KIND_SERVER, span.SPAN_KIND_CLIENT)
        assert 0 < span.start_time_unix_nano <= span.end_time_unix_nano
        assert all(row.value.WhichOneof("value") for row in span.attributes)


def read_spans(collector: FakeUpstream) -> list[dict[str, Any]]:
    """Every span that was sent, in order, its shape checked strictly and its attributes read."""
    spans = []
    for seen in collector.seen:
        assert (seen.method, seen.path, seen.headers["content-type"]) == ("POST", "/v1/traces", "application/json")
        assert (seen.headers["x-api-key"], seen.headers["a"]) == ("canary collector", "b=c")
        assert seen.json.keys() == {"resourceSpans"}
        read_as_protobuf(seen.json)
        for resource in seen.json["resourceSpans"]:
            assert resource.keys() == {"resource", "scopeSpans"} and resource["resource"].keys() == {"attributes"}
            named = read_attributes(resource["resource"]["attributes"])
            assert named == {"service.name": "shop-proxy", "service.version": stockyard.__version__}
            for scoped in resource["scopeSpans"]:
                assert scoped.keys() == {"scope", "spans"} and scoped["scope"]["name"] == "stockyard"
                spans += scoped["spans"]
    for span in spans:
        must = {"traceId", "spanId", "name", "kind", "startTimeUnixNano", "endTimeUnixNano", "attributes", "status"}
        assert must <= span.keys() <= must | {"parentSpanId"}
        assert re.fullmatch("[0-9a-f]{32}", span["traceId"]) and re.fullmatch("[0-9a-f]{16}", span["spanId"])
        assert re.fullmatch("[0-9a-f]{16}", span.get("parentSpanId", "0" * 16))
        assert type(span["kind"]) is int and span["status"] in ({}, {"code": 2})
        times = [span["startTimeUnixNano"], span["endTimeUnixNano"]]
        assert all(type(time) is str and re.fullmatch("[0-9]{19}", time) for time in times) and times == sorted(times)
        span["attributes"] = read_attributes(span["attributes"])
    assert len({span["spanId"] for span in spans}) == len(spans)
    return spans


async def test_a_call_is_a_server_span_and_each_attempt_a_client_span(start: Start, collector: FakeUpstream) -> None:
    async with start(**variables(collector)) as proxy:
        proxy.upstream.answers = [plain({"error": {"message": "canary"}}, 500), plain(COMPLETION)]
        sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "authorization": "Bearer canary-key"}
        status, headers, _ = await proxy.post(PATH, CHAT, **sent)
        assert status == 200 and proxy.gateway.traces is not None
        await proxy.gateway.traces.flush()
        server, failed, answered = read_spans(collector)
        assert [span["kind"] for span in (server, failed, answered)] == [2, 3, 3]
        assert {span["traceId"] for span in (server, failed, answered)} == {TRACE}
        assert server["parentSpanId"] == PARENT
        assert failed["parentSpanId"] == answered["parentSpanId"] == server["spanId"]
        assert int(server["startTimeUnixNano"]) <= int(failed["startTimeUnixNano"]) < int(answered["endTimeUnixNano"])
        assert int(failed["endTimeUnixNano"]) <= int(answered["startTimeUnixNano"])
        assert [span["status"] for span in (server, failed, answered)] == [{}, {"code": 2}, {}]
        assert server["attributes"]["stockyard.request_id"] == headers["x-stockyard-request-id"]
        assert server["attributes"]["http.response.status_code"] == 200
        asked = {
            "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "gpt-4o-mini",
            "server.address": "127.0.0.1", "server.port": proxy.upstream.port,
        }  # fmt: skip
        assert failed["attributes"].keys() == {*asked, "error.type"}
        assert answered["name"] == "chat gpt-4o-mini" and answered["attributes"] == asked | {
            "gen_ai.response.model": "gpt-4o-mini", "gen_ai.response.finish_reasons": ["stop"],
            "gen_ai.usage.input_tokens": 10, "gen_ai.usage.output_tokens": 5, "gen_ai.usage.cache_read.input_tokens": 4,
        }  # fmt: skip
        assert all(b"canary" not in seen.body for seen in collector.seen)


async def test_the_trace_is_the_clients_where_it_has_one(start: Start, collector: FakeUpstream) -> None:
    async with start(**variables(collector)) as proxy:
        assert proxy.gateway.traces is not None
        bad = ["", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", f"00-{TRACE.upper()}-{PARENT}-01", "canary"]
        for text in bad:
            await proxy.post(PATH, {**CHAT, "stream": True}, traceparent=text)
        await proxy.post(PATH, CHAT, traceparent=f"00-{TRACE}-{PARENT}-00")  # its caller does not sample
        await proxy.post(PATH, {"model": "nobody-serves-this", "messages": CHAT["messages"]})
        await proxy.gateway.traces.flush()
        spans = read_spans(collector)
        servers = [span for span in spans if span["kind"] == 2]
        assert len(servers) == len({span["traceId"] for span in servers}) == len(bad) + 1
        assert all("parentSpanId" not in span and span["traceId"] != TRACE for span in servers)
        assert servers[-1]["attributes"]["http.response.status_code"] == 404
        assert len(spans) == 2 * len(bad) + 1


async def test_a_collector_that_fails_harms_no_call(
    start: Start, collector: FakeUpstream, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stockyard.Traces, "MAX_WAITING", 4)
    async with start(**variables(collector)) as proxy:
        traces = proxy.gateway.traces
        assert traces is not None
        collector.answers = [plain({}, 503), plain({}), plain({}, 400)]
        for _ in range(3):
            assert (await proxy.post(PATH, CHAT))[0] == 200
        assert traces.dropped == 2
        await traces.flush()
        assert (traces.sent, traces.dropped, len(collector.seen)) == (4, 2, 2)
        assert (await proxy.post(PATH, CHAT))[0] == 200
    assert (traces.dropped, len(collector.seen)) == (4, 3), "what waited at the stop was sent, and refused"
    said = capsys.readouterr().err
    assert "2 spans were not delivered to the collector: HTTP 400" in said and "canary" not in said


async def test_nothing_is_made_where_it_is_off(start: Start) -> None:
    async with start() as proxy:
        assert proxy.gateway.traces is None


def test_the_variables_of_opentelemetry() -> None:
    read = stockyard.read_collector
    base = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4318"}
    assert read({}) is read({**base, "OTEL_SDK_DISABLED": "True"}) is None
    found = read(base)
    assert found is not None and (found.url, found.service) == ("http://h:4318/v1/traces", "stockyard")
    found = read({**base, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://x/own"})
    assert found is not None and found.url == "https://x/own"
    for wrong in (
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "h:4318"},
        {**base, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {**base, "OTEL_EXPORTER_OTLP_HEADERS": "canary"},
    ):
        with pytest.raises(stockyard.SettingsError, match="OTEL_") as caught:
            read(wrong)
        assert "canary" not in str(caught.value)
