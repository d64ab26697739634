"""Names that stacks, apps and routers share.

They are 0.3.x's, and may not change: a stack that 0.3.x has created is taken over in place. "Ours"
marks those that 0.3.x does not have. router.py has a copy of those that it needs, since its image
has no pulse_railway; tests/test_contract.py compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

# Query parameters and headers of the affinity.
AFFINITY_QUERY: Final = "pulse_deployment"
AFFINITY_HEADER: Final = "x-pulse-deployment"
SELECTED_HEADER: Final = "x-pulse-selected-deployment"
CLIENT_LOADER_HEADER: Final = "x-pulse-client-loader"
CLIENT_LOADER_LOCATION_HEADER: Final = "x-pulse-client-loader-location"
RELOAD_QUERY: Final = "pulse_reload_on_stale_affinity"
STALE_HEADER: Final = "x-pulse-stale-affinity"
# A preview's key, `<deployment id>.<key>`; ours.
PREVIEW_QUERY: Final = "pulse_preview"
PREVIEW_HEADER: Final = "x-pulse-preview"
PREVIEW_COOKIE: Final = "__Host-pulse_preview"

# Paths of the app and of the router.
META_PATH: Final = "/_pulse/meta"
HEALTH_PATH: Final = "/_pulse/health"
INTERNAL_PREFIX: Final = "/_pulse/internal"
SESSIONS_PATH: Final = "/_pulse/internal/railway/sessions"
RELOAD_PATH: Final = "/_pulse/internal/railway/reload"
INTERNAL_TOKEN_HEADER: Final = "x-pulse-railway-internal-token"
ROUTER_HEALTH_PATH: Final = "/healthz"
SCRIPT_PATH: Final = "/_pulse/railway/affinity.js"  # ours
MOVE_PATH: Final = "/_pulse/railway/move"  # ours: a tab that is not used asks whether it moves over

# Variables of a backend service.
DEPLOYMENT_ID: Final = "PULSE_DEPLOYMENT_ID"
INTERNAL_TOKEN: Final = "PULSE_RAILWAY_INTERNAL_TOKEN"
APP_FILE: Final = "PULSE_APP_FILE"
SERVER_ADDRESS: Final = "PULSE_SERVER_ADDRESS"
PUBLIC_ORIGIN: Final = "PULSE_PUBLIC_ORIGIN"  # a later Pulse reads this in place of the former
PORT: Final = "PORT"
SESSION_REDIS_URL: Final = "PULSE_RAILWAY_REDIS_URL"  # on the env service: another one for apps
SESSION_SCOPE: Final = "PULSE_RAILWAY_SESSION_SCOPE"  # ours, in a copy: follows the keys' prefix
# Variables of its build, besides some of those.
WEB_ROOT: Final = "PULSE_WEB_ROOT"
DOCKERFILE_PATH: Final = "RAILWAY_DOCKERFILE_PATH"

# Variables of the router and the janitor.
RAILWAY_TOKEN: Final = "RAILWAY_TOKEN"  # the janitor's
# ours, as RAILWAY_TOKEN on the router, which needs none: 0.3.x refuses a router without one
NO_TOKEN: Final = "the-janitor-alone-has-it"
RAILWAY_API_TOKEN: Final = "RAILWAY_API_TOKEN"
REDIS_URL: Final = "REDIS_URL"
REDIS_PREFIX: Final = "PULSE_RAILWAY_REDIS_PREFIX"
SERVICE_PREFIX: Final = "PULSE_RAILWAY_SERVICE_PREFIX"
KEY_TTL: Final = "PULSE_RAILWAY_KEY_TTL_SECONDS"  # ours, in a copy: its keys' time to live
DRAIN_TTL: Final = "PULSE_RAILWAY_DRAIN_TTL_SECONDS"
ROLLBACK_WINDOW: Final = "PULSE_RAILWAY_ROLLBACK_WINDOW_SECONDS"  # ours, on the janitor
KEEP: Final = "PULSE_RAILWAY_KEEP"  # ours, on the janitor: deployments to keep beyond the window
CRON: Final = "PULSE_RAILWAY_CRON"  # ours: the janitor's schedule, as `ensure` has set it
ROUTER_REPLICAS: Final = "PULSE_RAILWAY_ROUTER_REPLICAS"  # ours: the same of the router's replicas
ROUTER_SERVICE: Final = "PULSE_RAILWAY_SERVICE"
JANITOR_SERVICE: Final = "PULSE_RAILWAY_JANITOR_SERVICE"
REDIS_SERVICE: Final = "PULSE_RAILWAY_REDIS_SERVICE"
# ours: JSON, former internal tokens that live versions hold -> until when each was the present one
FORMER_TOKENS: Final = "PULSE_RAILWAY_FORMER_TOKENS"
NOTIFY_URL: Final = "PULSE_RAILWAY_NOTIFY_URL"  # ours, on the janitor: the URL of notifications
# ours, where a verb runs: what Railway pulls private images with
REGISTRY_USERNAME: Final = "PULSE_RAILWAY_REGISTRY_USERNAME"
REGISTRY_PASSWORD: Final = "PULSE_RAILWAY_REGISTRY_PASSWORD"
SSH_KEY: Final = "PULSE_RAILWAY_SSH_KEY"  # ours, where a verb runs: the key of `railway ssh`
# ours, on the router: the deployment promoted last, and the time in seconds by Redis' clock
LAST_PROMOTED: Final = "PULSE_RAILWAY_ACTIVE"
LAST_PROMOTED_AT: Final = "PULSE_RAILWAY_ACTIVE_AT"
MAINTENANCE: Final = "PULSE_RAILWAY_MAINTENANCE"  # ours, on the router: closed since this time
APP: Final = "PULSE_RAILWAY_APP"  # ours, on the router: the identity of its app
STACK: Final = "PULSE_RAILWAY_STACK"  # ours, on every service of a stack: its owner
OWNS_STATE: Final = "PULSE_RAILWAY_OWNS_STATE"  # ours, on the router: claims a state without owner
REPLACES: Final = "PULSE_RAILWAY_REPLACES"  # ours, on a router made again: the owner it follows
REMOVED: Final = "PULSE_RAILWAY_REMOVED"  # ours: the service could not be deleted, and is empty
MAINTENANCE_OFF: Final = "PULSE_RAILWAY_MAINTENANCE_OFF"  # ours, on the router: time of its end
TOKEN_MADE: Final = "PULSE_RAILWAY_TOKEN_MADE"  # ours, on the router: `ensure` made its token
NAME: Final = "PULSE_RAILWAY_DEPLOYMENT_NAME"  # ours, on a backend: its id was generated from this
ABOUT: Final = "PULSE_RAILWAY_ABOUT"  # ours, on a backend: commit, author, message, as JSON
RUN: Final = "PULSE_RAILWAY_DEPLOY_RUN"  # ours, on a backend: the run that created it
PREVIEW: Final = "PULSE_RAILWAY_PREVIEW"  # ours, on a preview: the SHA-256 of its key
INSTANCES: Final = "PULSE_RAILWAY_INSTANCES"  # ours, on a backend: how many processes it runs
INSTANCE: Final = "PULSE_RAILWAY_INSTANCE"  # ours, of a process: which one it is, from 1
SSR_BACKEND: Final = "PULSE_SSR_BACKEND_URL"  # a later Pulse renders a page by this address
CONTROL: Final = "PULSE_RAILWAY_CONTROL"  # ours, on the janitor: a control command to carry out
CONTROL_ANSWER: Final = "PULSE_RAILWAY_CONTROL_ANSWER"  # ours, on the janitor: its answer
ANSWER_BYTES: Final = 16 * 1024  # of that answer, at most
UNFINISHED: Final = "PULSE_RAILWAY_SETUP"  # ours: the `ensure` that creates it; deleted at its end
UNDEPLOYED: Final = "PULSE_RAILWAY_UNDEPLOYED"  # ours: 1 until what `ensure` wrote is deployed
RUNTIME_VERSION: Final = "PULSE_RAILWAY_RUNTIME_VERSION"  # ours: the version of a service's runtime

# Variables that a user's `pulse-env` or `--env` may not set on a backend.
RESERVED: Final = frozenset(
    {
        DEPLOYMENT_ID,
        INTERNAL_TOKEN,
        APP_FILE,
        SERVER_ADDRESS,
        PUBLIC_ORIGIN,
        PORT,
        SESSION_REDIS_URL,
        SESSION_SCOPE,
        KEY_TTL,
        NAME,
        ABOUT,
        PREVIEW,
        INSTANCES,
        INSTANCE,
        STACK,
        REMOVED,
        "PULSE_RAILWAY_DEPLOYMENT_STATE",
        "PULSE_RAILWAY_DRAIN_STARTED_AT",
    }
)
# Variables to which a backend gets no reference: those above, and the build's own.
NOT_REFERENCED: Final = RESERVED | {WEB_ROOT, DOCKERFILE_PATH, "APP_FILE", "WEB_ROOT"}

DEFAULT_ROUTER: Final = "pulse-router"
DEFAULT_ENV: Final = "pulse-env"
DEFAULT_REDIS: Final = "pulse-redis"
DEFAULT_JANITOR: Final = "pulse-janitor"
DEFAULT_PORT: Final = 8000
DEFAULT_DRAIN_TTL_SECONDS: Final = 86_400
MIN_KEY_TTL_SECONDS: Final = 3600  # long enough for the janitor's runs, which renew it
DEFAULT_ROLLBACK_WINDOW_SECONDS: Final = 900
DEFAULT_CRON: Final = "*/5 * * * *"
DEFAULT_DEPLOYMENT_NAME: Final = "prod"
DEFAULT_ENVIRONMENT: Final = "production"
DEFAULT_REDIS_PREFIX: Final = "pulse:railway"
TEMPLATE_CODE: Final = "pulse-baseline"

INSTANCES_AT_MOST: Final = 64  # processes of a deployment


def parse_instances(value: object) -> int:
    """Return a number of processes. Raises ValueError, whose message says what it takes."""
    text = str(value)
    if not re.fullmatch("[1-9][0-9]?", text, re.ASCII) or int(text) > INSTANCES_AT_MOST:
        raise ValueError(f"a whole number from 1 to {INSTANCES_AT_MOST}, not {text!r}")
    return int(text)


def instances_of(variables: Mapping[str, str]) -> int:
    """Return how many processes a backend with these variables runs; 1 for an invalid number."""
    try:
        return parse_instances(variables.get(INSTANCES) or "1")
    except ValueError:
        return 1


DEPLOYMENT_ID_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,23}")
SERVICE_NAME_LIMIT: Final = 32  # Railway's
SERVICE_PREFIX_LIMIT: Final = 8  # with its dash

# `serve` passes SIGTERM on, removes old locks and reaps (app/serve.py). A container with an earlier
# pulse-railway, which has no `serve`, starts `pulse run` itself. The empty address listens on all
# IPv4 and IPv6 addresses: older environments of Railway have only IPv6 between services, and with
# `::` asyncio, which sets IPV6_V6ONLY, would listen on IPv6 only.
START_COMMAND: Final = (
    "pulse-railway serve --help >/dev/null 2>&1 && exec pulse-railway serve;"
    ' exec pulse run "$PULSE_APP_FILE" --prod --address "" --port "${PORT:-8000}" --no-find-port'
)

API_URL: Final = "https://backboard.railway.com/graphql/v2"
API_URL_VARIABLE: Final = "PULSE_RAILWAY_API_URL"
