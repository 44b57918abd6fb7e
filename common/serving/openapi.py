"""The OpenAPI document of the service, made from the tables the bodies are checked against."""

KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
MESSAGES = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
            "content": {"type": "string"},
        },
    },
}
PROMPT = {
    "description": "text, texts, token ids, or lists of token ids",
    "oneOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ],
}
STOP = {
    "description": "texts that end the answer and are left out",
    "oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 8}],
}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": "string", "nullable": True},
                "code": {"type": "string", "nullable": True},
            },
        }
    },
}


def document(text_generate, chat, completion):
    """The OpenAPI 3.0 document; each argument is {name: Field} of a body."""
    prompt_or_messages = {"messages": MESSAGES}, {"prompt": PROMPT}
    bodies = {
        "/nlg/text_generate": ("One question, one text", text_generate, {}),
        "/v1/chat/completions": ("OpenAI's chat completions", chat, prompt_or_messages[0] | {"stop": STOP}),
        "/v1/completions": ("OpenAI's completions", completion, prompt_or_messages[1] | {"stop": STOP}),
    }
    pages = {
        "/v1/models": "The models served",
        "/health": "ok, or 503: loading, draining, dead",
        "/metrics": "Counts, in Prometheus' text format",
    }
    paths = {path: {"post": _post(*about)} for path, about in bodies.items()}
    paths |= {path: {"get": {"summary": about, "responses": _responses()}} for path, about in pages.items()}
    return {
        "openapi": "3.0.3",
        "info": {"title": "chinese-sft", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _post(summary, fields, others):
    properties = {name: _property(field) for name, field in fields.items()} | others
    required = [name for name in ("messages", "prompt") if name in properties]
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    schema |= {"required": required} if required else {}
    content = {"application/json": {"schema": schema}}
    return {"summary": summary, "requestBody": {"required": True, "content": content}, "responses": _responses()}


def _property(field):
    found = {"type": KINDS[field.kind], "description": field.about}
    if field.default is not None:
        found["default"] = field.default
    if field.least is not None:
        found |= {"minimum": field.least, "maximum": field.most}
    return found


def _responses():
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    statuses = {"400": "wrong", "401": "no key", "429": "full", "503": "not ready"}
    return {"200": {"description": "the answer"}} | {s: {"description": d, **error} for s, d in statuses.items()}
