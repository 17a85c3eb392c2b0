"""Planted mistakes in the formats of compressed-tensors, TensorRT Model Optimizer and GPTQModel's rules."""

from __future__ import annotations

from mutant import QUANTIZED, QUANTIZED_IR, Mutant

FP8_LINEAR = "backends/qwenspec_triton/kernels/fp8_linear.py"
LOADING = ("tests/equivalence/test_quantized_loading.py",)
CONFIGS = ("tests/unit/test_hf_formats.py",)
KERNELS = ("tests/backends/kernels/test_quantized_cpu.py",)

FORMATS_MUTANTS = (
    # ------------------------------------------------------------------------------- the numbers, as packages read them
    Mutant(
        "fp8_rows_of_the_first_part",
        QUANTIZED,
        'return _floats(self._read(source, "weight_scale", rows, groups))\n        if PACKING == "fp8":',
        'return _floats(self._read(self.sources[0], "weight_scale", rows, groups))\n        if PACKING == "fp8":',
        "each part of a fused matrix has scales of its own",
        tests=LOADING,
    ),
    Mutant(
        "fp8_scale_of_the_first_part_for_all",
        QUANTIZED,
        '_floats(self._read(source, "weight_scale")))[:, groups]',
        '_floats(self._read(self.sources[0], "weight_scale")))[:, groups]',
        "a tensor's scale is of its rows alone",
        tests=LOADING,
    ),
    Mutant(
        "packed_words_from_the_highest_bits",
        QUANTIZED,
        "np.stack([whole & 15, whole >> 4], axis=-1)",
        "np.stack([whole >> 4, whole & 15], axis=-1)",
        "the first of a word is in its lowest bits",
        tests=LOADING,
    ),
    Mutant(
        "packed_zero_points_along_groups",
        QUANTIZED,
        'return _split(words.T, self.format["bits"]).T[_within(rows, per_word)]',
        'return _split(words, self.format["bits"])[:, : words.shape[1]].repeat(per_word, 0)[_within(rows, per_word)]',
        "a word of zero points is of neighbouring outputs",
        tests=LOADING,
    ),
    Mutant(
        "packed_zero_points_one_more",
        QUANTIZED,
        'return _split(words.T, self.format["bits"]).T[_within(rows, per_word)]',
        'return _split(words.T, self.format["bits"]).T[_within(rows, per_word)] + np.uint8(1)',
        "zero points are less by one in GPTQ's first format alone",
        tests=LOADING,
    ),
    Mutant(
        "packed_scales_in_float16",
        QUANTIZED,
        'if PACKING in ("fp8", "int8", "pack_quantized"):\n            return scales',
        'if PACKING in ("fp8", "int8"):\n            return scales',
        "scales have the model's dtype, which float16 need not hold",
        tests=LOADING,
    ),
    Mutant(
        "parts_with_input_scales_fused",
        QUANTIZED_IR,
        ' | Fp8Format(activations="static")',
        "",
        "each part rounds its inputs with a scale of its own",
        tests=("tests/unit/test_ir_quantized.py",),
    ),
    # ------------------------------------------------------------------------------------------------------- kernels
    Mutant(
        "triton_input_scale_ignored",
        FP8_LINEAR,
        "return encode_torch(x.float() / scale), scale.expand(n, 1)",
        "return encode_torch(x.float()), torch.ones_like(scale).expand(n, 1)",
        "inputs are divided by what the checkpoint has",
        tests=KERNELS,
    ),
    Mutant(
        "triton_rows_not_scaled",
        FP8_LINEAR,
        "torch.cat(outs, dim=1) * (256 * weight.scales.flatten())",
        "torch.cat(outs, dim=1) * (256 * weight.scales[0])",
        "each row has a scale",
        tests=KERNELS,
    ),
    # ------------------------------------------------------------------------------------- which modules, and which key
    Mutant(
        "ignored_by_the_end_of_a_name",
        "qwenspec/hf/compressed_tensors.py",
        "if name in (module, _LINEAR))",
        "if module.endswith(name) or name == _LINEAR)",
        "`ignore` has whole names",
        tests=CONFIGS,
    ),
    Mutant(
        "expressions_match_anywhere",
        "qwenspec/hf/compressed_tensors.py",
        "if pattern and pattern.match(module))",
        "if pattern and pattern.search(module))",
        "an expression matches the beginning of a name",
        tests=CONFIGS,
    ),
    Mutant(
        "the_head_may_be_quantised",
        "qwenspec/hf/compressed_tensors.py",
        "if head in chosen - ignored:",
        "if False:",
        "a quantised head is refused, not read as if it were not",
        tests=CONFIGS,
    ),
    Mutant(
        "the_last_rule_decides",
        "qwenspec/hf/gptq_dynamic.py",
        "for rule, pattern in patterns if pattern.match(module)",
        "for rule, pattern in reversed(patterns) if pattern.match(module)",
        "the first rule that matches decides",
        tests=CONFIGS,
    ),
    Mutant(
        "other_bits_accepted",
        "qwenspec/hf/gptq_dynamic.py",
        "if key in common and (value != common[key]",
        "if key in common and (key == 'bits'",
        "settings of single modules are refused where they differ",
        tests=CONFIGS,
    ),
    Mutant(
        "static_activations_read_as_dynamic",
        "qwenspec/hf/compressed_tensors.py",
        '"dynamic" if dynamic else "static"}',
        '"dynamic"}',
        "a stored scale is another rounding",
        tests=CONFIGS,
    ),
)
