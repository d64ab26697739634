"""The router's background tasks: one that ends is started again, or the process is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pulse_railway.local.supervisor import free_port
from tests.conftest import ROOT, Process, Redis
from tests.net import Backend, Connection, ask, eventually, listens, ok

BROKEN = """
import asyncio, router
real, ended = router.{task}, []
async def {name}(*arguments):
    if len(ended) < {times}:
        ended.append(1)
        {how}
    await real(*arguments)
router.{task} = {name}
raise SystemExit(router.main([]))
"""


def run(
    start: Callable[..., Process],
    python: Path,
    server: Redis,
    task: str,
    times: int,
    how: str = "raise RuntimeError('secret-text')",
) -> Process:
    """A router, whose background task ends so many times before it does its work."""
    script = BROKEN.format(task=task, name=task.rpartition(".")[2], times=times, how=how)
    port = free_port()
    env = {"PORT": str(port), "HOST": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    return start([str(python), "-c", script], port, env | {"REDIS_URL": server.url})


def test_a_task_that_ends_is_started_again(
    start: Callable[..., Process], router_python: Path, redis_server: Redis
) -> None:
    with Backend(ok(b"a")) as a:
        redis_server.deployment("a", a.address)
        router = run(start, router_python, redis_server, "Table.follow", 2)
        eventually(lambda: ask(router.port).body == b"a")
        said = router.output()
        assert said.count("the task `routing state` has ended, and starts again: RuntimeError") == 2
        assert "in follow" in said  # where it was
        assert "secret-text" not in said  # its message can hold one


def test_one_that_returns_has_ended_too(
    start: Callable[..., Process], router_python: Path, redis_server: Redis
) -> None:
    with Backend(ok(b"a")) as a:
        redis_server.deployment("a", a.address)
        router = run(start, router_python, redis_server, "close_overdue", 1, "return")
        eventually(lambda: ask(router.port).body == b"a")
        eventually(lambda: "the task `timeouts` has ended" in router.output())
        assert "it returned" in router.output()


def test_three_times_in_a_minute_ends_the_process(
    start: Callable[..., Process], router_python: Path, redis_server: Redis
) -> None:
    """In order, and with a status that makes Railway start it again: requests are finished."""

    def slow(c: Connection) -> None:
        while c.head():
            c.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab")
            eventually(lambda: not listens(router.port))
            c.send(b"cd")

    with Backend(handle=slow) as a:
        redis_server.deployment("a", a.address)
        router = run(start, router_python, redis_server, "close_overdue", 3)
        eventually(lambda: ask(router.port, "/healthz").status == 200)
        answer = ask(router.port)
        assert (answer.status, answer.body) == (200, b"abcd")
        assert router.popen.wait(10) == 1
        said = router.output()
        assert said.count("the task `timeouts` has ended") == 3
        assert "the task `timeouts` cannot be kept running: this router ends" in said
        # it has ended as by SIGTERM
        assert not list(redis_server.client.scan_iter("pulse:railway:router:*"))
