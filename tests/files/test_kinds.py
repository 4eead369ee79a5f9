"""Patterns of names: the same here and where the hub's library matches them."""

from fnmatch import fnmatchcase

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorafuse.files.kinds import any_case, in_other_folders

FOLDERS = ("additional_chat_templates", "custom_generate")
names = st.text(st.sampled_from("acdtu_x/."), min_size=1, max_size=6)
starts = st.sampled_from(["", *(f"{folder}/"[:n] for folder in FOLDERS for n in range(1, 27))])


@settings(max_examples=500)
@given(st.builds(lambda start, rest: f"{start}{rest}".lstrip("/").replace("//", "/"), starts, names))
@example("custom_generate/generate.py")
@example("custom_generate2/generate.py")
@example("additional_chat_templates")
def test_in_other_folders(name: str) -> None:
    """Every name in a sub-folder but in these, and no other name."""
    expected = "/" in name and not name.startswith(tuple(f"{folder}/" for folder in FOLDERS))
    assert any(fnmatchcase(name, pattern) for pattern in in_other_folders(FOLDERS)) == expected


@given(
    st.sampled_from(["*.bin", "readme*", "[0-9]*_adapters.x", "tf_model*"]),
    st.text("REAdmetf_olbin.x0ps", max_size=9),
)
def test_any_case(pattern: str, name: str) -> None:
    assert fnmatchcase(name, any_case(pattern)) == fnmatchcase(name.lower(), pattern)
