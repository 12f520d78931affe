"""The accounts that hold AWS Marketplace's model packages and algorithms, by region.

Owns: the table. Must not know: who uses it. Source: the ARN maps in NVIDIA/nim-deploy's and
cohere-ai/cohere-aws's notebooks, identical in both. A region that is not listed has no published account.
Invariant: account ids are strings: some begin with a zero.
"""

from __future__ import annotations

from typing import Final

MARKETPLACE: Final[dict[str, str]] = {
    "ap-northeast-1": "977537786026",
    "ap-northeast-2": "745090734665",
    "ap-south-1": "077584701553",
    "ap-southeast-1": "192199979996",
    "ap-southeast-2": "666831318237",
    "ca-central-1": "470592106596",
    "eu-central-1": "446921602837",
    "eu-north-1": "136758871317",
    "eu-west-1": "985815980388",
    "eu-west-2": "856760150666",
    "eu-west-3": "843114510376",
    "sa-east-1": "270155090741",
    "us-east-1": "865070037744",
    "us-east-2": "057799348421",
    "us-west-1": "382657785993",
    "us-west-2": "594846645681",
}
