// The NestJS gRPC service that is measured; started as server.js is.
import 'reflect-metadata';
import { GrpcMethod } from '@nestjs/microservices';
import { serve } from '../../interop/peer.js';
import { decorate, listen } from '../../interop/service.js';
import { GRPC } from './grpc.js';

class BenchController {
  // An empty list does not arrive.
  sum({ numbers = [] }) { return { total: numbers.reduce((total, number) => total + number, 0) }; }
}

decorate(BenchController, { sum: GrpcMethod('Bench', 'Sum') });

await serve(({ url, options }) => listen([BenchController], { url, options: { ...GRPC, ...options } }));
