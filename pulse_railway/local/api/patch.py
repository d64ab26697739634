"""An environment's config as one JSON document: read, changed by patches, checked.

Its shape is that of Railway's CLI (src/controllers/config/environment.rs). What a patch names and
this Railway does not know is refused: a change that is dropped in silence looks like one that
was made.
"""

from __future__ import annotations

from typing import Any

from pulse_railway.local import state as model
from pulse_railway.local.api.access import Caller, need_instance, need_service, refuse
from pulse_railway.local.state import Environment, Instance, Service

BUILD = ("builder", "buildCommand", "dockerfilePath", "watchPatterns")
DEPLOY = (
    "startCommand preDeployCommand healthcheckPath healthcheckTimeout numReplicas"
    " multiRegionConfig cronSchedule restartPolicyType restartPolicyMaxRetries sleepApplication"
    " overlapSeconds drainingSeconds region"
).split()
SERVICE = ("groupId", "source", "build", "deploy", "variables", "isDeleted", "isCreated")
REGIONS = {
    "us-west2": ("California, USA", "US"),
    "us-east4-eqdc4a": ("Virginia, USA", "US"),
    "europe-west4-drams3a": ("Amsterdam, Netherlands", "NL"),
    "asia-southeast1-eqsg3a": ("Singapore", "SG"),
}
SHORTEST_CRON = 5  # minutes


# -- settings, which serviceInstanceUpdate takes too -------------------------------------------


def check_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are kept; `numReplicas` mirrors `multiRegionConfig`, which decides.

    Raises what Railway refuses with.
    """
    kept = dict(given)
    for name in ("healthcheckTimeout", "overlapSeconds", "drainingSeconds", "numReplicas"):
        if (value := kept.get(name)) is not None and value < (name == "numReplicas"):
            raise refuse(f"Invalid {name}: {value}")
    path = kept.get("healthcheckPath")
    if path and not path.startswith("/"):
        raise refuse("Healthcheck path must start with a /")
    if schedule := kept.get("cronSchedule"):
        _check_cron(schedule)
    if regions := kept.get("multiRegionConfig"):
        for region in regions:
            _check_region(region)
        kept["numReplicas"] = sum((r or {}).get("numReplicas") or 0 for r in regions.values())
    elif kept.get("numReplicas"):
        region = kept.get("region") or "us-west2"
        kept["multiRegionConfig"] = {region: {"numReplicas": kept["numReplicas"]}}
    if region := kept.get("region"):
        _check_region(region)
    return kept


def _check_region(region: str) -> None:
    if region not in REGIONS:
        raise refuse(f"Region {region} not found")


def _check_cron(schedule: str) -> None:
    fields = schedule.split()
    limits = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
    if len(fields) != 5 or not all(map(_in_range, fields, limits)):
        raise refuse("Invalid cron schedule")
    step = fields[0].partition("/")[2] if fields[0].startswith("*/") else None
    if fields[0] == "*" or (step and int(step) < SHORTEST_CRON):
        raise refuse("Cron schedule must be at least 5 minutes apart")


def _in_range(field: str, limits: tuple[int, int]) -> bool:
    for part in field.split(","):
        span, slash, step = part.partition("/")
        if slash and not (step.isdigit() and int(step) > 0):
            return False
        ends = span.split("-") if span != "*" else []
        if not all(e.isdigit() and limits[0] <= int(e) <= limits[1] for e in ends) or len(ends) > 2:
            return False
    return True


# -- reading -----------------------------------------------------------------------------------


def config_of(caller: Caller, environment: Environment) -> dict[str, Any]:
    services = {s.id: _config(s, i) for s, i in caller.state.instances(environment.id)}
    return {
        "services": services,
        "groups": environment.groups,
        "sharedVariables": {k: {"value": v} for k, v in environment.shared.items()},
        "volumes": {},
        "buckets": {},
    }


def _config(service: Service, instance: Instance) -> dict[str, Any]:
    settings = instance.settings
    source = {"image": instance.image, "repo": instance.repo}
    found = {
        "groupId": instance.group_id,
        "source": {k: v for k, v in source.items() if v},
        "build": {k: settings[k] for k in BUILD if settings.get(k) is not None},
        "deploy": {k: settings[k] for k in DEPLOY if settings.get(k) is not None},
        "variables": {k: {"value": v} for k, v in instance.variables.items()},
        "networking": {
            "serviceDomains": {d.domain: {"port": d.target_port} for d in instance.domains}
        },
    }
    return {k: v for k, v in found.items() if v} | {"isCreated": True}


# -- changing ----------------------------------------------------------------------------------


async def apply(
    caller: Caller, environment: Environment, patch: dict[str, Any], *, deploys: bool = True
) -> None:
    """Carry a patch out: all of it, or nothing where something in it is refused."""
    _known(patch, ("services", "groups", "sharedVariables", "volumes", "buckets"), "the patch")
    services = patch.get("services") or {}
    changes = {}
    for service_id, change in services.items():
        instance = need_instance(caller, service_id, environment.id)
        changes[service_id] = instance, _checked(change or {})
    for name, group in (patch.get("groups") or {}).items():
        if group is None:
            environment.groups.pop(name, None)
        else:
            environment.groups[name] = {**environment.groups.get(name, {}), **group}
    _merge(environment.shared, patch.get("sharedVariables") or {})
    for service_id, (instance, change) in changes.items():
        service = need_service(caller, service_id)
        if change.get("isDeleted"):
            await caller.supervisor.remove(service)
            caller.state.services.remove(service)
            caller.supervisor.write_hosts(environment.id)
        elif _change(instance, change) and deploys:
            caller.supervisor.deploy(service, instance)


def _checked(change: dict[str, Any]) -> dict[str, Any]:
    _known(change, SERVICE, "a service")
    build, deploy = change.get("build") or {}, change.get("deploy") or {}
    _known(build, BUILD, "build")
    _known(deploy, tuple(DEPLOY), "deploy")
    return {**change, "settings": check_settings({**build, **deploy})}


def _known(given: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(given) - set(names)):
        raise refuse(f"the local Railway does not know {', '.join(unknown)} in {where}")


def _merge(into: dict[str, str], variables: dict[str, Any]) -> bool:
    """Variables as a patch gives them; None removes one. Says whether anything changed."""
    before = dict(into)
    for name, spec in variables.items():
        if spec is None:
            into.pop(name, None)
        else:
            into[name] = str(spec.get("value") or "")
    return into != before


def _change(instance: Instance, change: dict[str, Any]) -> bool:
    """Apply a change to a service; says whether it is one that Railway deploys anew for."""
    if "groupId" in change:
        instance.group_id = change["groupId"]
    changed = _merge(instance.variables, change.get("variables") or {})
    before = dict(instance.settings), instance.image, instance.repo
    instance.settings.update(change["settings"])
    if "source" in change:
        source = change["source"] or {}
        instance.image, instance.repo = source.get("image"), source.get("repo")
    instance.updated_at = model.now()
    has_source = bool(instance.image or instance.upload)
    changed = changed or before != (instance.settings, instance.image, instance.repo)
    return changed and has_source
