"""The stages of a training run: corpus, tokenizer, position tagger, transformer, export, sampling; resumable.

Each stage writes into the output folder and is left out when its result is there; a stage that was stopped goes on from
its last checkpoint.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.bench.peak import matmul_peak
from foveate.conditioning.minilm import TextEncoder
from foveate.conditioning.places import PLACES_NAME, Places
from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.state import Request
from foveate.families.minilm import MINILM_PLACES
from foveate.families.spec import Defaults, ModelSpec, per_scale, tuples
from foveate.models.infinity import Infinity
from foveate.policies.full import Full
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.tokenizers.bsq import BSQTokenizer
from foveate.weights.files import weights_sha256
from foveate.weights.folder import AUTOENCODER, TRANSFORMER, read_network, save_folder, text_encoder_folder
from foveate.weights.infinity import load_autoencoder, load_transformer
from recipes.emoji.contrast import rim_contrast
from recipes.emoji.corpus import Corpus, CorpusConfig, build_corpus, load_corpus
from recipes.emoji.loop import Limits, PauseError, averages_of
from recipes.emoji.places import placed_share, teach_places
from recipes.emoji.recipe import Recipe, Route, load_corpus_config, load_recipe
from recipes.emoji.sampling import ScoreBook, choose_sampling, require_scorer
from recipes.emoji.shared_codes import SharedCodes
from recipes.emoji.start import Start, fitted
from recipes.emoji.texts import bundled_encoder
from recipes.emoji.tokenizer import composite, psnr_of, reconstruct, train_tokenizer
from recipes.emoji.transformer import train_transformer
from recipes.emoji.weights import drawing_weights
from recipes.emoji.window import SceneSequence, Window

Stage = Literal["corpus", "tokenizer", "places", "transformer", "export", "sampling", "model", "all"]
Log = Callable[[str], None]
M = TypeVar("M", bound=nn.Module)

BATCH = 16
"""Drawings that are reconstructed together."""

FITTED = 128
"""Scenes by which a tokenizer takes over older codes."""

SAMPLING = "sampling.json"
"""What the validation scenes chose, in the folder of a run."""


def train(
    config: Path,
    out: Path,
    stage: Stage = "all",
    log: Log = print,
    route: Route | None = None,
    start: Start | None = None,
    stop_after: float | None = None,
) -> Path:
    """Runs one stage or all of them.

    Args:
        config: The training file; for the corpus alone, a corpus file does as well.
        out: Folder of the run; give it again to resume.
        stage: What to run; "all" runs what is missing, "model" the same without sampling.
        log: Receives progress lines.
        route: Device, minutes, dry run.
        start: What to begin with; a checkpoint in `out` goes before it.
        stop_after: Minutes after which to pause behind a checkpoint; the same call then goes on from there. A dry run
            does not pause.

    Returns:
        The folder of the exported model, or of the stage's result.

    Raises:
        PauseError: The time of this call is up before all is done.
    """
    is_dry = route is not None and route.is_dry
    deadline = math.inf if stop_after is None or is_dry else time.perf_counter() + 60 * stop_after
    if stage == "corpus":
        return make_corpus(load_corpus_config(config, route), out, log)
    recipe = load_recipe(config, route)
    out.mkdir(parents=True, exist_ok=True)
    folder = out
    if is_dry:
        # Beside the run, so that nothing of it is taken for a result.
        folder = out / "dry"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    run = TrainingFolder(recipe, folder, log, start or Start(), deadline, corpus_at=out)
    stages = {"all": [*_MODEL, "sampling"], "model": [*_MODEL]}.get(stage, [stage])
    if "sampling" in stages:
        require_scorer()
    result = out
    for name in stages:
        log(f"stage {name}")
        result = {
            "corpus": run.corpus,
            "tokenizer": run.tokenizer,
            "places": run.places,
            "transformer": run.transformer,
            "export": run.export,
            "sampling": run.sampling,
        }[name]()
    return result


_MODEL = ("corpus", "tokenizer", "places", "transformer", "export")


def make_corpus(config: CorpusConfig, out: Path, log: Log) -> Path:
    """Builds the corpus of a run in its folder, unless it is there; packages are kept beside it."""
    folder = out / "corpus"
    if not folder.exists():
        out.mkdir(parents=True, exist_ok=True)
        build_corpus(config, folder, out / "packages", log)
    return folder


class TrainingFolder:
    """The stages of one recipe in one folder."""

    def __init__(self, recipe: Recipe, out: Path, log: Log, start: Start, deadline: float, corpus_at: Path) -> None:
        self.recipe, self.out, self.log, self.corpus_at = recipe, out, log, corpus_at
        self.start, self.deadline = start, deadline

    def limits(self, dtype: str, device: str) -> Limits:
        """The deadline, and the device's peak, measured now; one step of a dry run is not worth the seconds."""
        if self._is_dry:
            return Limits(deadline=self.deadline)
        peak = matmul_peak(getattr(torch, dtype), torch.device(device))
        return Limits(deadline=self.deadline, peak=peak.flops_per_s)

    @property
    def _is_dry(self) -> bool:
        return self.corpus_at != self.out

    def corpus(self) -> Path:
        """Builds the corpus, unless it is there."""
        return make_corpus(self.recipe.corpus, self.corpus_at, self.log)

    def tokenizer(self) -> Path:
        """Trains the autoencoder, unless its weights are there; logs PSNR on drawings of both splits."""
        path = self.out / "autoencoder.safetensors"
        if path.exists():
            return path
        recipe, checkpoint = self.recipe.tokenizer, self.out / "tokenizer.ckpt"
        if not recipe.optimisation.minutes and not self.start.has_tokenizer and not checkpoint.exists():
            raise FoveateError("a tokenizer that is not trained must be there; name it with --tokenizer")
        corpus = load_corpus(self.corpus())
        sequence = self.sequence(corpus, recipe.device, self.recipe.transformer.schedule)
        preview = sequence.pixels(sequence.scenes(0, 8)).cpu()

        def draw(model: Autoencoder) -> None:
            save_sheet(torch.cat([preview, reconstruct(model, preview, recipe.grids)]), 8, self.out / "tokenizer.png")

        codes = self.start.older_codes(recipe)
        weights = train_tokenizer(
            recipe,
            sequence,
            checkpoint,
            self.log,
            draw,
            initial=None if checkpoint.exists() else self._initial_tokenizer(sequence, codes),
            limits=self.limits(recipe.dtype, recipe.device),
            codes=codes,
        )
        _save(weights, path)
        draw(self.autoencoder())
        for name in ("train", "test"):
            drawings = _drawings(corpus, name)[: BATCH if self._is_dry else None]
            if len(drawings):
                self.log(f"tokenizer PSNR on drawings of the {name} split: {self._psnr(drawings):.2f} dB")
        return path

    def _initial_tokenizer(self, sequence: SceneSequence, codes: SharedCodes | None) -> dict[str, Tensor] | None:
        recipe = self.recipe.tokenizer
        weights = self.start.own_tokenizer(recipe, codes)
        if weights is None or codes is None or not recipe.optimisation.minutes:
            return weights
        pixels = sequence.pixels(sequence.scenes(0, BATCH if self._is_dry else FITTED))
        return fitted(weights, recipe, codes, pixels)

    def places(self) -> Path:
        """Trains the position tagger, unless its weights are there.

        A model that is trained further keeps its own position tagger: what its features mean must not change. A recipe
        of no steps keeps the bundled one.
        """
        path = self.out / PLACES_NAME
        if path.exists():
            return path
        kept = None if self.start.model is None else Places.from_folder(text_encoder_folder(self.start.model))
        if not self.recipe.places.steps:
            kept = kept or bundled_encoder().places
        if kept is not None:
            kept.save(self.out)
            return path
        encoder, drawings = bundled_encoder(), load_corpus(self.corpus()).split("train")
        encoder.to(torch.device(self.recipe.transformer.device))
        teach_places(self.recipe.places, encoder, drawings, self.log).save(self.out)
        share = placed_share(self.encoder(), drawings, self.recipe.places.checks)
        self.log(f"position tagger: every token is right in {share:.1%} of new captions")
        return path

    def encoder(self) -> TextEncoder:
        """The bundled text encoder with the position tagger of this run, on the CPU, rounded as users get it."""
        return replace(bundled_encoder(), places=Places.from_folder(self.places().parent))

    def transformer(self) -> Path:
        """Trains the transformer, unless its weights are there; draws a sample sheet along the way."""
        path = self.out / "transformer.safetensors"
        if path.exists():
            return path
        recipe = self.recipe.transformer
        device, checkpoint = torch.device(recipe.device), self.out / "transformer.ckpt"
        if not recipe.optimisation.minutes and self.start.model is None and not checkpoint.exists():
            raise FoveateError("a transformer that is not trained must be there; name its model with --start-from")
        encoder = self.encoder().to(device)
        autoencoder = self.autoencoder().to(device)
        corpus = load_corpus(self.corpus())
        windows = {
            schedule: Window(
                self.sequence(corpus, recipe.device, schedule, seed),
                autoencoder.encode,
                encoder.encode_together,
                size=math.ceil(recipe.window * recipe.share_of(schedule)),
            )
            for seed, schedule in enumerate(recipe.schedules)
        }

        def draw(weights: dict[str, Tensor]) -> None:
            self.sample_sheet(weights, encoder, self.out / "samples.png")

        weights = train_transformer(
            recipe,
            windows,
            checkpoint,
            self.log,
            draw,
            initial=None if checkpoint.exists() else self.start.transformer(recipe.shape),
            limits=self.limits(recipe.dtype, recipe.device),
        )
        _save(weights, path)
        draw(weights)
        return path

    def sequence(self, corpus: Corpus, device: str, schedule: ScaleSchedule, seed: int = 0) -> SceneSequence:
        """The scenes of the training split, rendered on a device in the size of a schedule."""
        drawings, stride = corpus.split("train"), self.recipe.tokenizer.shape.stride
        height, width = schedule.grids[-1]
        return SceneSequence(
            drawings=drawings,
            images_NYXc=torch.from_numpy(corpus.images_NYXc).to(device),
            config=self.recipe.scenes,
            weights=drawing_weights(drawings, self.recipe.weights),
            contrast_NK=rim_contrast(corpus.images_NYXc),
            size=(height * stride, width * stride),
            seed=seed,
        )

    def export(self) -> Path:
        """Writes the model folder that `Pipeline.from_pretrained` reads, of a run under way from its checkpoint."""
        folder = self.out / self.recipe.name
        spec = ModelSpec(
            name=self.recipe.name,
            family="infinity",
            transformer=self.recipe.transformer.shape,
            autoencoder=self.recipe.tokenizer.shape,
            conditioner=MINILM_PLACES.name,
            budgets=(self.recipe.budget,),
            ratios=self.recipe.ratios,
            defaults=self.defaults(),
        )
        save_folder(
            folder,
            config=spec.to_json(),
            transformer=self._infinity(self._latest()),
            autoencoder=self.autoencoder(),
            text_encoder=self.encoder(),
            notice=self.recipe.notice,
            model_card=self.recipe.card,
        )
        return folder

    def _latest(self) -> Mapping[str, Tensor]:
        """The transformer's weights, finished or not.

        Raises:
            FoveateError: Its training has not begun.
        """
        path, checkpoint = self.out / "transformer.safetensors", self.out / "transformer.ckpt"
        if path.exists():
            return load_file(path)
        if not checkpoint.exists():
            raise FoveateError(f"nothing to export: no transformer in {self.out}; run --stage transformer first")
        average, minutes = averages_of(checkpoint)
        self.log(f"exported after {minutes:.1f} of {self.recipe.transformer.optimisation.minutes} minutes")
        return average

    def sampling(self) -> Path:
        """Chooses guidance and temperature of every scale, unless that was done, and exports the model with them."""
        folder = self.out / self.recipe.name
        if self._chosen() is None:
            weights = self._weights()
            book = ScoreBook(path=self.out / "sampling_scores.json", weights=weights, may_go_on=self._check_deadline)
            corpus, device = load_corpus(self.corpus()), self.recipe.transformer.device
            best = choose_sampling(folder, corpus, self.recipe.sampling, device, book, self.log)
            chosen = {"weights": weights, "guidance_scale": best.guidance, "temperature": best.temperature}
            write_text(self.out / SAMPLING, json.dumps(chosen, indent=1) + "\n")
        # Also where it was chosen before: a call that was stopped may have left a folder without it.
        self.export()
        self._log_rounding(folder)
        return folder

    def defaults(self) -> Defaults:
        """How the model is sampled: as the recipe says, until the validation scenes have chosen."""
        return replace(self.recipe.defaults, **(self._chosen() or {}))

    def _chosen(self) -> dict[str, Any] | None:
        """What was chosen for these weights, if they are there and it was."""
        path = self.out / SAMPLING
        if not path.exists() or not (self.out / "transformer.safetensors").exists():
            return None
        data = tuples(json.loads(path.read_text(encoding="utf-8")))
        return data if data.pop("weights") == self._weights() else None

    def _weights(self) -> str:
        return weights_sha256([self.out / "transformer.safetensors", self.out / "autoencoder.safetensors"])

    def _check_deadline(self) -> None:
        if time.perf_counter() > self.deadline:
            raise PauseError("paused while sampling was chosen; run it again to go on")

    def autoencoder(self) -> Autoencoder:
        """The trained autoencoder, on the CPU."""
        model = Autoencoder(self.recipe.tokenizer.shape)
        model.load_state_dict(load_file(self.out / "autoencoder.safetensors"))
        return model.eval()

    def _infinity(self, weights: Mapping[str, Tensor]) -> Infinity:
        model = Infinity(self.recipe.transformer.shape)
        model.load_state_dict({name: value.cpu() for name, value in weights.items()})
        return model.eval()

    def _psnr(self, drawings: UInt8[np.ndarray, "n Y X 4"]) -> float:
        model = self.autoencoder()
        values = [
            psnr_of(reconstruct(model, part, self.recipe.tokenizer.grids), part)
            for part in composite(drawings).split(BATCH)
        ]
        return float(torch.cat(values).mean())

    def sample_sheet(self, weights: Mapping[str, Tensor], encoder: TextEncoder, path: Path) -> None:
        """Generates the recipe's prompts with the given weights, through the engine that users run."""
        save_sheet(self._drawn(self._infinity(weights), self.autoencoder(), encoder), 8, path)

    def _drawn(self, model: Infinity, autoencoder: Autoencoder, encoder: TextEncoder) -> Float[Tensor, "n 3 Y X"]:
        prompts, defaults = self.recipe.sheet, self.defaults()
        schedule = self.recipe.transformer.schedule
        tokenizer = BSQTokenizer(autoencoder)
        request = Request(
            schedule=schedule,
            guidance=GuidanceSchedule(weights=per_scale(defaults.guidance_scale, len(schedule))),
            temperatures=per_scale(defaults.temperature, len(schedule)),
            filters=tuple(
                Filter(top_k=int(k), top_p=p)
                for k, p in zip(
                    per_scale(defaults.top_k, len(schedule)), per_scale(defaults.top_p, len(schedule)), strict=True
                )
            ),
            sampler=KeyedSampler(seeds=tuple(range(len(prompts)))),
            conditions=tuple(text.cpu() for text in encoder.encode(list(prompts))),
            num_images=len(prompts),
        )
        *_, last = Engine(model, tokenizer).run(Full().bind(schedule, model.shape), request)
        return tokenizer.decode(last.f_hat_BZHW)

    def _log_rounding(self, folder: Path) -> None:
        """Logs what the rounding of the stored weights changes in the images of the recipe's prompts."""
        cpu, encoder = torch.device("cpu"), self.encoder()
        shape, tokens = self.recipe.transformer.shape, self.recipe.tokenizer.shape
        stored = self._drawn(
            read_network(folder / TRANSFORMER, lambda: Infinity(shape), load_transformer, torch.float32, cpu),
            read_network(folder / AUTOENCODER, lambda: Autoencoder(tokens), load_autoencoder, torch.float32, cpu),
            encoder,
        )
        trained = self._infinity(load_file(self.out / "transformer.safetensors"))
        psnr_n = psnr_of(stored, self._drawn(trained, self.autoencoder(), encoder))
        self.log(
            f"stored in float16: {float(psnr_n.median()):.1f} dB from the weights as trained "
            f"(median of {len(psnr_n)} images, least {float(psnr_n.min()):.1f})"
        )


def _save(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes weights; a file that exists is whole."""
    with replace_file(path) as partial:
        save_file({name: value.contiguous() for name, value in weights.items()}, partial)


def _drawings(corpus: Corpus, split: str) -> UInt8[np.ndarray, "n Y X 4"]:
    index = [drawing.index for drawing in corpus.split(split)]
    return np.ascontiguousarray(corpus.images_NYXc[index])


def save_sheet(pixels: Tensor, columns: int, path: Path) -> None:
    """Writes pixels in [-1, 1] as one image of many, complete or not at all."""
    images = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    rows = math.ceil(len(images) / columns)
    size = images.shape[1]
    sheet = np.full((rows * size, columns * size, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        sheet[y * size : (y + 1) * size, x * size : (x + 1) * size] = image
    with replace_file(path) as partial:
        Image.fromarray(sheet).save(partial, format="PNG")
