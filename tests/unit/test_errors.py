"""Secrets are struck out of whatever is shown, by one list: messages, pages and model cards alike."""

from __future__ import annotations

import pytest

from tunesmith.errors import DataError, masked
from tunesmith.evaluate.report_html import clean

SECRETS = (
    "hf_" + "a" * 20,
    "sk-" + "b1_-" * 8,
    "ghp_" + "c" * 36,
    "github_pat_" + "d" * 22,
    "AKIA" + "E" * 16,
    "xoxb-" + "1" * 12,
)


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_struck_out_of_messages_and_pages(secret):
    for shown in (str(DataError(f"before {secret} after")), clean(f"before {secret} after")):
        assert shown == "before *** after"


def test_a_login_is_struck_out_of_an_address_and_the_address_stays():
    assert masked("read https://me:word@host/data.csv") == "read https://***@host/data.csv"
    assert clean("https://me:word@host/data.csv") == "https://***@host/data.csv"


def test_what_only_looks_like_one_stays():
    for text in ("hf_short", "a task-force", "mail me@host.org", "https://host/a@b", "gh_pages", "AKIA"):
        assert masked(text) == text
