"""Fine-tune ChatGLM3 on instructions with LoRA.

python chatglm_sft/ft_chatglm3/train.py --path_model_pretrain THUDM/chatglm3-6b --data_path my.jsonl
"""

import sys

if __name__ == "__main__":  # finds common/ from any directory
    sys.path[0] = __file__.rpartition("chatglm_sft")[0] or "."

from chatglm_sft import prompt_chatglm3 as prompt
from chatglm_sft.ft_chatglm3.config import Config
from common.cli import parse
from common.config import TrainFlags
from common.errors import run_main


def main(argv: list[str] | None = None) -> None:
    cfg, flags = parse(Config, TrainFlags, argv)
    import chatglm_sft.models.chatglm2  # noqa: F401 -- tells transformers about the model
    from common import distributed
    from common.data import accounts, dataset
    from common.evaluation import evaluate
    from common.model import layers, loading, template_tokens
    from common.runs import lineage, places, run

    # torch is imported only now, so that --help answers at once
    from common.training import report, samples, trainer, tuning

    distributed.join(cfg)
    places.check_training(cfg, flags)
    cfg, parent = lineage.inherit(cfg, flags)
    places.show_base(cfg, flags)
    tokenizer = loading.load_tokenizer(cfg.base, prompt, cfg.thinking)
    base = loading.load_base(cfg.base, cfg.dtype, cfg.bits, cfg.attn_implementation)
    if flags.print_targets:
        return layers.show_targets(base)
    if flags.check:
        from common.checking import check

        return check.run(cfg, flags, base, tokenizer, prompt, parent)
    rows = dataset.prepare(cfg, tokenizer, prompt)
    accounts.show_counts(rows)
    accounts.show_first(rows, tokenizer)
    held_out = evaluate.held_out_rows(cfg, rows)
    cfg = tuning.fit_targets(cfg, base, parent)
    work = run.start(cfg, flags.resume, tokenizer, prompt, rows, flags.resume_anyway, parent)
    tokens = template_tokens.to_train(base, cfg, tokenizer, prompt, rows, parent)
    net = tuning.make_trainable(base, cfg, tokens, parent)
    layers.show_parameters(net)
    sampled = samples.of(net, rows, cfg, tokenizer, prompt, work.folder)
    results = trainer.fit(net, rows, cfg, tokenizer, work.checkpoint, sampled)
    report.leave(work, net, tokenizer, results)
    report.compare(work, held_out, net, tokenizer, prompt, cfg)
    samples.conclude(work, results, cfg)


if __name__ == "__main__":
    run_main(main)
