"""Tensors come back as they were sent, and what does not fit is named."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serve.api.open_inference import InferRequest, OpenInference
from serve.api.tensors import DTYPES
from serve.errors import InvalidInput, PredictionFailed
from serve.models.base import Signature, TensorSpec
from tests.api.toys import Everything, spec

EVERYTHING = OpenInference(spec("python"), Everything.signature)


def read_tensor(tensor: dict[str, Any], binary: bytes = b"") -> list[Any]:
    """Return the rows that the protocol makes of one input."""
    head = orjson.dumps({"inputs": [tensor]})
    request = EVERYTHING.read(head + binary, str(len(head)).encode() if binary else None)
    return [item[tensor["name"]] for item in request.items]


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, np.ndarray[Any, Any]]:
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=4))
    dtype = DTYPES[datatype]
    elements: dict[str, Any] = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    return datatype, draw(hnp.arrays(dtype, shape, elements=elements))


@settings(max_examples=40)
@given(arrays(), st.booleans())
@example(("UINT64", np.array([[0, 2**63]], dtype=np.uint64)), True)
def test_numbers_come_back_as_they_were_sent(sent: tuple[str, np.ndarray[Any, Any]], flat: bool) -> None:
    datatype, array = sent
    head = {"name": f"in_{datatype}", "datatype": datatype, "shape": list(array.shape)}
    data = array.ravel().tolist() if flat else array.tolist()
    for rows in (
        read_tensor(head | {"data": data}),
        read_tensor(head | {"parameters": {"binary_data_size": array.nbytes}}, array.tobytes()),
    ):
        assert np.array_equal(np.stack(rows), array)
        assert rows[0].dtype == array.dtype
    told = TensorSpec(f"out_{datatype}", datatype, (-1, -1), "")  # type: ignore[arg-type]
    protocol = OpenInference(spec("python"), Signature((), (told,)))
    results = [{told.name: row} for row in array]
    for binary in (False, True):
        request = EVERYTHING.read(orjson.dumps({"inputs": [head | {"data": data}]}), None)
        headers, body = protocol.write(replace(request, outputs=[(told, binary)]), results)
        length = dict(headers).get(b"inference-header-content-length", b"%d" % len(body))
        output = orjson.loads(body[: int(length)])["outputs"][0]
        assert output["shape"] == list(array.shape)
        found = np.frombuffer(body[int(length) :], array.dtype) if binary else np.array(output["data"], array.dtype)
        assert np.array_equal(found.reshape(array.shape), array)


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=6))
def test_bytes_come_back_as_they_were_sent(values: list[bytes]) -> None:
    raw = b"".join(len(value).to_bytes(4, "little") + value for value in values)
    tensor = {
        "name": "in_BYTES",
        "datatype": "BYTES",
        "shape": [len(values), 1],
        "parameters": {"binary_data_size": len(raw)},
    }
    assert [row[0] for row in read_tensor(tensor, raw)] == values


@given(st.binary(max_size=200), st.none() | st.integers(-2, 220).map(lambda n: str(n).encode()))
def test_any_bytes_are_answered_or_refused(body: bytes, header: bytes | None) -> None:
    with pytest.raises(InvalidInput):
        EVERYTHING.read(body, header)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "data", "shape", "x"]), inner),
    max_leaves=8,
)


@given(
    st.sampled_from(["data", "shape", "datatype", "parameters", "name", "x"]),
    json_values,
    st.sampled_from(Everything.datatypes),
)
def test_any_json_in_any_place_is_answered_or_refused(key: str, value: Any, datatype: str) -> None:
    data: list[Any] = ["a"] if datatype == "BYTES" else [True] if datatype == "BOOL" else [1]
    tensor = {"name": f"in_{datatype}", "datatype": datatype, "shape": [1, 1], "data": data} | {key: value}
    try:
        request = EVERYTHING.read(json.dumps({"inputs": [tensor]}).encode(), None)
    except InvalidInput as error:
        assert error.place
    else:
        assert len(request.items) == 1


@pytest.mark.parametrize(
    ("datatype", "data", "place", "words"),
    [
        ("UINT8", [1, 300], "data[1]", "300 is out of the range of UINT8"),
        ("UINT64", [-1, 1], "data[0]", "out of the range of UINT64"),
        ("INT64", [2**63, 1], "data[0]", "out of the range of INT64"),
        ("INT32", [1, 1.0], "data[1]", "no whole number"),
        ("INT32", [True, 1], "data[0]", "no number"),
        ("INT8", ["1", 2], "data[0]", "no number"),
        ("FP16", [1, 70000], "data[1]", "out of the range of FP16"),
        ("FP32", [1e39, 1], "data[0]", "out of the range of FP32"),
        ("FP32", [None, 1], "data[0]", "no number"),
        ("FP64", [True, 1.5], "data[0]", "no number"),
        ("BOOL", [0, 1], "data[0]", "no boolean"),
        ("BYTES", ["a", 1], "data[1]", "must be a string"),
        ("BYTES", [["a", "b"], ["c"]], "data", "3 elements"),
        ("FP32", [[1], [2, 3]], "data", "3 elements"),
        ("FP32", [1, 2, 3], "data", "holds 3 elements, and the shape [1, 2] has 2"),
        ("FP32", [[1], [2]], "data", "nested as [2, 1]"),
        ("FP32", "1 2", "data", "must be a list, not a string"),
        ("FP32", [[1, "x"]], "data[0][1]", "'x' is no number"),
        ("UINT8", [[1, 300]], "data[0][1]", "300 is out of the range"),
        ("BYTES", [["a"], ["b", 1]], "data", "must be a string"),
        ("FP32", [[1, 2], []], "data", "nested unevenly"),
        ("BYTES", [["a", "b"], []], "data", "nested unevenly"),
        ("FP32", [1, [2]], "data", "holds lists beside elements"),
    ],
)
def test_what_does_not_fit_is_named(datatype: str, data: Any, place: str, words: str) -> None:
    tensor = {"name": f"in_{datatype}", "datatype": datatype, "shape": [1, 2], "data": data}
    with pytest.raises(InvalidInput) as caught:
        read_tensor(tensor)
    assert caught.value.place == f"inputs[0].{place}"
    assert words in caught.value.message


def test_a_long_string_among_numbers_is_refused_before_it_takes_memory() -> None:
    data: list[Any] = ["x" * 10_000, *[0] * 4_999]
    tensor = {"name": "in_FP32", "datatype": "FP32", "shape": [1, 5000], "data": data}
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput) as caught:
            read_tensor(tensor)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.place == "inputs[0].data[0]"
    assert peak < 10 * 2**20


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    ("datatype", "row", "words"),
    [
        ("UINT8", [300], "is no UINT8: .*300"),
        ("BYTES", 5, "is no BYTES: 5 is neither str nor bytes"),
        ("BYTES", ["a", None], "is no BYTES: None is neither"),
    ],
)
def test_an_output_of_another_type_is_the_model_s_failure(datatype: Any, row: Any, words: str, binary: bool) -> None:
    output = TensorSpec("x", datatype, (-1, -1), "rows")
    request = InferRequest([], None, [(output, binary)], None)
    with pytest.raises(PredictionFailed, match=words):
        OpenInference(spec("python"), Signature((), (output,))).write(request, [{"x": row}])


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    ("datatype", "shape", "row"),
    [
        ("FP32", (-1,), np.zeros(3)),
        ("FP32", (-1, 4), np.zeros(3)),
        ("FP32", (-1, -1), 1.0),
        ("FP32", (-1, -1), np.zeros((2, 2))),
        ("BYTES", (-1,), ["a"]),
        ("BYTES", (-1, 2), ["a"]),
        ("BYTES", (-1, 1), "a"),
    ],
)
def test_an_output_of_another_shape_than_its_signature_s_is_the_model_s_failure(
    datatype: Any, shape: tuple[int, ...], row: Any, binary: bool
) -> None:
    output = TensorSpec("x", datatype, shape, "rows")
    request = InferRequest([], None, [(output, binary)], None)
    with pytest.raises(PredictionFailed, match=r"the model's output 'x' has the shape .*, and its signature says"):
        OpenInference(spec("python"), Signature((), (output,))).write(request, [{"x": row}, {"x": row}])


def test_a_raw_body_is_one_input() -> None:
    number = TensorSpec("x", "FP32", (-1, 2), "pairs")
    protocol = OpenInference(spec("python"), Signature((number,), (number,)))
    request = protocol.read(np.float32([[1, 2], [3, 4]]).tobytes(), b"0")
    assert np.array_equal(np.stack([item["x"] for item in request.items]), [[1, 2], [3, 4]])
    assert request.outputs[0][1] is True
    with pytest.raises(InvalidInput, match="12 bytes are no whole tensor"):
        protocol.read(b"x" * 12, b"0")
    text = OpenInference(spec("text-embedding"), Signature((TensorSpec("text", "BYTES", (-1,), "text"),), ()))
    assert text.read(b"words", b"0").items == [{"text": b"words"}]
