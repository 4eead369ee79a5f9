"""Messages that Python's callers get name parameters, where those of the command line name options."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from build import write_adapter, write_checkpoint
from click.testing import CliRunner

import lorafuse
from lorafuse.cli import lorafuse as command
from lorafuse.errors import OutDirError, UsageError
from lorafuse.in_python import FLAGS, VALUED, in_python

PACKAGE = Path(lorafuse.__file__).parent
COMMANDS = {"cli", "card.py", "reproduce.py"}  # print commands, or are the command line
SPOKEN = {
    "out: exists and is not empty; --overwrite replaces it once the new one is complete.":
        "out: exists and is not empty; overwrite=True replaces it once the new one is complete.",
    "Raise --memory-limit.": "Raise memory_limit.",
    "--dtype float16 keeps 3 more bits (an overflow ends the run), --dtype float32 keeps everything":
        "dtype='float16' keeps 3 more bits (an overflow ends the run), dtype='float32' keeps everything",
    "--keep-dense PATTERN leaves modules in full precision, --format dense all of them":
        "keep_dense=PATTERN leaves modules in full precision, format='dense' all of them",
    "Take --base-quant-from adapter/README.md, or --base-quant auto, which takes":
        "Take base_quant_from='adapter/README.md', or base_quant='auto', which takes",
    "or --base-quant-from its config.json, which": "or base_quant_from its config.json, which",
    " --base-quant nf4 --quant-experts quantizes each expert":
        " base_quant='nf4', quant_experts=True quantizes each expert",
    "--keep-dense *.v_proj: matches no module.": "keep_dense='*.v_proj': matches no module.",
    "leave --keep-dense and --rounding out.": "leave keep_dense and rounding out.",
    "leave it in full precision, --keep-dense 'model.head', or choose --format fp8, which":
        "leave it in full precision, keep_dense='model.head', or choose format='fp8', which",
    "go together: --index I --of N takes share I": "go together: index=I, of=N takes share I",
    "choose one by its name (--adapter-name).": "choose one by its name (adapter_name).",
    "--no-double-quant says how the base was quantized, but --base-quant is none;":
        "double_quant=False says how the base was quantized, but base_quant is none;",
    "--base-quant auto and --quant-skip both say": "base_quant='auto' and quant_skip both say",
    "--quant-skip: '(' is no name": "quant_skip: '(' is no name",
    "is public already, and --private is given.": "is public already, and private=True is given.",
    "set the option base-quant to nf4.": "set base_quant to nf4.",
    "--base-quant on a GPU needs bitsandbytes": "base_quant on a GPU needs bitsandbytes",
    "give --ckpt and --adapter.": "give ckpt and adapters.",
    "python zero_to_fp32.py . OUT --safe_serialization": "python zero_to_fp32.py . OUT --safe_serialization",
}  # fmt: skip


@pytest.mark.parametrize("message", SPOKEN)
def test_a_message_in_python(message):
    assert in_python(message) == SPOKEN[message]


def parameters() -> set[str]:
    functions = (lorafuse.convert, lorafuse.batch, lorafuse.verify, lorafuse.Push)
    return {name for function in functions for name in inspect.signature(function).parameters}


def test_every_name_is_a_parameter():
    assert (FLAGS.keys() - {"no_double_quant"}) | VALUED <= parameters()


def messages() -> Iterator[str]:
    """Every text of the package that names an option, but docstrings and what prints commands."""
    for path in PACKAGE.rglob("*.py"):
        if COMMANDS & {path.name, *path.relative_to(PACKAGE).parts}:
            continue
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
            if is_text and re.search(r"--[a-z]", node.value):
                yield node.value


def test_every_message_of_the_package_can_be_said_in_python():
    told = list(messages())
    assert len(told) > 50
    foreign = {"python zero_to_fp32.py", "--local-dir"}  # options of other programs
    left = [text for text in told if re.search(r"--[a-z]+(-[a-z]+)*\b(?!_)", in_python(text))]
    assert [text for text in left if not any(word in text for word in foreign)] == []


def refusals() -> Iterator[tuple[str, str]]:
    """(file, text) of every UsageError, but of those that only Python's callers get."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UsageError":
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                yield from ((path.name, text) for text in texts if isinstance(text, str))


def test_no_message_of_the_package_names_a_parameter():
    """It names the option, of which `in_python` makes a parameter."""
    names = [name for name in sorted(FLAGS.keys() | VALUED) if "_" in name]
    told = [(file, text) for file, text in refusals() if file != "arguments.py"]
    assert len(told) > 50
    assert [said for said in told if re.search(rf"\b({'|'.join(names)})\b", said[1])] == []


@pytest.fixture
def inputs(tmp_path):
    return write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")


def test_errors_and_events_of_the_functions(inputs, tmp_path):
    ckpt, lora = inputs
    out = tmp_path / "out"
    lorafuse.convert(ckpt, lora, out)
    with pytest.raises(OutDirError, match=r"; overwrite=True replaces it"):
        lorafuse.convert(ckpt, lora, out)
    with pytest.raises(UsageError, match=r"^double_quant=False says how the base was quantized"):
        lorafuse.convert(ckpt, lora, tmp_path / "new", double_quant=False)
    events = []
    plan = lorafuse.convert(
        ckpt, lora, tmp_path / "new", format="nf4", keep_dense=["*.x"], dry_run=True, on_event=events.append
    )
    [said] = [event["message"] for event in events if event["event"] == "warning"]
    assert said.startswith("keep_dense='*.x': matches no ")
    assert not any("--" in note or "base-quant" in note for note in plan["notes"])


def test_errors_of_the_jobs_of_a_batch(inputs, tmp_path):
    ckpt, lora = inputs
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(f'{{"adapter": "{lora}", "name": "a"}}\n')
    lorafuse.convert(ckpt, lora, tmp_path / "root/a", dtype="float16")
    events = []
    [state] = lorafuse.batch(ckpt, jobs, tmp_path / "root", on_event=events.append)
    [said] = [event["error"] for event in events if event.get("state") == "failed"]
    assert "overwrite=True" in str(state.error) and str(state.error) == said


def test_the_command_line_still_names_options(inputs, tmp_path):
    ckpt, lora = map(str, inputs)
    for args in (["convert"], ["convert"]):
        result = CliRunner().invoke(command, [*args, ckpt, lora, str(tmp_path / "out")])
    assert result.exit_code == 7 and "; --overwrite replaces it" in result.stderr
