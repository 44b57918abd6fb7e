"""Write the tuned ChatGLM as one whole model that needs no adapter: safetensors, tokenizer, template, Ollama Modelfile.

python chatglm_sft/ft_chatglm/export.py --model_save_dir out --output_dir out_merged --dtype bfloat16
"""

import sys

if __name__ == "__main__":  # finds common/ from any directory
    sys.path[0] = __file__.rpartition("chatglm_sft")[0] or "."

from chatglm_sft import prompt
from chatglm_sft.ft_chatglm.config import Config
from common.cli import parse
from common.config import ExportFlags
from common.errors import run_main


def main(argv: list[str] | None = None) -> None:
    cfg, flags = parse(Config, ExportFlags, argv)
    import chatglm_sft.models.chatglm  # noqa: F401 -- tells transformers about the model
    from common.export import engines, folder, merging, proof, repair, verify
    from common.runs import chosen

    if flags.repair:
        return repair.mend(cfg, flags, prompt)
    cfg = chosen.choose(cfg, flags)
    if flags.verify:
        return verify.check(cfg, flags, prompt)
    place = folder.new_folder(cfg, flags)
    tuned = proof.load(cfg, prompt)
    folder.check_format(tuned, cfg, flags, prompt)
    expected = proof.measure(tuned)
    whole = merging.merge(tuned)
    proof.check_merge(whole, expected)
    folder.write(whole, expected, place, cfg, flags, prompt)
    engines.show(tuned, place, flags, prompt)


if __name__ == "__main__":
    run_main(main)
