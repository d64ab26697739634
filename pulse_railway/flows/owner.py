"""`ensure` and `restore`: which stack owns the routing state.

In a Redis of the project the janitor claims a state without an owner, and `ensure` takes one over
that an older snapshot or a backup gives to another owner. `ensure` claims an empty state in an
external Redis at once, before another stack writes to it. A state without an owner can be another
stack's there, so the user has to decide.
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
from pulse_railway.waiting import FAILED_STATES

Ask = Callable[[str], bool | None]  # asks the user a question; None: not interactive
MAX_SERVICES = 200  # of other environments, whose variables are read


WRONG_PASSWORD = ("it refuses the password", "AuthenticationError")  # the latter: an older router


def claim_state(
    api: Api, stack: Stack, output: Output, ask: Ask, owns_state: bool, created: bool = False
) -> bool:
    """Make this stack the owner of the routing state if that is certain; else warn.

    Returns whether Redis answers the router, and the state in it is no other stack's.

    Args:
        owns_state: the user says that the state is this stack's, whoever else may use it.
        created: the stack was created in this run, and a Redis of its own with it.
    """
    router = stack.router
    assert router is not None
    if stack.redis is None and contract.REDIS_URL not in router.variables:  # a new stack
        read_variables(api, stack)
    replaced = router.variables.get(contract.REPLACES)
    if not replaced and (stack.copied_from or (created and not stack.external_redis)):
        return True
    if stopped := is_stopped(stack):
        output.warn(stopped)
        return False
    try:
        with output.step("ask the router whose its state is"):
            state = router_commands.read_state(api, stack, pauses=(1.0,))
        owner = state.get("owner")
        if replaced and owner == replaced and is_deleted(stack, owner):
            router_commands.send_claim(api, stack, instead_of=owner)
            owner = stack.stamp
        known = router.variables.get(contract.OWNS_STATE) == "1"
        ours = True
        if owner is None and not (stack.redis and has_invalid_owner(state)):
            ours = claim_unowned(api, stack, state, output, ask, owns_state or known)
        elif owner != stack.stamp:
            ours = take_over_state(api, stack, state, output, owns_state)
        elif stack.external_redis and not known:
            write_variables(api, stack.target, router.id, {contract.OWNS_STATE: "1"})
        if replaced:
            write_variables(api, stack.target, router.id, {contract.REPLACES: ""})
        return ours
    except Failure as failure:
        output.warn(no_answer(stack, failure, bool(replaced)))
        return False


def is_stopped(stack: Stack) -> str:
    """Return a message if the stack's Redis is stopped: how to start it. Else ""."""
    redis = stack.redis
    if redis is None or not (redis.stopped or redis.status in FAILED_STATES):
        return ""
    how = "was stopped" if redis.stopped else f"is {redis.status}"
    return (
        f"{redis.name} {how} on Railway: the sessions and the routing state are not to be had, and"
        f" nothing can be promoted. `railway redeploy --service {redis.name}` starts it"
    )


def no_answer(stack: Stack, failure: Failure, replaced: bool) -> str:
    """Return the message for a router that has not answered whose its state is."""
    if any(f"({cause})" in str(failure) for cause in WRONG_PASSWORD):
        names = [s.name for s in (stack.router, stack.janitor) if s]
        commands = " and ".join(f"`railway redeploy --service {name}`" for name in names)
        return (
            f"{stack.names.redis if stack.redis else 'Redis'} refuses the password that"
            f" {stack.names.router} was started with: if it was changed, {commands} start them with"
            " the present one, and `pulse-railway redeploy` the deployments with sessions in Redis"
        )
    if replaced:
        return (
            f"the routing state still belongs to the deleted router ({failure}): run"
            " `pulse-railway ensure` again"
        )
    return f"it is not known whose the routing state is: {failure}"


def claim_unowned(
    api: Api, stack: Stack, state: dict[str, Any], output: Output, ask: Ask, owns_state: bool
) -> bool:
    """Claim a state without an owner in an external Redis if that is certain; else warn.

    Returns whether it has a valid owner, or none, then.
    """
    if stack.redis:
        return True  # the janitor claims it
    empty = not state.get("active") and not state["deployments"]
    if empty or owns_state or ask_user(api, stack, state.get("active") or "none", output, ask):
        router_commands.send_claim(api, stack)
        return True
    return not has_invalid_owner(state)


def take_over_state(
    api: Api, stack: Stack, state: dict[str, Any], output: Output, owns_state: bool = False
) -> bool:
    """Claim a state of another owner if that one cannot be using it, and say so; else warn.

    It cannot if its router was in this environment and is deleted. A Redis of this environment is
    used by its stacks alone, so that an owner elsewhere is what a backup has brought along.

    Returns whether the state is this stack's now.
    """
    owner = state.get("owner")
    using = routers_with_same_state(stack)
    stamp = ownership.parse_stamp(owner)
    gone = owner is not None and is_deleted(stack, owner)
    in_use = stamp is not None and stamp.router_id in using.values()
    whose = f"a router that is gone ({owner})" if gone else f"another stack ({owner})"
    if owner is None:
        whose = "an owner that is not valid"
    if in_use or not (gone or stack.redis):
        output.warn(
            f"the routing state belongs to another stack ({owner}, as environment and router): this"
            " one changes nothing in it. To keep them apart, delete this one's baseline and run"
            " `pulse-railway scaffold` with another --redis-prefix or --redis-url"
        )
        return False
    if using and not owns_state:
        output.warn(
            f"the routing state is of {whose}, and {joined(using)} uses it too: this stack changes"
            " nothing in it. If it is this stack's, run `pulse-railway ensure --owns-state`"
        )
        return False
    router_commands.send_claim(api, stack, instead_of=owner)
    names = joined(r["deployment_id"] for r in state["deployments"]) or "nothing"
    output.warn(f"the routing state was of {whose}, and is this stack's now. It holds {names}")
    return True


def has_other_owner(stack: Stack, state: dict[str, Any]) -> bool:
    """Has the state another owner than this stack, or one that is not valid?"""
    owner = state.get("owner")
    return has_invalid_owner(state) if owner is None else owner != stack.stamp


def has_invalid_owner(state: dict[str, Any]) -> bool:
    return any(str(problem).startswith(":owner ") for problem in state.get("problems") or ())


def is_deleted(stack: Stack, owner: str) -> bool:
    """Return whether the owner's router was in this environment and is not any more."""
    stamp = ownership.parse_stamp(owner)
    existing = {service.id for service in [*stack.services.values(), *stack.others]}
    in_environment = stamp is not None and stamp.environment_id == stack.target.environment_id
    return in_environment and stamp.router_id not in existing


def routers_with_same_state(stack: Stack) -> dict[str, str]:
    """Return the environment's other routers with this one's Redis and prefix: name -> id."""
    url = str(stack.stored(contract.REDIS_URL) or "")
    host = f"{stack.names.redis}.railway.internal"

    def same_redis(other: str) -> bool:
        if stack.redis is None:
            return other.rstrip("/") == url.rstrip("/")
        references = {match[1] for match in ownership.REFERENCE.finditer(other)}
        return stack.redis.name in references or host in other

    others = [ownership.ServiceVariables(s.id, s.name, s.variables) for s in stack.others]
    return {
        router.name: router.id
        for router in ownership.routers(others)
        if same_redis(router.variables.get(contract.REDIS_URL, ""))
        and (router.variables.get(contract.REDIS_PREFIX) or contract.DEFAULT_REDIS_PREFIX)
        == stack.redis_prefix
    }


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
