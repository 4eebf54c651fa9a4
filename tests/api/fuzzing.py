"""What a hostile client sends: valid requests of every kind, mutated in JSON, in protobuf and in zstd.

A request is written with the names of things in capitals (``RUN``, ``SESSION``, ...), which an ``Attacker`` replaces by
those of a client that it keeps alive meanwhile.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
import zstandard
from hypothesis import strategies as st

from tests.api.calls import TOKENS, cross_entropy
from tuft.api.proto import wire_pb2
from tuft.api.wire import scan_envelope
from tuft.errors import InvalidInput

RECIPIENT = "age1lggyhqrw2nlhcxprm67z43rta597azn8gknawjehu9d9dl0jq3yqqvfafg"


def _ints(values: list[int], *shape: int) -> dict[str, Any]:
    return {"data": values, "dtype": "int64", "shape": list(shape or (len(values),))}


def _floats(values: list[float], *shape: int) -> dict[str, Any]:
    return {"data": values, "dtype": "float32", "shape": list(shape or (len(values),))}


def _loss(loss_fn: str, config: Mapping[str, Any], **inputs: Any) -> dict[str, Any]:
    inputs = {"target_tokens": _ints(TOKENS[1:]), **inputs}
    datum = {"model_input": {"chunks": [{"type": "encoded_text", "tokens": TOKENS[:-1]}]}, "loss_fn_inputs": inputs}
    return {**OPERATION, "forward_input": {"data": [datum], "loss_fn": loss_fn, "loss_fn_config": dict(config)}}


def _node(op: str, name: str, target: str, *args: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": {}}


OPERATION = {"model_id": "RUN", "seq_id": "NEXT"}
SAMPLE = {
    "sampling_session_id": "SAMPLER",
    "seq_id": "NEXT",
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": TOKENS}]},
    "sampling_params": {"max_tokens": 1, "seed": 1, "stop": ["x"], "temperature": 1.0, "top_k": 5, "top_p": 0.9},
    "num_samples": 1,
    "prompt_logprobs": True,
    "topk_prompt_logprobs": 2,
    "topk_sample_logprobs": 1,
    "target_prompt_logprobs": {
        **_ints([7, 8], 4, 3),
        "sparse_crow_indices": [0, 1, 1, 2, 2],
        "sparse_col_indices": [0, 2],
    },
    "prompt_alt_tokens_k": 1,
    "prompt_logprobs_last_n": 2,
    "record_stability_info": True,
}
POLICY = {"logprobs": _floats([-1.0, -2.0, -3.0, -4.0]), "advantages": _floats([1.0, 0.0, -1.0, 0.5])}
CLIPS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
REQUESTS: Mapping[str, dict[str, Any]] = {
    "create_session": {"tags": ["a"], "user_metadata": {}, "sdk_version": "1", "display_name": "d", "project_id": "p"},
    "sessions/search": {
        "session_id": "SESSION",
        "project_ids": ["p"],
        "user_metadata": {"a": "b"},
        "display_name": "d",
        "owner": {"type": "user", "owner_urns": ["urn:tuft:tenant:alice"]},
        "statuses": [{"type": "client_finished", "reasons": ["success"]}],
        "limit": 50,
        "cursor": {"last_created_at": "2026-01-01T00:00:00Z", "last_session_id": "SESSION"},
    },
    "session_heartbeat": {"session_id": "SESSION"},
    "sessions/OTHER/finish": {"reason": {"type": "x"}, "detail": "d"},
    "PUT sessions/SESSION/project": {"project_id": "p"},
    "create_model": {
        "session_id": "SESSION",
        "model_seq_id": 1_000_000,
        "base_model": "MODEL",
        "lora_config": {"rank": 1, "seed": 1, "train_mlp": True},
        "user_metadata": {"a": "b"},
        "optimizer_config": {"type": "dimuon", "version": 1},
    },
    "get_info": {"model_id": "RUN"},
    "forward": {**OPERATION, "forward_input": cross_entropy(TOKENS, loss_fn_config={"a": 1})},
    "forward#top_k": _loss(
        "cross_entropy",
        {},
        target_tokens=_ints([1, 2, 3, 4, 5, 6, 7, 8], 4, 2),
        weights={**_floats([0.5, 0.5], 4, 2), "sparse_crow_indices": [0, 1, 1, 1, 2], "sparse_col_indices": [0, 1]},
    ),
    "forward#ppo": _loss("ppo", CLIPS, **POLICY, clip_low_threshold=_floats([0.5] * 4)),
    "forward#cispo": _loss("cispo", CLIPS, **POLICY),
    "forward#dro": _loss("dro", {"beta": 0.1}, **POLICY),
    "forward#gspo": _loss("gspo", CLIPS, **POLICY, sequence_ratio_mask=_floats([1.0] * 4)),
    "forward#importance_sampling": _loss("importance_sampling", {}, **POLICY),
    "forward#stable_reinforce": _loss("stable_reinforce", {"kl_coeff": 0.1}, **POLICY),
    "forward#custom": _loss("custom", {"loss_id": "LOSS"}, **POLICY),
    "optim_step": {**OPERATION, "adam_params": {"learning_rate": 1e-4, "beta1": 0.5, "grad_clip_norm": 1.0}},
    "optim_step#params": {**OPERATION, "optimizer_params": {"type": "adamw", "eps": 1e-8, "weight_decay": 0.1}},
    "save_weights": {**OPERATION, "path": "p", "ttl_seconds": 3600, "overwrite": True, "user_metadata": {"a": "b"}},
    "save_weights_for_sampler": {**OPERATION, "sampling_session_seq_id": "COUNT", "kind": "snapshot", "path": None},
    "save_weights_external": {
        **OPERATION,
        "path": "p",
        "ttl_seconds": 3600,
        "age_encryption_recipients": [RECIPIENT],
    },
    "load_weights": {**OPERATION, "path": "CHECKPOINT", "optimizer": True, "weights_access_token": "t"},
    "load_weights#create": {"session_id": "SESSION", "model_seq_id": 5, "path": "CHECKPOINT", "optimizer": False},
    "create_sampling_session": {"session_id": "SESSION", "sampling_session_seq_id": 3, "base_model": "MODEL"},
    "join_sampling_session": {"sampling_session_id": "SAMPLER"},
    "asample": SAMPLE,
    "asample#model": {"base_model": "MODEL", "prompt": SAMPLE["prompt"], "sampling_params": {"max_tokens": 1}},
    "retrieve_future": {"request_id": "FUTURE"},
    "retrieve_futures": {
        "target": {"type": "sampling_session", "sampling_session_id": "SAMPLER", "cloned_sampler_id": 0},
        "prev_cursor": 0,
        "timeout": 0.0,
        "retrieved_request_ids": ["FUTURE"],
    },
    "cancel_future": {"request_id": "FUTURE"},
    "weights_info": {"tinker_path": "CHECKPOINT"},
    "copy_weights": {
        "source_path": "CHECKPOINT",
        "destination_project_id": "p",
        "ttl_seconds": 3600,
        "weights_access_token": "t",
    },
    "copy_weights#slot": {"source_path": "CHECKPOINT", "session_id": "SESSION", "model_seq_id": 7},
    "PUT training_runs/RUN/checkpoints/weights/base/ttl": {"ttl_seconds": 3600},
    "create_custom_loss": {
        "session_id": "SESSION",
        "custom_loss_seq_id": "COUNT",
        "name": "loss",
        "inputs": [{"name": "logprobs", "rank": 1}, {"name": "advantages", "rank": 1}],
        "graph": {
            "format": 1,
            "nodes": [
                _node("placeholder", "logprobs", "logprobs"),
                _node("placeholder", "advantages", "advantages"),
                _node("call_function", "product", "operator.mul", {"ref": "logprobs"}, {"ref": "advantages"}),
                _node("call_method", "total", "sum", {"ref": "product"}),
                _node("output", "output", "output", {"tuple": [{"ref": "total"}, {"dict": {}}]}),
            ],
        },
    },
}
"""By ``[METHOD ]path[#variant]``."""


# --- JSON -------------------------------------------------------------------------------------------------------------

EXTREMES = [0, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**70), 10**400, 1e308, 1e-30, 1e-320]
LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from([*EXTREMES, 0.5, float("nan"), float("-inf")])
    | st.text(max_size=4)
    | st.sampled_from(["\x00", "é" * 3, "../..", "tinker://", "SESSION", "RUN", "x" * 5000, "\ud800"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
) | st.sampled_from([[0] * 3000, ["x"] * 3000, [[]] * 500, {str(number): "v" for number in range(500)}])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


def value_at(value: Any, path: tuple[Any, ...]) -> Any:
    return value_at(value[path[0]], path[1:]) if path else value


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


def filled(value: Any, names: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: filled(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


# --- protobuf and zstd ------------------------------------------------------------------------------------------------


def proto_request(model_id: str, seq_id: int, rng: random.Random) -> bytes:
    """A forward_backward that is right, or wrong as no client of ours would make it."""
    numbers = [0, 1, 4, 5, -1, 2**31, 2**62, -(2**63)]

    def array(size: int) -> bytes:
        return rng.randbytes(rng.choice([0, size, size, size, size * 4, size * 4 + 1]))

    message = wire_pb2.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id)
    message.loss_fn = rng.choice(["cross_entropy", "ppo", "gspo", "stable_reinforce", "custom", "é", ""])
    message.forward_only = rng.random() < 0.5
    for key in rng.sample(["clip_low_threshold", "beta", "loss_id", "kl_coeff", "\x00"], rng.choice([0, 0, 1])):
        message.loss_fn_config[key] = rng.choice([0.5, float("nan"), float("inf"), 1e308])
        message.loss_fn_config_v2[key].text = rng.choice(["", "x" * 1000])
    for _ in range(rng.choice([0, 1, 1, 3])):
        datum = message.data.add()
        tokens = TOKENS[:4] if rng.random() < 0.8 else [rng.choice([-1, 2**31 - 1])] * 4
        datum.model_input.add().encoded_text.tokens = b"".join(
            token.to_bytes(4, "little", signed=True) for token in tokens
        )
        if rng.random() < 0.1:
            datum.model_input.add().image.SetInParent()
        for name in rng.sample(["target_tokens", "weights", "logprobs", "advantages", "clip_low_threshold", "?"], 3):
            tensor = datum.loss_fn_inputs[name]
            tensor.dtype = rng.choice([1, 2, 3, 4, 0, 77])
            tensor.shape.extend(rng.choices(numbers, k=rng.choice([0, 1, 1, 2, 2, 3])))
            if rng.random() < 0.5:
                tensor.dense = array(8)
            elif rng.random() < 0.9:
                tensor.sparse_csr.values = array(4)
                rows = rng.choices(numbers, k=rng.choice([0, 1, 5]))
                tensor.sparse_csr.crow_indices = b"".join(row.to_bytes(8, "little", signed=True) for row in rows)
                tensor.sparse_csr.col_indices = array(8)
        targets = datum.loss_fn_inputs["target_tokens"]
        if rng.random() < 0.7:
            targets.Clear()
            targets.dtype, targets.dense = 2, b"".join(token.to_bytes(8, "little") for token in TOKENS[1:])
        for spans in (datum.model_input_spans, datum.loss_fn_input_spans):
            for _ in range(rng.choice([0, 0, 1, 300])):
                span = spans.add()
                named = rng.choice([span.sampled_tokens, span.prompt_tokens])
                named.sequence_id = rng.choice(["", "x:0:0", "\x00"])
                named.offset, named.length = rng.choice(numbers), rng.choice(numbers)
    return bytes(message.SerializeToString())


def mangled(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut out, put in; varints that never end, or announce more than there is."""
    bad = [b"\xff" * 10, b"\xff\xff\xff\xff\x0f", b"\x80" * 11, b"\x0b", b"\x0c", b"\x1a\xff\xff\xff\xff\x07", b"\x00"]
    for _ in range(rng.choice([1, 1, 2, 5])):
        start = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0:
                content = content[:start]
            case 1:
                content = content[:start] + rng.choice(bad) + content[start:]
            case 2:
                content = content[:start] + content[start + rng.randrange(9) :]
            case 3:
                content = content[:start] + content[start:] * rng.choice([2, 3])
            case _:
                flipped = bytearray(content)
                if flipped:
                    flipped[start % len(flipped)] ^= 1 << rng.randrange(8)
                content = bytes(flipped)
    return content


def compressed(content: bytes, limit_bytes: int, rng: random.Random) -> bytes:
    """One frame; or several, a bomb, one of a wrong or no size, a damaged one."""
    frame = zstandard.ZstdCompressor(level=1).compress(content)
    match rng.randrange(8):
        case 0:
            return frame + frame
        case 1:
            return zstandard.ZstdCompressor(level=1).compress(content + b"\0" * (limit_bytes + 1))
        case 2:
            return zstandard.ZstdCompressor(write_content_size=False).compress(content)
        case 3:
            return mangled(frame, rng)
        case 4:
            return mangled(frame[: zstandard.get_frame_parameters(frame).window_size % 12], rng)
        case 5:
            return b"\x50\x2a\x4d\x18" + rng.randbytes(8) + frame  # a skippable frame
        case 6:
            return b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 7 + b"\x7f" + frame[6:]  # says that it has 2**63 bytes
    return frame


# --- the attacker -----------------------------------------------------------------------------------------------------


@dataclass
class Attacker:
    """A client whose operations go on under the next seq whatever it sends. What the server does wrong is kept in
    ``faults``; ``statuses`` counts its answers."""

    client: httpx.Client
    model: str
    limit_bytes: int
    names: dict[str, Any] = field(default_factory=dict)
    next_seq: Counter[str] = field(default_factory=Counter)
    numbers: Iterator[int] = field(default_factory=lambda: count(2000))
    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """A new client, with all the things that requests name."""
        session_id = self._ask("create_session", tags=[])["session_id"]
        self.names = {"MODEL": self.model, "SESSION": session_id, "OTHER": self._ask("create_session")["session_id"]}
        created = self._ask("create_model", session_id=session_id, model_seq_id=0, base_model=self.model)
        self.names["RUN"] = run_id = self._outcome(created["request_id"])["model_id"]
        saved = self._ask("save_weights", model_id=run_id, seq_id=1, path="base")
        self.names["CHECKPOINT"] = self._outcome(saved["request_id"])["path"]
        sampler = self._ask(
            "create_sampling_session", session_id=session_id, sampling_session_seq_id=0, base_model=self.model
        )
        self.names["SAMPLER"] = sampler["sampling_session_id"]
        self.names["FUTURE"] = saved["request_id"]
        self.next_seq = Counter({run_id: 2, self.names["SAMPLER"]: 0})
        loss = filled({**REQUESTS["create_custom_loss"], "custom_loss_seq_id": 0}, self.names)
        self.names["LOSS"] = self._outcome(self._ask("create_custom_loss", **loss)["request_id"])["loss_id"]

    def end(self) -> None:
        for session in ("SESSION", "OTHER"):
            self.client.post(f"/api/v1/sessions/{self.names[session]}/finish", json={"reason": {"type": "success"}})

    def json(self, label: str, place: tuple[Any, ...], value: Any) -> None:
        """The request of that label with ``value`` at ``place``."""
        method, _, path = label.partition("#")[0].rpartition(" ")
        request = REQUESTS[label]
        owner = self.names["SAMPLER" if "sampling_session_id" in request else "RUN"]
        names = {**self.names, "NEXT": self.next_seq[owner], "COUNT": next(self.numbers)}
        body = filled(replaced(request, place, value), names)
        for name, known in self.names.items():
            path = path.replace(name, str(known))
        is_numbered = request.get("seq_id") == "NEXT"
        is_in_order = is_numbered and place[:1] not in ((), ("seq_id",))
        self.send(
            method or "POST",
            f"/api/v1/{path}",
            json.dumps(body).encode(),
            seq_of=owner if is_in_order else None,
            wait=is_in_order or not is_numbered,
        )

    def proto(self, rng: random.Random, *, mangle: bool, compress: bool) -> None:
        run_id = self.names["RUN"]
        content = proto_request(run_id, self.next_seq[run_id], rng)
        if mangle:
            content = mangled(content, rng)
        headers = {"Content-Type": "application/x-protobuf"}
        read = content
        if compress:
            content = compressed(content, self.limit_bytes, rng)
            headers["Content-Encoding"] = "zstd"
            read = _decompressed(content)
        is_next = _envelope(read) == (run_id, self.next_seq[run_id])
        seq_of = run_id if is_next else None
        self.send("POST", "/api/v1/forward_backward", content, headers, seq_of=seq_of, wait=is_next)

    def send(
        self,
        method: str,
        path: str,
        content: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        seq_of: str | None,
        wait: bool,
    ) -> None:
        """An answer comes, and neither it nor the future that it names is the server's fault. ``seq_of``: whose next
        seq the request uses up if it is accepted; ``wait``: for its outcome, which then comes without a further seq."""
        shown = f"{method} {path} {headers or ''} {content[:300]!r}"
        try:
            response = self.client.request(method, path, content=content, headers=headers)
        except httpx.HTTPError as error:
            self.faults.append(f"{shown}: {error!r}")
            return
        status = str(response.status_code)
        if response.status_code >= 500:
            self.faults.append(f"{shown}: {response.status_code} {response.text[:500]}")
        elif response.status_code >= 400 and not (
            response.status_code == 408 or method == "HEAD" or "detail" in _object(response)
        ):
            self.faults.append(f"{shown}: no detail in {response.text[:500]}")
        elif response.status_code == 200 and isinstance(request_id := _object(response).get("request_id"), str):
            if seq_of is not None:
                self.next_seq[seq_of] += 1
            if wait:
                status += self._judge(shown, request_id)
        self.statuses[status] += 1

    def _judge(self, shown: str, request_id: str) -> str:
        outcome = self._outcome(request_id)
        if outcome.get("category") == "server":
            self.faults.append(f"{shown}: {str(outcome)[:500]}")
        return f" and {outcome['category']} error" if "category" in outcome else " and result"

    def _ask(self, route: str, **fields: Any) -> dict[str, Any]:
        response = self.client.post(f"/api/v1/{route}", json=fields)
        assert response.status_code == 200, response.text
        return _object(response)

    def _outcome(self, request_id: str) -> dict[str, Any]:
        for _ in range(300):
            response = self.client.post("/api/v1/retrieve_future", json={"request_id": request_id})
            if response.status_code != 408:
                return _object(response)
        return {"category": "server", "error": "it hangs"}


def _decompressed(content: bytes) -> bytes:
    """What of its beginning holds the envelope."""
    try:
        return bytes(zstandard.ZstdDecompressor().stream_reader(content).read(2**16))
    except zstandard.ZstdError:
        return b""


def _envelope(content: bytes) -> tuple[str, int] | None:
    try:
        return scan_envelope(content)
    except InvalidInput:
        return None


def _object(response: httpx.Response) -> dict[str, Any]:
    """Its JSON if that is an object, else nothing."""
    if response.headers.get("content-type", "") != "application/json":
        return {}
    found = response.json()
    return found if isinstance(found, dict) else {}
