"""What bench/faithfulness/ measures and writes: its formulas against PEFT and bitsandbytes, its page against
itself."""

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import bitsandbytes.functional as bnb
import pytest
import torch
from models import by_transformers, tiny_llama
from safetensors.torch import load_file, save_file
from unmerged import train

from bench.faithfulness import light, real
from bench.faithfulness.accuracy import rows_of, same_weights
from bench.faithfulness.bars import Bar, Point, decades, scatter, svg
from bench.faithfulness.distance import around_block, kept_and_noise, merged_in_float64
from bench.faithfulness.smollm2 import ADAPTERS, QLORA, Adapter, quantize, save_decoded
from bench.faithfulness.ways import FINER, SAME, merges, titles
from lorafuse import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "accuracy.md"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("faithfulness") / "dense"
    tiny_llama(dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_update_that_kept_is_measured_against_is_what_peft_merges(tmp_path, use_dora):
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    peft = train(model, tmp_path / "adapter", target_modules=["q_proj", "k_proj"], use_dora=use_dora)
    after = dict(peft.merge_and_unload().named_parameters())
    found = list(merged_in_float64(Adapter(str(tmp_path / "adapter"), "nf4", ""), before.__getitem__))
    assert {name for name, _, _ in found} == {
        name for name in before if "q_proj.weight" in name or "k_proj.weight" in name
    }
    for name, W, V in found:
        assert torch.equal(W, before[name].double())
        assert (V - W).norm() > 0.1 * W.norm()
        torch.testing.assert_close(V, after[name].double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("share", "kept", "noise"), [(0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (0.25, 0.25, 0.75), (-1.0, -1.0, 2.0)]
)
def test_a_share_of_the_update_is_kept_and_the_rest_is_noise(tmp_path, share, kept, noise):
    W = torch.randn(8, 6, dtype=torch.float64)
    A, B = torch.randn(2, 6), torch.randn(8, 2)
    base, merged, adapter = tmp_path / "base", tmp_path / "merged", tmp_path / "adapter"
    for path in (base, merged, adapter):
        path.mkdir()
    save_file({"q.weight": W}, base / "model.safetensors")
    save_file({"q.weight": W + share * 3 * (B.double() @ A.double())}, merged / "model.safetensors")
    factors = {"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 6, "r": 2, "use_dora": false}')
    assert kept_and_noise(merged, base, Adapter(str(adapter), "nf4", "")) == pytest.approx(
        (kept, noise), abs=1e-12
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_naive_is_every_linear_layer_as_bitsandbytes_quantizes_it(dense, tmp_path, kind):
    save_decoded(quantize(dense, kind), dense, tmp_path)
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        want = weight
        if "_proj.weight" in name and kind == "nf4":
            want = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
        elif "_proj.weight" in name:
            q, scb, _ = bnb.int8_vectorwise_quant(weight.half())
            want = bnb.int8_vectorwise_dequant(q, scb)
        assert torch.equal(after[name], want), name
        assert torch.equal(after[name].float(), weight.float()) == ("_proj.weight" not in name), name


def test_decoding_a_saved_checkpoint_gives_what_quantizing_gave(dense, tmp_path):
    from transformers import AutoModelForCausalLM

    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    by_transformers(dense, tmp_path / "nf4", **settings)
    for name, model in (
        ("saved", AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")),
        ("fresh", quantize(dense, "nf4")),
    ):
        (tmp_path / name).mkdir()
        save_decoded(model, dense, tmp_path / name)
    assert same_weights(tmp_path / "saved", tmp_path / "fresh")
    assert not same_weights(tmp_path / "saved", dense)


def test_the_same_weights_are_the_same_bits_under_the_same_names(tmp_path):
    def save(name, *shards):
        (tmp_path / name).mkdir()
        for i, tensors in enumerate(shards):
            save_file(tensors, tmp_path / name / f"{i}.safetensors")
        return tmp_path / name

    a, zero = torch.arange(4.0), torch.zeros(3)
    one = save("one", {"a": a, "b": zero})
    assert same_weights(one, save("two shards", {"b": zero}, {"a": a}))
    assert not same_weights(one, save("negative zero", {"a": a, "b": -zero}))
    assert not same_weights(one, save("less", {"a": a}))
    assert not same_weights(one, save("another dtype", {"a": a, "b": zero.bfloat16()}))


def test_only_what_is_between_the_markers_is_rewritten(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before <!-- x:begin -->\nold\n<!-- x:end --> after")
    assert around_block(page, "x") == ("before <!-- x:begin -->\n", "\n<!-- x:end --> after")
    with pytest.raises(SystemExit, match="expected one <!-- y:begin --> and one <!-- y:end -->"):
        around_block(page, "y")


def test_the_axis_starts_below_the_least_value():
    assert decades([3e-7, 0.2]) == (-7, 0)
    assert decades([1e-7, 1.0]) == (-8, 0)
    assert decades([0.0, 0.5, 20.0]) == (-1, 2)


def test_a_bar_is_as_long_as_its_logarithm():
    bars = [
        Bar("a", 1e-4, "right"),
        Bar("b < 1", 1e-2, "wrong"),
        Bar("c", 1.0, "wrong"),
        Bar("same", 0.0, "right"),
    ]
    root = ElementTree.fromstring(svg("title & more", {"panel": bars[:2], "another": bars[2:]}))
    tag = "{http://www.w3.org/2000/svg}"
    widths = [float(rect.get("width")) for rect in root.iter(f"{tag}rect") if rect.get("x")]
    assert widths == pytest.approx([90, 270, 450, 0])  # 450 px for 5 decades, from 1e-5
    texts = [text.text for text in root.iter(f"{tag}text")]
    assert {"title & more", "panel", "another", "b < 1", "1.0e-02", "1e-4", "0.0e+00"} <= set(texts)


def test_no_label_of_a_plot_hides_another_or_a_point():
    points = [Point("abc", 112, y) for y in (0.35, 0.34, 0.33, 1e-3)]
    points += [Point("abc", 116, 0.34), Point("abc", 269, 0.34), Point("abc", 117, 1.1e-3)]
    root, tag = ElementTree.fromstring(scatter("title", {"panel": points})), "{http://www.w3.org/2000/svg}"
    boxes = []
    for text in root.iter(f"{tag}text"):
        if text.text.endswith(" MB"):
            end, left = text.get("class").endswith("end"), float(text.get("x"))
            boxes.append((left - 70 if end else left, float(text.get("y")) - 4))  # px of eleven letters
    circles = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in root.iter(f"{tag}circle")]
    assert len(boxes) == len(circles) == len(points)
    for i, (left, y) in enumerate(boxes):
        assert not [x for x, height in circles if left <= x <= left + 70 and abs(height - y) < 4]
        others = boxes[:i] + boxes[i + 1 :]
        assert not [at for at, height in others if abs(at - left) < 70 and abs(height - y) < 12]


def rows(text):
    """{row: cells} of the tables whose first column names a row."""
    return {match[1]: match[2] for match in re.finditer(r"^\| `([\w-]+)` \| (.*) \|$", text, re.M)}


def sections(word="faithfulness"):
    """What a script wrote between its markers, adapter by adapter."""
    page = PAGE.read_text(encoding="utf-8")
    block = page.split(f"<!-- {word}:begin -->")[1].split(f"<!-- {word}:end -->")[0]
    return re.split(r"^### ", block, flags=re.M)[1:]


def test_the_page_has_every_row_of_every_adapter():
    found = {section.split("`")[1]: rows(section) for section in sections()}
    assert found.keys() == {f"fixtures/{adapter.name}/" for adapter in ADAPTERS}
    for adapter in ADAPTERS:
        have = {row: cells.split(" | ")[0] for row, cells in found[f"fixtures/{adapter.name}/"].items()}
        assert have == {row: titles(adapter.base)[row] for row in rows_of(adapter)}, adapter.name


def test_the_page_has_the_light_rows_of_every_adapter():
    found = {section.split("`")[1]: rows(section) for section in sections("light")}
    assert found.keys() == {f"fixtures/{adapter.name}/" for adapter in ADAPTERS}
    for adapter in ADAPTERS:
        have = {row: cells.split(" | ")[0] for row, cells in found[f"fixtures/{adapter.name}/"].items()}
        assert have == {row: titles(adapter.base)[row] for row in light.ROWS}, adapter.name
    plot = ElementTree.fromstring(PAGE.with_name("accuracy-size.svg").read_text(encoding="utf-8"))
    plotted = [row for row in light.ROWS if row not in (*SAME, *FINER)]
    assert len(plot.findall("{http://www.w3.org/2000/svg}circle")) == len(ADAPTERS) * len(plotted)


def test_the_readme_shows_rows_of_the_page():
    assert sections()[0].startswith(QLORA.what) and QLORA.what in sections("light")[0].split("\n")[0]
    light_rows = [cells.split(" | ") for cells in rows(sections("light")[0]).values()]
    page = [cells.split(" | ") for cells in rows(sections()[0]).values()]
    page += [cells[:-2] for cells in light_rows]  # without bits a weight and MB
    table = re.search(
        r"<!-- real:begin -->\n(.*?)\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
    )[1]
    shown = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert [cells[0] for cells in shown] == [titles(QLORA.base)[row] for row in real.ROWS]
    assert all(cells[:-1] in page for cells in shown)
    megabytes = {cells[0]: cells[-1] for cells in light_rows}
    assert all(cells[-1] == megabytes.get(cells[0], cells[-1]) for cells in shown)


def test_the_commands_of_the_page_are_commands_of_lorafuse():
    commands = [
        shlex.split(line)[1:]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("lorafuse-convert ")
    ]
    rows = [row for adapter in ADAPTERS for row in rows_of(adapter) if row in merges(adapter.base)]
    assert len(commands) >= len(rows)
    for command in commands:
        cli.convert.make_context("lorafuse-convert", command)
