"""The whole page: its head, its sections, and the style sheet beside this file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafuse._version import __version__
from lorafuse.receipt.fields import Receipt
from lorafuse.receipt.read import merged_inputs
from lorafuse.reporting import sections
from lorafuse.reporting.files_and_sizes import files, sizes
from lorafuse.reporting.markup import Markup, element
from lorafuse.reporting.tables import code

# Nothing is loaded and nothing runs, whatever a name in the receipt might be.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(receipt: Receipt, config: Mapping[str, Any], out_dir: str) -> str:
    """A receipt, and the config.json of the result, as HTML."""
    adapters = [_short(str(adapter["path"])) for adapter in merged_inputs(receipt, "adapter")]
    bases = [_short(str(base["path"])) for base in merged_inputs(receipt, "checkpoint")]
    merged = f"{' + '.join(adapters) or 'an adapter'} merged into {' '.join(bases) or 'a checkpoint'}"
    header = element(
        "header",
        element("p", "lorafuse merge report", class_="kind"),
        element("h1", merged),
        element("p", code(out_dir), class_="note"),
    )
    parts = [
        sections.what(receipt, config),
        sections.by_layer(receipt),
        sections.worst(receipt),
        sections.modules(receipt),
        sizes(receipt),
        files(receipt),
        sections.left_over(receipt),
        sections.again(receipt, out_dir),
    ]
    footer = element("footer", f"Made by lorafuse {__version__} from lorafuse_receipt.json alone. "
                     "The weights were not read: lorafuse verify checks them.")  # fmt: skip
    body = [header, element("main", sections.at_a_glance(receipt), sections.warnings(receipt), parts), footer]
    style = Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8"))
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        element("title", f"{merged} – lorafuse"),
        element("style", style),
    ]
    html = element("html", element("head", head), element("body", body), lang="en")
    return f"<!DOCTYPE html>\n{html.html}\n"


def _short(path: str) -> str:
    """A hub id as it is, of a longer path its last part."""
    parts = path.rstrip("/").split("/")
    return path if len(parts) <= 2 and parts[0] else parts[-1]
