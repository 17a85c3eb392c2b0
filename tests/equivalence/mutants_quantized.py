"""Planted mistakes in quantised weights: what the checkpoint's tensors mean, which are read, and what packages keep."""

from __future__ import annotations

from mutant import LOWER, QUANTIZED, QUANTIZED_IR, Mutant

NODES = "qwenspec/ir/nodes.py"

QUANTIZED_MUTANTS = (
    # ------------------------------------------------------------------------------- the numbers, as packages read them
    Mutant(
        "awq_nibbles_in_order",
        QUANTIZED,
        "NIBBLES = np.array((0, 4, 1, 5, 2, 6, 3, 7))",
        "NIBBLES = np.arange(8)",
        "AWQ's order of nibbles is its own",
    ),
    Mutant(
        "awq_order_inverted",
        QUANTIZED,
        "NIBBLES = np.array((0, 4, 1, 5, 2, 6, 3, 7))",
        "NIBBLES = np.array((0, 2, 4, 6, 1, 3, 5, 7))",
        "where an output is, not which output is there",
    ),
    Mutant(
        "awq_word_of_the_first_rows",
        QUANTIZED,
        'words = self._read(source, "qweight", columns, _blocks(rows, 8))',
        'words = self._read(source, "qweight", columns, _blocks(slice(0, rows.stop - rows.start), 8))',
        "rows that are read later are other rows",
    ),
    Mutant(
        "high_nibble_first",
        QUANTIZED,
        "np.stack([whole & 15, whole >> 4], axis=-1)",
        "np.stack([whole >> 4, whole & 15], axis=-1)",
        "nibble order",
    ),
    Mutant(
        "gptq_v1_read_as_v2",
        QUANTIZED,
        "return points + np.uint8(1)",
        "return points",
        "zero points are stored minus one",
    ),
    Mutant(
        "gptq_v2_read_as_v1",
        QUANTIZED,
        "return points + np.uint8(1)\n            return points\n",
        "return points + np.uint8(1)\n            return points + np.uint8(1)\n",
        "gptq_v2 stores zero points as they are",
    ),
    Mutant(
        "g_idx_ignored",
        QUANTIZED,
        "return values[:, self._order] if ACT_ORDER else values",
        "return values",
        "any order of groups must be honoured",
    ),
    Mutant(
        "g_idx_inverted",
        QUANTIZED,
        'np.argsort(self._read(source, G_IDX), kind="stable").astype(np.int32)',
        'np.argsort(np.argsort(self._read(source, G_IDX), kind="stable")).astype(np.int32)',
        "a permutation and its inverse",
    ),
    Mutant(
        "int8_without_its_middle",
        QUANTIZED,
        "return signed.view(np.uint8) ^ 128",
        "return signed.view(np.uint8)",
        "zero point off",
    ),
    Mutant(
        "scales_of_the_other_part",
        QUANTIZED,
        "scales = self._by_group(self._scales, np.float32)",
        "scales = np.roll(self._by_group(self._scales, np.float32), self.sources[0].rows, 0)",
        "fused matrices keep each part's scales (vllm#41021, #47515)",
    ),
    Mutant(
        "zeros_of_the_other_part",
        QUANTIZED,
        "return self._by_group(self._zeros, np.uint8)",
        "return np.roll(self._by_group(self._zeros, np.uint8), self.sources[0].rows, 0)",
        "fused matrices keep each part's zero points (vllm#41021, #47515)",
    ),
    Mutant(
        "bfloat16_scales_as_float16",
        QUANTIZED,
        "return (array.astype(np.uint32) << 16).view(np.float32)",
        "return array.view(np.float16).astype(np.float32)",
        "weight_scale_inv may be of any float",
    ),
    Mutant(
        "parts_from_the_first_row",
        QUANTIZED,
        "yield piece.at + start - piece.start, np.ascontiguousarray(whole)",
        "yield start, np.ascontiguousarray(whole)",
        "parts lie one below the other",
    ),
    Mutant(
        "other_zero_points_taken_for_the_middle",
        QUANTIZED,
        'if (points != 1 << (self.format["bits"] - 1)).any():',
        "if False:",
        "a file that the spec does not describe is refused",
    ),
    Mutant(
        "uneven_groups_accepted",
        QUANTIZED,
        "if not np.array_equal(np.sort(self._read(source, G_IDX)), np.arange(inputs) // size):",
        "if False:",
        "a file that packages cannot run is refused",
    ),
    Mutant(
        "order_of_groups_not_looked_at",
        QUANTIZED,
        "elif groups in self.stored and (self._read(source, G_IDX) != np.arange(inputs) // size).any():",
        "elif False:",
        "a file that the spec does not describe is refused",
    ),
    Mutant(
        "scales_rounded_to_float16",
        QUANTIZED,
        "if not np.array_equal(rounded, scales):",
        "if False:",
        "scales are kept or refused, never rounded",
    ),
    # ------------------------------------------------------------------------------- what is stored how, and where
    Mutant(
        "skip_ignored",
        LOWER,
        "for module, format in found.items() if module not in quantization.skip}",
        "for module, format in found.items()}",
        "a wrong prefix bypasses per-module quantisation (vllm#11795, #51495, sglang#37848)",
    ),
    Mutant(
        "quantised_head_of_a_tied_model_is_apart",
        LOWER,
        "found[spec.layout.embedding if arch.tie_word_embeddings else spec.layout.lm_head] = head",
        "found[spec.layout.lm_head] = head",
        "tying × quantisation (vllm#52147)",
    ),
    Mutant(
        "untied_embedding_quantised_for_the_head",
        LOWER,
        "found[spec.layout.embedding if arch.tie_word_embeddings else spec.layout.lm_head] = head",
        "found[spec.layout.embedding] = head",
        "tying × quantisation (vllm#52147)",
    ),
    Mutant(
        "cut_blocks_fused",
        QUANTIZED_IR,
        "return all(source.rows % height == 0 for source in itertools.islice(sources, len(sources) - 1))",
        "return True",
        "FP8 block rows must be checked for each part (vllm#54178, #52997, #44763)",
    ),
    Mutant(
        "parts_with_orders_fused",
        QUANTIZED_IR,
        "IntFormat(act_order=True) | ",
        "",
        "each part has an order of its own",
    ),
    Mutant(
        "one_group_fewer_at_a_ragged_edge",
        NODES,
        "return -(-inputs // self.block[1]) if self.block[1] else 1",
        "return max(1, inputs // self.block[1]) if self.block[1] else 1",
        "blocks at the edges are smaller",
    ),
    Mutant(
        "int4_head_in_int8",
        QUANTIZED_IR,
        'return INT8_PER_ROW if quantization.head == "int8" else weight_format(quantization)',
        "return INT8_PER_ROW",
        "a head has a format of its own",
    ),
)
