"""Element types by name, so that planning needs no torch.

A dtype is its torch name without the prefix ("bfloat16"). Every dtype that torch can copy is here.
"""

from difflib import get_close_matches

from tricomm.errors import ArgumentError, SpecError, shown

_FLOATS = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
_INTEGERS = {
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
}
_COMPLEX = {"complex32": 4, "complex64": 8, "complex128": 16}
# Types with no arithmetic of their own: they move, and they are never cast or reduced.
OPAQUE = {
    "float4_e2m1fn_x2": 1,
    "bits8": 1,
    "bits16": 2,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
}

ITEMSIZE: dict[str, int] = {"bool": 1, **_FLOATS, **_INTEGERS, **_COMPLEX, **OPAQUE}
"""Bytes of one element, by dtype name."""

SHORT_NAMES = {
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "byte": "uint8",
    "char": "int8",
    "fp64": "float64",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "bfloat": "bfloat16",
    "fp8": "float8_e4m3fn",
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "boolean": "bool",
    "cfloat": "complex64",
    "chalf": "complex32",
    "cdouble": "complex128",
}
"""What people write for a dtype, and what it is called; only to say so, never to guess."""


def dtype_name(dtype: object) -> str:
    """The name of a dtype given as "float32" or as torch.float32.

    Raises:
        SpecError: no such element type; an ArgumentError where it is not even a name.

    Example:
        >>> dtype_name("torch.bfloat16")
        'bfloat16'
    """
    try:
        name = str(dtype).removeprefix("torch.")
    except Exception:
        name = ""  # refused below
    if name not in ITEMSIZE:
        # A torch.dtype is known by its type's name, so that planning needs no torch.
        if not isinstance(dtype, str) and type(dtype).__name__ != "dtype":
            raise ArgumentError(f'dtype={shown(dtype)} is not a dtype; write "bfloat16" or torch.bfloat16')
        meant = next(iter(get_close_matches(name.lower(), [*SHORT_NAMES, *ITEMSIZE], 1)), None)
        meant = SHORT_NAMES.get(meant, meant) if meant else None
        remedy = f'say "{meant}"?' if meant else f"use one of {', '.join(sorted(ITEMSIZE))}"
        raise SpecError(f"dtype {shown(dtype)} is not an element type that tricomm moves; {remedy}")
    return name


def check_cast(source: str, destination: str) -> None:
    """Refuse a cast that would lose more than rounding.

    Raises:
        SpecError: complex to real, or to or from a type that has no values of its own.
    """
    if source == destination:
        return
    opaque = next((name for name in (source, destination) if name in OPAQUE), None)
    if opaque is not None:
        raise SpecError(f"cannot cast {source} to {destination}: {opaque} has no cast; give both specs the same dtype")
    if source in _COMPLEX and destination not in _COMPLEX:
        raise SpecError(
            f"cannot cast {source} to {destination}: the imaginary part would be lost; "
            "pass torch.view_as_real(tensor) or keep a complex dtype"
        )


def check_reduction(op: str, dtype: str) -> None:
    """Refuse a reduction that has no meaning for the dtype.

    Raises:
        SpecError: for example the maximum of complex numbers, or the average of integers.
    """
    if dtype in OPAQUE:
        problem = "the type has no arithmetic"
    elif op in ("max", "min") and dtype in _COMPLEX:
        problem = "complex numbers have no order"
    elif op == "avg" and (dtype in _INTEGERS or dtype == "bool"):
        problem = "an average of integers is not an integer"
    elif op == "sum" and dtype == "bool":
        problem = "a sum of booleans is not a boolean"
    else:
        return
    raise SpecError(f"Partial({op!r}) cannot reduce {dtype}: {problem}; cast the tensor or choose another op")
