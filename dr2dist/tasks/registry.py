"""The tasks that configurations and exported files may name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dr2dist.config.task import TaskOptions, register_sections, sections_of
from dr2dist.errors import UserError, nearest, one_line
from dr2dist.tasks.classification import Classification
from dr2dist.tasks.multilabel import Multilabel
from dr2dist.tasks.regression import Regression
from dr2dist.tasks.task import Task
from dr2dist.tasks.temporal_action_detection import TemporalActionDetection
from dr2dist.tasks.video_classification import VideoClassification

log = logging.getLogger(__name__)

_tasks: dict[str, type[Task]] = {}


def register_task(task: type[Task]) -> type[Task]:
    """Makes a task known by its name, and returns it; may be used as a decorator.

    A second one of a name takes the place of the first, with a notice: cells of notebooks are run
    again. Raises UserError for a class that is not a whole task, or whose inputs are not among
    its fields.
    """
    missing = [name for name in ("name", "fields", "inputs", "best") if not hasattr(task, name)]
    missing += sorted(getattr(task, "__abstractmethods__", ()))
    if missing:
        raise UserError(f"register_task: {task.__name__} does not say {', '.join(missing)}")
    for name in task.inputs:
        if name not in task.fields:
            raise UserError(
                f"register_task: {task.__name__}.inputs names {name}, which is not in its fields, "
                f"{', '.join(task.fields)}"
            )
    if task.name in _tasks and _tasks[task.name] is not task:
        log.warning("the task '%s' is registered anew", task.name)
    _tasks[task.name] = task
    register_sections(task.name, task.Options, task.Data)
    return task


def supported_tasks() -> tuple[str, ...]:
    """Names of the tasks that are known, the built-in ones first."""
    return tuple(_tasks)


def task_of(name: str) -> type[Task]:
    """The task of a name. Raises UserError if it is not known."""
    if name not in _tasks:
        raise UserError(
            f"task '{name}' is not known{nearest(name, _tasks)}; allowed are {', '.join(_tasks)}"
        )
    return _tasks[name]


def make_task(
    options: TaskOptions, classes: Sequence[str], preprocessing: Mapping[str, Any]
) -> Task:
    """The task that a configuration's section `task` names."""
    return task_of(options.name)(options, classes, preprocessing)


def options_from(values: Mapping[str, Any], plugins: Sequence[str] = ()) -> TaskOptions:
    """A section `task` from a file's values.

    plugins: modules that the file's task came from. Raises UserError for a task that is not known,
    or values that are not its own.
    """
    name = str(values.get("name"))
    if name not in _tasks and plugins:
        raise UserError(
            f"task '{name}' is not known here; it was registered by {', '.join(plugins)}: import "
            f"that first, or give --plugin {plugins[0]}"
        )
    task_of(name)
    try:
        return sections_of(name)[0].model_validate(values)
    except ValidationError as error:
        raise UserError(f"task {name}: {one_line(error)}") from None


for _task in (
    Classification,
    Multilabel,
    Regression,
    VideoClassification,
    TemporalActionDetection,
):
    register_task(_task)
