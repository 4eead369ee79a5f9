"""Credentials, region and endpoint of S3, where the AWS tools find them: in the environment, else in the
files of `aws configure`. obstore itself reads the first, and what AWS gives its machines and containers."""

import os
import re
from collections.abc import Mapping
from configparser import ConfigParser, Error
from typing import Any

from lorafuse.errors import UsageError, shown

KEYS = ("access_key_id", "secret_access_key", "session_token")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def aws_options(environ: Mapping[str, str], url: str) -> dict[str, Any]:
    """What `from_url` is given beside the URL. Raises UsageError for a profile that is not there, or whose
    credentials another program has to fetch, and for what obstore would end the process on: keys that no
    header can hold, an endpoint that is no URL."""
    profile = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE")
    own_keys = "AWS_ACCESS_KEY_ID" in environ
    section = _section(environ, profile or "default")
    if profile and not section:
        raise UsageError(
            f"{shown(url)}: AWS_PROFILE is {shown(profile)}, which no file of the AWS tools has."
        )
    options: dict[str, Any] = {}
    if not own_keys and "aws_access_key_id" in section:
        options = {key: section[f"aws_{key}"] for key in KEYS if f"aws_{key}" in section}
    elif profile and not own_keys:
        raise UsageError(
            f"{shown(url)}: the profile {shown(profile)} has no keys of its own; put them into the "
            'environment: `eval "$(aws configure export-credentials --format env)"`.'
        )
    if not {"AWS_REGION", "AWS_DEFAULT_REGION"} & environ.keys() and "region" in section:
        options["region"] = section["region"]
    endpoint = next((environ[name] for name in ENDPOINTS if environ.get(name)), None)
    if not endpoint and "endpoint_url" in section:
        endpoint = options["endpoint"] = section["endpoint_url"]
    _refuse_unusable(environ, options, endpoint, url)
    if endpoint and endpoint.startswith("http://"):  # as typed: of this machine, as a rule
        options["client_options"] = {"allow_http": True}
    return options


def _refuse_unusable(
    environ: Mapping[str, str], options: Mapping[str, Any], endpoint: str | None, url: str
) -> None:
    for key in KEYS:
        name, value = f"AWS_{key.upper()}", options.get(key)
        if not _is_plain(value or environ.get(name, "")):
            raise UsageError(
                f"{shown(url)}: {name} has a character that no key has, a space or a line end perhaps."
            )
    if endpoint and not (_is_plain(endpoint) and re.match(r"https?://[^/:]", endpoint)):
        raise UsageError(
            f"{shown(url)}: the endpoint of the store (AWS_ENDPOINT_URL) is no URL; expected one as "
            "https://host:port."
        )


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _section(environ: Mapping[str, str], profile: str) -> dict[str, str]:
    """What both files say of a profile; the one of credentials wins."""
    section: dict[str, str] = {}
    home = environ.get("HOME", "")
    for variable, file, prefix in (
        ("AWS_CONFIG_FILE", "config", "" if profile == "default" else "profile "),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", ""),
    ):
        parser = ConfigParser(interpolation=None)
        try:
            parser.read(environ.get(variable) or os.path.join(home, ".aws", file), encoding="utf-8")
        except (Error, ValueError):  # the AWS tools say what is wrong with it
            continue
        if parser.has_section(prefix + profile):
            section |= dict(parser.items(prefix + profile))
    return section
