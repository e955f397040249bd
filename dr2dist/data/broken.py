"""What a file is said to be that turns out broken when more of it is read."""


class BrokenError(ValueError):
    """A member of a sample that cannot be decoded."""
