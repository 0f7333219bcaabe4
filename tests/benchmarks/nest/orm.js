// A NestJS service that reads a row by TypeORM; started as server.js is, with the path of an SQLite `database` beside
// the URL. `orm.js --seed PATH` writes one.
import 'reflect-metadata';
import { Module } from '@nestjs/common';
import { NestFactory } from '@nestjs/core';
import { MessagePattern, RpcException } from '@nestjs/microservices';
import { InjectRepository, TypeOrmModule } from '@nestjs/typeorm';
import { Column, DataSource, Entity, PrimaryColumn } from 'typeorm';
import { serve } from '../../interop/peer.js';
import { decorate } from '../../interop/service.js';
import { configuration } from '../../interop/transports.js';

const ROWS = 1_000;

// On an older one the binary of better-sqlite3 ends the process without a word.
if (Number.parseInt(process.versions.node, 10) < 22) {
  throw new Error(`Node 22 or newer is needed, not ${process.version}.`);
}

class User {}
Entity('users')(User);
PrimaryColumn('integer')(User.prototype, 'id');
Column('varchar')(User.prototype, 'name');
Column('varchar')(User.prototype, 'email');

class UsersController {
  constructor(users) { this.users = users; }

  async user({ id }) {
    const user = await this.users.findOneBy({ id });
    if (user === null) {
      throw new RpcException({ statusCode: 404, code: 'user-not-found', message: 'There is no such user.' });
    }
    return user;
  }
}
decorate(UsersController, { user: MessagePattern('user') });
InjectRepository(User)(UsersController, undefined, 0);

async function seed(database) {
  const source = await new DataSource({ ...sqlite(database), synchronize: true }).initialize();
  const users = Array.from({ length: ROWS }, (_, index) => (
    { id: index + 1, name: `User ${index + 1}`, email: `user${index + 1}@example.org` }
  ));
  await source.getRepository(User).save(users);
  await source.destroy();
}

const sqlite = (database) => ({ type: 'better-sqlite3', database, entities: [User] });

async function start({ database, ...told }) {
  class OrmModule {}
  Module({
    imports: [TypeOrmModule.forRoot(sqlite(database)), TypeOrmModule.forFeature([User])],
    controllers: [UsersController],
  })(OrmModule);
  const application = await NestFactory.createMicroservice(OrmModule, {
    ...configuration(told), logger: false, abortOnError: false,
  });
  await application.listen();
  return application;
}

if (process.argv[2] === '--seed') {
  await seed(process.argv[3]);
} else {
  await serve(start);
}
