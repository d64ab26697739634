"""An environment's config as one JSON document: read, changed by patches, checked.

Its shape is that of Railway's CLI (src/controllers/config/environment.rs). What a patch names and
this Railway does not know is refused: a change that is dropped in silence looks like one that
was made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pulse_railway.local import state as model
from pulse_railway.local.api.access import Caller, need_service, refuse
from pulse_railway.local.api.services import remove_instances
from pulse_railway.local.state import Environment, Instance, Service

BUILD = ("builder", "buildCommand", "dockerfilePath", "watchPatterns")
DEPLOY = (
    "startCommand preDeployCommand healthcheckPath healthcheckTimeout numReplicas"
    " multiRegionConfig cronSchedule restartPolicyType restartPolicyMaxRetries sleepApplication"
    " overlapSeconds drainingSeconds region"
).split()
SERVICE = (
    "groupId source build deploy variables networking volumeMounts configFile isDeleted isCreated"
).split()
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
    """What an environment is made of. As a patch of another environment it makes a copy."""
    instances = list(caller.state.instances(environment.id))
    services = {s.id: _config(s, i) for s, i in instances}
    return {
        "services": services,
        "groups": environment.groups,
        "sharedVariables": {k: {"value": v} for k, v in environment.shared.items()},
        "volumes": {volume_id(s): {"isCreated": True} for s, i in instances if i.volume},
        "buckets": {},
    }


def volume_id(service: Service) -> str:
    return f"volume-{service.id}"


def _config(service: Service, instance: Instance) -> dict[str, Any]:
    settings = instance.settings
    source = {
        "image": instance.image,
        "repo": instance.repo,
        "rootDirectory": settings.get("rootDirectory"),
    }
    found = {
        "groupId": instance.group_id,
        "configFile": settings.get("railwayConfigFile"),
        "source": {k: v for k, v in source.items() if v},
        "build": {k: settings[k] for k in BUILD if settings.get(k) is not None},
        "deploy": {k: settings[k] for k in DEPLOY if settings.get(k) is not None},
        "variables": {k: {"value": v} for k, v in instance.variables.items()},
        "networking": {
            "serviceDomains": {d.domain: {"port": d.target_port} for d in instance.domains}
        }
        if instance.domains
        else None,
        "volumeMounts": {volume_id(service): {"mountPath": "/data"}} if instance.volume else None,
    }
    return {k: v for k, v in found.items() if v} | {"isCreated": True}


# -- changing ----------------------------------------------------------------------------------


async def apply_patch(
    caller: Caller, environment: Environment, patch: dict[str, Any], *, deploys: bool = True
) -> None:
    """Carry a patch out: all of it, or nothing where something in it is refused.

    A service with `isCreated` that is not in this environment yet comes into it. One with
    `isDeleted` leaves this environment and no other.
    """
    _check_names(
        patch, ("services", "groups", "sharedVariables", "volumes", "buckets"), "the patch"
    )
    changes = []
    for service_id, given in (patch.get("services") or {}).items():
        service = need_service(caller, service_id)
        changes.append((service, _checked_change(caller, environment, service, given or {})))
    for name, group in (patch.get("groups") or {}).items():
        if group is None:
            environment.groups.pop(name, None)
        else:
            environment.groups[name] = {**environment.groups.get(name, {}), **group}
    _merge_variables(environment.shared, patch.get("sharedVariables") or {})
    due = []
    for service, change in changes:
        instance = caller.state.instance(service.id, environment.id)
        is_new = instance is None
        if change.get("isDeleted"):
            if instance and caller.rules.deletion_patch != "ignore":
                remove_instances(caller, service, [instance])
            continue
        if instance is None:
            instance = await _create(caller, environment, service, change)
        if (_change_instance(instance, change) or is_new) and (instance.image or instance.upload):
            due.append((service, instance))
    for service, instance in due if deploys else []:  # when what they refer to is there
        caller.supervisor.deploy(service, instance)


async def _create(
    caller: Caller, environment: Environment, service: Service, change: dict[str, Any]
) -> Instance:
    """Bring a service into an environment, with domains of its own for those that it has where the
    patch comes from."""
    instance = Instance(model.new_id(), service.id, environment.id)
    service.instances.append(instance)
    for domain in ((change.get("networking") or {}).get("serviceDomains") or {}).values():
        await caller.open_domain(service, instance, (domain or {}).get("port"))
    if environment.copy_of and caller.rules.copy_uploads:
        source = caller.state.instance(service.id, environment.copy_of)
        instance.upload = source.upload if source else None
    return instance


def _checked_change(
    caller: Caller, environment: Environment, service: Service, change: dict[str, Any]
) -> dict[str, Any]:
    """A change of a service, with its settings. Raises what Railway refuses with."""
    instance = caller.state.instance(service.id, environment.id)
    project = caller.state.project(service.project_id)
    if project is None or environment not in project.environments:
        raise refuse("Service not found")
    if instance is None and not change.get("isCreated"):
        raise refuse("ServiceInstance not found")
    if change.get("isDeleted") and caller.rules.deletion_patch == "refuse":
        raise refuse()
    _check_names(change, SERVICE, "a service")
    build, deploy = change.get("build") or {}, change.get("deploy") or {}
    networking, source = change.get("networking") or {}, change.get("source") or {}
    _check_names(build, BUILD, "build")
    _check_names(deploy, DEPLOY, "deploy")
    _check_names(networking, ("serviceDomains",), "networking")
    if instance and set(networking.get("serviceDomains") or {}) - {
        domain.domain for domain in instance.domains
    }:
        raise refuse("the local Railway makes domains by serviceDomainCreate")
    settings = check_settings({**build, **deploy})
    for name, here, key in (
        ("rootDirectory", source, "rootDirectory"),
        ("railwayConfigFile", change, "configFile"),
    ):
        if key in here:
            settings[name] = here[key]
    return {**change, "settings": settings}


def _check_names(given: dict[str, Any], names: Iterable[str], where: str) -> None:
    if unknown := sorted(set(given) - set(names)):
        raise refuse(f"the local Railway does not know {', '.join(unknown)} in {where}")


def _merge_variables(into: dict[str, str], variables: dict[str, Any]) -> bool:
    """Variables as a patch gives them; None removes one. Says whether anything changed."""
    before = dict(into)
    for name, spec in variables.items():
        if spec is None:
            into.pop(name, None)
        else:
            into[name] = str(spec.get("value") or "")
    return into != before


def _change_instance(instance: Instance, change: dict[str, Any]) -> bool:
    """Apply a change to a service; says whether it is one that Railway deploys anew for.

    Domains change at once, without a deployment (Railway's docs, "Staged changes").
    """
    named = (change.get("networking") or {}).get("serviceDomains") or {}
    for domain in [d for d in instance.domains if d.domain in named]:
        if named[domain.domain] is None:
            instance.domains.remove(domain)
        else:
            domain.target_port = named[domain.domain].get("port")
    instance.volume = instance.volume or bool(change.get("volumeMounts"))
    if "groupId" in change:
        instance.group_id = change["groupId"]
    changed = _merge_variables(instance.variables, change.get("variables") or {})
    before = _deployed_settings(instance)
    instance.settings.update(change["settings"])
    if "source" in change:
        source = change["source"] or {}
        instance.image, instance.repo = source.get("image"), source.get("repo")
    instance.updated_at = model.now()
    return changed or before != _deployed_settings(instance)


def _deployed_settings(instance: Instance) -> tuple[Any, ...]:
    """What a deployment is made of: of replicas the regions, and not their number."""
    settings = {k: v for k, v in instance.settings.items() if k != "numReplicas"}
    regions = settings.pop("multiRegionConfig", None) or {}
    return settings, sorted(r for r, at in regions.items() if at), instance.image, instance.repo
