"""`lorafuse report`: what the page says, that it is safe, and that it is small."""

import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import build
import numpy as np
import pytest
from click.testing import CliRunner
from html_page import parsed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutate import mutated_json
from receipts import merged_entry, mixture, receipt_of, write_receipt
from safetensors.torch import save_file

import lorafuse
from lorafuse import cli
from lorafuse.errors import ResultError, sized
from lorafuse.files.names import place_of
from lorafuse.reporting.figures import MAX_CELLS, grids_of

HOSTILE = 'x"><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J'
ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "div", "p"),
    *("h1", "h2", "h3", "code", "pre", "strong", "ul", "li", "dl", "dt", "dd", "details", "summary"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "svg", "rect", "text"),
}


def run(*args):
    return CliRunner().invoke(cli.lorafuse, [str(arg) for arg in args])


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """A directory with the result of a merge of the hand-written inputs."""
    monkeypatch.chdir(tmp_path)
    build.write_checkpoint(tmp_path / "ckpt")
    build.write_adapter(tmp_path / "adapter")
    lorafuse.convert("ckpt", "adapter", "merged")
    return Path("merged")


# ---- what it says


def test_the_page_says_what_was_merged(merged):
    """Base, adapter, counts, and every file with its hash, as they stand in the receipt."""
    receipt = json.loads((merged / "lorafuse_receipt.json").read_bytes())
    root = parsed(lorafuse.report(merged))
    (heading,) = root.all("h1")
    assert heading.text == "adapter merged into ckpt"
    (title,) = [e for e in root.all("title") if e.text.endswith("lorafuse")]
    assert title.text == "adapter merged into ckpt – lorafuse"
    text = root.text
    assert "17 copied, 4 merged" in text and "rank 4, scale 2.0 (4 weights)" in text
    assert "stored in full precision" in text and receipt["plan_id"] in text
    for entry in (*receipt["inputs"], *receipt["outputs"]):
        assert entry["sha256"] in text
        assert entry.get("path", entry.get("file")) in text


def figures_in(root, title):
    """{(layer, module): figure} of one heat map, by what its cells say."""
    (figure,) = [e for e in root.all("figure") if title in e.text]
    said = [title.text for rect in figure.all("rect") for title in rect.all("title")]
    cells = [re.fullmatch(r"layer (\d+), (\S+): (.*)", line).groups() for line in said]
    return {(int(layer), module): figure for layer, module, figure in cells}


def test_the_heat_maps_show_the_figures_of_each_weight(merged):
    """One weight a cell: the cell says what the receipt says."""
    tensors = json.loads((merged / "lorafuse_receipt.json").read_bytes())["tensors"]
    root = parsed(lorafuse.report(merged))
    for title, figure in (("Size of the update", "delta_rel"), ("Kept", "kept"), ("Noise", "noise")):
        cells = figures_in(root, title)
        assert len(cells) == 4
        for (layer, module), said in cells.items():
            assert said == f"{tensors[f'model.layers.{layer}.{module}.weight'][figure]:.4g}"


def test_experts_are_summed(tmp_path):
    """The cell of all experts of a layer is that of one long vector of random updates, here really made."""
    rng, tensors, expected = np.random.default_rng(0), {}, {}
    for layer in range(2):
        parts = []
        for i in range(5):
            W, D = rng.normal(size=50), rng.normal(size=50) * rng.uniform(0.01, 0.1)
            S = np.float32(W + D).astype(np.float16).astype(np.float64) + rng.normal(size=50) * 0.01
            parts.append((W, D, S))
            tensors[f"model.layers.{layer}.mlp.experts.{i}.up_proj.weight"] = {
                "action": "merged", "dtype": "float16", "shape": [50], "rank": 1, "scale": 1.0,
                "delta_norm": np.linalg.norm(D), "delta_rel": np.linalg.norm(D) / np.linalg.norm(W),
                "kept": (S - W) @ D / (D @ D), "noise": np.linalg.norm(S - W - D) / np.linalg.norm(D),
                "changed": 1.0,
            }  # fmt: skip
        W, D, S = map(np.concatenate, zip(*parts, strict=True))
        figures = (np.linalg.norm(D) / np.linalg.norm(W), (S - W) @ D / (D @ D),
                   np.linalg.norm(S - W - D) / np.linalg.norm(D))  # fmt: skip
        expected[layer, "mlp.experts.*.up_proj"] = figures
    root = parsed(lorafuse.report(write_receipt(tmp_path / "m", receipt_of(tensors))))
    for number, title in enumerate(("Size of the update", "Kept", "Noise")):
        cells = figures_in(root, title)
        assert cells == {where: f"{figures[number]:.4g}" for where, figures in expected.items()}


def test_shades_stand_for_what_the_legend_says(tmp_path):
    """`kept` 0.9999 is the first shade, 0.6 the fifth, and a weight that is not merged has none."""
    tensors = {
        f"h.{i}.c.weight": {"action": "merged", "dtype": "bfloat16", "shape": [1], "kept": kept, "noise": 0.0,
                            "delta_norm": 1.0, "delta_rel": 0.5}
        for i, kept in enumerate((0.9999, 1.0001, 0.985, 0.6, 0.2))
    }  # fmt: skip
    tensors["h.5.c.weight"] = {"action": "copied", "dtype": "bfloat16", "shape": [1]}
    root = parsed(lorafuse.report(write_receipt(tmp_path / "m", receipt_of(tensors))))
    (figure,) = [e for e in root.all("figure") if "Kept" in e.text]
    shades = [rect.attributes["class"] for rect in figure.all("rect") if rect.all("title")]
    assert shades == ["loss-0", "loss-0", "loss-2", "loss-4", "loss-5", "none"]
    labels = [item.text for item in figure.all("li")]
    assert labels[:3] == ["within 0.1% of 1", "within 1% of 1", "within 3% of 1"]


def test_the_worst_come_first_and_low_ones_are_marked(tmp_path):
    tensors = {f"h.{i}.c.weight": merged_entry(Random(i)) for i in range(30)}
    tensors["h.7.c.weight"]["kept"] = 0.3
    root = parsed(lorafuse.report(write_receipt(tmp_path / "m", receipt_of(tensors))))
    (table,) = [t for t in root.all("table") if "keep the least" in t.all("caption")[0].text]
    rows = [[cell.text for cell in row.children] for row in table.all("tbody")[0].all("tr")]
    assert rows[0][0] == "h.7.c.weight" and rows[0][4] == "0.3 low"
    assert len(rows) == 20
    kept = [float(row[4].removesuffix(" low")) for row in rows]
    assert kept == sorted(kept)
    assert "and 10 more weights were merged." in root.text
    assert "weights keep less than 97% of the update, h.7.c.weight the least (30.0%)" in root.text


def test_warnings(tmp_path, merged):
    """Nothing to warn of is said too."""
    assert "Nothing to warn of" in lorafuse.report(merged)
    ignored = {"used": [], "ignored": {"odd.lora_A.weight": "has no use"}}
    zero = {"h.0.c.weight": merged_entry(Random(1)) | {"delta_norm": 0.0, "kept": None}}
    page = lorafuse.report(write_receipt(tmp_path / "m", receipt_of(zero, adapter_tensors=ignored)))
    assert "Nothing to warn of" not in page
    text = parsed(page).text
    assert "The update of every weight is zero" in text and "1 tensor of the adapter was ignored" in text
    assert "has no use" in text


OPTIONS = [
    {},
    {"dtype": "float16", "adapter_scale": 0.5, "max_shard_size": "3KB"},
    {"base_quant": "nf4", "double_quant": False, "quant_blocksize": 32, "quant_skip": ["lm_head", "q_proj"]},
    {"format": "int8", "keep_dense": ["*.q_proj", "a b"], "rounding": "nearest"},
    {"adapters": [("second", 0.25)]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
def test_the_commands_do_what_they_say(options, tmp_path, monkeypatch):
    """The first makes the same bytes again, the second verifies the result."""
    monkeypatch.chdir(tmp_path)
    hidden = 32 if "base_quant" in options or "format" in options else 16
    tensors = build.checkpoint_tensors(hidden=hidden)
    build.write_checkpoint(tmp_path / "my ckpt", tensors, config=build.CONFIG | {"vocab_size": 2 * hidden})
    build.write_adapter(tmp_path / "adapter", build.adapter_tensors(tensors))
    build.write_adapter(tmp_path / "second", build.adapter_tensors(tensors, 0.2))
    lorafuse.convert("my ckpt", "adapter", "out", **options)
    again, verify = (e.text.replace("\\\n", "") for e in parsed(lorafuse.report("out")).all("pre"))
    words = shlex.split(again)
    assert words[0] == "lorafuse-convert"
    done = CliRunner().invoke(cli.convert, words[1:])
    assert done.exit_code == 0, done.output
    for path in Path("out").iterdir():
        if path.name != "lorafuse_receipt.json":
            assert path.read_bytes() == (Path("merged") / path.name).read_bytes()
    receipts = [json.loads(Path(name, "lorafuse_receipt.json").read_bytes()) for name in ("out", "merged")]
    assert receipts[0]["plan_id"] == receipts[1]["plan_id"]
    done = run(*shlex.split(verify)[1:])
    assert (done.exit_code, "are what the inputs make" in done.output) == (0, True), done.output


# ---- safe


def test_names_are_escaped(tmp_path, monkeypatch):
    """A tensor's name is text, wherever it stands; what it is not is an element, an attribute or an escape
    of the terminal."""
    monkeypatch.chdir(tmp_path)
    tensors = build.checkpoint_tensors()
    build.write_checkpoint(tmp_path / "<b>ckpt", {**tensors, HOSTILE: tensors["model.norm.weight"].clone()})
    save_file({}, tmp_path / "empty.safetensors")
    build.write_adapter(tmp_path / "a'd\"apter")
    lorafuse.convert("<b>ckpt", "a'd\"apter", "merged")
    page = lorafuse.report("merged")
    assert "<script" not in page and "<img" not in page and "<b>" not in page and "\x1b" not in page
    root = parsed(page)
    shown = HOSTILE.replace("\x1b", "\\x1b")
    assert shown in [code.text for code in root.all("code")]
    assert {e.name for e in root.all()} <= ELEMENTS


def test_nothing_is_loaded(merged):
    """No link, no address, no event handler; and a policy that forbids them all."""
    page = lorafuse.report(merged)
    root = parsed(page)
    for element in root.all():
        assert not {"src", "href", "action", "data", "srcset", "poster"} & element.attributes.keys()
        assert not [name for name in element.attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", page)
    (policy,) = [e for e in root.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attributes["content"].startswith("default-src 'none';")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_receipt_is_a_page_or_refused(tmp_path_factory, data):
    """A receipt that somebody changed ends in a page without foreign elements, or in ResultError."""
    tensors = {"a.0.b.weight": merged_entry(Random(1)),
               "c.weight": {"action": "copied", "dtype": "x", "shape": [2],
                            "stored": {"c": {"dtype": "uint8", "shape": [1]}}}}  # fmt: skip
    quant = {"kind": "nf4", "double_quant": False, "blocksize": 64, "skip": ["x"], "experts": False}
    receipt = receipt_of(tensors, dropped={"d": "why"})
    receipt["settings"] |= {"base_quant": quant, "keep_dense": ["*.x"], "format": "base"}
    path = write_receipt(tmp_path_factory.mktemp("m"), receipt)
    file = path / "lorafuse_receipt.json"
    file.write_bytes(data.draw(mutated_json(file.read_bytes())))
    try:
        page = lorafuse.report(path)
    except ResultError:
        return
    assert {e.name for e in parsed(page).all()} <= ELEMENTS


# ---- accessible


def test_structure_for_those_who_do_not_see(merged):
    """A language, headings in order, captions and scopes of tables, names of pictures, and regions that
    scroll and can be reached by the keyboard."""
    root = parsed(lorafuse.report(merged))
    (html,) = root.all("html")
    assert html.attributes["lang"] == "en"
    assert len(root.all("main")) == len(root.all("header")) == len(root.all("footer")) == 1
    levels = [int(e.name[1]) for e in root.all() if re.fullmatch(r"h\d", e.name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [e.attributes["id"] for e in root.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    assert {e.attributes["aria-labelledby"] for e in root.all("section")} == set(ids)
    for table in root.all("table"):
        assert len(table.all("caption")) == 1
        assert all(cell.attributes.get("scope") in ("col", "row") for cell in table.all("th"))
    for svg in root.all("svg"):
        named = svg.attributes.get("role") == "img" and svg.attributes.get("aria-label")
        assert named or svg.attributes.get("aria-hidden") == "true"
    scrolling = [e for e in root.all("div") if e.attributes.get("class") == "scroll"]
    assert scrolling and all(e.attributes["tabindex"] == "0" for e in scrolling)
    assert all(e.attributes["aria-label"] for e in scrolling)
    assert len(root.all("figure")) == len(root.all("figcaption")) == 3


def luminance(colour):
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast():
    """Text has a contrast of 4.5 to its background in both schemes (WCAG AA), and shades follow each other
    from near the background to far from it."""
    css = (Path(lorafuse.__file__).parent / "reporting/page.css").read_text()
    light, dark = re.findall(r":root \{([^}]*--page[^}]*)\}", css)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        pairs = [(ink, on) for ink in ("ink", "soft", "accent") for on in ("page", "card")]
        pairs += [("good", "good-card"), ("ink", "good-card"), ("bad", "bad-card"), ("ink", "bad-card"),
                  ("bad", "card")]  # fmt: skip
        for ink, on in pairs:
            assert contrast(colours[ink], colours[on]) >= 4.5, (ink, on)
        for ramp, n in (("size", 7), ("loss", 6)):
            steps = [contrast(colours[f"{ramp}-{i}"], colours["card"]) for i in range(n)]
            assert steps == sorted(steps), ramp
            assert all(after / before > 1.12 for before, after in pairwise(steps)), ramp


# ---- small


def test_experts_do_not_make_the_page_longer(tmp_path):
    """Experts are one row: ten times as many make a page of about the same size."""
    pages = [lorafuse.report(write_receipt(tmp_path / str(n), receipt_of(mixture(24, n)))) for n in (20, 200)]
    assert len(pages[1]) < 1.1 * len(pages[0]) < 250_000
    (grid,) = grids_of(mixture(24, 20))
    assert (len(grid.rows), len(grid.columns)) == (7, 24)


def test_no_model_makes_a_large_page(tmp_path):
    """Many layers share columns, many modules lose their rows, many stacks their grids: each is said."""
    rng = Random(1)
    deep = {f"a.{i}.m{j}.weight": merged_entry(rng) for i in range(250) for j in range(50)}
    wide = {f"s{i}.0.m.weight": merged_entry(rng) for i in range(5000)}
    grids = grids_of(deep | wide)
    assert sum(len(grid.rows) * len(grid.columns) for grid in grids) <= MAX_CELLS
    assert grids[0].n_left_out == 10 and grids[0].column_name(0) == "layers 0–2"
    page = lorafuse.report(write_receipt(tmp_path / "m", receipt_of(deep | wide)))
    assert len(page) < 4_000_000
    assert "and 10 more modules are in the table of modules only" in page


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.experts.7.up_proj.weight", ("model.layers", 3, "mlp.experts.*.up_proj")),
        ("lm_head.weight", ("", None, "lm_head")),
        ("model.norm.bias", ("", None, "model.norm.bias")),
        ("0.weight", ("", 0, "")),
        ("h.12.attn.c_attn.bias", ("h", 12, "attn.c_attn.bias")),
        ("wav2vec2.conv1d.weight", ("", None, "wav2vec2.conv1d")),
        ("a.1234567890.b", ("", None, "a.1234567890.b")),
    ],
)
def test_places(name, place):
    assert place_of(name) == place


# ---- the command


def test_where_the_page_goes(merged):
    """In OUT_DIR, where verify leaves it alone and another merge does not copy it; to a file; to stdout."""
    done = run("report", merged)
    assert (done.exit_code, done.output) == (0, "merged/lorafuse_report.html\n")
    page = (merged / "lorafuse_report.html").read_text(encoding="utf-8")
    assert page == lorafuse.report(merged)
    assert run("verify", merged).exit_code == 0
    lorafuse.convert(merged, "adapter", "twice")
    assert not Path("twice/lorafuse_report.html").exists()
    assert run("report", merged, "-o", "page.html").output == "page.html\n"
    assert Path("page.html").read_text(encoding="utf-8") == page
    assert run("report", merged, "-o", "-").output == page
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["adapter", "ckpt", "merged", "page.html", "twice"]


def test_what_is_refused(merged, tmp_path):
    """No result, no receipt, a damaged one, a name that is no page's, and a place that cannot be written."""
    cases = [
        (("nowhere",), 3, "nowhere: no such directory"),
        (("ckpt",), 8, "ckpt: has no lorafuse_receipt.json, so it is no result of lorafuse"),
        ((merged, "-o", "merged/config.json"), 2, "expected a name that ends with .html"),
        ((merged, "-o", "none/page.html"), 5, "No such file or directory"),
        ((merged, "-o", "s3://u:p@b/page.html"), 2, "-o s3://b/page.html: expected a file of this machine."),
    ]
    for args, code, message in cases:
        done = run("report", *args)
        assert (done.exit_code, "Traceback" in done.output) == (code, False), done.output
        assert message in done.output
    (merged / "lorafuse_receipt.json").write_text("{")
    assert run("report", merged).exit_code == 8
    assert not (merged / "lorafuse_report.html").exists()


def test_a_hub_id(hub, tmp_path):
    """Only the receipt and the config are fetched, and the page is written here."""
    ckpt, adapter = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "adapter")
    lorafuse.convert(ckpt, adapter, tmp_path / "merged")
    hub.add("org/name", tmp_path / "merged")
    assert run("report", "org/name").output == "lorafuse_report.html\n"
    assert "org/name" in Path("lorafuse_report.html").read_text(encoding="utf-8")
    assert hub.fetched().keys() == {"config.json", "lorafuse_receipt.json"}


def test_torch_is_not_imported(merged):
    code = "import sys, lorafuse; lorafuse.report('merged'); print({'torch', 'numpy'} & {*sys.modules})"
    path = str(Path(lorafuse.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.00 KB"), (9994, "9.99 KB"),
     (9996, "10.0 KB"), (99_960, "100 KB"), (999_499, "999 KB"), (999_500, "1.00 MB"),
     (16_060_000_000, "16.1 GB"), (2.5e15, "2.50 PB"), (5e18, "5,000 PB")],
)  # fmt: skip
def test_sizes(nbytes, said):
    assert sized(nbytes) == said
