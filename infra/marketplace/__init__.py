"""From a sealed package to a listing on AWS Marketplace, checked wholly offline.

    vendor file + package + measured results + a running server
        -> vendor, figures, samples (facts) -> request, texts, notebook (what is made of them) -> folder

Owns: what a listing says and what AWS would refuse of it. Must not know: how a model is sealed or served.
Invariant: every figure comes from a results file and every sample from a server; what a folder shows is what
its `listing.json` gives. Nothing here was submitted to AWS yet.
"""
