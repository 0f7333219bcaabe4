// A real NestJS gRPC service of the shop's own .proto files: `node grpc-server.js PORT`.
import 'reflect-metadata';
import { dirname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { Controller, Module } from '@nestjs/common';
import { NestFactory } from '@nestjs/core';
import { GrpcMethod, RpcException, Transport } from '@nestjs/microservices';
import { concat, from, NEVER, throwError } from 'rxjs';

const PROTO = join(dirname(fileURLToPath(import.meta.url)), '../../proto');
const ADA = { id: '1', name: 'Ada é😀', email: 'ada@example.org' };
const order = (number) => ({ id: `${number}`, number: `2026-${number}`, total: 2 ** 53 - 1, lines: [] });

export const grpcOptions = (port) => ({
  transport: Transport.GRPC,
  options: {
    url: `127.0.0.1:${port}`,
    package: ['users', 'orders'],
    protoPath: ['users.proto', 'orders.proto'].map((file) => join(PROTO, file)),
    loader: { keepCase: true, longs: Number },
  },
});

class UsersController {
  async findOne({ id }, metadata) {
    switch (id) {
      case 'nobody': throw new RpcException({ code: 5, message: 'nf' });
      case 'text': throw new RpcException('boom');
      case 'bug': throw new Error('secret');
      case 'slow': await sleep(5_000); return ADA;
      case 'metadata': return { ...ADA, name: `${metadata.get('trace-id')}` };
      default: return { ...ADA, id };
    }
  }
  findAll() { return { users: [ADA, { ...ADA, id: '2' }] }; }
  createUser({ name, email }) { return { id: '3', name, email }; }
}

class OrdersController {
  cancelled = 0;

  findAll({ status }) {
    const orders = from([order(1), order(2)]);
    return status === 'broken' ? concat(orders, throwError(() => new RpcException('broken'))) : orders;
  }
  watchOrder(data, metadata, call) {
    call.on('cancelled', () => { this.cancelled += 1; });
    return concat(from([order(7)]), NEVER);
  }
  findOne() { return order(this.cancelled); }
}

// Decorator syntax would need a build step.
function decorate(controller, service, methods) {
  for (const method of methods) {
    const { prototype } = controller;
    const rpc = method[0].toUpperCase() + method.slice(1);
    GrpcMethod(service, rpc)(prototype, method, Object.getOwnPropertyDescriptor(prototype, method));
  }
  Controller()(controller);
}

decorate(UsersController, 'UsersService', ['findOne', 'findAll', 'createUser']);
decorate(OrdersController, 'OrdersService', ['findOne', 'findAll', 'watchOrder']);

class PeerModule {}
Module({ controllers: [UsersController, OrdersController] })(PeerModule);

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const stop = () => process.exit(0);
  process.on('SIGTERM', stop);
  // A test run that is killed cannot send a signal, but its end of the pipe closes.
  process.stdin.on('end', stop).on('error', stop).resume();
  const application = await NestFactory.createMicroservice(PeerModule, {
    ...grpcOptions(process.argv[2]), logger: false, abortOnError: false,
  });
  await application.listen();
  console.log('ready');
}
