"""Deliberately broken kernels: the checks of the Triton kernels can fail, each for its reason."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_triton as values
import test_triton_codegen as code
import torch
from test_triton_codegen import Compiled, Job

pytestmark = values.pytestmark
if importlib.util.find_spec("triton") is not None:
    from atlas_kernels.ops.backends.triton import groups, kernels, ops, packed
    from atlas_kernels.ops.codecs import CODECS

BF16, F32 = torch.bfloat16, torch.float32


def broken(folder: Path, module: Any, name: str, old: str, new: str) -> Path:
    """A file of kernels with one piece of text replaced, wherever it stands."""
    text = Path(module.__file__).read_text()
    assert old in text, "the kernels have changed: adapt this mutation"
    path = folder / f"broken_{name}.py"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("name", "old", "new", "check"),
    [
        (
            "tile_map_of_bank",
            "tl.load(p_tile_block + i_t)\n    start = tl.mul",
            "tl.load(p_tile_block + i_t // 2)\n    start = tl.mul",
            lambda: values.check_bank(2, F32, BF16),
        ),
        (
            "tile_of_bank",
            "i_t = tl.program_id(0) // (STORED // TILE)",
            "i_t = tl.program_id(0) // TILE",
            lambda: values.check_bank(2, F32, BF16),
        ),
        (
            "row_of_bank",
            "p_rows + i * length",
            "p_rows",
            lambda: values.check_bank(2, F32, BF16),
        ),
        (
            "tile_of_list",
            "start = (i_t - tl.load(p_block_tile + i_b))",
            "start = 0 * (i_t - tl.load(p_block_tile + i_b))",
            lambda: values.check_list(2, F32, BF16, "plain"),
        ),
        (
            "last_tile_not_summed",
            "o < end, other=0)\n    tl.store",
            "o < end - 1, other=0)\n    tl.store",
            lambda: values.check_list(2, F32, BF16, "plain"),
        ),
        (
            "last_column_of_narrow_steps",
            "range(0, length, STEP)",
            "range(0, length - 1, STEP)",
            lambda: values.check_list(2, F32, BF16, "offset"),
        ),
        (
            "rounding",
            "if INTERPRETED and",
            "if not INTERPRETED and",
            lambda: values.check_bank(2, BF16, BF16),
        ),
        (
            "rounding_of_every_sum",
            "b_acc += tl.load(p_coef + i * stride) * _row(p_rows, i, length, o, m)",
            "b_acc = (b_acc + tl.load(p_coef + i * stride) * _row(p_rows, i, length, o, m))"
            ".to(tl.float16).to(tl.float32)",
            lambda: values.check_bank(2, F32, BF16),
        ),
    ],
)
def test_wrong_values_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    old: str,
    new: str,
    check: Callable[[], None],
) -> None:
    check()
    module = code.module_from(broken(tmp_path, kernels, name, old, new))
    monkeypatch.setattr(ops, "kernels", module)
    with pytest.raises(AssertionError):
        check()


PLANE = "_level(b_window, 1 + BITS * k % 16, BITS)"


@pytest.mark.parametrize(
    ("name", "old", "new", "codec"),
    [
        ("plane_shift", PLANE, PLANE.replace("k %", "(k ^ 1) %"), "int2"),
        ("second_half_of_word", "o_group * 8 * BITS + BITS * k", "o_group * 8 * BITS", "int4"),
        ("second_word_of_group", "BITS // 4 + BITS * k // 32", "BITS // 4", "int8"),
        ("window_of_group", "o_group * 8 * BITS + BITS * k", "BITS * k", "sign"),
        ("third_bits_of_group", "o_group % 4 * 8", "o_group % 2 * 8", "int3"),
        ("low_words_of_group", "o_group // 2 % 2, m", "0, m", "int3"),
        ("level", "2**BITS - 1)", "2**BITS)", "int2"),
        ("group_of_scale", "i * groups + o_group", "i * groups + o_group // 2 * 2", "int4"),
        ("scales_of_vector", "i * groups + o_group", "o_group", "int4"),
        ("words_of_vector", "p_words + i * row", "p_words", "int4"),
        ("plane_not_summed", "range(1, PLANES)", "range(1, PLANES - 1)", "int4"),
        (
            "rounding_of_every_sum", "b_acc[k] + b_factor * b_levels[k]",
            "(b_acc[k] + b_factor * b_levels[k]).to(tl.float16).to(tl.float32)", "int4",
        ),
    ],
)  # fmt: skip
def test_wrong_packed_values_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, old: str, new: str, codec: str
) -> None:
    module = code.module_from(broken(tmp_path, packed, name, old, new))
    monkeypatch.setattr(ops, "packed", module)
    with pytest.raises(AssertionError):
        values.check_packed(CODECS[codec], 2, F32)


@pytest.mark.parametrize(
    ("name", "old", "new", "codec"),
    [
        ("slot_map", "for _ in tl.static_range(ROUNDS)", "for _ in tl.static_range(3)", "bf16"),
        ("round_backwards", "h_keys[ROUNDS - 1 - r]", "h_keys[r]", "bf16"),
        ("inverse", "return h_near * (2 - h_odd * h_near)", "return h_near", "bf16"),
        ("group_rounding", "umulhi(h_slot,", "umulhi(h_slot | 0xFFFFF,", "bf16"),
        ("first_slot", "(o_group * TILE + num_groups - 1)", "(o_group * TILE)", "bf16"),
        ("last_slot", "tl.where(o_slot < o_end, b_members, 0)", "b_members", "bf16"),
        ("block_of_coef", "(p_tile_block + i_t)", "(p_tile_block)", "bf16"),
        ("stride_of_coef", "num_blocks.to(tl.int64) * num_groups", "num_groups", "bf16"),
        ("vector_of_sums", "p_part += i.to", "p_part += 0 * i.to", "bf16"),
        ("split_field", "o // WORDS % count * BITS", "o % count * BITS", "int4"),
        ("split_high_words", "2 * WORDS + 2 * o_unit", "2 * WORDS + o_unit", "int3"),
        ("split_scale", "(num_vectors * start + i * length)", "(num_vectors * start)", "sign"),
    ],
)  # fmt: skip
def test_wrong_partitions_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, old: str, new: str, codec: str
) -> None:
    module = code.module_from(broken(tmp_path, groups, name, old, new))
    monkeypatch.setattr(ops, "groups", module)
    with pytest.raises(AssertionError):
        values.check_partition(CODECS[codec], 2, 5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses fork and mmap of Linux")
@pytest.mark.parametrize(
    ("module", "name", "old", "new"),
    [
        ("kernels", "tile_mask", "m = o < length", "m = o < 4096"),
        ("kernels", "absent_mask", "m & (a_delta != 0)", "m"),
        ("kernels", "last_tiles_mask", "mask=o < end, other=0", "mask=o >= 0, other=0"),
        (
            "kernels", "store_mask",
            "_narrowed(b_values, DTYPE), mask=m", "_narrowed(b_values, DTYPE)",
        ),
        ("packed", "word_mask", "tl.load(p_words + o, mask=m, other=0)", "tl.load(p_words + o)"),
        ("packed", "scale_mask", "mask=m_group, other=0", "mask=o_group >= 0, other=0"),
        ("packed", "plane_mask", "k * WORDS, mask=m, other=0", "k * WORDS"),
        ("packed", "packed_store_mask", "b_out, mask=m", "b_out"),
        ("groups", "value_mask", "p_items + o, mask=m, other=0", "p_items + o"),
        ("groups", "field_mask", "+ o % WORDS), mask=m, other=0", "+ o % WORDS)"),
        (
            "groups", "group_mask",
            "b_sums, mask=tl.arange(0, GROUPS) < num_groups", "b_sums",
        ),
    ],
)  # fmt: skip
def test_stray_accesses_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, name: str, old: str, new: str
) -> None:
    flawed = code.module_from(broken(tmp_path, getattr(ops, module), name, old, new))
    monkeypatch.setattr(ops, module, flawed)
    compute = values.compute_between_fences
    if module == "groups":
        compute = values.compute_partitions_between_fences
    with pytest.raises(AssertionError):
        values.check_fences(compute)


FLAWS = {
    "offset_32": (
        "p_rows + i * length", "p_rows + i * length.to(tl.int32)", code.check_offsets,
        ("arena_compose_kernel", "arena_partial_kernel"),
    ),
    "length_hint": (
        "end = tl.multiple_of(tl.load(p_tile_offset + i_t + 1), 16)",
        "end = tl.load(p_tile_offset + i_t + 1)",
        code.check_widths,
        ("arena_compose_kernel", "arena_partial_kernel"),
    ),
    "address_hint": (
        "p_tensor = tl.multiple_of(p_tensor, 16)", "p_tensor = p_tensor", code.check_widths,
        ("compose_kernel", "partial_kernel"),
    ),
    "truncation": (
        "b_wide.to(DTYPE)", 'b_wide.to(DTYPE, fp_downcast_rounding="rtz")', code.check_rounding,
        ("arena_compose_kernel", "compose_kernel"),
    ),
}  # fmt: skip


PACKED_FLAWS = {
    "packed_offset_32": (
        "p_words + i * row", "p_words + i * row.to(tl.int32)", code.check_offsets,
    ),
    "word_divisor": (
        "elements * BITS // (32 * WORDS) * WORDS", "elements * BITS // 32",
        code.check_packed_widths,
    ),
    "start_hint": (
        "tl.multiple_of(tl.load(p_tile_offset + i_t), 16)", "tl.load(p_tile_offset + i_t)",
        code.check_packed_widths,
    ),
    "exponent_for_each_field": (
        "((((1 << BITS) - 1) << P) |", "(((1 << BITS) - 1) << P) | (", code.check_instructions,
    ),
}  # fmt: skip


PARTITION_FLAWS = {
    "partition_offset_32": (
        "stride = num_blocks.to(tl.int64) * num_groups", "stride = num_blocks * num_groups",
        code.check_offsets, ("group_compose_kernel",),
    ),
    "partition_start_hint": (
        "tl.multiple_of(tl.load(p_tile_offset + i_t), 16)", "tl.load(p_tile_offset + i_t)",
        code.check_partition_widths, ("group_compose_kernel", "group_partial_kernel"),
    ),
}  # fmt: skip


def test_flaws_of_the_code_are_noticed(tmp_path: Path) -> None:
    jobs = [
        Job("sm_90", (9,), (("bf16", "bf16"),), str(broken(tmp_path, kernels, name, old, new)))
        for name, (old, new, _, _) in FLAWS.items()
    ]
    jobs += [
        Job(
            "sm_90",
            (9,),
            (("fp32", "int4"),),
            str(broken(tmp_path, packed, name, old, new)),
            "packed",
        )
        for name, (old, new, _) in PACKED_FLAWS.items()
    ]
    jobs += [
        Job(
            "sm_90",
            (9,),
            (("fp32", "int4"),),
            str(broken(tmp_path, groups, name, old, new)),
            "groups",
        )
        for name, (old, new, _, _) in PARTITION_FLAWS.items()
    ]
    # 128 elements per thread.
    jobs.append(Job("sm_90", (9,), (("fp32", "bf16"),), launch=(4096, 1, 0)))
    *results, crowded = code.compiled_elsewhere(*jobs)
    for (_, _, check, guilty), compiled in zip(FLAWS.values(), results, strict=False):
        assert noticed_in(compiled, check) == set(guilty)
    results = results[len(FLAWS) :]
    for (_, _, check), compiled in zip(PACKED_FLAWS.values(), results, strict=False):
        assert noticed_in(compiled, check) == {"packed_compose_kernel", "packed_partial_kernel"}
    results = results[len(PACKED_FLAWS) :]
    for (_, _, check, guilty), compiled in zip(PARTITION_FLAWS.values(), results, strict=True):
        assert noticed_in(compiled, check) == set(guilty)
    assert noticed_in(crowded, code.check_spills) == {"arena_compose_kernel", "compose_kernel"}


def noticed_in(compiled: list[Compiled], check: Callable[[Compiled], Any]) -> set[str]:
    """The kernels for which a check fails."""

    def fails(it: Compiled) -> bool:
        try:
            check(it)
        except AssertionError:
            return True
        return False

    return {it.kernel for it in compiled if fails(it)}


def test_conversions_in_loops_are_counted() -> None:
    text = """
    %0 = ttg.convert_layout %a
    %1 = scf.for %i = %x to %y {
      scf.if %c {
        %2 = ttg.convert_layout %b
      } else {
      }
    } {attributes}
    %3 = ttg.convert_layout %1
    """
    assert code.in_loops(text, "convert_layout") == 1
