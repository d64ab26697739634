"""Previews: what the routing state holds of them, and who reaches them through a router.

A real Redis, real routers and backends; the janitor's calls to Railway alone are stood in for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse_railway import contract, runtime_image
from pulse_railway.flows import preview as flow
from tests.conftest import Process
from tests.net import Answer, Backend, ask, eventually, header, headers, ok
from tests.scene import Site, up

router: Any = runtime_image.load("router")
control: Any = runtime_image.load("control")
janitor: Any = runtime_image.load("janitor")

Run = Callable[..., Process]
NOW = 1_800_000_000.0
KEY = "k" * 43
HASH = hashlib.sha256(KEY.encode()).hexdigest()
OTHER = "K" * 43
ID = "pr-12"
TICKET = f"{ID}.{KEY}"
COOKIE = f"cookie: a=b; __Host-pulse_preview={TICKET}; c=d"
TOKEN = "internal-token"


def parse(state: dict[str, Any]) -> Any:
    return router.parse(
        {k: v if isinstance(v, str) else json.dumps(v) for k, v in state.items()}, NOW
    )


def with_preview(routing: Any = None, **more: Any) -> Any:
    fields = {"service_name": ID, "service_id": "s-12", "preview": HASH, **more}
    return control.add_record(routing or parse({":active": "a"}), ID, **fields)


# -- the routing state ---------------------------------------------------------------------------


def test_a_preview_lies_under_a_key_of_its_own() -> None:
    empty = parse({":active": "a", ":store": "s"})
    change = router.changes(empty, with_preview(empty))
    assert set(change) == {":preview:pr-12", ":epoch"}
    stored = json.loads(change[":preview:pr-12"])
    assert (stored["preview"], stored["state"], stored["held"]) == (HASH, "pending", True)
    again = parse({":active": "a", ":preview:pr-12": stored})
    assert again.records[ID].preview == HASH
    assert router.changes(again, again) == {}


def test_a_promotion_makes_it_an_ordinary_record() -> None:
    before = with_preview()
    for step in (
        lambda r: control.set_active(r, ID, ID, []),
        lambda r: control.set_canary_weight(r, ID, ID, 5.0),
    ):
        after = step(before)
        change = router.changes(before, after)
        assert change[":preview:pr-12"] is None
        assert "preview" not in json.loads(change[":deployment:pr-12"])
        assert not after.records[ID].is_preview
    gone = control.delete_record(before, ID)
    assert router.changes(before, gone)[":preview:pr-12"] is None


def test_a_preview_is_not_made_ordinary_by_a_second_registration() -> None:
    before = with_preview()
    with pytest.raises(control.StateError, match="pr-12 is a preview"):
        control.add_record(before, ID, ID, service_id="s-12")
    assert not control.add_record(before, ID, ID, service_id="s-13").records[ID].is_preview


@pytest.mark.parametrize("stored", ["", "{", '{"preview": "abc"}', '{"preview": 5}', "{}"])
def test_an_invalid_preview_is_opened_by_no_key(stored: str) -> None:
    record = parse({":preview:pr-12": stored}).records[ID]
    assert (record.is_preview, record.preview) == (True, "")
    assert record.key == ":preview:pr-12"


def test_an_older_promotion_wins_over_the_record_of_the_preview() -> None:
    """An earlier control knows no previews, and writes an ordinary record beside one."""
    ordinary = {"deployment_id": ID, "state": "pending", "service_name": ID, "preview": HASH}
    both = {":preview:pr-12": {"preview": HASH}, ":deployment:pr-12": ordinary}
    for state in (both, dict(reversed(both.items()))):
        assert not parse(state).records[ID].is_preview
    assert not parse({":active": ID, ":preview:pr-12": {"preview": HASH}}).records[ID].is_preview


def test_a_lost_preview_is_written_back_as_a_preview() -> None:
    known = parse(
        {":active": "a", ":store": "s", ":epoch": "5", ":preview:pr-12": {"preview": HASH}}
    )
    for state in ({}, {":active": "a", ":store": "s", ":epoch": "4"}):
        store = parse(state)
        change = router.changes(store, router.repaired(store, known, "new"))
        assert json.loads(change[":preview:pr-12"])["preview"] == HASH
        assert ":deployment:pr-12" not in change
    same = parse({":active": "a", ":store": "s", ":epoch": "5"})
    assert ID not in router.repaired(same, known, "new").records
    assert router.repaired(same, known, "new", {ID}).records[ID].preview == HASH


def test_a_snapshot_does_not_close_what_was_promoted_since() -> None:
    before = replace(with_preview(), store_id="s", epoch=4, promoted=router.Promotion("a", 5.0))
    after = replace(control.set_active(before, ID, ID, []), epoch=5)
    healed = router.repaired(before, after, "new")
    assert (healed.active, healed.records[ID].is_preview) == (ID, False)
    assert router.changes(before, healed)[":preview:pr-12"] is None


def test_previews_are_no_fallback_and_no_target_of_a_rollback() -> None:
    state = {":active": "a", ":deployment:a": {"state": "active", "registered_at": 9}}
    routing = parse({**state, ":preview:pr-12": {"preview": HASH, "registered_at": 5}})
    assert (routing.fallback, routing.canary, routing.baking) == (None, None, None)
    running = {"a", ID}
    assert janitor.Retention(60, 900, 5).rollback_targets(routing, running) == set()


def test_a_rebuilt_state_has_previews_as_previews() -> None:
    found = [
        router.Record("a", service_name="a", service_id="1"),
        router.Record(ID, "pending", service_name=ID, service_id="2", pinned=True, preview=HASH),
    ]
    rebuilt = control.rebuild_records(parse({}), found, "a")
    assert (rebuilt.records[ID].preview, rebuilt.records[ID].state) == (HASH, "pending")
    chosen = control.rebuild_records(parse({}), found, ID)
    assert not chosen.records[ID].is_preview


# -- through the router --------------------------------------------------------------------------


class Gate:
    """A router before `new` (active), `old` (draining) and the preview."""

    def __init__(self, site: Site, process: Process, backend: Backend) -> None:
        self.site, self.process, self.backend = site, process, backend

    def ask(self, target: str = "/", *lines: str, **more: Any) -> Answer:
        return ask(self.process.port, target, *lines, **more)

    def got(self, target: str = "/", *lines: str) -> str | None:
        return self.ask(target, *lines).header("x-pulse-selected-deployment")


@pytest.fixture
def gate(site: Site, run_router: Run) -> Any:
    with Backend(ok(b"preview")) as backend:
        process = up(run_router(site.server, PULSE_RAILWAY_INTERNAL_TOKEN=TOKEN))
        words = ["--deployment-id", ID, "--service-id", "s-12", "--preview", HASH]
        assert site.control("register", *words, backend=backend) == 0
        yield Gate(site, process, backend)


def test_who_reaches_a_preview(gate: Gate) -> None:
    affinity = f"/?pulse_deployment={ID}"
    # with the key: by cookie without affinity, its assets included; by a header; with affinity
    assert gate.got("/", COOKIE) == ID
    assert gate.got("/assets/app.js", COOKIE) == ID
    assert gate.got("/", f"x-pulse-preview: {TICKET}") == ID
    assert gate.got(affinity, COOKIE) == ID
    assert gate.got("/", COOKIE, f"x-pulse-deployment: {ID}") == ID
    assert gate.got(affinity, f"x-pulse-railway-internal-token: {TOKEN}") == ID
    answer = gate.ask("/", COOKIE)
    assert answer.body == b"preview"
    assert answer.header("cache-control") == "private"
    gate.backend.answer = ok(b"preview", "cache-control: public, max-age=9")
    for path in ("/", "/assets/app.js"):  # one line: a cache may read only the first
        assert headers(gate.ask(path, COOKIE).head, "cache-control") == ["private, max-age=9"]
    # a tab of another version stays where it is
    assert gate.got("/?pulse_deployment=old", COOKIE) == "old"
    # and what is gone is gone
    assert gate.ask("/?pulse_deployment=gone", COOKIE).status == 409
    # without: what everybody gets
    assert gate.got("/") == "new"
    for line in (
        f"cookie: __Host-pulse_preview={ID}.{OTHER}",
        f"cookie: pulse_preview={TICKET}",
        f"cookie: x__Host-pulse_preview={TICKET}",
        f"cookie: __Host-pulse_preview={ID}.{HASH}",
        f"cookie: __Host-pulse_preview=pr-13.{KEY}",
        f"cookie: __Host-pulse_preview={TICKET}x",
        f"x-pulse-preview: {ID}.{OTHER}",
        f"x-pulse-preview: {TICKET}x",
        "x-pulse-preview: ",
        f"x-pulse-railway-internal-token: {TOKEN}",
    ):
        assert gate.got("/", line) == "new", line
        if TOKEN not in line:
            assert gate.ask(affinity, line).status == 409, line


def shape(answer: Answer) -> tuple[int, bytes, list[str]]:
    """Return all of an answer but its date."""
    lines = answer.head.decode("latin-1").split("\r\n")
    kept = [line for line in lines if not line.lower().startswith("date:")]
    return answer.status, answer.body, kept


PAGE = ("accept: text/html", "sec-fetch-mode: navigate")


FORMS = ("/a?x=1&pulse_deployment={}&y", "/a?pulse_preview={}." + OTHER, "/?pulse_preview={}")


def test_without_the_key_the_answer_is_that_of_an_unknown_id(gate: Gate) -> None:
    headers = ((), PAGE, ("origin: https://a.example",), ("upgrade: x",))
    for form, method, lines in itertools.product(
        FORMS, ("GET", "HEAD", "POST", "OPTIONS"), headers
    ):
        preview, unknown, gone = (
            gate.ask(form.format(name), *lines, method=method) for name in (ID, "pr-13", "old-1")
        )
        assert shape(preview) == shape(unknown) == shape(gone), (form, method, lines)
        assert preview.header("x-pulse-selected-deployment") is None
        assert gate.backend.heads == []


def test_a_wrong_key_takes_as_long_as_an_unknown_id(gate: Gate) -> None:
    """A rough look from outside; the comparison itself is hmac.compare_digest."""

    def seconds(name: str) -> float:
        began = time.perf_counter()
        gate.ask("/", f"x-pulse-preview: {name}.{OTHER}")
        return time.perf_counter() - began

    known, unknown = [], []
    for _ in range(150):
        known.append(seconds(ID))
        unknown.append(seconds("pr-13"))
    ratio = statistics.median(known) / statistics.median(unknown)
    assert 0.7 < ratio < 1.4


def test_requests_without_a_key_cost_one_look_at_the_headers(monkeypatch: Any) -> None:
    """While there is a preview, every request of every visitor is asked for its key."""
    looks = []

    class Fields(list[Any]):
        def __iter__(self) -> Any:
            looks.append(1)
            return super().__iter__()

    class Request:
        affinity_id, query = b"", b"a=b"
        fields = Fields([(b"Cookie", b"cookie", b"a=b"), (b"Host", b"host", b"x")])

        def values(self, field: bytes) -> list[bytes]:
            return [value for _, name, value in self.fields if name == field]

    preview = router.Deployment(ID, "pending", "h", 1, b"", key_hash=HASH)
    monkeypatch.setattr(router.TABLE, "previews", {ID.encode(): preview})
    request: Any = Request()
    assert router.preview_of(request) is None
    assert len(looks) == 1
    key = (b"", b"cookie", COOKIE.partition(": ")[2].encode())
    request.fields.append(key)
    assert router.preview_of(request) is preview
    request.fields.append((b"", b"x-pulse-preview", b""))  # the header comes first, if it is there
    assert router.preview_of(request) is None


def test_the_link_sets_a_cookie_and_leaves_the_address(gate: Gate) -> None:
    answer = gate.ask(f"/a%2Fb//c;d?x=%41&pulse_preview={TICKET}&y=&&z=1")
    assert answer.status == 302
    assert answer.header("location") == "/a%2Fb//c;d?x=%41&y=&&z=1"
    cookie = str(answer.header("set-cookie"))
    assert cookie.split("; ")[0] == f"__Host-pulse_preview={TICKET}"
    assert set(cookie.split("; ")[1:]) == {"Path=/", "Secure", "HttpOnly", "SameSite=Lax"}
    assert answer.header("cache-control") == "no-store"
    assert answer.header("referrer-policy") == "no-referrer"
    assert gate.ask(f"/?pulse_preview={TICKET}").header("location") == "/"
    assert gate.ask(f"/?pulse_deployment=old&pulse_preview={TICKET}").header("location") == "/"
    # a link without a key ends the preview
    end = gate.ask("/x?pulse_preview=", COOKIE)
    assert (end.status, end.header("location")) == (302, "/x")
    assert "Max-Age=0" in str(end.header("set-cookie"))
    # no browser is sent to another host, and nothing but a link is followed
    for target in ("//evil.example/?", "/\\evil.example/?"):
        hostile = gate.ask(f"{target}pulse_preview={TICKET}")
        assert (hostile.status, hostile.header("location")) == (409, None), target
    posted = gate.ask(f"/?pulse_preview={TICKET}", method="POST", body=b"x")
    assert (posted.status, posted.header("set-cookie")) == (409, None)
    # the key of a link reaches no backend
    assert not [
        head for b in (gate.site.new, gate.backend) for head in b.heads if b"pulse_preview=" in head
    ]


def test_a_link_works_no_more_than_an_unknown_one_where_no_preview_exists(
    site: Site, run_router: Run
) -> None:
    process = up(run_router(site.server))
    answer = ask(process.port, f"/x?pulse_preview={TICKET}", *PAGE)
    assert (answer.status, answer.header("location")) == (302, "/x")
    assert answer.header("set-cookie") is None
    assert ask(process.port, f"/x?pulse_preview={TICKET}").status == 409


def test_a_socket_of_a_preview_needs_the_key(gate: Gate) -> None:
    handshake = (
        "connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13",
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
    )  # fmt: skip
    target = f"/socket.io/?pulse_deployment={ID}"
    assert gate.ask(target, *handshake).status == 409
    assert not gate.backend.heads
    assert gate.ask(target, *handshake, COOKIE).header("x-pulse-selected-deployment") == ID
    # with the reload opt-in a stranger gets the active one, which tells the tab to reload
    reloading = f"{target}&pulse_reload_on_stale_affinity=1"
    assert gate.got(reloading, *handshake) == "new"


def test_other_versions_never_get_a_previews_answer(gate: Gate) -> None:
    """Neither an asset nor a route of a preview, nor a page while the active one is down."""
    gate.site.new.answer = gate.site.old.answer = ok(b"", status="404 Not Found")
    gate.backend.answer = ok(b"secret")
    assert gate.ask("/assets/secret.js").status == 404
    reload = ok(b"", "x-remix-reload-document: true", status="204 No Content")
    gate.site.new.answer = gate.site.old.answer = reload
    assert gate.ask("/__manifest?version=1").status == 204
    gate.site.new.stop()
    assert gate.got("/") == "old"
    gate.site.old.stop()
    assert gate.ask("/").status == 502
    assert gate.backend.heads == []


def test_nothing_stands_in_for_a_preview(gate: Gate) -> None:
    gate.backend.stop()
    for target in ("/", "/assets/app.js"):
        answer = gate.ask(target, COOKIE)
        assert (answer.status, answer.header("x-pulse-selected-deployment")) == (502, ID)


def test_maintenance_closes_a_preview_too(gate: Gate) -> None:
    gate.site.control("maintenance", "on")
    eventually(lambda: gate.ask("/").status == 503)
    assert gate.ask("/", COOKIE).status == 503
    assert gate.ask(f"/?pulse_preview={TICKET}").status == 503


def test_a_promoted_preview_is_an_ordinary_version(gate: Gate) -> None:
    gate.site.promote(ID)
    assert gate.got("/") == ID
    answer = gate.ask("/", COOKIE)
    assert (answer.header("cache-control"), answer.header("set-cookie")) == (None, None)
    gate.site.promote("new")
    assert gate.got(f"/?pulse_deployment={ID}") == ID
    assert ":preview:pr-12" not in gate.site.state
    assert gate.site.record(ID)["state"] == "draining"


def test_a_preview_whose_record_is_lost_stays_closed(gate: Gate, run_router: Run) -> None:
    gate.site.server.client.delete("pulse:railway:preview:pr-12")
    gate.site.store.announce()
    second = up(run_router(gate.site.server))
    for process in (gate.process, second):
        assert ask(process.port, f"/?pulse_deployment={ID}").status == 409
    assert ask(second.port, "/", COOKIE).header("x-pulse-selected-deployment") == "new"
    assert gate.got("/", COOKIE) == ID  # the router that knows it goes on


def test_a_deleted_preview_is_gone(gate: Gate) -> None:
    assert gate.site.control("retire", "--deployment-id", ID) == 0
    eventually(lambda: gate.got("/", COOKIE) == "new")
    assert gate.site.control("delete", "--deployment-id", ID) == 0
    assert ":preview:pr-12" not in gate.site.state
    assert gate.ask(f"/?pulse_deployment={ID}", COOKIE).status == 409


def test_a_router_looks_a_preview_up_that_it_does_not_know(gate: Gate) -> None:
    """A tab's request can come to a router that an announcement has not reached."""
    record = {**json.loads(gate.site.state[":preview:pr-12"]), "deployment_id": "pr-13"}
    gate.site.server.client.set("pulse:railway:preview:pr-13", json.dumps(record))
    target, cookie = "/?pulse_deployment=pr-13", COOKIE.replace(ID, "pr-13")
    assert gate.got(target, cookie) == "pr-13"
    assert gate.ask(target).status == 409


def test_a_registration_waits_for_the_routers(gate: Gate) -> None:
    """So that the link works at once."""
    words = ["--deployment-id", "pr-13", "--service-name", "pr-13", "--preview", HASH]
    answer = control.carry_out(["register", *words], {"REDIS_URL": gate.site.server.url})
    (report,) = answer["routers"]
    assert (answer["behind"], report["epoch"]) == ([], gate.site.store.read().epoch)


def test_a_router_that_starts_finds_the_previews(gate: Gate, run_router: Run) -> None:
    process = up(run_router(gate.site.server))
    eventually(lambda: ask(process.port, "/", COOKIE).body == b"preview")


def test_status_and_history_of_a_preview(gate: Gate) -> None:
    state = control.status_answer(gate.site.store, "", None)
    (row,) = [r for r in state["deployments"] if r["deployment_id"] == ID]
    assert (row["preview"], row["state"], state["previews"]) == (True, "pending", True)
    assert HASH not in json.dumps(state)
    entry = gate.site.store.read().history[-1]
    assert (entry["what"], entry["deployment_id"]) == ("preview", ID)
    assert KEY not in json.dumps(gate.site.state)


def test_the_hash_of_a_registration_is_checked(site: Site, capsys: Any) -> None:
    words = ["--deployment-id", ID, "--service-name", ID, "--preview", "abc"]
    assert site.control("register", *words) == 1
    assert "--preview cannot be" in capsys.readouterr().err


def test_who_reaches_the_other_versions(gate: Gate) -> None:
    """The table of SECURITY.md: by its id everybody reaches what runs; what is retired, nobody."""
    site = gate.site
    by_id = "/?pulse_deployment={}".format
    with Backend(ok(b"held")) as backend:
        words = ["--deployment-id", "held", "--service-id", "s-held", "--hold"]
        assert site.control("register", *words, backend=backend) == 0
        assert (gate.got(by_id("held")), gate.got(by_id("old"))) == ("held", "old")
        site.promote("held", "--weight", "1")
        assert gate.got(by_id("held")) == "held"
        site.promote("held")
        site.promote("new", "--instead-of", "held", "--rolls-back")
        assert site.record("held")["rejected_at"]
        assert gate.got(by_id("held")) == "held"
        assert site.control("retire", "--deployment-id", "held") == 0
        assert gate.ask(by_id("held")).status == 409


def test_backends_see_the_cookie_as_they_see_all_others(gate: Gate) -> None:
    gate.ask("/", COOKIE)
    assert header(gate.backend.heads[-1], "cookie") == COOKIE.partition(": ")[2]
    gate.ask("/?pulse_deployment=old", COOKIE)
    assert header(gate.site.old.heads[-1], "cookie") == COOKIE.partition(": ")[2]


# -- a request, without sockets ------------------------------------------------------------------


class Asking:
    """As much of a router's Request as these functions read."""

    def __init__(self, query: bytes = b"", **fields: bytes) -> None:
        self.query, self.url, self.method = query, b"/?" + query, b"GET"
        self.fields = [(b"", k.replace("_", "-").encode(), v) for k, v in fields.items()]
        self.affinity_id, self.handshake, self.has_body = b"", False, False
        self.path = b"/"

    def values(self, field: bytes) -> list[bytes]:
        return [value for _, name, value in self.fields if name == field]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.from_regex(rb"[a-z0-9-]{1,30}\.[A-Za-z0-9_-]{40,46}", fullmatch=True),
    )
)
def test_nothing_but_the_key_opens_a_preview(text: bytes) -> None:
    table = router.Table({})
    table.take_over(with_preview())
    before, router.TABLE = router.TABLE, table
    try:
        for asking in (
            Asking(x_pulse_preview=text),
            Asking(cookie=b"__Host-pulse_preview=" + text),
        ):
            assert router.preview_of(asking) is None
        assert router.open_preview(text) is None
        assert router.open_preview(TICKET.encode()).id == ID
    finally:
        router.TABLE = before


def test_a_request_makes_at_most_one_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    table = router.Table({})
    table.take_over(with_preview())
    monkeypatch.setattr(router, "TABLE", table)
    digests = []
    real = router.hashlib
    counting = SimpleNamespace(sha256=lambda data: digests.append(data) or real.sha256(data))
    monkeypatch.setattr(router, "hashlib", counting)
    wrong = f"__Host-pulse_preview={ID}.{OTHER}; ".encode() * 900
    began = time.perf_counter()
    assert router.preview_of(Asking(cookie=wrong)) is None
    assert (len(digests), time.perf_counter() - began < 0.05) == (1, True)
    assert router.open_preview(f"pr-13.{KEY}".encode()) is None  # an unknown id costs the same
    assert digests.pop() == KEY.encode()
    long = b"__Host-pulse_preview=" + b"a" * 60_000
    assert router.preview_of(Asking(cookie=long)) is None
    assert len(digests) == 1


def test_the_names_and_the_hash_are_the_clis() -> None:
    names = "PREVIEW_QUERY PREVIEW_HEADER PREVIEW_COOKIE".split()
    assert [getattr(router, n) for n in names] == [getattr(contract, n) for n in names]
    assert janitor.PREVIEW == contract.PREVIEW
    assert flow.hash_of(KEY) == HASH
    keys = {flow.new_key() for _ in range(50)}
    assert len(keys) == 50
    assert all(router.PREVIEW_KEY.fullmatch(f"{ID}.{key}".encode()) for key in keys)


# -- the janitor ---------------------------------------------------------------------------------


class OnRailway:
    """The calls of janitor.Railway that a run makes."""

    def __init__(self, *services: Any, promoted: Any = None) -> None:
        self.inventory = janitor.Inventory(list(services), "id-router", promoted)
        self.deleted: list[str] = []
        self.set: dict[str, dict[str, str]] = {}

    def set_variables(self, service_id: str, values: dict[str, str]) -> None:
        self.set[service_id] = values

    def delete(self, service: Any) -> bool:
        self.deleted.append(service.deployment)
        return True


def on_railway(name: str, preview: str | None = None, age: float = 7200, **more: Any) -> Any:
    fields = {"ours": True, "preview": preview, **more}
    return janitor.Backend(f"s-{name}", name, name, age, "SUCCESS", **fields)


def clean_up(site: Site, *services: Any, promoted: Any = None) -> tuple[Any, OnRailway]:
    railway = OnRailway(on_railway("new"), *services, promoted=promoted)
    store = site.store
    limits = janitor.Retention(1e9, 1e9)
    report = janitor.clean_up(store, railway, store.read(), railway.inventory, "token", limits)
    return report, railway


def aged(site: Site, seconds: float) -> None:
    def step(routing: Any) -> Any:
        record = replace(routing.records[ID], registered_at=routing.now - seconds)
        return control.with_records(routing, record)

    site.store.apply(step)


def test_the_janitor_keeps_a_preview_and_its_record(gate: Gate) -> None:
    site = gate.site
    aged(site, 90 * 86_400)
    report, railway = clean_up(site, on_railway(ID, HASH), on_railway("old"))
    assert (railway.deleted, report.kept[ID]) == ([], "a preview")
    # its record is lost: restored as a preview, not as something that answers everybody
    gate.process.stop()
    site.server.client.delete("pulse:railway:preview:pr-12")
    report, railway = clean_up(site, on_railway(ID, HASH), on_railway("old"))
    assert (railway.deleted, report.kept[ID][:40]) == (
        [],
        "no record named it: a preview, as it was",
    )
    record = site.store.read().records[ID]
    assert (record.preview, record.state, record.pinned) == (HASH, "pending", True)
    assert ":deployment:pr-12" not in site.state
    # the state is lost
    site.server.client.flushall()
    report, railway = clean_up(
        site, on_railway(ID, HASH), on_railway("old"), promoted=router.Promotion("new", 5.0)
    )
    assert report.restored == "new"
    assert site.store.read().records[ID].preview == HASH
    assert ":deployment:pr-12" not in site.state
    # with a hash that is none, no key opens it
    site.server.client.delete("pulse:railway:preview:pr-12")
    clean_up(site, on_railway(ID, ""), on_railway("old"))
    assert site.store.read().records[ID].preview == ""
    # Railway's service was deleted by hand
    gate.backend.stop()
    aged(site, 300)
    clean_up(site, on_railway("old"))
    assert ID not in site.store.read().records


def test_the_janitor_releases_a_preview_that_an_earlier_version_has_promoted(gate: Gate) -> None:
    gate.site.promote(ID, "--weight", "5")
    _, railway = clean_up(gate.site, on_railway(ID, HASH), on_railway("old"))
    assert railway.set["s-pr-12"]["PULSE_RAILWAY_PREVIEW"] == ""
    assert railway.set["s-pr-12"]["PULSE_RAILWAY_DEPLOY_RUN"]
