// A real NestJS microservice for the Python side to call: `node --import ./versions.js server.js '{"url": URL}'`.
import 'reflect-metadata';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  Ctx, EventPattern, KafkaContext, MessagePattern, MqttContext, NatsContext, Payload, RmqContext, RpcException,
} from '@nestjs/microservices';
import { concat, of, range, throwError } from 'rxjs';
import { isMain, serve } from './peer.js';
import { decorate, listen } from './service.js';

class PeerController {
  stored = [];

  sum(numbers) { return numbers.reduce((total, number) => total + number, 0); }
  echo(payload) { return payload; }
  answerNull() { return null; }
  answerNothing() {}
  stream({ count }) { return range(0, count); }
  async slow({ ms }) { await sleep(ms); return ms; }
  // NestJS 11 knows of none.
  metadata(payload, context) { return context.getMetadata?.(); }
  headers(payload, context) { return headersOf(context); }
  failWithText() { throw new RpcException('boom'); }
  failWithObject() {
    throw new RpcException({ statusCode: 404, code: 'user-not-found', message: 'nf' });
  }
  failUnexpectedly() { throw new Error('secret'); }
  streamThenFail() { return concat(of(1), throwError(() => new RpcException('broken'))); }
  patternText(payload, context) { return channelOf(context); }
  patternTextOfObject(payload, context) { return channelOf(context); }
  patternTextOfList(payload, context) { return channelOf(context); }
  note(payload) { this.stored.push(payload); }
  noteOrder(payload) { this.stored.push({ order: payload }); }
  noteLogged(payload, context) { this.stored.push({ channel: channelOf(context), data: payload }); }
  answerAsked(payload, context) { return { channel: channelOf(context), data: payload }; }
  notes() { return this.stored; }
  who() { return this.name; }
}

function channelOf(context) {
  const getter = ['getPattern', 'getSubject', 'getChannel', 'getTopic'].find((name) => name in context);
  return context[getter]();
}

// What came beside the data, where the transport has a place for it.
function headersOf(context) {
  if (context instanceof NatsContext) {
    const headers = context.getHeaders();
    return { headers: Object.fromEntries((headers?.keys() ?? []).map((key) => [key, headers.values(key).join()])) };
  }
  if (context instanceof MqttContext) {
    const { qos, retain, properties } = context.getPacket();
    return { headers: { ...properties?.userProperties }, qos, retain };
  }
  if (context instanceof RmqContext) {
    const { headers, priority, expiration, messageId, deliveryMode } = context.getMessage().properties;
    return { headers, priority, expiration, messageId, persistent: deliveryMode === 2 };
  }
  if (context instanceof KafkaContext) {
    const { key, headers } = context.getMessage();
    const text = (value) => (typeof value === 'string' ? value : JSON.stringify(value));
    const texts = Object.entries(headers).map(([name, value]) => [name, text(value)]);
    // Nest takes an answer with a `key` for a whole record.
    return { headers: Object.fromEntries(texts), messageKey: key };
  }
  return { headers: {} };
}

const REQUESTS = {
  sum: { cmd: 'sum' },
  echo: 'echo',
  // Nest reads a text pattern as JSON first, so it never finds a handler named 'null'.
  answerNull: { cmd: 'null' },
  answerNothing: 'nothing',
  stream: 'stream',
  slow: 'slow',
  metadata: 'metadata',
  headers: 'headers',
  failWithText: 'rpc-text',
  failWithObject: 'rpc-object',
  failUnexpectedly: 'unexpected',
  streamThenFail: 'stream-then-error',
  patternText: 5,
  patternTextOfObject: { b: 1, a: 'x' },
  patternTextOfList: ['first', 'second'],
  notes: 'notes',
  who: 'who',
};
const EVENTS = { note: 'noted', noteOrder: 'order_created' };

// A topic of Kafka has a plain name.
const KAFKA_REQUESTS = {
  ...REQUESTS, sum: 'sum', answerNull: 'answer-null', patternText: 'five', patternTextOfObject: 'object',
};

// Behind a name, any one word.
const WILDCARDS = { redis: '.*', nats: '.*', mqtt: '/+', amqp: '.*' };

const textOf = (pattern) => (
  typeof pattern === 'object' ? JSON.stringify(pattern, Object.keys(pattern).sort()) : `${pattern}`
);

// All subscriptions of an MQTT server are shared by the servers of its group.
const shared = (group, pattern) => [pattern].flat().map((one) => `$share/${group}/${textOf(one)}`);

// Nest itself never acknowledges.
function acknowledging(handle) {
  return async function acknowledge(payload, context) {
    try {
      return await handle.call(this, payload, context);
    } finally {
      context.getChannelRef().ack(context.getMessage());
    }
  };
}

function withPayloadAndContext(decorator) {
  return (prototype, method, descriptor) => {
    decorator(prototype, method, descriptor);
    Payload()(prototype, method, 0);
    Ctx()(prototype, method, 1);
  };
}

export async function startServer({ url, options = {}, name, share }) {
  const [scheme] = url.split(':');
  const { prototype } = PeerController;
  const decorators = {};
  const declare = (decorator, patterns) => {
    for (const [method, pattern] of Object.entries(patterns)) {
      decorators[method] = withPayloadAndContext(decorator(share ? shared(share, pattern) : pattern));
      if (options.noAck === false) {
        prototype[method] = acknowledging(prototype[method]);
      }
    }
  };
  declare(MessagePattern, scheme === 'kafka' ? KAFKA_REQUESTS : REQUESTS);
  declare(EventPattern, EVENTS);
  if (scheme in WILDCARDS) {
    declare(MessagePattern, { answerAsked: `asked${WILDCARDS[scheme]}` });
    declare(EventPattern, { noteLogged: `logged${WILDCARDS[scheme]}` });
  }
  decorate(PeerController, decorators);
  prototype.name = name;
  return listen([PeerController], { url, options });
}

if (isMain(import.meta)) {
  await serve(startServer);
}
