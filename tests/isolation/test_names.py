"""No name that a client gives leads out of its tenant's place: neither by ``..`` nor by ``/``, nor by what looks so."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.api.calls import BASE_MODEL, post, result
from tests.isolation.conftest import Grid
from tests.isolation.things import Client
from tuft.errors import InvalidInput
from tuft.records import valid_name

SECRET = "what no client may read"
BAD = [
    *("..", ".", "", "/", "/etc/passwd", "../x", "../../secret", "..\\x", "a/b", "a\\b", "a/../b", "./a", ".hidden"),
    *(
        "a\0b",
        "\0",
        "a\nb",
        "a\tb",
        "a b",
        " a",
        "a ",
        "~",
        "~root",
        "$HOME",
        "%2e%2e",
        "..%2fx",
        "a;b",
        "a|b",
        "*",
        "?",
    ),
    *(
        "․․",
        "‥",
        "／etc",
        "．．／x",
        "∕etc",
        "⁄etc",
        "ａ",
        "bаse",
        "base\u200b",
        "\ufeffbase",
        "ba\u0301se",
        "\u202ebase",
    ),
    *("x" * 129, "x" * 300, "é" * 200, "x" * 10_000, "\ud800"),
    *("-rf", "--help", "_x", "CON:", "a:b", "file:///etc/passwd", "http://localhost/x", "//host/share", "\\\\host\\x"),
]
GOOD = ["a", "0", "a" * 128, "A.b_c-D.9", "a..b", "a.", "COM1", "base.safetensors"]
quietly = settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


def test_a_name_is_plain_letters_and_few_of_them() -> None:
    for name in GOOD:
        assert valid_name(name, "path") == name
    for name in BAD:
        with pytest.raises(InvalidInput, match="path: got "):
            valid_name(name, "path")


@settings(max_examples=500)
@given(st.text(max_size=150))
def test_no_other_character_is_in_a_name(name: str) -> None:
    try:
        valid_name(name, "path")
    except InvalidInput:
        return
    assert name.isascii()
    assert name[0].isalnum()
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@pytest.fixture(scope="module")
def places(grid: Grid) -> Iterator[list[Path]]:
    """Secrets in, beside and above what the server hands out."""
    home = grid.served.services.config.home
    model = Path(grid.served.services.base_models[0].tokenizer_dir)
    files = [
        home / "secret",
        home.parent / "secret",
        home / "checkpoints" / "secret",
        model / "secret",
        model.parent / "x",
    ]
    for file in files:
        file.write_text(SECRET)
    yield files
    for file in files:
        file.unlink()


@pytest.fixture(scope="module")
def client(grid: Grid) -> Client:
    client = grid.tenant("namer")
    client.need("MY_CHECKPOINT")
    return client


def below(home: Path) -> set[str]:
    """All directories and files of the home, but those of the server's own running."""
    own = ("tuft.sqlite3", "journal", "snapshots", "server", "spool")
    found = {str(path.relative_to(home)) for path in home.rglob("*")}
    return {path for path in found if not path.startswith(own)}


def saving(client: Client, route: str, name: str) -> str:
    run_id = client.run()
    response = post(client.http, route, model_id=run_id, seq_id=client.seq(run_id), path=name)
    assert response.status_code in (200, 400), response.text
    return str(result(client.http, response)) if response.status_code == 200 else response.text


@pytest.mark.parametrize("route", ["save_weights", "save_weights_for_sampler", "save_weights_external"])
def test_a_bad_name_saves_nothing_and_is_named(grid: Grid, client: Client, places: list[Path], route: str) -> None:
    home = grid.served.services.config.home
    before = below(home)
    for name in BAD:
        if name != "\ud800":  # no JSON text of ours can hold it: see tests/api/fuzzing.py
            assert "path: got" in saving(client, route, name), name
    assert below(home) == before


@settings(quietly, max_examples=60)
@given(
    name=st.text(alphabet=st.sampled_from("ab./\\\0~%․／ \n:0"), max_size=12),
    route=st.sampled_from(["save_weights", "save_weights_for_sampler", "save_weights_external"]),
)
def test_whatever_is_saved_is_in_its_runs_own_directory(grid: Grid, client: Client, name: str, route: str) -> None:
    home = grid.served.services.config.home
    tenant = grid.served.services.tenants.named(client.name)
    before = below(home)
    saving(client, route, name)
    own = f"checkpoints/{tenant.tenant_id}/{client.run()}/{name}-"
    assert all(path.startswith(own) for path in below(home) - before)


def nasty_paths(client: Client) -> list[str]:
    run_id = client.run()
    return [
        *(f"tinker://{run_id}/weights/{name}" for name in BAD if name != "\ud800"),
        *(f"tinker://{name}/weights/base" for name in BAD if name != "\ud800"),
        *(f"tinker://{run_id}/{name}/base" for name in BAD if name != "\ud800"),
        *("file:///etc/passwd", "/etc/passwd", "../../secret", "tinker:///etc/passwd", "tinker://", "x" * 300),
        *("tinker://../weights/secret", "tinker://./weights/../secret", "TINKER://a/weights/b", "hf://a/b", "s3://a/b"),
    ]


def test_no_path_leads_to_another_file(client: Client, places: list[Path]) -> None:
    for path in nasty_paths(client):
        for response in (
            post(client.http, "weights_info", tinker_path=path),
            post(client.http, "create_sampling_session", session_id=client.mine["MY_SESSION"],
                 sampling_session_seq_id=9, model_path=path),
            post(client.http, "load_weights", session_id=client.mine["MY_SESSION"], model_seq_id=9, path=path),
            post(client.http, "copy_weights", source_path=path, session_id=client.mine["MY_SESSION"], model_seq_id=8),
        ):  # fmt: skip
            assert response.status_code in (400, 404), (path, response.text)
            assert SECRET not in response.text


@pytest.mark.parametrize(
    "route",
    [
        "/api/v1/training_runs/{}",
        "/api/v1/training_runs/{}/checkpoints",
        "/api/v1/training_runs/{}/checkpoints/weights/base/archive",
        "/api/v1/training_runs/RUN/checkpoints/weights/{}/archive",
        "/api/v1/training_runs/RUN/checkpoints/{}/base/archive",
        "/api/v1/training_runs/RUN/checkpoints/external_weights/{}/external_weights_urls",
        "/api/v1/download/{}/weights/base/archive.tar?expires=9999999999&signature=0",
        "/api/v1/download/RUN/weights/{}/archive.tar?expires=9999999999&signature=0",
        "/api/v1/download/RUN/weights/base/{}?expires=9999999999&signature=0",
        "/api/v1/sessions/{}",
        "/api/v1/samplers/{}",
        "/api/v1/traces/{}?expires=9999999999&signature=0",
        f"/{BASE_MODEL}/resolve/main/{{}}",
        f"/{BASE_MODEL}/resolve/{{}}/config.json",
        "/{}/resolve/main/config.json",
        f"/api/models/{BASE_MODEL}/tree/main/{{}}",
        f"/api/models/{BASE_MODEL}/tree/{{}}",
        "/api/models/{}",
    ],
)
def test_no_url_leads_to_another_file(client: Client, places: list[Path], route: str) -> None:
    for name in BAD:
        if name in ("", ".", "\ud800", "x" * 10_000):
            continue  # another route's url, none at all, or longer than a request's head
        for quoted in {quote(name, safe=""), quote(name, safe="/:\\")}:
            url = route.replace("RUN", client.run()).format(quoted)
            status, text = get_as_it_is(client, url)
            assert status in (307, 400, 404, 405), (url, text)  # 307: to the same without its last slash
            assert SECRET not in text


def get_as_it_is(client: Client, target: str) -> tuple[int, str]:
    """Other clients would take ``..`` out of the path themselves."""
    url = client.http.base_url
    connection = HTTPConnection(url.host, url.port or 80, timeout=60)
    try:
        connection.request("GET", target, headers={"X-API-Key": client.http.headers["X-API-Key"]})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_no_file_of_a_link_can_be_exchanged_for_another(client: Client, places: list[Path]) -> None:
    run_id = client.run()
    link = client.http.get(f"/api/v1/training_runs/{run_id}/checkpoints/weights/base/archive").headers["Location"]
    assert client.http.get(link).status_code == 200
    files = (
        "manifest.json",
        "optimizer.safetensors",
        "adapter_config.json",
        "..%2fsecret",
        "%2e%2e%2f..%2f..%2fsecret",
    )
    for file in files:
        refused = client.http.get(link.replace("archive.tar", file))
        assert refused.status_code == 404, file
        assert SECRET not in refused.text


@pytest.mark.parametrize("name", [name for name in BAD if name != "\ud800"])
def test_no_tenant_and_no_project_is_named_so(grid: Grid, client: Client, name: str) -> None:
    with pytest.raises(InvalidInput):
        grid.served.services.tenants.create_key(name)
    before = below(grid.served.services.config.home)
    answer = post(client.http, "create_session", project_id=name)
    assert answer.status_code in (200, 400)  # a label may be any words: nothing on the disk is named by it
    assert below(grid.served.services.config.home) == before


def test_a_directory_that_was_put_elsewhere_is_not_followed(grid: Grid, tmp_path: Path) -> None:
    client = grid.tenant("linked")
    client.need("MY_CHECKPOINT")
    run_id = client.run()
    archive = f"/api/v1/training_runs/{run_id}/checkpoints/weights/base/archive"
    link = client.http.get(archive).headers["Location"]
    tenant = grid.served.services.tenants.named("linked")
    directory = grid.served.services.config.home / "checkpoints" / tenant.tenant_id / run_id
    outside = tmp_path / "outside"
    directory.rename(outside)
    directory.symlink_to(outside)
    for url in (archive, link):
        refused = client.http.get(url)
        assert refused.status_code == 422
        assert "a link has been put in its place" in refused.text
        assert str(tmp_path) not in refused.text
    path = client.mine["MY_CHECKPOINT"]
    loaded = post(client.http, "load_weights", model_id=run_id, seq_id=client.seq(run_id), path=path)
    assert "damaged" in str(result(client.http, loaded))
    assert client.http.delete(archive.removesuffix("/archive")).status_code == 204
    assert len(list(outside.rglob("*.safetensors"))) == 2
