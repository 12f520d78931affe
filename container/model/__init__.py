"""One rank's tensors: StepPlan to token ids."""

import os

# Nothing in this room may reach for a network, whatever the environment says. The hub's client reads these
# once, when it is first imported, so they are set before any module of the room.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# transformers otherwise reads the whole checkpoint ahead in threads: a second copy of the model in memory.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
