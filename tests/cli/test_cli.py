"""The command line: what is printed where, and what it ends with.

Most tests call the command in this process; the options that must not import torch get processes of their
own.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from build import (
    CONFIG,
    adapter_tensors,
    checkpoint_tensors,
    files_of,
    write_adapter,
    write_checkpoint,
    write_json,
    write_told_adapter,
)

import lorafuse
from lorafuse import __version__, cli, errors
from lorafuse.files.safetensors_writer import ShardWriter

PACKAGE_ROOT = Path(cli.__file__).parents[2]
RESULT = ["config.json", "lorafuse_receipt.json", "model.safetensors"]


def exit_code_of(*args: object) -> int:
    """Runs `lorafuse convert` in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        cli.convert.main([str(arg) for arg in args], prog_name="lorafuse-convert")
    except SystemExit as e:
        return int(e.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


class Cli:
    """Runs `lorafuse convert`; `out` and `err` are those of the last run."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *args: object) -> int:
        self._capsys.readouterr()
        code = exit_code_of(*args)
        self.out, self.err = self._capsys.readouterr()
        assert "Traceback" not in self.out + self.err
        return code

    @property
    def events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "ckpt")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_told_adapter(tmp_path / "adapter")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[None]:
    """Nothing that existed when the test began changed, and nothing was added: neither OUT_DIR nor
    staging."""
    yield
    assert sorted(p.name for p in tmp_path.iterdir() if p.name not in ("ckpt", "adapter", "seen")) == []


MAIN = "from lorafuse.cli import main_convert; main_convert()"


def process(*args: object, code: str = MAIN, **env: str) -> subprocess.Popen[str]:
    """`lorafuse convert` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=60)
    return child.returncode, out, err


# ---- exit code 0


def test_merge(run: Cli, ckpt: Path, adapter: Path, out: Path) -> None:
    """A merge ends with 0, its last line on stdout is OUT_DIR, and OUT_DIR holds the result."""
    assert run(ckpt, adapter, out) == 0
    assert run.out == f"{out}\n"
    assert sorted(files_of(out)) == RESULT
    pattern = (
        rf"Merged {adapter} into {ckpt} \(stored in full precision\): 4 of 21 weights updated, "
        r"[0-9.]+% of the update kept where it is least; [0-9.]+ KB in [0-9.]+ s, peak [0-9,.]+ [MG]B\."
    )
    assert re.fullmatch(rf"model\.safetensors: 13\.0 KB \(1 of 1\)\n{pattern}\n", run.err)


def test_out_dir_as_given(
    run: Cli, ckpt: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT_DIR is printed as it was given, so that a script can use it."""
    monkeypatch.chdir(tmp_path)
    assert run("ckpt", "adapter", "./deep/er/out/") == 0
    assert run.out == "./deep/er/out/\n"
    assert sorted(files_of(tmp_path / "deep/er/out")) == RESULT


def test_out_dir_that_is_no_unicode(
    ckpt: Path, adapter: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """A path whose bytes are no UTF-8 is a path all the same."""
    out = os.fsencode(tmp_path) + b"/out\xff"
    assert exit_code_of(ckpt, adapter, os.fsdecode(out)) == 0
    assert capsysbinary.readouterr().out == out + b"\n"
    assert os.path.exists(out + b"/lorafuse_receipt.json")


def test_inputs_that_are_no_unicode(run: Cli, tmp_path: Path, out: Path) -> None:
    """The same for the inputs, whose paths go into the receipt."""
    ckpt, adapter = write_checkpoint(tmp_path / "ckpt\udcff"), write_adapter(tmp_path / "adapter\udcff")
    assert run(ckpt, adapter, out) == 0
    assert (
        json.loads((out / "lorafuse_receipt.json").read_bytes())["inputs"][0]["path"] == f"{ckpt}/config.json"
    )


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "\ud800", "🙂"])
def test_config_values_pass_through(
    run: Cli, tmp_path: Path, adapter: Path, out: Path, value: object
) -> None:
    """What config.json says beyond JSON's rules, such as Mamba's "time_step_limit": [0.0, Infinity], is kept,
    not crashed on."""
    ckpt = write_checkpoint(tmp_path / "ckpt", config=CONFIG | {"time_step_limit": [0.0, value]})
    assert run(ckpt, adapter, out) == 0
    kept = json.loads((out / "config.json").read_bytes())["time_step_limit"][1]
    assert kept == value or (kept != kept and value != value)  # NaN is not itself


def test_quiet(run: Cli, ckpt: Path, adapter: Path, out: Path) -> None:
    """With --quiet nothing is on stderr, not even warnings, and OUT_DIR is still on stdout."""
    write_adapter(adapter.with_name("seen"), r=16)  # warns: the config's rank is not that of the tensors
    assert run(ckpt, adapter.with_name("seen"), out, "--quiet") == 0
    assert (run.out, run.err) == (f"{out}\n", "")


def test_warning(run: Cli, ckpt: Path, tmp_path: Path, out: Path) -> None:
    """A warning is one line on stderr."""
    adapter = write_adapter(tmp_path / "adapter", r=16)
    assert run(ckpt, adapter, out) == 0
    warning = (
        f"Warning: {adapter}/adapter_config.json: says rank 16 where the tensors have rank 4; the tensors "
        "are believed.\n"
    )
    assert run.err.startswith(warning)
    assert run.out == f"{out}\n"


def test_verbose(run: Cli, ckpt: Path, adapter: Path, out: Path) -> None:
    """With --verbose every weight that changed has a line with its figures."""
    assert run(ckpt, adapter, out, "-v") == 0
    lines = [line for line in run.err.splitlines() if line.startswith("merged ")]
    assert [line.split()[1] for line in lines] == [
        f"model.layers.{i}.{module}.weight"
        for i in range(2)
        for module in ("mlp.down_proj", "self_attn.q_proj")
    ]
    assert all("rank 4" in line and "scale 2" in line and "kept " in line for line in lines)
    assert run.out == f"{out}\n"


def test_json(run: Cli, ckpt: Path, adapter: Path, out: Path) -> None:
    """With --json stdout is one object a line and nothing else: the plan, each file, and that it is done."""
    assert run(ckpt, adapter, out, "--json", "--max-shard-size", "4KB") == 0
    kinds = [event["event"] for event in run.events]
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert kinds == ["plan", *["shard"] * len(files), "done"]
    assert sorted(event["file"] for event in run.events if event["event"] == "shard") == files
    assert [shard["file"] for shard in run.events[0]["shards"]] == files
    assert run.events[-1]["out_dir"] == str(out)


def test_json_quiet(run: Cli, ckpt: Path, tmp_path: Path, out: Path) -> None:
    """--json and --quiet go together: events on stdout, warnings among them, nothing on stderr."""
    assert run(ckpt, write_adapter(tmp_path / "adapter", r=16), out, "--json", "-q") == 0
    assert [event["event"] for event in run.events] == ["warning", "plan", "shard", "done"]
    assert run.err == ""


def test_dry_run(run: Cli, ckpt: Path, adapter: Path, out: Path, untouched: None) -> None:
    """With --dry-run the plan is on stdout and nothing is written."""
    before = files_of(ckpt.parent)
    assert run(ckpt, adapter, out, "--dry-run", "--dtype", "float32") == 0
    fixed, lasting = run.out.split("disk      ")
    assert fixed == (
        f"base      {ckpt}: llama: 21 weights in full precision\n"
        f"adapter   {adapter}: LORA of PEFT, 8 tensors\n"
        "weights   17 decoded (not changed, stored in another way than in the base), 4 merged (changed by an "
        "update)\n"
        "changes   4 of 21 weights: 2 mlp.down_proj, 2 self_attn.q_proj\n"
        "writes    21.8 KB in 1 file of weights\n"
        "          model.safetensors  21.8 KB  21 weights\n"
        "--format  dense 21.8 KB, base 10.9 KB, fp8 7.07 KB, int8 7.60 KB\n"
    )
    pattern = (
        r"\d+ KB needed, [\d,.]+ [GT]B free\nmemory    at most 100 MB beyond `import torch`; \d workers?\n"
        r"time      less than a second \(.* to compute beside .* to write\), estimated by a probe of half a "
        r"second\nadapter tensors: 8 used, 0 ignored\nconfig\.json: dtype = \"float32\"\n"
    )
    assert re.fullmatch(pattern, lasting)
    assert files_of(ckpt.parent) == before


def test_dry_run_json(run: Cli, ckpt: Path, adapter: Path, out: Path, untouched: None) -> None:
    """With --dry-run and --json stdout is one line, the plan."""
    assert run(ckpt, adapter, out, "--dry-run", "--json") == 0
    (plan,) = run.events
    assert plan["event"] == "plan"
    assert plan["weights"] == {"copied": 17, "merged": 4}
    assert plan["adapter_tensors"] == {"used": 8, "ignored": {}}


def test_dry_run_predicts(run: Cli, ckpt: Path, adapter: Path, out: Path) -> None:
    """The plan of a dry run is the plan of the run, with the size in each format."""
    run(ckpt, adapter, out, "--dry-run", "--json", "--max-shard-size", "3KB")
    (planned,) = run.events
    run(ckpt, adapter, out, "--json", "--max-shard-size", "3KB")
    assert planned.pop("formats")["dense"] == planned["nbytes"]
    for answer in ("inputs", "changes", "changed", "memory_nbytes", "disk", "estimate", "device"):
        del planned[answer]
    assert run.events[0] == planned
    assert planned["plan_id"] == json.loads((out / "lorafuse_receipt.json").read_text())["plan_id"]


def test_overwrite(run: Cli, ckpt: Path, adapter: Path, out: Path) -> None:
    """--overwrite replaces OUT_DIR as a whole; nothing of the old one is left."""
    (out / "sub").mkdir(parents=True)
    (out / "adapter_config.json").write_text("{}")
    assert run(ckpt, adapter, out, "--overwrite") == 0
    assert sorted(files_of(out)) == RESULT
    assert sorted(p.name for p in out.parent.iterdir()) == ["adapter", "ckpt", "out"]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(run: Cli, flag: str) -> None:
    """Help is on stdout."""
    assert run(flag) == 0
    assert run.out.startswith("Usage: lorafuse-convert [OPTIONS] CKPT ADAPTER OUT_DIR\n")
    assert run.err == ""


def test_version(run: Cli) -> None:
    """--version prints the version, and which kernel is used."""
    assert run("--version") == 0
    version, kernel = run.out.splitlines()
    assert version == f"lorafuse, version {__version__}"
    assert kernel in {f"compiled kernel: {word}" for word in ("none", "baseline", "avx2", "avx512")}


# ---- exit code 2, and starting without torch

WRONG_OPTIONS = [
    ([], "Missing argument 'CKPT'."),
    (["a", "b"], "Missing argument 'OUT_DIR'."),
    (["a", "b", "c", "d"], "Got unexpected extra argument (d)"),
    (["a", "b", "c", "--nonsense"], "No such option"),
    (["a", "b", "c", "--dtype", "int4"], "'int4' is not one of"),
    (["a", "b", "c", "--base-quant", "nf5"], "'nf5' is not one of"),
    (
        ["a", "b", "c", "--base-quant", "nf4", "--quant-blocksize", "65"],
        "--quant-blocksize is 65; expected one of 32, 64, 128, ",
    ),
    (
        ["a", "b", "c", "--quant-experts"],
        "--quant-experts says how the base was quantized, but --base-quant is none; ",
    ),
    (
        ["a", "b", "c", "--max-shard-size", "5XB"],
        "'5XB' is no size; expected a number with a decimal unit, such as 100MB or 5GB.",
    ),
    (
        ["a", "b", "c", "--max-shard-size", "0"],
        "'0' is no size; expected at least 1 byte and less than 2^63.",
    ),
    (["a", "b", "c", "--max-shard-size", "-1"], "'-1' is no size"),
    (["a", "b", "c", "--memory-limit", "9" * 400 + "GB"], "is no size"),
    (["a", "b", "c", "--memory-limit", "much"], "'much' is no size"),
    (["a", "b", "c", "--adapter-scale", "x"], "'x' is not a valid float."),
    (["a", "b", "c", "--adapter-scale", "nan"], "--adapter-scale is nan; expected a finite number."),
    (["a", "b", "c", "--adapter-scale", "inf"], "--adapter-scale is inf; expected a finite number."),
    (["a", "b", "c", "--device", "tpu"], "--device is tpu; expected auto, cpu, cuda or cuda:N."),
    (["a", "b", "c", "--device", "cuda:x"], "--device is cuda:x; expected auto, cpu, cuda or cuda:N."),
]


@pytest.mark.parametrize(("args", "message"), WRONG_OPTIONS)
def test_usage_error(run: Cli, args: list[str], message: str) -> None:
    """A wrong option ends with 2 and says what is wrong with it."""
    assert run(*args) == 2
    assert run.out == ""
    assert message in run.err.partition("Error: ")[2]


def test_starts_without_torch(tmp_path: Path) -> None:
    """Help, version and every wrong option need neither torch nor the hub: here, importing either fails."""
    for module in ("torch", "huggingface_hub", "numpy", "safetensors"):
        (tmp_path / f"{module}.py").write_text(
            "raise ImportError('not before the options are known to be right')"
        )
    cases = [(args, 2) for args, _ in WRONG_OPTIONS] + [(["--help"], 0), (["-h"], 0), (["--version"], 0)]
    code = f"""if True:
        import io, sys
        from contextlib import redirect_stderr, redirect_stdout
        from lorafuse.cli import main_convert
        for args, expected in {cases!r}:
            sys.argv = ["lorafuse-convert", *args]
            try:
                with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                    main_convert()
            except SystemExit as e:
                assert (e.code or 0) == expected, (args, e.code)
    """
    child = process(code=code, PYTHONPATH=f"{tmp_path}{os.pathsep}{PACKAGE_ROOT}")
    assert finished(child) == (0, "", "")


def test_help_is_quick() -> None:
    """Help appears within 0.7 s of a processor, which is 0.7 s on an idle machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, out, _ = finished(process("--help"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (code, out[:6]) == (0, "Usage:")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.7


def test_memory_limit_too_small(run: Cli, ckpt: Path, adapter: Path, out: Path, untouched: None) -> None:
    """A limit that nothing fits into is a usage error that says how much is needed."""
    assert run(ckpt, adapter, out, "--memory-limit", "1MB") == 2
    pattern = r"Error: A memory limit of 1 MB is too small: \d+ MB are needed beyond `import torch`, most "
    pattern += r"of it for \S+\. "
    assert re.fullmatch(pattern + r"Raise --memory-limit\.\n", run.err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_no_cuda(run: Cli, ckpt: Path, adapter: Path, out: Path, untouched: None) -> None:
    """A device that is not there is a usage error."""
    assert run(ckpt, adapter, out, "--device", "cuda:1") == 2
    assert run.err == "Error: device cuda:1: torch sees 0 CUDA devices here.\n"


# ---- exit codes 3, 4, 5, 7, 8


def test_bad_checkpoint(run: Cli, ckpt: Path, adapter: Path, out: Path, untouched: None) -> None:
    """A bad checkpoint ends with 3, in one line, before anything is written."""
    (ckpt / "config.json").write_text("[]")
    assert run(ckpt, adapter, out) == 3
    assert (run.out, run.err) == ("", f"Error: {ckpt}/config.json: holds list, expected an object.\n")


def test_no_checkpoint(run: Cli, tmp_path: Path, adapter: Path, out: Path, untouched: None) -> None:
    """A checkpoint that is not there ends with 3."""
    assert run(tmp_path / "none", adapter, out) == 3
    assert run.err == f"Error: {tmp_path}/none: no such directory.\n"


def test_no_adapter(run: Cli, ckpt: Path, tmp_path: Path, out: Path, untouched: None) -> None:
    """An adapter that is not there ends with 4."""
    assert run(ckpt, tmp_path / "none", out) == 4
    assert run.err == f"Error: {tmp_path}/none: no such directory.\n"


def test_bad_adapter(run: Cli, ckpt: Path, adapter: Path, out: Path, untouched: None) -> None:
    """A bad adapter ends with 4, in one line, before anything is written."""
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert run(ckpt, adapter, out) == 4
    expected = f"Error: {adapter}/adapter_model.safetensors: 0 bytes are too few for a safetensors file.\n"
    assert (run.out, run.err) == ("", expected)


def test_adapter_for_another_base(run: Cli, ckpt: Path, tmp_path: Path, out: Path, untouched: None) -> None:
    """An adapter that does not fit ends with 4 and names both sides."""
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors(checkpoint_tensors(hidden=8)))
    assert run(ckpt, adapter, out) == 4
    module = "base_model.model.model.layers.0.mlp.down_proj"
    assert run.err == (
        f"Error: {adapter}/adapter_model.safetensors: {module}.lora_A.weight [4, 12] and "
        f"{module}.lora_B.weight [8, 4] do not fit model.layers.0.mlp.down_proj.weight [16, 24]; is the "
        "adapter for another base? The adapter's config names somebody/something as its base.\n"
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_error_with_json(
    run: Cli, ckpt: Path, tmp_path: Path, out: Path, untouched: None, as_json: bool
) -> None:
    """An error is on stderr with --json and --quiet too, and stdout has nothing else."""
    assert run(ckpt, tmp_path / "none", out, "-q", *(["--json"] if as_json else [])) == 4
    assert run.err == f"Error: {tmp_path}/none: no such directory.\n"
    assert [json.loads(line)["event"] for line in run.out.splitlines()] == (["error"] if as_json else [])


def test_full_disk(
    run: Cli, ckpt: Path, adapter: Path, out: Path, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space ends with 5 and leaves nothing behind."""
    real_write = os.write

    def write(fd: int, data: memoryview, *at: int) -> int:
        if ".lorafuse-" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, os.strerror(28))
        return real_write(fd, data)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "pwrite", write)
    assert run(ckpt, adapter, out) == 5
    assert run.err == f"Error: {out}: No space left on device.\n"


def test_hub_unreachable(
    run: Cli, adapter: Path, out: Path, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input that may be on the hub, without a network, ends with 5."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(out.parent / "no-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("no-org/no-name", adapter, out) == 5
    expected = (
        "Error: no-org/no-name: no such directory, and it is not in the hub's cache; HF_HUB_OFFLINE is set: "
        "unset it to ask the hub.\n"
    )
    assert run.err == expected


def test_out_dir_not_empty(run: Cli, ckpt: Path, adapter: Path, out: Path) -> None:
    """An OUT_DIR with anything in it ends with 7 and stays as it is."""
    out.mkdir()
    (out / "mine").write_text("mine")
    assert run(ckpt, adapter, out) == 7
    assert (
        run.err
        == f"Error: {out}: exists and is not empty; --overwrite replaces it once the new one is complete.\n"
    )
    assert files_of(out) == {"mine": b"mine"}


def test_an_error_is_an_event_too(run: Cli, ckpt: Path, adapter: Path, out: Path) -> None:
    """With --json a script learns from stdout alone how a command ended."""
    out.mkdir()
    (out / "mine").write_text("mine")
    assert run(ckpt, adapter, out, "--json") == 7
    (event,) = map(json.loads, run.out.splitlines())
    message = f"{out}: exists and is not empty; --overwrite replaces it once the new one is complete."
    assert event == {"event": "error", "message": message, "exit_code": 7}
    assert run.err == f"Error: {message}\n"


def test_out_dir_is_a_file(run: Cli, ckpt: Path, adapter: Path, out: Path) -> None:
    """A file in place of OUT_DIR ends with 7, even with --overwrite."""
    out.write_text("mine")
    assert run(ckpt, adapter, out, "--overwrite") == 7
    assert run.err == f"Error: {out}: exists and is not a directory.\n"
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    "where", ["ckpt", "ckpt/out", "ckpt/../ckpt", "adapter", "adapter/x/y", "..", "link", "link/out"]
)
def test_out_dir_and_inputs(run: Cli, ckpt: Path, adapter: Path, tmp_path: Path, where: str) -> None:
    """An OUT_DIR that is, contains or lies inside an input ends with 7, through links too, and --overwrite
    does not change that."""
    (tmp_path / "link").symlink_to("ckpt")
    before = files_of(tmp_path)
    assert run(ckpt, adapter, f"{tmp_path}/{where}", "--overwrite") == 7
    named = adapter if where.startswith("adapter") else ckpt
    expected = (
        f"Error: {tmp_path}/{where}: is, contains or lies inside the input {named}; choose another "
        "directory.\n"
    )
    assert run.err == expected
    assert files_of(tmp_path) == before


def test_overflow(run: Cli, tmp_path: Path, out: Path, untouched: None) -> None:
    """A sum that overflows the output's dtype ends with 8 and leaves nothing behind."""
    ckpt = write_checkpoint(tmp_path / "ckpt")
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors(checkpoint_tensors(), scale=1e3))
    assert run(ckpt, adapter, out, "--dtype", "float16") == 8
    pattern = (
        r"Error: model\.layers\.0\.mlp\.down_proj\.weight: \d+ of 384 values are not finite in float16, "
        r"though the base's are: the update, the sum or the cast overflows\. --dtype bfloat16 or float32 has "
        r"a wider range\.\n"
    )
    assert re.fullmatch(pattern, run.err.splitlines(keepends=True)[-1])


def test_bug(ckpt: Path, adapter: Path, out: Path, untouched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw passes through, so that Python shows its traceback and ends with 1, and leaves
    nothing behind."""

    def broken(*_: object, **__: object) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr("lorafuse.batching.one_pass.merge", broken)
    with pytest.raises(KeyError, match="unforeseen"):
        exit_code_of(ckpt, adapter, out)


# ---- interrupted


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(
    run: Cli,
    ckpt: Path,
    adapter: Path,
    out: Path,
    untouched: None,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    exit_code: int,
) -> None:
    """A signal in the middle of the merge ends with 130 or 143, says so in a line, and keeps what is
    finished, after which the same command goes on."""
    real_finish, finished_files = ShardWriter.finish, []

    def finish_and_signal(writer: ShardWriter) -> str:
        finished_files.append(writer)
        if len(finished_files) == 3:
            os.kill(os.getpid(), number)
        return real_finish(writer)

    monkeypatch.setattr(ShardWriter, "finish", finish_and_signal)
    assert run(ckpt, adapter, out, "--max-shard-size", "1KB") == exit_code
    message = "Error: interrupted; OUT_DIR is as it was, and the same command goes on from what is finished."
    assert (run.out, run.err.splitlines()[-1], out.exists()) == ("", message, False)
    assert run(ckpt, adapter, out, "--max-shard-size", "1KB") == 0
    said = re.match(r"Going on after (\d+) of 16 files that an earlier run finished\.\nmodel-", run.err)
    assert said and 3 <= int(said[1]) < 16  # those that had all their bytes, too
    shutil.rmtree(out)


def test_two_interruptions(ckpt: Path, adapter: Path, out: Path) -> None:
    """The second one ends the process at once, whatever it is doing."""
    stuck = (
        "import os, signal, time, lorafuse.batching.one_pass\n"
        "def merge(*_, **__):\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(60)\n"
        "    finally:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(60)\n"
        "lorafuse.batching.one_pass.merge = merge\n"
    )
    assert finished(process(ckpt, adapter, out, code=stuck + MAIN))[0] == 130


# ---- every refusal


@pytest.mark.parametrize("n_shards", [1, 3])
def test_inputs_are_not_changed(run: Cli, tmp_path: Path, adapter: Path, out: Path, n_shards: int) -> None:
    """Whether a run succeeds or not, its inputs keep every byte and get no file."""
    ckpt = write_checkpoint(tmp_path / "ckpt", n_shards=n_shards)
    before = files_of(ckpt) | files_of(adapter)
    assert run(ckpt, adapter, out) == 0
    write_json(out / "config.json", [])
    assert run(out, adapter, tmp_path / "more") == 3
    assert files_of(ckpt) | files_of(adapter) == before


def test_python_m_lorafuse_is_the_command() -> None:
    """`python -m lorafuse` does what `lorafuse` does."""
    env = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "lorafuse", "--version"], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"lorafuse, version {lorafuse.__version__}\n")


def test_the_public_names_are_there_and_all_that_dir_shows() -> None:
    """Every name of `__all__`, the errors among them; and the package says that it is typed."""
    assert dir(lorafuse) == sorted(lorafuse.__all__)
    assert all(getattr(lorafuse, name) is not None for name in lorafuse.__all__)
    kinds = {
        kind.__name__
        for kind in vars(errors).values()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    assert kinds <= {*lorafuse.__all__}
    assert (PACKAGE_ROOT / "lorafuse/py.typed").exists()
