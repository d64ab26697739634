"""Railway's GraphQL API over the local state.

access.py checks permissions, views.py has the fields of each type. queries.py, mutations.py,
environments.py and tokens.py have one resolver a field; patch.py and services.py change the state.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import graphql
from graphql import (
    DefinitionNode,
    DocumentNode,
    ExecutionResult,
    GraphQLError,
    GraphQLResolveInfo,
    GraphQLSchema,
    OperationDefinitionNode,
    OperationType,
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
    """Return a document's syntax tree, cached. Raises GraphQLSyntaxError."""
    return parse(document)


@functools.lru_cache(maxsize=256)
def violations(compiled: GraphQLSchema, document: str) -> list[GraphQLError]:
    return validate(compiled, parsed(document))


def _is_mutation(node: DefinitionNode) -> bool:
    return isinstance(node, OperationDefinitionNode) and node.operation is OperationType.MUTATION


async def execute(
    compiled: GraphQLSchema, caller: Caller, document: str, values: dict[str, Any] | None
) -> dict[str, Any]:
    """Carry out a document, save what a mutation changed, and return an answer as Railway's.

    Args:
        values: the document's variables.
    """
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
        if any(_is_mutation(node) for node in parsed(document).definitions):
            caller.state.save()
    answer: dict[str, Any] = {"data": result.data}
    if result.errors:
        answer["errors"] = [
            {
                "message": error.message,
                "locations": [
                    {"line": location.line, "column": location.column}
                    for location in error.locations or []
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
