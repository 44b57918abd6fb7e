"""Serve the tuned Gemma over HTTP: OpenAI's API, POST /nlg/text_generate, a chat page.

python gemma_sft/ft_gemma/post_api.py --model_save_dir out --port 8044
"""

import sys

if __name__ == "__main__":  # finds common/ from any directory
    sys.path[0] = __file__.rpartition("gemma_sft")[0] or "."

from common.cli import parse
from common.config import ServeFlags
from common.errors import run_main
from gemma_sft.ft_gemma.config import Config
from gemma_sft.ft_gemma.predict import load_answer


def main(argv: list[str] | None = None) -> None:
    cfg, flags = parse(Config, ServeFlags, argv)
    from common.runs import chosen
    from common.serving import app

    app.run(load_answer, chosen.choose(cfg, flags), flags)


if __name__ == "__main__":
    run_main(main)
