"""How machine code is counted, on code written by hand."""

import pytest

from bench.kernels.sass import CONVERSION, INTEGER, MEMORY, PREDICATE, Tile, tiles


def code(*lines: str) -> str:
    """As nvdisasm prints it."""
    return "\n".join(f"{line}:" if line.startswith(".L") else f"        /*0000*/  {line} ;" for line in lines)


STRAIGHT = code(
    "S2R R0, SR_TID.X",
    "ISETP.GE.AND P0, PT, R0, R2, PT",
    "@!P0 LDG.E.128 R4, desc[UR4][R2.64]",
    "@P0 EXIT",
    "STG.E.128 desc[UR4][R8.64], R4",
    "EXIT",
)
TWO_WAYS = code(
    "ISETP.NE.U32.AND P0, PT, R4, 0x1, PT",
    "@P0 BRA `(.L_x_0)",
    "LDG.E.64 R4, desc[UR4][R2.64]",
    "STG.E.64 desc[UR4][R8.64], R4",
    "EXIT",
    ".L_x_0",
    "I2F R4, R4",
    "STG.E.U16 desc[UR4][R8.64], R4",
    "STG.E.U16 desc[UR4][R8.64+0x40], R4",
    "EXIT",
    ".L_x_1",
    "BRA `(.L_x_1)",
)
ENDS = code(
    "LDG.E.64 R4, desc[UR4][R2.64]",
    "STG.E.64 desc[UR4][R8.64], R4",
    "STG.E.64 desc[UR4][R8.64+0x100], R4",
    "@P0 BRA `(.L_x_0)",
    "STG.E.U16 desc[UR4][R8.64], R4",
    "STG.E.U8 desc[UR4][R8.64+0x2], R4",
    ".L_x_0",
    "EXIT",
)
LOOP = code(
    "S2R R0, SR_TID.X",
    "IADD3 R0, R0, R1, RZ",
    ".L_x_0",
    "LDG.E R4, desc[UR4][R2.64]",
    "ISETP.GE.AND P0, PT, R0, R2, PT",
    "@P0 BRA `(.L_x_2)",
    "STG.E desc[UR4][R8.64], R4",
    ".L_x_2",
    "STG.E desc[UR4][R8.64], R4",
    "@P1 BRA `(.L_x_0)",
    "EXIT",
)
TABLE = code(
    """BRX R14 -0x650  (*"BRANCH_TARGETS .L_x_3,.L_x_4"*)""",
    ".L_x_3",
    "STG.E.U8 desc[UR4][R8.64], R4",
    "EXIT",
    ".L_x_4",
    "BRA.U UP0, `(.L_x_3)",
    "STG.E desc[UR4][R8.64], R4",
    "EXIT",
)


def test_predicated_instructions_count_and_an_early_exit_is_passed() -> None:
    assert tiles(STRAIGHT) == [Tile(16, 1, {MEMORY: 2, INTEGER: 1, PREDICATE: 3}, 1)]
    early = code("STG.E R1, R2", "@P0 EXIT", "STG.E.U16 R1, R2", "EXIT")
    assert tiles(early) == [Tile(4, 1, {MEMORY: 2, PREDICATE: 2}, 0, 1), Tile(4, 1, {MEMORY: 1, PREDICATE: 1}, 0)]
    assert tiles(STRAIGHT)[0].stored_nbytes == 512


def test_each_way_is_counted_and_what_is_not_reached_is_not() -> None:
    assert tiles(TWO_WAYS) == [
        Tile(8, 1, {MEMORY: 2, PREDICATE: 3}, 1),
        Tile(2, 2, {MEMORY: 2, PREDICATE: 3, CONVERSION: 1}, 0),
    ]


def test_narrower_stores_on_a_way_are_told_apart() -> None:
    assert (
        tiles(ENDS) == [Tile(8, 2, {MEMORY: 3, PREDICATE: 2}, 1, 0), Tile(8, 2, {MEMORY: 5, PREDICATE: 2}, 1, 2)][::-1]
    )
    one_block = code("STG.E R1, R2", "STG.E.64 R1, R2", "EXIT")
    assert tiles(one_block) == [Tile(8, 1, {MEMORY: 2, PREDICATE: 1}, 0, 1)]


def test_of_a_loop_one_turn_counts() -> None:
    assert tiles(LOOP) == [Tile(4, 2, {MEMORY: 3, PREDICATE: 3}, 1), Tile(4, 1, {MEMORY: 2, PREDICATE: 3}, 1)]


def test_jumps_by_a_table_and_by_a_uniform_predicate_are_followed() -> None:
    assert tiles(TABLE) == [Tile(4, 1, {MEMORY: 1, PREDICATE: 3}, 0), Tile(1, 1, {MEMORY: 1, PREDICATE: 3}, 0)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (code("FROB R1, R2", "EXIT"), "instruction FROB is of no class"),
        (code(".L_x_0", "BRA.U UP0, `(.L_x_0)", ".L_x_1", "@P0 BRA `(.L_x_1)", "EXIT"), "the code has 2 loops"),
    ],
)
def test_code_of_another_kind_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tiles(text)
