"""GGUF files that are damaged, or made to cost much: refused in one line, in time and memory linear in their size."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rbe_gpu.models.gguf_file import read_gguf
from rbe_gpu.models.tokenizer import read_tokenizer

from .. import gguf_files as files
from ..bounded import limit, readings

U8, U32, F32, STRING, ARRAY = 0, 4, 6, 8, 9
MUTATIONS = 800  # of each file; 30,000 of each ran without a finding


# --- a file, part by part -----------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def texts(*values: str | bytes) -> bytes:
    return struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values))


def tensor(
    name: str | bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0, axes: int | None = None
) -> bytes:
    """shape : in the order of the file, the fastest first"""
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return (
        text(name)
        + struct.pack("<I", len(shape) if axes is None else axes)
        + sizes
        + struct.pack("<IQ", kind, offset)
    )


@dataclass
class Raw:
    """A file by its parts; counts as they are unless stated."""

    keys: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int | None, int | None] = (None, None)

    def join(self) -> bytes:
        tensors, keys = self.counts
        head = self.magic + struct.pack(
            "<IQQ",
            self.version,
            len(self.tensors) if tensors is None else tensors,
            len(self.keys) if keys is None else keys,
        )
        raw = head + b"".join(self.keys) + b"".join(self.tensors)
        return raw + bytes(-len(raw) % 32) + self.data


LLAMA = key("general.architecture", STRING, text("llama"))


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[bytes], str]:
    """The message of the ValueError for a file's bytes, which is one line that begins with the file's name."""
    path = tmp_path / "hostile.gguf"

    def run(raw: bytes) -> str:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"hostile\.gguf: ") as error:
            read_gguf(path)
        message = str(error.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert len(message) < 600 + len(str(path))
        return message.removeprefix(f"{path}: ")

    return run


# --- the outside --------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [b"", b"G", b"GGUF", b"GGUF\3\0\0\0", b"\0" * 23])
def test_too_short(refused: Callable[[bytes], str], raw: bytes) -> None:
    assert "too few" in refused(raw)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (Raw(magic=b"ggml").join(), "does not start with 'GGUF'"),
        (b'{"a": 1}' * 10, "does not start with 'GGUF'"),
        (Raw(version=1).join() + bytes(32), "version 1; supported: 2, 3"),
        (Raw(version=4).join(), "version 4; supported: 2, 3"),
        (Raw(version=3 << 24).join(), "big-endian"),
        (Raw(version=2).join(), "general.architecture=null"),
        (Raw(keys=[key("general.architecture", STRING, text(""))]).join(), 'general.architecture=""; supported'),
        (Raw(keys=[key("general.architecture", U32, struct.pack("<I", 1))]).join(), "general.architecture=1"),
        (Raw(keys=[key("general.architecture", ARRAY, texts("llama"))]).join(), 'general.architecture=["llama"]'),
    ],
)  # fmt: skip
def test_what_is_no_supported_gguf_file(refused: Callable[[bytes], str], raw: bytes, words: str) -> None:
    assert words in refused(raw)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a regular file"):
        read_gguf(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "absent.gguf")


HUGE = (1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 53, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


@pytest.mark.parametrize("count", HUGE)
def test_counts_beyond_the_file(refused: Callable[[bytes], str], count: int) -> None:
    number = struct.pack("<Q", count)
    assert refused(Raw(keys=[LLAMA], counts=(None, count)).join())
    assert refused(Raw(keys=[LLAMA], counts=(count, None)).join())
    assert "the name of a key" in refused(Raw(keys=[number + b"general.architecture"]).join())
    assert '"a"' in refused(Raw(keys=[text("a") + struct.pack("<I", STRING) + number + b"b"]).join())
    for kind in range(13):
        if kind not in (STRING, ARRAY):
            assert '"a"' in refused(Raw(keys=[key("a", ARRAY, struct.pack("<I", kind) + number)]).join())
    assert "claims" in refused(Raw(keys=[key("a", ARRAY, struct.pack("<I", STRING) + number)]).join())
    assert '"a"' in refused(Raw(keys=[key("a", ARRAY, struct.pack("<IQ", STRING, 1) + number)]).join())
    assert "the name of a tensor" in refused(Raw(keys=[LLAMA], tensors=[number + b"a"]).join())
    assert '"a"' in refused(Raw(keys=[LLAMA], tensors=[tensor("a", (count,))]).join())
    assert '"a"' in refused(Raw(keys=[LLAMA], tensors=[tensor("a", (32, count), 8)]).join())
    assert '"a"' in refused(Raw(keys=[LLAMA], tensors=[tensor("a", (count, count, count, count))]).join())
    assert '"a"' in refused(Raw(keys=[LLAMA], tensors=[tensor("a", (1,), offset=count & ~31)]).join())


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (Raw(keys=[key("a", 13, b"")]), 'key "a" has the unknown type 13'),
        (Raw(keys=[key("a", 0xFFFFFFFF, b"")]), 'key "a" has the unknown type'),
        (Raw(keys=[key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), 'key "a" is a list of type 9'),
        (Raw(keys=[key("a", ARRAY, struct.pack("<IQ", 99, 0))]), 'key "a" is a list of type 99'),
        (Raw(keys=[LLAMA, LLAMA]), 'key "general.architecture" appears twice'),
        (Raw(keys=[key(b"\xff", U8, b"\0")]), "the name of a key is not UTF-8"),
        (Raw(keys=[key("a", STRING, text(b"\xc3("))]), 'key "a" is not UTF-8 text'),
        (Raw(keys=[key("a\n", ARRAY, texts(b"\xff"))]), 'item 0 of key "a\\n" is not UTF-8 text'),
        (Raw(keys=[key("a" * 70_000, U8, b"\0")]), "the name of a key has 70000 bytes"),
        (Raw(keys=[LLAMA, key("a\nb", U8, b"\0")]), 'unknown key "a\\nb"'),
        (Raw(keys=[LLAMA, key("", U8, b"\0")]), 'unknown key ""'),
        (Raw(keys=[key("general.alignment", U32, struct.pack("<I", 0))]), "general.alignment=0"),
        (Raw(keys=[key("general.alignment", U32, struct.pack("<I", 1 << 30))]), "general.alignment="),
        (Raw(keys=[key("general.alignment", STRING, text("32"))]), "general.alignment=32"),
        (Raw(tensors=[tensor("a", (), axes=0)]), 'tensor "a" has 0 axes'),
        (Raw(tensors=[tensor("a", (1, 1, 1, 1, 1))]), 'tensor "a" has 5 axes'),
        (Raw(tensors=[tensor("a", (1,), axes=0xFFFFFFFF)]), 'tensor "a" has 4294967295 axes'),
        (Raw(tensors=[tensor("a", (4, 0))]), 'tensor "a" has the shape (0, 4)'),
        (Raw(tensors=[tensor("a", (4,), 27)]), 'tensor "a" has the type 27; supported: F32, F16'),
        (Raw(tensors=[tensor("a", (4,), 4)]), 'tensor "a" has the type 4'),
        (Raw(tensors=[tensor("a", (33, 2), 8)]), 'tensor "a" has rows of 33 weights'),
        (Raw(tensors=[tensor("a", (4,), offset=4)], data=bytes(64)), 'tensor "a" is at 4 of the data'),
        (Raw(tensors=[tensor("a", (4,), offset=32)], data=bytes(32)), 'tensor "a" ends at byte'),
        (Raw(tensors=[tensor("a", (4,)), tensor("a", (4,), offset=32)], data=bytes(64)), 'tensor "a" appears twice'),
        (Raw(tensors=[tensor("a", (4,)), tensor("b", (4,))], data=bytes(64)), 'tensor "b" overlaps'),
        (Raw(tensors=[tensor("a", (9,)), tensor("b", (4,), offset=32)], data=bytes(64)), 'tensor "b" overlaps'),
        (Raw(tensors=[tensor(b"\xff", (4,))]), "the name of a tensor is not UTF-8"),
        (Raw(tensors=[tensor("a" * 300, (4,))]), "the name of a tensor has 300 bytes"),
        (Raw(keys=[LLAMA], tensors=[tensor("a\r\n", (4,))], data=bytes(16)), "llama.embedding_length=null"),
    ],
)  # fmt: skip
def test_damaged_headers(refused: Callable[[bytes], str], raw: Raw, words: str) -> None:
    assert words in refused(raw.join())


# --- damaged models -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def valid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small model; its tokenizer is byte-level, or of SentencePiece."""
    path = tmp_path_factory.mktemp("valid") / "valid.gguf"
    kinds = {"blk.0.ffn_down.weight": "Q8_0", "blk.1.attn_q.weight": "Q4_0", "blk.0.attn_v.weight": "F16"}
    return files.small(path, request.param, kinds=kinds).read_bytes()


def read_all(path: Path) -> str | None:
    """Everything that a file leads to; the message of a ValueError, or None."""
    try:
        model = read_gguf(path)
        if model.tokenizer is not None:
            read_tokenizer(model.tokenizer, path).encode("the world \u4e2d 12")
        for name, entry in model.file.entries.items():
            a = model.file.array(name)
            assert a.shape == entry.shape
            assert np.isfinite(a).all()
    except ValueError as error:
        message = str(error)
        assert message.startswith(str(path)), message
        assert "\n" not in message
        return message
    return None


def test_cut_anywhere(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(valid)
    assert read_all(path) is None
    header = read_gguf(path).file.header_bytes
    places = {
        *range(0, 600),
        *range(0, header, 61),
        *range(header - 300, header + 100),
        *range(0, len(valid), 3001),
    }
    for at in sorted(place for place in places if place < len(valid) - 32):  # the end may be padding
        path.write_bytes(valid[:at])
        assert read_all(path), f"cut at {at}"


def mutations(raw: bytes, header: int, count: int, seed: int) -> Iterator[bytes]:
    """Copies with bytes, numbers or runs of the header changed; one in eight with bytes of the data."""
    randomly = random.Random(seed)
    numbers = [0, 1, 2, 7, 255, 256, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
    for i in range(count):
        made = bytearray(raw)
        end = len(raw) if i % 8 == 0 else header
        for _ in range(randomly.choice((1, 1, 1, 2, 5))):
            at = randomly.randrange(24 if i % 3 else 0, end - 8)
            how = randomly.randrange(5)
            if how == 0:
                made[at] ^= 1 << randomly.randrange(8)
            elif how == 1:
                made[at] = randomly.randrange(256)
            elif how == 2:
                made[at : at + 8] = struct.pack("<Q", randomly.choice(numbers))
            elif how == 3:
                made[at : at + 4] = struct.pack("<I", randomly.choice(numbers) & 0xFFFFFFFF)
            else:
                other, length = randomly.randrange(24, end - 8), randomly.randrange(1, 40)
                made[at : at + length] = made[other : other + length]
        yield bytes(made)


def test_mutated_files(valid: bytes, tmp_path: Path) -> None:
    """A ValueError, or a model that can be used."""
    path = tmp_path / "mutated.gguf"
    path.write_bytes(valid)
    header = read_gguf(path).file.header_bytes
    loaded = 0
    for made in mutations(valid, header, MUTATIONS, seed=1):
        path.write_bytes(made)
        loaded += read_all(path) is None
    assert 0 < loaded < MUTATIONS


# --- files that cost much -----------------------------------------------------------------------------

SIZES = (400_000, 6_000_000)


def _lists(item: Callable[[int], str | bytes]) -> Callable[[int], bytes]:
    def made(size: int) -> bytes:
        items: list[str | bytes] = []
        used = 0
        while used < size:
            items.append(item(len(items)))
            used += 8 + len(items[-1])
        return Raw(keys=[LLAMA, key("general.tags", ARRAY, texts(*items))]).join()

    return made


COSTLY: dict[str, Callable[[int], bytes]] = {
    "empty texts": _lists(lambda i: b""),
    "short texts": _lists(lambda i: f"{i % 900 + 100}"),
    "lists of 4,000 texts": lambda n: Raw(
        keys=[LLAMA]
        + [key(f"general.{i}", ARRAY, texts(*(f"{k}" for k in range(4000)))) for i in range(n // 48_000)]
    ).join(),
    "a long text": lambda n: Raw(keys=[LLAMA, key("general.name", STRING, text("a" * n))]).join(),
    "long texts with one wide character": lambda n: Raw(
        keys=[LLAMA]
        + [key(f"general.{i}", STRING, text("a" * 100_000 + "\U0001f600")) for i in range(n // 100_000)]
    ).join(),
    "keys": lambda n: Raw(
        keys=[LLAMA] + [key(f"general.{i}", U8, b"\0") for i in range(min(n // 30, 9999))]
    ).join(),
    "more keys": lambda n: Raw(
        keys=[LLAMA] + [key(f"general.{i}", U8, b"\0") for i in range(n // 30)]
    ).join(),
    "numbers": lambda n: Raw(
        keys=[LLAMA, key("general.tags", ARRAY, struct.pack("<IQ", U8, n) + bytes(n))]
    ).join(),
    "tensors": lambda n: Raw(
        keys=[LLAMA],
        tensors=[tensor(f"{i}", (8,), offset=32 * i) for i in range(min(n // 70, 65_000))],
        data=bytes(32 * min(n // 70, 65_000)),
    ).join(),
}


def test_costly_headers(tmp_path: Path) -> None:
    """All are refused: they describe no model."""
    paths = []
    for name, make in COSTLY.items():
        for size in SIZES:
            paths.append(tmp_path / f"{name}, {size}")
            paths[-1].write_bytes(make(size))
    faults = []
    for path, reading in zip(paths, readings("models.gguf_file:read_gguf", paths), strict=True):
        size = path.stat().st_size
        if not (reading.message or "").startswith("ValueError"):
            faults.append(f"{path.name}: {reading.message}")
        if reading.nbytes > limit(path):
            faults.append(f"{path.name}: {reading.nbytes >> 20} MB for {size} bytes")
        if reading.seconds > 2 + 1e-6 * size:
            faults.append(f"{path.name}: {reading.seconds:.1f} s for {size} bytes")
    assert not faults


def _model(path: Path, vocabulary: dict[str, Any]) -> Path:
    """A llama whose rows are as short as rows can be: 2 bytes. (gguf's writer takes a minute for these lists.)"""
    rows = len(vocabulary["tokens"])
    own = {
        "context_length": 1,
        "embedding_length": 1,
        "block_count": 1,
        "feed_forward_length": 1,
        "attention.head_count": 1,
        "attention.key_length": 2,
    }
    keys = [LLAMA, *(key(f"llama.{name}", U32, struct.pack("<I", value)) for name, value in own.items())]
    keys.append(key("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-6)))
    for name, value in vocabulary.items():
        if isinstance(value, str):
            kind, raw = STRING, text(value)
        elif isinstance(value, list):
            kind, raw = ARRAY, texts(*value)
        else:
            kind, raw = ARRAY, struct.pack("<IQ", F32, len(value)) + value.astype("<f4").tobytes()
        keys.append(key(f"tokenizer.ggml.{name}", kind, raw))
    shapes = {
        "token_embd": (1, rows), "output_norm": (1,), "blk.0.attn_norm": (1,), "blk.0.ffn_norm": (1,),
        "blk.0.attn_q": (1, 2), "blk.0.attn_k": (1, 2), "blk.0.attn_v": (1, 2), "blk.0.attn_output": (2, 1),
        "blk.0.ffn_gate": (1, 1), "blk.0.ffn_up": (1, 1), "blk.0.ffn_down": (1, 1),
    }  # fmt: skip
    tensors, offset = [], 0
    for name, shape in shapes.items():
        tensors.append(tensor(f"{name}.weight", shape, 1, offset))  # float16
        offset += -(-2 * int(np.prod(shape)) // 32) * 32
    path.write_bytes(Raw(keys, tensors, bytes(offset)).join())
    return path


def _pieces(count: int, letters: str) -> list[str]:
    """The shortest texts of these letters: every split of one is one of two others."""
    found, level = list(letters), list(letters)
    while len(found) < count:
        level = [a + b for a in level for b in letters]
        found += level
    return found[:count]


def test_costly_vocabularies(tmp_path: Path) -> None:
    """Far more tokens than a file of that size has: memory stays within 32 times its size and 64 MB."""
    spm = {"model": "llama"}
    bpe = {"model": "gpt2", "pre": "gpt-2"}
    made: dict[str, dict[str, Any]] = {}
    for count in (20_000, 60_000):
        words = [f"{i:x}" for i in range(count)]
        made[f"{count} tokens"] = {**bpe, "tokens": words, "merges": ["1 2"]}
        merges = [f"{word[:-1]} {word[-1]}" for word in words if len(word) > 1]
        made[f"{count} merges"] = {**bpe, "tokens": words, "merges": merges}
        for letters in ("ab", "abcd", "abcdefgh"):
            made[f"{count} pieces of {letters}"] = {
                **spm, "tokens": _pieces(count, letters), "scores": np.zeros(count),
            }  # fmt: skip
        long = [f"{i:0512x}" for i in range(count // 64)]
        made[f"{count // 64} long pieces"] = {**spm, "tokens": long, "scores": np.zeros(len(long))}
    paths = [_model(tmp_path / name, vocabulary) for name, vocabulary in made.items()]
    faults = []
    for path, reading in zip(paths, readings("models.gguf_file:read_gguf", paths), strict=True):
        size = path.stat().st_size
        if reading.nbytes > 32 * size + (64 << 20):
            faults.append(f"{path.name}: {reading.nbytes >> 20} MB for {size} bytes")
        if reading.seconds > 2 + 4e-6 * size:
            faults.append(f"{path.name}: {reading.seconds:.1f} s for {size} bytes")
    assert not faults


def test_pieces_that_are_too_long(tmp_path: Path) -> None:
    vocabulary = {"model": "llama", "tokens": ["a" * 513], "scores": np.zeros(1)}
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.tokens has 513 characters in token 0"):
        read_gguf(_model(tmp_path / "long.gguf", vocabulary))


def test_gguf_itself_reads_the_valid_files(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "valid.gguf"
    path.write_bytes(valid)
    ours = read_gguf(path).file
    for stored in gguf.GGUFReader(path).tensors:
        assert ours.header.tensors[stored.name].start == stored.data_offset
        assert ours.header.tensors[stored.name].shape == tuple(stored.shape[::-1])
