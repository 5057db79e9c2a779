#!/usr/bin/env python3
"""Writes deepseek_v32.jsonl: prompts of the model's own encoder for a few conversations.

    make_deepseek_v32.py ENCODER.py

ENCODER.py is `encoding/encoding_dsv32.py` of deepseek-ai/DeepSeek-V3.2 or a copy whose tools block still has its blank
lines (mlx-lm's `chat_templates/deepseek_v32.py`; those of vLLM and SGLang have lost them).
"""
import copy
import importlib.util
import json
import pathlib
import sys

OUT = pathlib.Path(__file__).with_name("deepseek_v32.jsonl")
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather of a day, 天气 <b>", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1.5}},
        "required": ["city"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
FORMAT = {"type": "object", "properties": {"x": {"type": "number"}}}
SYSTEM = {"role": "system", "content": "Be brief."}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, reasoning=None, calls=()):
    message = {"role": "assistant", "content": text, "reasoning_content": reasoning}
    function = lambda name, arguments: {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if calls:
        message["tool_calls"] = [{"id": at, "type": "function", "function": function(*call)} for at, *call in calls]
    return message


def tool(call, text):
    return {"role": "tool", "tool_call_id": call, "content": text}


ARGUMENTS = {"city": "Paris \"x\"\n<y>", "days": 2, "l": [1, {"a": None}], "f": 1e-7, "b": True}
CALLS = [("1", "get_weather", ARGUMENTS), ("2", "now", {})]
LOOP = [user("a"), assistant("x", "r1", [("1", "now", {})]), tool("1", "t1"), assistant("", "r2", [("2", "now", {})]), tool("2", "t2")]
CONVERSATIONS = [
    ([user("Hi")], {}),
    ([user("Hi")], {"thinking": True}),
    ([user("Hi")], {"tools": TOOLS}),
    ([SYSTEM, user("Hi"), assistant("Hello."), user("Bye  \n")], {"thinking": True, "response_format": FORMAT}),
    ([SYSTEM, user("1+1?"), assistant("2", "easy"), user("2+2?")], {"thinking": True}),
    ([SYSTEM, user("Paris?"), assistant("", "look", CALLS), tool("1", "{\"sun\": 1}"), tool("2", "noon"),
      assistant("Sunny.", "done"), user("And 北京?")], {"thinking": True, "tools": TOOLS, "response_format": FORMAT}),
    (LOOP, {"thinking": True}),
    (LOOP, {}),
    ([SYSTEM, {"role": "developer", "content": "Use French."}], {"thinking": True}),
]


def main():
    spec = importlib.util.spec_from_file_location("encoder", sys.argv[1])
    encoder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(encoder)
    lines = []
    for messages, options in CONVERSATIONS:
        theirs = copy.deepcopy(messages)
        extra = {key: value for key, value in options.items() if key != "thinking"}
        if extra:
            # As SGLang does: on the first message, an empty system message if there is none.
            if theirs[0]["role"] != "system":
                theirs.insert(0, {"role": "system", "content": ""})
            theirs[0].update(extra)
        mode = "thinking" if options.get("thinking") else "chat"
        expect = encoder.encode_messages(theirs, thinking_mode=mode)
        lines.append(json.dumps({"messages": messages, **options, "expect": expect}, ensure_ascii=False) + "\n")
    OUT.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()
