"""What names an object store, and where credentials are found; none of it asks a store."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
from build import files_of, write_adapter, write_checkpoint
from click.testing import CliRunner

import lorafuse
from lorafuse import cli
from lorafuse.errors import LorafuseError, OutDirError, UsageError
from lorafuse.files import cloud_client
from lorafuse.files.cloud_aws import aws_options
from lorafuse.files.cloud_errors import explained
from lorafuse.files.cloud_folder import CloudFolder
from lorafuse.files.cloud_store import CloudPlace
from lorafuse.files.cloud_url import cloud_url
from lorafuse.outdir.clean import clean
from lorafuse.outdir.cloud import check_out_dir


@pytest.mark.parametrize(
    ("name", "root", "prefix"),
    [
        ("s3://bucket", "s3://bucket", ""),
        ("s3://bucket/a b/%20/ü/", "s3://bucket", "a b/%20/ü"),
        ("s3a://bucket/a", "s3://bucket", "a"),
        ("gs://bucket/a", "gs://bucket", "a"),
        ("az://container/a/b", "az://container", "a/b"),
        ("abfss://c@account.dfs.core.windows.net/a", "abfss://c@account.dfs.core.windows.net", "a"),
        ("abfs://c@account.dfs.core.windows.net/a", "abfss://c@account.dfs.core.windows.net", "a"),
        *((f"{scheme}://c/a", "az://c", "a") for scheme in ("abfs", "abfss", "adl", "azure")),
        ("memory:///a", "memory://", "a"),
        ("memory://a/b", "memory://", "a/b"),
    ],
)
def test_urls(name, root, prefix):
    """A key is what is written: nothing in it is escaped."""
    assert cloud_url(name) == (root, prefix)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("s3://", "s3://: names no bucket."),
        ("s3:///a", "s3:///a: names no bucket."),
        ("s3://b/a//c", "s3://b/a//c: has an empty part, '.' or '..' in its path."),
        ("s3://b/../c", "s3://b/../c: has an empty part, '.' or '..' in its path."),
    ],
)
def test_no_urls(name, says):
    with pytest.raises(UsageError) as caught:
        cloud_url(name)
    assert str(caught.value) == says


def test_a_password_in_the_url_of_azure():
    with pytest.raises(UsageError) as caught:
        cloud_url("abfss://c:hush@account.dfs.core.windows.net/a")
    assert "hush" not in str(caught.value)


def test_two_urls_of_one_place_of_azure(monkeypatch):
    """The account is in the URL, or in the environment: an input is not replaced under its other name."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "mine")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    cloud_client._store.cache_clear()
    short, long, other = (
        CloudFolder.at(f"{root}/base")
        for root in ("az://c", "abfss://c@mine.dfs.core.windows.net", "abfss://c@other.dfs.core.windows.net")
    )
    assert short.address == long.address != other.address
    for out in ("az://c/base", "abfss://c@mine.dfs.core.windows.net/base/merged", "az://c"):
        with pytest.raises(OutDirError, match="is, contains or lies inside the input"):
            check_out_dir(out, [short], overwrite=True)
        with pytest.raises(OutDirError, match="is, contains or lies inside the input"):
            check_out_dir(out, [long], overwrite=True)


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("S3://me:hush@models/x?X-Amz-Signature=hush", "s3://"),
        ("s3:/models/x", "s3://"),
        ("s3:/me:hush@models/x", "s3://"),
        ("Gs://models/x", "gs://"),
        ("FILE:///models/x", "file:///"),
        ("file:/models/x", "file:///"),
        ("file://here/models/x", "file:///"),
    ],
)
def test_what_is_nearly_a_url(name, begins, tmp_path, monkeypatch):
    """Nothing is written into a directory that is called so; but one that is there is taken."""
    monkeypatch.chdir(tmp_path)
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    scheme, _, path = name.partition(":")
    plain = f"{scheme}:{path}".partition("?")[0].replace("me:hush@", "")
    for names in ((name, lora, "out"), (ckpt, name, "out"), (ckpt, lora, name)):
        with pytest.raises(UsageError) as caught:
            lorafuse.convert(*names)
        assert str(caught.value) == f"{plain}: is no URL; expected one that begins with {begins}."
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "lora"}
    (tmp_path / "s3:").mkdir()
    ckpt.rename(tmp_path / "s3:/ckpt")
    lorafuse.convert("s3:/ckpt", lora, "out")


PRESIGNED = "https://me:hush@models.example/x/lora?X-Amz-Signature=hush#hush"


def test_a_presigned_url(tmp_path):
    """Of a name that is no place of ours a message has no secret either, and no result has it in its name."""
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    for call in (
        partial(lorafuse.convert, PRESIGNED, lora, tmp_path / "out"),
        partial(lorafuse.convert, ckpt, PRESIGNED, tmp_path / "out"),
        partial(lorafuse.convert, ckpt, lora, PRESIGNED),
        partial(lorafuse.batch, ckpt, PRESIGNED, tmp_path / "out"),
        partial(lorafuse.batch, ckpt, lora, PRESIGNED),
        partial(lorafuse.inspect, PRESIGNED),
        partial(lorafuse.verify, PRESIGNED),
        partial(clean, PRESIGNED),
    ):
        with pytest.raises(LorafuseError, match=r"^https://models\.example/x/lora: ") as caught:
            call()
        assert "hush" not in str(caught.value)
    lines = "".join(
        json.dumps({"adapter": f"{scheme}://me:hush@models/x{n}?token=hush"}) + "\n"
        for n, scheme in enumerate(("s3", "https", "ftp"))
    )
    (tmp_path / "jobs.jsonl").write_text(lines)
    states = lorafuse.batch(ckpt, tmp_path / "jobs.jsonl", tmp_path / "root")
    assert [(state.name, state.state) for state in states] == [(f"x{n}", "failed") for n in range(3)]
    assert "hush" not in repr([(state.out_dir, str(state.error)) for state in states])


def test_a_result_that_would_be_gone(tmp_path):
    """With the command, or in the processes of workers."""
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "jobs/lora")
    for command in (("convert", ckpt, lora), ("batch", ckpt, tmp_path / "jobs")):
        ran = CliRunner().invoke(cli.lorafuse, [*map(str, command), "memory:///out"])
        assert ran.exit_code == 2
        assert (
            ran.output == "Error: memory:///out: is gone when this command ends; memory:// is for Python.\n"
        )
    says = r"^memory:///(out|in): is in this process alone, and workers are others\. Give"
    for call in (
        partial(lorafuse.convert, ckpt, lora, "memory:///out"),
        partial(lorafuse.batch, ckpt, tmp_path / "jobs", "memory:///out"),
    ):
        with pytest.raises(UsageError, match=says):
            call(engine="ray")


ENDPOINT = "the endpoint of the store (AWS_ENDPOINT_URL) is no URL; expected one as https://host:port."
KEY = "has a character that no key has, a space or a line end perhaps."
SETTINGS = "the settings of the store cannot be used: Generic "
UNUSABLE = [
    ("s3://b", {"AWS_ENDPOINT_URL": "me:hush@host:9000"}, ENDPOINT),
    ("s3://b", {"AWS_ENDPOINT_URL": "http://a hush"}, ENDPOINT),
    ("s3://b", {"AWS_ENDPOINT_URL_S3": "http:///hush"}, ENDPOINT),
    ("s3://b", {"AWS_ACCESS_KEY_ID": "hush\n"}, f"AWS_ACCESS_KEY_ID {KEY}"),
    ("s3://b", {"AWS_ACCESS_KEY_ID": "a", "AWS_SESSION_TOKEN": "hu sh"}, f"AWS_SESSION_TOKEN {KEY}"),
    ("gs://b", {"GOOGLE_SERVICE_ACCOUNT_KEY": '{"private_key": "hush"'}, f"{SETTINGS}GCS error: GCP cred"),
    (
        "gs://b",
        {"GOOGLE_APPLICATION_CREDENTIALS": "/nothing"},
        f"{SETTINGS}GCS error: Unable to open",
    ),
    ("az://b", {"AZURE_STORAGE_ACCOUNT_KEY": "hush="}, f"{SETTINGS}MicrosoftAzure error: Invalid Access Key"),
    (
        "az://b",
        {"AZURE_STORAGE_SAS_KEY": "hush"},
        f"{SETTINGS}MicrosoftAzure error: Missing component",
    ),
    ("az://b", {"AZURE_STORAGE_ENDPOINT": "hush"}, f"{SETTINGS}MicrosoftAzure error: Unable"),
]


@pytest.mark.parametrize(("url", "settings", "says"), UNUSABLE, ids=str)
def test_settings_that_cannot_be_used(url, settings, says, monkeypatch, tmp_path):
    """Are said before anything is asked; what may be a secret is not repeated."""
    for name in os.environ:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    for name, value in {"HOME": str(tmp_path), "AZURE_STORAGE_ACCOUNT_NAME": "me", **settings}.items():
        monkeypatch.setenv(name, value)
    cloud_client._store.cache_clear()
    with pytest.raises(UsageError) as caught:
        CloudPlace.at(url)
    assert str(caught.value).startswith(f"{url}: {says}")
    assert not any(secret in str(caught.value) for secret in ("hush", "hu sh"))


@pytest.fixture
def home(tmp_path):
    """The files of `aws configure`."""
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/config").write_text(
        "[default]\nregion = eu-west-1\n[profile work]\nregion = eu-north-1\nendpoint_url = http://here:9000\n"
        "[profile login]\nsso_session = x\n"
    )
    (tmp_path / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = a\naws_secret_access_key = b%c\n"
        "[work]\naws_access_key_id = w\naws_secret_access_key = s\naws_session_token = t\n"
    )
    return {"HOME": str(tmp_path)}


def test_the_files_of_the_aws_tools(home):
    """The environment wins over them."""
    assert aws_options(home, "s3://b") == {
        "access_key_id": "a",
        "secret_access_key": "b%c",
        "region": "eu-west-1",
    }
    assert aws_options(home | {"AWS_PROFILE": "work"}, "s3://b") == {
        "access_key_id": "w",
        "secret_access_key": "s",
        "session_token": "t",
        "region": "eu-north-1",
        "endpoint": "http://here:9000",
        "client_options": {"allow_http": True},
    }
    of_environment = {"AWS_ACCESS_KEY_ID": "x", "AWS_REGION": "y", "AWS_ENDPOINT_URL": "https://z"}
    assert aws_options(home | of_environment, "s3://b") == {}
    assert aws_options({"HOME": "/nowhere"}, "s3://b") == {}


def test_profiles_without_keys(home):
    with pytest.raises(UsageError) as caught:
        aws_options(home | {"AWS_PROFILE": "other"}, "s3://b")
    assert str(caught.value) == "s3://b: AWS_PROFILE is other, which no file of the AWS tools has."
    with pytest.raises(UsageError) as caught:
        aws_options(home | {"AWS_PROFILE": "login"}, "s3://b")
    assert str(caught.value) == (
        "s3://b: the profile login has no keys of its own; put them into the environment: "
        '`eval "$(aws configure export-credentials --format env)"`.'
    )


def test_no_secret_is_repeated():
    """Of an answer only its code is told."""
    body = (
        "<Error><Code>SignatureDoesNotMatch</Code><Message>hush</Message><AWSAccessKeyId>hush</AWSAccessKeyId>"
        "<StringToSign>hush</StringToSign></Error>"
    )
    errors = [
        "Error performing PUT https://host/x?X-Amz-Signature=hush in 1s - Server returned non-2xx status "
        f"code: {status} Forbidden: {body}"
        for status in (403, 418)
    ]
    errors += [
        "Generic S3 error: HTTP error: error sending request for https://me:hush@host/x?token=hush\nhush"
    ]
    for error in errors:
        assert "hush" not in str(explained(Exception(error), "s3://b/x", "s3://b"))
    none = "Error performing PUT http://169.254.169.254/latest/api/token in 6ms - HTTP error"
    assert str(explained(Exception(none), "s3://b/x", "s3://b")) == (
        "s3://b/x: no credentials were found; set those that the cloud's own tools read "
        "(docs/object-storage.md)."
    )


def test_a_file_url_is_a_path(tmp_path):
    ckpt, lora = write_checkpoint(tmp_path / "a ckpt"), write_adapter(tmp_path / "lora")
    lorafuse.convert(f"file://{tmp_path}/a%20ckpt", f"file://{lora}/", f"file://{tmp_path}/out")
    lorafuse.convert(ckpt, lora, tmp_path / "expected")
    names = [name for name in files_of(tmp_path / "out") if name.endswith(".safetensors")]
    assert names
    assert all(files_of(tmp_path / "out")[name] == files_of(tmp_path / "expected")[name] for name in names)


def test_obstore_is_imported_for_such_urls_alone():
    code = "import sys, lorafuse.cli, lorafuse.pipeline, lorafuse.batching.batch as _; "
    code += "sys.exit('obstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
