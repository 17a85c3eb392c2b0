"""Planted mistakes in how backends keep quantised weights and compute with them."""

from __future__ import annotations

from mutant import TRITON, TVM, Mutant

GEMM = f"{TVM}/kernels/quantized_gemm.py"
PANELS = f"{TVM}/kernels/quantized_panels.py"
E4M3 = f"{TVM}/kernels/e4m3.py"
WEIGHT = f"{TVM}/kernels/quantized.py"
INT_MATRIX = f"{TRITON}/kernels/int_matrix.py"
INT_LINEAR = f"{TRITON}/kernels/int_linear.py"
FP8_LINEAR = f"{TRITON}/kernels/fp8_linear.py"

QUANTIZED_KERNELS = (
    # ----------------------------------------------------------------------------------------------------- TVM
    Mutant(
        "tvm_nibbles_swapped",
        PANELS,
        "pairs = q[:, ::2] | q[:, 1::2] << 4",
        "pairs = q[:, 1::2] | q[:, ::2] << 4",
        "nibble order",
    ),
    Mutant(
        "tvm_zero_point_off_by_one",
        PANELS,
        "return 8 if self.bits == 4 else 0",
        "return 7 if self.bits == 4 else 0",
        "zero point off by one",
    ),
    Mutant(
        "tvm_scale_unused",
        GEMM,
        "totals[p, s, j] + sums[at, j] * weight.scale(panels[p], run, j)",
        "totals[p, s, j] + sums[at, j]",
        "scale unused",
    ),
    Mutant(
        "tvm_scale_of_the_first_group",
        GEMM,
        "float32(self.scales[panel, run // self.layout.runs_in_group, j])",
        "float32(self.scales[panel, 0, j])",
        "scale of the wrong group",
    ),
    Mutant(
        "tvm_zero_point_of_the_first_group",
        GEMM,
        "float32(self.zeros[panel, run // self.layout.runs_in_group, j])",
        "float32(self.zeros[panel, 0, j])",
        "zero point of the wrong group",
    ),
    Mutant(
        "tvm_group_for_every_run",
        GEMM,
        "float32(self.scales[panel, run // self.layout.runs_in_group, j])",
        "float32(self.scales[panel, run % self.layout.groups, j])",
        "groups of more inputs than a run has",
    ),
    Mutant(
        "tvm_zero_point_forgotten_in_a_row_alone",
        GEMM,
        "-total if ZERO_POINTS else -total * T.float32(layout.zero)",
        "-total",
        "zero points in the product of one row",
    ),
    Mutant(
        "tvm_rows_looked_up_by_the_first_scale",
        GEMM,
        "weight.weight_at(panel, w // layout.words_in_run, w, i, j)",
        "weight.weight_at(panel, 0, w, i, j)",
        "tying × quantisation (vllm#52147)",
    ),
    Mutant(
        "tvm_padding_read_as_inputs",
        PANELS,
        "return k, (offset < self.group) & (k < self.inputs)",
        "return k, k < self.inputs",
        "ragged groups",
    ),
    Mutant(
        "tvm_order_ignored",
        WEIGHT,
        "lambda row, k: x[row, order[k]]",
        "lambda row, k: x[row, k]",
        "g_idx ignored",
    ),
    Mutant(
        "tvm_block_rows_swapped",
        f"{TVM}/runtime/weights.py",
        'scales = np.repeat(scales, matrix.format["block"][0], axis=0)[: matrix.shape[0]]',
        'scales = np.tile(scales, (matrix.format["block"][0], 1))[: matrix.shape[0]]',
        "a scale is of neighbouring rows",
    ),
    Mutant(
        "tvm_activations_not_rounded",
        WEIGHT,
        "x = round_activations(x, self.layout.group)",
        "x = x.astype('float32')",
        "activations are rounded as the spec says",
    ),
    Mutant(
        "tvm_activations_of_another_e4m3",
        E4M3,
        "LARGEST = 448.0",
        "LARGEST = 240.0",
        "e4m3fn and e4m3fnuz",
    ),
    Mutant(
        "tvm_activations_cut_off",
        E4M3,
        "to_nearest = bits + T.int32(0x7FFFF) + T.bitwise_and(T.shift_right(bits, T.int32(20)), T.int32(1))",
        "to_nearest = bits",
        "to the nearest",
    ),
    # -------------------------------------------------------------------------------------- Triton, PyTorch's path
    Mutant(
        "triton_nibbles_swapped",
        INT_MATRIX,
        "return (lower | upper << 4).flatten(1)",
        "return (upper | lower << 4).flatten(1)",
        "nibble order",
    ),
    Mutant(
        "triton_zero_point_off_by_one",
        INT_MATRIX,
        'zero=8 + 16 * 8 if BITS == "4" else 128',
        'zero=7 + 16 * 8 if BITS == "4" else 127',
        "zero point off by one",
    ),
    Mutant(
        "triton_scale_unused",
        INT_LINEAR,
        "return sums.mul_(weight.scales[tiles].unsqueeze(1)).sum(2)",
        "return sums.sum(2)",
        "scale unused",
    ),
    Mutant(
        "triton_zero_point_above_the_middle",
        INT_LINEAR,
        "(weight.zeros[tiles].float() - MIDDLE).unsqueeze(1)",
        "weight.zeros[tiles].float().unsqueeze(1)",
        "zero points count from the middle",
    ),
    Mutant(
        "triton_scales_of_the_first_tile",
        INT_LINEAR,
        "above.mul_(weight.scales[i].unsqueeze(1))",
        "above.mul_(weight.scales[0].unsqueeze(1))",
        "scale of the wrong rows",
    ),
    Mutant(
        "triton_order_ignored",
        INT_LINEAR,
        "x = x[:, weight.order]",
        "x = x.contiguous()",
        "g_idx ignored",
    ),
    Mutant(
        "triton_embeddings_by_swapped_nibbles",
        INT_MATRIX,
        "torch.cat([rows & 15, rows >> 4], dim=2)",
        "torch.cat([rows >> 4, rows & 15], dim=2)",
        "tying × quantisation (vllm#52147)",
    ),
    Mutant(
        "triton_block_rows_reversed",
        FP8_LINEAR,
        "_spread(256 * weight.scales, weight)",
        "_spread(256 * weight.scales.flip(0), weight)",
        "a block's scale is of its rows",
    ),
    Mutant(
        "triton_scale_inv_divides",
        FP8_LINEAR,
        "_spread(256 * weight.scales, weight)",
        "_spread(256 / weight.scales, weight)",
        "weight_scale_inv multiplies",
    ),
    Mutant(
        "triton_activations_of_one_scale",
        FP8_LINEAR,
        "scales = grouped.abs().amax(2) / 448",
        "scales = grouped.abs().amax((1, 2), keepdim=True)[:, :, 0].expand(n, groups) / 448",
        "the scale of activations is a group's",
    ),
    Mutant(
        "triton_activations_of_another_e4m3",
        FP8_LINEAR,
        "scales = grouped.abs().amax(2) / 448",
        "scales = grouped.abs().amax(2) / 240",
        "e4m3fn and e4m3fnuz",
    ),
    Mutant(
        "triton_activations_not_rounded",
        FP8_LINEAR,
        "x = decoded * scales if ROW_SCALES else decoded * _spread(scales, weight)",
        "x = x.float()",
        "activations are rounded as the spec says",
    ),
    # ---------------------------------------------------------------------------------- Triton, in the interpreter
    Mutant(
        "kernel_matvec_nibbles_swapped",
        INT_LINEAR,
        "acc += (_above(qweight & 15, zero) * x + _above(qweight >> 4, zero) * upper_x) * scale",
        "acc += (_above(qweight >> 4, zero) * x + _above(qweight & 15, zero) * upper_x) * scale",
        "nibble order",
        interpreted=True,
    ),
    Mutant(
        "kernel_matmul_scale_of_the_first_group",
        INT_LINEAR,
        "acc += sums * tl.load(scales_ptr + first_group + g).to(tl.float32)[None, :]",
        "acc += sums * tl.load(scales_ptr + first_group).to(tl.float32)[None, :]",
        "scale of the wrong group",
        interpreted=True,
    ),
    Mutant(
        "kernel_matmul_zero_point_of_the_first_group",
        INT_LINEAR,
        "zero = tl.load(zeros_ptr + first_group + g)",
        "zero = tl.load(zeros_ptr + first_group)",
        "zero point of the wrong group",
        interpreted=True,
    ),
    Mutant(
        "kernel_matmul_beyond_a_group",
        INT_LINEAR,
        "inside = (WIDTH + j < GROUP_SIZE) & (WIDTH + k < in_features)",
        "inside = WIDTH + k < in_features",
        "odd groups are ragged in their bytes",
        interpreted=True,
    ),
    Mutant(
        "kernel_matmul_block_of_the_first_rows",
        FP8_LINEAR,
        "scale_ptrs = scales_ptr + row_n // HEIGHT * groups",
        "scale_ptrs = scales_ptr + row_n * 0",
        "a block's scale is of its rows",
        interpreted=True,
    ),
    Mutant(
        "kernel_matvec_block_columns_swapped",
        FP8_LINEAR,
        "scale_ptrs = scales_ptr + (row // HEIGHT)[:, None] * groups + g[None, :]",
        "scale_ptrs = scales_ptr + (row // HEIGHT)[:, None] * groups + (groups - 1 - g)[None, :]",
        "a block's scale is of its inputs",
        interpreted=True,
    ),
    Mutant(
        "kernel_activations_of_another_e4m3",
        FP8_LINEAR,
        "scale = tl.div_rn(tl.max(tl.abs(x), 0), 448.0)",
        "scale = tl.div_rn(tl.max(tl.abs(x), 0), 240.0)",
        "e4m3fn and e4m3fnuz",
        interpreted=True,
    ),
)
