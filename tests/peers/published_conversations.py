"""Sixteen conversations as data files hold them, for chat templates that are in use."""

from __future__ import annotations

from typing import Any

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What time is it in Oslo?"}
REPLY = {"role": "assistant", "content": "Noon."}
MORE = [{"role": "user", "content": "And in Rome?"}, {"role": "assistant", "content": "Noon, too."}]
PROPERTIES = {"city": {"type": "string", "description": "its name"}, "days": {"type": "integer"}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["city"]}
TOOL = {
    "type": "function",
    "function": {"name": "time_in", "description": "The time in a city.", "parameters": PARAMETERS},
}


def call(city: str) -> dict[str, Any]:
    """A call as OpenAI writes it."""
    function = {"name": "time_in", "arguments": {"city": city, "days": 2}}
    return {"type": "function", "id": "call12345", "function": function}


def calling(*cities: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [call(city) for city in cities]}


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


RESULT = {"role": "tool", "name": "time_in", "tool_call_id": "call12345", "content": "12:00"}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [USER, REPLY]},
    "a system prompt": {"messages": [SYSTEM, USER, REPLY]},
    "two turns": {"messages": [USER, REPLY, *MORE]},
    "a system prompt and three turns": {"messages": [SYSTEM, USER, REPLY, *MORE, *MORE]},
    "many scripts": {
        "messages": [
            {"role": "user", "content": "Zoë: 你好, שלום, \U0001f469\u200d\U0001f52c e\u0301 \u00bd"},
            {"role": "assistant", "content": "Привет! \U0001f600"},
        ]
    },
    "white space and signs": {
        "messages": [
            {"role": "user", "content": "  <b>{{ x }}</b> & 'q'\n\n"},
            {"role": "assistant", "content": "\n\ta = {'b': \"c\"}  \n"},
        ]
    },
    "an empty reply": {"messages": [USER, {"role": "assistant", "content": ""}, *MORE]},
    "an empty system prompt": {"messages": [{"role": "system", "content": ""}, USER, REPLY]},
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "One, "}, {"type": "text", "text": "two?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
        ]
    },
    "tools without a call": {"messages": [USER, REPLY], "tools": [TOOL]},
    "a call and its result": {"messages": [USER, calling("Oslo"), RESULT, REPLY], "tools": [TOOL]},
    "two calls at once": {
        "messages": [SYSTEM, USER, calling("Oslo", "Rome"), RESULT, RESULT, REPLY, *MORE],
        "tools": [TOOL],
    },
    "reasoning": {"messages": [USER, REPLY | {"reasoning_content": "East of Greenwich."}]},
    "reasoning in an earlier turn": {
        "messages": [USER, REPLY | {"reasoning_content": "East of Greenwich."}, *MORE]
    },
    "reasoning between tags": {
        "messages": [USER, {"role": "assistant", "content": "<think>\nEast.\n</think>\n\nNoon."}]
    },
    "a call after reasoning": {
        "messages": [USER, calling("Oslo") | {"reasoning_content": "Ask."}, RESULT, REPLY],
        "tools": [TOOL],
    },
}
