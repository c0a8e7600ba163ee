"""Units as what a gradient can be taken of: a number each, or for a head the vector z that it writes from."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_modules.bases import HeadSite
from tl_modules.sites import Activation, Site

Components = Float[Tensor, "batch pos unit component"]


def components(site: Site, activation: Activation) -> Components:
    """The units' values, with an axis of length 1; the z of each head."""
    if isinstance(site, HeadSite):
        return activation.reshape(*activation.shape[:2], site.n_units, -1)
    return site.values(activation)[..., None]


def component_gradients(
    site: Site, values: Components, output: Activation, gradient: Activation
) -> Components:
    """The gradient with respect to the components, from that with respect to the activation they act on.

    Args:
        site: whose units.
        values: their components.
        output: the activation at `site.write_name`.
        gradient: of the target, there.
    """
    if isinstance(site, HeadSite):
        return gradient.reshape(values.shape)
    now = values[..., 0].detach()
    with torch.enable_grad():
        new = now.clone().requires_grad_()
        (found,) = torch.autograd.grad(site.edited(output.detach(), now, new), new, gradient)
    return found[..., None]
