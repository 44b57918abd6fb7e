"""Model families this project ships itself because transformers does not."""

# Fields that only ChatGLM2's and ChatGLM3's config.json have. All three generations say model_type "chatglm".
CHATGLM2_FIELDS = {"padded_vocab_size", "ffn_hidden_size", "kv_channels", "multi_query_attention", "rmsnorm"}
