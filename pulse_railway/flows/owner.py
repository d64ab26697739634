"""`ensure` on an external Redis: whose the routing state is that it holds.

A Redis in the project is the stack's own, and the janitor claims it; an empty state is, too, and is
claimed at once, before another stack's deploy is in it. Another one may hold the state of a stack
elsewhere, which only a person knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pulse_railway import contract, router_commands
from pulse_railway.errors import Failure, keep_secret
from pulse_railway.output import Output
from pulse_railway.railway.api import Api, GraphqlError
from pulse_railway.services import write_variables
from pulse_railway.stack import Stack, joined, ownership, read_variables

Ask = Callable[[str], bool | None]  # a question to its answer; None: there is nobody to ask
MOST_SERVICES = 200  # of other environments, that are looked at


def settle_owner(api: Api, stack: Stack, output: Output, ask: Ask, owns_state: bool) -> None:
    """Claim the routing state where that is certain; else say how it is done.

    Args:
        owns_state: it is this stack's, says who runs this, if it is nobody's.
    """
    router = stack.router
    assert router is not None
    if stack.redis is None and contract.REDIS_URL not in router.variables:  # it was made just now
        read_variables(api, stack)
    known = router.variables.get(contract.OWNS_STATE) == "1"
    if not stack.external_redis or stack.copied_from or (known and not owns_state):
        return
    try:
        with output.step("ask the router whose its state is"):
            state = router_commands.read_state(api, stack, pauses=(1.0,))
            if (owner := state.get("owner")) != stack.stamp:
                claim(api, stack, state, owner, output, ask, owns_state)
            elif not known:  # so that it is not asked again
                value = {contract.OWNS_STATE: "1"}
                write_variables(api, stack.target, router.id, value)
    except Failure as failure:
        output.warn(f"it is not known whose the routing state is: {failure}")


def claim(
    api: Api,
    stack: Stack,
    state: dict[str, Any],
    owner: str | None,
    output: Output,
    ask: Ask,
    owns_state: bool,
) -> None:
    if owner is None:
        empty = not state.get("active") and not state["deployments"]
        if empty or owns_state or is_ours(api, stack, state.get("active") or "none", output, ask):
            router_commands.send_claim(api, stack)
    elif is_gone(stack, owner):
        router_commands.send_claim(api, stack, instead_of=owner)
        names = joined(r["deployment_id"] for r in state["deployments"]) or "nothing"
        output.warn(
            f"the routing state was of a router that is gone ({owner}), and is this stack's now. It"
            f" holds {names}"
        )
    else:
        output.warn(
            f"the routing state belongs to another stack ({owner}, as environment and router): this"
            " one changes nothing in it. To keep them apart, delete this one's baseline and run"
            " `pulse-railway scaffold` with another --redis-prefix or --redis-url"
        )


def is_gone(stack: Stack, owner: str) -> bool:
    stamp = ownership.parse(owner)
    there = {service.id for service in [*stack.services.values(), *stack.others]}
    here = stamp is not None and stamp.environment_id == stack.target.environment_id
    return here and stamp.router_id not in there


def is_ours(api: Api, stack: Stack, active: str, output: Output, ask: Ask) -> bool:
    """Ask whether a state that does not say whose it is, is this stack's."""
    sharing = who_shares(api, stack)
    what = (
        f"the Redis holds a routing state that does not say whose it is (prefix"
        f" {stack.redis_prefix}, {active} is active)"
    )
    if sharing:
        what += f", and {joined(sharing)} of this project uses it too"
    if sharing is not None and ask(f"{what}. Is it this stack's?"):
        return True
    output.warn(
        f"{what}: it works as before, and any stack can change it. If it is this stack's, run"
        " `pulse-railway ensure --owns-state`"
    )
    return False


def who_shares(api: Api, stack: Stack) -> list[str] | None:
    """The other environments of the project with the same Redis and prefix, by name; None where the
    token does not see them all."""
    if api.is_project_token or stack.router is None:
        return None
    project = stack.target.project_id
    try:
        found = api.call(ownership.REACH, project=project)["project"]["environments"]
    except GraphqlError:
        return None
    nodes = [e["node"] for e in found["edges"] if e["node"]["id"] != stack.target.environment_id]
    pairs = [
        (node["id"], node["name"], edge["node"]["serviceId"])
        for node in nodes
        for edge in node["serviceInstances"]["edges"]
    ]
    seen = all(node["canAccess"] for node in nodes) and not found["pageInfo"]["hasNextPage"]
    if not seen or len(pairs) > MOST_SERVICES:
        return None
    if not pairs:
        return []
    parameters = "".join(f", $e{i}: String!, $s{i}: String!" for i in range(len(pairs)))
    fields = "\n".join(
        f"  v{i}: variables(projectId: $project, environmentId: $e{i}, serviceId: $s{i},"
        " unrendered: true)"
        for i in range(len(pairs))
    )
    ids = {f"e{i}": pair[0] for i, pair in enumerate(pairs)}
    ids |= {f"s{i}": pair[2] for i, pair in enumerate(pairs)}
    document = f"query Sharing($project: String!{parameters}) {{\n{fields}\n}}"
    values = api.call(document, project=project, **ids)
    mine = stack.router.variables.get(contract.REDIS_URL), stack.redis_prefix
    sharing = set()
    for i, (_, name, _) in enumerate(pairs):
        variables = values[f"v{i}"]
        keep_secret(variables.get(contract.REDIS_URL))
        prefix = variables.get(contract.REDIS_PREFIX) or contract.DEFAULT_REDIS_PREFIX
        if (variables.get(contract.REDIS_URL), prefix) == mine:
            sharing.add(str(name))
    return sorted(sharing)
