"""`ensure` with an external Redis: which stack owns the routing state in it.

The janitor claims the state in a Redis of the project. `ensure` claims an empty state in an
external Redis at once, before another stack writes to it. A state without an owner can be another
stack's, so the user has to decide.
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

Ask = Callable[[str], bool | None]  # asks the user a question; None: not interactive
MAX_SERVICES = 200  # of other environments, whose variables are read


def claim_state(api: Api, stack: Stack, output: Output, ask: Ask, owns_state: bool) -> None:
    """Make this stack the owner of the routing state if that is certain; else warn.

    Args:
        owns_state: the user says that a state without an owner is this stack's.
    """
    router = stack.router
    assert router is not None
    if router.variables.get(contract.REPLACES):
        claim_replaced(api, stack, output)
    if stack.redis is None and contract.REDIS_URL not in router.variables:  # a new stack
        read_variables(api, stack)
    known = router.variables.get(contract.OWNS_STATE) == "1"
    if not stack.external_redis or stack.copied_from or (known and not owns_state):
        return
    try:
        with output.step("ask the router whose its state is"):
            state = router_commands.read_state(api, stack, pauses=(1.0,))
            if (owner := state.get("owner")) != stack.stamp:
                replace_owner(api, stack, state, owner, output, ask, owns_state)
            elif not known:  # the next run does not ask the router again
                value = {contract.OWNS_STATE: "1"}
                write_variables(api, stack.target, router.id, value)
    except Failure as failure:
        output.warn(f"it is not known whose the routing state is: {failure}")


def claim_replaced(api: Api, stack: Stack, output: Output) -> None:
    """Make the router the owner of the state of the deleted router in whose place it was created.

    The variable REPLACES has that owner until this is done.
    """
    router = stack.router
    assert router is not None
    replaced = router.variables[contract.REPLACES]
    try:
        with output.step("take over the routing state"):
            state = router_commands.read_state(api, stack, pauses=(1.0,))
            if state.get("owner") == replaced and is_deleted(stack, replaced):
                router_commands.send_claim(api, stack, instead_of=replaced)
            write_variables(api, stack.target, router.id, {contract.REPLACES: ""})
    except Failure as failure:
        output.warn(
            f"the routing state still belongs to the deleted router ({failure}): run"
            " `pulse-railway ensure` again"
        )


def replace_owner(
    api: Api,
    stack: Stack,
    state: dict[str, Any],
    owner: str | None,
    output: Output,
    ask: Ask,
    owns_state: bool,
) -> None:
    """Claim a state of no owner, or of a deleted stack; warn if it has another owner."""
    if owner is None:
        empty = not state.get("active") and not state["deployments"]
        if empty or owns_state or ask_user(api, stack, state.get("active") or "none", output, ask):
            router_commands.send_claim(api, stack)
    elif is_deleted(stack, owner):
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


def is_deleted(stack: Stack, owner: str) -> bool:
    """Return whether the owner's router was in this environment and is not any more."""
    stamp = ownership.parse_stamp(owner)
    existing = {service.id for service in [*stack.services.values(), *stack.others]}
    in_environment = stamp is not None and stamp.environment_id == stack.target.environment_id
    return in_environment and stamp.router_id not in existing


def ask_user(api: Api, stack: Stack, active: str, output: Output, ask: Ask) -> bool:
    """Ask whether a state without an owner is this stack's; warn if the answer is not yes.

    Nobody is asked if the token does not show whether other environments use the state.
    """
    sharing = environments_with_same_state(api, stack)
    description = (
        f"the Redis holds a routing state without an owner (prefix"
        f" {stack.redis_prefix}, {active} is active)"
    )
    if sharing:
        description += f", and {joined(sharing)} of this project uses it too"
    if sharing is not None and ask(f"{description}. Is it this stack's?"):
        return True
    output.warn(
        f"{description}: it works as before, and any stack can change it. If it is this stack's,"
        " run `pulse-railway ensure --owns-state`"
    )
    return False


def environments_with_same_state(api: Api, stack: Stack) -> list[str] | None:
    """Return the names of the project's other environments with the same Redis and prefix.

    None if the token does not show all of them, or they have more than MAX_SERVICES services.
    """
    if api.is_project_token or stack.router is None:
        return None
    project = stack.target.project_id
    try:
        page = api.call(ownership.REACH, project=project)["project"]["environments"]
    except GraphqlError:
        return None
    nodes = [e["node"] for e in page["edges"] if e["node"]["id"] != stack.target.environment_id]
    pairs = [
        (node["id"], node["name"], edge["node"]["serviceId"])
        for node in nodes
        for edge in node["serviceInstances"]["edges"]
    ]
    complete = all(node["canAccess"] for node in nodes) and not page["pageInfo"]["hasNextPage"]
    if not complete or len(pairs) > MAX_SERVICES:
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
    own = stack.router.variables.get(contract.REDIS_URL), stack.redis_prefix
    sharing = set()
    for i, (_, name, _) in enumerate(pairs):
        variables = values[f"v{i}"]
        keep_secret(variables.get(contract.REDIS_URL))
        prefix = variables.get(contract.REDIS_PREFIX) or contract.DEFAULT_REDIS_PREFIX
        if (variables.get(contract.REDIS_URL), prefix) == own:
            sharing.add(str(name))
    return sorted(sharing)
