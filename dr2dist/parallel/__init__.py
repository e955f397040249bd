"""Training on DeepSpeed: engines, verdicts, shards and stages."""

from __future__ import annotations

import logging


def _tells(record: logging.LogRecord) -> bool:
    """Not that a machine without a GPU has none, which DeepSpeed warns of in every process."""
    return "Setting accelerator to CPU" not in record.getMessage()


logging.getLogger("DeepSpeed").addFilter(_tells)  # before DeepSpeed is imported
