"""Files for whoever has a link to them, and for no one else."""

from __future__ import annotations

import io
import json
import tarfile
import time
from email.utils import parsedate_to_datetime

import httpx
import pyrage
import pytest
from tinker.types import ExternalWeightsUrlsResponse

from tests.api.calls import post, result
from tests.api.conftest import Served

PEFT = {"adapter_config.json", "adapter_model.safetensors"}
SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILIlU49ANVDWYdAlwjfrFgsnw6NAeq116r0oQyMfxIfE someone@somewhere\n"


def save(server: Served, run_id: str, seq_id: int, route: str, **fields: object) -> str:
    submitted = post(server.alice, route, model_id=run_id, seq_id=seq_id, path="x", **fields)
    body = result(server.alice, submitted)
    assert "error" not in body, body
    return str(body["path"]).removeprefix(f"tinker://{run_id}/")


def links(server: Served, run_id: str, **headers: str) -> ExternalWeightsUrlsResponse:
    url = f"/api/v1/training_runs/{run_id}/checkpoints/external_weights/x/external_weights_urls"
    response = server.alice.get(url, headers=headers)
    assert response.status_code == 200, response.text
    return ExternalWeightsUrlsResponse.model_validate(response.json())


def test_a_link_is_followed_without_a_key_and_in_parts(server: Served, run_id: str) -> None:
    assert save(server, run_id, 1, "save_weights_external") == "external_weights/x"
    found = links(server, run_id)
    assert found.urls.keys() == {*PEFT, "checkpoint_complete"}
    assert 3500 < found.expires.timestamp() - time.time() < 3601
    assert all(url.startswith(f"{server.url}/api/v1/download/{run_id}/") for url in found.urls.values())
    files = {name: httpx.get(url).content for name, url in found.urls.items()}
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA"
    assert files["checkpoint_complete"] == b""
    weights = found.urls["adapter_model.safetensors"]
    part = httpx.get(weights, headers={"Range": "bytes=8-99"})
    assert (part.status_code, part.content) == (206, files["adapter_model.safetensors"][8:100])


def test_a_link_that_was_changed_or_has_expired_leads_nowhere(server: Served, run_id: str) -> None:
    save(server, run_id, 1, "save_weights_external")
    save(server, run_id, 2, "save_weights")
    url = httpx.URL(links(server, run_id).urls["adapter_config.json"])
    signature, expires = url.params["signature"], int(url.params["expires"])
    changed = [
        url.copy_set_param("expires", expires + 1),
        url.copy_set_param("expires", int(time.time()) - 1),
        url.copy_set_param("signature", signature[:-1] + ("0" if signature[-1] != "0" else "1")),
        url.copy_set_param("signature", "ünïcode"),
        url.copy_with(path=url.path.replace("adapter_config.json", "adapter_model.safetensors")),
        url.copy_with(path=url.path.replace("adapter_config.json", "manifest.json")),
        url.copy_with(path=url.path.replace("external_weights/x", "weights/x")),
        url.copy_with(raw_path=url.raw_path.replace(b"adapter_config.json", b"..%2F..%2F..%2Fapi_key")),
    ]
    answers = [httpx.get(link) for link in changed]
    assert {answer.status_code for answer in answers} == {404}
    told = {answer.json()["detail"] for answer in answers}
    assert "this link is not one of this server's, or is no longer good; ask for a new one" in told
    assert httpx.get(url).status_code == 200


def test_a_link_ends_with_what_it_leads_to(server: Served, run_id: str) -> None:
    save(server, run_id, 1, "save_weights_external")
    first = links(server, run_id).urls["adapter_config.json"]
    save(server, run_id, 2, "save_weights_external")
    assert httpx.get(first).status_code == 404, "the name means something else now"
    second = links(server, run_id).urls["adapter_config.json"]
    assert httpx.get(second).status_code == 200
    server.alice.delete(f"/api/v1/training_runs/{run_id}/checkpoints/external_weights/x")
    assert httpx.get(second).status_code == 404


def test_links_are_given_to_those_who_may_read_and_name_the_server_as_they_do(server: Served, run_id: str) -> None:
    save(server, run_id, 1, "save_weights_external")
    url = f"/api/v1/training_runs/{run_id}/checkpoints/external_weights/x"
    assert server.bob.get(f"{url}/external_weights_urls").status_code == 404
    assert server.bob.get(f"{url}/archive").status_code == 404
    server.alice.post(f"{url}/publish")
    assert server.bob.get(f"{url}/external_weights_urls").status_code == 200
    proxy = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "tuft.example", "X-Forwarded-Prefix": "/ml/"}
    for found in links(server, run_id, **proxy).urls.values():
        assert found.startswith(f"https://tuft.example/ml/api/v1/download/{run_id}/external_weights/x/")
    assert links(server, run_id, Host="[::1").urls["checkpoint_complete"].startswith("http://[::1/api/v1/download/")
    other = server.alice.get(f"/api/v1/training_runs/{run_id}/checkpoints/weights/x/external_weights_urls")
    assert other.status_code == 404


@pytest.mark.calls("GET /api/v1/training_runs/{}/checkpoints/{}/archive")
@pytest.mark.parametrize("route", ["save_weights", "save_weights_for_sampler", "save_weights_external"])
def test_old_sdks_are_sent_to_a_tar_of_the_adapter(server: Served, run_id: str, route: str) -> None:
    checkpoint_id = save(server, run_id, 1, route)
    sent = server.alice.get(f"/api/v1/training_runs/{run_id}/checkpoints/{checkpoint_id}/archive")
    assert sent.status_code == 302
    assert 3500 < parsedate_to_datetime(sent.headers["Expires"]).timestamp() - time.time() < 3601
    answer = httpx.get(sent.headers["Location"])
    assert int(answer.headers["Content-Length"]) == len(answer.content)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        members = tar.getmembers()
        assert {member.name for member in members} == {*PEFT, "checkpoint_complete"}
        assert all(member.isreg() for member in members)
        config, weights = (tar.extractfile(name) for name in sorted(PEFT))
        assert config is not None
        assert weights is not None
        assert json.load(config)["r"] == 4
        assert b"lora_A.weight" in weights.read()[:4096]


def test_what_is_encrypted_only_its_recipients_can_read(server: Served, run_id: str) -> None:
    alice, eve = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    recipients = [str(alice.to_public()), SSH_KEY]
    save(server, run_id, 1, "save_weights_external", age_encryption_recipients=recipients)
    urls = links(server, run_id).urls
    assert urls.keys() == {f"{name}.age" for name in (*PEFT, "checkpoint_complete")}
    files = {name.removesuffix(".age"): httpx.get(url).content for name, url in urls.items()}
    assert json.loads(pyrage.decrypt(files["adapter_config.json"], [alice]))["r"] == 4
    assert b"-> ssh-ed25519 " in files["adapter_config.json"].partition(b"\n---")[0]
    assert b"lora_A" not in files["adapter_model.safetensors"]
    assert b"lora_A" in pyrage.decrypt(files["adapter_model.safetensors"], [alice])
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(files["adapter_config.json"], [eve])


@pytest.mark.parametrize(
    ("recipients", "problem"),
    [
        ([], "age_encryption_recipients: got '0 recipients'; must be at least 1, or absent"),
        (["age1"] * 11, "age_encryption_recipients: got '11 of them'; must be at most 10"),
        (
            ["{key}", "AGE-SECRET-KEY-1QQ"],
            "age_encryption_recipients[1]: got 'AGE-SECR…'; must be an age1... key or an SSH",
        ),
        (["ssh-ed25519 nonsense"], "age_encryption_recipients[0]: got 'ssh-ed25…'; must be an age1... key or an SSH"),
    ],
)
def test_a_recipient_that_cannot_be_one_is_named_by_its_index(
    server: Served, run_id: str, recipients: list[str], problem: str
) -> None:
    key = str(pyrage.x25519.Identity.generate().to_public())
    recipients = [recipient.format(key=key) for recipient in recipients]
    submitted = post(
        server.alice,
        "save_weights_external",
        model_id=run_id,
        seq_id=1,
        path="x",
        age_encryption_recipients=recipients,
    )
    failed = result(server.alice, submitted)
    assert failed["category"] == "user"
    assert failed["error"].startswith(problem)
    assert server.alice.get(f"/api/v1/training_runs/{run_id}/checkpoints").json()["checkpoints"] == []


def test_external_weights_are_not_for_loading(server: Served, run_id: str, session_id: str) -> None:
    path = f"tinker://{run_id}/{save(server, run_id, 1, 'save_weights_external')}"
    loaded = result(server.alice, post(server.alice, "load_weights", model_id=run_id, seq_id=2, path=path))
    assert "external weights are there to be downloaded" in loaded["error"]
    for route in ("load_weights", "create_sampling_session"):
        fields = {"path": path} if route == "load_weights" else {"model_path": path, "sampling_session_seq_id": 1}
        refused = post(server.alice, route, session_id=session_id, model_seq_id=1, **fields)
        assert (refused.status_code, "external weights" in refused.text) == (400, True)
    assert post(server.alice, "weights_info", tinker_path=path).json()["lora_rank"] == 4
