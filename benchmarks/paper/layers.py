"""Holds what the paper compares TrAct with at the first layer: norms of patches, and whitening."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_tract import find_first_layers

# airbench's.
WHITENING_EPS = 5e-4


def first_layer(model: nn.Module) -> str:
    """Return the name of the layer that TrAct would take."""
    (layer,) = find_first_layers(model)
    return layer.name


def patches_of(x: Tensor, patch: int) -> Tensor:
    """Return the patches of images (B, C, H, W), side by side, as (B, H / patch, W / patch, n)."""
    return F.pixel_unshuffle(x, patch).movedim(1, -1)


class Behind(nn.Module):
    """Runs a layer behind something else; it has the layer's weight, whose dtype models ask for."""

    def __init__(self, before: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.before = before
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        """Return the layer's weight."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, C, H / patch, W / patch)."""
        result: Tensor = self.layer(self.before(x))
        return result


class OnPatches(nn.Module):
    """Applies `inner` to each patch of an image, as (..., n) in the order of `weight.flatten(1)`; returns an image."""

    def __init__(self, patch: int, inner: nn.Module) -> None:
        super().__init__()
        self.patch = patch
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to images of that shape."""
        return F.pixel_shuffle(self.inner(patches_of(x, self.patch)).movedim(-1, 1), self.patch)


class BetweenNorms(nn.Module):
    """Runs a layer of patches between two norms with parameters, as a linear layer of the patches' numbers."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.patch = layer.kernel_size[0]
        n = layer.weight[0].numel()
        self.before = nn.LayerNorm(n)
        self.layer = nn.Linear(n, layer.out_channels, bias=layer.bias is not None)
        self.after = nn.LayerNorm(layer.out_channels)
        with torch.no_grad():
            self.layer.weight.copy_(layer.weight.flatten(1))
            if layer.bias is not None:
                self.layer.bias.copy_(layer.bias)

    @property
    def weight(self) -> Tensor:
        """Return the layer's weight, whose dtype models ask for."""
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, C, H / patch, W / patch)."""
        normed: Tensor = self.after(self.layer(self.before(patches_of(x, self.patch))))
        return normed.movedim(-1, 1)


class Whitening(nn.Module):
    """Maps patches by a frozen matrix, so that the given ones get uncorrelated and of variance 1, as in airbench."""

    matrix: Tensor

    def __init__(self, patches: Tensor, eps: float = WHITENING_EPS) -> None:
        """Take the map from the eigenvectors of the second moment of `patches` (b, n)."""
        super().__init__()
        patches = patches.double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        self.register_buffer("matrix", (vectors / (values + eps).sqrt()).float())

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches (..., n) to whitened ones."""
        return patches @ self.matrix


def patch_norm(layer: nn.Conv2d) -> nn.Module:
    """Return the layer behind a norm of each patch, without parameters."""
    norm = nn.LayerNorm(layer.weight[0].numel(), elementwise_affine=False)
    return Behind(OnPatches(layer.kernel_size[0], norm), layer)


def dual_patch_norm(layer: nn.Conv2d) -> nn.Module:
    """Return the layer between two norms with parameters."""
    return BetweenNorms(layer)


def whitened_coordinates(layer: nn.Conv2d, patches: Tensor, eps: float) -> nn.Module:
    """Return the layer in whitened coordinates; it computes what it computed before.

    With D the second moment of these patches (b, n) plus `eps`, and U its eigenvectors, the layer's weight is now
    V (D^-1/2 U)^T, and V is what is trained: its gradient is that of the weight, times D^-1/2 U.
    """
    whitening = Whitening(patches, eps)
    back = torch.linalg.inv(whitening.matrix.double())
    with torch.no_grad():
        rows = layer.weight.flatten(1).double() @ back.T
        layer.weight.copy_(rows.view_as(layer.weight))
    return Behind(OnPatches(layer.kernel_size[0], whitening), layer)


def whitening_stem(layer: nn.Conv2d, patches: Tensor, eps: float) -> nn.Module:
    """Return the layer behind a frozen map that whitens these patches (b, n), damped by `eps`."""
    return Behind(OnPatches(layer.kernel_size[0], Whitening(patches, eps)), layer)
