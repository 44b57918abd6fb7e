"""The verbs the recipes share: one noun per file, plain functions, nothing that knows a model family."""

import os

# Large pages for what torch allocates on a CPU, so fewer page faults in training; read once, at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
