"""Which column of a Parquet file is what: pictures, captions, conversations, names.

What the settings do not say the file may: by the features that Hugging Face `datasets` writes, or by the type of a
picture.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pyarrow as pa

from components.shard.source_settings import SourceSettings
from llava.data.schema import IMAGE_COLUMNS
from llava.errors import RefusedInput


class Columns(NamedTuple):
    """What is read of a file. `captions`, `conversations`: names of columns; `id` None: names are made."""

    images: tuple[str, ...]
    captions: tuple[str, ...]
    conversations: str | None
    id: str | None

    @property
    def names(self) -> list[str]:
        """All that are there."""
        one = (self.conversations, self.id)
        return list(
            dict.fromkeys([*self.images, *self.captions, *(name for name in one if name is not None)])
        )


def columns_of(settings: SourceSettings, schema: pa.Schema, where: str) -> Columns:
    """Which column is what; RefusedInput names the setting that can tell."""
    own_id = () if settings.id_column is None else (settings.id_column,)
    wanted = {"image_columns": settings.image_columns, "texts": settings.texts, "id_column": own_id}
    for setting, names in wanted.items():
        if missing := [name for name in names if name not in schema.names]:
            raise RefusedInput(
                f"shard.{setting}: {where} has no column {missing[0]!r}; there are {', '.join(schema.names)}"
            )
    captions, conversations = [], []
    for name in settings.texts:
        kind = schema.field(name).type
        if _is_text(kind) or (_is_list(kind) and _is_text(kind.value_type)):
            captions.append(name)
        elif _is_list(kind) and pa.types.is_struct(kind.value_type):
            conversations.append(name)
        else:
            raise RefusedInput(
                f"shard.texts: column {name!r} of {where} is {kind}; give texts, lists of texts or conversations"
            )
    if len(conversations) > 1:
        raise RefusedInput(f"shard.texts: {' and '.join(conversations)} are both conversations; choose one")
    images = settings.image_columns or _usual_images(schema, where)
    for name in images:
        if not _holds_images(schema.field(name).type):
            raise RefusedInput(
                f"shard.image_columns: column {name!r} of {where} is {schema.field(name).type}"
            )
    id_column = settings.id_column or ("id" if "id" in schema.names else None)
    return Columns(images, tuple(captions), conversations[0] if conversations else None, id_column)


def _usual_images(schema: pa.Schema, where: str) -> tuple[str, ...]:
    """The columns that the file itself calls pictures."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = [name for name, feature in features.items() if _is_feature(feature) and name in schema.names]
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        found = []
    if not found:
        found = [field.name for field in schema if _is_picture(field.type)]
    if len(found) > 1 and found != [*IMAGE_COLUMNS]:
        raise RefusedInput(f"{where}: pictures in {', '.join(found)}; choose in shard.image_columns")
    return tuple(found)


def _is_feature(feature: Any) -> bool:
    if isinstance(feature, list):
        return any(_is_feature(one) for one in feature)
    return isinstance(feature, dict) and (
        feature.get("_type") == "Image" or _is_feature(feature.get("feature"))
    )


def _is_picture(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    return fields.keys() == {"bytes", "path"} and _is_bytes(fields["bytes"]) and _is_text(fields["path"])


def _holds_images(kind: pa.DataType) -> bool:
    inner = kind.value_type if _is_list(kind) else kind
    return _is_picture(inner) or _is_bytes(inner)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
