"""Parameters, arithmetic and bytes of a network, from its config alone. Tests hold each figure to what is built.

D model width, V vocabulary, H heads, K key/value heads, E attention head width, P Mamba head width, N state size,
G groups, F feed-forward width, W convolution width, I = HP + 2GN channels of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

from whimbrel.errors import UserError, nearest
from whimbrel.model.config import ATTENTION, FEED_FORWARD, MAMBA, ModelConfig
from whimbrel.ops.packed import GROUPS, SIDE, SLICE

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
FLOAT32 = 4
SCAN_CHUNK = 64
"""Tokens of a chunk of the scan in `ops/torch` (not the config's `chunk_size`, which is another implementation's)."""


def dtype_bytes(dtype: str, name: str = "dtype") -> int:
    """Bytes of one number that is computed with; an unknown dtype raises `UserError` that names the setting `name`."""
    dtype = computed(dtype) if name == "dtype" else dtype
    if dtype not in DTYPE_BYTES:
        known = [*DTYPE_BYTES, *FEW] if name == "dtype" else DTYPE_BYTES
        raise UserError(f"{name} is {dtype!r}; {nearest(str(dtype), known)} (set {name} to bfloat16, for example)")
    return DTYPE_BYTES[dtype]


FEW = {"int8": 8, "int4": 4, "fp8": 8}
"""Bits of weights as a GPU holds them (docs/gpu.md); groups of 32 inputs, or as in int4/64."""


def computed(dtype: str) -> str:
    """What is computed with beside weights stored as `dtype`: bfloat16 for few bits, else the same."""
    name, _, group = dtype.partition("/")
    few = name in FEW and (not group or (name != "fp8" and group in map(str, GROUPS)))
    return "bfloat16" if few else dtype


def _stored(outputs: int, inputs: int, dtype: str, projection: bool = True) -> int:
    """Bytes of a matrix stored as `dtype`: codes and scales; 16 bits where its sides do not allow fewer."""
    name, _, group = dtype.partition("/")
    each = int(group or 32)
    if name == "fp8" and projection and inputs % SIDE == 0:
        return -(-outputs // SIDE) * SIDE * (inputs + FLOAT32)
    if name in ("int8", "int4") and inputs % each == 0:
        return outputs * (inputs * FEW[name] // 8 + 2 * (inputs // each))
    return outputs * inputs * dtype_bytes(dtype)


def _table(config: ModelConfig, dtype: str) -> int:
    """Bytes of the embedding, or of a head of its own."""
    return _stored(config.vocab_size, config.hidden_size, dtype, projection=False)


def projections(config: ModelConfig) -> list[tuple[int, int, int]]:
    """How many there are of which outputs and inputs."""
    width, inner, wide = config.hidden_size, config.mamba_inner, config.intermediate_size
    mamba, attention, mlp = (config.count(kind) for kind in (MAMBA, ATTENTION, FEED_FORWARD))
    return [
        (mamba, config.in_proj_width if mamba else 0, width),
        (mamba, width, inner),
        (attention, _queries(config), width),
        (2 * attention, _keys(config), width),
        (attention, width, _queries(config)),
        ((2 if config.mlp == "swiglu" else 1) * mlp, wide, width),
        (mlp, width, wide),
    ]


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by role: embedding, head, mamba, attention, mlp, norm. A tied head counts once, as the embedding.

    One `M` layer: D(2HP + 2GN + H) in, I(W + 1) convolution and its bias, 3H (A_log, D, dt_bias), HP norm, HP*D out.
    One `*` layer: D*HE for q and for o, D*KE for k and for v, 2E with q/k norm. One `-` layer: 2DF, or 3DF with a gate.
    norm: D for each layer and for the end, twice that where the norm has a bias (layernorm1p).
    """
    width, vocabulary = config.hidden_size, config.vocab_size
    norm = width * (2 if config.norm == "layernorm1p" else 1)
    return {
        "embedding": vocabulary * width,
        "head": 0 if config.tie_embeddings else vocabulary * width,
        "mamba": config.count(MAMBA) * sum(_mamba(config)),
        "attention": config.count(ATTENTION) * sum(_attention(config)),
        "mlp": config.count(FEED_FORWARD) * sum(_mlp(config)),
        "norm": (config.layers + 1) * norm,
    }


def _mamba(config: ModelConfig) -> tuple[int, int]:
    """Numbers in the matrices of one `M` layer, and in everything else of it."""
    width, inner = config.hidden_size, config.mamba_inner
    convolution = config.conv_channels * (config.conv_kernel + config.conv_bias)
    bias = (config.in_proj_width + width) * config.mamba_bias
    return width * (config.in_proj_width + inner), convolution + 3 * config.mamba_num_heads + inner + bias


def _attention(config: ModelConfig) -> tuple[int, int]:
    """Numbers in the matrices of one `*` layer, and in everything else of it."""
    width, queries, keys = config.hidden_size, _queries(config), _keys(config)
    bias = (queries + 2 * keys + width) * config.attention_bias
    return 2 * width * (queries + keys), bias + 2 * config.head_dim * config.qk_norm


def _mlp(config: ModelConfig) -> tuple[int, int]:
    """Numbers in the matrices of one `-` layer, and in its biases."""
    into = 2 if config.mlp == "swiglu" else 1
    width, inner = config.hidden_size, config.intermediate_size
    return (into + 1) * width * inner, (into * inner + width) * config.mlp_bias


def _queries(config: ModelConfig) -> int:
    return config.num_attention_heads * config.head_dim


def _keys(config: ModelConfig) -> int:
    return config.num_key_value_heads * config.head_dim


def total(config: ModelConfig) -> int:
    """All parameters; a tied head counts once."""
    return sum(parameters(config).values())


def weights_bytes(config: ModelConfig, dtype: str = "bfloat16") -> int:
    """Bytes of all weights in `dtype`, except A_log, D and dt_bias (3H an `M` layer), which are always float32.

    int8, int4 and fp8 are those of the matrices, of fp8 those of the projections; all else is then bfloat16.
    """
    kept, size = 3 * config.mamba_num_heads * config.count(MAMBA), dtype_bytes(dtype)
    saved = (2 - config.tie_embeddings) * (config.vocab_size * config.hidden_size * size - _table(config, dtype))
    saved += sum(
        n * (outputs * inputs * size - _stored(outputs, inputs, dtype)) for n, outputs, inputs in projections(config)
    )
    return (total(config) - kept) * size + kept * FLOAT32 - saved


def kv_bytes(config: ModelConfig, context: int, batch: int = 1, dtype: str = "bfloat16") -> int:
    """Bytes of keys and values: 2KE numbers a token, a `*` layer and a sequence."""
    return 2 * _keys(config) * config.count(ATTENTION) * context * batch * dtype_bytes(dtype, "kv_dtype")


def state_bytes(config: ModelConfig, batch: int = 1, dtype: str = "bfloat16", state_dtype: str = "float32") -> int:
    """Bytes of recurrent state: HPN `state_dtype` (SSM) and I(W-1) of `dtype` (convolution tail) a sequence
    and `M` layer.

    It does not depend on the context. float32 because the state sums over the whole past: half precision drifts, unless
    it is rounded at random.
    """
    ssm = config.mamba_inner * config.ssm_state_size * dtype_bytes(state_dtype, "state_dtype")
    tail = config.conv_channels * (config.conv_kernel - 1) * dtype_bytes(dtype)
    return config.count(MAMBA) * batch * (ssm + tail)


def flops(config: ModelConfig, context: float) -> dict[str, float]:
    """Forward operations of one token that sees `context` keys (itself among them), by part; a multiply-add is two.

    matmul       2 for each number in a layer's matrices
    head         2VD, tied or not (a prompt needs it in its last token only)
    attention    4HE a key and `*` layer: 2HE for the scores, 2HE for the weighted values
    scan         5HPN + 2HP an `M` layer: decay, outer product and sum of the state (3HPN), read-out (2HPN), skip (2HP).
                 This is the step recurrence, the least there is; a chunked scan does more work in faster matrix form
    convolution  2IW an `M` layer
    Left out: norms, activations, softmax, rotary and the embedding's look-up, a few operations a channel each.
    """
    inner, mamba = config.mamba_inner, config.count(MAMBA)
    matrices = (
        mamba * _mamba(config)[0]
        + config.count(ATTENTION) * _attention(config)[0]
        + config.count(FEED_FORWARD) * _mlp(config)[0]
    )
    return {
        "matmul": 2.0 * matrices,
        "head": 2.0 * config.vocab_size * config.hidden_size,
        "attention": 4.0 * _queries(config) * config.count(ATTENTION) * context,
        "scan": float(mamba * (5 * inner * config.ssm_state_size + 2 * inner)),
        "convolution": 2.0 * mamba * config.conv_channels * config.conv_kernel,
    }


def flops_per_token(config: ModelConfig, context: float, training: bool = False) -> float:
    """Operations of one token that sees `context` keys. Training is three times that: two products go back for one.

    For whole causal sequences give `mean_context(lengths)`. What checkpointing computes again is not counted.
    """
    return sum(flops(config, context).values()) * (3 if training else 1)


def mean_context(lengths: Sequence[int]) -> float:
    """Mean number of keys a token sees in causal, isolated documents of these lengths: sum L(L+1)/2 over sum L."""
    return sum(n * (n + 1) / 2 for n in lengths) / max(1, sum(lengths))


def decode_bytes(
    config: ModelConfig,
    context: int,
    batch: int = 1,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    state_dtype: str = "float32",
) -> dict[str, int]:
    """Bytes that must move to make one more token of each of `batch` sequences that hold `context` tokens.

    weights  read once a step, but of an untied embedding only `batch` rows
    kv       all keys and values of the context read, one token's written
    state    read and written
    """
    table = _table(config, dtype)
    return {
        "weights": weights_bytes(config, dtype)
        - (not config.tie_embeddings) * table
        + batch * table // config.vocab_size,
        "kv": kv_bytes(config, context + 1, batch, kv_dtype or computed(dtype)),
        "state": 2 * state_bytes(config, batch, dtype, state_dtype),
    }


def activation_bytes(config: ModelConfig, tokens: int, context: int, dtype: str = "bfloat16") -> int:
    """Largest bytes of temporary tensors while the last `tokens` tokens of a prompt of `context` are computed.

    Layers come one after the other, so the largest counts; numbers a token in `ops/torch` (`ops/cpu` takes less):
    every layer  2D (the stream and its norm)
    -            3F, or 4F with a gate
    *            3HE + 2KE, and 2KE numbers and an index (8 bytes) a token of the context: one layer's keys and values,
                 gathered from their blocks. Not here: on a CPU torch's kernel adds masks of 13 * tokens * context bytes
    M            (2HP + 2GN + H) + I, then in float32 7HP + 2GN + 64H + 3HPN/64 (u = dt x and its products, decays
                 inside chunks of 64, three states a chunk), and I more where `dtype` is not float32
    With int8 and int4 a slice of unpacked weights comes on top, with fp8 the input of the widest product in 8 bits.
    """
    size, more = dtype_bytes(dtype), 0
    if computed(dtype) != dtype:
        widest = max((inputs for n, _, inputs in projections(config) if n), default=0)
        largest = max((outputs * inputs for n, outputs, inputs in projections(config) if n), default=0)
        more = tokens * widest if dtype == "fp8" else 2 * min(SLICE, largest)
    peaks = [0]
    if FEED_FORWARD in config.pattern:
        peaks.append((4 if config.mlp == "swiglu" else 3) * config.intermediate_size * size * tokens)
    if ATTENTION in config.pattern:
        chunk = (3 * _queries(config) + 2 * _keys(config)) * size * tokens
        peaks.append(chunk + (2 * _keys(config) * size + 8) * context)
    if MAMBA in config.pattern:
        scan = _scan_floats(config, 7, 3) + (config.conv_channels if size != FLOAT32 else 0)
        peaks.append((size * (config.in_proj_width + config.conv_channels) + FLOAT32 * scan) * tokens)
    return 2 * config.hidden_size * size * tokens + max(peaks) + more


def _scan_floats(config: ModelConfig, rows: int, states: int) -> int:
    """float32 numbers a token inside the scan: `rows` times HP, B and C, decays of a chunk, `states` states a chunk."""
    inner = config.mamba_inner
    shared = 2 * config.n_groups * config.ssm_state_size
    decays = SCAN_CHUNK * config.mamba_num_heads
    return rows * inner + shared + decays + states * inner * config.ssm_state_size // SCAN_CHUNK


def step_bytes(config: ModelConfig, dtype: str = "bfloat16") -> int:
    """Temporary bytes of each sequence in a decoding step.

    3HPN float32 (one layer's state: gathered, decayed, new); for sampling V logits in `dtype`, float32 and three times
    float64.
    """
    state = 3 * config.mamba_inner * config.ssm_state_size * FLOAT32 * (MAMBA in config.pattern)
    return state + config.vocab_size * (dtype_bytes(dtype) + FLOAT32 + 3 * 8)
