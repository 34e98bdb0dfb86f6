// OpenAI's JavaScript client against a server: node with_openai_js.mjs URL prints a JSON line for each feature.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "developer", content: "You are brief." }, { role: "user", content: "Name three fruits." }];
const tell = (feature, right, got) =>
  console.log(JSON.stringify({ feature, right: Boolean(right), got: JSON.stringify(got).slice(0, 60) }));
const chat = (more = {}) =>
  client.chat.completions.create({ model, messages, max_completion_tokens: 12, temperature: 0, ...more });

const plain = await chat();
const text = plain.choices[0].message.content;
tell("plain", text, text);
tell("usage", plain.usage.total_tokens === plain.usage.prompt_tokens + plain.usage.completion_tokens, plain.usage);
let streamed = "", usage = null;
for await (const chunk of await chat({ stream: true })) streamed += chunk.choices[0].delta.content ?? "";
tell("streaming", streamed === text, streamed);
for await (const chunk of await chat({ stream: true, stream_options: { include_usage: true } })) usage = chunk.usage;
tell("streaming with usage", usage && usage.total_tokens === plain.usage.total_tokens, usage);
const events = client.chat.completions.stream({ model, messages, max_completion_tokens: 12, temperature: 0 });
const whole = await events.finalChatCompletion();
tell("its own stream helper", whole.choices[0].message.content === text, whole.choices[0].finish_reason);
const two = await chat({ n: 2, temperature: 1, seed: 1 });
tell("n", new Set(two.choices.map((choice) => choice.message.content)).size === 2, two.choices.length);
const stop = text.split(" ")[1];
const stopped = (await chat({ stop: [stop] })).choices[0].message.content;
tell("stop", stopped === text.slice(0, text.indexOf(stop)), stopped);
const logged = (await chat({ logprobs: true, top_logprobs: 2 })).choices[0].logprobs.content;
tell("logprobs", logged.map((token) => token.token).join("") === text, logged.length);
const schema = {
  type: "object", properties: { fruits: { type: "array", items: { type: "string" }, maxItems: 2 } },
  required: ["fruits"], additionalProperties: false,
};
const written = await chat({
  max_completion_tokens: 120, response_format: { type: "json_schema", json_schema: { name: "fruits", schema } },
});
tell("json_schema", Array.isArray(JSON.parse(written.choices[0].message.content).fruits), written.choices[0].message);
for (const [feature, kind, more] of [
  ["too long", OpenAI.BadRequestError, { messages: [{ role: "user", content: "word ".repeat(5000) }] }],
  ["unknown model", OpenAI.NotFoundError, { model: "nothing" }],
  ["a wrong value", OpenAI.BadRequestError, { temperature: 9 }],
]) {
  try {
    await chat(more);
    tell(feature, false, "an answer");
  } catch (error) {
    tell(feature, error instanceof kind && error.message, error.message);
  }
}
const aborted = await chat({ stream: true, max_completion_tokens: 200 });
let n = 0;
for await (const chunk of aborted) if (++n === 3) aborted.controller.abort();
tell("abort", n === 3 || n === 4, n);
