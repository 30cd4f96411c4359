"""RBETransformer: a compressed encoder as the module of a `SentenceTransformer`.

sentence-transformers calls `preprocess` (`tokenize` before version 6) on a batch of texts, then the module on the
features, and reads `sentence_embedding` from them. Nothing of the library is imported until a model of it is made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.json_files import read_json
from ..models.load import load_embedder
from ..output import replacing, write_text
from ..transfer import to
from .tensors import ArrayModule, as_tensor, current_stream, outside_of_graphs

_FILE, _SETTINGS = "model.rbe.safetensors", "rbe_settings.json"


def load(path: str | Path, device: str = "cpu", **options: Any) -> Any:
    """A `SentenceTransformer` of a compressed file, with the prompts that the file names.

    options : of `RBETransformer`
    """
    from sentence_transformers import SentenceTransformer

    module = RBETransformer(path, **options)
    encoder = module.encoder
    return SentenceTransformer(
        modules=[module],
        prompts=dict(encoder.prompts),
        default_prompt_name=encoder.default_prompt_name,
        device=device,
    )


class RBETransformer(ArrayModule):
    """A compressed encoder, from texts to their vectors: `SentenceTransformer(modules=[RBETransformer(path)])`.

    The vectors are those of `rbe_gpu.load(path).embed(texts)`: pooled, normalised and truncated as the file says.

    Parameters
    ----------
    path : a `.rbe.safetensors` file of an encoder with its tokenizer
    activations, cache_bytes, dtype : as for `rbe_gpu.load`
    max_seq_length : tokens that texts are truncated to; None: as the file says

    Attributes
    ----------
    encoder : TextEmbedder
    """

    def __init__(
        self,
        path: str | Path,
        activations: str | None = None,
        cache_bytes: int = 0,
        dtype: str = "float32",
        max_seq_length: int | None = None,
    ) -> None:
        super().__init__()
        self.path = Path(path).expanduser().absolute()
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} is no file; `rbe-gpu compress FOLDER -o FILE` makes one")
        self._version = _version(self.path)
        self._options = {"activations": activations, "cache_bytes": cache_bytes, "dtype": dtype}
        self.encoder = load_embedder(self.path, cache_bytes, dtype, activations)
        if self.encoder.tokenizer is None:
            raise ValueError(f"{path} holds no tokenizer")
        if max_seq_length is not None:
            self.max_seq_length = max_seq_length

    # --- what sentence-transformers asks for ----------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        return self.encoder.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens that texts are truncated to."""
        return self.encoder.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        tokenizer, most = self.encoder.tokenizer, self.encoder.max_positions
        least = tokenizer.num_special_tokens_to_add(False) + 1
        if not isinstance(tokens, int) or not least <= tokens <= most:
            raise ValueError(f"max_seq_length={tokens!r} is not an integer of {least} to {most}")
        tokenizer.enable_truncation(tokens, direction=tokenizer.truncation["direction"])
        self.encoder.max_seq_length = tokens

    def get_embedding_dimension(self) -> int:
        """Columns of the vectors."""
        return self.encoder.embedding_size

    get_sentence_embedding_dimension = get_embedding_dimension  # its name before version 6

    def preprocess(
        self, inputs: Sequence[str], prompt: str | None = None, task: str | None = None
    ) -> dict[str, Any]:
        """Features of texts, each with `prompt` before it.

        Returns
        -------
        input_ids, attention_mask : (batch, seq) int64, padding on the right
        prompt_length : tokens of the prompt, if they are not pooled
        """
        sequences = self.encoder.token_ids(list(inputs), prompt or "")
        seq = max(map(len, sequences), default=0)
        ids, mask = torch.zeros(len(sequences), seq, dtype=torch.int64), torch.zeros(len(sequences), seq)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence)
            mask[row, : len(sequence)] = 1
        features: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.to(torch.int64)}
        if prompt and not self.encoder.include_prompt:
            features["prompt_length"] = self.encoder.prompt_length(prompt)
        return features

    def tokenize(self, texts: Sequence[str], **options: Any) -> dict[str, Any]:
        """`preprocess`, under its name before version 6."""
        return self.preprocess(texts, **options)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Add `token_embeddings` (batch, seq, hidden) and `sentence_embedding` (batch, embedding_size) float32."""
        if torch.compiler.is_compiling():
            return _outside_of_graphs(self, features)  # type: ignore[no-any-return]
        return self._embed(features)

    def _embed(self, features: dict[str, Any]) -> dict[str, Any]:
        encoder = self.encoder
        ids, mask = features["input_ids"].cpu().numpy(), features["attention_mask"].cpu().numpy()
        lengths = mask.sum(axis=1, dtype=np.int64)
        if not np.array_equal(mask != 0, np.arange(mask.shape[1]) < lengths[:, None]):
            raise ValueError("attention_mask is not that of padding on the right, as `preprocess` makes it")
        skipped = 0 if encoder.include_prompt else int(features.get("prompt_length") or 0)
        with current_stream(self._place.device):
            states: Any = encoder.forward(ids, lengths)
            pooled, remaining = states, lengths
            if skipped:
                pooled, remaining = states[:, skipped:].copy(), np.maximum(lengths - skipped, 0)
            vectors: Any = encoder.pool(pooled, to(remaining, encoder.device), skipped=skipped)
            if not remaining.all():
                without = to(np.flatnonzero(remaining == 0), encoder.device)
                vectors[without] = to(encoder.vector_without_tokens(), encoder.device)
            features["token_embeddings"] = as_tensor(states)
            features["sentence_embedding"] = as_tensor(vectors)[:, : encoder.embedding_size]
        return features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write the file and the settings into a folder.

        Raises
        ------
        ValueError
            The file that the module was made from has been changed since.
        """
        if _version(self.path) != self._version:
            raise ValueError(f"{self.path} has been changed since it was loaded; load it again to save it")
        folder = Path(output_path)
        if not (folder / _FILE).exists() or not (folder / _FILE).samefile(self.path):
            with open(self.path, "rb") as source, replacing(folder / _FILE) as file:
                shutil.copyfileobj(source, file)
        settings = {**self._options, "max_seq_length": self.max_seq_length}
        write_text(folder / _SETTINGS, json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **_: Any,
    ) -> RBETransformer:
        """The module that `save` wrote; a name that is no folder is looked up on the Hugging Face Hub."""

        def file(name: str) -> Path:
            if Path(model_name_or_path).is_dir():
                return Path(model_name_or_path) / subfolder / name
            from sentence_transformers.util import load_file_path

            there = load_file_path(
                model_name_or_path,
                name,
                subfolder=subfolder,
                token=token,
                cache_folder=cache_folder,
                revision=revision,
                local_files_only=local_files_only,
            )
            if there is None:
                raise FileNotFoundError(f"{model_name_or_path} has no {name} in {subfolder or 'its root'}")
            return Path(there)

        settings = file(_SETTINGS)
        return cls(file(_FILE), **_checked(read_json(settings), settings))

    def _move(self, device: str) -> None:
        if device != self.encoder.device:
            self.encoder = to(self.encoder, device)

    def extra_repr(self) -> str:
        return f"{self.path.name}, {self.encoder!r}"


_outside_of_graphs = outside_of_graphs(RBETransformer._embed)


def _version(path: Path) -> tuple[int, ...]:
    """What differs between two versions of a file."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _checked(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings that `save` writes, each of its type; what they say is checked where it is used."""
    types = {"activations": str | None, "cache_bytes": int, "dtype": str, "max_seq_length": int}
    for name, value in settings.items():
        if name not in types or not isinstance(value, types[name]) or isinstance(value, bool):
            raise ValueError(f"{path}: {name}={value!r} is not a setting of RBETransformer")
    return dict(settings)
