"""What tasks on classes share: options, names, and means over the classes that there are samples
of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from dr2dist.config.task import TaskOptions
from dr2dist.data.index import Index
from dr2dist.errors import UserError
from dr2dist.tasks.task import Row, Task

Weight = Annotated[float, Field(gt=0)]


class ClassOptions(TaskOptions):
    """A head of one output for each class."""

    num_classes: int = Field(ge=2, description="classes of the head")

    def outputs(self) -> int:
        """See TaskOptions."""
        return self.num_classes

    def check_one_a_class(self, name: str) -> None:
        """Raises ValueError unless a setting has a value for each class, if it has any."""
        values = getattr(self, name)
        if values is not None and len(values) != self.num_classes:
            raise ValueError(
                f"{name} has {len(values)} values, allowed is one for each of num_classes, "
                f"{self.num_classes}"
            )


class ClassTask(Task):
    """A task whose outputs are one for each class; names are numbers where there are
    none."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.classes = self.classes or tuple(map(str, range(self.options.num_classes)))
        name, count = Counter(self.classes).most_common(1)[0]
        if count > 1:
            raise UserError(f"{count} classes are called '{name}', allowed is a name for each")

    def check_classes(self, index: Index, source: str) -> None:
        """Raises UserError if shards have another number of classes, or others by name."""
        count = self.options.num_classes
        if len(index.classes) != count:
            raise UserError(
                f"task.num_classes is {count}, the shards have {len(index.classes)} classes: "
                f"{', '.join(index.classes[:10])}"
            )
        self.check_names(index, source)

    def check_names(self, index: Index, source: str) -> None:
        """Raises UserError if shards have classes of other names."""
        if index.classes != self.classes:
            raise UserError(
                f"{source}: has the classes {', '.join(index.classes[:10])}; allowed are "
                f"{', '.join(self.classes[:10])}"
            )

    def shares_by_name(self, shares: Sequence[float]) -> Row:
        """p_NAME for each class, rounded."""
        return {f"p_{n}": round(s, 6) for n, s in zip(self.classes, shares, strict=True)}

    def told_by_class(self, name: str, values: Mapping[str, float | None]) -> dict[str, Any]:
        """Of a report: values by class under a name, None where a class has no sample,
        absent_classes and classes."""
        return {
            name: dict(values),
            "absent_classes": [each for each, value in values.items() if value is None],
            "classes": list(self.classes),
        }


def mean_of_present(values: Mapping[str, float | None]) -> float:
    """Over classes that there are samples of; NaN if there are none."""
    own = [value for value in values.values() if value is not None]
    return sum(own) / len(own) if own else float("nan")
