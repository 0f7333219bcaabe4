// A real NestJS gRPC service of the shop's own .proto files, and of talk.proto; started as server.js is.
import 'reflect-metadata';
import { setTimeout as sleep } from 'node:timers/promises';
import { GrpcMethod, GrpcStreamMethod, RpcException } from '@nestjs/microservices';
import { concat, from, map, NEVER, range, reduce, throwError } from 'rxjs';
import { serve } from './peer.js';
import { decorate, listen } from './service.js';

const ADA = { id: '1', name: 'Ada é😀', email: 'ada@example.org' };
const order = (number) => ({ id: `${number}`, number: `2026-${number}`, total: 2 ** 53 - 1, lines: [] });

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

// What is empty does not arrive.
function answer({ text = '' }) {
  switch (text) {
    case 'broken': throw new RpcException({ code: 3, message: 'broken' });
    case 'text': throw new RpcException('boom');
    case 'bug': throw new Error('secret');
    default: return { text: `re: ${text}` };
  }
}

class TalkController {
  say(line, metadata) {
    switch (line.text) {
      case 'slow': return NEVER;
      case 'metadata': return { text: `${metadata.get('trace-id')}` };
      default: return answer(line);
    }
  }
  count({ count = 0 }) { return range(1, count).pipe(map((number) => ({ text: `${number}` }))); }
  // An async function that awaits the last line never gets the first.
  collect(lines) {
    const summary = { lines: 0, text: '' };
    return lines.pipe(reduce((sum, { text = '' }) => ({ lines: sum.lines + 1, text: sum.text + text }), summary));
  }
  chat(lines) { return lines.pipe(map((line) => answer(line))); }
}

function provide(controller, service, methods) {
  decorate(controller, Object.fromEntries(Object.entries(methods).map(([method, decorator]) => (
    [method, decorator(service, method[0].toUpperCase() + method.slice(1))]
  ))));
}

provide(UsersController, 'UsersService', { findOne: GrpcMethod, findAll: GrpcMethod, createUser: GrpcMethod });
provide(OrdersController, 'OrdersService', { findOne: GrpcMethod, findAll: GrpcMethod, watchOrder: GrpcMethod });
provide(TalkController, 'TalkService', {
  say: GrpcMethod, count: GrpcMethod, collect: GrpcStreamMethod, chat: GrpcStreamMethod,
});

await serve((told) => listen([UsersController, OrdersController, TalkController], told));
