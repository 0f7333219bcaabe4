// Prints the route that NestJS makes of each pattern, a line of JSON for a line of JSON; started as server.js is.
import 'reflect-metadata';
import { createInterface } from 'node:readline';
import { transformPatternToRoute } from '@nestjs/microservices/utils/transform-pattern.utils.js';

const routes = [];
for await (const line of createInterface({ input: process.stdin })) {
  routes.push(JSON.stringify(transformPatternToRoute(JSON.parse(line))));
}
process.stdout.write(`${routes.join('\n')}\n`);
