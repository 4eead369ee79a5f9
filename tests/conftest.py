"""Tiny but real checkpoints (transformers, bitsandbytes) and adapters (PEFT), made once a session."""

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import fix_bnb_avx512
import pytest
import torch
from azure_server import azurite
from models import DENSE, QUANTIZED
from scenario import five_shards, uninterrupted

fix_bnb_avx512.mend()
if "PYTEST_XDIST_WORKER" in os.environ:  # there is such a process for each core
    torch.set_num_threads(1)
MARKED_GPU = "needs a CUDA device, and torch sees none here"
MARKED_CLOUDS = "needs Azurite, which is not installed; `make clouds` installs it"
MARKED_ORACLE = "needs {}, which is not installed; `make oracle` installs it"


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=MARKED_GPU))
        if "clouds" in item.keywords and not azurite():
            item.add_marker(pytest.mark.skip(reason=MARKED_CLOUDS))
        for mark in item.iter_markers("oracle"):
            for library in mark.args or ("compressed_tensors",):
                if not importlib.util.find_spec(library):
                    item.add_marker(pytest.mark.skip(reason=MARKED_ORACLE.format(library)))


@pytest.fixture(scope="session")
def share_s(request):
    """Seconds that a test marked `soak` goes on for: its share of LORAFUSE_SOAK hours."""
    n_tests = sum("soak" in item.keywords for item in request.session.items)
    return float(os.environ.get("LORAFUSE_SOAK", "0")) * 3600 / n_tests


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """base(kind) → a checkpoint directory, not to be changed."""
    root = tmp_path_factory.mktemp("bases")

    def get(kind):
        path = root / kind
        if not path.exists():
            if kind in DENSE:
                DENSE[kind]().save_pretrained(path)
            else:
                source, quantize, settings = QUANTIZED[kind]
                quantize(get(source), path, **settings)
        return path

    return get


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory):
    """trained(case, base) → Trained, of the table in peft_cases.py, made once; without a base on the first of
    the case. More settings are those of its config."""
    import trained as training
    from peft_cases import CASES

    made = {}

    def get(name, base_kind=None, **settings):
        case = CASES[name]
        case = case._replace(settings=case.settings | settings)
        base_kind = base_kind or case.bases[0]
        key = (name, base_kind, repr(settings))
        if key not in made:
            path = tmp_path_factory.mktemp("trained") / "adapter"
            made[key] = training.train(case, base(base_kind), path)
        return made[key]

    return get


@pytest.fixture
def adapter(base, tmp_path):
    """adapter(kind, …LoraConfig) → an adapter that PEFT wrote for the dense twin of that checkpoint, no
    factor zero."""

    def make(kind, *, name="adapter", model=None, save=None, **settings):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        dense = QUANTIZED[kind][0] if kind in QUANTIZED else kind
        model = model or AutoModelForCausalLM.from_pretrained(base(dense), dtype=torch.float32)
        torch.manual_seed(1)
        peft = get_peft_model(
            model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings)
        )
        with torch.no_grad():
            for p in peft.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.05)
        path = tmp_path / name
        peft.save_pretrained(path, **(save or {}))
        make.model = peft.eval()
        return path

    return make


@pytest.fixture(scope="session")
def kernel_path(tmp_path_factory):
    """The compiled kernel, as a file."""
    import compiled_kernel

    return compiled_kernel.built(tmp_path_factory.mktemp("kernel"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, which the hub's library asks; its cache is in `home`, and nothing is in the
    current directory."""
    from hub_server import HubServer, asked_here

    server = HubServer(tmp_path / "server")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with asked_here(server, tmp_path / "home", monkeypatch):
        yield server
    server.close()


@pytest.fixture
def in_memory(monkeypatch):
    """in_memory(path) → the URL of a copy of that directory in memory: a second kind of folder."""
    from memory_folder import Memory

    from lorafuse.files.folders import FOLDERS

    memory = Memory()
    monkeypatch.setitem(FOLDERS, "memory", memory.at)
    return memory


@pytest.fixture
def object_store(in_memory, monkeypatch):
    """What is in memory, as a place for results too: `memory://name` is a second kind of OUT_DIR."""
    from memory_out_dir import MemoryOutDirs, ObjectStore

    from lorafuse.outdir.kinds import OUT_DIRS

    store = ObjectStore(in_memory.store)
    monkeypatch.setitem(OUT_DIRS, "memory", MemoryOutDirs(store))
    return store


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """An S3 server on this machine, of all tests of a process."""
    from s3_server import S3Server

    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.close()


@pytest.fixture
def s3(s3_server, tmp_path, monkeypatch):
    """The same with an empty bucket `models`, and as the store that s3:// is; errors that may pass are told
    soon."""
    from disturbing_proxy import told_soon

    s3_server.bucket("models")
    s3_server.log.clear()
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "hush"), ("AWS_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", s3_server.url),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    with told_soon(monkeypatch):
        yield s3_server


@pytest.fixture(scope="session")
def other_stores(request, tmp_path_factory):
    """other_stores(scheme) → a server that is no S3 server, of all tests of a process"""
    from azure_server import AzureServer
    from google_server import GoogleServer

    made = {}

    def get(scheme):
        home = tmp_path_factory.mktemp(scheme)
        if scheme not in made and scheme == "az":
            made[scheme] = AzureServer(home)
        elif scheme not in made:
            made[scheme] = GoogleServer(request.getfixturevalue("s3_server").port, home)
        return made[scheme]

    yield get
    for server in made.values():
        server.close()


@pytest.fixture
def inputs(tmp_path):
    """A checkpoint of five files, and an adapter."""
    return five_shards(tmp_path)


@pytest.fixture
def clean(inputs, tmp_path):
    """The files of their merge on this machine, which nothing cut off."""
    return uninterrupted(inputs, tmp_path / "clean")
