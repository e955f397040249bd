"""Where a run's values go beside its own files: TensorBoard, W&B, MLflow, or what one adds."""
