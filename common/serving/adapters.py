"""Several adapters over one base, each by a name requests choose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.conversation import thinking
from common.cores import apart
from common.errors import UserError
from common.inference.products import give_back
from common.model import adapter, loading
from common.model.layers import causal_of
from common.runs import adopted

if TYPE_CHECKING:
    from common.inference.answerer import Answerer

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def load(answer: Answerer, specs: Sequence[str], alone: str = "tuned") -> dict[str, str | None]:
    """{name: peft's name, None for the base} of all an Answerer's model can answer as, more adapters loaded into it.

    specs: "name=folder" each. The Answerer's own adapter is called tuned, the model without any base; a model without
    adapter is called `alone`: base, or tuned where its own weights were. UserError where a name is taken or a run's
    base, prompt style or thinking is another one.
    """
    has_adapter = causal_of(answer.net) is not answer.net
    models: dict[str, str | None] = {"tuned": "default", "base": None} if has_adapter else {alone: None}
    for spec in specs:
        name, equals, folder = spec.partition("=")
        taken = dict.fromkeys((*models, "tuned", "default"))
        if not equals or not NAME.fullmatch(name) or name in taken:
            raise UserError(
                f"--adapters {spec}: 应为 must be name=folder, the name of 1 to 64 characters A-Z a-z 0-9 . _ - and "
                f"not yet taken ({', '.join(taken)})"
            )
        _check(answer, folder)
        own = f"adapter_{len(models)}"  # peft takes no dot, and finds "1" in layers.1 too
        answer.net = apart(partial(adapter.attach, answer.net, folder, own))
        models[name] = own
    give_back(answer.net)
    return models


def penalties(specs: Sequence[str]) -> dict[str, float]:
    """{name: the repetition penalty it was trained by} of those of `specs` that are runs."""
    folders = {name: folder for name, _, folder in (spec.partition("=") for spec in specs)}
    configs = {name: (adopted.find_manifest(folder) or {}).get("config", {}) for name, folder in folders.items()}
    return {name: one["repetition_penalty"] for name, one in configs.items() if "repetition_penalty" in one}


def _check(answer: Answerer, folder: str) -> None:
    """UserError where the run in `folder`, or of the checkpoint there, has another base, prompt or thinking."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(f"--adapters {folder}: 没有适配器 there is no adapter; give the folder of a finished LoRA run")
    manifest = adopted.find_manifest(folder)
    if manifest is None:
        return
    adopted.accept(folder, manifest)
    net = causal_of(answer.net)
    served = loading.base_hash(net.name_or_path), answer.style
    trained = manifest["base"]["sha256"], manifest["template"]["style"]
    if trained != served:
        raise UserError(
            f"--adapters {folder}: 基座或模板不同 another base or prompt style: trained on {manifest['base']['path']}, "
            f"{trained[1]}; served: {net.name_or_path}, {served[1]}"
        )
    mode, asked = manifest.get("config", {}).get("thinking", "auto"), answer.tokenizer.chat_template
    if mode == "auto" and not str(asked).startswith((thinking.ON, thinking.OFF)):
        return
    if loading.load_tokenizer(net.name_or_path, answer.prompt, mode).chat_template != asked:
        raise UserError(
            f"--adapters {folder}: 思考方式不同 trained with --thinking {mode}, what is served thinks otherwise; "
            "serve it by itself"
        )
