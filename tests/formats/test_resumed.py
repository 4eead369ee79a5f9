"""A light merge that is killed: the same command makes of what is left what an uninterrupted one makes."""

import pytest
from faults import Disk, Killed
from models import LINEARS
from scenario import content

import lorafuse

STEP = 13  # of the calls that change the file system, one in so many is the last


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nf4_dq", {"format": "base"}),
        ("nf4_dq", {"format": "light"}),
        ("int8", {"format": "mixed"}),
        ("bf16", {"format": "nf4"}),
        ("bf16", {"format": "w8a16"}),
        ("bf16", {"format": "base", "base_quant": "nf4"}),
    ],
)
def test_killed_at_many_calls(kind, options, base, adapter, tmp_path, monkeypatch):
    lora, options = adapter(kind, target_modules=LINEARS), options | {"max_shard_size": "40KB"}
    lorafuse.convert(base(kind), lora, tmp_path / "clean", **options)
    clean, disk, resumed = content(tmp_path / "clean"), Disk(monkeypatch), set()
    for number in range(STEP, 1000, STEP):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        disk.kill_at(number)
        try:
            with disk.watched():
                lorafuse.convert(base(kind), lora, out, **options)
            break
        except Killed:
            disk.dead = False
        if out.exists():
            assert content(out) == clean
            continue
        events = []
        lorafuse.convert(base(kind), lora, out, on_event=events.append, **options)
        made = sum(event["event"] == "shard" for event in events)
        resumed.add(sum(name.endswith(".safetensors") for name in clean) - made)
        assert content(out) == clean
    assert number > 3 * STEP and len(resumed) > 1
