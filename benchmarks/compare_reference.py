"""The released program and fastem side by side: same device, same random weights, same images.

    python benchmarks/compare_reference.py PATH [--device cuda] [--particles 1 4 16] [--dtype float16]

PATH is a checkout of FastDiffusionEM. Nothing of it is part of fastem. Its functions are found by name in its sources
(`NAMES`) and called by the names of their parameters (`SYNONYMS`); a name that is missing is told, not guessed. Three
parts, chosen by --parts: `unet` (forward and gradient), `mstep` (ten iterations and the shift to the centre), `run`
(a whole Fast EM PiGDM restoration). The released program needs a GPU for the last: it moves tensors to `cuda`. It needs
scipy; what else it imports may be missing (`StandIns`).
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import inspect
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import harness
import torch
from torch import Tensor, nn

from fastem import ops, profiling, runtime
from fastem.em import HQS
from fastem.guidance import PiGDM
from fastem.models import UNetEps
from fastem.models.kernel_denoiser import FDnCNN
from fastem.mstep import PnP, mstep
from fastem.operators import Observation
from fastem.samplers import Eager, PhiloxNoise, sample
from fastem.schedules import Schedule

NAMES = {  # what each part calls, by the name it is defined under
    "unet": ("create_model",),
    "mstep": ("HQS_ker", "kernel_shift"),
    "run": ("create_model", "create_sampler", "fastem_pigdm"),
}
PACKAGE = "guided_diffusion"
NETWORK = {  # of ffhq_10m.pt
    "image_size": 256, "num_channels": 128, "num_res_blocks": 1, "channel_mult": "", "learn_sigma": True,
    "class_cond": False, "use_checkpoint": False, "attention_resolutions": "16", "num_heads": 4,
    "num_head_channels": 64, "num_heads_upsample": -1, "use_scale_shift_norm": True, "dropout": 0.0,
    "resblock_updown": True, "use_fp16": False, "use_new_attention_order": False, "model_path": "models/ffhq_10m.pt",
}  # fmt: skip
DIFFUSION = {
    "sampler": "fastem_pigdm", "steps": 1000, "noise_schedule": "linear", "model_mean_type": "epsilon",
    "model_var_type": "fixed_small", "dynamic_threshold": False, "clip_denoised": True, "rescale_timesteps": False,
}  # fmt: skip
SYNONYMS = {  # parameter names that mean the same
    "y": ("y", "measurement", "b"), "x": ("x", "x0", "x_0", "x0_hat"), "sigma": ("sigma", "noise_level", "sig"),
    "kernel": ("k", "ker", "kernel", "z", "k_0", "k0", "init", "init_ker"), "ksize": ("ksize", "kernel_size"),
    "n_iter": ("n_iter", "niter", "num_iter", "iters", "max_iter"), "lam": ("lam", "lamb", "lambda_", "lmbda"),
    "beta": ("beta",), "reg": ("reg", "prior"), "model": ("model", "net"), "x_start": ("x_start", "x_T", "img"),
    "device": ("device",), "record": ("record",), "save_root": ("save_root",),
    "timestep_respacing": ("timestep_respacing",),
}  # fmt: skip
SIGMA, BETA, KERNEL_SIZE = 5 / 255, 1e5, 33


class NotTheReference(Exception):
    """PATH is missing, or holds something else."""


def definitions(root: Path) -> dict[str, list[Path]]:
    """Files in which each function, method or class is defined or, later in the list, registered by a string; no code
    of the checkout runs."""
    defined: dict[str, list[Path]] = {}
    registered: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    defined.setdefault(node.name, []).append(path)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    registered.setdefault(node.value, []).append(path)
    return {name: defined.get(name, []) + registered.get(name, []) for name in {*defined, *registered}}


def check_checkout(root: Path, parts: Sequence[str]) -> dict[str, Path]:
    """Where each name that the parts need is defined.

    Raises:
        NotTheReference: saying what is missing.
    """
    if not root.is_dir():
        raise NotTheReference(f"no folder {root}; give the path of a checkout of FastDiffusionEM")
    if not (root / PACKAGE).is_dir():
        raise NotTheReference(f"{root} is no checkout of FastDiffusionEM: it has no folder {PACKAGE}")
    known = definitions(root)
    wanted = dict.fromkeys(name for part in parts for name in NAMES[part])
    missing = [name for name in wanted if name not in known]
    if missing:
        raise NotTheReference(
            f"{root} is no checkout of FastDiffusionEM, or of another version: it does not define {', '.join(missing)}"
        )
    return {name: known[name][0] for name in wanted}


class _Bar(list):
    """A progress bar without a bar."""

    def __init__(self, items, *args, **kwargs) -> None:
        super().__init__(items)

    def set_postfix(self, *args, **kwargs) -> None:
        pass


class _StandIn(types.ModuleType):
    """A module that is not installed; its names exist, and only the bar does something."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Bar if name == "tqdm" else None


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what the checkout imports, nobody has installed, and no timed function calls: a motion-blur generator that
    is not part of it, plots, pictures, metrics and bars."""

    NAMES = ("motionblur", "cv2", "matplotlib", "tqdm", "torchvision", "yaml", "skimage", "lpips")

    def find_spec(self, name, path=None, target=None):
        known = name.partition(".")[0] in self.NAMES
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module) -> None:
        pass


class Reference:
    """The functions of a checkout, imported while the working directory holds the weights that it looks for."""

    def __init__(self, root: Path, parts: Sequence[str], denoiser: nn.Module, unet: nn.Module) -> None:
        self.root = root.resolve()
        self.places = check_checkout(self.root, parts)
        self._denoiser, self._unet = denoiser, unet

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """Within the block its modules can be imported, and the files it opens by relative paths are there."""
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            for name, net in (("model_zoo/kernel_denoiser.pth", self._denoiser), ("models/ffhq_10m.pt", self._unet)):
                Path(name).parent.mkdir(exist_ok=True)
                torch.save({key: value.cpu() for key, value in net.state_dict().items()}, name)
            for folder_ in ("configs", "model_zoo"):
                source, target = self.root / folder_, Path(folder_)
                if source.is_dir() and not target.exists():
                    os.symlink(source, target)
            sys.path.insert(0, str(self.root))
            sys.meta_path.append(stand_ins := StandIns())  # the last to be asked
            before = set(sys.modules)
            try:
                yield
            finally:
                sys.path.remove(str(self.root))
                sys.meta_path.remove(stand_ins)
                for name in set(sys.modules) - before:
                    module = sys.modules[name]
                    if isinstance(module, _StandIn) or str(self.root) in str(getattr(module, "__file__", "")):
                        del sys.modules[name]

    def get(self, name: str) -> Callable:
        """A function or class of the checkout, imported."""
        path = self.places[name].relative_to(self.root).with_suffix("")
        module = ".".join(part for part in path.parts if part != "__init__")
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise NotTheReference(f"{module} of the checkout does not import: {error}; install what it needs") from None
        except AttributeError:
            raise NotTheReference(f"{module} of the checkout defines {name} inside of something else") from None


def call(function: Callable, **known) -> object:
    """Calls a function by the names of its parameters; those that nobody knows must have defaults.

    Raises:
        NotTheReference: naming the parameter that stands in the way.
    """
    by_name = {synonym: value for name, value in known.items() for synonym in SYNONYMS.get(name, (name,))}
    given = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in by_name:
            given[name] = by_name[name]
        elif parameter.default is parameter.empty:
            where = getattr(function, "__qualname__", function)
            raise NotTheReference(f"{where} has a parameter {name!r} that is not known here; add it to SYNONYMS")
    return function(**given)


# ------------------------------------------------------------------------------------------------ the parts


def compare_unet(reference: Reference, net: UNetEps, ours: UNetEps, device, size: int, rounds: int) -> list[dict]:
    theirs = call(reference.get("create_model"), **NETWORK).to(device).eval()
    theirs.load_state_dict(net.net.state_dict())
    x, v = torch.randn(2, 1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    t = torch.full((1,), 500.0, device=device)

    def forward(model: Callable) -> Tensor:
        with torch.no_grad():
            return model(x, t)[:, :3]

    def gradient(model: Callable) -> Tensor:
        z = x.clone().requires_grad_()
        return torch.autograd.grad(model(z, t)[:, :3], z, v)[0]

    rows = []
    for task, function in (("forward", forward), ("forward + VJP", gradient)):
        a, b = function(theirs), function(ours)
        row = {"part": "unet", "task": task, "difference": ((a - b).abs().max() / a.abs().max()).item()}
        rows.append(row | paired(lambda f=function: f(theirs), lambda f=function: f(ours), device, rounds))
    return rows


def compare_mstep(reference: Reference, denoiser: FDnCNN, device, n: int, size: int, rounds: int) -> dict:
    hqs, shift = reference.get("HQS_ker"), reference.get("kernel_shift")
    y, _ = profiling.problem((size, size), 1, KERNEL_SIZE, device)
    x = y + 0.02 * torch.randn(n, *y.shape[1:], generator=torch.Generator().manual_seed(1)).to(device)
    k = torch.zeros(1, 1, KERNEL_SIZE, KERNEL_SIZE, device=device)
    k[..., KERNEL_SIZE // 2, KERNEL_SIZE // 2] = 1

    def theirs() -> Tensor:
        with torch.no_grad():
            found = call(hqs, y=y, x=x, kernel=k, sigma=SIGMA, beta=BETA, lam=1.0, n_iter=10, ksize=KERNEL_SIZE,
                         reg="pnp", denoiser=denoiser.model, device=device)  # fmt: skip
            shifted = call(shift, kernel=found[0, 0].cpu().numpy(), sf=1)  # as its loop does
            return torch.as_tensor(shifted).float().to(device)

    def ours() -> Tensor:
        with torch.no_grad():
            return ops.recentre(mstep(y, x[None], k, sigma=SIGMA, prior=PnP(denoiser), beta=BETA, compat="released"))

    a, b = torch.as_tensor(theirs()).to(device).view(1, 1, KERNEL_SIZE, -1), ours()
    row = {"part": "mstep", "particles": n, "difference": ((a - b).abs().max() / a.abs().max()).item()}
    return row | paired(theirs, ours, device, rounds)


def compare_run(reference: Reference, net, ours: UNetEps, denoiser, device, n: int, size: int, steps: int) -> dict:
    model = call(reference.get("create_model"), **NETWORK).to(device).eval()
    model.load_state_dict(net.net.state_dict())
    create, known = reference.get("create_sampler"), {**DIFFUSION, "timestep_respacing": str(steps)}
    try:
        sampler = call(create, **known)
    except NameError:  # the sampler is a method, not one of the registered names
        sampler = call(create, **known | {"sampler": "ddpm"})
    y, _ = profiling.problem((size, size), 1, KERNEL_SIZE, device)
    start = torch.randn(n, *y.shape[1:], generator=torch.Generator().manual_seed(2)).to(device)
    loop = getattr(sampler, "fastem_pigdm", None) or getattr(sampler, "p_sample_loop", None)
    if loop is None:
        raise NotTheReference("the sampler of the checkout has neither fastem_pigdm nor p_sample_loop")
    observation = Observation.of(y, torch.full((1,), SIGMA, device=device))
    estimator = HQS(PnP(denoiser), (KERNEL_SIZE, KERNEL_SIZE), compat="released")
    noise = PhiloxNoise(torch.zeros(1, dtype=torch.int64, device=device), n, tuple(y.shape[1:]))
    schedule = Schedule.linear().respace(steps)
    execute = runtime.StepGraphs() if device.type == "cuda" else Eager

    def theirs() -> object:
        return call(loop, model=model, x_start=start.clone().requires_grad_(), y=y, measurement=y, sigma=SIGMA,
                    ksize=KERNEL_SIZE, record=False, save_root=".", device=device)  # fmt: skip

    def released() -> object:
        with torch.no_grad():
            return sample(
                ours, observation, estimator, PiGDM("released"), schedule, noise=noise, x_start=start[None],
                execute=execute,
            )  # fmt: skip

    return {"part": "run", "particles": n, "steps": steps} | paired(theirs, released, device, rounds=1)


def paired(theirs: Callable, ours: Callable, device: torch.device, rounds: int) -> dict:
    clock = harness.clock_of(device, cpu_time=torch.get_num_threads() == 1)
    return harness.summary(harness.alternate({"released": theirs, "fastem": ours}, rounds, clock), "released", "fastem")


# ------------------------------------------------------------------------------------------------ the program


def flags(device: torch.device) -> str:
    where = profiling.environment(device)
    names = ("device", "torch", "threads", "tf32_convolutions", "tf32_products", "cudnn_benchmark")
    return ", ".join(f"{name} {where[name]}" for name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkout of FastDiffusionEM")
    parser.add_argument("--parts", nargs="+", choices=list(NAMES), help="default: all on a GPU, else unet and mstep")
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default=None, help="of our network; default float16 on a GPU, else float32")
    parser.add_argument("--net", default="ffhq-random", choices=list(profiling.RANDOM), help="what create_model builds")
    args = parser.parse_args(arguments)
    device = runtime.resolve_device(args.device)
    cuda = device.type == "cuda"
    parts = args.parts or (list(NAMES) if cuda else ["unet", "mstep"])
    try:
        check_checkout(args.path, parts)
        rows = run_parts(args, device, parts, args.dtype or ("float16" if cuda else "float32"))
    except NotTheReference as error:
        print(f"compare_reference: {error}", file=sys.stderr)
        return 2
    if args.json:
        harness.write(args.json, "reference", rows, device=args.device, size=args.size, dtype=args.dtype)
    return 0


def run_parts(args, device: torch.device, parts: list[str], dtype: str) -> list[dict]:
    print(flags(device) + f", ours {dtype} {'channels last' if device.type == 'cuda' else ''}".rstrip())
    torch.manual_seed(0)
    denoiser = FDnCNN().requires_grad_(False).eval().to(device)
    net = UNetEps(profiling.random_unet(profiling.RANDOM[args.net])).to(device)
    workload = profiling.Workload(prior=args.net, dtype=dtype, channels_last=device.type == "cuda")
    ours = profiling.load_prior(workload, device)
    reference = Reference(args.path, parts, denoiser, net.net)
    rows: list[dict] = []
    with reference.at_home():
        if "unet" in parts:
            rows += compare_unet(reference, net, ours, device, args.size, args.rounds)
        for n in args.particles:
            if "mstep" in parts:
                rows.append(compare_mstep(reference, denoiser, device, n, args.size, args.rounds))
            if "run" in parts:
                rows.append(compare_run(reference, net, ours, denoiser, device, n, args.size, args.steps))
    for row in rows:
        what = " ".join(str(row[name]) for name in ("part", "task") if name in row)
        n = f", n = {row['particles']}" if "particles" in row else ""
        differs = f", largest relative difference {row['difference']:.1e}" if "difference" in row else ""
        times = "  ".join(f"{name} {value:.2f} ms" for name, value in row["median_ms"].items())
        print(f"{what}{n}: {times}  ratio {row['ratio']:.2f}{differs}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
