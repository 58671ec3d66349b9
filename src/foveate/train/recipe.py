"""The whole recipe of a bundled model from one file: corpus, tokenizer, transformer, export; resumable at any moment.

Each stage writes into the output folder and is left out when its result is there; a stage that was stopped goes on from
its last checkpoint. The same file serves a CPU and a GPU: `device` and the minutes are all that differ.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from jaxtyping import UInt8
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.conditioning.minilm import TextEncoder
from foveate.core.atomic import replace_file
from foveate.core.errors import FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.state import Request
from foveate.families.spec import Defaults, ModelSpec
from foveate.folder import AUTOENCODER, TRANSFORMER, read_network, save_folder
from foveate.models.checkpoint_infinity import load_autoencoder, load_transformer
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.policies.full import Full
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.bsq import BSQTokenizer
from foveate.train.captions import all_captions, framed_captions
from foveate.train.corpus import Corpus, CorpusConfig, build_corpus, load_corpus
from foveate.train.loop import Optimisation
from foveate.train.minilm_import import import_minilm
from foveate.train.tokenizer import TokenizerRecipe, composite, latents_of, psnr_of, reconstruct, train_tokenizer
from foveate.train.transformer import Examples, TransformerRecipe, train_transformer

Stage = Literal["corpus", "tokenizer", "transformer", "export", "all"]
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that a training file says."""

    name: str
    budget: str
    corpus: CorpusConfig
    tokenizer: TokenizerRecipe
    transformer: TransformerRecipe
    defaults: Defaults
    sheet: tuple[str, ...]
    notice: str
    card: str


def load_recipe(path: Path, minutes_scale: float = 1.0) -> Recipe:
    """Reads a training file; `corpus` in it names another file beside it.

    Raises:
        FoveateError: The file cannot be read, or a field is missing or unknown.
    """
    try:
        data = _read_yaml(path)
        corpus = CorpusConfig.from_dict(_read_yaml(path.parent / data["corpus"]))
        schedule = ScaleSchedule.from_template(1.0, data["budget"])
        run = {"device": data["device"], "dtype": data["dtype"]}
        shape = data["autoencoder"] | {"channel_multipliers": tuple(data["autoencoder"]["channel_multipliers"])}
        tokenizer = TokenizerRecipe(
            shape=AutoencoderConfig(**shape),
            grids=schedule.grids,
            optimisation=_optimisation(data["tokenizer"].pop("optimisation"), minutes_scale),
            **data["tokenizer"],
            **run,
        )
        transformer = TransformerRecipe(
            shape=InfinityConfig(**data["transformer"].pop("shape")),
            schedule=schedule,
            optimisation=_optimisation(data["transformer"].pop("optimisation"), minutes_scale),
            **data["transformer"],
            **run,
        )
        notice = (path.parent / data["notice"]).read_text(encoding="utf-8")
        card = (path.parent / data["card"]).read_text(encoding="utf-8")
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["defaults"].items()}
        return Recipe(
            name=data["name"],
            budget=data["budget"],
            corpus=corpus,
            tokenizer=tokenizer,
            transformer=transformer,
            defaults=Defaults(**tuples),
            sheet=tuple(data["sheet"]),
            notice=notice,
            card=card,
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise FoveateError(f"cannot read the training file {path}: {error!r}") from None


def load_corpus_config(path: Path) -> CorpusConfig:
    """Reads what goes into a corpus, from a corpus file or from the training file that names one.

    Raises:
        FoveateError: A file cannot be read, or a field is unknown or wrong.
    """
    try:
        data = _read_yaml(path)
        return CorpusConfig.from_dict(_read_yaml(path.parent / data["corpus"]) if "corpus" in data else data)
    except (OSError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise FoveateError(f"cannot read the corpus file {path}: {error!r}") from None


def _read_yaml(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds; its readers check it
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _optimisation(fields: dict[str, Any], minutes_scale: float) -> Optimisation:
    return Optimisation(**(fields | {"minutes": fields["minutes"] * minutes_scale}))


def train(
    config: Path,
    out: Path,
    stage: Stage = "all",
    log: Log = print,
    minutes_scale: float = 1.0,
    start_from: Path | None = None,
) -> Path:
    """Runs one stage or all of them.

    Args:
        config: The training file; for the corpus alone, a corpus file does as well.
        out: Folder of the run; give it again to resume.
        stage: What to run; "all" runs what is missing.
        log: Receives progress lines.
        minutes_scale: Multiplies the minutes of both networks, for a dry run.
        start_from: Folder of a model of the same shape, for example the bundled one: its tokenizer is kept, its
            transformer is trained further. A checkpoint in `out` goes before it.

    Returns:
        The folder of the exported model, or of the stage's result.
    """
    out.mkdir(parents=True, exist_ok=True)
    if stage == "corpus":
        return make_corpus(load_corpus_config(config), out, log)
    recipe = load_recipe(config, minutes_scale)
    run = TrainingFolder(recipe, out, log, start_from)
    stages = ["corpus", "tokenizer", "transformer", "export"] if stage == "all" else [stage]
    result = out
    for name in stages:
        log(f"stage {name}")
        result = {
            "corpus": run.corpus,
            "tokenizer": run.tokenizer,
            "transformer": run.transformer,
            "export": run.export,
        }[name]()
    return result


def make_corpus(config: CorpusConfig, out: Path, log: Log) -> Path:
    """Builds the corpus of a run in its folder, unless it is there; packages are kept beside it."""
    folder = out / "corpus"
    if not folder.exists():
        build_corpus(config, folder, out / "packages", log)
    return folder


class TrainingFolder:
    """The stages of one recipe in one folder."""

    def __init__(self, recipe: Recipe, out: Path, log: Log, start_from: Path | None = None) -> None:
        self.recipe, self.out, self.log, self.start_from = recipe, out, log, start_from

    def corpus(self) -> Path:
        """Builds the corpus, unless it is there."""
        return make_corpus(self.recipe.corpus, self.out, self.log)

    def tokenizer(self) -> Path:
        """Trains the autoencoder, unless its weights are there; logs PSNR on seen and on held-out drawings."""
        path = self.out / "autoencoder.safetensors"
        if path.exists():
            return path
        if self.start_from is not None:
            cpu = torch.device("cpu")
            shape = self.recipe.tokenizer.shape
            stored = self.start_from / AUTOENCODER
            kept = read_network(stored, lambda: Autoencoder(shape), load_autoencoder, torch.float32, cpu)
            _save(kept.state_dict(), path)
            return path
        corpus = load_corpus(self.corpus())
        seen, held_out = _drawings(corpus, "train"), _drawings(corpus, "test")
        preview = seen[:: max(1, len(seen) // 8)][:8]

        def draw(model: Autoencoder) -> None:
            pixels = composite(preview)
            both = torch.cat([pixels, reconstruct(model, pixels, self.recipe.tokenizer.grids)])
            save_sheet(both, 8, self.out / "tokenizer.png")

        checkpoint = self.out / "tokenizer.ckpt"
        weights = train_tokenizer(self.recipe.tokenizer, seen, checkpoint, self.log, draw)
        _save(weights, path)
        for name, drawings in (("seen", seen), ("held out", held_out)):
            if len(drawings):
                self.log(f"tokenizer PSNR on {name} drawings: {self._psnr(drawings):.2f} dB")
        return path

    def transformer(self) -> Path:
        """Trains the transformer, unless its weights are there; draws a sample sheet along the way."""
        path = self.out / "transformer.safetensors"
        if path.exists():
            return path
        encoder = self._text_encoder()
        corpus = load_corpus(self.corpus())
        drawings = corpus.split("train")
        with torch.inference_mode():
            latents = latents_of(self.autoencoder(), composite(_drawings(corpus, "train"))).clone()
        texts = [all_captions(drawing) for drawing in drawings]
        count = self.recipe.transformer.framed_captions
        framed = [framed_captions(drawing, count) for drawing in drawings]
        captions = tuple(tuple(encoder.encode([*a, *b])) for a, b in zip(texts, framed, strict=True))
        device = self.recipe.transformer.device
        examples = Examples(
            latents=latents.to(device), captions=tuple(tuple(c.to(device) for c in each) for each in captions)
        )

        def draw(weights: dict[str, Tensor]) -> None:
            self.sample_sheet(weights, encoder, self.out / "samples.png")

        checkpoint = self.out / "transformer.ckpt"
        initial = None
        if self.start_from is not None:
            shape, place = self.recipe.transformer.shape, torch.device(device)
            stored = self.start_from / TRANSFORMER
            kept = read_network(stored, lambda: Infinity(shape), load_transformer, torch.float32, place)
            initial = kept.state_dict()
        weights = train_transformer(self.recipe.transformer, examples, checkpoint, self.log, draw, initial=initial)
        _save(weights, path)
        draw(weights)
        return path

    def export(self) -> Path:
        """Writes the model folder that `Pipeline.from_pretrained` reads."""
        folder = self.out / self.recipe.name
        spec = ModelSpec(
            name=self.recipe.name,
            transformer=self.recipe.transformer.shape,
            autoencoder=self.recipe.tokenizer.shape,
            budgets=(self.recipe.budget,),
            ratios=("1:1",),
            defaults=self.recipe.defaults,
        )
        save_folder(
            folder,
            config=spec.to_json(),
            transformer=self._infinity(load_file(self.out / "transformer.safetensors")),
            autoencoder=self.autoencoder(),
            text_encoder=import_minilm(),
            notice=self.recipe.notice,
            model_card=self.recipe.card,
        )
        return folder

    def autoencoder(self) -> Autoencoder:
        """The trained autoencoder, on the CPU."""
        model = Autoencoder(self.recipe.tokenizer.shape)
        model.load_state_dict(load_file(self.out / "autoencoder.safetensors"))
        return model.eval()

    def _infinity(self, weights: Mapping[str, Tensor]) -> Infinity:
        model = Infinity(self.recipe.transformer.shape)
        model.load_state_dict({name: value.cpu() for name, value in weights.items()})
        return model.eval()

    def _text_encoder(self) -> TextEncoder:
        """The text encoder with the rounding that users get, so that training sees the same features."""
        folder = self.out / "text_encoder"
        if not folder.exists():
            partial = folder.with_name("text_encoder.partial")
            import_minilm().save(partial)
            partial.replace(folder)
        return TextEncoder.from_folder(folder)

    def _psnr(self, drawings: UInt8[np.ndarray, "n Y X 4"]) -> float:
        model = self.autoencoder()
        values = [
            psnr_of(reconstruct(model, part, self.recipe.tokenizer.grids), part)
            for part in composite(drawings).split(16)
        ]
        return float(torch.cat(values).mean())

    def sample_sheet(self, weights: Mapping[str, Tensor], encoder: TextEncoder, path: Path) -> None:
        """Draws the recipe's prompts with the given weights, through the engine that users run."""
        prompts = self.recipe.sheet
        schedule = self.recipe.transformer.schedule
        model = self._infinity(weights)
        tokenizer = BSQTokenizer(self.autoencoder())
        heat = self.recipe.defaults.temperature
        temperatures = heat[: len(schedule)] if isinstance(heat, tuple) else (heat,) * len(schedule)
        request = Request(
            schedule=schedule,
            guidance=GuidanceSchedule.from_infinity(self.recipe.defaults.guidance_scale, len(schedule)),
            temperatures=temperatures,
            filters=(Filter(top_k=self.recipe.defaults.top_k, top_p=self.recipe.defaults.top_p),) * len(schedule),
            sampler=KeyedSampler(seeds=tuple(range(len(prompts)))),
            conditions=tuple(encoder.encode(list(prompts))),
            num_images=len(prompts),
        )
        *_, last = Engine(model, tokenizer).run(Full().bind(schedule, model.shape), request)
        save_sheet(tokenizer.decode(last.f_hat_BZHW), 8, path)


def _save(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes weights by atomic rename: a file that exists is whole."""
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in weights.items()}, partial)
    partial.replace(path)


def _drawings(corpus: Corpus, split: str) -> UInt8[np.ndarray, "n Y X 4"]:
    index = [drawing.index for drawing in corpus.split(split)]
    return np.ascontiguousarray(corpus.images_NYXc[index])


def save_sheet(pixels: Tensor, columns: int, path: Path) -> None:
    """Writes pixels in [-1, 1] as one picture of many, complete or not at all."""
    images = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    rows = math.ceil(len(images) / columns)
    size = images.shape[1]
    sheet = np.full((rows * size, columns * size, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        sheet[y * size : (y + 1) * size, x * size : (x + 1) * size] = image
    with replace_file(path) as partial:
        Image.fromarray(sheet).save(partial, format="PNG")
