// A real NestJS client that the Python side drives: `node --import ./versions.js client.js '{"url": URL}'`.
import 'reflect-metadata';
import { AsyncLocalStorage } from 'node:async_hooks';
import { Logger } from '@nestjs/common';
import { ClientProxyFactory, Transport } from '@nestjs/microservices';
import {
  defaultIfEmpty, forkJoin, ignoreElements, lastValueFrom, mergeAll, tap, timeout, TimeoutError,
  toArray,
} from 'rxjs';
import { answerLines, told } from './peer.js';
import { recordOf } from './records.js';
import { configuration, firstFetch } from './transports.js';

const OPERATION_TIMEOUT = 10_000;

// Nest logs to stdout, which carries the answers.
Logger.overrideLogger(false);

const { replies = [], ...config } = told();
const configured = configuration(config);
const client = ClientProxyFactory.create(configured);

if (configured.transport === Transport.KAFKA) {
  replies.forEach((pattern) => client.subscribeToResponseOf(pattern));
  await client.connect();
  if (replies.length > 0) {
    await firstFetch(client.consumer);
  }
}

// The hook sees only the packet, and commands run side by side.
const currentMetadata = new AsyncLocalStorage();
client.setOnDispatchHook?.((packet) => {
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

async function perform({ op, record, ...command }) {
  const values = [];
  try {
    if (currentMetadata.getStore() !== undefined && client.setOnDispatchHook === undefined) {
      throw new Error('This NestJS sends no metadata.');
    }
    const data = record === undefined ? command.data : await recordOf(configured.transport, command.data, record);
    const result = operations[op]({ ...command, data }).pipe(
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

answerLines(client, ({ metadata, ...command }) => currentMetadata.run(metadata, () => perform(command)));
