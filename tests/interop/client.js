// A real NestJS client that the Python side drives by JSON lines: `node client.js PORT`, over TCP, or
// `node client.js PORT redis`, with the port of a Redis.
import 'reflect-metadata';
import { AsyncLocalStorage } from 'node:async_hooks';
import { Logger } from '@nestjs/common';
import { ClientProxyFactory, Transport } from '@nestjs/microservices';
import {
  defaultIfEmpty, forkJoin, ignoreElements, lastValueFrom, mergeAll, tap, timeout, TimeoutError,
  toArray,
} from 'rxjs';
import { answerLines } from './lines.js';

const OPERATION_TIMEOUT = 10_000;

// Nest logs to stdout, which carries the answers.
Logger.overrideLogger(false);

const client = ClientProxyFactory.create({
  transport: Transport[(process.argv[3] ?? 'tcp').toUpperCase()],
  options: { host: '127.0.0.1', port: Number(process.argv[2]) },
});

// The hook sees only the packet, and commands run side by side.
const currentMetadata = new AsyncLocalStorage();
client.setOnDispatchHook((packet) => {
  const metadata = currentMetadata.getStore();
  if (metadata !== undefined) {
    packet.metadata = metadata;
  }
});

const operations = {
  'send': ({ pattern, data }) => client.send(pattern, data),
  'send-many': ({ pattern, count }) => {
    const requests = Array.from({ length: count }, (_, n) => (
      // forkJoin gives up the whole list when one request completes without a value.
      client.send(pattern, { n, text: `é😀${n}` }).pipe(defaultIfEmpty(null))
    ));
    return forkJoin(requests).pipe(mergeAll());
  },
  // A sent event emits undefined, which is no answer.
  'emit': ({ pattern, data }) => client.emit(pattern, data).pipe(ignoreElements()),
};

function describe(error) {
  return error instanceof Error ? { name: error.name, message: error.message } : error;
}

async function perform({ op, ...command }) {
  const values = [];
  try {
    const result = operations[op](command).pipe(
      tap((value) => values.push(value)),
      // One item at completion makes the deadline one for the operation, not for each value.
      toArray(),
      timeout(OPERATION_TIMEOUT),
    );
    await lastValueFrom(result);
    return { values };
  } catch (error) {
    if (error instanceof TimeoutError) {
      return { error: { name: 'TimeoutError' } };
    }
    return { values, error: describe(error) };
  }
}

answerLines(({ metadata, ...command }) => currentMetadata.run(metadata, () => perform(command)));
