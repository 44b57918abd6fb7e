"""A llama.cpp server in a process of its own, where a fault of its library ends nothing else; which is asked over HTTP.

python common/elsewhere/llama_server.py FILE CONTEXT THREADS: prints its address, and ends when its input does.
"""

from __future__ import annotations

import sys


def main(file: str, context: str, threads: str) -> None:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = file, int(context), 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.cpuparams.n_threads, options.warmup = int(threads), False
    server = xllamacpp.Server(options)
    print(f"\n{server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
