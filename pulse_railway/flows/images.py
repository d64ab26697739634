"""The images of deployments: which one a deployment had, its digest, and why one is not pulled."""

from __future__ import annotations

from typing import Any

import httpx

from pulse_railway import contract, router_commands
from pulse_railway.errors import Failure
from pulse_railway.options import RegistryCredentials
from pulse_railway.output import Output
from pulse_railway.railway.api import Api
from pulse_railway.stack import Stack

# the kinds of manifests that a registry may answer with (OCI's image specification, and docker's)
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json,"
    " application/vnd.docker.distribution.manifest.list.v2+json,"
    " application/vnd.docker.distribution.manifest.v2+json"
)
TIMEOUT = 10.0  # seconds
LOCAL = ("localhost", "127.0.0.1")


def find_image(api: Api, stack: Stack, deployment_id: str) -> tuple[str, int | None]:
    """Return the image of a deployment, which may be gone: by its digest if that is known. And how
    many processes the deployment ran; None if that is not known.

    Raises Failure for a deployment that was built from source, or is not in the history.
    """
    facts = facts_of(api, stack).get(deployment_id)
    if facts is None:
        raise Failure(
            f"there is no {deployment_id} in the history: `pulse-railway history` lists what there"
            " was"
        )
    if image := facts.get("image"):
        variables = {contract.INSTANCES: facts.get("instances", "")}
        if service := stack.backend(deployment_id):
            variables = service.variables
        count = contract.instances_of(variables) if service or "instances" in facts else None
        return pinned(image, facts.get("digest")), count
    raise Failure(f"{deployment_id} was built from source: {again(deployment_id, facts)}")


def facts_of(api: Api, stack: Stack) -> dict[str, dict[str, str]]:
    """Return image, digest, processes and commit of the deployments that the history names.

    The one that was promoted last comes last.
    """
    found: dict[str, dict[str, str]] = {}
    keys = ("image", "digest", "instances", "commit")
    for entry in router_commands.read_history(api, stack):
        if name := entry.get("deployment_id"):
            facts = {key: entry[key] for key in keys if entry.get(key)}
            before = found.pop(name, {}) if entry["what"] == "promote" else found.get(name, {})
            found[name] = before | facts
    return found


def pinned(image: str, digest: str | None) -> str:
    """Return an image with its digest in place of the tag, which may have been moved."""
    if not digest or "@" in image:
        return image
    repository, _, tag = image.rpartition(":")
    return f"{image if '/' in tag else repository}@{digest}"


def again(deployment_id: str, facts: dict[str, str]) -> str:
    """Return how a deployment that is gone is brought up again."""
    if facts.get("image"):
        return f"`pulse-railway deploy --from {deployment_id}` brings its image up again"
    if commit := facts.get("commit"):
        return f"check out {commit} (`git checkout {commit}`), and `pulse-railway deploy`"
    return "deploy that version again"


def find_digest(image: str, registry: RegistryCredentials | None, output: Output) -> str | None:
    """Return an image's digest: its own, or the one that its registry has for the tag.

    None, and a warning, if the registry does not say it; Railway may be able to pull it all the
    same. Registries: distribution's HTTP API v2, with the tokens of its specification.
    """
    name, _, digest = image.partition("@")
    if digest:
        return digest
    host, slash, rest = name.partition("/")
    repository, _, tag = rest.rpartition(":")
    if not slash or not ({".", ":"} & set(host) or host == "localhost"):
        output.warn(
            f"the digest of {image} is not looked up, since it names no registry: give it as"
            " @sha256:..."
        )
        return None
    scheme = "http" if host.partition(":")[0] in LOCAL else "https"  # as docker does
    url = f"{scheme}://{host}/v2/{repository}/manifests/{tag}"
    try:
        with httpx.Client(timeout=TIMEOUT) as client:
            answer = client.head(url, headers={"accept": MANIFESTS})
            if answer.status_code == 401:
                token = bearer(client, answer.headers.get("www-authenticate", ""), registry)
                headers = {"accept": MANIFESTS, "authorization": f"Bearer {token}"}
                answer = client.head(url, headers=headers)
            answer.raise_for_status()
            return str(answer.headers["docker-content-digest"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        output.warn(f"the registry does not say the digest of {image}: {error}")
        return None


def bearer(client: httpx.Client, challenge: str, registry: RegistryCredentials | None) -> str:
    """Return a token to pull with, from where a registry's 401 says it is given."""
    scheme, _, rest = challenge.partition(" ")
    fields = dict(part.split("=", 1) for part in rest.split(",") if "=" in part)
    parameters = {name.strip(): value.strip('" ') for name, value in fields.items()}
    if scheme.lower() != "bearer":
        raise ValueError(f"the registry asks for {scheme or 'nothing'}, not for a token")
    realm = parameters.pop("realm")
    if not realm.startswith("https://") and httpx.URL(realm).host not in LOCAL:
        raise ValueError("the registry wants the password without TLS")
    auth: Any = (registry.username or "x", registry.password) if registry else None
    answer = client.get(realm, params=parameters, auth=auth)
    answer.raise_for_status()
    body = answer.json()
    return str(body.get("token") or body["access_token"])


def why_not_pulled(failure: str, registry: RegistryCredentials | None) -> str:
    """Return a failed deployment's message, with what to do if Railway could not pull the image."""
    if not any(word in failure.lower() for word in ("unauthorized", "denied", "forbidden")):
        return failure
    if registry is None:
        remedy = (
            f"a private registry needs {contract.REGISTRY_USERNAME} and"
            f" {contract.REGISTRY_PASSWORD} here (and Railway's Pro plan)"
        )
    else:
        remedy = (
            f"the registry does not accept {contract.REGISTRY_USERNAME} and"
            f" {contract.REGISTRY_PASSWORD}: has the token the right to read packages?"
        )
    return f"Railway may not pull the image: {remedy}. {failure}"
