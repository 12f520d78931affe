"""The vendor's file: each field has its limit, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.marketplace import vendor
from infra.report import CommandError, ExitCode
from sagemaker_entry import reference
from tests.infra.marketplace.making import EXAMPLE, toml, words


def test_the_example_file_is_read_whole() -> None:
    read, terms = vendor.read(EXAMPLE)
    assert read.product.package_name == "strongroom-example-chat-1-0-0" and terms == ""


def test_the_examples_environment_names_are_settings_of_the_container() -> None:
    page = reference.settings_page()
    assert words().image.environment
    for name in words().image.environment:
        assert f"`{name}`" in page


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('name = "strongroom-example-chat"', 'name = "Strongroom"', "$.product.name"),
        ('name = "strongroom-example-chat"', f'name = "{"x" * 41}"', "$.product.name"),
        ('version = "1.0.0"', 'version = "1.0"', "$.product.version"),
        ('title = "Example Chat', f'title = "{"x" * 72}', "$.product.title"),
        ('short_description = "', f'short_description = "{"x" * 350}', "$.product.short_description"),
        ('overview = """', f'overview = """{"x" * 5000}', "$.product.overview"),
        ('customer = "', 'customer = "\\n', "$.product.customer"),
        ("use_cases = [", "use_cases = [] # [", "$.product.use_cases"),
        ('training_data = "', f'training_data = "{"x" * 5000}', "$.product.training_data"),
        ("limitations = [", "limitations = [] # [", "$.product.limitations"),
        ("highlights = [", 'highlights = ["12345", "12345", ', "$.product.highlights"),
        ("highlights = [", f'highlights = ["{"x" * 251}", ', "$.product.highlights"),
        ("keywords = [", "keywords = [] # [", "$.product.keywords"),
        ("keywords = [", f'keywords = ["{"x" * 240}", ', "product.keywords"),
        ('version_notes = "First version."', 'version_notes = ""', "$.product.version_notes"),
        ('cuda = "12.2"', 'cuda = "twelve"', "$.image.cuda"),
        ('user = "10001:10001"', 'user = "strongroom"', "$.image.user"),
        ('region = "us-east-1"', 'region = "America"', "$.regions[0].region"),
        ("realtime = [", "realtime = [] # [", "$.instances.realtime"),
        ("batch = [", "batch = [] # [", "$.instances.batch"),
        ('kind = "hourly"', 'kind = "free"', "$.pricing.kind"),
        ('kind = "hourly"', 'kind = "inference"', "pricing.unit"),
        ('kind = "hourly"', 'unit = "an answer"\nkind = "inference"', "pricing.trial_days"),
        ("trial_days = 14", "trial_days = 4", "pricing.trial_days"),
        ("trial_days = 14", "trial_days = 121", "pricing.trial_days"),
        ('contact = "support@example.com"', 'contact = "us"', "$.support.contact"),
        ('hours = "', 'hours = "\\n', "$.support.hours"),
        ('refund = "', f'refund = "{"x" * 5000}', "$.support.refund"),
        ("prompts = [", 'prompts = ["one"] # [', "$.samples.prompts"),
        ("max_tokens = 24", "max_tokens = 0", "$.samples.max_tokens"),
        ("W3 = ", "# W3 = ", "$.workloads"),
        ('eula = "standard"', 'eula = "../EULA.md"', "eula"),
        ('eula = "standard"', 'eula = "missing.md"', "missing.md"),
        ('eula = "standard"', 'eulogy = "x"', "eulogy"),
        ("[product]", "[product", "vendor.toml"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    with pytest.raises(CommandError) as caught:
        vendor.read(toml(tmp_path, (old, new)))
    assert named in caught.value.message and caught.value.code == ExitCode.USAGE
    assert caught.value.hint and "\n" not in caught.value.message


def test_a_region_named_twice_is_refused(tmp_path: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    block = text[text.index("[[regions]]") : text.index("[instances]")]
    (tmp_path / "vendor.toml").write_text(text.replace(block, block + block), encoding="utf-8")
    with pytest.raises(CommandError, match="bad_vendor_file") as caught:
        vendor.read(tmp_path / "vendor.toml")
    assert "twice" in caught.value.message


def test_own_terms_are_read_from_beside_the_file(tmp_path: Path) -> None:
    made = toml(tmp_path, ('eula = "standard"', 'eula = "EULA.txt"'))
    (tmp_path / "EULA.txt").write_text("Our terms.", encoding="utf-8")
    assert vendor.read(made)[1] == "Our terms."
    (tmp_path / "EULA.txt").write_bytes(b"\xff")
    with pytest.raises(CommandError, match="bad_vendor_file"):
        vendor.read(made)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "vendor.toml").write_text("#" * (vendor.VENDOR_BYTES + 1), encoding="utf-8")
    with pytest.raises(CommandError) as caught:
        vendor.read(tmp_path / "vendor.toml")
    assert "larger than" in caught.value.message
