// A NestJS service without the decorator syntax, which would need a build step.
import { Controller, Module } from '@nestjs/common';
import { NestFactory } from '@nestjs/core';
import { Transport } from '@nestjs/microservices';
import { configuration, firstFetch } from './transports.js';

export function decorate(controller, decorators) {
  for (const [method, decorator] of Object.entries(decorators)) {
    const { prototype } = controller;
    const descriptor = Object.getOwnPropertyDescriptor(prototype, method);
    decorator(prototype, method, descriptor);
    // A decorator may put another function into it.
    Object.defineProperty(prototype, method, descriptor);
  }
  Controller()(controller);
}

export async function listen(controllers, told) {
  class PeerModule {}
  Module({ controllers })(PeerModule);
  const configured = configuration(told);
  const application = await NestFactory.createMicroservice(PeerModule, {
    ...configured,
    logger: false,
    // Otherwise a failed start aborts the process without telling why.
    abortOnError: false,
  });
  await application.listen();
  if (configured.transport === Transport.KAFKA) {
    const [, consumer] = application.unwrap();
    await firstFetch(consumer);
  }
  return application;
}
