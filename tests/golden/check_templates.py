#!/usr/bin/env python3
"""Compares prompts of our renderer with those of Jinja2 as transformers sets it up.

    check_templates.py TOKENIZER.json TEMPLATE.jinja...

Needs transformers and `cargo build --release -p sparsed-model --examples`. Prints each difference and a summary.
"""
import copy
import json
import pathlib
import subprocess
import sys

from transformers.utils import chat_template_utils

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOW = 1767225600  # 2026-01-01


def strftime_now(form):
    import datetime

    return datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc).strftime(form)


def call(name, arguments):
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather \"now\", 天气 <b>", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "where"}, "days": {"type": "integer"}},
    "required": ["city"]}}}]
CALLED = [
    {"role": "user", "content": "Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [call("get_weather", {"city": "Paris & <x>", "days": 2})]},
    {"role": "tool", "content": "{\"sun\": 1}", "tool_call_id": "call00001", "name": "get_weather"},
]
CASES = [
    ([{"role": "user", "content": " Hi <there> & \"you\" "}], {}),
    ([SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}], {}),
    ([SYSTEM, {"role": "user", "content": "Hi"}], {"thinking": True}),
    ([SYSTEM, {"role": "user", "content": "Hi"}], {"thinking": False}),
    ([SYSTEM, {"role": "user", "content": "Hi"}], {"tools": TOOLS}),
    (CALLED, {"tools": TOOLS}),
    (CALLED + [{"role": "assistant", "content": "Sunny.", "reasoning_content": "Easy."}, {"role": "user", "content": "And 北京?"}],
     {"tools": TOOLS, "thinking": True}),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "why"},
      {"role": "user", "content": "c"}], {}),
]


def reference(template, messages, options):
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    if "thinking" in options:
        variables |= {"thinking": options["thinking"], "enable_thinking": options["thinking"]}
    compiled = chat_template_utils._compile_jinja_template(template)
    compiled.globals["strftime_now"] = strftime_now
    if "tools" in options:
        variables["tools"] = options["tools"]
    return compiled.render(messages=messages, add_generation_prompt=True, **variables)


def as_text(messages):
    messages = copy.deepcopy(messages)
    for message in messages:
        for made in message.get("tool_calls", []):
            made["function"]["arguments"] = json.dumps(made["function"]["arguments"], ensure_ascii=False)
    return messages


def main():
    tokenizer, *templates = sys.argv[1:]
    cases = []
    for path in templates:
        template = pathlib.Path(path).read_text()
        for at, (messages, options) in enumerate(CASES):
            expect = []
            # Objects or text for arguments: both are right where a template takes both.
            for variant in (messages, as_text(messages)):
                try:
                    expect.append(reference(template, variant, options))
                except Exception as error:  # a template's refusal
                    expect.append(error)
            request = {"template": template, "messages": as_text(messages), "now": NOW, "bos": "<s>", "eos": "</s>", **options}
            cases.append((pathlib.Path(path).name, at, expect, request))
    lines = "".join(json.dumps(request) + "\n" for *_, request in cases)
    renderer = ROOT / "target/release/examples/render"
    done = subprocess.run([renderer, tokenizer], input=lines, capture_output=True, text=True, check=True)
    equal = refused = 0
    for (name, at, expect, _), line in zip(cases, done.stdout.splitlines(), strict=True):
        ours = json.loads(line)
        texts = [text for text in expect if isinstance(text, str)]
        if "error" in ours and (not texts or "takes no tools" in ours["error"]):
            refused += 1
        elif ours.get("text") in texts:
            equal += 1
        else:
            print(f"{name} case {at}:\n  ours   {ours}\n  theirs {expect[0]!r}")
    print(f"{len(cases)} prompts: {equal} equal, {refused} refused by both or for tools the template does not take")
    sys.exit(equal + refused != len(cases))


if __name__ == "__main__":
    main()
