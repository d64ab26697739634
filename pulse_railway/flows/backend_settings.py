"""The settings of a new backend's service, beside its variables.

Each deployment is a service of its own, so what a person has set on the active one (its region,
limits, static outbound addresses, tracing) would be gone with the next deploy. `deploy` gives it to
the new one. Replicas, start command and health check are pulse-railway's own, and not taken over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pulse_railway import contract
from pulse_railway.config import Target
from pulse_railway.errors import Failure
from pulse_railway.options import DeployOptions
from pulse_railway.output import Output
from pulse_railway.railway import documents
from pulse_railway.railway.api import Api, GraphqlError
from pulse_railway.services import REGIONS, region_of
from pulse_railway.stack import Service, Stack, joined

FIXED: dict[str, Any] = {
    "healthcheckPath": contract.HEALTH_PATH,
    "healthcheckTimeout": 300,
    "overlapSeconds": 30,
    "drainingSeconds": 10,
}


@dataclass(frozen=True)
class Hosting:
    """Where and how a backend runs. None and False: Railway's default."""

    region: str | None = None
    memory_gb: float | None = None  # 10^9 bytes
    vcpus: float | None = None
    static_addresses: bool = False  # outbound IPv4 addresses that stay
    ipv6: bool = False  # outbound
    tracing: bool | None = None  # None: as the project
    instrumented: bool = False  # by Railway, without code of the app

    def words(self) -> list[str]:
        """Return what differs from Railway's default, for a message."""
        parts = [
            self.region,
            f"{self.memory_gb:g} GB of memory" if self.memory_gb else None,
            f"{self.vcpus:g} vCPU" if self.vcpus else None,
            "static outbound addresses" if self.static_addresses else None,
            "outbound IPv6" if self.ipv6 else None,
            None if self.tracing is None else f"tracing {'on' if self.tracing else 'off'}",
            "automatic instrumentation" if self.instrumented else None,
        ]
        return [part for part in parts if part]

    def settings(self) -> dict[str, Any]:
        """Return the fields of ServiceInstanceUpdateInput. A backend has one replica: Railway does
        not send a tab to the same replica again.

        `numReplicas` alone would leave a service in Railway's default region.
        """
        settings: dict[str, Any] = {"numReplicas": 1}
        if self.region:
            settings = {"multiRegionConfig": {self.region: {"numReplicas": 1}}}
        if self.ipv6:
            settings["ipv6EgressEnabled"] = True
        if self.tracing is not None:
            settings["tracingEnabled"] = self.tracing
        if self.instrumented:
            settings["autoInstrumentationEnabled"] = True
        return settings


def choose_hosting(api: Api, stack: Stack, options: DeployOptions, output: Output) -> Hosting:
    """Return where and how the new backend runs: as the options say, else as the active one does.

    Without an active one, it runs in the router's region. What is taken over is printed. Raises
    Failure for a region that Railway does not have.
    """
    if options.region:
        require_region(api, stack.target, options.region)
    active = stack.backend(stack.last_promoted or "")
    router_region = region_of(stack.router) if stack.router else None
    hosting = Hosting(region=router_region)
    if active:
        own = set_by_hand(api, stack.target, active, output)
        taken_over = replace(
            own,
            region=None if options.region or own.region == router_region else own.region,
            memory_gb=None if options.memory_gb else own.memory_gb,
            vcpus=None if options.vcpus else own.vcpus,
        )
        if words := taken_over.words():
            output.info(f"as {active.deployment_id} has it: {', '.join(words)}")
        hosting = replace(own, region=own.region or router_region)
    return replace(
        hosting,
        region=options.region or hosting.region,
        memory_gb=options.memory_gb or hosting.memory_gb,
        vcpus=options.vcpus or hosting.vcpus,
    )


def require_region(api: Api, target: Target, region: str) -> None:
    """Raise Failure for a region that Railway does not have for this project."""
    if region in REGIONS:
        return
    answer = api.call(documents.REGIONS, project=target.project_id)["regions"]
    names = sorted(str(item["name"]) for item in answer)
    if region not in names:
        raise Failure(f"--region {region}: Railway has {joined(names)} for this project")


def set_by_hand(api: Api, target: Target, service: Service, output: Output) -> Hosting:
    """Return where and how a backend runs.

    If Railway refuses to say what it has beside region and limits, a warning says so.
    """
    hosting = Hosting(
        region_of(service), service.limits.get("memory_gb"), service.limits.get("vcpus")
    )
    where: Any = {"service": service.id, "environment": target.environment_id}
    try:
        answer = api.call(documents.SET_BY_HAND, **where)
        instance = answer["serviceInstance"]
        return replace(
            hosting,
            static_addresses=bool(answer["egressGateways"]),
            ipv6=bool(instance["ipv6EgressEnabled"]),
            tracing=answer["service"]["tracingEnabled"],
            instrumented=bool(instance["autoInstrumentationEnabled"]),
        )
    except (GraphqlError, KeyError, TypeError) as error:
        output.warn(
            f"static outbound addresses and tracing of {service.name} are not known, so the new"
            f" version does not get them: {error}"
        )
        return hosting


def allot(api: Api, target: Target, service_id: str, hosting: Hosting) -> None:
    """Give a new service its limits and its static outbound addresses, before it is deployed."""
    service = {"environmentId": target.environment_id, "serviceId": service_id}
    values: dict[str, Any] = {}
    limits = {"memoryGB": hosting.memory_gb, "vCPUs": hosting.vcpus}
    if limits := {name: value for name, value in limits.items() if value}:
        values["limits"] = {**service, **limits}
    if hosting.static_addresses:
        region = {"region": hosting.region} if hosting.region else {}
        values["gateway"] = {**service, **region}
    if values:
        document = documents.allot(limits=bool(limits), gateway=hosting.static_addresses)
        api.call(document, **values)
