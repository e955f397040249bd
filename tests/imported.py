"""What a run imports, and nothing of it may start a thread: forked processes come from here."""

from __future__ import annotations

import importlib
import os

# Read when the library is loaded; a rank of one's own sets it before.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

for name in (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which an engine imports, and torch's compiler
    "dr2dist.training.command",
    "dr2dist.training.datasets",
    "dr2dist.training.folder",
    "dr2dist.training.hosts",
    "dr2dist.training.main",
    "dr2dist.training.plan",
    "dr2dist.training.run",
    "torchmetrics",
):
    importlib.import_module(name)
