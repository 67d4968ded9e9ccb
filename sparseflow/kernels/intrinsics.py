"""What numba lacks for these kernels: 16-bit floats, typed pointers, a shared counter, and one vector loop."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparseflow.store.codes import GROUP, ROW_GROUP_WORDS

DIGEST = zlib.crc32(Path(__file__).read_bytes(), GROUP) | 1  # of this file and what it imports; never 0

LANES = 16  # float32 lanes of the running sum; LLVM splits them where the machine's vectors are narrower


def _half_to_float(builder: Any, bits: Any) -> Any:
    return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())


def _bfloat_to_float(builder: Any, bits: Any) -> Any:
    wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
    return builder.bitcast(wide, ir.FloatType())


def _unchanged(builder: Any, value: Any) -> Any:
    return value


# numba has no 16-bit floats on a CPU, so two integer types stand for their bits: half_at and bfloat_at point to these.
_TO_FLOAT = {types.uint16: _half_to_float, types.int16: _bfloat_to_float, types.float32: _unchanged}


@intrinsic
def to_float(typingctx: Any, element: Any) -> Any:
    """A weight as float32, from half bits (uint16), bfloat16 bits (int16) or float32: one vector instruction."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _TO_FLOAT[element](builder, args[0])

    return types.float32(element), codegen


def _float_to_half(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))


def _float_to_bfloat(builder: Any, value: Any) -> Any:
    """To nearest, ties to even; a NaN stays one."""
    i32 = ir.IntType(32)
    bits = builder.bitcast(value, i32)
    is_odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
    rounded = builder.add(bits, builder.add(is_odd, i32(0x7FFF)))
    kept = builder.select(builder.fcmp_unordered("uno", value, value), i32(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(kept, i32(16)), ir.IntType(16))


_FROM_FLOAT = {types.uint16: _float_to_half, types.int16: _float_to_bfloat, types.float32: _unchanged}


@intrinsic
def store(typingctx: Any, pointer: Any, index: Any, value: Any) -> Any:
    """pointer[index] = value, rounded to what the pointer's type stands for. value: float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.gep(args[0], [args[1]])
        builder.store(_FROM_FLOAT[pointer.dtype](builder, args[2]), place)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, types.float32), codegen


@intrinsic
def advance(typingctx: Any, pointer: Any, n_elements: Any) -> Any:
    """pointer + n_elements, as in C."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


def _prefetch(builder: Any, pointer: Any) -> None:
    byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
    signature = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    function = builder.module.declare_intrinsic("llvm.prefetch", (byte,), signature)
    read, into_all_caches, data = i32(0), i32(3), i32(1)
    builder.call(function, [builder.bitcast(pointer, byte), read, into_all_caches, data])


@intrinsic
def take_next(typingctx: Any, counter: Any) -> Any:
    """counter[0], which goes up by one: no two threads get the same number. counter: int64*."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


def _pointer_to(element: types.Type) -> Callable[[Any], Any]:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        result = types.CPointer(element)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(types.intp), codegen

    typed: Callable[[Any], Any] = pointer
    return typed


int8_at = _pointer_to(types.int8)
int16_at = _pointer_to(types.int16)
half_at = _pointer_to(types.uint16)
bfloat_at = _pointer_to(types.int16)
int32_at = _pointer_to(types.int32)
uint32_at = _pointer_to(types.uint32)
int64_at = _pointer_to(types.int64)
float32_at = _pointer_to(types.float32)
float64_at = _pointer_to(types.float64)


def _load(builder: Any, pointer: Any, offset: Any, n_elements: int) -> Any:
    """A vector of what lies at pointer[offset] and behind."""
    vector = ir.VectorType(pointer.type.pointee, n_elements)
    return builder.load(builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer()), align=1)


def _nibbles(builder: Any, words: Any) -> list[Any]:
    """The four nibbles of 16-bit words, lowest first. Every second is 16 times as large, which spares its shift."""

    def all_lanes(value: int) -> Any:
        return ir.Constant(words.type, [value] * words.type.count)

    upper = builder.lshr(words, all_lanes(8))
    return [builder.and_(half, all_lanes(mask)) for half in (words, upper) for mask in (0x0F, 0xF0)]


def _pairwise_products(builder: Any, a: Any, b: Any) -> Any:
    """Products of two int16 vectors, neighbours added in int32: LLVM makes one `pmaddwd` of it."""
    wide = ir.VectorType(ir.IntType(32), 2 * LANES)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    lanes_i32 = ir.VectorType(ir.IntType(32), LANES)
    even = ir.Constant(lanes_i32, list(range(0, 2 * LANES, 2)))
    odd = ir.Constant(lanes_i32, list(range(1, 2 * LANES, 2)))
    return builder.add(
        builder.shuffle_vector(products, products, even), builder.shuffle_vector(products, products, odd)
    )


def _splat(builder: Any, scalar: Any) -> Any:
    i32 = ir.IntType(32)
    vector = builder.insert_element(
        ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined), scalar, ir.Constant(i32, 0)
    )
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(i32, LANES), [0] * LANES))


def _sum_lanes(builder: Any, lanes: Any) -> Any:
    """The sum of all lanes, halving the vector each time."""
    i32 = ir.IntType(32)
    width = LANES
    while width > 1:
        width //= 2
        lower = ir.Constant(ir.VectorType(i32, width), list(range(width)))
        upper = ir.Constant(ir.VectorType(i32, width), list(range(width, 2 * width)))
        lanes = builder.fadd(builder.shuffle_vector(lanes, lanes, lower), builder.shuffle_vector(lanes, lanes, upper))
    return builder.extract_element(lanes, ir.Constant(i32, 0))


@intrinsic
def nibble_dot(
    typingctx: Any, codes: Any, ahead: Any, x: Any, starts: Any, code_scales: Any, x_scales: Any, n_groups: Any
) -> Any:
    """sum over g of code_scales[g] * x_scales[g] * (codes of group g . x of group g), GROUP elements a group.

    codes: int16*, a row of a plane as `store.codes` packs it. ahead: int16*, a row asked for meanwhile. x: int16*.
    starts: int32*, LANES a group, added to the product of codes and x: lane l sums columns 2 l and 2 l + 1 of each
    ROW_GROUP_WORDS. Both scales: float32*, n_groups: intp. Written as vectors because LLVM does not find this shape by
    itself (from a scalar loop it made code a quarter as fast): exact in int32 within a group; the groups add up in
    float32 lanes.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, ahead, x, starts, code_scales, x_scales, n_groups = args

        def place(group: Any, n_elements: int, offset: int = 0) -> Any:
            start = builder.mul(group, ir.Constant(group.type, n_elements))
            return builder.add(start, ir.Constant(group.type, offset))

        lanes_f32 = ir.VectorType(ir.FloatType(), LANES)
        total = cgutils.alloca_once_value(builder, ir.Constant(lanes_f32, [0.0] * LANES))
        with cgutils.for_range(builder, n_groups, intp=n_groups.type) as loop:
            _prefetch(builder, builder.gep(ahead, [place(loop.index, ROW_GROUP_WORDS)]))
            words = _load(builder, codes, place(loop.index, ROW_GROUP_WORDS), ROW_GROUP_WORDS)
            products = []
            for n, nibbles in enumerate(_nibbles(builder, words)):
                columns = _load(builder, x, place(loop.index, GROUP, n * ROW_GROUP_WORDS), ROW_GROUP_WORDS)
                products.append(_pairwise_products(builder, nibbles, columns))
            sixteen_fold = builder.add(products[1], products[3])
            partial = builder.ashr(sixteen_fold, ir.Constant(sixteen_fold.type, [4] * LANES))
            for term in (products[0], products[2], _load(builder, starts, place(loop.index, LANES), LANES)):
                partial = builder.add(partial, term)
            scale = builder.fmul(
                builder.load(builder.gep(code_scales, [loop.index])), builder.load(builder.gep(x_scales, [loop.index]))
            )
            term = builder.fmul(builder.sitofp(partial, lanes_f32), _splat(builder, scale), flags=("contract",))
            builder.store(builder.fadd(builder.load(total), term, flags=("contract",)), total)
        return _sum_lanes(builder, builder.load(total))

    numbers = types.CPointer(types.float32)
    integers = types.CPointer(types.int16)
    return types.float32(
        integers, integers, integers, types.CPointer(types.int32), numbers, numbers, types.intp
    ), codegen
