"""ChatGLM2-6B and ChatGLM3-6B, one architecture, for transformers 5.

Importing this package registers it, so that `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and `AutoTokenizer` load
the official checkpoint folders as they are, without `trust_remote_code`. They call themselves "chatglm", and their
tokenizer `ChatGLMTokenizer`, as the first ChatGLM does, whose classes hand such folders over.
"""

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from .. import chatglm  # noqa: F401 -- what "chatglm" and "ChatGLMTokenizer" name
from .configuration_chatglm2 import ChatGLM2Config
from .modeling_chatglm2 import ChatGLM2ForCausalLM, ChatGLM2Model
from .tokenization_chatglm2 import ChatGLM2Tokenizer

AutoModel.register(ChatGLM2Config, ChatGLM2Model, exist_ok=True)
AutoModelForCausalLM.register(ChatGLM2Config, ChatGLM2ForCausalLM, exist_ok=True)
AutoTokenizer.register(ChatGLM2Config, tokenizer_class=ChatGLM2Tokenizer, exist_ok=True)

__all__ = ["ChatGLM2Config", "ChatGLM2ForCausalLM", "ChatGLM2Model", "ChatGLM2Tokenizer"]
