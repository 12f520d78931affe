"""The AWS templates: what is deployed, as data; the CDK app that checks it; the files rendered from it.

    variants, params      which templates there are, what a person may choose in each
    network .. outputs    the resources, in CloudFormation's own names
    template              one variant's whole template
    emit, render          the same as YAML, and the files under `infra/rendered`
    page                  `infra/README.md`, made from the same data
    app                   the CDK app: every resource through its typed L1 class

Invariant: only `app` imports the CDK; the rest is the standard library, so a drift check needs no Node.
"""
