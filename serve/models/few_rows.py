"""The product that a decode step waits for and torch lacks: few rows by weights as they lie, compiled where it runs.

A step of one row is bound by the bytes of the weights and a step of several by arithmetic, so a weight is read once,
converted in a register, and multiplied with up to eight rows there, as the register blocking of BLIS (ACM TOMS 41(3),
2015) has it. Where registers are many, two outputs share the rows that were loaded, as loading is what takes long.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

_ROWS = 8  # that a weight is multiplied with at once: their sums fill half the registers of AVX2
_OUTPUTS = 32  # whose weights stay near while one block of rows after another meets them
_UNROLLED = 4
_MANY_LANES = 16  # AVX-512 has 32 registers: sums of eight rows and two outputs, and what they are made from
_AHEAD = 4096  # bytes between the weight that is used and the one that is asked of memory
# What of a processor converts float16 in one instruction, and how many float32 its registers hold; the widest first.
_LANES = (("avx512f", 16), ("f16c", 8), ("fullfp16", 4), ("neon", 4))

_I64, _I32, _FLOAT, _HALF = ir.IntType(64), ir.IntType(32), ir.FloatType(), ir.HalfType()
_POINTER = ir.IntType(8).as_pointer()

#: Addresses of rows, weights and products; outputs, width, count of rows.
Product = Callable[[int, int, int, int, int, int], None]


class FewRows:
    """A linear map for few rows; its products are summed in float32.

    Args:
        weight: float32 or float16 [outputs, width], on the CPU.
        bias: float32 [outputs], or None.
        threads: Threads that share a product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, threads: int) -> None:
        self._weight = weight.contiguous()
        self._bias = bias
        self._outputs, self._width = weight.shape
        self._address = self._weight.data_ptr()
        self._product = _compiled(weight.dtype == torch.float16, threads)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Return whether this machine's processor has the instructions, and the weights a width that fills them."""
        lanes = _lanes()
        return lanes is not None and weight.shape[1] % (lanes * _UNROLLED) == 0

    def __call__(self, rows: Tensor) -> Tensor:
        """Return `rows @ weight.T + bias`, float32 [count, outputs], of float32 [count, width]."""
        rows = rows.contiguous()
        products = torch.empty(len(rows), self._outputs)
        self._product(rows.data_ptr(), self._address, products.data_ptr(), self._outputs, self._width, len(rows))
        return products if self._bias is None else products.add_(self._bias)


@functools.cache
def _lanes() -> int | None:
    features = llvm.get_host_cpu_features()
    return next((lanes for name, lanes in _LANES if features.get(name)), None)


@functools.cache
def _compiled(halves: bool, threads: int) -> Product:
    """Return the product, compiled; it lets go of the interpreter while it computes."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    team = _find_team() if threads > 1 else None
    parsed = llvm.parse_assembly(str(_module(_HALF if halves else _FLOAT, _lanes() or 1, threads if team else 1)))
    parsed.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3)
    function: Any = signature(engine.get_function_address("product"))
    function.kept = (engine, team)  # the code lives as long as its engine
    compiled: Product = function
    return compiled


def _find_team() -> ctypes.CDLL | None:
    """Return the library of the threads that torch computes with, so that both use the same ones, or None without it.

    Its entry points (GOMP_parallel and OpenMP's API, section 3 of OpenMP 5.2) become known to the compiled code.
    """
    path = next(Path(torch.__file__).with_name("lib").glob("libgomp*.so*"), None)
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"):
        llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    return library


def _module(kind: Any, lanes: int, threads: int) -> ir.Module:
    """Return the code: `columns` computes a range of outputs, `product` shares all outputs among threads."""
    module = ir.Module("few_rows")
    module.triple = llvm.get_process_triple()
    # rows, weights, products; outputs, width, count of rows
    arguments = [_FLOAT.as_pointer(), kind.as_pointer(), _FLOAT.as_pointer(), _I64, _I64, _I64]
    columns = ir.Function(module, ir.FunctionType(ir.VoidType(), [*arguments, _I64, _I64]), "columns")
    columns.linkage = "internal"
    _Columns(columns, kind, lanes).write()
    product = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), "product")
    build = ir.IRBuilder(product.append_basic_block())
    if threads > 1:
        _share(build, columns, product.args, threads)
    else:
        build.call(columns, [*product.args, _I64(0), product.args[3]])
    build.ret_void()
    return module


def _share(build: ir.IRBuilder, columns: ir.Function, arguments: Sequence[Any], threads: int) -> None:
    """Have each thread of a team call `columns` with its part of the outputs."""
    module = columns.module
    number, count = (
        ir.Function(module, ir.FunctionType(_I32, []), name) for name in ("omp_get_thread_num", "omp_get_num_threads")
    )
    work = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), "work")
    packed = ir.LiteralStructType([argument.type for argument in arguments])
    team = ir.Function(module, ir.FunctionType(ir.VoidType(), [work.type, _POINTER, _I32, _I32]), "GOMP_parallel")
    here = build.alloca(packed)
    for index, argument in enumerate(arguments):
        build.store(argument, build.gep(here, [_I32(0), _I32(index)]))
    build.call(team, [work, build.bitcast(here, _POINTER), _I32(threads), _I32(0)])

    build = ir.IRBuilder(work.append_basic_block())
    there = build.bitcast(work.args[0], packed.as_pointer())
    given = [build.load(build.gep(there, [_I32(0), _I32(index)])) for index in range(len(arguments))]
    own = build.sext(build.call(number, []), _I64)
    of = build.sext(build.call(count, []), _I64)
    edges = [build.sdiv(build.mul(given[3], edge), of) for edge in (own, build.add(own, _I64(1)))]
    build.call(columns, [*given, *edges])
    build.ret_void()


class _Columns:
    """Writes the loops over outputs, blocks of rows and width."""

    def __init__(self, function: ir.Function, kind: Any, lanes: int) -> None:
        self._build = ir.IRBuilder(function.append_basic_block())
        self._rows, self._weights, self._products, self._outputs, self._width, self._count, *self._range = function.args
        self._kind, self._lanes = kind, lanes
        self._wide = ir.VectorType(_FLOAT, lanes)
        module = function.module
        wide = self._wide
        self._fma = ir.Function(module, ir.FunctionType(wide, [wide] * 3), f"llvm.fma.v{lanes}f32")
        self._sum = ir.Function(module, ir.FunctionType(_FLOAT, [_FLOAT, wide]), f"llvm.vector.reduce.fadd.v{lanes}f32")
        self._fetch = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER, _I32, _I32, _I32]), "llvm.prefetch")

    def write(self) -> None:
        """Write the whole function."""
        begin, end = self._range
        self._loop(begin, end, _OUTPUTS, self._tile)
        self._build.ret_void()

    def _loop(
        self, begin: Any, end: Any, step: int, body: Callable[..., Sequence[Any]], carried: Sequence[Any] = ()
    ) -> list[Any]:
        """Write `for index in range(begin, end, step): carried = body(index, *carried)` and return what is carried."""
        build = self._build
        before = build.block
        head, inside, after = (build.append_basic_block() for _ in range(3))
        build.branch(head)
        build.position_at_end(head)
        index = build.phi(_I64)
        held = [build.phi(value.type) for value in carried]
        build.cbranch(build.icmp_signed("<", index, end), inside, after)
        build.position_at_end(inside)
        results = body(index, *held)
        following = build.add(index, _I64(step))
        for phi, first, later in zip([index, *held], [begin, *carried], [following, *results], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(later, build.block)
        build.branch(head)
        build.position_at_end(after)
        return held

    def _tile(self, begin: Any) -> Sequence[Any]:
        """Write some outputs of every row: whole blocks of rows, then the one block of those left over."""
        build = self._build
        until = build.add(begin, _I64(_OUTPUTS))
        last = self._range[1]
        end = build.select(build.icmp_signed("<", until, last), until, last)
        left = build.and_(self._count, _I64(_ROWS - 1))
        whole = build.sub(self._count, left)

        def block(row: Any, rows: int) -> Sequence[Any]:
            together = 2 if self._lanes == _MANY_LANES and 2 * rows > _ROWS else 1
            odd = build.and_(build.sub(end, begin), _I64(together - 1))
            paired = build.sub(end, odd)
            self._loop(begin, paired, together, lambda output: self._some(output, row, rows, outputs=together))
            if together > 1:
                self._loop(paired, end, 1, lambda output: self._some(output, row, rows, outputs=1))
            return ()

        self._loop(_I64(0), whole, _ROWS, lambda row: block(row, _ROWS))
        after = build.append_basic_block()
        switch = build.switch(left, after)
        for rows in range(1, _ROWS):
            case = build.append_basic_block()
            switch.add_case(_I64(rows), case)
            build.position_at_end(case)
            block(whole, rows)
            build.branch(after)
        build.position_at_end(after)
        return ()

    def _some(self, output: Any, row: Any, rows: int, *, outputs: int) -> Sequence[Any]:
        """Write one or two outputs of some rows; few rows have two sums each, so that no addition waits for another."""
        build = self._build
        weights = [
            build.gep(self._weights, [build.mul(build.add(output, _I64(o)), self._width)]) for o in range(outputs)
        ]
        chains = 1 if 2 * rows > _ROWS else 2
        starts = [build.gep(self._rows, [build.mul(build.add(row, _I64(r)), self._width)]) for r in range(rows)]
        zeros = [ir.Constant(self._wide, [0.0] * self._lanes)] * (rows * outputs * chains)

        def step(index: Any, *sums: Any) -> Sequence[Any]:
            for start in weights:
                ahead = build.gep(build.bitcast(build.gep(start, [index]), _POINTER), [_I64(_AHEAD)])
                build.call(self._fetch, [ahead, _I32(0), _I32(3), _I32(1)])
            grown = list(sums)
            for part in range(_UNROLLED):
                at = build.add(index, _I64(part * self._lanes))
                loaded = [self._weight(start, at) for start in weights]
                for r, start in enumerate(starts):
                    values = self._vector(start, at, _FLOAT)
                    for o, weight in enumerate(loaded):
                        chain = (r * outputs + o) * chains + part % chains
                        grown[chain] = build.call(self._fma, [values, weight, grown[chain]])
            return grown

        sums = self._loop(_I64(0), self._width, _UNROLLED * self._lanes, step, zeros)
        for r in range(rows):
            for o in range(outputs):
                first = (r * outputs + o) * chains
                total = sums[first] if chains == 1 else build.fadd(*sums[first : first + chains])
                place = build.add(build.mul(build.add(row, _I64(r)), self._outputs), build.add(output, _I64(o)))
                product = build.call(self._sum, [ir.Constant(_FLOAT, 0.0), total], fastmath=("reassoc",))
                build.store(product, build.gep(self._products, [place]))
        return ()

    def _weight(self, start: Any, index: Any) -> Any:
        weight = self._vector(start, index, self._kind)
        return self._build.fpext(weight, self._wide) if self._kind is _HALF else weight

    def _vector(self, start: Any, index: Any, kind: Any) -> Any:
        place = self._build.gep(start, [index])
        vector = self._build.load(self._build.bitcast(place, ir.VectorType(kind, self._lanes).as_pointer()))
        vector.align = 2 if kind is _HALF else 4
        return vector
