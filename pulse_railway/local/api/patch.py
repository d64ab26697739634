"""An environment's config as one JSON document: reads it, checks and applies patches.

Its shape is that of Railway's CLI (src/controllers/config/environment.rs). A patch with a field
that the local Railway does not know is refused: if the field were ignored, a test could not tell
that from a change which was made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pulse_railway.local import state as model
from pulse_railway.local.api.access import Caller, need_service, refuse
from pulse_railway.local.api.services import remove_instances
from pulse_railway.local.state import DEFAULT_REGION, Environment, Instance, Service

BUILD = ("builder", "buildCommand", "dockerfilePath", "watchPatterns")
DEPLOY = (
    "startCommand preDeployCommand healthcheckPath healthcheckTimeout numReplicas"
    " multiRegionConfig cronSchedule restartPolicyType restartPolicyMaxRetries sleepApplication"
    " overlapSeconds drainingSeconds region limitOverride ipv6EgressEnabled"
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


def check_settings(changes: dict[str, Any]) -> dict[str, Any]:
    """Return settings as they are stored: `numReplicas` follows from `multiRegionConfig`.

    Raises Railway's error for an invalid one.
    """
    settings = dict(changes)
    for name in ("healthcheckTimeout", "overlapSeconds", "drainingSeconds", "numReplicas"):
        if (value := settings.get(name)) is not None and value < (name == "numReplicas"):
            raise refuse(f"Invalid {name}: {value}")
    path = settings.get("healthcheckPath")
    if path and not path.startswith("/"):
        raise refuse("Healthcheck path must start with a /")
    if schedule := settings.get("cronSchedule"):
        _check_cron(schedule)
    if regions := settings.get("multiRegionConfig"):
        for region in regions:
            _check_region(region)
        settings["numReplicas"] = sum((r or {}).get("numReplicas") or 0 for r in regions.values())
    elif settings.get("numReplicas"):
        region = settings.get("region") or DEFAULT_REGION
        settings["multiRegionConfig"] = {region: {"numReplicas": settings["numReplicas"]}}
    if region := settings.get("region"):
        _check_region(region)
    return settings


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
    """Return an environment's config. Applied as a patch to an empty environment, it copies it."""
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
    config = {
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
    return {k: v for k, v in config.items() if v} | {"isCreated": True}


# -- changing ----------------------------------------------------------------------------------


async def apply_patch(
    caller: Caller, environment: Environment, patch: dict[str, Any], *, deploys: bool = True
) -> None:
    """Apply a patch. It is checked first: an invalid one changes nothing, and raises.

    `isCreated` adds a service to this environment if it has no instance here; `isDeleted` removes
    its instance from this environment alone.

    Args:
        deploys: deploy the services that the patch has changed.
    """
    _check_names(
        patch, ("services", "groups", "sharedVariables", "volumes", "buckets"), "the patch"
    )
    changes = []
    for service_id, change in (patch.get("services") or {}).items():
        service = need_service(caller, service_id)
        changes.append((service, _checked_change(caller, environment, service, change or {})))
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
        else:
            caller.supervisor.spawn(caller.supervisor.scale(service, instance), "scale")
    # after all instances exist, since their variables may refer to each other
    for service, instance in due if deploys else []:
        caller.supervisor.deploy(service, instance)


async def _create(
    caller: Caller, environment: Environment, service: Service, change: dict[str, Any]
) -> Instance:
    """Add a service to an environment.

    The instance gets a new domain for each that the patch names, since a domain belongs to one
    environment.
    """
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
    """Return a change of a service with its `settings`. Raises Railway's error if it is invalid."""
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
    given = {name for name, value in networking.items() if value}  # the CLI sends empty ones too
    _check_names(dict.fromkeys(given), ("serviceDomains",), "networking")
    if instance and set(networking.get("serviceDomains") or {}) - {
        domain.domain for domain in instance.domains
    }:
        raise refuse("the local Railway makes domains by serviceDomainCreate")
    settings = check_settings({**build, **deploy})
    if "rootDirectory" in source:
        settings["rootDirectory"] = source["rootDirectory"]
    if "configFile" in change:
        settings["railwayConfigFile"] = change["configFile"]
    return {**change, "settings": settings}


def _check_names(part: dict[str, Any], names: Iterable[str], label: str) -> None:
    if unknown := sorted(set(part) - set(names)):
        raise refuse(f"the local Railway does not know {', '.join(unknown)} in {label}")


def _merge_variables(into: dict[str, str], variables: dict[str, Any]) -> bool:
    """Apply a patch's variables, of which None removes one; return whether anything changed."""
    before = dict(into)
    for name, spec in variables.items():
        if spec is None:
            into.pop(name, None)
        else:
            into[name] = str(spec.get("value") or "")
    return into != before


def _change_instance(instance: Instance, change: dict[str, Any]) -> bool:
    """Apply a change to a service; return whether Railway makes a new deployment for it.

    Domains change at once, without a deployment (Railway's docs, "Staged changes").
    """
    domains = (change.get("networking") or {}).get("serviceDomains") or {}
    for domain in [d for d in instance.domains if d.domain in domains]:
        if domains[domain.domain] is None:
            instance.domains.remove(domain)
        else:
            domain.target_port = domains[domain.domain].get("port")
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
    """Return what makes a new deployment when it changes: not the number of replicas."""
    settings = {k: v for k, v in instance.settings.items() if k != "numReplicas"}
    regions = settings.pop("multiRegionConfig", None) or {}
    return settings, sorted(r for r, at in regions.items() if at), instance.image, instance.repo
