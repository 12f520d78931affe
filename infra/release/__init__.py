"""What a customer gets beside the image to judge it by: bills of materials, provenance, one signature.

Signatures are made and checked with the `openssl` program: a customer needs nothing of ours to check one, and
a vendor's key may stay in whatever openssl can reach.
"""
