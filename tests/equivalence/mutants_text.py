"""Planted mistakes between text and tokens: tokenizers, chat templates, stop strings, sampling, the command."""

from __future__ import annotations

from mutant import RUNTIME, TRITON, TVM, Mutant

CHAT = f"{RUNTIME}/chat.py"
CONVERSATION = f"{RUNTIME}/conversation.py"
DETOKENIZER = f"{RUNTIME}/detokenizer.py"
GENERATION = f"{RUNTIME}/generation.py"
TEXT = f"{RUNTIME}/text.py"
TOKENIZER = f"{RUNTIME}/tokenizer.py"
TRITON_GENERATE = f"{TRITON}/runtime/generate.py"
TVM_GENERATE = f"{TVM}/runtime/generate.py"

IN_CHAT = ("tests/unit/test_text_chat.py",)
IN_CONVERSATION = ("tests/unit/test_text_conversation.py",)
IN_DETOKENIZER = ("tests/unit/test_text_detokenizer.py",)
IN_SAMPLING = ("tests/unit/test_text_sampling.py",)
IN_TOKENIZER = ("tests/unit/test_text_tokenizer.py",)

SAMPLING_MUTANTS = (
    Mutant(
        "triton_temperature_after_top_p",
        TRITON_GENERATE,
        "ordered, order = logits.sort(descending=True)",
        "ordered, order = (logits * sampling.temperature).sort(descending=True)",
        "what is kept depends on the temperature",
        tests=IN_SAMPLING,
    ),
    Mutant(
        "tvm_temperature_after_top_p",
        TVM_GENERATE,
        "        likeliest = softmax(np.take_along_axis(logits, order, -1))\n",
        "        likeliest = softmax(np.take_along_axis(logits * np.float32(sampling.temperature), order, -1))\n",
        "what is kept depends on the temperature",
        tests=IN_SAMPLING,
    ),
    Mutant(
        "triton_top_p_drops_what_crosses",
        TRITON_GENERATE,
        "ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)",
        "ordered.softmax(-1).cumsum(-1)",
        "the token with which the bound is reached belongs to those that are kept",
        tests=IN_SAMPLING,
    ),
    Mutant(
        "tvm_top_p_drops_what_crosses",
        TVM_GENERATE,
        "before = likeliest.cumsum(-1) - likeliest",
        "before = likeliest.cumsum(-1)",
        "the token with which the bound is reached belongs to those that are kept",
        tests=IN_SAMPLING,
    ),
    Mutant(
        "triton_top_k_of_one_more",
        TRITON_GENERATE,
        "logits.topk(sampling.top_k).values",
        "logits.topk(min(sampling.top_k + 1, logits.shape[-1])).values",
        "k tokens, and not k + 1",
        tests=IN_SAMPLING,
    ),
    Mutant(
        "tvm_top_k_of_one_less",
        TVM_GENERATE,
        "np.partition(logits, -sampling.top_k)[:, -sampling.top_k, None]",
        "np.partition(logits, -sampling.top_k)[:, min(-sampling.top_k + 1, -1), None]",
        "k tokens, and not k - 1",
        tests=IN_SAMPLING,
    ),
    Mutant(
        "length_before_stop",
        GENERATION,
        "if id in sampling.stop_tokens or (stopped and stopped(prompt, id)):",
        "if produced < sampling.max_tokens and (id in sampling.stop_tokens or (stopped and stopped(prompt, id))):",
        "an answer that ends by itself at the last token was not cut off",
        tests=IN_SAMPLING,
    ),
    Mutant(
        "tiny_temperature_divides",
        GENERATION,
        "return self.temperature < GREEDY",
        "return self.temperature == 0",
        "logits divided by 1e-45 are infinite, and their softmax is NaN",
        tests=IN_SAMPLING,
    ),
    Mutant(
        "temperature_may_be_nan",
        GENERATION,
        "not math.isfinite(self.temperature) or self.temperature < 0",
        "self.temperature < 0",
        "NaN compares with nothing",
        tests=IN_SAMPLING,
    ),
)

STREAM_MUTANTS = (
    Mutant(
        "stream_drops_the_last_token",
        f"{RUNTIME}/answers.py",
        "streams[token.prompt].take(token.finished is not None), token.finished)",
        '"" if token.finished else streams[token.prompt].take(False), token.finished)',
        "the token that reaches the length limit is text like any other",
        tests=IN_CONVERSATION,
    ),
    Mutant(
        "streams_share_a_decoder",
        f"{RUNTIME}/answers.py",
        "streams = [TextStream(text, stop) for _ in prompts]",
        "streams = [TextStream(text, stop)] * len(prompts)",
        "tokens of a batch come in turns",
        tests=IN_CONVERSATION,
    ),
    Mutant(
        "special_tokens_are_shown",
        TOKENIZER,
        "self._tokenizer.decode(list(ids))",
        "self._tokenizer.decode(list(ids), skip_special_tokens=False)",
        "<|im_end|> is no text",
        tests=IN_DETOKENIZER,
    ),
    Mutant(
        "characters_in_halves",
        DETOKENIZER,
        '        if not piece.endswith("\\ufffd"):  # else bytes of the last character may still come\n',
        "        if piece:\n",
        "a character's bytes may come in several tokens",
        tests=IN_DETOKENIZER,
    ),
    Mutant(
        "stop_within_one_token_only",
        DETOKENIZER,
        "        self._held += piece\n",
        "        self._held += piece\n        if not any(end in piece for end in self._stop):\n            return\n",
        "a stop string may be of several tokens",
        tests=IN_DETOKENIZER,
    ),
    Mutant(
        "stop_strings_beginning_is_told",
        DETOKENIZER,
        "kept = 0 if last or self._stopped else self._beginning()",
        "kept = 0",
        "what is printed cannot be taken back when the stop string is complete",
        tests=IN_DETOKENIZER,
    ),
    Mutant(
        "held_back_text_is_lost",
        DETOKENIZER,
        "kept = 0 if last or self._stopped else self._beginning()",
        "kept = 0 if self._stopped else self._beginning()",
        "an answer may end with what a stop string begins with",
        tests=IN_DETOKENIZER,
    ),
    Mutant(
        "stop_string_that_begins_first",
        DETOKENIZER,
        "self._held = self._held[: min(found)[1]]",
        "self._held = self._held[: min(at for _, at in found)]",
        "which stop string counts does not depend on where tokens end",
        tests=IN_DETOKENIZER,
    ),
)

TEMPLATE_MUTANTS = (
    Mutant(
        "trim_blocks_off",
        CHAT,
        "trim_blocks=True, lstrip_blocks=True",
        "trim_blocks=False, lstrip_blocks=True",
        "the newline after a block is none of the text's",
        tests=IN_CHAT,
    ),
    Mutant(
        "the_first_of_several_templates",
        TEXT,
        'name = template or ("tool_use" if tools is not None and "tool_use" in found else "default")',
        "name = template or next(iter(found))",
        "the one named default, or tool_use with tools",
        tests=IN_CHAT,
    ),
    Mutant(
        "bos_token_is_not_given",
        TEXT,
        '{"add_generation_prompt": True, **self._tokenizer.special_tokens, **options}',
        '{"add_generation_prompt": True, **options}',
        "templates write the special tokens by their names",
        tests=IN_CHAT,
    ),
    Mutant(
        "tojson_escapes",
        CHAT,
        "ensure_ascii: bool = False,",
        "ensure_ascii: bool = True,",
        "a tool's description may be of any language",
        tests=IN_CHAT,
    ),
    Mutant(
        "tojson_for_html",
        CHAT,
        '        self.filters["tojson"] = _tojson\n',
        "",
        "jinja's own filter escapes <, > and &",
        tests=IN_CHAT,
    ),
    Mutant(
        "no_tools_is_undefined",
        TEXT,
        '{"tools": tools, "documents": documents, **known}',
        '{key: value for key, value in {"tools": tools, "documents": documents}.items() if value is not None} | known',
        "templates ask `tools is not none`",
        tests=IN_CHAT,
    ),
    Mutant(
        "none_is_a_content",
        CHAT,
        "said = {key: value for key, value in message.items() if value is not None}",
        "said = dict(message)",
        "a message with tool calls has no content",
        tests=IN_CHAT,
    ),
    Mutant(
        "a_loop_without_end",
        CHAT,
        "visit_For = visit_Macro = visit_CallBlock = _ticking",
        "visit_CallBlock = _ticking",
        "nested loops take years",
        tests=IN_CHAT,
    ),
    Mutant(
        "joined_texts_of_any_size",
        CHAT,
        "        _bounded(sum(map(_length, parts)))\n",
        "",
        "a text that doubles forty times fills the memory",
        tests=IN_CHAT,
    ),
    Mutant(
        "padding_of_percent_signs",
        CHAT,
        "        return _formatted(left, right)\n",
        "        return 0\n",
        "'%900000000s' % 'x' is a gigabyte",
        tests=IN_CHAT,
    ),
    Mutant(
        "a_template_in_the_locales_encoding",
        f"{RUNTIME}/stored.py",
        'return file.read_text(encoding="utf-8")',
        "return file.read_text()",
        "files are UTF-8, whatever the machine's locale",
        tests=IN_CHAT,
    ),
    Mutant(
        "a_rendered_chat_gets_special_tokens",
        CONVERSATION,
        "text.encode(text.chat(prompt, **options), add_special_tokens=False)",
        "text.encode(text.chat(prompt, **options))",
        "the template has written them",
        tests=IN_CONVERSATION,
    ),
    Mutant(
        "ranks_do_not_compare_what_they_are_asked",
        CONVERSATION,
        "repr((asked, sampling))",
        "repr(sampling)",
        "a template may tell every rank another time",
        tests=IN_CONVERSATION,
    ),
    Mutant(
        "stop_tokens_of_config_json_first",
        TEXT,
        'for file in (self.folder / "generation_config.json", self.folder / "config.json"):',
        'for file in (self.folder / "config.json", self.folder / "generation_config.json"):',
        "a chat model's end of turn is in generation_config.json alone",
        tests=IN_CHAT,
    ),
    Mutant(
        "true_is_a_stop_token",
        TEXT,
        "type(i) is int and i >= 0",
        "isinstance(i, int)",
        "True is 1 in Python",
        tests=IN_CHAT,
    ),
    Mutant(
        "thinking_is_always_told",
        CONVERSATION,
        "{} if args.thinking is None else ",
        "",
        "what is undefined in a template is not none",
        tests=IN_CONVERSATION,
    ),
    Mutant(
        "a_dialogue_forgets_its_answers",
        CONVERSATION,
        '        messages.append(_message("assistant", found.text))\n',
        "",
        "the model reads what it said itself",
        tests=IN_CONVERSATION,
    ),
    Mutant(
        "sampling_without_do_sample",
        TEXT,
        "            if not sampled:\n                return {}\n",
        "",
        "a temperature without do_sample does not act",
        tests=IN_CHAT,
    ),
    Mutant(
        "the_configs_sampling_wins",
        CONVERSATION,
        "{**default, **given}",
        "{**given, **default}",
        "the command line wins",
        tests=IN_CONVERSATION,
    ),
)

TOKENIZER_MUTANTS = (
    Mutant(
        "truncation_left_on",
        TOKENIZER,
        '{**content, "truncation": None, "padding": None}',
        '{**content, "padding": None}',
        "it is of training",
        tests=IN_TOKENIZER,
    ),
    Mutant(
        "padding_left_on",
        TOKENIZER,
        '{**content, "truncation": None, "padding": None}',
        '{**content, "truncation": None}',
        "it is of training",
        tests=IN_TOKENIZER,
    ),
    Mutant(
        "added_tokens_ignored",
        TOKENIZER,
        "self._tokenizer.add_tokens([*added, *(token",
        "self._tokenizer.add_tokens([*(token",
        "tokens that only tokenizer_config.json or added_tokens.json has",
        tests=IN_TOKENIZER,
    ),
    Mutant(
        "added_tokens_in_the_order_of_text",
        TOKENIZER,
        "for key in sorted(listed, key=int)]",
        "for key in sorted(listed)]",
        "tokens get their ids in the order of the ids that are named",
        tests=IN_TOKENIZER,
    ),
    Mutant(
        "named_tokens_are_not_special",
        TOKENIZER,
        "token.special = token.special or str(token) in self.special_tokens.values()",
        "pass",
        "an eos token is not shown, whatever its entry says",
        tests=IN_TOKENIZER,
    ),
    Mutant(
        "bos_token_of_tokenizer_json",
        TOKENIZER,
        "        if not file.exists():\n            self._add_ends",
        "        if True:\n            self._add_ends",
        "add_bos_token acts only where there is no tokenizer.json",
        tests=IN_TOKENIZER,
    ),
    Mutant(
        "no_normal_form",
        TOKENIZER,
        '"normalizer": {"type": "NFC"}',
        '"normalizer": None',
        "é is one character or two",
        tests=IN_TOKENIZER,
    ),
    Mutant(
        "first_generation_without_normal_form",
        TOKENIZER,
        'self._encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")',
        'self._encoding.encode(text, allowed_special="all")',
        "é is one character or two",
        tests=IN_TOKENIZER,
    ),
    Mutant(
        "digits_in_threes",
        TOKENIZER,
        r'r"(?i:\'s|\'t|\'re|\'ve|\'m|\'ll|\'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|'.replace("\\'", "'"),
        r'r"(?i:\'s|\'t|\'re|\'ve|\'m|\'ll|\'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|'.replace("\\'", "'"),
        "Qwen reads digits one by one",
        tests=IN_TOKENIZER,
    ),
)

TEXT_MUTANTS = (*SAMPLING_MUTANTS, *STREAM_MUTANTS, *TEMPLATE_MUTANTS, *TOKENIZER_MUTANTS)
