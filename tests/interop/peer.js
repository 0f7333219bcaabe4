// How the Python side drives a peer: it tells it in JSON what to be, and ends it by closing its stdin.
import { realpathSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';

const END_LIMIT = 2_000;

export const told = () => JSON.parse(process.argv[2]);

export const isMain = ({ url }) => url === pathToFileURL(realpathSync(process.argv[1])).href;

// Kafka waits for a member that leaves its group without a word.
async function end(peer) {
  await Promise.race([peer?.close(), sleep(END_LIMIT)]).catch(() => {});
  process.exit(0);
}

// A server is ready once it listens.
export async function serve(start) {
  let application;
  const stop = () => end(application);
  process.on('SIGTERM', stop);
  // A test run that is killed cannot send a signal, but its end of the pipe closes.
  process.stdin.on('end', stop).on('error', stop).resume();
  application = await start(told());
  console.log('ready');
}

// A client gets a command a line, and answers each by a line.
export function answerLines(client, perform) {
  const lines = createInterface({ input: process.stdin });
  lines.on('close', () => end(client));
  lines.on('line', async (line) => {
    const { tag, ...command } = JSON.parse(line);
    console.log(JSON.stringify({ ...(await perform(command)), tag }));
  });
  console.log('ready');
}
