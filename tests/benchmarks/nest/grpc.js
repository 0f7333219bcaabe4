// The options of NestJS for bench.proto, otherwise its defaults.
import { fileURLToPath } from 'node:url';

export const GRPC = {
  package: 'bench',
  protoPath: fileURLToPath(new URL('../proto/bench.proto', import.meta.url)),
  loader: {},
};
