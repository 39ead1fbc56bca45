"""The engine a user holds: `Deblurrer` restores images of unknown blur, one call per image."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastem import io, noise, ops, photo, runtime
from fastem.em import (
    HQS,
    ROUNDS,
    EdgeEM,
    Known,
    delta_kernel,
    denoise_observation,
    diffusion_em,
    noise_level,
    place_between,
)
from fastem.guidance import DPS, ErrorLaw, Guidance, PiGDM, PosteriorMean, default_r2, still_r2
from fastem.initial import CoarseToFine, centre, centre_by_pixels, drop_faint, find_kernel_size
from fastem.models import EpsModel, load_kernel_denoiser, load_model
from fastem.mstep import PnP
from fastem.operators import Canvas, Observation, blur
from fastem.ops.backend import Backend, use_backend
from fastem.samplers import (
    DDPM,
    Eager,
    Execute,
    KernelEstimator,
    PhiloxNoise,
    PlugAndPlay,
    Renoise,
    Rule,
    Sample,
    sample,
)
from fastem.schedules import Schedule, Step
from fastem.varying import VaryingBlur, VaryingMean, Windows, WindowSums, fit_kernels

SIGMA_FLOOR = 0.5 / 255  # below the noise of 8-bit rounding there is nothing to estimate
BLIND_SIGMA = 2 / 255  # least noise to assume where the kernel is an estimate, whose errors act as noise
LOSSY_SIGMA = 2 / 255  # least estimate for JPEG photos: what compression did to them, on the scale of white noise
JPEG_INFLATION = 1.5  # of the error of the luminance: colours are stored coarser, and the error is not white
MIN_SIDE = 8  # pixels
TIGHT_TILE = 256  # pixels: side of the tiles where memory has ended
NOT_FINITE = "the restoration is not finite; try another seed, --sigma with the true noise level, or --guidance mean"
SEARCH_AGAIN = 6_000_000  # values: larger images get one search, as a run takes minutes
SIGMA_MAX, SIGMA_MIN = 1.0, 0.02  # noise levels, relative to [-1, 1], between which the short schedule runs
SEARCH_SIGMA_MIN = 0.2  # where it ends for the search: below, x0_hat is what the present kernel makes of y
NOISE_AGREES = 1.06  # ratio of two noise levels: the kernel's view of it is 1 to 5 % high, the blind estimate better
INFLATION = 2.0  # of sigma with a kernel that is a first guess: its error counts as noise
KERNEL_INFLATION = 1.15  # of sigma with the kernel that was found
# At the noise where the search ends x follows y closely: a good kernel leaves 0.5 to 0.98.
CHI2_GOOD = 1.0  # a kernel whose search leaves more residual than this, in units of the noise, is searched for again
SHARP_WIDTH = 1.8  # pixels (a perfect step has 2): an image with edges as narrow in all directions has no blur to find
DOUBTFUL_WIDTH = 2.3, 2.0, 29.0  # below max(a, b + c sigma) a kernel has to prove itself: noise widens edges
PROOF = 0.575  # so far from its restoration, blurred (0), towards its denoising (1) may a photo lie without its noise
# A kernel with such a peak gains about 1 dB where it is right, and costs 4 to 8 where it is wrong.
PEAK, PROOF_OF_PEAK = 0.3, 0.5
FIRST_AUTO, LARGEST_AUTO = 33, 129  # pixels: kernel sizes between which "auto" starts and ends
PROBE_RUN = 1000  # the streams of the noise that judges, of which no restoration draws
JUDGED_SIGMA = 5 / 255  # least noise under which a kernel proves itself
GAMMAS = (1.0, 2.2)  # that "auto" tries
STARTS = (CoarseToFine(), CoarseToFine(ridge=0.3), CoarseToFine(sparsity=1e-2), CoarseToFine(sparsity=2e-2))


@dataclass(frozen=True)
class Effort:
    """What a preset spends on an image."""

    inflations: tuple[float, ...]  # of sigma in each run that looks for the kernel, whose error counts as noise
    search_steps: int  # reverse steps of each
    steps: int  # of the run that restores with it; the default of `steps`


EFFORTS = {
    "exact": Effort(inflations=(INFLATION, 1.5, 1.2), search_steps=9, steps=12),
    "turbo": Effort(inflations=(INFLATION, 1.2), search_steps=9, steps=10),
}


class Method(StrEnum):
    FAST_EM = "fast-em"
    DIFFUSION_EM = "diffusion-em"
    KNOWN = "known"


class Mode(StrEnum):
    MEAN = "mean"
    SAMPLE = "sample"


class Guide(StrEnum):
    MEAN = "mean"
    PIGDM = "pigdm"
    DPS = "dps"


class NumericError(ArithmeticError):
    """The restoration is not finite; nothing of it is returned."""


@dataclass
class Restoration:
    """What became of one image."""

    image: Any  # restored: same type, dtype and size as the input
    kernel: np.ndarray  # (h, w) float32, >= 0, sums to 1, origin (h // 2, w // 2)
    samples: np.ndarray  # (n, H, W, C) float32 in [0, 1], all particles
    sigma: float  # std of the noise used, image units
    sigma_estimated: bool
    reblur: float  # chi^2 = ||k * x - y||^2 / (M sigma^2): about 1 where the model explains the image
    trace: list[dict] = field(default_factory=list)  # one record per step
    warnings: list[str] = field(default_factory=list)
    kernels: np.ndarray | None = None  # (rows, cols, h, w) float32 where the blur varies; `kernel` is that of the whole

    def mean(self) -> np.ndarray:
        """`(H, W, C)`: mean of the particles (PSNR-SA is measured on it)."""
        return self.samples.mean(axis=0)

    def std(self) -> np.ndarray:
        """`(H, W, C)`: spread of the particles, 0 for one.

        An uncertainty map where they are posterior samples: mode "sample", or guidance "pigdm" or "dps". Those of mode
        "mean" with guidance "mean" differ by their starting noise alone, far less than by what is uncertain.
        """
        return self.samples.std(axis=0)


@dataclass(frozen=True)
class _Picture:
    """An input of any accepted type as `(1, 3, H, W)` float32 in [0, 1], and the way back."""

    y: Tensor
    like: Any
    gray: bool
    lossy: bool = False  # by what is known of its file
    quantization: np.ndarray | None = None

    def back(self, x: Tensor) -> Any:
        """`(C, H, W)` in [0, 1] -> the type, dtype and layout of the input."""
        x = x.detach().cpu().float()
        if self.gray:
            x = x.mean(dim=0, keepdim=True)
        like = self.like
        if isinstance(like, Tensor):
            return _quantise(x.view_as(like) if like.dim() == 2 else x, like.dtype)
        array = _quantise(x.permute(1, 2, 0), torch.from_numpy(np.empty(0, _dtype_of(like))).dtype).numpy()
        if isinstance(like, Image.Image):
            return Image.fromarray(array[..., 0] if self.gray else array)
        return array.reshape(like.shape)


@dataclass(frozen=True)
class Request:
    """One item of `Deblurrer.map` with options of its own; see `Deblurrer.__call__`."""

    image: Any
    sigma: float | None = None
    seed: int = 0
    lossy: bool | None = None
    quantization: np.ndarray | None = None


@dataclass(frozen=True)
class _Job:
    """An image that is ready for the network."""

    picture: _Picture
    sigma: float  # in use, image units
    estimated: bool
    seed: int
    kernel: Tensor | None  # (1, 1, h, w), the same for all jobs of a run
    canvas: Canvas | None  # None where it waits for the size of the kernel
    notes: list[str]
    settled: Restoration | None  # where there is nothing to do
    alone: bool = False  # restored in a batch of its own
    sent: runtime.Arriving | None = None  # the image, ahead of its batch
    refine: bool = False  # sigma is a first guess, which the run may improve
    upper: bool = False  # sigma is an upper limit

    @property
    def kind(self) -> tuple:
        alone = id(self) if self.canvas is None or self.alone else None  # kernels of different sizes share no batch
        return self.canvas, self.settled is not None, alone


def _dtype_of(like: Any) -> np.dtype:
    if isinstance(like, Image.Image):
        return np.dtype(np.uint16 if like.mode == "I;16" else np.uint8)
    return like.dtype.newbyteorder("=")


def _quantise(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return x.to(dtype)
    levels = torch.iinfo(dtype).max
    return (x.double().clamp(0, 1) * levels).round().to(dtype)


def _picture(image: Any) -> _Picture:
    lossy = getattr(image, "format", None) in ("JPEG", "MPO")  # of a PIL image that was opened, not made
    steps = io.jpeg_quantization(image) if isinstance(image, Image.Image) else None
    if isinstance(image, (str, Path)):
        read = io.read_image(image)
        image, lossy, steps = read.pixels, read.lossy, read.quantization
    if isinstance(image, Image.Image):
        if image.mode in ("RGBA", "LA", "PA"):
            raise ValueError(f"PIL mode {image.mode} has an alpha channel; restore the colours, put it back after")
        if image.mode not in ("L", "RGB", "I;16"):
            image = image.convert("RGB")
        array = np.asarray(image)
    elif isinstance(image, Tensor):
        if image.dtype == torch.bfloat16:
            raise ValueError("images are uint8, uint16 or floating point in [0, 1], got bfloat16; use .float()")
        array = (image.permute(1, 2, 0) if image.dim() == 3 else image).detach().cpu().numpy()
    else:
        array = np.asarray(image)
        image = array
    if array.ndim == 3 and array.shape[2] not in (1, 3) or array.ndim not in (2, 3):
        raise ValueError(
            f"an image is (H, W), (H, W, 1) or (H, W, 3) as an array, (C, H, W) as a tensor; got {tuple(image.shape)}. "
            "Carry an alpha channel beside it."
        )
    if min(array.shape[:2]) < MIN_SIDE:
        raise ValueError(f"an image has at least {MIN_SIDE} pixels on each side, got {array.shape[1]}x{array.shape[0]}")
    if array.dtype.kind not in "uf" or array.dtype.itemsize > 8 or array.dtype.kind == "u" and array.dtype.itemsize > 2:
        raise ValueError(f"images are uint8, uint16 or floating point in [0, 1], got {array.dtype}")
    scale = np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1
    y = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32) / np.float32(scale))
    if not bool(torch.isfinite(y).all()):
        raise ValueError("the image holds NaN or infinite values")
    if float(y.abs().max()) > 8:  # noise and highlights may leave [0, 1], but not by this much
        raise ValueError(f"floating-point images are in [0, 1], got values up to {float(y.max()):.4g}; divide by 255?")
    y = y[None] if y.dim() == 2 else y.permute(2, 0, 1)
    return _Picture(y.expand(3, -1, -1)[None].contiguous(), image, y.shape[0] == 1, lossy, steps)


class Deblurrer:
    """Restores blurry images and finds their blur kernels. Holds the networks; call it as often as you like.

    Args:
        prior: the diffusion prior: a bundled name (`"natural"`), a checkpoint file, a state dict or an eps model.
        method: `"fast-em"` (Algorithm 2), `"diffusion-em"` (Algorithm A.1) or `"known"` (the kernel is always given).
        guidance: `"mean"` (Jacobian-free, the default), `"pigdm"` or `"dps"`.
        steps: reverse steps; by default what the guidance needs (12, 100, 1000).
        particles: samples per image; the M-step uses all of them.
        kernel_size: side of the kernel's support in pixels, odd or even, or (h, w); `"auto"` finds it for each image,
            up to 129.
        compat: `"paper"`, our reading and corrections, or `"released"`, the released program to the last detail.
        m_step: `"edges"` (the default, from a coarse-to-fine start) or `"hqs"`, Eq. (22)-(25) from a delta; with
            guidance "mean" another run restores with the kernel that was found.
        r2_term: Appendix D's r_t^2 term in the HQS M-step.
        mode: `"mean"`, the best PSNR: guidance "mean" draws no noise but that of the start, and the image is the mean
            of the particles; or `"sample"`, a draw from the posterior: the particle whose residual is nearest to the
            noise.
        guard: images that show no blur are denoised only and come back with a delta kernel; M-step `"edges"` only.
        gamma: the blur happens in light, the photo stores about its `1 / gamma`-th power: 1 takes the pixels as light,
            2.2 is usual for cameras, `"auto"` tries both and keeps the one that explains the photo better.
        saturation: pixels of this brightness in [0, 1] and more are clipped and count as not measured; None: none are.
        varying: where one kernel leaves much more residual in some places than in most, look for a blur that changes
            over the image. Slower by as many runs again.
        kernel_prior: the kernel denoiser of the HQS M-step, a bundled name, file or module.
        lam: strength of the kernel prior; by default 1, and 0.2 for kernels of 48 pixels and more.
        boundary: `"photo"` continues the image smoothly to a periodic one, `"circular"` takes it as periodic, `"auto"`
            looks whether its borders match.
        tile: evaluate the network on tiles of this side; less memory for large images.
        device, backend: where and how it runs; see `fastem doctor`.
        precision: of the network's body, `"fp32"`, `"fp16"` or `"bf16"`; `"auto"` is fp16 on a GPU, fp32 on a CPU.
            States, guidance and M-step are float32 always.
        preset: `"exact"`, or `"turbo"`: fewer steps and rounds, 0 to 0.2 dB less and 1.04 times the kernel error on
            test images (docs/architecture.md).

    Raises:
        ValueError: for an unknown option, naming what is allowed.
        fastem.models.CheckpointError: for weights that are missing or do not fit.
    """

    def __init__(
        self, prior: Any = "natural", *, method: str = "fast-em", guidance: str | None = None, steps: int | None = None,
        particles: int = 1, kernel_size: int | tuple[int, int] | str = 33, compat: str = "paper",
        kernel_prior: Any = "kernel", m_step: str | None = None, r2_term: bool = False, guard: bool = True,
        mode: str = "mean", gamma: float | str = 1.0, saturation: float | None = None, varying: bool = False,
        lam: float | None = None, boundary: str = "auto", tile: int | None = None, device: str = "auto",
        backend: str = "auto", precision: str = "auto", preset: str = "exact",
    ) -> None:  # fmt: skip
        self.method = _choice("method", method, Method)
        self.compat = _choice("compat", compat, ("paper", "released"))
        released = self.compat == "released"
        self.guidance = _choice("guidance", guidance or ("pigdm" if released else "mean"), Guide)
        self.boundary = _choice("boundary", boundary, ("auto", "photo", "circular"))
        self.m_step = _choice("m_step", m_step or ("hqs" if released else "edges"), ("edges", "hqs"))
        if released and self.m_step != "hqs":
            raise ValueError("compat 'released' has the M-step 'hqs' only; leave m_step out, or choose compat 'paper'")
        if r2_term and self.m_step != "hqs":
            raise ValueError("r2_term belongs to the M-step 'hqs'; add m_step 'hqs', or leave r2_term out")
        self.r2_term, self.guard = r2_term, guard
        self.mode = _choice("mode", mode, Mode)
        self.preset = _choice("preset", preset, tuple(EFFORTS))
        self.effort = EFFORTS[self.preset]
        usual = self.guidance is Guide.MEAN and self.m_step == "edges" and self.method is not Method.DIFFUSION_EM
        if self.preset == "turbo" and not usual:
            raise ValueError("preset 'turbo' was measured for the default method, guidance and M-step; leave them out")
        default_steps = {Guide.MEAN: self.effort.steps, Guide.PIGDM: 100, Guide.DPS: 1000}[self.guidance]
        self.steps = _positive("steps", default_steps if steps is None else steps, 1000)
        self.particles = _positive("particles", particles, 1024)
        self.kernel_size = _kernel_size(kernel_size)
        self.gammas, self.saturation = _gammas(gamma), saturation
        if saturation is not None and not 0 < saturation <= 1:
            raise ValueError(f"saturation is a brightness in (0, 1], or None, got {saturation}")
        plain_light = self.gammas == (1.0,) and saturation is None
        asks = not plain_light or self.kernel_size is None
        if asks and (self.m_step == "hqs" or self.method is Method.DIFFUSION_EM):
            raise ValueError("gamma, saturation and kernel_size 'auto' need method 'fast-em' with the M-step 'edges'")
        self._may_vary = plain_light and usual and self.method is Method.FAST_EM
        if varying and not self._may_vary:
            raise ValueError(
                "varying needs method 'fast-em', guidance 'mean' and the M-step 'edges', without gamma and saturation"
            )
        self.varying = varying
        self.lam = (0.2 if max(self.kernel_size or (0,)) >= 48 else 1.0) if lam is None else lam
        self.tile, self.backend = tile, _choice("backend", backend, Backend)
        self.device = runtime.resolve_device(device)
        self.prior_name = prior if isinstance(prior, (str, Path)) else type(prior).__name__
        self.model: EpsModel = prior if isinstance(prior, EpsModel) else load_model(prior)
        dtype = runtime.resolve_precision(precision, self.device)
        self.precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        if dtype != torch.float32 and self.model is prior:
            self.model = copy.deepcopy(prior)  # other holders keep their bits
        self.model.to(self.device)
        if dtype != torch.float32:
            self.model.set_precision(dtype)
        if self.device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)
        if isinstance(kernel_prior, torch.nn.Module):
            self.kernel_denoiser = kernel_prior.to(self.device)
        else:
            self.kernel_denoiser = load_kernel_denoiser(kernel_prior).to(self.device)
        self.execute = runtime.StepGraphs() if self.device.type == "cuda" else Eager

    @property
    def config(self) -> dict:
        """Everything that decides a result, as plain JSON values."""
        return {
            "prior": str(self.prior_name), "prior_sha256": self.model.sha256, "method": str(self.method),
            "guidance": str(self.guidance), "steps": self.steps, "particles": self.particles,
            "kernel_size": "auto" if self.kernel_size is None else list(self.kernel_size), "compat": self.compat,
            "m_step": self.m_step, "r2_term": self.r2_term, "guard": self.guard, "mode": str(self.mode),
            "gamma": self.gammas[0] if len(self.gammas) == 1 else "auto", "saturation": self.saturation,
            "varying": self.varying,
            "lam": self.lam, "boundary": self.boundary,
            "tile": self.tile, "device": str(self.device), "backend": str(self.backend),
            "precision": self.precision, "preset": self.preset,
        }  # fmt: skip

    def __call__(
        self, image: Any, *, sigma: float | None = None, seed: int = 0, kernel: np.ndarray | Tensor | None = None,
        lossy: bool | None = None, quantization: np.ndarray | None = None, on_step: Any = None,
    ) -> Restoration:  # fmt: skip
        """Restores one image.

        Args:
            image: ndarray `(H, W[, C])`, tensor `(C, H, W)`, PIL image or path; uint8, uint16 or float in [0, 1].
            sigma: std of the noise in image units (8-bit 5 is 5 / 255); None estimates it. Where the kernel is searched
                for, at least 2 / 255 is assumed: its errors act as noise.
            seed: same seed, same restoration.
            kernel: `(h, w)`, the blur where it is known, >= 0; it is normalised to sum 1.
            lossy: whether the image went through JPEG or the like: compression takes the noise, which the estimate then
                misses, and leaves errors that deblurring would amplify. Such an estimate is at least 2 grey levels.
                None: as the file or the PIL image says; arrays and tensors do not.
            quantization: `(8, 8)`, the steps of the luminance of a JPEG: the estimate is then at least 1.5 times the
                error that they leave (`fastem.photo.jpeg_sigma`), too. None: as the file or the PIL image says.
            on_step: called with (steps done, steps in all).

        Raises:
            ValueError: for an image or option that cannot be used, saying why.
            NumericError: if the result is not finite.
        """
        job = self._job(Request(image, sigma, seed, lossy, quantization), kernel)
        if job.settled is not None:
            return job.settled
        (result,) = self._restore_jobs([job], on_step=on_step)
        if isinstance(result, Exception):
            raise result
        return result

    def map(
        self, items: Iterable[Any], *, batch_size: int | str = "auto", sigma: float | None = None, seed: int = 0,
        kernel: np.ndarray | Tensor | None = None, on_step: Any = None,
    ) -> Iterator[Restoration | Exception]:  # fmt: skip
        """Restores images in batches; results come in order, and an item that fails yields its exception instead.

        Images are read and prepared in other threads while others are restored. Those of one size share batches, padded
        to a power of two: the result of an image does not depend on its company in a batch of that size. Where
        memory ends, batches are halved; then the network is evaluated on tiles; then that item fails.

        Args:
            items: what a call takes, or `Request`s with a sigma, seed and compression of their own.
            batch_size: images per batch (each has `particles` samples); `"auto"` is 1 on a CPU and what fits on a GPU.
            sigma, seed, kernel: as in a call, for items that are no `Request`; the kernel is that of all.
            on_step: called with (steps done, steps in all) of each batch.

        Raises:
            ValueError: for a batch size or kernel that cannot be used.
        """
        if batch_size != "auto":
            batch_size = _positive("batch_size", batch_size, 1024)
        if kernel is not None:
            kernel = _kernel(kernel)

        transfers = runtime.Transfers(self.device)
        later = transfers if transfers.overlap and len(self.gammas) == 1 and not self.varying else None

        def prepare(item: Any) -> _Job | Exception:
            try:
                job = self._job(item if isinstance(item, Request) else Request(item, sigma, seed), kernel)
                return replace(job, sent=transfers.send(job.picture.y)) if later and job.settled is None else job
            except Exception as error:
                return error

        def run(jobs: Sequence[_Job], tiled: bool) -> list[Restoration | Exception]:
            if jobs[0].settled is not None:
                return [job.settled for job in jobs]
            return self._restore_jobs(jobs, on_step=on_step, tile=TIGHT_TILE if tiled else None, later=later)

        batches = runtime.MicroBatches(
            run, kind=lambda job: job.kind, size=self._auto_batch if batch_size == "auto" else batch_size,
            free=self._free, cut=self._can_be_cut,
        )  # fmt: skip
        most = 2 * runtime.LOOK_AHEAD if batch_size == "auto" else runtime.LOOK_AHEAD * batch_size
        yield from batches(runtime.ahead(items, prepare, threads=2, most=most))

    def _job(self, request: Request, kernel: Tensor | None) -> _Job:
        """What can be decided without the network; raises for what cannot be used."""
        picture, sigma = _picture(request.image), request.sigma
        estimated = sigma is None
        if estimated:
            sigma = noise.estimate_sigma(picture.y[0].permute(1, 2, 0).numpy())
        if not 0 <= sigma < math.inf:
            raise ValueError(f"sigma must be a number >= 0 in image units (8-bit 5 is 5 / 255), got {sigma}")
        if sigma > 1:
            raise ValueError(f"sigma is in image units, where the image spans [0, 1]; got {sigma}; divide by 255?")
        if not -(2**63) <= request.seed < 2**63:
            raise ValueError(f"seed must be a 64-bit integer, got {request.seed}")
        if kernel is None and self.method is Method.KNOWN:
            raise ValueError("method 'known' needs the kernel: pass kernel=, or choose method 'fast-em'")
        used, notes, upper = max(float(sigma), SIGMA_FLOOR), [], False
        if estimated and (picture.lossy if request.lossy is None else request.lossy):
            steps = picture.quantization if request.quantization is None else request.quantization
            least = least_lossy_sigma(picture.y[0].permute(1, 2, 0).numpy(), steps)
            upper = used < least
            if upper:
                found, used = 255 * sigma, least
                notes.append(
                    f"W_LOSSY: {found:.2g} grey levels of noise survived compression; counted as {255 * least:.2g}"
                )
        if kernel is not None:
            kernel = _kernel(kernel)
        settled = None
        if float(picture.y.std(dim=(-2, -1)).max()) < SIGMA_FLOOR and kernel is None:
            settled = self._nothing_to_see(picture, used, estimated)
        ksize = self.kernel_size if kernel is None else tuple(kernel.shape[-2:])
        canvas = None if ksize is None else self._canvas(picture.y, ksize)
        return _Job(
            picture, used, estimated, request.seed, kernel, canvas, notes, settled, self.varying,
            refine=estimated and not upper, upper=upper,
        )  # fmt: skip

    def _restore_jobs(
        self, jobs: Sequence[_Job], *, on_step: Any = None, tile: int | None = None,
        later: runtime.Transfers | None = None,
    ) -> list[Restoration | Exception]:  # fmt: skip
        """The images of one batch, which share size, canvas and kernel; each in the light that explains it best.

        With `later` each is a `runtime.Later`, and its copy to the host runs beside what comes next.
        """
        tried = [
            self._restore_in_light(jobs, gamma, on_step=on_step, tile=tile, later=later) for gamma in self.gammas
        ]  # fmt: skip
        if len(tried) == 1:
            return tried[0]
        best = []
        for results in zip(*tried, strict=True):
            restored = [(g, r) for g, r in zip(self.gammas, results, strict=True) if isinstance(r, Restoration)]
            good = [(r.reblur * r.sigma**2, g, r) for g, r in restored]  # each has a sigma of its own
            best.append(min(good, key=lambda found: found[0])[2] if good else results[0])
            if good:
                gamma = min(good, key=lambda found: found[0])[1]
                best[-1].warnings.append(f"W_GAMMA: gamma {gamma:g} explains the image best")
        return best

    def _restore_in_light(
        self, jobs: Sequence[_Job], gamma: float, *, on_step: Any, tile: int | None, later: runtime.Transfers | None
    ) -> list[Restoration | Exception]:
        first = jobs[0]
        y = torch.cat([self._to_device(job.picture.y) if job.sent is None else job.sent.get() for job in jobs])
        sigma = self._to_device(torch.tensor([job.sigma for job in jobs]))
        seeds = self._to_device(torch.tensor([job.seed for job in jobs], dtype=torch.int64))
        refine = self._to_device(torch.tensor([job.refine for job in jobs]))
        drawn, canvas, trace, sigma = self.restore(
            y, sigma, seeds, kernel=first.kernel, gamma=gamma, on_step=on_step, canvas=first.canvas, tile=tile,
            refine=refine,
        )  # fmt: skip
        explain = partial(reblur_residual, k=drawn.kernel, y=y, canvas=canvas, gamma=gamma, seen=self._seen(y))
        residual, kernels = explain(drawn.images.mean(dim=1)), None
        asked = self.varying and first.kernel is None and float(drawn.kernel.max()) < 1
        if asked and photo.blur_varies(_inside(residual[0], drawn.kernel.shape[-2:])):
            drawn, blurs = self._vary(y, sigma, seeds, drawn.kernel, canvas, tile)
            explain = partial(reblur_residual, k=blurs, y=y, canvas=canvas)
            residual, kernels = explain(drawn.images.mean(dim=1)), blurs.on_grid()
        chosen = self._chosen(drawn, explain, sigma)
        restored = self._restorations(jobs, drawn, canvas, residual, chosen, sigma, trace, later)
        if kernels is not None and isinstance(restored[0], Restoration):
            restored[0].kernels = kernels.cpu().numpy()
        return restored

    def _restorations(
        self, jobs: Sequence[_Job], drawn: Sample, canvas: Canvas, residual: Tensor, chosen: Tensor, sigma: Tensor,
        trace: list[dict], later: runtime.Transfers | None,
    ) -> list[Restoration | Exception]:  # fmt: skip
        samples = canvas.crop(drawn.images)
        finite = drawn.x.isfinite().flatten(1).all(1) & drawn.kernel.isfinite().flatten(1).all(1)
        leaving = (later or runtime.Transfers(None)).fetch([samples, drawn.kernel, finite, residual, chosen, sigma])

        def finish(i: int) -> Restoration | Exception:
            x, k, ok, e, shown, s = (t[i] for t in leaving.get())
            job, level = jobs[i], float(s)
            if not math.isclose(level, job.sigma, rel_tol=1e-6):  # of float32
                upper = job.upper or math.isclose(level, BLIND_SIGMA, rel_tol=1e-6)
                job = replace(job, sigma=level, upper=upper)
            return self._restoration(job, x, int(shown), k[0], e, trace) if ok else NumericError(NOT_FINITE)

        rows = range(len(jobs))
        return [runtime.Later(partial(finish, i)) for i in rows] if later else [finish(i) for i in rows]

    def _vary(
        self, y: Tensor, sigma: Tensor, seeds: Tensor, k: Tensor, canvas: Canvas, tile: int | None
    ) -> tuple[Sample, VaryingBlur]:
        """One image `(1, C, H, W)` with a kernel per window: EM from its kernel as a whole, in as many rounds."""
        observation = _blind(self._observe(y, sigma, canvas, 1.0))
        model = runtime.fit_to_size(self.model, observation.size, tile or self.tile)
        search = Schedule.karras(min(self.effort.search_steps, self.steps), SIGMA_MAX, SEARCH_SIGMA_MIN)
        windows = Windows.over(observation.size, tuple(k.shape[-2:]))
        blurs = VaryingBlur(windows, k[0].expand(windows.count, -1, -1).contiguous())

        def draw(schedule: Schedule, inflation: float, run: int, on_step: Any = None, still: bool = False) -> Sample:
            guide = VaryingMean(blurs, inflation)
            noise_ = PhiloxNoise(seeds, self.particles, tuple(observation.y.shape[1:]), run)
            # Eager: a recorded step would hold these kernels, and be of use to no other run.
            return self._draw(model, observation, Known(k), guide, schedule, noise_, on_step, still, execute=Eager)

        with use_backend(self.backend):
            for run, inflation in enumerate(self.effort.inflations, 1):
                sums = WindowSums(blurs, observation)
                draw(search, inflation, run, sums)
                blurs = VaryingBlur(windows, fit_kernels(sums.cross, sums.energy, blurs.kernels, windows))
            return draw(self._schedule(), KERNEL_INFLATION, 0, still=self.mode is Mode.MEAN), blurs

    def _restoration(
        self, job: _Job, samples: Tensor, chosen: int, k: Tensor, e: Tensor, trace: list[dict]
    ) -> Restoration:  # fmt: skip
        """Samples `(n, C, H, W)`, kernel `(h, w)` and residual `(C, H, W)` on the host, in the form of the input."""
        notes, chi2 = list(job.notes), float(e.square().mean() / job.sigma**2)
        if job.kernel is None and float(k.max()) == 1:
            notes.append("W_NO_BLUR: the image shows no blur that can be found; only its noise was removed")
        elif photo.blur_varies(_inside(e, k.shape)):
            advice = "do not trust it"
            if self._may_vary and job.kernel is None:
                advice = "nor does what --varying found; do not trust it" if self.varying else "--varying"
            notes.append(f"W_VARYING: one blur does not explain the whole image (reblur chi^2 {chi2:.2f}): {advice}")
        elif chi2 > 2 or chi2 < 0.5 and not job.upper:
            notes.append(f"W_SIGMA: reblur chi^2 is {chi2:.2f}, far from 1: is sigma right?")
        averaged = self.mode is Mode.MEAN and self.compat != "released"
        image = job.picture.back(samples.mean(dim=0) if averaged else samples[chosen])
        return Restoration(
            image, k.numpy().copy(), samples.permute(0, 2, 3, 1).numpy().copy(), job.sigma, job.estimated, chi2,
            list(trace), notes,
        )  # fmt: skip

    def _chosen(self, drawn: Sample, explain: Callable[[Tensor], Tensor], sigma: Tensor) -> Tensor:
        """The particle of each image to show if they are not averaged, `(B,)`: that with the reblur chi^2 nearest to 1.

        The released program shows the first.
        """
        images = drawn.images
        if self.compat == "released" or images.shape[1] == 1 or self.mode is Mode.MEAN:
            return torch.zeros(len(images), dtype=torch.long, device=images.device)
        chi2 = torch.stack([explain(x).square().mean(dim=(1, 2, 3)) / sigma**2 for x in images.unbind(1)], dim=1)
        return (chi2 - 1).abs().argmin(dim=1)

    def _to_device(self, t: Tensor) -> Tensor:
        return t.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else t

    def _auto_batch(self, job: _Job) -> int:
        """Images per batch: 1 on a CPU, where one fills the cores; on a GPU what fits, by one trial evaluation."""
        if self.device.type != "cuda" or job.settled is not None or job.canvas is None:
            return 1
        model = runtime.fit_to_size(self.model, (job.canvas.height, job.canvas.width), self.tile)
        jacobian = self.guidance is not Guide.MEAN
        each = runtime.device_bytes(model, job.canvas, self.particles, jacobian=jacobian, device=self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        return runtime.largest_batch(free, each)

    def _can_be_cut(self, job: _Job) -> bool:
        """Whether tiles would be smaller than what the network was evaluated on."""
        largest = max(job.picture.y.shape[-2:]) if job.canvas is None else max(job.canvas.height, job.canvas.width)
        return (self.tile or largest) > TIGHT_TILE and self.model.image_size is None

    def _free(self) -> None:
        if isinstance(self.execute, runtime.StepGraphs):
            self.execute.release()
        runtime.release_device()

    @torch.no_grad()
    def restore(
        self, y: Tensor, sigma: float | Tensor, seeds: Tensor, *, kernel: Tensor | None = None, gamma: float = 1.0,
        on_step: Any = None, canvas: Canvas | None = None, tile: int | None = None, refine: Tensor | None = None,
    ) -> tuple[Sample, Canvas, list[dict], Tensor]:  # fmt: skip
        """The batched core: y `(B, C, H, W)` in [0, 1], sigma scalar or `(B,)`, seeds `(B,)` -> particles on a canvas.

        `canvas` is that of all images (None: chosen from them); `tile` as for the engine, and stronger. `refine`
        `(B,)`, bool: whose sigma is a guess that the search for the kernel improves (`fastem.em.noise_level`). Returns
        the particles, the canvas, one record per step, and the sigma `(B,)` of the last run.

        The result of an image depends on its pixels, sigma and seed, not on the other images of the batch.
        """
        ksize = self.kernel_size if kernel is None else tuple(kernel.shape[-2:])
        tile = tile or self.tile
        if ksize is None:
            ksize = self._find_size(y, sigma, gamma, tile)
        canvas = canvas or self._canvas(y, ksize)
        observation = self._observe(y, sigma, canvas, gamma)
        particles = len(y) * self.particles
        jacobian = self.guidance is not Guide.MEAN
        runtime.check_memory(observation.size, particles, jacobian=jacobian, device=self.device)
        model = runtime.fit_to_size(self.model, observation.size, tile)
        schedule = self._schedule()
        if isinstance(model, EpsModel):
            model.prepare([step.t for step in schedule.reverse()])
        trace: list[dict] = []
        once = self.m_step == "hqs" and (jacobian or self.compat == "released")  # the run that finds k restores, too
        searched = 0 if kernel is not None or once else None  # steps it took to find the kernel

        def record(step, x0_hat, k) -> None:
            trace.append({"index": step.index, "t": step.t, "sigma_t": step.sigma_t})
            if on_step is not None:
                search = self.steps
                if self.m_step == "edges":
                    search = len(self.effort.inflations) * min(self.effort.search_steps, self.steps)
                ahead = search * math.ceil(len(trace) / search) if searched is None else searched
                on_step(len(trace), len(schedule) + ahead)

        def philox(run: int) -> PhiloxNoise:
            return PhiloxNoise(seeds, self.particles, tuple(observation.y.shape[1:]), run)

        prior = PnP(self.kernel_denoiser, self.lam)
        with use_backend(self.backend):
            if self.method is Method.DIFFUSION_EM and kernel is None:
                guide, searched = self._guide(), (ROUNDS - (self.compat == "released")) * len(schedule)
                drawn = diffusion_em(
                    model, observation, guide, schedule, prior=prior, kernel_size=ksize, noise=philox,
                    compat=self.compat, rule=_rule(guide), r2=_r2(guide, self.model), execute=self.execute,
                    on_step=record,
                )  # fmt: skip
                return _projected(drawn), canvas, trace, observation.sigma
            if kernel is not None:
                known, sharp = kernel.to(y), torch.zeros(len(y), dtype=torch.bool, device=y.device)
            elif self.m_step == "hqs":
                estimator = HQS(prior, ksize, compat=self.compat, r2_ridge=self.r2_term)
                guide = self._guide(INFLATION)
                assumed = observation if once else _blind(observation)
                drawn = self._draw(model, assumed, estimator, guide, schedule, philox(0 if once else 1), record)
                if once:
                    return _projected(drawn), canvas, trace, observation.sigma
                known, sharp = drop_faint(drawn.kernel), torch.zeros(len(y), dtype=torch.bool, device=y.device)
                searched = len(trace)
            else:
                known, sharp, level = self._find_kernel(y, observation, ksize, seeds, record, tile)
                if refine is not None:
                    differs = (level / observation.sigma).log().abs() > math.log(NOISE_AGREES)
                    level = torch.where(refine & differs & ~sharp, level.clamp(min=SIGMA_FLOOR), observation.sigma)
                    observation = replace(observation, sigma=level)
                searched = len(trace)
            if bool(sharp.all()):
                return self._denoised(model, observation, ksize), canvas, trace, observation.sigma
            guide = self._guide(1.0 if kernel is not None else KERNEL_INFLATION)
            still = self.mode is Mode.MEAN and self.guidance is Guide.MEAN
            plain = self._denoised(model, observation, ksize) if bool(sharp.any()) else None
            if kernel is None:
                observation = _blind(observation, sharp)
            drawn = self._draw(model, observation, Known(known), guide, schedule, philox(0), record, still)
            if plain is not None:
                x = torch.where(sharp.view(-1, 1, 1, 1, 1), plain.x, drawn.x)
                drawn = Sample(x, torch.where(sharp.view(-1, 1, 1, 1), plain.kernel, drawn.kernel))
        return drawn, canvas, trace, observation.sigma

    def _draw(
        self, model: torch.nn.Module, observation: Observation, estimator: KernelEstimator, guide: Guidance,
        schedule: Schedule, noise_: PhiloxNoise, record: Any = None, still: bool = False,
        execute: Execute | None = None,
    ) -> Sample:  # fmt: skip
        """One run of the sampler; `still`: without noise but that of its start, for guidances that have no Jacobian."""
        x_start = None
        if not guide.jacobian:  # the schedule starts where the low frequencies of y are right
            first = schedule.step(len(schedule) - 1)
            a, s = math.sqrt(first.alpha_bar), math.sqrt(1 - first.alpha_bar)
            x_start = a * (2 * observation.y[:, None] - 1) + s * noise_.start()

        rule, r2 = (PlugAndPlay(), still_r2) if still else (_rule(guide), _r2(guide, self.model))
        return sample(
            model, observation, estimator, guide, schedule, noise=noise_, rule=rule, r2=r2, error=self.model.r2,
            x_start=x_start, execute=execute or self.execute, on_step=record,
        )  # fmt: skip

    def _find_kernel(
        self, y: Tensor, observation: Observation, ksize: tuple[int, int], seeds: Tensor, record: Any,
        tile: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The kernel of each image, `(B, 1, h, w)`; whether it shows no blur, `(B,)`; its noise as EM sees it, `(B,)`.

        A start, then rounds of EM. The noise is sigma where no kernel was found.

        Each image keeps its first kernel that explains it, or the best of all; each search starts from other constants.
        A doubtful image has no blur if no kernel predicts it about as well as its denoising does (`place_between`).
        """
        y, window, denoised = self._kernel_window(y, observation, ksize, tile)
        model = runtime.fit_to_size(self.model, window.size, tile)
        widths = self._edge_widths(window, denoised)
        sharp = widths < SHARP_WIDTH
        if bool(sharp.all()):
            return delta_kernel(len(y), ksize).to(y), sharp, observation.sigma
        canvas, sigma = window.canvas or Canvas(*window.size, window.size), window.sigma
        window = _blind(window)
        schedule = Schedule.karras(min(self.effort.search_steps, self.steps), SIGMA_MAX, SEARCH_SIGMA_MIN)
        light = denoised.clamp(min=0) ** observation.gamma
        found = delta_kernel(len(y), ksize).to(y)
        best, level = torch.where(sharp, 0.0, math.inf), sigma  # nothing to find where it is sharp
        least, offset, slope = DOUBTFUL_WIDTH
        doubtful = ~sharp & (widths < (offset + slope * sigma).clamp(min=least))
        for search in STARTS:
            k = search(light, ksize, window.canvas, window.seen)
            for run, inflation in enumerate(self.effort.inflations, 1):
                noise_ = PhiloxNoise(seeds, self.particles, tuple(window.y.shape[1:]), run)
                guide, last = PosteriorMean(inflation), _LastStep(record)
                drawn = self._draw(model, window, EdgeEM(k), guide, schedule, noise_, last)
                k = centre_by_pixels(drawn.kernel)
            k = centre(k)  # by the fraction too: this one restores
            misfit = reblur_chi2(drawn, y, canvas, window.sigma, observation.gamma, self._seen(y)) / CHI2_GOOD
            if bool((doubtful & ~(best <= 1)).any()):
                place = self._place_of_photo(model, y, window, k, sigma, seeds)
                proof = torch.where(k.amax(dim=(1, 2, 3)) < PEAK, PROOF, PROOF_OF_PEAK)
                misfit = torch.where(doubtful, place / proof, misfit)
            better = ~(best <= 1) & (misfit < best)
            found = torch.where(better.view(-1, 1, 1, 1), k, found)
            best = torch.where(better, misfit, best)
            X, K = torch.fft.rfft2(last.x0_hat), ops.psf_to_otf(drawn.kernel, window.size)
            level = torch.where(better, noise_level(window, X, K), level)
            if bool((best <= 1).all()) or observation.y[0].numel() > SEARCH_AGAIN:
                break
        return found, sharp | doubtful & ~(best <= 1), level

    def _place_of_photo(
        self, model: torch.nn.Module, y: Tensor, window: Observation, k: Tensor, sigma: Tensor, seeds: Tensor
    ) -> Tensor:  # fmt: skip
        """How far from its restoration with k, blurred (0), towards its denoising (1) y lies without its noise, `(B,)`.

        `place_between`, plus its standard deviation; sigma of the noise. Both predict y from y with as much more noise
        as brings it to `JUDGED_SIGMA`: without noise denoising is hard to beat. The place is right also where sigma is
        too large, as it is for photos that were compressed: both risks are too small by the same.
        """
        canvas, seen = window.canvas or Canvas(*window.size, window.size), self._seen(y)
        judged = sigma.clamp(min=JUDGED_SIGMA)
        noise_ = PhiloxNoise(seeds, self.particles, tuple(window.y.shape[1:]))
        schedule = Schedule.karras(self.effort.steps, SIGMA_MAX, SIGMA_MIN)

        def observed(y: Tensor) -> Observation:
            return replace(window, y=canvas.extend(y), sigma=judged)

        def reblurred(y: Tensor) -> Tensor:
            guide = PosteriorMean(KERNEL_INFLATION)
            drawn = self._draw(model, observed(y), Known(k), guide, schedule, noise_, still=True)
            return y + reblur_residual(drawn.images.mean(dim=1), k, y, canvas, window.gamma, seen)

        def denoised(y: Tensor) -> Tensor:
            e = canvas.crop(denoise_observation(model, observed(y))) - y
            return y + (e if seen is None else e * seen)

        more, probe = (PhiloxNoise(seeds, 1, tuple(y.shape[1:]), PROBE_RUN + i).start()[:, 0] for i in range(2))
        y, probe = y + (judged**2 - sigma**2).sqrt().view(-1, 1, 1, 1) * more, probe.sign()
        if seen is not None:
            probe = probe * seen
        place, deviation = place_between(reblurred, denoised, y, judged, probe)
        return place + deviation

    def _observe(self, y: Tensor, sigma: float | Tensor, canvas: Canvas, gamma: float) -> Observation:
        seen = self._seen(y)
        if seen is not None:
            seen = F.pad(seen, (0, canvas.width - y.shape[-1], 0, canvas.height - y.shape[-2]), value=1.0)
        return Observation.of(canvas.extend(y), sigma, canvas, seen=seen, gamma=gamma)

    def _seen(self, y: Tensor) -> Tensor | None:
        """Where y was not clipped; None where nobody asks, or nothing was."""
        if self.saturation is None:
            return None
        seen = photo.unsaturated(y, self.saturation)
        return None if bool((seen == 1).all()) else seen

    def _find_size(self, y: Tensor, sigma: float | Tensor, gamma: float, tile: int | None) -> tuple[int, int]:
        """A support that holds the blur of every image of the batch."""
        largest = max(min(LARGEST_AUTO, *((n // 2 - 1) | 1 for n in y.shape[-2:])), 5)
        start = (min(FIRST_AUTO, largest),) * 2
        canvas = self._canvas(y, start)
        with use_backend(self.backend):
            _, window, denoised = self._kernel_window(y, self._observe(y, sigma, canvas, gamma), start, tile)
            frame = canvas if window.canvas is None else window.canvas
            light = frame.crop(denoised).clamp(min=0) ** gamma
            seen = None if window.seen is None else frame.crop(window.seen)
            size = find_kernel_size(light, start[0], largest, periodic=window.canvas is None, seen=seen)
        return size, size

    def _edge_widths(self, window: Observation, denoised: Tensor) -> Tensor:
        """`fastem.photo.edge_width` of each image, `(B,)`; infinite, as if blurred, where nobody asks."""
        widths = [math.inf] * len(denoised)
        if self.guard:
            crop = (lambda x: x) if window.canvas is None else window.canvas.crop
            levels = window.sigma.tolist()
            widths = [photo.edge_width(crop(x), s) for x, s in zip(denoised, levels, strict=True)]
        return torch.tensor(widths, device=denoised.device)

    def _denoised(self, model: torch.nn.Module, observation: Observation, ksize: tuple[int, int]) -> Sample:
        """Images without their noise, as if drawn with no blur; all particles are alike."""
        x = (2 * denoise_observation(model, observation) - 1)[:, None].expand(-1, self.particles, -1, -1, -1)
        return Sample(x.contiguous(), delta_kernel(len(x), ksize).to(x))

    def _kernel_window(
        self, y: Tensor, observation: Observation, ksize: tuple[int, int], tile: int | None
    ) -> tuple[Tensor, Observation, Tensor]:
        """Where the kernel is searched, the image or the busiest window of a large one; as observed; and denoised."""
        window = runtime.busiest_window(y)
        if window.shape != y.shape:
            canvas = Canvas.around((window.shape[-2], window.shape[-1]), ksize)
            observation = self._observe(window, observation.sigma, canvas, observation.gamma)
        model = runtime.fit_to_size(self.model, observation.size, tile)
        return window, observation, denoise_observation(model, observation)

    def _guide(self, inflation: float = 1.0) -> Guidance:
        mean = PosteriorMean(inflation)
        return {Guide.MEAN: mean, Guide.PIGDM: PiGDM(self.compat), Guide.DPS: DPS(self.compat)}[self.guidance]

    def _schedule(self) -> Schedule:
        if self.guidance is Guide.MEAN:
            return Schedule.karras(self.steps, SIGMA_MAX, SIGMA_MIN)
        return Schedule.linear().respace(self.steps)

    def _canvas(self, y: Tensor, ksize: tuple[int, int]) -> Canvas:
        size = (y.shape[-2], y.shape[-1])
        roomy = all(n >= 1.5 * m for n, m in zip(size, ksize, strict=True))
        alike = (
            self.boundary == "auto" and roomy and len(y) == 1 and looks_periodic(y)
        )  # images of a batch share a canvas
        if self.boundary == "circular" or self.compat == "released" or alike:
            return Canvas(*size, size)
        margin = tuple(max(m, 2 * m - n) for n, m in zip(size, ksize, strict=True))
        return Canvas.around(size, margin)

    def _nothing_to_see(self, picture: _Picture, sigma: float, estimated: bool) -> Restoration:
        """A constant image: any kernel explains it, so it is returned as it is with no blur."""
        k = delta_kernel(1, self.kernel_size or (FIRST_AUTO,) * 2)[0, 0].numpy()
        samples = picture.y.permute(0, 2, 3, 1).expand(self.particles, -1, -1, -1).numpy().copy()
        return Restoration(
            picture.back(picture.y[0]),
            k,
            samples,
            sigma,
            estimated,
            0.0,
            [],
            ["W_NO_INFORMATION: the image is constant"],
        )


@dataclass
class _LastStep:
    """Passes steps on, and keeps x0_hat of the last: the image as the prior sees it, before y has its say."""

    record: Any
    x0_hat: Tensor | None = None

    def __call__(self, step: Step, x0_hat: Tensor, k: Tensor) -> None:
        self.record(step, x0_hat, k)
        if step.index == 0:
            self.x0_hat = x0_hat.clone()


def least_lossy_sigma(image: np.ndarray, quantization: np.ndarray | None) -> float:
    """The least noise to count in a photo `(H, W, C)` in [0, 1] that was compressed; by its JPEG table, if any."""
    if quantization is None:
        return LOSSY_SIGMA
    return max(LOSSY_SIGMA, JPEG_INFLATION * photo.jpeg_sigma(image, quantization))


def _blind(observation: Observation, sharp: Tensor | None = None) -> Observation:
    """With the noise that a run with an estimated kernel assumes; not for images that are `sharp`, `(B,)`, bool."""
    sigma = observation.sigma.clamp(min=BLIND_SIGMA)
    return replace(observation, sigma=sigma if sharp is None else torch.where(sharp, observation.sigma, sigma))


def _rule(guide: Guidance) -> Rule:
    return DDPM() if guide.jacobian else Renoise()


def _r2(guide: Guidance, model: torch.nn.Module) -> ErrorLaw:
    return model.error_spectrum if isinstance(guide, PiGDM) else default_r2


def _projected(drawn: Sample) -> Sample:
    """With the kernel as it is returned: recentring left small values below 0."""
    return Sample(drawn.x, ops.project_kernel(drawn.kernel), drawn.trace)


def reblur_chi2(
    drawn: Sample, y: Tensor, canvas: Canvas, sigma: Tensor, gamma: float = 1.0, seen: Tensor | None = None
) -> Tensor:
    """`||k * x - y||^2 / (M sigma^2)` of each image, `(B,)`: y `(B, C, H, W)`, sigma `(B,)`, x the mean particle."""
    e = reblur_residual(drawn.images.mean(dim=1), drawn.kernel, y, canvas, gamma, seen)
    return e.square().mean(dim=(1, 2, 3)) / sigma**2


def reblur_residual(
    x: Tensor, k: Tensor | VaryingBlur, y: Tensor, canvas: Canvas, gamma: float = 1.0, seen: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`k * x - y` like y, blurred in linear light; 0 where a pixel was not seen. x `(B, C, H, W)` on the canvas."""
    light = x if gamma == 1 else x**gamma
    again = canvas.crop(k(light) if isinstance(k, VaryingBlur) else blur(light, k))
    if gamma != 1:
        again = again.clamp(min=0) ** (1 / gamma)
    return again - y if seen is None else (again - y) * seen


def looks_periodic(y: Tensor) -> bool:
    """Whether the borders of `(B, C, H, W)` continue each other: jumps there are at most 1.5 times those inside."""
    for dim in (-2, -1):
        size = y.shape[dim]
        inner = (y.narrow(dim, 1, size - 1) - y.narrow(dim, 0, size - 1)).square().mean()
        outer = (y.narrow(dim, 0, 1) - y.narrow(dim, size - 1, 1)).square().mean()
        if outer > 1.5**2 * inner:
            return False
    return True


def _kernel(kernel: np.ndarray | Tensor) -> Tensor:
    """A given kernel as `(1, 1, h, w)`, normalised to sum 1."""
    k = torch.as_tensor(kernel if isinstance(kernel, Tensor) else np.asarray(kernel)).float()
    while k.dim() > 2 and k.shape[0] == 1:
        k = k[0]
    if k.dim() != 2 or not bool(torch.isfinite(k).all()) or float(k.min()) < 0 or float(k.sum()) <= 0:
        raise ValueError(f"a kernel is (h, w), finite, >= 0 and of positive sum, got shape {tuple(k.shape)}")
    return (k / k.sum())[None, None]


def _inside(x: Tensor, ksize: tuple[int, int]) -> Tensor:
    """Without a border of half a kernel, if anything stays."""
    top, left = (min(m // 2, n // 4) for m, n in zip(ksize, x.shape[-2:], strict=True))
    return x[..., top : x.shape[-2] - top, left : x.shape[-1] - left]


def _kernel_size(given: int | tuple[int, int] | str) -> tuple[int, int] | None:
    """(h, w), None for "auto"."""
    if isinstance(given, str):
        if given != "auto":
            raise ValueError(f"kernel_size is a side, (height, width) or 'auto', got {given!r}")
        return None
    size = (given, given) if np.ndim(given) == 0 else tuple(given)
    if len(size) != 2:
        raise ValueError(f"kernel_size is a side, (height, width) or 'auto', got {given}")
    return tuple(_positive("kernel_size", s, 513) for s in size)


def _gammas(given: float | str) -> tuple[float, ...]:
    """The gammas to try."""
    if given == "auto":
        return GAMMAS
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 1 <= given <= 4:
        raise ValueError(f"gamma is a number from 1 to 4 or 'auto', got {given!r}")
    return (float(given),)


def _choice(name: str, value: str, allowed: Any) -> Any:
    values = [str(a) for a in allowed]
    if value not in values:
        raise ValueError(f"unknown {name} {value!r}; allowed are {', '.join(values)}")
    return allowed(value) if isinstance(allowed, type) else value


def _positive(name: str, value: int, largest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= largest:
        raise ValueError(f"{name} must be a whole number from 1 to {largest}, got {value!r}")
    return int(value)
