"""The verbs the recipes share: one noun per file, plain functions, nothing that knows a model family."""

import logging
import os

# Large pages for what torch allocates on a CPU, so fewer page faults in training; read once, at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# oneDNN keeps 1,024 programs by default, each for one shape: hundreds of MiB where every batch has a length of its own.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

# Where it is installed peft imports bitsandbytes, which on some CPUs asks for a package of kernels not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
