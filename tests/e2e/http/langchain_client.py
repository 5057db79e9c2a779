"""LangChain's ChatOpenAI against the real daemon with a tiny model. Usage: langchain_client.py SOCKET"""
import sys

import httpx
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

transport = httpx.HTTPTransport(uds=sys.argv[1])
common = dict(base_url="http://localhost/v1", api_key="none", model="default", temperature=0.7, seed=3, max_retries=0)
common["http_client"] = httpx.Client(transport=transport, timeout=60)
chat = ChatOpenAI(**common, max_tokens=12)
messages = [SystemMessage("Be brief."), HumanMessage("Hello")]

whole = chat.invoke(messages)
assert isinstance(whole, AIMessage) and whole.usage_metadata["output_tokens"] > 0, whole
pieces = list(chat.stream(messages, stream_usage=True))
assert "".join(piece.content for piece in pieces) == whole.content and len(pieces) > 2, (pieces, whole)
total = pieces[0]
for piece in pieces[1:]:
    total += piece
assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"], total
assert len(chat.batch([messages, messages, messages])) == 3
assert chat.bind(logprobs=True).invoke(messages).response_metadata["logprobs"]["content"]


@tool
def light(on: bool) -> str:
    """Switches the light."""
    return "done"


caller = ChatOpenAI(**common, max_tokens=300)
called = caller.bind_tools([light], tool_choice="light").invoke(messages)
assert called.tool_calls[0]["name"] == "light" and isinstance(called.tool_calls[0]["args"]["on"], bool), called
answer = ToolMessage(light.invoke(called.tool_calls[0]["args"]), tool_call_id=called.tool_calls[0]["id"])
assert chat.bind_tools([light]).invoke([*messages, called, answer]).usage_metadata


class Number(BaseModel):
    n: bool


for method in ("json_schema", "function_calling"):
    assert isinstance(caller.with_structured_output(Number, method=method).invoke(messages), Number), method

# A reader that leaves cancels; the next one is served.
stream = ChatOpenAI(**common, max_tokens=3000, extra_body={"ignore_eos": True}).stream(messages)
next(stream)
stream.close()
assert chat.invoke(messages).content == whole.content

# The other interface: a conversation that the daemon keeps.
del common["seed"]  # no field of that interface, says the client
responses = ChatOpenAI(**common, max_tokens=12, use_responses_api=True, store=True, use_previous_response_id=True)
first = responses.invoke("Hello")
second = responses.invoke([HumanMessage("Hello"), first, HumanMessage("And then?")])
assert second.response_metadata["id"] != first.response_metadata["id"] and second.text, second
print("LangChain: ok")
