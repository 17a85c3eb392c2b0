"""The families in specs/: their sizes against a second transcription and against published parameter counts."""

from pathlib import Path

import pytest

from qwenspec.ir.lower import lower
from qwenspec.spec.load import load, load_all

SPECS = Path(__file__).parents[2] / "specs"
FILES = sorted(SPECS.glob("*.yaml"))

# hidden_size, layers, heads, kv heads, intermediate_size, vocab_size, theta, max positions, eps, tied
FACTS = {
    "qwen1.yaml": {
        "qwen-1.8b": (2048, 24, 16, 16, 5504, 151936, 1e4, 8192, 1e-6, False),
        "qwen-7b": (4096, 32, 32, 32, 11008, 151936, 1e4, 32768, 1e-6, False),
        "qwen-7b-chat-v1.0": (4096, 32, 32, 32, 11008, 151936, 1e4, 6144, 1e-6, False),
        "qwen-14b": (5120, 40, 40, 40, 13696, 152064, 1e4, 8192, 1e-6, False),
        "qwen-72b": (8192, 80, 64, 64, 24576, 152064, 1e6, 32768, 1e-6, False),
    },
    "qwen1_5.yaml": {
        "qwen1.5-0.5b": (1024, 24, 16, 16, 2816, 151936, 1e6, 32768, 1e-6, True),
        "qwen1.5-1.8b": (2048, 24, 16, 16, 5504, 151936, 1e6, 32768, 1e-6, False),
        "qwen1.5-4b": (2560, 40, 20, 20, 6912, 151936, 1e6, 32768, 1e-6, False),
        "qwen1.5-7b": (4096, 32, 32, 32, 11008, 151936, 1e6, 32768, 1e-6, False),
        "qwen1.5-14b": (5120, 40, 40, 40, 13696, 152064, 1e6, 32768, 1e-6, False),
        "qwen1.5-32b": (5120, 64, 40, 8, 27392, 152064, 1e6, 32768, 1e-6, False),
        "qwen1.5-72b": (8192, 80, 64, 64, 24576, 152064, 1e6, 32768, 1e-6, False),
        "qwen1.5-110b": (8192, 80, 64, 8, 49152, 152064, 1e6, 32768, 1e-6, False),
    },
    "qwen2.yaml": {
        "qwen2-0.5b": (896, 24, 14, 2, 4864, 151936, 1e6, 131072, 1e-6, True),
        "qwen2-1.5b-instruct": (1536, 28, 12, 2, 8960, 151936, 1e6, 32768, 1e-6, True),
        "qwen2-7b": (3584, 28, 28, 4, 18944, 152064, 1e6, 131072, 1e-6, False),
        "qwen2-7b-instruct": (3584, 28, 28, 4, 18944, 152064, 1e6, 32768, 1e-6, False),
        "qwen2-72b": (8192, 80, 64, 8, 29568, 152064, 1e6, 131072, 1e-6, False),
    },
    "qwen2_5.yaml": {
        "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, 1e6, 32768, 1e-6, True),
        "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936, 1e6, 131072, 1e-6, True),
        "qwen2.5-3b-instruct": (2048, 36, 16, 2, 11008, 151936, 1e6, 32768, 1e-6, True),
        "qwen2.5-7b-instruct": (3584, 28, 28, 4, 18944, 152064, 1e6, 32768, 1e-6, False),
        "qwen2.5-14b": (5120, 48, 40, 8, 13824, 152064, 1e6, 131072, 1e-5, False),
        "qwen2.5-32b": (5120, 64, 40, 8, 27648, 152064, 1e6, 131072, 1e-5, False),
        "qwen2.5-72b": (8192, 80, 64, 8, 29568, 152064, 1e6, 131072, 1e-5, False),
        "qwen2.5-coder-32b": (5120, 64, 40, 8, 27648, 152064, 1e6, 32768, 1e-5, False),
        "qwen2.5-math-1.5b": (1536, 28, 12, 2, 8960, 151936, 1e4, 4096, 1e-6, True),
        "qwen2.5-math-72b": (8192, 80, 64, 8, 29568, 152064, 1e4, 4096, 1e-5, False),
        "qwen2.5-7b-instruct-1m": (3584, 28, 28, 4, 18944, 152064, 1e7, 1010000, 1e-5, False),
        "qwen2.5-14b-instruct-1m": (5120, 48, 40, 8, 13824, 152064, 1e7, 1010000, 1e-5, False),
        "qwq-32b": (5120, 64, 40, 8, 27648, 152064, 1e6, 131072, 1e-5, False),
    },
    "qwen3.yaml": {
        "qwen3-0.6b": (1024, 28, 16, 8, 3072, 151936, 1e6, 40960, 1e-6, True),
        "qwen3-1.7b": (2048, 28, 16, 8, 6144, 151936, 1e6, 40960, 1e-6, True),
        "qwen3-4b": (2560, 36, 32, 8, 9728, 151936, 1e6, 40960, 1e-6, True),
        "qwen3-4b-thinking-2507": (2560, 36, 32, 8, 9728, 151936, 5e6, 262144, 1e-6, True),
        "qwen3-8b": (4096, 36, 32, 8, 12288, 151936, 1e6, 40960, 1e-6, False),
        "qwen3-14b": (5120, 40, 40, 8, 17408, 151936, 1e6, 40960, 1e-6, False),
        "qwen3-32b": (5120, 64, 64, 8, 25600, 151936, 1e6, 40960, 1e-6, False),
        "qwen3-14b-base": (5120, 40, 40, 8, 17408, 151936, 1e6, 32768, 1e-6, False),
        "qwen3-reranker-4b": (2560, 36, 32, 8, 9728, 151669, 1e6, 40960, 1e-6, True),
    },
}
CASES = [(file, name, facts) for file, variants in FACTS.items() for name, facts in variants.items()]

# Parameters in billions, as the model cards or their tensors give them; a tied embedding counts once.
PUBLISHED = [
    ("qwen1", "qwen-1.8b", "1.84"),
    ("qwen1", "qwen-7b", "7.72"),
    ("qwen1", "qwen-72b", "72.3"),
    ("qwen1_5", "qwen1.5-4b", "3.95"),
    ("qwen2_5", "qwen2.5-0.5b", "0.49"),
    ("qwen2_5", "qwen2.5-1.5b", "1.54"),
    ("qwen2_5", "qwen2.5-3b", "3.09"),
    ("qwen2_5", "qwen2.5-7b", "7.61"),
    ("qwen2_5", "qwen2.5-14b", "14.7"),
    ("qwen2_5", "qwen2.5-32b", "32.8"),
    ("qwen2_5", "qwen2.5-72b", "72.7"),
    ("qwen3", "qwen3-0.6b", "0.6"),
    ("qwen3", "qwen3-1.7b", "1.7"),
    ("qwen3", "qwen3-4b", "4.0"),
    ("qwen3", "qwen3-8b", "8.2"),
    ("qwen3", "qwen3-14b", "14.8"),
    ("qwen3", "qwen3-32b", "32.8"),
]


@pytest.mark.parametrize(("file", "variant", "facts"), CASES, ids=[case[1] for case in CASES])
def test_sizes(file, variant, facts):
    arch = load(SPECS / file, variant).architecture
    found = (
        arch.hidden_size,
        arch.num_hidden_layers,
        arch.num_attention_heads,
        arch.num_key_value_heads or arch.num_attention_heads,
        arch.intermediate_size,
        arch.vocab_size,
        arch.rope.theta,
        arch.max_position_embeddings,
        arch.norm.eps,
        arch.tie_word_embeddings,
    )
    assert found == facts


@pytest.mark.parametrize(("file", "variant", "billions"), PUBLISHED)
def test_parameter_count_is_the_published_one(file, variant, billions):
    arch = load(SPECS / f"{file}.yaml", variant).architecture
    hidden, heads = arch.hidden_size, arch.num_attention_heads
    head_dim = arch.attention.head_dim or hidden // heads
    width = (heads + 2 * (arch.num_key_value_heads or heads)) * head_dim
    attention = hidden * width + heads * head_dim * hidden + (width if arch.attention.bias.qkv else 0)
    layer = attention + 3 * hidden * arch.intermediate_size + 2 * hidden
    embeddings = arch.vocab_size * hidden * (1 if arch.tie_word_embeddings else 2)
    total = arch.num_hidden_layers * layer + embeddings + hidden
    last_digit = 10.0 ** -len(billions.partition(".")[2])
    assert total / 1e9 == pytest.approx(float(billions), abs=last_digit)  # cards cut as often as they round


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_variant_is_valid_and_lowers(file):
    specs = load_all(file)
    assert set(FACTS[file.name]) <= {spec.variant for spec in specs}
    for spec in specs:
        model = lower(spec)
        assert len(model.layers) == spec.architecture.num_hidden_layers
        assert all(layer.mixer.window is None for layer in model.layers), "no release slides"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_are_easy_to_read(file):
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema/spec.v1.schema.json\n")
    assert max(map(len, text.splitlines())) <= 110
    assert "\t" not in text


def test_what_sets_the_generations_apart():
    qwen1 = load(SPECS / "qwen1.yaml", "qwen-7b-chat-v1.0")
    assert qwen1.architecture.rope.scaling.train_length == qwen1.architecture.attention.logn.train_length == 2048
    assert qwen1.architecture.rope.compute_dtype == "float32"
    assert qwen1.layout.mlp.gate_up == ("mlp.w2", "mlp.w1")
    untouched = load(SPECS / "qwen1.yaml", "qwen-72b").architecture
    assert (untouched.rope.scaling, untouched.attention.logn) == (None, None)
    for name in ("qwen1_5", "qwen2", "qwen2_5"):
        attention = load(SPECS / f"{name}.yaml").architecture.attention
        assert (attention.bias.qkv, attention.bias.output, attention.qk_norm) == (True, False, "none")
    attention = load(SPECS / "qwen3.yaml").architecture.attention
    assert (attention.bias.qkv, attention.bias.output, attention.qk_norm) == (False, False, "per_head")
    embedding = load(SPECS / "qwen3.yaml", "qwen3-embedding-4b")
    assert embedding.architecture.lm_head is None
    assert embedding.architecture.embedding.normalize
    assert embedding.layout.embedding == "embed_tokens"
    yarn = load(SPECS / "qwen3.yaml", "qwen3-8b-yarn-128k").architecture.rope.scaling
    assert (yarn.kind, yarn.factor, yarn.original_max_position_embeddings) == ("yarn", 4.0, 32768)


def test_quantised_releases():
    schemes = {
        spec.variant: spec.quantization.scheme
        for file in FILES
        for spec in load_all(file)
        if spec.quantization is not None
    }
    assert schemes == {
        "qwen2.5-7b-instruct-awq": "awq",
        "qwen2.5-7b-instruct-gptq-int4": "gptq",
        "qwen2.5-7b-instruct-gptq-int8": "gptq",
        "qwen3-8b-awq": "awq",
        "qwen3-8b-fp8": "fp8_block",
    }
