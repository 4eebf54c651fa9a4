"""Which scope of an API key each route needs: the only place that says so.

A route that asks for a key and is not listed here is for admins alone, and a test (``tests/api/test_scopes.py``) fails
until it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuft.config import Scope

API_PREFIX = "/api/v1"

_ROUTES: Mapping[Scope | None, Sequence[str]] = {
    None: (  # every valid key's: what all clients call, and what a key may ask of itself
        "GET /auth/apikey/me",
        "DELETE /auth/apikey/me",
        "POST /auth/token",
        "POST /client/config",
        "POST /client/dynamic_config",
        "GET /get_server_capabilities",
        "POST /create_session",
        "POST /session_heartbeat",
        "POST /sessions/{session_id}/finish",
        "POST /telemetry",
        "POST /retrieve_future",
        "POST /retrieve_futures",
        "POST /cancel_future",
        "POST /weights_info",  # of what kind a checkpoint is: trainers, samplers and readers ask alike
    ),
    "train": (
        "POST /create_model",
        "POST /get_info",
        "POST /unload_model",
        "POST /forward",
        "POST /forward_backward",
        "POST /optim_step",
        "POST /save_weights",
        "POST /save_weights_for_sampler",
        "POST /save_weights_external",
        "POST /load_weights",
        "POST /create_custom_loss",
        "PUT /sessions/{session_id}/project",
        "DELETE /training_runs/{run_id}/checkpoints/{kind}/{name}",
        "POST /training_runs/{run_id}/checkpoints/{kind}/{name}/publish",
        "DELETE /training_runs/{run_id}/checkpoints/{kind}/{name}/publish",
        "PUT /training_runs/{run_id}/checkpoints/{kind}/{name}/ttl",
        "POST /copy_weights",
    ),
    "sample": (
        "POST /create_sampling_session",
        "POST /join_sampling_session",
        "GET /samplers/{sampler_id}",
        "POST /asample",
    ),
    "read": (
        "GET /sessions",
        "GET /sessions/{session_id}",
        "GET /sessions/{session_id}/trace_export",
        "POST /sessions/search",
        "GET /training_runs",
        "GET /training_runs/{run_id}",
        "GET /training_runs/{run_id}/checkpoints",
        "GET /models/{run_id}/checkpoints",
        "GET /training_runs/{run_id}/checkpoints/{kind}/{name}/archive",
        "GET /training_runs/{run_id}/checkpoints/{kind}/{name}/external_weights_urls",
        "GET /checkpoints",
        "GET /billing/usage/events",
        "GET /billing/usage/checkpoints/current",
        "GET /audit",
        "GET /queue",
    ),
    "admin": (
        "GET /admin/tenants",
        "POST /admin/tenants",
        "POST /admin/tenants/{tenant_name}/suspend",
        "POST /admin/tenants/{tenant_name}/resume",
        "GET /admin/keys",
        "POST /admin/keys",
        "DELETE /admin/keys/{key_id}",
        "POST /admin/keys/{key_id}/rotate",
        "GET /admin/audit",
    ),
}
SCOPES: Mapping[str, Scope | None] = {
    route.replace(" ", f" {API_PREFIX}"): scope for scope, routes in _ROUTES.items() for route in routes
}
"""``METHOD path`` to the scope; None: any."""


def scope_of(method: str, path: str) -> Scope | None:
    """What a key must have for the route of that path, as the application writes it (``/{run_id}``)."""
    return SCOPES.get(f"{method} {path}", "admin")
