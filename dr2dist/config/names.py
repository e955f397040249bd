"""What settings were called before, and what others call them."""

from __future__ import annotations

MOVED = {"train.checkpoint_every": "checkpoint.steps", "train.keep": "checkpoint.keep"}
"""Settings of earlier versions, and what they are called now."""

BEFORE = {"data": {"orientation": "stored", "order": "dealt"}}
"""What runs of earlier versions did where there was no setting, and the default does otherwise."""

OWN_SETTINGS = {
    "num_classes": "task.num_classes",
    "img_size": "model.image_size",
    "in_chans": "model.in_channels",
    "drop_path_rate": "model.drop_path",
    "proj_drop_rate": "model.dropout",
    "pretrained": "model.weights",
    "checkpoint_path": "model.weights",
}
"""timm's arguments of a model that are settings of their own."""
MEANT = {
    **OWN_SETTINGS,
    "learning_rate": "optim.lr",
    "lr": "optim.lr",
    "wd": "optim.weight_decay",
    "weight_decay": "optim.weight_decay",
    "optimizer": "optim.name",
    "warmup_ratio": "optim.warmup",
    "max_grad_norm": "optim.clip",
    "clip_grad": "optim.clip",
    "batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulate",
    "accumulation_steps": "train.accumulate",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "early_stopping": "train.patience",
    "save_steps": "checkpoint.steps",
    "save_total_limit": "checkpoint.keep",
    "input_size": "model.image_size",
    "frames": "model.options.frames",
    "num_frames": "model.options.frames",
    "clip_len": "model.options.frames",
    "sampling_rate": "data.stride",
    "frame_interval": "data.stride",
    "num_clips": "data.views",
    "num_crops": "data.crops",
    "classes": "task.num_classes",
    "output_dir": "output",
    "zero_stage": "parallel.zero",
    "workers": "data.num_workers",
    "train_dir": "data.train",
    "val_dir": "data.val",
}
"""What others call a setting."""
