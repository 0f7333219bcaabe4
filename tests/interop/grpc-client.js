// A real NestJS ClientGrpc that the Python side drives; started as client.js is.
import 'reflect-metadata';
import { Metadata } from '@grpc/grpc-js';
import { Logger } from '@nestjs/common';
import { ClientProxyFactory } from '@nestjs/microservices';
import { concatMap, delay, from, lastValueFrom, of, take, tap, toArray } from 'rxjs';
import { answerLines, told } from './peer.js';
import { configuration } from './transports.js';

// Nest logs to stdout, which carries the answers.
Logger.overrideLogger(false);

const client = ClientProxyFactory.create(configuration(told()));

function describe({ code, details, metadata }) {
  const [object] = metadata?.get('rpc-error') ?? [];
  return { code, details, object: object === undefined ? null : JSON.parse(object) };
}

// `items` are what a stream of the client's carries, each `pause` ms after the one before.
async function perform({
  service, method, data, items, pause = 0, metadata = {}, deadline = 10_000, first = Infinity,
}) {
  const values = [];
  const given = new Metadata();
  Object.entries(metadata).forEach(([key, value]) => given.set(key, value));
  const request = items === undefined ? data : from(items).pipe(concatMap((item) => of(item).pipe(delay(pause))));
  try {
    const options = { deadline: Date.now() + deadline };
    const answers = client.getService(service)[method](request, given, options);
    await lastValueFrom(answers.pipe(take(first), tap((value) => values.push(value)), toArray()));
    return { values };
  } catch (error) {
    return { values, error: describe(error) };
  }
}

answerLines(client, perform);
