"""Railway's GraphQL API over the local state.

access.py says who may see what, views.py what each type answers. queries.py, mutations.py,
environments.py and tokens.py have a resolver a field; patch.py and services.py change what exists.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import graphql
from graphql import (
    DocumentNode,
    ExecutionResult,
    GraphQLError,
    GraphQLResolveInfo,
    GraphQLSchema,
    build_schema,
    default_field_resolver,
    parse,
    validate,
)

from pulse_railway.local import state as model
from pulse_railway.local.api import environments, tokens
from pulse_railway.local.api.access import Caller, Rules, need_instance, need_service
from pulse_railway.local.api.mutations import MUTATIONS
from pulse_railway.local.api.queries import QUERIES

SCHEMA = Path(__file__).parent.with_name("schema.graphql")


def _resolve(source: Any, info: GraphQLResolveInfo[Caller], **arguments: Any) -> Any:
    table = {"Query": QUERIES, "Mutation": MUTATIONS}.get(info.parent_type.name)
    if table is None:
        return default_field_resolver(source, info, **arguments)
    return table[info.field_name](info.context, **arguments)


def schema() -> GraphQLSchema:
    return build_schema(SCHEMA.read_text())


@functools.lru_cache(maxsize=256)
def parsed(document: str) -> DocumentNode:
    """A document's tree. The same few come again and again. Raises GraphQLSyntaxError."""
    return parse(document)


@functools.lru_cache(maxsize=256)
def violations(compiled: GraphQLSchema, document: str) -> list[GraphQLError]:
    return validate(compiled, parsed(document))


async def execute(
    compiled: GraphQLSchema, caller: Caller, document: str, values: dict[str, Any] | None
) -> dict[str, Any]:
    """Run a document; the answer as Railway shapes it. Mutations are saved."""
    if errors := violations(compiled, document):
        result = ExecutionResult(data=None, errors=errors)
    else:
        done = graphql.execute(
            compiled,
            parsed(document),
            context_value=caller,
            variable_values=values,
            field_resolver=_resolve,
        )
        result = await done if inspect.isawaitable(done) else done
    caller.state.save()
    answer: dict[str, Any] = {"data": result.data}
    if result.errors:
        answer["errors"] = [
            {
                "message": error.message,
                "locations": [
                    {"line": place.line, "column": place.column} for place in error.locations or []
                ],
                "path": error.path,
                "extensions": {"code": "INTERNAL_SERVER_ERROR"},
                "traceId": model.new_id()[:8],
            }
            for error in result.errors
        ]
    return answer


__all__ = [
    "MUTATIONS",
    "QUERIES",
    "Caller",
    "Rules",
    "environments",
    "execute",
    "need_instance",
    "need_service",
    "parsed",
    "schema",
    "tokens",
]
