"""The heavy linters of the templates, each in its own locked environment: CDK with cdk-nag and cfn-guard,
cfn-lint, checkov. The ordinary suite needs none of them.
"""
