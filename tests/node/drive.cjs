// Drives a Node SDK for tests/test_sdks.py: node drive.cjs SDK CALL...
// BASE_URL and API_KEY come by the environment. One line of JSON for each call: what the SDK made of the answer, or of
// the refusal. NODE_PATH says where the SDKs are, so this is CommonJS: an import would not look there.
'use strict';

const [sdk, ...calls] = process.argv.slice(2);
const options = { baseURL: process.env.BASE_URL, maxRetries: 2 };
const messages = [{ role: 'user', content: 'Say hello. Größe 日本語' }];

const openai = (client) => ({
  async chat() {
    const answer = await client.chat.completions.create({ model: 'gpt-test', messages });
    return { text: answer.choices[0].message.content, object: answer.object, usage: answer.usage };
  },
  async chat_stream() {
    let text = '';
    let chunks = 0;
    for await (const chunk of await client.chat.completions.create({ model: 'gpt-test', messages, stream: true })) {
      text += chunk.choices[0]?.delta?.content ?? '';
      chunks += 1;
    }
    return { text, chunks };
  },
  async responses() {
    const answer = await client.responses.create({ model: 'gpt-test', input: 'Say hello' });
    return { text: answer.output_text, object: answer.object };
  },
  async responses_stream() {
    let text = '';
    let last = '';
    for await (const event of await client.responses.create({ model: 'gpt-test', input: 'hello', stream: true })) {
      if (event.type === 'response.output_text.delta') text += event.delta;
      last = event.type;
    }
    return { text, last };
  },
  async embeddings() {
    const answer = await client.embeddings.create({ model: 'embed-test', input: 'hello' });
    return { numbers: answer.data[0].embedding.length, finite: answer.data[0].embedding.every(Number.isFinite) };
  },
  async models() {
    const found = [];
    for await (const model of client.models.list()) found.push(model.id);
    return { found };
  },
  async not_allowed() {
    return { answer: await client.moderations.create({ model: 'mod-test', input: 'hello' }) };
  },
});

const anthropic = (client) => ({
  async messages() {
    const answer = await client.messages.create({ model: 'claude-test', max_tokens: 50, messages });
    return { text: answer.content[0].text, object: answer.type, usage: answer.usage };
  },
  async messages_stream() {
    const stream = client.messages.stream({ model: 'claude-test', max_tokens: 50, messages });
    let text = '';
    stream.on('text', (piece) => (text += piece));
    const whole = await stream.finalMessage();
    return { text, whole: whole.content[0].text, stop: whole.stop_reason };
  },
  async count_tokens() {
    const answer = await client.messages.countTokens({ model: 'claude-test', messages });
    return { tokens: answer.input_tokens };
  },
  async models() {
    const found = [];
    for await (const model of client.models.list()) found.push(model.id);
    return { found };
  },
  async not_allowed() {
    return { answer: await client.models.retrieve('claude-test') };
  },
});

async function main() {
  let table;
  if (sdk === 'openai') {
    const { OpenAI } = require('openai');
    table = openai(new OpenAI({ ...options, apiKey: process.env.API_KEY }));
  } else {
    const { Anthropic } = require('@anthropic-ai/sdk');
    table = anthropic(new Anthropic({ ...options, apiKey: process.env.API_KEY }));
  }
  for (const call of calls) {
    let line;
    try {
      line = { call, ...(await table[call]()) };
    } catch (error) {
      line = { call, error: error.constructor.name, status: error.status, message: error.message };
    }
    console.log(JSON.stringify(line));
  }
}

main();
