"""ChatGLM-6B (v1) for transformers 5.

Importing this package registers the family, so that `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and
`AutoTokenizer` load the official checkpoint folder as it is, without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configuration_chatglm import ChatGLMConfig
from .modeling_chatglm import ChatGLMForCausalLM, ChatGLMModel
from .tokenization_chatglm import ChatGLMTokenizer

AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
AutoModel.register(ChatGLMConfig, ChatGLMModel, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM, exist_ok=True)
AutoTokenizer.register(ChatGLMConfig, tokenizer_class=ChatGLMTokenizer, exist_ok=True)

__all__ = ["ChatGLMConfig", "ChatGLMForCausalLM", "ChatGLMModel", "ChatGLMTokenizer"]
