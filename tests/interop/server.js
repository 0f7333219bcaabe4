// A real NestJS microservice for the Python side to call: `node server.js PORT`, over TCP, or
// `node server.js PORT redis`, with the port of a Redis.
import 'reflect-metadata';
import { realpathSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { Controller, Module } from '@nestjs/common';
import { NestFactory } from '@nestjs/core';
import {
  Ctx, EventPattern, MessagePattern, Payload, RpcException, Transport,
} from '@nestjs/microservices';
import { concat, of, range, throwError } from 'rxjs';

class PeerController {
  stored = [];

  sum(numbers) { return numbers.reduce((total, number) => total + number, 0); }
  echo(payload) { return payload; }
  answerNull() { return null; }
  answerNothing() {}
  stream({ count }) { return range(0, count); }
  async slow({ ms }) { await sleep(ms); return ms; }
  metadata(payload, context) { return context.getMetadata(); }
  failWithText() { throw new RpcException('boom'); }
  failWithObject() {
    throw new RpcException({ statusCode: 404, code: 'user-not-found', message: 'nf' });
  }
  failUnexpectedly() { throw new Error('secret'); }
  streamThenFail() { return concat(of(1), throwError(() => new RpcException('broken'))); }
  patternText(payload, context) { return context.getPattern(); }
  patternTextOfObject(payload, context) { return context.getPattern(); }
  patternTextOfList(payload, context) { return context.getPattern(); }
  note(payload) { this.stored.push(payload); }
  noteOrder(payload) { this.stored.push({ order: payload }); }
  notes() { return this.stored; }
}

// Decorator syntax would need a build step.
function decorate(controller, decorators) {
  for (const [method, decorator] of Object.entries(decorators)) {
    const { prototype } = controller;
    decorator(prototype, method, Object.getOwnPropertyDescriptor(prototype, method));
    Payload()(prototype, method, 0);
    Ctx()(prototype, method, 1);
  }
  Controller()(controller);
}

decorate(PeerController, {
  sum: MessagePattern({ cmd: 'sum' }),
  echo: MessagePattern('echo'),
  // Nest reads a text pattern as JSON first, so it never finds a handler named 'null'.
  answerNull: MessagePattern({ cmd: 'null' }),
  answerNothing: MessagePattern('nothing'),
  stream: MessagePattern('stream'),
  slow: MessagePattern('slow'),
  metadata: MessagePattern('metadata'),
  failWithText: MessagePattern('rpc-text'),
  failWithObject: MessagePattern('rpc-object'),
  failUnexpectedly: MessagePattern('unexpected'),
  streamThenFail: MessagePattern('stream-then-error'),
  patternText: MessagePattern(5),
  patternTextOfObject: MessagePattern({ b: 1, a: 'x' }),
  patternTextOfList: MessagePattern(['first', 'second']),
  note: EventPattern('noted'),
  noteOrder: EventPattern('order_created'),
  notes: MessagePattern('notes'),
});

class PeerModule {}
Module({ controllers: [PeerController] })(PeerModule);

export async function startServer(port, transport = 'tcp') {
  const application = await NestFactory.createMicroservice(PeerModule, {
    transport: Transport[transport.toUpperCase()],
    options: { host: '127.0.0.1', port },
    logger: false,
    // Otherwise a failed start aborts the process without telling why.
    abortOnError: false,
  });
  await application.listen();
  return application;
}

if (import.meta.url === pathToFileURL(realpathSync(process.argv[1])).href) {
  const stop = () => process.exit(0);
  process.on('SIGTERM', stop);
  // A test run that is killed cannot send a signal, but its end of the pipe closes.
  process.stdin.on('end', stop).on('error', stop).resume();
  await startServer(Number(process.argv[2]), process.argv[3]);
  console.log('ready');
}
