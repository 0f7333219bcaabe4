// A real NestJS ClientGrpc that the Python side drives by JSON lines: `node grpc-client.js PORT`.
import 'reflect-metadata';
import { Metadata } from '@grpc/grpc-js';
import { Logger } from '@nestjs/common';
import { ClientProxyFactory } from '@nestjs/microservices';
import { lastValueFrom, take, tap, toArray } from 'rxjs';
import { grpcOptions } from './grpc-server.js';
import { answerLines } from './lines.js';

// Nest logs to stdout, which carries the answers.
Logger.overrideLogger(false);

const client = ClientProxyFactory.create(grpcOptions(process.argv[2]));

function describe({ code, details, metadata }) {
  const [object] = metadata?.get('rpc-error') ?? [];
  return { code, details, object: object === undefined ? null : JSON.parse(object) };
}

async function perform({ service, method, data, metadata = {}, deadline = 10_000, first = Infinity }) {
  const values = [];
  const told = new Metadata();
  Object.entries(metadata).forEach(([key, value]) => told.set(key, value));
  try {
    const options = { deadline: Date.now() + deadline };
    const answers = client.getService(service)[method](data, told, options);
    await lastValueFrom(answers.pipe(take(first), tap((value) => values.push(value)), toArray()));
    return { values };
  } catch (error) {
    return { values, error: describe(error) };
  }
}

answerLines(perform);
