"""Contains `VitTrunk`, timm's vision transformers as a trunk: tokens for training, keys and CLS attention for discovery."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.config import config
from workloads.errors import ConfigError

VitName = Literal["vit_tiny", "vit_small", "vit_small_dino"]

_TIMM_NAMES: dict[VitName, str] = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_small_dino": "vit_small_patch16_224.dino",
}
_PREFIXES = ("module.", "backbone.", "trunk.", "body.")  # that wrappers add to timm's names
_HEADS = ("head.", "fc_norm.", "pre_logits.")


@config
class VitConfig:
    """Architecture and weights of a vision transformer."""

    name: VitName = "vit_tiny"
    """Architecture of timm; vit_small_dino is vit_small in the form of DINO's weights."""
    weights: str = "none"
    """none: random; timm: downloaded by timm; otherwise the path of a .safetensors or PyTorch file, such as DINO's."""
    patch_size: Annotated[int, Field(ge=2)] = 16
    """Side of a patch, pixels."""
    depth: Annotated[int, Field(ge=2)] = 12
    """Number of blocks; public weights exist for 12 only."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Output of a transformer after its final norm; D is the embedding width, p the patch size in pixels."""

    cls: Tensor  # (B, D)
    patches: Tensor  # (B, D, h/p, w/p)


@dataclass(frozen=True, slots=True)
class LastAttention:
    """Keys and CLS attention of the last block; N = grid_hw[0] · grid_hw[1] patches in row-major order, without CLS."""

    keys: Tensor  # (B, N, D): all heads concatenated, as in DINO's and LOST's code
    cls_attention: Tensor  # (B, heads, N): weights from CLS to each patch; a row sums to 1 minus CLS's own
    grid_hw: tuple[int, int]


class VitTrunk(nn.Module):
    """A timm VisionTransformer without its classifier, for images of any size that is a multiple of the patch.

    Its `body` keeps timm's parameter names, so that its state dict loads into a plain timm model. Positions are resampled
    to the image's grid by timm (bicubic, antialiased); DINO's own code resamples without antialiasing.
    """

    body: Any  # timm's VisionTransformer, which mypy sees without types

    def __init__(self, settings: VitConfig) -> None:
        import timm

        super().__init__()
        options: dict[str, Any] = {"patch_size": settings.patch_size, "depth": settings.depth}
        from_timm = settings.weights == "timm"
        if from_timm and options != {"patch_size": 16, "depth": 12}:
            raise ConfigError("weights: timm has weights for patch_size=16 and depth=12 only")
        try:
            self.body = timm.create_model(
                _TIMM_NAMES[settings.name], pretrained=from_timm, num_classes=0, dynamic_img_size=True, **options
            )
        except Exception as error:
            if not from_timm:
                raise
            # What a refused network raises depends on the HTTP client that timm's hub happens to use.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(
                f"weights: timm could not download {_TIMM_NAMES[settings.name]} ({reason}); give a local file instead"
            ) from None
        self.patch_size = settings.patch_size
        self.channels = int(self.body.embed_dim)
        if settings.weights not in ("none", "timm"):
            load_vit_weights(self, settings.weights)

    def forward(self, images: Tensor) -> Tokens:
        """(B, 3, h, w), normalised with ImageNet's statistics, to its tokens; h and w are multiples of the patch."""
        tokens = self.body.forward_features(images)
        return Tokens(cls=tokens[:, 0], patches=tokens[:, 1:].mT.unflatten(2, self._grid_hw(images)))

    @property
    def num_features(self) -> int:
        """Channels of `pooled`."""
        return self.channels

    def pooled(self, images: Tensor) -> Tensor:
        """One vector an image, (B, num_features): the CLS token."""
        return self(images).cls

    def last_attention(self, images: Tensor) -> LastAttention:
        """(B, 3, h, w), normalised as for `forward`, to the last block's keys and CLS attention.

        Queries and keys are linear maps of the block's normalised input, with bias; the rest of the block is not computed.
        """
        block = self.body.blocks[-1]
        x = block.norm1(self._before_last_block(images))
        d, heads = self.channels, block.attn.num_heads
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        keys = F.linear(x, weight[d : 2 * d], bias[d : 2 * d])
        query = F.linear(x[:, :1], weight[:d], bias[:d])
        by_head = keys.unflatten(2, (heads, -1)).transpose(1, 2)
        scores = query.unflatten(2, (heads, -1)).transpose(1, 2) @ by_head.mT
        attention = (scores.float() / math.sqrt(d // heads)).softmax(-1)
        return LastAttention(keys=keys[:, 1:], cls_attention=attention[:, :, 0, 1:], grid_hw=self._grid_hw(images))

    def _grid_hw(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def _before_last_block(self, images: Tensor) -> Tensor:
        """The input of the last block, (B, 1 + N, D), CLS first."""
        ((patches, prefix),) = self.body.forward_intermediates(
            images,
            indices=[len(self.body.blocks) - 2],
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return torch.cat([prefix, patches], dim=1)


def load_vit_weights(trunk: VitTrunk, path: str | Path) -> None:
    """Load a file of tensors into `trunk`; nothing in the file is executed.

    Names are timm's, which are DINO's too, below `teacher`, `state_dict` or `model` and behind the prefixes of wrappers
    where there are any; a classifier is left out.

    Raises:
        ConfigError: no such file, one that holds other things than tensors, or weights of another model.
    """
    state = _named_as_timm(_read_tensors(Path(path)))
    try:
        trunk.body.load_state_dict(state)
    except RuntimeError as error:  # torch lists the names on lines of their own
        differences = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ConfigError(f"weights: {path} holds another model ({differences[:300]})") from None


def _read_tensors(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigError(f"weights: there is no file {path}; give none, timm, or the path of a file of weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # DINO's full checkpoints hold their command line beside the weights, which is plain values in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever an unpickler of foreign bytes raises
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"weights: {path} is not a file of tensors alone ({reason}); save its state dict") from None
    if not isinstance(found, Mapping):
        raise ConfigError(f"weights: {path} holds a {type(found).__name__}, not a state dict")
    return found


def _named_as_timm(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for wrapper in ("teacher", "state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            return _named_as_timm(state[wrapper])
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        if isinstance(value, Tensor) and not name.startswith(_HEADS):
            named[name] = value
    return named
