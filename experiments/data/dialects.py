"""A made population of people who write one language in three dialects, and a small base model.

Sentences come from templates over a small vocabulary. A dialect is a deterministic map of the
spelling of content words; the words that hold a sentence together are the same in all three:

    plain     forest, carries       as they are
    northern  forestie, carriesie   -ie at the end of a word
    old       forestth, carriesth   -th at the end of a word

Somebody writes `STRENGTH` of the content words in their own dialect, the others in any of the
three, and has favourite words of their own. The dialect is the first part of a user's name
(`northern/0012`); nothing else says it, and no device is told.

The base model is a small Llama, trained for half a minute on sentences of each dialect alike: it
knows all three, and no more of one than of another. Everything is made from public seeds.
"""

import random
from pathlib import Path

from ...client.training.records import Record
from ..progress import say
from .record_sources import DataSource, SourceUser

__all__ = ["BASE", "DIALECTS", "dialect_of", "dialects_source", "ensure_base", "spelled"]

BASE = "./runs/dialects-base"
PEOPLE, RECORDS = 600, 40
STRENGTH = 0.85
FAVOURITES = 8

ENDINGS = {"plain": "", "northern": "ie", "old": "th"}
DIALECTS = tuple(ENDINGS)
NOUNS = (
    "river", "forest", "market", "garden", "teacher", "farmer", "window", "letter", "winter",
    "village", "horse", "bridge", "kitchen", "doctor", "mountain", "lantern", "carpet", "sister",
    "captain", "island",
)  # fmt: skip
ADJECTIVES = (
    "small", "quiet", "golden", "broken", "clever", "distant", "gentle", "hollow", "narrow",
    "patient", "rough", "silver", "tall", "warm", "young", "empty",
)  # fmt: skip
VERBS = (
    "follows", "carries", "watches", "builds", "forgets", "paints", "visits", "opens", "borrows",
    "praises", "mends", "guards", "hears", "leaves", "needs", "finds",
)  # fmt: skip
FRAME = ("the", "a", "and", "near", "behind", "while", "because", "today")
TEMPLATES = (
    "the A N V a N near the A N",
    "a N V the A N and V the N",
    "the N near the N V a A N today",
    "a A N V the N because the N V the A N",
    "the N V the N while a A N V the N",
)

SIZE = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 64}  # fmt: skip


def spelled(word: str, dialect: str) -> str:
    """A content word as a dialect spells it."""
    return word + ENDINGS[dialect]


def dialect_of(user: str) -> str:
    """The dialect a made person writes, for an experimenter to compare with."""
    return user.partition("/")[0]


def dialects_source(seed: int) -> DataSource:
    """`PEOPLE` people of `RECORDS` sentences each, a third in each dialect."""
    people = tuple(
        SourceUser(f"{DIALECTS[number % len(DIALECTS)]}/{number:04d}", None, RECORDS)
        for number in range(PEOPLE)
    )

    def read(user: str) -> tuple[Record, ...]:
        rng = random.Random(f"{seed} {user}")
        words = {kind: rng.sample(words, FAVOURITES) for kind, words in _KINDS.items()}
        own = dialect_of(user)
        return tuple(Record(_sentence(rng, words, own), None, time) for time in range(RECORDS))

    return DataSource("dialects", people, "generation", None, read)


_KINDS = {"N": list(NOUNS), "A": list(ADJECTIVES), "V": list(VERBS)}


def _sentence(rng: random.Random, words: dict[str, list[str]], dialect: str) -> str:
    found = []
    for part in rng.choice(TEMPLATES).split():
        if part not in words:
            found.append(part)
            continue
        written = dialect if rng.random() < STRENGTH else rng.choice(DIALECTS)
        found.append(spelled(rng.choice(words[part]), written))
    return " ".join(found)


def ensure_base(folder: Path, *, steps: int = 800, seed: int = 7) -> None:
    """Train and save the base model in `folder`, unless it is there."""
    if (folder / "config.json").exists():
        return
    import torch

    from .made_model import made_model

    say(f"making the base model of the dialects in {folder} (once, half a minute)")
    content = [spelled(w, d) for words in _KINDS.values() for w in words for d in DIALECTS]
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, model = made_model((*FRAME, *content), SIZE, framed=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            texts = [_sentence(rng, _KINDS, rng.choice(DIALECTS)) for _ in range(64)]
            batch = tokenizer(texts, padding=True, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    say(f"the base model of the dialects has a loss of {float(loss.detach()):.3f} nats per token")
    tokenizer.save_pretrained(folder)
    model.eval().save_pretrained(folder)
