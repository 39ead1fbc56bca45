"""Denoisers of blur kernels: the proximal step of Eq. (25).

Both networks are plain chains of 3x3 convolutions with ReLU between, on two planes (kernel, constant noise level), so
that the M-step loop can run them fused (`ops.hqs_chain`). `KernelDenoiser` has no biases: it is homogeneous,
`D(c k, c sigma) = c D(k, sigma)` for c > 0, and what it learnt at one kernel size and scale holds at others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastem.models.checkpoints import CheckpointError, check_tensors, load_strict, read_named, save_safetensors

FORMAT = "fastem-kernel-1"  # value of "format" in the metadata

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
        biases = [None if conv.bias is None else conv.bias.detach() for conv in convs]
        return [conv.weight.detach() for conv in convs], biases, self.scale

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


def load_kernel_denoiser(source: str | Path | Mapping[str, Tensor], device: torch.device | str = "cpu") -> ConvChain:
    """A kernel denoiser, frozen, in eval mode.

    Args:
        source: `"kernel"`, the bundled one; a `.safetensors`, `.pt` or `.pth` file, ours or a published one; or a state
            dict with the keys of `FDnCNN`, with biases or without.

    Raises:
        CheckpointError: no such file or name, or the weights are not those of a kernel denoiser.
    """
    if isinstance(source, Mapping):
        check_tensors(source, own_storage=False)
        state_dict, config = source, None
    else:
        state_dict, metadata, _ = read_named(source, (FORMAT,))
        config = metadata.get("config") if metadata.get("format") == FORMAT else None
    return load_strict(_build(state_dict, config), state_dict).to(device)


def _build(state_dict: Mapping[str, Tensor], config: dict | None) -> ConvChain:
    """The network that has these keys and shapes; `load_strict` compares them one by one."""
    try:
        if config is not None:
            return KernelDenoiser(KernelDenoiserConfig(**config))
        width = state_dict["model.0.weight"].shape[0]
        num_layers = sum(name.endswith(".weight") for name in state_dict)
        if "model.0.bias" in state_dict:
            return FDnCNN(width, num_layers)
        return KernelDenoiser(KernelDenoiserConfig(width, num_layers))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        first = next(iter(state_dict))
        raise CheckpointError(
            "not a kernel denoiser: it has 3x3 convolutions model.0.weight, model.2.weight, ..., got "
            f"{str(first)[:80]!r}, ..."
        ) from error


def save_kernel_denoiser(path: str | Path, model: KernelDenoiser, card: dict | str) -> None:
    """Writes the weights for `load_kernel_denoiser`; `card` says data, licence, recipe and measured quality."""
    save_safetensors(path, model.state_dict(), format=FORMAT, config=model.config.to_dict(), card=card)
