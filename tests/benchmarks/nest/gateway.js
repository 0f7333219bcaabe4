// A NestJS gateway before the users of server.js; started as that is, by
// '{"port": PORT, "adapter": "express" or "fastify", "users": URL}'.
import 'reflect-metadata';
import { BadGatewayException, Get, HttpException, Inject, Module, Param, ParseIntPipe } from '@nestjs/common';
import { NestFactory } from '@nestjs/core';
import { ClientsModule } from '@nestjs/microservices';
import { catchError } from 'rxjs';
import { serve } from '../../interop/peer.js';
import { decorate } from '../../interop/service.js';
import { configuration } from '../../interop/transports.js';

const USERS = 'USERS';

const ADAPTERS = {
  express: async () => new (await import('@nestjs/platform-express')).ExpressAdapter(),
  fastify: async () => new (await import('@nestjs/platform-fastify')).FastifyAdapter(),
};

// What the service says of its own accord, it says with a status.
function mapped(error) {
  throw error.statusCode ? new HttpException(error, error.statusCode) : new BadGatewayException();
}

class UsersController {
  constructor(users) { this.users = users; }

  findOne(id) { return this.users.send({ cmd: 'get_user' }, { id }).pipe(catchError(mapped)); }
}
decorate(UsersController, { findOne: Get('api/users/:id') });
Param('id', ParseIntPipe)(UsersController.prototype, 'findOne', 0);
Inject(USERS)(UsersController, undefined, 0);

async function start({ port, adapter, users }) {
  class GatewayModule {}
  Module({
    imports: [ClientsModule.register([{ name: USERS, ...configuration({ url: users }) }])],
    controllers: [UsersController],
  })(GatewayModule);
  const application = await NestFactory.create(GatewayModule, await ADAPTERS[adapter](), {
    logger: false, abortOnError: false,
  });
  await application.listen(port, '127.0.0.1');
  return application;
}

await serve(start);
