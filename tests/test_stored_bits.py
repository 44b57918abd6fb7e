"""Models that are quantised already: taken as they are stored, or refused in one line."""

from pathlib import Path

import pytest
import torch
import transformers

from common.errors import UserError
from common.model import loading

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def quantised(small_qwen, tmp_path):
    """quantised(config): a folder whose model says it is stored so."""

    def write(stored):
        config = transformers.AutoConfig.from_pretrained(small_qwen)
        config.quantization_config = stored
        config.save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("own, bits", [(4, 0), (4, 8), (8, 0), (8, 4)])
def test_a_quantised_model_is_taken_as_it_is_stored_or_not_at_all(quantised, own, bits):
    folder = quantised({"quant_method": "bitsandbytes", "load_in_4bit": own == 4, "load_in_8bit": own == 8})
    with pytest.raises(UserError, match=f"--tuning qlora --quantization_bit {own}"):
        loading.load_base(folder, "float32", bits)


def test_what_a_quantised_model_needs_is_named(quantised):
    folder = quantised({"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(UserError, match="pip install"):
        loading.load_base(folder, "float32")


def test_a_model_stored_in_4_bits_loads_as_it_was(tmp_path):
    base = loading.load_base(ROOT / "qwen2_sft/embedded", "float32", 4)
    base.save_pretrained(tmp_path)
    again = loading.load_base(tmp_path, "float32", 4)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, base(input_ids=ids).logits)
