"""The house: the verbs the recipes share, in rooms. Plain functions, nothing that knows a model family.

Each room's docstring says what comes in, what goes out, and in what order to read its files. A room imports only lower
ones (tests/test_rooms.py holds this):

launch, garbage, device, cores, versions, peft_names  <  errors  <  opened  <  inputs, elsewhere
    <  config, files, workers  <  knobs
    <  distributed, conversation  <  data  <  model  <  runs  <  inference
    <  evaluation, engine  <  training, serving, export  <  checking

knob_files and cli stand beside them, over knobs: only recipes import cli.
"""

import logging
import os
import warnings

# Large pages for what torch allocates on a CPU, so fewer page faults in training; read once, at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# oneDNN keeps 1,024 programs by default, each for one shape: hundreds of MiB where every batch has a length of its own.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

# Where it is installed peft imports bitsandbytes, which on some CPUs asks for a package of kernels not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# What libraries say and a user cannot mend: peft 0.21 asks a transformers model by its old property name, and says that
# it ignores the doubled rank of fused experts, which it takes; bitsandbytes 0.50 tells of LLM.int8's own rounding, once
# for each layer and forward pass.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
logging.getLogger("bitsandbytes.autograd._functions").addFilter(lambda record: "inputs will be cast" not in record.msg)
