"""The house rules that a test can see: who may import whom, and which file alone does what."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorafuse
from lorafuse.adapters import ADAPTERS, module_of
from lorafuse.codecs import CODECS

PACKAGE = Path(lorafuse.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# A room may import from the rooms before it; rooms of one floor, joined by commas, do not know each other.
FLOORS = """
    _version, errors < settings, events < engines, arguments, in_python, progress_bar < files < arithmetic
    < codecs < patches < adapters, naming < structure, trained_base, side_files < formats < planning < merge
    < outdir < receipt < inputs < batching < pipeline, verification, inspection, reporting < cli < __main__
"""
RANK = {room.strip(): rank for rank, floor in enumerate(FLOORS.split("<")) for room in floor.split(",")}
ARCHITECTURE = Path(__file__).resolve().parents[2] / "ARCHITECTURE.md"
ROOMS_IN_ARCHITECTURE = re.compile(r"(<!-- rooms:begin -->\n)(.*?)(\n<!-- rooms:end -->)", re.DOTALL)
# The functions that may cast a finished value to another dtype than fp32: each value is rounded once.
ROUNDINGS = {"codecs/plain.py: PlainEncoder.encode"}
CASTS = {"bfloat16", "copy_", "double", "float", "half", "to", "type", "type_as"}
# Files and rooms that know paths: those that are a file system's own, those that ask where an input lies, the
# list of a batch's jobs, the files of the AWS tools, and what asks the kernel about this process.
KNOW_PATHS = {
    *("files/local_folder.py", "files/folder.py", "files/hub.py", "files/hub_folder.py"),
    *("files/hub_repo.py", "files/hub_upload.py", "files/cloud_aws.py"),
    *("files/safetensors_writer.py", "files/sharing.py", "files/seen.py", "settings.py", "outdir", "cli"),
    *("batching/jobs_afar.py", "batching/places.py", "batching/jobs.py", "batching/existing_results.py"),
    *("batching/pass_size.py", "receipt/write.py"),
}


def top(path: Path) -> str:
    """The room that a file belongs to: a package or a module of the top level."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, as a dotted name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """The rooms that a file imports from, its own left out."""
    tops = {name.split(".")[1] for name in imports(path) if name.startswith("lorafuse.")}
    return {
        name
        for name in tops
        if name != top(path) and ((PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists())
    }


def used_names(path: Path) -> set[str]:
    """What a file calls or refers to: `print`, `sys.exit`, `click.echo`."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Name | ast.Attribute)}


def said(path: Path) -> set[str]:
    """Names, attributes with their dot, keywords and string constants of a file; no comment, no docstring."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    docs = {
        id(node.body[0].value)
        for node in nodes
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and ast.get_docstring(node) is not None
    }
    return {
        node.id
        if isinstance(node, ast.Name)
        else f".{node.attr}"
        if isinstance(node, ast.Attribute)
        else node.value
        for node in nodes
        if isinstance(node, ast.Name | ast.Attribute)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs)
    }


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions of a file and of its classes, by name: `encode` of a class is `PlainEncoder.encode`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{f.name}", f) for f in node.body if isinstance(f, ast.FunctionDef))


def defined_names(path: Path) -> set[str]:
    """The functions of a file's top level."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", [p for p in FILES if p != PACKAGE / "__init__.py"], ids=relative)
def test_import_order(path: Path) -> None:
    """A module imports only what comes before it."""
    assert top(path) in RANK, f"{top(path)} has no place in the import order yet"
    later = {name for name in own_imports(path) if RANK[name] >= RANK[top(path)]}
    assert not later, f"{relative(path)} imports {later}, which come after it"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if not {p.relative_to(PACKAGE).parts[0], relative(p)} & KNOW_PATHS],
    ids=relative,
)
def test_inputs_have_no_paths(path: Path) -> None:
    """What is read comes from a Folder: nothing else opens a file or looks at a directory, but for the
    package's own tables beside a module."""
    text = path.read_text(encoding="utf-8").replace("Path(__file__)", "HERE")
    names = {
        ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name | ast.Attribute)
    }
    used = names & {"Path", "PurePath", "PosixPath", "open", "io.open", "os.fdopen"}
    used |= {name for name in names if re.match(r"os\.(path|open|stat|lstat|scandir|listdir|walk)\b", name)}
    assert not used


def test_what_knows_paths_is_there() -> None:
    """No exemption outlives its file."""
    assert all((PACKAGE / name).exists() for name in KNOW_PATHS)


def rooms_table() -> str:
    """ARCHITECTURE's table of rooms: the floors, and what each room says of itself first."""
    lines = ["| floor | room of `convert/lorafuse/` | what it is |", "|---:|---|---|"]
    for room, rank in RANK.items():
        package = (PACKAGE / room).is_dir()
        path = PACKAGE / room / "__init__.py" if package else PACKAGE / f"{room}.py"
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if said:  # the file with the version says nothing
            first, *_ = said.split("\n\n")
            lines.append(f"| {rank} | `{room}{'/' if package else '.py'}` | {' '.join(first.split())} |")
    return "\n".join(lines)


def test_the_architecture_lists_the_rooms() -> None:
    """Every room on disk has its line, on its floor, with its own first words."""
    on_disk = {top(path) for path in FILES} - {"__init__"}
    assert on_disk == RANK.keys()
    table = ROOMS_IN_ARCHITECTURE.search(ARCHITECTURE.read_text(encoding="utf-8"))
    assert table
    assert table[2] == rooms_table(), f"python {Path(__file__).name} writes it anew"


def test_package_imports_little() -> None:
    """`import lorafuse` brings names, not modules: everything else waits for the first use."""
    code = "import sys, lorafuse; print(sorted(m for m in sys.modules if m.startswith('lorafuse')))"
    assert in_a_process(code) == "['lorafuse', 'lorafuse._version', 'lorafuse.errors']\n"


def test_codecs_know_no_adapters() -> None:
    """A storage scheme knows nothing of what is merged into it."""
    for path in (PACKAGE / "codecs").glob("*.py"):
        assert "adapters" not in own_imports(path)


def test_codecs_know_no_codec() -> None:
    """A codec shares helpers with the others and nothing else, so that one can be taken out."""
    codecs = {codec.__name__ for codec in CODECS}
    for path in (PACKAGE / "codecs").glob("*.py"):
        if path.name != "__init__.py":
            assert not codecs & set(imports(path))


def test_codecs_are_files() -> None:
    """Every codec on disk, a file that claims stored tensors, is in the table, once, and the other way
    round."""
    paths = [path for path in (PACKAGE / "codecs").glob("*.py") if path.name != "__init__.py"]
    files = {path.stem for path in paths if "claim" in defined_names(path)}
    table = [codec.__name__.removeprefix("lorafuse.codecs.") for codec in CODECS]
    assert sorted(table) == sorted(files)
    assert table[-1] == "dense", "it takes what the others leave"


def test_adapters_are_files() -> None:
    """Every file of adapters/types/ is in the table, and the other way round; a file may serve several
    types."""
    files = {path.stem for path in (PACKAGE / "adapters/types").glob("*.py")} - {"__init__"}
    modules = list(map(module_of, ADAPTERS))
    assert {module.__name__.removeprefix("lorafuse.adapters.types.") for module in modules} == files
    assert all(callable(module.updates) for module in modules)
    assert all(kind == kind.upper() for kind in ADAPTERS), "peft_type is in capitals"


@pytest.mark.parametrize(
    ("word", "file"),
    [
        ("data_offsets", "files/safetensors_file.py"),
        (r"\.offset$", "files/safetensors_file.py"),
        (r"\.set_num_threads$", "arithmetic/torch_state.py"),
        ("quant_state.bitsandbytes__", "codecs/bnb4_state.py"),
        ("renameat2", "outdir/commit.py"),
    ],
)
def test_one_file_knows(word: str, file: str) -> None:
    """One place per fact: these words are in the code of one file of the package."""
    assert [relative(path) for path in FILES if any(re.search(word, name) for name in said(path))] == [file]


@pytest.mark.parametrize("path", [p for p in FILES if top(p) != "arithmetic"], ids=relative)
def test_arithmetic_alone_knows_devices(path: Path) -> None:
    """What is computed where, and by which implementation, is chosen in arithmetic/."""
    pattern = r"(.*\.)?device\.type|torch\.cuda(\..*)?|.*\.(pin_memory|record_stream)"
    assert not {name for name in used_names(path) if re.fullmatch(pattern, name)}
    words = (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.keyword))
    assert not {"non_blocking", "pin_memory"} & {word.arg for word in words}


@pytest.mark.parametrize("path", [p for p in FILES if relative(p) != "codecs/sources.py"], ids=relative)
def test_values_are_what_is_fetched_and_decoded(path: Path) -> None:
    """No sources have a `values` of their own, and nothing else decodes what it has just fetched."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [c for c in calls if ast.unparse(c.func).endswith(".decode") and ".fetch(" in ast.unparse(c)]
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert not [
        node.name
        for node in classes
        if {"Sources", "ReadByColumns", "RecodedByColumns", "GridSources"}
        & {ast.unparse(base) for base in node.bases}
        and any(isinstance(part, ast.FunctionDef) and part.name == "values" for part in node.body)
    ]


def casts(function: ast.FunctionDef) -> Iterator[ast.Call]:
    """The calls that may change a dtype, but for those that fill what the arena holds in fp32."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CASTS:
            into = ast.unparse(node.func.value)
            if not re.fullmatch(r"arena\.get\(.*, torch\.float32\)", into):
                yield node


def defines_encoder(path: Path) -> bool:
    classes = [
        n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ClassDef)
    ]
    return any(ast.unparse(base) == "Encoder" for node in classes for base in node.bases)


def test_one_rounding() -> None:
    """From the sum in fp32 to the bytes in OUT_DIR one function casts. Nothing rounds to whole numbers but
    seconds, a number of groups and codes that are integers."""
    on_the_way = [
        p for p in FILES if top(p) in {"merge", "outdir", "pipeline", "batching"} or defines_encoder(p)
    ]
    assert {
        f"{relative(path)}: {name}"
        for path in on_the_way
        for name, function in functions(path)
        if any(True for _ in casts(function))
    } == ROUNDINGS
    rounds = {
        relative(path)
        for path in FILES
        if any(re.fullmatch(r"(.*\.)?round_?", name) for name in used_names(path))
    }
    of_scalars = {"verification/verdict.py", "receipt/write.py"}
    of_codes = {"arithmetic/symmetric.py", "arithmetic/quantize.py"}
    assert rounds <= of_scalars | of_codes | {"adapters/types/tinylora.py"}


@pytest.mark.parametrize("path", [p for p in FILES if top(p) not in ("cli", "progress_bar")], ids=relative)
def test_only_cli_prints_or_exits(path: Path) -> None:
    """Nothing but the command line prints, exits, or knows click and tqdm: a program that calls convert()
    decides for itself, and has a bar where it makes one."""
    names = used_names(path)
    assert not names & {"print", "exit", "quit", "SystemExit", "input", "breakpoint"}
    assert not {
        name
        for name in names
        if re.fullmatch(r"sys\.(exit|stdout|stderr|argv)|os\.(_exit|abort)|warnings\.warn", name)
    }
    assert not {"click", "tqdm", "logging", "argparse"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_model_class(path: Path) -> None:
    """No module imports the libraries that know models, and one alone bitsandbytes, for its kernels on a
    GPU."""
    forbidden = {"transformers", "peft", "accelerate", "diffusers", "vllm"}
    if relative(path) != "arithmetic/bnb_kernels.py":
        forbidden.add("bitsandbytes")
    assert not forbidden & {name.split(".")[0] for name in imports(path)}


def test_nothing_heavy_is_imported() -> None:
    """The whole tool imports neither bitsandbytes (seconds, 120 MB) nor the libraries that know models, and
    no type of adapter before there is one."""
    code = "import sys, lorafuse.pipeline, lorafuse.cli; print(sorted(sys.modules))"
    modules = ast.literal_eval(in_a_process(code))
    loaded = {name.split(".")[0] for name in modules}
    assert "torch" in loaded
    assert not loaded & {"bitsandbytes", "transformers", "peft", "huggingface_hub", "scipy", "pandas", "yaml"}
    assert not any(name.startswith("lorafuse.adapters.types.") for name in modules)


def in_a_process(code: str) -> str:
    """What a program prints that finds this copy of the package first."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {code}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_module_says_what_it_is(path: Path) -> None:
    """Every module begins with a docstring, except the one with the version."""
    assert path.name == "_version.py" or ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_plain_style(path: Path) -> None:
    """No hasattr, and inheritance only from exceptions and protocols, or within the reading of
    checkpoints."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert "hasattr" not in used_names(path)
    allowed = {
        "Protocol",
        "Readable",
        "NamedTuple",
        "TypedDict",
        "Patch",
        "Sources",
        "Encoder",
        "ReadByColumns",
        "RecodedByColumns",
        "GridSources",
        "QuantizedOnLoad",
        "Quantizer",
        "Grid",
        "TileDraws",
        "Turned",
        "Stack",
        "Format",
        "Exception",
        "BaseException",
        "LorafuseError",
        "ShardedStore",
        "click.ParamType[str]",
        "ctypes.Structure",
    }
    bases = {
        ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases
    }
    assert bases <= allowed


def test_one_exception_per_exit_code() -> None:
    """No two kinds of error end with the same code, and every code is one of the contract's."""
    from lorafuse import errors

    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.LorafuseError)]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert set(codes) <= {1, 2, 3, 4, 5, 6, 7, 8, 9}


TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_tests_import_no_tests(path: Path) -> None:
    """What tests share is in tests/support/, and that imports no test either."""
    parts = {part for name in imports(path) for part in name.split(".")}
    assert not {part for part in parts if part.startswith("test_") or part == "conftest"}


def test_every_test_is_in_the_room_of_what_it_tests() -> None:
    """A room of tests has the name of a room of the package; project/ looks at all of them."""
    rooms = {path.parent.name for path in TESTS.rglob("test_*.py")}
    assert rooms - {"project"} <= {room for room in RANK if (PACKAGE / room).is_dir()}


if __name__ == "__main__":
    text = ARCHITECTURE.read_text(encoding="utf-8")
    ARCHITECTURE.write_text(
        ROOMS_IN_ARCHITECTURE.sub(lambda found: found[1] + rooms_table() + found[3], text), encoding="utf-8"
    )
