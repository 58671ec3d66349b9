"""The language model that HART reads, at toy size: against the published form, from files, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from foveate.conditioning.qwen2 import (
    Padding,
    QwenText,
    RandomPlacedText,
    positions_of,
    published_system_prompt,
)
from foveate.conditioning.text import Conditioner
from foveate.core.errors import CheckpointError

PAD = "<|endoftext|>"
VOCAB = [PAD, "[UNK]", *["a", "red", "green", "cat", "dog", "on", "the", "left", "Given", "user", "prompt", "generate"]]
MAX_TOKENS, WIDTH = 6, 24


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([PAD])
    return tokenizer


def make_model() -> "transformers.Qwen2Model":
    torch.manual_seed(3)
    return transformers.Qwen2Model(
        transformers.Qwen2Config(
            vocab_size=len(VOCAB), hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.3,
        )
    )  # fmt: skip


def make_text(*, is_left: bool = False, system: str | None = "Given user prompt") -> QwenText:
    return QwenText(
        model=make_model(),
        tokenizer=make_tokenizer(),
        padding=Padding(token=0, is_left=is_left),
        max_tokens=MAX_TOKENS,
        system_prompt=system,
    )


@torch.no_grad()
def published(text: QwenText, prompt: str, *, is_left: bool) -> tuple[Tensor, list[int]]:
    """Padded by transformers' own tokenizer, mask and running count by the padding token, the system prompt cut."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(), pad_token=PAD, padding_side="left" if is_left else "right"
    )
    ids = tokenizer(prompt, max_length=MAX_TOKENS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    mask = ids != 0
    system = tokenizer("Given user prompt", return_tensors="pt").input_ids
    hidden = text.model(
        torch.cat((system, ids), 1),
        attention_mask=torch.cat((torch.ones_like(system), mask.long()), 1),
        output_hidden_states=True,
    ).hidden_states[-1]
    return hidden[0, system.shape[1] :], (mask.cumsum(1) - 1)[0].tolist()


@pytest.mark.parametrize("is_left", [False, True])
@pytest.mark.parametrize("prompt", ["a red cat", "the cat on the left dog a red", f"a {PAD} dog"])
def test_equals_the_published_form(prompt: str, is_left: bool) -> None:
    text = make_text(is_left=is_left)
    assert isinstance(text, Conditioner)
    found = text.encode(["dog", prompt])[1]
    hidden, positions = published(text, prompt, is_left=is_left)
    assert torch.allclose(found.tokens_TE, hidden, atol=1e-6)
    assert found.positions == tuple(positions)
    assert torch.equal(text.encode([prompt])[0].tokens_TE, found.tokens_TE)
    assert text.num_cut(prompt) == (2 if "on" in prompt else 0)


def test_the_system_prompt_is_read_and_cut() -> None:
    with_it, without = (make_text(system=system).encode(["a cat"])[0] for system in ("Given user", ""))
    assert with_it.tokens_TE.shape == without.tokens_TE.shape == (MAX_TOKENS, WIDTH)
    assert not torch.allclose(with_it.tokens_TE, without.tokens_TE, atol=1e-2)
    said = published_system_prompt()
    assert said.startswith('Given a user prompt, generate an "Enhanced prompt"')
    assert said.endswith("User Prompt:\n")


@pytest.mark.parametrize("text", [make_text(), RandomPlacedText(width=WIDTH, max_tokens=6, device=torch.device("cpu"))])
def test_no_prompt_is_zeros_in_two_tokens(text: Conditioner) -> None:
    (found,) = text.encode([""])
    assert found.tokens_TE.shape == (2, WIDTH)
    assert not found.tokens_TE.any()
    assert (found.positions, found.first_copies) == ((0, 0), MAX_TOKENS - 1)


def test_random_texts_have_the_full_length() -> None:
    text = RandomPlacedText(width=WIDTH, max_tokens=MAX_TOKENS, device=torch.device("cpu"))
    first, again = text.encode(["a cat", "a cat"])
    assert torch.equal(first.tokens_TE, again.tokens_TE)
    assert first.positions == (0, 1, 2, 3, 3, 3)
    assert not first.tokens_TE[4:].any()
    assert text.num_cut("a b c d e f g") == 3


def test_positions_count_the_prompt() -> None:
    assert positions_of([True, True, False, False]) == (0, 1, 1, 1)
    assert positions_of([False, False, True, True]) == (-1, -1, 0, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": PAD, "padding_side": "left"}))
    return tmp_path


def test_is_read_from_files(folder: Path) -> None:
    text = QwenText.from_pretrained(folder, max_tokens=MAX_TOKENS)
    assert text.padding == Padding(token=0, is_left=True)
    own = QwenText(model=make_model(), tokenizer=make_tokenizer(), padding=text.padding, max_tokens=MAX_TOKENS)
    assert torch.allclose(text.encode(["a cat"])[0].tokens_TE, own.encode(["a cat"])[0].tokens_TE, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "match"),
    [('{"pad_token": "[PAD]"}', r"padding token '\[PAD\]' is not in the tokenizer"), ("{", "not readable as JSON")],
)
def test_padding_that_cannot_be_told_is_refused(folder: Path, content: str, match: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=match):
        QwenText.from_pretrained(folder)
