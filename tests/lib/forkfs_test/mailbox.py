"""A mailbox's frame as a host writes it (docs/mailbox.md), made by other hands than the engine's."""

import struct

MAGIC = b"HYPEMAN_FORK_MAILBOX_V1\0"


def crc32c(data):
    """Castagnoli's checksum."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def frame(payload, epoch, flags=3):
    """[(offset, bytes)] in the order in which they are written. epoch None: without the extension."""
    rest = struct.pack("<IQ", flags, 0) + epoch if epoch else bytes(28)
    length = struct.pack("<I", len(payload))
    crc = struct.pack("<I", crc32c(rest + length + payload)) if epoch else bytes(4)
    return [(264, payload), (224, crc), (228, rest), (260, length), (256, struct.pack("<I", 1))]
