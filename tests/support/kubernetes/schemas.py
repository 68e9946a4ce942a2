"""The custom resources' schemas, made strict: what the API server would drop or refuse is an error."""

import functools
import json
from typing import Any

import jsonschema

from tests.support.repository import SHARED

FOLDER = SHARED / "schemas"


def errors_of(body: dict[str, Any]) -> list[str]:
    """What is wrong with a custom resource, one line each, with the place."""
    group, _, version = body["apiVersion"].partition("/")
    validator = _validator(f"{group}_{version}_{body['kind']}")
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(body)]


@functools.cache
def _validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_closed(json.loads((FOLDER / f"{name}.json").read_text())))


def _closed(schema: Any) -> Any:
    """A copy in which an object takes only the properties that are listed, unless it says that it takes others."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    open_ = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_:
        closed["additionalProperties"] = False
    return closed
