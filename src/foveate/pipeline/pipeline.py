"""The pipeline, from prompts to images: the only place where a model meets a policy."""

import inspect
import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from foveate.conditioning.remembered import Remembered
from foveate.core.errors import FoveateError
from foveate.core.warnings import CallWarning, log_warnings
from foveate.engine.executor import Engine
from foveate.engine.graphs import DeviceCapture, Graphs
from foveate.families.loading import LoadedModel, Origin, Precision, load_model, with_independent_rows
from foveate.families.moving import moved
from foveate.families.offload import CODEBOOK, TRANSFORMER, Offload
from foveate.families.residency import Residency
from foveate.kernels import native
from foveate.kernels.gpu import launch
from foveate.kernels.heap import kept_heap
from foveate.pipeline.budget import with_budget
from foveate.pipeline.call import Job, Prompts, resolve, warnings_of
from foveate.pipeline.foreign import NoOthers, refuse_loading
from foveate.pipeline.options import CallOptions, Options
from foveate.pipeline.output import Images, PipelineOutput, ScaleEvent, tokens_run
from foveate.pipeline.placement import (
    find_device,
    find_dtype,
    is_same_device,
    one_dtype,
    refuse_move,
    refuse_offload,
    refuse_other_dtype,
    wants_triton,
)
from foveate.pipeline.runner import BatchStep, OpenCall, Runner

_NO_GRAPHS_WITH_OFFLOAD = "captured graphs need weights that stay where they are; leave offload or cuda graphs out"


class Pipeline:
    """A loaded model that generates images; calls do not influence each other.

    Attributes:
        model: Transformer, tokenizer, text encoder and what belongs to them.
        runner: Runs calls scale by scale, for those who pack calls of their own.
    """

    def __init__(self, model: LoadedModel, offload: Offload | None = None, *, uses_triton: bool = False) -> None:
        """Wraps a loaded model.

        Args:
            model: The transformer.
            offload: Moves its modules to the device and back; None leaves all of them where they are.
            uses_triton: Whether Triton kernels run on a GPU.
        """
        self.model = with_independent_rows(model)
        self.runner = Runner(
            model=self.model, engine=_engine(self.model, None, uses_triton), offload=offload, uses_triton=uses_triton
        )
        log_warnings(self.warnings)
        self._hides_progress: bool | None = None

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - one call for everything that a model is, in the names that users bring
        cls,
        name_or_path: str | Path = "emoji",
        *,
        autoencoder: str | Path | None = None,
        text_encoder: str | Path | None = None,
        weights: str = "pretrained",
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        decoder_dtype: str | torch.dtype | None = None,
        quantization: str | None = None,
        device: str | torch.device = "cpu",
        kernels: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        offload: bool = False,
        release_text_encoder: bool = False,
        **others: Unpack[NoOthers],
    ) -> "Pipeline":
        """Loads a bundled model, a model folder, or published weights from the hub or from this disk.

        Args:
            name_or_path: A registered name (`foveate models` lists them), a model folder, a file of transformer
                weights (safetensors, pickle or index of shards) or a folder that holds one, or `owner/name` on the hub.
            autoencoder: File of the autoencoder's weights, where it does not lie beside the transformer.
            text_encoder: Folder or hub repository of the text encoder; None takes the published one.
            weights: `pretrained`, or `random`, which fills the shape with noise, for timing; the text features are then
                random as well.
            dtype: What the model computes in, whatever the files hold: float32, bfloat16 or float16; None is float32.
            torch_dtype: Another name of dtype.
            decoder_dtype: What the decoder computes in; None takes `dtype`.
            quantization: `int8` or `fp8` holds the weights of the transformer's blocks in int8 or fp8: less memory, no
                less time. Needs the extra `quantize`. None keeps them in `dtype`.
            device: Where it runs.
            kernels: `triton` runs our Triton kernels on a GPU. Each is compared with plain torch at its first use; one
                that fails or disagrees does not run, and the report says so (`kernels_plain`). They have never run on a
                device. None runs plain torch there, and C code on a CPU that it is made for.
            revision: Branch, tag or commit of a hub model; None elsewhere.
            local_files_only: Never reaches for the network: a hub model must have been fetched before.
            offload: Loads into main memory and calls `enable_model_cpu_offload`.
            release_text_encoder: Reads the text encoder when prompts are encoded and drops it afterwards: every call
                with new prompts takes the time of reading it, and no memory for it while generating. It is read once at
                loading, too, so that errors come then. Nothing changes where prompts need no weights.
            **others: None; those of diffusers are refused with what to do here.

        Raises:
            FoveateError: An unknown name, dtype, quantisation, device or kernels, or torchao or triton is missing.
            CheckpointError: The folder is incomplete, damaged or of another model.
        """
        refuse_loading(others, list(inspect.signature(cls.from_pretrained).parameters)[:-1])
        origin = Origin(
            name_or_path=name_or_path,
            autoencoder=autoencoder,
            text_encoder=text_encoder,
            revision=revision,
            local_files_only=local_files_only,
        )
        precision = Precision(
            dtype=one_dtype(dtype, torch_dtype),
            decoder_dtype=None if decoder_dtype is None else find_dtype(decoder_dtype, "decoder_dtype"),
            quantization=quantization,
        )
        residency = Residency(offload=offload, release_text_encoder=release_text_encoder)
        place = find_device(device)
        uses_triton = wants_triton(kernels, place)
        if offload:
            refuse_offload(place)
        model = load_model(origin, weights=weights, precision=precision, device=place, residency=residency)
        pipe = cls(model, uses_triton=uses_triton)
        if offload:
            pipe.enable_model_cpu_offload()
        return pipe

    def to(self, device: str | torch.device | torch.dtype, dtype: str | torch.dtype | None = None) -> "Pipeline":
        """Moves all modules to a device, between calls; images are then those of a pipeline that was loaded there.

        Args:
            device: Where it computes from now on. A dtype alone is taken as `dtype`.
            dtype: None, or the one that it was loaded in; no other.

        Returns:
            This pipeline.

        Raises:
            FoveateError: There is no such device, the dtype is another one, or offload, captured graphs, Triton
                kernels or quantised weights hold the pipeline where it is.
        """
        if isinstance(device, torch.dtype):
            refuse_other_dtype(device, self.model.dtype)
            return self
        place, runner = find_device(device), self.runner
        if dtype is not None:
            refuse_other_dtype(dtype, self.model.dtype)
        is_there, has_graphs = is_same_device(place, self.model.device), runner.engine.graphs is not None
        if runner.offload is not None or not is_there:
            refuse_move(
                place,
                has_offload=runner.offload is not None,
                has_graphs=has_graphs,
                uses_triton=runner.uses_triton,
                quantization=self.model.precision.quantization,
            )
        if not is_there:
            self.model = runner.model = with_independent_rows(moved(self.model, place))
            runner.engine = _engine(self.model, None, runner.uses_triton)
            log_warnings(self.warnings)
        return self

    def enable_model_cpu_offload(self) -> None:
        """Moves all modules to main memory; from now on only the module in use is on the device.

        Text encoder, transformer and decoder take turns, each as a whole, and all are in main memory between calls.
        With previews the decoder joins the transformer at the first one, and both stay until the last scale has run.
        Images are the same bits as without; every call takes the time of the moves.

        Raises:
            FoveateError: The pipeline computes on the CPU, so there is no device to save memory of.
        """
        refuse_offload(self.model.device)
        if self.runner.engine.graphs is not None:
            raise FoveateError(_NO_GRAPHS_WITH_OFFLOAD)
        if self.runner.offload is None:
            self.runner.offload = Offload.of(self.model)

    def enable_cuda_graphs(self) -> None:
        """Replays the first scales of an image as captured graphs, where launching kernels takes longer than they do.

        Calls that agree in their size, their batch and the lengths of their texts share graphs, which are captured at
        the second one and compared there with the plain loop: a shape that fails or disagrees takes the plain loop, and
        the report says so (`graphs_plain`). Costs memory for each such shape; see docs/gpu.md. The weights must stay
        where they are, and calls run on one stream; of calls side by side one has graphs.

        Raises:
            FoveateError: The pipeline computes on the CPU, or offload is on.
        """
        if self.model.device.type != "cuda":
            raise FoveateError('cuda graphs need a pipeline on a GPU; load it with device="cuda", or leave them out')
        runner = self.runner
        if runner.offload is not None:
            raise FoveateError(_NO_GRAPHS_WITH_OFFLOAD)
        if runner.engine.graphs is None:
            runner.engine = _engine(self.model, Graphs(DeviceCapture(self.model.device)), runner.uses_triton)

    def remember_prompts(self, count: int) -> None:
        """Keeps what the text encoder made of the last prompts, for calls that repeat them; images are the same bits.

        Not for calls from several threads at once.

        Args:
            count: Prompts, 1 or more; each takes the text width times its tokens in memory of the device.

        Raises:
            FoveateError: A count below 1.
        """
        text = self.model.text
        inner = text.inner if isinstance(text, Remembered) else text
        self.model = self.runner.model = replace(self.model, text=Remembered(inner=inner, count=count))

    def set_progress_bar_config(self, *, disable: bool | None = None) -> None:
        """Shows (False), hides (True) or, with None, shows progress on stderr only where that is a terminal."""
        self._hides_progress = disable

    @overload
    def __call__(
        self, prompt: Prompts, *, output_type: Literal["pil"] = "pil", **options: Unpack[CallOptions]
    ) -> PipelineOutput[list[Image.Image]]: ...

    @overload
    def __call__(
        self, prompt: Prompts, *, output_type: Literal["np"], **options: Unpack[CallOptions]
    ) -> PipelineOutput[np.ndarray]: ...

    @overload
    def __call__(
        self, prompt: Prompts, *, output_type: Literal["pt", "latent"], **options: Unpack[CallOptions]
    ) -> PipelineOutput[Tensor]: ...

    @overload
    def __call__(self, prompt: Prompts, **options: Unpack[Options]) -> PipelineOutput[Images]: ...

    def __call__(self, prompt: Prompts, **options: Unpack[Options]) -> PipelineOutput[Any]:
        """Generates all images of all prompts as one batch.

        Args:
            prompt: One or several texts, none of them empty; names or indices of classes for a model of classes.
            **options: See `foveate.pipeline.options.Options`.

        Returns:
            Images in the form of `output_type`, seeds, configuration and report.

        Raises:
            FoveateError: A value out of range, an impossible size, policies that contradict each other.
            Cancelled: A callback asked to stop; nothing of the call remains.
        """
        began = time.perf_counter()
        job = self._began(prompt, options)
        last = None
        with self.runner.parts():
            with closing(self._steps(job, 0, began)) as steps:
                for last in steps:  # noqa: B007 - the last one is what counts
                    pass
            assert last is not None, "a schedule has at least one scale"
            return self.finish(*last)

    @overload
    def stream(
        self,
        prompt: Prompts,
        previews: int = 3,
        *,
        output_type: Literal["pil"] = "pil",
        **options: Unpack[CallOptions],
    ) -> Generator[ScaleEvent[list[Image.Image]], None, None]: ...

    @overload
    def stream(
        self, prompt: Prompts, previews: int = 3, *, output_type: Literal["np"], **options: Unpack[CallOptions]
    ) -> Generator[ScaleEvent[np.ndarray], None, None]: ...

    @overload
    def stream(
        self,
        prompt: Prompts,
        previews: int = 3,
        *,
        output_type: Literal["pt", "latent"],
        **options: Unpack[CallOptions],
    ) -> Generator[ScaleEvent[Tensor], None, None]: ...

    @overload
    def stream(
        self, prompt: Prompts, previews: int = 3, **options: Unpack[Options]
    ) -> Generator[ScaleEvent[Images], None, None]: ...

    def stream(
        self, prompt: Prompts, previews: int = 3, **options: Unpack[Options]
    ) -> Generator[ScaleEvent[Any], None, None]:
        """Generates like the call and hands out every scale; the last event carries the call's output.

        Closing the iterator cancels.

        Args:
            prompt: One or several texts.
            previews: How many of the last scales come with decoded images, the final one included; 0 or more.
            **options: See `foveate.pipeline.options.Options`.
        """
        if previews < 0:
            raise FoveateError(f"previews must be 0 or more, got {previews}")
        job = self._began(prompt, options)
        return self._events(job, previews)

    def job(self, prompts: Prompts, options: Options) -> Job:
        """A call completed from the model's defaults, its budget fitted; nothing is generated.

        Raises:
            FoveateError: A value out of range, an impossible size, a budget that the policy does not reach.
        """
        return with_budget(resolve(prompts, options, self.model.spec), self.model.transformer.shape)

    def _began(self, prompts: Prompts, options: Options) -> Job:
        """The completed call; logs its warnings."""
        job = self.job(prompts, options)
        log_warnings(self._warnings_of(job))
        return job

    @property
    def warnings(self) -> tuple[CallWarning, ...]:
        """What holds for every call of this model on this machine, as far as is known by now."""
        graphs = self.runner.engine.graphs
        return (
            *self.model.warnings,
            *(native.warnings() if self.model.device.type == "cpu" else ()),
            *(launch.warnings() if self.runner.uses_triton else ()),
            *(() if graphs is None else graphs.warnings()),
        )

    def _warnings_of(self, job: Job) -> tuple[CallWarning, ...]:
        model = self.model
        return warnings_of(job, model.spec, model.sha256, is_trained=model.weights == "pretrained")

    def finish(self, call: OpenCall, step: BatchStep) -> PipelineOutput:
        """Decodes what a step of a call left, and says what it took, with all warnings of this pipeline."""
        return self.runner.finish(call, step, (*self.warnings, *self._warnings_of(call.job)))

    def _events(self, job: Job, previews: int) -> Generator[ScaleEvent[Any], None, None]:
        began = time.perf_counter()
        num_scales, runner = len(job.schedule), self.runner
        with runner.parts(), closing(self._steps(job, previews, began, times_scales=True)) as steps:
            for call, step in steps:
                output = None
                if step.scale == num_scales - 1:
                    # Keys and values go before the decoder needs room.
                    steps.close()
                    output = self.finish(call, step)
                images = output.images if output is not None and previews else None
                if output is None and step.scale >= num_scales - previews:
                    images = runner.decode(step.f_hat_BZHW, job.options["output_type"], (TRANSFORMER, CODEBOOK))
                work = step.trace.scales[-1]
                yield ScaleEvent(
                    scale=step.scale,
                    grid=work.grid,
                    tokens_run=tokens_run(work),
                    tokens_full=job.num_images * work.grid[0] * work.grid[1],
                    ms=work.ms,
                    images=images,
                    output=output,
                )

    def _steps(
        self, job: Job, previews: int, began: float, times_scales: bool = False
    ) -> Generator[tuple[OpenCall, BatchStep], None, None]:
        """Runs the requests of a call side by side, scale by scale; closing it frees all of them.

        Parts are brought again before every scale: another call may have run since the last one.

        Args:
            job: The call.
            previews: How many of the last scales will be decoded.
            began: When the call began, as `time.perf_counter` has it.
            times_scales: Whether the time of a scale must be known when it is handed out.
        """
        num_scales = len(job.schedule)
        with ExitStack() as stack:
            stack.enter_context(kept_heap())
            call = self.runner.open(job, began, times_scales=times_scales)
            stack.callback(self.runner.close, call)
            bar = stack.enter_context(tqdm(total=num_scales, disable=self._hides_progress, unit="scale", leave=False))
            for scale in range(num_scales):
                (step,) = self.runner.advance([call], decodes=scale > num_scales - previews)
                if isinstance(step, Exception):
                    raise step
                bar.set_description(f"scale {scale + 1}/{num_scales}")
                bar.update()
                if (callback := job.options["callback_on_step_end"]) is not None:
                    callback(self, scale, num_scales - 1 - scale, {"latents": step.f_hat_BZHW})
                yield call, step


def stack_uint8(images: Images) -> np.ndarray:
    """Images of `output_type` pil or np as one uint8 array (n, height, width, 3).

    Raises:
        FoveateError: Tensors, which hold no bytes.
    """
    if isinstance(images, Tensor):
        raise FoveateError('images as bytes need output_type "pil" or "np"')
    return images if isinstance(images, np.ndarray) else np.stack([np.asarray(image) for image in images])


def _engine(model: LoadedModel, graphs: Graphs | None, uses_triton: bool) -> Engine:
    make = model.spec.kind.refiner
    refiner = None if make is None else make(model.transformer, model.tokenizer)
    return Engine(model.transformer, model.tokenizer, graphs, refiner, uses_triton=uses_triton)
