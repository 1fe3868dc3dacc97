"""Sentence vectors of a person's texts, made on the device by a small encoder and kept for reuse.

**Guarantee**: vectors are as private as the texts they were made from; they are kept in the vault
(`kept_bytes`) and nothing sends them.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from ...common.errors import ModelError, StateError
from ...common.model.base_model import BaseModel, final_states, load, pad
from ...common.settings.sections import ComputeSettings
from .retrieval import Encoder

__all__ = ["embed", "embed_new", "kept_bytes", "read_kept", "sentence_encoder"]

MAX_TOKENS = 256
"""Tokens of a text that are read; what all-MiniLM-L6-v2 was trained with."""
BATCH = 32
_DIGEST = 16

Known = Mapping[bytes, NDArray[np.float32]]
Step = Callable[[int], object]


def sentence_encoder(name: str = "minilm") -> Encoder:
    """Load an encoder that turns texts into sentence vectors.

    Any encoder will do whose mean final state means something, in the catalogue or not.

    Raises:
        ModelError: a decoder, or no such model.
        AssetError: it cannot be fetched.
    """
    base = load(name, ComputeSettings(device="cpu", dtype="float32"))  # vectors are kept
    if base.kind != "encoder":
        raise ModelError(f"{name!r} makes text, not sentence vectors; take an encoder (minilm)")
    return lambda texts: embed(base, texts)


@torch.inference_mode()
def embed(base: BaseModel, texts: Sequence[str], step: Step | None = None) -> NDArray[np.float32]:
    """Return a sentence vector for each text, (texts, width).

    It is the mean of the final states of the text's tokens, scaled to length 1.

    Batches hold texts of about one length. A text of which nothing is left is a row of zeros.

    Args:
        base: an encoder.
        texts: any number.
        step: told the number of texts done after each batch.
    """
    vectors = np.zeros((len(texts), base.width), np.float32)
    if not texts:
        return vectors
    rows = base.tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS, verbose=False)
    rows = rows["input_ids"]
    order = sorted((i for i, ids in enumerate(rows) if ids), key=lambda i: len(rows[i]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        ids, mask = pad([rows[i] for i in batch])
        weight = mask[..., None].float()
        mean = (final_states(base, ids, mask) * weight).sum(1) / weight.sum(1)
        vectors[batch] = torch.nn.functional.normalize(mean, dim=1).numpy()
        if step is not None:
            step(len(batch))
    return vectors


def embed_new(texts: Sequence[str], encoder: Encoder, known: Known) -> NDArray[np.float32]:
    """Return the sentence vectors of texts, encoding only those that are not known already.

    Returns:
        (texts, width); (0, 0) without texts.
    """
    digests = [_digest(text) for text in texts]
    fresh = {d: text for d, text in zip(digests, texts, strict=True) if d not in known}
    made = dict(zip(fresh, encoder(list(fresh.values())), strict=True)) if fresh else {}
    rows = [known[d] if d in known else made[d] for d in digests]
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


def kept_bytes(texts: Sequence[str], vectors: NDArray[np.float32]) -> bytes:
    """Return sentence vectors as the safetensors file that the vault keeps.

    It has two bytes a number, and no text.
    """
    digests = np.frombuffer(b"".join(map(_digest, texts)), np.uint8).reshape(len(texts), _DIGEST)
    content: bytes = safetensors.numpy.save(
        {"digests": digests, "vectors": vectors.astype(np.float16)}
    )
    return content


def read_kept(content: bytes | None, width: int) -> dict[bytes, NDArray[np.float32]]:
    """Read the sentence vectors that `kept_bytes` wrote, by the digest of their text.

    Empty where nothing was kept, or another encoder made them.

    Raises:
        StateError: it is not such a file.
    """
    if content is None:
        return {}
    try:
        tensors = safetensors.numpy.load(content)
        digests, vectors = tensors["digests"], tensors["vectors"].astype(np.float32)
        rows = [row.tobytes() for row in digests]
        known = dict(zip(rows, vectors, strict=True))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise StateError(
            f"the kept sentence vectors cannot be read ({error}); remove the vault's entry "
            "retrieval/, and they are made again"
        ) from None
    return known if vectors.ndim == 2 and vectors.shape[1] == width else {}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=_DIGEST).digest()
