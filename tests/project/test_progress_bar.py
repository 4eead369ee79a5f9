"""The bar for callers from Python: tqdm's, which in a notebook is a widget."""

import subprocess
import sys
from typing import Any

import pytest
import tqdm.auto
from build import write_adapter, write_checkpoint

import lorafuse

IN_A_NOTEBOOK = """
import sys, types
from tqdm.std import tqdm
class Widget(tqdm):
    made = []
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.made.append((self.desc, self.total))
kernel = types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: kernel)
sys.modules["ipykernel.zmqshell"] = types.SimpleNamespace()
sys.modules["tqdm.notebook"] = types.SimpleNamespace(
    tqdm=Widget, trange=None, tnrange=None, IProgress=object, WARN_NOIPYW="")
from lorafuse import ProgressBar
bar = ProgressBar()
bar({"event": "plan", "nbytes": 7, "shards": [{}]})
bar({"event": "progress", "nbytes": 7})
bar({"event": "done"})
print(Widget.made)
"""


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every bar that is made."""
    made: list[Any] = []

    class Bar(tqdm.auto.tqdm):  # type: ignore[misc,unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    return made


@pytest.fixture
def inputs(tmp_path):
    return write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "jobs/lora")


def test_a_merge_a_dry_run_and_a_verification(bars, inputs, tmp_path, capsys):
    ckpt, lora = inputs
    plan = lorafuse.convert(ckpt, lora, tmp_path / "out", dry_run=True, on_event=lorafuse.ProgressBar())
    assert bars == []
    lorafuse.convert(ckpt, lora, tmp_path / "out", on_event=lorafuse.ProgressBar())
    with lorafuse.ProgressBar() as bar:
        lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=lora, on_event=bar)
    assert [bar.desc for bar in bars] == ["merging", "verifying"]
    assert [bar.total for bar in bars] == [plan["nbytes"]] * 2
    assert all(bar.n == bar.total and bar.disable for bar in bars)  # complete, and closed
    assert capsys.readouterr().out == ""


def test_a_batch_has_a_bar_for_each_pass(bars, inputs, tmp_path, capsys):
    ckpt, _ = inputs
    (tmp_path / "jobs/logs").mkdir()
    (tmp_path / "jobs/logs/events").touch()
    lorafuse.batch(ckpt, tmp_path / "jobs", tmp_path / "out", on_event=lorafuse.ProgressBar())
    assert [(bar.desc, bar.n == bar.total) for bar in bars] == [("pass 1", True)]
    assert capsys.readouterr().out.startswith(f"Warning: {tmp_path}/jobs/logs: holds no adapter")


def test_an_error_closes_it(bars, inputs, tmp_path):
    with pytest.raises(ZeroDivisionError), lorafuse.ProgressBar() as bar:
        bar({"event": "plan", "nbytes": 5, "shards": [{}]})
        1 / 0  # noqa: B018
    assert bars[0].disable


def test_in_a_notebook_it_is_a_widget():
    ran = subprocess.run(
        [sys.executable, "-c", IN_A_NOTEBOOK], check=False, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "[('merging', 7)]\n", ran.stderr
