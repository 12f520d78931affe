"""The examples for the SageMaker SDK, run in an environment of their own; see `__main__`."""
