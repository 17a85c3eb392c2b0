"""Keys of config.json that are not read because they cannot change what the model computes."""

from __future__ import annotations

_TRAINING = "used in training only"
_RECORD = "a record of how the file was made"
_CALL = "what the Python call returns, not what it computes"
_TOKENS = "token ids: generation reads them from generation_config.json and the tokenizer"
_SAMPLING = "a default for sampling"
_KERNEL = "chooses between kernels that compute the same"
_CLASS = "names Python classes"
_LABELS = "labels of a classification head"

HARMLESS: dict[str, str] = {
    "_attn_implementation": _KERNEL,
    "_attn_implementation_autoset": _KERNEL,
    "_commit_hash": _RECORD,
    "_name_or_path": _RECORD,
    "attention_dropout": _TRAINING,
    "attn_dropout_prob": _TRAINING,
    "attn_implementation": _KERNEL,
    "attn_pdrop": _TRAINING,
    "auto_map": _CLASS,
    "bias_dropout_fusion": _TRAINING,
    "bos_token_id": _TOKENS,
    "chat_format": _TOKENS,
    "chunk_size_feed_forward": "splits the feed-forward in time; the sums are the same",
    "decoder_start_token_id": _TOKENS,
    "do_sample": _SAMPLING,
    "embd_pdrop": _TRAINING,
    "emb_dropout_prob": _TRAINING,
    "eos_token_id": _TOKENS,
    "gradient_checkpointing": _TRAINING,
    "id2label": _LABELS,
    "initializer_range": _TRAINING,
    "label2id": _LABELS,
    "max_new_tokens": _SAMPLING,
    "num_labels": _LABELS,
    "onnx_safe": _KERNEL,
    "output_attentions": _CALL,
    "output_hidden_states": _CALL,
    "pad_token_id": _TOKENS,
    "problem_type": _LABELS,
    "repetition_penalty": _SAMPLING,
    "resid_pdrop": _TRAINING,
    "return_dict": _CALL,
    "sep_token_id": _TOKENS,
    "softmax_in_fp32": "the softmax is computed in float32 in any case",
    "temperature": _SAMPLING,
    "tokenizer_class": _CLASS,
    "tokenizer_type": _CLASS,
    "top_k": _SAMPLING,
    "top_p": _SAMPLING,
    "torchscript": _CALL,
    "transformers_version": _RECORD,
    "unsloth_fixed": _RECORD,
    "unsloth_version": _RECORD,
    "use_cache": _CALL,
    "use_cache_kernel": _KERNEL,
    "use_flash_attn": _KERNEL,
}
