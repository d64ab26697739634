"""Redis addresses, and why a Redis cannot be used: each named, without any part of a password."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import trustme
from hypothesis import example, given
from hypothesis import strategies as st

import control
import router
from pulse_railway import options
from pulse_railway.app.session import RailwaySessionStore
from pulse_railway.errors import Failure
from pulse_railway.output import Output
from tests.conftest import ROOT, Process, Redis
from tests.net import Backend, ask, eventually, ok

Run = Callable[..., Process]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://host", None),
        ("rediss://default:p%23ss@host.example:6380/1?ssl_cert_reqs=none", None),
        ("redis://[::1]:6379", None),
        ("redis://:p#ss@host:6379", "percent-encoded"),
        ("redis://u:p/ss@host:6379", "percent-encoded"),
        ("redis://u:p?ss@host", "percent-encoded"),
        ("redis://u:p@ss@host", "percent-encoded"),
        ("redis://u:pass@host:port", "or its port is no number"),
        ("redis://u:pass@host:70000", "or its port is no number"),
        ("redis://host:6379/0#x", "it must be redis://[user:password@]host[:port][/number]"),
        ("redis://host:6379/0 ", "it must be redis://"),
        ("host:6379", "it must begin with redis:// or rediss://"),
        ("http://host", "it must begin with redis:// or rediss://"),
        ("redis+sentinel://u:pass@host:26379/mymaster", "Sentinel is not supported"),
        ("redis://default:pass@:6379", "it names no host"),  # a reference that rendered empty
        ("redis://", "it names no host"),
        ("redis:///0", "it names no host"),
        ('"redis://u:pass@host"', "it is in quotes"),
        ("redis://u:pass@host'", "it is in quotes"),
    ],
)
def test_an_address_is_right_or_says_what_is_wrong(url: str, says: str | None) -> None:
    problem = router.redis_problem(url)
    assert says in problem if says and problem else problem is None
    if problem:
        assert "pass" not in problem.replace("password", "")
    else:
        redis.Redis.from_url(url)


PASSWORDS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=20)


@given(PASSWORDS, st.sampled_from(["redis://u:{}@host:6379", "redis://{}", "{}", "rediss://:{}@"]))
@example("a#bcdefgh", "redis://u:{}@host:6379")
def test_no_part_of_a_password_is_told(password: str, shape: str) -> None:
    url = shape.format(password)
    told = [router.redis_problem(url) or ""]
    with pytest.raises(Failure) as failed:
        options.parse_baseline({"app": "examples/railway/main.py", "redis_url": url}, Output())
        raise Failure("")  # the address is one
    told.append(str(failed.value))
    with pytest.raises(RuntimeError) as refused:
        _ = RailwaySessionStore.from_url(url).client
        raise RuntimeError("")  # redis-py takes it
    assert refused.value.__cause__ is None
    told.append(str(refused.value))
    known = "--redis-url is wrong: " + " ".join(told)
    parts = {password[i : i + 5] for i in range(len(password) - 4)}
    ours = "redis://[user:password@]host[:port][/number] rediss:// percent-encoded Sentinel"
    assert not [part for part in parts if part in known and part not in ours and part not in WORDS]


WORDS = " ".join(
    filter(
        None,
        (router.redis_problem(u) for u in ("x", "redis://", "'", "redis://a@b@c", "redis://h#")),
    )
)


def test_a_router_with_a_wrong_address_says_so_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "router.py")],
        env={"REDIS_URL": "redis://u:s3cr#t@host:6379", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"the Redis address is wrong: a character of its password .*\n", done.stderr
    )
    assert "s3c" not in done.stderr


# -- a Redis that cannot be used -----------------------------------------------------------------


@pytest.fixture
def with_password(redis_server: Redis) -> Iterator[Redis]:
    redis_server.client.config_set("requirepass", "s3cret-pass")
    client = redis.Redis.from_url(redis_server.url.replace("redis://", "redis://:s3cret-pass@"))
    yield redis_server
    client.config_set("requirepass", "")


def why(url: str) -> str:
    try:
        router.RedisStore(url, "pulse:railway").client.ping()
    except (redis.RedisError, OSError) as error:
        return router.redis_cause(error)
    return "it answers"


def test_the_cause_is_named(with_password: Redis) -> None:
    good = with_password.url
    right = good.replace("redis://", "redis://:s3cret-pass@")
    assert why(right) == "it answers"
    for wrong in (good, good.replace("redis://", "redis://:s3cret-wrong@")):  # rotated
        assert why(wrong) == "it refuses the password"
    client = redis.Redis.from_url(right)
    client.acl_setuser("app", enabled=True, passwords=["+app-pass"], keys=["x"], commands=["+get"])
    assert why(good.replace("redis://", "redis://app:app-pass@")) == "its user may not do this"
    client.acl_deluser("app")
    assert why("redis://127.0.0.1:9") == "it refuses connections"
    assert why("redis://no-such-host.invalid") == "its name is not known"


def test_a_certificate_that_is_not_trusted() -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(4):
                with contextlib.suppress(OSError):
                    context.wrap_socket(server.accept()[0], server_side=True)

        threading.Thread(target=serve, daemon=True).start()
        url = f"rediss://127.0.0.1:{server.getsockname()[1]}"
        assert why(url) == "its certificate is not trusted"
        # a private CA is in the address, as docs/operating.md has it
        pem = authority.cert_pem.bytes().decode()
        url += f"?ssl_ca_data={urllib.parse.quote(pem, safe='')}"
        assert router.redis_problem(url) is None
        assert why(url) == "ConnectionError"  # this server ends the connection


def test_the_router_and_control_name_it(
    with_password: Redis, run_router: Run, monkeypatch: Any, capsys: Any
) -> None:
    url = with_password.url.replace("redis://", "redis://:s3cret-wrong@")
    started = run_router(with_password, REDIS_URL=url)
    line = "routing state unreadable (it refuses the password); trying again"
    eventually(lambda: line in started.output())
    assert "s3cret" not in started.output()
    env = {"REDIS_URL": url, "RAILWAY_SERVICE_ID": "r"}
    answer = control.carry_out(["active"], env)
    assert answer["error"] == "the router's Redis does not answer (it refuses the password)"


def test_the_acl_in_the_docs_suffices(redis_server: Redis, run_router: Run) -> None:
    line = re.search(r"`(ACL SETUSER .*?)`", (ROOT / "docs" / "operating.md").read_text())
    assert line
    client = redis_server.client
    client.execute_command(*line[1].replace("PASSWORD", "app-pass").split())
    url = redis_server.url.replace("redis://", "redis://pulse:app-pass@")
    try:
        with Backend(ok(b"a")) as a:
            redis_server.deployment("a", a.address)
            started = run_router(redis_server, REDIS_URL=url)
            eventually(lambda: ask(started.port).body == b"a")
            store = router.RedisStore(url, "pulse:railway")
            store.apply(lambda routing: control.set_active(routing, "a", "a", []))
            eventually(lambda: bool(control.reports(store)))
            state = control.status_answer(store, "", None)
            assert (state["active"], state["redis"]["save"] is None) == ("a", False)
            assert started.output() == ""
            with pytest.raises(redis.exceptions.NoPermissionError):
                store.client.get("another:key")
    finally:
        client.acl_deluser("pulse")
