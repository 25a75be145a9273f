"""Keys: every route is guarded but two, and nothing about a wrong key can be told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute

from engine.errors import ConfigError
from server.app import create_routes
from server.auth import OPEN_PATHS, KeyRing
from server.config import ServerConfig
from server.errors import ApiError
from server.key_file import LOOK_SECONDS, KeyFile
from server.service import Service
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import LiveServer, live_server, make_tokenizer

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys").write_text("\n".join(KEYS) + "\n")
    with live_server(folder / "model", api_key_file=folder / "keys") as server:
        yield server


def routes(folder: Path) -> list[tuple[str, str]]:
    tokenizer = make_tokenizer(folder)
    config = ServerConfig.resolve({"model": folder}, folder)
    app = create_routes(Service(FakeEngine(tokenizer), tokenizer, config))
    routers = [getattr(route, "original_router", None) for route in app.routes]
    assert all(routers), "every route belongs to a router of ours"
    found = [route for router in routers if router for route in router.routes]
    assert all(isinstance(route, APIRoute) for route in found)
    return [(method, route.path) for route in found for method in route.methods]


def test_v15_every_route_needs_a_key_but_the_listed_ones(
    guarded: LiveServer, tmp_path: Path
) -> None:
    assert {"/health/live", "/health/ready"} == OPEN_PATHS
    seen = routes(tmp_path)
    assert len(seen) >= 10
    for method, path in seen:
        answer = httpx.request(method, guarded.url + path.replace("{model_id:path}", "toy"))
        if path in OPEN_PATHS:
            assert answer.status_code == 200
        else:
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"


def test_all_keys_work_and_only_as_bearer(guarded: LiveServer) -> None:
    url = guarded.url + "/v1/models"
    for key in KEYS:
        assert httpx.get(url, headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert httpx.get(url, headers={"authorization": f"bearer {key}"}).status_code == 200
        assert httpx.get(url, headers={"authorization": key}).status_code == 401
        assert httpx.get(url, headers={"authorization": f"Basic {key}"}).status_code == 401


def test_b67_keys_elsewhere_do_not_count(guarded: LiveServer) -> None:
    (key, _) = KEYS
    assert httpx.get(guarded.url + f"/v1/models?api_key={key}").status_code == 401
    body = {"prompt": "a", "api_key": key}
    assert httpx.post(guarded.url + "/v1/completions", json=body).status_code == 401


def test_v14_refusals_are_all_the_same(guarded: LiveServer) -> None:
    answers = set()
    for header in ({}, {"authorization": "Bearer first-ke"}, {"authorization": "Bearer x"}):
        answers.add(httpx.get(guarded.url + "/v1/models", headers=header).text)
    assert len(answers) == 1


def test_b65_a_bad_key_is_refused_before_the_body(guarded: LiveServer) -> None:
    answer = guarded.send(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
        b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"100 Continue" not in answer


def test_v16_a_host_header_cannot_open_a_path(guarded: LiveServer) -> None:
    for host in ("localhost/health/live?", "localhost#", "localhost/health/live"):
        answer = guarded.send(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 400")


def test_other_addresses_need_a_key(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="without an API key"):
        ServerConfig.resolve({"host": "0.0.0.0"}, tmp_path)
    ServerConfig.resolve({"host": "0.0.0.0", "allow_unauthenticated": True}, tmp_path)
    (tmp_path / "keys").write_text("k\n")
    ServerConfig.resolve({"host": "0.0.0.0", "api_key_file": tmp_path / "keys"}, tmp_path)


def test_settings_show_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTPURBO_API_KEY", "hush-hush")
    monkeypatch.setenv("RTPURBO_PORT", "1234")
    config = ServerConfig.resolve({}, tmp_path)
    assert config.keys() == ("hush-hush",)
    assert config.port == 1234
    assert ServerConfig.resolve({"port": 99}, tmp_path).port == 99, "flags win"
    assert "hush-hush" not in config.describe() + repr(config)


@pytest.mark.parametrize("text", [None, "", "\n \n"], ids=["missing", "empty", "blank"])
def test_key_files_that_hold_no_key(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="api_key_file"):
        ServerConfig.resolve({"api_key_file": path}, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("port", 70000), ("max_num_seqs", 0), ("dtype", "int4"), ("nonsense", 1)]
)
def test_bad_settings_are_named(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        ServerConfig.resolve({name: value}, tmp_path)


def test_open_metrics_open_metrics_alone(tmp_path: Path) -> None:
    with live_server(tmp_path / "model", api_key="key", open_metrics=True) as server:
        assert httpx.get(server.url + "/metrics").status_code == 200
        assert httpx.get(server.url + "/v1/models").status_code == 401


def test_keys_rotate_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be used leaves the keys before it valid; nothing ever opens the server."""
    path, clock = tmp_path / "keys", [0.0]
    path.write_text("old\n")
    file = KeyFile(path, lambda: clock[0])

    def after(change: Callable[[], object]) -> tuple[str, ...]:
        change()
        assert file.keys() == before, "looked at once a second at most"
        clock[0] += LOOK_SECONDS
        return file.keys()

    before = file.keys()
    assert after(lambda: None) is before
    before = after(lambda: path.write_text("old\nnew\n"))
    assert before == ("old", "new")
    for spoil in (
        lambda: path.write_text("\n \n"),
        lambda: path.write_bytes(b"\xff\xfe\x00"),
        path.unlink,
        path.mkdir,
    ):
        caplog.clear()
        assert after(spoil) is before
        assert "the keys before stay valid" in caplog.text
        assert "new" not in caplog.text
        caplog.clear()
        assert after(lambda: None) is before
        assert not caplog.text, "said once"
    path.rmdir()
    (tmp_path / "target").write_text("linked\n")
    assert after(lambda: path.symlink_to(tmp_path / "target")) == ("linked",)


def test_a_ring_follows_its_keys() -> None:
    keys: list[tuple[str, ...]] = [("old",)]
    ring = KeyRing(lambda: keys[-1])

    def status(key: str) -> int:
        headers = [(b"authorization", f"Bearer {key}".encode())]
        try:
            ring.check({"path": "/v1/models", "headers": headers})
        except ApiError as error:
            return error.status
        return 200

    assert status("old") == 200
    keys.append(("new", "other"))
    assert [status(key) for key in ("old", "new", "other")] == [401, 200, 200]
