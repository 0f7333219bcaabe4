// Lets the scripts import the NestJS that NEST names, of the folder that they run in:
// `NEST=nest11 node --import ./versions.js SCRIPT`.
import * as modules from 'node:module';
import { pathToFileURL } from 'node:url';
import { isMainThread } from 'node:worker_threads';

export const VERSION = process.env.NEST ?? 'nest12';
const TESTS = new URL('..', import.meta.url).href;
const PROJECT = pathToFileURL(`${VERSION}/package.json`).href;

export function resolve(specifier, context, nextResolve) {
  const { parentURL = '' } = context;
  const ours = parentURL.startsWith(TESTS) && !parentURL.includes('/node_modules/');
  const bare = !/^([./]|\w+:)/.test(specifier);
  return nextResolve(specifier, ours && bare ? { ...context, parentURL: PROJECT } : context);
}

// The thread that an older Node needs for the hook, where it imports this module once more, takes memory.
if (modules.registerHooks) {
  modules.registerHooks({ resolve });
} else if (isMainThread) {
  modules.register(import.meta.url);
}
