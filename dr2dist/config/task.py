"""The sections `task` and `data` of a task: what a task's own add is theirs."""

from __future__ import annotations

import importlib
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    PlainSerializer,
    create_model,
    model_validator,
)

from dr2dist.config.section import Place, Positive, Section
from dr2dist.config.text import shown_value
from dr2dist.errors import UserError, nearest


class TaskOptions(Section):
    """What is learnt. A task's own options are a subclass, whose `name` registering adds."""

    name: str = Field("", description="the task")

    def outputs(self) -> int:
        """Outputs of the backbone's own head; 0 for a task that brings a head."""
        return 0

    def __reduce__(self) -> tuple[Any, ...]:
        """By the task's name: loader processes get options with their task, and the class that says
        the name is made when the task is registered."""
        return _again, (self.name, self.model_dump())

    def check_micro_batch(self, micro_batch: int) -> None:
        """Raises ValueError for samples of a micro-batch that the task cannot take."""


class CacheOptions(Section):
    """Where shards are kept that are not on this machine."""

    folder: Place = Field(description="on a disk of the node; all its processes share it")
    limit: ByteSize = Field(description="that it never exceeds, such as 200GB")
    of: Literal["remote", "all"] = Field(
        "remote", description="which shards; all: those of mounted file systems too"
    )
    patience: float = Field(
        60.0, ge=0, description="seconds for which a server is asked again that does not answer"
    )


class Source(Section):
    """One of several sources of training samples, which are mixed."""

    shards: Place = Field(description="a folder, brace pattern, index, or URL of one")
    passes: float = Field(1.0, gt=0, description="over its samples in an epoch, such as 2 or 0.25")


def _listed(value: Any) -> Any:
    """One source stands alone, or is a member of a list; it may be said by its shards."""
    listed = [value] if isinstance(value, str | dict) else value
    if not isinstance(listed, list):
        return listed
    return [{"shards": each} if isinstance(each, str) else each for each in listed]


def stands_alone(sources: tuple[Source, ...]) -> bool:
    """Whether nothing is mixed: one source, and one pass over it is an epoch."""
    return len(sources) == 1 and sources[0].passes == 1


def _as_said(sources: tuple[Source, ...]) -> Any:
    alone = stands_alone(sources)
    return sources[0].shards if alone else [source.effective() for source in sources]


Sources = Annotated[
    tuple[Source, ...],
    BeforeValidator(_listed),
    PlainSerializer(_as_said),
    Field(min_length=1),
]


class Data(Section):
    """Shards, and how their samples are prepared."""

    train: Sources = Field(
        description="shards: a folder, brace pattern, index, or URL of one; or a list of several "
        "{shards: ..., passes: ...}, which are mixed"
    )
    val: Place | None = Field(None, description="the same for validation; null: none")
    num_workers: int = Field(0, ge=0, description="loader processes of each rank")
    order: Literal["streams", "dealt"] = Field(
        "streams", description="of training samples; dealt: as runs of versions before 0.3 had it"
    )
    streams: Positive = Field(
        64, description="that the shards are cut into; nodes read different ones, so divide them"
    )
    shuffle_window: Positive | None = Field(
        None, description="samples within which a stream is mixed; null: ten shards"
    )
    unreadable: Literal["fail", "skip"] = Field(
        "fail", description="samples that cannot be read; skip: counted, another one instead"
    )
    cache: CacheOptions | None = Field(None, description="of shards that are elsewhere")
    fields: dict[str, str] = Field(
        {}, description="members of a sample instead of the task's, such as {label: json#category}"
    )

    def idle(self) -> dict[str, str]:
        """See Section."""
        dealt = self.order == "dealt"
        return dict.fromkeys(("streams", "shuffle_window"), "order dealt") if dealt else {}

    @model_validator(mode="after")
    def _one_source_dealt(self) -> Self:
        if self.order == "dealt" and not stands_alone(self.train):
            raise ValueError("order is dealt, allowed with one source of one pass only")
        return self

    def preprocessing(self) -> dict[str, Any]:
        """What is said here of how samples are prepared, in place of what the model says."""
        return {}


def _again(name: str, values: dict[str, Any]) -> TaskOptions:
    return sections_of(name)[0].model_validate(values)


class _Sections(NamedTuple):
    options: type[TaskOptions]
    data: type[Data]


DEFAULT_TASK = "classification"
OWN = "dr2dist.tasks.registry"
"""Registers dr2dist's own tasks. It stands above the configuration, which does not know them."""
_tasks: dict[str, _Sections] = {}


def register_sections(name: str, options: type[TaskOptions], data: type[Data]) -> None:
    """Makes the sections of a task known, whose name they then say; others of the name go."""
    tag: Any = Literal[name]
    described = Field(name, description="the task")
    _tasks[name] = _Sections(
        create_model(
            options.__name__, __base__=options, __doc__=options.__doc__, name=(tag, described)
        ),
        data,
    )


def sections_of(name: Any) -> tuple[type[TaskOptions], type[Data]]:
    """The sections `task` and `data` of a task. Raises UserError for an unknown name."""
    known = _known()
    if not isinstance(name, str) or name not in known:
        hint = nearest(name, _tasks) if isinstance(name, str) else ""
        raise UserError(
            f"task.name: found {shown_value(name)}; allowed is {', '.join(_tasks)}{hint}"
        )
    return _tasks[name]


def task_names() -> tuple[str, ...]:
    """The tasks that are known."""
    return tuple(_known())


def _known() -> dict[str, _Sections]:
    """Those that were registered: dr2dist's own are plugins that need not be named."""
    importlib.import_module(OWN)
    return _tasks
