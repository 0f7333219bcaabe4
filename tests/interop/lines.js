// How the Python side drives a client: a command a line on stdin, its answer a line on stdout.
import { createInterface } from 'node:readline';

export function answerLines(perform) {
  const lines = createInterface({ input: process.stdin });
  lines.on('close', () => process.exit(0));
  lines.on('line', async (line) => {
    const { tag, ...command } = JSON.parse(line);
    console.log(JSON.stringify({ ...(await perform(command)), tag }));
  });
  console.log('ready');
}
