"""The container image: how it is built, made the same twice, and checked from outside.

Here and not in container/: what runs inside the image knows nothing of Docker. What builds and judges it runs
on a vendor's or a customer's machine, like all of infra.
"""
