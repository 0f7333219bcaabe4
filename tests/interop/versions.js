// Lets the scripts import the NestJS that NEST names: `NEST=nest11 node --import ./versions.js SCRIPT`.
import { register } from 'node:module';
import { isMainThread } from 'node:worker_threads';

export const VERSION = process.env.NEST ?? 'nest12';
const HERE = new URL('.', import.meta.url).href;
const PROJECT = new URL(`${VERSION}/package.json`, HERE).href;

export function resolve(specifier, context, nextResolve) {
  const { parentURL = '' } = context;
  const ours = parentURL.startsWith(HERE) && !parentURL.includes('/node_modules/');
  const bare = !/^([./]|\w+:)/.test(specifier);
  return nextResolve(specifier, ours && bare ? { ...context, parentURL: PROJECT } : context);
}

// Node imports this module once more in the thread where it runs the hook.
if (isMainThread) {
  register(import.meta.url);
}
