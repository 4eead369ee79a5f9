"""The model card: what was merged into what, and how to load, make and verify it. Its metadata is read back
with the hub's library, its commands are run."""

import json
import shlex
from pathlib import Path
from typing import Any

import build
import pytest
from click.testing import CliRunner
from hub_server import HubServer
from huggingface_hub import ModelCard

import lorafuse
from lorafuse import cli
from lorafuse.errors import AdapterError

BASE_CARD = """---
license: other
license_name: own
license_link: https://example.com/license
language: [en, de]
pipeline_tag: text-generation
tags: [chat, "base_model:adapter:x"]
---
# The base
"""
ADAPTER_CARD = """---
base_model: org/base
library_name: peft
license: mit
datasets: [me/data]
tags: [lora, base_model:adapter:org/base, poems]
---
# Tuned for poems

Trained on poems. | and `code`
"""


@pytest.fixture
def repos(hub: HubServer, tmp_path: Path) -> HubServer:
    ckpt, lora = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "lora")
    (ckpt / "README.md").write_text(BASE_CARD)
    (lora / "README.md").write_text(ADAPTER_CARD)
    hub.add("org/base", ckpt)
    hub.add("me/tuned", lora)
    return hub


def card_of(out: Path) -> ModelCard:
    return ModelCard((out / "README.md").read_text())


def test_metadata(repos: HubServer, tmp_path: Path) -> None:
    """Base and relation, the base's licence, what both say of languages and data; tags of adapters go."""
    lorafuse.convert("org/base", "me/tuned", tmp_path / "out", card=True)
    assert card_of(tmp_path / "out").data.to_dict() == {
        "base_model": ["org/base", "me/tuned"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "other",
        "license_name": "own",
        "license_link": "https://example.com/license",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "datasets": ["me/data"],
        "tags": ["chat", "poems", "lorafuse"],
    }


def test_text(repos: HubServer, tmp_path: Path) -> None:
    """The commits, what was kept, how to load; the adapter's card below."""
    receipt = lorafuse.convert("org/base@main", "me/tuned", tmp_path / "out", card=True)
    text = card_of(tmp_path / "out").text
    base, adapter = (f"{name}@{repos.repos[name].refs['main']}" for name in ("org/base", "me/tuned"))
    assert f"`{base}` with `{adapter}` merged into its weights by lorafuse {lorafuse.__version__}." in text
    for row in (f"| base | `{base}` |", f"| adapter | `{adapter}` |", "| changed weights | 4 of 21 |"):
        assert row in text
    assert "| base in training | stored in full precision |" in text
    kept = [entry["kept"] for entry in receipt["tensors"].values() if "kept" in entry]
    assert f", at least {min(kept):.4%} in `model.layers." in text
    assert "AutoModelForCausalLM.from_pretrained(" in text
    below = text.partition(f"## The card of the adapter `{adapter}`\n\n")[2]
    assert below == "# Tuned for poems\n\nTrained on poems. | and `code`\n"


def test_the_commands_of_the_card(repos: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They make the same bytes again, of the same commits, whatever is committed later; and verify them."""
    lorafuse.convert(
        "org/base", "me/tuned", tmp_path / "out", card=True,
        dtype="float32", max_shard_size=3000, adapter_scale=0.5, base_quant="nf4", double_quant=False,
        quant_blocksize=32, quant_skip=["lm_head"], adapters=[("me/tuned", 0.25)],
    )  # fmt: skip
    for name in ("org/base", "me/tuned"):
        repos.add(name, build.write_adapter(tmp_path / name.replace("/", "-")))
    block = (
        card_of(tmp_path / "out").text.partition("## Reproduce and verify\n\n```\n")[2].partition("```")[0]
    )
    convert, verify = (shlex.split(line) for line in block.strip().splitlines())
    monkeypatch.chdir(tmp_path)
    for arguments in (convert, verify):
        ran = CliRunner().invoke(cli.lorafuse, arguments[1:])
        assert ran.exit_code == 0, ran.output
    again, out = build.files_of(tmp_path / "OUT_DIR"), build.files_of(tmp_path / "out")
    weights = [name for name in out if name.endswith(".safetensors")]
    assert len(weights) > 3 and all(again[name] == out[name] for name in weights)
    assert (
        json.loads(again["lorafuse_receipt.json"])["settings"]
        == json.loads(out["lorafuse_receipt.json"])["settings"]
    )


@pytest.mark.parametrize("revision", [None, "v2"])
def test_the_commands_of_the_card_on_the_hub(repos: HubServer, tmp_path: Path, revision: str | None) -> None:
    """They load and verify what is published there, on the branch that the card is on."""
    push = lorafuse.Push("me/merged", revision=revision)
    lorafuse.convert("org/base", "me/tuned", tmp_path / "out", push_to_hub=push)
    text = card_of(tmp_path / "out").text
    where = '"me/merged", revision="v2"' if revision else '"me/merged"'
    assert f"AutoModelForCausalLM.from_pretrained({where}, dtype=" in text
    assert f"AutoTokenizer.from_pretrained({where})" in text
    verify = next(line for line in text.splitlines() if line.startswith("lorafuse verify"))
    assert shlex.split(verify)[2] == ("me/merged@v2" if revision else "me/merged")
    ran = CliRunner().invoke(cli.lorafuse, shlex.split(verify)[1:])
    assert ran.exit_code == 0 and "21 weights are what the inputs make." in ran.output, ran.output


def test_verify_with_a_card(repos: HubServer, tmp_path: Path) -> None:
    """A card is no part of the model: it may be written and edited."""
    lorafuse.convert("org/base", "me/tuned", tmp_path / "out", card=True)
    with open(tmp_path / "out/README.md", "a") as f:
        f.write("More.\n")
    assert lorafuse.verify(tmp_path / "out", ckpt="org/base", adapters=["me/tuned"])["weights"] == 21


@pytest.mark.parametrize(
    "card", [None, "no metadata", "---\nlicense: [\n---\n# broken", "---\n- a list\n---\nx", b"\xff\xfe"]
)
def test_of_local_inputs(tmp_path: Path, card: Any) -> None:
    """The adapter's config names the base; no path of this machine is in the card. A card that cannot be read
    is no reason to fail."""
    ckpt, lora = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "lo|r`a")
    if card is not None:
        (lora / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    lorafuse.convert(ckpt, lora, tmp_path / "out", card=True)
    found = card_of(tmp_path / "out")
    assert found.data.to_dict() == {
        "base_model": ["somebody/something"],
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["lorafuse"],
    }
    assert str(tmp_path) not in found.content and "| adapter | `lo\\|r'a` |" in found.text


def test_no_card_unless_asked(repos: HubServer, tmp_path: Path) -> None:
    """The card of the base is not even fetched; that of the adapter may say how training loaded the base."""
    lorafuse.convert("org/base", "me/tuned", tmp_path / "out")
    assert not (tmp_path / "out/README.md").exists() and "README.md" not in repos.fetched("org/base")


def test_auto(repos: HubServer, tmp_path: Path) -> None:
    """CKPT may be the base that the adapter's config names, at its revision."""
    build.write_adapter(tmp_path / "a", base_model_name_or_path="org/base", revision="main")
    receipt = lorafuse.convert("auto", tmp_path / "a", tmp_path / "out")
    assert receipt["inputs"][0]["path"] == "org/base@main/config.json"
    build.write_adapter(tmp_path / "b", base_model_name_or_path=str(tmp_path / "ckpt"))
    receipt = lorafuse.convert("-", tmp_path / "b", tmp_path / "out2")
    assert receipt["inputs"][0]["path"] == f"{tmp_path}/ckpt/config.json"


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "the config names no base; give the checkpoint."),
        (
            "/no/such",
            "the config names /no/such as its base, which is no directory here; give the checkpoint.",
        ),
    ],
)
def test_auto_that_names_nothing(tmp_path: Path, base: str | None, said: str) -> None:
    lora = build.write_adapter(tmp_path / "lora", base_model_name_or_path=base)
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert("auto", lora, tmp_path / "out")
    assert str(caught.value) == f"{lora}: {said}"
