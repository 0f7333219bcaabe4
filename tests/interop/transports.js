// What a server and a client of NestJS are told of their transport, by a URL and options of NestJS's own.
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { Transport } from '@nestjs/microservices';

const file = (path) => fileURLToPath(new URL(path, import.meta.url));

// Otherwise a member waits for its group for half a minute.
const FAST_GROUP = { sessionTimeout: 6_000, rebalanceTimeout: 3_000, heartbeatInterval: 500, maxWaitTimeInMs: 100 };

const hostAndPort = ({ hostname, port, username, password }, options) => ({
  host: hostname, port: Number(port), ...(password && { username, password }), ...options,
});

const TRANSPORTS = {
  tcp: [Transport.TCP, hostAndPort],
  redis: [Transport.REDIS, hostAndPort],
  nats: [Transport.NATS, ({ href }, options) => ({ servers: href, ...options })],
  mqtt: [Transport.MQTT, ({ href }, options) => ({ url: href, ...options })],
  amqp: [Transport.RMQ, ({ href }, options) => ({ urls: [href], ...options })],
  kafka: [Transport.KAFKA, ({ host }, { client, consumer, ...options }) => ({
    client: { brokers: [host], ...client },
    consumer: { ...FAST_GROUP, ...consumer },
    ...options,
  })],
  grpc: [Transport.GRPC, ({ host }, options) => ({
    url: host,
    package: ['users', 'orders', 'talk'],
    protoPath: ['../../proto/users.proto', '../../proto/orders.proto', 'talk.proto'].map(file),
    loader: { keepCase: true, longs: Number },
    ...options,
  })],
};

// JSON cannot carry a key or a certificate, but its path.
function read(tls) {
  const files = ['ca', 'cert', 'key'].filter((name) => name in tls);
  return { ...tls, ...Object.fromEntries(files.map((name) => [name, readFileSync(tls[name])])) };
}

export function configuration({ url, options = {} }) {
  const address = new URL(url);
  const [transport, translate] = TRANSPORTS[address.protocol.slice(0, -1)];
  const { tlsOptions, ...rest } = options;
  return { transport, options: translate(address, tlsOptions ? { ...rest, tlsOptions: read(tlsOptions) } : rest) };
}

// A new group reads from where the topics end when it first looks: what was sent before is lost to it.
export const firstFetch = (consumer) => new Promise((fetched) => {
  const stop = consumer.on(consumer.events.FETCH, () => { stop(); fetched(); });
});
