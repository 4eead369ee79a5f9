"""Damaged inputs, drawn by Hypothesis: a merge succeeds or ends with a documented exit, in bounded time and
memory.

Short and always the same in a normal run; `make soak` goes on, and says how many inputs were tried and how
they ended.
"""

import json
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from build import files_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutate import file_of, mutated_bytes, mutated_header, mutated_json, mutated_tensors, tensors_of
from safetensors import safe_open
from valid_inputs import Files, valid_bases, valid_inputs, valid_kinds, valid_types, write_files

import lorafuse
from lorafuse.adapters import ADAPTERS
from lorafuse.errors import LorafuseError
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.safetensors_file import FormatError, Shard

pytestmark = pytest.mark.soak
MAX_CPU_S = 10
ADAPTER, LORA = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
MAX_DATA_NBYTES = (
    400 << 20
)  # --memory-limit, and as much again for what torch and threads take at their first use
CKPT_WORDS = (
    "model.layers.0", "model.layers.1", "model.layers.2", "model.", "q_proj", "k_proj", "down_proj", "weight",
    "bias",
    "absmax", "nested_absmax", "quant_map", "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4",
    "SCB",
    "lm_head", "embed_tokens", "norm", "weight_format",
)  # fmt: skip
BASE_WORDS = (
    "model.layers.0", "model.layers.1", "q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "gate_proj",
    "weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale",
    "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale", "k_scale", "_blocks", "_scales",
    "experts.", "self_attn.",
)  # fmt: skip
ADAPTER_WORDS = (
    "base_model.model.", "model.layers.0", "layers.1", "layers.9", "q_proj", "k_proj", "down_proj", "mlp",
    "lora_A.weight",
    "lora_B.weight", "lora_A", "lora_B", "weight", "bias", "default", "lora_embedding_A", "lora_embedding_B",
    "lora_magnitude_vector", "lora_B.bias", "modules_to_save.weight", "base_layer.weight", "lora_diag",
    "token_adapter.trainable_tokens_delta", "embed_tokens", "lm_head", "self_attn", "hada_w1_a", "lokr_w1",
    "ia3_l",
    "oft_R.weight", "vera_lambda_b", "experts", "score.weight",
)  # fmt: skip
ADAPTER_FIELDS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "modules_to_save",
    "target_parameters", "layers_to_transform", "layer_replication", "init_lora_weights", "fan_in_fan_out",
    "trainable_token_indices", "peft_type", "task_type", "ensure_weight_tying", "use_bdlora", "lora_bias",
    "fine_tune_type",
    "lora_parameters", "num_layers", "base_model_name_or_path", "inference_mode",
)  # fmt: skip
CONFIG_FIELDS = (
    "tie_word_embeddings", "model_type", "architectures", "quantization_config", "text_config",
    "num_hidden_layers",
    "vocab_size", "dtype", "torch_dtype", "num_local_experts", "layer_types", "num_labels", "id2label",
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    return valid_inputs(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def types(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    return valid_types(tmp_path_factory.mktemp("types"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return valid_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    return valid_kinds(tmp_path_factory.mktemp("kinds"))


@pytest.fixture
def fuzz(
    share_s: float, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., None]]:
    """fuzz(strategy, check): many examples of it; `check` says in a word how each ended."""
    ends: Counter[object] = Counter()

    def run(strategy: st.SearchStrategy[object], check: Callable[..., object], n_examples: int = 40) -> None:
        phases = [Phase.explicit, Phase.generate, Phase.shrink]
        bounds = {
            "deadline": None,
            "database": None,
            "suppress_health_check": list(HealthCheck),
            "phases": phases,
        }
        soak = share_s > 0

        @settings(max_examples=200 if soak else n_examples, derandomize=not soak, **bounds)
        @given(example=strategy)
        def trial(example: object) -> None:
            ends[check(example)] += 1

        until = time.monotonic() + share_s
        trial()
        while time.monotonic() < until:
            trial()

    yield run
    if share_s:
        said = ", ".join(f"{end}: {n}" for end, n in sorted(ends.items(), key=str))
        with capsys.disabled():
            sys.stdout.write(f"\n{request.node.name}: {ends.total()} inputs ({said})\n")


def data_nbytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmData"))


def judged(files: Files, **options: object) -> str:
    """Merge these files: how it ended. Whoever asks for more memory than is allowed gets an error that is no
    LorafuseError."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        root = Path(name)
        write_files(root, files)
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (data_nbytes() + MAX_DATA_NBYTES, hard))
        began = time.process_time()
        warnings: list[str] = []
        try:
            lorafuse.convert(
                root / "ckpt",
                root / "adapter",
                root / "out",
                on_event=lambda e: warnings.append(str(e.get("message", ""))),
                **options,
            )
            end = "merged"
        except LorafuseError as e:
            assert 2 <= e.exit_code <= 8, e
            assert str(e).isprintable(), e
            end = f"exit {e.exit_code}"
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        for part in ("ckpt", "adapter"):
            inspected(root / part)
        assert time.process_time() - began < MAX_CPU_S
        assert all(map(str.isprintable, warnings)), warnings
        _check_files(root, files, end)
    return end


def inspected(path: Path) -> None:
    try:
        lorafuse.inspect(path)
    except LorafuseError as e:
        assert 3 <= e.exit_code <= 8, e
        assert str(e).isprintable(), e


def _check_files(root: Path, files: Files, end: str) -> None:
    """The inputs are as they were; a result is complete and readable; after a refusal there is nothing."""
    visible = {path.name for path in root.iterdir() if not path.name.startswith(".")}
    assert visible - {"ckpt", "adapter"} == ({"out"} if end == "merged" else set())
    assert {k: v for k, v in files_of(root).items() if k in files} == files
    for path in (root / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as f:
            assert all(f.get_tensor(key) is not None for key in f.keys())  # noqa: SIM118 (not a dict)


def damaged(
    good: dict[str, Files],
    kinds: tuple[str, ...],
    which: Callable[[str], bool],
    damage: Callable[[bytes], st.SearchStrategy[bytes]],
):
    """Inputs of one of the kinds with one of the files that `which` chooses damaged."""
    places = [(kind, path) for kind in kinds for path in good[kind] if which(path)]
    assert places
    return st.sampled_from(places).flatmap(
        lambda place: damage(good[place[0]][place[1]]).map(lambda data: good[place[0]] | {place[1]: data})
    )


def is_shard(path: str) -> bool:
    return path.startswith("ckpt/") and path.endswith(".safetensors")


def test_the_inputs_are_good(good):
    """Undamaged, all of them merge."""
    assert {kind: judged(files) for kind, files in good.items()} == dict.fromkeys(good, "merged")


def test_headers(good, fuzz):
    """Of checkpoints and adapters; whatever is accepted, safetensors accepts as well."""

    def check(files: Files) -> str:
        for path, data in files.items():
            if path.endswith(".safetensors"):
                _differential(data)
        return judged(files)

    kinds = ("whole", "shards", "nf4", "int8")
    fuzz(damaged(good, kinds, lambda path: path.endswith(".safetensors"), mutated_header), check, 60)


def _differential(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as f:
        f.write(data)
        f.flush()
        try:
            shard = Shard(LocalFolder(Path(f.name).parent), Path(f.name).name)
        except FormatError:
            return
        shard.close()
        with safe_open(f.name, framework="np") as reference:
            assert set(reference.keys()) == set(shard.tensors)


def test_indexes(good, fuzz):
    """The index of a sharded checkpoint, by its values and by its bytes."""
    fuzz(
        damaged(
            good,
            ("shards",),
            lambda path: path.endswith("index.json"),
            lambda data: mutated_json(data) | mutated_bytes(data),
        ),
        judged,
    )


def test_checkpoint_configs(good, fuzz):
    kinds = ("whole", "nf4")
    fuzz(
        damaged(
            good,
            kinds,
            lambda p: p == "ckpt/config.json",
            lambda d: mutated_json(d, CONFIG_FIELDS) | mutated_bytes(d),
        ),
        judged,
    )


def test_adapter_configs(good, fuzz):
    """Those of all types, with the tensors of LoRA."""

    def damage(data: bytes) -> st.SearchStrategy[bytes]:
        retyped = st.sampled_from(sorted(ADAPTERS)).map(
            lambda kind: data.replace(b'"LORA"', f'"{kind}"'.encode())
        )
        return (
            mutated_json(data, ADAPTER_FIELDS)
            | mutated_bytes(data)
            | retyped.flatmap(lambda d: mutated_json(d, ADAPTER_FIELDS))
        )

    fuzz(
        damaged(good, ("whole", "nf4"), lambda path: path.endswith("adapter_config.json"), damage), judged, 60
    )


def test_tensors_of_checkpoints(good, fuzz):
    """Valid files whose tensors are not those of the model: names, types, shapes, companions of quantized
    weights."""
    kinds = ("whole", "shards", "nf4", "int8")
    fuzz(damaged(good, kinds, is_shard, lambda data: mutated_tensors(data, CKPT_WORDS)), judged)


def test_other_quantizations(bases, fuzz):
    """Names, types, shapes and values of the tensors of other quantized formats, and their config."""
    good = {"bases": bases}
    assert judged(bases) == "merged"
    fuzz(damaged(good, ("bases",), is_shard, lambda data: mutated_tensors(data, BASE_WORDS)), checked, 60)
    fuzz(
        damaged(
            good, ("bases",), lambda p: p == "ckpt/config.json", lambda d: mutated_json(d, CONFIG_FIELDS)
        ),
        checked,
        30,
    )


def parts_of(name: str) -> tuple[str, ...]:
    module, _, leaf = name.rpartition(".")
    return module, leaf, leaf.removeprefix("_")


def test_tensors_of_each_format(kinds, fuzz):
    """A checkpoint of one format: names, types, shapes, and values of what it stores, each other's names
    among them."""
    assert {kind: judged(files) for kind, files in kinds.items()} == dict.fromkeys(kinds, "merged")
    names = {name for files in kinds.values() for name in tensors_of(files["ckpt/model.safetensors"])}
    words = tuple(sorted({part for name in names for part in parts_of(name)}))
    strategy = damaged(kinds, tuple(kinds), is_shard, lambda data: mutated_tensors(data, words))
    fuzz(strategy, checked, 60)


def test_headers_and_configs_of_each_format(kinds, fuzz):
    """What says how: config.json, and torchao's metadata."""
    sections = [json.loads(files["ckpt/config.json"]) for files in kinds.values()]
    fields = {field for config in sections for value in (config, *config.values()) for field in _keys(value)}
    fuzz(
        damaged(
            kinds,
            tuple(kinds),
            lambda p: p == "ckpt/config.json",
            lambda d: mutated_json(d, tuple(sorted(fields))),
        )
        | damaged(kinds, tuple(kinds), is_shard, mutated_header),
        checked,
        50,
    )


def _keys(value: object) -> list[str]:
    return sorted(value) if isinstance(value, dict) else []


def test_data_of_each_format(kinds, fuzz):
    """Groups, shapes and words among the numbers."""

    def damage(data: bytes) -> st.SearchStrategy[bytes]:
        return mutated_bytes(data, 8 + int.from_bytes(data[:8], "little"), same_length=True)

    fuzz(damaged(kinds, tuple(kinds), is_shard, damage), checked)


def checked(files: Files) -> str:
    """Merge these files: how it ended, which is one of the ends of a bad checkpoint."""
    end = judged(files)
    assert end in ("merged", "exit 3", "exit 4"), end
    return end


def test_quant_states(good, fuzz):
    """What says how a 4-bit weight is packed: a JSON inside of a tensor."""
    whole = good["nf4"]["ckpt/model.safetensors"]
    states = sorted(name for name in tensors_of(whole) if ".quant_state." in name)

    def replaced(name: str) -> st.SearchStrategy[bytes]:
        stored = tensors_of(whole)
        damages = mutated_json(
            stored[name][2], ("nested_offset", "nested_blocksize", "nested_dtype")
        ) | mutated_bytes(stored[name][2])
        return damages.map(lambda data: file_of(stored | {name: ("U8", [len(data)], data)}))

    fuzz(
        st.sampled_from(states).flatmap(replaced),
        lambda data: judged(good["nf4"] | {"ckpt/model.safetensors": data}),
    )


def test_tensors_of_adapters(good, fuzz):
    """Valid files whose tensors are not those of the type."""
    strategy = damaged(
        good,
        ("whole", "nf4"),
        lambda p: p.startswith("adapter/") and p.endswith(".safetensors"),
        lambda d: mutated_tensors(d, ADAPTER_WORDS),
    )
    fuzz(strategy, judged, 60)


def test_tensors_of_all_types(types, fuzz):
    """The same for adapters of every type, with each other's names."""
    assert {kind: judged(files) for kind, files in types.items()} == dict.fromkeys(types, "merged")
    names = {
        name.removeprefix("base_model.model.")
        for files in types.values()
        for name in tensors_of(files[ADAPTER])
    }
    words = tuple(
        sorted(
            {part for name in names for part in (name, name.removeprefix("one."), name.rpartition(".")[2])}
        )
    )
    fuzz(
        damaged(types, tuple(types), lambda path: path == ADAPTER, lambda data: mutated_tensors(data, words)),
        judged,
        50,
    )


def test_configs_of_all_types(types, fuzz):
    """Each type's own fields."""
    fields = tuple(sorted({field for files in types.values() for field in json.loads(files[LORA])}))
    fuzz(
        damaged(types, tuple(types), lambda path: path == LORA, lambda data: mutated_json(data, fields)),
        judged,
        50,
    )


def test_files_that_say_how_training_quantized(good, fuzz):
    """--base-quant-from: a JSON, YAML or Markdown file."""
    texts = {
        "config.json": b'{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": '
        b'["lm_head"]}',
        "axolotl.yml": b"base_model: a/b\nadapter: qlora\nload_in_8bit: false\nload_in_4bit: "
        b"true\ndatasets:\n  - path: x\n",
        "README.md": b"- quant_method: bitsandbytes\n- load_in_8bit: False\n- load_in_4bit: True\n- "
        b"bnb_4bit_quant_type: nf4\n",
    }

    def damage(place: tuple[str, bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
        name, text = place
        damages = mutated_json(text) | mutated_bytes(text) if name.endswith(".json") else mutated_bytes(text)
        return damages.map(lambda data: (name, data))

    def check(example: tuple[str, bytes]) -> str:
        name, data = example
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).write_bytes(data)
            return judged(good["whole"], base_quant_from=str(Path(folder) / name))

    fuzz(st.sampled_from(sorted(texts.items())).flatmap(damage), check, 50)


def test_data(good, fuzz):
    """Bytes of data anywhere behind the header, quant_state among them, and dtypes to which the result is
    cast."""

    def damage(data: bytes) -> st.SearchStrategy[bytes]:
        return mutated_bytes(data, 8 + int.from_bytes(data[:8], "little"), same_length=True)

    strategy = st.tuples(
        damaged(good, ("nf4", "int8", "whole"), is_shard, damage),
        st.sampled_from(["auto", "float16", "float32"]),
    )
    fuzz(strategy, lambda example: judged(example[0], dtype=example[1]))


def test_pickled_adapters(good, fuzz):
    """A .bin file, which torch reads with weights_only."""
    fuzz(damaged(good, ("bin",), lambda path: path.endswith(".bin"), mutated_bytes), judged)
