"""The customer's keys in a plan: state, region, and whether their policies let the role's rights count."""

from __future__ import annotations

import json
from typing import Any

import pytest

from infra.deploy import key_checks
from infra.deploy.findings import looked
from tests.infra.recorded import refusal
from tests.infra.test_deploy_plan import example, recorded

ACCOUNT = "123456789012"
KEY = f"arn:aws:kms:us-east-1:{ACCOUNT}:key/00000000-0000-0000-0000-000000000000"
ROOT = {"AWS": f"arn:aws:iam::{ACCOUNT}:root"}


def statement(**changes: Any) -> dict[str, Any]:
    made = {"Effect": "Allow", "Principal": ROOT, "Action": "kms:*", "Resource": "*", **changes}
    return {name: value for name, value in made.items() if value is not None}


def found(
    *statements: dict[str, Any], name: str = "VolumeKeyArn", key: str = KEY, **metadata: Any
) -> list[str]:
    held = {"KeyId": "0", "KeyState": "Enabled", **metadata}
    aws = recorded(
        DescribeKey={"KeyMetadata": held},
        GetKeyPolicy={"Policy": json.dumps({"Statement": list(statements)})},
    )
    told = [f"{one.state}: {one.detail} | {one.hint}" for one in key_checks.keys(example(**{name: key}), aws)]
    aws.close()
    return told


def test_a_key_whose_policy_hands_all_to_iam_is_good() -> None:
    told = found(statement())
    assert len(told) == 4 and all(one.startswith("ok: ") for one in told)
    assert len(found(statement(), name="ModelDataKeyArn")) == 2


@pytest.mark.parametrize(
    ("made", "action"),
    [
        (statement(Action=["kms:Decrypt", "kms:GenerateDataKey*"]), "kms:CreateGrant"),
        (statement(Action=["kms:CreateGrant", "kms:Decrypt"]), "kms:GenerateDataKey"),
        (statement(Action=["kms:CreateGrant", "kms:Generate*"]), "kms:Decrypt"),
        (statement(Action=None, NotAction=["kms:CreateGrant"]), "kms:CreateGrant"),
        (statement(Principal={"AWS": f"arn:aws:iam::{ACCOUNT}:role/admin"}), "kms:Decrypt"),
        (statement(Principal={"AWS": "arn:aws:iam::999999999999:root"}), "kms:Decrypt"),
        (statement(Principal={"Service": "s3.amazonaws.com"}), "kms:Decrypt"),
    ],
)
def test_an_action_that_the_policy_keeps_from_iam_is_refused(made: dict[str, Any], action: str) -> None:
    refused = [one for one in found(made) if one.startswith("refused")]
    assert any(
        f"does not hand `{action}` to IAM | let `arn:aws:iam::{ACCOUNT}:root`" in one for one in refused
    )


@pytest.mark.parametrize("principal", [ROOT, {"AWS": ACCOUNT}, {"AWS": ["x", "*"]}, "*"])
def test_the_accounts_root_is_known_in_each_form(principal: Any) -> None:
    assert all(one.startswith("ok") for one in found(statement(Principal=principal)))


def test_a_policy_that_cannot_be_judged_is_unchecked() -> None:
    condition = {"Bool": {"kms:GrantIsForAWSResource": "true"}}
    told = found(
        statement(Action="kms:CreateGrant", Condition=condition),
        statement(NotAction="kms:CreateGrant", Action=None),
    )
    assert [one.partition(":")[0] for one in told] == ["ok", "unchecked", "ok", "ok"]
    denied = found(statement(), statement(Effect="Deny", Principal="*", Action="kms:Decrypt"))
    assert any("denies `kms:Decrypt` to some" in one for one in denied)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"KeyState": "PendingDeletion"}, "is PendingDeletion"),
        ({"KeySpec": "RSA_2048"}, "is not symmetric"),
    ],
)
def test_a_key_that_cannot_encrypt_is_refused_before_its_policy(metadata: dict[str, Any], words: str) -> None:
    (told,) = found(**metadata)
    assert told.startswith("refused") and words in told


def test_a_key_of_another_region_is_refused_without_asking() -> None:
    (told,) = found(key=KEY.replace("us-east-1", "eu-west-1"))
    assert told == "refused: `VolumeKeyArn` lies in eu-west-1 | name a key of us-east-1"


def test_without_the_right_to_read_the_policy_it_is_unchecked() -> None:
    denied = refusal("AccessDeniedException")
    aws = recorded(DescribeKey={"KeyMetadata": {"KeyId": "0", "KeyState": "Enabled"}}, GetKeyPolicy=denied)
    states = [one.state for one in looked("keys", key_checks.keys, example(VolumeKeyArn=KEY), aws)]
    aws.close()
    assert states == ["ok", "unchecked"] or states == ["unchecked"]


def test_a_plan_without_keys_of_ones_own_asks_nothing() -> None:
    aws = recorded()
    assert list(key_checks.keys(example(), aws)) == []
    aws.close()
