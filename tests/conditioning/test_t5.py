"""The T5 encoder at toy size: against the published padded form, from a checkpoint, and what is said when it fails."""

import logging
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers  # its parts are imported when a test asks for them
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from foveate.conditioning.t5 import T5Text
from foveate.conditioning.text import Conditioner
from foveate.core.errors import CheckpointError, FoveateError

WORDS = ["a", "red", "green", "blue", "cat", "dog", "apple", "on", "the", "left", "of", "house"]
PROMPTS = ["a red cat", "", "two green dogs on the left of a house", "apple"]
FILES = ["config.json", "tokenizer.json", "model.safetensors"]


def make_tokenizer() -> Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    # As files may have it, which would change the features in silence.
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    return tokenizer


def make_config() -> "transformers.T5Config":
    # Dropout, so that a model left in training mode shows.
    return transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        dropout_rate=0.5,
        initializer_factor=2.0,
    )


@pytest.fixture
def text() -> T5Text:
    torch.manual_seed(3)
    return T5Text(model=transformers.T5EncoderModel(make_config()), tokenizer=make_tokenizer())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint like the published ones: the decoder and the head are in it, too."""
    torch.manual_seed(4)
    transformers.T5ForConditionalGeneration(make_config()).save_pretrained(tmp_path)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@torch.no_grad()
def published(model: nn.Module, prompt: str, max_tokens: int = 512) -> Tensor:
    """Padded to `max_tokens`, masked, and cut to the real length."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(), pad_token="<pad>", eos_token="</s>"
    )
    tokens = tokenizer([prompt], max_length=max_tokens, padding="max_length", truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape == (1, max_tokens)
    out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state.float()
    return out[0, : int(tokens.attention_mask.sum())]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_real_length_equals_the_published_padded_form(text: T5Text, prompt: str) -> None:
    (x_TE,) = text.encode([prompt])
    torch.testing.assert_close(x_TE, published(text.model, prompt), rtol=1e-4, atol=1e-5)


def test_encode_counts_the_end(text: T5Text) -> None:
    features = text.encode(PROMPTS)
    # "two" is a blank and three letters, "dogs" a word and a letter.
    assert [x_TE.shape for x_TE in features] == [(4, 32), (1, 32), (14, 32), (2, 32)]
    assert all(x_TE.dtype == torch.float32 and not x_TE.requires_grad for x_TE in features)
    assert isinstance(text, Conditioner)


def test_alone_equals_batch(text: T5Text) -> None:
    together = text.encode(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        assert torch.equal(text.encode([prompt])[0], together[index])


def test_too_long_prompt_is_cut_before_its_end(text: T5Text) -> None:
    short = T5Text(model=text.model, tokenizer=text.tokenizer, max_tokens=8)
    prompt = " ".join(["red", "cat"] * 5)
    (cut_TE,) = short.encode([prompt])
    assert short.num_cut(prompt) == 3
    torch.testing.assert_close(cut_TE, published(text.model, prompt, max_tokens=8), rtol=1e-4, atol=1e-5)
    assert torch.equal(cut_TE, text.encode(["red cat red cat red cat red"])[0])


def test_prompt_that_just_fits_is_read_whole(text: T5Text) -> None:
    short = T5Text(model=text.model, tokenizer=text.tokenizer, max_tokens=8)
    assert short.encode(["red " * 7])[0].shape[0] == 8
    assert short.num_cut("red " * 7) == 0


def test_from_pretrained_takes_the_encoder_of_a_full_checkpoint(
    folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        text = T5Text.from_pretrained(folder, local_files_only=True)
    assert not caplog.records
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    encoder = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval().get_encoder()
    for prompt, x_TE in zip(PROMPTS, text.encode(PROMPTS), strict=True):
        torch.testing.assert_close(x_TE, published(encoder, prompt), rtol=1e-4, atol=1e-5)
    assert not any("decoder" in name for name, _ in text.model.named_parameters())


def test_float16_keeps_wo_in_float32(folder: Path) -> None:
    full = T5Text.from_pretrained(str(folder))
    half = T5Text.from_pretrained(folder, dtype=torch.float16, device="cpu")
    dtypes = {name.endswith(".wo.weight"): parameter.dtype for name, parameter in half.model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.float16}
    for name, parameter in half.model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(".wo.weight") else torch.float16), name
    for x_TE, y_TE in zip(full.encode(PROMPTS), half.encode(PROMPTS), strict=True):
        assert y_TE.dtype == torch.float32
        assert not torch.equal(x_TE, y_TE)
        assert torch.nn.functional.cosine_similarity(x_TE, y_TE).min() > 0.999


@pytest.mark.parametrize("missing", FILES)
def test_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=f"a text encoder needs {missing}, no such file in "):
        T5Text.from_pretrained(folder)


@pytest.mark.parametrize("damaged", FILES)
def test_damaged_file_is_one_line(folder: Path, damaged: str) -> None:
    (folder / damaged).write_bytes(b"{ damaged")
    with pytest.raises(CheckpointError) as caught:
        T5Text.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_lack_a_tensor_are_refused(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    lost = "encoder.block.1.layer.0.SelfAttention.k.weight"
    del stored[lost]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"a T5EncoderModel from .*: 1 weights are missing, first {lost}$"):
        T5Text.from_pretrained(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["encoder.final_layer_norm.weight"] = torch.ones(16)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    said = r"encoder.final_layer_norm.weight has shape \(16,\) and must have \(32,\) by config.json$"
    with pytest.raises(CheckpointError, match=said):
        T5Text.from_pretrained(folder)


@pytest.mark.parametrize("name", FILES)
def test_stand_ins_are_named(folder: Path, name: str) -> None:
    for content, what in (
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html>", "web page"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}: the file is a {what}"):
            T5Text.from_pretrained(folder)


@pytest.mark.parametrize("is_pickled", [False, True])
@pytest.mark.parametrize("key", ["shared.weight", "encoder.block.1.layer.1.DenseReluDense.wo.weight"])
def test_weights_that_are_no_numbers_are_refused(folder: Path, key: str, *, is_pickled: bool) -> None:
    path = folder / "model.safetensors"
    stored = load_file(path)
    if is_pickled:
        path.unlink()
        path = folder / "pytorch_model.bin"

    def write(value: float) -> None:
        changed = stored[key].clone()
        changed[0, 0] = value
        save = torch.save if is_pickled else partial(save_file, metadata={"format": "pt"})
        save(stored | {key: changed}, path)

    for value, what in ((float("nan"), "NaN"), (float("-inf"), "infinity")):
        write(value)
        with pytest.raises(CheckpointError) as caught:
            T5Text.from_pretrained(folder, dtype=torch.float16)
        assert str(caught.value).startswith(f"{path}: {key} holds {what} at 1 of {stored[key].numel()} values; ")
        assert "\n" not in str(caught.value)
    write(7e4)
    T5Text.from_pretrained(folder, dtype=torch.bfloat16)
    if key.endswith(".wo.weight"):
        # In float32 beside float16, as published.
        T5Text.from_pretrained(folder, dtype=torch.float16)
        return
    with pytest.raises(
        CheckpointError, match=f"{path}: {key} reaches 70000, but float16 ends at 65504; take --dtype bf"
    ):
        T5Text.from_pretrained(folder, dtype=torch.float16)


def test_a_file_is_no_text_encoder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a text encoder is a folder .*, .*model\.safetensors is a file$"):
        T5Text.from_pretrained(folder / "model.safetensors")


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.path,)


def test_pickles_may_hold_tensors_only(folder: Path) -> None:
    expected = T5Text.from_pretrained(folder).encode(["a red cat"])[0]
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(T5Text.from_pretrained(folder).encode(["a red cat"])[0], expected)
    torch.save(weights | {"more": Harm(folder / "harmed")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="are pickled and hold more than tensors; use those in safetensors"):
        T5Text.from_pretrained(folder)
    assert not (folder / "harmed").exists()


def test_without_transformers_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FoveateError, match=r'not installed: pip install "foveate\[text\]"$'):
        T5Text.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (Path("no/such/folder"), "no text encoder at no/such/folder: no such file or folder; give an existing path"),
        ("./folder", "no text encoder at ./folder: no such file or folder; give an existing path"),
        ("/no/such/folder", "no text encoder at /no/such/folder: no such file or folder; give an existing path"),
        (
            "~/folder",
            "no text encoder at ~/folder: no such file or folder (`~` is not expanded); give an existing path",
        ),
        ("folder", "no text encoder at folder: no such file or folder"),
        ("a/b/c", "no text encoder at a/b/c: no such file or folder"),
        ("weights/t5.safetensors", "no text encoder at weights/t5.safetensors: no such file or folder"),
        (Path("nobody-at-all/nothing"), "no text encoder at nobody-at-all/nothing: no such file or folder"),
        ("nobody-at-all/nothing-2.5", "no folder nobody-at-all/nothing-2.5, and no tokenizer.json from the hub: "),
        ("nobody-at-all/nothing", "no folder nobody-at-all/nothing, and no tokenizer.json from the hub: "),
    ],
)
def test_what_does_not_exist_is_named(name: str | Path, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        T5Text.from_pretrained(name, local_files_only=True)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_settings_are_checked(text: T5Text) -> None:
    with pytest.raises(FoveateError, match="max_tokens must be at least 2, got 1"):
        T5Text(model=text.model, tokenizer=text.tokenizer, max_tokens=1)
    endless = make_tokenizer()
    endless.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(FoveateError, match="tokenizer must add an end token"):
        T5Text(model=text.model, tokenizer=endless)
    large = make_tokenizer()
    large.add_tokens([f"word{index}" for index in range(64)])
    with pytest.raises(FoveateError, match="tokenizer must have at most vocab_size = 64 tokens, got 10"):
        T5Text(model=text.model, tokenizer=large)


def test_nothing_imports_transformers_before_an_encoder_is_read() -> None:
    code = (
        "import sys\n"
        "import foveate, foveate.pipeline\n"
        "import foveate.conditioning.clip, foveate.conditioning.label, foveate.conditioning.t5\n"
        "from foveate.cli.main import main\n"
        "assert main(['generate', '--help']) == 0\n"
        "assert 'transformers' not in sys.modules\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
