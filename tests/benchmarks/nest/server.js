// The NestJS service that is measured: `NEST=nest12 node --import ../../interop/versions.js server.js '{"url": URL}'`,
// beside the URL the `options` of its transport; `--versions` prints what it is made of.
import 'reflect-metadata';
import { readFileSync } from 'node:fs';
import { EventPattern, MessagePattern, RpcException } from '@nestjs/microservices';
import { serve } from '../../interop/peer.js';
import { decorate, listen } from '../../interop/service.js';
import { VERSION } from '../../interop/versions.js';

class BenchController {
  noted = 0;

  sum(numbers) { return numbers.reduce((total, number) => total + number, 0); }
  user({ id, name }) { return { id, name, greeting: `Hello, ${name}!` }; }
  getUser({ id }) {
    if (id === 0) {
      throw new RpcException({ statusCode: 404, code: 'user-not-found', message: 'There is no such user.' });
    }
    return { id, name: 'Ada Lovelace', email: 'ada@example.org' };
  }
  note() { this.noted += 1; }
  count() { return this.noted; }
}

// A topic of Kafka has a plain name.
const command = (url, name) => (url.startsWith('kafka:') ? name : { cmd: name });

function start(told) {
  decorate(BenchController, {
    sum: MessagePattern(command(told.url, 'sum')),
    user: MessagePattern('user'),
    getUser: MessagePattern(command(told.url, 'get_user')),
    note: EventPattern('noted'),
    count: MessagePattern('count'),
  });
  return listen([BenchController], told);
}

if (process.argv[2] === '--versions') {
  const { dependencies } = JSON.parse(readFileSync(`${VERSION}/package.json`));
  console.log(JSON.stringify({ node: process.versions.node, ...dependencies }));
} else {
  await serve(start);
}
