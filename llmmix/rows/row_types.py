"""The Arrow types of rows: found over all rows of a file, merged, and rows brought to them.

Whole and broken numbers together are broken numbers. Text together with numbers or truth values is
text. A list or an object together with anything else keeps its own shape in each row, as
`datasets.Json` does.
"""

import functools
import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

JSON = pa.json_()


def type_of_rows(rows: list[dict[str, Any]]) -> pa.DataType:
    """The struct that all rows fit, once `fitted` has brought them to it."""
    try:
        return pa.array(rows).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return _merged_all(map(_type_of, rows))


def merged(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type of a column in which both occur."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields = {field.name: field.type for field in one}
        for field in other:
            fields[field.name] = merged(fields.get(field.name, pa.null()), field.type)
        return pa.struct(list(fields.items()))
    if pa.types.is_list(one) and pa.types.is_list(other):
        return pa.list_(merged(one.value_type, other.value_type))
    if any(pa.types.is_nested(kind) or kind == JSON for kind in (one, other)):
        return JSON
    numbers = all(pa.types.is_integer(k) or pa.types.is_floating(k) for k in (one, other))
    return pa.float64() if numbers else pa.string()


def fitted(value: Any, kind: pa.DataType) -> Any:
    """A value as its column takes it: a number as text, or a whole number as a broken one."""
    if kind == JSON and isinstance(value, str):
        return json.dumps(value)  # else `datasets` would read the text "4" as the number
    if value is None or kind == JSON:
        return value
    if pa.types.is_struct(kind):
        return {field.name: fitted(value.get(field.name), field.type) for field in kind}
    if pa.types.is_list(kind):
        return [fitted(entry, kind.value_type) for entry in value]
    if pa.types.is_string(kind) and not isinstance(value, str):
        return json.dumps(value)  # true, 1987, 0.5
    if pa.types.is_floating(kind):
        return float(value)  # Arrow refuses to round a large whole number
    return value


def table_of(rows: list[dict[str, Any]], kind: pa.DataType) -> pa.Table:
    """Rows as a table; `kind` holds no JSON."""
    try:
        values = pa.array(rows, type=kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        values = pa.array([fitted(row, kind) for row in rows], type=kind)
    return pa.Table.from_struct_array(values)


def holds_json(kind: pa.DataType) -> bool:
    """Whether a type has JSON in it, which Arrow itself does not make of values."""
    return kind == JSON or any(
        holds_json(kind.field(number).type) for number in range(kind.num_fields)
    )


def _merged_all(kinds: Iterable[pa.DataType]) -> pa.DataType:
    return functools.reduce(merged, kinds, pa.null())


def _type_of(value: Any) -> pa.DataType:
    if value is None:
        return pa.null()
    if isinstance(value, dict):
        return pa.struct([(name, _type_of(entry)) for name, entry in value.items()])
    if isinstance(value, list):
        return pa.list_(_merged_all(map(_type_of, value)))
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):  # one too long for a column of numbers is kept as text
        return pa.int64() if -(1 << 63) <= value < 1 << 63 else pa.string()
    return pa.float64() if isinstance(value, float) else pa.string()
