// What a command's `record` says of a message, in the words of its transport.
import { MqttRecordBuilder, NatsRecordBuilder, RmqRecordBuilder, Transport } from '@nestjs/microservices';
import { VERSION } from './versions.js';

const NATS = VERSION === 'nest11' ? 'nats' : '@nats-io/transport-node';

const BUILDERS = {
  async [Transport.NATS](data, { headers }) {
    const nats = await import(NATS);
    const given = nats.headers();
    Object.entries(headers).forEach(([key, value]) => given.set(key, value));
    return new NatsRecordBuilder(data).setHeaders(given).build();
  },
  [Transport.MQTT](data, { qos = 0, retain = false, userProperties }) {
    return new MqttRecordBuilder(data).setQoS(qos).setRetain(retain).setProperties({ userProperties }).build();
  },
  [Transport.RMQ](data, options) {
    return new RmqRecordBuilder(data).setOptions(options).build();
  },
  [Transport.KAFKA](value, { key, headers }) {
    return { key, value, headers };
  },
};

export const recordOf = (transport, data, record) => BUILDERS[transport](data, record);
