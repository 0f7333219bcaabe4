// NestJS's client in a closed loop, started as server.js is and told as DEFAULTS says: prints what it measured, a line
// of JSON, or ends with 1.
import 'reflect-metadata';
import { randomBytes } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { Metadata } from '@grpc/grpc-js';
import { Logger } from '@nestjs/common';
import { ClientProxyFactory } from '@nestjs/microservices';
import { firstValueFrom, lastValueFrom } from 'rxjs';
import { told } from '../../interop/peer.js';
import { configuration, firstFetch } from '../../interop/transports.js';
import { GRPC } from './grpc.js';

const DEFAULTS = { calls: 20_000, inFlight: 128, warmUp: 12_000, kind: 'send', options: {} };
const CALL_LIMIT = 10_000;  // ms

// Nest logs to stdout, which carries the line.
Logger.overrideLogger(false);

const { url, calls, inFlight, warmUp, kind, options } = { ...DEFAULTS, ...told() };
const [scheme] = url.split(':');
const client = ClientProxyFactory.create(configuration({
  url, options: scheme === 'grpc' ? { ...GRPC, ...options } : options,
}));

const sum = scheme === 'kafka' ? 'sum' : { cmd: 'sum' };
// Over Kafka a number comes as its text.
const check = (answer, n) => {
  if (Number(answer) !== n + 3) {
    throw new Error(`The sum of ${n}, 1 and 2 is not ${JSON.stringify(answer)}.`);
  }
};

async function send(n) {
  check(await firstValueFrom(client.send(sum, [n, 1, 2])), n);
}

async function emit(n) {
  await lastValueFrom(client.emit('noted', { n }), { defaultValue: undefined });
}

const traceParent = () => `00-${randomBytes(16).toString('hex')}-${randomBytes(8).toString('hex')}-01`;

async function call(n) {
  const metadata = new Metadata();
  metadata.set('traceparent', traceParent());
  const { total } = await lastValueFrom(bench.sum({ numbers: [n, 1, 2] }, metadata));
  check(total, n);
}

const counted = async () => Number(await firstValueFrom(client.send('count', {})));

// Each lane has one call in flight, and one timer for all of them costs the client nothing that users' do not pay.
async function loop(perform, count) {
  const latencies = new Float64Array(count);
  const since = new Float64Array(inFlight).fill(Infinity);
  let next = 0;
  const lane = async (_, number) => {
    while (next < count) {
      const n = next++;
      since[number] = performance.now();
      await perform(n);
      latencies[n] = performance.now() - since[number];
    }
    since[number] = Infinity;
  };
  const watch = setInterval(() => {
    if (performance.now() - Math.min(...since) > CALL_LIMIT) {
      fail(new Error(`A call took longer than ${CALL_LIMIT / 1_000} s, after ${next} of them.`));
    }
  }, 1_000);
  await Promise.all(Array.from({ length: inFlight }, lane));
  clearInterval(watch);
  return latencies.sort();
}

// Until the server has counted all events; the seconds after the last was sent.
async function delivered(total) {
  const start = performance.now();
  while (await counted() < total) {
    if (performance.now() - start > CALL_LIMIT) {
      throw new Error(`Only ${await counted()} of ${total} events arrived.`);
    }
    await sleep(1);
  }
  return (performance.now() - start) / 1_000;
}

// The others connect by their first call.
async function connectToKafka() {
  [sum, 'count'].forEach((pattern) => client.subscribeToResponseOf(pattern));
  await client.connect();
  await firstFetch(client.consumer);
}

async function measure() {
  if (scheme === 'kafka') {
    await connectToKafka();
  }
  const perform = scheme === 'grpc' ? call : { send, emit }[kind];
  const before = kind === 'emit' ? await counted() : 0;
  await loop(perform, warmUp);
  if (kind === 'emit') {
    await delivered(before + warmUp);
  }
  const [cpu, start] = [process.cpuUsage(), performance.now()];
  const latencies = await loop(perform, calls);
  const sent = (performance.now() - start) / 1_000;
  const { user, system } = process.cpuUsage(cpu);
  const late = kind === 'emit' ? await delivered(before + warmUp + calls) : 0;
  const seconds = sent + late;
  const percentile = (share) => latencies[Math.floor(share * (calls - 1))];
  return {
    calls, made: warmUp + calls, seconds, rate: calls / seconds, p50: percentile(0.5), p99: percentile(0.99), cpu: (user + system) / 1e6,
    memory: process.memoryUsage.rss() / 1e6,
  };
}

function fail(error) {
  console.error(error);
  process.exit(1);
}

const bench = scheme === 'grpc' ? client.getService('Bench') : undefined;
try {
  console.log(JSON.stringify(await measure()));
  await client.close();
  process.exit(0);
} catch (error) {
  fail(error);
}
