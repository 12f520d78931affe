"""The hardening checks, numbered as in the specification: CIS Docker 4.x and 5.x, Dockle, NIST SP 800-190.

A check is a function from what was observed to a list of findings; an empty list passes. Observing and
judging are apart, so that every check can be shown to fail: tests hand it an image or a container with that
one fault.
"""
