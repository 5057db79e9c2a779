"""The real openai client against the real daemon, over its Unix socket. Usage: openai_client.py SOCKET"""
import sys

import httpx
import openai

client = openai.OpenAI(
    base_url="http://localhost/v1",
    api_key="none",
    max_retries=0,
    http_client=httpx.Client(transport=httpx.HTTPTransport(uds=sys.argv[1])),
)
question = [{"role": "user", "content": "What is the capital of France?"}]
expected = "The capital of France is Paris."

models = client.models.list().data
assert [model.id for model in models] == ["default"], models
assert client.models.retrieve("default").id == "default"

whole = client.chat.completions.create(model="default", messages=question, temperature=0)
assert whole.choices[0].message.content == expected, whole
assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason == "stop", whole
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 40, whole.usage

stream = client.chat.completions.create(
    model="default", messages=question, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == expected, text
assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 3, chunks
assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].choices == [], chunks[-2:]
assert chunks[-1].usage == whole.usage, chunks[-1]

stopped = client.chat.completions.create(model="default", messages=question, temperature=0, stop=[" is"])
assert stopped.choices[0].message.content == "The capital of France", stopped
short = client.chat.completions.create(model="default", messages=question, temperature=0, max_completion_tokens=2)
assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2, short

seeded = [
    client.completions.create(model="default", prompt="Once upon a time", seed=7, max_tokens=12, temperature=1).choices[0].text
    for _ in range(2)
]
assert seeded[0] == seeded[1] != "", seeded
tokens = client.completions.create(model="default", prompt=[504, 3575, 282], max_tokens=3, temperature=0, stream=True)
assert "".join(chunk.choices[0].text for chunk in tokens) != ""


def refused(kind, **arguments):
    try:
        client.chat.completions.create(**{"model": "default", "messages": question, **arguments})
    except kind as error:
        return error.body
    raise AssertionError(f"{arguments} was not refused with {kind}")


assert refused(openai.NotFoundError, model="nothing")["code"] == "model_not_found"
assert refused(openai.BadRequestError, n=5)["param"] == "n"
assert refused(openai.BadRequestError, store=True)["param"] == "store"
image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
assert "messages[0]" in refused(openai.BadRequestError, messages=[{"role": "user", "content": [image]}])["param"]
assert refused(openai.BadRequestError, extra_body={"strict": True, "tempratur": 1})["param"] == "tempratur"
parts = [{"role": "user", "content": [{"type": "text", "text": question[0]["content"]}]}]
assert client.chat.completions.create(model="default", messages=parts, temperature=0).choices[0].message.content == expected

# Several answers, and how likely their tokens were, whole and streamed.
several = dict(model="default", messages=question, n=3, seed=5, max_tokens=8, logprobs=True, top_logprobs=2)
whole = client.chat.completions.create(**several)
assert [choice.index for choice in whole.choices] == [0, 1, 2], whole
streamed = {0: "", 1: "", 2: ""}
tokens = {0: [], 1: [], 2: []}
for chunk in client.chat.completions.create(**several, stream=True):
    for choice in chunk.choices:
        streamed[choice.index] += choice.delta.content or ""
        tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
for choice in whole.choices:
    assert streamed[choice.index] == choice.message.content, (streamed, whole)
    assert tokens[choice.index] == choice.logprobs.content, choice
    assert b"".join(bytes(one.bytes) for one in choice.logprobs.content).decode() == choice.message.content, choice
    assert all(len(one.top_logprobs) == 2 and one.logprob <= one.top_logprobs[0].logprob <= 0 for one in choice.logprobs.content)
assert whole.usage.completion_tokens <= 24 and len({choice.message.content for choice in whole.choices}) > 1, whole
echoed = client.completions.create(model="default", prompt="Once upon", echo=True, max_tokens=2).choices[0].text
assert echoed.startswith("Once upon") and len(echoed) > 9, echoed
assert refused(openai.BadRequestError, temperature=-1)["param"] == "temperature"
assert refused(openai.BadRequestError, messages=[])["param"] == "messages"
too_long = refused(openai.BadRequestError, messages=[{"role": "user", "content": "word " * 9000}])
assert too_long["code"] == "context_length_exceeded" and "8192" in too_long["message"], too_long

# A client that stops reading ends the request; the next one is served.
abandoned = client.chat.completions.create(model="default", messages=question, stream=True, extra_body={"ignore_eos": True})
next(iter(abandoned))
abandoned.close()
assert client.chat.completions.create(model="default", messages=question, temperature=0).choices[0].message.content == expected
print("openai client: ok")
