"""What all sections of a configuration share: strict keys, and no setting without effect."""

from __future__ import annotations

import os
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Unit = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path; `~` at its beginning is the home folder."""


class Section(BaseModel):
    """A part of the configuration: frozen, and strict about its keys.

    A task's own sections are subclasses; each field has a description, which
    `dr2dist train --settings` shows.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    def idle(self) -> dict[str, str]:
        """Settings without effect beside the others, with the reason; giving one is refused."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        """pydantic would take `true` (which YAML 1.1 also writes `on` and `yes`) for 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(
                    f"{name} is {str(value).lower()}: true and false are not allowed here"
                )
        return values

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        for name, reason in self.idle().items():
            if name in self.model_fields_set:
                raise ValueError(f"{name} has no effect with {reason}: leave it out")
        return self

    def effective(self) -> dict[str, Any]:
        """All settings as plain values, defaults filled in, those without effect left out."""
        values = self.model_dump(mode="json")
        for name in type(self).model_fields:
            part = getattr(self, name)
            if isinstance(part, Section):
                values[name] = part.effective()
        return {name: value for name, value in values.items() if name not in self.idle()}
