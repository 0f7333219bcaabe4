// Records what a real NestJS client and server say to each other: `npm run record`.
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { readFileSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { ClientProxyFactory, Transport } from '@nestjs/microservices';
import { lastValueFrom } from 'rxjs';
import { startServer } from './server.js';
import { VERSION } from './versions.js';

const HOST = '127.0.0.1';
const TARGET = new URL('../toolkit/golden/tcp.json', import.meta.url);
const MANIFEST = JSON.parse(readFileSync(new URL(`${VERSION}/package.json`, import.meta.url), 'utf8'));

const EXCHANGES = {
  'request-sum': (client) => client.send({ cmd: 'sum' }, [1, 2, 3]),
  'request-echo-text': (client) => client.send('echo', '😀é'),
  'request-object-pattern': (client) => client.send({ b: 1, a: 'x' }, { k: 1 }),
  'request-number-pattern': (client) => client.send(5, 'five'),
  'request-null': (client) => client.send({ cmd: 'null' }, {}),
  'request-nothing': (client) => client.send('nothing', {}),
  'request-stream': (client) => client.send('stream', { count: 3 }),
  'request-metadata': (client) => {
    client.setOnDispatchHook((packet) => { packet.metadata = { 'trace-id': 'é1' }; });
    return client.send('metadata', {});
  },
  'error-rpc-text': (client) => client.send('rpc-text', {}),
  'error-rpc-object': (client) => client.send('rpc-object', {}),
  'error-unexpected': (client) => client.send('unexpected', {}),
  'error-after-value': (client) => client.send('stream-then-error', {}),
  'error-unknown-pattern': (client) => client.send({ cmd: 'unknown' }, {}),
  'event-object-pattern': (client) => client.emit({ b: 1, a: 'x' }, { k: 1 }),
  'event-string-pattern': (client) => client.emit('noted', { k: 1 }),
};

async function startRelay(serverPort) {
  const relay = net.createServer((clientSide) => {
    const serverSide = net.connect(serverPort, HOST);
    const said = { client: [], server: [] };
    clientSide.on('data', (bytes) => said.client.push(bytes)).pipe(serverSide);
    serverSide.on('data', (bytes) => said.server.push(bytes)).pipe(clientSide);
    serverSide.on('close', () => relay.emit('recorded', {
      client: Buffer.concat(said.client).toString(),
      server: Buffer.concat(said.server).toString(),
    }));
  });
  relay.listen(0, HOST);
  await once(relay, 'listening');
  return relay;
}

async function record(relay, exchange) {
  const options = { host: HOST, port: relay.address().port };
  const client = ClientProxyFactory.create({ transport: Transport.TCP, options });
  const recorded = once(relay, 'recorded');
  try {
    await lastValueFrom(exchange(client), { defaultValue: null });
  } catch (error) {
    // An error from the wire is a plain object or text; an Error means that nothing was recorded.
    if (error instanceof Error) {
      throw error;
    }
  }
  // An event has no answer to wait for: the end of its connection is what follows its last byte.
  client.close();
  const [said] = await recorded;
  return said;
}

function withFixedId(name, { client, server }) {
  const id = client.match(/"id":"([0-9a-f]{21})"\}$/)?.[1];
  if (id === undefined) {
    return { name, client, server };
  }
  const fixed = createHash('sha256').update(name).digest('hex').slice(0, id.length);
  return { name, client: client.replaceAll(id, fixed), server: server.replaceAll(id, fixed) };
}

const server = await startServer({ url: `tcp://${HOST}:0` });
const relay = await startRelay(server.unwrap().address().port);
const cases = [];
for (const [name, exchange] of Object.entries(EXCHANGES)) {
  cases.push(withFixedId(name, await record(relay, exchange)));
}
relay.close();
await server.close();

writeFileSync(TARGET, `${JSON.stringify({
  recorded_from: `@nestjs/microservices ${MANIFEST.dependencies['@nestjs/microservices']}`,
  note: 'Byte for byte as recorded, one connection a case, except that each random id '
    + 'is replaced on both sides by a fixed one of the same length.',
  cases,
}, null, 2)}\n`);
