// The real openai client for Node against the real daemon with a tiny model, over its Unix socket.
// Usage: node openai_client.mjs SOCKET, with the packages of package.json in NODE_MODULES/node_modules
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const installed = createRequire(`${process.env.NODE_MODULES}/`);
const { OpenAI } = installed("openai");
const { Agent, fetch } = installed("undici");

const dispatcher = new Agent({ connect: { socketPath: process.argv[2] } });
const client = new OpenAI({ baseURL: "http://localhost/v1", apiKey: "none", maxRetries: 0, fetch, fetchOptions: { dispatcher } });
const question = [{ role: "user", content: "Hello" }];
const common = { model: "default", messages: question, max_tokens: 12, temperature: 0.7, seed: 3 };

// One answer, whole and in pieces.
const whole = await client.chat.completions.create(common);
assert.equal(whole.choices[0].message.role, "assistant");
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
let text = "";
let last;
for await (const chunk of await client.chat.completions.create({ ...common, stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta.content ?? "";
  last = chunk;
}
assert.equal(text, whole.choices[0].message.content);
assert.deepEqual(last.usage, whole.usage);
const helped = client.chat.completions.stream(common);
assert.equal((await helped.finalChatCompletion()).choices[0].message.content, text);

// A tool that must be called, by the client's own loop of calls.
const parameters = { type: "object", properties: { on: { type: "boolean" } }, required: ["on"], additionalProperties: false };
const light = { type: "function", function: { name: "light", description: "Switches it.", parameters } };
const called = await client.chat.completions.create({ ...common, max_tokens: 300, tools: [light], tool_choice: "required" });
const call = called.choices[0].message.tool_calls[0];
assert.equal(called.choices[0].finish_reason, "tool_calls");
assert.equal(typeof JSON.parse(call.function.arguments).on, "boolean");
const pieces = client.chat.completions.stream({ ...common, max_tokens: 300, tools: [light], tool_choice: "required" });
assert.deepEqual((await pieces.finalChatCompletion()).choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
const after = [...question, called.choices[0].message, { role: "tool", tool_call_id: call.id, content: "done" }];
assert.ok((await client.chat.completions.create({ ...common, messages: after, tools: [light] })).choices[0]);

// An answer of a form.
const schema = { type: "object", properties: { n: { enum: [1, 2] } }, required: ["n"], additionalProperties: false };
const response_format = { type: "json_schema", json_schema: { name: "number", strict: true, schema } };
const formed = await client.chat.completions.parse({ ...common, max_tokens: 200, response_format });
assert.ok([1, 2].includes(formed.choices[0].message.parsed.n), formed.choices[0].message.content);

// Cancelled in the middle; the next one is served.
const abort = new AbortController();
const endless = await client.chat.completions.create(
  { ...common, max_tokens: 3000, stream: true, ignore_eos: true }, { signal: abort.signal });
for await (const _ of endless) {
  abort.abort();
}
assert.ok((await client.chat.completions.create(common)).choices[0]);

// A response in the background, heard twice: from its beginning, and on from what the first reader had.
const asked = { model: "default", input: "Hello", max_output_tokens: 60, temperature: 0.7, seed: 5, ignore_eos: true };
const heard = [];
let id;
for await (const event of await client.responses.create({ ...asked, background: true, stream: true })) {
  id ??= event.response?.id;
  heard.push(event);
  if (event.type === "response.output_text.delta" && heard.length > 8) {
    break;
  }
}
for await (const event of await client.responses.retrieve(id, { stream: true, starting_after: heard.at(-1).sequence_number })) {
  heard.push(event);
}
const said = heard.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta).join("");
assert.equal(said, (await client.responses.retrieve(id)).output_text);
const long = await client.responses.create({ ...asked, max_output_tokens: 3000, background: true });
assert.ok(["cancelled", "incomplete"].includes((await client.responses.cancel(long.id)).status));

// Refusals are the client's own errors.
const refused = async (kind, change) => assert.rejects(client.chat.completions.create({ ...common, ...change }), kind);
await refused(OpenAI.NotFoundError, { model: "nothing" });
await refused(OpenAI.BadRequestError, { temperature: -1 });
await assert.rejects(client.embeddings.create({ model: "default", input: "x" }), OpenAI.BadRequestError);
assert.deepEqual((await client.models.list()).data.map((model) => model.id), ["default"]);
console.log("openai client for Node: ok");
