"""Decoding speed against what the memory allows, batch 1: `python benchmarks/bench_generate.py`.

One process measures everything: the ceiling (a large matrix-vector product, which reads memory as
decoding does), cached decoding in each precision, of one sequence and of several, the grammar's
cost, and, where PyTorch is
installed, a plain key-value-cache loop of the same network in it.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aria_jax.config import ComputeConfig
from aria_jax.generate.cache import decode_step, empty_cache, prefill
from aria_jax.generate.decoding import Decoding, decode
from aria_jax.generate.grammar import make_grammar, state_after
from aria_jax.generate.sampler import MinP, step_keys
from aria_jax.generate.weights import DecoderWeights, decoder_weights
from aria_jax.models.heads import build_model
from aria_jax.presets import MODELS
from data_pipeline.tokenizers import Tokenizer

TOKENIZER = Tokenizer.preset("aria")


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """Least wall time of `call` after one warm-up; what else runs on the machine only adds."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def memory_bandwidth(gigabytes: float) -> Callable[[], float]:
    """What measures bytes a second of float32 matrix-vector products too large for any cache.

    Both ways to store the matrix are tried for a third of a second each, and the faster one is the
    ceiling.
    """
    side = 8192
    matrix = jnp.ones((side, int(gigabytes * 2**30 / 4 / side)))
    vector, across = jnp.ones((1, side)), jnp.ones((1, matrix.shape[1]))
    by_columns = jax.jit(jnp.matmul)
    by_rows = jax.jit(lambda x, m: jax.lax.dot_general(x, m, (((1,), (1,)), ((), ()))))
    products = partial(by_columns, vector, matrix), partial(by_rows, across, matrix)

    def speed(product: Callable[[], jax.Array]) -> float:
        n, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < 1 / 3:
            product().block_until_ready()
            n += 1
        return n * matrix.nbytes / seconds

    def measured() -> float:
        return max(speed(product) for product in products)

    measured()
    return measured


def bytes_per_token(weights: DecoderWeights, n_cached: int) -> int:
    """What one step must read: every matrix (of the embedding one row), keys and values."""
    leaves = jax.tree.leaves((weights.blocks, weights.head, weights.norm_scale_D))
    d_model = weights.embedding_VxD.shape[1]
    cache = 2 * len(weights.blocks) * n_cached * d_model * weights.cache_dtype.itemsize
    return sum(leaf.nbytes for leaf in leaves) + cache


def prompt_of(length: int) -> np.ndarray:
    """A prompt of notes, 100 ms apart."""
    ids = [TOKENIZER.id_of(("prefix", "instrument", "piano")), TOKENIZER.bos_id]
    step = 0
    while len(ids) < length:
        if step and step % 50 == 0:
            ids.append(TOKENIZER.time_id)
        note = ("piano", 40 + step % 40, 60), ("onset", step % 50 * 100), ("dur", 200)
        ids += [TOKENIZER.id_of(token) for token in note]
        step += 1
    return np.array(ids[: length - length % 3 + 2])


@dataclass(frozen=True)
class Speeds:
    """Of each round: seconds a step of one sequence and of several, and bytes a second of memory.

    What else runs on a machine, or on its neighbours, takes memory's speed away for seconds at a
    time: what is compared is measured in turns.
    """

    one: np.ndarray
    several: np.ndarray
    bandwidth: np.ndarray


def decode_speeds(
    weights: DecoderWeights,
    prompt: np.ndarray,
    n_tokens: int,
    n_rounds: int,
    n_sequences: int,
    bandwidth: Callable[[], float],
) -> Speeds:
    """Speeds within the loop: the chunks after the first (prefill, compilation) one."""
    # Some room is left: at its end no note can begin, and the piece might end.
    length = (n_rounds + 1) * n_tokens
    decoding = Decoding(max_tokens=length + 8, chunk=n_tokens, sampler=MinP())

    def chunks(n: int) -> Iterator[np.ndarray]:
        key = jax.random.key(0)
        return decode(weights, TOKENIZER, prompt, n_sequences=n, key=key, settings=decoding)

    def seconds(running: Iterator[np.ndarray]) -> float:
        start = time.perf_counter()
        ids = next(running)
        taken = time.perf_counter() - start
        if ids.shape[1] % n_tokens:
            raise RuntimeError("the piece ended before it was measured")
        return taken / n_tokens

    one, several = chunks(1), chunks(n_sequences)
    next(one), next(several)
    rounds = []
    for _ in range(n_rounds):
        before = bandwidth()
        rounds.append((seconds(one), seconds(several), (before + bandwidth()) / 2))
    return Speeds(*np.array(rounds).T)


def grammar_seconds(prompt: np.ndarray, repeats: int, n: int = 200) -> float:
    """Extra seconds a token that the grammar takes beside sampling, without the network.

    Within whole tokens so small a difference is lost in the noise; here the two sides alternate.
    """
    grammar, state = make_grammar(TOKENIZER, prompt), state_after(TOKENIZER, prompt, 1)
    logits = jax.random.normal(jax.random.key(0), (1, TOKENIZER.vocab_size))

    def draw(logits_BxV: jax.Array, step: jax.Array) -> jax.Array:
        return MinP().draw(logits_BxV, step_keys(jax.random.key(0), jnp.arange(1), step))

    def with_grammar(step, carry):
        grammar, state, logits_BxV, _ = carry
        allowed = jnp.where(grammar.allowed(state, 1000), jnp.nan_to_num(logits_BxV), -jnp.inf)
        token = draw(allowed, step)
        return grammar, grammar.advance(state, token), logits_BxV, token

    def without(step, carry):
        grammar, state, logits_BxV, token = carry
        return grammar, state, logits_BxV, draw(logits_BxV + 0.0 * token[0], step)

    with_it, alone = in_turns(
        (with_grammar, without), (grammar, state, logits, jnp.zeros(1, jnp.int32)), repeats, n
    )
    return with_it - alone


def draw_seconds(repeats: int, n: int = 200) -> tuple[float, float]:
    """Seconds that min-p takes to choose a token, and that it would with Gumbel's noise."""
    logits = 3 * jax.random.normal(jax.random.key(0), (1, TOKENIZER.vocab_size))

    def with_gumbel(logits_BxV: jax.Array, keys_B: jax.Array) -> jax.Array:
        kept_BxV = jnp.where(MinP().keep(logits_BxV), logits_BxV / MinP().temperature, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys_B, kept_BxV).astype(jnp.int32)

    def body(draw: Callable, step: jax.Array, token: jax.Array) -> jax.Array:
        return draw(logits + 0.0 * token[0], step_keys(jax.random.key(0), jnp.arange(1), step))

    draws = partial(body, MinP().draw), partial(body, with_gumbel)
    one_number, gumbel = in_turns(draws, jnp.zeros(1, jnp.int32), repeats, n)
    return float(one_number), float(gumbel)


def in_turns(bodies: tuple[Callable, Callable], first: object, repeats: int, n: int) -> np.ndarray:
    """Least seconds per iteration of `fori_loop(0, n, body, first)`, for each body."""
    loops = [jax.jit(partial(jax.lax.fori_loop, 0, n, body)) for body in bodies]
    rounds = [
        [best_seconds(lambda loop=loop: jax.block_until_ready(loop(first)), 1) for loop in loops]
        for _ in range(repeats + 3)
    ]
    return np.min(rounds, axis=0) / n


def torch_seconds(model, n_prompt: int, n_tokens: int, repeats: int) -> float | None:
    """Seconds a token of the same network with a key-value cache in PyTorch; None without it."""
    try:
        import torch
    except ImportError:
        return None
    from torch.nn import functional

    def tensor(array):
        return torch.from_numpy(np.array(array))

    heads, width = model.config.n_heads, model.config.d_head
    stacked = model.backbone.blocks.stacked()
    # nn.Linear keeps its matrices output by input.
    blocks = [
        {
            name: tensor(
                np.asarray(array[i]).reshape(array.shape[1], -1).T if array.ndim > 2 else array[i]
            ).contiguous()
            for name, array in stacked.items()
        }
        for i in range(model.config.n_layers)
    ]
    embedding, head = tensor(model.backbone.embedding[...]), tensor(model.head[...].T).contiguous()
    norm = tensor(model.backbone.norm_scale[...]), tensor(model.backbone.norm_bias[...])
    slots = n_prompt + n_tokens
    cache = torch.zeros(len(blocks), 2, 1, heads, slots, width)
    frequency = 500_000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(slots)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()

    def rotate(x, at):
        a, b = x.chunk(2, -1)
        c, s = cos[at], sin[at]
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    @torch.inference_mode()
    def step(ids, at):
        x = embedding[ids]
        for number, block in enumerate(blocks):
            y = functional.layer_norm(x, x.shape[-1:], block["norm1_scale"], block["norm1_bias"])
            q, k, v = (
                functional.linear(y, block["qkv"]).reshape(-1, 3, heads, width).permute(1, 2, 0, 3)
            )
            cache[number, 0, 0, :, at], cache[number, 1, 0, :, at] = rotate(k, at), v
            k, v = cache[number, :, :, :, : at[-1] + 1]
            y = functional.scaled_dot_product_attention(
                rotate(q, at)[None], k, v, is_causal=len(at) > 1
            )
            x = x + functional.linear(y[0].transpose(0, 1).reshape(len(at), -1), block["out"])
            y = functional.layer_norm(x, x.shape[-1:], block["norm2_scale"], block["norm2_bias"])
            y = functional.silu(functional.linear(y, block["gate"])) * functional.linear(
                y, block["up"]
            )
            x = x + functional.linear(y, block["down"])
        return functional.linear(functional.layer_norm(x[-1:], x.shape[-1:], *norm), head)

    def loop():
        logits = step(torch.zeros(n_prompt, dtype=torch.long), torch.arange(n_prompt))
        start = time.perf_counter()
        for i in range(n_prompt, slots):
            # Min-p sampling, as the reference samples.
            probabilities = torch.softmax(logits / 0.98, -1)
            probabilities[probabilities < 0.035 * probabilities.max()] = 0
            token = torch.multinomial(probabilities, 1)[0]
            logits = step(token, torch.tensor([i]))
        return (time.perf_counter() - start) / n_tokens

    return min(loop() for _ in range(repeats + 1))


def check_same_network(weights: DecoderWeights, model, prompt: np.ndarray) -> None:
    """Raises where cached decoding is not the network: a fast wrong answer is no speed."""
    padded = np.full(-(-len(prompt) // 256) * 256, TOKENIZER.pad_id)
    padded[: len(prompt)] = prompt
    _, cache = jax.jit(prefill)(weights, jnp.asarray(padded), jnp.int32(len(prompt)))
    token = jnp.array([TOKENIZER.first_note_id])
    logits, _ = jax.jit(decode_step)(
        weights, cache, empty_cache(weights, 1, 8, dtype=weights.cache_dtype), token, jnp.int32(0)
    )
    expected = model(jnp.append(jnp.asarray(prompt), token)[None])[0, -1]
    np.testing.assert_allclose(logits[0], expected, atol=1e-3)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="medium", choices=sorted(MODELS))
    parser.add_argument("--precisions", default="float32", help="comma-separated (float32)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of a round (24)")
    parser.add_argument("--batch", type=int, default=4, help="sequences at once, beside one (4)")
    parser.add_argument("--rounds", type=int, default=9, help="medians of so many (9)")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    args = parser.parse_args()
    model = build_model(MODELS[args.preset], ComputeConfig(), rngs=nnx.Rngs(0))
    prompt = prompt_of(args.prompt)
    result: dict[str, object] = {"preset": args.preset, "device": jax.devices()[0].device_kind}
    result["prompt_tokens"] = len(prompt)
    bandwidth = memory_bandwidth(1.0)
    for precision in args.precisions.split(","):
        weights = decoder_weights(model, precision)
        if precision == "float32":
            check_same_network(weights, model, prompt)
        speeds = decode_speeds(weights, prompt, args.tokens, args.rounds, args.batch, bandwidth)
        seconds = float(np.median(speeds.one))
        if precision == "float32":
            result["grammar_share"] = grammar_seconds(prompt, args.rounds) / seconds
            one_number, gumbel = draw_seconds(args.rounds)
            result["draw_ms"], result["draw_gumbel_ms"] = 1e3 * one_number, 1e3 * gumbel
        # Of the generated tokens so many are there on average.
        read = bytes_per_token(weights, len(prompt) + args.tokens * (args.rounds + 2) // 2)
        result[precision] = {
            "tokens_per_s": 1 / seconds,
            "bandwidth_gb_s": float(np.median(speeds.bandwidth)) / 1e9,
            "limit_tokens_per_s": float(np.median(speeds.bandwidth)) / read,
            "share_of_limit": float(np.median(read / speeds.one / speeds.bandwidth)),
            "gb_per_token": read / 1e9,
            "batch": args.batch,
            "batch_step_ratio": float(np.median(speeds.several / speeds.one)),
        }
        del weights
    torch_time = torch_seconds(model, len(prompt), 2 * args.tokens, 3)
    result["torch_tokens_per_s"] = None if torch_time is None else 1 / torch_time
    print(json.dumps(result) if args.json else _table(result))


def _table(result: dict) -> str:
    lines = [
        f"{result['preset']} on {result['device']}, batch 1, "
        f"prompt of {result['prompt_tokens']} tokens",
        "share: of what the memory's speed (large matrix-vector product, in turns) allows",
    ]
    for precision in ("float32", "bfloat16", "int8"):
        if precision in result:
            row = result[precision]
            lines.append(
                f"{precision:>9}: {row['tokens_per_s']:6.2f} tokens/s of "
                f"{row['limit_tokens_per_s']:6.2f} ({row['gb_per_token']:.2f} GB a token, "
                f"{row['bandwidth_gb_s']:.1f} GB/s): "
                f"{row['share_of_limit']:.0%} of the limit; a step of {row['batch']} sequences "
                f"takes {row['batch_step_ratio']:.2f} times as long"
            )
    if "grammar_share" in result:
        lines.append(f"  grammar: {result['grammar_share']:+.2%} time a token")
        lines.append(
            f"  drawing a token: {result['draw_ms']:.3f} ms, by Gumbel's noise "
            f"{result['draw_gumbel_ms']:.3f} ms"
        )
    torch_speed = result["torch_tokens_per_s"]
    lines.append(
        "  PyTorch: not installed (pip install 'aria-jax[bench]')"
        if torch_speed is None
        else f"  PyTorch: {torch_speed:6.2f} tokens/s, key-value cache, float32"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
