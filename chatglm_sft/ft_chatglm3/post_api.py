"""Serve the tuned ChatGLM3 over HTTP: OpenAI's API, POST /nlg/text_generate, a chat page.

python chatglm_sft/ft_chatglm3/post_api.py --model_save_dir out --port 8035
"""

import sys

if __name__ == "__main__":  # finds common/ from any directory
    sys.path[0] = __file__.rpartition("chatglm_sft")[0] or "."

from chatglm_sft.ft_chatglm3.config import Config
from chatglm_sft.ft_chatglm3.predict import load_answer
from common.cli import parse
from common.config import ServeFlags
from common.errors import run_main


def main(argv: list[str] | None = None) -> None:
    cfg, flags = parse(Config, ServeFlags, argv)
    from common.runs import chosen
    from common.serving import app

    app.run(load_answer, chosen.choose(cfg, flags), flags)


if __name__ == "__main__":
    run_main(main)
