"""What a file beside weights is, by its name alone: weights, training state, a card, a hidden file.

Patterns are those of fnmatch on names in lower case; a `*` matches a slash too.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from lorafuse.files.names import REPORT

SAFETENSORS_FILES = "*.safetensors"
# Of every format, with the index and the graph of some. Names of one model's other files may end alike: what
# a loader needs of these is in `side_files/sets.py`.
INDEXES = ("*.index.json", "*.index.*.json")
OTHER_WEIGHTS = (
    "consolidated*.safetensors",
    *INDEXES,
    "openvino_*",
    "tf_model*",
    *(
        f"*.{suffix}"
        for suffix in (
            *("bin", "pt", "pt2", "pth", "ckpt", "pkl", "pickle", "npy", "npz", "h5", "keras", "msgpack"),
            *("ot", "pb", "onnx", "onnx_data*", "onnx.data", "gguf", "ggml", "ggmf", "llamafile", "tflite"),
            *("mlmodel", "nemo", "pdparams", "distcp", "engine", "pte", "task", "litertlm", "rknn", "rkllm"),
            "mnn",
        )
    ),
)
WEIGHTS = (SAFETENSORS_FILES, *OTHER_WEIGHTS)
TRAINING_STATE = (
    "optimizer*",
    "scheduler.*",
    "scaler.*",
    "rng_state*",
    "random_states_*",
    "trainer_state*",
    "trainer_log*",
    "training_args*",
    "training_state*",
    "training_*.png",
    *("all_results.json", "train_results.json", "eval_results.json", "predict_results.json"),
    "events.out.tfevents*",
    "global_step*",
    "zero_to_fp32.py",
    "latest",
    "*.log",
    # MLX-LM's adapter after so many steps.
    "[0-9]*_adapters.safetensors",
)
CARDS = ("readme*", "model_card*", "modelcard*", REPORT)
HIDDEN = (".*", "*/.*")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name, in any case, matches a pattern."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def is_weights(name: str) -> bool:
    return matches(name, WEIGHTS)


def is_training_state(name: str) -> bool:
    return matches(name, TRAINING_STATE)
