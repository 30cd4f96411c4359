"""What is fuzzed: how inputs are made, and what must hold for each."""

from __future__ import annotations

import os
import random
import shlex
import shutil
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from . import budget, mutate
from .budget import allowed

DECODED = 1 << 24  # bytes that an accepted file may decode to
_TEXTS = ("A text.", "Another one, with more words than the first has")
_MESSAGE = 2000  # characters
#: files of a model folder that the small model lacks
_MORE_FILES = (
    "added_tokens.json", "model.safetensors.index.json", "special_tokens_map.json", "vocab.txt",
    "config_sentence_transformers.json", "sentence_bert_config.json", "tokenizer_config.json", "2_Dense/config.json",
    "generation_config.json", "chat_template.jinja", "modules.json",
)  # fmt: skip
_GONE = "-"  # before the name of a file that the folder of an input lacks


class Target(ABC):
    """One function under test. `folder` is scratch space that `run` may fill."""

    #: modules that are instrumented for coverage; kernels are compiled from their bytecode, and are not
    modules: tuple[str, ...]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seeds = self.make_seeds()

    @abstractmethod
    def make_seeds(self) -> list[bytes]:
        """Inputs to start from, made of real weights."""

    @abstractmethod
    def mutated(self, data: bytes, rng: random.Random, own: mutate.Bytes) -> bytes:
        """Another input."""

    @abstractmethod
    def run(self, data: bytes) -> None:
        """Try an input; raises where something does not hold."""

    def warm(self, seed: bytes) -> None:
        """Run a seed without limits: imports, and kernels that are compiled, are not the input's cost."""
        with mock.patch.object(budget, "SECONDS", float("inf")), mock.patch.object(budget, "BYTES", 1 << 40):
            self.run(seed)


def _check_message(error: BaseException, start: str = "") -> None:
    message = str(error)
    assert message.startswith(start), message
    assert message, type(error)
    assert "\n" not in message, message
    assert len(message) < _MESSAGE, message[:200]


class Reader(Target):
    """`load_file`: a `FormatError` on one line, or tensors that decode."""

    modules = (
        "rbe_gpu.container", "rbe_gpu.mapped", "rbe_gpu.stored", "rbe_gpu.json_checks", "rbe_gpu.codecs",
        "rbe_gpu.transforms",
    )  # fmt: skip
    words = (
        "kind", "codes", "dense", "sparse", "grid", "matrix", "vectors", "transform", "dct", "dwt", "none",
        "hadamard", "dwt-haar", "dwt-bior3.1", "bits", "block", "shape", "basis", "gain", "group", "index",
        "bitmap", "delta", "full", "value", "f32", "f16", "int8", "int4", "scale", "bands", "version", "tensors",
        "config", "F32", "F16", "BF16", "U8", "U16", "I64", "BOOL", "dtype", "data_offsets",
        "__metadata__", "rbe",
    )  # fmt: skip

    def make_seeds(self) -> list[bytes]:
        from rbe_gpu.container import save_file

        from ..compressed import FORMS, compressed
        from ..hostile.parts import valid_bytes

        seeds = [valid_bytes()]
        for form in FORMS:
            save_file(self.folder / "seed", {"w": compressed(form)})
            seeds.append((self.folder / "seed").read_bytes())
        return [seed for seed in seeds if len(seed) < 60_000]

    def mutated(self, data: bytes, rng: random.Random, own: mutate.Bytes) -> bytes:
        return mutate.mutate_safetensors(data, rng, own, self.words)

    def run(self, data: bytes) -> None:
        import numpy as np

        from rbe_gpu.blocks import RBEBlocks
        from rbe_gpu.container import FormatError, load_file

        path = self.folder / "input"
        path.write_bytes(data)
        with allowed(len(data), DECODED):
            try:
                tensors, _ = load_file(path, max_decoded_bytes=DECODED)
            except FormatError as error:
                _check_message(error, str(path))
                return
            with np.errstate(all="ignore"):
                for value in tensors.values():
                    value.decode() if isinstance(value, RBEBlocks) else value.tobytes()


class Folder(Target):
    """`load` of a model folder, and `embed` where it loads: a ValueError or an OSError on one line, or vectors."""

    modules = ("rbe_gpu.models", "rbe_gpu.mapped", "rbe_gpu.json_checks")
    words = (
        "model_type", "bert", "Pooling", "Normalize", "Transformer", "Dense", "path", "type",
        "pooling_mode_mean_tokens", "pooling_mode_cls_token", "max_seq_length", "do_lower_case", "model",
        "vocab", "WordPiece", "unk_token", "[UNK]", "post_processor", "normalizer", "pre_tokenizer",
        "added_tokens", "decoder", "truncation", "padding", "id", "special", "content", "hidden_act",
        "gelu", "absolute", "position_embedding_type",
    )  # fmt: skip

    def make_seeds(self) -> list[bytes]:
        from ..test_compress_model import make_model
        from .tiny import make_tiny

        make_model(self.folder / "model")
        make_tiny(self.folder / "model", self.folder / "tiny")
        names = sorted(
            str(p.relative_to(self.folder / "tiny")) for p in (self.folder / "tiny").rglob("*") if p.is_file()
        )
        self.names = frozenset((*names, *_MORE_FILES))
        self.written: dict[str, bytes] = {}
        return [mutate.pack({name: (self.folder / "tiny" / name).read_bytes() for name in names})]

    def mutated(self, data: bytes, rng: random.Random, own: mutate.Bytes) -> bytes:
        files = mutate.unpack(data)
        if not files:
            return self.seeds[0]
        if rng.random() < 0.02:
            files.setdefault(rng.choice(_MORE_FILES), rng.choice((b"{}", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n")))
        name = rng.choice(sorted(files))
        if rng.random() < 0.02:
            del files[name]
        else:
            files[name] = self.mutated_file(name, files[name], rng, own)
        return mutate.pack(files)

    def mutated_file(self, name: str, raw: bytes, rng: random.Random, own: mutate.Bytes) -> bytes:
        if name.endswith(".safetensors"):
            return mutate.mutate_safetensors(raw, rng, own, self.words)
        return mutate.mutate_text(raw, rng, own, self.words)

    def files(self, data: bytes) -> dict[str, bytes] | None:
        """The files of an input; None for one that is left out."""
        files = mutate.unpack(data)
        return files if self.names.issuperset(files) else None

    def use(self, folder: Path) -> None:
        """Load the model of a folder, and run it."""
        import rbe_gpu as rbe

        model = rbe.load(folder)
        vectors = model.embed(_TEXTS)
        assert vectors.shape == (len(_TEXTS), model.embedding_size)

    def run(self, data: bytes) -> None:
        import numpy as np

        folder = self.folder / "input"
        files = self.files(data)
        if files is None:
            return
        for name in self.names:  # most are those of the input before
            raw = files.get(name)
            if raw == self.written.get(name):
                continue
            path = folder / name
            path.unlink(missing_ok=True)
            self.written.pop(name, None)
            if raw is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(raw)
                self.written[name] = raw
        with allowed(sum(map(len, files.values())), DECODED), np.errstate(all="ignore"):
            try:
                self.use(folder)
            except (ValueError, OSError) as error:
                _check_message(error)


class DecoderFolder(Folder):
    """`load` of the folder of a decoder, or of a model of sentence-transformers that is read like one, and two tokens
    behind a text and a conversation, or vectors: a ValueError or an OSError on one line, or texts or vectors.

    An input names a folder of `decoders.folders`, and holds the files that differ from its.
    """

    words = (
        *("model_type", "llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "mistral", "modernbert"),
        *("vocab_size", "hidden_size", "head_dim", "num_key_value_heads", "max_position_embeddings"),
        *(
            "rope_scaling",
            "rope_parameters",
            "rope_theta",
            "factor",
            "default",
            "linear",
            "llama3",
            "yarn",
            "longrope",
        ),
        *(
            "low_freq_factor",
            "original_max_position_embeddings",
            "beta_fast",
            "mscale",
            "partial_rotary_factor",
        ),
        *("sliding_window", "layer_types", "full_attention", "sliding_attention", "tie_word_embeddings"),
        *(
            "eos_token_id",
            "do_sample",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "min_length",
        ),
        *(
            "chat_template",
            "bos_token",
            "eos_token",
            "add_bos_token",
            "added_tokens_decoder",
            "tokenizer_class",
        ),
        *(
            "GPT2Tokenizer",
            "default",
            "name",
            "template",
            "weight_map",
            "metadata",
            "model.safetensors",
            "BPE",
        ),
        *(
            "{{ messages[0].content }}",
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "{{ bos_token }}",
        ),
    )

    def make_seeds(self) -> list[bytes]:
        from .decoders import folders

        self.bases = {
            name: {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
            for name, path in folders(self.folder / "models").items()
        }
        self.names = frozenset(name for files in self.bases.values() for name in files) | set(_MORE_FILES)
        self.written = {}
        return [mutate.pack({"": name.encode()}) for name in self.bases]

    def mutated(self, data: bytes, rng: random.Random, own: mutate.Bytes) -> bytes:
        files = mutate.unpack(data)
        base = self.bases.get(files.get("", b"").decode("utf-8", "replace"))
        if base is None:
            return rng.choice(self.seeds)
        # of the weights rarely: other targets change them
        names = [name for name in base if not name.endswith(".safetensors") or rng.random() < 0.1]
        name = rng.choice(names)
        if rng.random() < 0.02:
            name = rng.choice(_MORE_FILES)
            files.setdefault(name, rng.choice((b"{}", b"{{ messages[0].content }}")))
        if rng.random() < 0.02:
            files.pop(name, None)
            files[_GONE + name] = b""
        else:
            files.pop(_GONE + name, None)
            files[name] = self.mutated_file(name, files.get(name, base.get(name, b"{}")), rng, own)
        return mutate.pack(files)

    def files(self, data: bytes) -> dict[str, bytes] | None:
        changed = mutate.unpack(data)
        base = self.bases.get(changed.pop("", b"").decode("utf-8", "replace"))
        if base is None or not self.names.issuperset(name.removeprefix(_GONE) for name in changed):
            return None
        return {name: raw for name, raw in {**base, **changed}.items() if _GONE + name not in changed}

    def use(self, folder: Path) -> None:
        import rbe_gpu as rbe
        from rbe_gpu.models.decoder import Decoder

        model = rbe.load(folder)
        if not isinstance(model, Decoder):
            assert model.embed(_TEXTS).shape == (len(_TEXTS), model.embedding_size)
            return
        texts = [made.text for made in model.generate(_TEXTS, 2, seed=0)]
        if model.chat_template is not None:
            texts.append(model.chat([{"role": "user", "content": _TEXTS[0]}], 1, seed=0).text)
        assert all(isinstance(text, str) for text in texts)


class StoredTokenizer(Target):
    """`load` of a model file whose tokenizer is the input, then vectors or two tokens: a ValueError on one line, or
    what the model makes.

    An input is the text in the array, and says which model and which array hold it.
    """

    modules = ("rbe_gpu.models", "rbe_gpu.json_checks")
    words = (
        *(
            "type",
            "vocab",
            "merges",
            "unk_token",
            "unk_id",
            "byte_fallback",
            "ignore_merges",
            "dropout",
            "fuse_unk",
        ),
        *(
            "continuing_subword_prefix",
            "end_of_word_suffix",
            "max_input_chars_per_word",
            "WordPiece",
            "WordLevel",
        ),
        *(
            "BPE",
            "Unigram",
            "added_tokens",
            "normalized",
            "lstrip",
            "rstrip",
            "single_word",
            "special",
            "content",
        ),
        *(
            "id",
            "##",
            "[UNK]",
            "</w>",
            "\u2581",
            "\u0120",
            "Sequence",
            "normalizers",
            "pretokenizers",
            "decoders",
        ),
        *(
            "processors",
            "pattern",
            "String",
            "Regex",
            "behavior",
            "Isolated",
            "Removed",
            "MergedWithNext",
            "a*",
            "\\K",
        ),
        *(
            "prepend",
            "replacement",
            "prepend_scheme",
            "always",
            "first",
            "start",
            "stop",
            "length",
            "suffix",
            "single",
        ),
        *(
            "special_tokens",
            "ids",
            "tokens",
            "TemplateProcessing",
            "SpecialToken",
            "type_id",
            "A",
            "B",
            "stride",
        ),
        *("max_length", "direction", "Left", "strategy", "truncation", "padding", "Fixed"),
    )

    def make_seeds(self) -> list[bytes]:
        from rbe_gpu.container import load_file
        from rbe_gpu.models.compress import compress_model

        from ..test_compress_model import make_model
        from .decoders import folders
        from .tiny import make_tiny
        from .tokenizers import stored_texts

        models = {
            "encoder": make_tiny(make_model(self.folder / "model"), self.folder / "tiny"),
            "decoder": folders(self.folder / "models", ("llama",))["llama"],
        }
        self.models: dict[str, Any] = {}
        for name, model in models.items():
            compress_model(model, self.folder / name, codes="dense-int6", transform="none")
            self.models[name] = load_file(self.folder / name)
        texts = stored_texts(models["encoder"], models["decoder"])
        return [mutate.pack({f"{model}.{kind}": text}) for model, kind, text in texts]

    def mutated(self, data: bytes, rng: random.Random, own: mutate.Bytes) -> bytes:
        ((name, text), *_) = [*mutate.unpack(data).items(), ("", b"")]
        if not name:
            return rng.choice(self.seeds)
        if text[:1] == b"[":  # a list of tokens, and the rest
            tokens, newline, rest = text.partition(b"\n")
            if rng.random() < 0.1:
                tokens = mutate.mutate_text(tokens, rng, own, self.words, 0.8)
            else:
                rest = mutate.mutate_text(rest, rng, own, self.words, 0.8)
            text = tokens + newline + rest
        else:
            text = mutate.mutate_text(text, rng, own, self.words, 0.8)
        return mutate.pack({name: text})

    def run(self, data: bytes) -> None:
        import zlib

        import numpy as np
        import zstandard

        import rbe_gpu as rbe
        from rbe_gpu.container import save_file
        from rbe_gpu.models.decoder import Decoder
        from rbe_gpu.models.stored_tokenizer import ARRAY

        for name, text in mutate.unpack(data).items():
            model_name, _, kind = name.partition(".")
            if model_name not in self.models or kind not in ("zst", "zlib"):
                return
            tensors, config = self.models[model_name]
            packed = zstandard.compress(text, 1) if kind == "zst" else zlib.compress(text, 1)
            rest = {n: tensor for n, tensor in tensors.items() if n != ARRAY}
            array = ARRAY if kind == "zst" else ARRAY.replace("zst", "zlib")
            path = self.folder / "input"
            save_file(path, {**rest, array: np.frombuffer(packed, np.uint8)}, config)
            with allowed(path.stat().st_size, DECODED), np.errstate(all="ignore"):
                try:
                    model = rbe.load(path)
                    if isinstance(model, Decoder):
                        model.generate(_TEXTS, 2, temperature=0.0)
                    else:
                        assert model.embed(_TEXTS).shape == (len(_TEXTS), model.embedding_size)
                except ValueError as error:
                    _check_message(error)


class Gguf(Target):
    """`load` of a GGUF file, and two tokens after a text where it loads: a ValueError or an OSError on one line, or
    texts."""

    modules = (
        "rbe_gpu.models.gguf_header", "rbe_gpu.models.gguf_file", "rbe_gpu.models.gguf_config",
        "rbe_gpu.models.gguf_tokenizer", "rbe_gpu.models.decoder_settings", "rbe_gpu.mapped",
    )  # fmt: skip
    words = (
        "general.architecture", "general.alignment", "general.file_type", "llama", "qwen2", "qwen3", "gemma3",
        "llama.context_length", "llama.embedding_length", "llama.block_count", "llama.feed_forward_length",
        "llama.attention.head_count", "llama.attention.head_count_kv", "llama.attention.key_length",
        "llama.attention.value_length", "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base",
        "llama.rope.dimension_count", "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.expert_count",
        "gemma3.attention.sliding_window", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.add_space_prefix", "tokenizer.chat_template", "gpt2", "default", "token_embd.weight",
        "output_norm.weight", "output.weight", "blk.0.attn_q.weight", "blk.1.ffn_up.weight", "rope_freqs.weight",
    )  # fmt: skip

    def make_seeds(self) -> list[bytes]:
        from .. import gguf_files

        # of few tokens, so that most bytes say something
        words = gguf_files.byte_level()
        seeds = []
        for architecture in gguf_files.ARCHITECTURES:
            vocabulary = None if architecture == "gemma3" else words
            path = gguf_files.small(self.folder / "seed.gguf", architecture, vocabulary_of=vocabulary)
            seeds.append(path.read_bytes())
        return seeds

    def mutated(self, data: bytes, rng: random.Random, own: mutate.Bytes) -> bytes:
        return mutate.mutate_gguf(data, rng, own, self.words)

    def run(self, data: bytes) -> None:
        import numpy as np

        import rbe_gpu as rbe

        path = self.folder / "input.gguf"
        path.write_bytes(data)
        with allowed(len(data), DECODED):
            try:
                model = rbe.load(path)
                with np.errstate(all="ignore"):
                    texts = [made.text for made in model.generate(_TEXTS, 2, temperature=0.0)]
            except (ValueError, OSError) as error:
                _check_message(error)
                return
        assert all(isinstance(text, str) for text in texts)


class CommandLine(Target):
    """`rbe-gpu`: exit code 0, 1 or 2; for 1 and 2 one line on standard error, and no file left behind.

    The arguments are lines of the input. Slashes stand for nothing, so that no file outside `folder` is named;
    commands that measure the machine for minutes are left out.
    """

    modules = ("rbe_gpu.cli",)
    slow = frozenset(("report", "tune", "warmup", "docstrings"))
    seconds = 20.0  # of a command that does its work

    def make_seeds(self) -> list[bytes]:
        from typer import testing

        from ..cli import bad_inputs
        from ..cli.bad_command_lines import DATA, USAGE
        from ..test_compress_model import make_model
        from .tiny import make_tiny

        # making the options of all commands takes 30 ms, half of the time of an input
        testing._get_command = cache(testing._get_command)
        for name in ("bad", "here"):
            (self.folder / name).mkdir(exist_ok=True)
        make_tiny(make_model(self.folder / "larger"), self.folder / "model")
        (self.folder / "texts").write_text("a text\nand another one\n", "utf-8")
        self._command(
            ["compress", str(self.folder / "model"), "-o", str(self.folder / "file"), "--codes", "dense-int6"]
        )
        bad_inputs.build(self.folder / "bad", self.folder / "model", self.folder / "file")
        good = (
            *("inspect {file}", "inspect {file} --json", "info", "--help", "--version"),
            "embed {file} {texts} -o {here}/out",
            "compress {model} -o {here}/out --grade B",
            "eval {file} --against {model} --no-retrieval",
        )
        lines = [line for line, _ in (*USAGE, *DATA) if len(line) < 2000] + list(good)
        self.dictionary = sorted({word for line in lines for word in shlex.split(line)})
        return ["\n".join(shlex.split(line)).encode("utf-8", "surrogatepass") for line in lines]

    def mutated(self, data: bytes, rng: random.Random, own: mutate.Bytes) -> bytes:
        words = data.split(b"\n")
        at = rng.randrange(len(words) + 1)
        kind = rng.randrange(6)
        if kind <= 1:
            words.insert(at, os.fsencode(rng.choice(self.dictionary)))
        elif kind == 2 and at < len(words):
            del words[at]
        elif kind == 3 and at < len(words):
            words[at] = own(words[at], len(words[at]) + 40)
        elif at < len(words):
            words[at] = os.fsencode(rng.choice(self.dictionary))
        return b"\n".join(words)

    def arguments(self, data: bytes) -> list[str] | None:
        """The command line of an input, or None for one that is left out."""
        words = [os.fsdecode(word) for word in data.replace(b"\0", b"").split(b"\n")]
        if any(name in word for name in self.slow for word in words):
            return None
        if "eval" in words and "--no-retrieval" not in words:
            return None
        places = {
            f"{{{name}}}": str(self.folder / name) for name in ("bad", "here", "model", "file", "texts")
        }
        made = []
        for word in words:
            start = next((place for place in places if word.startswith(place)), "")
            rest = word[len(start) :].replace("..", "_").replace("~", "_")
            under = rest[:1] == "/" and bool(start)
            made.append(places.get(start, "") + ("/" if under else "") + rest[under:].replace("/", "_"))
        return made

    def run(self, data: bytes) -> None:
        arguments = self.arguments(data)
        if arguments is None:
            return
        if arguments[:1] == ["compress"] and any(word.startswith("--cal") for word in arguments):
            return  # seconds of work
        here = self.folder / "here"
        os.chdir(here)
        with allowed(len(data), DECODED, self.seconds):
            result = self._command(arguments)
        left = os.listdir(here)
        for name in left:
            path = here / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        assert result.exit_code in (0, 1, 2), result.exit_code
        if result.exit_code:
            lines = result.stderr.splitlines()
            assert lines, "nothing on standard error"
            assert all(line.startswith("rbe-gpu: ") for line in lines), result.stderr
            assert sum(not line.startswith("rbe-gpu: warning: ") for line in lines) == 1, result.stderr
            assert "internal error" not in result.stderr, result.stderr
            assert not left, left

    @staticmethod
    def _command(arguments: list[str]) -> Any:
        from typer.testing import CliRunner

        from rbe_gpu import cli

        result = CliRunner().invoke(cli.app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result


TARGETS: dict[str, type[Target]] = {
    "reader": Reader, "folder": Folder, "decoder_folder": DecoderFolder, "tokenizer": StoredTokenizer, "gguf": Gguf,
    "command_line": CommandLine,
}  # fmt: skip
