"""Planted mistakes in tensor parallelism: who has which rows and columns, and what ranks do together."""

from __future__ import annotations

from mutant import LOWER, QUANTIZED, RUNTIME, SHARD, SHARES, TRITON, TVM, Mutant

CHECKPOINT = f"{RUNTIME}/checkpoint.py"
CONFIG = "qwenspec/backend/templates/config.py.jinja"
TRITON_RANKS = f"{TRITON}/runtime/parallel.py"
TRITON_WEIGHTS = f"{TRITON}/runtime/weights.py"
TVM_RANKS = f"{TVM}/runtime/parallel.py"
TVM_COLLECTIVES = f"{TVM}/kernels/collectives.py"
FIRST_ALONE = "bias_shard = Shard.COLUMN if shard is Shard.COLUMN else Shard.FIRST"
TVM_ATTENTION_SUM = "return all_reduce(out, self.degree)"
TVM_MLP_SUM = "return all_reduce(self.down_proj(act_and_mul(gate_up)), self.degree)"
TRITON_ATTENTION_SUM = "return all_reduce(self.o_proj(out), self.ranks)"
TRITON_MLP_SUM = "return all_reduce(self.down_proj(act_and_mul(gate_up)), self.ranks)"

PARALLEL_MUTANTS = (
    # ------------------------------------------------------------------------------------------------ the plan
    Mutant(
        "o_bias_on_every_rank",
        LOWER,
        FIRST_ALONE,
        f'{FIRST_ALONE}\n        bias_shard = Shard.REPLICATE if name.endswith("o_proj") else bias_shard',
        "a row-parallel bias is added once (text-generation-inference#1036)",
    ),
    Mutant(
        "down_bias_on_every_rank",
        LOWER,
        FIRST_ALONE,
        f'{FIRST_ALONE}\n        bias_shard = Shard.REPLICATE if name.endswith("down_proj") else bias_shard',
        "a row-parallel bias is added once (text-generation-inference#1036)",
    ),
    Mutant(
        "row_bias_sharded",
        LOWER,
        FIRST_ALONE,
        "bias_shard = Shard.COLUMN",
        "a row-parallel bias is whole, added once (text-generation-inference#1036)",
    ),
    Mutant(
        "row_parallel_split_by_rows",
        SHARD,
        "return replace(whole, columns=self._inputs(param))",
        "return replace(whole, rows=(shares.Part(param.shape[0], 1, 0),))",
        "row-parallel products are split by input features",
    ),
    Mutant(
        "norms_sharded_by_width",
        SHARD,
        "case Shard.REPLICATE:\n                return whole",
        "case Shard.REPLICATE:\n                return replace(whole, rows=(shares.Part(param.shape[0], 1, 0),))",
        "QK-norm weights are of a head, whatever the degree (sglang#20967)",
    ),
    Mutant(
        "fused_matrices_split_as_one",
        SHARD,
        "return replace(whole, rows=tuple(map(self._part, param.parts)))",
        "return replace(whole, rows=(shares.Part(param.shape[0], 1, 0),))",
        "each part of a fused matrix is split on its own (vllm#41021)",
    ),
    Mutant(
        "mlp_cuts_groups",
        SHARD,
        "return math.lcm(*units)",
        "return 1",
        "what shares a scale stays together",
    ),
    Mutant(
        "heads_of_attention_inputs_by_width",
        SHARD,
        "return _heads(self.model, self.model.layers[0].mixer.num_heads)",
        "return shares.Part(param.shape[1], self.model.layers[0].mixer.num_heads + 1, 0)",
        "o_proj reads whole heads",
    ),
    # ----------------------------------------------------------------------------------------- rows and columns
    Mutant(
        "kv_head_of_another_rank",
        SHARES,
        "head = (rank * slots + slot) * readers // self.readers",
        "head = (rank * slots + slot) % (self.size // self.unit)",
        "kv × tp: replicated KV heads (transformers#48307, torchtitan#2577)",
    ),
    Mutant(
        "kv_heads_always_shared_evenly",
        SHARES,
        "head = (rank * slots + slot) * readers // self.readers",
        "head = rank * slots + slot",
        "fewer KV heads than ranks (transformers#48307, sglang#20967)",
    ),
    Mutant(
        "slots_with_too_many_readers",
        SHARES,
        "readers = math.gcd(queries, self.readers)",
        "readers = min(queries, self.readers)",
        "neither number divides the other: a rank begins in the middle of a KV head's readers",
    ),
    Mutant(
        "uneven_heads_accepted",
        SHARES,
        "if part.readers == 1 and part.size // part.unit % degree:",
        "if part.readers == 1 and part.size // part.unit < degree:",
        "an illegal degree is refused before anything runs (vllm#13640, torchtitan#2577)",
    ),
    Mutant(
        "vocabulary_rounded_down",
        SHARES,
        "return -(-units // degree) * self.unit if degree > 1 else self.size",
        "return units // degree * self.unit",
        "the vocabulary is padded, never cut (QwenLM/Qwen3#1567)",
    ),
    Mutant(
        "shares_off_by_one",
        SHARES,
        "yield range(min(rank * share, self.size), min((rank + 1) * share, self.size))",
        "yield range(min(rank * (share - 1), self.size), min(rank * (share - 1) + share, self.size))",
        "where a rank's vocabulary begins",
    ),
    Mutant(
        "row_bias_on_no_rank",
        SHARES,
        "if rank == 0 or not self.first else []",
        "if degree == 1 or not self.first else []",
        "a row-parallel bias is added once",
    ),
    Mutant(
        "parts_begin_after_a_share",
        SHARES,
        "start, at = start + part.size, at + part.share(degree)",
        "start, at = start + part.share(degree), at + part.share(degree)",
        "each part of a fused matrix is split on its own (vllm#41021)",
    ),
    Mutant(
        "second_part_after_the_whole_first",
        SHARES,
        "filled = at\n            for held",
        "filled = start\n            for held",
        "parts of a rank's share lie one below the other",
    ),
    Mutant(
        "columns_of_another_rank",
        SHARES,
        "held = list(self.columns.held(degree, rank))",
        "held = list(self.columns.held(degree, degree - 1 - rank))",
        "a rank's inputs are what it computes",
    ),
    Mutant(
        "neighbours_joined_wherever_they_go",
        SHARES,
        "if last and piece.start == last.stop and piece.at == last.at + last.stop - last.start:",
        "if last and piece.start <= last.stop:",
        "a KV head that is twice on a rank is read twice",
    ),
    Mutant(
        "rows_of_all_sources_at_the_first",
        SHARES,
        "piece.at + start - piece.start)",
        "piece.at)",
        "a rank's rows may lie in several tensors",
    ),
    Mutant(
        "config_rounds_the_vocabulary_down",
        CONFIG,
        "vocab_size=-(-self.vocab_size // degree),",
        "vocab_size=self.vocab_size // degree,",
        "the vocabulary is padded, never cut (QwenLM/Qwen3#1567)",
    ),
    # ---------------------------------------------------------------------------------------------- the reading
    Mutant(
        "first_columns_on_every_rank",
        CHECKPOINT,
        "index = (slice(columns.start, columns.stop),)",
        "index = (slice(0, columns.stop - columns.start),)",
        "each rank reads its own columns",
    ),
    Mutant(
        "rows_where_the_checkpoint_has_them",
        CHECKPOINT,
        "yield piece.at + start - piece.start, tensors.get_slice",
        "yield start, tensors.get_slice",
        "a row's place in a rank's share is not that in the whole",
    ),
    Mutant(
        "first_groups_on_every_rank",
        QUANTIZED,
        "self._groups(slice(0, self.shape[1])), self._groups(self.columns)",
        "self._groups(slice(0, self.shape[1])), self._groups(slice(0, self.columns.stop - self.columns.start))",
        "scales and zero points go with their columns",
    ),
    Mutant(
        "zero_points_of_the_first_groups",
        QUANTIZED,
        'return _nibbles(self._read(source, "qzeros", groups, _blocks(rows, 8))).T[_within(rows, 8)]',
        "groups = slice(0, groups.stop - groups.start)\n"
        '                return _nibbles(self._read(source, "qzeros", groups, _blocks(rows, 8))).T[_within(rows, 8)]',
        "zero points go with their columns",
    ),
    Mutant(
        "scales_of_the_first_rows",
        QUANTIZED,
        "values = read(source, _blocks(slice(piece.start, piece.stop), height), groups)",
        "values = read(source, _blocks(slice(0, piece.stop - piece.start), height), groups)",
        "scales go with their rows",
    ),
    Mutant(
        "scales_one_below_the_other",
        QUANTIZED,
        "found[piece.at // height :][: len(values), : values.shape[1]] = values",
        "rows = found[piece.start // height :][: len(values)]\n"
        "            rows[:, : values.shape[1]] = values[: len(rows)]",
        "a scale's place in a rank's share is not that in the whole",
    ),
    Mutant(
        "quantised_columns_of_the_first_rank",
        QUANTIZED,
        "columns = self.columns\n",
        "columns = slice(0, self.columns.stop - self.columns.start)\n",
        "each rank reads its own columns",
    ),
    # ------------------------------------------------------------------------------------------------- Triton
    Mutant(
        "triton_attention_not_summed",
        f"{TRITON}/templates/attention.py.jinja",
        TRITON_ATTENTION_SUM,
        "return self.o_proj(out)",
        "one all-reduce after attention",
    ),
    Mutant(
        "triton_attention_summed_twice",
        f"{TRITON}/templates/attention.py.jinja",
        TRITON_ATTENTION_SUM,
        "return all_reduce(all_reduce(self.o_proj(out), self.ranks), self.ranks)",
        "one all-reduce after attention",
    ),
    Mutant(
        "triton_mlp_not_summed",
        f"{TRITON}/templates/layers.py.jinja",
        TRITON_MLP_SUM,
        "return self.down_proj(act_and_mul(gate_up))",
        "one all-reduce after the MLP",
    ),
    Mutant(
        "triton_mlp_summed_twice",
        f"{TRITON}/templates/layers.py.jinja",
        TRITON_MLP_SUM,
        "return all_reduce(all_reduce(self.down_proj(act_and_mul(gate_up)), self.ranks), self.ranks)",
        "one all-reduce after the MLP",
    ),
    Mutant(
        "triton_embeddings_of_other_ranks",
        TRITON_RANKS,
        "return all_reduce(x.masked_fill(elsewhere[:, None], 0), ranks)",
        "return all_reduce(x, ranks)",
        "ids of other ranks are zeros",
    ),
    Mutant(
        "triton_embedding_rows_rounded_down",
        TRITON_RANKS,
        "rows = -(-vocab_size // ranks.size)",
        "rows = vocab_size // ranks.size",
        "where a rank's vocabulary begins",
    ),
    Mutant(
        "triton_logits_in_another_order",
        TRITON_RANKS,
        "torch.cat(shares, dim=1)",
        "torch.cat(shares[::-1], dim=1)",
        "logits lie in the ranks' order",
    ),
    Mutant(
        "triton_padding_in_the_logits",
        TRITON_RANKS,
        "[:, :vocab_size]",
        "",
        "tokens that are not there (QwenLM/Qwen3#1567)",
    ),
    Mutant(
        "triton_padding_is_not_zero",
        TRITON_WEIGHTS,
        "new = torch.empty if parameter.degree == 1 else torch.zeros",
        "new = torch.empty if parameter.degree == 1 else torch.ones",
        "what a rank has no rows or columns for is zeros",
    ),
    Mutant(
        "triton_cache_of_all_heads",
        f"{TRITON}/templates/contract.py.jinja",
        "num_kv_heads=self.share.num_key_value_heads,",
        "num_kv_heads=self.config.num_key_value_heads,",
        "the cache has a rank's heads",
    ),
    # ---------------------------------------------------------------------------------------------------- TVM
    Mutant(
        "tvm_attention_not_summed",
        f"{TVM}/templates/attention.py.jinja",
        TVM_ATTENTION_SUM,
        "return out",
        "one all-reduce after attention",
    ),
    Mutant(
        "tvm_attention_summed_twice",
        f"{TVM}/templates/attention.py.jinja",
        TVM_ATTENTION_SUM,
        "return all_reduce(all_reduce(out, self.degree), self.degree)",
        "one all-reduce after attention",
    ),
    Mutant(
        "tvm_mlp_not_summed",
        f"{TVM}/templates/layers.py.jinja",
        TVM_MLP_SUM,
        "return self.down_proj(act_and_mul(gate_up))",
        "one all-reduce after the MLP",
    ),
    Mutant(
        "tvm_mlp_summed_twice",
        f"{TVM}/templates/layers.py.jinja",
        TVM_MLP_SUM,
        "return all_reduce(all_reduce(self.down_proj(act_and_mul(gate_up)), self.degree), self.degree)",
        "one all-reduce after the MLP",
    ),
    Mutant(
        "tvm_sum_of_one_rank",
        TVM_RANKS,
        "dist.all_reduce(from_dlpack(out))",
        "pass",
        "the sum is that of all ranks",
    ),
    Mutant(
        "tvm_embeddings_of_other_ranks",
        TVM_COLLECTIVES,
        "tirx.all(row >= 0, row < rows), x[i, j]",
        "row < rows, x[i, j]",
        "ids of other ranks are zeros",
    ),
    Mutant(
        "tvm_embedding_rows_rounded_down",
        f"{TVM}/runtime/engine.py",
        "first_token = ranks.rank * Config().share(ranks.size).vocab_size",
        "first_token = ranks.rank * (Config().vocab_size // ranks.size)",
        "where a rank's vocabulary begins",
    ),
    Mutant(
        "tvm_logits_in_another_order",
        TVM_COLLECTIVES,
        "op.reshape(op.permute_dims(by_rank, [1, 0, 2]), (m, degree * share))",
        "op.reshape(by_rank, (m, degree * share))",
        "logits lie in the ranks' order, row by row",
    ),
    Mutant(
        "tvm_padding_in_the_logits",
        TVM_COLLECTIVES,
        'return rows if vocab_size == degree * share else op.tensor_expr_op(_cut_te, "cut", [rows, vocab_size])',
        "return rows",
        "tokens that are not there (QwenLM/Qwen3#1567)",
    ),
    Mutant(
        "tvm_cache_of_all_heads",
        f"{TVM}/templates/contract.py.jinja",
        "num_kv_heads=self.share.num_key_value_heads,",
        "num_kv_heads=self.config.num_key_value_heads,",
        "the cache has a rank's heads",
    ),
)
