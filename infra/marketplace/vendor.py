"""The vendor's own words and choices: one small TOML file.

Owns: its fields and their limits. Must not know: AWS, the package, what was measured.
Invariant: a Vendor made by `read` is within every limit, and a field that nobody knows is refused.

Where AWS states no limit for a machine learning product, the tightest that it states for a product of another
kind is taken; each is marked so. They were not confirmed by a submission.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Final

import msgspec

from infra.report import CommandError, ExitCode

# Of the service model: `ModelPackageName` has 63 characters, `ModelPackageDescription` 1024.
NAME_PATTERN: Final = r"\A[a-z0-9](-*[a-z0-9]){0,39}\Z"
VERSION_PATTERN: Final = r"\A[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}\Z"
TITLE_LETTERS: Final = 72  # of AMI and container products; the service model says 255
SHORT_LETTERS: Final = 350  # of AMI products
OVERVIEW_LETTERS: Final = 5000  # of container products
HIGHLIGHTS: Final = 3
HIGHLIGHT_LETTERS: Final = 250
KEYWORDS: Final = 15
KEYWORD_LETTERS: Final = 250  # of all keywords together, with commas
TRIAL_DAYS: Final = (5, 120)  # the seller guide; it recommends 14 to 30
VENDOR_BYTES: Final = 64 * 1024
EULA_BYTES: Final = 1024 * 1024
STANDARD_CONTRACT: Final = "standard"

Line = Annotated[str, msgspec.Meta(min_length=1, max_length=400, pattern=r"\A[^\r\n]+\Z")]
Words = Annotated[str, msgspec.Meta(min_length=1, max_length=OVERVIEW_LETTERS)]
Region = Annotated[str, msgspec.Meta(pattern=r"\A[a-z]{2}-[a-z]+-[0-9]\Z")]


class Pricing(enum.StrEnum):
    """What a buyer pays for. Batch is billed by the hour whatever is chosen."""

    HOURLY = "hourly"
    INFERENCE = "inference"


class Product(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is sold, in words."""

    name: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
    version: Annotated[str, msgspec.Meta(pattern=VERSION_PATTERN)]
    title: Annotated[str, msgspec.Meta(min_length=5, max_length=TITLE_LETTERS, pattern=r"\A[^\r\n]+\Z")]
    short_description: Annotated[str, msgspec.Meta(min_length=10, max_length=SHORT_LETTERS)]
    overview: Annotated[str, msgspec.Meta(min_length=50, max_length=OVERVIEW_LETTERS)]
    customer: Line
    use_cases: Annotated[tuple[Line, ...], msgspec.Meta(min_length=1, max_length=10)]
    training_data: Words
    limitations: Annotated[tuple[Line, ...], msgspec.Meta(min_length=1, max_length=20)]
    highlights: Annotated[
        tuple[Annotated[str, msgspec.Meta(min_length=5, max_length=HIGHLIGHT_LETTERS)], ...],
        msgspec.Meta(min_length=1, max_length=HIGHLIGHTS),
    ]
    keywords: Annotated[tuple[Line, ...], msgspec.Meta(min_length=1, max_length=KEYWORDS)]
    version_notes: Words

    @property
    def package_name(self) -> str:
        """The model package's name: unversioned for AWS, the version is a part of it."""
        return f"{self.name}-{self.version.replace('.', '-')}"


class Image(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the image's own labels say, and how it is started."""

    cuda: Annotated[str, msgspec.Meta(pattern=r"\A(none|[0-9]{2}\.[0-9])\Z")]
    user: Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{1,10}(:[0-9]{1,10})?\Z")]
    environment: dict[str, str] = {}


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where image, artefact and validation data lie in one region; all of one seller's account."""

    region: Region
    image: str
    model_data: str
    role: str
    validation_input: str
    validation_output: str


class Instances(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The instance types that were tried."""

    realtime: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    batch: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    recommended_realtime: str
    recommended_batch: str


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How it is billed; `unit` is what one unit of the metering dimension is."""

    kind: Pricing
    unit: str = ""
    trial_days: int | None = None


class Support(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whom a buyer asks."""

    contact: Annotated[str, msgspec.Meta(pattern=r"\A[^@\s]+@[^@\s]+\.[^@\s]+\Z")]
    hours: Line
    refund: Words


class Samples(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the samples ask; the answers are recorded."""

    prompts: Annotated[tuple[Line, ...], msgspec.Meta(min_length=2, max_length=20)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=256)] = 32


class Vendor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. `workloads` says of each measured workload, by name, what it is."""

    product: Product
    image: Image
    regions: Annotated[tuple[Source, ...], msgspec.Meta(min_length=1, max_length=16)]
    instances: Instances
    pricing: Price
    support: Support
    samples: Samples
    workloads: Annotated[dict[str, Line], msgspec.Meta(min_length=1)]
    eula: str = STANDARD_CONTRACT


def read(path: Path) -> tuple[Vendor, str]:
    """Return the vendor's file and the text of its licence terms, empty for AWS's standard contract.

    Raises CommandError naming the field that is wrong.
    """
    try:
        vendor = msgspec.toml.decode(_text(path, VENDOR_BYTES), type=Vendor)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise _refused(f"`{path.name}`: {_lower(str(error))}") from error
    _look(vendor)
    if vendor.eula == STANDARD_CONTRACT:
        return vendor, ""
    terms = path.parent / vendor.eula
    if Path(vendor.eula).is_absolute() or ".." in Path(vendor.eula).parts:
        raise _refused("`eula` must name a file beside the vendor file")
    return vendor, _text(terms, EULA_BYTES)


def _look(vendor: Vendor) -> None:
    """Raise CommandError for what depends on more than one field."""
    price, named = vendor.pricing, [source.region for source in vendor.regions]
    if len(", ".join(vendor.product.keywords)) > KEYWORD_LETTERS:
        raise _refused(f"`product.keywords` have more than {KEYWORD_LETTERS} characters together")
    if len(set(named)) != len(named):
        raise _refused("`regions` names a region twice")
    if price.kind is Pricing.INFERENCE and not price.unit:
        raise _refused("`pricing.unit` must say what one unit is", "buyers are billed by it")
    if price.kind is Pricing.INFERENCE and price.trial_days is not None:
        raise _refused("`pricing.trial_days` goes with hourly pricing only")
    low, high = TRIAL_DAYS
    if price.trial_days is not None and not low <= price.trial_days <= high:
        raise _refused(f"`pricing.trial_days` must be from {low} to {high}")


def _text(path: Path, limit_bytes: int) -> str:
    try:
        if path.stat().st_size > limit_bytes:
            raise _refused(f"`{path.name}` is larger than {limit_bytes} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(f"`{path.name}` cannot be read as text") from error


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _refused(message: str, hint: str = "see infra/marketplace/README.md for the fields") -> CommandError:
    return CommandError(ExitCode.USAGE, "bad_vendor_file", message, hint)
