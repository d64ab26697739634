"""The flags of the verbs: FLAGS is the only place for a flag's name, kind, default and help.

The tasks' signatures (verbs.py), the console script's command line (cli.py), `--help` (help.py),
the keys of invoke.yaml, the options' values and defaults (options.py) and docs/reference.md are
generated from FLAGS. A verb in tasks.py lists the names of its flags.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pulse_railway import contract
from pulse_railway.errors import Failure

if TYPE_CHECKING:
    from pulse_railway.app.plugin import RailwayPlugin

Flags = Mapping[str, Any]  # the values that a user has given, by flag name; see UNSET

EMPTY: Mapping[str, str] = MappingProxyType({})
UNSET: tuple[Any, ...] = (None, "", [])
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MAX_NUMBER = 10**9  # the largest whole number that a flag takes


@dataclass(frozen=True)
class Flag:
    name: str  # as a keyword of the task and as a key in invoke.yaml
    help: str
    value: str = "NAME"  # the placeholder for its value in the help
    kind: type = str  # bool: a switch; int; float; dict: KEY=VALUE, may be repeated
    default: Any = None  # the value of a text or number that is not given
    words: str = ""  # describes the default in the help, where other code determines it
    kept: bool = False  # a stack keeps its value; the default is a new stack's
    minimum: int = 1  # the smallest whole number
    maximum: int = MAX_NUMBER  # the largest
    range: tuple[float, float] = (0, 100)  # of a float
    several: bool = False  # floats with commas between them; the value is a tuple
    variable: str = ""  # an environment variable that is read if nothing else gives a value
    plugin: bool = False  # an argument of RailwayPlugin has this name, and comes before `variable`
    positional: bool = False

    @property
    def option(self) -> str:
        """Return the option, as in `--bake`."""
        return f"--{self.name.rstrip('_').replace('_', '-')}"

    @property
    def usage(self) -> str:
        """Return the option with its placeholder, as in `--bake SECONDS`."""
        return self.option if self.kind is bool else f"{self.option} {self.value}"

    @property
    def text(self) -> str:
        """Return the help, with the default."""
        default = self.words if self.default is None else str(self.default)
        default = default or (self.variable and f"${self.variable}")
        if self.kept:
            default = f"the stack's; {default} in a new one"
        return f"{self.help} (default: {default})" if default else self.help

    @property
    def unset(self) -> Any:
        """Return the value of a task's parameter if the flag is not given."""
        return {bool: False, dict: []}.get(self.kind)

    def parse(self, raw: Any) -> Any:
        """Return `raw` as a value of this flag's kind. Raises Failure if it is none."""
        if self.several:
            texts = raw if isinstance(raw, list | tuple) else str(raw).split(",")
            return tuple(self._fraction(text) for text in texts)
        parsers: Any = {bool: bool, int: self._number, float: self._fraction, dict: self._pairs}
        return parsers[self.kind](raw) if self.kind in parsers else raw

    def _number(self, raw: Any) -> int:
        try:
            number = int(str(raw))
        except ValueError:
            number = self.minimum - 1
        if not self.minimum <= number <= self.maximum:
            raise Failure(
                f"{self.option} takes a whole number from {self.minimum} to {self.maximum},"
                f" not {raw!r}"
            )
        return number

    def _fraction(self, raw: Any) -> float:
        least, most = self.range
        try:
            number = float(str(raw).removesuffix("%"))
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise Failure(f"{self.option} takes a number from {least:g} to {most:g}, not {raw!r}")
        return number

    def _pairs(self, raw: Iterable[str]) -> dict[str, str]:
        pairs = {}
        for item in raw:
            key, equals, value = item.partition("=")
            if not equals or not VARIABLE_NAME.fullmatch(key):
                raise Failure(
                    f"{self.option} takes KEY=VALUE, not {key!r}: a name has letters, digits, _"
                )
            pairs[key] = value
        return pairs


def value(flags: Flags, name: str, plugin: RailwayPlugin | None = None) -> Any:
    """Return a flag's value: from the flags, the plugin, the environment variable or the default.

    The first that has one counts; a flag that a stack keeps has no default (None). Raises Failure
    for a value that is not of the flag's kind.
    """
    flag = FLAGS[name]
    raw = flags.get(name)
    if raw in UNSET and plugin and flag.plugin:
        raw = getattr(plugin, name)
    if raw in UNSET and flag.variable:
        raw = os.environ.get(flag.variable)
    if raw in UNSET:
        default = None if flag.kept else flag.default
        return {bool: False, dict: EMPTY}.get(flag.kind, default)
    return flag.parse(raw)


# fmt: off
_ALL = (
    # the app
    Flag("app", "the app's file, path/to/main.py[:variable], relative to the context", "FILE"),
    Flag("context", "the folder to build and upload", "FOLDER", words="this one"),
    # the target
    Flag("workspace", "Railway workspace, by name; narrows --project"),
    Flag("workspace_id", "Railway workspace, by id", "ID"),
    Flag("project", "Railway project, by name", plugin=True),
    Flag("project_id", "Railway project, by id", "ID"),
    Flag("environment", "Railway environment, by name", words=contract.DEFAULT_ENVIRONMENT,
         plugin=True),
    Flag("environment_id", "Railway environment, by id", "ID"),
    Flag("token", "Railway token; better in RAILWAY_TOKEN or RAILWAY_API_TOKEN", "TOKEN"),
    # the way to the router
    Flag("control", "how control commands reach the router: ssh, or job (by the janitor)", "WAY"),
    Flag("ssh_key", "private key for `railway ssh`, or its file", "FILE",
         variable=contract.SSH_KEY),
    Flag("service", "the router's service name", words=contract.DEFAULT_ROUTER),
    Flag("service_prefix", "prefix of every service name; at most 8 characters", "PREFIX"),
    Flag("redis_service", "the Redis service's name", words=contract.DEFAULT_REDIS),
    # the baseline
    Flag("redis_url", "use this Redis instead of one in the project", "URL"),
    Flag("redis_prefix", "prefix of the state's Redis keys", "PREFIX",
         words=contract.DEFAULT_REDIS_PREFIX),
    Flag("session_redis_url", "keep apps' sessions in this Redis", "URL",
         words="the router's Redis", kept=True),
    Flag("janitor_cron_schedule", "when the janitor runs, in UTC", "CRON",
         default=contract.DEFAULT_CRON, kept=True),
    Flag("drain_ttl_seconds", "the longest time to keep a draining deployment", "SECONDS", int,
         contract.DEFAULT_DRAIN_TTL_SECONDS, minimum=0, kept=True),
    Flag("rollback_window_seconds",
         "time to keep the previously active deployment, even without tabs", "SECONDS", int,
         contract.DEFAULT_ROLLBACK_WINDOW_SECONDS, minimum=0, kept=True),
    Flag("keep", "number of previous deployments to keep, until the drain TTL", "NUMBER", int, 0,
         minimum=0, kept=True),
    Flag("router_replicas", "router replicas", "NUMBER", int, 1, kept=True),
    Flag("runtime_image", "a published image of router and janitor", "IMAGE",
         words="built on Railway", plugin=True),
    Flag("repair", "create services of this stack again that were deleted", kind=bool),
    Flag("owns_state", "claim the routing state of an external Redis if it has no owner",
         kind=bool),
    Flag("rotate", "replace the internal token; live versions go on with the former one",
         kind=bool),
    Flag("plan", "print the changes without making them", kind=bool),
    # a deployment
    Flag("deployment_name", "prefix of the generated deployment id",
         default=contract.DEFAULT_DEPLOYMENT_NAME, plugin=True),
    Flag("deployment_id", "a deployment's id", "ID"),
    Flag("server_address", "the app's public address", "URL", words="the app's, then the router's"),
    Flag("web_root", "the React project, relative to the context", "FOLDER", words="the app's"),
    Flag("image_repository", "build here and push to this repository, e.g. registry/org/name",
         "REPOSITORY", plugin=True),
    Flag("image", "deploy this image, which exists, instead of building one", "IMAGE"),
    Flag("from_", "deploy the image of this deployment again, which may be gone", "ID"),
    Flag("registry_username", "the user with whom Railway pulls a private image",
         variable=contract.REGISTRY_USERNAME, words="the image's owner"),
    Flag("registry_password_file", "a file with the password or token for that", "FILE",
         words=f"${contract.REGISTRY_PASSWORD}"),
    Flag("build_arg", "build argument KEY=VALUE; may be repeated", "KEY=VALUE", dict),
    Flag("no_gitignore", "upload files that .gitignore excludes, too", kind=bool),
    Flag("env", "variable KEY=VALUE of this deployment; may be repeated", "KEY=VALUE", dict),
    Flag("instances", "processes of the new version, in its one container", "NUMBER", int, 1,
         maximum=contract.INSTANCES_AT_MOST, plugin=True),
    Flag("backend_replicas", "only 1: for more processes use --instances", "NUMBER", int, 1),
    Flag("region", "Railway's region to run in", words="the active version's, then the router's",
         plugin=True),
    Flag("memory_gb", "the memory that it may use, in GB", "GB", float, range=(0.1, 1024),
         words="the active version's", plugin=True),
    Flag("vcpus", "the vCPUs that it may use", "NUMBER", float, range=(0.1, 64),
         words="the active version's", plugin=True),
    Flag("no_promote", "leave the new deployment pending", kind=bool),
    Flag("preview", "leave it pending, and reachable only with the link that is printed",
         kind=bool),
    Flag("evict", "then delete all other versions at once, for a security release", kind=bool),
    Flag("replace_app", "deploy even if the stack serves an app of another name", kind=bool),
    Flag("new", "write a small app first, where there is none", kind=bool),
    Flag("show", "print the text of the files", kind=bool),
    Flag("keep_failed", "keep the service if the deploy fails", kind=bool),
    # its life
    Flag("canary", "make it a canary for this percentage of the new visitors; with several, step"
         " by step, each with a --bake, and promote it then", "PERCENT[,PERCENT]", float,
         several=True),
    Flag("continue_", "take up a canary's steps again, where a run was cut off", kind=bool),
    Flag("weight", "make it a canary for this percentage of the new visitors", "PERCENT", float),
    Flag("bake", "seconds to watch it after the switch; roll back if it fails more often",
         "SECONDS", int, 0, minimum=0),
    Flag("bake_latency_ms",
         "in a bake, roll back also if clearly fewer than 99 % of its answers begin in this time",
         "P99", int, words="durations are not judged", minimum=1),
    Flag("move", "the tabs of the version that drains move over when their users go to another"
         " page", kind=bool),
    Flag("move_after", "as --move, so many seconds later", "SECONDS", int,
         words="tabs stay on their version", minimum=0, maximum=86_400),
    Flag("move_idle", "as --move, and a tab that nobody has used for so long moves over by itself"
         " (affinity.js)", "SECONDS", int, words="such a tab stays", minimum=60, maximum=86_400),
    Flag("lock_wait", "seconds to wait for another deploy", "SECONDS", int,
         words="does not wait", minimum=0),
    Flag("message", "a message for the history", "TEXT", words="the commit's"),
    Flag("notify", "post the result to this URL, a secret (Slack-compatible JSON)", "URL",
         variable=contract.NOTIFY_URL),
    Flag("switch", "on or off", "on|off", positional=True),
    Flag("page", "an HTML file to show instead of the router's own page", "FILE"),
    Flag("retry_after", "seconds after which a browser may try again", "SECONDS", int, 30),
    # the rest
    Flag("repository", "repository to push the runtime image to, e.g. registry/org/pulse-railway",
         "REPOSITORY"),
    Flag("tag", "the image's tag", "TAG", words="the version"),
    Flag("build", "the build log instead of the running service's", kind=bool),
    Flag("follow", "go on until interrupted", kind=bool),
    Flag("watch", "repeat until interrupted, with rates and sparklines", kind=bool),
    Flag("every", "seconds between two updates; Railway limits API calls", "SECONDS", int, 15),
    Flag("lines", "how many lines", "NUMBER", int, 100),
    Flag("force", "promote it even if it does not answer; delete it even if new visitors get it",
         kind=bool),
    Flag("yes", "do not ask", kind=bool),
    Flag("json", "one JSON object on stdout", kind=bool),
)
# fmt: on
FLAGS: Mapping[str, Flag] = {flag.name: flag for flag in _ALL}

# what several verbs take
WHERE = [
    *"app context workspace workspace_id project project_id environment environment_id".split(),
    *"token control ssh_key".split(),
]
STACK = [*WHERE, "service", "service_prefix", "redis_service", "json"]
BASELINE = [
    *WHERE,
    *"service_prefix redis_url redis_prefix session_redis_url janitor_cron_schedule".split(),
    *"drain_ttl_seconds rollback_window_seconds keep router_replicas runtime_image".split(),
    *"registry_username registry_password_file notify json".split(),
]
MOVE = ["move", "move_after", "move_idle"]
DEPLOY = [
    *WHERE,
    *"deployment_name deployment_id service_prefix server_address web_root".split(),
    *"image_repository image from_ registry_username registry_password_file build_arg".split(),
    *"no_gitignore env instances backend_replicas region memory_gb".split(),
    *"vcpus no_promote preview".split(),
    *"evict replace_app keep_failed canary bake bake_latency_ms".split(),
    *MOVE,
    *"lock_wait message notify json".split(),
]
