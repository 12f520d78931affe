"""`strongroom deploy`: look before, apply, watch, take down; boto3 and CloudFormation, no state of its own.

    choices    what is to be deployed: variant, region, parameter values
    aws        clients whose every request is checked before it is sent
    findings   one line of a plan; plan and the files beside it make them
    stack      apply and take down, and why something is still being created

Invariant: what AWS answers is the state; every verb may be run twice.
"""
