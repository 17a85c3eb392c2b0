"""Planted mistakes in what is told and judged round the maths: configs and specs, written and read; diagnostics;
rounding; and the proof itself, which must not be satisfied too easily."""

from __future__ import annotations

from mutant import Mutant

HF = "qwenspec/hf"
VERIFY = "qwenspec/verify"
ROUNDING = "qwenspec/convert/rounding.py"
PARTIAL = "qwenspec/convert/partial.py"
EXPLAIN = "qwenspec/spec/explain.py"

CLASSES = ("tests/unit/test_hf_classes.py",)
NUMBERS = ("tests/unit/test_hf_writer.py",)
CHANGES = ("tests/unit/test_diagnostics_of_changes.py",)
ROUNDED = ("tests/unit/test_convert_rounding.py",)
DISK = ("tests/unit/test_convert_disk.py",)
METRICS = ("tests/unit/test_verify_metrics.py",)
SESSION = ("tests/unit/test_verify_session.py",)
MACHINE = ("tests/unit/test_verify_machine.py",)
LEDGER = ("tests/unit/test_verify_ledger.py",)

DOOR_MUTANTS = (
    # ------------------------------------------------------------------------------------- config.json, both ways
    Mutant(
        "absent_tie_is_true",
        f"{HF}/importer.py",
        'config.flag("tie_word_embeddings", default=False)',
        'config.flag("tie_word_embeddings", default=True)',
        "the base class's default is not the model's",
        tests=CLASSES,
    ),
    Mutant(
        "dtype_of_absent_is_float32",
        f"{HF}/importer.py",
        'released.")\n    return "bfloat16"',
        'released.")\n    return "float32"',
        "a config without a dtype",
        tests=CLASSES,
    ),
    Mutant(
        "window_dropped_on_export",
        f"{HF}/qwen2.py",
        '"sliding_window": window.window if window and slides else None,',
        '"sliding_window": None,',
        "layers slide by nothing",
        tests=CLASSES,
    ),
    Mutant(
        "sliding_layer_early",
        f"{HF}/qwen2.py",
        "kinds = [rope.LAYER_TYPES[i >= first] for i in range(num_layers)]",
        "kinds = [rope.LAYER_TYPES[i + 1 >= first] for i in range(num_layers)]",
        "max_window_layers is the first that slides (transformers#35896)",
        tests=CLASSES,
    ),
    Mutant(
        "window_on_although_off",
        f"{HF}/qwen2.py",
        'used = config.flag("use_sliding_window") if "use_sliding_window" in config else False',
        'used = config.flag("use_sliding_window") if "use_sliding_window" in config else True',
        "an absent use_sliding_window is off (vllm#15705)",
        tests=CLASSES,
    ),
    Mutant(
        "layer_types_of_export_swapped",
        f"{HF}/qwen2.py",
        'keys["layer_types"] = [rope.LAYER_TYPES[i in slides] for i in range(count)]',
        'keys["layer_types"] = [rope.LAYER_TYPES[i not in slides] for i in range(count)]',
        "the other layers slide",
        tests=CLASSES,
    ),
    Mutant(
        "qwen3_head_dim_from_hidden",
        f"{HF}/qwen2.py",
        "    return QWEN3_HEAD_DIM\n",
        "    return None\n",
        "Qwen3's default is 128, not hidden / heads",
        tests=CLASSES,
    ),
    Mutant(
        "attention_bias_without_output",
        f"{HF}/qwen2.py",
        '"output": bias if qwen3 else False}',
        '"output": False}',
        "Qwen3's attention_bias is of o_proj too",
        tests=CLASSES,
    ),
    Mutant(
        "v5_dtype_by_its_old_name",
        f"{HF}/exporter.py",
        '("dtype" if form == "v5" else "torch_dtype")',
        '("torch_dtype" if form == "v5" else "torch_dtype")',
        "transformers 5 writes `dtype`",
        tests=CLASSES,
    ),
    Mutant(
        "v5_rope_outside_its_parameters",
        f"{HF}/rope.py",
        'return {"rope_parameters": {"rope_theta": rope.theta, **fields}}',
        'return {"rope_parameters": {**fields}, "rope_theta": rope.theta}',
        "transformers 5 has theta inside",
        tests=CLASSES,
    ),
    Mutant(
        "original_length_not_assumed",
        f"{HF}/rope.py",
        "            fields[ORIGINAL] = max_position_embeddings\n",
        "            fields[ORIGINAL] = max_position_embeddings // 2\n",
        "without an original length it is max_position_embeddings",
        tests=CLASSES,
    ),
    Mutant(
        "scaling_by_its_old_name_ignored",
        f"{HF}/rope.py",
        'new, old = scaling.get("rope_type"), scaling.get("type")',
        'new, old = scaling.get("rope_type"), None and scaling.get("type")',
        "`type` was the name until transformers 4.45",
        tests=CLASSES,
    ),
    # -------------------------------------------------------------------------------------------- written numbers
    Mutant(
        "exponent_without_a_sign",
        f"{HF}/writer.py",
        "e{int(power):+d}",
        "e{int(power)}",
        "1.0e22 is text in YAML 1.1",
        tests=NUMBERS,
    ),
    Mutant(
        "exponent_without_a_point",
        f"{HF}/writer.py",
        "{mantissa if '.' in mantissa else mantissa + '.0'}e",
        "{mantissa}e",
        "1e-06 is text in YAML 1.1",
        tests=NUMBERS,
    ),
    Mutant(
        "words_that_yaml_knows_unquoted",
        f"{HF}/writer.py",
        "if not _PLAIN.fullmatch(value) or value.lower() in _WORDS:",
        "if not _PLAIN.fullmatch(value):",
        "a family called `no` is false in YAML 1.1",
        tests=NUMBERS,
    ),
    # ------------------------------------------------------------------------------------------------ diagnostics
    Mutant(
        "unknown_key_at_its_mapping",
        EXPLAIN,
        "    return parent.entries[str(path[-1])].key\n",
        "    return parent.location\n",
        "the place of a mistake is the line to change",
        tests=CHANGES,
    ),
    Mutant(
        "one_mistake_hides_the_next",
        EXPLAIN,
        "found.setdefault((at.path, absent),",
        "found.setdefault((at.path[:1], absent),",
        "all mistakes are told at once",
        tests=("tests/unit/test_spec_load.py", *CHANGES),
    ),
    Mutant(
        "control_characters_in_messages",
        "qwenspec/diagnostics.py",
        'return "".join(c if _visible(c) else c.encode("unicode_escape").decode("ascii") for c in text)',
        "return text",
        "a file's escape sequences act on the terminal",
        tests=CHANGES,
    ),
    Mutant(
        "control_characters_in_shown_lines",
        "qwenspec/diagnostics.py",
        'out += char if char.isprintable() else "\\ufffd"',
        "out += char",
        "a file's escape sequences act on the terminal",
        tests=CHANGES,
    ),
    # --------------------------------------------------------------------------------------------------- rounding
    Mutant(
        "rounded_down",
        ROUNDING,
        "q = np.rint(values / _divisors(scales)[:, None])",
        "q = np.floor(values / _divisors(scales)[:, None])",
        "int8 is rounded to nearest",
        tests=ROUNDED,
    ),
    Mutant(
        "scale_by_128",
        ROUNDING,
        "scales = _largest(values) / np.float32(127)",
        "scales = _largest(values) / np.float32(128)",
        "the largest weight must not be clipped",
        tests=ROUNDED,
    ),
    Mutant(
        "largest_without_negatives",
        ROUNDING,
        "np.maximum(values.max(axis=-1), -values.min(axis=-1))",
        "np.maximum(values.max(axis=-1), values.min(axis=-1))",
        "the largest weight may be negative",
        tests=ROUNDED,
    ),
    Mutant(
        "error_of_the_last_piece",
        ROUNDING,
        "        self.squared_error += other.squared_error\n",
        "        self.squared_error = other.squared_error\n",
        "a report that praises",
        tests=ROUNDED,
    ),
    Mutant(
        "config_before_the_weights",
        PARTIAL,
        """        for number, name in enumerate(self.names):
            self._unfinished(number).replace(self.folder / name)
        if len(self.shards) > 1:
            _write(self.folder / INDEX, json.dumps(self._index(), indent=2))
        if config is not None:
            _write(self.folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\\n")
""",
        """        if config is not None:
            _write(self.folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\\n")
        for number, name in enumerate(self.names):
            self._unfinished(number).replace(self.folder / name)
        if len(self.shards) > 1:
            _write(self.folder / INDEX, json.dumps(self._index(), indent=2))
""",
        "a checkpoint that was cut off looks whole",
        tests=DISK,
    ),
    Mutant(
        "lines_of_lost_bytes_are_believed",
        PARTIAL,
        "            if tensor in whole:\n                self.finished[tensor] = error\n",
        "            self.finished[tensor] = error\n",
        "what was lost is not done again",
        tests=("tests/unit/test_convert_interrupted.py",),
    ),
    # ------------------------------------------------------------------------------------------------- comparison
    Mutant(
        "last_row_alone_is_judged",
        f"{VERIFY}/metrics.py",
        "worst = int(errors.argmax())",
        "worst = len(errors) - 1",
        "every position counts",
        tests=METRICS,
    ),
    Mutant(
        "nan_is_equal",
        f"{VERIFY}/metrics.py",
        "errors, cosines = np.full(len(e), np.inf), np.zeros(len(e))",
        "errors, cosines = np.zeros(len(e)), np.zeros(len(e))",
        "what is not finite is as far off as can be",
        tests=METRICS,
    ),
    Mutant(
        "a_near_tie_excuses_all",
        f"{VERIFY}/metrics.py",
        "verdict=Verdict.FAIL if errors[worst] > bound else Verdict.AMBIGUOUS if near_ties else Verdict.PASS,",
        "verdict=Verdict.AMBIGUOUS if near_ties else Verdict.FAIL if errors[worst] > bound else Verdict.PASS,",
        "ambiguous is within the bound",
        tests=METRICS,
    ),
    Mutant(
        "near_ties_pass",
        f"{VERIFY}/metrics.py",
        "else Verdict.AMBIGUOUS if near_ties else Verdict.PASS,",
        "else Verdict.PASS,",
        "another token is chosen, and nobody hears of it",
        tests=METRICS,
    ),
    Mutant(
        "shapes_are_not_compared",
        f"{VERIFY}/metrics.py",
        "if actual.shape != expected.shape:",
        "if len(actual) != len(expected):",
        "one column is broadcast",
        tests=METRICS,
    ),
    Mutant(
        "error_by_the_actual_length",
        f"{VERIFY}/metrics.py",
        "distances, lengths = np.linalg.norm(a - e, axis=-1), np.linalg.norm(e, axis=-1)",
        "distances, lengths = np.linalg.norm(a - e, axis=-1), np.linalg.norm(a, axis=-1) + np.linalg.norm(e, axis=-1)",
        "what is twice too large is off by 1",
        tests=METRICS,
    ),
    Mutant(
        "bound_ten_times_as_wide",
        f"{VERIFY}/tolerances.yaml",
        "      k: 55.0\n      measured: >-\n        634 specs",
        "      k: 550.0\n      measured: >-\n        634 specs",
        "a bound that nothing misses",
        tests=METRICS,
    ),
    Mutant(
        "bound_of_16_bits_twice_as_wide",
        f"{VERIFY}/tolerances.yaml",
        "      k: 7.3\n      measured: >-\n        489 specs",
        "      k: 14.6\n      measured: >-\n        489 specs",
        "a bound that nothing misses",
        tests=METRICS,
    ),
    Mutant(
        "bound_by_depth",
        f"{VERIFY}/metrics.py",
        "return entries[dtype].k * unit * math.sqrt(depth)",
        "return entries[dtype].k * unit * depth",
        "roundings are independent",
        tests=METRICS,
    ),
    Mutant(
        "head_always_widens",
        f"{VERIFY}/metrics.py",
        "if head_dtype and ROUNDING[head_dtype] > unit else 0.0",
        "if head_dtype else 0.0",
        "a wider head rounds nothing more",
        tests=METRICS,
    ),
    # ---------------------------------------------------------------------------------------------------- session
    Mutant(
        "reference_row_shifted",
        f"{VERIFY}/contenders.py",
        'return self.taps(step)["logits"][step.rows]',
        'return self.taps(step)["logits"][[row - 1 for row in step.rows]]',
        "each row has its own expectation",
        tests=SESSION,
    ),
    Mutant(
        "row_of_the_first_token",
        f"{VERIFY}/steps.py",
        "return [end - 1 for end in accumulate(self.lengths)]",
        "return [end - n for end, n in zip(accumulate(self.lengths), self.lengths, strict=True)]",
        "what a prefill returns is of the last token",
        tests=SESSION,
    ),
    Mutant(
        "tokens_without_their_history",
        f"{VERIFY}/contenders.py",
        "                sequence.forward(ids)\n",
        "                sequence.popn(sequence.length)\n                sequence.forward(ids)\n",
        "the reference remembers",
        tests=SESSION,
    ),
    Mutant(
        "packages_not_compared",
        f"{VERIFY}/session.py",
        "return [(name, REFERENCE) for name in others] + list(itertools.combinations(others, 2))",
        "return [(name, REFERENCE) for name in others]",
        "both are near the reference, to either side",
        tests=SESSION,
    ),
    Mutant(
        "last_contender_skipped",
        f"{VERIFY}/session.py",
        "return [(name, REFERENCE) for name in others] + list(",
        "return [(name, REFERENCE) for name in others[:1]] + list(",
        "a contender that nobody judges",
        tests=SESSION,
    ),
    Mutant(
        "trees_not_compared",
        f"{VERIFY}/session.py",
        "if isinstance(step, Forward):\n            self._compare",
        "if isinstance(step, Forward) and not step.trees:\n            self._compare",
        "token trees have logits",
        tests=SESSION,
    ),
    Mutant(
        "decodes_not_compared",
        f"{VERIFY}/session.py",
        "if isinstance(step, Forward):\n            self._compare",
        'if isinstance(step, Forward) and step.method != "batch_decode":\n            self._compare',
        "every method has logits",
        tests=SESSION,
    ),
    Mutant(
        "one_may_refuse",
        f"{VERIFY}/session.py",
        "if refused and len(refused) < len(packages):",
        "if refused and len(refused) > len(packages):",
        "all are out of pages, or none",
        tests=SESSION,
    ),
    Mutant(
        "refusal_without_eviction",
        f"{VERIFY}/session.py",
        'if self.case.sizes.evicts and "were given back" in str(error):',
        'if "were given back" in str(error):',
        "a cache that keeps all pages must not say so",
        tests=SESSION,
    ),
    Mutant(
        "failures_among_packages_forgiven",
        f"{VERIFY}/session.py",
        "if found.verdict is Verdict.FAIL:",
        "if found.verdict is Verdict.FAIL and pair[1] == REFERENCE:",
        "two backends must agree",
        tests=SESSION,
    ),
    Mutant(
        "comparisons_not_counted",
        f"{VERIFY}/session.py",
        "            self.ledger.compared(pair, case.dtype, found, outputs)\n",
        "",
        "what ran is what is said to have run",
        tests=SESSION,
    ),
    # -------------------------------------------------------------------------------------------------- workloads
    Mutant(
        "lengths_by_chance",
        f"{VERIFY}/machine.py",
        'n = data.draw(some | st.sampled_from(reachable) if reachable else some, "tokens")',
        'n = data.draw(some, "tokens")',
        "mistakes are at the ends of pages and windows",
        tests=MACHINE,
    ),
    Mutant(
        "lengths_never_end_a_page",
        f"{VERIFY}/machine.py",
        "for side in (-1, 0, 1)}\n",
        "for side in (-1, 1)}\n",
        "a page that is just full",
        tests=MACHINE,
    ),
    Mutant(
        "windows_are_no_edge",
        f"{VERIFY}/machine.py",
        "edges |= {window.window} if window else set()",
        "edges |= set()",
        "a window that is just full",
        tests=MACHINE,
    ),
    Mutant(
        "pages_are_not_poisoned",
        f"{VERIFY}/machine.py",
        "        self.do(Poison(self.case.seed))\n",
        "",
        "stale entries that are read are zero, and nothing shows",
        tests=MACHINE,
    ),
    Mutant(
        "lost_pages_are_not_counted",
        f"{VERIFY}/machine.py",
        "            self.do(Restart(self.cache_sizes))\n",
        "            pass\n",
        "a workload ends with all pages free",
        tests=MACHINE,
    ),
    Mutant(
        "a_fork_s_parent_stops",
        f"{VERIFY}/machine.py",
        "self.decode_batch(data, [child, parent])",
        "self.decode_batch(data, [child])",
        "a child writes over its parent's page",
        tests=MACHINE,
    ),
    Mutant(
        "forks_within_pages",
        f"{VERIFY}/machine.py",
        'return data.draw(page_starts | st.integers(0, length), "length")',
        'return data.draw(st.integers(0, length), "length")',
        "a fork where a page begins shares no page that is written",
        tests=MACHINE,
    ),
    Mutant(
        "the_same_tokens_again",
        f"{VERIFY}/machine.py",
        "for i in range(first, self.drawn))",
        "for i in range(n))",
        "a cache that mixes up sequences goes unnoticed",
        tests=MACHINE,
    ),
    Mutant(
        "seed_is_ignored",
        f"{VERIFY}/search.py",
        "hypothesis.seed(seed)(workload(cases, sizes, ledger, count, keep, max_length))",
        "hypothesis.seed(0)(workload(cases, sizes, ledger, count, keep, max_length))",
        "other seeds look elsewhere",
        tests=MACHINE,
    ),
    Mutant(
        "failure_lost",
        f"{VERIFY}/search.py",
        "    except Disagreement as disagreement:\n        return disagreement\n",
        "    except Disagreement:\n        return None\n",
        "a failure that was found is told",
        tests=MACHINE,
    ),
    Mutant(
        "flaky_failure_lost",
        f"{VERIFY}/search.py",
        "        return found[-1]\n",
        "        return None\n",
        "a failure that does not come again is one",
        tests=MACHINE,
    ),
    Mutant(
        "examples_not_counted",
        f"{VERIFY}/search.py",
        "        ledger.example(session.case, features(session.case.spec), session.pairs)\n",
        "",
        "what ran is what is said to have run",
        tests=MACHINE,
    ),
    # ----------------------------------------------------------------------------------------------------- ledger
    Mutant(
        "features_of_anybody",
        f"{VERIFY}/ledger.py",
        "if count and (contender is None or contender in pair)",
        "if count",
        "each backend must have had each feature",
        tests=LEDGER,
    ),
    Mutant(
        "the_last_error_is_the_worst",
        f"{VERIFY}/ledger.py",
        "self.error, self.used = max(self.error, other.error), max(self.used, other.used)",
        "self.error, self.used = other.error, other.used",
        "the worst of all is told",
        tests=LEDGER,
    ),
    Mutant(
        "merged_failures_vanish",
        f"{VERIFY}/ledger.py",
        'for name in ("comparisons", "rows", "passed", "ambiguous", "failed"):',
        'for name in ("comparisons", "rows", "passed", "ambiguous"):',
        "failures in other processes count",
        tests=LEDGER,
    ),
)
