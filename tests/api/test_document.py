"""The OpenAPI document tells what every route reads, by the model that the route parses."""

from __future__ import annotations

from typing import Any

from tests.api.conftest import Served
from tuft.api.document import readers
from tuft.api.http import API_PREFIX, ROUTERS, create_app

WITHOUT_BODY = {
    ("POST", f"{API_PREFIX}/admin/tenants/{{tenant_name}}/resume"),
    ("POST", f"{API_PREFIX}/admin/tenants/{{tenant_name}}/suspend"),
    ("POST", f"{API_PREFIX}/auth/token"),
    ("POST", f"{API_PREFIX}/client/config"),
    ("POST", f"{API_PREFIX}/client/dynamic_config"),
    ("POST", f"{API_PREFIX}/telemetry"),
    ("POST", f"{API_PREFIX}/training_runs/{{run_id}}/checkpoints/{{kind}}/{{name}}/publish"),
}
"""POSTs and PUTs that read nothing of what is sent."""


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_every_body_is_described(server: Served) -> None:
    found = operations(server.anyone.get("/openapi.json").json())
    described = {place for place, operation in found.items() if "requestBody" in operation}
    sending = {place for place in found if place[0] in ("POST", "PUT", "PATCH")}
    assert sending - described == WITHOUT_BODY
    assert described <= sending


def test_what_is_described_is_what_is_parsed(server: Served) -> None:
    document = create_app(server.services).openapi()
    for (path, method), reader in readers(ROUTERS).items():
        if reader is not None:
            content = document["paths"][path][method.lower()]["requestBody"]["content"]
            shown = content["application/json"]["schema"]
            names = {kind["$ref"].rpartition("/")[2] for kind in shown.get("anyOf", [shown])}
            assert names == {kind.__name__ for kind in reader.model.one_of or [reader.model]}
            assert ("application/x-protobuf" in content) == path.endswith("/forward_backward")
            for kind in names:
                assert document["components"]["schemas"][kind]["type"] == "object"


def test_every_reference_leads_somewhere(server: Served) -> None:
    document = server.anyone.get("/openapi.json").json()

    def references(part: Any) -> list[str]:
        if isinstance(part, dict):
            own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
            return own + [reference for value in part.values() for reference in references(value)]
        return [reference for value in part for reference in references(value)] if isinstance(part, list) else []

    found = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert found <= set(document["components"]["schemas"])
    assert {"CreateModel", "LoraSpec", "Refusal"} <= found


def test_options_of_the_api_are_named(server: Served) -> None:
    schemas = server.anyone.get("/openapi.json").json()["components"]["schemas"]
    loss = schemas["ForwardBackward"]["properties"]["forward_backward_input"]
    assert {"cross_entropy", "stable_reinforce", "custom"} <= set(loss["properties"]["loss_fn"]["enum"])
    families = schemas["Step"]["properties"]["optimizer_params"]["anyOf"]
    assert "damping" in families[1]["properties"]
    assert {"target_prompt_logprobs", "prompt_alt_tokens_k"} <= set(schemas["Sample"]["properties"])


def test_no_list_is_read_on_behind_its_first_wrong_item() -> None:
    """Else pydantic makes an error of each: 3 GB and half a minute for 9 MB of zeros where texts are meant."""
    models = {kind for reader in readers(ROUTERS).values() if reader for kind in reader.model.one_of or [reader.model]}
    lists = [schema for model in models for schema in lists_in(model.__pydantic_core_schema__)]
    assert len(lists) > 5
    assert all(schema.get("fail_fast") for schema in lists), lists


def lists_in(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, dict):
        own = [schema] if schema.get("type") in ("list", "tuple", "set") and "default" not in schema else []
        return own + [found for value in schema.values() for found in lists_in(value)]
    return [found for value in schema for found in lists_in(value)] if isinstance(schema, list) else []


def test_refusals_and_keys_are_described(server: Served) -> None:
    found = operations(server.anyone.get("/openapi.json").json())
    for place, operation in found.items():
        refused = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
        assert refused == {"$ref": "#/components/schemas/Refusal"}, place
        assert "422" not in operation["responses"]
    assert found["POST", f"{API_PREFIX}/asample"]["security"] == [{"key": []}, {"bearer": []}]
    assert "security" not in found["GET", "/readyz"]


def test_a_body_is_not_read_before_the_caller_is_known(server: Served) -> None:
    assert server.anyone.post(f"{API_PREFIX}/asample", content=b"{").status_code == 401
    assert server.alice.post(f"{API_PREFIX}/asample", content=b"{").status_code == 400
