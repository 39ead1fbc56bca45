"""Denoisers of blur kernels: the proximal step of Eq. (25).

Both networks are plain chains of 3x3 convolutions with ReLU between, on two planes (kernel, constant noise level), so
that the M-step loop can run them fused (`ops.hqs_chain`). `KernelDenoiser` has no biases: it is homogeneous,
`D(c k, c sigma) = c D(k, sigma)` for c > 0, and what it learnt at one kernel size and scale holds at others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "fastem-kernel-1"
BUNDLED = {"kernel": "kernel.safetensors"}

Chain = tuple[list[Tensor], list[Tensor | None], float]  # weights, biases, scale of the input planes


@dataclass(frozen=True)
class KernelDenoiserConfig:
    """What it takes to rebuild a `KernelDenoiser`; stored in the metadata of its weights file."""

    width: int = 32
    num_layers: int = 5
    scale: float = 100.0  # of both input planes: kernels of sum 1 have values around 0.01

    def to_dict(self) -> dict:
        return asdict(self)


class ConvChain(nn.Module):
    """Same-size 3x3 convolutions with ReLU between; the layers are `model.0`, `model.2`, ... in the state dict."""

    def __init__(self, width: int, num_layers: int, scale: float, bias: bool) -> None:
        super().__init__()
        if num_layers < 2:
            raise ValueError(f"a chain has at least 2 layers, got {num_layers}")
        self.scale = scale
        widths = [2, *[width] * (num_layers - 1), 1]
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=bias), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])

    def as_chain(self) -> Chain:
        """The arguments of `ops.denoise_chain` and `ops.hqs_chain` that describe the network."""
        convs = self.model[::2]
        return [c.weight.detach() for c in convs], [None if c.bias is None else c.bias.detach() for c in convs], self.scale

    def forward(self, k: Tensor, noise_std: float | Tensor) -> Tensor:
        """The clean kernel under k.

        Args:
            k: `(B, 1, h, w)`, a kernel of sum about 1 plus noise.
            noise_std: std of that noise, a float or `(B,)`, in the units of k.

        Returns:
            `(B, 1, h, w)`, the estimate of the clean kernel; neither clipped nor normalised.
        """
        if k.dim() != 4 or k.shape[1] != 1:
            raise ValueError(f"kernels are (B, 1, h, w), got {tuple(k.shape)}")
        level = torch.as_tensor(noise_std, dtype=k.dtype, device=k.device)
        if level.dim() > 1 or (level.dim() == 1 and level.shape[0] != k.shape[0]):
            raise ValueError(f"noise_std is a float or ({k.shape[0]},), one per kernel, got {tuple(level.shape)}")
        planes = torch.cat([k, level.view(-1, 1, 1, 1).expand_as(k)], dim=1)
        return self.model(planes * self.scale) / self.scale


class KernelDenoiser(ConvChain):
    """Our bias-free denoiser; it starts as the identity, carried by the pair `relu(k) - relu(-k)`."""

    def __init__(self, config: KernelDenoiserConfig = KernelDenoiserConfig()) -> None:
        super().__init__(config.width, config.num_layers, config.scale, bias=False)
        self.config = config
        convs = self.model[::2]
        with torch.no_grad():
            for conv in convs:
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                conv.weight[:2] = 0
            convs[0].weight[:2, 0, 1, 1] = torch.tensor([1.0, -1.0])
            for conv in convs[1:-1]:
                conv.weight[:2, :2, 1, 1] = torch.eye(2)
            convs[-1].weight.zero_()
            convs[-1].weight[0, :2, 1, 1] = torch.tensor([1.0, -1.0])


class FDnCNN(ConvChain):
    """The denoiser of the released program: 5 layers of 32 channels with biases, kernels in their natural scale.

    The state dict has the published keys, `model.0.weight` to `model.8.bias`.
    """

    def __init__(self, width: int = 32, num_layers: int = 5) -> None:
        super().__init__(width, num_layers, scale=1.0, bias=True)


def load_kernel_denoiser(source: str | Path | Mapping[str, Tensor]) -> ConvChain:
    """A kernel denoiser, ready to run (no gradients), on the CPU.

    Args:
        source: `"kernel"`, the bundled one; a file: our `.safetensors`, or a published `.pth`; or a state dict with
            the keys of `FDnCNN`, with or without biases.

    Raises:
        FileNotFoundError: if there is no such file or bundled name.
        ValueError: if the weights are not those of a kernel denoiser.
    """
    if isinstance(source, Mapping):
        return _from_state_dict(dict(source), {})
    if str(source) in BUNDLED:
        with resources.as_file(resources.files("fastem") / "weights" / BUNDLED[str(source)]) as path:
            return _from_state_dict(*_read(path))
    if not Path(source).is_file():
        raise FileNotFoundError(f"no kernel denoiser {str(source)!r}: give {', '.join(map(repr, BUNDLED))} or a weights file")
    return _from_state_dict(*_read(Path(source)))


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    return torch.load(path, map_location="cpu", weights_only=True), {}


def _from_state_dict(state: dict[str, Tensor], metadata: dict) -> ConvChain:
    config = json.loads(metadata["config"]) if metadata.get("format") == FORMAT else {}
    model = _build(state, config)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def _build(state: dict[str, Tensor], config: dict) -> ConvChain:
    """The network whose keys and shapes these are."""
    if config:
        return KernelDenoiser(KernelDenoiserConfig(**config))
    num_layers = sum(key.endswith(".weight") for key in state)
    width = state["model.0.weight"].shape[0]
    if "model.0.bias" in state:
        return FDnCNN(width, num_layers)
    return KernelDenoiser(KernelDenoiserConfig(width, num_layers))


def save_kernel_denoiser(model: KernelDenoiser, path: str | Path) -> None:
    """Writes the weights, with what it takes to rebuild the network, as safetensors."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, path, metadata={"format": FORMAT, "config": json.dumps(model.config.to_dict())})
