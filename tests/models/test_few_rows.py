"""Products of few rows, against torch's own."""

from __future__ import annotations

import ctypes
import mmap
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from serve.models.few_rows import FewRows

pytestmark = pytest.mark.skipif(
    not FewRows.takes(torch.empty(1, 1024)), reason="this processor has no instructions that the product is made of"
)

# outputs and width: a tile and less, more, and many; the narrowest width that every processor's registers divide
SHAPES = [(1, 64), (31, 64), (32, 192), (33, 576), (577, 1536), (2049, 128)]
#: Every number of rows left over beside none, one and two whole blocks.
COUNTS = range(24)


def weights(outputs: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(outputs * width)
    return torch.randn(outputs, width, generator=generator).div(width**0.5).to(dtype)


def some_rows(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count + 1))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("outputs", "width"), SHAPES)
def test_every_number_of_rows_gives_torchs_product(outputs: int, width: int, dtype: torch.dtype, threads: int) -> None:
    weight = weights(outputs, width, dtype)
    product = FewRows(weight, None, threads=threads)
    for count in COUNTS:
        rows = some_rows(count, width)
        torch.testing.assert_close(product(rows), F.linear(rows, weight.float()), atol=2e-6, rtol=2e-5)


def test_a_bias_is_added() -> None:
    weight, bias, rows = weights(40, 64, torch.float32), some_rows(1, 40)[0], some_rows(5, 64)
    expected = F.linear(rows, weight, bias)
    torch.testing.assert_close(FewRows(weight, bias, threads=1)(rows), expected, atol=2e-6, rtol=2e-5)


def test_rows_and_weights_that_do_not_lie_in_order_are_put_in_order() -> None:
    weight, rows = weights(64, 128, torch.float32).t(), some_rows(64, 3).t()
    assert not weight.is_contiguous()
    assert not rows.is_contiguous()
    expected = F.linear(rows, weight)
    torch.testing.assert_close(FewRows(weight, None, threads=1)(rows), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_is_read_past_the_weights(dtype: torch.dtype) -> None:
    """The weights end where memory that may not be read begins."""
    outputs, width, page = 48, 64, mmap.PAGESIZE
    size = outputs * width * dtype.itemsize
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    weight = torch.frombuffer(memory, dtype=dtype, count=outputs * width, offset=whole - size).view(outputs, width)
    weight.copy_(weights(outputs, width, dtype))
    assert protect(start + whole, page, 0) == 0
    try:
        rows = some_rows(9, width)
        expected = F.linear(rows, weights(outputs, width, dtype).float())
        torch.testing.assert_close(FewRows(weight, None, threads=1)(rows), expected, atol=2e-6, rtol=2e-5)
    finally:
        protect(start + whole, page, mmap.PROT_READ | mmap.PROT_WRITE)


def test_numbers_that_are_none_stay_in_their_row() -> None:
    weight, rows = weights(40, 64, torch.float32), some_rows(4, 64)
    rows[2, 7] = torch.nan
    products = FewRows(weight, None, threads=1)(rows)
    assert products[2].isnan().all()
    assert products[[0, 1, 3]].isfinite().all()


def test_a_width_that_does_not_fill_the_registers_is_left_to_torch() -> None:
    assert not FewRows.takes(torch.empty(8, 65))


def test_two_threads_may_ask_for_products_at_once() -> None:
    weight = weights(577, 576, torch.float32)
    product = FewRows(weight, None, threads=2)
    results: dict[int, Tensor] = {}

    def ask(number: int) -> None:
        for _ in range(50):
            results[number] = product(some_rows(number, 576))

    askers = [threading.Thread(target=ask, args=(number,)) for number in (3, 8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    for number, result in results.items():
        torch.testing.assert_close(result, F.linear(some_rows(number, 576), weight), atol=2e-6, rtol=2e-5)
    assert sorted(results) == [3, 8]
