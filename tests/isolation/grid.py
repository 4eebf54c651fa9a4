"""Every route of the application, and with each kind of id that it takes a request that names one.

A request is written with the names of things in capitals, which become the owner's ids (``Things``), or ids of the same
shape that nobody has. ``MY_...`` are things of whoever asks. A route that is missing here fails ``test_grid``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.api.calls import BASE_MODEL, TOKENS, cross_entropy
from tests.api.fuzzing import POLICY, REQUESTS

KIND_OF_FIELD = {
    "session_id": "session",
    "run_id": "run",
    "model_id": "run",
    "sampling_session_id": "sampler",
    "sampler_id": "sampler",
    "request_id": "future",
    "retrieved_request_ids": "future",
    "tinker_path": "checkpoint",
    "source_path": "checkpoint",
    "model_path": "checkpoint",
    "loss_id": "custom_loss",
    "project_id": "project",
    "project_ids": "project",
    "destination_project_id": "project",
    "owner_urns": "tenant",
}
"""Parameters and fields of bodies that name something of a tenant's, by their last word."""

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": TOKENS}]}
SAMPLE = {"prompt": PROMPT, "sampling_params": {"max_tokens": 1, "seed": 1}}
LORA = {"base_model": BASE_MODEL, "lora_config": {"rank": 4, "seed": 1}}
ONE = "/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}"


@dataclass(frozen=True)
class Case:
    """One request to ``route`` (``METHOD path``) that names a thing of that kind.

    ``body`` may be JSON or, as a str, the name of a protobuf body. ``member``: a member of a shared project is let in.
    ``is_audited`` is False where nothing is asked for: the id is a filter, or an acknowledgement. ``note`` tells cases
    of one route and kind apart. ``has_key``: False for links.
    """

    route: str
    kind: str
    path: str
    body: Mapping[str, Any] | str | None = None
    member: bool = False
    is_audited: bool = True
    has_key: bool = True
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.route} {self.kind}{self.note and f' ({self.note})'}"


def _post(name: str, kind: str, body: Mapping[str, Any] | str, **more: Any) -> Case:
    return Case(f"POST /api/v1/{name}", kind, f"/api/v1/{name}", body, **more)


def _get(path: str, kind: str, query: str, **more: Any) -> Case:
    """``query`` has the path's parameters filled in, and perhaps a query behind."""
    return Case(f"GET {path}", kind, query, **more)


def _on_run(name: str, **fields: Any) -> Case:
    return _post(name, "run", {"model_id": "RUN", "seq_id": "SEQ", **fields})


CASES = (
    # sessions
    _post("create_session", "project", {"project_id": "PROJECT"}),
    _post("session_heartbeat", "session", {"session_id": "SESSION"}),
    _get("/api/v1/sessions/{session_id}", "session", "/api/v1/sessions/SESSION"),
    _get(
        "/api/v1/sessions/{session_id}",
        "session",
        "/api/v1/sessions/SESSION?access_scope=accessible",
        member=True,
        note="accessible",
    ),
    _get(
        "/api/v1/sessions/{session_id}/trace_export",
        "session",
        "/api/v1/sessions/SESSION/trace_export",
        member=True,
    ),
    _post("sessions/search", "session", {"session_id": "SESSION", "owner": {"type": "accessible"}}, member=True),
    _post("sessions/search", "project", {"project_ids": ["PROJECT"], "owner": {"type": "accessible"}}),
    _post("sessions/search", "tenant", {"owner": {"type": "user", "owner_urns": ["OWNER"]}}, is_audited=False),
    # runs
    _post("create_model", "session", {"session_id": "SESSION", "model_seq_id": 100, **LORA}),
    _post("get_info", "run", {"model_id": "RUN"}),
    _on_run("forward_backward", forward_backward_input=cross_entropy(TOKENS)),
    _post("forward_backward", "run", "loss", note="protobuf"),
    _post(
        "forward_backward", "custom_loss", {"model_id": "MY_RUN", "seq_id": "SEQ", "forward_backward_input": "CUSTOM"}
    ),
    _post("forward_backward", "sequence", "spans"),
    _on_run("forward", forward_input=cross_entropy(TOKENS)),
    _post("forward", "custom_loss", {"model_id": "MY_RUN", "seq_id": "SEQ", "forward_input": "CUSTOM"}),
    _on_run("optim_step", adam_params={"learning_rate": 1e-4}),
    _on_run("save_weights", path="another"),
    _on_run("save_weights_for_sampler", path="another"),
    _on_run("save_weights_external", path="another"),
    _on_run("load_weights", path="MY_CHECKPOINT"),
    _post(
        "load_weights",
        "checkpoint",
        {"model_id": "MY_RUN", "seq_id": "SEQ", "path": "CHECKPOINT", "optimizer": True},
        member=True,
    ),
    _post(
        "load_weights",
        "checkpoint",
        {"session_id": "MY_SESSION", "model_seq_id": 101, "path": "CHECKPOINT"},
        member=True,
        note="into a new run",
    ),
    _post("load_weights", "session", {"session_id": "SESSION", "model_seq_id": 102, "path": "MY_CHECKPOINT"}),
    _post("create_custom_loss", "session", {**REQUESTS["create_custom_loss"], "custom_loss_seq_id": 5}),
    _get("/api/v1/training_runs", "project", "/api/v1/training_runs?access_scope=accessible&project_id=PROJECT"),
    _get("/api/v1/training_runs/{run_id}", "run", "/api/v1/training_runs/RUN"),
    _get(
        "/api/v1/training_runs/{run_id}",
        "run",
        "/api/v1/training_runs/RUN?access_scope=accessible",
        member=True,
        note="accessible",
    ),
    _get("/api/v1/training_runs/{run_id}/checkpoints", "run", "/api/v1/training_runs/RUN/checkpoints", member=True),
    _get("/api/v1/models/{run_id}/checkpoints", "run", "/api/v1/models/RUN/checkpoints", member=True),
    # samples
    _post(
        "create_sampling_session",
        "session",
        {"session_id": "SESSION", "sampling_session_seq_id": 50, "base_model": BASE_MODEL},
    ),
    _post(
        "create_sampling_session",
        "checkpoint",
        {"session_id": "MY_SESSION", "sampling_session_seq_id": 51, "model_path": "CHECKPOINT"},
        member=True,
    ),
    _post("join_sampling_session", "sampler", {"sampling_session_id": "SAMPLER"}),
    _get("/api/v1/samplers/{sampler_id}", "sampler", "/api/v1/samplers/SAMPLER"),
    _post("asample", "sampler", {"sampling_session_id": "SAMPLER", "seq_id": "SEQ", **SAMPLE}),
    _post("asample", "checkpoint", {"model_path": "CHECKPOINT", **SAMPLE}, member=True),
    # futures
    _post("retrieve_future", "future", {"request_id": "FUTURE"}),
    _post("retrieve_future", "future", {"request_id": "PENDING"}, note="pending"),
    _post("retrieve_futures", "sampler", {"target": {"sampling_session_id": "SAMPLER"}, "timeout": 0.0}),
    _post(
        "retrieve_futures",
        "future",
        {
            "target": {"sampling_session_id": "MY_SAMPLER"},
            "timeout": 0.0,
            "retrieved_request_ids": ["FUTURE", "PENDING"],
        },
        is_audited=False,
    ),
    _post("cancel_future", "future", {"request_id": "FUTURE"}),
    _post("cancel_future", "future", {"request_id": "PENDING"}, note="pending"),
    # checkpoints
    _post("weights_info", "checkpoint", {"tinker_path": "CHECKPOINT"}, member=True),
    _post(
        "copy_weights",
        "checkpoint",
        {"source_path": "CHECKPOINT", "session_id": "MY_SESSION", "model_seq_id": 103},
        member=True,
    ),
    _post("copy_weights", "session", {"source_path": "MY_CHECKPOINT", "session_id": "SESSION", "model_seq_id": 104}),
    _post("copy_weights", "project", {"source_path": "MY_CHECKPOINT", "destination_project_id": "PROJECT"}),
    Case(f"GET {ONE}/archive", "checkpoint", "/api/v1/training_runs/RUN/checkpoints/weights/base/archive", member=True),
    Case(
        f"GET {ONE}/external_weights_urls",
        "checkpoint",
        "/api/v1/training_runs/RUN/checkpoints/external_weights/out/external_weights_urls",
        member=True,
    ),
    Case(
        "GET /api/v1/download/{run_id}/{kind}/{name}/{file}",
        "link",
        "/api/v1/download/RUN/weights/base/archive.tar?expires=EXPIRES&signature=SIGNATURE",
        has_key=False,
    ),
    Case(
        "GET /api/v1/traces/{session_id}",
        "trace",
        "/api/v1/traces/SESSION?expires=EXPIRES&signature=TRACE_SIGNATURE",
        has_key=False,
    ),
    # usage
    _get(
        "/api/v1/billing/usage/checkpoints/current",
        "project",
        "/api/v1/billing/usage/checkpoints/current?project_id=PROJECT",
    ),
    # what ends things, last: the owner makes these calls too
    Case(
        "PUT /api/v1/sessions/{session_id}/project", "session", "/api/v1/sessions/SESSION/project", {"project_id": "x"}
    ),
    Case(
        "PUT /api/v1/sessions/{session_id}/project",
        "project",
        "/api/v1/sessions/MY_SESSION/project",
        {"project_id": "PROJECT"},
    ),
    Case(
        f"PUT {ONE}/ttl", "checkpoint", "/api/v1/training_runs/RUN/checkpoints/weights/base/ttl", {"ttl_seconds": 9999}
    ),
    Case(f"POST {ONE}/publish", "checkpoint", "/api/v1/training_runs/RUN/checkpoints/weights/base/publish"),
    Case(f"DELETE {ONE}/publish", "checkpoint", "/api/v1/training_runs/RUN/checkpoints/weights/base/publish"),
    Case(f"DELETE {ONE}", "checkpoint", "/api/v1/training_runs/RUN/checkpoints/weights/base"),
    _post("unload_model", "run", {"model_id": "RUN"}),
    Case(
        "POST /api/v1/sessions/{session_id}/finish",
        "session",
        "/api/v1/sessions/SESSION/finish",
        {"reason": {"type": "success"}},
    ),
)

CUSTOM = {**cross_entropy(TOKENS), "loss_fn": "custom", "loss_fn_config": {"loss_id": "LOSS"}}
CUSTOM["data"] = [{**CUSTOM["data"][0], "loss_fn_inputs": {**CUSTOM["data"][0]["loss_fn_inputs"], **POLICY}}]

NAMELESS = {
    "GET /": "about the server",
    "GET /readyz": "about the server",
    "GET /api/v1/healthz": "about the server",
    "POST /api/v1/client/config": "about the server",
    "POST /api/v1/client/dynamic_config": "about the server",
    "GET /api/v1/get_server_capabilities": "about the server",
    "GET /api/v1/auth/apikey/me": "of the calling key itself",
    "DELETE /api/v1/auth/apikey/me": "of the calling key itself",
    "POST /api/v1/auth/token": "of the calling key itself",
    "POST /api/v1/telemetry": "kept nowhere",
    "GET /api/v1/sessions": "lists the caller's own",
    "GET /api/v1/checkpoints": "lists the caller's own",
    "GET /api/v1/audit": "lists the caller's own",
    "GET /api/v1/queue": "lists the caller's own",
    "GET /api/v1/billing/usage/events": "lists the caller's own",
    "GET /{name}/resolve/{revision}/{file}": "of base models, which are everyone's",
    "HEAD /{name}/resolve/{revision}/{file}": "of base models, which are everyone's",
    "GET /api/models/{name}/tree/{revision}": "of base models, which are everyone's",
    "GET /api/models/{name}/tree/{revision}/{folder}": "of base models, which are everyone's",
    "GET /api/models/{name}": "of base models, which are everyone's",
    "GET /api/models/{name}/revision/{revision}": "of base models, which are everyone's",
    "GET /openapi.json": "about the server",
    "GET /docs": "about the server",
}
"""Routes that name nothing of a tenant's, and why they need no id."""

OPERATORS = "/api/v1/admin/"
"""Routes below it are for whoever administers all tenants; ``test_grid`` tries them with a key that does not."""

NO_IDS = frozenset(
    # numbers, times and lists' pages
    "limit offset day expires starting_on ending_before ttl_seconds timeout prev_cursor last_created_at "
    "sampling_session_seq_id model_seq_id seq_id custom_loss_seq_id cloned_sampler_id "
    # where a page of the caller's own ended
    "last_session_id "
    # words that stand for one of a few things, or for nothing
    "access_scope event_type type reason reasons version format optimizer overwrite revision "
    # what a client calls its own, or says of it; ``path`` names a checkpoint to load in ``CASES``
    "kind name path tags user_metadata sdk_version display_name detail "
    # proof of a right
    "signature weights_access_token "
    # what is the server's and everyone's
    "base_model file folder "
    # what is computed with
    "rank lora_config nodes adam_params forward_backward_input forward_input age_encryption_recipients "
    "prompt max_tokens seed stop temperature top_k top_p num_samples prompt_logprobs topk_prompt_logprobs "
    "topk_sample_logprobs target_prompt_logprobs prompt_alt_tokens_k prompt_logprobs_last_n "
    "record_stability_info".split()
)
"""Parameters and fields that name nothing of a tenant's by which it could be reached."""
