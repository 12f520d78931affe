"""A local SageMaker runtime in front of a real container."""
