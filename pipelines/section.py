"""What every part of the YAML is: frozen, typed, without unknown fields.

A field either bears identity (it changes what is computed, so it enters fingerprints) or concerns
execution only (where, with how many workers: never in a fingerprint). `identity()` is the one place
that tells them apart.
"""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def execution(default: Any, **options: Any) -> Any:
    """A field that does not bear identity."""
    return Field(default=default, json_schema_extra={"execution": True}, **options)


class Section(BaseModel):
    """A part of the YAML: frozen, and without unknown fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and not {int, float}.isdisjoint({kind, *get_args(kind)}):
            raise ValueError("a number is needed, and YAML reads yes, no, on and off as booleans")
        return value


def identity(section: BaseModel) -> dict[str, Any]:
    """Return the fields that change what is computed, as plain JSON values."""
    fields = type(section).model_fields
    bearing = {
        name
        for name, field in fields.items()
        if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra["execution"])
    }
    return section.model_dump(mode="json", include=bearing)
