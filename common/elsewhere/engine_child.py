"""One engine asked about a folder of safetensors, run by `asking` in the Python that has the engine.

python common/elsewhere/engine_child.py ENGINE FOLDER SCRATCH

Its input: {"prompts": [[id]], "messages": [[{"role", "content"}] or null], "new_tokens", "stop_ids", "threads"}.
Its last line: {"versions", "prompts": [[id] or null], "answers": [[id]], "seconds"}: the prompts as the engine makes
ids of the messages, what it answers to the given ids, and how long the answers took. It computes in float32; an engine
that converts first does it in SCRATCH. It imports nothing of the project, whose packages its Python may lack.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Ids = list[int]
Messages = list[dict[str, str]]


class Engine(NamedTuple):
    """A model loaded in an engine: how it answers ids, and its ids of messages (None: it has no chat template)."""

    answer: Callable[[Ids], Ids]
    prompt: Callable[[Messages], Ids] | None = None


def transformers(folder: Path, scratch: Path, asked: dict[str, Any]) -> Engine:
    """The engine that the others are compared with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    torch.set_num_threads(asked["threads"])
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    net.generation_config = GenerationConfig()
    stops = asked["stop_ids"] or None
    config = GenerationConfig(max_new_tokens=asked["new_tokens"], eos_token_id=stops, pad_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def answer(ids: Ids) -> Ids:
        with torch.inference_mode():
            given = torch.tensor([ids])
            output = net.generate(given, attention_mask=torch.ones_like(given), generation_config=config)
        return output[0, len(ids) :].tolist()

    return Engine(answer, _template_of(tokenizer))


def ctranslate2(folder: Path, scratch: Path, asked: dict[str, Any]) -> Engine:
    """CTranslate2; it has no tokenizer: ids go in and out as the pieces of its vocabulary."""
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter

    made = TransformersConverter(str(folder)).convert(str(scratch / "model"), quantization="float32")
    generator = Generator(made, compute_type="float32", intra_threads=asked["threads"])
    pieces = json.loads((Path(made) / "vocabulary.json").read_text(encoding="utf-8"))
    options = {"max_length": asked["new_tokens"], "sampling_topk": 1, "include_prompt_in_result": False}

    def answer(ids: Ids) -> Ids:
        tokens, stops = [pieces[number] for number in ids], asked["stop_ids"]
        found = generator.generate_batch([tokens], end_token=stops, return_end_token=True, **options)
        return found[0].sequences_ids[0]

    return Engine(answer)


def mlx(folder: Path, scratch: Path, asked: dict[str, Any]) -> Engine:
    """mlx-lm, its weights raised to float32."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    net, tokenizer = load(str(folder))
    net.set_dtype(mx.float32)

    def answer(ids: Ids) -> Ids:
        found: Ids = []
        for token, _ in generate_step(mx.array(ids), net, max_tokens=asked["new_tokens"]):
            found.append(int(token))
            if found[-1] in asked["stop_ids"]:
                break
        return found

    return Engine(answer, _template_of(tokenizer))


def onnx(folder: Path, scratch: Path, asked: dict[str, Any]) -> Engine:
    """ONNX Runtime GenAI, converted by its own builder."""
    import onnxruntime_genai

    words = ["-i", folder, "-o", scratch / "model", "-p", "fp32", "-e", "cpu", "-c", scratch / "cache"]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, words)]
    if (done := subprocess.run(builder, stdout=sys.stderr)).returncode:
        sys.exit(done.returncode)  # it said why
    net = onnxruntime_genai.Model(str(scratch / "model"))
    tokenizer = onnxruntime_genai.Tokenizer(net)

    def answer(ids: Ids) -> Ids:
        parameters = onnxruntime_genai.GeneratorParams(net)
        parameters.set_search_options(max_length=len(ids) + asked["new_tokens"], do_sample=False)
        generator = onnxruntime_genai.Generator(net, parameters)
        generator.append_tokens(ids)
        found: Ids = []  # not its get_sequence, which leaves out the stop id
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return found

    def prompt(messages: Messages) -> Ids:
        text = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        return [int(number) for number in tokenizer.encode(text)]

    return Engine(answer, prompt)


def openvino(folder: Path, scratch: Path, asked: dict[str, Any]) -> Engine:
    """OpenVINO GenAI, converted by optimum-intel, without its default cache of 8 bits."""
    import openvino_genai
    from openvino import Tensor
    from optimum.exporters.openvino import main_export

    main_export(str(folder), scratch / "model", task="text-generation-with-past", convert_tokenizer=True)
    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "ATTENTION_BACKEND": "SDPA"}
    net = openvino_genai.LLMPipeline(str(scratch / "model"), "CPU", INFERENCE_NUM_THREADS=asked["threads"], **options)
    tokenizer, config = net.get_tokenizer(), openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.stop_token_ids = asked["new_tokens"], False, set(asked["stop_ids"])

    def answer(ids: Ids) -> Ids:
        import numpy

        given = numpy.array([ids], dtype=numpy.int64)
        mask = Tensor(numpy.ones_like(given))
        return list(net.generate(openvino_genai.TokenizedInputs(Tensor(given), mask), config).tokens[0])

    def prompt(messages: Messages) -> Ids:
        text = tokenizer.apply_chat_template(messages, True)
        return tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist()

    return Engine(answer, prompt)


def keras(folder: Path, scratch: Path, asked: dict[str, Any]) -> Engine:
    """keras-hub on JAX."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras_hub
    import numpy

    net = keras_hub.models.CausalLM.from_preset(str(folder), dtype="float32")
    net.compile(sampler="greedy")
    longest, stops = max(map(len, asked["prompts"])) + asked["new_tokens"], tuple(asked["stop_ids"])
    filler = next(id_ for id_ in itertools.count() if id_ not in stops)  # a stop id there ends the answer at once

    def answer(ids: Ids) -> Ids:
        padded = numpy.full((1, longest), filler, dtype="int32")
        padded[0, : len(ids)] = ids
        given = {"token_ids": padded, "padding_mask": numpy.arange(longest)[None] < len(ids)}
        if hasattr(net.backbone, "vision_encoder"):  # images are handed on, and JAX takes no None
            given["images"] = numpy.zeros((1, 0, 1, 1, 3), dtype="float32")
        net.preprocessor = None  # ids in, ids out
        found = numpy.asarray(net.generate(given, stop_token_ids=stops)["token_ids"])
        return found[0, len(ids) : len(ids) + asked["new_tokens"]].tolist()

    return Engine(answer)


def llama_cpp(folder: Path, scratch: Path, asked: dict[str, Any]) -> Engine:
    """llama.cpp with the GGUF file in the folder, its cache in float32; for benchmarks/engines.py."""
    import urllib.request

    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_parallel = str(next(folder.glob("*.gguf"))), 1
    options.n_ctx, options.cpuparams.n_threads = 1024, asked["threads"]
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(options)

    def ask(path: str, **body: Any) -> dict[str, Any]:
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    def answer(ids: Ids) -> Ids:
        given = {"prompt": ids, "n_predict": asked["new_tokens"], "temperature": 0, "repeat_penalty": 1}
        return ask("/completion", return_tokens=True, cache_prompt=False, **given)["tokens"]

    def prompt(messages: Messages) -> Ids:
        text = ask("/apply-template", messages=messages)["prompt"]
        return ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    return Engine(answer, prompt)


ENGINES: dict[str, tuple[Callable[[Path, Path, dict[str, Any]], Engine], tuple[str, ...]]] = {
    "transformers": (transformers, ("transformers", "torch")),
    "ctranslate2": (ctranslate2, ("ctranslate2", "transformers")),
    "mlx": (mlx, ("mlx-lm", "mlx")),
    "onnx": (onnx, ("onnxruntime-genai", "onnxruntime")),
    "openvino": (openvino, ("openvino-genai", "optimum-intel")),
    "keras": (keras, ("keras-hub", "jax")),
    "llama.cpp": (llama_cpp, ("xllamacpp",)),
}


def _template_of(tokenizer: Any) -> Callable[[Messages], Ids]:
    def prompt(messages: Messages) -> Ids:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    return prompt


def _until(ids: Ids, stops: Ids) -> Ids:
    """The ids up to the first stop id, that one included."""
    return ids[: next((place for place, number in enumerate(ids, 1) if number in stops), len(ids))]


def main(engine: str, folder: str, scratch: str) -> None:
    asked = json.load(sys.stdin)
    load, packages = ENGINES[engine]
    loaded = load(Path(folder), Path(scratch), asked)
    loaded.answer(asked["prompts"][0])  # what it prepares at the first time is not measured
    started = time.perf_counter()
    answers = [_until(loaded.answer(ids), asked["stop_ids"]) for ids in asked["prompts"]]
    seconds = time.perf_counter() - started
    prompts = [loaded.prompt(one) if loaded.prompt and one else None for one in asked["messages"]]
    versions = {name: importlib.metadata.version(name) for name in packages}
    print("\n" + json.dumps({"versions": versions, "prompts": prompts, "answers": answers, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
