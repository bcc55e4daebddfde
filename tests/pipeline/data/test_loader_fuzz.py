"""Whatever the bytes of a file: it loads, or the error is one that the user can mend."""

import json
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.loader import load_rows
from pipeline.errors import UserError

GOOD = {"question": "Q?", "matching": "a", "not_matching": "b"}
HEAD = ",".join(GOOD) + "\n"

JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(list(GOOD)), inner, max_size=5)
    ),
    max_leaves=8,
)
ROWISH = st.dictionaries(st.sampled_from([*GOOD, "A", "B", "persona", "text", "answer", "split", "topic"]), JSON_LIKE)
CONTENT = (
    st.binary(max_size=300)
    | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))
    | st.lists(ROWISH, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | st.text(alphabet='",\n\r\0ab\ufeff', max_size=60).map(lambda t: (HEAD + t).encode())
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=CONTENT, suffix=st.sampled_from([".csv", ".jsonl"]), strict=st.booleans())
def test_any_bytes_load_or_raise_usererror(content, suffix, strict):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        path.write_bytes(content)
        try:
            loaded = load_rows(str(path), strict=strict)
        except UserError:
            return
    assert any(loaded.items.values())
    assert not (strict and loaded.problems)
    for items in loaded.items.values():
        assert all(i.matching.strip() and i.other != i.matching for i in items)
