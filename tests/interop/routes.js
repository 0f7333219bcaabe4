// Prints the route that NestJS makes of each pattern, a line of JSON for a line of JSON; started as server.js is.
import 'reflect-metadata';
import { text } from 'node:stream/consumers';
import { transformPatternToRoute } from '@nestjs/microservices/utils/transform-pattern.utils.js';

// Not by readline: newer ones end a line at U+2028, too.
const lines = (await text(process.stdin)).split('\n');
const routes = lines.map((line) => JSON.stringify(transformPatternToRoute(JSON.parse(line))));
process.stdout.write(`${routes.join('\n')}\n`);
