"""One process per accelerator: spawn, channel, heartbeat."""
