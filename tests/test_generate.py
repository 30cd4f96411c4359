"""Generation: sampling, texts to stop at, streaming, chat templates; on the real SmolLM2 and on small decoders."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbe_gpu.evaluate_decoders import evaluate_decoders
from rbe_gpu.layers import KVCache
from rbe_gpu.models.chat import ChatTemplate
from rbe_gpu.models.decoder import Decoder
from rbe_gpu.models.generate import Sampling, _Text, next_token, sampling_of
from rbe_gpu.models.load import load

from . import real
from .architectures.decoder_cases import CONFIGS, write_with_tokenizer
from .architectures.test_decoders import tensors

PROMPTS = ["The capital of France is", "def add(a, b):\n    return", "Water boils at"]


@pytest.fixture(scope="module")
def smollm() -> Decoder:
    decoder = load(real.smollm2())
    assert isinstance(decoder, Decoder)
    return decoder


@pytest.fixture(scope="module")
def small() -> Decoder:
    return Decoder(tensors("llama"), CONFIGS["llama"])


# --- sampling -------------------------------------------------------------------------------------------


def drawn(logits: list[float], count: int = 4000, seen: tuple[int, ...] = (), **options: Any) -> np.ndarray:
    """How often each token is drawn."""
    rng, scores = np.random.default_rng(0), np.array(logits, np.float32)
    tokens = [next_token(scores, Sampling(**options), seen, rng) for _ in range(count)]
    return np.bincount(tokens, minlength=len(logits)) / count


def test_probabilities_are_those_of_the_softmax() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    for temperature in (0.5, 1.0, 2.0):
        p = np.exp(np.array(logits) / temperature)
        p /= p.sum()
        # four standard deviations of 4,000 draws
        assert np.abs(drawn(logits, temperature=temperature) - p).max() <= 4 * np.sqrt(0.25 / 4000)


def test_top_k_top_p_and_min_p_leave_tokens_out() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    for options, kept in (
        ({"top_k": 2}, [0, 1]), ({"top_p": 0.8}, [0, 1]), ({"top_p": 0.81}, [0, 1, 2]), ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.5}, [0, 1]), ({"top_k": 3, "top_p": 0.6}, [0, 1]), ({}, [0, 1, 2, 3]),
    ):  # fmt: skip
        share = drawn(logits, temperature=1.0, **options)
        assert np.flatnonzero(share).tolist() == kept, options
        p = np.exp(np.array(logits)[kept])
        assert np.abs(share[kept] - p / p.sum()).max() <= 0.032


def test_temperature_0_and_penalties() -> None:
    assert drawn([1.0, 3.0, 2.0], 10).tolist() == [0, 1, 0]
    assert drawn([1.0, 3.0, 2.0], 10, seen=(1, 1), repetition_penalty=2.0).tolist() == [0, 0, 1]
    assert drawn([-1.0, -3.0, -2.0], 10, seen=(0,), repetition_penalty=2.5).tolist() == [0, 0, 1]
    assert drawn([5.0, 5.0], 10).tolist() == [1, 0]  # the lower id of two
    for temperature in (0.0, 1e-9, 1.0, 1e30):  # 3e68 is no float32 number: NaN, then an IndexError
        options = {"repetition_penalty": 1e-30, "temperature": temperature}
        assert drawn([3e38, 3.0], 10, seen=(0,), **options).tolist() == [1, 0]


def test_generation_config() -> None:
    assert sampling_of({}, (2,)) == (Sampling(), (2,))
    assert sampling_of({"temperature": 0.6, "eos_token_id": [5, 6]}, (2,)) == (Sampling(), (5, 6))
    assert sampling_of({"top_p": 0.5, "_from_model_config": True}, ())[0] == Sampling(top_p=0.5)
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 1}
    assert sampling_of(sampled, ())[0] == Sampling(0.6, 50, 0.9)  # transformers' top_k
    for bad, message in (
        ({"num_beams": 4}, "num_beams=4: not supported"), ({"do_sample": 1}, "do_sample=1; needs true, false"),
        ({"do_sample": True, "top_p": 2.0}, "top_p=2.0; needs a number above 0, up to 1"),
        ({"eos_token_id": -1}, "eos_token_id=-1"), ({"unheard_of": 1}, "unknown key"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sampling_of(bad, ())


# --- texts ----------------------------------------------------------------------------------------------


def test_draws_repeat_and_do_not_depend_on_the_batch(small: Decoder) -> None:
    prompts = [[1, 2, 3], [4, 5], [6]]
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3}
    first = small.generate(prompts, 12, **options)
    assert first == small.generate(prompts, 12, **options)
    assert first[0].ids == small.generate(prompts[:1], 12, **options)[0].ids
    others = small.generate(prompts, 12, temperature=1.0, seed=4)
    assert [g.ids for g in first] != [g.ids for g in others]


def test_threads_share_a_model(small: Decoder) -> None:
    """Each with a cache of its own: what they generate is what one alone does."""
    prompts = [[1 + i, 2, 3] for i in range(8)]
    want = [small.generate([prompt], 60, ignore_eos=True)[0] for prompt in prompts]
    fresh = Decoder(tensors("llama"), CONFIGS["llama"])  # its tables of positions grow meanwhile
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda prompt: fresh.generate([prompt], 60, ignore_eos=True)[0], prompts))
    assert got == want


def test_the_context_ends(small: Decoder) -> None:
    got = small.generate([[1] * 190], 50, ignore_eos=True)[0]
    assert (len(got.ids), got.reason) == (10, "context")
    with pytest.raises(ValueError, match="200 tokens, the model has 200 positions"):
        small.generate([[1] * 200])
    with pytest.raises(ValueError, match="201 tokens, the model has 200 positions"):
        small.logits(np.ones((1, 201), np.int64))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([[1, 2]], {}, TypeError, r"pass a list of such lists"),
        ([[[]]], {}, ValueError, r"prompts\[0\] is empty"),
        ([[[1], [61]]], {}, ValueError, r"prompts\[1\] has ids from 61 to 61; use 0 to 60"),
        ([b"x"], {}, TypeError, "prompts is a bytes"),
        (["x"], {}, ValueError, "no tokenizer"),
        ([[[1], [1.5]]], {}, TypeError, r"prompts\[1\] holds other values than token ids"),
        ([[[True]]], {}, TypeError, r"prompts\[0\] holds other values"),
        ([[None]], {}, TypeError, r"prompts\[0\] is a NoneType"),
        ([[[1]]], {"stop": 5}, TypeError, "stop is a int"),
        ([[[1]], 2.5], {}, ValueError, "max_new_tokens=2.5"),
        ([[[1]]], {"temperature": 10**400}, ValueError, "needs a number from 0"),
        ([[[1]], 0], {}, ValueError, "max_new_tokens=0"),
        ([[[1]]], {"temperature": -1.0}, ValueError, "temperature=-1.0; needs a number from 0"),
        ([[[1]]], {"temperature": float("nan")}, ValueError, "temperature=nan"),
        ([[[1]]], {"top_k": 1.5}, ValueError, "top_k=1.5; needs an integer from 0"),
        ([[[1]]], {"top_p": 0.0}, ValueError, "top_p=0.0"),
        ([[[1]]], {"repetition_penalty": 0.0}, ValueError, "repetition_penalty=0.0"),
        ([[[1]]], {"repetition_penalty": 1e-31}, ValueError, "needs a number from 1e-30 to 1e30"),
        ([[[1]]], {"stop": "x"}, ValueError, "no tokenizer, which stop= needs"),
        ([[[1]]], {"stop": [""]}, ValueError, "stop is not a text, or an empty one"),
    ],
)
def test_bad_arguments(
    small: Decoder, arguments: list[Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        small.generate(*arguments, **options)
    assert small.generate([]) == []


def test_a_cache_has_a_size(small: Decoder) -> None:
    cache = small.new_cache(2, 5)
    small.logits(np.ones((2, 4), np.int64), cache=cache)
    with pytest.raises(ValueError, match="6 tokens with these, the cache has room for 5"):
        small.logits(np.ones((2, 2), np.int64), cache=cache)
    assert cache.lengths.tolist() == [4, 4]
    with pytest.raises(ValueError, match="the cache is of 2 sequences, the batch has 1"):
        small.logits(np.ones((1, 1), np.int64), cache=cache)
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]
    for wrong in ([1, 0], [0, 0], [2], [-1]):
        with pytest.raises(ValueError, match="are not ascending numbers from 0 to 1"):
            cache.keep(wrong)
    cache.lengths[1] = -1
    with pytest.raises(ValueError, match="lengths begin at -1"):
        small.logits(np.ones((2, 1), np.int64), cache=cache)
    cache.reset()
    assert cache.nbytes == 2 * 3 * 2 * 5 * 2 * 8 * 4
    for name, sizes in (("batch", (1, 0, 1, 1, 1)), ("capacity", (1, 1, 0, 1, 1))):
        with pytest.raises(ValueError, match=f"{name}=0 is not positive"):
            KVCache(*sizes)


def test_ids_and_lengths(small: Decoder) -> None:
    for ids, message in (
        ([[1, 61]], "ids run from 1 to 61; use 0 to 60"),
        ([[-1, 2]], "ids run from -1 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            small.logits(np.array(ids))
    want = small.logits(np.array([[1, 2]]))
    np.testing.assert_array_equal(small.logits(np.array([[1, 2, 99]]), [2])[:, :2], want)  # of padding any id
    for shape in ((0, 3), (2, 0)):
        assert small.logits(np.zeros(shape, np.int64)).shape == (*shape, 61)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        small.logits(np.array([[1], [2]]), np.array([1, 0]), last=True)
    with pytest.raises(TypeError, match="ids is not an array of integers"):
        small.logits(np.ones((1, 2)))


def test_logits_that_are_not_finite(small: Decoder) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="the logits hold NaN or Inf"):
            next_token(np.array([1, bad], np.float32), Sampling(), (), np.random.default_rng(0))
    assert next_token(np.array([1, 3, 2], np.float32), Sampling(1e-310), (), np.random.default_rng(0)) == 1


def test_forgetting_tokens(small: Decoder) -> None:
    """A cache whose lengths were set back continues from there."""
    ids = np.array([[3, 1, 4, 1, 5, 9]])
    cache = small.new_cache(1, 20)
    want = small.logits(ids, cache=cache)
    cache.lengths[:] = 2
    assert np.abs(small.logits(ids[:, 2:], cache=cache) - want[:, 2:]).max() <= 1e-5 * np.abs(want).max()


# --- SmolLM2 --------------------------------------------------------------------------------------------


def test_text_is_that_of_the_tokens(smollm: Decoder) -> None:
    """Streamed pieces add up to the text, and the text to what the tokenizer makes of the tokens."""
    pieces: dict[int, str] = {}

    def on_text(i: int, text: str) -> None:
        pieces[i] = pieces.get(i, "") + text

    results = smollm.generate(PROMPTS, 24, on_text=on_text)
    for i, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        assert result.text == pieces[i]
        whole = smollm.tokenizer.decode([*smollm.token_ids(prompt), *result.ids])
        assert whole == prompt + result.text
        alone = smollm.generate(prompt, 24)[0]
        assert alone.ids == result.ids
    assert "Paris" in results[0].text


def test_texts_to_stop_at(smollm: Decoder) -> None:
    """They end the text before them; a beginning of one is not shown before it is known not to be it."""
    full = smollm.generate(PROMPTS[0], 24)[0].text
    at = full.index("Paris")
    pieces: list[str] = []
    got = smollm.generate(PROMPTS[0], 24, stop=["xyz", "aris"], on_text=lambda _, text: pieces.append(text))[
        0
    ]
    assert got.text == full[: at + 1] == "".join(pieces)
    assert got.reason == "stop"
    never = smollm.generate(PROMPTS[0], 24, stop="Parisians")[0]
    assert (never.text, never.reason) == (full, "length")


def test_characters_of_several_tokens(smollm: Decoder) -> None:
    """Nothing is shown before a character is whole."""
    prompt, rest = smollm.token_ids("Parrot"), smollm.token_ids(" 日本語と emoji 🦜🦜 naïve")
    text = _Text(prompt, smollm.tokenizer.decode, ())
    shown = ""
    for token in rest:
        text.add(token, ())
        new = text.new_text(False)
        assert "\ufffd" not in new
        shown += new
    assert shown == " 日本語と emoji 🦜🦜 naïve"


def test_a_tokenizer_that_panics_when_it_decodes(tmp_path: Path) -> None:
    """One that was given to the model; of a file it is refused. A panic of Rust code is no Exception."""
    from tokenizers import decoders

    folder = write_with_tokenizer(tmp_path / "m")
    model = load(folder)
    assert model.generate("a", 2)
    model.tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 0, 9)])
    with pytest.raises(
        ValueError, match=r"^the tokenizer does not decode what was generated: index out of bounds"
    ):
        model.generate(" ", 2)


def test_special_tokens_within_a_text() -> None:
    """A tokenizer that strips the first space keeps the one behind a special token."""
    pieces = {1: " a", 2: " ab", 3: "", 4: "c"}

    def decode(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids).removeprefix(" ")

    for tokens in ([2, 3, 2, 4], [3, 3, 2], [4, 3, 4], [2, 2, 3, 3, 4, 2]):
        text = _Text([1], decode, ())
        for token in tokens:
            text.add(token, ())
        assert "a" + text.text == decode([1, *tokens])


def test_the_first_of_several_texts_to_stop_at() -> None:
    for stops in (("lo", "hello"), ("hello", "lo")):
        text = _Text([1], lambda ids: "".join({1: "", 2: "say hello", 3: "!"}[i] for i in ids), stops)
        text.add(2, ())
        assert (text.text, text.reason) == ("say ", "stop")


def test_chat(smollm: Decoder) -> None:
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    text = smollm.tokenizer.decode(smollm.chat_ids(messages), skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    answer = smollm.chat(messages, 40)
    assert answer.prompt_tokens == len(smollm.chat_ids(messages))
    assert "4" in answer.text
    for bad in ([{"role": "user"}], ["text"], [{"role": "user", "content": 3}]):
        with pytest.raises(ValueError, match=r"messages\[0\] has no role and content"):
            smollm.chat_ids(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "the chat template: "),
        ("{{ raise_exception('roles must alternate') }}", "the chat template: roles must alternate"),
        (r"{{ raise_exception('two\nlines \x1b[31m') }}", r"the chat template: two lines \\x1b\[31m$"),
        *(
            (
                f"{{{{ {expression} }}}}",
                "the chat template: (.* of too large values|No filter|'lipsum' is undefined)",
            )
            for expression in (
                *(
                    "'a'|center(10**9)",
                    "'a'.ljust(10**9)",
                    "'1'.zfill(10**9)",
                    "'%1000000000d' % 1",
                    "lipsum(n=10**6)",
                ),
                *(
                    "'{:>1000000000}'.format(1)",
                    "'a'|indent(10**9)",
                    "[1]|tojson(indent=10**9)",
                    "[1]|batch(10**9, 0)",
                ),
                "('a' * 9999).replace('a', 'a' * 9999)",
            )
        ),
        ("{{ messages.__class__.__mro__ }}", "the chat template: "),
        ("{{ messages[5].content.x }}", "the chat template: "),
        ("{{ 1 // 0 }}", "the chat template: ZeroDivisionError"),
    ],
)
def test_bad_templates(smollm: Decoder, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source).render([{"role": "user", "content": "x"}], smollm.special_tokens)


def test_a_compressed_file_generates(smollm: Decoder, tmp_path: Path) -> None:
    """From a file with 8-bit codes the same model, its template and its tokenizer."""
    import rbe_gpu as rbe

    out = tmp_path / "smollm2.rbe.safetensors"
    summary = rbe.compress_model(real.smollm2(), out, codes="dense-int8", transform="none")
    assert summary.ratio > 3.7
    model = load(out)
    assert model.settings == smollm.settings
    assert model.nbytes < smollm.nbytes / 3.6
    assert model.chat_template.source == smollm.chat_template.source
    evaluation = evaluate_decoders(model, smollm, real.texts()[:4], window=64)
    assert evaluation.dense.perplexity == pytest.approx(evaluation.compressed.perplexity, rel=0.02)
    assert evaluation.compressed.kl < 0.005
    assert evaluation.compressed.top_1 > 0.95
    assert "Paris" in model.generate(PROMPTS[0], 8)[0].text


def test_metrics_are_their_definitions() -> None:
    """Of two models whose logits are known."""

    class Fixed:
        def __init__(self, seed: int) -> None:
            self.table = np.random.default_rng(seed).standard_normal((7, 7)).astype(np.float32)

        def token_ids(self, text: str) -> list[int]:
            return [ord(c) % 7 for c in text]

        def logits(self, ids: np.ndarray) -> np.ndarray:
            return self.table[ids]

    a, b = Fixed(0), Fixed(1)
    texts = ["some text", "and more of it"]
    got = evaluate_decoders(b, a, texts, window=5)
    ids = np.array(a.token_ids("some text\n\nand more of it"))
    losses, divergences, same = [], [], []
    for start in range(0, len(ids), 5):
        part = ids[start : start + 5]
        for now, following in itertools.pairwise(part):
            p, q = (np.exp(m.table[now].astype(np.float64)) for m in (a, b))
            p, q = p / p.sum(), q / q.sum()
            losses.append([-np.log(p[following]), -np.log(q[following])])
            divergences.append(np.sum(p * np.log(p / q)))
            same.append(p.argmax() == q.argmax())
    assert got.dense.tokens == len(losses)
    assert got.dense.perplexity == pytest.approx(np.exp(np.mean([x[0] for x in losses])))
    assert got.compressed.perplexity == pytest.approx(np.exp(np.mean([x[1] for x in losses])))
    assert got.compressed.kl == pytest.approx(np.mean(divergences))
    assert got.compressed.kl_p99 == pytest.approx(np.percentile(divergences, 99))
    assert got.compressed.top_1 == pytest.approx(np.mean(same))
    assert (got.dense.kl, got.dense.top_1) == (0.0, 1.0)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        evaluate_decoders(b, a, ["x"])
    with pytest.raises(ValueError, match="window=1 is too short"):
        evaluate_decoders(b, a, texts, window=1)


def test_what_a_folder_says(tmp_path: Path) -> None:
    """generation_config.json and chat_template.jinja are read, and kept in a compressed file."""
    import rbe_gpu as rbe

    from .architectures.test_decoders import folder

    source = folder("llama", tmp_path / "model")
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 8], "do_sample": True, "top_k": 5})
    )
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    rbe.compress_model(source, tmp_path / "m.rbe.safetensors", codes="dense-int8", transform="none")
    for path in (source, tmp_path / "m.rbe.safetensors"):
        model = load(path)
        assert model.eos == (7, 8)
        assert model.sampling == Sampling(1.0, 5)
        assert model.chat_template.source == "{{ messages[0].content }}"
    (source / "generation_config.json").write_text(json.dumps({"penalty_alpha": 0.6}))
    with pytest.raises(ValueError, match=r"penalty_alpha=0.6: not supported"):
        load(source)
