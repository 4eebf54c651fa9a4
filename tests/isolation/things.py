"""One of each kind of thing, of a real tenant on a real server; and the same ids as nobody has them."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import httpx
import numpy as np
import tinker
from tinker.proto.request_conv import forward_backward_request_to_proto

from tests.api.calls import BASE_MODEL, PROTOBUF, TOKENS, cross_entropy, datum, new_session, post, proto_body, result
from tests.api.fuzzing import REQUESTS, filled
from tests.isolation.grid import CUSTOM, LORA, SAMPLE, Case

TEAM, HERS = "team", "hers"
"""A project of alice's and carol's, and one of alice's alone."""
_UNLIKE_HEX = str.maketrans("0123456789abcdef", "ghijklmnopqrsuvw")  # or a session's id might hold the word
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_FUTURE = re.compile(r"future-[0-9a-f]{32}")


@dataclass
class Client:
    """A tenant who makes calls. ``mine`` are things of their own, made when a request is to name one."""

    name: str
    http: httpx.Client
    mine: dict[str, str] = field(default_factory=dict)
    next_seq: Counter[str] = field(default_factory=Counter)

    def run(self) -> str:
        if "MY_RUN" not in self.mine:
            self.mine["MY_SESSION"] = session_id = self.mine.get("MY_SESSION") or new_session(self.http)
            created = post(self.http, "create_model", session_id=session_id, model_seq_id=0, **LORA)
            self.mine["MY_RUN"] = str(result(self.http, created)["model_id"])
            self.next_seq[self.mine["MY_RUN"]] = 1
        return self.mine["MY_RUN"]

    def seq(self, of: str) -> int:
        """The next operation of a run, or sample of a sampler, that may be another's."""
        seq = self.next_seq.get(of, 1)
        self.next_seq[of] = seq + 1
        return seq

    def need(self, name: str) -> None:
        if name in self.mine:
            return
        match name:
            case "MY_SESSION":
                self.mine[name] = new_session(self.http)
            case "MY_RUN":
                self.run()
            case "MY_SAMPLER":
                self.need("MY_SESSION")
                fields = {"session_id": self.mine["MY_SESSION"], "sampling_session_seq_id": 0}
                answer = post(self.http, "create_sampling_session", base_model=BASE_MODEL, **fields)
                self.mine[name] = str(answer.json()["sampling_session_id"])
            case "MY_CHECKPOINT":
                run_id = self.run()
                saved = post(self.http, "save_weights", model_id=run_id, seq_id=self.seq(run_id), path="base")
                self.mine[name] = str(result(self.http, saved)["path"])

    def send(self, case: Case, things: Mapping[str, str], record: str = "") -> httpx.Response:
        """The case's request, naming ``things``."""
        method, _ = case.route.split()
        for name in ("MY_SESSION", "MY_RUN", "MY_SAMPLER", "MY_CHECKPOINT"):
            if name in case.path or name in str(case.body) or (name == "MY_RUN" and case.body == "spans"):
                self.need(name)
        names: dict[str, Any] = {**things, **self.mine}
        path = case.path
        for name in sorted(names, key=len, reverse=True):
            path = path.replace(name, str(names[name]))
        headers = {"X-Record": record} if case.has_key else {"X-Record": record, "X-API-Key": ""}
        if isinstance(case.body, str):
            headers |= PROTOBUF
            return self.http.request(method, path, content=self._protobuf(case.body, names), headers=headers)
        if case.body is not None and "SEQ" in case.body.values():
            subject = case.body.get("model_id") or case.body["sampling_session_id"]
            names["SEQ"] = self.seq(names[subject])
        names["CUSTOM"] = filled(CUSTOM, names)
        json = None if case.body is None else filled(dict(case.body), names)
        return self.http.request(method, path, json=json, headers=headers)

    def _protobuf(self, name: str, names: Mapping[str, Any]) -> bytes:
        if name == "loss":
            return proto_body(names["RUN"], self.seq(names["RUN"]), [datum(TOKENS)])
        run_id = names["MY_RUN"]
        prompt = tinker.types.PromptProvenanceSpan(sequence_id=names["SEQUENCE"], length=len(TOKENS))
        inputs = {"target_tokens": np.array(TOKENS), "advantages": np.zeros(len(TOKENS), dtype=np.float32)}
        given = tinker.Datum(model_input=tinker.ModelInput.from_ints(TOKENS), loss_fn_inputs=inputs)
        data = [given.with_provenance(model_input=[prompt], loss_fn_inputs=[prompt])]
        loss_input = tinker.types.ForwardBackwardInput(data=data, loss_fn="stable_reinforce")
        request = tinker.types.ForwardBackwardRequest(
            forward_backward_input=loss_input, model_id=run_id, seq_id=self.seq(run_id)
        )
        return bytes(forward_backward_request_to_proto(request).SerializeToString())


def make_things(owner: Client) -> dict[str, str]:
    """What the owner has, by the names that requests have for it."""
    http = owner.http
    session_id = str(post(http, "create_session", tags=[], project_id=TEAM).json()["session_id"])
    run_id = str(result(http, post(http, "create_model", session_id=session_id, model_seq_id=0, **LORA))["model_id"])
    saved = post(http, "save_weights", model_id=run_id, seq_id=1, path="base")
    path = str(result(http, saved)["path"])
    result(http, post(http, "save_weights_external", model_id=run_id, seq_id=2, path="out"))
    fields = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": BASE_MODEL}
    sampler_id = str(post(http, "create_sampling_session", **fields).json()["sampling_session_id"])
    sampled = post(http, "asample", sampling_session_id=sampler_id, seq_id=0, record_stability_info=True, **SAMPLE)
    result(http, sampled)
    loss = {**REQUESTS["create_custom_loss"], "session_id": session_id, "custom_loss_seq_id": 0}
    early = {"model_id": run_id, "seq_id": 1000, "forward_input": cross_entropy(TOKENS)}  # waits for its turn
    things = {
        "SESSION": session_id,
        "RUN": run_id,
        "SAMPLER": sampler_id,
        "SEQUENCE": str(sampled.json()["sample_sequence_ids"][0]),
        "FUTURE": str(saved.json()["request_id"]),
        "PENDING": str(post(http, "forward", **early).json()["request_id"]),
        "CHECKPOINT": path,
        "LOSS": str(result(http, post(http, "create_custom_loss", **loss))["loss_id"]),
        "PROJECT": TEAM,
        "OWNER": f"urn:tuft:tenant:{owner.name}",
    }
    owner.next_seq.update({run_id: 3, sampler_id: 1})
    return things | {"EXPIRES": str(int(time.time()) + 1000), "SIGNATURE": "0" * 64, "TRACE_SIGNATURE": "1" * 64}


def signed(owner: Client, things: Mapping[str, str]) -> dict[str, str]:
    """The same with the signatures of links that the server made."""
    run_id, session_id = things["RUN"], things["SESSION"]
    archive = owner.http.get(f"/api/v1/training_runs/{run_id}/checkpoints/weights/base/archive").headers["Location"]
    trace = owner.http.get(f"/api/v1/sessions/{session_id}/trace_export").json()["url"]
    of_archive, of_trace = (parse_qs(urlsplit(url).query) for url in (archive, trace))
    assert abs(int(of_archive["expires"][0]) - int(of_trace["expires"][0])) <= 1
    return {
        **things,
        "EXPIRES": of_archive["expires"][0],
        "SIGNATURE": of_archive["signature"][0],
        "TRACE_SIGNATURE": of_trace["signature"][0],
    }


def nobodys(things: Mapping[str, str]) -> dict[str, str]:
    """Ids of the same shape and length that nothing has."""
    session_id = str(uuid4())
    changed = {name: value.replace(things["SESSION"], session_id) for name, value in things.items()}
    changed |= {name: f"future-{token_hex(16)}" for name in ("FUTURE", "PENDING")}
    changed["PROJECT"] = token_hex(2).translate(_UNLIKE_HEX)
    changed["OWNER"] = "urn:tuft:tenant:" + token_hex(8)[: len(things["OWNER"]) - len("urn:tuft:tenant:")]
    return changed


def answer_to(client: Client, response: httpx.Response, things: Mapping[str, str]) -> tuple[Any, ...]:
    """Status, headers and body, with the result of its future if it has one, without the ids themselves."""
    body = response.text
    if (
        response.status_code == 200
        and '"request_id"' in body
        and response.request.url.path != "/api/v1/retrieve_futures"
    ):
        settled = result(client.http, response)
        body = f"{_without_timings(body)} {_without_timings(str(settled))}"
    headers = {name: response.headers.get(name) for name in ("content-type", "www-authenticate", "retry-after")}
    headers["location"] = "somewhere" if "location" in response.headers else None
    return response.status_code, tuple(headers.items()), _without_ids(body, things)


def _without_ids(text: str, things: Mapping[str, str]) -> str:
    text = _FUTURE.sub("FUTURE", _UUID.sub("SESSION", text))
    return text.replace(things["OWNER"], "OWNER").replace(things["PROJECT"], "PROJECT")


def _without_timings(text: str) -> str:
    return re.sub(r"\d+\.\d+", "0.0", text)
