"""The protobuf messages of the wire: ``wire.proto`` is ours, the rest is generated from it."""
