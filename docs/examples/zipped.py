"""A codec of one's own: packets travel compressed."""

import zlib

from microservices.codec import Codec

MOST = 1024 * 1024


class Zipped(Codec):
    def encode(self, body):
        return zlib.compress(body)

    def decode(self, body):
        reader = zlib.decompressobj()
        text = reader.decompress(body, MOST)  # a small message can hold a very large one
        if reader.unconsumed_tail:
            raise ValueError("the message is too large")
        return text
