"""The version, read by setup.py too."""

__version__ = "0.4.0"
"""What exported files, checkpoints and run folders name as the version that wrote them."""
