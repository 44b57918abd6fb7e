"""The OpenAPI document of the service, made from the tables the bodies are checked against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.serving.validation import Field

KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
APART = {
    "reasoning_content": {"type": "string", "description": "what was thought before an answer"},
    "tool_calls": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "id": {"type": "string"},
                "type": {"type": "string", "enum": ["function"]},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
                },
            },
        },
    },
}
TOOL_CHOICE = {"type": "string", "enum": ["auto", "none"], "description": "none: the tools are not offered"}
MESSAGES = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"type": "string", "nullable": True},
            **{name: APART[name] for name in ("reasoning_content", "tool_calls")},
            "tool_call_id": {"type": "string", "description": "of the call that a tool's message answers"},
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


def document(
    text_generate: Mapping[str, Field], chat: Mapping[str, Field], completion: Mapping[str, Field]
) -> dict[str, Any]:
    """The OpenAPI 3.0 document; each argument is {name: Field} of a body."""
    chat_fields = {"messages": MESSAGES, "tool_choice": TOOL_CHOICE, "stop": STOP}
    bodies: dict[str, tuple[str, Mapping[str, Field], dict[str, Any]]] = {
        "/nlg/text_generate": ("One question, one text", text_generate, {}),
        "/v1/chat/completions": (
            "OpenAI's chat completions; reasoning_content and tool_calls of an answer where there are any",
            chat,
            chat_fields,
        ),
        "/v1/completions": ("OpenAI's completions", completion, {"prompt": PROMPT, "stop": STOP}),
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


def _post(summary: str, fields: Mapping[str, Field], others: Mapping[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {**{name: _property(field) for name, field in fields.items()}, **others}
    required = [name for name in ("messages", "prompt") if name in properties]
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if required:
        schema["required"] = required
    content = {"application/json": {"schema": schema}}
    return {"summary": summary, "requestBody": {"required": True, "content": content}, "responses": _responses()}


def _property(field: Field) -> dict[str, Any]:
    found: dict[str, Any] = {"type": KINDS[field.kind], "description": field.about}
    if field.default is not None:
        found["default"] = field.default
    if field.least is not None:
        found |= {"minimum": field.least, "maximum": field.most}
    return found


def _responses() -> dict[str, Any]:
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    statuses = {"400": "wrong", "401": "no key", "429": "full", "503": "not ready"}
    return {"200": {"description": "the answer"}} | {s: {"description": d, **error} for s, d in statuses.items()}
