"""Which other engines give an exported model's text, and how fast: a line for each engine and model, from a run.

python benchmarks/engines.py
python benchmarks/engines.py --gemma gemma-3-270m --qwen Qwen2.5-0.5B --checkpoints gemma-3-270m --engines mlx

Each engine runs in float32 in a virtual environment of its own (benchmarks/engines.txt says what is installed there).
The models are the embedded ones, small random ones of each kind, and the folders --checkpoints, exported as export.py
does. A line has how many of 8 greedy answers are equal, the largest gap of logits where one parts, how many prompts get
the same ids by the engine's own tokenizer and template, and how many times as fast as transformers the answers came.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from measure import ROOT, VENVS, machine, pinned, python_of, table

WIDE = dict(hidden_size=64, intermediate_size=128, head_dim=32)
ROPE = {"rope_type": "default", "rope_theta": 1e6}
TWO_THETAS = {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
SCALED = TWO_THETAS | {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
GEMMA = WIDE | dict(query_pre_attn_scalar=32, sliding_window=24)
GEMMA3 = GEMMA | dict(num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"])
GEMMA4 = WIDE | dict(sliding_window=24, global_head_dim=64, hidden_size_per_layer_input=32)
GEMMA4 |= dict(num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"])
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32)
LINEAR |= {"num_hidden_layers": 4, "rope_parameters": ROPE | {"partial_rotary_factor": 0.25}}
RANDOM = {
    "Gemma 1": ("gemma", "Gemma", WIDE),
    "Gemma 2": ("gemma", "Gemma2", GEMMA | {"sliding_window": 4096}),
    "Gemma 2, past its window": ("gemma", "Gemma2", GEMMA),
    "Gemma 3": ("gemma", "Gemma3", GEMMA3 | {"rope_parameters": TWO_THETAS}),
    "Gemma 3, scaled": ("gemma", "Gemma3", GEMMA3 | {"rope_parameters": SCALED}),
    "Gemma 4": ("gemma", "Gemma4", GEMMA4),
    "Qwen2": ("qwen", "Qwen2", WIDE),  # theta 10,000
    "Qwen2-MoE": ("qwen", "Qwen2Moe", WIDE | EXPERTS | {"shared_expert_intermediate_size": 96}),
    "Qwen3": ("qwen", "Qwen3", WIDE | {"rope_parameters": ROPE}),
    "Qwen3-MoE": ("qwen", "Qwen3Moe", WIDE | EXPERTS | {"rope_parameters": ROPE, "norm_topk_prob": True}),
    "Qwen3.5": ("qwen", "Qwen3_5", WIDE | LINEAR),
    "Qwen3.5-MoE": ("qwen", "Qwen3_5Moe", WIDE | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 96}),
}
PROMPTS = {"gemma": "gemma_sft.prompt", "qwen": "qwen2_sft.prompt"}


def main():
    args = arguments()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import exports

    from common.elsewhere import asking
    from common.errors import UserError
    from common.export import folder

    print(machine(), flush=True)
    lines, problems = [], []
    for name, family, base, make in models(args):
        with tempfile.TemporaryDirectory() as scratch:
            prompt, place = importlib.import_module(PROMPTS[family]), Path(scratch)
            expected = exports.measured(base, prompt, make())
            folder.save(expected.tuned.net, expected.tuned, place / "whole", prompt)
            alone = asking.ask("transformers", place / "whole", questions(expected))
            for engine in args.engines:
                try:
                    line = cells(engine, place, expected, alone, prompt, python_of(engine, __file__, args.venvs))
                except (UserError, SystemExit) as problem:
                    line = ["–"] * 4 + [""]
                    problems.append(f"- {engine}, {name}: {problem}")
                    print(problems[-1])
                lines.append([name, engine, *line])
                print(*lines[-1], sep=" | ", flush=True)
    header = ["model", "engine", "same text", "gap", "same prompt", "speed", "versions"]
    print("\n" + table(header, lines) + "\n\n" + "\n".join(problems))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = pinned(__file__)
    names = ["embedded Gemma", "embedded Qwen", *RANDOM]
    parser.add_argument(
        "--engines", nargs="+", choices=known, default=list(known), metavar="ENGINE", help=", ".join(known)
    )
    parser.add_argument("--models", nargs="*", choices=names, default=names, metavar="MODEL", help=", ".join(names))
    parser.add_argument(
        "--gemma", default=ROOT / "gemma_sft/embedded", help="folder whose tokenizer the random Gemma take"
    )
    parser.add_argument("--qwen", default=ROOT / "qwen2_sft/embedded", help="the same for Qwen")
    parser.add_argument("--checkpoints", nargs="*", default=[], help="folders of Gemma or Qwen to be asked too")
    parser.add_argument("--venvs", type=Path, default=VENVS, help="where the environments are made")
    return parser.parse_args()


def models(args):
    """(name, family, folder of the tokenizer, a function that makes the model) of each model."""
    import exports
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def read(base):
        return lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    bases = {"gemma": args.gemma, "qwen": args.qwen}
    for name in args.models:
        if name in RANDOM:
            family, classes, options = RANDOM[name]
            kind = exports.Kind("", PROMPTS[family], classes, {}, **options)
            yield (
                name,
                family,
                bases[family],
                lambda kind=kind, base=bases[family]: exports.model_of(kind, AutoTokenizer.from_pretrained(base)),
            )
        else:
            family = name.split()[1].lower()
            base = ROOT / importlib.import_module(PROMPTS[family]).RECIPES.split("/")[0] / "embedded"
            yield name, family, base, read(base)
    for base in map(Path, args.checkpoints):
        yield base.name, "gemma" if "gemma" in base.name.lower() else "qwen", base, read(base)


def questions(expected):
    import torch

    from common.elsewhere import asking
    from common.export import proof

    tuned = expected.tuned
    messages = [[{"role": turn.role, "content": turn.text} for turn in turns] for turns in tuned.questions]
    return asking.Questions(tuned.prompts, messages, tuned.stop_ids, proof.NEW_TOKENS, torch.get_num_threads())


def cells(engine, place, expected, alone, prompt, python):
    """What an engine gives, beside `alone`, what transformers gave in a process of its own."""
    from common.elsewhere import asking
    from common.export import gguf_file, verify

    given = place / "whole"
    if engine == "llama.cpp":
        given = place / "gguf"
        if not given.exists():
            given.mkdir()
            gguf_file.write(expected.tuned.net, expected, given / "model.gguf", "f32", prompt)
    found = asking.ask(engine, given, questions(expected), python)
    triples = zip(found.answers, expected.answers, expected.logits, strict=True)
    parted = [verify.parted_ids(*one) for one in triples]
    gap = max((place.gap for place in parted if place), default=0)
    prompts = sum(one == ids for one, ids in zip(found.prompts, expected.tuned.prompts, strict=True))
    return [
        f"{parted.count(None)}/{len(parted)}",
        f"{gap:.2g}" if gap else "",
        f"{prompts}/{len(parted)}" if any(found.prompts) else "no template",
        f"{alone.seconds / found.seconds:.1f}",
        ", ".join(" ".join(pair) for pair in found.versions.items()),
    ]


if __name__ == "__main__":
    main()
