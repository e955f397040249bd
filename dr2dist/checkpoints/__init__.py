"""Checkpoints as files: what training writes, and inference reads too."""
