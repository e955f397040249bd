"""What a run imports, and nothing of it may start a thread: forked processes come from here."""

import os

# Read when the library is loaded; a rank of one's own sets it before.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
