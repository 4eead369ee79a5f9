"""A bar for Python's callers: in a notebook a widget, where the notebook has such, else a line on stderr."""

from typing import Any, Self

from lorafuse.events import Event


class ProgressBar:
    """Shows how far `convert`, `batch` or `verify` is, and its warnings, as their `on_event`. It is closed at
    the end of the run; as a context manager after an error, too.

        >>> with lorafuse.ProgressBar() as bar:
        ...     lorafuse.convert("base-nf4", "my-adapter", "merged", on_event=bar)
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._n_passes = 0

    def __call__(self, event: Event) -> None:
        if event["event"] == "plan" and "job" not in event and "disk" not in event:  # no batch, no dry run
            self._begin("merging" if event["shards"] else "verifying", event["nbytes"])
        elif event["event"] == "pass":
            self._n_passes += 1
            self._begin(f"pass {self._n_passes}", event["nbytes"])
        elif event["event"] in ("progress", "resumed") and self._bar is not None:
            self._bar.update(event["nbytes"])
        elif event["event"] == "warning":
            self._warn(event["message"], event.get("job"))
        elif event["event"] in ("done", "total"):
            self.close()

    def _begin(self, label: str, nbytes: int) -> None:
        self.close()
        from tqdm.auto import tqdm  # which imports a notebook's widgets

        self._bar = tqdm(total=nbytes, unit="B", unit_scale=True, desc=label)

    def _warn(self, message: str, job: str | None) -> None:
        from tqdm.auto import tqdm

        tqdm.write(f"Warning: {job}: {message}" if job else f"Warning: {message}")

    def close(self) -> None:
        """Nothing more comes. What is there stays, as in a notebook other output does."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
