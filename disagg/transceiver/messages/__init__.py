"""Wire messages: one frozen dataclass each. The codec is apart, in `disagg.transceiver.codec`."""
