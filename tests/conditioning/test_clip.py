"""The two CLIP encoders at toy size: against the published padded form, from checkpoints, and what they refuse."""

import logging
from pathlib import Path

import pytest
import torch
import transformers  # its parts are imported when a test asks for them
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from foveate.conditioning.clip import ClipPair, ClipText
from foveate.conditioning.text import Conditioner
from foveate.core.errors import CheckpointError, FoveateError

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "!abcdefghijklmnopqrstuvwxyz"
VOCAB = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ca", "cat</w>", START, END]
PROMPTS = ["a red cat", "", "two Green dogs on the left of a house!", "apple"]
# The published configurations give the end token an old number, and then the pooled vector is found in another way.
OLD_END = 2


def make_tokenizer() -> Tokenizer:
    ids = {token: index for index, token in enumerate(VOCAB)}
    tokenizer = Tokenizer(
        models.BPE(ids, [("c", "a"), ("ca", "t</w>")], end_of_word_suffix="</w>", unk_token=END, fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.RobertaProcessing((END, ids[END]), (START, ids[START]))
    tokenizer.add_special_tokens([START, END])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=20)
    return tokenizer


def make_config(width: int, end: int, max_tokens: int = 77) -> "transformers.CLIPTextConfig":
    return transformers.CLIPTextConfig(
        vocab_size=len(VOCAB),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_tokens,
        hidden_act="quick_gelu" if end == OLD_END else "gelu",
        attention_dropout=0.5,
        initializer_factor=4.0,
        bos_token_id=VOCAB.index(START),
        eos_token_id=end,
        pad_token_id=0,
    )


def make_encoder(width: int, end: int, max_tokens: int = 77) -> ClipText:
    torch.manual_seed(width)
    model = transformers.CLIPTextModel(make_config(width, end, max_tokens))
    for parameter in model.parameters():
        # Biases and norms away from 0 and 1, so that leaving one out shows.
        parameter.data += 0.1 * torch.randn_like(parameter)
    return ClipText(model=model, tokenizer=make_tokenizer())


@pytest.fixture
def pair() -> ClipPair:
    return ClipPair(first=make_encoder(24, OLD_END), second=make_encoder(40, VOCAB.index(END)))


@torch.no_grad()
def published(pair: ClipPair, prompt: str) -> tuple[Tensor, Tensor]:
    """Both encoders over all padded positions, side by side; then the mask of the second; and its pooled vector."""
    outputs, masks = [], []
    for encoder in (pair.first, pair.second):
        # Both published tokenizers pad with the end token.
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=make_tokenizer(), pad_token=END, eos_token=END
        )
        tokens = tokenizer(
            [prompt], max_length=encoder.max_tokens, padding="max_length", truncation=True, return_tensors="pt"
        )
        assert tokens.input_ids.shape == (1, encoder.max_tokens)
        outputs.append(encoder.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask))
        masks.append(tokens.attention_mask[0].bool())
    hidden = torch.cat([out.last_hidden_state for out in outputs], dim=-1)[0]
    return hidden[masks[1]], outputs[1].pooler_output[0]


@pytest.mark.parametrize("prompt", [*PROMPTS, f"a {END} in the middle"])
def test_real_length_equals_the_published_padded_form(pair: ClipPair, prompt: str) -> None:
    (features,) = pair.encode([prompt])
    tokens_TE, pooled_F = published(pair, prompt)
    torch.testing.assert_close(features.tokens_TE, tokens_TE, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.pooled_F, pooled_F, rtol=1e-4, atol=1e-5)


def test_encode_counts_both_ends(pair: ClipPair) -> None:
    features = pair.encode(PROMPTS)
    # Letters, "cat" as one token, and two ends.
    assert isinstance(pair, Conditioner)
    assert [x.tokens_TE.shape for x in features] == [(7, 64), (2, 64), (32, 64), (7, 64)]
    for x in features:
        assert x.pooled_F.shape == (40,)
        assert x.tokens_TE.dtype == x.pooled_F.dtype == torch.float32
        assert not x.tokens_TE.requires_grad
        assert torch.equal(x.pooled_F, x.tokens_TE[-1, 24:]), "the second encoder's hidden state at the end token"


def test_alone_equals_batch(pair: ClipPair) -> None:
    together = pair.encode(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        (alone,) = pair.encode([prompt])
        assert torch.equal(alone.tokens_TE, together[index].tokens_TE)
        assert torch.equal(alone.pooled_F, together[index].pooled_F)


def test_too_long_prompt_is_cut_before_its_end(pair: ClipPair) -> None:
    prompt = "cat " * 80
    (features,) = pair.encode([prompt])
    assert pair.num_cut(prompt) == 5
    tokens_TE, pooled_F = published(pair, prompt)
    assert tokens_TE.shape == (77, 64)
    torch.testing.assert_close(features.tokens_TE, tokens_TE, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.pooled_F, pooled_F, rtol=1e-4, atol=1e-5)


def test_prompt_that_just_fits_is_read_whole(pair: ClipPair) -> None:
    assert pair.encode(["cat " * 75])[0].tokens_TE.shape == (77, 64)
    assert pair.num_cut("cat " * 75) == 0


@pytest.fixture
def folders(tmp_path: Path, pair: ClipPair) -> tuple[Path, Path]:
    """The first as a whole CLIP, image encoder and all, like the published ones; the second with its text part only."""
    both = transformers.CLIPConfig(
        text_config=pair.first.model.config.to_dict(),
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    whole = transformers.CLIPModel(both)
    whole.text_model.load_state_dict(pair.first.model.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    pair.second.model.save_pretrained(tmp_path / "text")
    for name in ("whole", "text"):
        make_tokenizer().save(str(tmp_path / name / "tokenizer.json"))
    return tmp_path / "whole", tmp_path / "text"


def test_from_pretrained_takes_the_text_part(
    pair: ClipPair, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert any(key.startswith("vision_model.") for key in load_file(folders[0] / "model.safetensors"))
    with caplog.at_level(logging.WARNING):
        loaded = ClipPair.from_pretrained(*folders, local_files_only=True)
    assert not caplog.records
    for x, y in zip(pair.encode(PROMPTS), loaded.encode(PROMPTS), strict=True):
        assert torch.equal(x.tokens_TE, y.tokens_TE)
        assert torch.equal(x.pooled_F, y.pooled_F)


def test_load_in_bfloat16_returns_float32(pair: ClipPair, folders: tuple[Path, Path]) -> None:
    loaded = ClipPair.from_pretrained(*folders, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for e in (loaded.first, loaded.second) for p in e.model.parameters()} == {torch.bfloat16}
    (x,), (y,) = pair.encode(["a red cat"]), loaded.encode(["a red cat"])
    assert y.tokens_TE.dtype == y.pooled_F.dtype == torch.float32
    assert not torch.equal(x.tokens_TE, y.tokens_TE)
    assert torch.nn.functional.cosine_similarity(x.tokens_TE, y.tokens_TE).min() > 0.99


def test_checkpoint_that_lacks_a_weight_is_refused(folders: tuple[Path, Path]) -> None:
    path = folders[0] / "model.safetensors"
    stored = load_file(path)
    del stored["text_model.final_layer_norm.bias"]
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"a CLIPTextModel from .*: 1 weights are missing, first .*layer_norm"):
        ClipPair.from_pretrained(*folders)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(folders: tuple[Path, Path], which: int, missing: str) -> None:
    (folders[which] / missing).unlink()
    with pytest.raises(CheckpointError, match=f"needs {missing}, no such file in {folders[which]}$"):
        ClipPair.from_pretrained(*folders)


def test_encoders_that_are_no_pair_are_refused(pair: ClipPair) -> None:
    with pytest.raises(FoveateError, match="same length, got 77 and 64 tokens"):
        ClipPair(first=pair.first, second=make_encoder(40, VOCAB.index(END), max_tokens=64))
    other = make_tokenizer()
    other.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("e")
    odd = ClipPair(first=pair.first, second=ClipText(model=pair.second.model, tokenizer=other))
    with pytest.raises(FoveateError, match=r"must cut a prompt alike, got 7 and 6 tokens for 'apple'; use the"):
        odd.encode(["apple"])
