"""The real ollama client against the real daemon with a tiny model. Usage: ollama_client.py SOCKET"""
import json
import sys

import httpx
import ollama

client = ollama.Client(host="http://localhost")
client._client = httpx.Client(transport=httpx.HTTPTransport(uds=sys.argv[1]), base_url="http://localhost", timeout=60)
question = [{"role": "user", "content": "Hello"}]
options = {"num_predict": 12, "seed": 3, "temperature": 0.7, "num_ctx": 2048}

models = client.list().models
assert [model.model for model in models] == ["default:latest"] and models[0].size > 0, models
shown = client.show("default")
assert "tools" in shown.capabilities and shown.modelinfo["general.architecture"], shown
assert client.ps().models[0].context_length == 4096, client.ps()

whole = client.chat("default", question, options=options)
assert whole.done and whole.message.role == "assistant" and whole.eval_count > 0, whole
assert whole.prompt_eval_count > 5 and whole.done_reason in ("stop", "length"), whole
pieces = list(client.chat("default:latest", question, options=options, stream=True))
assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content, (pieces, whole)
assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True] and len(pieces) > 1, pieces
assert pieces[-1].eval_count == whole.eval_count, pieces[-1]

generated = client.generate("default", "Hello", options=options)
assert generated.response == whole.message.content, (generated, whole)
streamed = client.generate("default", "Once", raw=True, options=options, stream=True)
assert "".join(piece.response for piece in streamed) == client.generate("default", "Once", raw=True, options=options).response
assert client.generate("default", "").done_reason == "load"

schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
formed = client.chat("default", question, format=schema, options={"num_predict": 200, "seed": 1})
assert json.loads(formed.message.content)["n"] in (1, 2), formed


def refused(status, call):
    try:
        call()
    except ollama.ResponseError as error:
        assert error.status_code == status, error
        return error.error
    raise AssertionError(f"not refused with {status}")


assert "not configured" in refused(404, lambda: client.chat("nothing", question))
assert "mirostat" in refused(400, lambda: client.chat("default", question, options={"mirostat": 1}))
assert client.pull("default").status == "success"
assert "operator" in refused(501, lambda: client.pull("another"))
assert "operator" in refused(501, lambda: client.delete("default"))
assert "embeddings" in refused(400, lambda: client.embed("default", "x"))


def light(on: bool) -> str:
    """Switches the light."""
    return "done"


# The tiny model calls nothing by itself; a conversation in which something was called is understood.
called = question + [
    {"role": "assistant", "tool_calls": [{"function": {"name": "light", "arguments": {"on": True}}}]},
    {"role": "tool", "tool_name": "light", "content": "done"},
]
assert client.chat("default", called, tools=[light], options=options).done
# A reader that leaves cancels; the next one is served.
endless = client.chat("default", question, options={**options, "num_predict": 3000}, stream=True)
next(endless)
endless.close()
assert client.chat("default", question, options=options).message.content == whole.message.content
print("ollama client: ok")
