"""Every document we send, and every one the local Railway serves, is Railway's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from graphql import (
    GraphQLInputObjectType,
    GraphQLObjectType,
    GraphQLSchema,
    build_schema,
    is_required_input_field,
    parse,
    validate,
)

from examples import demo
from pulse_railway import runtime_image
from pulse_railway.local import api as local_api
from pulse_railway.local import cli as local_cli
from pulse_railway.railway import documents
from tests import test_real_cli

janitor: Any = runtime_image.load("janitor")
ownership: Any = runtime_image.load("ownership")

SENT = {
    name: value
    for module in (documents, janitor, ownership, local_cli, demo)
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, str) and value.lstrip().startswith(("query", "mut"))
} | {
    "variables_of": documents.variables_of(3),
    "configure": documents.configure(variables=2, settings=2, disconnect=1, patch=True),
    "configure_variables": documents.configure(variables=1),
    "finish": documents.configure(variables=2, deletions=2),
    **{f"railway {verb}": text for verb, text in test_real_cli.DOCUMENTS.items()},
    **{f"railway {verb}": text for verb, text in test_real_cli.CHANGES.items()},
    "railway logs --build": test_real_cli.LOGS,
}


@pytest.fixture(scope="module")
def real() -> GraphQLSchema:
    path = os.environ.get("RAILWAY_SCHEMA")
    if not path:
        pytest.skip("RAILWAY_SCHEMA does not name Railway's schema")
    # assumed valid: it breaks a rule of newer GraphQL versions that no document depends on
    return build_schema(Path(path).read_text(), assume_valid=True)


def test_there_are_documents() -> None:
    assert len(SENT) > 20


@pytest.mark.parametrize("name", sorted(SENT))
def test_valid_against_the_local_schema(name: str) -> None:
    assert validate(local_api.schema(), parse(SENT[name])) == []


@pytest.mark.parametrize("name", sorted(SENT))
def test_valid_against_railways_schema(name: str, real: GraphQLSchema) -> None:
    assert validate(real, parse(SENT[name])) == []


def test_the_local_schema_is_a_part_of_railways(real: GraphQLSchema) -> None:
    ours: Any  # and theirs: which attributes there are depends on the kind
    for name, ours in local_api.schema().type_map.items():
        if name.startswith("__"):
            continue
        theirs: Any = real.type_map[name]
        assert type(ours) is type(theirs), name
        for field, value in getattr(ours, "fields", {}).items():
            other = theirs.fields[field]
            assert str(value.type) == str(other.type), f"{name}.{field}"
            if isinstance(ours, GraphQLObjectType):
                assert set(value.args) == set(other.args), f"{name}.{field}"
                arguments = {k: str(a.type) for k, a in value.args.items()}
                assert arguments == {k: str(a.type) for k, a in other.args.items()}, field
        if isinstance(ours, GraphQLInputObjectType):
            needed = {k for k, f in theirs.fields.items() if is_required_input_field(f)}
            assert needed <= set(ours.fields), name
        if hasattr(ours, "values"):
            assert set(ours.values) == set(theirs.values), name


def test_every_served_field_has_a_resolver() -> None:
    schema = local_api.schema()
    assert schema.query_type is not None
    assert schema.mutation_type is not None
    assert set(schema.query_type.fields) == set(local_api.QUERIES)
    assert set(schema.mutation_type.fields) == set(local_api.MUTATIONS)
